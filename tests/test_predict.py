"""New images through runs and blends."""

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import call, hashes

import util
from util import InputError


def predict(run, output, *images, meta=None, more=()):
    words = [*images, "--run", run, "--output", output, "--device", "cpu", *more]
    return call("predict", *words, *([] if meta is None else ["--csv", meta]))


def read(path):
    return pd.read_csv(path, dtype={"image_name": str})


@pytest.fixture
def test_images(source):
    return [source / "images" / f"{i:04d}.jpg" for i in range(24, 28)]


@pytest.mark.parametrize("name", ["resnet", "chipnet", "cropnet", "mean"])
def test_new_images_score_as_the_test_set_did(runs_dir, source, test_images, tmp_path, name):
    out = predict(runs_dir / name, tmp_path / "out", *test_images, meta=source / "test.csv")
    table = read(out / "predictions.csv").merge(read(runs_dir / name / "submission.csv"),
                                                on="image_name")  # fmt: skip
    assert len(table) == 4
    assert np.allclose(table["prob"], table["target"], atol=1e-5)


def test_boxes_are_those_of_crop_py(runs_dir, data_dir, test_images, tmp_path):
    out = predict(runs_dir / "cropnet", tmp_path / "out", *test_images)
    boxes = read(data_dir / "crops" / "chipnet" / "test_boxes.csv")
    edges = ["x0", "y0", "x1", "y1"]
    assert np.allclose(read(out / "predictions.csv")[edges], boxes[edges], atol=1e-3)


def test_folder_through_a_learned_blend_with_pictures(runs_dir, source, tmp_path, capsys):
    before = hashes(source)
    out = predict(runs_dir / "ensemble", tmp_path / "out", source / "images")
    assert "24 images have names of training images" in capsys.readouterr().out
    table = read(out / "predictions.csv")
    assert len(table) == 28
    assert table["prob"].between(0, 1).all()
    assert len(list(out.glob("*.png"))) == 28
    assert hashes(source) == before
    with pytest.raises(InputError, match="already finished"):
        predict(runs_dir / "ensemble", tmp_path / "out", source / "images")


def test_zoom_blend_weighs_new_images_by_their_boxes(runs_dir, test_images, tmp_path):
    runs = shutil.copytree(runs_dir, tmp_path / "runs")
    blend = call("ensemble", "zoom", "--runs_dir", runs, "--runs", "resnet", "cropnet",
                 "--name", "zoom")  # fmt: skip
    config = util.read_json(blend / "config.json")
    util.write_json(blend / "config.json", config | {"zoom": [0.0, 0.0]})
    table = read(predict(blend, tmp_path / "whole", *test_images) / "predictions.csv")
    rank = call("ensemble", "rank", "--runs_dir", runs, "--runs", "resnet", "--name", "rank")
    ranked = read(predict(rank, tmp_path / "rank", *test_images) / "predictions.csv")
    assert np.allclose(table["prob"], ranked["prob"])  # no weight on crops: resnet's ranks
    util.write_json(blend / "config.json", config | {"zoom": [1.0, 0.0]})
    other = read(predict(blend, tmp_path / "crop", *test_images) / "predictions.csv")
    assert not np.allclose(table["prob"], other["prob"])


def test_bad_images_are_named_or_left_out(runs_dir, test_images, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in test_images:
        shutil.copy(path, folder)
    (folder / "0025.jpg").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"0025\.jpg.*--on_error skip"):
        predict(runs_dir / "resnet", tmp_path / "out", folder)
    assert not (tmp_path / "out" / "predictions.csv").exists()
    more = ["--on_error", "skip", "--no-pictures"]
    out = predict(runs_dir / "resnet", tmp_path / "out", folder, more=more)
    assert read(out / "predictions.csv")["image_name"].tolist() == ["0024", "0026", "0027"]
    assert not list(out.glob("*.png"))


def test_runs_of_another_version_are_named(runs_dir, test_images, tmp_path):
    run = shutil.copytree(runs_dir / "resnet", tmp_path / "old")
    (run / "config.json").write_text('{"argv": []}')
    with pytest.raises(InputError, match=r"config\.json has no 'args': another version"):
        predict(run, tmp_path / "out", *test_images)


def test_crops_of_another_version_or_of_a_csv_are_named(runs_dir, test_images, tmp_path):
    run = shutil.copytree(runs_dir / "cropnet", tmp_path / "old")
    config = util.read_json(run / "config.json")
    old = {key: value for key, value in config["crop"].items() if key != "shifts"}
    util.write_json(run / "config.json", config | {"crop": old})
    with pytest.raises(InputError, match="nothing of 'shifts': another version"):
        predict(run, tmp_path / "out", *test_images)
    csv = config["crop"] | {"source": "boxes", "boxes": "mine.csv"}
    util.write_json(run / "config.json", config | {"crop": csv})
    with pytest.raises(InputError, match=r"boxes of mine\.csv; new images have none"):
        predict(run, tmp_path / "out", *test_images)


def test_bad_words(runs_dir, test_images, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        predict(runs_dir / "nowhere", tmp_path / "out", *test_images)
    with pytest.raises(InputError, match=r"no\.jpg is missing"):
        predict(runs_dir / "resnet", tmp_path / "out", tmp_path / "no.jpg")
    with pytest.raises(InputError, match="holds no jpg"):
        predict(runs_dir / "resnet", tmp_path / "out", tmp_path)
    shutil.copy(test_images[0], tmp_path)
    with pytest.raises(InputError, match="share a name"):
        predict(runs_dir / "resnet", tmp_path / "out", tmp_path, test_images[0])


def test_precision_changes_predictions_a_little(runs_dir, test_images, tmp_path):
    exact, rough = (
        read(predict(runs_dir / "cropnet", tmp_path / amp, *test_images, more=["--amp", amp])
             / "predictions.csv")
        for amp in ("off", "bf16")
    )  # fmt: skip
    assert np.allclose(exact["prob"], rough["prob"], atol=0.02)
    assert not np.array_equal(exact["prob"], rough["prob"])
