"""Cut what a network attends to out of the full-resolution originals.

Reads   --data_dir (preprocess.py), the originals (never written), and by --source: --run (a trained run), --backbone
        with --weights, or --boxes
Writes  --output_dir/NAME/: {train,test}_224.npy, train_wide_314.npy (for jitter in training), {train,test}_boxes.csv,
        {train,test}_depth_224.npy (--depth_dir), {train,test}_attention.npy, the networks that made the maps,
        crop.json, worth.json, montage.png. With
        --n_boxes K arrays hold K crops of an image, black where there is no place, and a csv has a row for every box

    python crop.py
    python crop.py --source saliency
    python crop.py --source attention --run runs/chipnet --rule original --num_devs 1.0
    python crop.py --run runs/scout --box_size 192
    python crop.py --source cam --run runs/resnet
    python crop.py --source boxes --boxes detector.csv
    python crop.py --source boxes --boxes detector.csv --margin .5 --depth_dir depth

A training image is cropped by the map of the fold that held it out; a test image by the mean map of all folds. Sources:
attention (a ChipNet, or a scout, which looks at the originals), saliency (no labels: what differs from the background
in the features of a pretrained network), attention*saliency (their product), cam or gradcam (any other trained run),
rollout (a vision transformer; see maps.py), boxes (a csv of image_name, x0, y0, x1, y1 in pixels of the originals,
turned upright).

Every file is decoded once, for all its crops. A stopped run goes on where it was when called again.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import localize
import models
import util
from localize import Box, Finder
from plumbing.arrays import Filling, PartialArray, Rows, array_path, open_array
from plumbing.cells import make_cells
from plumbing.data import CORNERS, Data, numbers, read_data, read_table
from plumbing.distributed import pick_device
from plumbing.figures import draw_row, new_figure, save_figure
from plumbing.files import copy, finish_output, open_output, provenance, sha256, write_json, write_table
from plumbing.guards import check_unseen, fold_weights
from plumbing.images import (
    Frame,
    configure_pillow,
    cut_depth,
    frame_of,
    name_key,
    read_crops,
    read_depth,
    read_square,
)
from plumbing.runs import Run, read_run
from util import FOLD, ID, INNER, PLACE, InputError

MONTAGE_ROWS = 8
WIDE = 1.4  # side of the crops from which jittered ones are cut, over the box's
WORTH = {8: "crops usually pay", 4: "crops may pay", 0: "crops did not pay"}  # by how much larger originals are
EDGE = 0.5  # pixels by which a given box may leave its image: detectors round


# ---------------------------------------------------------------- where maps or boxes come from
def is_scout(run: Run) -> bool:
    """Whether a run looks at cells of the originals."""
    return not run.is_blend and models.MODELS[run.config["args"]["model"]].scouts


def fill_defaults(args: argparse.Namespace, data: Data) -> Run | None:
    """Fill in what depends on the run, in place; returns the run that maps come from, if any. Raises InputError if
    arguments contradict each other."""
    source = localize.SOURCES.get(args.source)
    run = read_run(args.run) if args.source is None or (source and source.way) else None
    scout = run is not None and is_scout(run)
    args.source = args.source or ("attention" if scout else "attention*saliency")
    args.rule = args.rule or ("peak" if scout else "component")
    args.views = args.views or min(Finder.views, run.config["views"] if run else Finder.views)
    if (args.source == "boxes") != (args.boxes is not None):
        raise InputError("--source boxes and --boxes FILE go together; pass both or neither")
    if args.class_name is not None and (args.class_name not in data.task.names or run is None):
        raise InputError(f"--class {args.class_name} is no output of a trained run; pass {', '.join(data.task.names)}")
    if args.class_name is not None and args.source == "rollout":
        raise InputError("--class: a rollout is the same for all classes; leave it out, or take cam or gradcam")
    if args.layer is not None and args.source != "gradcam":
        raise InputError(f"--layer {args.layer} is for --source gradcam; pass both")
    if args.depth_dir is not None and args.n_boxes > 1:
        raise InputError("--depth_dir is for one box of an image; leave --n_boxes out")
    if args.box_size is not None and args.rule != "peak":
        raise InputError("--box_size is for --rule peak; pass both")
    if scout and args.source != "attention":
        raise InputError(f"--source {args.source} looks at small images, a scout at originals; pass --source attention")
    return run


def find_networks(run: Run, source: localize.Source, data: Data) -> dict[int, Path]:
    """Checkpoints of a run by fold. Raises InputError if they do not fit the source or saw what they should map."""
    run_dir, recipe = run.path, models.MODELS.get(run.config["args"].get("model"))  # a blend has none
    if recipe is None or run.config["crop"] is not None or not (recipe.scouts or recipe.inputs == ("whole",)):
        raise InputError(f"{run_dir} does not look at whole images: it cannot say where to crop; pass one that does")
    if hasattr(recipe.network, "attention") != (source.way == "attention"):
        raise InputError(f"--source {source.way} does not fit {run_dir}; pass a ChipNet for attention, another for cam")
    found = {k: run.checkpoint(k) for k in run.folds}
    for k, path in found.items():
        check_unseen(path, models.read_torch_file(path).get("trained_on"), data.folds_sha256, k)
    missing = ", ".join(str(k) for k in range(data.facts["n_folds"]) if k not in found)
    if missing:
        print(f"fold {missing} of {run_dir} is not trained: networks that saw its images crop them (oof = 0)")
    return found


def learn_saliencies(data: Data, path: Path, args: argparse.Namespace, device: torch.device) -> None:
    """Learn a Saliency per fold from the images of the other folds, and keep them in a checkpoint."""
    for k in range(data.facts["n_folds"]):
        fold_weights(args.weights, data, k)  # raises InputError if the backbone saw labels of fold k
    spec = models.Spec("resnet", args.backbone, data.size)
    torch.manual_seed(0)  # of --weights none
    network = models.build_model(spec, args.weights).to(device).eval()
    array, fold = open_array(data.array_path("train"), len(data.train), data.size), data.train[FOLD].to_numpy()
    parts = {}
    for k in range(data.facts["n_folds"]):
        saliency = localize.fit_saliency(network, array, np.flatnonzero(fold != k), device, seed=k)
        parts[str(k)] = {"weight": saliency.weight, "bias": saliency.bias}
    models.save_checkpoint(path, network, spec, saliency=parts)


def read_boxes(path: Path, table: pd.DataFrame, frame: str, n_boxes: int, margin: float) -> list[list[Box]]:
    """Boxes of a table's images from a csv, the first n_boxes of each, made square and enlarged by a margin; the whole
    frame for images that have none there."""
    given = read_table(path, CORNERS, unique=n_boxes == 1).dropna(subset=CORNERS, how="all")
    corners = np.column_stack([numbers(given, column, path) for column in CORNERS])
    found: dict[str, list] = {}
    for name, each in zip(given[ID].map(name_key), corners, strict=True):
        found.setdefault(name, []).append(each)
    boxes = []
    for name, width, height in table[[ID, "width", "height"]].itertuples(index=False, name=None):
        boxes.append([])
        for x0, y0, x1, y1 in found.get(name_key(name), [])[:n_boxes]:
            if not (-EDGE <= x0 < x1 <= width + EDGE and -EDGE <= y0 < y1 <= height + EDGE):
                where = f"{x0:g} {y0:g} {x1:g} {y1:g}, does not lie in its {width} x {height} px"
                raise InputError(f"{path}: the box of {name}, {where}; corners are pixels of the upright original")
            x, y, half = (x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0) / 2
            given = Box(x - half, y - half, x + half, y + half, inner=(x0, y0, x1, y1))
            boxes[-1].append(localize.enlarge(given, margin, (width, height)))
        boxes[-1] = boxes[-1] or [Box(*frame_of(width, height, frame), f"no box in {path.name}")]
    return boxes


# ---------------------------------------------------------------- crops of one split
class Cropper:
    """Maps, boxes and crops of one split: {split}_attention.npy and an array per size."""

    def __init__(self, split: str, data: Data, folder: Path, args: argparse.Namespace):
        self.split, self.folder, self.args = split, folder, args
        whole = data.tables()[split]
        self.table = whole[: args.limit]
        self.stored = data.cells.get(split) or Rows(data.array_path(split), len(whole))  # what networks look at
        self.sizes = {split: data.size}  # side of each array, in pixels
        if split == "train":
            self.sizes["train_wide"] = round(WIDE * data.size)
        self.paths = data.find_originals(split, args.image_dir, args.limit)
        self.originals = list(self.table[["width", "height"]].itertuples(index=False, name=None))
        self.boxes: list[list[Box]] = [[]] * len(self.table)  # of every image, best first
        if args.source == "boxes":
            self.boxes = read_boxes(args.boxes, self.table, data.facts["frame"], args.n_boxes, args.margin)
            if split == "train" and all(boxes[0].reason for boxes in self.boxes):
                raise InputError(f"{args.boxes} has a box of none of the training images; write names as in the table")

    def groups(self, finder: Finder | None) -> list[tuple[np.ndarray, list[int] | None, bool]]:
        """(rows, folds whose maps they are cropped by, whether these saw none of them): a training image gets the map
        of its fold, a test image and one of a fold without a network the mean of all."""
        if finder is None or self.split == "test":
            return [(np.arange(len(self.table)), None, True)]
        fold = self.table[FOLD].to_numpy()
        return [(np.flatnonzero(fold == k), [k] if k in finder.sources else None, k in finder.sources)
                for k in sorted(set(fold))]  # fmt: skip

    def fill(self, finder: Finder | None, device: torch.device) -> None:
        """Write the rows that are not there yet."""
        n, args, crops = len(self.table), self.args, {}
        several = (args.n_boxes,) if args.n_boxes > 1 else ()
        shape = (0, 0, 0) if finder is None else self._find_shape(finder, device)
        for name, side in self.sizes.items():
            crops[name] = PartialArray(array_path(self.folder, name, side), (n, *several, side, side, 3))
        self.arrays = dict(crops)
        if args.depth_dir is not None:
            path = array_path(self.folder, f"{self.split}_depth", self.sizes[self.split])
            self.arrays["depth"] = PartialArray(path, (n, *crops[self.split].view().shape[1:]))
        if finder is not None:
            path = self.folder / f"{self.split}_attention.npy"
            self.arrays["attention"] = PartialArray(path, (n, *shape[1:]), np.float32)
        filling = Filling(self.folder / f"{self.split}_done.npy", list(self.arrays.values()), n)

        def work(row: int, attention: np.ndarray | None) -> int:
            size = self.originals[row]
            boxes = self.boxes[row] or finder.boxes(attention, size)
            boxes = {name: [box if name == self.split else localize.widen(box, WIDE, size) for box in boxes]
                     for name in crops}  # fmt: skip
            corners = [box.corners for each in boxes.values() for box in each]
            sides = [side for name, side in self.sizes.items() for _ in boxes[name]]
            pixels = iter(read_crops(self.paths[row], corners, sides, size))
            for name, array in crops.items():
                found = np.stack([next(pixels) for _ in boxes[name]])
                filled = np.concatenate([found, np.zeros((args.n_boxes - len(found), *found.shape[1:]), np.uint8)])
                array.write(row, filled)  # a place that does not exist is black
            if attention is not None:
                self.arrays["attention"].write(row, attention)
            if "depth" in self.arrays:
                depth, box = read_depth(args.depth_dir, self.table[ID].iloc[row]), boxes[self.split][0]
                self.arrays["depth"].write(row, cut_depth(depth, box.corners, self.sizes[self.split], size))
            return 1

        with tqdm(total=n, desc=f"crop {self.split}", unit="image") as bar:
            for rows, folds, _ in self.groups(finder):

                def maps_of(chunk: np.ndarray, folds=folds) -> np.ndarray:
                    maps = []
                    for start in range(0, len(chunk), args.batch_size):
                        part = chunk[start : start + args.batch_size]
                        sizes = [self.originals[row] for row in part]
                        maps.append(finder.maps(self.stored[part], device, sizes, folds, args.amp, args.batch_size))
                    return np.concatenate(maps)

                filling.run(rows, work, args.workers, bar, maps_of if finder is not None else None)

    def _find_shape(self, finder: Finder, device: torch.device) -> tuple[int, ...]:
        """Shape of the map of an image (1, h, w). Raises InputError if it has fewer cells than boxes are asked for."""
        shape = finder.maps(self.stored[[0]], device, self.originals[:1], amp=self.args.amp).shape
        if self.args.n_boxes > shape[1] * shape[2]:
            cells = f"the map has {shape[1]} x {shape[2]} cells"
            raise InputError(f"--n_boxes {self.args.n_boxes}: {cells}; pass fewer")
        return shape

    def finish(self, finder: Finder | None) -> list[Path]:
        """Give the arrays their names and write the table of boxes; returns the files written."""
        maps = self.arrays["attention"].view() if finder is not None else None
        if maps is not None:
            self.boxes = [finder.boxes(maps[row], size) for row, size in enumerate(self.originals)]
        for array in self.arrays.values():
            array.finish(np.arange(len(self.table)))
        of_row = np.repeat(np.arange(len(self.boxes)), list(map(len, self.boxes)))
        flat = [box for boxes in self.boxes for box in boxes]
        rows = pd.DataFrame([asdict(box) for box in flat]).rename(columns={"reason": "fallback"})
        rows[list(INNER)] = [box.inner or box.corners for box in flat]
        rows.insert(0, ID, self.table[ID].to_numpy()[of_row])
        rows["box"], rows["oof"] = [i for boxes in self.boxes for i in range(len(boxes))], 1
        for chosen, _, unseen in self.groups(finder):
            rows.loc[np.isin(of_row, chosen), "oof"] = int(unseen)
        rows[list(PLACE)] = place_in_wide(flat, [self.originals[row] for row in of_row])
        path = self.folder / f"{self.split}_boxes.csv"
        number = ["box"] if self.args.n_boxes > 1 else []
        write_table(path, rows[[ID, *number, *CORNERS, "oof", "fallback", "confidence", *PLACE, *INNER]])
        finer = np.median(self.table[["width", "height"]].min(axis=1) / [boxes[0].side for boxes in self.boxes])
        whole = sum(boxes[0].reason != "" for boxes in self.boxes)
        print(f"{self.split}: {len(rows)} crops, median {finer:.2f}x finer, {whole} whole squares")
        return [path, *(array.path for array in self.arrays.values())]


def place_in_wide(boxes: list[Box], sizes: list[tuple[int, int]]) -> np.ndarray:
    """Where boxes lie in their wide crops: x, y and side in fractions of these (N, 3)."""
    wides = [localize.widen(box, WIDE, size) for box, size in zip(boxes, sizes, strict=True)]
    place = [((box.x0 - wide.x0) / wide.side, (box.y0 - wide.y0) / wide.side, box.side / wide.side)
             for box, wide in zip(boxes, wides, strict=True)]  # fmt: skip
    return np.clip(place, 0, 1)  # rounding


def judge_worth(data: Data, cropper: Cropper) -> dict:
    """How much finer than the whole image the best crops are, in words too; see docs/gain.md."""
    sides = np.array([boxes[0].side for boxes in cropper.boxes])
    frames = [frame_of(*size, data.facts["frame"]) for size in cropper.originals]
    factor = np.median([right - left for left, _, right, _ in frames]) / data.size
    facts = {"factor": factor, "box_side": np.median(sides), "box_side_in_input": np.median(sides) / factor,
             "cropped": np.mean([boxes[0].reason == "" for boxes in cropper.boxes])}  # fmt: skip
    says = next(says for least, says in WORTH.items() if factor >= least)
    wide = facts["box_side_in_input"]
    print(f"originals are {factor:.1f} times the input, and boxes {wide:.0f} px wide there: {says}; see docs/gain.md")
    return facts | {"says": says}


def plot_montage(path: Path, data: Data, cropper: Cropper, frame: Frame) -> None:
    """Picture of the first training images of every class: box, attention and crop."""
    table, n = cropper.table, len(cropper.table)
    crops = open_array(cropper.arrays["train"].path, n)
    maps = open_array(cropper.arrays["attention"].path, n, dtype=np.float32) if "attention" in cropper.arrays else None
    strata = data.task.strata(data.target[:n])
    some = -(-MONTAGE_ROWS // len(np.unique(strata)))
    rows = np.concatenate([np.flatnonzero(strata == stratum)[:some] for stratum in np.unique(strata)[::-1]])
    figure = new_figure(figsize=(7, 2.2 * len(rows)))
    for axes, row in zip(figure.subplots(len(rows), 3, squeeze=False), rows, strict=True):
        boxes, (left, top, right, _) = cropper.boxes[row], frame_of(*cropper.originals[row], frame)
        inside = [Box(b.x0 - left, b.y0 - top, b.x1 - left, b.y1 - top) for b in boxes]  # of the stored square
        box = boxes[0]
        attention = None if maps is None else localize.upsample(maps[row])
        picture = read_square(cropper.paths[row], data.size, frame=frame)[0]
        crop = np.concatenate(crops[row][: len(boxes)], axis=1) if crops.ndim == 5 else crops[row]
        draw_row(axes, picture, (right - left, right - left), inside, attention, crop)
        axes[0].set_title(f"{table[ID].iloc[row]}, {data.task.describe(data.target[row])}", fontsize=8)
        axes[1].set_title(box.reason or f"confidence {box.confidence:.2f}", fontsize=8)
        axes[2].set_title(f"crop, {(right - left) / box.side:.1f}x finer", fontsize=8)
    save_figure(path, figure)


# ---------------------------------------------------------------- command
def default_name(args: argparse.Namespace, source: localize.Source | None) -> str:
    """Name of the crops' directory: what they were cut by."""
    if source is None:
        return args.boxes.stem
    if source.way is None:
        return args.source
    parts = [args.run.resolve().name, args.source, (args.class_name or "").replace("/", "_")]
    return "_".join(part for part in parts if part not in ("", "attention*saliency"))


