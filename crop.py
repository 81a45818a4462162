"""Cut what a network attends to out of the full-resolution originals.

Reads   --data_dir (preprocess.py), the originals (never written), and by --source: --run (a
        trained run), --backbone with --weights, or --boxes
Writes  --output_dir/NAME/: {train,test}_224.npy, train_wide_314.npy (for jitter in training),
        {train,test}_boxes.csv, {train,test}_attention.npy, saliency.pt, crop.json, montage.png

    python crop.py
    python crop.py --source attention --run runs/chipnet --rule original --num_devs 1.0
    python crop.py --source attention*saliency --run runs/chipnet
    python crop.py --source gradcam --run runs/resnet
    python crop.py --source boxes --boxes detector.csv

A training image is cropped by the map of the fold that held it out; a test image by the mean map
of all folds. Sources: attention (a ChipNet), gradcam (any trained run), saliency (no labels:
what differs from the background in the features of a pretrained network), attention*saliency
(their product), boxes (a csv of image_name, x0, y0, x1, y1 in pixels of the originals).

Every file is decoded once, for all its crops. A stopped run goes on where it was when called
again. N machines share the work as --shard 0/N, 1/N, ...; a call without --shard then finishes.
"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import localize
import models
import util
from localize import Box
from util import FOLD, ID, TARGET, InputError

MONTAGE_ROWS = 8
WIDE = 1.4  # side of the crops from which jittered ones are cut, over the box's
CORNERS = ["x0", "y0", "x1", "y1"]


# ---------------------------------------------------------------- sources of maps
def load_networks(run_dir: Path, source: str, data: util.Data, device: torch.device) -> dict:
    """Networks of a run by fold. Raises InputError where they do not fit the source or data."""
    config = util.read_config(run_dir)
    recipe = models.MODELS.get(config["args"].get("model"))  # a blend has none
    if "attention" in source and (recipe is None or recipe.network is not models.ChipNet):
        raise InputError(
            f"{run_dir} is no ChipNet run: it has no attention to crop by; pass one, or gradcam"
        )
    if recipe is None or recipe.inputs != ("whole",):
        raise InputError(
            f"{run_dir} does not look at whole images: it cannot say where to crop; pass one that "
            "does"
        )
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
    return {k: models.load_fold(run_dir, k, config["spec"], device)[0] for k in folds}


def fit_saliencies(data: util.Data, output_dir: Path, args, device) -> dict:
    """A Saliency by fold, learned from the images of the other folds, or loaded where a stopped
    run or another shard has learned them; kept in saliency.pt.part."""
    path = util.part_of(output_dir / "saliency.pt")
    if path.exists():
        return localize.read_saliencies(path, *models.load_checkpoint(path, device))
    spec = {
        "model": "resnet", "backbone": args.backbone, "image_size": data.size, "meta_dim": 0,
        "hidden": 1, "dropout": 0.0, "gates": None,
    }  # fmt: skip
    torch.manual_seed(0)  # of --weights none
    network = models.build_model(spec, args.weights).to(device).eval()
    path_of_array = util.array_path(data.directory, "train", data.size)
    array = util.open_array(path_of_array, len(data.train), data.size)
    fold = data.train[FOLD].to_numpy()
    found = {
        k: localize.fit_saliency(network, array, np.flatnonzero(fold != k), device, seed=k)
        for k in range(data.facts["n_folds"])
    }
    parts = {str(k): {"weight": s.weight, "bias": s.bias} for k, s in found.items()}
    models.save_checkpoint(path, network, spec, saliency=parts)
    return found


def make_sources(data: util.Data, output_dir: Path, args, device: torch.device) -> dict:
    """Sources of maps by fold, as --source asks for; none for boxes."""
    networks, saliencies = {}, {}
    if args.source in localize.NETWORK_SOURCES:
        networks = load_networks(args.run, args.source, data, device)
    claim_output(output_dir, data, args, sorted(networks))
    if "saliency" in args.source:
        with util.locked(output_dir):  # other shards wait, and load them
            saliencies = fit_saliencies(data, output_dir, args, device)
    return {
        k: localize.make_source(args.source, networks.get(k), saliencies.get(k), args.shifts)
        for k in (networks or saliencies)
    }


def checkpoint_hashes(args: argparse.Namespace, folds: list[int]) -> dict[str, str]:
    """SHA-256 of the run's checkpoints that crops depend on."""
    if args.source not in localize.NETWORK_SOURCES:
        return {}
    return {f"fold{k}": util.sha256(args.run / f"fold{k}_best.pt") for k in folds}


