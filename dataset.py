"""Images as tensors: augmentation, sources of pictures, the data sets of a fold, and the loaders of its training.

Images come out as uint8 (3, S, S); networks normalise them on their own device. Loader processes augment them one by
one. Test-time views are exact symmetries of a batch and live with the networks (models.dihedral). Albumentations is
imported here alone; a pipeline of your own is a row of AUGMENTATIONS.

References:
    C. Careaga, attention_guided_cropping (2020): the augmentations, hair among them.
"""

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no version check over the network

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from plumbing.arrays import Rows, array_path, open_array
from plumbing.cells import Bag, Cells
from plumbing.data import Data, MetaEncoder, meta_columns, with_boxes
from plumbing.distributed import Team
from plumbing.files import read_json
from plumbing.images import box_raster, frame_of, hide_outside
from tasks import Task, pick_rows
from util import FOLD

JITTER_SCALE, JITTER_SHIFT = (0.9, 1.25), 0.1  # of a box's side, while training on crops
WHOLE_SHARE = 0.1  # of the crops in training that are the whole image instead
HAIRS = (50, 100, 150, 200, 300, 400, 500, 600)  # on one image
HAIR_BANK = 64  # overlays
HAIR_COLORS = np.array([(35, 18, 11), (61, 35, 20), (90, 56, 37), (44, 22, 8), (21, 15, 8)])
SLIGHT_TURN = np.pi / 18  # 10 degrees
LUMA = np.array([0.299, 0.587, 0.114])


# ---------------------------------------------------------------- augmentation
def draw_hair(size: int, rng: np.random.Generator) -> np.ndarray:
    """The opacity 0..255 of some hair: blurred arcs, uint8 (size, size)."""
    side = size + 200
    canvas = np.zeros((side, side), np.uint8)
    for _ in range(rng.choice(HAIRS)):
        axes = rng.uniform(100, 1.5 * side, 2) / 2
        centre = rng.uniform(-side, side, 2) + axes
        start, end, opacity, width = -rng.integers(71), rng.integers(71), rng.integers(70, 181), rng.integers(1, 4)
        ellipse = [np.rint(16 * pair).astype(int).tolist() for pair in (centre, axes)]  # 1/16 pixel
        cv2.ellipse(canvas, *ellipse, 0, int(start), int(end), int(opacity), int(width), cv2.LINE_AA, 4)
    blurred = cv2.GaussianBlur(canvas, (0, 0), 1)
    return cv2.resize(blurred, (size, size), interpolation=cv2.INTER_AREA)


@cache
def hair_bank(size: int) -> list[np.ndarray]:
    """What draw_hair draws, some times; drawn once in a process."""
    rng = np.random.default_rng(0)
    return [draw_hair(size, rng) for _ in range(HAIR_BANK)]


class DrawHair(A.ImageOnlyTransform):
    """Dark, blurred arcs over a square uint8 image, so that networks learn to look past hair. Numbers, widths, colours,
    opacities and the share of hairy images are the original's. Overlays come from a bank and are varied by the
    symmetries of the square, which is some hundred times cheaper than drawing each time."""

    def __init__(self, size: int, p: float = 0.8):
        super().__init__(p=p)
        self.size = size

    def get_params(self) -> dict:
        """Draw an overlay, a symmetry and a colour."""
        rng = self.random_generator
        return {"overlay": rng.integers(HAIR_BANK), "symmetry": rng.integers(8), "color": rng.choice(HAIR_COLORS)}

    def apply(self, img: np.ndarray, overlay: int, symmetry: int, color: np.ndarray, **_) -> np.ndarray:
        """Blend one overlay into a uint8 (size, size, 3) image."""
        opacity = np.rot90(hair_bank(self.size)[overlay], symmetry % 4)
        opacity = np.ascontiguousarray(opacity.T if symmetry >= 4 else opacity)
        hair = cv2.merge([cv2.convertScaleAbs(opacity, alpha=float(value) / 255) for value in color])
        return cv2.add(cv2.multiply(img, 255 - cv2.merge([opacity] * 3), scale=1 / 255), hair)


