"""What two stages must agree on: columns, tables, arrays, images, metrics and run directories.

Every file that one script writes and another reads goes through a function here. Nothing heavy
is imported at the top (no torch, no scikit-learn), so that `--help` and preprocessing start fast.
"""

import argparse
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError

ID, TARGET, FOLD, PROB = "image_name", "target", "fold", "prob"
EXTERNAL = -1  # fold of images that are trained on and never held out
PLACE = ("place_x", "place_y", "place_side")  # of a box in its wide crop, in fractions of it
BOX_SIDE = "box_side"  # of the box over the short side of its image: 1 is the whole square
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
BOOTSTRAP_SAMPLES = 1000
# Of an original. Mammograms have 30 million, the largest cameras 150, scanned films 200; decoded,
# a pixel takes four bytes, so that a forged or mistaken file costs 2 GB per thread at most.
MAX_PIXELS = 500_000_000
CHUNK = 256  # rows between two records of progress: what a kill may cost
RANK_MODES = ("rank", "weights", "zoom")  # blends of ranks
MIN_TPR = 0.8  # the ISIC 2024 score: area under the ROC curve above this sensitivity


# ---------------------------------------------------------------- errors and command line
def one_line(text: str) -> str:
    """A text without line breaks and control characters, for names in files may hold any; of a
    very long one the middle is left out."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= 900 else f"{line[:600]} ... {line[-280:]}"


class InputError(Exception):
    """Bad input: its text is one line that names the file or value and says what to do."""

    def __init__(self, text: str):
        # one that a loader process raised comes with its traceback
        super().__init__(one_line(text.rpartition("InputError: ")[2]))


class Stopped(Exception):
    """Unfinished work that was stopped in good order: what to do, and the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the line breaks of a script's docstring and shows real defaults."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default in (None, False)
        return action.help if silent else super()._get_help_string(action)


def new_parser(description: str) -> argparse.ArgumentParser:
    """An argument parser that takes no abbreviated flags."""
    return argparse.ArgumentParser(
        description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: a number of a kind (int, float) in low..high."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not in {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def run_script(main: Callable, parser: argparse.ArgumentParser, *expected: type[Exception]) -> None:
    """Parse the command line and run `main(args)`; bad input ends in one line and exit status 2.

    `expected` are further exception types that mean bad input. Anything else is a bug and keeps
    its traceback.
    """
    args = parser.parse_args()
    try:
        main(args)
    except Stopped as stopped:
        parser.exit(stopped.status, f"{parser.prog}: {stopped}\n")
    except (InputError, *expected) as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(str(error))}\n")
    except OSError as error:
        advice = "make room, change permissions or pass another path"
        parser.exit(2, f"{parser.prog}: error: {one_line(str(error))}; {advice}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted\n")


def shard(text: str) -> tuple[int, int]:
    """An argparse type: i/n, the part i (from 0) of n parts."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text} is not i/n with i from 0 to n - 1")
    return int(part), int(parts)


def claim_dir(path: Path, marker: str, overwrite: bool) -> Path:
    """Create a directory to write to; refuse one that already holds its `marker` file."""
    try:
        if (path / marker).exists() and not overwrite:
            raise InputError(f"{path} is already finished; pass --overwrite to replace it")
        path.mkdir(parents=True, exist_ok=True)
        (path / marker).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written to ({error.strerror}); pass another folder"
        ) from None
    return path


def claim_filling(path: Path, marker: str, args: argparse.Namespace, settings: dict) -> Path:
    """claim_dir for a directory of PartialArrays: goes on with one that was left unfinished.

    settings: all that its rows depend on, as plain JSON. Raises InputError where the unfinished
    work had others.
    """
    if args.overwrite and args.shard:
        raise InputError("--overwrite would drop what other shards wrote; remove the directory")
    if (path / marker).exists():
        drop_parts(path)  # of a run that was killed after its last step
    claim_dir(path, marker, args.overwrite)
    if args.overwrite:
        drop_parts(path)
    started = part_of(path / marker)
    if not started.exists():
        write_json(started, settings)
    for key, value in read_json(started, dict.fromkeys(settings, object)).items():
        if value != settings[key]:
            raise InputError(
                f"{path} is unfinished and was begun with {key} = {value}, not {settings[key]}; "
                "pass --overwrite to start anew"
            )
    return path


def finish_filling(path: Path, marker: str, facts: dict) -> None:
    """Write the marker of a finished directory, and drop the records of its progress."""
    write_json(path / marker, facts)
    drop_parts(path)


def part_of(path: Path) -> Path:
    """Where a file lies until it is finished."""
    return path.with_name(path.name + ".part")


def drop_parts(path: Path) -> None:
    """Remove what belongs to unfinished work."""
    for part in path.glob("*.part"):
        part.unlink()


# ---------------------------------------------------------------- files that are whole or absent
@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` only on success.

    Processes that write the same path take turns; what a killed one left is written over.
    """
    temporary = path.with_name(path.name + ".tmp")
    handle = own_file(temporary)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def own_file(path: Path) -> int:
    """Create a file, or take over one that no living process holds; returns its locked handle."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # while we waited its owner gave it another name


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Within the block no other process is in such a block of the directory."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict) -> None:
    """Write strict, sorted JSON: paths become text, numpy numbers plain ones, NaN is refused."""

    def plain(value):
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"{value!r} has no place in a JSON file")

    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False, default=plain)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


@contextmanager
def reading(path: Path, advice: str) -> Iterator[None]:
    """Within the block, a file that cannot be opened is an InputError with that advice."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {advice}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); {advice}") from None


