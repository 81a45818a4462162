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

References:
    Pang et al., Rethinking Feature Extraction: Gradient-Based Localized Feature Extraction for End-to-End Surgical
    Downstream Tasks, RA-L 2022: the three routes, and with --pool original their 512 numbers.
    He et al., Mask R-CNN, ICCV 2017: RoIAlign.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from torchvision.ops import roi_align
from tqdm import tqdm

import util
from inference import BATCH, CHUNK, Images, Single, list_images, read_chunks, read_meta
from localize import Box, class_boxes, seen_part
from maps import WAYS, check_way, default_way, every, feature_layer, read_features
from plumbing.backbones import find_stages
from plumbing.data import CORNERS, read_data
from plumbing.distributed import pick_device
from plumbing.files import atomic, finish_output, open_output, provenance, sha256, write_table
from plumbing.images import configure_pillow, read_crops
from plumbing.runs import Run, read_run
from util import FOLD, ID, InputError

COLUMNS = [ID, FOLD, "class", "box", *CORNERS, "confidence", "probability"]
NOTHING = np.empty((0, 0), np.float32)
NUMBERS = 512  # of --pool original
FINER = {16: 8, 4: 16, 1: 32}  # --layer size: stride of the map for boxes up to 1/16, 1/4, all of what is seen


