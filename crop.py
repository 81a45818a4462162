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
"""

import argparse
import os
from contextlib import ExitStack
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
WIDE = 1.4  # side of the crops from which jittered ones are cut, over the box's
CORNERS = ["x0", "y0", "x1", "y1"]


# ---------------------------------------------------------------- sources of maps
def load_networks(run_dir: Path, source: str, data: util.Data, device: torch.device) -> dict:
    """Networks of a run by fold. Raises InputError where they do not fit the source or data."""
    config = util.read_config(run_dir)
    recipe = models.MODELS.get(config["args"].get("model"))
    if "attention" in source and (recipe is None or recipe.network is not models.ChipNet):
        raise InputError(f"{run_dir} is no ChipNet run: it has no attention to crop by")
    if recipe is None or recipe.inputs != ("whole",):
        raise InputError(f"{run_dir} does not look at whole images: it cannot say where to crop")
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


def fit_saliencies(data: util.Data, array: np.ndarray, output_dir: Path, args, device) -> dict:
    """A Saliency by fold, learned from the images of the other folds; saved in saliency.pt."""
    spec = {
        "model": "resnet", "backbone": args.backbone, "image_size": data.size, "meta_dim": 0,
        "hidden": 1, "dropout": 0.0, "gates": None,
    }  # fmt: skip
    network = models.build_model(spec, args.weights).to(device).eval()
    fold = data.train[FOLD].to_numpy()
    found = {
        k: localize.fit_saliency(network, array, np.flatnonzero(fold != k), device, seed=k)
        for k in range(data.facts["n_folds"])
    }
    parts = {str(k): {"weight": s.weight, "bias": s.bias} for k, s in found.items()}
    models.save_checkpoint(output_dir / "saliency.pt", network, spec, saliency=parts)
    return found


def make_sources(data: util.Data, output_dir: Path, args, device: torch.device) -> dict:
    """Sources of maps by fold, as --source asks for; none for boxes."""
    networks, saliencies = {}, {}
    if args.source in localize.NETWORK_SOURCES:
        networks = load_networks(args.run, args.source, data, device)
    util.claim_dir(output_dir, "crop.json", args.overwrite)
    if "saliency" in args.source:
        path = util.array_path(data.directory, "train", data.size)
        array = util.open_array(path, len(data.train))
        saliencies = fit_saliencies(data, array, output_dir, args, device)
    return {
        k: localize.make_source(args.source, networks.get(k), saliencies.get(k), args.shifts)
        for k in (networks or saliencies)
    }


def train_maps(sources: dict, array: np.ndarray, fold: np.ndarray, device, views: int):
    """Maps of the training images and whether they are out of fold: (N, h, w), bool (N,)."""
    maps, oof = None, np.isin(fold, list(sources))
    for k in sorted(set(fold)):
        rows = np.flatnonzero(fold == k)
        chosen = [sources[k]] if k in sources else list(sources.values())
        part = localize.attention_maps(chosen, array[rows], device, views, desc=f"fold {k}")
        if maps is None:
            maps = np.empty((len(array), *part.shape[1:]), np.float32)
        maps[rows] = part
    return maps, oof


# ---------------------------------------------------------------- boxes and crops
def read_boxes(path: Path, table: pd.DataFrame) -> list[Box]:
    """Boxes of a table's images from a csv, made square; the whole square where it has none."""
    given = util.read_table(path, CORNERS)
    for column in CORNERS:
        given[column] = pd.to_numeric(given[column], errors="coerce")
    given = given.dropna(subset=CORNERS).set_index(ID)[CORNERS]
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
                f"{width} x {height} px; corners are pixels of the original"
            )
        x, y, half = (x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0) / 2
        square = Box(x - half, y - half, x + half, y + half)
        boxes.append(localize.widen(square, 1.0, (width, height)))  # shifted into the image
    return boxes


def write_crops(
    output_dir: Path, split: str, table: pd.DataFrame, boxes: list[Box], data: util.Data, args
) -> dict[str, int]:
    """Write the crops of a table in its order, for "train" also the wide ones; their sizes."""
    image_dir, size = args.image_dir or Path(data.facts["image_dir"]), data.size
    index = util.index_images(image_dir)
    for name in table[ID]:
        if name not in index:
            raise InputError(f"{image_dir} has no image named {name!r}; check --image_dir")
    sizes = {split: size}
    if split == "train":
        sizes["train_wide"] = round(WIDE * size)

    def work(row: int) -> None:
        name, width, height = table[[ID, "width", "height"]].iloc[row]
        wide = localize.widen(boxes[row], WIDE, (width, height))
        both = [boxes[row], wide][: len(sizes)]
        crops = util.read_crops(index[name], both, list(sizes.values()), (width, height))
        for array, crop in zip(arrays, crops, strict=True):
            array[row] = crop

    with ExitStack() as stack:
        arrays = [
            stack.enter_context(
                util.new_array(util.array_path(output_dir, name, side), (len(table), side, side, 3))
            )
            for name, side in sizes.items()
        ]
        util.run_threads(work, range(len(table)), args.workers, f"crop {split}")
    return sizes


