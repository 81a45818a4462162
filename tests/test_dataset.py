"""Metadata, augmentation, sources of pictures, draws and batches of training."""

import pickle
import signal
import warnings
from itertools import product
from types import SimpleNamespace

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode, functional

import dataset
from dataset import DrawHair, Guide, ImageDataset, Jittered, Stored, TrainLoader, TurnAndTint, cut_batches, draw_order
from plumbing.arrays import array_path, open_array
from plumbing.data import MetaEncoder
from plumbing.distributed import Team


# ---------------------------------------------------------------- metadata
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
    assert MetaEncoder.fit(table[3:]).columns["sex"]["values"] == ["male"]  # of the rows given, no others


def test_encoder_takes_new_values_and_lost_columns(table):
    encoder = MetaEncoder(pickle.loads(pickle.dumps(MetaEncoder.fit(table).columns)))
    new = pd.DataFrame({"sex": ["other"], "age_approx": ["about forty"]})
    assert encoder.encode(new)[0].tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    assert MetaEncoder.fit(pd.DataFrame({"x": [1]})).encode(new).shape == (1, 0)


def test_one_value_is_one_value_however_a_file_writes_it():
    encoder = MetaEncoder.fit(pd.DataFrame({"stage": ["1", "2", "x"], "flag": [True, None, False]}), ("stage", "flag"))
    same = pd.DataFrame({"stage": [1.0, 2.0, np.nan], "flag": [1, np.nan, 0]})  # numbers, since a gap is among them
    expected = encoder.encode(pd.DataFrame({"stage": ["1", "2", None], "flag": ["True", None, "False"]}))
    assert (encoder.encode(same) == expected).all()
    assert expected[:2, :3].tolist() == [[1, 0, 0], [0, 1, 0]]


# ---------------------------------------------------------------- hair
def test_hair_is_drawn_with_the_originals_numbers_widths_and_opacities(monkeypatch):
    overlays, draw = [], cv2.ellipse

    def record(canvas, centre, axes, angle, start, end, opacity, width, *more):
        overlays[-1].append((start, end, opacity, width))
        return draw(canvas, centre, axes, angle, start, end, opacity, width, *more)

    monkeypatch.setattr(dataset.cv2, "ellipse", record)
    hair, rng = DrawHair(64), np.random.default_rng(1)
    for _ in range(12):
        overlays.append([])
        hair._draw(rng)
    assert {len(arcs) for arcs in overlays} <= {50, 100, 150, 200, 300, 400, 500, 600}
    assert len({len(arcs) for arcs in overlays}) > 3
    low, high = np.min(sum(overlays, []), axis=0), np.max(sum(overlays, []), axis=0)
    assert (low.tolist(), high.tolist()) == ([-70, 0, 70, 1], [0, 70, 180, 3])


def test_four_of_five_images_get_hair_in_one_of_five_browns():
    hair = DrawHair(64, bank_size=4)
    transform = A.Compose([hair])
    transform.set_random_seed(0)
    image = np.full((64, 64, 3), 200, np.uint8)
    share = np.mean([(transform(image=image)["image"] != 200).any() for _ in range(400)])
    assert 0.74 < share < 0.86
    drawn = [hair.get_params() for _ in range(200)]
    assert {tuple(d["color"]) for d in drawn} == {tuple(color) for color in dataset.HAIR_COLORS}
    assert {(d["overlay"], d["symmetry"]) for d in drawn} == set(product(range(4), range(8)))


def test_hair_covers_by_its_opacity_in_eight_symmetries():
    hair, color = DrawHair(48, bank_size=2), np.array([61, 35, 20])
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    done = [hair.apply(image, 1, symmetry, color) for symmetry in range(8)]
    opacity = hair.bank[1][..., None] / 255
    assert 0.02 < opacity.mean() < 0.7
    assert np.abs(done[0] - ((1 - opacity) * image + opacity * color)).max() <= 1.5
    covers = [hair.apply(np.zeros_like(image), 1, symmetry, np.array([255] * 3))[..., 0] for symmetry in range(8)]
    turned = [np.rot90(m, k) for m in (hair.bank[1], hair.bank[1].T) for k in range(4)]
    assert len({cover.tobytes() for cover in covers}) == 8
    assert {cover.tobytes() for cover in covers} == {one.tobytes() for one in turned}


