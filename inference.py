"""A finished run or blend as what predicts new images: as the training images were made, so are they.

predictor = open_predictor(read_run(Path("runs/ensemble")), device)
for images in read_chunks(list_images([folder]), table, predictor, "fail"):
    predictor.predict(images, found := {})
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

import models
import util
from blends import BLENDS, Weighted, average_of
from localize import Box, Finder, upsample
from places import Extractor, widen
from plumbing.cells import Bag, read_cells, split
from plumbing.data import MetaEncoder, read_table
from plumbing.figures import draw_picture, draw_row, new_figure
from plumbing.files import check_hashes
from plumbing.images import (
    SUFFIXES,
    Frame,
    ImageIndex,
    box_raster,
    cut_depth,
    frame_of,
    hide_outside,
    name_key,
    read_crops,
    read_depth,
    read_image,
    read_square_or_skip,
)
from plumbing.runs import FINDER, STACK, Run
from tasks import task_of
from util import BOX_SIDE, FOLD, ID, InputError

CHUNK = 64  # images in memory at a time
BATCH = 32  # images that a network sees at a time


@dataclass
class Look:
    """Where a run looked: maps (N, h, w) of a frame, boxes of every image, best first, and crops (N, K, S, S, 3), black
    where there is no box. weights: of the boxes in the prediction (N, K)."""

    maps: np.ndarray
    boxes: list[list[Box]]
    weights: np.ndarray
    crops: np.ndarray
    frame: Frame


def read_thumbnail(path: Path, side: int) -> np.ndarray:
    """Picture of an image file: uint8 (H, W, 3), at most `side` pixels long."""
    image = read_image(path, side)[0]
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image)


def draw_look(path: Path, size: tuple[int, int], look: Look | None, row: int, side: int):
    """Figure of an image file of `size` (width, height), at most `side` pixels long: with its boxes, map and crops, if
    there is a look, of which it is a row."""
    image, figure = read_thumbnail(path, side), new_figure(figsize=(9, 3.2))
    if look is None:
        draw_picture(figure.subplots(), image, size)
    else:
        boxes, axes = look.boxes[row], figure.subplots(1, 3)
        crops = np.concatenate(look.crops[row, : len(boxes)], axis=1)
        draw_row(axes, image, size, boxes, upsample(look.maps[row]), crops, look.frame)
        for axis, title in zip(axes, ("box", boxes[0].reason or "map", "crop"), strict=True):
            axis.set_title(title, fontsize=9)
    return figure


@dataclass
class Images:
    """Images on their way through the networks."""

    table: pd.DataFrame  # image_name, and metadata if given
    paths: list[Path]
    squares: np.ndarray  # uint8 (N, S, S, 3)
    sizes: list[tuple[int, int]]  # of the originals, (width, height)
    looks: dict[str, Look] = field(default_factory=dict)  # by what found them: members of a blend may share one
    cells: dict[str, Bag] = field(default_factory=dict)  # by the scout that made them

    def seen_by(self, scout: models.Scout | None) -> np.ndarray | Bag:
        """What networks look at: the squares, or for a scout the cells of the originals, made once."""
        if scout is None:
            return self.squares
        key = fingerprint_of(scout)
        if key not in self.cells:
            self.cells[key] = Bag.of([read_cells(scout, *pair) for pair in zip(self.paths, self.sizes, strict=True)])
        return self.cells[key]


@cache
def fingerprint_of(scout: models.Scout) -> str:
    """Scout.fingerprint, hashed once for all images."""
    return scout.fingerprint()


# ---------------------------------------------------------------- runs and blends
class Single:
    """A run of train.py: its networks by fold and the way their images are made."""

    def __init__(self, run: Run, device: torch.device, tta: int | None = None, amp: str = "off", fold: bool = True,
                 depth_dir: Path | None = None):  # fmt: skip
        self.name, self.device, self.amp, self.tta = run.name, device, amp, tta or run.config["args"]["tta"]
        self.networks, self.encoders, self.tasks = {}, {}, {}
        for k in run.folds:
            self.networks[k], content = models.load_checkpoint(run.checkpoint(k), device, fold=fold)
            self.tasks[k] = task_of(content["task"])
            self.encoders[k], self.size = MetaEncoder(content["encoder"]), content["spec"]["image_size"]
        recipe = models.recipe_of(run.config["args"]["model"], run.config["args"].get("streams", ()))
        self.inputs, self.crop, self.depth_dir = recipe.inputs, run.config["crop"], depth_dir
        if "depth" in self.inputs and depth_dir is None:
            raise InputError(f"{run.path} looks at depth maps; pass predict.py --depth_dir, without --maps")
        self.exact, self.frame = run.config["exact"], run.config["frame"]
        network = next(iter(self.networks.values()))
        self.scout = network if isinstance(network, models.Scout) else None
        self.finder, self.key = None, str(run.path.resolve())
        if self.crop is not None:
            self.finder, self.key = Finder.load(run.path / FINDER, self.crop, device), str(self.crop["sha256"])
        elif hasattr(network, "attention"):  # boxes as crop.py finds them by default
            frame, rule = (network.scout_size, "peak") if self.scout else (self.frame, "component")
            views = min(Finder.views, run.config["views"])
            self.finder = Finder(self.networks, rule, views=views, frame=frame, scout=self.scout)
            for network in self.networks.values():
                network.shifts = 2

    def look(self, images: Images, folds: list[int] | None = None) -> Look | None:
        """Where this run looks, found once per set of images, by the networks of some folds or of all; None if it does
        not look anywhere in particular."""
        if self.finder is not None and self.key not in images.looks:
            amp = self.amp if self.crop is None else self.crop["amp"]
            seen = images.seen_by(self.finder.scout)
            known = [k for k in folds or () if k in self.finder.sources]
            maps = self.finder.maps(seen, self.device, images.sizes, known, amp=amp, batch_size=BATCH)
            boxes = [self.finder.boxes(*pair) for pair in zip(maps, images.sizes, strict=True)]
            crops = np.zeros((len(boxes), self.finder.n_boxes, self.size, self.size, 3), np.uint8)
            with ThreadPoolExecutor(util.CPUS) as pool:
                corners = [[box.corners for box in each] for each in boxes]
                found = pool.map(read_crops, images.paths, corners, [[self.size] * len(b) for b in boxes], images.sizes)
                for row, each in enumerate(found):
                    crops[row, : len(each)] = each
            images.looks[self.key] = Look(maps, boxes, np.ones(crops.shape[:2]), crops, self.finder.frame)
        return images.looks.get(self.key)

    def batches(self, images: Images, folds: list[int] | None = None) -> dict[int, list[tuple]]:
        """What the networks of some folds, or of all, are fed with, by fold: (pictures, metadata) of BATCH images."""
        seen, table = images.seen_by(self.scout), images.table
        if self.crop is not None:
            look = self.look(images, folds)
            table = table.assign(**{BOX_SIDE: [boxes[0].side for boxes in look.boxes] / np.min(images.sizes, axis=1)})
            names = ("crop",) if self.inputs == ("whole",) else self.inputs
            pictures = {"whole": lambda: [seen], "crop": lambda: look.crops.swapaxes(0, 1),
                        "location": lambda: [self.locate(images, look)], "depth": lambda: [self.fathom(images, look)]}
            seen = np.concatenate([one for name in names for one in pictures[name]()], axis=3)
        batches = split(seen, BATCH)
        meta = {k: torch.from_numpy(self.encoders[k].encode(table)).split(BATCH) for k in folds or self.networks}
        return {k: list(zip(batches, each, strict=True)) for k, each in meta.items()}

    def locate(self, images: Images, look: Look) -> np.ndarray:
        """Squares with all but the boxes hidden: uint8 (N, S, S, 3)."""
        found = []
        for square, size, boxes in zip(images.squares, images.sizes, look.boxes, strict=True):
            raster = box_raster(boxes[0].inner, frame_of(*size, self.frame), self.size)
            found.append(hide_outside(square, raster))
        return np.stack(found)

    def fathom(self, images: Images, look: Look) -> np.ndarray:
        """Depth maps of the boxes as grey pictures: uint8 (N, S, S, 3)."""
        triples = zip(images.table[ID], images.sizes, look.boxes, strict=True)
        return np.stack([cut_depth(read_depth(self.depth_dir, name), boxes[0].corners, self.size, size)
                         for name, size, boxes in triples])  # fmt: skip

    def check_sees_one(self) -> None:
        """Raise InputError if the networks see several pictures of an image."""
        if len(self.inputs) > 1 or (self.crop and self.finder.n_boxes > 1):
            raise InputError(f"{self.name} looks at several pictures of an image; pass a run that looks at one")

    def views(self, images: Images) -> list[tuple]:
        """The square of every original (x0, y0, x1, y1) that networks for one picture see."""
        if self.crop is None:
            frame = self.frame if self.scout is None else self.scout.scout_size
            return [frame_of(*size, frame) for size in images.sizes]
        return [boxes[0].corners for boxes in self.look(images).boxes]

    def predict(self, images: Images, found: dict[str, np.ndarray]) -> dict[int, np.ndarray]:
        """Predictions (N, K) by fold; their mean goes into `found` under the run's name."""
        probs, weights = {}, []
        for k, loader in self.batches(images).items():
            network = self.networks[k]
            probs[k] = models.predict(network, self.tasks[k], loader, self.device, self.tta, self.amp)
            if self.finder and self.finder.n_boxes > 1:
                weights.append(models.box_weights(network, loader, self.device, self.amp))
        if weights:
            self.look(images).weights = np.mean(weights, axis=0)
        found[self.name] = np.mean(list(probs.values()), axis=0)
        return probs

    def meta_columns(self) -> set[str]:
        """Metadata that it was trained with."""
        return {name for encoder in self.encoders.values() for name in encoder.columns} - {BOX_SIDE}


