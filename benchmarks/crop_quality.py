"""How well boxes find the lesion, judged by masks: every map and rule beside plain baselines.

    python benchmarks/crop_quality.py DATA_DIR --folds 2 --montage crops.png

Takes the maps of all crop.py results in DATA_DIR/crops, and for each the rule of localize.py and the original's (square
around all above mean + k std, clipped at the border). Coverage is the share of the lesion inside the box; IoU is with
the ideal square, 1.3 times the mask's bounding box; small lesions cover less than 20 % of the centre square;
MaxBoxAccV2 asks for the mask's bounding box from the map at its best threshold; a peak hits if it lies on the lesion.

References:
    Choe et al., Evaluating Weakly Supervised Object Localization Methods Right, CVPR 2020: MaxBoxAccV2.
    Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016: the pointing game.
"""

import argparse
from pathlib import Path

import cv2
import lesions
import numpy as np
import pandas as pd
from tqdm import tqdm

import localize
import util
from localize import GRID, Box
from plumbing.arrays import open_array
from plumbing.data import Data, read_data
from plumbing.figures import draw_row, new_figure, save_figure
from plumbing.images import frame_of
from util import FOLD, ID, InputError

THRESHOLDS = np.arange(0.05, 1, 0.05)  # of MaxBoxAccV2, over the map's maximum
DELTAS = (0.3, 0.5, 0.7)
HEADER = ("", "covered", ">= .95", "< .5", "IoU", "IoU small", "V2", "peak", "side", "whole",
          "not square")  # fmt: skip


# ---------------------------------------------------------------- boxes by baseline
def centre_box(side: float, size: tuple[int, int]) -> Box:
    """Centre square with a side in shares of the short side."""
    width, height = size
    half = side * min(size) / 2
    return Box(width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)


def grey_map(square: np.ndarray) -> np.ndarray:
    """Darkness of a blurred picture (S, S, 3): the prior that our own sources do without."""
    grey = cv2.GaussianBlur(cv2.cvtColor(square, cv2.COLOR_RGB2GRAY), (0, 0), len(square) / 56)
    return 255 - grey.astype(np.float32)


def otsu_box(square: np.ndarray, size: tuple[int, int]) -> Box:
    """Box of what Otsu's threshold calls dark, padded as ours."""
    raster = cv2.resize(grey_map(square), (GRID, GRID))
    blobs = localize.pick_blobs(raster - raster.min(), localize.otsu(raster) - raster.min())
    x, y, side = localize.bounding_square(blobs, localize.PAD)
    if side >= localize.FULL_SIDE * GRID:
        return centre_box(1.0, size)
    scale, (left, top, *_) = min(size) / GRID, frame_of(*size)
    side = side * scale
    x0, y0 = localize.fit_in(left + x * scale, top + y * scale, side, (0, 0, *size))
    return Box(x0, y0, x0 + side, y0 + side)


def clipped_box(attention: np.ndarray, num_devs: float, size: tuple[int, int]) -> Box:
    """The original's box: as --rule original, but clipped where it leaves the centre square."""
    found = localize.original_rule(attention, num_devs=num_devs)
    if isinstance(found, str):
        return centre_box(1.0, size)
    x, y, side = found
    edges = np.clip([x - side / 2, y - side / 2, x + side / 2, y + side / 2], 0, GRID)
    left, top, *_ = frame_of(*size)
    edges = edges * min(size) / GRID + np.array([left, top, left, top])
    return Box(*edges)


