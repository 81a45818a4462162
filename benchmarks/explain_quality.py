"""Maps judged, not believed: do they show the object, does the network use what they show, do they follow its weights?

    python benchmarks/explain_quality.py judge runs/resnet --mask_dir masks --ways cam gradcam gradcam:features.5
    python benchmarks/explain_quality.py judge runs/cells --boxes boxes.csv --label Platelets
    python benchmarks/explain_quality.py speed

judge: a row for each way of maps.py, for stored maps of crop.py (--crop_dir) and for two controls, a random map and one
of the centre; held-out images whose object is known, each by the network of its fold; the map is the one that crop.py
uses, of one view. Columns:

    pointing    share of the images in which the map's highest place lies on the object
    energy      share of the map on the object
    V2          MaxBoxAccV2: share whose object's box is met at an IoU of .3, .5, .7, best threshold for each, mean
    IoU         of the object's mask with the map above the one threshold that is best for all
    deletion    mean probability of the prediction while what the map shows is taken away (less is better)
    insertion   the same while it is shown on a blurred picture (more is better)
    shuffled    rank correlation of the map with that of the same network, whose head, upper half, or all weights are
                shuffled; 1 means that the map does not show what was learned
    ms          per image, in batches of 16

speed: all class maps and pooled features of route heat in one pass, against a forward and a backward pass for each
class at batch size 1, ResNet-50 and 9 classes.

References:
    Choe et al., Evaluating Weakly Supervised Object Localization Methods Right, CVPR 2020: MaxBoxAccV2.
    Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016: the pointing game.
    Wang et al., Score-CAM, CVPR-W 2020: energy inside. Petsiuk et al., RISE, BMVC 2018: deletion and insertion.
    Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018: shuffled weights.
"""

import argparse
import copy
import sys
import time
from functools import partial
from pathlib import Path

import cv2
import lesions
import numpy as np
import pandas as pd
import torch
from timing import fastest
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
import places
import util
from inference import Single
from localize import GRID, upsample
from maps import WAYS, Explainer, GradCam, default_way, every, read_features
from plumbing.arrays import Rows, open_array
from plumbing.data import Data, read_data, read_table
from plumbing.images import frame_of
from plumbing.runs import read_run
from scores import spearman
from util import FOLD, ID, InputError

THRESHOLDS, DELTAS = np.arange(0.05, 1, 0.05), (0.3, 0.5, 0.7)
STEPS = 16  # of deletion and insertion
HEADER = ("", "pointing", "energy", "V2", "IoU", "deletion", "insertion", "shuffled head", "half", "all", "ms")
PARTS = (0.0, 0.5, 1.0)  # of the backbone's weights that are shuffled beside the head, from the top


# ---------------------------------------------------------------- where the object is
def boxes_of(path: Path, label: str | None) -> dict[str, np.ndarray]:
    """Boxes (n, 4) by image from a csv of image_name, [label,] xmin, ymin, xmax, ymax."""
    table = read_table(path, ("xmin", "ymin", "xmax", "ymax"), unique=False)
    table = table if label is None else table[table["label"] == label]
    return {name: each[["xmin", "ymin", "xmax", "ymax"]].to_numpy(float) for name, each in table.groupby(ID)}


