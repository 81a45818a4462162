"""Small data for all tests: 24 images of 12 patients, half of them preprocessed at 64 px."""

import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start: threads of several processes slow each other

import shutil
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, settings

import plumbing.runs
import scores
from plumbing.files import read_json, sha256, write_json

ROOT = Path(__file__).parent.parent
SMALL_MODEL = [
    "--weights", "none", "--backbone", "regnet_tiny", "--hidden", "8", "--dropout", "0",
    "--lr", "1e-3", "--head_lr", "1e-3", "--epochs", "1", "--batch_size", "8", "--workers", "0",
    "--tta", "2", "--device", "cpu",
]  # fmt: skip
SMALL_CROP = ["--weights", "none", "--backbone", "regnet_tiny", "--device", "cpu"]

# of tests/test_fuzz.py: the same few cases every time, or with --hypothesis-profile long many new
for name, examples in (("short", 20), ("long", 1000)):
    settings.register_profile(name, max_examples=examples, deadline=None, derandomize=name == "short", database=None,
                              suppress_health_check=list(HealthCheck))  # fmt: skip
settings.load_profile("short")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """A second thread gains such small networks nothing, and on a busy machine loses a lot."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def quick_endings():
    """The curves of a training are drawn, but not rendered, and intervals come from few samples: else these take most
    of the time of small trainings."""
    curves = mock.patch.object(plumbing.runs, "save_figure", lambda path, _: path.touch())
    with curves, mock.patch.object(scores, "BOOTSTRAP_SAMPLES", 100):
        yield


def write_images(folder: Path, n_train: int = 24, n_test: int = 4) -> Path:
    """Write a data set of noisy images with a dark disc, brighter inside when positive."""
    images = folder / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n_train + n_test):
        width, height = ((96, 72), (72, 96), (80, 80))[i % 3]
        image = rng.normal(180, 8, (height, width, 3))
        center = (int(rng.integers(30, width - 30)), int(rng.integers(30, height - 30)))
        disc = np.zeros((height, width), np.uint8)
        cv2.circle(disc, center, 12, 1, -1)
        target = int(i % 4 < 2)
        image[disc > 0] = (60, 90, 120) if target else (120, 60, 60)
        name = f"{i:04d}"  # leading zeros: ids are text
        cv2.imwrite(str(images / f"{name}.jpg"), np.clip(image, 0, 255).astype(np.uint8))
        rows.append({
            "image_name": name, "patient_id": f"p{i // 2}", "sex": ("male", "female", None)[i % 3],
            "age_approx": None if i % 7 == 3 else 20 + 5 * (i % 9),
            "anatom_site_general_challenge": ("torso", "head/neck")[i % 2], "target": target,
        })  # fmt: skip
    table = pd.DataFrame(rows)
    table[:n_train].to_csv(folder / "train.csv", index=False)
    test = table[n_train:].drop(columns="target")
    test.to_csv(folder / "test.csv", index=False)
    sample = test[["image_name"]].iloc[::-1].assign(target=0)  # another order than test.csv
    sample.to_csv(folder / "sample_submission.csv", index=False)
    return folder


def call(script: str, *args, cwd: Path | None = None) -> Path:
    """Run main() of a script in this process with command line words; returns what it returns."""
    module = __import__(script)
    parser = module.get_args_parser()
    return module.main(parser.parse_args([str(arg) for arg in args]))


def hashes(folder: Path) -> dict[str, str]:
    """Content hash of every file of a folder."""
    return {str(path): sha256(path) for path in folder.rglob("*") if path.is_file()}


def read(path: Path) -> pd.DataFrame:
    """A table; image names are text."""
    return pd.read_csv(path, dtype={"image_name": str})


def change(path: Path, edit) -> None:
    """Edit a JSON file or a checkpoint in place."""
    load, save = (read_json, write_json) if path.suffix == ".json" else (torch.load, lambda p, c: torch.save(c, p))
    content = load(path)
    edit(content)
    save(path, content)


def rewrite(table: Path, edit, facts: str = "metrics.json") -> None:
    """Change a table as if it had been written so, with its hash in the JSON file beside it."""
    edit(read(table)).to_csv(table, index=False)
    change(table.with_name(facts), lambda content: content["sha256"].update({table.name: sha256(table)}))


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A user's folder: images/, train.csv, test.csv, sample_submission.csv."""
    return write_images(tmp_path_factory.mktemp("source") / "my data")


@pytest.fixture(scope="session")
def data_dir(source, tmp_path_factory) -> Path:
    """The folder, preprocessed at 64 px."""
    output = tmp_path_factory.mktemp("data") / "data"
    return call("preprocess", "--train_csv", source / "train.csv", "--output_dir", output,
                "--size", 64, "--n_folds", 2)  # fmt: skip


@pytest.fixture(scope="session")
def runs_dir(data_dir, tmp_path_factory) -> Path:
    """Trained runs: resnet, chipnet, crops of it, cropnet, a mean and a learned blend."""
    runs = tmp_path_factory.mktemp("runs")
    where = ["--data_dir", data_dir, "--runs_dir", runs]
    for model in ("resnet", "chipnet"):
        call("train", "--model", model, *where, *SMALL_MODEL)
    call("crop", "--run", runs / "chipnet", "--data_dir", data_dir, *SMALL_CROP, "--views", 2)
    call("train", "--model", "cropnet", *where, *SMALL_MODEL)
    call("ensemble", "mean", "--runs_dir", runs, "--name", "mean")
    call("ensemble", "weights", "--runs_dir", runs)
    return runs


@pytest.fixture
def runs(runs_dir, tmp_path) -> Path:
    """A copy of all runs, to spoil."""
    return shutil.copytree(runs_dir, tmp_path / "runs")