# ---------------------------------------------------------------- scores
def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = max(0.0, min(a.x1, b.x1) - max(a.x0, b.x0))
    height = max(0.0, min(a.y1, b.y1) - max(a.y0, b.y0))
    areas = [(box.x1 - box.x0) * (box.y1 - box.y0) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def coverage(mask: np.ndarray, box: Box) -> float:
    """Share of a mask inside a box."""
    x0, y0, x1, y1 = (max(round(edge), 0) for edge in box.corners)
    return mask[y0:y1, x0:x1].sum() / mask.sum()


def best_boxes(attention: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """IoU of the best blob's bounding box with the mask's, by threshold (T,)."""
    raster = localize.upsample(attention)
    raster = raster / raster.max()
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    scale = GRID / len(mask)
    truth = Box(columns[0] * scale, rows[0] * scale, (columns[-1] + 1) * scale,
                (rows[-1] + 1) * scale)  # fmt: skip
    best = []
    for threshold in THRESHOLDS:
        blobs = cv2.connectedComponentsWithStats((raster >= threshold).astype(np.uint8))[2][1:]
        best.append(max(overlap(Box(x, y, x + w, y + h), truth) for x, y, w, h, _ in blobs))
    return np.array(best)


def hits(attention: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the peak of a map, or of the raster of a constant one its centre, is on the mask."""
    raster = localize.upsample(attention)
    peaks = np.argwhere(raster >= raster.max())
    row, column = ((peaks.mean(axis=0) + 0.5) * len(mask) / GRID).astype(int)
    return bool(mask[row, column])


def score(boxes: list[Box], cases: list[dict], maps: np.ndarray | None) -> list[float]:
    """One row of the table, without its name."""
    covered = np.array([coverage(c["mask"], box) for c, box in zip(cases, boxes, strict=True)])
    iou = np.array([overlap(c["ideal"], box) for c, box in zip(cases, boxes, strict=True)])
    small = np.array([case["share"] < lesions.SMALL for case in cases])
    v2 = peak = np.nan
    if maps is not None:
        pairs = [(m, c["centre"]) for m, c in zip(maps, cases, strict=True) if c["centre"].any()]
        best = np.array([best_boxes(*pair) for pair in pairs])
        v2 = np.mean([(best >= delta).mean(axis=0).max() for delta in DELTAS])
        peak = np.mean([hits(*pair) for pair in pairs])
    side = np.array([box.side / min(c["size"]) for c, box in zip(cases, boxes, strict=True)])
    odd = [abs((box.y1 - box.y0) - box.side) > 0.51 for box in boxes]
    return [covered.mean(), (covered >= 0.95).mean(), (covered < 0.5).mean(), iou.mean(),
            iou[small].mean() if small.any() else np.nan, v2, peak, side.mean(),
            (side > 0.999).mean(), np.mean(odd)]  # fmt: skip


# ---------------------------------------------------------------- the table
def read_cases(data: Data, folds: list[int], mask_dir: Path) -> tuple[np.ndarray, list[dict]]:
    """Rows of the folds whose mask is not empty, and what their boxes are judged by."""
    rows, cases = [], []
    for row, record in enumerate(tqdm(data.train.to_dict("records"), desc="masks")):
        size = record["width"], record["height"]
        if record[FOLD] in folds:
            mask = lesions.read_mask(mask_dir, record[ID], size)
            if mask.any():
                centre = lesions.centre_crop(mask)
                ideal = lesions.ideal_square(mask)
                cases.append({"mask": mask, "ideal": ideal, "size": size, "centre": centre,
                              "share": centre.mean()})  # fmt: skip
                rows.append(row)
    if not cases:
        raise InputError(f"no image of folds {folds} has a lesion mask in {mask_dir}")
    return np.array(rows), cases


def plot_cases(path: Path, squares: np.ndarray, cases: list, boxes: list, maps: np.ndarray) -> None:
    """Best, median and worst boxes by IoU: image with box (green) and ideal square, map."""
    iou = np.array([overlap(c["ideal"], box) for c, box in zip(cases, boxes, strict=True)])
    order = np.argsort(-iou, kind="stable")
    middle = len(order) // 2 - 3
    chosen = [*order[:6], *order[middle : middle + 6], *order[-6:]]
    figure = new_figure(figsize=(13, 13.5))
    axes = figure.subplots(6, 6)
    for n, case in enumerate(chosen):
        row, column = 2 * (n // 6), n % 6
        size = cases[case]["size"]
        left, top, *_ = frame_of(*size)
        inside = [Box(b.x0 - left, b.y0 - top, b.x1 - left, b.y1 - top)
                  for b in (boxes[case], cases[case]["ideal"])]  # fmt: skip
        pair = axes[row, column], axes[row + 1, column]
        draw_row(pair, squares[case], (min(size),) * 2, inside[:1], maps[case], None)
        x0, y0, x1, y1 = np.array(inside[1].corners) * len(squares[case]) / min(size)
        pair[0].plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="yellow", linestyle="--")
        word = ("best", "median", "worst")[n // 6]
        pair[0].set_title(f"{word}: IoU {iou[case]:.2f}", fontsize=9)
    save_figure(path, figure)


def main(args: argparse.Namespace) -> None:
    """Judge all boxes; print the table."""
    data = read_data(args.data_dir)
    folds = args.folds or list(range(data.facts["n_folds"]))
    rows, cases = read_cases(data, folds, lesions.find_mask_dir(data, args.mask_dir))
    array = open_array(data.array_path("train"), len(data.train))
    sizes, frame = [case["size"] for case in cases], data.facts["frame"]
    table = {
        "whole image": ([centre_box(1.0, size) for size in sizes], np.ones((len(rows), 7, 7))),
        "centre .8": ([centre_box(0.8, size) for size in sizes], None),
        "centre .6": ([centre_box(0.6, size) for size in sizes], None),
    }
    if frame == "square":
        table["dark by Otsu's threshold"] = (
            [otsu_box(array[row], size) for row, size in zip(rows, sizes, strict=True)],
            np.stack([cv2.resize(grey_map(array[row]), (56, 56)) for row in rows]),
        )
    for path in sorted(args.data_dir.glob("crops/*/train_attention.npy")):
        name, maps = path.parent.name, np.load(path, allow_pickle=False)[rows]
        for num_devs in (1.5, 1.0) if frame == "square" else ():
            boxes = [clipped_box(m, num_devs, size) for m, size in zip(maps, sizes, strict=True)]
            table[f"{name}, original k = {num_devs}"] = boxes, maps
        boxes = [localize.find_box(m, size, frame=frame) for m, size in zip(maps, sizes, strict=True)]
        table[f"{name}, ours"] = boxes, maps if frame == "square" else None  # V2 and peak are of the centre square
        if args.montage and name == args.show:
            plot_cases(args.montage, array[rows], cases, boxes, maps)
    print(f"{len(rows)} images with a lesion, folds {folds}\n")
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for name, (boxes, maps) in table.items():
        values = pd.Series(score(boxes, cases, maps)).map(lambda v: "" if v != v else f"{v:.3f}")
        print(f"| {name} | " + " | ".join(values) + " |")


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    parser.add_argument("data_dir", type=Path, help="from preprocess.py, with crops/")
    parser.add_argument("--folds", type=int, nargs="+", help="held-out folds to judge [all]")
    parser.add_argument("--mask_dir", type=Path, help="NAME.png by image [masks/ by the images]")
    parser.add_argument("--show", default="saliency", help="crops of which the montage is made")
    parser.add_argument("--montage", type=Path, help="picture of best, median and worst boxes")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
