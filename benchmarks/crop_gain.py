"""What the crop is worth: the same folds and recipe with and without it, over several seeds.

    python benchmarks/crop_gain.py DATA_DIR --crop_dir CROPS --train_flags='--epochs 3'

Trains what is missing in --runs_dir: full (resnet), crop (cropnet), fusion, with --oracle_dir (crops by mask boxes)
oracle, and with --large_dir (the same data with 1.4 times the side) large: as many pixels as whole and crop together.
Each once per seed. Prints the out-of-fold AUC (ranked inside folds) of each and of their blends (rank means, and means
whose weight for a fold maximises the AUC of the others), for all images and, where there are masks, for lesions below
20 % of the square, and their gain over the control, which is the mean of two full nets of different seeds. Blends are
averaged over all pairs of seeds. No patient data is used; nets on crops are told the side of their box, for a crop does
not show its own size.

Intervals are 95 %, by bootstrap over groups and over trainings: every sample also draws the seeds of each arm with
replacement, so that they are not conditional on the few trainings made. With three seeds that still is a little too
narrow, by a factor of sqrt(2/3) on the part of the trainings. The spread of a blend is over pairs that share
trainings, and so understates.
"""

import argparse
import shlex
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import lesions
import numpy as np
from tqdm import tqdm

import scores
import util
from plumbing.data import Data, read_data
from plumbing.runs import read_run
from util import BOX_SIDE, FOLD, ID, PROB, TARGET, InputError

ARMS = {"full": "resnet", "large": "resnet", "crop": "cropnet", "fusion": "fusion", "oracle": "cropnet"}
CONTROL = "full + full (control)"


def train(arm: str, seed: int, data: Data, args: argparse.Namespace) -> Path:
    """Train one arm with one seed unless that is done; returns its run directory."""
    run_dir = args.runs_dir / f"{arm}_seed{seed}"
    if not (run_dir / "metrics.json").exists() or len(read_run(run_dir).folds) < data.facts["n_folds"]:
        script = Path(__file__).resolve().parent.parent / "train.py"
        crop_dir = {"full": None, "large": None, "oracle": args.oracle_dir}.get(arm, args.crop_dir)
        data_dir = args.large_dir if arm == "large" else args.data_dir
        crops, meta = ([], []) if crop_dir is None else (["--crop_dir", crop_dir], [BOX_SIDE])
        words = [sys.executable, script, "--model", ARMS[arm], "--name", run_dir.name, "--seed", seed, "--data_dir",
                 data_dir, "--runs_dir", args.runs_dir, "--resume", *crops, "--meta_cols", *meta,
                 *args.train_flags]  # fmt: skip
        subprocess.run([str(word) for word in words], check=True)
    return run_dir


def ranks(run_dir: Path, data: Data) -> np.ndarray:
    """Out-of-fold ranks of a run in the order of the train table (N,)."""
    oof = read_run(run_dir).table("oof.csv").set_index(ID).loc[data.train[ID]]
    return scores.rank_in_fold(oof[[PROB]].to_numpy(), oof[FOLD].to_numpy())[:, 0]


