"""Where to look: maps, from maps to boxes, and the Finder that does both for training images and new ones alike.

A map (h, w) covers the centre square of an original image, or with padding all of it; a box lies in the original's
pixels. Maps come from anything with attention(image, views) -> (N, h, w), positive, summing to 1: a ChipNet, a Saliency
(no labels), a maps.Explainer (any trained network), or a Product of them. A new source of maps is a row of SOURCES.

    box = find_box(attention, image_size=(width, height))

References:
    C. Careaga, attention_guided_cropping (2020): the rule "original".
    Zhu et al., Saliency Optimization from Robust Background Detection, CVPR 2014: what is cut off by the frame is
    rarely the subject.
    Zhang et al., Rethinking the Route Towards Weakly Supervised Object Localization, CVPR 2020: training a localiser
    on its own pseudo labels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from maps import WAYS, normalised
from models import Scout, autocast, load_checkpoint, mean_over_views
from plumbing.backbones import find_stages, run_backbone
from plumbing.cells import split
from plumbing.data import MetaEncoder
from plumbing.files import check_hashes
from plumbing.images import Frame, frame_of, inside, inside_view
from tasks import task_of
from util import InputError

# map -> box. Tuned on two folds of real dermoscopy images, reported on the third.
GRID = 224  # side of the raster on which maps are thresholded; boxes scale with the original
SMOOTHING = 3 / 8  # of a cell: the noise of one cell must not set the maximum
BACKGROUND = 20  # percentile of the map that counts as "nothing here"
THRESHOLD = 0.2  # of the maximum; low, because a threshold at mean + k * std caps the area
KEEP = 0.4  # blobs with this share of the heaviest blob's weight are part of the lesion
CENTRE = 0.25  # of the side: width of the prior that photographers centre the subject
PAD = 0.18  # of the blob's side, on each side: border and context are diagnostic
MIN_SIDE = 0.2  # of the square; smaller crops only magnify JPEG noise
FULL_SIDE = 0.85  # of the square; larger crops gain nothing over the whole
PEAK_CELLS = 4  # side of a box around a peak, in cells of the map
FLAT = 0.985  # normalised entropy above which a map says nothing
SPECK = 25 / (256 * 320)  # of the picture; smaller parts of a map of a class get no box (the original's 25 pixels)
WHOLE = np.asarray  # the part of a raster that lies in the image: all of it

# saliency
SALIENCY_STRIDES = (4, 8, 16)  # of the feature maps that are read; the map has stride 4
SALIENCY_BATCH = 8  # images at a time: their features on one grid are large
BORDER = 3  # cells around the frame that stand for the background
FIT_IMAGES, FIT_PIXELS = 256, 256  # images to learn from, and pixels of each
FIT_C = 1e-4  # inverse strength of its L2 penalty


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the original, half-open, square where it is to be cropped; reason says why it is the
    full square."""

    x0: float
    y0: float
    x1: float
    y1: float
    reason: str = ""
    confidence: float = 0.0  # share of the map in the box less the box's share of the square
    inner: tuple[float, float, float, float] | None = None  # corners of what an enlarged box is around

    @property
    def side(self) -> float:
        """Side in pixels of the original."""
        return self.x1 - self.x0

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1."""
        return self.x0, self.y0, self.x1, self.y1


# ---------------------------------------------------------------- maps
@torch.no_grad()
def attention_maps(sources: list, seen, device, views: int = 1, batch_size: int = 16) -> np.ndarray:
    """Mean attention of several sources for images uint8 (N, S, S, 3) or a Bag: float32 (N, h, w)."""
    maps = []
    for image in split(seen, batch_size):
        each = [source.attention(image.to(device), views) for source in sources]
        maps.append(torch.stack(each).mean(dim=0).float().cpu().numpy())
    return np.concatenate(maps)


class Saliency:
    """What differs from the background, told by the features of a network that knows no lesion. A linear score on
    multi-scale features, their contrast to the border of the picture, and the Mahalanobis distance of the colour from
    the border's. Without a score it is that distance."""

    def __init__(self, network: nn.Module, weight: torch.Tensor | None = None, bias: float = 0.0):
        self.network, self.weight, self.bias = network, weight, bias
        self._stages: list[str] | None = None

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """image uint8 (N, 3, S, S) -> (N, D, S / 4, S / 4); the last channel is the distance."""
        if self._stages is None:
            found = find_stages(self.network, image, SALIENCY_STRIDES)
            self._stages = [found[stride] for stride in SALIENCY_STRIDES]
        network = self.network
        _, outputs = run_backbone(network, self._stages, lambda: network.backbone(network.normalise(image)))
        stages = [outputs[name] for name in self._stages]
        grid = stages[0].shape[-1]
        color = F.adaptive_avg_pool2d(image.float() / 255, grid)
        color = F.avg_pool2d(F.pad(color, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        scaled = [F.interpolate(x.float(), size=(grid, grid), mode="bilinear") for x in stages]
        x = torch.cat([*scaled, color], dim=1)
        border = torch.ones(grid, grid, dtype=torch.bool, device=x.device)
        border[BORDER:-BORDER, BORDER:-BORDER] = False
        contrast = x - x[:, :, border].median(dim=2).values[:, :, None, None]
        with torch.autocast(image.device.type, enabled=False):  # differences of small numbers
            distance = background_distance(color, border).log1p()
        return torch.cat([x, contrast, distance.unsqueeze(1)], dim=1)

    def attention(self, image: torch.Tensor, views: int = 1) -> torch.Tensor:
        """image uint8 (N, 3, S, S) -> attention (N, S / 4, S / 4)."""

        def attend(image: torch.Tensor) -> torch.Tensor:
            features = self.features(image)
            if self.weight is None:
                return normalised(features[:, -1].expm1())
            score = torch.einsum("ndhw,d->nhw", features, self.weight.to(features)) + self.bias
            return normalised(score.sigmoid())

        parts = image.split(SALIENCY_BATCH)
        return torch.cat([mean_over_views(attend, part, views) for part in parts])


def background_distance(color: torch.Tensor, border: torch.Tensor) -> torch.Tensor:
    """Mahalanobis distance (N, n, n) of colours (N, 3, n, n) in 0..1 from those of the border. The border's colours are
    described without the 30 % farthest from their median (hair, ruler, a lesion that reaches it), with a floor of 1.4 %
    of the range on their spread."""
    sample = color[:, :, border].transpose(1, 2)  # (N, P, 3)
    away = (sample - sample.median(dim=1, keepdim=True).values).square().sum(dim=2)
    nearest = away.argsort(dim=1)[:, : int(0.7 * sample.shape[1])]
    sample = sample.gather(1, nearest.unsqueeze(2).expand(-1, -1, 3))
    mean = sample.mean(dim=1, keepdim=True)
    centred = sample - mean
    spread = centred.transpose(1, 2) @ centred / sample.shape[1]
    spread = spread + 2e-4 * torch.eye(3, device=color.device)
    offset = color - mean.transpose(1, 2).unsqueeze(3)
    solved = torch.linalg.solve(spread, offset.flatten(2))
    return (offset.flatten(2) * solved).sum(dim=1).clamp_min(0).sqrt().view_as(color[:, 0])


def fit_saliency(network: nn.Module, array: np.ndarray, rows: np.ndarray, device, seed: int = 0) -> Saliency:
    """Learn a Saliency from some rows of images (N, S, S, 3) uint8 alone, no labels. Pseudo labels are the blobs that
    stand out from the border's colours; a logistic regression on the features keeps what these blobs have in common
    over all images. Raises InputError where there are none."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    contrast, inputs, labels = Saliency(network), None, []
    with torch.no_grad():
        chosen = np.sort(rng.permutation(rows)[:FIT_IMAGES])
        for place, row in enumerate(tqdm(chosen, desc="saliency", unit="image", leave=False)):
            image = torch.from_numpy(np.array(array[row])).permute(2, 0, 1)[None].to(device)
            features = contrast.features(image)[0].cpu().numpy()  # (D, n, n)
            distance = np.expm1(features[-1])
            blobs = pick_blobs(distance, otsu(distance))
            pixels = rng.choice(blobs.size, min(FIT_PIXELS, blobs.size), replace=False)
            if inputs is None:  # a large network's take a gigabyte: there is one copy, no more
                inputs = np.empty((len(chosen) * len(pixels), len(features)), np.float32)
            part = slice(place * len(pixels), (place + 1) * len(pixels))
            inputs[part] = features.reshape(len(features), -1)[:, pixels].T
            labels.append(blobs.ravel()[pixels])
    labels = np.concatenate(labels)
    if labels.min() == labels.max():
        raise InputError("saliency finds nothing that differs from the images' borders; pass another --source")
    scaler = StandardScaler(copy=False).fit(inputs)
    fit = LogisticRegression(C=FIT_C, max_iter=200)
    fit.fit(scaler.transform(inputs), labels)
    weight = fit.coef_[0] / scaler.scale_
    bias = float(fit.intercept_[0] - weight @ scaler.mean_)
    return Saliency(network, torch.tensor(weight, dtype=torch.float32), bias)


class Product:
    """Cell by cell geometric mean of two maps, on the finer grid: where both look."""

    def __init__(self, first, second):
        self.sources = first, second

    def attention(self, image: torch.Tensor, views: int = 1) -> torch.Tensor:
        """image uint8 (N, 3, S, S) -> attention (N, h, w)."""
        maps = [source.attention(image, views).unsqueeze(1) for source in self.sources]
        size = max(tuple(m.shape[-2:]) for m in maps)
        fine = [F.interpolate(m, size=size, mode="bilinear") for m in maps]
        return normalised((fine[0] * fine[1]).sqrt().squeeze(1))


@dataclass(frozen=True)
class Source:
    """A source of maps: a way to explain the networks of a trained run (maps.WAYS), a saliency, or the product of both.
    A ChipNet or scout that is to look for no output in particular is its own source of attention."""

    way: str | None = None
    saliency: bool = False

    def make(self, network, saliency: Saliency | None, meta=None, evidence: Callable | None = None, layer=None):
        """What has attention(image, views); meta, evidence and layer as of maps.Explainer."""
        parts = [saliency] if self.saliency else []
        if self.way is not None:
            plain = self.way == "attention" and evidence is None
            parts.insert(0, network if plain else WAYS[self.way](network, meta, evidence, layer))
        return parts[0] if len(parts) == 1 else Product(*parts)


SOURCES = {"attention*saliency": Source("attention", saliency=True), **{way: Source(way) for way in WAYS},
           "saliency": Source(saliency=True)}  # fmt: skip


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


def original_rule(attention: np.ndarray, part: Callable = WHOLE, num_devs: float = 1.5):
    """The original's square around every pixel above mean + num_devs * std, or a reason."""
    raster = part(upsample(attention))
    mask = raster > raster.mean() + num_devs * raster.std()
    if not mask.any():
        return "no pixel above the threshold"
    return bounding_square(mask, pad=0)


def otsu(raster: np.ndarray) -> float:
    """Otsu's threshold of a map: the best split into two levels."""
    low, high = float(raster.min()), float(raster.max())
    levels = np.rint((raster - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
    level, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return low + (level + 0.5) / 255 * (high - low)


def pick_blobs(raster: np.ndarray, threshold: float, centre: float = CENTRE) -> np.ndarray:
    """Blobs of a map (n, m) above a threshold that are, or belong to, the subject: bool (n, m). A blob counts by its
    mass, less far from the centre (by a normal density of width `centre`, in long sides; 0: everywhere alike), and less
    where the frame cuts it off."""
    mask = (raster >= threshold).astype(np.uint8)
    count, labels = cv2.connectedComponents(mask, connectivity=8)
    side = max(raster.shape)
    down, right = ((np.arange(n) + 0.5) / side - n / (2 * side) for n in raster.shape)
    prior = np.exp(-(down[:, None] ** 2 + right**2) / (2 * centre**2)) if centre else np.ones(raster.shape)
    weight = np.bincount(labels.ravel(), (raster * prior).ravel(), minlength=count)
    frame = np.concatenate([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    on_frame = np.bincount(frame, minlength=count)
    area = np.maximum(np.bincount(labels.ravel(), minlength=count), 1)
    weight *= np.exp(-on_frame / np.sqrt(area))
    weight[0] = 0  # label 0 is the background
    return ((weight >= KEEP * weight.max()) & (weight > 0))[labels]


def component_rule(attention: np.ndarray, part: Callable = WHOLE, centre: float = CENTRE):
    """Square around the heaviest blobs of the smoothed map, or a reason."""
    if entropy(part(attention)) > FLAT:
        return "flat map"
    sigma = SMOOTHING * GRID / len(attention)
    raster = cv2.GaussianBlur(part(upsample(attention)), (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    raster = np.maximum(raster - np.percentile(raster, BACKGROUND), 0)
    if raster.max() <= 0:
        return "flat map"
    x, y, side = bounding_square(pick_blobs(raster, THRESHOLD * raster.max(), centre), PAD)
    if side >= FULL_SIDE * GRID:
        return "fills the image"
    return x, y, max(side, MIN_SIDE * GRID)


def fit_in(x: float, y: float, side: float, frame: tuple) -> tuple[float, float]:
    """Upper left corner of the square around (x, y), shifted into a frame (x0, y0, x1, y1), or centred on it along an
    axis on which it is longer."""
    corner = []
    for middle, low, high in ((x, frame[0], frame[2]), (y, frame[1], frame[3])):
        room = high - low - side
        corner.append(float(np.clip(middle - side / 2, low, high - side)) if room >= 0 else low + room / 2)
    return corner[0], corner[1]


def widen(box: Box, factor: float, image_size: tuple[int, int]) -> Box:
    """A box around a box, `factor` times as wide where the original has the room."""
    side = max(box.side, min(box.side * factor, *image_size))
    middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    x0, y0 = fit_in(*middle, side, (0, 0, *image_size))
    return Box(x0, y0, x0 + side, y0 + side)


def enlarge(box: Box, margin: float, image_size: tuple[int, int]) -> Box:
    """A box with `margin` times its side added on each side where the original has the room, around what it was."""
    wide = widen(box, 1 + 2 * margin, image_size)
    return replace(wide, reason=box.reason, confidence=box.confidence, inner=box.inner or box.corners)


def peak_rule(attention: np.ndarray, part: Callable = WHOLE, side: float | None = None):
    """The square of a given side, or of PEAK_CELLS cells, that holds most of the map, or a reason: for subjects that
    may be small and anywhere. Of squares that hold about the same the middle one."""
    if entropy(part(attention)) > FLAT:
        return "flat map"
    side = side or PEAK_CELLS * GRID / len(attention)
    pixels = 2 * round(side / 2) + 1  # odd, so that a square has a middle
    raster, border = part(upsample(attention)), cv2.BORDER_CONSTANT
    held = cv2.boxFilter(raster, -1, (pixels, pixels), normalize=False, borderType=border)
    held = cv2.GaussianBlur(held, (0, 0), side / 8, borderType=border)
    y, x = np.unravel_index(held.argmax(), held.shape)
    return x + 0.5, y + 0.5, side


RULES = {"component": component_rule, "original": original_rule, "peak": peak_rule}


def on_map(box: Box, frame: tuple, cells: int) -> np.ndarray:
    """Corners of a box in cells of a map (cells, cells) that covers a frame (x0, y0, x1, y1): (4,)."""
    left, top, right, _ = frame
    return (np.array(box.corners) - [left, top, left, top]) * cells / (right - left)


def excess_mass(attention: np.ndarray, box: Box, frame: tuple) -> float:
    """Share of a map inside a box, less the share of the map's frame (x0, y0, x1, y1) it covers: 0 if the map is
    uniform, near 1 if all of it lies in a small box."""
    raster = upsample(attention)
    x0, y0, x1, y1 = np.clip(np.rint(on_map(box, frame, GRID)), 0, GRID).astype(int)
    inside = raster[y0:y1, x0:x1]
    return max(float(inside.sum() / raster.sum() - inside.size / raster.size), 0.0)


def cut_out(attention: np.ndarray, box: Box, frame: tuple) -> np.ndarray:
    """A map without what lies inside a box; of a cell that lies there in part, that part is taken away."""
    x0, y0, x1, y1 = on_map(box, frame, len(attention))
    start = np.arange(len(attention))
    down, across = (np.clip(np.minimum(start + 1, end) - np.maximum(start, begin), 0, 1)
                    for begin, end in ((y0, y1), (x0, x1)))  # fmt: skip
    return attention * (1 - np.outer(down, across)).astype(attention.dtype)


def find_box(
    attention: np.ndarray,
    image_size: tuple[int, int],
    rule: str = "component",
    num_devs: float | None = None,
    centre: float | None = None,
    frame: Frame = "square",
    box_size: float | None = None,
) -> Box:
    """Square to cut from an original of image_size (width, height) px, by its attention (h, w). If the rule finds
    nothing the box is all that the network saw, with the reason. A box that would leave the image is shifted, never
    clipped: "original" stays in the centre square, the others may use all of the picture. num_devs: of the rule
    "original"; centre: of "component"; box_size: of "peak", in pixels; frame: of the picture, as in frame_of, whose
    padding is not looked at."""
    left, top, right, bottom = frame_of(*image_size, frame)
    square = frame_of(*image_size, "square" if frame == "square" else "whole")

    def part(raster: np.ndarray) -> np.ndarray:
        return raster[inside(image_size, frame, len(raster))]

    scale = (right - left) / GRID
    options = {"num_devs": num_devs, "centre": centre, "side": box_size and box_size / scale}
    options = {key: value for key, value in options.items() if value is not None}
    seen = part(attention)
    finite = np.isfinite(seen).all() and seen.sum() > 0
    found = RULES[rule](attention, part, **options) if finite else "map is not finite"
    if isinstance(found, str):
        return Box(*square, found)
    rows, columns = inside(image_size, frame, GRID)
    x, y = left + (columns.start + found[0]) * scale, top + (rows.start + found[1]) * scale
    side = min(found[2] * scale, square[2] - square[0])
    x0, y0 = fit_in(x, y, side, square if rule == "original" else (0, 0, *image_size))
    box = Box(x0, y0, x0 + side, y0 + side)
    return replace(box, confidence=excess_mass(attention, box, (left, top, right, bottom)))


def find_boxes(attention: np.ndarray, image_size: tuple[int, int], n_boxes: int = 1, **how) -> list[Box]:
    """Up to n_boxes squares as find_box finds them, best first: each in the map without what lies in those before it
    (non-maximum suppression), until a place holds no more of the map than its share of the area. how: of find_box."""
    frame, boxes, left = frame_of(*image_size, how.get("frame", "square")), [], attention
    while len(boxes) < n_boxes and left.sum() > 0:
        box = find_box(left, image_size, **how)
        if boxes:
            share = left.sum() / attention.sum()
            area = (box.side / (frame[2] - frame[0])) ** 2
            box = replace(box, confidence=max((excess_mass(left, box, frame) + area) * share - area, 0.0))
            if box.reason or box.confidence == 0:
                break
        boxes.append(box)
        if box.reason:
            break
        left = cut_out(left, box, frame)
    return boxes or [find_box(attention, image_size, **how)]


# ---------------------------------------------------------------- map of a class -> boxes
def seen_part(view: tuple, image_size: tuple[int, int], cells: int) -> np.ndarray:
    """Which cells of a map (cells, cells) of the square `view` (x0, y0, x1, y1) lie in the image, at least one each
    way: bool."""
    seen = np.zeros((cells, cells), bool)
    seen[inside_view(image_size, view, cells)] = True
    return seen


def class_boxes(evidence: np.ndarray, view: tuple, image_size: tuple[int, int], t_roi: float) -> list[Box]:
    """Rectangles around the connected parts of a map (h, w), signed, that lie above t_roi of its maximum, best first;
    none if nothing in the image speaks for the class or all of it does alike. view: the square of the original that the
    map covers. A box's confidence is its share of what speaks for the class, less its share of the picture's area."""
    inside = seen_part(view, image_size, GRID)
    small = np.maximum(evidence[seen_part(view, image_size, len(evidence))], 0)
    raster = np.maximum(upsample(evidence), 0) * inside
    if raster.max() <= 0 or small.max() <= 0 or (len(small) > 1 and entropy(small) > FLAT):
        return []
    scale, found = (view[2] - view[0]) / GRID, []
    parts = cv2.connectedComponentsWithStats((raster > t_roi * raster.max()).astype(np.uint8), connectivity=8)[2]
    for x, y, width, height, _ in parts[1:]:
        if width * height > SPECK * inside.sum():
            held = raster[y : y + height, x : x + width].sum() / raster.sum()
            corners = np.array([x, y, x + width, y + height]) * scale + [view[0], view[1], view[0], view[1]]
            corners = np.clip(corners, 0, [*image_size, *image_size]).tolist()
            found.append(Box(*corners, confidence=max(float(held - width * height / inside.sum()), 0.0)))
    return sorted(found, key=lambda box: -box.confidence)


# ---------------------------------------------------------------- maps and boxes of a crop directory
@dataclass
class Finder:
    """Finds boxes as crop.py does: sources of maps by the fold that was held out from them, and the box rule."""

    sources: dict[int, object]
    rule: str = "component"
    num_devs: float | None = None
    centre: float | None = None
    views: int = 4  # symmetries over which maps are averaged
    frame: Frame = "square"
    box_size: float | None = None
    n_boxes: int = 1  # of an image, at most
    margin: float = 0.0  # added to a box on each side, in sides
    scout: Scout | None = None  # if what it looks at are cells: the network that makes them

    @classmethod
    def load(cls, folder: Path, facts: dict, device: torch.device) -> "Finder":
        """The Finder of a crop directory, from the networks in it; facts: of its crop.json. Raises InputError if a
        network is not the one that was hashed, or if the boxes came from a csv."""
        if facts["source"] not in SOURCES:
            raise InputError(f"{folder} was cut by boxes from a csv; new images have none: use other crops")
        check_hashes(folder, facts["networks"], "crop and train again")
        saliencies, sources = {}, {}
        if "saliency.pt" in facts["networks"]:
            saliencies = load_saliencies(folder / "saliency.pt", device)
        for k in facts["folds"]:
            network, meta, evidence = None, None, None
            if facts["trained"]:
                fold = SOURCES[facts["source"]].way == "attention"  # other ways need the modules as they were trained
                network, content = load_checkpoint(folder / f"fold{k}_network.pt", device, fold=fold)
                network.shifts, meta = facts["shifts"], blank_meta(content)
                if facts["class_name"] or not fold:  # the attention of a ChipNet is one for all outputs
                    evidence = partial(task_of(content["task"]).evidence, name=facts["class_name"])
            layer = facts.get("layer")
            sources[k] = SOURCES[facts["source"]].make(network, saliencies.get(k), meta, evidence, layer)
        how = {key: facts[key] for key in ("rule", "num_devs", "centre", "views", "frame", "box_size")}
        how |= {"n_boxes": facts.get("n_boxes", 1), "margin": facts.get("margin", 0.0)}  # unknown to older versions
        return cls(sources, **how, scout=network if isinstance(network, Scout) else None)

    def maps(self, seen, device, sizes=(), folds=None, amp: str = "off", batch_size: int = 16):
        """Maps (N, h, w) of images uint8 (N, S, S, 3), or of cells (a Bag): the mean over the sources of some
        folds, or of all; 0 on the padding. sizes: (width, height) of the originals, unless the frame is "square"."""
        sources = [self.sources[k] for k in folds or self.sources]
        with autocast(torch.device(device), amp):
            maps = attention_maps(sources, seen, device, self.views, batch_size)
        if self.frame == "square":  # there is no padding
            return maps
        for attention, size in zip(maps, sizes, strict=True):
            seen = np.zeros_like(attention)
            part = inside(size, self.frame, len(attention))
            seen[part] = attention[part]
            attention[:] = seen / max(seen.sum(), 1e-30)
        return maps

    def boxes(self, attention: np.ndarray, image_size: tuple[int, int]) -> list[Box]:
        """Boxes of an image of image_size (width, height) by its map (h, w), best first."""
        how = {key: getattr(self, key) for key in ("n_boxes", "rule", "num_devs", "centre", "frame", "box_size")}
        return [enlarge(box, self.margin, image_size) for box in find_boxes(attention, image_size, **how)]


def blank_meta(content: dict) -> np.ndarray:
    """Metadata (1, M) that is missing everywhere, as the encoder in a checkpoint writes it."""
    return MetaEncoder(content["encoder"]).encode(pd.DataFrame(index=[0]))


def load_saliencies(path: Path, device: torch.device) -> dict[int, Saliency]:
    """Saliencies by fold from a checkpoint that crop.py wrote."""
    network, content = load_checkpoint(path, device)
    parts = content.get("saliency") or {}
    return {int(k): Saliency(network, part["weight"], part["bias"]) for k, part in parts.items()}
