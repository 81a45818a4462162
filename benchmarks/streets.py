"""Draw wide scenes in which one small object decides the class, and judge where crops of them lie.

    python benchmarks/streets.py draw DATA streets
    python benchmarks/streets.py judge data/crops/scout_attention --boxes streets/objects.csv

draw: a scene is a patchwork of real photographs (isic2018, polyps256 and bccd in DATA), which no saliency can tell from
its subject: everything differs from everything. Into it are pasted one sign, a disc with a handwritten digit of MNIST
(0 to 4), which is the class and decides both colours of the disc, and some blank discs of any two of these colours. A
sign measures 2 to 8 % of the long side.
Writes OUTPUT/images, train.csv (image_name, target) and objects.csv (the sign's box, to judge with, never to learn).

judge: share of the images whose sign lies as a whole in the best crop, and in any of their crops, of held-out maps
alone (oof = 1 in the boxes).
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import util
from plumbing.data import CORNERS, numbers, read_table
from plumbing.files import write_table
from util import ID, TARGET, InputError

KINDS = 5
LONG, SHORT = (1600, 2048), (800, 1200)  # pixels of a scene
SIGN = 0.02, 0.08  # side of a sign over the long side of its scene, drawn evenly on a logarithmic scale
BLANKS = 2, 6  # discs without a digit
SOURCES = ("isic2018", "polyps256", "bccd")
COLORS = np.array([(200, 40, 40), (40, 80, 190), (235, 235, 235), (235, 200, 40), (60, 140, 70)], np.float32)
INSIDE = 0.98  # of the sign's area that a crop must hold: corners are rounded to pixels


def read_rgb(path: Path) -> np.ndarray:
    """A photograph, uint8 (H, W, 3)."""
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def draw_background(photos: list[Path], rng: np.random.Generator) -> np.ndarray:
    """A patchwork of photographs of many sizes, each with contrast and brightness of its own: float32 (H, W, 3)."""
    width, height = (int(rng.integers(*span)) for span in (LONG, SHORT))
    scene = np.zeros((height, width, 3), np.float32)
    for size in (900, 700, 500, 500, 350, 350, 350, 250, 250, 250, 250, 150, 150, 150, 150):
        for _ in range(2 if size < 900 else 6):
            photo = read_rgb(photos[rng.integers(len(photos))])
            side = int(size * rng.uniform(0.7, 1.3))
            patch = cv2.resize(photo, (side, int(side * rng.uniform(0.6, 1.4))), interpolation=cv2.INTER_AREA)
            patch = (patch - 128.0) * rng.uniform(0.6, 1.2) + rng.uniform(70, 180)
            y, x = rng.integers(-side // 2, height), rng.integers(-side // 2, width)
            part = scene[max(y, 0) : y + len(patch), max(x, 0) : x + patch.shape[1]]
            part[:] = patch[max(-y, 0) :, max(-x, 0) :][: part.shape[0], : part.shape[1]]
    return scene


def draw_disc(colors, digit: np.ndarray | None, side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A disc of one colour with a border of another, and a digit (28, 28) on it or none: colours (side, side, 3) and
    opacity (side, side, 1)."""
    fill, edge = colors
    y, x = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1
    radius = np.hypot(x, y)[..., None]
    disc = np.where(radius > rng.uniform(0.75, 0.9), edge, fill).astype(np.float32)
    if digit is not None:
        ink = np.zeros((side, side), np.float32)
        inner = max(8, int(0.72 * side))
        start = (side - inner) // 2
        ink[start : start + inner, start : start + inner] = cv2.resize(digit, (inner, inner)) / 255
        ink = ink[..., None]
        disc = disc * (1 - ink) + (20 if fill.mean() > 110 else 240) * ink
    opacity = np.clip((1 - radius) * side / 2, 0, 1)
    return (disc * rng.uniform(0.7, 1.1) + rng.normal(0, 4, disc.shape)).astype(np.float32), opacity