def claim_output(output_dir: Path, data: util.Data, args, folds: list[int]) -> None:
    """Create the directory of crops, or go on with what a stopped run or other shards began."""
    keys = ("source", "rule", "num_devs", "views", "shifts", "backbone", "weights", "amp", "limit")
    settings = {key: getattr(args, key) for key in keys} | {
        "folds_sha256": util.folds_sha256(data.train),
        "arrays": data.facts["sha256"],
        "checkpoints": checkpoint_hashes(args, folds),
        "boxes": None if args.boxes is None else util.sha256(args.boxes),
    }
    util.claim_filling(output_dir, "crop.json", args, settings)


def source_groups(
    split: str, sources: dict, table: pd.DataFrame
) -> list[tuple[np.ndarray, list, bool]]:
    """Rows of a table, the sources whose mean map they are cropped by, and whether these saw none
    of them: a training image gets the source of its fold, a test image all."""
    every = list(sources.values())
    if split == "test" or not sources:
        return [(np.arange(len(table)), every, True)]
    fold, groups = table[FOLD].to_numpy(), []
    for k in sorted(set(fold)):
        chosen = [sources[k]] if k in sources else every
        groups.append((np.flatnonzero(fold == k), chosen, k in sources))
    return groups


# ---------------------------------------------------------------- boxes and crops
def read_boxes(path: Path, table: pd.DataFrame) -> list[Box]:
    """Boxes of a table's images from a csv, made square; the whole square where it has none."""
    given = util.read_table(path, CORNERS)
    given = given.dropna(subset=CORNERS, how="all")
    corners = {column: util.numbers(given, column, path) for column in CORNERS}
    given = pd.DataFrame(corners, index=given[ID])
    boxes = []
    for name, width, height in table[[ID, "width", "height"]].itertuples(index=False, name=None):
        if name not in given.index:
            boxes.append(Box(*util.centre_square(width, height), f"no box in {path.name}"))
            continue
        x0, y0, x1, y1 = given.loc[name]
        inside = 0 <= x0 < x1 <= width + 0.5 and 0 <= y0 < y1 <= height + 0.5
        if not inside:
            raise InputError(
                f"{path}: the box of {name}, {x0:g} {y0:g} {x1:g} {y1:g}, does not lie in its "
                f"{width} x {height} px; corners are pixels of the original, x0 < x1 and y0 < y1"
            )
        x, y, half = (x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0) / 2
        square = Box(x - half, y - half, x + half, y + half)
        boxes.append(localize.widen(square, 1.0, (width, height)))  # shifted into the image
    return boxes