class TurnAndTint(A.DualTransform):
    """A square image or its mirror image, turned, moved, and tinted: brighter, darker, duller or gaudier. turn: by
    "any" angle, by "quarter" turns, or "slightly", which does not mirror. All of it takes two passes over the pixels:
    one affine map, mirrored at the border, and one matrix on the colours, without a clip between brightness, contrast
    and saturation. About twice as fast as D4, Affine and ColorJitter of albumentations, which do the same
    (benchmarks/speed.py)."""

    def __init__(self, shift: int = 0, tint: float = 0.2, turn: str = "any"):
        super().__init__(p=1.0)
        self.shift, self.tint, self.turn = shift, tint, turn

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        """Draw both matrices as OpenCV takes them: place (2, 3) from old to new pixels, color (3, 4)."""
        image = data["image"] if "image" in data else data["images"].reshape(-1, *data["images"].shape[2:])
        rng, centre = self.random_generator, (params["shape"][0] - 1) / 2
        if self.turn == "slightly":
            angle, mirror = rng.uniform(-SLIGHT_TURN, SLIGHT_TURN), 1
        else:
            angle, mirror = rng.uniform(-np.pi, np.pi), rng.choice([-1, 1])
        if self.turn == "quarter":
            angle = np.pi / 2 * np.round(angle / (np.pi / 2))
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[mirror * cos, sin], [-mirror * sin, cos]])  # a vertical flip is a mirror image turned
        moved = centre + rng.uniform(-self.shift, self.shift, 2) - centre * turn.sum(axis=1)
        bright, contrast, saturation = rng.uniform(1 - self.tint, 1 + self.tint, 3)
        mix = saturation * np.eye(3) + (1 - saturation) * LUMA
        grey = (1 - contrast) * bright * (LUMA @ cv2.mean(image)[:3])
        color = np.column_stack([bright * contrast * mix, np.full(3, grey)])
        return {"place": np.column_stack([turn, moved]), "color": color.astype(np.float32)}

    def _move(self, raster: np.ndarray, place: np.ndarray) -> np.ndarray:
        size = raster.shape[1], raster.shape[0]
        return cv2.warpAffine(raster, place, size, borderMode=cv2.BORDER_REFLECT_101)

    def apply(self, img: np.ndarray, place: np.ndarray, color: np.ndarray, **_) -> np.ndarray:
        """Move and tint a uint8 (H, W, 3) image."""
        return self.apply_to_images(img[None], place, color)[0]

    def apply_to_images(self, images: np.ndarray, place: np.ndarray, color: np.ndarray, **_) -> np.ndarray:
        """Move and tint uint8 (N, H, W, 3) tiles of an image, all alike."""
        tall = cv2.cvtColor(images.reshape(-1, *images.shape[2:]), cv2.COLOR_RGB2RGBA)  # OpenCV moves four channels
        moved = [self._move(wide, place) for wide in np.split(tall, len(images))]  # faster than three
        return cv2.transform(cv2.cvtColor(np.concatenate(moved), cv2.COLOR_RGBA2RGB), color).reshape(images.shape)

    def apply_to_mask(self, mask: np.ndarray, place: np.ndarray, **_) -> np.ndarray:
        """Move a guide (H, W) with its image."""
        return self._move(mask, place)


class Augmentation(NamedTuple):
    """How training images are varied: transforms(size, shift), and over how many symmetries predictions and maps may be
    averaged. shift: pixels by which networks want images moved that cut them into chips."""

    transforms: Callable[[int, int], list]
    views: int = 8


