"""Classify new images with a run or a blend, and show where it looked.

Reads   --run (train.py or ensemble.py) and the image files or folders named (never written)
Writes  --output/: predictions.csv (probability, one column per member of a blend, best box), predictions.json and
        NAME.png per image: box, attention, crop; if there are several boxes also boxes.csv, with what each weighed

    python predict.py --run runs/ensemble path/to/images
    python predict.py --run runs/chipnet one.jpg two.png --csv metadata.csv

Images take the way the training images took: centre square, for cropnet and fusion the maps and box rule their crops
were made with, and the metadata encoder of each network. A run holds all of that, so it can be moved.
"""

import argparse
from argparse import BooleanOptionalAction
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

import models
import util
from blends import BLENDS, average_of
from calibration import calibrated
from localize import Box, Finder, upsample
from plumbing.cells import Bag, read_cells, split
from plumbing.data import CORNERS, MetaEncoder, read_table
from plumbing.distributed import pick_device
from plumbing.figures import draw_row, new_figure, save_figure
from plumbing.files import finish_output, open_output, provenance, sha256, write_table
from plumbing.images import (
    SUFFIXES,
    Frame,
    ImageIndex,
    configure_pillow,
    name_key,
    read_crops,
    read_image,
    read_square_or_skip,
)
from plumbing.runs import FINDER, Run, read_run
from tasks import task_of
from util import BOX_SIDE, FOLD, ID, PROB, InputError

CHUNK = 64  # images in memory at a time
BATCH = 32  # images that a network sees at a time
THUMBNAIL = 448  # longest side, in pixels, of the picture an image is drawn from


@dataclass
class Look:
    """Where a run looked: maps (N, h, w) of a frame, boxes of every image, best first, and crops (N, K, S, S, 3), black
    where there is no box. weights: of the boxes in the prediction (N, K)."""

    maps: np.ndarray
    boxes: list[list[Box]]
    weights: np.ndarray
    crops: np.ndarray
    frame: Frame


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

    def __init__(self, run: Run, device: torch.device, tta: int | None, amp: str):
        self.name, self.device, self.amp, self.tta = run.name, device, amp, tta or run.config["args"]["tta"]
        self.networks, self.encoders, self.tasks = {}, {}, {}
        for k in run.folds:
            self.networks[k], content = models.load_checkpoint(run.checkpoint(k), device, fold=True)
            self.tasks[k] = task_of(content["task"])
            self.encoders[k], self.size = MetaEncoder(content["encoder"]), content["spec"]["image_size"]
        self.inputs, self.crop = models.MODELS[run.config["args"]["model"]].inputs, run.config["crop"]
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

    def look(self, images: Images) -> Look | None:
        """Where this run looks, found once per set of images; None if it does not look anywhere in particular."""
        if self.finder is not None and self.key not in images.looks:
            amp = self.amp if self.crop is None else self.crop["amp"]
            seen = images.seen_by(self.finder.scout)
            maps = self.finder.maps(seen, self.device, images.sizes, amp=amp, batch_size=BATCH)
            boxes = [self.finder.boxes(*pair) for pair in zip(maps, images.sizes, strict=True)]
            crops = np.zeros((len(boxes), self.finder.n_boxes, self.size, self.size, 3), np.uint8)
            with ThreadPoolExecutor(util.CPUS) as pool:
                corners = [[box.corners for box in each] for each in boxes]
                found = pool.map(read_crops, images.paths, corners, [[self.size] * len(b) for b in boxes], images.sizes)
                for row, each in enumerate(found):
                    crops[row, : len(each)] = each
            images.looks[self.key] = Look(maps, boxes, np.ones(crops.shape[:2]), crops, self.finder.frame)
        return images.looks.get(self.key)

    def predict(self, images: Images, found: dict[str, np.ndarray]) -> dict[int, np.ndarray]:
        """Predictions (N, K) by fold; their mean goes into `found` under the run's name."""
        seen, table = images.seen_by(self.scout), images.table
        if self.crop is not None:
            look = self.look(images)
            table = table.assign(**{BOX_SIDE: [boxes[0].side for boxes in look.boxes] / np.min(images.sizes, axis=1)})
            parts = [*([seen] if len(self.inputs) > 1 else []), *look.crops.swapaxes(0, 1)]
            seen = np.concatenate(parts, axis=3)
        probs, weights, pictures = {}, [], split(seen, BATCH)
        for k, network in self.networks.items():
            meta = torch.from_numpy(self.encoders[k].encode(table)).split(BATCH)
            loader = list(zip(pictures, meta, strict=True))
            probs[k] = models.predict(network, self.tasks[k], loader, self.device, self.tta, self.amp)
            if self.finder and self.finder.n_boxes > 1:
                weights.append(models.box_weights(network, loader, self.device, self.amp))
        if weights:
            look.weights = np.mean(weights, axis=0)
        found[self.name] = np.mean(list(probs.values()), axis=0)
        return probs

    def meta_columns(self) -> set[str]:
        """Metadata that it was trained with."""
        return {name for encoder in self.encoders.values() for name in encoder.columns} - {BOX_SIDE}


class Blended:
    """A blend of runs or of further blends."""

    def __init__(self, run: Run, device: torch.device, tta: int | None, amp: str):
        self.name, self.task, self.blend = run.name, run.task, BLENDS[run.config["args"]["mode"]]
        used = [(member, weight) for member, weight in run.members() if weight > 0]
        self.weights = np.array([weight for _, weight in used])
        self.members = [open_predictor(member, device, tta, amp) for member, _ in used]
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
            average, history = (average_of(np.stack(each, axis=1), self.weights) for each in (values, histories))
            blended[k] = self.blend.score(self.task, average, history)
        found[self.name] = np.mean(list(blended.values()), axis=0)
        return blended

    def meta_columns(self) -> set[str]:
        """Metadata that its members were trained with."""
        return set().union(*(member.meta_columns() for member in self.members))