class Cropper:
    """Maps, boxes and crops of one split: {split}_attention.npy and the arrays of `sizes`."""

    def __init__(self, split: str, data: util.Data, output_dir: Path, args: argparse.Namespace):
        self.split, self.args = split, args
        self.table = data.tables()[split]
        path = util.array_path(data.directory, split, data.size)
        util.open_array(path, len(self.table), data.size)
        self.stored = util.Rows(path, len(self.table))
        self.table = self.table[: args.limit]
        facts = self.table[[ID, "width", "height"]]
        self.originals = list(facts.itertuples(index=False, name=None))
        self.sizes = {split: data.size}
        if split == "train":
            self.sizes["train_wide"] = round(WIDE * data.size)
        self.output_dir, self.maps = output_dir, None
        self.boxes: list[Box | None] = [None] * len(self.table)
        if args.source == "boxes":
            self.boxes = read_boxes(args.boxes, self.table)
            if split == "train" and all(box.reason for box in self.boxes):
                raise InputError(f"{args.boxes} has a box of none of the training images; write "
                                 "their names as in the table")  # fmt: skip
        image_dir = args.image_dir or Path(data.facts["image_dir"])
        self.index = util.index_images(image_dir)
        for name in self.table[ID]:
            if name not in self.index:
                raise InputError(f"{image_dir} has no image named {name!r}; check --image_dir")

    def open_arrays(self, sources: list, device) -> util.Progress:
        """Create the arrays, or go on with those of a stopped run."""
        n = len(self.table)
        self.crops = [
            util.PartialArray(util.array_path(self.output_dir, name, side), (n, side, side, 3))
            for name, side in self.sizes.items()
        ]
        if sources:
            one = localize.attention_maps(sources[:1], self.stored[[0]], device)
            path = self.output_dir / f"{self.split}_attention.npy"
            self.maps = util.PartialArray(path, (n, *one.shape[1:]), np.float32)
        self.arrays = self.crops + ([self.maps] if sources else [])
        return util.Progress(self.output_dir / f"{self.split}_done.npy", self.arrays)

    def find_box(self, row: int, attention: np.ndarray | None) -> Box:
        """Box of a row: given, or found in its map."""
        if self.boxes[row] is None:
            size = self.originals[row][1:]
            self.boxes[row] = localize.find_box(attention, size, self.args.rule, self.args.num_devs)
        return self.boxes[row]

    def cut(self, item: tuple[int, np.ndarray | None]) -> None:
        """Write a row's map and, from one decode of its file, all its crops."""
        row, attention = item
        name, *size = self.originals[row]
        box = self.find_box(row, attention)
        boxes = [box, localize.widen(box, WIDE, tuple(size))][: len(self.crops)]
        sides = list(self.sizes.values())
        for array, crop in zip(
            self.crops, util.read_crops(self.index[name], boxes, sides, tuple(size)), strict=True
        ):
            array.write(row, crop)
        if self.maps is not None:
            self.maps.write(row, attention)

    def fill(self, groups: list, device: torch.device) -> None:
        """Write the rows, or a shard of them, that are not there yet."""
        args = self.args
        progress = self.open_arrays(groups[0][1], device)
        with tqdm(total=len(self.table), desc=f"crop {self.split}", unit="image") as bar:
            bar.update(len(self.table) - len(progress.todo(np.arange(len(self.table)))))
            for rows, sources, _ in groups:
                for chunk in util.chunked(progress.todo(rows), args.shard):
                    maps = [None] * len(chunk)
                    if sources:
                        with models.autocast(device, args.amp):
                            maps = localize.attention_maps(
                                sources, self.stored[chunk], device, args.views, args.batch_size
                            )
                    items = zip(chunk, maps, strict=True)
                    util.run_threads(self.cut, items, args.workers, bar)
                    progress.add(chunk, np.ones((len(chunk), 1)))

    def finish(self, groups: list) -> None:
        """Give the arrays their names and write the table of boxes."""
        maps = None if self.maps is None else self.maps.view()
        for row in range(len(self.table)):  # those of an earlier call are found again
            self.find_box(row, None if maps is None else maps[row])
        for array in self.arrays:
            array.finish(np.arange(len(self.table)))
        rows = pd.DataFrame([asdict(box) for box in self.boxes])
        rows = rows.rename(columns={"reason": "fallback"})
        rows.insert(0, ID, self.table[ID].to_numpy())
        oof = np.empty(len(rows), dtype=int)
        for chosen, _, unseen in groups:
            oof[chosen] = unseen
        rows["oof"] = oof
        rows[list(util.PLACE)] = place_in_wide(self.boxes, self.table)
        columns = [ID, *CORNERS, "oof", "fallback", "confidence", *util.PLACE]
        util.write_table(self.output_dir / f"{self.split}_boxes.csv", rows[columns])
        short = self.table[["width", "height"]].min(axis=1).to_numpy()
        finer = np.median(short / [box.side for box in self.boxes])
        whole = sum(box.reason != "" for box in self.boxes)
        print(f"{self.split}: {len(rows)} crops, median {finer:.2f}x finer, {whole} whole squares")


def place_in_wide(boxes: list[Box], table: pd.DataFrame) -> np.ndarray:
    """Where boxes lie in their wide crops: x, y and side in fractions of these (N, 3)."""
    places = []
    for box, size in zip(boxes, table[["width", "height"]].to_numpy(), strict=True):
        wide = localize.widen(box, WIDE, tuple(size))
        offset = box.x0 - wide.x0, box.y0 - wide.y0, box.side
        places.append(np.array(offset) / wide.side)
    return np.array(places)


def plot_montage(path: Path, data: util.Data, crop_dir: Path, cropper: Cropper) -> None:
    """Picture of the first training images of both classes: box, attention and crop."""
    table, boxes, maps = cropper.table, cropper.boxes, None
    if cropper.maps is not None:
        maps = util.open_maps(cropper.maps.path, len(table))
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
        attention = None if maps is None else maps[row]
        localize.draw_row(axes, whole[row], (short, short), inside, attention, crops[row])
        label = "positive" if table[TARGET].iloc[row] else "negative"
        axes[0].set_title(f"{table[ID].iloc[row]}, {label}", fontsize=8)
        axes[1].set_title(box.reason or f"confidence {box.confidence:.2f}", fontsize=8)
        axes[2].set_title(f"crop, {short / box.side:.1f}x finer", fontsize=8)
    util.save_figure(path, figure)


