"""Tables: what preprocess.py wrote, groups that folds keep whole, boxes beside a table, metadata as numbers."""

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from plumbing.arrays import array_path
from plumbing.files import check_hashes, read_csv, read_json
from plumbing.images import ImageIndex, name_key
from tasks import Task, as_words, task_of
from util import BOX_SIDE, EXTERNAL, FOLD, ID, INNER, PLACE, InputError

META_COLUMNS = ("sex", "age_approx", "anatom_site_general_challenge")  # of ISIC 2020
STATISTICS = "statistics.csv"  # for people; nothing reads it
CORNERS = ["x0", "y0", "x1", "y1"]  # of a box, in pixels of the original


# ---------------------------------------------------------------- tables of images
def read_table(path: Path, columns=(), id_col=ID, text: tuple[str, ...] = (), words=(), unique=True) -> pd.DataFrame:
    """Read a csv with one image per row, or if not `unique` with several; `id_col` is called image_name from here on.
    Image names and the columns in `text` stay text; in those in `words` None and NA are words too, unless all
    others are numbers. Raises InputError naming the file and the column or row at fault."""
    table = read_csv(path, [id_col, *columns], text=(id_col, *text), words=words)
    if id_col != ID:
        table = table.drop(columns=ID, errors="ignore")
    bad = table[id_col].isna()
    if unique:
        bad |= table[id_col].map(name_key).duplicated()
    if bad.any():
        line = int(np.flatnonzero(bad)[0])
        raise InputError(f"{path} line {line + 2}: {id_col} {table[id_col][line]!r} is empty or there twice; remove it")
    return table.rename(columns={id_col: ID})


def numbers(table: pd.DataFrame, column: str, path: Path, low: float = -math.inf, high: float = math.inf) -> np.ndarray:
    """A column of a table as float (N,); raises InputError unless all are finite numbers from low to high."""
    values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float)
    bad = ~(np.isfinite(values) & (values >= low) & (values <= high))
    if bad.any():
        row = table[bad].iloc[0]
        span = "" if low == -math.inf else f" from {low:g} to {high:g}"
        raise InputError(f"{path}: {column} of {row[ID]} is {str(row[column])!r}; it must be a number{span}")
    return values


# ---------------------------------------------------------------- groups and folds
def groups_of(table: pd.DataFrame, group_col: str | None) -> np.ndarray:
    """Group of every row (N,) as text; a row without one is a group of its own."""
    own = "row:" + table[ID].astype(str)
    if group_col is None:
        return own.to_numpy()
    return ("group:" + as_words(table[group_col]).astype(str)).where(table[group_col].notna(), own).to_numpy()


def check_groups(group: np.ndarray, fold: np.ndarray, what: str) -> None:
    """Raise InputError if a group lies in two folds."""
    order = np.lexsort((fold, group))
    group, fold = group[order], fold[order]
    straddles = (group[1:] == group[:-1]) & (fold[1:] != fold[:-1])
    if straddles.any():
        place = int(np.flatnonzero(straddles)[0])
        name = group[place].partition(":")[2]
        folds = f"{fold[place]} and {fold[place + 1]} ({EXTERNAL} is external)"
        raise InputError(f"{what}: {name} is in folds {folds}, trained on and scored; remove rows or preprocess again")


def folds_sha256(table: pd.DataFrame, task: Task) -> str:
    """Hash of which image is in which fold with which target: what all stages must share."""
    return hashlib.sha256(table[[ID, *task.targets, FOLD]].to_csv(index=False).encode()).hexdigest()


