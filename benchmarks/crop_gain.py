"""What the crop is worth: the same folds and recipe with and without it, over several seeds.

    python benchmarks/crop_gain.py DATA_DIR --crop_dir CROPS --train_flags='--epochs 3'

Trains what is missing in --runs_dir: full (resnet), crop (cropnet), fusion, and with --oracle_dir
(crops by mask boxes) oracle, once per seed. Prints the out-of-fold AUC (ranked inside folds) of
each and of their blends, for all images and for lesions below 20 % of the square, and their gain
over the control, which is the mean of two full nets of different seeds. Blends are averaged over
all pairs of seeds; intervals are 95 %, by bootstrap over groups. "zoom" is ensemble.py zoom:
weights by the side of the box, cross-fitted; the others are rank means. No patient data is used;
nets on crops are told the side of their box, for a crop does not show its own size.
"""

import argparse
import shlex
import subprocess
import sys
from functools import partial
from itertools import combinations, product
from pathlib import Path

import lesions
import numpy as np
from tqdm import tqdm

import ensemble
import util
from util import FOLD, ID, PROB, TARGET

ARMS = {"full": "resnet", "crop": "cropnet", "fusion": "fusion", "oracle": "cropnet"}


def train(arm: str, seed: int, args: argparse.Namespace) -> Path:
    """Train one arm with one seed unless that is done; returns its run directory."""
    run_dir = args.runs_dir / f"{arm}_seed{seed}"
    n_folds = util.read_data(args.data_dir).facts["n_folds"]
    done = run_dir / "metrics.json"
    if not done.exists() or len(util.read_metrics(run_dir)["folds"]) < n_folds:
        script = Path(__file__).resolve().parent.parent / "train.py"
        crop_dir = {"full": None, "oracle": args.oracle_dir}.get(arm, args.crop_dir)
        crops, meta = ([], []) if crop_dir is None else (["--crop_dir", crop_dir], [util.BOX_SIDE])
        words = [sys.executable, script, "--model", ARMS[arm], "--name", run_dir.name, "--seed",
                 seed, "--data_dir", args.data_dir, "--runs_dir", args.runs_dir, "--resume",
                 *crops, "--meta_cols", *meta, *args.train_flags]  # fmt: skip
        subprocess.run([str(word) for word in words], check=True)
    return run_dir


def ranks(run_dir: Path, data: util.Data) -> np.ndarray:
    """Out-of-fold ranks of a run in the order of the train table (N,)."""
    oof = util.read_predictions(run_dir, "oof.csv", [ID, FOLD, TARGET, PROB]).set_index(ID)
    oof = oof.loc[data.train[ID]]
    return util.rank_in_fold(oof[PROB].to_numpy(), oof[FOLD].to_numpy())


def zoom_blend(pair: tuple, side: np.ndarray, target: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Cross-fitted zoom-aware blend of ranks on whole images and on crops (N,)."""
    values = np.column_stack(pair)
    learn = partial(ensemble.learn_zoom, values, target, side, np.array([False, True]))
    return util.rank_in_fold(ensemble.cross_fit(learn, values, fold), fold)


def make_blends(found: dict, args: argparse.Namespace, data: util.Data) -> dict:
    """Scores to compare, by name: for each a list of (N,), one per seed or pair of seeds."""
    target, fold = data.train[TARGET].to_numpy(), data.train[FOLD].to_numpy()
    scores = dict(found)
    scores["full + full (control)"] = [sum(pair) for pair in combinations(found["full"], 2)]
    for arm, crop_dir in (("crop", args.crop_dir), ("oracle", args.oracle_dir)):
        if arm in found:
            side = util.with_box_side(data.train, crop_dir, "train")[util.BOX_SIDE].to_numpy()
            pairs = list(product(found["full"], found[arm]))
            scores[f"full + {arm}"] = [sum(pair) for pair in pairs]
            scores[f"full + {arm}, zoom"] = [zoom_blend(p, side, target, fold) for p in pairs]
    scores["full + fusion"] = [sum(pair) for pair in product(found["full"], found["fusion"])]
    return scores


def compare(scores: dict, target: np.ndarray, rows: np.ndarray, group: np.ndarray) -> dict:
    """(AUC, its spread over seeds, gain over the control, low, high) by name, on some rows."""

    def aucs(weight) -> dict[str, np.ndarray]:
        return {
            name: np.array([util.weighted_auc(target[rows], s[rows], weight) for s in each])
            for name, each in scores.items()
        }

    point, control = aucs(1.0), "full + full (control)"
    gains = {name: [] for name in scores}
    for weight in tqdm(util.bootstrap_weights(group[rows]), total=util.BOOTSTRAP_SAMPLES):
        sample = {name: values.mean() for name, values in aucs(weight).items()}
        for name in scores:
            gains[name].append(sample[name] - sample[control])
    return {
        name: (values.mean(), values.std(ddof=len(values) > 1),
               values.mean() - point[control].mean(), *np.quantile(gains[name], [0.025, 0.975]))
        for name, values in point.items()
    }  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Train, compare, print."""
    data = util.read_data(args.data_dir)
    arms = [arm for arm in ARMS if arm != "oracle" or args.oracle_dir]
    found = {arm: [ranks(train(arm, seed, args), data) for seed in args.seeds] for arm in arms}
    scores = make_blends(found, args, data)
    target, group = data.train[TARGET].to_numpy(), data.group.to_numpy()
    share = lesions.shares(data.train, lesions.find_mask_dir(data, args.mask_dir))
    subsets = {"all": np.ones(len(target), dtype=bool), "small": share < lesions.SMALL}
    for name, rows in subsets.items():
        print(
            f"\n{name}: {rows.sum()} images, {target[rows].sum()} positive, {len(args.seeds)} "
            f"seeds, {data.facts['n_folds']} folds, {data.size} px\n"
        )
        print("| | AUC | sd over seeds | against full + full |\n|---|---|---|---|")
        for arm, (auc, spread, gain, low, high) in compare(scores, target, rows, group).items():
            print(f"| {arm} | {auc:.3f} | {spread:.3f} | {gain:+.3f} [{low:+.3f}, {high:+.3f}] |")


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    parser.add_argument("data_dir", type=Path, help="from preprocess.py, with masks beside")
    parser.add_argument("--crop_dir", type=Path, required=True, help="crops to judge")
    parser.add_argument("--oracle_dir", type=Path, help="crops by mask boxes: the ceiling")
    parser.add_argument("--mask_dir", type=Path, help="NAME.png by image [masks/ by the images]")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/crop_gain"), help="of the arms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least two")
    parser.add_argument("--train_flags", type=shlex.split, default=[], help="for train.py, as one "
                        "word: --train_flags='--epochs 3'")  # fmt: skip
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
