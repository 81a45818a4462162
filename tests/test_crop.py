"""crop.py: where boxes come from, what is cut, what is refused."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL_MODEL, call, hashes
from PIL import Image

import crop
import localize
import models
from localize import Box, Source
from plumbing import arrays
from plumbing.arrays import open_array
from plumbing.data import CORNERS, read_data
from plumbing.files import read_json, write_json
from plumbing.images import read_crops, read_image
from util import PLACE, InputError

SMALL = ["--backbone", "regnet_tiny", "--weights", "none", "--views", 1]


@pytest.fixture
def make(data_dir, runs_dir, tmp_path):
    """Crop into tmp_path by words of the command line."""

    def run(*words, output=tmp_path):
        chipnet = [] if "--run" in words else ["--run", runs_dir / "chipnet"]
        return call("crop", "--data_dir", data_dir, "--output_dir", output, "--device", "cpu", *SMALL, *chipnet, *words)

    return run


def read_boxes(crops, split="train"):
    return pd.read_csv(crops / f"{split}_boxes.csv", dtype={"image_name": str})


# ---------------------------------------------------------------- pixels
def test_crop_is_cut_from_the_original_at_full_resolution(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    boxes = [(410, 20, 474, 84), (0, 0, 300, 300)]
    cut, whole = read_crops(tmp_path / "a.png", boxes, [64, 300], (500, 300))
    assert (whole == image[:, :300]).all()
    assert (cut == image[20:84, 410:474]).all()
    with pytest.raises(InputError, match="500 x 300 .* 400 x 300"):
        read_crops(tmp_path / "a.png", boxes, [64, 300], (400, 300))


def test_reduced_decoding_of_a_crop_is_close(tmp_path):
    ramp = np.linspace(0, 255, 1601)[None, :, None] * np.ones((1201, 1, 3))  # sides are no multiples of 8
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    (crop,) = read_crops(tmp_path / "a.jpg", [(500.5, 100.25, 1600.5, 1200.25)], [64], (1601, 1201))
    expected = np.linspace(500.5, 1600.5, 65)[:-1] + 1100 / 128
    assert np.abs(crop[32, :, 0] - (expected - 0.5) * 255 / 1600 + 0.5).max() < 1


def test_place_of_a_box_in_its_wide_crop():
    middle, corner = crop.place_in_wide([Box(100, 50, 200, 150), Box(0, 200, 100, 300)], [(500, 300)] * 2)
    assert middle == pytest.approx([20 / 140, 20 / 140, 100 / 140])
    assert corner == pytest.approx([0, 40 / 140, 100 / 140])  # no room to the left and below


# ---------------------------------------------------------------- by attention
def test_crop_directory(runs_dir, data_dir, source):
    crops = data_dir / "crops" / "chipnet"
    data, facts = read_data(data_dir), read_json(crops / "crop.json")
    for split, table in data.tables().items():
        array, boxes = open_array(crops / f"{split}_64.npy", len(table)), read_boxes(crops, split)
        assert list(boxes) == ["image_name", *CORNERS, "oof", "fallback", "confidence", *PLACE]
        assert boxes["image_name"].tolist() == table["image_name"].tolist()
        assert (boxes["oof"] == 1).all()
        size, box = (table["width"].iloc[0], table["height"].iloc[0]), Box(*boxes[CORNERS].iloc[0])
        path = source / "images" / f"{boxes['image_name'].iloc[0]}.jpg"
        cuts = read_crops(path, [box.corners, localize.widen(box, 1.4, size).corners], [64, 90], size)
        assert (array[0] == cuts[0]).all()
        if split == "train":
            wide = open_array(crops / f"train_wide_{facts['wide_size']}.npy", len(table))
            assert (wide[0] == cuts[1]).all()
    assert (crops / "montage.png").stat().st_size > 10_000
    assert (facts["folds"], facts["run"]) == ([0, 1], str(runs_dir / "chipnet"))


def test_by_default_crops_lie_where_runs_chipnet_and_saliency_both_look(data_dir, runs_dir, tmp_path, monkeypatch):
    shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns("crops"))
    shutil.copytree(runs_dir / "chipnet", tmp_path / "runs" / "chipnet")
    monkeypatch.chdir(tmp_path)
    crops = call("crop", "--backbone", "regnet_tiny", "--weights", "none", "--device", "cpu")
    assert crops.resolve() == tmp_path / "data" / "crops" / "chipnet"
    assert read_json(crops / "crop.json")["source"] == "attention*saliency"
    maps, usual = np.load(crops / "train_attention.npy"), data_dir / "crops" / "chipnet"
    assert (maps == np.load(usual / "train_attention.npy")).all()
    data = read_data(data_dir)
    array, saliencies = open_array(data.array_path("train"), 24), localize.load_saliencies(crops / "saliency.pt", "cpu")
    for k in (0, 1):  # of the networks that held these images out
        network, _ = models.load_checkpoint(runs_dir / "chipnet" / f"fold{k}_best.pt")
        network.shifts = 2
        rows = np.flatnonzero(data.train["fold"] == k)
        parts = [localize.attention_maps([one], array[rows], "cpu", 4) for one in (network, saliencies[k])]
        fine = np.stack([localize.upsample(attention, 16) for attention in parts[0]])
        product = np.sqrt(fine * parts[1])
        assert np.allclose(maps[rows], product / product.sum(axis=(1, 2), keepdims=True), atol=1e-5)
        again = localize.fit_saliency(saliencies[k].network, array, np.flatnonzero(data.train["fold"] != k), "cpu", k)
        assert torch.allclose(again.weight, saliencies[k].weight, atol=1e-4)


def test_images_that_no_network_held_out_get_the_mean_map(make, data_dir, runs_dir, tmp_path, capsys):
    maps = np.load(make("--source", "attention", "--shifts", 1) / "test_attention.npy")
    networks = [models.load_checkpoint(runs_dir / "chipnet" / f"fold{k}_best.pt")[0] for k in (0, 1)]
    test = open_array(data_dir / "test_64.npy", 4)
    assert np.allclose(maps, localize.attention_maps(networks, test, "cpu", 1), atol=1e-6)

    run = shutil.copytree(runs_dir / "chipnet", tmp_path / "partial")
    metrics = read_json(run / "metrics.json")
    write_json(run / "metrics.json", metrics | {"folds": metrics["folds"][:1]})
    crops = make("--run", run, "--source", "attention", "--shifts", 1, "--rule", "original", "--num_devs", 0.5)
    assert crops.name == "partial_attention"
    assert "fold 1" in capsys.readouterr().out
    train, boxes = read_data(data_dir).train, read_boxes(crops)
    assert (boxes["oof"] == (train["fold"] == 0)).all()
    found, array = np.load(crops / "train_attention.npy"), open_array(data_dir / "train_64.npy", 24)
    assert np.allclose(found, localize.attention_maps(networks[:1], array, "cpu", 1), atol=1e-6)
    box = localize.find_box(found[3], tuple(train[["width", "height"]].iloc[3]), "original", 0.5)
    assert boxes[CORNERS].iloc[3].tolist() == pytest.approx(box.corners)


@pytest.mark.parametrize("kind", ["attention", "attention*saliency"])
def test_a_stopped_call_goes_on_to_the_same_bytes(make, tmp_path, monkeypatch, kind):
    def files(folder):
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".npy", ".csv", ".pt")}

    monkeypatch.setattr(arrays, "CHUNK", 5)
    whole, seen = make("--source", kind, output=tmp_path / "whole"), []

    def read(*words):
        if len(seen) == 7:
            raise KeyboardInterrupt
        seen.append(words[0])
        return read_crops(*words)

    monkeypatch.setattr(crop, "read_crops", read)
    with pytest.raises(KeyboardInterrupt):
        make("--source", kind, "--workers", 1, output=tmp_path / "stopped")
    stopped = tmp_path / "stopped" / whole.name
    assert {path.suffix for path in stopped.iterdir()} <= {".part", ".pt"}
    with pytest.raises(InputError, match="views = 1, not 2"):
        make("--source", kind, "--views", 2, output=tmp_path / "stopped")
    counted = len(seen)
    monkeypatch.setattr(crop, "read_crops", lambda *words: seen.append(words[0]) or read_crops(*words))
    make("--source", kind, output=tmp_path / "stopped")
    assert len(seen) - counted == 28 - 5  # the first five were done
    assert files(stopped) == files(whole)
    assert not [path for path in stopped.iterdir() if path.suffix in (".part", ".tmp")]


# ---------------------------------------------------------------- other sources
def test_grad_cam_maps_are_named_after_their_run(make, runs_dir):
    crops = make("--source", "gradcam", "--run", runs_dir / "resnet")
    assert crops.name == "resnet_gradcam"
    assert np.load(crops / "train_attention.npy").shape == (24, 2, 2)


def test_a_source_is_one_row(make, data_dir, source, tmp_path, monkeypatch):
    class Corner:
        def attention(self, image, views=1):
            maps = torch.full((len(image), 7, 7), 1e-3)
            maps[:, 1, 1] = 1
            return maps / maps.sum(dim=(1, 2), keepdim=True)

    monkeypatch.setitem(localize.SOURCES, "corner", Source(lambda net, saliency, meta: Corner()))
    crops = make("--source", "corner")
    assert crops.name == "corner"
    boxes = read_boxes(crops)
    assert (boxes["fallback"].isna() & (boxes["oof"] == 1)).all()
    run = call("train", "--model", "cropnet", "--data_dir", data_dir, "--crop_dir", crops, "--runs_dir", tmp_path,
               "--fold", 0, *SMALL_MODEL)  # fmt: skip
    out = call("predict", "--run", run, "--output", tmp_path / "out", "--csv", source / "test.csv", "--no-pictures",
               "--device", "cpu", source / "images" / "0025.jpg")  # fmt: skip
    found = pd.read_csv(out / "predictions.csv", dtype={"image_name": str}).iloc[0]
    expected = read_boxes(crops, "test").set_index("image_name").loc["0025", CORNERS]
    assert np.allclose(found[CORNERS].astype(float), expected.astype(float))


def test_boxes_of_a_user(make, data_dir, source, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("image_name,x0,y0,x1,y1\n0000,10,20,40,30\n0001.jpg,,,,\n0024.jpg,-.3,0,20,20.4\n")
    words = ["--source", "boxes", "--boxes", path]
    crops = make(*words)
    boxes = read_boxes(crops).set_index("image_name")
    assert boxes.loc["0000", CORNERS].tolist() == [10, 10, 40, 40]
    assert boxes["fallback"].notna().sum() == 23
    edge = read_boxes(crops, "test").set_index("image_name").loc["0024", CORNERS].tolist()
    assert edge == pytest.approx([0, 0, 20.4, 20.4])  # moved into the picture
    assert not (crops / "train_attention.npy").exists()
    image = read_image(source / "images" / "0000.jpg")[0]
    expected = image.resize((64, 64), Image.Resampling.BILINEAR, box=(10, 10, 40, 40))
    assert (open_array(crops / "train_64.npy", 24)[0] == np.asarray(expected)).all()
    for wrong in (["--source", "boxes"], ["--boxes", path]):
        with pytest.raises(InputError, match="--boxes"):
            make(*wrong)
    for box in ("-3,0,20,20", "10,20,400,30", "40,20,10,30", "nan,0,20,20"):
        path.write_text(f"image_name,x0,y0,x1,y1\n0000,{box}\n")
        with pytest.raises(InputError, match=r"mine\.csv.*0000"):
            make(*words, "--overwrite")
    path.write_text("image_name,x0,y0,x1,y1\nother,0,0,20,20\n")
    with pytest.raises(InputError, match="none"):
        make(*words, "--overwrite")


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--source", "attention", "--run", "resnet"], "ChipNet"),
        (["--source", "gradcam"], "ChipNet"),
        (["--source", "gradcam", "--run", "cropnet"], "whole images"),
        (["--source", "gradcam", "--run", "mean"], "whole images"),
        (["--source", "saliency", "--weights", "resnet/fold0_best.pt"], "fold 1"),  # it learned fold 1's labels
        (["--image_dir", "chipnet"], "--image_dir"),
    ],
)
def test_what_does_not_fit_is_refused(make, runs_dir, tmp_path, words, text):
    with pytest.raises(InputError, match=text):
        make(*(runs_dir / word if (runs_dir / word).exists() else word for word in words))
    assert not list(tmp_path.rglob("crop.json"))


@pytest.mark.parametrize(("model", "kind"), [("resnet", "gradcam"), ("chipnet", "attention")])
def test_a_run_that_was_trained_on_crops_does_not_say_where_to_crop(make, runs_dir, tmp_path, model, kind):
    run = shutil.copytree(runs_dir / model, tmp_path / "on_crops")
    crop_json = read_json(runs_dir / "cropnet" / "config.json")["crop"]
    write_json(run / "config.json", read_json(run / "config.json") | {"crop": crop_json})
    with pytest.raises(InputError, match="whole images"):
        make("--source", kind, "--run", run)


def test_networks_of_other_folds_or_changed_since_are_refused(make, runs_dir, tmp_path):
    run = shutil.copytree(runs_dir / "chipnet", tmp_path / "run")
    shutil.copy(run / "fold1_best.pt", run / "fold0_best.pt")
    with pytest.raises(InputError, match=r"fold0_best\.pt"):
        make("--run", run)
    metrics = read_json(run / "metrics.json")
    metrics["folds"][0]["checkpoint"] = metrics["folds"][1]["checkpoint"]
    write_json(run / "metrics.json", metrics)
    with pytest.raises(InputError, match="fold 0"):  # which this network learned from
        make("--run", run)


def test_bad_originals_and_finished_crops_are_refused_and_originals_stay(make, source, data_dir, tmp_path):
    before, images = hashes(source), shutil.copytree(source / "images", tmp_path / "images")
    (images / "0005.jpg").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"0005\.jpg"):
        make("--image_dir", images)
    assert not (tmp_path / "chipnet" / "crop.json").exists()
    with pytest.raises(InputError, match="--overwrite"):
        make(output=data_dir / "crops")
    assert hashes(source) == before
