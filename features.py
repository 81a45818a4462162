"""Turn a trained classifier into features of places: for every image and every class that it sees there, a vector.

Reads   --run (train.py), and the images of its tables, or those named (never written)
Writes  --output_dir/: {train,test}.npy or images.npy, float32 (rows, D), with a csv of the same rows (image_name, fold,
        class, box, x0, y0, x1, y1, confidence, probability), and features.json

    python features.py --run runs/resnet
    python features.py --run runs/resnet --route crop --t_class .3 photos
    python features.py --run runs/resnet --route roi --pool original --layer size

A row is a class whose probability is at least --t_class. Its map (maps.py) says where:

heat    one pass, no box: the mean of the last feature map, weighted by what speaks for the class (--heat soft), or over
        the cells above --t_roi of the map's maximum (--heat cut); over the whole map if nothing speaks for it
roi     a row for every box around a part of the map above --t_roi: the mean of the feature map inside it (RoIAlign)
crop    such a row too: the box is cut from the original at its own resolution and sent through the network

Training images are read by the network of the fold that held them out, all others by each, as `fold` says: features of
two networks are not the same numbers. A stopped run goes on where it was when called again.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import util
from inference import CHUNK, Single, list_images, note_seen, read_chunks, read_meta
from maps import WAYS
from places import COLUMNS, NOTHING, Extractor, read_rows
from plumbing.data import read_data
from plumbing.distributed import pick_device
from plumbing.files import atomic, finish_output, open_output, provenance, sha256, write_table
from plumbing.images import configure_pillow
from plumbing.runs import Run, read_run
from util import FOLD, ID, InputError


# ---------------------------------------------------------------- images, chunk by chunk
def find_parts(args: argparse.Namespace, run: Run, single: Single) -> dict[str, tuple[list, list]]:
    """What is to be read, by split: names in their order, and groups (folds of the networks that read, files by name,
    their metadata)."""
    if args.images:
        paths = dict(list(list_images(args.images).items())[: args.limit])
        note_seen(run, paths)
        table = read_meta(args, list(paths), single.meta_columns())
        return {"images": (list(paths), [(run.folds, paths, table)])}
    data = read_data(args.data_dir or Path(run.config["args"]["data_dir"]))
    if run.config["inputs"]["folds"] != data.folds_sha256:
        raise InputError(f"{run.path} has other folds than {data.directory}; pass its --data_dir")
    parts = {}
    for split, table in data.tables().items():
        table = table[: args.limit]
        files = np.array(data.find_originals(split, args.image_dir, args.limit), dtype=object)
        groups = [(run.folds, np.ones(len(table), bool))]
        names = table[ID]
        if split == "train":
            groups = [([k], (table[FOLD] == k).to_numpy()) for k in run.folds]
            names = names[table[FOLD].isin(run.folds)]
        parts[split] = names.tolist(), [
            (folds, dict(zip(table[ID][rows], files[rows], strict=True)), table[rows]) for folds, rows in groups
        ]
    return parts


def describe(groups: list[tuple]) -> str:
    """Hash of which images are read by which networks, with what metadata."""
    digest = hashlib.sha256()
    for folds, paths, table in groups:
        digest.update(repr((folds, [(name, str(path)) for name, path in paths.items()])).encode())
        digest.update(table.to_csv(index=False).encode())
    return digest.hexdigest()


def write_part(path: Path, extractor: Extractor, folds: list[int], paths: dict, table: pd.DataFrame) -> None:
    """Write rows and vectors of a chunk of images, the vectors last: with them it is done."""
    tables, vectors = [], []
    for images in read_chunks(paths, table, extractor.single, extractor.args.on_error):
        for k in folds:
            images.looks.clear()  # another network looks elsewhere
            rows, found = extractor.extract(images, k)
            tables.append(rows)
            vectors += [found] if len(found) else []
    write_table(path.with_suffix(".csv.part"), pd.concat(tables) if tables else pd.DataFrame(columns=COLUMNS))
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.concatenate(vectors) if vectors else NOTHING)


def join_parts(folder: Path, split: str, paths: list[Path], names: list[str], classes, width: int) -> pd.DataFrame:
    """Bring the chunks of a split into the order of the images, their folds, classes and boxes; one chunk's vectors of
    `width` numbers are in memory at a time."""
    tables = [read_rows(path.with_suffix(".csv.part")) for path in paths]
    table = pd.concat([pd.DataFrame(columns=COLUMNS), *(each for each in tables if len(each))], ignore_index=True)
    place = {name: i for i, name in enumerate(names)}
    number = table["class"].map({name: i for i, name in enumerate(classes)})
    order = np.lexsort([each.to_numpy(float) for each in (table["box"], number, table[FOLD], table[ID].map(place))])
    at, start = np.argsort(order), 0
    with atomic(folder / f"{split}.npy") as temporary:
        array = np.lib.format.open_memmap(temporary, "w+", np.float32, (len(table), width))
        for path in paths:
            found = np.load(path, allow_pickle=False)
            if len(found):
                array[at[start : start + len(found)]] = found
                start += len(found)
        array.flush()
        del array
    table = table.iloc[order]
    write_table(folder / f"{split}.csv", table)
    return table


# ---------------------------------------------------------------- command
def main(args: argparse.Namespace) -> Path:
    """Write the features; returns their directory."""
    configure_pillow()
    run = read_run(args.run)
    if run.is_blend:
        raise InputError(f"{args.run} is a blend: its members have features of their own; pass one of them")
    if args.layer == "size" and (args.pool != "original" or args.route != "roi"):
        raise InputError("--layer size: maps differ in width by the size; pass --route roi --pool original too")
    single = Single(run, pick_device(args.device), fold=False)
    extractor, parts = Extractor(single, args), find_parts(args, run, single)
    keys = ("route", "way", "layer", "pool", "cells", "heat", "t_class", "t_roi", "limit", "on_error")
    settings = {key: getattr(args, key) for key in keys} | {"run": sha256(args.run / "metrics.json")}
    settings["images"] = {split: describe(groups) for split, (_, groups) in parts.items()}
    mine = {path.name for split in parts for path in args.output_dir.glob(f"{split}.*")}
    if mine and not any((args.output_dir / f"features.json{end}").exists() for end in ("", ".part")):
        raise InputError(f"--output_dir {args.output_dir} holds {min(mine)} of something else; pass another folder")
    folder, written, counts = open_output(args.output_dir, "features.json", args.overwrite, settings), [], {}
    total, files = sum(len(paths) for _, groups in parts.values() for _, paths, _ in groups), {}
    with tqdm(total=total, unit="image") as bar:
        for split, (_, groups) in parts.items():
            files[split] = []
            for folds, paths, table in groups:
                named = list(paths.items())
                for start in range(0, len(named), CHUNK):
                    files[split].append(folder / f"{split}_{len(files[split])}.npy.part")
                    some = dict(named[start : start + CHUNK])
                    if not files[split][-1].exists():
                        write_part(files[split][-1], extractor, folds, some, table[start : start + CHUNK])
                    bar.update(len(some))
    widths = [np.load(path, mmap_mode="r", allow_pickle=False).shape[1] for each in files.values() for path in each]
    if not any(widths):
        raise InputError("no image has a class so probable with a map that says anything; pass --overwrite and a lower "
                         f"--t_class than {args.t_class:g}")  # fmt: skip
    for split, (names, _) in parts.items():
        found = join_parts(folder, split, files[split], names, run.task.names, max(widths))
        written += [f"{split}.npy", f"{split}.csv"]
        counts[split] = {"images": len(names), "without": len(names) - found[ID].nunique(), "rows": len(found)}
    hashes = {name: sha256(folder / name) for name in written}
    facts = settings | {"way": extractor.way, "width": max(widths), "rows": counts, "sha256": hashes} | provenance()
    finish_output(folder, "features.json", facts)
    for split, count in counts.items():
        print(f"{split}: {count['rows']} rows of {count['images']} images, {count['without']} have none")
    print(f"wrote {folder}")
    return folder


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__, "device", "on_error", "limit", "overwrite")
    add, share = parser.add_argument, util.SHARE
    add("images", nargs="*", type=Path, help="image files or folders [those of the run's tables]")
    add("--run", type=Path, required=True, help="finished run whose networks look at one picture of an image")
    add("--route", choices=("heat", "roi", "crop"), default="heat", help="what is pooled")
    add("--way", choices=tuple(WAYS), help="of making maps [cam; attention of a ChipNet or scout; rollout of a ViT]")
    add("--t_class", type=share, default=0.5, help="probability from which a class has rows")
    add("--t_roi", type=share, default=0.3, help="share of a map's maximum above which it belongs to a box")
    add("--heat", choices=("soft", "cut"), default="soft", help="--route heat: weighted by the map, or cut at --t_roi")
    add("--layer", help="module of the backbone that is read, or size: by the size of the box [the last map]")
    add("--pool", choices=("average", "original"), default="average", help="original: 512 averages of channels")
    add("--cells", type=int, choices=(1, 2, 4), default=1, help="--pool original: side of the grid in a region")
    add("--output_dir", type=Path, default=Path("features"), help="where to write")
    add("--data_dir", type=Path, help="from preprocess.py [as the run says]")
    add("--image_dir", type=Path, nargs="+", help="originals of the tables [as preprocessed]")
    add("--csv", type=Path, help="metadata of the images named [all missing]")
    add("--image_col", default=ID, help="column of image names in --csv")
    return parser
# fmt: on


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
