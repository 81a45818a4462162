"""Turn a csv and a folder of images into memory-mapped arrays and tables with frozen folds.

Reads   --train_csv, --test_csv, sample_submission.csv beside them, and --image_dir (never written)
Writes  --output_dir: {train,test}_224.npy, train.csv (with fold), test.csv, preprocess.json

    python preprocess.py
    python preprocess.py --train_csv my/labels.csv --image_col file --group_col patient

The array holds the centre square of every image, resized; the original's width and height go
into the table, so that boxes found later can be cut from the original file. A stopped run goes on
where it was when called again. N machines share the work as --shard 0/N, 1/N, ... in any order;
a call without --shard then finishes.
"""

import argparse
import hashlib
import itertools
import os
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import util
from util import FOLD, ID, TARGET, InputError

EXAMPLE_CSV = Path("example_data/train.csv")


def read_labels(path: Path, args: argparse.Namespace, columns: dict[str, str]) -> pd.DataFrame:
    """Read an input table and give the columns {theirs: ours} the project's names."""
    table = util.read_table(path, columns, args.image_col)
    for theirs, ours in columns.items():
        if theirs != ours and ours in table:
            raise InputError(f"{path} has both {theirs!r} and {ours!r}; rename the second")
    return table.rename(columns=columns)


def locate(table: pd.DataFrame, index: dict[str, Path], image_dirs: list, skip: bool) -> list:
    """Path of every row's image; a missing one is an error, or None where bad rows are skipped."""
    paths, where = [index.get(name) for name in table[ID]], ", ".join(map(str, image_dirs))
    missing = table[ID][[path is None for path in paths]].tolist()
    if missing and not skip:
        raise InputError(
            f"{where} has no image named {missing[0]!r} ({len(missing)} of {len(table)} are "
            "missing); check --image_dir and --image_col, or pass --on_error skip"
        )
    for name in missing:
        tqdm.write(f"skipped {name}: no such image in {where}")
    names: dict[Path, str] = {}
    for name, path in zip(table[ID], paths, strict=True):
        if path is not None and names.setdefault(path, name) != name:
            raise InputError(f"{names[path]!r} and {name!r} are one image, {path}; remove a row")
    return paths


def fill_array(
    table: pd.DataFrame, paths: list, array_path: Path, args: argparse.Namespace
) -> tuple[util.PartialArray, np.ndarray]:
    """Write the images of a table, or a shard of them, that are not there yet.

    Returns the array and the originals' width and height (N, 2), 0 where there is no image yet or
    its file is missing or broken (with --on_error skip).
    """
    array = util.PartialArray(array_path, (len(table), args.size, args.size, 3))
    record = array_path.with_name(f"{array_path.stem}_sizes.npy")
    progress = util.Progress(record, [array], facts=2)

    def work(row: int) -> tuple[int, int]:
        try:
            square, size = util.read_square(paths[row], args.size, args.exact)
        except InputError as error:
            if args.on_error == "fail":
                raise InputError(f"{error}, or pass --on_error skip") from None
            tqdm.write(f"skipped {table[ID].iloc[row]}: {error}")
            return 0, 0
        array.write(row, square)
        return size

    found = np.array([row for row, path in enumerate(paths) if path is not None], dtype=int)
    with tqdm(total=len(found), desc=array_path.name, unit="image") as bar:
        bar.update(len(found) - len(progress.todo(found)))
        for rows in util.chunked(progress.todo(found), args.shard):
            progress.add(rows, np.array(util.run_threads(work, rows, args.workers, bar)))
    return array, progress.facts


def finish_array(
    table: pd.DataFrame, array: util.PartialArray, sizes: np.ndarray
) -> pd.DataFrame:
    """Give a filled array its name, without the rows that have no image; returns the rows kept,
    with width and height."""
    kept = np.flatnonzero(sizes[:, 0])
    if not len(kept):
        raise InputError(f"none of the {len(table)} images of {array.path.stem} could be read")
    array.finish(kept)
    widths, heights = sizes[kept].T
    return table.iloc[kept].reset_index(drop=True).assign(width=widths, height=heights)


def group_column(table: pd.DataFrame, args: argparse.Namespace) -> str | None:
    """Column whose rows stay together in one fold, or None; raises InputError if unusable."""
    if args.group_col == "none":
        return None
    if args.group_col not in table:
        problem = f"{args.train_csv} has no column {args.group_col!r}"
    elif table[args.group_col].isna().all():
        problem = f"column {args.group_col!r} of {args.train_csv} is empty"
    else:
        return args.group_col
    raise InputError(
        f"{problem}; name the column of patients or lesions with --group_col, or pass "
        "--group_col none to split image by image"
    )


