"""The scout: cells of large pictures, attention over them, crops where it looks, and new images."""

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL_CROP, SMALL_MODEL, call, hashes, read

import models
import plumbing.cells as cells_of_pictures
from localize import find_box
from models import Spec, build_model
from plumbing.cells import Cells, make_cells, on_square, part_of, read_cells
from plumbing.data import read_data
from plumbing.files import read_json
from plumbing.images import read_square
from util import ID, PROB, InputError

SCOUT = ["--model", "scout", "--scout_size", 96, "--stride", 16, *SMALL_MODEL]
SCOUT[SCOUT.index("--tta") + 1] = 1
CPU = torch.device("cpu")


def scout(**changes):
    parts = {"hidden": 8, "scout_size": 128, "strides": (16, 32)} | changes
    return build_model(Spec("scout", "regnet_tiny", 64, **parts))


def write(path, width, height):
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    return path


def test_the_head_alone_learns_and_starts_from_one_backbone_in_every_fold():
    torch.manual_seed(0)
    one = scout()
    torch.manual_seed(1)
    two = scout().train()
    assert all(torch.equal(*pair) for pair in zip(one.backbone.buffers(), two.backbone.buffers(), strict=True))
    assert one.fingerprint() == two.fingerprint() != scout(strides=(32,)).fingerprint()
    assert not torch.equal(one.scorer.weight, two.scorer.weight)
    before = two.fingerprint()
    image = torch.randn(3, two.channels, 4, 4).half()
    optimizer = torch.optim.Adam(two.param_groups(1e-2, 1e-2))
    two(image, torch.zeros(3, 0)).square().sum().backward()
    optimizer.step()
    assert two.fingerprint() == before
    learned = {name for name, parameter in two.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in two.named_parameters() if not name.startswith("backbone.")}


def test_cells_are_what_the_backbone_finds_of_a_coarse_and_a_fine_map():
    network = scout().eval()
    picture = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        found, maps = network.cells(picture), {}
        trunk = network.backbone.stem(network.normalise(picture))
        for block in network.backbone.trunk_output:
            trunk = block(trunk)
            maps[trunk.shape[-1]] = trunk
    fine, coarse = maps[6], maps[3]
    assert found.shape == (1, 2, 3, 2 * fine.shape[1] + coarse.shape[1])
    wide = fine[0].unfold(1, 2, 2).unfold(2, 2, 2)  # (C, 2, 3, 2, 2)
    expected = torch.cat([wide.mean(dim=(3, 4)), wide.amax(dim=(3, 4)), coarse[0]]).permute(1, 2, 0)
    assert torch.allclose(found[0], expected, atol=1e-5)


@pytest.mark.parametrize(("width", "height", "rows", "columns"), [
    (256, 128, (1, 3), (0, 4)), (128, 256, (0, 4), (1, 3)), (64, 64, (1, 3), (1, 3)), (128, 128, (0, 4), (0, 4)),
    (500, 20, (1, 2), (0, 4))])  # fmt: skip
def test_cells_lie_where_their_pixels_lie_and_small_pictures_are_not_enlarged(tmp_path, width, height, rows, columns):
    network, size = scout().eval(), (width, height)
    part = part_of(network, size)
    assert [(span.start, span.stop) for span in part] == [rows, columns]
    if min(size) > 20:
        path = write(tmp_path / "a.png", width, height)
        square = read_square(path, 128, frame=128)[0]
        inner = square[rows[0] * 32 : rows[1] * 32, columns[0] * 32 : columns[1] * 32]
        if max(size) <= 128:  # pixel by pixel
            assert (inner == cv2.imread(str(path))[..., ::-1]).all()
        with torch.no_grad():
            expected = network.cells(torch.from_numpy(inner.copy()).permute(2, 0, 1)[None])[0].numpy()
        found = read_cells(network, path, size, CPU)
        assert np.allclose(found, expected, rtol=2e-3, atol=1e-3)
        on = on_square(found, part, network.grid)
        assert on.shape == (4, 4, network.channels)
        assert np.isnan(on).all(axis=-1).sum() == 16 - found.shape[0] * found.shape[1]