def open_predictor(run: Run, device: torch.device, tta: int | None, amp: str) -> Single | Blended:
    """What predicts with a run or a blend."""
    return (Blended if run.is_blend else Single)(run, device, tta, amp)


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
    files, read = list(paths.values()), partial(
        read_square_or_skip, size=predictor.size, exact=predictor.exact, frame=predictor.frame, on_error=on_error
    )
    for start in range(0, len(files), CHUNK):
        with ThreadPoolExecutor(util.CPUS) as pool:
            found = list(pool.map(read, files[start : start + CHUNK]))
        good = [i for i, one in enumerate(found) if one is not None]
        if good:
            rows = [start + i for i in good]
            squares, sizes = zip(*(found[i] for i in good), strict=True)
            yield Images(table.iloc[rows], [files[row] for row in rows], np.stack(squares), list(sizes))


def draw(path: Path, images: Images, row: int, look: Look | None, words: str) -> None:
    """Save the picture of one image; words: the prediction."""
    image = read_image(images.paths[row], THUMBNAIL)[0]
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    figure = new_figure(figsize=(9, 3.2))
    axes, parts = figure.subplots(1, 3), (None, None, None)
    if look is not None:
        crops = np.concatenate(look.crops[row, : len(look.boxes[row])], axis=1)
        parts = look.boxes[row], upsample(look.maps[row]), crops, look.frame
        axes[1].set_title(look.boxes[row][0].reason or "attention", fontsize=9)
        axes[2].set_title("crop", fontsize=9)
    draw_row(axes, np.asarray(image), images.sizes[row], *parts)
    axes[0].set_title(f"{images.table[ID].iloc[row]}: {words}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(path, figure)


# ---------------------------------------------------------------- command
def main(args: argparse.Namespace) -> Path:
    """Predict the images; returns the directory of the results."""
    configure_pillow()
    run = read_run(args.run)
    predictor = open_predictor(run, pick_device(args.device), args.tta, args.amp)
    paths = dict(list(list_images(args.images).items())[: args.limit])
    seen = paths.keys() & set(run.table("oof.csv")[ID].map(name_key))
    if seen:
        print(f"{len(seen)} images have names of training images, which networks of this run have seen; "
              f"{args.run / 'oof.csv'} has their held-out predictions")  # fmt: skip
    table = read_meta(args, list(paths), predictor.meta_columns())
    if args.output.resolve() in {path.resolve().parent for path in paths.values()}:
        raise InputError(f"--output {args.output} holds the images; pass another folder")
    output, written = open_output(args.output, "predictions.json", args.overwrite, {}), ["predictions.csv"]
    tables, each_box = [], []
    with tqdm(total=len(paths), unit="image") as bar:
        for images in read_chunks(paths, table, predictor, args.on_error):
            found: dict[str, np.ndarray] = {}
            predictor.predict(images, found)
            prob, rows = found.pop(predictor.name), pd.DataFrame({ID: images.table[ID].to_numpy()})
            rows[run.task.columns] = prob
            if fit := run.metrics["calibration"]:
                columns = [column.replace(PROB, "calibrated", 1) for column in run.task.columns]
                rows[columns] = calibrated(run.task, prob, fit)
            for name, values in found.items():  # of each member of a blend
                alone = len(run.task.names) == 1
                rows[[name] if alone else [f"{name}_{column}" for column in run.task.columns]] = values
            look = predictor.look(images)
            if look is not None:
                best = [boxes[0] for boxes in look.boxes]
                rows[[*CORNERS, "confidence", "fallback"]] = [(*b.corners, b.confidence, b.reason) for b in best]
                each_box += [(name, k, *box.corners, box.confidence, weight[k])
                             for name, boxes, weight in zip(rows[ID], look.boxes, look.weights, strict=True)
                             for k, box in enumerate(boxes)]  # fmt: skip
            if args.pictures:
                for row, name in enumerate(rows[ID]):
                    draw(output / f"{name}.png", images, row, look, run.task.show(prob[row]))
                    written.append(f"{name}.png")
            tables.append(rows)
            bar.update(len(rows))
    if not tables:
        raise InputError("none of the images could be read; pass others")
    result = pd.concat(tables)
    write_table(output / "predictions.csv", result)
    if look is not None and look.weights.shape[1] > 1:
        columns = [ID, "box", *CORNERS, "confidence", "weight"]
        write_table(output / "boxes.csv", pd.DataFrame(each_box, columns=columns))
        written.append("boxes.csv")
    facts = {"run": args.run.resolve(), "sha256": {name: sha256(output / name) for name in written}}
    finish_output(output, "predictions.json", facts | provenance())
    means = ", ".join(f"{column} {result[column].mean():.3f}" for column in run.task.columns)
    print(f"{len(result)} images, mean {means}; wrote {output}")
    return output


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__, "amp", "device", "on_error", "limit", "overwrite")
    add = parser.add_argument
    add("images", nargs="+", type=Path, help="image files or folders, with their subfolders")
    add("--run", type=Path, required=True, help="finished run or blend")
    add("--output", type=Path, default=Path("predictions"), help="where to write")
    add("--csv", type=Path, help="metadata of the images [all missing]")
    add("--image_col", default=ID, help="column of image names in --csv")
    add("--tta", type=int, choices=(1, 2, 4, 8), help="views [as trained]")
    add("--pictures", action=BooleanOptionalAction, default=True, help="draw a picture per image")
    return parser
# fmt: on


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
