"""Classify new images with a run or a blend, and show where it looked.

Reads   --run (train.py or ensemble.py) and the image files or folders named (never written)
Writes  --output/: predictions.csv (probability, one column per member of a blend, best box), predictions.json and
        NAME.png per image: box, attention, crop; if there are several boxes also boxes.csv, with what each weighed.
        With --maps instead maps.csv and a NAME.png with the map of every class seen, and boxes around its parts

    python predict.py --run runs/ensemble path/to/images
    python predict.py --run runs/chipnet one.jpg two.png --csv metadata.csv
    python predict.py --run runs/resnet --maps --class melanoma --t_roi .3 one.jpg

Images take the way the training images took: centre square, for cropnet and fusion the maps and box rule their crops
were made with, and the metadata encoder of each network. A run holds all of that, so it can be moved.
"""

import argparse
from argparse import BooleanOptionalAction
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import util
from calibration import calibrated
from inference import (
    Images,
    Single,
    draw_look,
    list_images,
    note_seen,
    open_predictor,
    read_chunks,
    read_meta,
    read_thumbnail,
)
from localize import class_boxes, upsample
from maps import WAYS, choose_way, every
from plumbing.data import CORNERS
from plumbing.distributed import pick_device
from plumbing.figures import draw_picture, new_figure, save_figure
from plumbing.files import finish_output, open_output, provenance, sha256, write_table
from plumbing.images import configure_pillow, find_depth
from plumbing.runs import Run, read_run
from util import ID, PROB, InputError

THUMBNAIL = 448  # longest side, in pixels, of the picture an image is drawn from