def check_keys(path: Path, content: dict, kinds: dict[str, type | tuple]) -> None:
    """Raise InputError unless JSON content has these keys with values of these types.

    A key may be a path as in "data.folds_sha256"; "*" stands for every item of a list.
    """
    for key, kind in kinds.items():
        values = [content]
        for part in key.split("."):
            if part == "*":
                values = [item for items in values for item in items]
            elif all(isinstance(value, dict) and part in value for value in values):
                values = [value[part] for value in values]
            else:
                raise InputError(f"{path} has no {key!r}: another version wrote it; make it again")
        wrong = [value for value in values if not isinstance(value, kind)]
        if wrong:
            short = textwrap.shorten(repr(wrong[0]), 60)
            raise InputError(f"{path}: {key} cannot be {short}; make it again")


def read_json(path: Path, kinds: dict[str, type | tuple] | None = None) -> dict:
    """Read a JSON object, strictly; raises InputError where it is missing, broken, or not as
    check_keys wants it."""

    def bounded(kind: type) -> Callable[[str], float]:
        def parse(text: str) -> float:
            value = kind(text)
            if not abs(value) < 1e300:  # NaN, infinite, or an integer that no float can hold
                raise ValueError(f"{text} is out of range")
            return value

        return parse

    parsers = {"parse_int": bounded(int), "parse_float": bounded(float)}
    try:
        with reading(path, "run the stage that writes it"):
            content = json.loads(
                path.read_text(encoding="utf-8"), parse_constant=bounded(float), **parsers
            )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); make it again") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise InputError(f"{path} should hold a JSON object, not a {kind}; make it again")
    check_keys(path, content, kinds or {})
    return content


def run_threads(work: Callable, items: Iterable, workers: int, bar=None) -> list:
    """Results of work(item) for all items, in threads; an error stops those not begun.

    bar: a tqdm bar to move on by every item.
    """
    results = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for result in pool.map(work, items):
                results.append(result)
                if bar is not None:
                    bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def provenance() -> dict:
    """Command line, package versions and commit of this run, for the json beside its results."""
    versions = {"python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "numpy", "pandas", "scikit-learn", "albumentations"):
        versions[name] = metadata.version(name)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # a copy without its git history
    return {"argv": sys.argv, "versions": versions, "commit": commit}


# ---------------------------------------------------------------- tables
def read_csv(path: Path, columns: Iterable[str], id_col: str | None = ID) -> pd.DataFrame:
    """Read a csv with all `columns` and with text in `id_col`, which no row lacks.

    Raises InputError naming the file and the column or row at fault.
    """
    columns = [*columns] if id_col is None else [id_col, *columns]
    text = {"encoding": "utf-8-sig", "compression": None, "skipinitialspace": True}
    try:
        with reading(path, "check its name"), warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            header = pd.read_csv(path, header=None, nrows=1, dtype=str, **text).iloc[0].dropna()
            # rows longer than the header are an error, and a column has one type throughout
            types = {} if id_col is None else {id_col: str}
            table = pd.read_csv(path, dtype=types, index_col=False, low_memory=False, **text)
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as CSV UTF-8") from None
    except pd.errors.ParserWarning:
        raise InputError(f"{path} has rows longer than its header; save it anew") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"{path} is not a readable csv ({error}); save it anew") from None
    if header.duplicated().any():
        twice = header[header.duplicated()].iloc[0]
        raise InputError(f"{path} has two columns {twice!r}; rename or remove one")
    for column in columns:
        if column not in table:
            names = textwrap.shorten(", ".join(table), 300, placeholder=" ...")
            raise InputError(
                f"{path} has no column {column!r}; it has {names}: rename one, or separate them "
                "by commas"
            )
    if table.empty:
        raise InputError(f"{path} has no rows; fill it")
    if id_col is not None and table[id_col].isna().any():
        row = int(np.flatnonzero(table[id_col].isna())[0]) + 2
        raise InputError(f"{path} line {row}: {id_col} is empty or NA; fill it in or remove it")
    return table