def test_attention_is_on_cells_alone_and_what_surrounds_them_changes_nothing():
    network = scout().eval()
    cells = torch.full((2, network.channels, 4, 4), torch.nan).half()
    cells[0, :, 1:3], cells[1, :, :2, :2] = torch.randn(network.channels, 2, 4).half(), 0.5
    with torch.no_grad():
        attention, logit = network.attention(cells), network(cells, torch.zeros(2, 0))
        alone = network(cells[:1, :, 1:3], torch.zeros(1, 0))
    assert torch.allclose(attention.sum(dim=(1, 2)), torch.ones(2))
    assert (attention[0, [0, 3]] == 0).all()
    assert attention[1, :2, :2].flatten().tolist() == pytest.approx([0.25] * 4)
    assert torch.allclose(logit[:1], alone, atol=1e-6)


def test_a_peak_gets_a_square_of_the_size_asked_for():
    attention = np.full((40, 40), 1e-6, np.float32)
    attention[20, 35] = 1
    box = find_box(attention, (1920, 1080), rule="peak", frame=1280, box_size=200)
    assert (box.side, box.confidence > 0.5) == (pytest.approx(200), True)
    assert ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) == pytest.approx((35.5 * 48, 20.5 * 48 - 420), abs=10)
    assert find_box(attention, (1920, 1080), rule="peak", frame=1280).side == pytest.approx(4 * 48)
    corner = np.zeros((40, 40), np.float32)
    corner[9, 0] = 1
    box = find_box(corner, (1920, 1080), rule="peak", frame=1280, box_size=200)
    assert (box.x0, box.y0) == (0, 0)  # shifted into the picture
    assert find_box(np.ones((40, 40), np.float32), (1920, 1080), rule="peak", frame=1280).reason == "flat map"


@pytest.fixture(scope="module")
def trained(source, data_dir, tmp_path_factory):
    """A scout on all folds, crops where it looks, and a network on these."""
    runs = tmp_path_factory.mktemp("scouts")
    where = ["--data_dir", data_dir, "--runs_dir", runs]
    call("train", *SCOUT, *where)
    crops = call("crop", "--run", runs / "scout", "--data_dir", data_dir, *SMALL_CROP, "--box_size", 40)
    call("train", "--model", "cropnet", "--crop_dir", crops, *where, *SMALL_MODEL)
    call("ensemble", "mean", "--runs_dir", runs)
    return runs, crops


def test_held_out_predictions_and_maps_are_those_of_the_folds_own_network(source, data_dir, trained):
    runs, crops = trained
    data, oof = read_data(data_dir), read(runs / "scout" / "oof.csv").set_index(ID)
    maps = np.load(crops / "train_attention.npy")
    for k in (0, 1):
        network, content = models.load_checkpoint(runs / "scout" / f"fold{k}_best.pt")
        found = make_cells(network, data, CPU, 1)["train"]
        for row in np.flatnonzero(data.train["fold"] == k)[:3]:
            name, size = data.train[ID][row], tuple(data.train.loc[row, ["width", "height"]])
            cells = read_cells(network, source / "images" / f"{name}.jpg", size, CPU)
            fresh = on_square(cells, part_of(network, size), network.grid)
            assert np.array_equal(found[row], fresh, equal_nan=True)
            image = torch.from_numpy(fresh).permute(2, 0, 1)[None]
            with torch.no_grad():
                assert network(image, torch.zeros(1, 0)).sigmoid().item() == pytest.approx(oof[PROB][name], abs=1e-5)
                assert np.allclose(network.attention(image)[0], maps[row], atol=1e-5)
    boxes = read(crops / "train_boxes.csv")
    assert boxes["oof"].eq(1).all()
    assert ((boxes["x1"] - boxes["x0"]).round() == 40)[boxes["fallback"].isna()].all()


def test_new_images_are_seen_as_the_test_images_were(source, data_dir, trained, tmp_path):
    runs, crops = trained
    (tmp_path / "new").mkdir()
    for name in read_data(data_dir).test[ID]:
        (tmp_path / "new" / f"{name}.jpg").write_bytes((source / "images" / f"{name}.jpg").read_bytes())
    for run in ("scout", "cropnet", "ensemble"):
        expected = read(runs / run / "test_predictions.csv").groupby(ID)[PROB].mean()
        found = call("predict", "--run", runs / run, "--output", tmp_path / run, "--device", "cpu", "--csv",
                     source / "test.csv", tmp_path / "new")  # fmt: skip
        table = read(found / "predictions.csv").set_index(ID)
        assert np.allclose(table[PROB], expected[table.index], atol=1e-4), run
        if run != "scout":
            boxes = read(crops / "test_boxes.csv").set_index(ID).loc[table.index]
            assert np.allclose(table[["x0", "y1"]], boxes[["x0", "y1"]], atol=1e-3)
    call("audit", runs / "scout", runs / "ensemble", "--data_dir", data_dir, "--device", "cpu")