# ---------------------------------------------------------------- maps of classes
def map_classes(single: Single, images: Images, way: str) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, K) and maps (N, K, h, w) of all classes, means over the networks of the folds."""
    probs, maps = [], []
    for k, loader in single.batches(images).items():
        explainer = WAYS[way](single.networks[k])
        with torch.no_grad():
            found = [explainer.explain(pictures.to(single.device), every, meta) for pictures, meta in loader]
        probs.append(np.concatenate([single.tasks[k].prob(logit.float().cpu().double()).numpy() for logit, _ in found]))
        maps.append(np.concatenate([each.float().cpu().numpy() for _, each in found]))
    return np.mean(probs, axis=0), np.mean(maps, axis=0)


def draw_maps(path: Path, image: np.ndarray, name: str, size: tuple, view: tuple, found: list[tuple]) -> None:
    """Save the picture of one image: for each of some (class, probability, map (h, w), boxes) where it was seen."""
    figure = new_figure(figsize=(3.2 * (1 + len(found)), 3.4))
    axes = np.atleast_1d(figure.subplots(1, 1 + len(found)))
    draw_picture(axes[0], image, size)
    axes[0].set_title(name if found else f"{name}: no class is so probable", fontsize=9)
    for axis, (label, prob, heat, boxes) in zip(axes[1:], found, strict=True):
        draw_picture(axis, image, size, boxes, upsample(np.maximum(heat, 0)), view)
        for box in boxes:
            axis.text(box.x0 * image.shape[1] / size[0], box.y0 * image.shape[0] / size[1], f"{box.confidence:.2f}",
                      color="lime", fontsize=8, verticalalignment="bottom")  # fmt: skip
        axis.set_title(f"{label} {prob:.3f}" + ("" if boxes else ": the map says nothing"), fontsize=9)
    save_figure(path, figure)


def show_maps(args: argparse.Namespace, run: Run, paths: dict[str, Path]) -> Path:
    """Draw the maps of the classes seen in images and write their boxes; returns the directory of the results."""
    if run.is_blend:
        raise InputError(f"{args.run} is a blend: its members have maps of their own; pass one of them")
    if args.class_name not in (None, *run.task.names):
        raise InputError(f"--class {args.class_name} is no output of {run.name}; pass {', '.join(run.task.names)}")
    single = Single(run, pick_device(args.device), fold=False)
    single.check_sees_one()
    network = next(iter(single.networks.values()))
    way, task = choose_way(args.way, network, single.size), run.task
    table = read_meta(args, list(paths), single.meta_columns())
    output, written, rows = open_output(args.output, "predictions.json", args.overwrite, {}), ["maps.csv"], []
    with tqdm(total=len(paths), unit="image") as bar:
        for images in read_chunks(paths, table, single, args.on_error):
            probs, maps = map_classes(single, images, way)
            for name, path, size, view, prob, heat in zip(images.table[ID], images.paths, images.sizes,
                                                          single.views(images), probs, maps, strict=True):  # fmt: skip
                seen = range(len(prob)) if not task.probabilistic else np.flatnonzero(prob >= args.t_class)
                seen = seen if args.class_name is None else [task.names.index(args.class_name)]
                found = [(task.names[c], prob[c], heat[c], class_boxes(heat[c], view, size, args.t_roi)) for c in seen]
                rows += [(name, label, p, number, *box.corners, box.confidence)
                         for label, p, _, boxes in found for number, box in enumerate(boxes)]  # fmt: skip
                if args.pictures:
                    draw_maps(output / f"{name}.png", read_thumbnail(path, THUMBNAIL), name, size, view, found)
                    written.append(f"{name}.png")
            bar.update(len(images.paths))
    if not bar.n:
        raise InputError("none of the images could be read; pass others")
    columns = [ID, "class", "probability", "box", *CORNERS, "confidence"]
    write_table(output / "maps.csv", pd.DataFrame(rows, columns=columns))
    facts = {"run": args.run.resolve(), "way": way, "sha256": {name: sha256(output / name) for name in written}}
    finish_output(output, "predictions.json", facts | provenance())
    print(f"{bar.n} images, {len(rows)} boxes; wrote {output}")
    return output


# ---------------------------------------------------------------- command
def main(args: argparse.Namespace) -> Path:
    """Predict the images; returns the directory of the results."""
    configure_pillow()
    run = read_run(args.run)
    paths = dict(list(list_images(args.images).items())[: args.limit])
    if args.output.resolve() in {path.resolve().parent for path in paths.values()}:
        raise InputError(f"--output {args.output} holds the images; pass another folder")
    note_seen(run, paths)
    if args.maps:
        return show_maps(args, run, paths)
    predictor = open_predictor(run, pick_device(args.device), args.tta, args.amp, args.depth_dir)
    for name in paths if args.depth_dir else ():
        find_depth(args.depth_dir, name)  # raises InputError if it is missing
    table = read_meta(args, list(paths), predictor.meta_columns())
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
                    figure = draw_look(images.paths[row], images.sizes[row], look, row, THUMBNAIL)
                    figure.axes[0].set_title(f"{name}: {run.task.show(prob[row])}", fontsize=9)
                    save_figure(output / f"{name}.png", figure)
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


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__, "amp", "device", "on_error", "limit", "overwrite")
    add = parser.add_argument
    add("images", nargs="+", type=Path, help="image files or folders, with their subfolders")
    add("--run", type=Path, required=True, help="finished run or blend")
    add("--output", type=Path, default=Path("predictions"), help="where to write")
    add("--depth_dir", type=Path, help="depth maps of the images, of a run with --streams depth")
    add("--csv", type=Path, help="metadata of the images [all missing]")
    add("--image_col", default=ID, help="column of image names in --csv")
    add("--tta", type=int, choices=(1, 2, 4, 8), help="views [as trained]")
    add("--maps", action="store_true", help="draw where each class is seen instead")
    add("--way", choices=tuple(WAYS), help="--maps: how they are made [cam; attention of a ChipNet; rollout of a ViT]")
    add("--class", dest="class_name", help="--maps: this class alone, however probable")
    add("--t_class", type=util.SHARE, default=0.5, help="--maps: probability from which a class is shown")
    add("--t_roi", type=util.SHARE, default=0.3, help="--maps: share of a map's maximum above which there are boxes")
    add("--pictures", action=BooleanOptionalAction, default=True, help="draw a picture per image")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