def read_table(path: Path, columns: Iterable[str] = (), id_col: str = ID) -> pd.DataFrame:
    """Read a csv of images: `id_col` is unique in every row, and called image_name from here on.

    Raises InputError naming the file and the column or row at fault.
    """
    table = read_csv(path, columns, id_col)
    if table[id_col].duplicated().any():
        name = table.loc[table[id_col].duplicated(), id_col].iloc[0]
        raise InputError(f"{path} names {id_col} {name!r} more than once; remove a row")
    if id_col != ID and ID in table:
        raise InputError(f"{path} has both {id_col!r} and {ID!r}; rename the second")
    return table.rename(columns={id_col: ID})


def numbers(
    table: pd.DataFrame, column: str, path: Path, low: float = -math.inf, high: float = math.inf
) -> np.ndarray:
    """A column of a table as float (N,); raises InputError unless all are numbers in low..high."""
    values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float)
    bad = ~(np.isfinite(values) & (values >= low) & (values <= high))
    if bad.any():
        row = table[bad].iloc[0]
        span = "" if low == -math.inf else f" from {low:g} to {high:g}"
        raise InputError(
            f"{path}: {column} of {row[ID]} is {str(row[column])!r}; it must be a number{span}"
        )
    return values


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a csv without an index; floats keep every digit."""
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)


def check_target(table: pd.DataFrame, path: Path, both: bool = True) -> np.ndarray:
    """Targets as int (N,); raises InputError unless all are 0 or 1 and, where asked, both occur."""
    values = pd.to_numeric(table[TARGET], errors="coerce")
    bad = ~values.isin([0, 1])
    if bad.any():
        row = table[bad].iloc[0]
        raise InputError(f"{path}: target of {row[ID]} is {str(row[TARGET])!r}; it must be 0 or 1")
    target = values.to_numpy(dtype=int)
    if both and len(np.unique(target)) < 2:
        raise InputError(f"{path}: every target is {target[0]}; both classes are needed")
    return target


def folds_sha256(table: pd.DataFrame) -> str:
    """Hash of who is in which fold with which target: what two stages must share."""
    return hashlib.sha256(table[[ID, TARGET, FOLD]].to_csv(index=False).encode()).hexdigest()


@dataclass
class Data:
    """What preprocess.py wrote: tables (row i is row i of the arrays) and facts about them."""

    directory: Path
    train: pd.DataFrame
    test: pd.DataFrame | None
    submission_ids: list[str] | None  # the order of sample_submission.csv
    facts: dict  # preprocess.json

    @property
    def size(self) -> int:
        """Side of the stored images, in pixels."""
        return self.facts["size"]

    @property
    def group(self) -> pd.Series:
        """Group label of every train image, by image_name."""
        return pd.Series(groups_of(self.train, self.facts["group_col"]), index=self.train[ID])

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables that exist, by split."""
        both = {"train": self.train, "test": self.test}
        return {split: table for split, table in both.items() if table is not None}


def read_data(data_dir: Path) -> Data:
    """Read a directory that preprocess.py finished.

    Raises InputError where a table is missing or was changed since, or a group lies in two folds.
    """
    kinds = {
        "size": int, "n_folds": int, "group_col": (str, type(None)), "image_dirs": list,
        "image_dirs.*": str, "sha256": dict,
    }  # fmt: skip
    facts = read_json(data_dir / "preprocess.json", kinds)
    group = [] if facts["group_col"] is None else [facts["group_col"]]
    columns = {
        "train.csv": (TARGET, FOLD, "width", "height", *group),
        "test.csv": ("width", "height"),
        "sample_submission.csv": (),
    }
    tables = dict.fromkeys(columns)
    for name in columns:
        if name in facts["sha256"] or name == "train.csv":
            tables[name] = read_table(data_dir / name, columns[name])
            if sha256(data_dir / name) != facts["sha256"].get(name):
                raise InputError(
                    f"{data_dir / name} was changed after preprocessing; run preprocess.py again"
                )
    folds = set(tables["train.csv"][FOLD]) - {EXTERNAL}
    if len(folds) != facts["n_folds"] or folds != set(range(len(folds))):
        raise InputError(f"{data_dir} has other folds than its json says; run preprocess.py again")
    sample = tables["sample_submission.csv"]
    submission_ids = None if sample is None else sample[ID].tolist()
    data = Data(data_dir, tables["train.csv"], tables["test.csv"], submission_ids, facts)
    check_groups(data)
    return data


