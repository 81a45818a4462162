"""Classify new images with a run or a blend, and show where it looked.

Reads   --run (train.py or ensemble.py) and the image files or folders named (never written)
Writes  --output/: predictions.csv (probability, one column per member of a blend, box) and
        NAME.png per image: box, attention, crop

    python predict.py --run runs/ensemble path/to/images
    python predict.py --run runs/chipnet one.jpg two.png --csv metadata.csv

Images take the way the training images took: centre square, for cropnet and fusion the maps and
box rule their crops were made with, and the metadata encoder of each network.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

import localize
import models
import util
from dataset import MetaEncoder
from localize import Box
from util import FOLD, ID, PROB, InputError

CHUNK = 64  # images in memory at a time
BATCH = 32
THUMBNAIL = 448  # longest side, in pixels, of the picture an image is drawn from
CHIPNET_LOOK = {
    "source": "attention",
    "rule": "component",
    "num_devs": 1.5,
    "views": 4,
    "shifts": 2,
}  # how the boxes of a ChipNet are found where no crops were made


@dataclass
class Look:
    """Where a run looked: maps (N, h, w), boxes and crops (N, S, S, 3)."""

    maps: np.ndarray
    boxes: list[Box]
    crops: np.ndarray


@dataclass
class Images:
    """Images on their way through the networks."""

    table: pd.DataFrame  # image_name, and metadata where given
    paths: list[Path]
    squares: np.ndarray  # uint8 (N, S, S, 3)
    sizes: list[tuple[int, int]]  # of the originals, (width, height)
    looks: dict[str, Look] = field(default_factory=dict)  # shared by the members of a blend


class Localizer:
    """Finds boxes in new images as crop.py found those of the training images."""

    def __init__(self, facts: dict, crop_dir: Path | None, device: torch.device, amp: str):
        missing = {"run", "folds", *CHIPNET_LOOK} - facts.keys()
        if missing:
            raise InputError(
                f"the crops in {crop_dir} say nothing of {min(missing)!r}: another version made "
                "them; crop and train again"
            )
        kind, self.facts, self.device, self.amp = facts["source"], facts, device, amp
        if kind == "boxes":
            raise InputError(
                f"{crop_dir} was cut by the boxes of {facts['boxes']}; new images have none, so "
                "predict with a run on crops of another --source"
            )
        self.key = " ".join(str(facts[name]) for name in ("run", *CHIPNET_LOOK))
        run_dir, networks, saliencies = Path(facts["run"]), {}, {}
        if kind in localize.NETWORK_SOURCES:
            spec = util.read_config(run_dir)["spec"]
            networks = {k: models.load_fold(run_dir, k, spec, device)[0] for k in facts["folds"]}
        if "saliency" in kind:
            path = crop_dir / "saliency.pt"
            saliencies = localize.read_saliencies(path, *models.load_checkpoint(path, device))
            if not set(facts["folds"]) <= saliencies.keys():
                raise InputError(f"{path} is of other folds than the crops; crop and train again")
            self.key += f" {crop_dir}"
        self.sources = [
            localize.make_source(kind, networks.get(k), saliencies.get(k), facts["shifts"])
            for k in facts["folds"]
        ]

    def look(self, images: Images, size: int) -> Look:
        """Maps, boxes and crops of `size` px, found once per set of images."""
        if self.key not in images.looks:
            facts = self.facts
            with models.autocast(self.device, self.amp):
                maps = localize.attention_maps(
                    self.sources, images.squares, self.device, facts["views"], BATCH
                )
            boxes = [
                localize.find_box(attention, original, facts["rule"], facts["num_devs"])
                for attention, original in zip(maps, images.sizes, strict=True)
            ]
            items = zip(images.paths, boxes, images.sizes, strict=True)
            crops = util.run_threads(
                lambda item: util.read_crops(item[0], [item[1]], [size], item[2])[0],
                items,
                os.cpu_count() or 1,
            )
            images.looks[self.key] = Look(maps, boxes, np.stack(crops))
        return images.looks[self.key]


class Run:
    """A trained run: its networks by fold and the way their images are made."""

    def __init__(
        self, run_dir: Path, config: dict, device: torch.device, args: argparse.Namespace
    ):
        self.name, self.device, self.amp = run_dir.name, device, args.amp
        self.tta = args.tta or config["args"]["tta"]
        self.networks, self.encoders = {}, {}
        for fold in util.read_metrics(run_dir)["folds"]:
            k = fold["fold"]
            network, content = models.load_fold(run_dir, k, config["spec"], device)
            self.networks[k], self.encoders[k] = network, MetaEncoder(content["encoder"])
            self.size = content["spec"]["image_size"]
        self.inputs = models.MODELS[config["args"]["model"]].inputs
        self.sees_crops, self.localizer = config["crop"] is not None, None
        if self.sees_crops:
            crop_dir = Path(config["args"]["crop_dir"])
            self.localizer = Localizer(config["crop"], crop_dir, device, args.amp)
        elif isinstance(network, models.ChipNet):
            facts = CHIPNET_LOOK | {"run": run_dir, "folds": list(self.networks)}
            self.localizer = Localizer(facts, None, device, args.amp)

    def look(self, images: Images) -> Look | None:
        """Where this run looks; None for a run that does not look anywhere in particular."""
        return None if self.localizer is None else self.localizer.look(images, self.size)

    def predict(self, images: Images, columns: dict[str, np.ndarray]) -> dict[int, np.ndarray]:
        """Probability (N,) by fold; the mean goes into `columns` under the run's name."""
        array, table = images.squares, images.table
        if self.sees_crops:
            look = self.look(images)
            sides = np.array([box.side for box in look.boxes]) / np.min(images.sizes, axis=1)
            crops, table = look.crops, table.assign(**{util.BOX_SIDE: sides})
            array = np.concatenate([array, crops], axis=3) if len(self.inputs) > 1 else crops
        probs = {}
        for k, network in self.networks.items():
            meta = self.encoders[k].encode(table)
            batches = [
                (torch.from_numpy(array[i : i + BATCH]).permute(0, 3, 1, 2),
                 torch.from_numpy(meta[i : i + BATCH]), None)
                for i in range(0, len(array), BATCH)
            ]  # fmt: skip
            probs[k] = models.predict(network, batches, self.device, self.tta, self.amp)
        columns[self.name] = np.mean(list(probs.values()), axis=0)
        return probs


