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
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

import util
from calibration import calibrated
from inference import Images, Look, list_images, open_predictor, read_chunks, read_meta
from localize import upsample
from plumbing.data import CORNERS
from plumbing.distributed import pick_device
from plumbing.figures import draw_row, new_figure, save_figure
from plumbing.files import finish_output, open_output, provenance, sha256, write_table
from plumbing.images import configure_pillow, name_key, read_image
from plumbing.runs import read_run
from util import ID, PROB, InputError

THUMBNAIL = 448  # longest side, in pixels, of the picture an image is drawn from


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