def main(args: argparse.Namespace) -> Path:
    """Crop the train and test images; returns the directory of the crops."""
    configure_pillow()
    device, data = pick_device(args.device), read_data(args.data_dir)
    run = fill_defaults(args, data)
    source = localize.SOURCES.get(args.source)
    args.batch_size = args.batch_size or (16 if device.type == "cpu" else 256)
    folder = (args.output_dir or data.directory / "crops") / default_name(args, source)
    found = find_networks(run, source, data) if run else {}
    if run and is_scout(run):
        scout = models.load_checkpoint(next(iter(found.values())), device)[0]
        data.cells = make_cells(scout, data, args.workers, args.image_dir)
    croppers = [Cropper(split, data, folder, args) for split in data.tables()]
    how = {key: getattr(args, key) for key in ("source", "rule", "views", "shifts", "amp", "class_name", "layer")}
    how["num_devs"] = args.num_devs if args.rule == "original" else None
    how |= {"centre": args.centre if args.rule == "component" else None, "box_size": args.box_size}
    how |= {"n_boxes": args.n_boxes, "margin": args.margin}
    how["depth_dir"] = args.depth_dir and str(args.depth_dir.resolve())
    how["frame"] = scout.scout_size if data.cells else data.facts["frame"]
    trained = {f"fold{k}_network.pt": sha256(path) for k, path in found.items()}
    settings = how | {"folds_sha256": data.folds_sha256, "arrays": data.facts["sha256"], "limit": args.limit,
                      "backbone": args.backbone, "weights": args.weights, "trained": trained,
                      "boxes": args.boxes and sha256(args.boxes)}  # fmt: skip
    open_output(folder, "crop.json", args.overwrite, settings)

    # what finds the boxes stays beside the crops, so that runs on them can find boxes in new images
    for k, path in found.items():
        copy(path, folder / f"fold{k}_network.pt")
    networks = dict(trained)
    if source and source.saliency:
        if args.overwrite or not (folder / "saliency.pt").exists():
            learn_saliencies(data, folder / "saliency.pt", args, device)
        networks["saliency.pt"] = sha256(folder / "saliency.pt")
    facts = how | {"run": args.run if found else None, "boxes": args.boxes, "networks": networks,
                   "trained": bool(found), "folds": sorted(found) or list(range(data.facts["n_folds"])),
                   "folds_sha256": data.folds_sha256, "wide_size": croppers[0].sizes["train_wide"]}  # fmt: skip
    finder = Finder.load(folder, facts, device) if source else None
    for cropper in croppers:
        cropper.fill(finder, device)
    written = [path for cropper in croppers for path in cropper.finish(finder)]
    plot_montage(folder / "montage.png", data, croppers[0], how["frame"])
    write_json(folder / "worth.json", judge_worth(data, croppers[0]))
    hashes = {path.name: sha256(path) for path in written} | networks
    finish_output(folder, "crop.json", facts | {"sha256": hashes} | provenance())
    print(f"wrote {folder}")
    return folder


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__, "data_dir", "amp", "device", "workers", "limit", "overwrite")
    add, count = parser.add_argument, util.COUNT
    add("--source", choices=(*localize.SOURCES, "boxes"), help="of maps or boxes [attention*saliency; scout attention]")
    add("--run", type=Path, default=Path("runs/chipnet"), help="of attention (a ChipNet or a scout), cam, ...")
    add("--class", dest="class_name", help="output that attention, cam or gradcam looks for [as predicted]")
    add("--layer", help="of --source gradcam: module of the backbone [its last map]")
    add("--backbone", default="resnet50", help="of the saliency: as in train.py")
    add("--weights", default="imagenet", help="of it: imagenet, none or a file")
    add("--boxes", type=Path, help="csv of --source boxes")
    add("--image_dir", type=Path, nargs="+", help="originals [as preprocessed]")
    add("--output_dir", type=Path, help="where to write NAME/ [crops/ in data_dir]")
    add("--rule", choices=sorted(localize.RULES), help="how a box is found in a map [component; of a scout peak]")
    add("--box_size", type=count, help="--rule peak: side of boxes, in pixels of the originals [4 cells of the map]")
    add("--n_boxes", type=count, default=1, help="places to cut out of an image, at most")
    add("--margin", type=util.number(float, 0, 10), default=0.0, help="added to a box on each side, in sides")
    add("--depth_dir", type=Path, help="depth maps by image name, .npy or 16-bit .png, to be cut out too")
    add("--num_devs", type=util.number(float, -100, 100), default=1.5, help="--rule original: mean + num_devs * std")
    add("--centre", type=util.number(float, 0, 10), default=localize.CENTRE, help="--rule component: width of "
        "the prior that subjects are in the centre, in sides; 0: none")
    add("--views", type=int, choices=(1, 2, 4, 8), help="symmetries over which maps are averaged [4; of a run with "
        "--augment upright 1]")
    add("--shifts", type=int, choices=(1, 2), default=2, help="2: chips also shifted by half, for a map twice as fine")
    add("--batch_size", type=count, help="images that networks see at a time [16; 256 on a GPU]")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
