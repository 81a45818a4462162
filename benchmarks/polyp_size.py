"""The grid of the gates' paper: polyp size by crop, place and depth, with and without gates, all else alike.

    python benchmarks/polyp_size.py polyps256 --crop_flags='--backbone timm:tf_efficientnet_lite0 --weights lite0.pth'
    python benchmarks/polyp_size.py real_colon --target size_mm --folds 6 --size 384 --epochs 40 --depth_dir depth

DATA is a folder that prepare.py wrote (train.csv with lesion_id, boxes.csv, images), or Kvasir-SEG and CVC-ClinicDB
with a labels.csv and a boxes.csv. The latter know no millimetres: their size is the diameter of a circle with the
mask's area in percent of the frame, its classes are those of 5 and 15 % of the area, the lesion is the sequence (CVC)
or the image (Kvasir), and boxes are those around the masks. Without --depth_dir depth is a shape from shading: a light
at the camera makes what is near bright, so depth is 1 / sqrt(brightness) of the blurred picture.

Networks see the crop (the box enlarged by half its side on each side), the frame with all but the box hidden, and
the depth of the crop. Plain and gated networks of a row share every setting; gates are the published ones (on the
outputs of stages and on the fused and the hidden vector, on residual branches of the ViT; they start at sigmoid(Xavier)
and step before the weights, --routing sequential). The last rows take boxes from crop.py's own maps instead of given
ones, and look at the whole frame alone.

Folds keep lesions whole. Thresholds on predictions are learned from the other folds. Intervals are 95 % by bootstrap
over lesions and seeds.
"""

import argparse
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import scores
import util
from plumbing.data import Data, read_data
from plumbing.files import read_csv, write_table
from plumbing.images import ImageIndex, read_image
from plumbing.runs import read_run
from tasks import by_case
from util import FOLD, ID

ROOT = Path(__file__).resolve().parents[1]
AREAS = (0.05, 0.15)  # shares of the frame at which the classes of polyps256 begin
RECIPE = "--schedule cosine --patience 100 --batch_size 32 --augment square --sampler shuffle --dropout 0.2 --hidden 64"
PUBLISHED = "--gate_init paper --routing sequential"
MARGIN = 0.5
# name -> (its streams, whether its backbone is the ViT, the crops it looks at)
ROWS = {
    "rgb": (["rgb"], False, "boxes"),
    "depth": (["depth"], False, "boxes"),
    "location": (["location"], False, "boxes"),
    "rgb + depth": (["rgb", "depth"], False, "boxes"),
    "location + depth": (["location", "depth"], False, "boxes"),
    "ViT, rgb": (["rgb"], True, "boxes"),
    "rgb + location": (["rgb", "location"], False, "boxes"),
    "rgb + location, own maps": (["rgb", "location"], False, "saliency"),
    "whole frame": ([], False, None),
}
PLAIN_ONLY = ("rgb + location", "rgb + location, own maps", "whole frame")  # beyond the paper's twelve


def script(name: str, *words) -> None:
    """Run a script of the project, without its bars."""
    run = subprocess.run([sys.executable, str(ROOT / name), *map(str, words)], capture_output=True, text=True)
    if run.returncode:
        raise util.InputError(f"{name} {' '.join(map(str, words))}: {run.stderr.strip().splitlines()[-1:]}")


# ---------------------------------------------------------------- data
def read_polyps(folder: Path, output: Path) -> tuple[Path, list[float]]:
    """Tables of polyps256 in the columns of prepare.py; returns the folder of the images and the cuts."""
    table = read_csv(folder / "labels.csv", text=(ID, "group"))
    boxes = read_csv(folder / "boxes.csv", text=(ID,)).groupby(ID)
    edges = pd.concat([boxes[["xmin", "ymin"]].min(), boxes[["xmax", "ymax"]].max()], axis=1).reindex(table[ID])
    scale = table[["width", "height", "width", "height"]].to_numpy()
    corners = np.nan_to_num(edges.to_numpy(), nan=0) * scale
    corners[edges.isna().any(axis=1)] = np.nan  # no box: the whole frame
    write_table(output / "boxes.csv", pd.DataFrame(corners, columns=["x0", "y0", "x1", "y1"]).assign(**{ID: table[ID]}))
    table["size"] = 100 * table["rel_diameter"]
    write_table(output / "train.csv", table[[ID, "group", "size"]].rename(columns={"group": "lesion_id"}))
    return folder / "images", [round(200 * (area / np.pi) ** 0.5, 2) for area in AREAS]


def shade(paths: list[Path], names: list[str], output: Path, side: int = 128) -> None:
    """Write a depth map of every image from its shading: 16-bit PNG, `side` pixels wide."""
    for path, name in zip(tqdm(paths, desc="shading", unit="image"), names, strict=True):
        target = (output / name).with_suffix(".png")
        if not target.exists():
            grey = np.asarray(read_image(path, side)[0].convert("L").resize((side, side)), np.float32)
            depth = 1 / np.sqrt(cv2.GaussianBlur(grey, (0, 0), side / 64) + 8)  # 8: highlights and black corners
            target.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(target), np.rint(65535 * depth / depth.max()).astype(np.uint16))