class Blended:
    """A blend of runs or of further blends."""

    def __init__(self, run: Run, device: torch.device, tta: int | None, amp: str, depth_dir: Path | None = None):
        self.name, self.task, self.blend = run.name, run.task, BLENDS[run.config["args"]["mode"]]
        used = [(member, weight) for member, weight in run.members() if weight > 0]
        self.mix, self.stack = Weighted(np.array([weight for _, weight in used])), run.config.get("stack")
        self.encoder, self.extractor = MetaEncoder((self.stack or {}).get("encoder", {})), None
        if self.stack is not None:
            check_hashes(run.path, {STACK: self.stack["sha256"]}, "blend again")
            with np.load(run.path / STACK, allow_pickle=False) as file:
                self.mix = self.blend.learn(run.task, file["values"], file["extra"], file["target"])
            if (facts := self.stack["features"]) is not None:
                single = Single(used[facts["member"]][0], device, fold=False)
                self.extractor = Extractor(single, argparse.Namespace(**facts))
        self.members = [open_predictor(member, device, tta, amp, depth_dir) for member, _ in used]
        columns = run.task.columns
        self.history = [dict(tuple(member.table("oof.csv").groupby(FOLD)[columns])) for member, _ in used]
        settings = {(member.size, member.exact, member.frame) for member in self.members}
        if len(settings) > 1:
            raise InputError(f"{run.path} blends networks for images of other sizes {sorted(settings)}; blend others")
        self.size, self.exact, self.frame = settings.pop()
        self.crop = next((member.crop for member in self.members if member.crop is not None), None)

    def look(self, images: Images) -> Look | None:
        """Where the first member that crops, or else the first ChipNet, looks."""
        looks = (member.look(images) for member in sorted(self.members, key=lambda member: member.crop is None))
        return next((look for look in looks if look is not None), None)

    def predict(self, images: Images, found: dict[str, np.ndarray]) -> dict[int, np.ndarray]:
        """Blended predictions (N, K) by fold; each member's mean goes into `found`."""
        parts = [member.predict(images, found) for member in self.members]
        blended = {}
        for k in parts[0]:
            histories = [history[k].to_numpy() for history in self.history]
            pairs = zip(parts, histories, strict=True)
            values = [self.blend.value(self.task, part[k], history) for part, history in pairs]
            mixture = self.mix(np.stack(values, axis=1), self.extra(images, k))
            history = average_of(np.stack(histories, axis=1), self.mix.weights)
            blended[k] = self.blend.score(self.task, mixture, history)
        found[self.name] = np.mean(list(blended.values()), axis=0)
        return blended

    def extra(self, images: Images, k: int) -> np.ndarray:
        """What a stack knows of images besides predictions (n, E)."""
        extra = self.encoder.encode(images.table)
        if self.extractor is None:
            return extra
        fresh = replace(images, looks={})  # where the networks of one fold look
        keys = images.table[[ID]].assign(**{FOLD: k})
        found = widen(*self.extractor.extract(fresh, k), keys, self.task.names, self.stack["features"]["width"])
        return np.concatenate([extra, found], axis=1)

    def meta_columns(self) -> set[str]:
        """Metadata that it and its members were trained with."""
        return set(self.encoder.columns).union(*(member.meta_columns() for member in self.members))


