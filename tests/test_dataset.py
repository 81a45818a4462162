"""Augmentation, sources of pictures, draws and batches of training."""

import pickle
import signal
from itertools import product
from types import SimpleNamespace
from unittest.mock import Mock

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import InterpolationMode, functional

import dataset
from dataset import DrawHair, Guide, ImageDataset, Jittered, TrainLoader, TurnAndTint, cut_batches, draw_order
from plumbing.arrays import Rows, array_path, open_array
from plumbing.distributed import Team


def test_four_of_five_images_get_hair_in_one_of_five_browns_and_eight_symmetries(monkeypatch):
    monkeypatch.setattr(dataset, "HAIR_BANK", 4)
    hair, bank = DrawHair(48), dataset.hair_bank(48)
    transform, plain = A.Compose([hair]), np.full((48, 48, 3), 200, np.uint8)
    transform.set_random_seed(0)
    assert 0.74 < np.mean([(transform(image=plain)["image"] != 200).any() for _ in range(400)]) < 0.86
    drawn = [hair.get_params() for _ in range(200)]
    assert len({tuple(d["color"].tolist()) for d in drawn}) == 5
    assert {(d["overlay"], d["symmetry"]) for d in drawn} == set(product(range(4), range(8)))
    image, color = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8), np.array([61, 35, 20])
    opacity = bank[1][..., None] / 255
    assert np.abs(hair.apply(image, 1, 0, color) - (1 - opacity) * image - opacity * color).max() <= 1.5
    covers = {hair.apply(0 * image, 1, k, np.array([255] * 3))[..., 0].tobytes() for k in range(8)}
    assert covers == {np.rot90(cover, k).tobytes() for cover in (bank[1], bank[1].T) for k in range(4)}
    assert len(covers) == 8
    dataset.hair_bank.cache_clear()
    assert np.array_equal(bank, dataset.hair_bank(48))  # the same in every process
    dataset.hair_bank.cache_clear()
    assert len(pickle.dumps(hair)) < 5_000  # since it is drawn there and not sent


