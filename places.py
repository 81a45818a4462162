"""Features of places: for an image and every class that a network sees in it, where, and a vector.

    rows, vectors = Extractor(single, settings).extract(images, k)       # of features.py, by the network of fold k

References:
    Pang et al., Rethinking Feature Extraction: Gradient-Based Localized Feature Extraction for End-to-End Surgical
    Downstream Tasks, RA-L 2022: the three routes, and with --pool original their 512 numbers.
    He et al., Mask R-CNN, ICCV 2017: RoIAlign.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from torchvision.ops import roi_align

from localize import Box, class_boxes, seen_part
from maps import WAYS, choose_way, every, feature_layer, read_features
from plumbing.backbones import find_stages
from plumbing.data import CORNERS
from plumbing.images import read_crops
from util import FOLD, ID, InputError

COLUMNS = [ID, FOLD, "class", "box", *CORNERS, "confidence", "probability"]
CROPS = 32  # that a network sees at a time
NOTHING = np.empty((0, 0), np.float32)
NUMBERS = 512  # of --pool original
FINER = {16: 8, 4: 16, 1: 32}  # --layer size: stride of the map for boxes up to 1/16, 1/4, all of what is seen


def pool_cells(features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean of a feature map (C, h, w) weighted by each of K maps (K, h, w), not negative: (K, C)."""
    return torch.einsum("chw,khw->kc", features, weight) / weight.sum(dim=(1, 2)).unsqueeze(1)


def heat_weights(heat: torch.Tensor, inside: torch.Tensor, t_roi: float | None) -> torch.Tensor:
    """What pool_cells weighs by, of signed maps (K, h, w): what speaks for a class inside the image (h, w), or with
    t_roi the cells where it is above t_roi of its maximum; all of the image where nothing does."""
    weight = heat.clamp_min(0) * inside
    if t_roi is not None:
        weight = (weight > t_roi * weight.amax(dim=(1, 2), keepdim=True)).to(weight.dtype)
    return torch.where(weight.sum(dim=(1, 2), keepdim=True) > 0, weight, inside.to(weight.dtype))