def test_stopped_cells_go_on_to_the_same_bytes_and_are_made_once(data_dir, tmp_path, monkeypatch):
    data, network = read_data(data_dir), scout(scout_size=96).eval()
    data.directory = tmp_path
    seen = []

    def stop_at(count):
        def read_some(*words):
            seen.append(words[1])
            if len(seen) == count:
                raise KeyboardInterrupt
            return read_cells(*words)

        return read_some

    monkeypatch.setattr("plumbing.arrays.CHUNK", 4)
    monkeypatch.setattr(cells_of_pictures, "read_cells", stop_at(11))
    with pytest.raises(KeyboardInterrupt):
        make_cells(network, data, CPU, 1)
    monkeypatch.setattr(cells_of_pictures, "read_cells", stop_at(0))
    make_cells(network, data, CPU, 1)
    assert len(seen) <= 12 + len(data.train) - 8 + len(data.test)  # two chunks of 4 were not done again
    (folder,) = (tmp_path / "cells").iterdir()
    stopped = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    assert set(stopped) == {"train.npy", "test.npy"}
    count, again = len(seen), make_cells(network, data, CPU, 1)
    assert (len(seen), isinstance(again["train"], Cells)) == (count, True)
    data.directory = tmp_path / "other"
    make_cells(network, data, CPU, 2)
    assert stopped == {path.name: path.read_bytes() for path in (tmp_path / "other").glob("cells/*/*.npy")}


@pytest.mark.parametrize(("words", "said"), [
    (["--scout_size", 100], "multiple of 16"), (["--mixup", 0.4], "--mixup"), (["--fsg"], "--fsg"),
    (["--guide", "crops"], "--guide"), (["--crop_dir", "crops"], "--crop_dir"), (["--tta", 4], "--tta")])  # fmt: skip
def test_what_a_scout_cannot_do_is_said_before_anything_is_written(data_dir, tmp_path, words, said):
    before = hashes(data_dir)
    with pytest.raises(InputError, match=said):
        call("train", *SCOUT, "--data_dir", data_dir, "--runs_dir", tmp_path / "runs", *words)
    assert not (tmp_path / "runs").exists()
    assert hashes(data_dir) == before


def test_lines_and_changed_pictures_are_named(source, tmp_path):
    table = pd.read_csv(source / "train.csv", dtype={ID: str})
    (tmp_path / "images").mkdir()
    for name in table[ID]:
        (tmp_path / "images" / f"{name}.jpg").write_bytes((source / "images" / f"{name}.jpg").read_bytes())
    table.to_csv(tmp_path / "train.csv", index=False)
    data_dir = call("preprocess", "--train_csv", tmp_path / "train.csv", "--output_dir", tmp_path / "data",
                    "--size", 64, "--n_folds", 2)  # fmt: skip
    network, data = scout(scout_size=96), read_data(data_dir)
    write(tmp_path / "images" / f"{table[ID][3]}.jpg", 50, 50)
    with pytest.raises(InputError, match=f"{table[ID][3]}.jpg is 50 x 50 px"):
        make_cells(network, data, CPU, 1)
    data.train.loc[5, ["width", "height"]] = 20_000, 1
    with pytest.raises(InputError, match=f"{table[ID][5]} is 20000 x 1 px, a line"):
        make_cells(network, data, CPU, 1)


def test_maps_of_a_scout_go_alone(trained, data_dir, tmp_path):
    runs, _ = trained
    where = ["--run", runs / "scout", "--data_dir", data_dir, "--output_dir", tmp_path, *SMALL_CROP]
    with pytest.raises(InputError, match="--source attention"):
        call("crop", *where, "--source", "attention*saliency")
    with pytest.raises(InputError, match="--rule peak"):
        call("crop", *where, "--rule", "component", "--box_size", 40)
    folder = call("crop", *where, "--class", "1")
    assert read_json(folder / "crop.json")["frame"] == 96