def prepare(args: argparse.Namespace) -> Data:
    """Arrays, depth maps and crops, made unless they are there."""
    output = args.output
    data_dir = output / "data"
    if not (data_dir / "preprocess.json").exists():
        output.mkdir(parents=True, exist_ok=True)
        tables, images, target, cuts = args.data, args.data / "images", args.target, args.cut
        if not (args.data / "train.csv").exists():
            tables, target = output, "size"
            images, cuts = read_polyps(args.data, output)
        script("preprocess.py", "--train_csv", tables / "train.csv", "--image_dir", images, "--output_dir", data_dir,
               "--target_col", target, "--cut", *cuts, "--group_col", "lesion_id", "--n_folds", args.folds,
               "--frame", "whole", "--size", args.size)  # fmt: skip
    data = read_data(data_dir)
    depth = args.depth_dir or output / "depth"
    if args.depth_dir is None:
        index = ImageIndex(*map(Path, data.facts["image_dirs"]["train"]))
        shade(index.find_all(data.train[ID].tolist()), data.train[ID].tolist(), depth)
    boxes = next(path for path in (output / "boxes.csv", args.data / "boxes.csv") if path.exists())
    more = ["--data_dir", data_dir, "--margin", MARGIN, "--depth_dir", depth, "--device", "cpu"]
    for name, words in {"boxes": ["--boxes", boxes], "saliency": args.crop_flags}.items():
        if not (data_dir / "crops" / name / "crop.json").exists():
            script("crop.py", "--source", name, *words, *more)
    return data


# ---------------------------------------------------------------- the grid
def train(name: str, gated: bool, seed: int, args: argparse.Namespace) -> Path:
    """A run of a row, trained unless it is there."""
    streams, vit, crops = ROWS[name]
    folder = args.output / "runs" / f"{name.replace(' ', '_').replace(',', '')}{'_gates' * gated}_{seed}"
    backbone, weights = (args.vit, args.vit_weights) if vit else (args.backbone, args.weights)
    words = ["--model", "streams", "--streams", *streams] if streams else ["--model", "resnet"]
    words += ["--crop_dir", args.output / "data" / "crops" / crops] if crops else []
    words += ["--gates", "branches" if vit else "stages", *shlex.split(PUBLISHED), "--gate_lr", 1.5 * args.lr] * gated
    script("train.py", *words, "--data_dir", args.output / "data", "--runs_dir", folder.parent, "--name", folder.name,
           "--backbone", backbone, "--weights", weights, "--lr", args.lr, "--head_lr", args.head_lr,
           "--epochs", args.epochs, "--seed", seed, "--loss", "weighted", "--pos_weight", 1, 3, 5, "--meta_cols",
           "--workers", 0, "--tta", 4, "--resume", *shlex.split(RECIPE), *args.train_flags)  # fmt: skip
    return folder


class Row:
    """Held-out predictions of a row over seeds, of images or of lesions, and their scores."""

    def __init__(self, runs: list[Path], data: Data, cases: bool):
        self.cuts, self.seeds = data.task.cuts, []
        for run in runs:
            oof = read_run(run).table("oof.csv")
            oof = by_case(data.task, oof, data.case) if cases and data.case is not None else oof
            target, value = oof["target"].to_numpy(float), oof["pred"].to_numpy(float)
            taken = scores.decide_bands(self.cuts, target, value, oof[FOLD].to_numpy())[0]
            self.seeds.append((scores.bands_of(target, self.cuts), taken, np.abs(target - value)))
        self.group = data.group[oof[ID]].to_numpy()

    def score(self, seed: int, weight=None, cut: int | None = None) -> dict:
        """Scores of one seed, with weights of rows, and the mean absolute error; cut: of two classes at that one."""
        true, taken, error = self.seeds[seed]
        classes = len(self.cuts) + 1
        if cut is not None:
            true, taken, classes = 1 * (true > cut), 1 * (taken > cut), 2
        found = scores.of_confusion(scores.confusion(true, taken, classes, weight))
        return found | {"mae": np.average(error, weights=weight)}

    def mean(self, key: str, cut: int | None = None) -> float:
        """Mean of a score over seeds."""
        return float(np.mean([self.score(seed, None, cut)[key] for seed in range(len(self.seeds))]))

    def drawn(self, key: str) -> np.ndarray:
        """Mean scores of bootstrap samples of lesions and seeds; rows of the same grid draw the same."""
        rng = np.random.default_rng(1)
        picks = ((weight, rng.integers(len(self.seeds), size=len(self.seeds)))
                 for weight in scores.bootstrap_weights(self.group))  # fmt: skip
        return np.array([np.mean([self.score(seed, weight)[key] for seed in seeds]) for weight, seeds in picks])


