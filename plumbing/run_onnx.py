"""Predict images with the files beside this script, which export.py wrote. NOT FOR CLINICAL USE.

Needs onnxruntime, numpy and opencv-python-headless; model.json says what the networks were and how images are prepared.

    python run.py FOLDER_OR_IMAGES --csv metadata.csv > predictions.csv
"""

import argparse
import csv
import json
import math
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
MISSING = ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
           "NA", "NULL", "NaN", "None", "n/a", "nan", "null")  # cells of a csv that pandas takes for empty


# ---------------------------------------------------------------- pixels
def decode(path: Path, min_side: float = math.inf) -> tuple[np.ndarray, tuple[int, int]]:
    """Upright RGB pixels uint8 (H, W, 3) and the original's (width, height); a JPEG at 1/2, 1/4 or 1/8 of its size as
    long as its short side keeps min_side pixels."""
    data = np.fromfile(path, np.uint8) if path.is_file() else b""
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if image is None:
        sys.exit(f"{path} is missing, or no JPEG, PNG, WebP or TIFF that OpenCV can read; convert it")
    size = image.shape[1::-1]
    scale = max(scale for scale in (1, 2, 4, 8) if scale == 1 or min(size) // min_side >= scale)
    if scale > 1 and data[:3].tobytes() == b"\xff\xd8\xff":
        image = cv2.imdecode(data, getattr(cv2, f"IMREAD_REDUCED_COLOR_{scale}"))
    return image[:, :, ::-1], size


def resample(image: np.ndarray, axis: int, low: float, high: float, n: int) -> np.ndarray:
    """n rows (axis 0) or columns (1) of an image from low to high by an antialiased bilinear filter, in the integers of
    Pillow."""
    image, low, high = np.moveaxis(image, axis, 0), np.float32(low), np.float32(high)
    step, rows = float(high - low) / n, []
    reach = max(step, 1.0)
    for i in range(n):
        middle = float(low) + (i + 0.5) * step
        first, last = max(int(middle - reach + 0.5), 0), min(int(middle + reach + 0.5), len(image))
        weight = np.maximum(1 - np.abs(np.arange(first, last) + 0.5 - middle) / reach, 0)
        rows.append(np.tensordot(np.floor(weight / weight.sum() * 2**22 + 0.5), image[first:last], 1))
    rows = np.clip((np.stack(rows) + 2**21) // 2**22, 0, 255).astype(np.uint8)
    return np.moveaxis(rows, 0, axis)


def cut(image: np.ndarray, box: tuple, size: int, original: tuple[int, int]) -> np.ndarray:
    """A box (x0, y0, x1, y1 in pixels of the original) of a decoded image: uint8 (size, size, 3), mirrored where the
    box leaves the image."""
    x0, y0, x1, y1 = np.array(box) / round(max(original) / max(image.shape))
    height, width = image.shape[:2]
    left, top, right, bottom = np.clip((x0, y0, x1, y1), 0, [width, height, width, height])
    before = [round(size * (left - x0) / (x1 - x0)), round(size * (top - y0) / (y1 - y0))]
    edges = [size * (right - x0) / (x1 - x0), size * (bottom - y0) / (y1 - y0)]
    inner = [max(1, round(edge) - start) for edge, start in zip(edges, before, strict=True)]
    steps = [(1, left, right, inner[0]), (0, top, bottom, inner[1])]
    for step in reversed(steps) if 0 < height - inner[1] > 2 * (width - inner[0]) else steps:  # as Pillow 13 does
        image = resample(image, *step)
    after = [size - start - length for start, length in zip(before, inner, strict=True)]
    return cv2.copyMakeBorder(image, before[1], after[1], before[0], after[0], cv2.BORDER_REFLECT_101)


# ---------------------------------------------------------------- metadata
def word(text: str) -> str:
    """A cell as the encoders know it: 1, 1.0, 001 and True are "1"; "" if it is missing."""
    text = unicodedata.normalize("NFC", text).strip()
    text = "" if text in MISSING else {"TRUE": "1", "FALSE": "0"}.get(text.upper(), text)
    whole = re.fullmatch(r"(-?)0*(\d+)(\.0*)?", text)
    return whole[1] + whole[2] if whole else text


def encode(row: dict[str, str], encoder: list) -> list[float]:
    """Metadata of one image by column as the numbers that one network takes."""
    values = []
    for name, column in encoder:
        text = word(row.get(name) or "")
        if "values" in column:
            known = [text == value for value in column["values"]]
            values += [*known, text != "" and not any(known), text == ""]
        else:
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            missing = not math.isfinite(number)
            values += [0.0 if missing else (number - column["mean"]) / column["std"], missing]
    return values


# ---------------------------------------------------------------- images
class Model:
    """The networks of a folder that export.py wrote."""

    def __init__(self, folder: Path, int8: bool = False):
        self.facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        names = {"model": "model_int8.onnx" if int8 else "model.onnx", "finder": "finder.onnx"}
        self.sessions = {key: onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
                         for key, name in names.items() if key == "model" or self.facts["finder"]}  # fmt: skip

    def find(self, square: np.ndarray, size: tuple[int, int]):
        """The box of an original of size (width, height), by its square (S, S, 3)."""
        import boxes

        heat, how = self.sessions["finder"].run(["map"], {"image": square[None]})[0][0], dict(self.facts["finder"])
        seen, part = np.zeros_like(heat), boxes.inside(size, how["frame"], len(heat))
        seen[part] = heat[part]  # nothing is looked for in what is mirrored
        margin = how.pop("margin")
        return boxes.enlarge(boxes.find_boxes(seen / max(seen.sum(), 1e-30), size, **how)[0], margin, size)

    def pictures(self, path: Path) -> tuple[np.ndarray, object, dict]:
        """What the networks see of a file, uint8 (S, S, 3 * pictures), the box in it or None, and what is known of
        it."""
        side, found, box, known = self.facts["size"], {}, None, {}
        image, size = decode(path, math.inf if self.facts["exact"] else 2 * side)
        length = max(size) if self.facts["frame"] == "whole" else min(size)
        left, top = (size[0] - length) / 2, (size[1] - length) / 2
        frame = left, top, left + length, top + length
        found["whole"] = cut(image, frame, side, size)
        if self.facts["finder"]:
            box = self.find(found["whole"], size)
            known = {"box_side": str(box.side / min(size))}
            if "crop" in self.facts["pictures"]:
                image, _ = decode(path, int(2 * side / box.side * min(size)))
                found["crop"] = cut(image, box.corners, side, size)
            if "location" in self.facts["pictures"]:
                import boxes

                raster = boxes.box_raster(box.inner, frame, side)
                found["location"] = boxes.hide_outside(found["whole"], raster)
        return np.concatenate([found[name] for name in self.facts["pictures"]], axis=2), box, known

    def predict(self, path: Path, row: dict[str, str]) -> list:
        """The cells of a file's row in the csv of predictions; row: its metadata."""
        picture, box, known = self.pictures(path)
        meta = [value for encoder in self.facts["encoders"] for value in encode(row | known, encoder)]
        inputs = {"image": picture[None]} | ({"meta": np.array([meta], np.float32)} if meta else {})
        cells = [float(x) for values in self.sessions["model"].run(self.facts["outputs"], inputs) for x in values[0]]
        return cells if box is None else [*cells, *box.corners, box.confidence, box.reason]


def key_of(name: str) -> str:
    """Name of an image without its suffix."""
    name = unicodedata.normalize("NFC", name)
    return name.rpartition(".")[0] if name.lower().endswith(SUFFIXES) else name


def main() -> None:
    """Print a csv of predictions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, help="images, or folders of images")
    parser.add_argument("--csv", type=Path, help="metadata: column image_name, and the columns of training")
    parser.add_argument("--int8", action="store_true", help="use model_int8.onnx")
    args = parser.parse_args()
    model, meta, paths = Model(Path(__file__).parent, args.int8), {}, {}
    if args.csv:
        with open(args.csv, encoding="utf-8-sig", newline="") as file:
            meta = {key_of(row["image_name"]): row for row in csv.DictReader(file) if "image_name" in row}
    for given in args.images:
        for path in sorted(given.rglob("*")) if given.is_dir() else [given]:
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                name = key_of(path.relative_to(given).as_posix() if given.is_dir() else path.name)
                if paths.setdefault(name, path) != path:
                    sys.exit(f"{paths[name]} and {path} have the same name; predict them apart")
    bare = Counter(name.rpartition("/")[2] for name in paths)  # a csv may name files without their folders
    rows = {name: meta.get(name) or (bare[end] == 1 and meta.get(end)) or {}
            for name in paths for end in [name.rpartition("/")[2]]}  # fmt: skip
    if not paths or args.csv and not any(rows.values()):
        sys.exit(f"{args.csv} names none of the images in a column image_name" if paths else "no images are named")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image_name", *model.facts["columns"]])
    for name, path in paths.items():
        writer.writerow([name, *model.predict(path, rows[name])])


if __name__ == "__main__":
    main()