def to_numbers(features: torch.Tensor, cells: int) -> torch.Tensor:
    """The original's 512 numbers of regions (n, C, p, p), p = cells: channels averaged in groups to 512 / p^2."""
    n, channels = features.shape[:2]
    flat = features.reshape(n, channels, -1).transpose(1, 2)  # (n, p * p, C)
    return F.adaptive_avg_pool1d(flat, NUMBERS // cells**2).transpose(1, 2).flatten(1)


def read_rows(path: Path) -> pd.DataFrame:
    """The table of features.py; None and NA may be names of classes."""
    return pd.read_csv(path, dtype={ID: str, "class": str}, keep_default_na=False)


def widen(rows: pd.DataFrame, vectors: np.ndarray, keys: pd.DataFrame, classes, width: int) -> np.ndarray:
    """Vectors (rows, D = width) as one row for each image and fold of keys (n, classes * D): of the best box of every
    class; NaN where there is none."""
    best = rows[(rows["box"] == 0).to_numpy()]
    places = pd.MultiIndex.from_frame(keys[[ID, FOLD]]).get_indexer(pd.MultiIndex.from_frame(best[[ID, FOLD]]))
    wide = np.full((len(keys), len(classes), width), np.nan, np.float32)
    known = places >= 0  # of other folds or images
    column = best["class"].map({name: i for i, name in enumerate(classes)}).to_numpy()
    if not known.any():
        return wide.reshape(len(keys), -1)
    wide[places[known], column[known]] = vectors[best.index.to_numpy()[known]]
    return wide.reshape(len(keys), -1)


class Place(NamedTuple):
    """What is known of an image when its places are read."""

    path: Path
    view: tuple  # square of the original that the network sees: x0, y0, x1, y1
    size: tuple[int, int]  # of the original: width, height
    fold: int
    features: dict[str, torch.Tensor]  # by layer (C, h, w)


class Extractor:
    """Rows and vectors of images (inference.Images) by the networks of a run (inference.Single). args: of features.py.
    Raises InputError if the networks cannot serve the route."""

    def __init__(self, single, args: argparse.Namespace):
        single.check_sees_one()
        network = next(iter(single.networks.values()))
        self.single, self.args, self.way = single, args, choose_way(args.way, network, single.size)
        self.ways = {k: WAYS[self.way](network) for k, network in single.networks.items()}
        image = torch.zeros(1, 3, single.size, single.size, dtype=torch.uint8, device=single.device)
        name = "" if self.way == "attention" else feature_layer(network, image)
        self.layers = {32: name}  # by stride; all but --layer size read one
        if self.way == "attention" and args.layer is not None:
            raise InputError(f"--layer {args.layer}: chips and cells are the only map of {single.name}; leave it out")
        if single.scout is not None and args.route == "crop":
            raise InputError(f"--route crop: {single.name} reads cells of pictures, not crops; pass heat or roi")
        if self.single.scout is None:  # what cannot be made is said before anything is written
            meta = torch.zeros(1, getattr(network, "meta_dim", 0))
            read_features(network, image, [], partial(self.ways[next(iter(self.ways))].explain, image, every, meta))
        if args.layer == "size":
            found = find_stages(network, image, tuple(FINER.values()))
            self.layers = {stride: found[stride] for stride in FINER.values()}
        elif args.layer is not None:
            self.layers = {32: args.layer}
            if args.layer not in dict(network.backbone.named_modules()):
                raise InputError(f"--layer {args.layer}: the backbone has no such module; {name} is the default")
            read_features(network, image, [args.layer])

    def extract(self, images, k: int) -> tuple[pd.DataFrame, np.ndarray]:
        """Table of rows (COLUMNS) and their vectors float32 (rows, D) by the network of fold k."""
        task, rows, vectors, row = self.single.tasks[k], [], [], 0
        batches = self.single.batches(images, [k])[k]
        views = self.single.views(images)
        for pictures, meta in batches:
            pictures = pictures.to(self.single.device)
            explain = partial(self.ways[k].explain, pictures, every, meta)
            network = self.single.networks[k]
            (logit, heat), found = read_features(network, pictures, list(self.layers.values()), explain)
            prob = task.prob(logit.float().cpu().double()).numpy()
            for i in range(len(prob)):
                features = {name: one[i].float() for name, one in found.items()}
                place = Place(images.paths[row], views[row], images.sizes[row], k, features)
                chosen = np.flatnonzero(prob[i] >= self.args.t_class) if task.probabilistic else range(len(prob[i]))
                for c in chosen:
                    boxes, pooled = self.extract_class(place, heat[i, c].float())
                    vectors.append(pooled)
                    rows += [(images.table[ID].iloc[row], k, task.names[c], number, *box.corners, box.confidence,
                              prob[i, c]) for number, box in enumerate(boxes)]  # fmt: skip
                row += 1
        vectors = [one for one in vectors if len(one)]
        return pd.DataFrame(rows, columns=COLUMNS), np.concatenate(vectors) if vectors else NOTHING

    def pool(self, regions: torch.Tensor) -> torch.Tensor:
        """Vectors (n, D) of regions (n, C, p, p): their mean, or the original's numbers."""
        if self.args.pool == "original":
            return to_numbers(F.adaptive_avg_pool2d(regions, self.args.cells), self.args.cells)
        return regions.mean(dim=(2, 3))

    def extract_class(self, place: Place, heat: torch.Tensor) -> tuple[list[Box], np.ndarray]:
        """Boxes of a class by its map (h, w), and their vectors (boxes, D)."""
        boxes = class_boxes(heat.cpu().numpy(), place.view, place.size, self.args.t_roi)
        if self.args.route == "heat":
            corners = np.clip(place.view, 0, [*place.size, *place.size]).tolist()
            boxes = [Box(*corners, confidence=max((box.confidence for box in boxes), default=0.0))]
            found = self.by_heat(place, heat)
        elif not boxes:
            return [], NOTHING
        else:
            found = self.by_roi(place, boxes) if self.args.route == "roi" else self.by_crop(place, boxes)
        return boxes, found.cpu().numpy()

    def by_heat(self, place: Place, heat: torch.Tensor) -> torch.Tensor:
        """Route heat: (1, D)."""
        (features,) = place.features.values()
        if heat.shape != features.shape[1:]:
            heat = F.interpolate(heat[None, None], size=features.shape[1:], mode="bilinear")[0, 0]
        inside = torch.from_numpy(seen_part(place.view, place.size, features.shape[1])).to(features.device)
        weight = heat_weights(heat[None], inside, self.args.t_roi if self.args.heat == "cut" else None)
        return self.pool(pool_cells(features, weight)[..., None, None])

    def by_roi(self, place: Place, boxes: list[Box]) -> torch.Tensor:
        """Route roi: (boxes, D), each from the layer for its size."""
        left, top, right, _ = place.view
        cells, found = self.args.cells if self.args.pool == "original" else 1, []
        for box in boxes:
            share = (box.x1 - box.x0) * (box.y1 - box.y0) / (right - left) ** 2
            stride = next(stride for part, stride in FINER.items() if part == 1 or share < 1 / part)
            features = place.features[self.layers.get(stride, self.layers[32])]
            corners = np.subtract(box.corners, [left, top, left, top]) * features.shape[1] / (right - left)
            corners = torch.from_numpy(corners[None]).to(features)
            found.append(self.pool(roi_align(features[None], [corners], cells, aligned=True)))
        return torch.cat(found)

    def by_crop(self, place: Place, boxes: list[Box]) -> torch.Tensor:
        """Route crop: (boxes, D), of crops from the original."""
        network, layer, found = self.single.networks[place.fold], self.layers[32], []
        sides = [self.single.size] * len(boxes)
        crops = read_crops(place.path, [box.corners for box in boxes], sides, place.size)
        for part in torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).to(self.single.device).split(CROPS):
            found.append(self.pool(read_features(network, part, [layer])[1][layer].float()))
        return torch.cat(found)