def check_groups(data: Data) -> int:
    """Number of groups of the training images; raises InputError where one lies in two folds."""
    folds = data.train[FOLD].groupby(data.group.to_numpy()).unique()
    for name, found in folds.items():
        if len(found) > 1:
            group = f"{data.facts['group_col']} {name.partition(':')[2]}"
            raise InputError(
                f"{data.directory / 'train.csv'}: {group} lies in folds {found[0]} and {found[1]}, "
                "so that networks would be scored on what they were trained on; run preprocess.py "
                "again"
            )
    return len(folds)


def groups_of(table: pd.DataFrame, group_col: str | None) -> np.ndarray:
    """Group label of every row (N,); a row without one is a group of its own."""
    own = table[ID].map("row:{}".format)
    if group_col is None:
        return own.to_numpy()
    return table[group_col].map("group:{}".format).where(table[group_col].notna(), own).to_numpy()


def with_box_side(table: pd.DataFrame, crop_dir: Path, split: str) -> pd.DataFrame:
    """A table of Data with the side of every image's box over the image's short side, and the
    box's place in its wide crop.

    Raises InputError where the boxes are of other images.
    """
    path = crop_dir / f"{split}_boxes.csv"
    boxes = read_table(path, ("x0", "x1", *PLACE))
    if boxes[ID].tolist() != table[ID].tolist():
        raise InputError(f"{path} has boxes of other images than the table; run crop.py again")
    place = {column: numbers(boxes, column, path, 0, 1) for column in PLACE}
    width = numbers(boxes, "x1", path) - numbers(boxes, "x0", path)
    side = width / table[["width", "height"]].min(axis=1)
    end = np.maximum(place["place_x"], place["place_y"]) + place["place_side"]
    bad = (side <= 0) | (side > 1 + 1e-6) | (place["place_side"] <= 0) | (end > 1 + 1e-6)
    if bad.any():
        raise InputError(
            f"{path}: the box of {table[ID][bad].iloc[0]} is not inside its image; run crop.py "
            "again"
        )
    return table.assign(**{BOX_SIDE: side}, **place)


# ---------------------------------------------------------------- arrays
def array_path(directory: Path, split: str, size: int) -> Path:
    """Where the images of a split lie: (N, size, size, 3) uint8."""
    return directory / f"{split}_{size}.npy"


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What a .npy file of that content begins with."""
    header = io.BytesIO()
    kind = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, kind)
    return header.getvalue()


class PartialArray:
    """An array on disk that is filled row by row; it lies at PATH.part until finish().

    A stopped run finds its rows again, and several processes may write different rows at once.
    Rows are plain file writes, no memory map: memory stays flat, and a full disk is an error
    where a map would kill the process.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype=np.uint8):
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        header = npy_header(self.dtype, shape)
        self.offset = len(header)
        self.row_bytes = self.dtype.itemsize * math.prod(shape[1:])
        size = self.offset + shape[0] * self.row_bytes
        if path.exists() and not part_of(path).exists():
            os.replace(path, part_of(path))  # a run stopped between this array and the next
        self._file = os.fdopen(os.open(part_of(path), os.O_RDWR | os.O_CREAT, 0o666), "r+b", 0)
        self.begun = os.fstat(self._file.fileno()).st_size == size
        if not self.begun:
            free = shutil.disk_usage(path.parent).free
            if free < size:
                raise InputError(
                    f"{path} needs {size / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
                    "make room or pass another --output_dir"
                )
            os.truncate(self._file.fileno(), size)
            os.pwrite(self._file.fileno(), header, 0)

    def write(self, row: int, values: np.ndarray) -> None:
        """Write a row; safe from several threads and processes."""
        values = np.ascontiguousarray(values, self.dtype)
        if values.shape != self.shape[1:]:
            raise ValueError(f"a row of {self.path} is {self.shape[1:]}, not {values.shape}")
        start = self.offset + int(row) * self.row_bytes
        if os.pwrite(self._file.fileno(), values, start) != self.row_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def sync(self) -> None:
        """Return when all rows written are on the disk."""
        os.fsync(self._file.fileno())

    def view(self) -> np.ndarray:
        """The rows so far, as a memory map."""
        return np.load(part_of(self.path), mmap_mode="r", allow_pickle=False)

    def finish(self, rows: np.ndarray) -> None:
        """Give the array its name; where `rows` are not all of it, to a copy of these."""
        self.sync()
        if len(rows) == self.shape[0]:
            os.replace(part_of(self.path), self.path)
            return
        view = self.view()
        with atomic(self.path) as temporary, open(temporary, "wb") as file:
            file.write(npy_header(self.dtype, (len(rows), *self.shape[1:])))
            for row in rows:
                file.write(view[row])


