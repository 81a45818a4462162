"""Cells: what a frozen network sees in large pictures, computed once and kept beside the data.

A picture is read whole, at most scout_size pixels long and never enlarged, and the network runs over it once. Of the
square of cells that frame_of(..., scout_size) describes, those that lie in the picture are kept as float16. The network
(models.Scout) has cells(image) -> (N, h, w, C), one for every `cell` pixels, a `scout_size` of `grid` cells, and a
fingerprint().
"""

import hashlib
import threading
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing.arrays import Filling, PartialArray
from plumbing.data import Data
from plumbing.files import finish_output, open_output, provenance, read_json
from plumbing.images import inside, read_square
from util import ID, InputError

MARKER = "cells.json"
ONE_AT_A_TIME = threading.Lock()  # hooks of a network see whatever runs through it; threads read, one forwards
THINNEST = 8  # pixels of the short side once the long one is scout_size


def part_of(network, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the square of cells that lie in a picture of size (width, height)."""
    return inside(size, network.scout_size, network.grid)


def check_shape(network, name, size: tuple[int, int]) -> None:
    """Raise InputError if a picture of size (width, height) is a line once it is shrunk."""
    if min(size) * min(1, network.scout_size / max(size)) < THINNEST:
        words = f"{name} is {size[0]} x {size[1]} px, a line at --scout_size {network.scout_size}"
        raise InputError(f"{words}; leave it out")


def read_cells(network, path: Path, size: tuple[int, int], device: torch.device) -> np.ndarray:
    """Cells of a picture of size (width, height): float16 (h, w, C). Raises InputError if it is a line, or of another
    size now."""
    check_shape(network, path, size)
    square, found = read_square(path, network.scout_size, frame=network.scout_size)
    if found != tuple(size):
        now, known = ("{} x {}".format(*each) for each in (found, size))
        raise InputError(f"{path} is {now} px, not {known} as when it was preprocessed; preprocess again")
    rows, columns = (slice(part.start * network.cell, part.stop * network.cell) for part in part_of(network, size))
    picture = torch.from_numpy(square[rows, columns].copy()).permute(2, 0, 1)[None]
    with ONE_AT_A_TIME, torch.inference_mode():
        cells = network.cells(picture.to(device))[0].float().cpu().numpy()
    limit = np.finfo(np.float16).max
    return np.clip(cells, -limit, limit).astype(np.float16)


def on_square(cells: np.ndarray, part: tuple[slice, slice], grid: int) -> np.ndarray:
    """Cells (h, w, C) of a picture in their part of the square: float16 (G, G, C), NaN around them."""
    square = np.full((grid, grid, cells.shape[-1]), np.nan, np.float16)
    square[part] = cells
    return square


class Cells:
    """Cells of the pictures of a table on disk: float16 (n, G, G, C), NaN where a picture has none. Plain reads, and it
    pickles small, as plumbing.arrays.Rows. parts: part_of every picture."""

    def __init__(self, path: Path, parts: list[tuple[slice, slice]], grid: int, channels: int):
        self.path, self.parts, self.grid, self.channels = path, parts, grid, channels
        counts = [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in parts]
        self.starts = np.concatenate([[0], np.cumsum(counts)])  # of every picture's cells in the file, and their end

    def __getitem__(self, rows: int | np.ndarray) -> np.ndarray:
        """Cells of some rows, or of one: float16 (len(rows), G, G, C) or (G, G, C)."""
        offset, squares = np.load(self.path, mmap_mode="r", allow_pickle=False).offset, []
        with open(self.path, "rb") as file:
            for row in np.ravel(rows):
                height, width = (span.stop - span.start for span in self.parts[row])
                file.seek(offset + int(self.starts[row]) * self.channels * 2)  # bytes of a float16
                cells = np.fromfile(file, np.float16, height * width * self.channels)
                squares.append(on_square(cells.reshape(height, width, -1), self.parts[row], self.grid))
        return squares[0] if np.ndim(rows) == 0 else np.stack(squares)

    def __call__(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """Cells of a row, as a source of dataset.ImageDataset: float16 (G, G, C)."""
        return self[row]


def make_cells(network, data: Data, device: torch.device, workers: int, image_dirs: list[Path] | None = None) -> dict:
    """Cells of the pictures of a data directory by split, computed unless they are there. They lie in cells/ below it,
    in a folder for this network and these pictures; a stopped call goes on."""
    facts = {"network": network.fingerprint(), "pictures": data.facts["sha256"], "scout_size": network.scout_size}
    key = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:12]
    folder, found, sizes_of = data.directory / "cells" / key, {}, {}
    for split, table in data.tables().items():
        sizes = list(table[["width", "height"]].itertuples(index=False, name=None))
        for name, size in zip(table[ID], sizes, strict=True):
            check_shape(network, name, size)
        parts = [part_of(network, size) for size in sizes]
        found[split], sizes_of[split] = Cells(folder / f"{split}.npy", parts, network.grid, network.channels), sizes
    if (folder / MARKER).exists():
        read_json(folder / MARKER)
        return found
    gigabytes = 2e-9 * network.channels * sum(int(cells.starts[-1]) for cells in found.values())
    print(f"cells of {sum(map(len, sizes_of.values()))} pictures take {gigabytes:.2f} GB in {folder}")
    open_output(folder, MARKER, False, facts)
    for split, cells in found.items():
        paths = data.find_originals(split, image_dirs)
        array = PartialArray(cells.path, (int(cells.starts[-1]), network.channels), np.float16)
        filling = Filling(folder / f"{split}_done.npy", [array], len(paths))

        def work(row: int, _, split=split, paths=paths, array=array, cells=cells) -> int:
            array.write(cells.starts[row], read_cells(network, paths[row], sizes_of[split][row], device))
            return 1

        with tqdm(total=len(paths), desc=f"cells {split}", unit="image") as bar:
            filling.run(np.arange(len(paths)), work, workers, bar)
        array.finish(range(int(cells.starts[-1])))
    finish_output(folder, MARKER, facts | provenance())
    return found
