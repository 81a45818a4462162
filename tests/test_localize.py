"""Sources of maps, from maps to boxes, and the Finder that does both."""

import shutil
from itertools import product
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

import localize
from localize import Finder, Product, Saliency, attention_maps, find_box, fit_saliency
from maps import Cam
from models import Spec, build_model, dihedral, load_checkpoint
from plumbing.backbones import find_stages
from plumbing.data import MetaEncoder
from plumbing.files import read_json, sha256
from util import InputError

CPU = torch.device("cpu")


def network(backbone="regnet_tiny", size=64):
    torch.manual_seed(0)
    return build_model(Spec("resnet", backbone, size, meta_dim=2, hidden=4)).eval()


def discs(n=24, size=64, dark=True):
    """Noisy pictures with one disc each: (images uint8 (n, size, size, 3), masks)."""
    rng, images, masks = np.random.default_rng(0), [], []
    ground, disc = ((190, 160, 150), (110, 80, 70)) if dark else ((60, 50, 50), (170, 150, 120))
    for _ in range(n):
        image, mask = rng.normal(ground, 6, (size, size, 3)), np.zeros((size, size), np.uint8)
        center = rng.integers(size // 3 - 1, size - size // 3 + 1, 2).tolist()
        cv2.circle(mask, center, int(rng.integers(6, 11) * size / 64), 1, -1)
        image[mask > 0] = rng.normal(disc, 6, (int(mask.sum()), 3))
        images.append(np.clip(image, 0, 255))
        masks.append(mask > 0)
    return np.stack(images).astype(np.uint8), np.stack(masks)


# ---------------------------------------------------------------- sources
@pytest.mark.parametrize(("size", "dark"), [(64, True), (64, False), (48, True), (32, True)])
def test_saliency_finds_what_differs_from_the_border(size, dark):
    images, masks = discs(size=size, dark=dark)
    saliency = fit_saliency(network(size=size), images, np.arange(16), CPU)
    maps = attention_maps([saliency], images[16:], CPU, views=2)
    assert maps.shape == (8, size // 4, size // 4)
    assert np.allclose(maps.sum(axis=(1, 2)), 1, atol=1e-5)
    inside = masks[16:].reshape(8, size // 4, 4, size // 4, 4).mean(axis=(2, 4))
    assert (maps * inside).sum() / inside.sum() > 1.1 * maps.mean()
    odd = np.stack([np.full((size, size, 3), level, np.uint8) for level in (0, 128, 255)])  # nothing, or lesion only
    assert np.isfinite(attention_maps([saliency], odd, CPU, views=8)).all()
    for attention, mask in zip(maps, masks[16:], strict=True) if size == 64 else ():  # else too few cells for a box
        box = find_box(attention, (640, 640))
        assert (box.reason, box.confidence > 0.2, box.side < 450) == ("", True, True)
        rows, columns = (10 * np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        assert max(box.x0 - columns[0], columns[-1] - box.x1, box.y0 - rows[0], rows[-1] - box.y1) < 15


def test_saliency_is_learned_from_the_rows_named_alone_against_most_of_the_border():
    images, _ = discs()
    changed = np.concatenate([images[:16], 255 - images[16:]])
    one, same = (fit_saliency(network(), array, np.arange(16), CPU).weight for array in (images, changed))
    assert torch.equal(one, same)
    assert not torch.allclose(one, fit_saliency(network(), changed, np.arange(24), CPU).weight)
    color, border = torch.rand(2, 3, 16, 16) * 0.02 + 0.5, torch.ones(16, 16, dtype=torch.bool)
    color[:, :, :3, :5] = 0.9  # a sticker in a corner
    color[0, :, 8, 8] = 0.1
    border[3:-3, 3:-3] = False
    distance = localize.background_distance(color, border)
    assert distance[0, 8, 8] > 5 * distance[0, 5:11, 5:11].median()
    assert (distance[:, :3, :5] > 5 * distance[1, 8, 8]).all()


def test_a_product_is_where_both_look():
    fine, coarse = torch.full((1, 8, 8), 1e-4), torch.full((1, 4, 4), 1e-4)
    fine[0, 1, 1] = fine[0, 6, 6] = coarse[0, 3, 3] = 1
    both = Product(*(SimpleNamespace(attention=lambda image, views, m=m: m) for m in (fine, coarse))).attention(None)
    assert (both.shape, both.argmax(), both.sum()) == ((1, 8, 8), 6 * 8 + 6, pytest.approx(1, abs=1e-5))


def test_stages_are_outputs_of_stages_which_some_networks_do_not_have():
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with torch.no_grad():
        resnet, other = (find_stages(network(name), image, (4, 8, 16)) for name in ("resnet18", "efficientnet_b0"))
    assert resnet == {2: "relu", 4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"}
    assert (other[8], other[32]) == ("features.3", "features")
    with pytest.raises(InputError, match="convolutional"):
        Saliency(network("vit_tiny")).attention(image)
    with pytest.raises(InputError, match="--source"):
        fit_saliency(network(), np.full((4, 64, 64, 3), 128, np.uint8), np.arange(4), CPU)  # nothing is there


# ---------------------------------------------------------------- rules
RULES = pytest.mark.parametrize("rule", sorted(localize.RULES))


def blob(*cells, size=7, floor=0.002):
    """Attention with the named (row, column, weight) cells over a flat floor, summing to 1."""
    attention = np.full((size, size), floor)
    for row, column, weight in cells:
        attention[row, column] += weight
    return attention / attention.sum()


@RULES
def test_box_is_a_square_in_the_picture_around_the_peak(rule):
    peaks, sizes = ((0, 0), (0, 6), (6, 3), (3, 3), (6, 6)), ((700, 700), (1200, 700), (700, 1000))
    for (row, column), (width, height) in product(peaks, sizes):
        box = find_box(blob((row, column, 1.0)), (width, height), rule)
        assert (box.reason, 0.5 < box.confidence <= 1) == ("", True)
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -1e-9
        assert box.x1 - box.x0 == pytest.approx(box.y1 - box.y0)
        assert box.x0 <= (width - 700) / 2 + (column + 0.5) * 100 <= box.x1
        assert box.y0 <= (height - 700) / 2 + (row + 0.5) * 100 <= box.y1


@RULES
def test_box_turns_with_the_map_and_scales_with_the_original(rule):
    attention = blob((1, 2, 1.0), (2, 2, 0.6), (2, 3, 0.5))
    box, mask = find_box(attention, (700, 700), rule), torch.zeros(700, 700)
    mask[round(box.y0) : round(box.y1), round(box.x0) : round(box.x1)] = 1
    for view in range(8):
        found = find_box(dihedral(torch.tensor(attention), view).numpy(), (700, 700), rule).corners
        ys, xs = np.nonzero(dihedral(mask, view).numpy())
        assert found == pytest.approx((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), abs=5)
    small, large = (find_box(attention, size, rule) for size in ((400, 300), (1600, 1200)))
    assert np.allclose(4 * np.array(small.corners), large.corners)


@RULES
@pytest.mark.parametrize("value", [1 / 49, np.nan, 0])
def test_maps_that_say_nothing_give_the_whole_square_and_why(rule, value):
    box = find_box(np.full((7, 7), value), (900, 700), rule)
    assert (box.corners, box.reason != "") == ((100, 0, 800, 700), True)
    assert box.confidence == pytest.approx(0, abs=1e-9)


def test_component_rule_covers_what_belongs_together_and_drops_a_stray_cell():
    two = find_box(blob((1, 1, 1.0), (5, 5, 0.9), (5, 1, 0.0)), (700, 700))
    assert two.reason == "fills the image"  # two blobs that far apart span most of it
    near = find_box(blob((1, 1, 1.0), (1, 4, 0.9)), (700, 700))
    assert near.x0 < 150 < 450 < near.x1
    stray = find_box(blob((1, 1, 1.0), (1, 2, 1.0), (2, 1, 1.0), (6, 6, 0.4)), (700, 700))
    assert max(stray.x1, stray.y1) < 500
    radius = np.hypot(*(np.mgrid[:28, :28] - 13.5))
    ring = find_box((np.abs(radius - 6) < 1.5).astype(float), (280, 280))
    assert max(ring.x0, ring.y0) <= 60 < 220 <= min(ring.x1, ring.y1)
    large = (radius < 28 * np.sqrt(0.6 / np.pi)).astype(float)  # 60 % of the image
    assert find_box(large, (280, 280)).reason == "fills the image"
    assert find_box(large, (280, 280), "original").reason  # nothing lies that far above the mean
    single = find_box(blob((5, 5, 1.0), size=28, floor=0), (2240, 2240))
    assert single.side == pytest.approx(0.2 * 2240)  # no smaller


def test_blobs_count_less_far_from_the_centre_and_where_the_frame_cuts_them_off():
    raster, other = np.zeros((2, 28, 28))
    raster[12:16, 6:10], raster[12:16, 24:28] = 1, 2  # the second is stronger, but on the frame
    kept, inside = localize.pick_blobs(raster, 0.5), localize.pick_blobs(np.roll(raster, -1, axis=1), 0.5)
    assert (kept[13, 7], kept[13, 26], inside[13, 6], inside[13, 25]) == (True, False, True, True)
    other[12:16, 12:16] = other[2:6, 2:6] = 1  # as heavy, in a corner but not on the frame
    kept = localize.pick_blobs(other, 0.5)
    assert (kept[13, 13], kept[3, 3]) == (True, False)


def test_original_rule_is_the_union_box_above_the_threshold():
    attention = blob((1, 1, 1.0), (4, 5, 0.8))
    raster = localize.upsample(attention)
    rows, columns = np.nonzero(raster > raster.mean() + 1.5 * raster.std())
    box = find_box(attention, (224, 224), "original", 1.5)
    assert box.side == max(np.ptp(rows), np.ptp(columns)) + 1
    assert box.x0 <= columns.min() <= columns.max() + 1 <= box.x1
    assert find_box(attention, (224, 224), "original", 0.5).side > box.side
    single = localize.upsample(blob((2, 5, 1.0), floor=0))  # every cell keeps its place
    assert (np.mean(np.nonzero(single == single.max()), axis=1) + 0.5).tolist() == [2.5 * 32, 5.5 * 32]


# ---------------------------------------------------------------- boxes of a class
def test_boxes_of_a_class_surround_its_parts_in_the_image_best_first():
    evidence, view = np.full((8, 8), -1.0), (0, -100, 400, 300)  # a picture of 400 x 200 px on its square
    evidence[3, 1] = evidence[4, 1] = 3
    evidence[4, 6] = 2
    evidence[0, 3] = 9  # on the padding
    first, second = localize.class_boxes(evidence, view, (400, 200), 0.5)
    assert (first.x0 < 75 < first.x1, first.y0 < 100 < first.y1) == (True, True)
    assert second.x0 < 325 < second.x1
    assert 1 > first.confidence > second.confidence > 0
    assert localize.class_boxes(evidence, view, (400, 200), 0.9)[0].side < first.side
    for nothing in (np.ones((8, 8)), np.zeros((8, 8)), -np.ones((8, 8))):  # all alike, nothing, all against it
        assert localize.class_boxes(nothing, view, (400, 200), 0.5) == []
    assert localize.seen_part((0, -410, 1000, 590), (1000, 180), 2).any()  # a thin picture on a coarse map


# ---------------------------------------------------------------- Finder
def test_finder_loads_what_crop_py_used_and_nothing_else(runs_dir):
    folder = runs_dir / "cropnet" / "finder"
    facts, images = read_json(folder / "crop.json"), discs(n=3)[0]
    finder = Finder.load(folder, facts, CPU)
    each = [finder.maps(images, CPU, folds=[k]) for k in (0, 1)]
    assert np.allclose(finder.maps(images, CPU), np.mean(each, axis=0), atol=1e-6)
    assert not np.allclose(*each, atol=1e-6)
    with pytest.raises(InputError, match="csv"):
        Finder.load(folder, facts | {"source": "boxes"}, CPU)


@pytest.mark.parametrize("way", ["cam", "gradcam"])
def test_maps_of_a_run_are_those_of_its_networks_with_metadata_missing(runs_dir, tmp_path, way):
    path = shutil.copy(runs_dir / "resnet" / "fold0_best.pt", tmp_path / "fold0_network.pt")
    facts = {"source": way, "networks": {path.name: sha256(path)}, "folds": [0], "trained": True, "shifts": 1,
             "rule": "component", "num_devs": None, "views": 1, "class_name": None,
             "centre": None, "frame": "square", "box_size": None}  # fmt: skip
    found, (trained, content) = Finder.load(tmp_path, facts, CPU).sources[0], load_checkpoint(path)
    missing = torch.from_numpy(MetaEncoder(content["encoder"]).encode(pd.DataFrame(index=[0])))
    assert missing.any()  # flags, and not the zeros that no encoder writes
    image, seen = torch.from_numpy(discs(n=2)[0]).permute(0, 3, 1, 2), []
    found.network.meta_branch.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        expected = Cam(trained, missing.numpy()).explain(image)[1]
        assert torch.allclose(found.explain(image)[1], expected, atol=1e-5 * float(expected.abs().max()))
    assert found.layer == "trunk_output"  # whole, and not the last module in it, as in a folded network
    assert torch.equal(seen[0], missing.expand(2, -1))
