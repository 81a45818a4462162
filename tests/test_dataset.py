"""Metadata, augmentation, workers, samplers."""

import os
import pickle
import signal
import warnings
from types import SimpleNamespace

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kstest
from torch.utils.data import Dataset, Subset
from torchvision.transforms.v2 import functional

import dataset
import util
from dataset import DrawHair, ImageDataset, MetaEncoder


@pytest.fixture
def table():
    return pd.DataFrame({
        "sex": ["male", "female", None, "male"], "age_approx": [30, None, 50, 70.0],
        "anatom_site_general_challenge": ["torso", "torso", None, "head/neck"],
    })  # fmt: skip


def test_encoder_marks_known_unknown_and_missing(table):
    encoder = MetaEncoder.fit(table)
    matrix = encoder.encode(table)
    assert matrix.shape == (4, encoder.dim) == (4, 4 + 2 + 4)
    assert matrix.dtype == np.float32
    assert (matrix[:, :4].sum(axis=1) == 1).all()
    assert matrix[0, :4].tolist() == [0, 1, 0, 0]  # female, male, unknown, missing
    assert matrix[2, :4].tolist() == [0, 0, 0, 1]
    assert matrix[1, 4:6].tolist() == [0, 1]  # missing age: the mean, and flagged


def test_encoder_takes_new_values_and_lost_columns(table):
    encoder = MetaEncoder(pickle.loads(pickle.dumps(MetaEncoder.fit(table).columns)))
    new = pd.DataFrame({"sex": ["other"], "age_approx": ["about forty"]})
    row = encoder.encode(new)[0]
    assert row[:4].tolist() == [0, 0, 1, 0]
    assert row[4:6].tolist() == [0, 1]
    assert row[6:].tolist() == [0, 0, 0, 1]
    assert MetaEncoder.fit(pd.DataFrame({"x": [1]})).encode(new).shape == (1, 0)


def test_encoder_is_fitted_on_the_rows_it_is_given(table):
    assert MetaEncoder.fit(table[:2]).columns["sex"]["values"] == ["female", "male"]
    assert MetaEncoder.fit(table[3:]).columns["sex"]["values"] == ["male"]


def test_transforms_are_built_without_a_warning_and_keep_shape():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform = dataset.train_transform(64)
    image = np.full((64, 64, 3), 128, np.uint8)
    out = transform(image=image)["image"]
    assert (out.shape, out.dtype) == (image.shape, np.uint8)
    assert (image == 128).all()


def test_hair_darkens_a_few_pixels_and_repeats_under_a_seed():
    image = np.full((96, 96, 3), 220, np.uint8)
    transform = A.Compose([DrawHair(96, p=1.0)])
    transform.set_random_seed(3)
    first = [transform(image=image)["image"] for _ in range(4)]
    transform.set_random_seed(3)
    again = [transform(image=image)["image"] for _ in range(4)]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    changed = [(hair != 220).any(axis=2).mean() for hair in first]
    assert 0.002 < min(changed)
    assert max(changed) < 0.4
    assert max(hair.max() for hair in first) == 220
    assert len(pickle.dumps(transform)) < 100_000  # the bank stays behind


def make(data_dir, transform=None):
    rows = np.arange(16)
    path = util.array_path(data_dir, "train", 64)
    stored = dataset.Stored(path, 24)
    return ImageDataset([stored], rows, np.zeros((16, 2)), rows % 4 == 0, transform)


def test_items(data_dir):
    images = make(data_dir)
    image, meta, target = images[4]
    assert (image.shape, image.dtype) == ((3, 64, 64), torch.uint8)
    assert (meta.shape, target.item()) == ((2,), 1.0)
    array = util.open_array(util.array_path(data_dir, "train", 64), 24)
    assert (image.numpy().transpose(1, 2, 0) == array[4]).all()
    assert len(pickle.dumps(images)) < 20_000  # an opened array is not pickled with it
    with pytest.raises(ValueError, match="do not match"):
        ImageDataset(images.sources, range(3), np.zeros((2, 1)))


