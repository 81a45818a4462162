"""crop.py: where boxes come from, what is cut, what is refused."""

import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL_CROP, call, change, read
from PIL import Image

import crop
import localize
import models
from localize import Box, Source, attention_maps
from plumbing import arrays
from plumbing.arrays import open_array
from plumbing.data import CORNERS, read_data
from plumbing.files import read_json
from plumbing.images import read_crops, read_image
from util import INNER, PLACE, InputError


@pytest.fixture
def make(data_dir, runs_dir, tmp_path):
    """Crop into tmp_path by words of the command line."""

    def run(*words, output=tmp_path):
        words = [*words, *([] if "--run" in words else ["--run", runs_dir / "chipnet"])]
        return call("crop", "--data_dir", data_dir, "--output_dir", output, *SMALL_CROP, "--views", 1, *words)

    return run


def read_boxes(crops, split="train"):
    return read(crops / f"{split}_boxes.csv").set_index("image_name")


def test_crop_directory(runs_dir, data_dir, source):
    crops = data_dir / "crops" / "chipnet"
    data, facts = read_data(data_dir), read_json(crops / "crop.json")
    for split, table in data.tables().items():
        array, boxes = open_array(crops / f"{split}_64.npy", len(table)), read_boxes(crops, split)
        assert list(boxes) == [*CORNERS, "oof", "fallback", "confidence", *PLACE, *INNER]
        assert np.allclose(boxes[[*INNER]], boxes[CORNERS])  # nothing was added to them
        assert boxes.index.tolist() == table["image_name"].tolist()
        assert (boxes["oof"] == 1).all()
        size, box = (table["width"].iloc[0], table["height"].iloc[0]), Box(*boxes[CORNERS].iloc[0])
        wide, path = localize.widen(box, 1.4, size), source / "images" / f"{boxes.index[0]}.jpg"
        cuts = read_crops(path, [box.corners, wide.corners], [64, facts["wide_size"]], size)
        assert (array[0] == cuts[0]).all()
        if split == "train":
            assert (open_array(crops / f"train_wide_{facts['wide_size']}.npy", 24)[0] == cuts[1]).all()
    assert (crops / "montage.png").stat().st_size > 10_000
    assert (facts["folds"], facts["run"]) == ([0, 1], str(runs_dir / "chipnet"))
    middle, corner = crop.place_in_wide([Box(100, 50, 200, 150), Box(0, 200, 100, 300)], [(500, 300)] * 2)
    assert middle == pytest.approx([20 / 140, 20 / 140, 100 / 140])
    assert corner == pytest.approx([0, 40 / 140, 100 / 140])  # no room to the left and below


def test_by_default_crops_lie_where_runs_chipnet_and_saliency_both_look(data_dir, runs_dir, tmp_path, monkeypatch):
    shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns("crops"))
    shutil.copytree(runs_dir / "chipnet", tmp_path / "runs" / "chipnet")
    monkeypatch.chdir(tmp_path)
    crops = call("crop", *SMALL_CROP)
    assert crops.resolve() == tmp_path / "data" / "crops" / "chipnet"
    assert read_json(crops / "crop.json")["source"] == "attention*saliency"
    fold, array = read_data(data_dir).train["fold"].to_numpy(), open_array(data_dir / "train_64.npy", 24)
    maps, saliencies = np.load(crops / "train_attention.npy"), localize.load_saliencies(crops / "saliency.pt", "cpu")
    for k in (0, 1):  # of the network that held these images out, and of a saliency that was not fitted to them
        network, _ = models.load_checkpoint(runs_dir / "chipnet" / f"fold{k}_best.pt")
        network.shifts = 2
        again = localize.fit_saliency(saliencies[k].network, array, np.flatnonzero(fold != k), "cpu", seed=k)
        attention, saliency = (attention_maps([one], array[fold == k], "cpu", 4) for one in (network, again))
        product = np.sqrt([localize.upsample(one, 16) for one in attention] * saliency)
        assert np.allclose(maps[fold == k], product / product.sum(axis=(1, 2), keepdims=True), atol=1e-5)


