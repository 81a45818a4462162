"""What grows with the number of images besides their pixels: processor time and peak memory on tables of any length.

    python benchmarks/scale.py --rows 100000 400000
    python benchmarks/scale.py --rows 20000 --files --train

Whole stages run on a synthetic table (three rows of a patient, one positive in a hundred, a tenth as many test rows)
whose pictures are black and 16 px wide, so that what is left is the work on rows: reading, folds, draws of an epoch,
scores with intervals, blends, boxes. Every part runs in a process of its own, forked from one that has loaded the
libraries; the first row is its memory. With --files preprocess.py looks for as many empty files as there are rows. With
--train a small network is trained for an epoch on arrays of 224 px.
"""

import argparse
import contextlib
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
from speed import peak_of, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import crop
import dataset
import ensemble
import models
import preprocess
import train
import util
from plumbing import runs
from plumbing.data import CORNERS, Data, read_data, read_table
from plumbing.distributed import Team
from plumbing.files import read_json, sha256, write_json, write_table
from util import FOLD, ID, PROB, TARGET

SIZE, LARGE = 16, 224  # side of the black pictures, and of those that are trained on
ORIGINAL = 1600, 1200  # width and height that they claim
BLEND = "a", "b", "c"  # runs
SMALL = ["--model", "resnet", "--weights", "none", "--backbone", "regnet_tiny", "--hidden", "8", "--augment", "square",
         "--epochs", "1", "--tta", "1", "--workers", "0", "--device", "cpu"]  # fmt: skip


