"""Runs as ONNX files: run.py, alone in a folder elsewhere, says what predict.py says."""

import argparse
import ast
import importlib.util
import io
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL_MODEL, call, change, read
from PIL import Image

import export
import localize
from inference import read_chunks
from plumbing.data import MetaEncoder
from plumbing.files import read_json
from plumbing.images import frame_of, read_crops, read_square
from plumbing.runs import read_run
from util import InputError

pytest.importorskip("onnxscript")
run_onnx = pytest.importorskip("plumbing.run_onnx")
BOX = ["x0", "y0", "x1", "y1", "confidence"]


def run_elsewhere(export_dir, folder, *words):
    """What run.py prints after its folder was moved to where none of our code is."""
    there = shutil.copytree(export_dir, folder / "hospital", dirs_exist_ok=True)
    done = subprocess.run([sys.executable, "-E", there / "run.py", *map(str, words)], cwd=folder, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return pd.read_csv(io.StringIO(done.stdout), dtype={"image_name": str}).set_index("image_name")


def predicted(run, folder, *words):
    """What predict.py says."""
    words = ["--run", run, "--output", folder / "predictions", "--device", "cpu", "--no-pictures", *words]
    return read(call("predict", *words) / "predictions.csv").set_index("image_name")


def same(found, expected):
    assert found.columns.tolist() == expected.columns.tolist()
    for column in found:
        if column == "fallback":
            assert found[column].fillna("").tolist() == expected[column].fillna("").tolist()
        else:
            assert found[column].to_numpy() == pytest.approx(expected[column].to_numpy(), abs=1e-4), column


@pytest.fixture(scope="module")
def new_images(source, tmp_path_factory):
    """Test images below a folder, one as PNG, with metadata: a number that was seldom seen, an unknown word."""
    folder = tmp_path_factory.mktemp("new")
    for i, name in enumerate(("a/0024.jpg", "a/0025.jpg", "0026.jpg", "0027.png")):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.open(source / "images" / f"{24 + i:04d}.jpg").save(folder / name)
    table = read(source / "test.csv").assign(age_approx=[70, 7.5, None, 50], sex=["male", "other", None, "female"])
    table.to_csv(folder / "meta.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def resnet(runs_dir, tmp_path_factory):
    """The export of a run with metadata, both folds, also in 8 bits."""
    return call("export", runs_dir / "resnet", "--output_dir", tmp_path_factory.mktemp("resnet") / "x", "--int8")


def test_a_run_with_metadata(resnet, runs_dir, new_images, tmp_path):
    words = [new_images, "--csv", new_images / "meta.csv"]
    found, expected = run_elsewhere(resnet, tmp_path, *words), predicted(runs_dir / "resnet", tmp_path, *words)
    same(found, expected)
    assert found.index.tolist() == ["0026", "0027", "a/0024", "a/0025"]
    assert {"prob", "calibrated"} == set(found)
    without = run_elsewhere(resnet, tmp_path, new_images)
    assert not np.allclose(without["prob"], found["prob"], atol=1e-4)


def test_8_bits_say_nearly_the_same_at_the_score_they_cost(resnet, runs_dir, new_images, tmp_path):
    small = run_elsewhere(resnet, tmp_path, new_images, "--int8")["prob"].to_numpy()
    whole = run_elsewhere(resnet, tmp_path, new_images)["prob"].to_numpy()
    assert 0 < np.abs(small - whole).max() < 0.05
    facts = read_json(resnet / "model.json")
    assert facts["int8"]["model.onnx"] == pytest.approx(read_json(runs_dir / "resnet" / "metrics.json")["mean_auc"])
    assert facts["int8"].keys() == {"model.onnx", "model_int8.onnx"}
    assert (resnet / "model_int8.onnx").stat().st_size < (resnet / "model.onnx").stat().st_size / 2


def test_a_graph_takes_many_images_and_says_what_each_fold_says(resnet, runs_dir, data_dir, source):
    model = run_onnx.Model(resnet)
    table = read(source / "test.csv").set_index("image_name").astype(object).fillna("").astype(str)
    pictures = np.stack([model.pictures(source / "images" / f"{name}.jpg")[0] for name in table.index])
    meta = [[x for encoder in model.facts["encoders"] for x in run_onnx.encode(dict(row), encoder)]
            for _, row in table.iterrows()]  # fmt: skip
    inputs = {"image": pictures, "meta": np.array(meta, np.float32)}
    found = dict(zip(["probability", "calibrated", "by_fold"], model.sessions["model"].run(None, inputs), strict=True))
    rows = read(runs_dir / "resnet" / "test_predictions.csv").set_index("image_name")
    for place, k in enumerate((0, 1)):
        expected = rows[rows["fold"] == k]["prob"][table.index]
        assert found["by_fold"][:, place, 0] == pytest.approx(expected.to_numpy(), abs=1e-5)
    assert found["probability"] == pytest.approx(found["by_fold"].mean(axis=1), abs=1e-6)


def test_one_fold_of_a_run_on_crops_says_what_it_said_of_held_out_images(runs_dir, data_dir, source, tmp_path):
    folder = call("export", runs_dir / "cropnet", "--output_dir", tmp_path / "x", "--fold", 0)
    found = run_elsewhere(folder, tmp_path, source / "images", "--csv", source / "train.csv")
    oof = read(runs_dir / "cropnet" / "oof.csv").set_index("image_name")
    held_out = oof[oof["fold"] == 0].index
    assert found["prob"][held_out].to_numpy() == pytest.approx(oof["prob"][held_out].to_numpy(), abs=1e-4)
    boxes = read(data_dir / "crops" / "chipnet" / "train_boxes.csv").set_index("image_name")
    assert found.loc[held_out, BOX].to_numpy() == pytest.approx(boxes.loc[held_out, BOX].to_numpy(), abs=1e-3)
    assert read_json(folder / "model.json")["folds"] == [0]
    see_all_pictures(folder, export.open_single(read_run(runs_dir / "cropnet"), argparse.Namespace(fold=0, tta=None)),
                     source / "images" / "0025.jpg")  # fmt: skip


def see_all_pictures(folder, single, path):
    """run.py makes the pictures of fusion and streams too."""
    single.inputs = ("whole", "crop", "location")
    (images,) = read_chunks({"x": path}, pd.DataFrame({"image_name": ["x"]}), single, "fail")
    model, expected = run_onnx.Model(folder), single.batches(images)[0][0][0][0].permute(1, 2, 0).numpy()
    model.facts["pictures"] = single.inputs
    with mock.patch.object(sys, "path", [*sys.path, str(folder)]):
        found, box, known = model.pictures(path)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert float(known["box_side"]) == pytest.approx(box.side / 72)


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """Train a network on a target of the small images: words, or a quantity."""
    folder = tmp_path_factory.mktemp("trained")
    table = read(source / "train.csv")
    table["kind"] = np.array(["a", "b", "c"])[np.arange(len(table)) % 3]
    table["size_mm"] = 3 + 0.5 * table["target"] + np.arange(len(table)) % 4
    table.to_csv(folder / "train.csv", index=False)

    def train(target, *words):
        data = call("preprocess", "--train_csv", folder / "train.csv", "--image_dir", source / "images", "--size", 64,
                    "--target_col", target, "--n_folds", 2, "--frame", "whole",
                    "--output_dir", folder / target)  # fmt: skip
        return call("train", "--data_dir", data, "--runs_dir", folder, "--fold", 0, *SMALL_MODEL, *words)

    return train


def test_a_gated_transformer_of_a_quantity_and_a_chipnet_of_classes(trained, source, tmp_path):
    image, words = source / "images" / "0025.jpg", ["--csv", source / "test.csv"]
    for run, columns in ((trained("size_mm", "--model", "fsg_vit", "--backbone", "vit_tiny"), ["pred"]),
                         (trained("kind", "--model", "chipnet"), ["prob_a", "prob_b", "prob_c"])):  # fmt: skip
        folder = call("export", run, "--output_dir", tmp_path / run.name)
        found = run_elsewhere(folder, tmp_path / run.name, image, *words)
        same(found, predicted(run, tmp_path / run.name, image, *words))
        assert [name for name in found if name.startswith("pr")] == columns
    assert set(BOX) < set(found)


# ---------------------------------------------------------------- what is refused, and what is left then
@pytest.fixture
def quick(resnet, monkeypatch):
    """Let the files of another export take the place of those that take long to write."""

    def write_files(folder, run, single):
        shutil.copytree(resnet, folder, dirs_exist_ok=True)
        return dict(read_json(folder / "model.json"))

    monkeypatch.setattr(export, "write_files", write_files)


def refused(tmp_path, match, *words):
    with pytest.raises(InputError, match=match):
        call("export", *words, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_files_cannot_give_is_refused_in_one_line(quick, runs, runs_dir, tmp_path, monkeypatch):
    refused(tmp_path, "export its members one by one: .*resnet", runs_dir / "mean")
    refused(tmp_path, "--fold 7: .* has folds 0, 1", runs_dir / "resnet", "--fold", 7)
    (tmp_path / "x.dcm").touch()
    refused(tmp_path, "reads no DICOM", runs_dir / "resnet", "--images", tmp_path / "x.dcm")
    path, kept = runs / "cropnet" / "config.json", (runs / "cropnet" / "config.json").read_bytes()
    for key, value, words in (("amp", "bf16", "without --amp"), ("n_boxes", 4, "several boxes"),
                              ("source", "cam", "maps of a class")):  # fmt: skip
        change(path, lambda config, new={key: value}: config["crop"].update(new))
        refused(tmp_path, words, runs / "cropnet")
        path.write_bytes(kept)
    change(path, lambda config: config["args"].update(streams=["rgb", "depth"]))
    refused(tmp_path, "depth maps", runs / "cropnet")
    monkeypatch.setattr(export, "PACKAGES", ("onnx", "onnx_of_tomorrow"))
    refused(tmp_path, "onnx_of_tomorrow is not installed; pip install onnx", runs_dir / "resnet")


def test_nothing_is_written_unless_it_is_whole_and_right(quick, runs_dir, data_dir, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as wrong:
        wrong.setattr(export, "TOLERANCE", -1.0)
        refused(tmp_path, "run.py says something else than predict.py, by ", runs_dir / "resnet")
    out = ["--output_dir", tmp_path / "out"]

    def killed(source, target):
        if target.name == "run.py":
            raise KeyboardInterrupt
        shutil.copyfile(source, target)

    with monkeypatch.context() as kill:
        kill.setattr(export, "copy", killed)
        with pytest.raises(KeyboardInterrupt):
            call("export", runs_dir / "resnet", *out)
    assert not (tmp_path / "out" / "model.json").exists()
    folder = call("export", runs_dir / "resnet", *out)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.onnx", "model_int8.onnx", "run.py"]
    with pytest.raises(InputError, match="--overwrite"):
        call("export", runs_dir / "resnet", *out)
    call("export", runs_dir / "resnet", *out, "--overwrite")


# ---------------------------------------------------------------- run.py by itself
def test_run_py_sees_the_very_pixels_that_networks_were_trained_on(tmp_path):
    rng, turned = np.random.default_rng(0), Image.Exif()
    turned[0x0112] = 6
    kinds = {"a.jpg": ("RGB", (700, 500), {}), "b.jpg": ("RGB", (300, 900), {"exif": turned}),
             "g.jpg": ("L", (99, 98), {}), "c.png": ("RGBA", (300, 900), {}), "d.png": ("P", (257, 256), {}),
             "e.webp": ("RGB", (64, 300), {}), "f.tif": ("RGB", (130, 70), {})}  # fmt: skip
    for name, (mode, (width, height), how) in kinds.items():
        noise = rng.integers(0, 256, (height, width, 4 if mode == "RGBA" else 3), dtype=np.uint8)
        path = tmp_path / name
        Image.fromarray(noise).convert(mode).save(path, **how)
        for exact, frame in ((True, "square"), (False, "whole")):
            expected, size = read_square(path, 64, exact, frame)
            image, found_size = run_onnx.decode(path, np.inf if exact else 128)
            assert found_size == size
            assert np.array_equal(run_onnx.cut(image, frame_of(*size, frame), 64, size), expected), (name, frame)
        for share in (0.9, 0.31, 0.07):
            side = share * min(size)
            x, y = rng.uniform(0, size[0] - side), rng.uniform(0, size[1] - side)
            box = (x, y, x + side, y + side)
            image, _ = run_onnx.decode(path, int(2 * 64 / side * min(size)))
            expected = read_crops(path, [box], [64], size)[0]
            assert np.array_equal(run_onnx.cut(image, box, 64, size), expected), (name, share)


def test_run_py_encodes_metadata_as_networks_know_it(tmp_path):
    table = pd.DataFrame({"sex": ["m", "f", "m", None], "age": [1, 2.5, None, 4], "code": ["1", "02", "x", "3.0"]})
    encoder = MetaEncoder.fit(table, ("sex", "age", "code", "none"))
    columns = list(encoder.columns.items())
    for table in ({"sex": ["m", " f", "NA", "", "other"], "age": ["003", "1e1", "", "inf", "word"],
                   "code": ["01", "2.0", "X", "nan", "True"]},
                  {"sex": ["n/a", "<NA>", "m"], "age": ["TRUE", "FALSE", ""],
                   "code": ["true", "FALSE", "#N/A"]}):  # fmt: skip
        cells = pd.DataFrame(table)
        cells.to_csv(tmp_path / "cells.csv", index=False)
        expected = encoder.encode(pd.read_csv(tmp_path / "cells.csv"))
        found = [run_onnx.encode(row, columns) for row in cells.to_dict("records")]
        assert np.array_equal(np.array(found, np.float32), expected)
    assert np.array_equal(run_onnx.encode({}, columns), encoder.encode(pd.DataFrame(index=[0]))[0])


def test_run_py_refuses_what_predict_refuses_in_one_line(resnet, new_images, tmp_path):
    (tmp_path / "other.csv").write_text("image_name,sex\n0001,male\n")
    (tmp_path / "unnamed.csv").write_text("file,sex\n0026,male\n")
    (tmp_path / "a").mkdir()
    for words, said in (([new_images, new_images / "a" / "0024.jpg", tmp_path / "a" / "0024.jpg"], "same name"),
                        ([new_images, "--csv", tmp_path / "other.csv"], "names none of the images"),
                        ([new_images, "--csv", tmp_path / "unnamed.csv"], "names none of the images"),
                        ([tmp_path / "none.jpg"], "none.jpg is missing"), ([tmp_path / "a"], "no images")):  # fmt: skip
        done = subprocess.run([sys.executable, resnet / "run.py", *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 1
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_files_need_onnxruntime_numpy_and_opencv_alone(tmp_path):
    export.write_boxes(tmp_path / "boxes.py")
    allowed = {"onnxruntime", "numpy", "cv2", "boxes"} | set(sys.stdlib_module_names)
    for path in (tmp_path / "boxes.py", Path(run_onnx.__file__)):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        assert {name.split(".")[0] for name in names} <= allowed


def test_every_box_rule_is_the_same_elsewhere(tmp_path):
    export.write_boxes(tmp_path / "boxes.py")
    spec = importlib.util.spec_from_file_location("boxes", tmp_path / "boxes.py")
    boxes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(boxes)
    for rule in localize.RULES:
        for frame, n in (("square", 14), ("whole", 56)):
            row, column = np.indices((n, n)) / n
            heat = 0.01 + np.exp(-((row - 0.4) ** 2 + (column - 0.55) ** 2) / 0.01).astype(np.float32)
            found, expected = (code(heat / heat.sum(), (300, 200), rule=rule, frame=frame)
                               for code in (boxes.find_boxes, localize.find_boxes))  # fmt: skip
            assert not expected[0].reason
            wide, known = (code(each[0], 0.2, (300, 200)) for code, each in (
                (boxes.enlarge, found), (localize.enlarge, expected)))  # fmt: skip
            assert (wide.corners, wide.inner, wide.confidence) == (known.corners, known.inner, known.confidence)