def line_of(name: str, rows: dict, plain: tuple) -> str:
    """A line of the table: scores of images, macro F1 of lesions, and what gates add; rows: by "images", "lesions"."""
    images, lesions = rows["images"], rows["lesions"]
    low, high = scores.interval(images.drawn("f1").tolist())
    words = [f"{images.mean('f1'):.3f} [{low:.3f}, {high:.3f}]", *(f"{images.mean(key):.3f}" for key in
             ("f1_weighted", "balanced_accuracy")), f"{images.mean('f1', len(images.cuts) - 1):.3f}",
             f"{images.mean('mae'):.2f}", f"{lesions.mean('f1'):.3f}"]  # fmt: skip
    gain = ""
    if plain:
        low, high = scores.interval((images.drawn("f1") - plain[0]["images"].drawn("f1")).tolist())
        gain = f"{images.mean('f1') - plain[0]['images'].mean('f1'):+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"| {name} | {' | '.join(words)} | {gain} |"


def constant_line(row: Row, data: Data) -> str:
    """The line of always predicting the median, which lies in one class."""
    true, target = row.seeds[0][0], data.target[:, 0]
    counts = np.bincount(true, minlength=len(row.cuts) + 1)
    found = scores.of_confusion(scores.confusion(true, np.full_like(true, counts.argmax()), len(counts)))
    last = 1 * (true == len(row.cuts))
    two = scores.of_confusion(scores.confusion(last, np.full_like(last, last.mean() > 0.5), 2))
    words = [found["f1"], found["f1_weighted"], found["balanced_accuracy"], two["f1"]]
    return (f"| commonest class, median | {' | '.join(f'{word:.3f}' for word in words)} "
            f"| {np.abs(target - np.median(target)).mean():.2f} | | |")  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Prepare and train what is missing; print the table."""
    data, found = prepare(args), {}
    jobs = [(name, gated, seed) for seed in args.seeds for name in args.only
            for gated in (False, True) if not (gated and name in PLAIN_ONLY)]  # fmt: skip
    with ThreadPoolExecutor(args.jobs) as pool:  # side by side: set OMP_NUM_THREADS to a share of the cores
        runs = dict(zip(jobs, tqdm(pool.map(lambda job: train(*job, args), jobs), total=len(jobs)), strict=True))
    lines = []
    for name in args.only:
        for gated in (False, True):
            own = [runs[name, gated, seed] for seed in args.seeds if (name, gated, seed) in runs]
            if own:
                rows = {what: Row(own, data, what == "lesions") for what in ("images", "lesions")}
                plain = (found[name, False],) if gated else ()
                found[name, gated] = rows
                lines.append(line_of(f"{name}, gates" if gated else name, rows, plain))
    first = next(iter(found.values()))["images"]
    counts = ", ".join(f"{n} {name}" for name, n in data.task.counts(data.target)["counts"].items())
    print(f"\n{len(data.train)} images ({counts}) of {data.group.nunique()} lesions, {args.size} px, {args.backbone}, "
          f"{args.vit}, {data.facts['n_folds']} folds, seeds {args.seeds}\n")  # fmt: skip
    print("| sees | macro F1 [95 %] | weighted F1 | balanced accuracy | macro F1, last cut | MAE | macro F1 of lesions "
          "| gates: macro F1 [95 %] |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|", constant_line(first, data), *lines, sep="\n")


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    add = parser.add_argument
    add("data", type=Path, help="from prepare.py, or polyps256")
    add("--output", type=Path, default=Path("runs/polyp_size"), help="arrays, crops, trainings")
    add("--target", default="size_mm", help="column of the size, of a folder of prepare.py")
    add("--cut", type=float, nargs="+", default=[5.0, 10.0], help="where its classes begin")
    add("--folds", type=int, default=3, help="6 in the paper")
    add("--size", type=util.COUNT, default=64, help="pixels; 384 in the paper")
    add("--depth_dir", type=Path, help="depth maps by image name [from shading]")
    add("--backbone", default="resnet18", help="of all rows but the ViT's")
    add("--weights", default="none", help="of it: none, imagenet or a file")
    add("--vit", default="timm:vit_tiny_patch16_224", help="backbone of the ViT's rows")
    add("--vit_weights", default="none", help="of it")
    add("--lr", type=util.POSITIVE, default=1e-3, help="of backbones")
    add("--head_lr", type=util.POSITIVE, default=1e-3, help="of heads")
    add("--epochs", type=util.COUNT, default=8, help="of each training")
    add("--seeds", type=int, nargs="+", default=[0], help="of the trainings")
    add("--only", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="rows of the table")
    add("--jobs", type=util.COUNT, default=1, help="trainings side by side")
    add("--crop_flags", type=shlex.split, default=[], help="for crop.py --source saliency, as one word")
    add("--train_flags", type=shlex.split, default=[], help="for train.py, as one word")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