def open_predictor(run: Run, device: torch.device, tta, amp: str, depth_dir=None) -> Single | Blended:
    """What predicts with a run or a blend; depth_dir: depth maps, for a network that looks at them."""
    return (Blended if run.is_blend else Single)(run, device, tta, amp, depth_dir=depth_dir)


# ---------------------------------------------------------------- images
def list_images(inputs: list[Path]) -> dict[str, Path]:
    """Images named or lying in the folders named, by their path in that folder, or file name, without suffix."""
    found: dict[str, Path] = {}
    for path in inputs:
        new = {path: path.name}
        if path.is_dir():
            new = {image: image.relative_to(path).as_posix() for image in ImageIndex(path).paths()}
            if not new:
                raise InputError(f"{path} holds no {', '.join(SUFFIXES)}; pass another folder")
        for image, name in new.items():
            if found.setdefault(name_key(name), image) != image:
                raise InputError(f"{found[name_key(name)]} and {image} share a name; predict them apart")
    return found


def note_seen(run: Run, paths: dict[str, Path]) -> None:
    """Say how many images have names of training images, which networks of the run have seen."""
    seen = paths.keys() & set(run.table("oof.csv")[ID].map(name_key))
    if seen:
        print(f"{len(seen)} images have names of training images, which networks of this run have seen; "
              f"{run.path / 'oof.csv'} has their held-out predictions")  # fmt: skip