class Blend:
    """A blend of runs or of further blends."""

    def __init__(
        self, run_dir: Path, config: dict, device: torch.device, args: argparse.Namespace
    ):
        self.name, self.mode = run_dir.name, config["args"]["mode"]
        self.zoom = config["zoom"]
        used = [m for m in config["members"] if m["weight"] > 0 or self.zoom]
        self.weights = np.array([member["weight"] for member in used])
        self.members = [open_run(Path(member["run"]), device, args) for member in used]
        sizes = {member.size for member in self.members}
        if len(sizes) > 1:
            raise InputError(f"{run_dir} blends networks for images of {sorted(sizes)} px")
        self.size = sizes.pop()
        # a new image is ranked among the held-out images its network was scored on
        self.history = {}
        for member, path in zip(self.members, used, strict=True):
            oof = util.read_predictions(Path(path["run"]), "oof.csv", [ID, FOLD, PROB])
            for k, rows in oof.groupby(FOLD):
                self.history[member.name, int(k)] = np.sort(rows[PROB].to_numpy())

    def look(self, images: Images) -> Look | None:
        """Where the first member that crops, or else the first ChipNet, looks."""
        for member in sorted(self.members, key=lambda m: not getattr(m, "sees_crops", False)):
            if member.look(images) is not None:
                return member.look(images)
        return None

    def predict(self, images: Images, columns: dict[str, np.ndarray]) -> dict[int, np.ndarray]:
        """Blended score (N,) by fold; each member's mean goes into `columns`."""
        parts = [member.predict(images, columns) for member in self.members]
        blended, weights = {}, self.weights
        if self.zoom:
            cropped = np.array([getattr(m, "sees_crops", False) for m in self.members])
            looks = [
                m.look(images) for m, crops in zip(self.members, cropped, strict=True) if crops
            ]
            short = np.min(images.sizes, axis=1)
            sides = [[box.side for box in look.boxes] / short for look in looks]
            weights = util.zoom_weights(np.mean(sides, axis=0), cropped, *self.zoom)
        for k in parts[0]:
            values = np.column_stack([part[k] for part in parts])
            if self.mode in util.RANK_MODES:
                for column, member in enumerate(self.members):
                    history = self.history[member.name, k]
                    below = np.searchsorted(history, values[:, column], side="right")
                    values[:, column] = below / len(history)
            blended[k] = util.combine(self.mode, values, weights)
        columns[self.name] = np.mean(list(blended.values()), axis=0)
        return blended


def open_run(run_dir: Path, device: torch.device, args: argparse.Namespace) -> Run | Blend:
    """Open a run directory of train.py or ensemble.py."""
    config = util.read_config(run_dir)
    if not (run_dir / "metrics.json").exists():
        raise InputError(f"{run_dir} is not finished; train it or go on with --resume")
    return (Blend if "members" in config else Run)(run_dir, config, device, args)


def list_images(inputs: list[Path]) -> dict[str, Path]:
    """Images named or lying in the folders named, by file name without suffix."""
    found: dict[str, Path] = {}
    for path in inputs:
        if path.is_dir():
            new = sorted(set(util.index_images(path).values()))
            if not new:
                raise InputError(f"{path} holds no jpg, jpeg or png; pass another folder")
        else:
            new = [path]
        for image in new:
            if image.stem in found and found[image.stem] != image:
                raise InputError(f"{found[image.stem]} and {image} share a name; predict apart")
            found[image.stem] = image
    return found


