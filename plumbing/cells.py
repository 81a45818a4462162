"""Cells: what a scout reads of large pictures, prepared once and kept beside the data.

A picture is read whole, at most scout_size pixels long and never enlarged. The scout (models.Scout) takes it apart:
scout.take_apart(picture) -> (values (B, ...), middles (B, 2)), of dtype scout.kept and shape scout.shape. That are
features of a frozen network on a grid, or the pixels of tiles for a network that is trained with the head. They are
kept in one file per picture. A Bag holds the cells of some pictures, of which not all have the same number.
"""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from tqdm import tqdm

from plumbing.data import Data
from plumbing.files import atomic, finish_output, open_output, provenance, remove
from plumbing.images import inside, read_square
from util import ID, InputError

MARKER = "cells.json"
ONE_AT_A_TIME = threading.Lock()  # hooks of a network see whatever runs through it; threads read, one forwards
THINNEST = 8  # pixels of the short side once the long one is scout_size
NEAR = 2  # pixels by which things grow when it is asked whether they touch


class Bag(NamedTuple):
    """Cells of N pictures, of which the largest has B."""

    values: torch.Tensor  # of all cells, picture after picture: (cells, C) features, or uint8 (cells, 3, T, T) pixels
    place: torch.Tensor  # float32 (N, B, 2): row and column of the middle, in sides of the square; NaN: no cell

    def to(self, device: torch.device, non_blocking: bool = False) -> "Bag":
        """The same on a device."""
        return Bag(*(part.to(device, non_blocking=non_blocking) for part in self))

    @classmethod
    def of(cls, pictures: list[np.ndarray]) -> "Bag":
        """Cells of some pictures as kept."""
        place = np.full((len(pictures), max(map(len, pictures)), 2), np.nan, np.float32)
        for row, cells in zip(place, pictures, strict=True):
            row[: len(cells)] = cells["place"]
        return cls(torch.from_numpy(np.concatenate([cells["values"] for cells in pictures])), torch.from_numpy(place))

    @property
    def known(self) -> torch.Tensor:
        """Where there is a cell: bool (N, B)."""
        return ~self.place[..., 0].isnan()


def split(seen: "np.ndarray | Bag", size: int) -> list:
    """Parts of at most `size` pictures, as networks take them: of images uint8 (N, S, S, 3) or of a Bag."""
    if isinstance(seen, Bag):
        counts = [int(known.sum()) for known in seen.known.split(size)]
        return list(map(Bag, seen.values.split(counts), seen.place.split(size)))
    return list(torch.from_numpy(np.array(seen)).permute(0, 3, 1, 2).split(size))


# ---------------------------------------------------------------- one picture
def check_shape(scout, name, size: tuple[int, int]) -> None:
    """Raise InputError if a picture of size (width, height) is a line once it is shrunk."""
    if min(size) * min(1, scout.scout_size / max(size)) < THINNEST:
        words = f"{name} is {size[0]} x {size[1]} px, a line at --scout_size {scout.scout_size}"
        raise InputError(f"{words}; leave it out")