def place_in_wide(boxes: list[Box], table: pd.DataFrame) -> np.ndarray:
    """Where boxes lie in their wide crops: x, y and side in fractions of these (N, 3)."""
    places = []
    for box, size in zip(boxes, table[["width", "height"]].to_numpy(), strict=True):
        wide = localize.widen(box, WIDE, tuple(size))
        offset = box.x0 - wide.x0, box.y0 - wide.y0, box.side
        places.append(np.array(offset) / wide.side)
    return np.array(places)


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
        attention = None if maps is None else maps[row]
        localize.draw_row(axes, whole[row], (short, short), inside, attention, crops[row])
        label = "positive" if table[TARGET].iloc[row] else "negative"
        axes[0].set_title(f"{table[ID].iloc[row]}, {label}", fontsize=8)
        axes[1].set_title(box.reason or f"confidence {box.confidence:.2f}", fontsize=8)
        axes[2].set_title(f"crop, {short / box.side:.1f}x finer", fontsize=8)
    util.save_figure(path, figure)


def crop_split(split: str, sources: dict, data: util.Data, output_dir: Path, args, device) -> dict:
    """Write the maps, boxes and crops of one split; returns the sizes of its arrays."""
    table = data.tables()[split]
    array = util.open_array(util.array_path(data.directory, split, data.size), len(table))
    array, table = array[: args.limit], table[: args.limit]
    maps, oof = None, np.ones(len(table), dtype=bool)  # no network saw a test image
    if args.source == "boxes":
        boxes = read_boxes(args.boxes, table)
    else:
        if split == "train":
            maps, oof = train_maps(sources, array, table[FOLD].to_numpy(), device, args.views)
        else:
            maps = localize.attention_maps(list(sources.values()), array, device, args.views)
        sizes = table[["width", "height"]].itertuples(index=False, name=None)
        boxes = [
            localize.find_box(attention, size, args.rule, args.num_devs)
            for attention, size in zip(maps, sizes, strict=True)
        ]
        with util.atomic(output_dir / f"{split}_attention.npy") as temporary:
            with open(temporary, "wb") as file:
                np.save(file, maps, allow_pickle=False)
    rows = pd.DataFrame([asdict(box) for box in boxes]).rename(columns={"reason": "fallback"})
    rows.insert(0, ID, table[ID].to_numpy())
    rows["oof"] = oof.astype(int)
    rows[list(util.PLACE)] = place_in_wide(boxes, table)
    columns = [ID, *CORNERS, "oof", "fallback", "confidence", *util.PLACE]
    util.write_table(output_dir / f"{split}_boxes.csv", rows[columns])
    written = write_crops(output_dir, split, table, boxes, data, args)
    if split == "train":
        plot_montage(output_dir / "montage.png", data, output_dir, table, boxes, maps)
    short = table[["width", "height"]].min(axis=1).to_numpy()
    finer = np.median(short / [box.side for box in boxes])
    whole = sum(box.reason != "" for box in boxes)
    print(f"{split}: {len(table)} crops, median {finer:.2f}x finer, {whole} whole squares")
    return written


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
    data = util.read_data(args.data_dir)
    output_dir = (args.output_dir or data.directory / "crops") / default_name(args)
    sources = make_sources(data, output_dir, args, device)
    arrays = {}
    for split in data.tables():
        arrays |= crop_split(split, sources, data, output_dir, args, device)
    paths = [util.array_path(output_dir, name, size) for name, size in arrays.items()]
    checkpoints = {}
    if args.source in localize.NETWORK_SOURCES:
        checkpoints = {f"fold{k}": util.sha256(args.run / f"fold{k}_best.pt") for k in sources}
    facts = {
        key: getattr(args, key)
        for key in ("source", "run", "boxes", "rule", "num_devs", "views", "shifts")
    }
    facts |= {
        "folds": sorted(sources),
        "folds_sha256": util.folds_sha256(data.train),
        "wide_size": arrays["train_wide"],
        "sha256": {path.name: util.sha256(path) for path in paths},
        "checkpoints": checkpoints,
        **util.provenance(),
    }
    util.write_json(output_dir / "crop.json", facts)
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
    parser.add_argument("--num_devs", type=float, default=1.5,
                        help="threshold of --rule original: mean + num_devs * std")  # fmt: skip
    parser.add_argument("--views", type=int, choices=(1, 2, 4, 8), default=4,
                        help="symmetries over which maps are averaged")  # fmt: skip
    parser.add_argument("--shifts", type=int, choices=(1, 2), default=2,
                        help="2: chips also shifted by half, for a map twice as fine")  # fmt: skip
    parser.add_argument("--limit", type=count, help="crop the first images: a dry run")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--workers", type=count, default=os.cpu_count(), help="threads")
    parser.add_argument("--overwrite", action="store_true", help="replace finished crops")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser(), models.ModelError, localize.SourceError)
