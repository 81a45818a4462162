"""Arrays on disk: filled row by row so that a stopped script goes on, read row by row so that memory stays flat."""

import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.files import atomic
from util import InputError

CHUNK = 256  # rows between two records of progress: what a kill may cost


def array_path(directory: Path, split: str, size: int) -> Path:
    """Where the images of a split lie: (N, size, size, 3) uint8."""
    return directory / f"{split}_{size}.npy"


def open_array(path: Path, rows: int, size: int | None = None, dtype=np.uint8) -> np.ndarray:
    """Memory-map images uint8 (rows, size, size, 3), several crops of each (rows, K, size, size, 3), or maps float32
    (rows, h, w) if dtype is np.float32. Raises InputError if the file is broken or anything else."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        side, several = size or array.shape[-2], array.shape[1:2] if array.ndim == 5 else ()
        expected = (rows, *several, side, side, 3) if dtype == np.uint8 else (rows, *array.shape[1:3])
        if array.shape != expected or array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(f"it holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {expected}")
    except OSError:
        raise
    except Exception as error:  # numpy raises many types on broken headers
        raise InputError(f"{path} is not the array expected ({error}); write it again") from None
    return array


class Rows:
    """Images of an array on disk, read when they are asked for: uint8 (n_rows, S, S, 3) or (n_rows, K, S, S, 3). Plain
    reads, because touched pages of a memory map count as memory of the process: in the end the whole array. Each call
    opens the file, because forked processes would share the position of an open one and read each other's rows."""

    def __init__(self, path: Path, n_rows: int):
        self.path, self.n_rows, self._shape = path, n_rows, None

    def __getitem__(self, rows: int | np.ndarray) -> np.ndarray:
        """Images of some rows, or of one: uint8 (len(rows), ..., 3) or (..., 3)."""
        if self._shape is None:
            array = open_array(self.path, self.n_rows)
            self._shape, self._offset = array.shape[1:], array.offset
        images = np.empty((np.size(rows), *self._shape), np.uint8)
        with open(self.path, "rb", buffering=0) as file:
            for image, row in zip(images, np.ravel(rows), strict=True):
                file.seek(self._offset + int(row) * image.nbytes)
                file.readinto(image)
        return images[0] if np.ndim(rows) == 0 else images

    def __call__(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """Images of a row, as a source of dataset.ImageDataset."""
        return self[row]


class PartialArray:
    """An array that is filled row by row; it lies at PATH.part until it is finished."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype=np.uint8):
        self.path, self.part, self._lock = path, path.with_name(f"{path.name}.part"), threading.Lock()
        if path.exists() and not self.part.exists():
            os.replace(path, self.part)  # a run stopped between finishing this array and the next
        self.is_new = not self.part.exists() or self.view().shape != shape  # stopped while rows were left out
        try:
            if self.is_new:
                with atomic(self.part) as new:
                    np.lib.format.open_memmap(new, "w+", dtype, shape)
                    with open(new, "r+b") as file:
                        if hasattr(os, "posix_fallocate"):  # takes the space now: a full disk is found before any work
                            os.posix_fallocate(file.fileno(), 0, os.path.getsize(new))
        except OSError as error:
            need = math.prod(shape) * np.dtype(dtype).itemsize / 1e9
            raise InputError(f"{path} needs {need:.2f} GB ({error}); make room or pass another path") from None
        self._offset, self._dtype, self._file = self.view().offset, dtype, open(self.part, "r+b", buffering=0)
        self._row_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize

    def view(self) -> np.ndarray:
        """The rows so far, as a memory map."""
        return np.load(self.part, mmap_mode="r", allow_pickle=False)

    def write(self, row: int, values: np.ndarray) -> None:
        """Write a row, or several from that one on; several threads may write different rows."""
        values = np.ascontiguousarray(values, self._dtype)
        with self._lock:
            self._file.seek(self._offset + int(row) * self._row_bytes)
            self._file.write(values.data)

    def sync(self) -> None:
        """Return when all rows written are on the disk."""
        os.fsync(self._file.fileno())

    def finish(self, rows: Sequence[int]) -> None:
        """Give the array its name; if `rows` are not all of it, keep these alone."""
        self._file.close()
        view = self.view()
        if len(rows) < len(view):
            with atomic(self.part) as kept:
                copy = np.lib.format.open_memmap(kept, "w+", view.dtype, (len(rows), *view.shape[1:]))
                for new, old in enumerate(rows):
                    copy[new] = view[old]
                copy.flush()
        os.replace(self.part, self.path)


class Filling:
    """Arrays that are filled together, and a record of which of their rows are done. A row counts as done once its
    arrays are on the disk, so that nothing is missing after a crash of the machine. facts: number of positive integers
    that are kept about every row."""

    def __init__(self, record: Path, arrays: list[PartialArray], n_rows: int, facts: int = 1):
        self.arrays, self._done = arrays, PartialArray(record, (n_rows, facts), np.int32)
        if any(array.is_new for array in arrays) and not self._done.is_new:  # someone removed an array
            for row in range(n_rows):
                self._done.write(row, np.zeros(facts))

    @property
    def facts(self) -> np.ndarray:
        """Facts about every row (N, facts); 0 for rows that are not done."""
        return np.array(self._done.view())

    def run(self, rows: np.ndarray, work: Callable, workers: int, bar: tqdm, prepare: Callable | None = None) -> None:
        """Call work(row, prepared) in threads for those rows that are not done; it writes a row and returns its facts.
        prepare(rows) -> one value per row, made for CHUNK rows at a time; without it `prepared` is None."""
        todo = rows[self.facts[rows, 0] == 0]
        bar.update(len(rows) - len(todo))
        for start in range(0, len(todo), CHUNK):
            chunk, facts = todo[start : start + CHUNK], []
            prepared = prepare(chunk) if prepare else [None] * len(chunk)
            with ThreadPoolExecutor(workers) as pool:
                for fact in pool.map(work, chunk, prepared):  # an error cancels what has not begun
                    facts.append(fact)
                    bar.update()
            for array in self.arrays:
                array.sync()
            for row, fact in zip(chunk, facts, strict=True):
                self._done.write(row, np.array(fact))
            self._done.sync()