def read_meta(args: argparse.Namespace, names: list[str], needed: set[str]) -> pd.DataFrame:
    """Metadata of the images in their order; says which columns or images it has none of."""
    table = pd.DataFrame({ID: names})
    if args.csv is not None:
        meta = read_table(args.csv, (), args.image_col)
        bare = pd.Series([name.rpartition("/")[2] for name in names])  # a csv may name files without their folders
        alone = ~bare.duplicated(keep=False)
        path_of = dict(zip(bare[alone], table[ID][alone], strict=True))
        meta[ID] = meta[ID].map(name_key).map(lambda name: path_of.get(name, name))
        found = table[ID].isin(meta[ID])
        if not found.any():
            raise InputError(f"{args.csv} names none of the images, such as {names[0]}; check --image_col")
        if not found.all():
            print(f"{args.csv} lacks {(~found).sum()} of {len(names)} images: their metadata counts as missing")
        table = table.merge(meta, on=ID, how="left", validate="one_to_one")
    if missing := sorted(needed - set(table)):
        print(f"no {', '.join(missing)} given, which the networks were trained with: they count as missing (--csv)")
    return table


def read_chunks(paths: dict[str, Path], table: pd.DataFrame, predictor, on_error: str) -> Iterator[Images]:
    """Read the images in chunks; a bad one is an error or, with "skip", left out."""
    files, how = list(paths.values()), {"size": predictor.size, "exact": predictor.exact, "frame": predictor.frame}
    read = partial(read_square_or_skip, **how, on_error=on_error)
    for start in range(0, len(files), CHUNK):
        with ThreadPoolExecutor(util.CPUS) as pool:
            found = list(pool.map(read, files[start : start + CHUNK]))
        good = [i for i, one in enumerate(found) if one is not None]
        if good:
            rows = [start + i for i in good]
            squares, sizes = zip(*(found[i] for i in good), strict=True)
            yield Images(table.iloc[rows], [files[row] for row in rows], np.stack(squares), list(sizes))
