"""Every kind of target on real images: fine-tuned networks beside frozen features and the best constant prediction.

    python benchmarks/targets.py DATA --weights lite0.pth
    python benchmarks/targets.py DATA --weights lite0.pth --only polyp_size blood_count --seeds 0

DATA has folders of images with a labels.csv: polyps256 (Kvasir-SEG with its official split, CVC-ClinicDB), bccd,
isic2018, and mnist with train.npz and test.npz. Prepares, trains and predicts what is missing in --output with the
scripts of this project, then prints a table row per target: the main score out of fold, and of the test images, by the
mean over the networks of the folds.

The frozen features are those of the same network with its ImageNet weights, of the same stored images, under a
logistic regression (of quantities: ridge). Features are standardised, and the strength of the penalty is chosen by
cross-validation inside the training folds. Fine-tuned is the mean of the scores of all seeds. The gain is fine-tuned
minus frozen, positive if fine-tuned is better; its interval is 95 % by bootstrap over groups and over seeds.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
import scores
import util
from plumbing.arrays import open_array
from plumbing.data import Data, groups_of, read_data
from plumbing.files import read_csv, write_table
from plumbing.runs import read_run
from tasks import Task, read_target
from util import FOLD, ID

ROOT = Path(__file__).resolve().parents[1]
BACKBONE = "timm:tf_efficientnet_lite0"
RECIPE = "--schedule cosine --patience 100 --batch_size 32 --lr 3e-4 --head_lr 1e-3 --dropout 0.3 --meta_cols"
MNIST = 5000, 2000  # images to train on, to test on
STRENGTHS = 10.0 ** np.arange(-5, 2)  # C of the logistic regression, 1 / alpha of ridge


# ---------------------------------------------------------------- the targets
def polyps(folder: Path, output: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Polyps: Kvasir's official split, and all of CVC to test on."""
    table = read_csv(folder / "labels.csv", text=(ID, "group"))
    table["size"] = table["size3"].map({"small": 0, "medium": 1, "large": 2})
    train = table["official_split"] == "train"
    return table[train], table[~train]


