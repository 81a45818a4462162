"""Lesion masks, for judging boxes: where the lesion is and how large. Masks never train."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from localize import Box
from plumbing.data import Data
from plumbing.images import frame_of, name_key
from util import ID, InputError

IDEAL = 1.3  # side of the ideal square over the longer side of the mask's bounding box
SMALL = 0.2  # share of the centre square below which a lesion counts as small


def read_mask(mask_dir: Path, name: str, size: tuple[int, int]) -> np.ndarray:
    """Mask NAME.png, or NAME_segmentation.png as the ISIC archive has it, of an original of size (width, height): bool
    (height, width)."""
    path = mask_dir / f"{name_key(name)}.png"
    if not path.exists():
        path = mask_dir / f"{name_key(name)}_segmentation.png"
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise InputError(f"{path} is missing or broken; pass the masks' folder with --mask_dir")
    if mask.shape != size[::-1]:
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
    return mask > 127


def centre_crop(mask: np.ndarray) -> np.ndarray:
    """The centre square of a mask: what networks see of the original."""
    height, width = mask.shape
    x0, y0, x1, y1 = (int(edge) for edge in frame_of(width, height))
    return mask[y0:y1, x0:x1]


def ideal_square(mask: np.ndarray) -> Box | None:
    """Square IDEAL times as wide as the mask, shifted into the original; None if it is empty."""
    if not mask.any():
        return None
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x0, x1, y0, y1 = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    side = min(IDEAL * max(x1 - x0, y1 - y0), width, height)
    left = float(np.clip((x0 + x1 - side) / 2, 0, width - side))
    top = float(np.clip((y0 + y1 - side) / 2, 0, height - side))
    return Box(left, top, left + side, top + side)


def find_mask_dir(data: Data, mask_dir: Path | None) -> Path:
    """The folder named, or masks/ beside the originals."""
    return mask_dir or Path(data.facts["image_dirs"]["train"][0]).parent / "masks"


def shares(table: pd.DataFrame, mask_dir: Path) -> np.ndarray:
    """Share of the centre square that the lesion covers, by row (N,)."""
    sizes = table[["width", "height"]].itertuples(index=False, name=None)
    masks = (read_mask(mask_dir, name, size) for name, size in zip(table[ID], sizes, strict=True))
    return np.array([centre_crop(mask).mean() for mask in masks])