class Progress:
    """Which rows of PartialArrays are done, and `facts` positive integers about each of them.

    A row counts as done once its arrays are on the disk, so that nothing is missing after a
    crash of the machine either.
    """

    def __init__(self, path: Path, arrays: list[PartialArray], facts: int = 1):
        self.arrays = arrays
        self._record = PartialArray(path, (arrays[0].shape[0], facts), np.int32)
        if self._record.begun and not all(array.begun for array in arrays):
            for row in range(self._record.shape[0]):  # someone removed an array
                self._record.write(row, np.zeros(facts))

    @property
    def facts(self) -> np.ndarray:
        """Facts of every row (N, facts); 0 where it is not done."""
        return np.array(self._record.view())

    def todo(self, rows: np.ndarray) -> np.ndarray:
        """Those of some rows that are not done."""
        return rows[self.facts[rows, 0] == 0]

    def add(self, rows: np.ndarray, facts: np.ndarray) -> None:
        """Record rows as done, with facts (len(rows), facts) about them."""
        for array in self.arrays:
            array.sync()
        for row, values in zip(rows, facts, strict=True):
            self._record.write(row, values)
        self._record.sync()


def chunked(rows: np.ndarray, part: tuple[int, int] | None) -> Iterator[np.ndarray]:
    """Rows CHUNK at a time; of a shard (i, n) every n-th, from i."""
    own = rows if part is None else rows[part[0] :: part[1]]
    for start in range(0, len(own), CHUNK):
        yield own[start : start + CHUNK]


def map_array(path: Path, stage: str = "the stage that writes it") -> np.ndarray:
    """Memory-map an array that `stage` wrote; raises InputError where it is missing or broken."""
    try:
        with reading(path, f"run {stage} first"), np.errstate(over="ignore"):  # of absurd shapes
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except InputError:
        raise
    except Exception as error:  # numpy raises many types on broken headers
        raise InputError(f"{path} is not a readable array ({error}); write it again") from None
    if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
        raise InputError(f"{path} is not one array in C order; write it again")
    return array


def open_array(path: Path, rows: int, size: int | None = None) -> np.ndarray:
    """Memory-map a uint8 (rows, S, S, 3) array, of S = size px where that is known; raises
    InputError if it is anything else."""
    array = map_array(path)
    good = array.ndim == 4 and array.shape[1] == array.shape[2] and array.shape[3] == 3
    if array.dtype != np.uint8 or not good or size not in (None, array.shape[1]):
        raise InputError(
            f"{path} holds {array.dtype} {array.shape}; uint8 (N, {size or 'size'}, "
            f"{size or 'size'}, 3) is expected: write it again"
        )
    if len(array) != rows:
        raise InputError(
            f"{path} has {len(array)} images but its table has {rows} rows; write it again"
        )
    return array


class Rows:
    """Images of an array on disk, read as they are asked for: uint8 (n_rows, S, S, 3).

    Plain reads, because what is touched of a memory map counts as this process's memory, in the
    end the whole array. Pickles small: the file is opened by the process that reads.
    """

    def __init__(self, path: Path, n_rows: int):
        self.path, self.n_rows = path, n_rows
        self._file = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, rows: int | np.ndarray) -> np.ndarray:
        """Images of some rows, or of one: uint8 (len(rows), S, S, 3) or (S, S, 3)."""
        if self._file is None:
            array = open_array(self.path, self.n_rows)
            self._shape, self._offset = array.shape[1:], array.offset
            self._file = open(self.path, "rb", buffering=0)
        images = np.empty((np.size(rows), *self._shape), np.uint8)
        for image, row in zip(images, np.ravel(rows), strict=True):
            start = self._offset + int(row) * image.nbytes
            if os.preadv(self._file.fileno(), [image], start) != image.nbytes:
                raise InputError(f"{self.path} ends before row {row}; write it again")
        return images[0] if np.ndim(rows) == 0 else images


def open_maps(path: Path, rows: int) -> np.ndarray:
    """Memory-map attention (rows, h, w) float32; raises InputError if it is anything else."""
    maps = map_array(path, "crop.py")
    if maps.dtype != np.float32 or maps.ndim != 3 or len(maps) != rows:
        raise InputError(
            f"{path} holds {maps.dtype} {maps.shape}; float32 ({rows}, h, w) is expected: "
            "run crop.py again"
        )
    return maps


# ---------------------------------------------------------------- images
def index_images(*image_dirs: Path) -> dict[str, Path]:
    """Images of folders by file name and by name without suffix (jpg, jpeg, png, any case).

    Raises InputError where two share a name, or where one is a link to another place.
    """
    index: dict[str, Path] = {}
    for folder in image_dirs:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; pass the images' folder with --image_dir")
        root = os.path.realpath(folder)
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            target = os.path.realpath(path) if path.is_symlink() else root
            if not Path(target).is_relative_to(root):
                raise InputError(
                    f"{path} is a link to {target}, outside of its folder; put the image there"
                )
            if path.stem in index:
                raise InputError(f"{index[path.stem]} and {path} share a name; remove one")
            index[path.stem] = index[path.name] = path
    return index


