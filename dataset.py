"""Arrays and tables as tensors: metadata encoder, augmentation, dataset and samplers.

Images come out as uint8 (3, S, S); networks normalise them on their own device. Test-time views
are exact symmetries of a batch and live with the networks (models.dihedral).
"""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no version check over the network

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from util import Rows, open_maps

META_COLUMNS = ("sex", "age_approx", "anatom_site_general_challenge")
MISSING, UNKNOWN = "missing", "unknown"
JITTER_SCALE, JITTER_SHIFT = (0.9, 1.25), 0.1  # of a box's side, while training on crops
WHOLE_SHARE = 0.1  # of the crops in training that are the whole image instead


class MetaEncoder:
    """Metadata as numbers, fitted on training rows alone.

    A text column becomes one column per value seen, one for unknown values and one for missing
    ones; a numeric column becomes its standard score and a missing flag. A column that a later
    table lacks counts as missing everywhere, so the width never changes.
    """

    def __init__(self, columns: dict[str, dict]):
        self.columns = columns  # plain types: it is saved inside checkpoints

    @classmethod
    def fit(cls, table: pd.DataFrame, names: tuple[str, ...] = META_COLUMNS) -> "MetaEncoder":
        """Learn the vocabularies of those of the named columns that the table has."""
        columns = {}
        for name in names:
            if name not in table or table[name].isna().all():
                continue
            values = table[name].dropna()
            if pd.api.types.is_numeric_dtype(values):
                spread = float(values.std(ddof=0))
                columns[name] = {"mean": float(values.mean()), "std": spread if spread > 0 else 1.0}
            else:
                columns[name] = {"values": sorted(values.astype(str).unique().tolist())}
        return cls(columns)

    @property
    def dim(self) -> int:
        """Number of encoded columns M."""
        return sum(len(c["values"]) + 2 if "values" in c else 2 for c in self.columns.values())

    def encode(self, table: pd.DataFrame) -> np.ndarray:
        """Encode a table: float32 (N, M)."""
        parts = [np.empty((len(table), 0))]
        for name, column in self.columns.items():
            values = table[name] if name in table else pd.Series(np.nan, index=table.index)
            if "values" in column:
                words = values.astype(str).where(values.notna(), MISSING).to_numpy()
                known = np.stack([words == word for word in column["values"]], axis=1)
                known &= values.notna().to_numpy()[:, None]
                unknown = values.notna().to_numpy() & ~known.any(axis=1)
                parts += [known, unknown[:, None], values.isna().to_numpy()[:, None]]
            else:
                number = pd.to_numeric(values, errors="coerce").to_numpy(dtype=float)
                gap = ~np.isfinite(number)
                standard = (np.where(gap, column["mean"], number) - column["mean"]) / column["std"]
                parts += [standard[:, None], gap[:, None]]
        return np.concatenate(parts, axis=1).astype(np.float32)