def test_jittered_crops_stay_near_the_box_and_are_now_and_then_the_whole(tmp_path):
    wide = np.zeros((1, 140, 140, 3), np.uint8)
    wide[0, ..., 0], wide[0, ..., 1] = np.arange(140), np.arange(140)[:, None]  # x, y in pixels
    np.save(tmp_path / "wide.npy", wide)
    np.save(tmp_path / "whole.npy", np.full((1, 100, 100, 3), 255, np.uint8))
    wide, whole = (dataset.Stored(tmp_path / f"{name}.npy", 1) for name in ("wide", "whole"))
    place = np.array([[20 / 140, 20 / 140, 100 / 140]])
    crops = dataset.Jittered(wide, whole, place, 100)
    rng = np.random.default_rng(0)
    drawn = [crops(0, rng) for _ in range(400)]
    share = np.mean([crop.min() == 255 for crop in drawn])
    assert 0.05 < share < 0.16
    cut = [crop.astype(float) for crop in drawn if crop.min() < 255]
    assert {crop.shape for crop in cut} == {(100, 100, 3)}
    span = np.array([crop[..., 0].max() - crop[..., 0].min() + 1 for crop in cut])
    middle = np.array([(crop[..., 0].mean(), crop[..., 1].mean()) for crop in cut])
    assert 88 <= span.min() < 95
    assert 120 < span.max() <= 127
    assert 8 < np.abs(middle - 69.5).max() <= 11
    assert middle.std(axis=0).min() > 3
    edge = dataset.Jittered(wide, whole, np.array([[0.0, 0.0, 1.0]]), 100)  # a box that fills it
    assert {edge(0, rng).shape for _ in range(50)} == {(100, 100, 3)}


def draws(data_dir, seed, workers, batch_size=4):
    """What every item of an epoch drew, seen through a random shade on equal images."""
    transform = A.Compose([A.RandomBrightnessContrast(brightness_limit=(-0.9, 0.9), p=1)])
    images = make(data_dir, transform)
    images.rows[:] = 0  # the same picture everywhere
    loader = dataset.train_loader(images, batch_size, "shuffle", workers, seed)
    return [float(item.float().mean()) for image, *_ in loader for item in image]


def test_epochs_differ_and_seeds_repeat_for_any_number_of_workers(data_dir):
    one, two = draws(data_dir, 1, 0), draws(data_dir, 2, 0)
    assert len(set(one)) >= 15  # 16 draws; a rounding tie is possible
    assert len(set(one) & set(two)) <= 1
    assert one == draws(data_dir, 1, 2) == draws(data_dir, 1, 1, batch_size=3)