# Pillow would return the memory of every large image to the system and have it zeroed anew for the
# next. Blocks are of 16 MB; 24 megapixels take six.
PILLOW_BLOCKS = 8 * (os.cpu_count() or 1)
Image.core.set_blocks_max(PILLOW_BLOCKS)
Image.MAX_IMAGE_PIXELS = None  # read_image has a limit of its own, and no warning below it
warnings.filterwarnings("ignore", module="PIL")  # of odd EXIF: an image is read or an error


def read_image(path: Path, min_side: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Read an image upright and as 8-bit RGB; returns it with the original's (width, height).

    With `min_side` a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its short
    side keeps that many pixels. EXIF orientation is applied; grey, palette, CMYK and 1-bit files
    are converted; an alpha channel is dropped; 16-bit grey is scaled to 8 bit (65535 -> 255).
    Raises InputError naming the file where it is missing, broken or of another kind.
    """
    with reading(path, "repair it"):
        file = open(path, "rb")
    try:
        # no other format, whatever the suffix: Pillow hands some to outside programs
        with file, Image.open(file, formats=("JPEG", "PNG")) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(
                    f"{path} claims {width} x {height} px, more than {MAX_PIXELS:,}; shrink it"
                )
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            image.load()
            orientation = image.getexif().get(0x0112, 1)
            # an image as it should be is passed on: a copy of a large one costs as much as decoding
            upright = image if orientation == 1 else ImageOps.exif_transpose(image)
            turned = orientation in (5, 6, 7, 8)  # the orientations that swap the sides
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path} is no JPEG or PNG; convert it") from None
    except Exception as error:  # Pillow's plugins raise many types on broken files
        raise InputError(f"{path} is not a readable image ({error}); repair it") from None
    if upright.mode.startswith("I"):
        grey = np.asarray(upright).astype(np.float64) / 257
        upright = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    rgb = upright if upright.mode == "RGB" else upright.convert("RGB")
    return rgb, (height, width) if turned else (width, height)


def resize_box(image: Image.Image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Cut a box (x0, y0, x1, y1 in pixels of `image`) and resize it: uint8 (size, size, 3).

    Antialiased bilinear (the filter the original used for its arrays).
    """
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def centre_square(width: int, height: int) -> tuple[float, float, float, float]:
    """Largest centred square of an image as (x0, y0, x1, y1)."""
    side = min(width, height)
    x0, y0 = (width - side) / 2, (height - side) / 2
    return x0, y0, x0 + side, y0 + side


def read_square(path: Path, size: int, exact: bool = False) -> tuple[np.ndarray, tuple[int, int]]:
    """Centre square of a file as uint8 (size, size, 3), and the original's (width, height).

    Unless `exact`, JPEGs are decoded at a reduced scale that keeps twice the pixels needed.
    """
    image, original_size = read_image(path, None if exact else 2 * size)
    return resize_box(image, centre_square(*image.size), size), original_size


def read_crops(path: Path, boxes: list, sizes: list[int], original_size: tuple[int, int]) -> list:
    """Square boxes (localize.Box) of a file, each resized: uint8 (size, size, 3) per box.

    The file is decoded once, a JPEG at a scale that keeps twice the pixels needed. Raises
    InputError where it is not of the (width, height) for which the boxes were found.
    """
    needed = max(size / box.side for box, size in zip(boxes, sizes, strict=True))
    image, found_size = read_image(path, int(2 * needed * min(original_size)))
    if found_size != tuple(original_size):
        raise InputError(
            f"{path} is {found_size[0]} x {found_size[1]} px but was {original_size[0]} x "
            f"{original_size[1]} when its box was found; preprocess and crop again"
        )
    crops = []
    for box, size in zip(boxes, sizes, strict=True):
        edges = np.array(box.scaled(image.width / found_size[0]))
        inside = np.clip(edges, 0, [image.width, image.height] * 2)  # a reduced scale rounds
        crops.append(resize_box(image, tuple(inside), size))
    return crops


# ---------------------------------------------------------------- metrics
def weighted_auc(target: np.ndarray, prob: np.ndarray, weight: np.ndarray | float = 1.0) -> float:
    """Area under the ROC curve of weighted rows, ties counted half; NaN with one class only."""
    level = np.unique(prob, return_inverse=True)[1]
    positive = np.bincount(level, weight * target)
    negative = np.bincount(level, weight * (1 - target))
    pairs = positive.sum() * negative.sum()
    won = positive @ (np.cumsum(negative) - negative / 2)
    return float(won / pairs) if pairs > 0 else float("nan")


def bootstrap_weights(group: np.ndarray) -> Iterator[np.ndarray]:
    """Row weights (N,) of bootstrap samples that draw whole groups: their rows are alike."""
    rng = np.random.default_rng(0)
    code = np.unique(group, return_inverse=True)[1]
    n_groups = code.max() + 1
    for _ in range(BOOTSTRAP_SAMPLES):
        yield rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups))[code]


