"""Maps to boxes, boxes to crops."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import call, hashes
from PIL import Image

import crop
import localize
import models
import util
from localize import Box, find_box
from util import InputError

ATTENTION = ["--source", "attention"]


def blob(*cells, size=7, floor=0.002):
    """Attention with the named (row, column, weight) cells over a flat floor, summing to 1."""
    attention = np.full((size, size), floor)
    for row, column, weight in cells:
        attention[row, column] += weight
    return attention / attention.sum()


def inside(box, size):
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= size[0] + 1e-9 and box.y1 <= size[1] + 1e-9


@pytest.mark.parametrize("rule", sorted(localize.RULES))
@pytest.mark.parametrize("cell", [(0, 0), (0, 6), (6, 3), (3, 3), (6, 6)])
@pytest.mark.parametrize("size", [(700, 700), (1200, 700), (700, 1000)])
def test_box_is_a_square_in_the_picture_around_the_peak(rule, cell, size):
    box = find_box(blob((*cell, 1.0)), size, rule)
    assert box.reason == ""
    assert inside(box, size)
    assert box.x1 - box.x0 == pytest.approx(box.y1 - box.y0)
    short, (width, height) = min(size), size
    x = (width - short) / 2 + (cell[1] + 0.5) * short / 7
    y = (height - short) / 2 + (cell[0] + 0.5) * short / 7
    assert box.x0 <= x <= box.x1
    assert box.y0 <= y <= box.y1
    assert 0.5 < box.confidence <= 1


@pytest.mark.parametrize("rule", sorted(localize.RULES))
@pytest.mark.parametrize("view", range(8))
def test_box_turns_with_the_map(rule, view):
    attention = blob((1, 2, 1.0), (2, 2, 0.6), (2, 3, 0.5))
    box = find_box(attention, (700, 700), rule)
    turned = models.dihedral(torch.tensor(attention), view).numpy()
    mask = np.zeros((700, 700))
    mask[round(box.y0) : round(box.y1), round(box.x0) : round(box.x1)] = 1
    ys, xs = np.nonzero(models.dihedral(torch.tensor(mask), view).numpy())
    other = find_box(turned, (700, 700), rule)
    found = (other.x0, other.y0, other.x1, other.y1)
    assert found == pytest.approx((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), abs=5)


@pytest.mark.parametrize("rule", sorted(localize.RULES))
def test_box_scales_with_the_original(rule):
    attention = blob((1, 2, 1.0), (4, 3, 0.4))
    small, large = (find_box(attention, size, rule) for size in ((400, 300), (1600, 1200)))
    assert np.allclose(small.scaled(4), large.scaled(1))


@pytest.mark.parametrize("rule", sorted(localize.RULES))
@pytest.mark.parametrize("attention", [np.full((7, 7), 1 / 49), np.full((7, 7), np.nan),
                                       np.zeros((7, 7))])  # fmt: skip
def test_maps_that_say_nothing_give_the_whole_square_and_why(rule, attention):
    box = find_box(attention, (900, 700), rule)
    assert box.scaled(1) == (100, 0, 800, 700)
    assert box.reason
    assert box.confidence == pytest.approx(0, abs=1e-9)


def test_component_rule_covers_two_blobs_and_drops_a_stray_cell():
    two = find_box(blob((1, 1, 1.0), (5, 5, 0.9), (5, 1, 0.0)), (700, 700))
    assert two.reason == "fills the image"  # two blobs that far apart span most of it
    near = find_box(blob((1, 1, 1.0), (1, 4, 0.9)), (700, 700))
    assert near.x0 < 150
    assert near.x1 > 450
    stray = find_box(blob((1, 1, 1.0), (1, 2, 1.0), (2, 1, 1.0), (6, 6, 0.4)), (700, 700))
    assert stray.x1 < 500
    assert stray.y1 < 500


def test_component_rule_keeps_a_ring_whole_and_covers_a_large_blob():
    y, x = np.mgrid[:28, :28] - 13.5
    radius = np.hypot(y, x)
    ring = find_box((np.abs(radius - 6) < 1.5).astype(float), (280, 280))
    assert ring.x0 <= 60 < 220 <= ring.x1
    assert ring.y0 <= 60 < 220 <= ring.y1
    large = (radius < 28 * np.sqrt(0.6 / np.pi)).astype(float)  # 60 % of the image
    box = find_box(large, (280, 280))
    assert box.reason == "fills the image"
    assert find_box(large, (280, 280), "original", 1.5).reason  # nothing lies that far above


def test_component_rule_prefers_the_centre_to_what_the_frame_cuts_off():
    attention = np.full((28, 28), 0.001)
    attention[12:17, 10:15] = 1
    attention[:9, 24:] = 1  # a sticker in the corner, larger than the lesion
    box = find_box(attention, (280, 280))
    assert box.x1 < 240
    assert box.y0 > 60


def test_blobs_count_less_where_the_frame_cuts_them_off():
    raster = np.zeros((28, 28))
    raster[12:16, 6:10] = 1
    raster[12:16, 24:28] = 2  # stronger, but on the frame
    kept = localize.pick_blobs(raster, 0.5)
    assert kept[13, 7]
    assert not kept[13, 26]
    kept = localize.pick_blobs(np.roll(raster, -1, axis=1), 0.5)  # both inside: both belong
    assert kept[13, 6]
    assert kept[13, 25]


def test_blobs_count_less_far_from_the_centre():
    raster = np.zeros((28, 28))
    raster[12:16, 12:16] = 1
    raster[2:6, 2:6] = 1  # as heavy, in a corner but not on the frame
    kept = localize.pick_blobs(raster, 0.5)
    assert kept[13, 13]
    assert not kept[3, 3]


def test_component_rule_keeps_a_minimum_side():
    single = np.zeros((28, 28))
    single[5, 5] = 1
    assert find_box(single, (2240, 2240)).side >= 0.2 * 2240 - 1e-6


def test_original_rule_is_the_union_box_above_the_threshold():
    attention = blob((1, 1, 1.0), (4, 5, 0.8))
    raster = localize.upsample(attention)
    rows, columns = np.nonzero(raster > raster.mean() + 1.5 * raster.std())
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    box = find_box(attention, (224, 224), "original", 1.5)
    assert box.side == side
    assert box.x0 <= columns.min()
    assert box.x1 >= columns.max() + 1
    wide = find_box(attention, (224, 224), "original", 0.5)
    assert wide.side > box.side


def test_upsampling_keeps_every_cell_in_place():
    attention = blob((2, 5, 1.0), floor=0)
    raster = localize.upsample(attention)
    ys, xs = np.nonzero(raster == raster.max())
    assert (ys.mean() + 0.5, xs.mean() + 0.5) == (2.5 * 32, 5.5 * 32)


def test_crop_is_cut_from_the_original_at_full_resolution(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (300, 500, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    boxes = [Box(410, 20, 474, 84), Box(0, 0, 300, 300)]
    cut, whole = util.read_crops(tmp_path / "a.png", boxes, [64, 300], (500, 300))
    assert (whole == image[:, :300]).all()
    assert (cut == image[20:84, 410:474]).all()
    with pytest.raises(InputError, match="500 x 300 px but was 400 x 300"):
        util.read_crops(tmp_path / "a.png", boxes, [64, 300], (400, 300))


def test_reduced_decoding_of_a_crop_is_close(tmp_path):
    ramp = np.linspace(0, 255, 1600)[None, :, None] * np.ones((1200, 1, 3))
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    box = Box(300.5, 100.25, 1300.5, 1100.25)
    (cut,) = util.read_crops(tmp_path / "a.jpg", [box], [64], (1600, 1200))
    expected = np.linspace(300.5, 1300.5, 65)[:-1] + 1000 / 128
    assert np.abs(cut[32, :, 0] - expected * 255 / 1599).max() < 2


# ---------------------------------------------------------------- crop.py
def test_place_of_a_box_in_its_wide_crop():
    table = pd.DataFrame({"width": [500, 500], "height": [300, 300]})
    boxes = [Box(100, 50, 200, 150), Box(0, 200, 100, 300)]
    middle, corner = crop.place_in_wide(boxes, table)
    assert middle == pytest.approx([20 / 140, 20 / 140, 100 / 140])
    assert corner == pytest.approx([0, 40 / 140, 100 / 140])  # no room to the left and below


def test_crop_directory(runs_dir, data_dir, source):
    crops = data_dir / "crops" / "chipnet"
    data, facts = util.read_data(data_dir), util.read_json(crops / "crop.json")
    for split, table in data.tables().items():
        array = util.open_array(crops / f"{split}_64.npy", len(table))
        boxes = pd.read_csv(crops / f"{split}_boxes.csv", dtype={"image_name": str})
        assert list(boxes) == ["image_name", "x0", "y0", "x1", "y1", "oof", "fallback",
                               "confidence", *util.PLACE]  # fmt: skip
        assert boxes["image_name"].tolist() == table["image_name"].tolist()
        assert (boxes["oof"] == 1).all()
        row = boxes.iloc[0]
        size = (table["width"].iloc[0], table["height"].iloc[0])
        box = Box(row["x0"], row["y0"], row["x1"], row["y1"])
        path = source / "images" / f"{row['image_name']}.jpg"
        cuts = util.read_crops(path, [box, localize.widen(box, 1.4, size)], [64, 90], size)
        assert (array[0] == cuts[0]).all()
        if split == "train":
            wide = util.open_array(crops / f"train_wide_{facts['wide_size']}.npy", len(table))
            assert (wide[0] == cuts[1]).all()
    assert (crops / "montage.png").stat().st_size > 10_000
    assert facts["folds"] == [0, 1]
    assert facts["run"] == str(runs_dir / "chipnet")


def test_train_boxes_come_from_the_network_that_held_the_image_out(runs_dir, data_dir):
    maps = np.load(data_dir / "crops" / "chipnet" / "train_attention.npy")
    test_maps = np.load(data_dir / "crops" / "chipnet" / "test_attention.npy")
    data = util.read_data(data_dir)
    networks = [models.load_checkpoint(runs_dir / "chipnet" / f"fold{k}_best.pt")[0]
                for k in (0, 1)]  # fmt: skip
    array = util.open_array(data_dir / "train_64.npy", 24)
    for k in (0, 1):
        rows = np.flatnonzero(data.train["fold"] == k)
        for network in networks:
            network.shifts = 2
        own = localize.attention_maps([networks[k]], array[rows], "cpu", 4)
        other = localize.attention_maps([networks[1 - k]], array[rows], "cpu", 4)
        assert np.allclose(maps[rows], own, atol=1e-6)
        assert not np.allclose(maps[rows], other, atol=1e-6)
    test = util.open_array(data_dir / "test_64.npy", 4)
    assert np.allclose(test_maps, localize.attention_maps(networks, test, "cpu", 4), atol=1e-6)


def test_missing_fold_is_told_and_marked(data_dir, runs_dir, tmp_path, capsys):
    run = shutil.copytree(runs_dir / "chipnet", tmp_path / "chip")
    metrics = util.read_json(run / "metrics.json")
    util.write_json(run / "metrics.json", metrics | {"folds": metrics["folds"][:1]})
    call("crop", *ATTENTION, "--run", run, "--data_dir", data_dir, "--output_dir", tmp_path,
         "--rule", "original", "--views", 1, "--overwrite", "--device", "cpu")  # fmt: skip
    assert "fold 1" in capsys.readouterr().out
    boxes = pd.read_csv(tmp_path / "chip" / "train_boxes.csv")
    assert (boxes["oof"] == (util.read_data(data_dir).train["fold"] == 0)).all()


def test_crop_refuses_what_it_cannot_use(runs_dir, data_dir, tmp_path, source):
    before = hashes(source)
    where = ["--data_dir", data_dir, "--output_dir", tmp_path, "--device", "cpu"]
    with pytest.raises(InputError, match="no ChipNet run"):
        call("crop", *ATTENTION, "--run", runs_dir / "resnet", *where)
    with pytest.raises(InputError, match=r"config\.json is missing"):
        call("crop", *ATTENTION, "--run", tmp_path / "nothing", *where)
    with pytest.raises(InputError, match="--image_dir"):
        call(
            "crop",
            *ATTENTION,
            "--run",
            runs_dir / "chipnet",
            *where,
            "--image_dir",
            tmp_path / "none",
        )
    with pytest.raises(InputError, match="already finished"):
        call(
            "crop",
            *ATTENTION,
            "--run",
            runs_dir / "chipnet",
            "--data_dir",
            data_dir,
            "--device",
            "cpu",
        )
    images = tmp_path / "images"
    shutil.copytree(source / "images", images)
    (images / "0005.jpg").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"0005\.jpg"):
        call("crop", *ATTENTION, "--run", runs_dir / "chipnet", *where, "--image_dir", images)
    assert not list((tmp_path / "chipnet").glob("*.npy.tmp"))
    assert not (tmp_path / "chipnet" / "crop.json").exists()
    assert hashes(source) == before


@pytest.mark.parametrize("kind", ["attention", "attention*saliency"])
def test_stopped_and_sharded_crops_are_those_of_one_call(
    runs_dir, data_dir, tmp_path, monkeypatch, kind
):
    def run(name, *more):
        return call("crop", "--source", kind, "--run", runs_dir / "chipnet", "--data_dir",
                    data_dir, "--output_dir", tmp_path / name, "--device", "cpu", "--backbone",
                    "regnet_tiny", "--weights", "none", "--views", 1, *more)  # fmt: skip

    def files(folder):
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".npy", ".csv")}

    monkeypatch.setattr(util, "CHUNK", 5)
    whole = run("whole")
    read, seen = util.read_crops, []

    def read_crops(path, *more):
        if len(seen) == 7:
            raise KeyboardInterrupt
        seen.append(path)
        return read(path, *more)

    monkeypatch.setattr(util, "read_crops", read_crops)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", "--workers", 1)
    monkeypatch.setattr(util, "read_crops", read)
    stopped = tmp_path / "stopped" / whole.name
    assert not files(stopped)
    with pytest.raises(InputError, match="begun with views = 1, not 2"):
        run("stopped", "--views", 2)
    assert files(run("stopped")) == files(whole)
    assert not list(stopped.glob("*.part"))
    for shard in ("1/2", "0/2"):
        run("shards", "--shard", shard)
    assert not files(tmp_path / "shards" / whole.name)
    shards = run("shards")
    for name in ("train_64.npy", "train_attention.npy", "test_attention.npy"):
        one, other = (np.load(folder / name).astype(float) for folder in (whole, shards))
        assert np.abs(one - other).mean() < 1e-4 * one.mean()  # other batches, other rounding