def test_images_that_no_network_held_out_get_the_mean_map(make, data_dir, runs_dir, tmp_path, capsys):
    words = ["--source", "attention", "--shifts", 1, "--rule", "original", "--num_devs", 0.5]
    networks = [models.load_checkpoint(runs_dir / "chipnet" / f"fold{k}_best.pt")[0] for k in (0, 1)]
    test, array = open_array(data_dir / "test_64.npy", 4), open_array(data_dir / "train_64.npy", 24)
    assert np.allclose(np.load(make(*words) / "test_attention.npy"), attention_maps(networks, test, "cpu"), atol=1e-6)
    run, train = shutil.copytree(runs_dir / "chipnet", tmp_path / "partial"), read_data(data_dir).train
    change(run / "metrics.json", lambda metrics: metrics["folds"].pop())
    crops = make("--run", run, *words)
    assert (crops.name, "fold 1" in capsys.readouterr().out) == ("partial_attention", True)
    maps, boxes = np.load(crops / "train_attention.npy"), read_boxes(crops)
    assert boxes["oof"].tolist() == [int(fold == 0) for fold in train["fold"]]
    assert np.allclose(maps, attention_maps(networks[:1], array, "cpu"), atol=1e-6)
    box = localize.find_box(maps[3], tuple(train[["width", "height"]].iloc[3]), "original", 0.5)
    assert boxes[CORNERS].iloc[3].tolist() == pytest.approx(box.corners)


def test_a_stopped_call_goes_on_to_the_same_bytes(make, tmp_path, monkeypatch):
    def read(*words):
        seen.append(words[0])
        if len(seen) == 8:
            raise KeyboardInterrupt
        return read_crops(*words)

    monkeypatch.setattr(arrays, "CHUNK", 5)
    whole, stopped, seen = make(output=tmp_path / "whole"), tmp_path / "stopped" / "chipnet", []
    monkeypatch.setattr(crop, "read_crops", read)
    with pytest.raises(KeyboardInterrupt):
        make("--workers", 1, output=stopped.parent)
    assert {path.suffix for path in stopped.iterdir()} <= {".part", ".pt"}
    with pytest.raises(InputError, match="views = 1, not 2"):
        make("--views", 2, output=stopped.parent)
    begun = len(seen)
    make(output=stopped.parent)
    assert len(seen) - begun == 28 - 5  # the first five were done
    files = [{p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".json"} for folder in (whole, stopped)]
    assert files[0] == files[1]


def test_a_source_is_one_row(make, data_dir, monkeypatch):
    class Corner:
        def attention(self, image, views=1):
            maps = torch.full((len(image), 7, 7), 1e-3)
            maps[:, 1, 1] = 1
            return maps / maps.sum(dim=(1, 2), keepdim=True)

    class Cornered(Source):
        def make(self, *parts):
            return Corner()

    monkeypatch.setitem(localize.SOURCES, "corner", Cornered())
    crops = make("--source", "corner")
    boxes = read_boxes(crops)
    assert (crops.name, (boxes["fallback"].isna() & (boxes["oof"] == 1)).all()) == ("corner", True)
    finder = localize.Finder.load(crops, read_json(crops / "crop.json"), torch.device("cpu"))  # as predict.py does
    size = tuple(read_data(data_dir).train[["width", "height"]].iloc[0])
    box = finder.boxes(finder.maps(np.zeros((1, 64, 64, 3), np.uint8), "cpu")[0], size)[0]
    assert boxes[CORNERS].iloc[0].tolist() == pytest.approx(box.corners)


def test_boxes_of_a_user(make, source, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("image_name,x0,y0,x1,y1\n0000,10,20,40,30\n0001.jpg,,,,\n0024.jpg,-.3,0,20,20.4\n")
    crops = make("--source", "boxes", "--boxes", path)
    boxes = read_boxes(crops)
    assert boxes.loc["0000", CORNERS].tolist() == [10, 10, 40, 40]
    assert boxes["fallback"].notna().sum() == 23
    assert read_boxes(crops, "test").loc["0024", CORNERS].tolist() == pytest.approx([0, 0, 20.4, 20.4])  # moved inside
    assert not (crops / "train_attention.npy").exists()
    image = read_image(source / "images" / "0000.jpg")[0]
    expected = image.resize((64, 64), Image.Resampling.BILINEAR, box=(10, 10, 40, 40))
    assert (open_array(crops / "train_64.npy", 24)[0] == np.asarray(expected)).all()