AUGMENTATIONS = {
    "skin": Augmentation(lambda size, shift: [DrawHair(size), TurnAndTint(shift)]),
    "square": Augmentation(lambda size, shift: [TurnAndTint(shift, turn="quarter")]),
    "upright": Augmentation(lambda size, shift: [TurnAndTint(max(shift, size // 20), turn="slightly")], views=1),
}


# ---------------------------------------------------------------- where pictures come from
class Jittered:
    """Crops for training: the box moved and scaled a little, now and then the whole image. They are cut from wide
    crops, in which box k of row i is the square at x, y = place[i, k, :2] with side place[i, k, 2], in fractions of the
    wide crop. So a network meets boxes as inexact as those of new images will be, without an array per epoch."""

    def __init__(self, wide: Rows, whole: Rows, place: np.ndarray, size: int):
        self.wide, self.whole, self.place, self.size = wide, whole, place, size

    def draw(self, place: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        """A new box in a wide crop for the one at `place`, (x, y, side) like it; None for the whole image."""
        corner, side = place[:2], place[2]
        new = min(side * rng.uniform(*JITTER_SCALE), 1)
        shift = rng.uniform(-JITTER_SHIFT, JITTER_SHIFT, 2) * side
        corner = np.clip(corner + (side - new) / 2 + shift, 0, 1 - new)
        return None if rng.random() < WHOLE_SHARE else np.append(corner, new)

    def cut(self, row: int, picture: np.ndarray, place: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A new crop of a wide one: uint8 (size, size, 3)."""
        box = self.draw(place, rng)
        if box is None:
            return self.whole(row, rng)
        left, top, span = np.rint(box * len(picture)).astype(int)
        crop = picture[top : top + span, left : left + span]
        how = cv2.INTER_AREA if len(crop) > self.size else cv2.INTER_LINEAR
        return cv2.resize(crop, (self.size, self.size), interpolation=how)

    def __call__(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """New crops of a row: uint8 (size, size, 3), or (K, size, size, 3) with black ones where there is no place."""
        wide = self.wide(row, rng)
        if wide.ndim == 3:
            return self.cut(row, wide, self.place[row, 0], rng)
        crops = np.zeros((len(wide), self.size, self.size, 3), np.uint8)
        for k in np.flatnonzero(~np.isnan(self.place[row, :, 0])):
            crops[k] = self.cut(row, wide[k], self.place[row, k], rng)
        return crops


class Located:
    """Whole images in which all but a thing's box is hidden, after they were turned and tinted. boxes: what the boxes
    of crop.py are around, views: the squares that the images show, both in pixels of the originals (N, 4)."""

    def __init__(self, whole: Rows, boxes: np.ndarray, views: np.ndarray):
        self.whole, self.boxes, self.views = whole, boxes, views

    def __call__(self, row: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (S, S, 3) of a row, and which share of every pixel lies in the box: float32 (S, S)."""
        image = self.whole(row, rng)
        return image, box_raster(self.boxes[row], self.views[row], len(image))

    def join(self, image: np.ndarray, raster: np.ndarray) -> np.ndarray:
        """The picture a network sees."""
        return hide_outside(image, raster)


class Depth:
    """Depth maps of crops as grey pictures; they turn and move like images, and are not tinted."""

    def __init__(self, stored: Rows):
        self.stored = stored

    def __call__(self, row: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The grey picture of a row, uint8 (S, S, 3), and its values: float32 (S, S)."""
        image = self.stored(row, rng)
        return image, image[..., 0].astype(np.float32)

    def join(self, image: np.ndarray, raster: np.ndarray) -> np.ndarray:
        """The picture a network sees."""
        return np.repeat(np.rint(raster).astype(np.uint8)[..., None], 3, axis=2)


class Guide:
    """Maps of crop.py that an attention should resemble; they turn and move with their images."""

    def __init__(self, path: Path, n_rows: int, grid: int):
        self.maps, self.grid = np.array(open_array(path, n_rows, dtype=np.float32)), grid

    def enlarge(self, row: int, size: int) -> np.ndarray:
        """Map of a row at the size of its image: float32 (size, size)."""
        return cv2.resize(self.maps[row], (size, size), interpolation=cv2.INTER_LINEAR)

    def shrink(self, raster: np.ndarray) -> np.ndarray:
        """The map as attention: float32 (grid, grid) that sums to 1."""
        small = cv2.resize(raster, (self.grid, self.grid), interpolation=cv2.INTER_AREA)
        return small / max(small.sum(), 1e-12)


# ---------------------------------------------------------------- data sets
class Batch(NamedTuple):
    """One item, or with a first dimension N a batch of them."""

    image: torch.Tensor | np.ndarray | Bag  # uint8 (3 * pictures, S, S), or a scout's cells as kept, in a batch a Bag
    meta: torch.Tensor  # float32 (M,)
    goal: torch.Tensor  # float32 (K,): what the loss compares with the logit; NaN if unknown
    weight: torch.Tensor  # float32; 0 for a row that only fills up a share
    guide: torch.Tensor  # float32 (grid, grid); (0,) without a guide

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class ImageDataset(Dataset):
    """Rows of one or more picture sources with their metadata and goal; the pictures of a row are stacked. An index
    is an item, or for training (item, weight, (seed, position)): a draw whose augmentation depends on its place in the
    epoch alone, so that neither the number of workers nor that of processes changes what a network sees."""

    def __init__(self, sources: list, rows, meta, goal=None, transform=None, guide: Guide | None = None):
        self.sources, self.guide, self.rows = sources, guide, np.asarray(rows)
        self.meta = np.asarray(meta, dtype=np.float32)
        self.goal = np.zeros((len(self.rows), 1), np.float32) if goal is None else np.asarray(goal, np.float32)
        self.transform = transform or A.Compose([])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple) -> Batch:
        i, weight, place = index if isinstance(index, tuple) else (index, 1.0, None)
        seed = None if place is None else int(np.random.SeedSequence(place).generate_state(1)[0])
        if seed is not None:
            self.transform.set_random_seed(seed)
        # a generator of its own: every transform begins with the numbers of the pipeline's
        row, rng = self.rows[i], np.random.default_rng(None if place is None else [*place, 1])
        pictures, guide = [source(row, rng) for source in self.sources], np.empty(0, np.float32)
        if isinstance(self.sources[0], Cells):
            image = self._vary(pictures[0]) if place is not None and self.transform.transforms else pictures[0]
        elif any(isinstance(picture, tuple) for picture in pictures):  # streams, which turn alike
            done = []
            for source, picture in zip(self.sources, pictures, strict=True):
                if seed is not None:
                    self.transform.set_random_seed(seed)
                layers = picture if isinstance(picture, tuple) else (picture,)
                varied = self.transform(**dict(zip(("image", "mask"), layers, strict=False)))
                done.append(source.join(varied["image"], varied["mask"]) if len(layers) > 1 else varied["image"])
            image = as_tensor(done)
        else:
            mask = {} if self.guide is None else {"mask": self.guide.enlarge(row, len(pictures[0]))}
            flat = [one for picture in pictures for one in (picture if picture.ndim == 4 else [picture])]
            done = [self.transform(image=one, **mask) if one.any() else {"image": one, **mask} for one in flat]
            guide = guide if self.guide is None else self.guide.shrink(done[0]["mask"])
            image = as_tensor([part["image"] for part in done])
        return Batch(
            image,
            torch.from_numpy(self.meta[i]),
            torch.from_numpy(self.goal[i]),
            torch.tensor(weight, dtype=torch.float32),
            torch.from_numpy(guide),
        )

    def choose(self, network: torch.nn.Module, amp: torch.autocast) -> None:
        """Look at the tiles alone that a scout finds best now; all else has nothing to choose."""
        if isinstance(self.sources[0], Cells):
            self.sources[0].choose(network, self.rows, amp)

    def _vary(self, cells: np.ndarray) -> np.ndarray:
        """All tiles of a picture transformed alike."""
        cells = np.array(cells)
        tiles = self.transform(images=cells["values"].transpose(0, 2, 3, 1))["images"]
        cells["values"] = np.asarray(tiles).transpose(0, 3, 1, 2)
        return cells


def as_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """Pictures uint8 (S, S, 3) one after the other as (3 * pictures, S, S)."""
    return torch.from_numpy(np.concatenate([picture.transpose(2, 0, 1) for picture in pictures]))


def make_images(data: Data, k: int, args, recipe) -> tuple[dict[str, ImageDataset], MetaEncoder, Task]:
    """Images of fold k to "train" on, "valid" (held out) and "test", if there are any, with the metadata encoder and
    the task, both fitted to the training rows. args: crop_dir, augment, jitter, limit, meta_cols and guide of train.py;
    recipe: of the network (models.MODELS)."""
    crop_dir, tables = args.crop_dir, data.tables()
    if crop_dir is not None:
        boxes = {split: with_boxes(table, crop_dir, split) for split, table in tables.items()}
        tables = {split: table for split, (table, *_) in boxes.items()}
    table, target, strata = tables["train"], data.target, data.task.strata(data.target)
    held_out = table[FOLD].to_numpy() == k
    rows = {
        "train": pick_rows(strata, np.flatnonzero(~held_out), args.limit),
        "valid": pick_rows(strata, np.flatnonzero(held_out), args.limit),
    }
    rows["train"] = rows["train"][~np.isnan(target[rows["train"]]).all(axis=1)]  # what is unknown teaches nothing
    task = data.task.fitted(target[rows["train"]])
    columns = meta_columns(table, args.meta_cols) if recipe.network.uses_meta else []
    encoder = MetaEncoder.fit(table.iloc[rows["train"]], columns)
    if "test" in tables:
        rows["test"] = np.arange(len(tables["test"]))[: args.limit]

    places = {}
    if "location" in recipe.inputs:
        for split, (each, _, inner) in boxes.items():
            views = [frame_of(*size, data.facts["frame"]) for size in each[["width", "height"]].to_numpy()]
            places[split] = inner, np.array(views)
    transforms = AUGMENTATIONS[args.augment].transforms(args.tile or data.size, recipe.network.shift)
    images, augment = {}, A.Compose(transforms)
    for part, chosen in rows.items():
        split, n_rows = ("test" if part == "test" else "train"), len(tables["test" if part == "test" else "train"])
        pictures = {"whole": Rows(data.array_path(split), n_rows), "cells": data.cells.get(split)}
        if crop_dir is not None:
            pictures["crop"] = Rows(array_path(crop_dir, split, data.size), n_rows)
        if part == "train" and crop_dir is not None and args.jitter:
            wide_size = read_json(crop_dir / "crop.json")["wide_size"]
            wide = Rows(array_path(crop_dir, "train_wide", wide_size), n_rows)
            pictures["crop"] = Jittered(wide, pictures["whole"], boxes["train"][1], data.size)
        if "location" in recipe.inputs:
            pictures["location"] = Located(pictures["whole"], *places[split])
        if "depth" in recipe.inputs:
            pictures["depth"] = Depth(Rows(array_path(crop_dir, f"{split}_depth", data.size), n_rows))
        # a network for whole images that is given --crop_dir looks at the crops instead
        seen = ("crop",) if crop_dir is not None and recipe.inputs == ("whole",) else recipe.inputs
        images[part] = ImageDataset(
            [pictures[name] for name in seen],
            chosen,
            encoder.encode(tables[split])[chosen],
            None if part == "test" else task.goal(target[chosen]),
            augment if part == "train" and (not recipe.scouts or args.finetune) else None,
        )
    if args.guide is not None:
        grid = data.size // recipe.network.chip
        images["train"].guide = Guide(args.guide / "train_attention.npy", len(table), grid)
    return images, encoder, task


# ---------------------------------------------------------------- loaders
def draw_order(
    strata: np.ndarray, sampler: str, seed: int, case: np.ndarray | None = None, per_case: int | None = None
) -> np.ndarray:
    """Items of an epoch, shuffled: "shuffle" takes each once, "balanced" as many of each stratum (class). Together
    these are twice the largest stratum, or as many as there are items if these are more: with two classes each of the
    larger once and as many draws from the smaller. per_case: of the items of a case (N,) so many at most, drawn anew in
    every epoch, as the frames of a lesion are alike."""
    rng, items = np.random.default_rng(seed), np.arange(len(strata))
    if per_case is not None:
        shuffled = rng.permutation(items)
        items = np.sort(shuffled[pd.Series(case[shuffled]).groupby(case[shuffled]).cumcount() < per_case])
    if sampler == "balanced":
        parts = [items[strata[items] == stratum] for stratum in np.unique(strata[items])]
        share = math.ceil(max(2 * max(map(len, parts)), len(items)) / len(parts))
        once = [rows if len(rows) <= share else rng.choice(rows, share, replace=False) for rows in parts]
        extra = [rng.choice(rows, share - len(rows)) for rows in once]
        items = np.concatenate([*once, *extra])
    return rng.permutation(items)


def cut_batches(n_items: int, batch_size: int, accumulate: int, rank: int, size: int) -> list[tuple[int, list]]:
    """Batches of an epoch: (items in the whole batch, this process's share of each of its `accumulate` parts). A share
    is a list of (position, weight). Every process gets the same number of parts and at least two rows of each, since
    batch norms need two and no process may sit a step out: rows that another process has too weigh 0. A last batch of
    one item joins the batch before it."""
    starts = list(range(0, n_items, batch_size))
    if len(starts) > 1 and n_items - starts[-1] == 1:
        starts.pop()
    batches = []
    for start, end in zip(starts, [*starts[1:], n_items], strict=True):
        shares = []
        for part in np.array_split(np.arange(start, end), min(accumulate, end - start)):
            share = [(int(position), 1.0) for position in part[rank::size]]
            if len(share) < 2:
                others = dict.fromkeys([*part, *range(start, end), (start - 1) % n_items])
                others = [position for position in others if (position, 1.0) not in share]
                share += [(int(position), 0.0) for position in others[: 2 - len(share)]]
            shares.append(share)
        batches.append((end - start, shares))
    return batches


class TrainLoader:
    """Batches of the training epochs of a fold; one pool of loader processes serves all epochs. strata: of its images
    (N,); case: of all rows of the table; args: sampler, per_case, batch_size, accumulate and workers of train.py."""

    def __init__(self, images: ImageDataset, strata: np.ndarray, case: pd.Series | None, args, team: Team):
        case = None if case is None else case.to_numpy()[images.rows]
        self.drawn_from = {"strata": strata, "sampler": args.sampler, "case": case, "per_case": args.per_case}
        self.how = args.batch_size, args.accumulate, team.rank, team.size
        self.batches, self._epoch = [], []
        self._loader = DataLoader(images, batch_sampler=self, **loader_options(args.workers))

    def __iter__(self) -> Iterator[list]:
        for _, shares in self.batches:
            for share in shares:
                yield [(self._epoch[position], weight, (self._seed, position)) for position, weight in share]

    def __len__(self) -> int:
        return sum(len(shares) for _, shares in self.batches)

    def epoch(self, seed: int) -> Iterator[tuple[int, list[Batch]]]:
        """(items in the whole batch, this process's parts of it), batch by batch; `seed` fixes all draws."""
        self._epoch, self._seed = draw_order(**self.drawn_from, seed=seed).tolist(), seed
        self.batches = cut_batches(len(self._epoch), *self.how)
        loaded = iter(self._loader)
        for n_items, shares in self.batches:
            yield n_items, [next(loaded) for _ in shares]


def collate(items: list[Batch]) -> Batch:
    """A batch of items; cells of pictures become a Bag."""
    if not isinstance(items[0][0], np.ndarray):
        return default_collate(items)
    images, *others = zip(*items, strict=True)
    return Batch(Bag.of(images), *map(torch.stack, others))


def start_worker(worker_id: int) -> None:
    """Keep OpenCV in a loader process from starting threads, and leave Ctrl-C to the process that trains."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # told to end: no error that torch has to report
    sys.excepthook = lambda *_: None  # of threads that find the process that trains gone; torch hands on the rest


def loader_options(workers: int) -> dict:
    """What all loaders have in common; their processes start once."""
    pin = workers > 0 and torch.cuda.is_available()
    more = {"worker_init_fn": start_worker, "persistent_workers": workers > 0, "pin_memory": pin}
    return {"num_workers": workers, "collate_fn": collate, **more}


def eval_loader(images: Dataset, rows, batch_size: int, workers: int) -> DataLoader:
    """Loader of some items of a data set, in order."""
    return DataLoader(Subset(images, rows), batch_size=batch_size, **loader_options(workers))
