"""Localized features: every route against its definition, rows out of fold, and a stop that loses nothing."""

import numpy as np
import pytest
import torch
from conftest import call
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from torchvision.ops import roi_align

import features
import places
from inference import Single
from localize import class_boxes
from maps import Cam, every
from plumbing.backbones import run_backbone
from plumbing.data import read_data
from plumbing.images import read_crops, read_square
from plumbing.runs import read_run
from util import InputError

CPU = torch.device("cpu")
LAYER = "trunk_output"


def extract(runs_dir, folder, *words, run="resnet"):
    """Tables and vectors by split."""
    words = ["--t_class", 0, *words] if "--t_class" not in words else words
    call("features", "--run", runs_dir / run, "--output_dir", folder, "--device", "cpu", *words)
    return {path.stem: (places.read_rows(path), np.load(path.with_suffix(".npy"))) for path in folder.glob("*.csv")}


def of_image(runs_dir, data_dir, name):
    """Of a test image and the network of fold 0: (path, size, network, map of the class, last feature map)."""
    data = read_data(data_dir)
    path = dict(zip(data.test["image_name"], data.find_originals("test"), strict=True))[name]
    single = Single(read_run(runs_dir / "resnet"), CPU, fold=False)
    network = single.networks[0]
    square, size = read_square(path, data.size)
    image = torch.tensor(square).permute(2, 0, 1)[None]
    row = data.test[data.test["image_name"] == name]
    meta = torch.from_numpy(single.encoders[0].encode(row))
    with torch.no_grad():
        heat = Cam(network).explain(image, every, meta)[1][0, 0]
        maps = run_backbone(network, [LAYER], lambda: network(image, meta))[1][LAYER][0]
    return path, size, network, heat, maps