def read_cells(scout, path: Path, size: tuple[int, int]) -> np.ndarray:
    """Cells of a picture of size (width, height): (B,) with fields place and values, as in Bag. Raises InputError if it
    is a line, or of another size now."""
    check_shape(scout, path, size)
    square, found = read_square(path, scout.scout_size, frame=scout.scout_size)
    if found != tuple(size):
        now, known = ("{} x {}".format(*each) for each in (found, size))
        raise InputError(f"{path} is {now} px, not {known} as when it was preprocessed; preprocess again")
    rows, columns = inside(size, scout.scout_size, scout.scout_size // scout.unit)
    start = np.array([rows.start, columns.start]) * scout.unit
    end = np.array([rows.stop, columns.stop]) * scout.unit
    with ONE_AT_A_TIME:
        values, middles = scout.take_apart(square[start[0] : end[0], start[1] : end[1]])
    cells = np.empty(len(values), [("place", np.float32, 2), ("values", scout.kept, scout.shape)])
    cells["place"], cells["values"] = (start + middles) / scout.scout_size, values
    return cells


def spread(start: int, length: int, tile: int, end: int) -> np.ndarray:
    """Where as few tiles as possible start that cover [start, start + length) inside [0, end)."""
    count = -(-length // tile)
    first = np.clip(start + (length - count * tile) // 2, 0, max(end - tile, 0))
    return np.clip(first + tile * np.arange(count), 0, max(end - tile, 0))


def place_tiles(picture: np.ndarray, tile: int) -> np.ndarray:
    """Upper left corners (B, 2) of tiles that hold all of a picture (H, W, 3) but areas of one colour. If a tile of the
    plain grid is of one colour, that is the background, and whatever stands before it gets tiles of its own, unless
    that takes more of them than the grid has."""
    size = picture.shape[:2]

    def cover(y: int, x: int, height: int, width: int) -> list:
        return [(row, column) for row in spread(y, height, tile, size[0]) for column in spread(x, width, tile, size[1])]

    def is_plain(corner) -> bool:
        part = picture[corner[0] : corner[0] + tile, corner[1] : corner[1] + tile]
        return bool((part == part[0, 0]).all())

    grid = cover(0, 0, *size)
    plain = next((corner for corner in grid if is_plain(corner)), None)
    if plain is not None:
        color = tuple(map(int, picture[plain]))
        thing = cv2.copyMakeBorder(255 - cv2.inRange(picture, color, color), *[NEAR] * 4, cv2.BORDER_CONSTANT)
        thing = cv2.dilate(thing, np.ones((2 * NEAR + 1,) * 2, np.uint8))
        found = cv2.connectedComponentsWithStats(thing, connectivity=8)[2][1:, :4] - [0, 0, 2 * NEAR, 2 * NEAR]
        things = [corner for x, y, width, height in found for corner in cover(y, x, height, width)]
        grid = min(grid, things or [plain], key=len)
    return np.array([corner for corner in grid if not is_plain(corner)] or grid[:1])


# ---------------------------------------------------------------- all pictures
class Cells:
    """Cells of the pictures of a table on disk, read when they are asked for."""

    def __init__(self, folder: Path, n_rows: int):
        self.folder, self.n_rows = folder, n_rows
        self.best = torch.empty(0)  # numbers of the cells of every row that are read, if not all: (n_rows, M)

    def path(self, row: int) -> Path:
        """Where the cells of a row lie."""
        return self.folder / f"{row}.npy"

    def read(self, row: int) -> np.ndarray:
        """Cells of a row, all or the best: (B,) with fields place and values."""
        cells = np.load(self.path(row), mmap_mode="r" if len(self.best) else None, allow_pickle=False)
        return cells[np.sort(self.best[row])] if len(self.best) and len(cells) > self.best.shape[1] else cells

    def __getitem__(self, rows: np.ndarray) -> Bag:
        """Cells of some rows."""
        return Bag.of([self.read(row) for row in rows])

    def __call__(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """Cells of a row, as a source of dataset.ImageDataset."""
        return self.read(row)

    @torch.no_grad()
    def choose(self, scout, rows: np.ndarray, amp: torch.autocast) -> None:
        """Read only the best scout.top_m cells of some rows from now on, in loader processes too. They are scored a few
        at a time, so that memory does not grow with the picture."""
        if not scout.top_m:
            return
        if not len(self.best):
            self.best = torch.zeros(self.n_rows, scout.top_m, dtype=torch.long).share_memory_()
        scout.eval()
        for row in tqdm(rows, desc="best cells", unit="picture", leave=False):
            cells, parts = np.load(self.path(row), mmap_mode="r", allow_pickle=False), []
            if len(cells) <= scout.top_m:
                continue
            for start in range(0, len(cells), scout.piece):  # plain reads: touched pages of a map count as memory
                where = {"count": min(scout.piece, len(cells) - start), "offset": cells.offset + start * cells.itemsize}
                bag = Bag.of([np.fromfile(self.path(row), cells.dtype, **where)]).to(scout.mean.device)
                with amp:
                    parts.append(scout.score(scout.embed(bag), bag.place))
            self.best[row] = scout.find_best(torch.cat(parts, dim=2))[0].cpu()


def make_cells(scout, data: Data, workers: int, image_dirs: list[Path] | None = None) -> dict[str, Cells]:
    """Cells of the pictures of a data directory by split, computed unless they are there. They lie in cells/ below it,
    in a folder for this scout and these pictures; a stopped call goes on."""
    facts = {"scout": scout.fingerprint(), "pictures": data.facts["sha256"]}
    folder = data.directory / "cells" / hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:12]
    found = {split: Cells(folder / split, len(table)) for split, table in data.tables().items()}
    if not (folder / MARKER).exists():
        sizes = {split: list(table[["width", "height"]].itertuples(index=False, name=None))
                 for split, table in data.tables().items()}  # fmt: skip
        for split, table in data.tables().items():
            for name, size in zip(table[ID], sizes[split], strict=True):
                check_shape(scout, name, size)
        most = sum(scout.bytes_of(size) for each in sizes.values() for size in each) / 1e9
        print(f"cells of {sum(map(len, sizes.values()))} pictures take up to {most:.2f} GB in {folder}")
        open_output(folder, MARKER, False, facts)
        for split, cells in found.items():
            cells.folder.mkdir(exist_ok=True)
            fill(scout, cells, data.find_originals(split, image_dirs), sizes[split], workers)
        finish_output(folder, MARKER, facts | provenance())
    return found


def fill(scout, cells: Cells, paths: list[Path], sizes: list[tuple[int, int]], workers: int) -> None:
    """Write the cells of a split that are not there yet."""
    remove(cells.folder, "*.tmp")

    def work(row: int) -> None:
        path = cells.path(row)
        if not path.exists():
            with atomic(path) as new, open(new, "wb") as file:
                np.save(file, read_cells(scout, paths[row], sizes[row]))

    bar = tqdm(total=len(paths), desc=cells.folder.name, unit="picture")
    with bar, ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, range(len(paths))):  # an error cancels what has not begun
            bar.update()
