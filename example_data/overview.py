"""Sum up `make demo`: one table of all runs and one picture of the test images.

    python example_data/overview.py --demo_dir demo

Prints run, AUC of each fold, out-of-fold AUC with its 95 % interval, AUC on the labelled example
test set, seconds of training, and how well the pattern of the lesion is told (three classes); draws
demo/overview.png (image with box, attention, crop, predictions).
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
import util
from localize import Box, upsample
from plumbing.arrays import array_path, open_array
from plumbing.data import CORNERS, read_data, read_table
from plumbing.figures import draw_row, new_figure, save_figure
from plumbing.images import read_image
from plumbing.runs import Run, read_run
from scores import auc
from util import ID, TARGET

PER_CLASS = 4
HERE = Path(__file__).parent


def test_auc(run: Run, labels: pd.Series) -> float:
    """AUC of a run's submission on the example test set."""
    submission = read_table(run.path / "submission.csv", [TARGET])
    return auc(labels[submission[ID]].to_numpy(), submission[TARGET].to_numpy())


def print_table(runs: list[Run], labels: pd.Series) -> None:
    """One line per run."""
    print(f"\n{'run':<10} {'AUC of folds':<20} {'out-of-fold AUC':<22} {'test AUC':<9} seconds")
    for run in runs:
        metrics = run.metrics
        folds = " ".join(f"{fold['auc']:.3f}" for fold in metrics["folds"])
        low, high = metrics["ranked"]["auc_interval"]
        seconds = sum(fold.get("seconds", 0) for fold in metrics["folds"])
        print(f"{run.name:<10} {folds:<20} {metrics['ranked']['auc']:.3f} [{low:.3f}, {high:.3f}]"
              f"   {test_auc(run, labels):<9.3f} {seconds:.0f}")  # fmt: skip


def print_patterns(run: Run, labels: pd.Series) -> None:
    """A line about three classes, the pattern of the lesion, from crops of the saliency."""
    pooled = run.metrics["pooled"]
    words = read_table(run.path / "submission.csv", [TARGET]).set_index(ID)[TARGET]
    print(f"\npattern of the lesion ({', '.join(run.task.names)}): out-of-fold AUC {pooled['auc']:.3f}, accuracy "
          f"{pooled['accuracy']:.3f} (commonest class {pooled['accuracy_of_baseline']:.3f}), test accuracy "
          f"{(words == labels[words.index]).mean():.3f}")  # fmt: skip


def draw_overview(path: Path, demo_dir: Path, runs: list[Run], labels: pd.Series) -> None:
    """Picture of some test images of both classes."""
    data = read_data(demo_dir / "data")
    crop_dir = demo_dir / "data" / "crops" / "chipnet"
    boxes = read_table(crop_dir / "test_boxes.csv").set_index(ID)
    maps = np.load(crop_dir / "test_attention.npy", allow_pickle=False)
    crops = open_array(array_path(crop_dir, "test", data.size), len(data.test))
    scores = {run.name: read_table(run.path / "submission.csv").set_index(ID)[TARGET] for run in runs}
    target = labels[data.test[ID]].to_numpy()
    rows = np.concatenate([np.flatnonzero(target == label)[:PER_CLASS] for label in (1, 0)])
    figure = new_figure(figsize=(9.5, 1.75 * len(rows)))
    for axes, row in zip(figure.subplots(len(rows), 4, squeeze=False), rows, strict=True):
        name, width, height = data.test[[ID, "width", "height"]].iloc[row]
        image = np.asarray(read_image(HERE / "images" / f"{name}.jpg", 300)[0])
        box = Box(*boxes.loc[name, CORNERS].astype(float))
        draw_row(axes[:3], image, (width, height), [box], upsample(maps[row]), crops[row], data.facts["frame"])
        axes[0].set_title(f"{name}: {'malignant' if target[row] else 'benign'}", fontsize=9)
        axes[1].set_title("attention", fontsize=9)
        axes[2].set_title(f"crop, {min(width, height) / box.side:.1f}x finer", fontsize=9)
        values = [scores[run.name][name] for run in runs]
        axes[3].barh([run.name for run in runs], values, color="C1")
        axes[3].set(xlim=(0, 1))
        axes[3].invert_yaxis()
        axes[3].set_title("prediction", fontsize=9)
    save_figure(path, figure)


def main(args) -> Path:
    """Print the table and draw the picture; returns the picture's path."""
    names = ["resnet", "chipnet", "cropnet", "fsg_vit", "ensemble"]
    runs = [read_run(args.demo_dir / "runs" / name) for name in names]
    answers = read_table(HERE / "test_labels.csv", [TARGET, "pattern"]).set_index(ID)
    labels = answers[TARGET]
    picture = args.demo_dir / "overview.png"
    draw_overview(picture, args.demo_dir, runs, labels)
    print_table(runs, labels)
    print_patterns(read_run(args.demo_dir / "pattern" / "runs" / "cropnet"), answers["pattern"])
    print(f"\npicture: {picture}")
    return picture


def get_args_parser():
    """Command line of this script."""
    parser = util.new_parser(__doc__)
    parser.add_argument("--demo_dir", type=Path, default=Path("demo"), help="written by make demo")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