def find_objects(data: Data, args: argparse.Namespace) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Of training rows whose object is known: its mask on the square that networks see, bool (GRID, GRID), and its
    boxes there (n, 4)."""
    given, found = None if args.boxes is None else boxes_of(args.boxes, args.label), {}
    mask_dir = lesions.find_mask_dir(data, args.mask_dir)
    for row, (name, width, height) in enumerate(data.train[[ID, "width", "height"]].itertuples(index=False, name=None)):
        left, top, right, _ = frame_of(width, height, data.facts["frame"])
        scale, mask = GRID / (right - left), np.zeros((GRID, GRID), np.uint8)
        if given is None:
            moved = np.float32([[scale, 0, -left * scale], [0, scale, -top * scale]])
            whole = lesions.read_mask(mask_dir, name, (width, height)).astype(np.uint8)
            mask = cv2.warpAffine(whole, moved, (GRID, GRID), flags=cv2.INTER_NEAREST)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            boxes = np.array([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]) if mask.any() else np.empty((0, 4))
        else:
            boxes = (given.get(name, np.empty((0, 4))) - [left, top, left, top]) * scale
            for x0, y0, x1, y1 in np.clip(np.rint(boxes), 0, GRID).astype(int):
                mask[y0:y1, x0:x1] = 1
        if mask.any():
            found[row] = mask > 0, boxes
    return found


# ---------------------------------------------------------------- scores of one map
def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (n, 4) and (m, 4): (n, m)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (a, b)]
    return both / (areas[0][:, None] + areas[1][None] - both)


def judge_map(raster: np.ndarray, mask: np.ndarray, boxes: np.ndarray) -> tuple[float, float, np.ndarray, np.ndarray]:
    """(pointing, energy, best IoU of a box by threshold, IoU with the mask by threshold)."""
    by_box, by_mask = [], []
    for threshold in THRESHOLDS:
        above = raster >= threshold * raster.max()
        stats = cv2.connectedComponentsWithStats(above.astype(np.uint8), connectivity=8)[2][1:, :4].astype(float)
        stats[:, 2:] += stats[:, :2]
        by_box.append(iou(stats, boxes).max(initial=0))
        by_mask.append((above & mask).sum() / (above | mask).sum())
    peak = np.unravel_index(raster.argmax(), raster.shape)
    return float(mask[peak]), raster[mask].sum() / raster.sum(), np.array(by_box), np.array(by_mask)


@torch.no_grad()
def perturb(predict, picture: np.ndarray, raster: np.ndarray) -> tuple[float, float]:
    """(deletion, insertion) of a picture uint8 (S, S, 3): mean of predict(uint8 (n, 3, S, S)) -> (n,) over STEPS."""
    order = np.argsort(-cv2.resize(raster, picture.shape[:2]).ravel(), kind="stable")
    blurred = cv2.GaussianBlur(picture, (0, 0), len(picture) / 16)
    mean = np.broadcast_to(picture.mean(axis=(0, 1)).astype(np.uint8), picture.shape)
    series = []
    for start, other in ((picture, mean), (blurred, picture)):
        for step in range(STEPS + 1):
            image = start.reshape(-1, 3).copy()
            chosen = order[: len(order) * step // STEPS]
            image[chosen] = other.reshape(-1, 3)[chosen]
            series.append(image.reshape(picture.shape))
    prob = predict(torch.from_numpy(np.stack(series)).permute(0, 3, 1, 2))
    return tuple(float(part.mean()) for part in np.split(prob, 2))


def shuffled(network: torch.nn.Module, part: float) -> torch.nn.Module:
    """A copy whose head is shuffled, and a part of its other weights from the top, each inside its tensor."""
    network, generator = copy.deepcopy(network), torch.Generator().manual_seed(0)
    body = [p for name, p in network.named_parameters() if name.startswith("backbone.")]
    rest = [p for name, p in network.named_parameters() if not name.startswith("backbone.")]
    with torch.no_grad():
        for parameter in rest + body[len(body) - round(part * len(body)) :]:
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return network


# ---------------------------------------------------------------- a table of ways
class Control:
    """A map that knows nothing of the picture: random cells, or the centre."""

    def __init__(self, kind: str):
        self.kind, self.generator = kind, torch.Generator().manual_seed(0)

    def attention(self, image: torch.Tensor, views: int = 1) -> torch.Tensor:
        """(N, 7, 7)."""
        place = torch.arange(7) - 3.0
        centre = torch.exp(-(place[:, None] ** 2 + place**2) / 4).expand(len(image), -1, -1)
        return centre if self.kind == "centre" else torch.rand(len(image), 7, 7, generator=self.generator)


class Kept:
    """Maps that crop.py has written."""

    def __init__(self, crop_dir: Path, n: int):
        self.maps, self.rows = open_array(crop_dir / "train_attention.npy", n, dtype=np.float32), None

    def attention(self, image: torch.Tensor, views: int = 1) -> torch.Tensor:
        """Those of self.rows."""
        return torch.from_numpy(np.array(self.maps[self.rows]))


def make_ways(args: argparse.Namespace, single: Single, n: int) -> dict:
    """By name: a function of a network and its task -> something with attention(image, views)."""

    def explain(words: str, network, task, meta):
        way, _, layer = words.partition(":")
        return WAYS[way](network, meta, task.evidence, layer or None)

    own = args.ways or [default_way(next(iter(single.networks.values())), single.size)]
    others = {crop_dir.name: Kept(crop_dir, n) for crop_dir in args.crop_dir}
    others |= {kind: Control(kind) for kind in ("random", "centre")}
    ways = {words: partial(explain, words) for words in own}
    return ways | {name: lambda *_, source=source: source for name, source in others.items()}


def judge_rows(make, network, task, meta: np.ndarray, rows: np.ndarray, stored: Rows, objects: dict, n_faith) -> list:
    """(pointing, energy, IoUs of boxes, IoUs of masks, deletion, insertion, likeness when shuffled, seconds) of every
    row by a network that did not learn from it; deletion and insertion of the first n_faith of them."""
    source, others, scores = make(network, task, meta), [], []
    if isinstance(source, Explainer):
        others = [make(shuffled(network, part), task, meta) for part in PARTS]

    @torch.no_grad()
    def predict(image: torch.Tensor) -> np.ndarray:
        fixed = torch.from_numpy(meta).expand(len(image), -1)
        return task.prob(network(image, fixed).double()).numpy()

    for start in tqdm(range(0, len(rows), 16), leave=False):
        part = rows[start : start + 16]
        source.rows = part  # of those that are kept
        images = stored[part]
        pictures = torch.from_numpy(images).permute(0, 3, 1, 2)
        begun = time.perf_counter()
        maps = source.attention(pictures, 1).detach().numpy()
        seconds = (time.perf_counter() - begun) / len(part)
        changed = [other.attention(pictures, 1).detach().numpy() for other in others]
        likeliest = predict(pictures)
        for i, row in enumerate(part):

            def of_prediction(image, first=likeliest[i]) -> np.ndarray:  # a single label: for or against it
                p = predict(image)
                return p[:, first.argmax()] if p.shape[1] > 1 else np.abs(p[:, 0] - (first[0] < 0.5))

            raster, (mask, boxes) = upsample(maps[i]), objects[row]
            alike = [spearman(maps[i].ravel(), other[i].ravel()) for other in changed] or [np.nan] * len(PARTS)
            faith = perturb(of_prediction, images[i], raster) if start + i < n_faith else (np.nan, np.nan)
            scores.append((*judge_map(raster, mask, boxes), *faith, alike, seconds))
    return scores


def judge(args: argparse.Namespace) -> None:
    """Print the table."""
    run = read_run(args.run)
    for words in args.ways or ():
        if words.partition(":")[0] not in WAYS:
            raise InputError(f"--ways {words}: the ways are {', '.join(WAYS)}; pass some of these")
    single, data = Single(run, torch.device("cpu"), fold=False), read_data(Path(run.config["args"]["data_dir"]))
    if single.scout is not None or run.config["crop"] is not None:
        raise InputError(f"{args.run} does not look at whole small images; pass one that does")
    objects, stored = find_objects(data, args), Rows(data.array_path("train"), len(data.train))
    fold, ways, found = data.train[FOLD].to_numpy(), make_ways(args, single, len(data.train)), {}
    known = [row for row in sorted(objects) if fold[row] in single.networks]
    if not known:
        raise InputError("no held-out image has an object; check --label or --mask_dir")
    chosen = np.random.default_rng(0).permutation(known)[: args.limit]
    for k, network in single.networks.items():
        rows, meta = chosen[fold[chosen] == k], single.encoders[k].encode(pd.DataFrame(index=[0]))
        for name, make in ways.items():
            scores = found.setdefault(name, [])
            n_faith = max(args.faith - len(scores), 0)
            scores += judge_rows(make, network, single.tasks[k], meta, rows, stored, objects, n_faith)
    print(f"{run.name}: {len(chosen)} of {len(known)} held-out images with a known object\n")
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for name, scores in found.items():
        pointing, energy, by_box, by_mask, out, into, alike, seconds = map(np.array, zip(*scores, strict=True))
        v2 = np.mean([(by_box >= delta).mean(axis=0).max() for delta in DELTAS])
        values = [pointing.mean(), energy.mean(), v2, by_mask.mean(axis=0).max(), np.nanmean(out), np.nanmean(into)]
        words = ["-" if np.isnan(value) else f"{value:.3f}" for value in (*values, *alike.mean(axis=0))]
        print("| " + " | ".join([name, *words, f"{1000 * np.median(seconds):.1f}"]) + " |")


# ---------------------------------------------------------------- speed
def speed(args: argparse.Namespace) -> None:
    """Print seconds per image of both ways."""
    torch.manual_seed(0)
    network = models.build_model(models.Spec("resnet", "resnet50", 224, outputs=9)).eval()
    image = torch.randint(0, 256, (16, 3, 224, 224), dtype=torch.uint8)
    layer, cam, grad = "layer4", WAYS["cam"](network), GradCam(network, layer="layer4")
    inside = torch.ones(7, 7)

    def ours() -> torch.Tensor:
        (_, heat), found = read_features(network, image, [layer], lambda: cam.explain(image))
        return torch.stack([places.pool_cells(one, places.heat_weights(h, inside, None))
                            for one, h in zip(found[layer], heat, strict=True)])  # fmt: skip

    def by_class(heat_of) -> torch.Tensor:
        each = [heat_of(c) for c in range(9)]
        return torch.cat([places.pool_cells(f, places.heat_weights(heat, inside, None)) for heat, f in each])[None]

    def original(c: int) -> tuple:  # back-propagates through the whole network
        network.zero_grad()
        kept = []
        with network.backbone.layer4.register_forward_hook(lambda module, inputs, output: kept.append(output)):
            logit = network(image[:1], torch.zeros(1, 0))
        kept[0].retain_grad()
        logit[0, c].backward()
        slope, features = kept[0].grad[0], kept[0][0].detach()
        return (slope.mean(dim=(1, 2), keepdim=True) * features).sum(dim=0)[None], features

    def to_layer(c: int) -> tuple:  # back to the layer alone
        (_, heat), found = read_features(
            network, image[:1], [layer], lambda: grad.explain(image[:1], lambda logit: every(logit)[:, c : c + 1]))
        return heat[0], found[layer][0]

    ways = {"one pass, all classes": (ours, len(image)),
            "a forward and a backward pass per class": (lambda: by_class(original), 1),
            "the same, backwards to the layer alone": (lambda: by_class(to_layer), 1)}  # fmt: skip
    assert all(torch.allclose(ours()[:1], way()[:1], atol=1e-4) for way, _ in ways.values())
    seconds = fastest([way for way, _ in ways.values()], args.repeats) / [n for _, n in ways.values()]
    print("| | per image | ratio |\n|---|---|---|")
    for name, best in zip(ways, seconds, strict=True):
        print(f"| {name} | {1000 * best:.0f} ms | {best / seconds[0]:.1f} |")


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("judge", allow_abbrev=False).add_argument
    add("run", type=Path, help="of train.py, on whole images")
    add("--ways", nargs="+", help="ways of maps.py, gradcam also with a layer: gradcam:NAME [what suits the network]")
    add("--crop_dir", type=Path, nargs="+", default=[], help="of crop.py: their maps too")
    add("--mask_dir", type=Path, help="NAME.png by image [masks/ by the images]")
    add("--boxes", type=Path, help="csv of image_name, label, xmin, ymin, xmax, ymax instead of masks")
    add("--label", help="of the boxes that count [all]")
    add("--limit", type=util.COUNT, default=1000, help="images")
    add("--faith", type=util.COUNT, default=100, help="images of every way for deletion and insertion")
    add = commands.add_parser("speed", allow_abbrev=False).add_argument
    add("--repeats", type=util.COUNT, default=5, help="of each; the fastest counts")
    return parser


def main(args: argparse.Namespace) -> None:
    """Judge or measure."""
    {"judge": judge, "speed": speed}[args.command](args)


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