def blood(folder: Path, output: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Blood smears: the repository's split."""
    table = read_csv(folder / "labels.csv", text=(ID, "group"))
    table["platelets"] = table["has_Platelets"]
    table["platelets_2"] = (table["count_Platelets"] >= 2).astype(int)
    table["red_10"] = (table["count_RBC"] >= 10).astype(int)
    table["red_14"] = (table["count_RBC"] >= 14).astype(int)
    return table[table["split"] != "test"], table[table["split"] == "test"]


def digits(folder: Path, output: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The first images of MNIST, written as PNG files."""
    tables = []
    for split, count in zip(("train", "test"), MNIST, strict=True):
        with np.load(folder / f"{split}.npz", allow_pickle=False) as file:
            image, digit = file["x"][:count], file["y"][:count]
        names = [f"{split}_{i:05d}.png" for i in range(count)]
        for name, picture in zip(names, image, strict=True):
            cv2.imwrite(str(output / "images" / name), picture)
        tables.append(pd.DataFrame({ID: names, "digit": digit, "group": names}))
    return tables[0], tables[1]


def skin(folder: Path, output: Path) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Dermoscopy, all of it to train on."""
    return read_csv(folder / "labels.csv", text=(ID, "group")), None


@dataclass(frozen=True)
class Row:
    """A row of the table: where its images are, what is predicted, and how."""

    what: str
    folder: str
    tables: Callable  # (folder of the data, output) -> (train table, test table or None)
    target: list[str]
    preprocess: str
    train: str


ROWS = {
    "polyp_size": Row("polyp size, 3 classes in order", "polyps256", polyps, ["size"],
                      "--ordinal --size 128", "--augment square --epochs 12"),
    "polyp_diameter": Row("polyp diameter / frame", "polyps256", polyps, ["rel_diameter"],
                          "--size 128", "--augment square --epochs 12 --sampler shuffle"),
    "blood_count": Row("number of red cells", "bccd", blood, ["count_RBC"],
                       "--task regression --frame whole --size 160", "--augment square --epochs 20 --sampler shuffle"),
    "blood_labels": Row("platelets, 2 platelets, 10 and 14 red cells", "bccd", blood,
                        ["platelets", "platelets_2", "red_10", "red_14"],
                        "--frame whole --size 160", "--augment square --epochs 15 --sampler shuffle"),
    "digits": Row("digit", "mnist", digits, ["digit"], "--size 64", "--augment upright --epochs 4 --sampler shuffle"),
    "melanoma": Row("melanoma", "isic2018", skin, ["target"], "--size 128",
                    "--augment square --epochs 3 --sampler shuffle --tta 4"),
}  # fmt: skip


# ---------------------------------------------------------------- data, trainings, frozen features
def script(name: str, *words) -> None:
    """Run a script of the project."""
    subprocess.run([sys.executable, str(ROOT / name), *map(str, words)], check=True)


def prepare(name: str, args: argparse.Namespace) -> Data:
    """Tables and arrays of a row, made unless they are there."""
    row, output = ROWS[name], args.output / name
    if not (output / "data" / "preprocess.json").exists():
        folder = args.data / row.folder
        (output / "images").mkdir(parents=True, exist_ok=True)
        train, test = row.tables(folder, output)
        write_table(output / "train.csv", train)
        images = output / "images" if row.tables is digits else folder / "images"
        words = ["--train_csv", output / "train.csv", "--image_dir", images, "--output_dir", output / "data",
                 "--target_col", *row.target, "--group_col", "group", *shlex.split(row.preprocess)]  # fmt: skip
        if test is not None:
            write_table(output / "test.csv", test.drop(columns=row.target))
            write_table(output / "answers.csv", test)
            words += ["--test_csv", output / "test.csv", "--test_image_dir", images]
        script("preprocess.py", *words)
    return read_data(output / "data")


def fine_tuned(name: str, seed: int, data: Data, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Predictions (N, K) of a training, which is done unless it is there, by split."""
    runs_dir = args.output / name / "runs"
    script("train.py", "--model", "resnet", "--name", f"seed{seed}", "--seed", seed, "--data_dir", data.directory,
           "--runs_dir", runs_dir, "--backbone", BACKBONE, "--weights", args.weights, "--resume",
           *shlex.split(RECIPE), *shlex.split(ROWS[name].train), *args.train_flags)  # fmt: skip
    run, columns = read_run(runs_dir / f"seed{seed}"), data.task.columns
    found = {"train": run.table("oof.csv").set_index(ID).loc[data.train[ID], columns].to_numpy(float)}
    if data.test is not None:
        mean = run.table("test_predictions.csv").groupby(ID)[columns].mean()
        found["test"] = mean.loc[data.test[ID]].to_numpy(float)
    return found


@torch.inference_mode()
def features_of(data: Data, weights: str) -> dict[str, np.ndarray]:
    """Features (N, C) of the frozen network for the stored images, by split."""
    network, found = models.build_model(models.Spec("resnet", BACKBONE, data.size), weights).eval(), {}
    for split, table in data.tables().items():
        images = open_array(data.array_path(split), len(table), data.size)
        starts = tqdm(range(0, len(table), 32), desc=f"features of {split}", leave=False)
        batches = (torch.from_numpy(np.array(images[i : i + 32])).permute(0, 3, 1, 2) for i in starts)
        found[split] = np.concatenate([network.backbone(network.normalise(batch)).numpy() for batch in batches])
    return found


def fit_linear(task: Task, x: np.ndarray, target: np.ndarray, group: np.ndarray) -> Callable:
    """A linear model of features (N, C); returns a function from features to predictions (n, K)."""
    inner = list(GroupKFold(3).split(x, groups=group))

    def fit(model, label: np.ndarray, scoring: str):
        steps = Pipeline([("scale", StandardScaler()), ("model", model)])
        strength = {"model__C": STRENGTHS} if task.probabilistic else {"model__alpha": 1 / STRENGTHS}
        return GridSearchCV(steps, strength, scoring=scoring, cv=inner).fit(x, label)

    if not task.probabilistic:
        ridge = fit(Ridge(), target[:, 0], "neg_mean_absolute_error")
        return lambda new: ridge.predict(new)[:, None]
    parts = [fit(LogisticRegression(max_iter=300), label.astype(int), "neg_log_loss") for label in target.T]
    if len(task.names) > 1 and target.shape[1] == 1:
        return parts[0].predict_proba
    return lambda new: np.column_stack([part.predict_proba(new)[:, 1] for part in parts])


def frozen(name: str, data: Data, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Predictions (N, K) of linear models of frozen features, by split: out of fold, of test images the mean."""
    path = args.output / name / "frozen.npz"
    if not path.exists():
        x, fold = features_of(data, args.weights), data.train[FOLD].to_numpy()
        found = {split: np.zeros((len(part), len(data.task.columns))) for split, part in x.items()}
        for k in tqdm(np.unique(fold), desc="frozen", unit="fold", leave=False):
            rest = fold != k
            predict = fit_linear(data.task, x["train"][rest], data.target[rest], data.group.to_numpy()[rest])
            found["train"][~rest] = predict(x["train"][~rest])
            if "test" in x:
                found["test"] += predict(x["test"]) / len(np.unique(fold))
        np.savez(path, **found)
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


# ---------------------------------------------------------------- the table
def best_constant(task: Task, train: np.ndarray, target: np.ndarray) -> float:
    """Main score of the best constant prediction, learned from the training target."""
    if not task.probabilistic:
        prob = np.full(target.shape, np.nanmedian(train))
    else:
        prob = np.tile(np.nanmean(task.members(train), axis=0)[-len(task.columns) :], (len(target), 1))
    return task.metrics[task.metric].of(target, prob)


def compare(task: Task, target, group, linear: np.ndarray, tuned: list[np.ndarray]) -> tuple:
    """(score of frozen, of every seed, gain, its interval)."""
    metric = task.metrics[task.metric]
    one, each = metric.resampled(target, linear), [metric.resampled(target, prob) for prob in tuned]
    rng, gains = np.random.default_rng(1), []
    for weight in scores.bootstrap_weights(group):
        drawn = rng.integers(len(each), size=len(each))
        gains.append(metric.sign * (np.mean([each[i](weight) for i in drawn]) - one(weight)))
    values = [metric.of(target, prob) for prob in tuned]
    return metric.of(target, linear), values, metric.sign * (np.mean(values) - metric.of(target, linear)), gains


def lines_of(name: str, args: argparse.Namespace) -> list[str]:
    """Rows of the table of one target: out of fold, and on its test images."""
    data, row = prepare(name, args), ROWS[name]
    linear = frozen(name, data, args)
    tuned = [fine_tuned(name, seed, data, args) for seed in args.seeds]
    parts = {"train": ("out of fold", data.target, data.group.to_numpy())}
    if data.test is not None:
        answers = read_csv(args.output / name / "answers.csv", text=(ID, "group")).set_index(ID).loc[data.test[ID]]
        target = read_target(data.task, answers.reset_index(), args.output / name / "answers.csv", row.target)
        parts["test"] = ("test", target, groups_of(data.test, "group"))
    lines = []
    for split, (where, target, group) in parts.items():
        constant = best_constant(data.task, data.target, target)
        probe, values, gain, gains = compare(data.task, target, group, linear[split], [it[split] for it in tuned])
        low, high = scores.interval(gains)
        lines.append(f"| {row.what} | {where} | {len(target)} | {data.task.metric} | {constant:.3f} | {probe:.3f} "
                     f"| {np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}) "
                     f"| {gain:+.3f} [{low:+.3f}, {high:+.3f}] |")  # fmt: skip
    return lines


def main(args: argparse.Namespace) -> None:
    """Prepare and train what is missing; print the table."""
    args.output.mkdir(parents=True, exist_ok=True)
    lines = [line for name in args.only for line in lines_of(name, args)]
    print(f"\n{BACKBONE}, seeds {args.seeds}\n")
    print("| target | rows | images | score | constant | frozen | fine-tuned (seeds) | gain [95 %] |")
    print("|---|---|---|---|---|---|---|---|", *lines, sep="\n")


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    add = parser.add_argument
    add("data", type=Path, help="folder with polyps256, bccd, mnist and isic2018")
    add("--weights", required=True, help="ImageNet weights of EfficientNet-Lite0")
    add("--output", type=Path, default=Path("runs/targets"), help="tables, arrays, trainings")
    add("--only", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="rows of the table")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings")
    add("--train_flags", type=shlex.split, default=[], help="for train.py, as one word: --train_flags='--epochs 1'")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
