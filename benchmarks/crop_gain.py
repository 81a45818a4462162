"""What the crop is worth: the same folds and recipe with and without it, over several seeds.

    python benchmarks/crop_gain.py DATA_DIR --crop_dir CROPS --train_flags='--epochs 3'

Trains what is missing in --runs_dir: full (resnet), crop (cropnet), fusion, and with --oracle_dir (crops by mask boxes)
oracle, once per seed. Prints the out-of-fold AUC (ranked inside folds) of each and of their blends (rank means), for
all images and for lesions below 20 % of the square, and their gain over the control, which is the mean of two full nets
of different seeds. Blends are averaged over all pairs of seeds. No patient data is used; nets on crops are told the
side of their box, for a crop does not show its own size.

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

ARMS = {"full": "resnet", "crop": "cropnet", "fusion": "fusion", "oracle": "cropnet"}
CONTROL = "full + full (control)"


def train(arm: str, seed: int, data: Data, args: argparse.Namespace) -> Path:
    """Train one arm with one seed unless that is done; returns its run directory."""
    run_dir = args.runs_dir / f"{arm}_seed{seed}"
    if not (run_dir / "metrics.json").exists() or len(read_run(run_dir).folds) < data.facts["n_folds"]:
        script = Path(__file__).resolve().parent.parent / "train.py"
        crop_dir = {"full": None, "oracle": args.oracle_dir}.get(arm, args.crop_dir)
        crops, meta = ([], []) if crop_dir is None else (["--crop_dir", crop_dir], [BOX_SIDE])
        words = [sys.executable, script, "--model", ARMS[arm], "--name", run_dir.name, "--seed", seed, "--data_dir",
                 args.data_dir, "--runs_dir", args.runs_dir, "--resume", *crops, "--meta_cols", *meta,
                 *args.train_flags]  # fmt: skip
        subprocess.run([str(word) for word in words], check=True)
    return run_dir


def ranks(run_dir: Path, data: Data) -> np.ndarray:
    """Out-of-fold ranks of a run in the order of the train table (N,)."""
    oof = read_run(run_dir).table("oof.csv").set_index(ID).loc[data.train[ID]]
    return scores.rank_in_fold(oof[[PROB]].to_numpy(), oof[FOLD].to_numpy())[:, 0]


def make_blends(found: dict[str, list[np.ndarray]]) -> dict[str, dict[tuple, np.ndarray]]:
    """What is compared, by name: {(arm, seed) of every member: sum of their scores (N,)}. found: scores by arm, one per
    seed."""
    nets = {arm: {(arm, seed): score for seed, score in enumerate(each)} for arm, each in found.items()}
    blends = {arm: {(net,): score for net, score in each.items()} for arm, each in nets.items()}
    blends[CONTROL] = {pair: sum(map(nets["full"].get, pair)) for pair in combinations(nets["full"], 2)}
    for arm in ("crop", "oracle", "fusion"):
        pairs = product(nets["full"].items(), nets.get(arm, {}).items())
        if arm in nets:
            blends[f"full + {arm}"] = {(a, b): first + second for (a, first), (b, second) in pairs}
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
    if len(set(args.seeds)) < 2:
        raise InputError("--seeds: the control is a blend of two seeds; name at least two")
    arms = [arm for arm in ARMS if arm != "oracle" or args.oracle_dir]
    found = {arm: [ranks(train(arm, seed, data, args), data) for seed in args.seeds] for arm in arms}
    target, group = data.train[TARGET].to_numpy(), data.group.to_numpy()
    share = lesions.shares(data.train, lesions.find_mask_dir(data, args.mask_dir))
    for name, rows in {"all": np.ones(len(target), dtype=bool), "small": share < lesions.SMALL}.items():
        print(f"\n{name}: {rows.sum()} images, {target[rows].sum()} positive, {len(args.seeds)} seeds, "
              f"{data.facts['n_folds']} folds, {data.size} px\n")  # fmt: skip
        print("| | AUC | sd over seeds | against full + full |\n|---|---|---|---|")
        blends = make_blends({arm: [score[rows] for score in each] for arm, each in found.items()})
        for arm, (auc, spread, gain, low, high) in compare(blends, target[rows], group[rows]).items():
            print(f"| {arm} | {auc:.3f} | {spread:.3f} | {gain:+.3f} [{low:+.3f}, {high:+.3f}] |")


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    add = parser.add_argument
    add("data_dir", type=Path, help="from preprocess.py, with masks beside")
    add("--crop_dir", type=Path, required=True, help="crops to judge")
    add("--oracle_dir", type=Path, help="crops by mask boxes: the ceiling")
    add("--mask_dir", type=Path, help="NAME.png by image [masks/ by the images]")
    add("--runs_dir", type=Path, default=Path("runs/crop_gain"), help="of the arms")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least two")
    add("--train_flags", type=shlex.split, default=[], help="for train.py, as one word: --train_flags='--epochs 3'")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
