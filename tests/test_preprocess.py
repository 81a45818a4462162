"""Images and csv to arrays, tables and folds."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.model_selection
from conftest import ROOT, SMALL_CROP, SMALL_MODEL, call, hashes, write_images
from PIL import Image

import preprocess
from plumbing import images
from plumbing.arrays import open_array
from plumbing.data import read_data
from plumbing.files import read_json
from plumbing.images import read_square
from plumbing.runs import make_submission
from tasks import Binary
from util import FOLD, ID, PROB, TARGET, InputError

BINARY = Binary(("1",), "auc")


def words(source, output, *more):
    return ["--train_csv", source / "train.csv", "--output_dir", output, "--size", 32, "--n_folds", 2, *more]


def run(*args):
    return call("preprocess", *words(*args))


def edit(path, change):
    change(pd.read_csv(path, dtype=str)).to_csv(path, index=False)


@pytest.fixture
def mine(tmp_path):
    return write_images(tmp_path / "mine", n_train=12)


def test_arrays_and_tables_agree(source, data_dir):
    data = read_data(data_dir)
    array = open_array(data.array_path("train"), 24)
    assert array.shape == (24, 64, 64, 3)
    assert data.train.loc[3, [ID, "width", "height"]].tolist() == ["0003", 96, 72]
    image = Image.open(source / "images" / "0000.jpg").resize((64, 64), 2, box=(12, 0, 84, 72))
    assert np.abs(array[0].astype(int) - np.asarray(image)).max() <= 1


# ---------------------------------------------------------------- stopping and starting
STOP = """
import os, sys, preprocess
from plumbing import arrays, images
arrays.CHUNK, read, seen, signal = 5, images.read_image, [], int(sys.argv.pop(1))

def read_image(path, *more):
    seen.append(path)
    if len(seen) == 14:
        os.kill(os.getpid(), signal)
    return read(path, *more)