class Process(Dataset):
    """Items that say what process makes them."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        return os.getpgid(0), default, cv2.getNumThreads()


def test_loader_processes_get_no_signals_of_the_trainer_and_can_be_ended():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        group, default, threads = next(iter(dataset.make_loader(Process(), 1, batch_size=2)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert group[0] != os.getpgid(0)
    assert default.all()
    assert (threads <= 1).all()


def test_order_of_an_epoch():
    target = np.array([0] * 10 + [1] * 3)
    drawn = dataset.draw_order(target, "balanced", seed=0)
    counts = np.bincount(drawn, minlength=13)
    assert len(drawn) == 20
    assert (counts[:10] == 1).all()
    assert counts[10:].sum() == 10
    assert (counts[10:] >= 1).all()
    assert drawn.tolist() == dataset.draw_order(target, "balanced", seed=0).tolist()
    assert drawn.tolist() != dataset.draw_order(target, "balanced", seed=1).tolist()
    shuffled = dataset.draw_order(target, "shuffle", seed=0)
    assert shuffled.tolist() != sorted(shuffled) == list(range(13))
    with pytest.raises(ValueError, match="both classes"):
        dataset.draw_order(np.zeros(3), "balanced", seed=0)


def test_turn_and_tint_is_numpys_and_torchvisions_within_rounding():
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(80, 170, (8, 8, 3), dtype=np.uint8), (64, 64))
    place = np.array([[0.0, 1, 0], [-1, 0, 63]])  # a quarter turn
    bright, contrast, saturation = 1.1, 0.85, 1.2
    color = dataset.color_maps(*np.array([bright, contrast, saturation]).reshape(3, 1, 1, 1))[0]
    color[:, 3] *= dataset.LUMA @ image.mean(axis=(0, 1))
    done = dataset.TurnAndTint().apply(image, place, color.astype(np.float32)).astype(int)
    tv = torch.from_numpy(image).permute(2, 0, 1) / 255
    for step, factor in (
        (functional.adjust_brightness, bright),
        (functional.adjust_contrast, contrast),
        (functional.adjust_saturation, saturation),
    ):
        tv = step(tv, factor)
    expected = np.rot90(255 * tv.permute(1, 2, 0).numpy())
    assert np.abs(done - expected).max() < 1


def test_turn_and_tint_draws_the_whole_circle_both_ways_and_moves_guides_along():
    transform = A.Compose([dataset.TurnAndTint(shift=5)])
    transform.set_random_seed(0)
    image = np.zeros((65, 65, 3), np.uint8)
    image[28:37, 44:60] = 200  # a bar to the right of the centre, its upper half red
    image[28:32, 44:60, 1:] = 0
    guide = (image[..., 0] > 0).astype(np.float32)
    angles, mirrored, levels = [], [], []
    for _ in range(300):
        done = transform(image=image, mask=guide)
        moved, mask = done["image"].astype(float), done["mask"]
        assert np.abs(mask - (moved[..., 0] / moved[..., 0].max())).mean() < 0.01
        y, x = (np.indices(mask.shape) * mask).sum(axis=(1, 2)) / mask.sum() - 32
        red = moved[..., 0] * (moved[..., 1] < moved[..., 0] / 2)
        ry, rx = (np.indices(mask.shape) * red).sum(axis=(1, 2)) / red.sum() - 32
        angles.append(np.degrees(np.arctan2(y, x)))
        mirrored.append(x * (ry - y) - y * (rx - x) > 0)  # on which side of the bar the red lies
        levels.append(moved[..., 0].max())
    assert np.histogram(angles, 6, (-180, 180))[0].min() > 30
    assert 0.4 < np.mean(mirrored) < 0.6
    assert min(levels) < 150
    assert max(levels) > 220
    places = dataset.TurnAndTint(shift=5).draw_places(np.random.default_rng(0), 500, 65)
    moved = np.abs(places @ [32, 32, 1] - 32)  # the centre, by the shift alone
    assert (moved.max(axis=0) > 4.5).all()
    assert moved.max() <= 5


# ---------------------------------------------------------------- a data set on a device
@pytest.fixture
def on_device(tmp_path):
    """Whole images, their wide crops, a guide and 12 rows of them, to be kept on a device."""
    rng = np.random.default_rng(0)

    def draw(size):
        coarse = rng.integers(30, 220, (12, 8, 8, 3), dtype=np.uint8)
        return np.stack([cv2.resize(image, (size, size)) for image in coarse])

    np.save(tmp_path / "whole.npy", draw(64))
    np.save(tmp_path / "wide.npy", draw(90))
    np.save(tmp_path / "maps.npy", rng.random((12, 14, 14), dtype=np.float32))
    whole, wide = (dataset.Stored(tmp_path / f"{name}.npy", 12) for name in ("whole", "wide"))
    jittered = dataset.Jittered(wide, whole, np.tile([13 / 90, 13 / 90, 64 / 90], (12, 1)), 64)
    guide = dataset.Guide(tmp_path / "maps.npy", 12, grid=2)

    def make(*sources, guide=None):
        rows = np.arange(12)
        images = ImageDataset(sources, rows, rows[:, None], rows % 3 == 0, guide=guide)
        images.transform = dataset.train_transform(64, shift=8)
        return images, dataset.DeviceImages(images, torch.device("cpu"))

    return SimpleNamespace(whole=whole, jittered=jittered, guide=guide, make=make)


def place_of(origin):
    """What affine_grid takes as the map of pixels that OpenCV takes."""
    pixels = np.array([[31.5, 0, 31.5], [0, 31.5, 31.5], [0, 0, 1]])
    return (pixels @ np.linalg.inv([*origin.tolist(), [0, 0, 1]]) @ np.linalg.inv(pixels))[:2]


def test_a_device_does_to_pixels_what_workers_do(on_device):
    images, resident = on_device.make(on_device.whole, guide=on_device.guide)
    hair, turn = images.transform.transforms
    epoch = resident.epoch(np.arange(12)[::-1].copy(), seed=3)
    pictures, meta, target, guides = epoch.__getitems__(list(range(12)))
    assert meta[:, 0].tolist() == list(range(12))[::-1]
    assert target.tolist() == [float(row % 3 == 0) for row in range(12)][::-1]
    bald = 0
    for i, row in enumerate(range(11, -1, -1)):
        drawn = {key: part[i] for key, part in epoch.draws[0].items()}
        picture, which = on_device.whole(row, None), int(drawn["hair"])
        bald += which < 0
        if which >= 0:
            picture = hair.apply(picture, which // 8, which % 8, drawn["hair_color"].numpy())
        color, place = drawn["color"].numpy().copy(), place_of(drawn["origin"])
        color[:, 3] *= dataset.LUMA @ picture.mean(axis=(0, 1))
        expected = turn.apply(picture, place, color).astype(int)
        assert np.abs(expected - pictures[i].permute(1, 2, 0).numpy()).max() <= 1
        raster = turn.apply_to_mask(on_device.guide(row, 64), place)
        assert np.allclose(guides[i], on_device.guide.shrink(raster), atol=2e-3)
    assert 2 <= bald <= 10


def test_a_device_cuts_jittered_crops_as_workers_do(on_device):
    _, resident = on_device.make(on_device.jittered)
    boxes = on_device.jittered.draw(np.arange(12), np.random.default_rng(1))
    boxes[3] = 0  # the whole image
    drawn = {"box": torch.from_numpy(boxes).float()}
    cut = resident.pictures(on_device.jittered, torch.arange(12), drawn)
    spans = set()
    for row, box in enumerate(boxes):
        left, top, span = np.rint(box * 90).astype(int)
        expected = on_device.whole(row, None)
        if span:
            spans.add(span > 64)
            picture = on_device.jittered.wide(row, None)[top : top + span, left : left + span]
            how = cv2.INTER_AREA if span > 64 else cv2.INTER_LINEAR
            expected = cv2.resize(picture, (64, 64), interpolation=how)
        assert np.abs(expected - cut[row].permute(1, 2, 0).numpy()).max() <= 1
    assert spans == {True, False}


def test_a_device_draws_from_the_distribution_of_the_workers(on_device):
    images, resident = on_device.make(on_device.whole, on_device.jittered)
    order = np.zeros(600, int)
    both = []
    for part in (images, resident):
        loader = dataset.make_loader(part.epoch(order, 0), 0, batch_size=60)
        both.append(torch.cat([image for image, *_ in loader]).float())
    assert both[0].shape == both[1].shape == (600, 6, 64, 64)
    for statistic in (
        lambda x: x.mean(dim=(2, 3)),  # colours
        lambda x: x.std(dim=(2, 3)),  # contrast
        lambda x: x.amin(dim=(2, 3)),  # hair
        lambda x: (x[..., :32] - x[..., 32:]).mean(dim=(2, 3)),  # left against right
        lambda x: (x[:, :, :32] - x[:, :, 32:]).mean(dim=(2, 3)),
        lambda x: x[:, :, 32, 32],
    ):
        one, two = (statistic(x) for x in both)
        worst = min(
            kstest(a, b).pvalue for a, b in zip(one.T.numpy(), two.T.numpy(), strict=True)
        )
        assert worst > 0.01


def test_epochs_on_a_device_repeat_whatever_the_batches(on_device):
    _, resident = on_device.make(on_device.whole, on_device.jittered)

    def pictures(seed, batch_size, share=(0, 1)):
        loader = dataset.train_loader(resident, batch_size, "shuffle", 0, seed, share)
        return torch.cat([image for image, *_ in loader])

    one = pictures(1, 4)
    assert torch.equal(one, pictures(1, 6))
    assert not torch.equal(one, pictures(2, 4))
    halves = [pictures(1, 4, (rank, 2)) for rank in (0, 1)]
    assert torch.equal(torch.stack(halves, dim=1).flatten(0, 1), one)


def test_images_on_a_device_are_as_stored_for_evaluation(on_device):
    images, _ = on_device.make(on_device.whole)
    images.transform = dataset.eval_transform()
    resident = dataset.DeviceImages(images, torch.device("cpu"))
    some = Subset(resident, [7, 2])
    image, meta, target = next(iter(dataset.make_loader(some, 0, batch_size=2)))
    assert torch.equal(image, torch.stack([images[7][0], images[2][0]]))
    assert (meta[:, 0].tolist(), target.tolist()) == ([7, 2], [0, 0])
