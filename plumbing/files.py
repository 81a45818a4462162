"""Files that are whole or absent: atomic writes, JSON with a format number, csv, hashes, provenance."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd

from util import InputError

FORMAT = 3  # of all JSON files and checkpoints; raised by a change that older files do not fit


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes the place of `path` if the block succeeds."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """Copy a file; the copy is whole or absent."""
    with atomic(target) as temporary:
        shutil.copyfile(source, temporary)


def remove(folder: Path, pattern: str) -> None:
    """Remove the files of a folder that fit a pattern."""
    for path in folder.glob(pattern):
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hashes(folder: Path, hashes: dict[str, str], advice: str) -> None:
    """Raise InputError unless every file of a folder {name: sha256} is as it was when it was hashed."""
    for name, expected in hashes.items():
        if sha256(folder / name) != expected:
            raise InputError(f"{folder / name} was changed since it was hashed; {advice}")


# ---------------------------------------------------------------- json
class Facts(dict):
    """A JSON object; a key that is missing is an InputError that names the file."""

    path: Path | None = None

    def __missing__(self, key: str):
        raise InputError(f"{self.path} has no {key!r}: it was edited, or another version wrote it; make it again")


def write_json(path: Path, content: dict) -> None:
    """Write strict, sorted JSON: paths become text, numpy numbers plain ones, NaN is refused."""

    def plain(value):
        return value.item() if isinstance(value, np.generic) else str(value)

    text = json.dumps({**content, "format": FORMAT}, indent=2, sort_keys=True, allow_nan=False, default=plain)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Facts:
    """Read a JSON object of this project; raises InputError if it is broken or of another format."""

    def named(content: dict) -> Facts:
        facts = Facts(content)
        facts.path = path
        return facts

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=named)
    except (ValueError, RecursionError) as error:
        content = error
    if not isinstance(content, Facts) or content.get("format") != FORMAT:
        raise InputError(f"{path} is no JSON object of format {FORMAT} ({str(content)[:99]}); make it again")
    return content


def provenance() -> dict:
    """Command line, package versions and commit of this process, for the JSON beside its results."""
    packages = ("torch", "torchvision", "numpy", "pandas", "scikit-learn", "albumentations")
    versions = {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # a copy without its git history
    return {"argv": sys.argv, "versions": versions, "commit": commit}


# ---------------------------------------------------------------- csv
def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a csv without an index; floats keep every digit."""
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)


def read_csv(path: Path, columns=(), text=(), words=()) -> pd.DataFrame:
    """Read a csv that has all `columns`; those in `text` are read as text, and in those in `words` None and NA are
    words too, unless all others are numbers. Raises InputError otherwise."""
    try:
        how = {"dtype": dict.fromkeys(text, str), "low_memory": False, "compression": None}
        table = pd.read_csv(path, encoding="utf-8-sig", **how)
        if not isinstance(table.index, pd.RangeIndex):  # pandas would take the first column for an index
            raise ValueError("rows are longer than the header")
        for column in (column for column in words if column in table and table[column].dtype not in (float, int, bool)):
            raw = pd.read_csv(path, encoding="utf-8-sig", usecols=[column], dtype=str, keep_default_na=False)[column]
            table[column] = raw.where(raw != "")
    except ValueError as error:  # not UTF-8, not a table, or empty: pandas says which
        raise InputError(f"{path} is not a readable csv ({error}); save it as CSV UTF-8") from None
    missing = [column for column in columns if column not in table]
    if missing or table.empty:
        what = f"column {missing[0]!r}; it has {', '.join(map(str, table))[:300]}" if missing else "rows"
        raise InputError(f"{path} has no {what}; add them, or name another")
    return table


# ---------------------------------------------------------------- directories of results
def open_output(path: Path, marker: str, overwrite: bool, settings: dict) -> Path:
    """Create a directory to write to, or go on with an unfinished one. A directory is finished once it holds its
    `marker` file; it is then refused, or with `overwrite` the files that the marker lists are removed. settings: all
    that the content depends on; an unfinished directory that was begun with others is refused too. Raises
    InputError."""
    begun, finished = path / f"{marker}.part", path / marker
    if overwrite or finished.exists():  # a killed call may have left some beside its marker
        remove(path, "*.part")
    if finished.exists() and not overwrite:
        raise InputError(f"{path} is already finished; pass --overwrite to replace it")
    path.mkdir(parents=True, exist_ok=True)
    remove(path, "*.tmp")
    if finished.exists():
        with suppress(ValueError, LookupError, TypeError, AttributeError):  # of any format, or broken
            for name in json.loads(finished.read_text(encoding="utf-8"))["sha256"].keys():
                if (path / name).resolve().is_relative_to(path.resolve()):
                    (path / name).unlink(missing_ok=True)
        finished.unlink()
    if begun.exists():
        old = read_json(begun)
        for key in (key for key, value in settings.items() if old[key] != value):
            raise InputError(f"{path} is unfinished and was begun with {key} = {old[key]}, not {settings[key]}; pass "
                             "--overwrite to start anew")  # fmt: skip
    else:
        write_json(begun, settings)
    return path


def finish_output(path: Path, marker: str, facts: dict) -> None:
    """Write the marker of a finished directory and drop what only unfinished work needs."""
    write_json(path / marker, facts)
    remove(path, "*.part")
