"""Turn images and a csv into arrays, tables and folds that all later stages share.

Reads   --train_csv, --test_csv, --extra_csv, sample_submission.csv beside them, and the images (never written)
Writes  --output_dir/: {train,test}_224.npy, train.csv (with fold), test.csv, preprocess.json,
        statistics.csv (what lies in each fold)

    python preprocess.py
    python preprocess.py --train_csv my/labels.csv --image_col file --group_col patient
    python preprocess.py --image_dir photos

The array holds the centre square of every image, resized; the original's width and height go into the table, so that
boxes found later can be cut from the original file. A stopped run goes on where it was when called again.

References:
    StratifiedGroupKFold of scikit-learn, unshuffled: below version 1.8 its shuffle does not stratify.
"""

import argparse
import hashlib
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import util
from plumbing.arrays import Filling, PartialArray, array_path
from plumbing.data import check_groups, folds_sha256, groups_of, read_table
from plumbing.files import finish_output, open_output, provenance, read_csv, sha256, write_table
from plumbing.images import ImageIndex, configure_pillow, name_key, read_square_or_skip
from tasks import KINDS, Task, find_task, read_target, some_of
from util import EXTERNAL, FOLD, ID, OWN_COLUMNS, TARGET, InputError

EXAMPLE_CSV = Path("example_data/train.csv")
CASE, PATIENT = "lesion_id", "patient_id"
QUARTILES = {"least": 0, "lower quartile": 0.25, "median": 0.5, "upper quartile": 0.75, "greatest": 1}


# ---------------------------------------------------------------- tables
def read_folders(args: argparse.Namespace) -> dict[str, pd.DataFrame]:
    """Tables by split of images in folders without a csv: those of --image_dir lie in a folder for each class, those of
    --test_image_dir anywhere below it. Raises InputError if there are none, or one lies in no class folder."""
    tables = {}
    test_dir = None if args.test_csv else args.test_image_dir
    for split, folders in (("train", args.image_dir), ("test", test_dir)):
        found = [path.relative_to(folder) for folder in folders or () for path in ImageIndex(folder).paths()]
        if folders and not found:
            raise InputError(f"{', '.join(map(str, folders))} has no images; pass another folder")
        if found:
            table = pd.DataFrame({ID: [name_key(path.as_posix()) for path in found]})
            if split == "train":
                table[args.target_col[0]] = [path.parts[0] for path in found]
                for path in (path for path in found if len(path.parts) == 1):
                    raise InputError(f"{path} lies in no class folder of {folders[0]}; move it, or pass --train_csv")
            some = np.linspace(0, len(table) - 1, min(args.limit or len(table), len(table)))
            tables[split] = table.iloc[some.astype(int)].reset_index(drop=True)  # --limit: of all classes
    return tables


def find_inputs(args: argparse.Namespace) -> dict[str, Path]:
    """Input tables by split, or folders if there is no table; test.csv and sample_submission.csv are looked for beside
    the table they belong to."""
    if args.train_csv is None:
        test = args.test_csv or (args.test_image_dir or [None])[0]
        found = {"train": args.image_dir[0], "test": test, "extra": args.extra_csv}
        return {split: path for split, path in found.items() if path is not None}
    beside = (args.test_csv or args.train_csv).parent
    inputs = {"train": args.train_csv, "test": args.test_csv or beside / "test.csv", "extra": args.extra_csv}
    if args.test_csv is None and not inputs["test"].exists():
        inputs["test"] = None
    elif (beside / "sample_submission.csv").exists():
        inputs["sample_submission"] = beside / "sample_submission.csv"
    return {split: path for split, path in inputs.items() if path is not None}


def read_labels(path: Path, args: argparse.Namespace, labelled: bool) -> pd.DataFrame:
    """Read an input table; groups stay text."""
    text = (args.case_col or CASE, *(() if args.group_col == "none" else (args.group_col,)))
    labels = args.target_col if labelled else []
    table = read_table(path, labels, args.image_col, text=text, words=labels)
    table = drop(table, path, ["width", "height"])  # those of the upright image take their place
    for column in (column for column in OWN_COLUMNS if column in table):
        raise InputError(f"{path} has a column {column!r}, which this project writes; rename or remove it")
    return table[: args.limit]