def auc_interval(target: np.ndarray, prob: np.ndarray, group: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the AUC over groups."""
    scores = [weighted_auc(target, prob, weight) for weight in bootstrap_weights(group)]
    return [float(bound) for bound in np.nanquantile(scores, [0.025, 0.975])]


def partial_auc(target: np.ndarray, prob: np.ndarray, min_tpr: float = MIN_TPR) -> float:
    """Area under the ROC curve above `min_tpr` sensitivity, 0 to 1 - min_tpr.

    The score of ISIC 2024: with classes and scores flipped, sensitivity becomes specificity.
    """
    from sklearn.metrics import roc_auc_score

    f = 1 - min_tpr
    standardised = roc_auc_score(1 - target, -prob, max_fpr=f)
    return float(f**2 / 2 + (f - f**2 / 2) / 0.5 * (standardised - 0.5))


def score(target: np.ndarray, prob: np.ndarray, group: np.ndarray) -> dict:
    """AUC with its 95 % interval, average precision and partial AUC; None where undefined."""
    from sklearn.metrics import average_precision_score

    result = {"rows": len(target), "positives": int(target.sum())}
    if 0 < target.sum() < len(target):
        return result | {
            "auc": weighted_auc(target, prob),
            "auc_interval": auc_interval(target, prob, group),
            "average_precision": float(average_precision_score(target, prob)),
            "partial_auc": partial_auc(target, prob),
        }
    keys = ("auc", "auc_interval", "average_precision", "partial_auc")
    return result | dict.fromkeys(keys)


def rank_in_fold(prob: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Rank of every row inside its fold, in (0, 1]: fold models are calibrated differently."""
    return pd.Series(prob).groupby(fold).rank(pct=True).to_numpy()


def combine(mode: str, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Blend values (N, K) of K runs with weights (K,) or (N, K) summing to 1: (N,).

    Values are probabilities, or in the RANK_MODES ranks in (0, 1].
    """
    if mode != "logit":
        return (values * weights).sum(axis=1)
    safe = np.clip(values, 1e-7, 1 - 1e-7)
    return 1 / (1 + np.exp(-(np.log(safe / (1 - safe)) * weights).sum(axis=1)))


def zoom_weights(side: np.ndarray, cropped: np.ndarray, base: float, slope: float) -> np.ndarray:
    """Weights (N, K) of runs that depend on how far a crop zooms: each row sums to 1.

    side: of the box over the image's short side (N,); cropped: which runs see the crop (K,). They
    share base + slope * (1 - side), held within 0 and 1; the runs on whole images share the rest.
    """
    share = np.clip(base + slope * (1 - side), 0, 1)[:, None]
    return share * cropped / cropped.sum() + (1 - share) * ~cropped / (~cropped).sum()


# ---------------------------------------------------------------- run directories
NUMBER, MAYBE = (int, float), type(None)
CONFIG = {"args": dict, "args.data_dir": str, "data": dict, "data.folds_sha256": str}
RUN_CONFIG = {"args.model": str, "args.tta": int, "spec": dict, "crop": (dict, MAYBE),
              "args.crop_dir": (str, MAYBE)}  # fmt: skip
BLEND_CONFIG = {
    "args.mode": str, "zoom": (list, MAYBE), "members": list, "members.*.run": str,
    "members.*.weight": NUMBER,
}  # fmt: skip
METRICS = {
    "folds": list, "folds.*.fold": int, "folds.*.auc": NUMBER, "pooled": dict, "ranked": dict,
    "ranked.auc": NUMBER, "ranked.auc_interval": list,
}  # fmt: skip


def check_pair(path: Path, name: str, value: list) -> None:
    """Raise InputError unless a list is of two numbers."""
    if len(value) != 2 or not all(isinstance(number, NUMBER) for number in value):
        raise InputError(f"{path}: {name} should be two numbers; make it again")


def read_config(run_dir: Path) -> dict:
    """config.json of a run or blend."""
    path = run_dir / "config.json"
    config = read_json(path, CONFIG)
    check_keys(path, config, BLEND_CONFIG if "members" in config else RUN_CONFIG)
    if "members" in config and config["zoom"] is not None:
        check_pair(path, "zoom", config["zoom"])
    return config


def read_metrics(run_dir: Path) -> dict:
    """metrics.json of a finished run or blend."""
    path = run_dir / "metrics.json"
    metrics = read_json(path, METRICS)
    check_pair(path, "auc_interval", metrics["ranked"]["auc_interval"])
    if not metrics["folds"]:
        raise InputError(f"{path} has no folds; train the run again")
    return metrics


def read_predictions(run_dir: Path, name: str, columns: Iterable[str]) -> pd.DataFrame:
    """A prediction table of a run: ids, which may repeat over folds, whole fold numbers,
    probabilities; targets are 0 or 1. Raises InputError otherwise."""
    path = run_dir / name
    table = read_csv(path, columns)
    spans = {FOLD: (0, 1000), TARGET: (0, 1), PROB: (0, 1)}
    for column in spans.keys() & set(columns):
        values = numbers(table, column, path, *spans[column])
        if column != PROB:
            odd = values != np.floor(values)
            if odd.any():
                row = table[odd].iloc[0]
                raise InputError(
                    f"{path}: {column} of {row[ID]} is {row[column]}; it must be a whole number"
                )
            values = values.astype(int)
        table[column] = values
    return table


def score_folds(oof: pd.DataFrame, data: Data, folds: Iterable[int]) -> dict:
    """Scores of held-out predictions in every fold, over all rows, and over ranks inside folds."""
    group, fold = data.group[oof[ID]].to_numpy(), oof[FOLD].to_numpy()
    target, prob = oof[TARGET].to_numpy(), oof[PROB].to_numpy()
    return {
        "folds": [
            {"fold": k, **score(target[fold == k], prob[fold == k], group[fold == k])}
            for k in folds
        ],
        "pooled": score(target, prob, group),
        "ranked": score(target, rank_in_fold(prob, fold), group),
    }


def write_run(
    run_dir: Path,
    oof: pd.DataFrame,
    test: pd.DataFrame | None,
    data: Data,
    folds: list[dict],
    **extra,
) -> dict:
    """Write what every run, blends included, leaves behind; returns the metrics.

    oof: image_name, fold, target, prob. test: image_name, fold, prob, or None. folds: one dict
    of facts per fold (at least its number), to which the scores are added. extra: further metrics.
    """
    metrics = score_folds(oof, data, [fold["fold"] for fold in folds]) | extra
    scores = metrics["folds"]
    metrics["folds"] = [facts | new for facts, new in zip(folds, scores, strict=True)]
    tables = {"oof.csv": oof}
    if test is not None:
        tables |= {"test_predictions.csv": test, "submission.csv": mean_over_folds(test, data)}
    for name, table in tables.items():
        write_table(run_dir / name, table)
    metrics["sha256"] = {name: sha256(run_dir / name) for name in tables}
    plot_roc(run_dir / "roc.png", oof)
    write_json(run_dir / "metrics.json", metrics)
    return metrics


def mean_over_folds(test: pd.DataFrame, data: Data) -> pd.DataFrame:
    """The submission: mean probability of the test images predicted, in the sample's order."""
    mean = test.groupby(ID)[PROB].mean()
    ids = pd.Index(data.submission_ids or data.test[ID])
    ids = ids[ids.isin(mean.index)]  # a dry run with --limit predicts some
    return pd.DataFrame({ID: ids, TARGET: mean[ids].to_numpy()})


def metrics_line(name: str, metrics: dict) -> str:
    """One line of a result table: fold AUCs, out-of-fold AUC (ranked inside folds), interval."""
    folds = " ".join(f"{fold['auc']:.3f}" for fold in metrics["folds"])
    low, high = metrics["ranked"]["auc_interval"]
    return f"{name:<12} folds {folds}   oof {metrics['ranked']['auc']:.3f} [{low:.3f}, {high:.3f}]"


# ---------------------------------------------------------------- pictures
def new_figure(**options):
    """A matplotlib figure that needs no screen."""
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def save_figure(path: Path, figure) -> None:
    """Save a figure as PNG."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def plot_roc(path: Path, oof: pd.DataFrame) -> None:
    """ROC curve of every fold."""
    from sklearn.metrics import roc_curve

    figure = new_figure(figsize=(5, 5))
    axes = figure.subplots()
    for fold, rows in oof.groupby(FOLD):
        fpr, tpr, _ = roc_curve(rows[TARGET], rows[PROB])
        auc = weighted_auc(rows[TARGET].to_numpy(), rows[PROB].to_numpy())
        axes.plot(fpr, tpr, label=f"fold {fold}: AUC {auc:.3f}")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", title="Held-out folds")
    axes.legend(loc="lower right")
    save_figure(path, figure)