# ---------------------------------------------------------------- features of places
def pool_cells(features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean of a feature map (C, h, w) weighted by each of K maps (K, h, w), not negative: (K, C)."""
    return torch.einsum("chw,khw->kc", features, weight) / weight.sum(dim=(1, 2)).unsqueeze(1)


def heat_weights(heat: torch.Tensor, inside: torch.Tensor, t_roi: float | None) -> torch.Tensor:
    """What pool_cells weighs by, of signed maps (K, h, w): what speaks for a class inside the image (h, w), or with
    t_roi the cells where it is above t_roi of its maximum; all of the image where nothing does."""
    weight = heat.clamp_min(0) * inside
    if t_roi is not None:
        weight = (weight > t_roi * weight.amax(dim=(1, 2), keepdim=True)).to(weight.dtype)
    return torch.where(weight.sum(dim=(1, 2), keepdim=True) > 0, weight, inside.to(weight.dtype))


def to_numbers(features: torch.Tensor, cells: int) -> torch.Tensor:
    """The original's 512 numbers of regions (n, C, p, p), p = cells: channels averaged in groups to 512 / p^2."""
    n, channels = features.shape[:2]
    flat = features.reshape(n, channels, -1).transpose(1, 2)  # (n, p * p, C)
    return F.adaptive_avg_pool1d(flat, NUMBERS // cells**2).transpose(1, 2).flatten(1)


class Place(NamedTuple):
    """What is known of an image when its places are read."""

    path: Path
    view: tuple  # square of the original that the network sees: x0, y0, x1, y1
    size: tuple[int, int]  # of the original: width, height
    fold: int
    features: dict[str, torch.Tensor]  # by layer (C, h, w)


class Extractor:
    """Rows and vectors of images by the networks of a run. args: of the command line. Raises InputError if the networks
    cannot serve the route."""

    def __init__(self, single: Single, args: argparse.Namespace):
        single.check_sees_one()
        network = next(iter(single.networks.values()))
        self.single, self.args, self.way = single, args, check_way(args.way or default_way(network), network)
        self.ways = {k: WAYS[self.way](network) for k, network in single.networks.items()}
        image = torch.zeros(1, 3, single.size, single.size, dtype=torch.uint8, device=single.device)
        name = "" if self.way == "attention" else feature_layer(network, image)
        self.layers = {32: name}  # by stride; all but --layer size read one
        if self.way == "attention" and args.layer is not None:
            raise InputError(f"--layer {args.layer}: chips and cells are the only map of {single.name}; leave it out")
        if single.scout is not None and args.route == "crop":
            raise InputError(f"--route crop: {single.name} reads cells of pictures, not crops; pass heat or roi")
        if args.layer == "size":
            found = find_stages(network, image, tuple(FINER.values()))
            self.layers = {stride: found[stride] for stride in FINER.values()}
        elif args.layer is not None:
            self.layers = {32: args.layer}
            if args.layer not in dict(network.backbone.named_modules()):
                raise InputError(f"--layer {args.layer}: the backbone has no such module; {name} is the default")

    def extract(self, images: Images, k: int) -> tuple[pd.DataFrame, np.ndarray]:
        """Table of rows (COLUMNS) and their vectors float32 (rows, D) by the network of fold k."""
        task, rows, vectors, row = self.single.tasks[k], [], [], 0
        batches = self.single.batches(images, [k])[k]
        views = self.single.views(images)
        for pictures, meta in batches:
            pictures = pictures.to(self.single.device)
            explain = partial(self.ways[k].explain, pictures, every, meta)
            network = self.single.networks[k]
            (logit, heat), found = read_features(network, pictures, list(self.layers.values()), explain)
            prob = task.prob(logit.float().cpu().double()).numpy()
            for i in range(len(prob)):
                features = {name: one[i].float() for name, one in found.items()}
                place = Place(images.paths[row], views[row], images.sizes[row], k, features)
                chosen = np.flatnonzero(prob[i] >= self.args.t_class) if task.probabilistic else range(len(prob[i]))
                for c in chosen:
                    boxes, pooled = self.extract_class(place, heat[i, c].float())
                    vectors.append(pooled)
                    rows += [(images.table[ID].iloc[row], k, task.names[c], number, *box.corners, box.confidence,
                              prob[i, c]) for number, box in enumerate(boxes)]  # fmt: skip
                row += 1
        vectors = [one for one in vectors if len(one)]
        return pd.DataFrame(rows, columns=COLUMNS), np.concatenate(vectors) if vectors else NOTHING

    def pool(self, regions: torch.Tensor) -> torch.Tensor:
        """Vectors (n, D) of regions (n, C, p, p): their mean, or the original's numbers."""
        if self.args.pool == "original":
            return to_numbers(F.adaptive_avg_pool2d(regions, self.args.cells), self.args.cells)
        return regions.mean(dim=(2, 3))

    def extract_class(self, place: Place, heat: torch.Tensor) -> tuple[list[Box], np.ndarray]:
        """Boxes of a class by its map (h, w), and their vectors (boxes, D)."""
        boxes = class_boxes(heat.cpu().numpy(), place.view, place.size, self.args.t_roi)
        if self.args.route == "heat":
            corners = np.clip(place.view, 0, [*place.size, *place.size]).tolist()
            boxes = [Box(*corners, confidence=max((box.confidence for box in boxes), default=0.0))]
            found = self.by_heat(place, heat)
        elif not boxes:
            return [], NOTHING
        else:
            found = self.by_roi(place, boxes) if self.args.route == "roi" else self.by_crop(place, boxes)
        return boxes, found.cpu().numpy()

    def by_heat(self, place: Place, heat: torch.Tensor) -> torch.Tensor:
        """Route heat: (1, D)."""
        (features,) = place.features.values()
        if heat.shape != features.shape[1:]:
            heat = F.interpolate(heat[None, None], size=features.shape[1:], mode="bilinear")[0, 0]
        inside = torch.from_numpy(seen_part(place.view, place.size, features.shape[1])).to(features.device)
        weight = heat_weights(heat[None], inside, self.args.t_roi if self.args.heat == "cut" else None)
        return self.pool(pool_cells(features, weight)[..., None, None])

    def by_roi(self, place: Place, boxes: list[Box]) -> torch.Tensor:
        """Route roi: (boxes, D), each from the layer for its size."""
        left, top, right, _ = place.view
        cells, found = self.args.cells if self.args.pool == "original" else 1, []
        for box in boxes:
            share = (box.x1 - box.x0) * (box.y1 - box.y0) / (right - left) ** 2
            stride = next(stride for part, stride in FINER.items() if part == 1 or share < 1 / part)
            features = place.features[self.layers.get(stride, self.layers[32])]
            corners = np.subtract(box.corners, [left, top, left, top]) * features.shape[1] / (right - left)
            corners = torch.from_numpy(corners[None]).to(features)
            found.append(self.pool(roi_align(features[None], [corners], cells, aligned=True)))
        return torch.cat(found)

    def by_crop(self, place: Place, boxes: list[Box]) -> torch.Tensor:
        """Route crop: (boxes, D), of crops from the original."""
        network, layer, found = self.single.networks[place.fold], self.layers[32], []
        sides = [self.single.size] * len(boxes)
        crops = read_crops(place.path, [box.corners for box in boxes], sides, place.size)
        for part in torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).to(self.single.device).split(BATCH):
            found.append(self.pool(read_features(network, part, [layer])[1][layer].float()))
        return torch.cat(found)


# ---------------------------------------------------------------- images, chunk by chunk
def find_parts(args: argparse.Namespace, run: Run, single: Single) -> dict[str, tuple[list, list]]:
    """What is to be read, by split: names in their order, and groups (folds of the networks that read, files by name,
    their metadata)."""
    if args.images:
        paths = dict(list(list_images(args.images).items())[: args.limit])
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
        if split == "train":
            groups = [([k], (table[FOLD] == k).to_numpy()) for k in run.folds]
        parts[split] = table[ID].tolist(), [
            (folds, dict(zip(table[ID][rows], files[rows], strict=True)), table[rows]) for folds, rows in groups
        ]
    return parts


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


def join_parts(folder: Path, split: str, paths: list[Path], names: list[str], classes: list[str]) -> pd.DataFrame:
    """Bring the chunks of a split into the order of the images, their folds, classes and boxes; one chunk's vectors are
    in memory at a time."""
    tables = [pd.read_csv(path.with_suffix(".csv.part"), dtype={ID: str, "class": str}) for path in paths]
    table = pd.concat(tables, ignore_index=True)
    place = {name: i for i, name in enumerate(names)}
    number = table["class"].map({name: i for i, name in enumerate(classes)})
    order = np.lexsort([table["box"], number, table[FOLD], table[ID].map(place)])
    at, start = np.argsort(order), 0
    width = max(np.load(path, mmap_mode="r", allow_pickle=False).shape[1] for path in paths)
    with atomic(folder / f"{split}.npy") as temporary:
        array = np.lib.format.open_memmap(temporary, "w+", np.float32, (len(table), width))
        for path in paths:
            found = np.load(path, allow_pickle=False)
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
    settings["images"] = {split: len(names) for split, (names, _) in parts.items()}
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
    if not any(np.load(path, mmap_mode="r", allow_pickle=False).size for each in files.values() for path in each):
        raise InputError("no image has a class so probable with a map that says anything; pass --overwrite and a lower "
                         f"--t_class than {args.t_class:g}")  # fmt: skip
    for split, (names, _) in parts.items():
        found = join_parts(folder, split, files[split], names, list(run.task.names))
        written += [f"{split}.npy", f"{split}.csv"]
        counts[split] = {"images": len(names), "without": len(names) - found[ID].nunique(), "rows": len(found)}
    hashes = {name: sha256(folder / name) for name in written}
    facts = settings | {"way": extractor.way, "rows": counts, "sha256": hashes} | provenance()
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