# ---------------------------------------------------------------- inputs
def draw_tables(folder: Path, rows: int) -> None:
    """train.csv, test.csv, and boxes.csv with a box for every image."""
    rng = np.random.default_rng(0)
    for name, number in (("train", np.arange(rows)), ("test", np.arange(rows, rows + rows // 10))):
        table = pd.DataFrame({
            ID: [f"IMG_{i:08d}" for i in number],
            "patient_id": [f"P_{i // 3:07d}" for i in number],
            "sex": rng.choice(["male", "female"], len(number)),
            "age_approx": rng.integers(20, 90, len(number)),
            "anatom_site_general_challenge": rng.choice(["torso", "head/neck", "lower extremity"], len(number)),
        })  # fmt: skip
        target = {TARGET: (rng.random(len(number)) < 0.01).astype(int)} if name == "train" else {}
        table.assign(**target).to_csv(folder / f"{name}.csv", index=False)
    boxes = pd.DataFrame({ID: [f"IMG_{i:08d}" for i in range(rows + rows // 10)]})
    boxes[CORNERS] = 400, 300, 900, 800
    boxes.to_csv(folder / "boxes.csv", index=False)


def draw_files(folder: Path, rows: int) -> None:
    """Empty files, 1,000 in a folder, for the rows of both tables."""
    for i in range(rows + rows // 10):
        part = folder / "images" / f"{i // 1000:05d}"
        if i % 1000 == 0:
            part.mkdir(parents=True)
        (part / f"IMG_{i:08d}.jpg").touch()


def predictions(target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Probabilities with an AUC of about .86."""
    return 1 / (1 + np.exp(3 - rng.normal(1.5 * target)))


def predict_folds(data: Data, run: Path) -> None:
    """Replace the few predictions of a run's folds by some for all rows."""
    rng, table = np.random.default_rng(0), data.train
    for k in range(data.facts["n_folds"]):
        oof = table.loc[table[FOLD] == k, [ID, FOLD, TARGET]]
        write_table(run / f"fold{k}_oof.csv", oof.assign(**{PROB: predictions(oof[TARGET], rng)}))
        test = data.test[[ID]].assign(**{FOLD: k, PROB: predictions(np.zeros(len(data.test)), rng)})
        write_table(run / f"fold{k}_test.csv", test)


def copy_run(run: Path, name: str) -> None:
    """A run with other predictions."""
    other = shutil.copytree(run, run.parent / name)
    metrics, rng = read_json(run / "metrics.json"), np.random.default_rng(ord(name))
    for file in ("oof.csv", "test_predictions.csv"):
        table = read_table(run / file, unique=False)
        table[PROB] = predictions(table[TARGET] if TARGET in table else np.zeros(len(table)), rng)
        write_table(other / file, table)
        metrics["sha256"][file] = sha256(other / file)
    write_json(other / "metrics.json", metrics)


# ---------------------------------------------------------------- parts
def call(script, *words) -> None:
    """Run a script with words of a command line in this process."""
    script.main(script.get_args_parser().parse_args([str(word) for word in words]))


def find_files(folder: Path) -> None:
    """preprocess.py looks for the file of every row."""
    tables = {split: read_table(folder / f"{split}.csv") for split in ("train", "test")}
    preprocess.locate(tables, {split: [folder / "images"] for split in tables}, skip=False)


def fill(folder: Path, size: int = SIZE) -> None:
    """preprocess.py, but for looking for files and reading them."""
    black, found = (np.zeros((size, size, 3), np.uint8), ORIGINAL), lambda tables, dirs, _: {
        split: tables[split][ID].tolist() for split in dirs}  # fmt: skip
    words = "--train_csv", folder / "train.csv", "--output_dir", folder / f"data_{size}", "--size", size
    with mock.patch.multiple(preprocess, locate=found, read_square_or_skip=lambda *_: black):
        call(preprocess, *words)


def read(folder: Path) -> None:
    """What every later script reads first."""
    read_data(folder / f"data_{SIZE}")


def start_training(folder: Path) -> None:
    """train.py on two images of each class: its work on tables, which every process does."""
    call(train, *SMALL, "--data_dir", folder / f"data_{SIZE}", "--runs_dir", folder / "runs", "--name", BLEND[0],
         "--limit", 2)  # fmt: skip


def draw_epoch(folder: Path) -> None:
    """train.py decides which image comes when, and which process reads it."""
    data = read_data(folder / f"data_{SIZE}")
    args = train.fill_defaults(train.get_args_parser().parse_args(SMALL), data.task)
    images = dataset.make_images(data, 0, args, models.recipe_of("resnet", []))[0]["train"]
    loader = dataset.TrainLoader(images, data.task.strata(data.target[images.rows]), None, args, Team("cpu"))
    next(loader.epoch(seed=0))
    for _ in loader:
        pass


def collect(folder: Path) -> None:
    """train.py scores what the folds predicted, and writes the files of the run."""
    data, run = read_data(folder / f"data_{SIZE}"), folder / "runs" / BLEND[0]
    predict_folds(data, run)
    runs.collect(run, data)


def blend(folder: Path) -> None:
    """ensemble.py learns weights of three runs."""
    call(ensemble, "weights", "--runs_dir", folder / "runs")


def cut_crops(folder: Path) -> None:
    """crop.py with a box of each image from a csv, but for reading files."""
    def black(path, boxes: list, sizes: list[int], original) -> list[np.ndarray]:
        return [np.zeros((size, size, 3), np.uint8) for size in sizes]

    with mock.patch.multiple(crop, read_crops=black, plot_montage=mock.DEFAULT), mock.patch.object(
        Data, "find_originals", lambda data, split, *_: data.tables()[split][ID].tolist()
    ):
        call(crop, "--data_dir", folder / f"data_{SIZE}", "--source", "boxes", "--boxes", folder / "boxes.csv",
             "--device", "cpu")  # fmt: skip


# ---------------------------------------------------------------- measuring
def measure(part: Callable, folder: Path) -> tuple[float, float]:
    """Seconds of processor time and peak memory (MB) of a part in a process of its own."""
    fork = multiprocessing.get_context("fork")
    heard, said = fork.Pipe(duplex=False)

    def work() -> None:
        started = time.process_time()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            part(folder)
        said.send((time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))

    process = fork.Process(target=work)
    process.start()
    said.close()
    with contextlib.suppress(EOFError):  # the process has said why
        found = heard.recv()
        process.join()
        return found
    raise SystemExit(f"{part.__name__} failed")


def measure_rows(rows: int, files: bool, folder: Path) -> dict[str, tuple[float, float]]:
    """Seconds and peak memory of all parts on so many rows; each is said as soon as it is known."""
    found = {}

    def note(name: str, part: Callable) -> None:
        found[name] = measure(part, folder)
        print(f"{rows:,} rows, {name}: {found[name][0]:.1f} s, {found[name][1]:.0f} MB", file=sys.stderr, flush=True)

    draw_tables(folder, rows)
    note("libraries alone", lambda _: None)
    if files:
        draw_files(folder, rows)
        note("preprocess.py, looking for files", find_files)
        shutil.rmtree(folder / "images")
    note("preprocess.py, the rest but for pixels", fill)
    note("tables, as every later script reads them", read)
    note("train.py, before and after training", start_training)
    note("train.py, draws of an epoch", draw_epoch)
    note("train.py, scores of all folds", collect)
    for name in BLEND[1:]:
        measure(lambda folder, name=name: copy_run(folder / "runs" / BLEND[0], name), folder)
    note("ensemble.py weights, three runs", blend)
    note("crop.py, boxes of a csv", cut_crops)
    return found


def measure_training(rows: int, folder: Path) -> list[str]:
    """Row of a table: an epoch of train.py on arrays that may be larger than the memory."""
    draw_tables(folder, rows)
    measure(lambda folder: fill(folder, LARGE), folder)
    words = "--data_dir", folder / f"data_{LARGE}", "--runs_dir", folder / "runs", "--fold", 0, "--sampler", "shuffle"
    seconds, memory = peak_of("train.py", *SMALL, *words)
    return [f"{rows:,}", f"{1.1 * rows * LARGE**2 * 3 / 1e6:,.0f}", f"{seconds:.0f}", f"{memory:.0f}"]


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    found = {}
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            found[rows] = measure_rows(rows, args.files, Path(folder))
    cells = [[name, *(f"{value:,.{digits}f}" for rows in args.rows
                      for value, digits in zip(found[rows][name], (1, 0), strict=True))]
             for name in found[args.rows[0]]]  # fmt: skip
    header = [f"{rows // 1000}k: {unit}" for rows in args.rows for unit in ("s", "MB")]
    print_table(", ".join(["part", *header]), cells)
    if args.train:
        trained = []
        for rows in args.rows:
            with tempfile.TemporaryDirectory() as folder:
                trained.append(measure_training(rows, Path(folder)))
        print()
        print_table("rows, arrays MB, train.py s, peak MB", trained)


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    parser.add_argument("--rows", type=util.number(int, 1000), nargs="+", default=[100_000], help="of the train table")
    parser.add_argument("--files", action="store_true", help="look for files too")
    parser.add_argument("--train", action="store_true", help="train a small network for an epoch too")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