@dataclass
class Data:
    """What preprocess.py wrote: tables (row i is row i of the arrays) and facts about them."""

    directory: Path
    train: pd.DataFrame
    test: pd.DataFrame | None
    submission: pd.DataFrame | None  # sample_submission.csv, of which the first column names the images
    facts: dict  # preprocess.json
    cells: dict = field(default_factory=dict)  # of the originals, by split, for a scout (plumbing/cells.py)

    @property
    def size(self) -> int:
        """Side of the stored images, in pixels."""
        return self.facts["size"]

    @property
    def folds_sha256(self) -> str:
        """Hash of the folds."""
        return self.facts["folds_sha256"]

    @cached_property
    def task(self) -> Task:
        """What the target is."""
        return task_of(self.facts["task"])

    @cached_property
    def target(self) -> np.ndarray:
        """Target of every train image (N, T)."""
        return self.train[self.task.targets].to_numpy(float)

    @cached_property
    def group(self) -> pd.Series:
        """Group of every train image, by image_name."""
        return pd.Series(groups_of(self.train, self.facts["group_col"]), index=self.train[ID])

    @cached_property
    def case(self) -> pd.Series | None:
        """What every train image shows, by image_name, if several images may show the same, such as a lesion."""
        column = self.facts.get("case_col")
        return None if column is None else pd.Series(groups_of(self.train, column), index=self.train[ID])

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables that exist, by split."""
        both = {"train": self.train, "test": self.test}
        return {split: table for split, table in both.items() if table is not None}

    def find_originals(self, split: str, image_dirs: list[Path] | None = None, limit: int | None = None) -> list[Path]:
        """Image files of the first rows of a split, from where they were preprocessed or from other folders."""
        folders = image_dirs or [Path(folder) for folder in self.facts["image_dirs"][split]]
        return ImageIndex(*folders).find_all(self.tables()[split][ID][:limit].tolist())

    def array_path(self, split: str) -> Path:
        """Where the centre squares of a split lie."""
        return array_path(self.directory, split, self.size)


def read_data(data_dir: Path) -> Data:
    """Read a directory that preprocess.py finished. Raises InputError if a table was changed since, or if a group lies
    in two folds."""
    facts = read_json(data_dir / "preprocess.json")
    given = {name: facts["sha256"][name] for name in facts["sha256"] if name.endswith(".csv") and name != STATISTICS}
    check_hashes(data_dir, given, "run preprocess.py again")
    text = [column for column in (facts["group_col"], facts.get("case_col")) if column]
    targets = task_of(facts["task"]).targets
    train = read_table(data_dir / "train.csv", (*targets, FOLD, "width", "height", *text), text=text)
    test = read_table(data_dir / "test.csv", ("width", "height"), text=text) if "test.csv" in given else None
    sample = None
    if "sample_submission.csv" in given:
        sample = read_csv(data_dir / "sample_submission.csv", text=facts["submission_columns"][:1])
    check_groups(groups_of(train, facts["group_col"]), train[FOLD].to_numpy(), f"{data_dir / 'train.csv'}")
    return Data(data_dir, train, test, sample, facts)


# ---------------------------------------------------------------- boxes
def with_boxes(table: pd.DataFrame, crop_dir: Path, split: str) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """A table with the side of every image's best box, the place of its boxes in their wide crops (N, K, 3), NaN where
    there is none, and what its best box is around, in pixels of the original (N, 4). Raises InputError if the boxes are
    of other images or not inside them."""
    path = crop_dir / f"{split}_boxes.csv"
    boxes = read_table(path, (*CORNERS, *PLACE, *INNER), unique=False)
    number = numbers(boxes, "box", path, 0, 999).astype(int) if "box" in boxes else np.zeros(len(boxes), int)
    best = boxes[number == 0].reset_index(drop=True)
    short, long = (table[["width", "height"]].agg(end, axis=1) for end in ("min", "max"))
    side = numbers(best, "x1", path) - numbers(best, "x0", path)
    values = np.stack([numbers(boxes, column, path, 0, 1) for column in PLACE], axis=1)
    inner = np.stack([numbers(best, column, path) for column in INNER], axis=1)
    row = pd.Series(np.arange(len(table)), index=table[ID]).reindex(boxes[ID]).to_numpy()
    if best[ID].tolist() != table[ID].tolist() or np.isnan(row).any() or not (
        (side / short).between(0, long / short + 1e-6, inclusive="right").all()
    ):
        raise InputError(f"{path} has boxes of other images than the table, or outside of them; run crop.py again")
    place = np.full((len(table), number.max() + 1, len(PLACE)), np.nan)
    place[row.astype(int), number] = values
    return table.assign(**{BOX_SIDE: side / short}), place, inner


def best_boxes(crop_dir: Path, split: str) -> pd.DataFrame:
    """The best box of every image of a split."""
    boxes = read_table(crop_dir / f"{split}_boxes.csv", unique=False)
    return boxes[boxes["box"] == 0] if "box" in boxes else boxes


# ---------------------------------------------------------------- metadata
class MetaEncoder:
    """Metadata as numbers, fitted on training rows alone. A text column becomes one column per value seen, one for
    unknown values and one for missing ones; a numeric column becomes its standard score and a missing flag. A column
    that a later table lacks counts as missing everywhere, so the width never changes."""

    def __init__(self, columns: dict[str, dict]):
        self.columns = columns  # plain types: it is saved inside checkpoints

    @classmethod
    def fit(cls, table: pd.DataFrame, names: tuple[str, ...] = META_COLUMNS) -> "MetaEncoder":
        """Learn the vocabularies of those of the named columns that the table has."""
        columns = {}
        for name in names:
            if name not in table or table[name].isna().all():
                continue
            words = as_words(table[name]).dropna()
            values = pd.to_numeric(words, errors="coerce").astype(float)
            if np.isfinite(values).all():
                spread = float(values.std(ddof=0))
                columns[name] = {"mean": float(values.mean()), "std": spread if spread > 0 else 1.0}
            else:
                columns[name] = {"values": sorted(words.unique().tolist())}
        return cls(columns)

    @property
    def dim(self) -> int:
        """Number of encoded columns M."""
        return sum(len(c["values"]) + 2 if "values" in c else 2 for c in self.columns.values())

    def encode(self, table: pd.DataFrame) -> np.ndarray:
        """Encode a table: float32 (N, M)."""
        parts = [np.empty((len(table), 0))]
        for name, column in self.columns.items():
            words = as_words(table[name]) if name in table else pd.Series(np.nan, index=table.index)
            missing = words.isna().to_numpy()
            if "values" in column:
                known = np.stack([(words == word).to_numpy() for word in column["values"]], axis=1)
                parts += [known, (~missing & ~known.any(axis=1))[:, None], missing[:, None]]
            else:
                number = pd.to_numeric(words, errors="coerce").to_numpy(dtype=float)
                missing = ~np.isfinite(number)
                standard = (np.where(missing, column["mean"], number) - column["mean"]) / column["std"]
                parts += [standard[:, None], missing[:, None]]
        return np.concatenate(parts, axis=1).astype(np.float32)


def meta_columns(table: pd.DataFrame, names: list[str] | None) -> list[str]:
    """Metadata columns to use: those named, which must exist, or ISIC 2020's and the side of the box."""
    for name in names or ():
        if name not in table:
            raise InputError(f"--meta_cols {name}: the train table has {', '.join(table)}; name some of these")
    return [*META_COLUMNS, BOX_SIDE] if names is None else names  # a crop does not show its own size