def assign_folds(target: np.ndarray, group: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """Held-out fold of every row (N,), stratified by target, groups kept whole.

    Raises InputError where a fold would lack one of the classes.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    for label in (0, 1):
        groups = len(np.unique(group[target == label]))
        if groups < n_folds:
            raise InputError(
                f"class {label} has only {groups} groups, too few for {n_folds} folds; "
                "pass a smaller --n_folds or more data"
            )
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    fold = np.full(len(target), -1)
    for k, (_, held_out) in enumerate(splitter.split(target, target, group)):
        fold[held_out] = k
    for k in range(n_folds):
        if len(np.unique(target[fold == k])) < 2:
            raise InputError(
                f"fold {k} would hold one class only; pass a smaller --n_folds or another --seed"
            )
    return fold


def find_inputs(args: argparse.Namespace) -> dict[str, Path]:
    """Input tables by split; those not given are looked for beside the train table."""
    folder = args.train_csv.parent
    inputs = {
        "train": args.train_csv,
        "test": args.test_csv or folder / "test.csv",
        "sample_submission": (args.test_csv or args.train_csv).parent / "sample_submission.csv",
    }
    if args.extra_csv is not None:
        inputs["extra"] = args.extra_csv
    optional = {split for split in ("test", "sample_submission") if not inputs[split].exists()}
    if args.test_csv is None and "test" in optional:
        optional.add("sample_submission")
    elif "test" in optional:
        raise InputError(f"{args.test_csv} is missing")
    return {split: path for split, path in inputs.items() if split not in optional}


def read_inputs(args: argparse.Namespace) -> tuple[dict[str, pd.DataFrame], dict[str, Path]]:
    """Input tables in the project's words and the files they came from, by split.

    Raises InputError for whatever can be known to be wrong before an image is read.
    """
    inputs = find_inputs(args)
    if args.image_col == args.target_col:
        raise InputError(f"--image_col and --target_col are both {args.image_col}; pass two")
    columns = {args.target_col: TARGET}
    tables = {"train": read_labels(inputs["train"], args, columns)[: args.limit]}
    target = util.check_target(tables["train"], args.train_csv)
    if FOLD in tables["train"]:
        raise InputError(f"{args.train_csv} has a column 'fold' already; rename or remove it")
    group = util.groups_of(tables["train"], group_column(tables["train"], args))
    assign_folds(target, group, args.n_folds, args.seed)
    if "test" in inputs:
        test = read_labels(inputs["test"], args, {})
        tables["test"] = test[: args.limit]
    if "sample_submission" in inputs:
        sample = read_labels(inputs["sample_submission"], args, {})
        odd = sorted(set(sample[ID]) ^ set(test[ID]))
        if odd:
            raise InputError(
                f"{inputs['sample_submission']} and {inputs['test']} do not name the same images: "
                f"only one has {odd[0]!r}; repair or remove one of them"
            )
        tables["sample_submission"] = sample
    if "extra" in inputs:
        tables["extra"] = read_extra(tables, args)
    return tables, inputs


def read_extra(tables: dict[str, pd.DataFrame], args: argparse.Namespace) -> pd.DataFrame:
    """The table of external images. Raises InputError where it shares an image or a group with
    another table: networks would be scored on what they were trained on."""
    extra = read_labels(args.extra_csv, args, {args.target_col: TARGET})[: args.limit]
    util.check_target(extra, args.extra_csv, both=False)
    columns = [ID] if group_column(tables["train"], args) is None else [ID, args.group_col]
    for split, column in itertools.product(("train", "test"), columns):
        if split in tables and column in extra and column in tables[split]:
            shared = extra[column][extra[column].isin(tables[split][column].dropna())]
            if len(shared):
                raise InputError(f"{args.extra_csv} has {column} {shared.iloc[0]!r}, and so has "
                                 f"the {split} table; remove these rows")  # fmt: skip
    return extra


def claim_output(
    paths: dict[str, list], inputs: dict[str, Path], image_dirs: list, args: argparse.Namespace
) -> Path:
    """Create the output directory, or go on with what a stopped run or other shards began.

    Raises InputError where input would be overwritten.
    """
    outputs = {(args.output_dir / f"{split}.csv").resolve() for split in inputs}
    given = {path.resolve() for path in (*image_dirs, *inputs.values())}
    own = {args.output_dir.resolve(), *outputs} & given
    if own:
        raise InputError(f"--output_dir {args.output_dir} would overwrite {min(own)}; pass another")
    settings = {"size": args.size, "exact": args.exact}
    for split, found in paths.items():
        listing = hashlib.sha256("\n".join(map(str, found)).encode())
        settings[f"{split} images"] = f"{len(found)} of sha256 {listing.hexdigest()}"
    return util.claim_filling(args.output_dir, "preprocess.json", args, settings)


def main(args: argparse.Namespace) -> Path:
    """Write the arrays and tables; returns their directory."""
    tables, inputs = read_inputs(args)
    external = tables.pop("extra", tables["train"][:0])
    tables["train"] = pd.concat([tables["train"], external], ignore_index=True)
    beside = [args.train_csv, *([] if args.extra_csv is None else [args.extra_csv])]
    image_dirs = args.image_dir or list(dict.fromkeys(path.parent / "images" for path in beside))
    index = util.index_images(*image_dirs)
    paths = {
        split: locate(tables[split], index, image_dirs, args.on_error == "skip")
        for split in ("train", "test")
        if split in tables
    }
    output_dir = claim_output(paths, inputs, image_dirs, args)
    arrays = {split: util.array_path(output_dir, split, args.size) for split in paths}
    filled = {
        split: fill_array(tables[split], paths[split], arrays[split], args) for split in paths
    }
    if args.shard:
        print("wrote shard {} of {}; when all are written, run without --shard".format(*args.shard))
        return output_dir
    for split, (array, sizes) in filled.items():
        tables[split] = finish_array(tables[split], array, sizes)
    if "sample_submission" in tables:
        read = tables["sample_submission"][ID].isin(tables["test"][ID])
        tables["sample_submission"] = tables["sample_submission"][read]
    group_col = group_column(tables["train"], args)
    own = ~tables["train"][ID].isin(external[ID])
    rows = tables["train"][own]  # without the images left out
    target, group = util.check_target(rows, args.train_csv), util.groups_of(rows, group_col)
    tables["train"][FOLD] = util.EXTERNAL
    tables["train"].loc[own, FOLD] = assign_folds(target, group, args.n_folds, args.seed)
    for split, table in tables.items():
        util.write_table(output_dir / f"{split}.csv", table)
    written = [*arrays.values(), *(output_dir / f"{split}.csv" for split in tables)]
    facts = {
        "size": args.size,
        "n_folds": args.n_folds,
        "seed": args.seed,
        "group_col": group_col,
        "image_dirs": [path.resolve() for path in image_dirs],
        "exact": args.exact,
        "inputs": {str(path): util.sha256(path) for path in inputs.values()},
        "sha256": {path.name: util.sha256(path) for path in written},
        **util.provenance(),
    }
    util.finish_filling(output_dir, "preprocess.json", facts)
    for k, rows in tables["train"].groupby(FOLD):
        name = "in no fold, external" if k == util.EXTERNAL else f"fold {k}"
        print(f"{name}: {len(rows)} images, {rows[TARGET].sum()} positive")
    print(f"wrote {output_dir}")
    return output_dir


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser, count = util.new_parser(__doc__), util.number(int, 1)
    data = parser.add_argument_group("input")
    data.add_argument("--train_csv", type=Path, default=EXAMPLE_CSV, help="table of labels")
    data.add_argument("--test_csv", type=Path, help="table to predict [test.csv beside train]")
    data.add_argument("--extra_csv", type=Path, help="external images to train on in every fold, "
                      "never scored; columns as in --train_csv")  # fmt: skip
    data.add_argument("--image_dir", type=Path, nargs="+",
                      help="originals [images/ beside the tables]")  # fmt: skip
    data.add_argument("--image_col", default=ID, help="column of image names")
    data.add_argument("--target_col", default=TARGET, help="column of labels, 0 or 1")
    data.add_argument("--group_col", default="patient_id", help="column that folds keep whole")
    data.add_argument("--limit", type=count, help="use the first rows of each table")
    data.add_argument("--on_error", choices=("fail", "skip"), default="fail", help="bad images")
    out = parser.add_argument_group("output")
    out.add_argument("--output_dir", type=Path, default=Path("data"), help="where to write")
    out.add_argument("--size", type=count, default=224, help="side in pixels")
    out.add_argument("--n_folds", type=util.number(int, 2), default=3, help="held-out folds")
    out.add_argument("--seed", type=util.number(int, 0, 2**32 - 1), default=0, help="of the folds")
    out.add_argument("--workers", type=count, default=os.cpu_count(), help="threads")
    out.add_argument("--exact", action="store_true", help="decode every JPEG in full")
    out.add_argument("--shard", type=util.shard, metavar="I/N", help="write every N-th image, from "
                     "I: one of N calls that share the work")  # fmt: skip
    out.add_argument("--overwrite", action="store_true", help="replace a finished --output_dir")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
