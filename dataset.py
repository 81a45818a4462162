"""Arrays and tables as tensors: metadata encoder, augmentation, dataset and samplers.

Images come out as uint8 (3, S, S); networks normalise them on their own device. Loader processes
augment them one by one (ImageDataset), or the device that trains does it batch by batch
(DeviceImages). Test-time views are exact symmetries of a batch and live with the networks
(models.dihedral).
"""

import os
import signal

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no version check over the network

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from util import InputError, Rows, chunked, open_maps

META_COLUMNS = ("sex", "age_approx", "anatom_site_general_challenge")
MISSING, UNKNOWN = "missing", "unknown"
JITTER_SCALE, JITTER_SHIFT = (0.9, 1.25), 0.1  # of a box's side, while training on crops
WHOLE_SHARE = 0.1  # of the crops in training that are the whole image instead
HAIR_COLOR = (75, 60, 52)  # at its lightest
LUMA = np.array([0.299, 0.587, 0.114])


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

    def draw(self, rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
        """Draw n overlays with their symmetries, and colours (n, 3), a dark brown."""
        return {
            "overlay": rng.integers(self.bank_size, size=n),
            "symmetry": rng.integers(8, size=n),
            "color": rng.uniform(0.3, 1, (n, 1)) * HAIR_COLOR,
        }

    def get_params(self) -> dict:
        """Draw for one image."""
        return {key: drawn[0] for key, drawn in self.draw(self.random_generator, 1).items()}

    def dense_bank(self) -> torch.Tensor:
        """Opacity of every overlay in its 8 symmetries, 0..255: uint8 (8 * bank_size, size, size).

        Symmetry s of overlay i is at 8 * i + s.
        """
        plain = torch.zeros(self.bank_size, self.size, self.size, dtype=torch.uint8)
        for overlay, (y, x, alpha) in zip(plain, self.bank, strict=True):
            overlay[y, x] = torch.from_numpy(np.rint(255 * alpha[:, 0]).astype(np.uint8))
        turned = [plain.rot90(turns, (1, 2)) for turns in range(4)]
        return torch.stack([*turned, *(view.mT for view in turned)], dim=1).flatten(0, 1)

    def apply(self, img: np.ndarray, overlay: int, symmetry: int, color, **_) -> np.ndarray:
        """Blend one overlay into a uint8 (size, size, 3) image."""
        y, x, alpha = self.bank[overlay]
        for _turn in range(symmetry % 4):
            y, x = self.size - 1 - x, y
        if symmetry >= 4:
            y, x = x, y
        under, hairy = img[y, x], img.copy()
        hairy[y, x] = np.rint(under + alpha * (np.array(color, np.float32) - under))
        return hairy


def color_maps(bright: np.ndarray, contrast: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    """Factors (n, 1, 1) as linear maps (n, 3, 4) of colours and the mean grey of their image."""
    mix = saturation * np.eye(3) + (1 - saturation) * LUMA
    grey = np.broadcast_to((1 - contrast) * bright, (len(mix), 3, 1))
    return np.concatenate([bright * contrast * mix, grey], axis=2)


class TurnAndTint(A.DualTransform):
    """A square image or its mirror image, turned by any angle, moved, and tinted: brighter, darker,
    duller or gaudier.

    All of it takes two passes over the pixels: one affine map, mirrored at the border, and one
    matrix on the colours, without a clip between brightness, contrast and saturation.
    """

    def __init__(self, shift: int = 0, tint: float = 0.2):
        super().__init__(p=1.0)
        self.shift, self.tint = shift, tint

    def draw_places(self, rng: np.random.Generator, n: int, size: int) -> np.ndarray:
        """Draw affine maps of pixels (n, 2, 3) as OpenCV takes them: from old to new places."""
        angle, mirror = rng.uniform(-np.pi, np.pi, n), rng.choice([-1, 1], n)
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.stack([mirror * cos, sin, -mirror * sin, cos], axis=1).reshape(n, 2, 2)
        centre = (size - 1) / 2  # a vertical flip is a horizontal one turned by half a circle
        moved = centre + rng.uniform(-self.shift, self.shift, (n, 2)) - centre * turn.sum(axis=2)
        return np.concatenate([turn, moved[:, :, None]], axis=2)

    def draw_colors(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Draw brightness, contrast and saturation: maps (n, 3, 4) of (red, green, blue, the mean
        grey of the image) to new colours."""
        factors = rng.uniform(1 - self.tint, 1 + self.tint, (3, n, 1, 1))
        return color_maps(*factors)

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        """Draw both matrices: place (2, 3) and color (3, 4), as OpenCV takes them."""
        place = self.draw_places(self.random_generator, 1, params["shape"][0])[0]
        color = self.draw_colors(self.random_generator, 1)[0]
        color[:, 3] *= LUMA @ cv2.mean(data["image"])[:3]
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

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """New boxes of some rows in their wide crops, as `place` (n, 3); a side of 0 stands for
        the whole image."""
        corner, side = self.place[rows, :2], self.place[rows, 2:]
        new = np.minimum(side * rng.uniform(*JITTER_SCALE, side.shape), 1)
        shift = rng.uniform(-JITTER_SHIFT, JITTER_SHIFT, corner.shape) * side
        corner = np.clip(corner + (side - new) / 2 + shift, 0, 1 - new)
        whole = rng.random(side.shape) < WHOLE_SHARE
        return np.where(whole, 0, np.hstack([corner, new]))

    def __call__(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """A new crop of a row: uint8 (size, size, 3)."""
        box = self.draw(np.array([row]), rng)[0]
        if box[2] == 0:
            return self.whole(row, rng)
        picture = self.wide(row, rng)
        left, top, span = np.rint(box * len(picture)).astype(int)
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

    @property
    def maps(self) -> np.ndarray:
        """Maps of all rows: float32 (n_rows, h, w)."""
        if self._maps is None:
            self._maps = open_maps(self.path, self.n_rows)
        return self._maps

    def __call__(self, row: int, size: int) -> np.ndarray:
        """Map of a row, enlarged to its image: float32 (size, size)."""
        return cv2.resize(self.maps[row], (size, size), interpolation=cv2.INTER_LINEAR)

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

    def epoch(self, order: np.ndarray, seed: int) -> "Epoch":
        """The draws of a training epoch."""
        return Epoch(self, order, seed)


def start_worker(worker_id: int) -> None:
    """Keep OpenCV in a loader process from starting threads, and Ctrl-C and the like, which reach
    a whole process group, for the trainer."""
    cv2.setNumThreads(0)
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):  # not the trainer's, where it was forked
        signal.signal(number, signal.SIG_DFL)


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


# ---------------------------------------------------------------- a data set on a device
def resize_weights(start: torch.Tensor, span: torch.Tensor, size: int, width: int) -> torch.Tensor:
    """Weights (n, size, width) that resize pixels start..start + span of a line of `width`.

    start, span: (n,). Mean over areas where the cut is wider than size, else linear, as OpenCV.
    """
    start, span = start.view(-1, 1, 1), span.view(-1, 1, 1)
    step = span / size
    new = torch.arange(size, device=start.device).view(-1, 1)
    old = torch.arange(width, device=start.device) - start
    overlap = torch.minimum((new + 1) * step, old + 1) - torch.maximum(new * step, old)
    centre = torch.minimum(((new + 0.5) * step - 0.5).clamp_min(0), span - 1)
    weights = torch.where(span > size, overlap / step, 1 - (centre - old).abs())
    return weights.clamp_min(0)


class DeviceImages(Dataset):
    """An ImageDataset that lies on a device as a whole and is augmented there, batch by batch.

    It draws from the distributions of the ImageDataset's transform and sources, and does the same
    to the pixels but for rounding. Raises InputError where it does not fit on the device.
    """

    def __init__(self, images: ImageDataset, device: torch.device):
        self.rows, self.target, self.sources = images.rows, images.target, images.sources
        self.device, self.guide, self.arrays = device, images.guide, {}
        for source in self.sources:
            for part in (source.wide, source.whole) if isinstance(source, Jittered) else (source,):
                if part.images.path not in self.arrays:
                    self.arrays[part.images.path] = self._copy(part.images)
        self.meta = torch.from_numpy(images.meta).to(device)
        self.labels = torch.tensor(self.target, dtype=torch.float32, device=device)
        self.transforms = images.transform.transforms  # those of train_transform, or none
        if self.transforms:
            bank = self.transforms[0].dense_bank()
            self.hair = torch.cat([bank, torch.zeros_like(bank[:1])]).to(device)  # the last: bald
        if self.guide is not None:
            self.maps = torch.from_numpy(self.guide.maps[self.rows]).to(device)

    def _copy(self, images: Rows) -> torch.Tensor:
        shape = len(self.rows), *images[self.rows[0]].shape
        try:
            copy = torch.empty(shape, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            raise InputError(
                f"{images.path} does not fit on {self.device}; pass --loader workers"
            ) from None
        with tqdm(total=len(copy), desc=f"reading {images.path}", leave=False) as bar:
            for chunk in chunked(np.arange(len(copy)), None):
                copy[chunk[0] : chunk[-1] + 1] = torch.from_numpy(images[self.rows[chunk]])
                bar.update(len(chunk))
        return copy

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, items: list[int]) -> tuple[torch.Tensor, ...]:
        """A batch as it was stored."""
        items = torch.tensor(items, device=self.device)
        image = torch.cat([self.stored(source, items) for source in self.sources], dim=1)
        return image, self.meta[items], self.labels[items]

    def stored(self, source: Stored, items: torch.Tensor) -> torch.Tensor:
        """Pictures of some items: uint8 (n, 3, S, S)."""
        return self.arrays[source.images.path][items].permute(0, 3, 1, 2)

    def epoch(self, order: np.ndarray, seed: int) -> "DeviceEpoch":
        """The draws of a training epoch."""
        return DeviceEpoch(self, order, seed)

    def draw(
        self, source: Stored | Jittered, order: np.ndarray, rng: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        """Draw the augmentation of the pictures of an epoch, (n, ...) each."""
        (hair, tint), n = self.transforms, len(order)
        overlay = hair.draw(rng, n)
        which = 8 * overlay["overlay"] + overlay["symmetry"]
        place = np.tile(np.eye(3), (n, 1, 1))
        place[:, :2] = tint.draw_places(rng, n, hair.size)
        half = (hair.size - 1) / 2
        pixels = np.array([[half, 0, half], [0, half, half], [0, 0, 1]])  # of -1..1
        drawn = {
            "hair": np.where(rng.random(n) < hair.p, which, -1),
            "hair_color": overlay["color"],
            "origin": (np.linalg.inv(place @ pixels) @ pixels)[:, :2],  # as affine_grid takes it
            "color": tint.draw_colors(rng, n),
        }
        if isinstance(source, Jittered):
            drawn["box"] = source.draw(self.rows[order], rng)
        whole_numbers = {"hair": drawn.pop("hair")}
        drawn = {key: part.astype(np.float32) for key, part in drawn.items()} | whole_numbers
        return {key: torch.from_numpy(part).to(self.device) for key, part in drawn.items()}

    def pictures(
        self, source: Stored | Jittered, items: torch.Tensor, drawn: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Pictures of some items, jittered as drawn: (n, 3, S, S), 0..255."""
        if isinstance(source, Stored):
            return self.stored(source, items)
        wide, whole = self.stored(source.wide, items), self.stored(source.whole, items)
        width = wide.shape[-1]
        left, top, span = (drawn["box"] * width).round().unbind(1)
        is_whole = span == 0
        span = torch.where(is_whole, width, span)
        across = resize_weights(left, span, source.size, width).unsqueeze(1)
        down = resize_weights(top, span, source.size, width).unsqueeze(1)
        crop = down @ wide.float() @ across.mT
        return torch.where(is_whole.view(-1, 1, 1, 1), whole, crop)

    def augment(
        self, picture: torch.Tensor, raster: torch.Tensor | None, drawn: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hair, place and colours as drawn: pictures uint8 (n, 3, S, S), and a raster
        (n, 1, S, S) moved along."""
        picture = picture.float()
        opacity = self.hair[drawn["hair"]].unsqueeze(1) / 255
        picture = picture + opacity * (drawn["hair_color"][..., None, None] - picture)
        mix, by_grey = drawn["color"].split((3, 1), dim=2)
        grey = picture.mean(dim=(2, 3)) @ torch.from_numpy(LUMA).to(picture)
        layers = picture if raster is None else torch.cat([picture, raster], dim=1)
        grid = F.affine_grid(drawn["origin"], layers.shape, align_corners=True)
        moved = F.grid_sample(layers, grid, padding_mode="reflection", align_corners=True)
        tinted = torch.einsum("nij,njyx->niyx", mix, moved[:, :3])
        tinted += (by_grey * grey.view(-1, 1, 1)).unsqueeze(3)
        return tinted.round_().clamp_(0, 255).byte(), moved[:, 3:]


class DeviceEpoch(Dataset):
    """Epoch for DeviceImages: all is drawn from the seed at once, batches are put together there.

    So neither the size of the batches nor the number of processes changes what is drawn.
    """

    def __init__(self, images: DeviceImages, order: np.ndarray, seed: int):
        self.images, self.order = images, torch.from_numpy(order).to(images.device)
        rng = np.random.default_rng(seed)
        self.draws = [images.draw(source, order, rng) for source in images.sources]

    def __len__(self) -> int:
        return len(self.order)

    def __getitems__(self, positions: list[int]) -> tuple[torch.Tensor, ...]:
        images, positions = self.images, torch.tensor(positions, device=self.order.device)
        items, raster, pictures = self.order[positions], None, []
        if images.guide is not None:
            size = images.transforms[0].size
            maps = images.maps[items].unsqueeze(1)
            raster = F.interpolate(maps, (size, size), mode="bilinear")
        for source, draws in zip(images.sources, self.draws, strict=True):
            drawn = {key: part[positions] for key, part in draws.items()}
            done, moved = images.augment(images.pictures(source, items, drawn), raster, drawn)
            pictures.append(done)
        batch = torch.cat(pictures, dim=1), images.meta[items], images.labels[items]
        if raster is None:
            return batch
        guide = F.adaptive_avg_pool2d(moved.squeeze(1), images.guide.grid)
        return *batch, guide / guide.sum(dim=(1, 2), keepdim=True).clamp_min(1e-12)


# ---------------------------------------------------------------- loaders
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
    images: "ImageDataset | DeviceImages",
    batch_size: int,
    sampler: str,
    workers: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
    start: int = 0,
) -> DataLoader:
    """Loader of one training epoch; `seed` fixes its order and augmentation.

    share: (i, n) takes every n-th image of each batch, from the i-th; a last batch of fewer than n
    images is left out. start: number of the first batch.
    """
    epoch = images.epoch(draw_order(images.target, sampler, seed), seed)
    part, parts = share
    places = range(len(epoch))
    whole = [places[start : start + batch_size] for start in range(0, len(epoch), batch_size)]
    batches = [list(batch[part::parts]) for batch in whole if len(batch) >= parts]
    return make_loader(epoch, workers, batch_sampler=batches[start:])


def collate(items: list | tuple) -> list | tuple:
    """A batch of items; what DeviceImages puts together is one already."""
    return items if isinstance(items, tuple) else default_collate(items)


def make_loader(images: Dataset, workers: int, **batches) -> DataLoader:
    """Loader in the order of a dataset; `batches` are DataLoader's batch_size or batch_sampler.

    DeviceImages take no workers.
    """
    return DataLoader(
        images,
        num_workers=workers,
        worker_init_fn=start_worker,
        collate_fn=collate,
        pin_memory=workers > 0 and torch.cuda.is_available(),
        **batches,
    )