def original_pool(regions, cells):
    """The original's 512 numbers, written out: a grid of cells, and means of as many channels as make 512 numbers."""
    channels = 512 // cells**2
    grid = F.adaptive_avg_pool2d(regions, cells).numpy()
    edges = [(i * grid.shape[1] // channels, -(-(i + 1) * grid.shape[1] // channels)) for i in range(channels)]
    return np.stack([grid[:, a:b].mean(axis=1) for a, b in edges], axis=1).reshape(len(grid), -1)


@pytest.mark.parametrize("pool", [(), *(("--pool", "original", "--cells", cells) for cells in (1, 2, 4))])
def test_routes_are_their_definitions(runs_dir, data_dir, tmp_path, pool):
    cells = pool[-1] if pool else 1

    def expected(regions):
        return original_pool(regions, cells) if pool else regions.mean(dim=(2, 3)).numpy()

    rows = extract(runs_dir, tmp_path / "boxes", "--route", "roi")["test"][0]
    name = rows.loc[rows["fold"] == 0, "image_name"].iloc[0]  # that has a box
    path, size, network, heat, maps = of_image(runs_dir, data_dir, name)
    side = min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    view = (left, top, left + side, top + side)
    boxes = class_boxes(heat.numpy(), view, size, 0.3)
    assert boxes
    speaks, definitions = heat.clamp_min(0), {}
    soft = (maps * speaks).sum(dim=(1, 2)) / speaks.sum()
    cut = maps[:, speaks > 0.3 * speaks.max()].mean(dim=1)
    definitions["heat"], definitions["cut"] = (v[None, :, None, None].expand(-1, -1, cells, cells) for v in (soft, cut))
    scale = maps.shape[1] / side
    corners = (torch.tensor([box.corners for box in boxes]) - torch.tensor([left, top, left, top])) * scale
    definitions["roi"] = roi_align(maps[None], [corners.float()], cells if pool else 1, aligned=True)
    crops = read_crops(path, [box.corners for box in boxes], [64] * len(boxes), size)
    image = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    with torch.no_grad():
        _, found = run_backbone(network, [LAYER], lambda: network.backbone(network.normalise(image)))
    definitions["crop"] = found[LAYER]
    for route, regions in definitions.items():
        words = ["--route", "heat", "--heat", "cut"] if route == "cut" else ["--route", route]
        rows, vectors = extract(runs_dir, tmp_path / route, *words, *pool)["test"]
        own = ((rows["image_name"] == name) & (rows["fold"] == 0)).to_numpy()
        assert np.allclose(vectors[own], expected(regions), atol=1e-5), route
        assert vectors.dtype == np.float32
        if route in ("roi", "crop"):
            assert np.allclose(rows.loc[own, ["x0", "y0", "x1", "y1"]], [box.corners for box in boxes])
            assert rows.loc[own, "box"].tolist() == list(range(len(boxes)))


def test_small_boxes_are_read_from_fine_maps(runs_dir, data_dir, tmp_path):
    words = ["--route", "roi", "--pool", "original", "--layer", "size", "--t_roi", 0.7]
    rows, vectors = extract(runs_dir, tmp_path, *words)["test"]
    vectors, row = vectors[rows["fold"] == 0], rows[rows["fold"] == 0].iloc[0]
    path, size, network, *_ = of_image(runs_dir, data_dir, row["image_name"])
    side = min(size)
    share = (row["x1"] - row["x0"]) * (row["y1"] - row["y0"]) / side**2
    stage = "block2" if share < 1 / 16 else "block3" if share < 1 / 4 else "block4"  # strides 8, 16, 32
    image = torch.tensor(read_square(path, 64)[0]).permute(2, 0, 1)[None]
    layer = f"trunk_output.{stage}"
    with torch.no_grad():
        maps = run_backbone(network, [layer], lambda: network.backbone(network.normalise(image)))[1][layer]
    scale = maps.shape[-1] / side
    corners = row[["x0", "y0", "x1", "y1"]].to_numpy(float) - np.tile(np.subtract(size, side) / 2, 2)
    region = roi_align(maps, [torch.tensor(corners[None] * scale).float()], 1, aligned=True)
    expected = original_pool(region, 1)
    assert np.allclose(vectors[:1], expected, atol=1e-5)


def test_nothing_that_speaks_for_a_class_gives_the_mean_of_the_picture():
    inside = torch.ones(2, 2)
    inside[1] = 0
    weight = places.heat_weights(torch.tensor([[[-1.0, -2], [5, 0]], [[1.0, 3], [9, 9]]]), inside, None)
    maps = torch.tensor([[[1.0, 3], [100, 100]]])
    assert places.pool_cells(maps, weight).tolist() == [[2.0], [2.5]]
    cut = places.heat_weights(torch.tensor([[[1.0, 3], [9, 9]]]), inside, 0.5)
    assert places.pool_cells(maps, cut).tolist() == [[3.0]]


@pytest.mark.parametrize("run", ["resnet", "chipnet", "cropnet"])
def test_rows_are_out_of_fold_in_the_order_of_the_tables(runs_dir, data_dir, tmp_path, run):
    found, data = extract(runs_dir, tmp_path, run=run), read_data(data_dir)
    rows, vectors = found["train"]
    assert rows["image_name"].tolist() == data.train["image_name"].tolist()
    assert rows["fold"].tolist() == data.train["fold"].tolist()
    oof = read_run(runs_dir / run).table("oof.csv").set_index("image_name")["prob"]
    assert np.corrcoef(oof[rows["image_name"]], rows["probability"])[0, 1] > 0.9  # of one view instead of eight
    assert found["test"][0]["fold"].tolist() == [0, 1] * len(data.test)
    model = LogisticRegression(max_iter=1000).fit(vectors, data.train["target"])  # all that a downstream model needs
    assert np.isfinite(model.predict_proba(found["test"][1])).all()


def test_a_stopped_call_goes_on_and_ends_in_the_same_files(runs_dir, source, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 3)
    words = [source / "images", "--limit", 8, "--route", "roi", "--t_roi", 0.5]
    extract(runs_dir, tmp_path / "whole", *words)
    write, calls = features.write_part, []

    def stop_after_one(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(write(*args))

    monkeypatch.setattr(features, "write_part", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        extract(runs_dir, tmp_path / "again", *words)
    monkeypatch.setattr(features, "write_part", lambda *args: calls.append(write(*args)))
    extract(runs_dir, tmp_path / "again", *words)
    assert len(calls) == 3  # of three chunks, one before the stop
    for name in ("images.npy", "images.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["features.json", "images.csv", "images.npy"]


def test_images_without_a_class_have_no_rows_and_a_stack_knows_nothing_of_them(runs_dir, source, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 3)
    prob = extract(runs_dir, tmp_path / "all", source / "images")["images"][0]["probability"]
    middle = float(prob.quantile(0.9))  # so that some chunks have no row
    rows, vectors = extract(runs_dir, tmp_path / "some", "--t_class", middle, source / "images")["images"]
    assert 0 < len(rows) == (prob >= middle).sum() == len(vectors)
    keys = rows[["image_name", "fold"]].assign(fold=7)
    none = places.widen(rows, vectors, keys, ("1",), vectors.shape[1])
    assert (none.shape, np.isnan(none).all()) == ((len(rows), vectors.shape[1]), True)
    own = rows[["image_name", "fold"]]
    assert np.array_equal(places.widen(rows, vectors, own, ("1",), vectors.shape[1]), vectors)
    empty = places.widen(rows[:0], places.NOTHING, keys, ("1",), vectors.shape[1])
    assert np.isnan(empty).all()


def test_nothing_of_others_is_replaced_and_nothing_of_other_images_goes_on(runs_dir, source, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match="train.csv"):
        extract(runs_dir, tmp_path / "mine")
    assert (tmp_path / "mine" / "train.csv").read_text() == "a\n1\n"
    images = sorted((source / "images").iterdir())
    monkeypatch.setattr(features, "join_parts", None)  # stopped before the end
    with pytest.raises(TypeError):
        extract(runs_dir, tmp_path / "f", *images[:3])
    monkeypatch.undo()
    with pytest.raises(InputError, match="images"):
        extract(runs_dir, tmp_path / "f", *images[3:6])