@pytest.mark.parametrize("mirror", [1, -1])
def test_turn_and_tint_is_torchvisions(mirror):
    coarse = np.random.default_rng(0).integers(80, 170, (8, 8, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (64, 64), interpolation=cv2.INTER_CUBIC)
    factors = {"brightness": 1.1, "contrast": 0.85, "saturation": 1.2}
    drawn = [0.6, np.array([3.0, -2.0]), list(factors.values())]  # angle, shift, tint
    transform = TurnAndTint(shift=5)
    transform.random_generator = SimpleNamespace(uniform=Mock(side_effect=drawn), choice=lambda options: mirror)
    params = transform.get_params_dependent_on_data({"shape": image.shape}, {"image": image})
    expected = torch.from_numpy(image).permute(2, 0, 1) / 255
    for name, factor in factors.items():
        expected = getattr(functional, f"adjust_{name}")(expected, factor)
    expected = functional.horizontal_flip(expected) if mirror == -1 else expected
    expected = functional.affine(expected, -np.degrees(0.6), [3, -2], 1.0, [0, 0], InterpolationMode.BILINEAR)
    y, x = np.indices((64, 64)) - 31.5
    difference = np.abs(transform.apply(image, **params) - 255 * expected.permute(1, 2, 0).numpy())
    assert difference[np.hypot(x - 3, y + 2) < 28].max() < 2  # the rest is mirrored at the border
    moved = transform.apply(image, params["place"], np.eye(3, 4, dtype=np.float32))
    assert (transform.apply_to_mask(image[..., 0], params["place"]) == moved[..., 0]).all()  # guides move along


def test_turn_and_tint_draws_the_whole_circle_both_ways_all_shifts_and_tints():
    transform, image = TurnAndTint(shift=5), np.full((65, 65, 3), 100, np.uint8)
    A.Compose([transform]).set_random_seed(0)
    drawn = [transform.get_params_dependent_on_data({"shape": image.shape}, {"image": image}) for _ in range(400)]
    place, color = (np.stack([one[name] for one in drawn]) for name in ("place", "color"))
    turn = place[:, :, :2]
    assert np.allclose(turn @ turn.transpose(0, 2, 1), np.eye(2))
    assert 0.4 < (np.linalg.det(turn) > 0).mean() < 0.6
    assert np.histogram(np.degrees(np.arctan2(turn[:, 1, 1], turn[:, 0, 1])), 6, (-180, 180))[0].min() > 40
    moved = np.abs(place @ [32, 32, 1] - 32)  # the centre, by the shift alone
    assert 4.5 < moved.max(axis=0).min() <= moved.max() <= 5
    level = color @ [100, 100, 100, 1]  # contrast and saturation leave a grey image as it is
    assert (80 <= level.min() < 85, 115 < level.max() <= 120.001) == (True, True)


def test_what_may_not_be_turned_stays_upright_and_quarter_turns_are_exact():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    quarter = A.Compose([TurnAndTint(tint=0, turn="quarter")])
    found = {quarter(image=image)["image"].tobytes() for _ in range(100)}
    assert found == {np.rot90(one, k).tobytes() for one in (image, image.transpose(1, 0, 2)) for k in range(4)}
    slight = TurnAndTint(turn="slightly")
    A.Compose([slight]).set_random_seed(0)
    turns = [slight.get_params_dependent_on_data({"shape": image.shape}, {"image": image})["place"] for _ in range(200)]
    angles = np.degrees([np.arctan2(turn[0, 1], turn[0, 0]) for turn in turns])
    assert 9 < np.abs(angles).max() <= 10
    assert np.allclose([np.linalg.det(turn[:, :2]) for turn in turns], 1)  # never mirrored
    assert not [step for step in dataset.AUGMENTATIONS["upright"].transforms(32, 0) if isinstance(step, DrawHair)]


def test_jittered_crops_stay_near_the_box_and_are_now_and_then_the_whole(tmp_path):
    wide = np.zeros((1, 140, 140, 3), np.uint8)
    wide[0, ..., 0], wide[0, ..., 1] = np.arange(140), np.arange(140)[:, None]  # x, y in pixels
    np.save(tmp_path / "wide.npy", wide)
    np.save(tmp_path / "whole.npy", np.full((1, 100, 100, 3), 255, np.uint8))
    wide, whole = (Rows(tmp_path / f"{name}.npy", 1) for name in ("wide", "whole"))
    crops, rng = Jittered(wide, whole, np.array([[[20 / 140, 20 / 140, 100 / 140]]]), 100), np.random.default_rng(0)
    drawn = [crops(0, rng).astype(float) for _ in range(400)]
    cut = np.stack([crop for crop in drawn if crop.min() < 255])
    assert 0.05 < 1 - len(cut) / 400 < 0.16
    span, middle = np.ptp(cut[..., 0], axis=(1, 2)) + 1, cut[..., :2].mean(axis=(1, 2))
    assert 88 <= span.min() < 95
    assert 120 < span.max() <= 127
    assert 8 < np.abs(middle - 69.5).max() <= 11
    assert middle.std(axis=0).min() > 3
    edge = Jittered(wide, whole, np.array([[[0.0, 0.0, 1.0]]]), 100)  # a box that fills it
    assert {edge(0, rng).shape for _ in range(50)} == {(100, 100, 3)}
    np.save(tmp_path / "wides.npy", np.full((1, 3, 140, 140, 3), 9, np.uint8))
    place = np.array([[[0.1, 0.1, 0.7], [0.2, 0.2, 0.7], [np.nan] * 3]])
    several = Jittered(Rows(tmp_path / "wides.npy", 1), whole, place, 100)(0, rng)
    assert several.shape == (3, 100, 100, 3)
    assert several.any(axis=(1, 2, 3)).tolist() == [True, True, False]


def make(data_dir, transform=None, guide=None):
    rows, stored = np.arange(16), Rows(array_path(data_dir, "train", 64), 24)
    return ImageDataset([stored], rows, np.zeros((16, 2)), rows[:, None] % 4 == 0, transform, guide)


def test_items_with_guides_that_turn_with_their_images_and_sum_to_one(data_dir, tmp_path):
    item, array = make(data_dir)[4], open_array(array_path(data_dir, "train", 64), 24)
    assert (item.image.numpy().transpose(1, 2, 0) == array[4]).all()
    assert (item.meta.shape, item.goal.item(), item.weight.item()) == ((2,), 1.0, 1.0)
    assert len(pickle.dumps(make(data_dir))) < 20_000  # an opened array is not pickled with it
    maps = np.zeros((24, 4, 4), np.float32)
    maps[:, 0, 3] = 0.25
    np.save(tmp_path / "maps.npy", maps)
    guide = Guide(tmp_path / "maps.npy", 24, grid=2)
    straight, flipped = (make(data_dir, A.Compose([A.HorizontalFlip(p=p)]), guide)[1].guide for p in (0, 1))
    assert (straight.argmax(), straight.sum().item()) == (1, pytest.approx(1))
    assert torch.allclose(flipped, straight.flip(1), atol=1e-6)
    assert guide.shrink(np.zeros((64, 64), np.float32)).sum() == 0  # a map of nothing is no division by 0


def test_boxes_and_augmentation_draw_different_numbers():
    drawn = []

    def source(row, rng):
        drawn.append(rng.random())
        return np.zeros((8, 8, 3), np.uint8)

    images = ImageDataset([source], [0], np.empty((1, 0)), transform=A.Compose([A.HorizontalFlip()]))
    for place in ((0, 0), (0, 0), (0, 1)):
        images[0, 1.0, place]
        seed = int(np.random.SeedSequence(place).generate_state(1)[0])
        images.transform.set_random_seed(seed)
        assert drawn[-1] != images.transform.random_generator.random()
    assert drawn[0] == drawn[1] != drawn[2]


def test_order_of_an_epoch():
    target = np.array([0] * 10 + [1] * 3)
    counts = np.bincount(draw_order(target, "balanced", seed=0), minlength=13)
    assert (counts[:10].tolist(), counts[10:].sum(), counts.min()) == ([1] * 10, 10, 1)
    classes = np.repeat(np.arange(5), [20, 18, 16, 16, 16])  # as many draws as images, although 40 would balance them
    drawn = classes[draw_order(classes, "balanced", seed=0)]
    assert np.bincount(drawn).tolist() == [18] * 5
    lesion = np.repeat(np.arange(20), np.arange(1, 21))
    some = draw_order(np.zeros(210), "shuffle", 0, lesion, per_case=5)
    assert np.bincount(lesion[some]).tolist() == [min(n, 5) for n in range(1, 21)]
    assert len(set(some)) == len(some)
    assert set(some) != set(draw_order(np.zeros(210), "shuffle", 1, lesion, per_case=5))  # drawn anew
    one, same, other = (draw_order(target, "shuffle", seed).tolist() for seed in (0, 0, 1))
    assert one == same != other
    assert one != sorted(one) == sorted(other) == list(range(13))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_batches_hold_every_item_once_and_keep_processes_in_step(size):
    for n_items, batch_size, accumulate in product([2, 3, 5, 9, 16, 17, 33], [1, 2, 3, 4, 8, 64], [1, 2, 3, 8]):
        ranks, counted = [cut_batches(n_items, batch_size, accumulate, rank, size) for rank in range(size)], []
        for batches in zip(*ranks, strict=True):
            assert len({(n, len(shares)) for n, shares in batches}) == 1  # all take as many parts of one size
            assert len(batches[0][1]) == min(accumulate, batches[0][0])
            shares = [share for _, parts in batches for share in parts]
            assert min(len({place for place, _ in share}) for share in shares) >= 2
            own = [place for share in shares for place, weight in share if weight == 1]
            assert len(own) == batches[0][0]
            assert {weight for share in shares for _, weight in share} <= {0.0, 1.0}
            counted += own
        assert sorted(counted) == list(range(n_items))
    assert [n for n, _ in cut_batches(17, 8, 1, 0, size)] == [8, 9]  # a last one joins the batch before it
    assert [n for n, _ in cut_batches(18, 8, 1, 0, size)] == [8, 8, 2]


def test_draws_depend_on_seed_and_position_alone(data_dir):
    def loader(batch_size=4, workers=0, accumulate=1, rank=0, size=1):
        images = make(data_dir, A.Compose([A.RandomBrightnessContrast(brightness_limit=(-0.9, 0.9), p=1)]))
        images.rows[:] = 0  # equal pictures, on which every item draws a random shade
        how = {"sampler": "shuffle", "batch_size": batch_size, "accumulate": accumulate, "workers": workers}
        how["per_case"] = None
        return TrainLoader(images, images.rows, None, SimpleNamespace(**how), Team(torch.device("cpu"), rank, size))

    def shades(loader, seed):
        parts = [part for _, batch in loader.epoch(seed) for part in batch]
        return [float(row.float().mean()) for part in parts for row in part.image[part.weight > 0]]

    one, two = shades(loader(), 1), shades(loader(), 2)
    assert len(set(one)) >= 15  # 16 draws; a rounding tie is possible
    assert len(set(one) & set(two)) <= 1
    workers = loader(batch_size=5, workers=2)  # the same processes in every epoch
    assert [shades(workers, seed) for seed in (1, 2, 1)] == [one, two, one]
    assert shades(loader(batch_size=8, accumulate=3), 1) == one
    assert [shades(loader(batch_size=16, rank=rank, size=3), 1) for rank in range(3)] == [one[k::3] for k in range(3)]


class Process(list):
    def __getitem__(self, i):
        return signal.getsignal(signal.SIGINT) == signal.SIG_IGN, cv2.getNumThreads() <= 1


def test_loader_processes_leave_ctrl_c_to_the_trainer_and_end_in_peace():
    loaded = iter(DataLoader(Process([0]), **dataset.loader_options(1)))
    assert torch.stack(next(loaded)).all()
    loaded._workers[0].terminate()
    loaded._workers[0].join(60)
    assert loaded._workers[0].exitcode == 0