class DrawHair(A.ImageOnlyTransform):
    """Thin dark curves over a square uint8 image, so that networks learn to look past hair.

    Overlays are drawn once into a bank, as lists of the few pixels they touch, and varied by the
    symmetries of the square: some two hundred times cheaper than drawing each time.
    """

    def __init__(self, size: int, max_hairs: int = 30, bank_size: int = 64, p: float = 0.5):
        super().__init__(p=p)
        self.size, self.max_hairs, self.bank_size = size, max_hairs, bank_size
        self._bank: list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None

    @property
    def bank(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Row, column and opacity (0..1) of the pixels of every overlay."""
        if self._bank is None:
            rng = np.random.default_rng(0)
            overlays = [self._draw(rng) for _ in range(self.bank_size)]
            self._bank = [(*o.nonzero(), o[o > 0, None] / np.float32(255)) for o in overlays]
        return self._bank

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_bank": None}  # drawn again in each worker, not sent to it

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        overlay = np.zeros((self.size, self.size), np.uint8)
        t = np.linspace(0, 1, 24)[:, None]
        for _ in range(rng.integers(1, self.max_hairs + 1)):
            start = rng.uniform(-0.1, 1.1, 2)
            angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.9)
            end = start + length * np.array([np.cos(angle), np.sin(angle)])
            bend = (start + end) / 2 + rng.normal(0, 0.25 * length, 2)
            curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
            points = np.rint(curve * self.size * 16).astype(np.int32)  # 1/16 pixel
            opacity = int(rng.integers(120, 230))
            cv2.polylines(overlay, [points], False, opacity, 1, cv2.LINE_AA, shift=4)
        return overlay

    def get_params(self) -> dict:
        """Draw an overlay, its symmetry and its colour, a dark brown."""
        shade = self.py_random.uniform(0.3, 1)
        return {
            "overlay": self.py_random.randrange(self.bank_size),
            "symmetry": self.py_random.randrange(8),
            "color": [75 * shade, 60 * shade, 52 * shade],
        }

    def apply(self, img: np.ndarray, overlay: int, symmetry: int, color: list, **_) -> np.ndarray:
        """Blend one overlay into a uint8 (size, size, 3) image."""
        y, x, alpha = self.bank[overlay]
        for _turn in range(symmetry % 4):
            y, x = self.size - 1 - x, y
        if symmetry >= 4:
            y, x = x, y
        under, hairy = img[y, x], img.copy()
        hairy[y, x] = np.rint(under + alpha * (np.array(color, np.float32) - under))
        return hairy


class TurnAndTint(A.DualTransform):
    """A mirror image or not, turned by any angle, moved, and brighter, darker, duller or gaudier.

    All of it takes two passes over the pixels: one affine map, mirrored at the border, and one
    matrix on the colours, without a clip between brightness, contrast and saturation.
    """

    LUMA = np.array([0.299, 0.587, 0.114])

    def __init__(self, shift: int = 0, tint: float = 0.2):
        super().__init__(p=1.0)
        self.shift, self.tint = shift, tint

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        """Draw both matrices: place (2, 3) and color (3, 4), as OpenCV takes them."""
        height, width = params["shape"][:2]
        draw = self.py_random.uniform
        place = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), draw(-180, 180), 1.0)
        place[:, 2] += draw(-self.shift, self.shift), draw(-self.shift, self.shift)
        if draw(0, 1) < 0.5:  # a vertical flip is this one turned by 180 degrees
            place = place @ np.array([[-1, 0, width - 1], [0, 1, 0], [0, 0, 1]])
        bright, contrast, saturation = (draw(1 - self.tint, 1 + self.tint) for _ in range(3))
        grey = self.LUMA @ cv2.mean(data["image"])[:3]
        mix = saturation * np.eye(3) + (1 - saturation) * self.LUMA
        offset = np.full((3, 1), (1 - contrast) * bright * grey)
        color = np.concatenate([bright * contrast * mix, offset], axis=1)
        return {"place": place, "color": color.astype(np.float32)}

    def _move(self, raster: np.ndarray, place: np.ndarray) -> np.ndarray:
        size = raster.shape[1], raster.shape[0]
        return cv2.warpAffine(raster, place, size, borderMode=cv2.BORDER_REFLECT_101)

    def apply(self, img: np.ndarray, place: np.ndarray, color: np.ndarray, **_) -> np.ndarray:
        """Move and tint a uint8 (H, W, 3) image."""
        wide = cv2.cvtColor(img, cv2.COLOR_RGB2RGBA)  # OpenCV moves four channels faster than three
        return cv2.transform(cv2.cvtColor(self._move(wide, place), cv2.COLOR_RGBA2RGB), color)

    def apply_to_mask(self, mask: np.ndarray, place: np.ndarray, **_) -> np.ndarray:
        """Move a guide (H, W) as its image."""
        return self._move(mask, place)


def train_transform(size: int, shift: int = 0) -> A.Compose:
    """The original's augmentation: hair, flips, any rotation, brightness, contrast, saturation.

    shift: also moves the image by up to so many pixels, for networks that cut it into chips.
    """
    return A.Compose([DrawHair(size), TurnAndTint(shift)])


def eval_transform() -> A.Compose:
    """Nothing: an image as it was stored."""
    return A.Compose([])


class Stored:
    """Images of an array, by row."""

    def __init__(self, path, n_rows: int):
        self.images = Rows(path, n_rows)

    def __call__(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """Image of a row: uint8 (S, S, 3)."""
        return self.images[row]


class Jittered:
    """Crops for training: the box moved and scaled a little, now and then the whole image.

    They are cut from wide crops, in which the box of row i is the square at x, y = place[i, :2]
    with side place[i, 2], in fractions of the wide crop. So a network meets boxes as inexact as
    those of new images will be, without an array per epoch.
    """

    def __init__(self, wide: Stored, whole: Stored, place: np.ndarray, size: int):
        self.wide, self.whole, self.place, self.size = wide, whole, place, size

    def __call__(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """A new crop of a row: uint8 (size, size, 3)."""
        if rng.random() < WHOLE_SHARE:
            return self.whole(row, rng)
        picture = self.wide(row, rng)
        x, y, side = self.place[row]
        new = min(side * rng.uniform(*JITTER_SCALE), 1)
        shift = rng.uniform(-JITTER_SHIFT, JITTER_SHIFT, 2) * side
        corner = np.clip(np.array([x, y]) + (side - new) / 2 + shift, 0, 1 - new)
        left, top, span = np.rint(np.array([*corner, new]) * len(picture)).astype(int)
        cut = picture[top : top + span, left : left + span]
        how = cv2.INTER_AREA if len(cut) > self.size else cv2.INTER_LINEAR
        return cv2.resize(cut, (self.size, self.size), interpolation=how)


class Guide:
    """Maps of crop.py that an attention should resemble, turned and moved with their images."""

    def __init__(self, path, n_rows: int, grid: int):
        self.path, self.n_rows, self.grid = path, n_rows, grid
        self._maps: np.ndarray | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": None}

    def __call__(self, row: int, size: int) -> np.ndarray:
        """Map of a row, enlarged to its image: float32 (size, size)."""
        if self._maps is None:
            self._maps = open_maps(self.path, self.n_rows)
        return cv2.resize(self._maps[row], (size, size), interpolation=cv2.INTER_LINEAR)

    def shrink(self, raster: np.ndarray) -> np.ndarray:
        """The map as attention: float32 (grid, grid) that sums to 1."""
        small = cv2.resize(raster, (self.grid, self.grid), interpolation=cv2.INTER_AREA)
        return small / max(small.sum(), 1e-12)


class ImageDataset(Dataset):
    """Rows of one or more image sources with their metadata and target.

    sources: Stored, or Jittered; with two of them (whole image and crop) their pictures are
    stacked. Items are (image uint8 (3 * sources, S, S), meta float32 (M,), target float32), with a
    guide also its map (grid, grid).
    """

    def __init__(self, sources: list, rows, meta, target=None, transform=None, guide=None):
        self.sources, self.guide = sources, guide
        self.rows = np.asarray(rows)
        self.meta = np.asarray(meta, dtype=np.float32)
        self.target = np.zeros(len(self.rows)) if target is None else np.asarray(target)
        if not len(self.rows) == len(self.meta) == len(self.target):
            raise ValueError(
                f"{len(self.rows)} rows, {len(self.meta)} of metadata and {len(self.target)} "
                "targets do not match"
            )
        self.transform = transform or eval_transform()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        row, rng = self.rows[i], self.transform.random_generator
        pictures = [source(row, rng) for source in self.sources]
        if self.guide is None:
            done = [self.transform(image=picture) for picture in pictures]
        else:
            done = [self.transform(image=pictures[0], mask=self.guide(row, len(pictures[0])))]
        image = np.concatenate([part["image"].transpose(2, 0, 1) for part in done])
        item = (
            torch.from_numpy(image),
            torch.from_numpy(self.meta[i]),
            torch.tensor(self.target[i], dtype=torch.float32),
        )
        if self.guide is None:
            return item
        return *item, torch.from_numpy(self.guide.shrink(done[0]["mask"]))


def one_thread(worker_id: int) -> None:
    """Keep OpenCV in a loader worker from starting threads of its own."""
    cv2.setNumThreads(0)


class Epoch(Dataset):
    """The draws of one training epoch: at position p the image order[p], augmented by (seed, p).

    So neither the number of workers nor that of processes changes what a network sees.
    """

    def __init__(self, images: ImageDataset, order: np.ndarray, seed: int):
        self.images, self.order, self.seed = images, order, seed

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, ...]:
        own_seed = np.random.SeedSequence([self.seed, position]).generate_state(1)[0]
        self.images.transform.set_random_seed(int(own_seed))
        return self.images[self.order[position]]


def draw_order(target: np.ndarray, sampler: str, seed: int) -> np.ndarray:
    """Items of an epoch, shuffled: "shuffle" takes each once, "balanced" each of the larger class
    once and as many draws from the smaller one."""
    rng, items = np.random.default_rng(seed), np.arange(len(target))
    if sampler == "balanced":
        by_class = [np.flatnonzero(np.asarray(target) == label) for label in (0, 1)]
        counts = [len(rows) for rows in by_class]
        if min(counts) == 0:
            raise ValueError("a balanced sampler needs rows of both classes")
        extra = [rng.choice(rows, max(counts) - len(rows)) for rows in by_class]
        items = np.concatenate([*by_class, *extra])
    return rng.permutation(items)


def train_loader(
    images: ImageDataset,
    batch_size: int,
    sampler: str,
    workers: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
) -> DataLoader:
    """Loader of one training epoch; `seed` fixes its order and augmentation.

    share: (i, n) takes every n-th image of each batch, from the i-th; a last batch of fewer than n
    images is left out.
    """
    epoch = Epoch(images, draw_order(images.target, sampler, seed), seed)
    part, parts = share
    places = range(len(epoch))
    whole = [places[start : start + batch_size] for start in range(0, len(epoch), batch_size)]
    batches = [list(batch[part::parts]) for batch in whole if len(batch) >= parts]
    return make_loader(epoch, workers, batch_sampler=batches)


def make_loader(images: Dataset, workers: int, **batches) -> DataLoader:
    """Loader in the order of a dataset; `batches` are DataLoader's batch_size or batch_sampler."""
    return DataLoader(
        images,
        num_workers=workers,
        worker_init_fn=one_thread,
        pin_memory=torch.cuda.is_available(),
        **batches,
    )