def drop(table: pd.DataFrame, path: Path, columns) -> pd.DataFrame:
    """A table without those of the columns that it has, which are said: what we know replaces them."""
    for column in (column for column in columns if column in table):
        print(f"{path}: column {column} is replaced")
    return table.drop(columns=columns, errors="ignore")


def with_target(table: pd.DataFrame, task: Task, path: Path, columns: list[str]) -> pd.DataFrame:
    """A table with the target as numbers, in the task's columns in place of the given ones."""
    target = read_target(task, table, path, columns)
    table = drop(table, path, [column for column in task.targets if column not in columns])
    place, rest = table.columns.get_loc(columns[0]), table.drop(columns=columns)
    whole = [values.astype(int) if np.isfinite(values).all() and task.classes else values for values in target.T]
    for i, (column, values) in enumerate(zip(task.targets, whole, strict=True)):
        rest.insert(min(place + i, rest.shape[1]), column, values)
    return rest


def read_inputs(args: argparse.Namespace, inputs: dict[str, Path]) -> tuple[dict[str, pd.DataFrame], Task]:
    """(input tables by split, what the target is). Raises InputError for whatever can be known to be wrong before an
    image is read."""
    if len({args.image_col, *args.target_col, args.group_col}) < 2 + len(args.target_col):
        raise InputError("--image_col, --target_col and --group_col name one column; pass different ones")
    folders = read_folders(args) if args.train_csv is None else {}
    tables = {split: folders[split] if split in folders else read_labels(inputs[split], args, split != "test")
              for split in ("train", "extra", "test") if split in inputs}  # fmt: skip
    train_path = inputs["train"]
    how = args.task, args.positive, args.metric, args.ordinal, tuple(args.cut)
    task = find_task(tables["train"], train_path, args.target_col, *how)
    for split in ("train", "extra"):
        if split in tables:
            tables[split] = with_target(tables[split], task, inputs[split], args.target_col)
    names = {split: set(table[ID].map(name_key)) for split, table in tables.items()}
    if twice := names["train"] & names.get("extra", set()):
        raise InputError(f"{train_path} and {args.extra_csv} both have an image {min(twice)!r}; rename one")
    col = group_column(tables["train"], args)
    groups = {split: groups_of(table, col if col in table else None) for split, table in tables.items()}
    case_column(tables["train"], args)  # raises InputError
    target = tables["train"][task.targets].to_numpy(float)
    fold = {"train": assign_folds(task, target, groups["train"], args.n_folds, args.seed)}
    for split, others in (("train", fold["train"]), ("test", np.full(len(groups.get("test", ())), EXTERNAL - 1))):
        if "extra" in groups and split in groups:
            both = np.concatenate([groups["extra"], groups[split]])
            external = np.full(len(groups["extra"]), EXTERNAL)
            check_groups(both, np.concatenate([external, others]), f"{args.extra_csv} and the {split} table")
    if "sample_submission" in inputs:
        path = inputs["sample_submission"]
        columns = [str(column) for column in read_csv(path)]
        id_col = args.image_col if args.image_col in columns else columns[0]
        sample = read_csv(path, text=(id_col,))[[id_col, *(column for column in columns if column != id_col)]]
        odd = sorted(set(sample[id_col].map(name_key)) ^ names["test"])
        if odd and args.limit is None:
            raise InputError(f"{path} and {inputs['test']} name other images: only one has {odd[0]!r}; repair it")
        if len(task.names) > 1:
            task.submit(np.zeros((1, len(task.names))), list(sample)[1:])  # raises InputError if it lacks a label
        tables["sample_submission"] = sample
    return tables, task


# ---------------------------------------------------------------- folds
def case_column(table: pd.DataFrame, args: argparse.Namespace) -> str | None:
    """Column of what several images may show, None if no two show the same; raises InputError if the one named is
    missing."""
    if args.case_col is not None and args.case_col not in table:
        raise InputError(f"{args.train_csv} has no column {args.case_col!r} (--case_col); name one of {some_of(table)}")
    column = args.case_col or CASE
    return column if column in table and table[column].dropna().duplicated().any() else None