def paste(scene: np.ndarray, colors, digit: np.ndarray | None, taken: list, rng: np.random.Generator) -> tuple:
    """Paste a disc of two colours where none is yet; returns its box (x0, y0, x1, y1)."""
    height, width = scene.shape[:2]
    side = int(width * np.exp(rng.uniform(*np.log(SIGN))))
    while True:
        x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        if all(x >= x1 or x + side <= x0 or y >= y1 or y + side <= y0 for x0, y0, x1, y1 in taken):
            break
    color, opacity = draw_disc(colors, digit, side, rng)
    part = scene[y : y + side, x : x + side]
    part[:] = part * (1 - opacity) + color * opacity
    taken.append((x, y, x + side, y + side))
    return taken[-1]


def draw(args: argparse.Namespace) -> None:
    """Write scenes and their tables."""
    photos = [path for name in SOURCES for path in sorted((args.data / name / "images").glob("*.jpg"))]
    with np.load(args.data / "mnist" / "train.npz", allow_pickle=False) as file:
        digits, kinds = file["x"], file["y"]
    if not photos:
        raise InputError(f"{args.data} has no {', '.join(SOURCES)} with images/*.jpg; pass another folder")
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in tqdm(range(args.count), unit="scene"):
        rng = np.random.default_rng([args.seed, i])
        scene, taken, kind = draw_background(photos, rng), [], i % KINDS
        digit = digits[rng.choice(np.flatnonzero(kinds == kind))]
        box = paste(scene, COLORS[[kind, kind - 2]], digit, taken, rng)
        for _ in range(rng.integers(*BLANKS)):
            paste(scene, COLORS[rng.permutation(KINDS)[:2]], None, taken, rng)
        picture = np.clip(cv2.GaussianBlur(scene, (0, 0), 0.7), 0, 255).astype(np.uint8)
        name = f"{i:04d}"
        path = args.output / "images" / f"{name}.jpg"
        cv2.imwrite(str(path), picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
        rows.append({ID: name, TARGET: kind} | dict(zip(CORNERS, box, strict=True)))
    table = pd.DataFrame(rows)
    write_table(args.output / "train.csv", table[[ID, TARGET]])
    write_table(args.output / "objects.csv", table[[ID, *CORNERS]])


def judge(args: argparse.Namespace) -> None:
    """Print how often the crops hold the objects."""
    boxes = read_table(args.crop_dir / "train_boxes.csv", (*CORNERS, "oof"), unique=False)
    boxes = boxes[boxes["oof"] == 1].reset_index(drop=True)
    objects = read_table(args.boxes, CORNERS).set_index(ID).loc[boxes[ID]].reset_index()
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
        [numbers(table, column, args.boxes) for column in CORNERS] for table in (boxes, objects)
    )
    overlap = np.clip(np.minimum(ax1, bx1) - np.maximum(ax0, bx0), 0, None)
    overlap *= np.clip(np.minimum(ay1, by1) - np.maximum(ay0, by0), 0, None)
    held = pd.Series(overlap / ((bx1 - bx0) * (by1 - by0)) >= INSIDE).groupby(boxes[ID])
    best = ~boxes[ID].duplicated()
    crop, sign = (np.median(side[best]) for side in (ax1 - ax0, bx1 - bx0))
    sides = f"median side of a crop {crop:.0f} px, of a sign {sign:.0f} px"
    print(f"{args.crop_dir}: {held.first().mean():.3f} of {len(held)} images have their sign in the best crop, "
          f"{held.any().mean():.3f} in one of up to {held.size().max()}; {sides}")  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("draw", allow_abbrev=False).add_argument
    add("data", type=Path, help="folder with isic2018, polyps256, bccd and mnist")
    add("output", type=Path, help="where to write")
    add("--count", type=util.COUNT, default=700, help="scenes")
    add("--seed", type=int, default=0, help="of everything drawn")
    add = commands.add_parser("judge", allow_abbrev=False).add_argument
    add("crop_dir", type=Path, help="from crop.py")
    add("--boxes", type=Path, required=True, help="objects.csv")
    return parser


def main(args: argparse.Namespace) -> None:
    """Draw or judge."""
    (draw if args.command == "draw" else judge)(args)


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
