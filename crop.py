"""Cut what a ChipNet attends to out of the full-resolution originals.

Reads   --run (a ChipNet run), --data_dir (preprocess.py) and the originals (never written)
Writes  --output_dir/RUN/: {train,test}_224.npy, {train,test}_boxes.csv,
        {train,test}_attention.npy, crop.json, montage.png

    python crop.py
    python crop.py --run runs/chipnet --rule original --num_devs 1.0

A training image is cropped by the network of the fold that held it out; a test image by the
mean map of all networks.
"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import localize
import models
import util
from localize import Box
from util import FOLD, ID, TARGET, InputError

MONTAGE_ROWS = 8


def load_networks(run_dir: Path, data: util.Data, device: torch.device) -> dict:
    """Networks of a ChipNet run by fold. Raises InputError where they do not fit the data."""
    config = util.read_config(run_dir)
    recipe = models.MODELS.get(config["args"].get("model"))
    if recipe is None or not hasattr(recipe.network, "attention"):
        raise InputError(f"{run_dir} is no ChipNet run: it has no attention to crop by")
    if config["data"]["folds_sha256"] != util.folds_sha256(data.train):
        raise InputError(
            f"{run_dir} was trained on other folds than {data.directory} has; train it again"
        )
    folds = [fold["fold"] for fold in util.read_metrics(run_dir)["folds"]]
    missing = sorted(set(range(data.facts["n_folds"])) - set(folds))
    if missing:
        print(
            f"fold {', '.join(map(str, missing))} of {run_dir} is not trained: its images are "
            "cropped by networks that saw them (oof = 0 in train_boxes.csv)"
        )
    paths = {k: run_dir / f"fold{k}_best.pt" for k in folds}
    return {k: models.load_checkpoint(path, device)[0] for k, path in paths.items()}


def train_maps(networks: dict, array: np.ndarray, fold: np.ndarray, device, views: int):
    """Attention of the training images and whether it is out of fold: (N, h, w), bool (N,)."""
    maps, oof = None, np.isin(fold, list(networks))
    for k in sorted(set(fold)):
        rows = np.flatnonzero(fold == k)
        chosen = [networks[k]] if k in networks else list(networks.values())
        part = localize.attention_maps(chosen, array[rows], device, views, desc=f"fold {k}")
        if maps is None:
            maps = np.empty((len(array), *part.shape[1:]), np.float32)
        maps[rows] = part
    return maps, oof


def write_crops(
    array_path: Path, table: pd.DataFrame, boxes: list[Box], image_dir: Path, size: int, workers
) -> None:
    """Write the array of all crops of a table, in its order."""
    index = util.index_images(image_dir)
    for name in table[ID]:
        if name not in index:
            raise InputError(f"{image_dir} has no image named {name!r}; check --image_dir")

    def work(row: int) -> None:
        name, width, height = table[[ID, "width", "height"]].iloc[row]
        array[row] = util.read_crop(index[name], boxes[row], (width, height), size)

    with util.new_array(array_path, (len(table), size, size, 3)) as array:
        util.run_threads(work, range(len(table)), workers, f"crop {array_path.name}")


def plot_montage(path: Path, data: util.Data, crop_dir: Path, table, boxes, maps) -> None:
    """Picture of the first images of both classes: box, attention and crop."""
    whole = util.open_array(util.array_path(data.directory, "train", data.size), len(data.train))
    crops = util.open_array(util.array_path(crop_dir, "train", data.size), len(table))
    by_class = [np.flatnonzero(table[TARGET] == label)[: MONTAGE_ROWS // 2] for label in (1, 0)]
    rows = np.concatenate(by_class)
    figure = util.new_figure(figsize=(7, 2.2 * len(rows)))
    for axes, row in zip(figure.subplots(len(rows), 3, squeeze=False), rows, strict=True):
        box, size = boxes[row], tuple(table[["width", "height"]].iloc[row])
        # the stored square, with the box moved into its frame
        short = min(size)
        left, top = (size[0] - short) / 2, (size[1] - short) / 2
        inside = Box(box.x0 - left, box.y0 - top, box.x1 - left, box.y1 - top)
        localize.draw_row(axes, whole[row], (short, short), inside, maps[row], crops[row])
        label = "positive" if table[TARGET].iloc[row] else "negative"
        axes[0].set_title(f"{table[ID].iloc[row]}, {label}", fontsize=8)
        axes[1].set_title(box.reason or f"confidence {box.confidence:.2f}", fontsize=8)
        axes[2].set_title(f"crop, {short / box.side:.1f}x finer", fontsize=8)
    util.save_figure(path, figure)


def crop_split(
    split: str, maps: np.ndarray, oof: np.ndarray, data: util.Data, output_dir: Path, args
) -> list[Box]:
    """Write the maps, boxes and crops of one split; returns the boxes."""
    table = data.tables()[split][: len(maps)]
    sizes = table[["width", "height"]].itertuples(index=False, name=None)
    boxes = [
        localize.find_box(attention, size, args.rule, args.num_devs)
        for attention, size in zip(maps, sizes, strict=True)
    ]
    rows = pd.DataFrame([asdict(box) for box in boxes]).rename(columns={"reason": "fallback"})
    rows.insert(0, ID, table[ID].to_numpy())
    rows["oof"] = oof.astype(int)
    columns = [ID, "x0", "y0", "x1", "y1", "oof", "fallback", "confidence"]
    util.write_table(output_dir / f"{split}_boxes.csv", rows[columns])
    with util.atomic(output_dir / f"{split}_attention.npy") as temporary:
        with open(temporary, "wb") as file:
            np.save(file, maps, allow_pickle=False)
    array_path = util.array_path(output_dir, split, data.size)
    image_dir = args.image_dir or Path(data.facts["image_dir"])
    write_crops(array_path, table, boxes, image_dir, data.size, args.workers)
    return boxes


def main(args: argparse.Namespace) -> Path:
    """Crop the train and test images; returns the directory of the crops."""
    device = models.pick_device(args.device)
    data = util.read_data(args.data_dir)
    networks = load_networks(args.run, data, device)
    name = args.run.resolve().name
    output_dir = (args.output_dir or data.directory / "crops") / name
    util.claim_dir(output_dir, "crop.json", args.overwrite)

    boxes = {}
    for split, table in data.tables().items():
        array = util.open_array(util.array_path(data.directory, split, data.size), len(table))
        array, table = array[: args.limit], table[: args.limit]
        if split == "train":
            fold = table[FOLD].to_numpy()
            maps, oof = train_maps(networks, array, fold, device, args.views)
            first_maps = maps
        else:
            maps = localize.attention_maps(list(networks.values()), array, device, args.views)
            oof = np.ones(len(table), dtype=bool)  # no network saw a test image
        boxes[split] = crop_split(split, maps, oof, data, output_dir, args)
        reasons = pd.Series([box.reason for box in boxes[split]])
        short = table[["width", "height"]].min(axis=1).to_numpy()
        finer = np.median(short / [box.side for box in boxes[split]])
        print(f"{split}: {len(table)} crops, median {finer:.2f}x finer, "
              f"{(reasons != '').sum()} whole squares")  # fmt: skip
    train = data.train[: args.limit]
    plot_montage(
        output_dir / "montage.png", data, output_dir, train, boxes["train"], first_maps
    )
    arrays = [util.array_path(output_dir, split, data.size) for split in boxes]
    facts = {
        "run": args.run,
        "rule": args.rule,
        "num_devs": args.num_devs,
        "views": args.views,
        "folds": sorted(networks),
        "folds_sha256": util.folds_sha256(data.train),
        "sha256": {path.name: util.sha256(path) for path in arrays},
        "checkpoints": {f"fold{k}": util.sha256(args.run / f"fold{k}_best.pt") for k in networks},
        **util.provenance(),
    }
    util.write_json(output_dir / "crop.json", facts)
    print(f"wrote {output_dir}")
    return output_dir


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser, count = util.new_parser(__doc__), util.number(int, 1)
    parser.add_argument("--run", type=Path, default=Path("runs/chipnet"), help="ChipNet run")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="from preprocess.py")
    parser.add_argument("--image_dir", type=Path, help="originals [as preprocessed]")
    parser.add_argument("--output_dir", type=Path, help="where to write RUN/ [crops/ in data_dir]")
    parser.add_argument("--rule", choices=sorted(localize.RULES), default="component",
                        help="how a box is found")  # fmt: skip
    parser.add_argument("--num_devs", type=float, default=1.5,
                        help="threshold of --rule original: mean + num_devs * std")  # fmt: skip
    parser.add_argument("--views", type=int, choices=(1, 2, 4, 8), default=8,
                        help="symmetries over which attention is averaged")  # fmt: skip
    parser.add_argument("--limit", type=count, help="crop the first images: a dry run")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--workers", type=count, default=os.cpu_count(), help="threads")
    parser.add_argument("--overwrite", action="store_true", help="replace finished crops")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser(), models.ModelError)
