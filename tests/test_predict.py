"""New images through runs and blends."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL_CROP, call, change, read, rewrite
from PIL import Image

import blends
import models
from inference import open_predictor
from localize import Finder
from plumbing.data import CORNERS
from plumbing.files import read_json
from plumbing.images import read_square
from plumbing.runs import read_run
from tasks import Binary
from util import InputError

BINARY = Binary(("1",), "auc")


def test_maps_are_drawn_with_boxes_of_the_class(runs_dir, source, tmp_path):
    image = source / "images" / "0024.jpg"
    words = ["--device", "cpu", "--maps", "--t_class", 0, "--t_roi", 0.5, image]
    for run in ("resnet", "chipnet", "cropnet"):
        folder = call("predict", "--run", runs_dir / run, "--output", tmp_path / run, *words)
        rows = read(folder / "maps.csv")
        probability = read(runs_dir / run / "test_predictions.csv").groupby("image_name")["prob"].mean()["0024"]
        assert (rows["class"] == 1).all()
        assert rows["probability"].to_numpy() == pytest.approx(probability, abs=0.1)  # of one view
        width, height = Image.open(image).size
        assert rows["x1"].between(1, width).all()
        assert rows["y1"].between(1, height).all()
        assert rows["confidence"].is_monotonic_decreasing
        assert Image.open(folder / "0024.png").size[0] > 500
    named = call("predict", "--run", runs_dir / "resnet", "--output", tmp_path / "named", *words, "--class", 1,
                 "--t_class", 1, "--way", "gradcam")  # fmt: skip
    rows, same = read(named / "maps.csv"), read(tmp_path / "resnet" / "maps.csv")
    assert np.allclose(rows.drop(columns=["image_name"]), same.drop(columns=["image_name"]), rtol=1e-3)
CPU = torch.device("cpu")


def predict(run, output, *images, meta=None, more=("--no-pictures",)):
    words = [*images, "--run", run, "--output", output, "--device", "cpu", *more]
    return by_name(call("predict", *words, *([] if meta is None else ["--csv", meta])) / "predictions.csv")


def by_name(path):
    return read(path).set_index("image_name")


@pytest.fixture
def test_images(source):
    return [source / "images" / f"{i:04d}.jpg" for i in range(24, 28)]


@pytest.mark.parametrize("name", ["resnet", "chipnet", "cropnet", "mean"])
def test_new_images_score_as_the_test_set_did(runs_dir, data_dir, source, test_images, tmp_path, name):
    table = predict(runs_dir / name, tmp_path / "out", *test_images, meta=source / "test.csv")
    assert np.allclose(table["prob"], by_name(runs_dir / name / "submission.csv")["target"][table.index], atol=1e-5)
    if name in ("cropnet", "mean"):
        boxes = by_name(data_dir / "crops" / "chipnet" / "test_boxes.csv")
        assert np.allclose(table[CORNERS], boxes[CORNERS], atol=1e-3)


def test_an_image_scores_the_same_alone_by_every_blend(runs, source, test_images, tmp_path, monkeypatch):
    geometric = blends.Blend(lambda task, prob, history: np.log(prob), lambda task, average, history: np.exp(average))
    monkeypatch.setitem(blends.BLENDS, "geometric", geometric)  # a blend is one row
    made = {mode: ["--runs", "resnet", "cropnet"] for mode in blends.BLENDS}
    made["rank"] += ["--weights", "resnet=1", "cropnet=3"]
    for mode, words in made.items():
        call("ensemble", mode, "--runs_dir", runs, "--name", f"by_{mode}", *words)
    call("ensemble", "rank", "--runs_dir", runs, "--name", "nested", "--runs", "by_weights", "by_geometric", "chipnet")
    for name in ("nested", *(f"by_{mode}" for mode in made)):
        table = predict(runs / name, tmp_path / name, test_images[1], meta=source / "test.csv")
        expected = by_name(runs / name / "submission.csv")["target"]["0025"]
        assert table["prob"].item() == pytest.approx(expected, abs=1e-5)
    assert table["prob"].item() == pytest.approx(np.sqrt(table["resnet"] * table["cropnet"]).item(), abs=0.01)


def test_images_are_decoded_and_searched_as_in_training(runs, test_images, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (301, 301, 3), dtype=np.uint8)  # large enough to decode a part
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    networks, found = [models.load_checkpoint(runs / "chipnet" / f"fold{k}_best.pt")[0] for k in (0, 1)], []
    for exact in (True, False):
        change(runs / "chipnet" / "config.json", lambda config, exact=exact: config.update(exact=exact))
        image = torch.tensor(read_square(tmp_path / "a.jpg", 64, exact)[0]).permute(2, 0, 1)[None]
        expected = [models.predict(network, BINARY, [(image, image[:, :0])], CPU, tta=2) for network in networks]
        found.append(predict(runs / "chipnet", tmp_path / str(exact), tmp_path / "a.jpg")["prob"].item())
        assert found[-1] == pytest.approx(np.mean(expected), abs=1e-6)
    more = ["--amp", "bf16", "--no-pictures"]
    found.append(predict(runs / "chipnet", tmp_path / "rough", tmp_path / "a.jpg", more=more)["prob"].item())
    assert found[0] != found[1] != found[2] == pytest.approx(found[1], abs=0.02)
    facts, (square, size) = read_json(runs / "cropnet" / "config.json")["crop"], read_square(test_images[1], 64)
    finder, found = Finder.load(runs / "cropnet" / "finder", facts, CPU), []
    for amp in ("off", "bf16"):  # of the maps the run's crops were cut by
        change(runs / "cropnet" / "config.json", lambda config, amp=amp: config["crop"].update(amp=amp))
        found.append(predict(runs / "cropnet", tmp_path / amp, test_images[1])["confidence"].item())
        box = finder.boxes(finder.maps(square[None], CPU, amp=amp)[0], size)[0]
        assert found[-1] == pytest.approx(box.confidence, abs=1e-6)
    assert found[0] != found[1]


def test_pictures_that_may_not_be_mirrored_are_looked_at_once_as_crops_are(runs, data_dir, tmp_path):
    change(runs / "chipnet" / "config.json", lambda config: config.update(views=1))  # --augment upright
    predictor = open_predictor(read_run(runs / "chipnet"), torch.device("cpu"), None, "off")
    where = ["--run", runs / "chipnet", "--data_dir", data_dir, "--output_dir", tmp_path, "--source", "attention"]
    assert predictor.finder.views == read_json(call("crop", *where, *SMALL_CROP) / "crop.json")["views"] == 1


def test_folders_of_folders_with_pictures_and_overwrite(runs_dir, source, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    for i, name in ((2, "a/0002.jpg"), (25, "b/c/0025.JPG"), (26, "0026.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "images" / f"{i:04d}.jpg", folder / name)
    table = predict(runs_dir / "ensemble", out, folder, source / "images" / "0003.jpg", more=())
    assert set(table.index) == {"a/0002", "b/c/0025", "0026", "0003"}
    assert "1 images have names of training images" in capsys.readouterr().out
    assert {p.relative_to(out).as_posix()[:-4] for p in out.rglob("*.png")} == set(table.index)
    with pytest.raises(InputError, match="--overwrite"):
        predict(runs_dir / "resnet", out, folder)
    predict(runs_dir / "resnet", out, folder / "0026.jpg", more=["--overwrite"])
    assert [path.name for path in out.rglob("*.png")] == ["0026.png"]  # none of other images
    with pytest.raises(InputError, match="share a name"):
        predict(runs_dir / "resnet", tmp_path / "twice", folder, source / "images" / "0026.jpg")


def test_names_in_a_table_may_have_suffixes_and_dots(runs, source, test_images, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    names = ["0024.jpg", "0000.9.png", "a.b.c.jpg", "0027.JPG"]
    for old, new in zip(test_images, names, strict=True):
        shutil.copy(old, tmp_path / "in" / new)
    meta = pd.read_csv(source / "test.csv").assign(image_name=["0024.JPG", "0000.9.png", "a.b.c", "0027.jpg"])
    meta.to_csv(tmp_path / "meta.csv", index=False)
    rewrite(runs / "resnet" / "oof.csv", lambda table: table.replace("0001", "a.b.c"))  # as if trained on that image
    table = predict(runs / "resnet", tmp_path / "out", tmp_path / "in", meta=tmp_path / "meta.csv")
    told = capsys.readouterr().out  # of a.b.c; 0000.9 is not 0000
    assert ("1 images have names of training images" in told, "missing" in told) == (True, False)
    expected = by_name(runs / "resnet" / "submission.csv")["target"][["0024", "0025", "0026", "0027"]]
    assert np.allclose(table["prob"][["0024", "0000.9", "a.b.c", "0027"]], expected, atol=1e-5)
    meta[2:].to_csv(tmp_path / "meta.csv", index=False)
    predict(runs / "resnet", tmp_path / "half", tmp_path / "in", meta=tmp_path / "meta.csv")
    assert "2 of 4" in capsys.readouterr().out


def test_missing_metadata_is_said_where_networks_know_it(runs_dir, source, test_images, tmp_path, capsys):
    def told(run, output, meta=None):
        predict(runs_dir / run, tmp_path / output, test_images[0], meta=meta)
        out = capsys.readouterr().out
        return {name for name in ("sex", "age_approx", "anatom_site_general_challenge", "box_side") if name in out}

    assert told("mean", "all") == {"sex", "age_approx", "anatom_site_general_challenge"}  # it finds the box itself
    pd.read_csv(source / "test.csv", dtype=str).drop(columns="sex").to_csv(tmp_path / "meta.csv", index=False)
    assert told("mean", "one", tmp_path / "meta.csv") == {"sex"}
    assert told("chipnet", "none") == set()


def test_bad_images_are_left_out(runs_dir, test_images, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"broken")
    images, out = [test_images[0], tmp_path / "bad.jpg", test_images[2]], tmp_path / "out"
    assert predict(runs_dir / "resnet", out, *images, more=["--on_error", "skip"]).index.tolist() == ["0024", "0026"]
    assert sorted(path.name for path in out.glob("*.png")) == ["0024.png", "0026.png"]