def weighted(first: np.ndarray, second: np.ndarray, target: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Weighted mean of two scores (N,) as ranks inside folds; the weight for a fold is the best on the others."""
    blend = np.empty(len(first))
    for k in np.unique(fold):
        mixes = [weight * second + (1 - weight) * first for weight in np.linspace(0, 1, 11)]
        best = max(mixes, key=lambda mix: scores.auc(target[fold != k], mix[fold != k]))
        blend[fold == k] = best[fold == k]
    return scores.rank_in_fold(blend[:, None], fold)[:, 0]


def make_blends(found: dict[str, list[np.ndarray]], target=None, fold=None) -> dict[str, dict[tuple, np.ndarray]]:
    """What is compared, by name: {(arm, seed) of every member: sum of their scores (N,)}. found: scores by arm, one per
    seed. target and fold (N,): of learned weights, without which there are none."""
    nets = {arm: {(arm, seed): score for seed, score in enumerate(each)} for arm, each in found.items()}
    blends = {arm: {(net,): score for net, score in each.items()} for arm, each in nets.items()}
    blends[CONTROL] = {pair: sum(map(nets["full"].get, pair)) for pair in combinations(nets["full"], 2)}
    for arm in ("crop", "oracle", "fusion"):
        pairs = list(product(nets["full"].items(), nets.get(arm, {}).items()))
        if pairs:
            blends[f"full + {arm}"] = {(a, b): first + second for (a, first), (b, second) in pairs}
        if pairs and target is not None:
            blends[f"full + {arm}, learned weights"] = {
                (a, b): weighted(first, second, target, fold) for (a, first), (b, second) in pairs}  # fmt: skip
    return blends


def draw_trainings(nets: set[tuple], rng: np.random.Generator) -> dict[tuple, int]:
    """How often each training (arm, seed) is drawn, with replacement within its arm; of "full" at least two different
    ones, for the control is made of pairs."""
    drawn = {}
    for arm in sorted({arm for arm, _ in nets}):
        seeds = sorted(seed for name, seed in nets if name == arm)
        counts = np.zeros(0)
        while (counts > 0).sum() < (2 if arm == "full" else 1):
            counts = np.bincount(rng.integers(len(seeds), size=len(seeds)), minlength=len(seeds))
        drawn |= {(arm, seed): count for seed, count in zip(seeds, counts, strict=True)}
    return drawn


def compare(blends: dict, target: np.ndarray, group: np.ndarray) -> dict[str, tuple]:
    """(AUC, its spread over seeds, gain over the control, low, high) by name."""
    ranked = {name: [scores.Ranked(target, score) for score in each.values()] for name, each in blends.items()}
    nets = {net for each in blends.values() for members in each for net in members}
    rng, gains = np.random.default_rng(1), {name: [] for name in blends}
    for weight in tqdm(scores.bootstrap_weights(group), unit="sample"):
        drawn, sample = draw_trainings(nets, rng), {}
        for name, each in blends.items():
            times = [np.prod([drawn[net] for net in members]) for members in each]
            sample[name] = np.average([one.auc(weight) for one in ranked[name]], weights=times)
        for name in blends:
            gains[name].append(sample[name] - sample[CONTROL])
    point = {name: np.array([one.auc() for one in each]) for name, each in ranked.items()}
    return {
        name: (aucs.mean(), aucs.std(ddof=len(aucs) > 1), aucs.mean() - point[CONTROL].mean(),
               *scores.interval(gains[name]))
        for name, aucs in point.items()
    }  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Train, compare, print."""
    data = read_data(args.data_dir)
    if len(set(args.seeds)) < 2 or "full" not in args.arms:
        raise InputError("the control is a blend of two seeds of full; name at least two --seeds, and full in --arms")
    absent = {"oracle": args.oracle_dir is None, "large": args.large_dir is None}
    arms = [arm for arm in ARMS if arm in args.arms and not absent.get(arm)]
    found = {arm: [ranks(train(arm, seed, data, args), data) for seed in args.seeds] for arm in arms}
    target, group, fold = data.train[TARGET].to_numpy(), data.group.to_numpy(), data.train[FOLD].to_numpy()
    parts, mask_dir = {"all": np.ones(len(target), dtype=bool)}, lesions.find_mask_dir(data, args.mask_dir)
    if mask_dir.is_dir():
        parts["small"] = lesions.shares(data.train, mask_dir) < lesions.SMALL
    for name, rows in parts.items():
        print(f"\n{name}: {rows.sum()} images, {target[rows].sum()} positive, {len(args.seeds)} seeds, "
              f"{data.facts['n_folds']} folds, {data.size} px\n")  # fmt: skip
        print("| | AUC | sd over seeds | against full + full |\n|---|---|---|---|")
        chosen = {arm: [score[rows] for score in each] for arm, each in found.items()}
        blends = make_blends(chosen, target[rows], fold[rows])
        for arm, (auc, spread, gain, low, high) in compare(blends, target[rows], group[rows]).items():
            print(f"| {arm} | {auc:.3f} | {spread:.3f} | {gain:+.3f} [{low:+.3f}, {high:+.3f}] |")


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    add = parser.add_argument
    add("data_dir", type=Path, help="from preprocess.py, with masks beside")
    add("--crop_dir", type=Path, required=True, help="crops to judge")
    add("--oracle_dir", type=Path, help="crops by mask boxes: the ceiling")
    add("--large_dir", type=Path, help="the same data, larger: the control of equal cost")
    add("--mask_dir", type=Path, help="NAME.png by image [masks/ by the images]")
    add("--runs_dir", type=Path, default=Path("runs/crop_gain"), help="of the arms")
    add("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="full, the control, must be one")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least two")
    add("--train_flags", type=shlex.split, default=[], help="for train.py, as one word: --train_flags='--epochs 3'")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