def group_column(table: pd.DataFrame, args: argparse.Namespace) -> str | None:
    """Column whose rows stay together in one fold, or None; raises InputError if it is missing or empty."""
    if args.group_col == "none":
        return None
    if args.group_col in table and not table[args.group_col].isna().all():
        return args.group_col
    problem = "is empty" if args.group_col in table else "is missing"
    raise InputError(
        f"column {args.group_col!r} of {args.train_csv} {problem}; name the column of patients or lesions with "
        "--group_col, or pass --group_col none to split image by image"
    )


def assign_folds(task: Task, target: np.ndarray, group: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """Held-out fold of every row (N,), stratified by target (N, T), groups kept whole. The seed permutes the groups
    before an unshuffled split. Raises InputError if a fold lacks a class, or a label is in one fold only."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    code, names = pd.factorize(group)
    advice, needed = "pass a smaller --n_folds, another --seed or more data", n_folds if task.in_every_fold else 2
    for name, member in zip(task.classes, task.members(target).T, strict=True):
        if (found := len(np.unique(code[member]))) < needed:
            raise InputError(f"{name!r} has only {found} groups, too few for {n_folds} folds; {advice}")
    if len(names) < n_folds:
        raise InputError(f"{len(names)} groups are too few for {n_folds} folds; {advice}")
    if len(names) == len(group):  # every row is a group of its own
        splitter, code = StratifiedKFold(n_folds, shuffle=True, random_state=seed), None
    else:
        splitter, code = StratifiedGroupKFold(n_folds), np.random.default_rng(seed).permutation(len(names))[code]
    fold, strata = np.full(len(target), -1), task.strata(target)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of strata rarer than there are folds
        try:
            for k, (_, held_out) in enumerate(splitter.split(strata, strata, code)):
                fold[held_out] = k
        except ValueError as error:  # every stratum has fewer rows than there are folds
            raise InputError(f"--n_folds {n_folds}: {error}; {advice}") from None
    for name, member in zip(task.classes, task.members(target).T, strict=True):
        if (found := len(np.unique(fold[member]))) < needed:
            raise InputError(f"{name!r} would be in {found} of {n_folds} folds; {advice}")
    return fold


def fold_statistics(table: pd.DataFrame, task: Task, col: str | None, case_col: str | None) -> pd.DataFrame:
    """A row per fold: its images, groups and cases, images and cases of every class, and quartiles of a quantity."""
    case = groups_of(table, case_col)
    target = table[task.targets].to_numpy(float)
    members = {name: task.bands(target) == i for i, name in enumerate(task.band_names)}
    if task.classes:
        members = dict(zip(task.classes, task.members(target).T, strict=True))
    group, rows = groups_of(table, col), []
    for fold, part in table.groupby(FOLD):
        here = (table[FOLD] == fold).to_numpy()
        row = {FOLD: fold, "images": here.sum()}
        row |= {"groups": len(np.unique(group[here])), "cases": len(np.unique(case[here]))}
        row |= {f"images {name}": (here & member).sum() for name, member in members.items()}
        row |= {f"cases {name}": len(np.unique(case[here & member])) for name, member in members.items()}
        if not task.classes:
            values = part[task.targets[0]]
            row |= {f"{name} {task.names[0]}": values.quantile(q) for name, q in QUARTILES.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def warn_of_straddling(table: pd.DataFrame, col: str | None, case_col: str | None) -> None:
    """Say how many patients or cases lie in several folds, if folds keep something else whole."""
    for column in dict.fromkeys((PATIENT, case_col)):
        known = table.dropna(subset=column) if column in table and column != col else table[:0]
        if straddling := int((known.groupby(column)[FOLD].nunique() > 1).sum()) if len(known) else 0:
            print(f"warning: {straddling} values of {column} lie in several folds, so networks are scored on what they "
                  f"have seen; --group_col {column} keeps them whole")  # fmt: skip


# ---------------------------------------------------------------- images
def locate(tables: dict, image_dirs: dict[str, list], skip: bool) -> dict[str, list[Path | None]]:
    """Image of every row by split; None for a missing one if bad rows are skipped. Raises InputError if an image is
    missing, or if two rows, of whatever tables, mean one file."""
    indexes = {dirs: ImageIndex(*dirs) for dirs in {tuple(dirs) for dirs in image_dirs.values()}}
    paths, seen = {}, {}
    for split, dirs in image_dirs.items():
        names = tables[split][ID].tolist()
        paths[split] = indexes[tuple(dirs)].find_all(names, skip)
        for name, path in zip(names, paths[split], strict=True):
            if path is not None and seen.setdefault(path.resolve(), (split, name)) != (split, name):
                raise InputError(f"{seen[path.resolve()]} and {(split, name)} are one image, {path}; remove a row")
    return paths


def fill_array(table: pd.DataFrame, paths: list, path: Path, args) -> tuple[PartialArray, np.ndarray]:
    """Write the images of a table that are not there yet. Returns the array and the originals' width and height (N, 2),
    0 for those that are missing or, with --on_error skip, broken."""
    array = PartialArray(path, (len(table), args.size, args.size, 3))
    filling = Filling(path.with_name(f"{path.stem}_sizes.npy"), [array], len(table), facts=2)

    def work(row: int, _) -> tuple[int, int]:
        read = read_square_or_skip(paths[row], args.size, args.exact, args.frame, args.on_error)
        if read is None:
            return 0, 0
        array.write(row, read[0])
        return read[1]

    found = np.array([row for row, path in enumerate(paths) if path is not None], dtype=int)
    with tqdm(total=len(found), desc=path.name, unit="image") as bar:
        filling.run(found, work, args.workers, bar)
    return array, filling.facts


# ---------------------------------------------------------------- command
def main(args: argparse.Namespace) -> Path:
    """Write the arrays and tables; returns their directory."""
    configure_pillow()
    if args.train_csv is None:
        folders = {"train_csv": None if args.image_dir else EXAMPLE_CSV}
        folders |= {"group_col": "none"} if args.image_dir else {}
        args = argparse.Namespace(**vars(args) | folders)
    inputs = find_inputs(args)
    tables, task = read_inputs(args, inputs)
    many = f"{len(task.classes)} {'classes' if task.in_every_fold else 'labels'} ({some_of(task.classes)})"
    one = f", {task.names[0]!r} counts as 1" if task.kind == "binary" else ""
    print(f"target: {many if task.classes else task.names[0]}, {task.kind}{one}, judged by {task.metric}")
    splits = [split for split in ("train", "extra", "test") if split in inputs]
    image_dirs = {split: args.image_dir or [inputs[split].parent / "images"] for split in splits}
    if args.test_image_dir and "test" in tables:
        image_dirs["test"] = args.test_image_dir
    given = {path.resolve() for paths in (inputs.values(), *image_dirs.values()) for path in paths}
    if {args.output_dir.resolve(), *((args.output_dir / f"{split}.csv").resolve() for split in tables)} & given:
        raise InputError(f"--output_dir {args.output_dir} holds the input, which would be overwritten; pass another")
    paths = locate(tables, image_dirs, args.on_error == "skip")
    n_external = len(tables.get("extra", ()))
    if n_external:
        tables["train"] = pd.concat([tables["train"], tables.pop("extra")], ignore_index=True)
        tables["train"][FOLD] = EXTERNAL
        paths["train"] += paths.pop("extra")
        image_dirs["train"] = list(dict.fromkeys([*image_dirs["train"], *image_dirs.pop("extra")]))
    settings = {"size": args.size, "exact": args.exact, "frame": args.frame}
    for split, found in paths.items():
        listing = hashlib.sha256("\n".join(map(str, found)).encode()).hexdigest()
        settings[f"{split} images"] = f"{len(found)} of sha256 {listing}"
    folder = open_output(args.output_dir, "preprocess.json", args.overwrite, settings)

    written, filled = [], {}
    for split, found in paths.items():
        filled[split] = fill_array(tables[split], found, array_path(folder, split, args.size), args)
    external = np.arange(len(tables["train"])) >= len(tables["train"]) - n_external
    for split, (array, sizes) in filled.items():
        kept = np.flatnonzero(sizes[:, 0])
        if not len(kept):
            raise InputError(f"none of the {len(sizes)} images of {split} could be read; check --image_dir")
        array.finish(kept)
        written.append(array.path)
        external = external[kept] if split == "train" else external
        tables[split] = tables[split].iloc[kept].reset_index(drop=True)
        tables[split][["width", "height"]] = sizes[kept]
    train, col = tables["train"], group_column(tables["train"], args)
    group, own = groups_of(train, col), np.flatnonzero(~external)
    train[FOLD] = EXTERNAL  # again without the images left out
    target = train[task.targets].to_numpy(float)
    train.loc[own, FOLD] = assign_folds(task, target[own], group[own], args.n_folds, args.seed)
    check_groups(group, train[FOLD].to_numpy(), f"{args.train_csv} and {args.extra_csv}")
    columns = [args.image_col, *(args.target_col if len(task.names) == 1 else task.names)]
    if (sample := tables.get("sample_submission")) is not None:
        columns = [*sample, *args.target_col][: 2 if len(task.names) == 1 else len(sample.columns)]
        tables["sample_submission"] = sample[sample[columns[0]].map(name_key).isin(tables["test"][ID].map(name_key))]
    case_col = case_column(train, args)
    for name, table in {**tables, "statistics": fold_statistics(train, task, col, case_col)}.items():
        write_table(folder / f"{name}.csv", table)
        written.append(folder / f"{name}.csv")
    facts = {
        "size": args.size, "n_folds": args.n_folds, "seed": args.seed, "group_col": col, "exact": args.exact,
        "frame": args.frame, "case_col": case_col,
        "submission_columns": columns, "folds_sha256": folds_sha256(train, task), "task": task.facts(),
        "image_dirs": {split: [str(path.resolve()) for path in dirs] for split, dirs in image_dirs.items()},
        "inputs": {str(path): sha256(path) for path in inputs.values() if path.is_file()},
        "sha256": {path.name: sha256(path) for path in written},
    }  # fmt: skip
    finish_output(folder, "preprocess.json", facts | provenance())
    warn_of_straddling(train, col, case_col)
    for k, rows in train.groupby(FOLD):
        name = "in no fold, external" if k == EXTERNAL else f"fold {k}"
        print(f"{name}: {len(rows)} images{task.sum_up(rows[task.targets].to_numpy(float))}")
    out = 1 - np.median(train[["width", "height"]].min(axis=1) / train[["width", "height"]].max(axis=1))
    if out > 0.01 and args.frame == "square":
        print(f"the centre square leaves out {out:.0%} of the median picture; --frame whole keeps it")
    print(f"wrote {folder}")
    return folder


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__, "workers", "on_error", "limit", "overwrite")
    add = parser.add_argument
    add("--train_csv", type=Path, help="table of labels [a folder per class in --image_dir, or else the example]")
    add("--test_csv", type=Path, help="table to predict [test.csv beside train]")
    add("--extra_csv", type=Path, help="external images to train on in every fold, never scored")
    add("--image_dir", type=Path, nargs="+", help="originals, with their subfolders [images/ beside each table]")
    add("--test_image_dir", type=Path, nargs="+", help="originals of the test table, if elsewhere")
    add("--image_col", default=ID, help="column of image names, or paths below --image_dir")
    add("--target_col", nargs="+", default=[TARGET], help="column of labels, or several columns of 0 and 1")
    add("--task", choices=tuple(KINDS), help="kind of target [what the labels look like]")
    add("--positive", help="the word that counts as 1, all others as 0 [of two words the rarer one]")
    metrics = dict.fromkeys(metric for kind in KINDS.values() for metric in kind.metrics)
    add("--metric", choices=tuple(metrics), help="main score [auc; multilabel ap; regression mae]")
    add("--ordinal", action="store_true", help="classes are in order: adds the quadratic kappa")
    add("--cut", type=float, nargs="+", default=[], help="where classes of a quantity begin, such as 5 10: scored too")
    add("--group_col", default=PATIENT, help="column that folds keep whole, or none")
    add("--case_col", help="column of what several images may show: scored too [lesion_id if there is one]")
    add("--output_dir", type=Path, default=Path("data"), help="where to write")
    add("--size", type=util.COUNT, default=224, help="side in pixels")
    add("--frame", choices=("square", "whole"), default="square", help="centre square, or the whole picture, mirrored")
    add("--n_folds", type=util.number(int, 2), default=3, help="held-out folds")
    add("--seed", type=util.number(int, 0, 2**32 - 1), default=0, help="of the folds")
    add("--exact", action="store_true", help="decode every JPEG in full")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
