"""New images through runs and blends."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL_MODEL, call, hashes
from PIL import Image

import blends
import models
from blends import Blend
from localize import Finder
from plumbing.data import CORNERS, MetaEncoder
from plumbing.files import read_json, sha256, write_json
from plumbing.images import read_square
from util import InputError


def predict(run, output, *images, meta=None, more=("--no-pictures",)):
    words = [*images, "--run", run, "--output", output, "--device", "cpu", *more]
    out = call("predict", *words, *([] if meta is None else ["--csv", meta]))
    return read(out / "predictions.csv")


def read(path):
    return pd.read_csv(path, dtype={"image_name": str}).set_index("image_name")


@pytest.fixture
def test_images(source):
    return [source / "images" / f"{i:04d}.jpg" for i in range(24, 28)]


@pytest.fixture
def runs(runs_dir, tmp_path):
    """A copy that tests may spoil."""
    return shutil.copytree(runs_dir, tmp_path / "runs")


# ---------------------------------------------------------------- scores and boxes
@pytest.mark.parametrize("name", ["resnet", "chipnet", "cropnet", "mean"])
def test_new_images_score_as_the_test_set_did(runs_dir, source, test_images, tmp_path, name):
    table = predict(runs_dir / name, tmp_path / "out", *test_images, meta=source / "test.csv")
    submission = read(runs_dir / name / "submission.csv")
    assert np.allclose(table["prob"], submission["target"][table.index], atol=1e-5)
    if name == "mean":
        assert {"resnet", "chipnet", "cropnet"} < set(table)
    if name == "cropnet":
        boxes = read(read_json(runs_dir / name / "config.json")["args"]["crop_dir"] + "/test_boxes.csv")
        assert np.allclose(table[CORNERS], boxes[CORNERS], atol=1e-3)


def test_an_image_scores_the_same_alone_by_every_blend(runs, source, test_images, tmp_path, monkeypatch):
    log = Blend(value=lambda prob, history: np.log(prob), score=np.exp)  # registered in one place
    monkeypatch.setitem(blends.BLENDS, "geometric", log)
    made = {mode: ["--runs", "resnet", "cropnet"] for mode in blends.BLENDS}
    made["rank"] += ["--weights", "resnet=1", "cropnet=3"]
    for mode, words in made.items():
        call("ensemble", mode, "--runs_dir", runs, "--name", f"by_{mode}", *words)
    call("ensemble", "rank", "--runs_dir", runs, "--name", "by_ranks", "--runs", "by_weights", "by_geometric", "chipnet")
    for name in ("by_ranks", *(f"by_{mode}" for mode in made)):
        table = predict(runs / name, tmp_path / name, test_images[1], meta=source / "test.csv")
        assert table["prob"].item() == pytest.approx(read(runs / name / "submission.csv")["target"]["0025"], abs=1e-5)
    probs = read(tmp_path / "by_geometric" / "predictions.csv").loc["0025"]
    assert probs["prob"] == pytest.approx(np.sqrt(probs["resnet"] * probs["cropnet"]), abs=0.01)


def test_runs_made_by_relative_paths_can_be_moved_with_their_originals_gone(
    runs_dir, data_dir, source, test_images, tmp_path, monkeypatch
):
    tour = tmp_path / "tour"
    shutil.copytree(data_dir, tour / "data")
    shutil.copytree(runs_dir / "resnet", tour / "runs" / "resnet")
    monkeypatch.chdir(tour)
    call("train", "--model", "cropnet", *SMALL_MODEL)
    call("ensemble", "rank")
    tour.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "data")
    monkeypatch.chdir(tmp_path)
    table = predict("moved/runs/ensemble", "out", *test_images, meta=source / "test.csv")
    expected = read(tmp_path / "moved" / "runs" / "ensemble" / "submission.csv")["target"]
    assert np.allclose(table["prob"], expected[table.index], atol=1e-5)


def test_images_are_decoded_and_searched_as_in_training(runs, test_images, tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (301, 301, 3), dtype=np.uint8))  # large enough to decode a part
    image.save(tmp_path / "a.jpg")
    for exact in (True, False):
        write_json(runs / "resnet" / "config.json", read_json(runs / "resnet" / "config.json") | {"exact": exact})
        square = read_square(tmp_path / "a.jpg", 64, exact)[0]
        expected = []
        for k in (0, 1):
            network, content = models.load_checkpoint(runs / "resnet" / f"fold{k}_best.pt")
            meta = torch.from_numpy(MetaEncoder(content["encoder"]).encode(pd.DataFrame(index=[0])))
            batch = torch.tensor(square).permute(2, 0, 1)[None], meta
            expected.append(models.predict(network, [batch], torch.device("cpu"), tta=2).item())
        found = predict(runs / "resnet", tmp_path / str(exact), tmp_path / "a.jpg")["prob"].item()
        assert found == pytest.approx(np.mean(expected), abs=1e-6)
    assert read(tmp_path / "True" / "predictions.csv")["prob"].item() != found

    config, confidence = read_json(runs / "cropnet" / "config.json"), {}
    square, size = read_square(test_images[1], 64)
    for amp in ("off", "bf16"):  # of the maps the run's crops were cut by
        write_json(runs / "cropnet" / "config.json", config | {"crop": config["crop"] | {"amp": amp}})
        confidence[amp] = predict(runs / "cropnet", tmp_path / amp, test_images[1])["confidence"].item()
        finder = Finder.load(runs / "cropnet" / "finder", config["crop"], torch.device("cpu"))
        attention = finder.maps(square[None], "cpu", amp=amp)[0]
        assert confidence[amp] == pytest.approx(finder.box(attention, size).confidence, abs=1e-6)
    assert confidence["off"] != confidence["bf16"]


def test_precision_changes_predictions_a_little(runs_dir, test_images, tmp_path):
    exact, rough = (
        predict(runs_dir / "cropnet", tmp_path / amp, *test_images, more=["--amp", amp, "--no-pictures"])["prob"]
        for amp in ("off", "bf16")
    )
    assert np.allclose(exact, rough, atol=0.02)
    assert not np.array_equal(exact, rough)


# ---------------------------------------------------------------- images, their names and metadata
def test_folders_of_folders_with_pictures_and_overwrite(runs_dir, source, tmp_path, capsys):
    before, folder = hashes(source), tmp_path / "in"
    for i, name in ((2, "a/0002.jpg"), (25, "b/c/0025.JPG"), (26, "0026.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "images" / f"{i:04d}.jpg", folder / name)
    table = predict(runs_dir / "ensemble", tmp_path / "out", folder, source / "images" / "0003.jpg", more=())
    assert set(table.index) == {"a/0002", "b/c/0025", "0026", "0003"}
    assert table["prob"].between(0, 1).all()
    assert "1 images have names of training images" in capsys.readouterr().out
    out = tmp_path / "out"
    assert {p.relative_to(out).as_posix()[:-4] for p in out.rglob("*.png")} == set(table.index)
    with pytest.raises(InputError, match="--overwrite"):
        predict(runs_dir / "resnet", out, folder)
    other = predict(runs_dir / "resnet", out, folder / "0026.jpg", more=["--overwrite"])
    assert other.index.tolist() == ["0026"]
    assert [path.name for path in out.rglob("*.png")] == ["0026.png"]  # none of other images
    assert hashes(source) == before


def test_names_in_a_table_may_have_suffixes_and_dots(runs, source, test_images, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for old, new in zip(test_images, ("0024.jpg", "a.b.c.jpg", "0000.9.png", "0027.jpg"), strict=True):
        shutil.copy(old, folder / new)
    meta = pd.read_csv(source / "test.csv", dtype={"image_name": str})
    meta["image_name"] = ["0024.jpg", "a.b.c", "0000.9.png", "0027.JPG"]
    meta.to_csv(tmp_path / "meta.csv", index=False)
    oof = pd.read_csv(runs / "resnet" / "oof.csv", dtype={"image_name": str})
    oof.replace({"0001": "a.b.c"}).to_csv(runs / "resnet" / "oof.csv", index=False)
    metrics = read_json(runs / "resnet" / "metrics.json")
    metrics["sha256"]["oof.csv"] = sha256(runs / "resnet" / "oof.csv")
    write_json(runs / "resnet" / "metrics.json", metrics)
    table = predict(runs / "resnet", tmp_path / "out", folder, meta=tmp_path / "meta.csv")
    told = capsys.readouterr().out
    assert "1 images have names of training images" in told  # a.b.c, and 0000.9 is not 0000
    assert "missing" not in told
    expected = read(runs / "resnet" / "submission.csv")["target"]
    assert np.allclose(table["prob"][["0024", "0027"]], expected[["0024", "0027"]], atol=1e-5)
    meta[2:].to_csv(tmp_path / "meta.csv", index=False)
    predict(runs / "resnet", tmp_path / "half", folder, meta=tmp_path / "meta.csv")
    assert "2 of 4" in capsys.readouterr().out
    meta.assign(image_name=[*"wxyz"]).to_csv(tmp_path / "meta.csv", index=False)
    with pytest.raises(InputError, match=r"meta\.csv"):
        predict(runs / "resnet", tmp_path / "none", folder, meta=tmp_path / "meta.csv")


def test_missing_metadata_is_said_where_networks_know_it(runs_dir, source, test_images, tmp_path, capsys):
    predict(runs_dir / "mean", tmp_path / "all", test_images[0])
    told = capsys.readouterr().out
    assert all(name in told for name in ("sex", "age_approx", "anatom_site_general_challenge"))
    assert "box_side" not in told  # which predict.py finds itself
    pd.read_csv(source / "test.csv", dtype=str).drop(columns="sex").to_csv(tmp_path / "meta.csv", index=False)
    predict(runs_dir / "mean", tmp_path / "one", test_images[0], meta=tmp_path / "meta.csv")
    told = capsys.readouterr().out
    assert ("sex" in told, "age_approx" in told) == (True, False)
    predict(runs_dir / "chipnet", tmp_path / "none", test_images[0])
    assert "sex" not in capsys.readouterr().out


def test_bad_images_are_named_or_left_out(runs_dir, test_images, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in test_images:
        shutil.copy(path, folder)
    (folder / "0025.jpg").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"0025\.jpg.*--on_error skip"):
        predict(runs_dir / "resnet", tmp_path / "out", folder)
    assert not (tmp_path / "out" / "predictions.csv").exists()
    table = predict(runs_dir / "resnet", tmp_path / "out", folder, more=["--on_error", "skip"])
    assert table.index.tolist() == ["0024", "0026", "0027"]
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    with pytest.raises(InputError, match="--output"):
        predict(runs_dir / "resnet", folder, folder)
    for path in test_images:
        (folder / path.name).write_bytes(b"broken")
    with pytest.raises(InputError, match="none of the images"):
        predict(runs_dir / "resnet", tmp_path / "no", folder, more=["--on_error", "skip"])


@pytest.mark.parametrize(
    ("run", "images", "word"),
    [
        ("nowhere", ["0024.jpg"], "nowhere"),
        ("resnet", ["no.jpg"], r"no\.jpg"),
        ("resnet", ["."], "holds no"),
        ("resnet", ["a/0024.jpg", "b/0024.png"], "share a name"),
    ],
)
def test_bad_words(runs_dir, test_images, tmp_path, run, images, word):
    for name in ("0024.jpg", "a/0024.jpg", "b/0024.png"):
        if name in images:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.open(test_images[0]).save(tmp_path / name)
    with pytest.raises((InputError, FileNotFoundError), match=word):
        predict(runs_dir / run, tmp_path / "out", *(tmp_path / name for name in images))


# ---------------------------------------------------------------- runs that are not what they were
def test_runs_that_were_changed_or_are_of_another_version_are_refused(runs, test_images, tmp_path):
    def refused(run, word):
        with pytest.raises(InputError, match=word):
            predict(runs / run, tmp_path / "out", *test_images)

    shutil.copy(runs / "resnet" / "fold1_best.pt", runs / "resnet" / "fold0_best.pt")
    refused("resnet", r"fold0_best\.pt")
    refused("mean", r"fold0_best\.pt")
    metrics = read_json(runs / "resnet" / "metrics.json")
    write_json(runs / "resnet" / "metrics.json", metrics | {"mean_auc": 0.5})  # as if it had been trained again
    refused("mean", "blend")
    config = read_json(runs / "cropnet" / "config.json")
    write_json(runs / "cropnet" / "config.json", config | {"crop": config["crop"] | {"source": "boxes"}})
    refused("cropnet", "csv")  # which new images are not in
    old = {key: value for key, value in config["crop"].items() if key != "shifts"}
    write_json(runs / "cropnet" / "config.json", config | {"crop": old})
    refused("cropnet", "shifts")
    (runs / "chipnet" / "config.json").write_text('{"argv": []}')
    refused("chipnet", r"config\.json")