images.read_image = read_image
preprocess.util.run_script(preprocess.main, preprocess.get_args_parser())
"""


@pytest.mark.parametrize(("signal", "status", "gone"), [(9, -9, False), (15, 130, False), (9, -9, True)])
def test_stopped_run_goes_on_where_it_was(source, tmp_path, monkeypatch, signal, status, gone):
    before, whole, out = hashes(source), run(source, tmp_path / "whole", "--workers", 4), tmp_path / "out"
    command = [sys.executable, "-c", STOP, signal, *words(source, out, "--workers", 1)]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert {path.suffix for path in out.iterdir()} == {".part"}
    with pytest.raises(InputError, match="exact = False, not True; "):
        run(source, out, "--exact")
    if gone:  # someone removed the array but not the record of its rows
        (out / "train_32.npy.part").unlink()
    seen, read = [], images.read_image
    monkeypatch.setattr(images, "read_image", lambda path, *more: seen.append(path) or read(path, *more))
    run(source, out)
    assert len(seen) == 28 - (0 if gone else 10)  # two chunks of five were recorded
    left, expected = ({Path(name).name: value for name, value in hashes(folder).items()} for folder in (out, whole))
    assert left | {"preprocess.json": 0} == expected | {"preprocess.json": 0}  # it names the command
    assert hashes(source) == before


# ---------------------------------------------------------------- folds
def test_folds_keep_patients_whole_and_spread_positives_evenly(data_dir):
    table = read_data(data_dir).train
    assert (table.groupby("patient_id")[FOLD].nunique() == 1).all()
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(300), rng.integers(1, 8, 300))
    target = (rng.random(len(group)) < 0.1).astype(int)
    folds = [preprocess.assign_folds(BINARY, target[:, None], group, 3, seed) for seed in range(5)]
    for fold in folds:
        assert np.ptp(np.bincount(fold[target == 1])) <= 2  # of 40 in each; shuffled groups vary by some ten
        assert np.ptp(np.bincount(fold)) < 0.05 * len(fold)
    assert (folds[0] != folds[1]).any()


def test_folds_of_single_rows_are_drawn_without_a_loop_over_groups(monkeypatch, recwarn):
    monkeypatch.setattr(sklearn.model_selection, "StratifiedGroupKFold", None)  # minutes for 400,000 groups
    fold = preprocess.assign_folds(BINARY, np.arange(30)[:, None] % 2, np.arange(30), 3, seed=0)
    assert np.bincount(fold).tolist() == [10, 10, 10]
    assert not recwarn.list


# ---------------------------------------------------------------- names, columns, labels
def test_bad_images_are_left_out(mine, tmp_path):
    (mine / "images" / "0003.jpg").unlink()
    (mine / "images" / "0007.jpg").write_bytes(b"")
    data = read_data(run(mine, tmp_path / "out", "--on_error", "skip"))
    assert data.train[ID].tolist() == [f"{i:04d}" for i in range(12) if i not in (3, 7)]
    array = open_array(data.array_path("train"), 10)
    assert (array[5] == read_square(mine / "images" / "0006.jpg", 32)[0]).all()  # the rows behind a gap moved up


def test_columns_labels_and_folders_are_named_by_flags(mine, tmp_path):
    label = {"0": "benign", "1": "malignant"}
    for i in range(16):  # folders by class; test images have names of training images
        new = mine / (f"train/{label[str(int(i % 4 < 2))]}/{i:04d}.JPG" if i < 12 else f"test/{i - 12:04d}.jpg")
        new.parent.mkdir(parents=True, exist_ok=True)
        (mine / "images" / f"{i:04d}.jpg").rename(new)
    edit(mine / "train.csv", lambda t: pd.DataFrame({
        "file": t["target"].map(label) + "/" + t[ID] + ".jpg", "kind": t["target"].map(label), "who": t["patient_id"],
        "width": 1, "height": 1, "target": 7}))  # the last three are replaced
    names = [f"{i:04d}.jpg" for i in range(4)]
    edit(mine / "test.csv", lambda t: pd.DataFrame({"file": names}))
    pd.DataFrame({"isic_id": names[::-1], "guess": 0.5}).to_csv(mine / "sample_submission.csv", index=False)
    data = read_data(run(mine, tmp_path / "out", "--image_dir", mine / "train", "--test_image_dir", mine / "test",
                         *"--image_col file --target_col kind --positive malignant --group_col who".split()))
    assert data.train[ID].iloc[1] == "malignant/0001.jpg"
    assert data.train[TARGET].tolist() == [1, 1, 0, 0] * 3
    assert data.train[["width", "height"]].min(axis=None) > 1
    assert data.facts["group_col"] == "who"
    submission = make_submission(pd.DataFrame({ID: names, PROB: [0.1, 0.2, 0.3, 0.4]}), data)
    assert submission.to_dict("list") == {"isic_id": names[::-1], "guess": [0.4, 0.3, 0.2, 0.1]}
    array = open_array(data.array_path("test"), 4)
    assert (array[0] == read_square(mine / "test" / "0000.jpg", 32)[0]).all()


# ---------------------------------------------------------------- what must not meet
def add_extra(source, folder, **change):
    """Three positive images of other patients in a folder of their own; returns their table."""
    (folder / "images").mkdir(parents=True)
    for i, name in enumerate(change.get(ID, ["ex0", "ex1", "ex2"])):
        shutil.copy(source / "images" / f"{i + 3:04d}.jpg", folder / "images" / f"{name}.jpg")
    table = pd.DataFrame({ID: ["ex0", "ex1", "ex2"], "target": 1, "patient_id": ["q0", None, "q2"], "sex": "male"})
    table.assign(**change).to_csv(folder / "extra.csv", index=False)
    return folder / "extra.csv"


@pytest.mark.parametrize(
    ("patients", "change", "value"),
    [
        (None, {"patient_id": ["q0", "p3", None]}, "p3"),
        (None, {"patient_id": ["q0", "p6", None]}, "p6"),  # of the test table
        ("{:03d}", {"patient_id": [3, None, 100]}, "3"),  # text in one table, 3.0 in the other, which has a gap
        ("90071992547409{:03d}", {"patient_id": ["90071992547409003", None, "1"]}, "90071992547409003"),  # no float
        (None, {ID: ["ex0", "0004", "ex2"]}, "0004"),  # another image of that name
        (None, {TARGET: [1, 2, 1]}, "ex1"),
    ],
)
def test_external_images_share_nothing_with_others(mine, tmp_path, patients, change, value):
    if patients is not None:
        edit(mine / "train.csv", lambda t: t.assign(patient_id=[*map(patients.format, range(11)), "A17"]))
    with pytest.raises(InputError, match=rf"extra\.csv.*\b{value}\b.*; "):
        run(mine, tmp_path / "data", "--extra_csv", add_extra(mine, tmp_path / "external", **change))
    assert not (tmp_path / "data").exists()


def test_an_image_is_in_one_table_whatever_it_is_called(mine, tmp_path):
    edit(mine / "test.csv", lambda t: t.assign(**{ID: ["0003.jpg", *t[ID][1:]]}))
    (mine / "sample_submission.csv").unlink()
    with pytest.raises(InputError, match="0003.*; remove"):
        run(mine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_external_images_are_trained_on_and_never_scored(source, data_dir, tmp_path):
    extra = run(source, tmp_path / "data", "--size", 64, "--extra_csv", add_extra(source, tmp_path / "external"))
    data, plain = read_data(extra), read_data(data_dir)
    assert data.train[FOLD].tolist() == [*plain.train[FOLD], -1, -1, -1]
    array, alone = open_array(data.array_path("train"), 27), open_array(plain.array_path("train"), 24)
    assert (array == np.concatenate([alone, alone[3:6]])).all()
    crops = call("crop", "--source", "saliency", "--data_dir", extra, *SMALL_CROP, "--views", 1)
    assert pd.read_csv(crops / "train_boxes.csv")["oof"].tolist() == [1] * 24 + [0] * 3
    fold = call("train", "--model", "cropnet", "--crop_dir", crops, "--data_dir", extra, "--runs_dir", tmp_path,
                "--fold", 0, *SMALL_MODEL)  # fmt: skip
    assert len(pd.read_csv(fold / "oof.csv")) == 12
    assert read_json(fold / "fold0_metrics.json")["train_rows"] == 12 + 3
    call("report", fold)