def read_chunks(
    paths: dict[str, Path], meta: pd.DataFrame | None, size: int, on_error: str
) -> Iterator[Images]:
    """Read the images in chunks; a bad one is an error or, with "skip", left out."""

    def read(path: Path):
        try:
            return util.read_square(path, size)
        except InputError as error:
            if on_error == "fail":
                raise InputError(f"{error}, or pass --on_error skip") from None
            tqdm.write(f"skipped {error}")
            return None

    names = list(paths)
    for start in range(0, len(names), CHUNK):
        chunk = names[start : start + CHUNK]
        found = util.run_threads(read, [paths[name] for name in chunk], os.cpu_count() or 1)
        squares = dict(zip(chunk, found, strict=True))
        good = [name for name in chunk if squares[name] is not None]
        if not good:
            continue
        table = pd.DataFrame({ID: good})
        if meta is not None:
            table = table.merge(meta, on=ID, how="left", validate="one_to_one")
        array = np.stack([squares[name][0] for name in good])
        sizes = [squares[name][1] for name in good]
        yield Images(table, [paths[name] for name in good], array, sizes)


def draw(path: Path, images: Images, row: int, look: Look | None, prob: float) -> None:
    """Save the picture of one image."""
    image = util.read_image(images.paths[row], THUMBNAIL)[0]
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    figure = util.new_figure(figsize=(9, 3.2))
    axes = figure.subplots(1, 3)
    parts = (None, None, None)
    if look is not None:
        parts = look.boxes[row], look.maps[row], look.crops[row]
        axes[1].set_title(look.boxes[row].reason or "attention", fontsize=9)
        axes[2].set_title("crop", fontsize=9)
    localize.draw_row(axes, np.asarray(image), images.sizes[row], *parts)
    axes[0].set_title(f"{images.table[ID].iloc[row]}: {prob:.3f}", fontsize=9)
    util.save_figure(path, figure)


def main(args: argparse.Namespace) -> Path:
    """Predict the images; returns the directory of the results."""
    run = open_run(args.run, models.pick_device(args.device), args)
    paths = list_images(args.images)
    paths = dict(list(paths.items())[: args.limit])
    trained_on = util.read_predictions(args.run, "oof.csv", [PROB])[ID]
    seen = paths.keys() & {Path(name).stem for name in trained_on}
    if seen:
        print(f"{len(seen)} images have names of training images, which networks of this run have "
              f"seen; {args.run / 'oof.csv'} has their held-out predictions")  # fmt: skip
    meta = None if args.csv is None else util.read_table(args.csv, (), args.image_col)
    if meta is not None and not meta[ID].isin(paths).any():
        raise InputError(f"{args.csv} names none of the images; write their names without suffix")
    if args.output.resolve() in {path.resolve().parent for path in paths.values()}:
        raise InputError(f"--output {args.output} holds the images; pass another folder")
    output = util.claim_dir(args.output, "predictions.csv", args.overwrite)
    tables = []
    with tqdm(total=len(paths), unit="image") as bar:
        for images in read_chunks(paths, meta, run.size, args.on_error):
            columns: dict[str, np.ndarray] = {}
            run.predict(images, columns)
            rows = pd.DataFrame({ID: images.table[ID], PROB: columns.pop(run.name), **columns})
            look = run.look(images)
            if look is not None:
                for edge in ("x0", "y0", "x1", "y1", "confidence"):
                    rows[edge] = [getattr(box, edge) for box in look.boxes]
                rows["fallback"] = [box.reason for box in look.boxes]
            if args.pictures:
                for row, prob in enumerate(rows[PROB]):
                    draw(output / f"{rows[ID].iloc[row]}.png", images, row, look, prob)
            tables.append(rows)
            bar.update(len(rows))
    if not tables:
        raise InputError("none of the images could be read; pass others")
    table = pd.concat(tables)
    util.write_table(output / "predictions.csv", table)
    print(f"{len(table)} images, mean {table[PROB].mean():.3f}; wrote {output}")
    return output


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__)
    parser.add_argument("images", nargs="+", type=Path, help="image files or folders")
    parser.add_argument("--run", type=Path, required=True, help="finished run or blend")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="where to write")
    parser.add_argument("--csv", type=Path, help="metadata of the images [all missing]")
    parser.add_argument("--image_col", default=ID, help="column of image names in --csv")
    parser.add_argument("--tta", type=int, choices=(1, 2, 4, 8), help="views [as trained]")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="precision")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--on_error", choices=("fail", "skip"), default="fail", help="bad images")
    parser.add_argument("--limit", type=util.number(int, 1), help="predict the first images")
    parser.add_argument("--pictures", action=argparse.BooleanOptionalAction, default=True,
                        help="draw a picture per image")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a finished --output")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser(), models.ModelError, localize.SourceError)
