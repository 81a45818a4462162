"""Where to look: maps, from maps to boxes, from boxes to pictures.

A map (h, w) covers the centre square of an original image; a box lies in the original's pixels.

    box = find_box(attention, image_size=(width, height))

References:
    C. Careaga, attention_guided_cropping (2020): the rule "original".
    The thresholds of "component" come from a simulation and are kept in one place below.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from tqdm import tqdm

GRID = 224  # side of the raster on which maps are thresholded; boxes scale with the original
SIGMA = GRID / 19  # smoothing: one chip's noise must not set the maximum
BACKGROUND = 20  # percentile of the map that counts as "nothing here"
THRESHOLD = 0.3  # of the maximum; low, because a threshold at mean + k * std caps the area
KEEP = 0.2  # blobs with this share of the heaviest blob's mass are part of the lesion
PAD = 0.15  # of the blob's side, on each side: border and context are diagnostic
MIN_SIDE = 64 / 224  # of the square; smaller crops only magnify JPEG noise
FULL_SIDE = 0.85  # of the square; larger crops gain nothing over the whole
FLAT = 0.985  # normalised entropy above which a map says nothing


@dataclass(frozen=True)
class Box:
    """A square in pixels of the original, half-open; reason says why it is the full square."""

    x0: float
    y0: float
    x1: float
    y1: float
    reason: str = ""
    confidence: float = 0.0  # 1 - normalised entropy of the map: 0 uniform, 1 a single cell

    @property
    def side(self) -> float:
        """Side in pixels of the original."""
        return self.x1 - self.x0

    def scaled(self, factor: float) -> tuple[float, float, float, float]:
        """Corners in an image that is `factor` times the original's size."""
        return tuple(factor * edge for edge in (self.x0, self.y0, self.x1, self.y1))


# ---------------------------------------------------------------- maps
@torch.inference_mode()
def attention_maps(
    networks: list, array: np.ndarray, device, views: int = 1, batch_size: int = 64, desc: str = ""
) -> np.ndarray:
    """Mean attention of several networks: array (N, S, S, 3) uint8 -> float32 (N, h, w).

    Networks offer attention(image, views) -> (N, h, w), positive, summing to 1.
    """
    maps = []
    starts = range(0, len(array), batch_size)
    for start in tqdm(starts, desc=desc or "attention", unit="batch", leave=False):
        image = torch.from_numpy(np.array(array[start : start + batch_size]))
        image = image.permute(0, 3, 1, 2).to(device)
        each = [network.attention(image, views) for network in networks]
        maps.append(torch.stack(each).mean(dim=0).float().cpu().numpy())
    return np.concatenate(maps)


def upsample(attention: np.ndarray, size: int = GRID) -> np.ndarray:
    """Bilinear enlargement (size, size) in which every cell keeps its place."""
    return cv2.resize(attention.astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR)


def entropy(attention: np.ndarray) -> float:
    """Entropy of a map over that of the uniform map, 0..1."""
    share = attention.ravel().astype(np.float64)
    share = share[share > 0] / share.sum()
    return float(-(share * np.log(share)).sum() / np.log(attention.size))


# ---------------------------------------------------------------- map -> box
def bounding_square(mask: np.ndarray, pad: float) -> tuple[float, float, float]:
    """Smallest square around a mask, widened: centre x, centre y and side in mask pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x0, x1, y0, y1 = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    return (x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0) * (1 + 2 * pad)


def original_rule(attention: np.ndarray, num_devs: float):
    """The original's square around every pixel above mean + num_devs * std, or a reason."""
    raster = upsample(attention)
    mask = raster > raster.mean() + num_devs * raster.std()
    if not mask.any():
        return "no pixel above the threshold"
    return bounding_square(mask, pad=0)


def component_rule(attention: np.ndarray, num_devs: float):
    """Square around the heaviest blobs of the smoothed map, or a reason."""
    if entropy(attention) > FLAT:
        return "flat map"
    raster = cv2.GaussianBlur(upsample(attention), (0, 0), SIGMA, borderType=cv2.BORDER_REFLECT)
    raster = np.maximum(raster - np.percentile(raster, BACKGROUND), 0)
    if raster.max() <= 0:
        return "flat map"
    mask = (raster >= THRESHOLD * raster.max()).astype(np.uint8)
    count, labels = cv2.connectedComponents(mask, connectivity=8)
    mass = np.bincount(labels.ravel(), raster.ravel(), minlength=count)
    mass[0] = 0  # label 0 is the background
    x, y, side = bounding_square((mass >= KEEP * mass.max())[labels], PAD)
    if side >= FULL_SIDE * GRID:
        return "fills the image"
    return x, y, max(side, MIN_SIDE * GRID)


RULES = {"component": component_rule, "original": original_rule}


def find_box(
    attention: np.ndarray,
    image_size: tuple[int, int],
    rule: str = "component",
    num_devs: float = 1.5,
) -> Box:
    """Square to cut from an original of image_size (width, height) px, by its attention (h, w).

    Where the rule finds nothing the box is the whole centre square, with the reason. A box that
    would leave the image is shifted, never clipped: "original" stays in the centre square, the
    others may use all of the picture.
    """
    width, height = image_size
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    finite = np.isfinite(attention).all() and attention.sum() > 0
    confidence = 1 - entropy(attention) if finite else 0.0
    found = RULES[rule](attention, num_devs) if finite else "map is not finite"
    if isinstance(found, str):
        return Box(left, top, left + short, top + short, found, confidence)
    scale = short / GRID
    x, y, side = left + found[0] * scale, top + found[1] * scale, min(found[2] * scale, short)
    frame = (left, top, left + short, top + short) if rule == "original" else (0, 0, width, height)
    x0 = float(np.clip(x - side / 2, frame[0], frame[2] - side))
    y0 = float(np.clip(y - side / 2, frame[1], frame[3] - side))
    return Box(x0, y0, x0 + side, y0 + side, "", confidence)


# ---------------------------------------------------------------- pictures
def draw_row(axes, image: np.ndarray, size: tuple[int, int], box: Box | None, attention, crop):
    """Draw one image on three axes: with its box, its attention, and the crop.

    image: a picture (H, W, 3) of an original of `size` (width, height); attention (h, w), box and
    crop may be None.
    """
    height, width = image.shape[:2]
    scale = width / size[0]
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(image)
    axes[1].imshow(image)
    if box is not None:
        x0, y0, x1, y1 = box.scaled(scale)
        corners = [x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0]
        axes[0].plot(*corners, color="lime", linewidth=1.5, clip_on=False)
    if attention is not None:
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        extent = (left, left + short, top + short, top)
        axes[1].imshow(upsample(attention), cmap="inferno", alpha=0.6, extent=extent)
    for axis in axes[:2]:  # neither box nor map may widen the frame
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    if crop is not None:
        axes[2].imshow(crop)