def default_name(args: argparse.Namespace) -> str:
    """Name of the crops' directory: what they were cut by."""
    if args.source == "boxes":
        return args.boxes.stem
    words = {"attention": [], "gradcam": ["gradcam"]}.get(args.source, ["saliency"])
    run = [args.run.resolve().name] if args.source in localize.NETWORK_SOURCES else []
    return "_".join([*run, *words])


def main(args: argparse.Namespace) -> Path:
    """Crop the train and test images; returns the directory of the crops."""
    if (args.source == "boxes") != (args.boxes is not None):
        raise InputError("--source boxes and --boxes FILE go together; pass both or neither")
    device = models.pick_device(args.device)
    args.batch_size = args.batch_size or (16 if device.type == "cpu" else 256)
    data = util.read_data(args.data_dir)
    output_dir = (args.output_dir or data.directory / "crops") / default_name(args)
    if output_dir.resolve() == data.directory.resolve():
        raise InputError(f"{output_dir} is --data_dir itself; pass another --output_dir")
    croppers = [Cropper(split, data, output_dir, args) for split in data.tables()]
    sources = make_sources(data, output_dir, args, device)
    groups = [source_groups(c.split, sources, c.table) for c in croppers]
    for cropper, its_groups in zip(croppers, groups, strict=True):
        cropper.fill(its_groups, device)
    if args.shard:
        print("wrote shard {} of {}; when all are written, run without --shard".format(*args.shard))
        return output_dir
    sizes = {}
    for cropper, its_groups in zip(croppers, groups, strict=True):
        cropper.finish(its_groups)
        sizes |= cropper.sizes
    plot_montage(output_dir / "montage.png", data, output_dir, croppers[0])
    if "saliency" in args.source:
        path = output_dir / "saliency.pt"
        os.replace(util.part_of(path), path)
    paths = [util.array_path(output_dir, name, size) for name, size in sizes.items()]
    paths += [output_dir / f"{cropper.split}_boxes.csv" for cropper in croppers]
    paths += [cropper.maps.path for cropper in croppers if cropper.maps is not None]
    facts = {
        key: getattr(args, key)
        for key in ("source", "run", "boxes", "rule", "num_devs", "views", "shifts", "amp")
    }
    facts |= {
        "folds": sorted(sources),
        "folds_sha256": util.folds_sha256(data.train),
        "wide_size": sizes["train_wide"],
        "sha256": {path.name: util.sha256(path) for path in paths},
        "checkpoints": checkpoint_hashes(args, sorted(sources)),
        **util.provenance(),
    }
    util.finish_filling(output_dir, "crop.json", facts)
    print(f"wrote {output_dir}")
    return output_dir


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser, count = util.new_parser(__doc__), util.number(int, 1)
    parser.add_argument("--source", choices=localize.SOURCES, default="saliency",
                        help="where maps or boxes come from")  # fmt: skip
    parser.add_argument("--run", type=Path, default=Path("runs/chipnet"),
                        help="of attention (a ChipNet run) and gradcam")  # fmt: skip
    parser.add_argument("--backbone", default="resnet50", help="of saliency: as in train.py")
    parser.add_argument("--weights", default="imagenet", help="of it: imagenet, none or a file")
    parser.add_argument("--boxes", type=Path, help="csv of --source boxes")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="from preprocess.py")
    parser.add_argument("--image_dir", type=Path, help="originals [as preprocessed]")
    parser.add_argument("--output_dir", type=Path, help="where to write NAME/ [crops/ in data_dir]")
    parser.add_argument("--rule", choices=sorted(localize.RULES), default="component",
                        help="how a box is found in a map")  # fmt: skip
    parser.add_argument("--num_devs", type=util.number(float, -100, 100), default=1.5,
                        help="threshold of --rule original: mean + num_devs * std")  # fmt: skip
    parser.add_argument("--views", type=int, choices=(1, 2, 4, 8), default=4,
                        help="symmetries over which maps are averaged")  # fmt: skip
    parser.add_argument("--shifts", type=int, choices=(1, 2), default=2,
                        help="2: chips also shifted by half, for a map twice as fine")  # fmt: skip
    parser.add_argument("--limit", type=count, help="crop the first images: a dry run")
    parser.add_argument("--shard", type=util.shard, metavar="I/N", help="write every N-th image, "
                        "from I: one of N calls that share the work")  # fmt: skip
    parser.add_argument("--batch_size", type=count, help="images that networks see at a time "
                        "[16; 256 on a GPU]")  # fmt: skip
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off",
                        help="precision of the maps")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--workers", type=count, default=os.cpu_count(), help="threads")
    parser.add_argument("--overwrite", action="store_true", help="replace finished crops")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser(), models.ModelError, localize.SourceError)