def test_hair_is_the_same_in_every_process_and_stays_out_of_pickles():
    one, other = DrawHair(48, bank_size=3), DrawHair(48, bank_size=3)
    assert all((a == b).all() for a, b in zip(one.bank, other.bank, strict=True))
    assert len(pickle.dumps(DrawHair(224))) < 100_000 > len(pickle.dumps(one))
    assert (pickle.loads(pickle.dumps(one)).bank[2] == one.bank[2]).all()


# ---------------------------------------------------------------- turns and tints
class Drawn:
    """A random generator that draws what it is told."""

    def __init__(self, *uniform, mirror=1):
        self.values, self.mirror = list(uniform), mirror

    def uniform(self, low, high, n=None):
        value = self.values.pop(0)
        assert np.all((low <= np.array(value)) & (np.array(value) <= high))
        return value

    def choice(self, options):
        return self.mirror


@pytest.mark.parametrize("mirror", [1, -1])
def test_turn_and_tint_is_torchvisions(mirror):
    coarse = np.random.default_rng(0).integers(80, 170, (8, 8, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (64, 64), interpolation=cv2.INTER_CUBIC)
    factors = {"brightness": 1.1, "contrast": 0.85, "saturation": 1.2}
    transform = TurnAndTint(shift=5)
    transform.random_generator = Drawn(0.6, np.array([3.0, -2.0]), list(factors.values()), mirror=mirror)
    params = transform.get_params_dependent_on_data({"shape": image.shape}, {"image": image})
    done = transform.apply(image, **params).astype(float)
    expected = torch.from_numpy(image).permute(2, 0, 1) / 255
    for name, factor in factors.items():
        expected = getattr(functional, f"adjust_{name}")(expected, factor)
    expected = functional.horizontal_flip(expected) if mirror == -1 else expected
    expected = functional.affine(expected, -np.degrees(0.6), [3, -2], 1.0, [0, 0], InterpolationMode.BILINEAR)
    y, x = np.indices((64, 64)) - 31.5
    inside = np.hypot(x - 3, y + 2) < 28
    difference = np.abs(done - 255 * expected.permute(1, 2, 0).numpy())[inside]
    assert difference.max() < 2
    assert difference.mean() < 0.6


def test_turn_and_tint_draws_the_whole_circle_both_ways_and_moves_guides_along():
    transform = A.Compose([TurnAndTint(shift=5)])
    transform.set_random_seed(0)
    image = np.zeros((65, 65, 3), np.uint8)
    image[28:37, 44:60] = 200  # a bar to the right of the centre, its upper half red
    image[28:32, 44:60, 1:] = 0
    guide = (image[..., 0] > 0).astype(np.float32)
    angles, mirrored, levels, moves = [], [], [], []
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
        place = transform.transforms[0].get_params_dependent_on_data({"shape": image.shape}, {"image": image})["place"]
        moves.append(np.abs(place @ [32, 32, 1] - 32))  # the centre, by the shift alone
    assert np.histogram(angles, 6, (-180, 180))[0].min() > 30
    assert 0.4 < np.mean(mirrored) < 0.6
    assert min(levels) < 150
    assert max(levels) > 220
    assert 4.5 < np.max(moves, axis=0).min() <= np.max(moves) <= 5


def test_training_transform_is_built_without_a_warning_and_keeps_shape():
    with warnings.catch_warnings(action="error"):
        transform = dataset.train_transform(64)
    image = np.full((64, 64, 3), 128, np.uint8)
    out = transform(image=image)["image"]
    assert (out.shape, out.dtype) == (image.shape, np.uint8)
    assert (image == 128).all()


# ---------------------------------------------------------------- pictures and guides
def test_jittered_crops_stay_near_the_box_and_are_now_and_then_the_whole(tmp_path):
    wide = np.zeros((1, 140, 140, 3), np.uint8)
    wide[0, ..., 0], wide[0, ..., 1] = np.arange(140), np.arange(140)[:, None]  # x, y in pixels
    np.save(tmp_path / "wide.npy", wide)
    np.save(tmp_path / "whole.npy", np.full((1, 100, 100, 3), 255, np.uint8))
    wide, whole = (Stored(tmp_path / f"{name}.npy", 1) for name in ("wide", "whole"))
    crops = Jittered(wide, whole, np.array([[20 / 140, 20 / 140, 100 / 140]]), 100)
    rng = np.random.default_rng(0)
    drawn = [crops(0, rng) for _ in range(400)]
    assert 0.05 < np.mean([crop.min() == 255 for crop in drawn]) < 0.16
    cut = [crop.astype(float) for crop in drawn if crop.min() < 255]
    assert {crop.shape for crop in cut} == {(100, 100, 3)}
    span = np.array([crop[..., 0].max() - crop[..., 0].min() + 1 for crop in cut])
    middle = np.array([(crop[..., 0].mean(), crop[..., 1].mean()) for crop in cut])
    assert 88 <= span.min() < 95
    assert 120 < span.max() <= 127
    assert 8 < np.abs(middle - 69.5).max() <= 11
    assert middle.std(axis=0).min() > 3
    edge = Jittered(wide, whole, np.array([[0.0, 0.0, 1.0]]), 100)  # a box that fills it
    assert {edge(0, rng).shape for _ in range(50)} == {(100, 100, 3)}


def test_guides_turn_with_their_images_and_sum_to_one(data_dir, tmp_path):
    maps = np.zeros((24, 4, 4), np.float32)
    maps[:, 0, 3] = 0.25
    np.save(tmp_path / "maps.npy", maps)
    guide = Guide(tmp_path / "maps.npy", 24, grid=2)
    flip = A.Compose([A.HorizontalFlip(p=1)])
    images = ImageDataset([Stored(array_path(data_dir, "train", 64), 24)], [0, 5], np.zeros((2, 0)), guide=guide)
    straight = images[1].guide
    images.transform = flip
    assert straight.argmax() == 1
    assert straight.sum() == pytest.approx(1)
    assert torch.allclose(images[1].guide, straight.flip(1), atol=1e-6)
    assert guide.shrink(np.zeros((64, 64), np.float32)).sum() == 0  # a map of nothing is no division by 0


def make(data_dir, transform=None):
    rows = np.arange(16)
    stored = Stored(array_path(data_dir, "train", 64), 24)
    return ImageDataset([stored], rows, np.zeros((16, 2)), rows % 4 == 0, transform)


def test_items(data_dir):
    images = make(data_dir)
    item = images[4]
    assert (item.image.shape, item.image.dtype) == ((3, 64, 64), torch.uint8)
    assert (item.meta.shape, item.target.item(), item.weight.item()) == ((2,), 1.0, 1.0)
    array = open_array(array_path(data_dir, "train", 64), 24)
    assert (item.image.numpy().transpose(1, 2, 0) == array[4]).all()
    assert len(pickle.dumps(images)) < 20_000  # an opened array is not pickled with it


# ---------------------------------------------------------------- draws and batches
def test_order_of_an_epoch():
    target = np.array([0] * 10 + [1] * 3)
    drawn = draw_order(target, "balanced", seed=0)
    counts = np.bincount(drawn, minlength=13)
    assert (counts[:10] == 1).all()
    assert counts[10:].sum() == 10
    assert (counts[10:] >= 1).all()
    assert drawn.tolist() == draw_order(target, "balanced", seed=0).tolist()
    assert drawn.tolist() != draw_order(target, "balanced", seed=1).tolist()
    shuffled = draw_order(target, "shuffle", seed=0)
    assert shuffled.tolist() != sorted(shuffled) == list(range(13))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_batches_hold_every_item_once_and_keep_processes_in_step(size):
    for n_items, batch_size, accumulate in product([2, 3, 5, 9, 16, 17, 33], [1, 2, 3, 4, 8, 64], [1, 2, 3, 8]):
        ranks = [cut_batches(n_items, batch_size, accumulate, rank, size) for rank in range(size)]
        counted = []
        for batches in zip(*ranks, strict=True):
            assert len({n for n, _ in batches}) == 1  # all know the size of the whole batch
            counts = {len(shares) for _, shares in batches}
            assert len(counts) == 1
            assert counts.pop() <= accumulate
            shares = [share for _, parts in batches for share in parts]
            assert min(map(len, shares)) >= 2
            assert all(len({place for place, _ in share}) == len(share) for share in shares)
            own = [place for share in shares for place, weight in share if weight == 1]
            assert len(own) == batches[0][0]
            assert {weight for share in shares for _, weight in share} <= {0.0, 1.0}
            counted += own
        assert sorted(counted) == list(range(n_items))


def test_a_last_batch_of_one_joins_the_one_before():
    assert [n for n, _ in cut_batches(17, 8, 1, 0, 1)] == [8, 9]
    assert [n for n, _ in cut_batches(18, 8, 1, 0, 1)] == [8, 8, 2]


def loader_of(data_dir, batch_size=4, workers=0, accumulate=1, rank=0, size=1):
    """Equal pictures, on which every item draws a random shade."""
    images = make(data_dir, A.Compose([A.RandomBrightnessContrast(brightness_limit=(-0.9, 0.9), p=1)]))
    images.rows[:] = 0
    return TrainLoader(images, "shuffle", batch_size, accumulate, workers, Team(torch.device("cpu"), rank, size))


def shades(loader, seed):
    """What every row of an epoch drew, in order; rows that only fill up a share are left out."""
    parts = [part for _, batch in loader.epoch(seed) for part in batch]
    return [float(row.float().mean()) for part in parts for row in part.image[part.weight > 0]]


def test_draws_depend_on_seed_and_position_alone(data_dir):
    one = shades(loader_of(data_dir), 1)
    assert len(set(one)) >= 15  # 16 draws; a rounding tie is possible
    assert len(set(one) & set(shades(loader_of(data_dir), 2))) <= 1
    workers = loader_of(data_dir, batch_size=5, workers=2)
    assert shades(workers, 1) == one
    assert shades(workers, 2) == shades(loader_of(data_dir), 2)  # the next epoch of the same processes
    assert shades(workers, 1) == one
    parted = loader_of(data_dir, batch_size=8, accumulate=3)
    assert shades(parted, 1) == one
    assert len(parted) == 6
    teams = [shades(loader_of(data_dir, batch_size=16, rank=rank, size=3), 1) for rank in range(3)]
    assert [one[rank::3] for rank in range(3)] == teams


class Process(Dataset):
    """Items that say what process makes them."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        signals = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        return signals == (signal.SIG_DFL, signal.SIG_IGN), cv2.getNumThreads()


def test_loader_processes_leave_ctrl_c_to_the_trainer_and_can_be_ended():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        signals, threads = next(iter(DataLoader(Process(), batch_size=2, **dataset.loader_options(1))))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signals.all()
    assert (threads <= 1).all()


# ---------------------------------------------------------------- data sets of a fold
def test_a_fold_is_held_out_from_its_training_and_its_encoder(data_dir):
    from models import MODELS
    from plumbing.data import read_data

    data = read_data(data_dir)
    args = SimpleNamespace(crop_dir=None, jitter=True, limit=None, meta_cols=None, guide=None)
    images, encoder = dataset.make_images(data, 1, args, MODELS["resnet"])
    fold = data.train["fold"].to_numpy()
    assert images["train"].rows.tolist() == np.flatnonzero(fold != 1).tolist()
    assert images["valid"].rows.tolist() == np.flatnonzero(fold == 1).tolist()
    assert len(images["test"]) == 4
    assert encoder.columns == MetaEncoder.fit(data.train[fold != 1]).columns
    assert len(images["train"].transform.transforms) > 0 == len(images["valid"].transform.transforms)
    args.limit = 2
    limited, _ = dataset.make_images(data, 1, args, MODELS["resnet"])
    assert (len(limited["train"]), len(limited["test"]), limited["train"].target.sum()) == (4, 2, 2)
