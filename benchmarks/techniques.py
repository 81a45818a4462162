"""Do techniques of papers help? Each beside a plain training with the same steps, three seeds, four sets of pictures.

    python benchmarks/techniques.py train DATA --weights lite0.pth
    python benchmarks/techniques.py train DATA --weights lite0.pth --only sam "patch mixing" --sets skin
    python benchmarks/techniques.py maps DATA --weights lite0.pth
    python benchmarks/techniques.py cost
    python benchmarks/techniques.py table DATA

DATA has isic2018 and polyps256 (folders with images, masks and labels.csv), cifar10_subset and mnist (npz). The sets:
skin (melanoma, 64 px, AUC), polyps (three sizes by the mask's area, 64 px), CIFAR-10 (5,000 images) and digits (2,000),
both 32 px and by accuracy. Of skin and polyps seed s holds out fold s of three, so every image is scored once; of the
others every seed is scored on the same test images.

The networks: EfficientNet-Lite0 with ImageNet weights (skin, polyps) or a ResNet-10-t from scratch, and a ViT of four
blocks from scratch. AdamW, one cycle of the learning rate, flips and quarter turns (CIFAR-10: flips and shifts; digits:
shifts); the last weights are scored. What a technique changes is in papers.py.

A row's gain is the mean over seeds; its interval (95 %) and p come from a bootstrap over groups of images and over
seeds; p is corrected for all rows by Holm's method. A technique is in if its interval excludes 0 after the correction.
table keeps all rows in techniques.csv, so that a set or technique can be measured without all others.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import lesions
import numpy as np
import pandas as pd
import papers
import torch
from papers import Plain, no_meta
from scipy.stats import norm
from timing import fastest
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from crop_quality import overlap
from polyp_size import script

import localize
import models
import scores
import util
from maps import GradCam, Rollout
from plumbing.backbones import find_stages, read_torch_file
from plumbing.data import read_data
from plumbing.files import atomic, write_table
from util import FOLD, ID

BATCH, LR = 32, {"cnn": 5e-4, "vit": 1e-3}
SEEDS = (0, 1, 2)
DRAWS = 2000
KEPT = ("plain", "registers")  # trainings whose weights are kept, for maps
FOUND = Path(__file__).with_suffix(".csv")  # all comparisons so far
SMALLEST = 5e-5  # that a p is said to be
EQUAL = 0.01  # a loss that the interval of a score that is no worse may reach


# ---------------------------------------------------------------- sets of pictures
@dataclass
class Problem:
    """Pictures to learn from and to be scored on."""

    name: str
    whole: torch.Tensor  # uint8 (N, 3, S, S)
    crop: torch.Tensor | None
    target: np.ndarray  # class (N,)
    group: np.ndarray
    fold: np.ndarray  # 0..2; -1: always learned from, 3: the test images of every seed
    epochs: dict[str, int]
    symmetries: int  # of the pictures, as in models.dihedral
    shift: int  # pixels by which pictures may move
    backbone: str = "timm:resnet10t"
    weights: str = "none"
    sizes: np.ndarray | None = None  # of the originals
    ideal: list | None = None  # by image: the square around its mask
    maps: Path | None = None  # of the saliency

    @property
    def size(self) -> int:
        """Side of the pictures in pixels."""
        return self.whole.shape[-1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.target.max()) + 1

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows to learn from, rows to be scored on."""
        test = (self.fold == seed) | (self.fold == 3)
        return np.flatnonzero(~test), np.flatnonzero(test)

    def pictures(self, rows: np.ndarray, names: tuple[str, ...]) -> torch.Tensor:
        """uint8 (n, 3 * pictures, S, S)."""
        return torch.cat([getattr(self, name)[torch.as_tensor(rows)] for name in names], dim=1)

    def one_hot(self, rows: np.ndarray) -> torch.Tensor:
        """(n, K)."""
        return nn.functional.one_hot(torch.as_tensor(self.target[rows]).long(), self.classes).float()

    def augment(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Each picture in one of its symmetries, moved by a few pixels."""
        view = rng.integers(self.symmetries, size=len(image))
        image = torch.stack([models.dihedral(one, int(v)) for one, v in zip(image, view, strict=True)])
        if self.shift:
            size = image.shape[-1]
            wide = nn.functional.pad(image.float(), (self.shift,) * 4, mode="reflect").to(image.dtype)
            corner = rng.integers(2 * self.shift + 1, size=(len(image), 2))
            image = torch.stack([one[:, y : y + size, x : x + size] for one, (y, x) in zip(wide, corner, strict=True)])
        return image

    def fit(self, parameters, loss, rows: np.ndarray, epochs: int, lr: float, rng, step=None) -> None:
        """Minimise loss(rows) over batches with AdamW and one cycle of the learning rate; step(optimizer, rows)
        instead of the usual one."""
        batches = max(len(rows) // BATCH, 1)
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.05)
        peaks = [group["lr"] for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=epochs * batches, pct_start=0.15)
        for _ in tqdm(range(epochs), leave=False, desc="epochs"):
            order = rng.permutation(rows)
            for batch in np.array_split(order[: batches * BATCH], batches):
                if step is None:
                    loss(batch).backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                else:
                    step(optimizer, batch)
                schedule.step()

    def run(self, way: Plain, after_epoch=None) -> nn.Module:
        """A network trained in a way."""
        torch.manual_seed(way.seed)
        network = way.build()
        way.before(network)
        network.train()
        steps = 0

        def step(optimizer: torch.optim.Optimizer, rows: np.ndarray) -> None:
            nonlocal steps
            image = self.augment(self.pictures(rows, way.pictures), way.rng)
            way.step(network, optimizer, *way.change(image, way.targets(rows)))
            steps += 1
            if after_epoch is not None and steps % (len(way.train) // BATCH) == 0:
                after_epoch(network)
                network.train()

        lr = LR[way.kind]
        epochs = way.length * self.epochs[way.kind]
        self.fit(network.param_groups(lr, 2 * lr), None, way.train, epochs, lr, way.rng, step)
        return network

    @torch.inference_mode()
    def predict(self, network: nn.Module, rows: np.ndarray, names: tuple[str, ...], views: int = 4) -> np.ndarray:
        """Probabilities (n, K), averaged over symmetries."""
        network.eval()
        prob, views = [], range(min(views, self.symmetries))
        for part in np.array_split(rows, -(-len(rows) // 128)):
            image = self.pictures(part, names)
            each = [network(models.dihedral(image, view), no_meta(image)).softmax(dim=1) for view in views]
            prob.append(torch.stack(each).mean(dim=0).numpy())
        return np.concatenate(prob)


def shrink(images: np.ndarray, size: int) -> torch.Tensor:
    """uint8 (N, S, S, 3) -> (N, 3, size, size)."""
    small = np.stack([cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in images])
    return torch.from_numpy(small).permute(0, 3, 1, 2).contiguous()


def read_masked(name: str, folder: str, target: str, args: argparse.Namespace) -> Problem:
    """Skin or polyps: the pictures and the crops by their saliency, made by our scripts unless they are there."""
    source, output = args.data / folder, args.output / name
    if not (output / "data/crops/saliency/crop.json").exists():
        output.mkdir(parents=True, exist_ok=True)
        table = pd.read_csv(source / "labels.csv", dtype=str)
        if name == "polyps":
            table["size3"] = table["size3"].map({"small": 0, "medium": 1, "large": 2})
        table[[ID, "group", target]].to_csv(output / "train.csv", index=False)
        words = ["--data_dir", output / "data", "--backbone", "timm:tf_efficientnet_lite0", "--weights", args.weights]
        script("preprocess.py", "--train_csv", output / "train.csv", "--image_dir", source / "images", "--output_dir",
               output / "data", "--target_col", target, "--group_col", "group", "--n_folds", 3)  # fmt: skip
        script("crop.py", "--source", "saliency", *words)
    data = read_data(output / "data")
    crops = data.directory / "crops" / "saliency"
    paths = data.array_path("train"), crops / data.array_path("train").name
    arrays = [shrink(np.load(path, mmap_mode="r", allow_pickle=False), args.size) for path in paths]
    sizes = data.train[["width", "height"]].to_numpy()
    pairs = zip(data.train[ID], sizes.tolist(), strict=True)
    squares = [lesions.ideal_square(lesions.read_mask(source / "masks", each, tuple(size))) for each, size in pairs]
    return Problem(name, *arrays, data.target[:, 0].astype(int), data.group.to_numpy(), data.train[FOLD].to_numpy(),
                   {"cnn": 4, "vit": 12}, 8, 0, "timm:tf_efficientnet_lite0", args.weights, sizes, squares,
                   crops / "train_attention.npy")  # fmt: skip


def read_small(name: str, args: argparse.Namespace) -> Problem:
    """CIFAR-10 or digits: the first images of both parts, 32 px."""
    if name == "cifar":
        with np.load(args.data / "cifar10_subset" / "cifar10_10k_3k.npz", allow_pickle=False) as file:
            parts = [(file["x_train"][:5000], file["y_train"][:5000]), (file["x_test"], file["y_test"])]
    else:
        parts = []
        for split in ("train", "test"):
            with np.load(args.data / "mnist" / f"{split}.npz", allow_pickle=False) as file:
                parts.append((np.repeat(np.pad(file["x"][:2000], ((0, 0), (2, 2), (2, 2)))[..., None], 3, axis=3),
                              file["y"][:2000]))  # fmt: skip
    images, target = (np.concatenate(part) for part in zip(*parts, strict=True))
    fold = np.repeat([-1, 3], [len(part[1]) for part in parts])
    image = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    epochs = {"cnn": 4, "vit": 6} if name == "cifar" else {"cnn": 8, "vit": 10}
    return Problem(name, image, None, target.astype(int), np.arange(len(target)), fold, epochs,
                   2 if name == "cifar" else 1, 3)  # fmt: skip


MASKED = ("skin", "polyps")
SETS = {"skin": partial(read_masked, "skin", "isic2018", "target"),
        "polyps": partial(read_masked, "polyps", "polyps256", "size3"),
        "digits": partial(read_small, "digits"), "cifar": partial(read_small, "cifar")}  # fmt: skip


# ---------------------------------------------------------------- trainings
def save(path: Path, **arrays) -> None:
    """Write an npz whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def path_of(args: argparse.Namespace, problem: str, technique: str, kind: str, seed: int) -> Path:
    """Where the predictions of a training lie."""
    return args.output / "found" / f"{problem}_{technique.replace(', ', '_').replace(' ', '_')}_{kind}_{seed}.npz"


def train_one(problem: Problem, technique: str, kind: str, seed: int, args: argparse.Namespace) -> None:
    """Train and save predictions; of a plain training also those of the best epoch and of the soup of the best three,
    and its weights."""
    path = path_of(args, problem.name, technique, kind, seed)
    if path.exists():
        return
    rows, test = problem.split(seed)
    way = papers.TRAININGS[technique](problem, kind, rows, seed)
    epochs: list[tuple] = []

    def note(network: nn.Module) -> None:
        prob = problem.predict(network, test, way.pictures, views=1)
        loss = -np.log(prob[np.arange(len(test)), problem.target[test]] + 1e-9).mean()
        epochs.append((loss, {key: value.clone() for key, value in network.state_dict().items()}))
        epochs.sort(key=lambda one: one[0])
        del epochs[3:]

    plain = technique == "plain"
    network = problem.run(way, note if plain else None)
    found = {"prob": problem.predict(network, test, way.pictures)}
    if technique in KEPT:
        models.save_plain(path.with_suffix(".pt"), state_dict=network.state_dict())
    if plain:
        states = [state for _, state in epochs]
        soup = {key: torch.stack([state[key].float() for state in states]).mean(dim=0).to(first.dtype)
                for key, first in states[0].items()}  # fmt: skip
        for name, state in (("best", states[0]), ("soup", soup)):
            network.load_state_dict(state)
            found[name] = problem.predict(network, test, way.pictures)
    save(path, rows=test, **found)


def train(args: argparse.Namespace) -> None:
    """All trainings that are missing."""
    (args.output / "found").mkdir(parents=True, exist_ok=True)
    for name in args.sets:
        problem = SETS[name](args)
        ways = {key: papers.TRAININGS[key] for key in args.only}
        jobs = [(key, kind, seed) for key, way in ways.items() for kind in way.kinds for seed in SEEDS
                if kind in args.kinds and (problem.crop is not None or "crop" not in way.pictures)]  # fmt: skip
        for job in tqdm(jobs, desc=name):
            train_one(problem, *job, args)


# ---------------------------------------------------------------- maps of trained networks
def fit_frozen(problem: Problem, module: nn.Module, loss, rows: np.ndarray, seed: int) -> nn.Module:
    """What is fitted to a frozen network: loss(image, target)."""
    rng = np.random.default_rng(seed)

    def of(batch: np.ndarray) -> torch.Tensor:
        return loss(problem.augment(problem.pictures(batch, ("whole",)), rng), problem.one_hot(batch))

    problem.fit(module.parameters(), of, rows, papers.FIT["epochs"], papers.FIT["lr"], rng)
    return module.eval()


def rollout(network: models.Network, views: int = 4):
    """image -> rollout (N, h, w)."""
    return lambda image: Rollout(network).attention(image, views)


def map_ways(problem: Problem, seed: int, args: argparse.Namespace) -> dict:
    """What makes maps of images, by name; and what Prompt-CAM predicts."""
    rows, _ = problem.split(seed)
    ways, networks = {}, {}
    for technique, kind in (("plain", "cnn"), ("plain", "vit"), ("registers", "vit")):
        network = papers.TRAININGS[technique](problem, kind, rows, seed).build()
        path = path_of(args, problem.name, technique, kind, seed).with_suffix(".pt")
        network.load_state_dict(read_torch_file(path)["state_dict"])
        networks[technique, kind] = network.eval()
    cnn, vit = networks["plain", "cnn"], networks["plain", "vit"]
    stages = find_stages(cnn, problem.pictures(rows[:1], ("whole",)), (8, 16, 32))
    for stride in (8, 16, 32):
        cam = GradCam(cnn, evidence=winner, layer=stages[stride])
        ways[f"Grad-CAM, stride {stride}"] = partial(cam.attention, views=4)
    torch.manual_seed(seed)
    tame = papers.Tame(cnn, problem.classes, problem.size)
    ways["T-TAME"] = fit_frozen(problem, tame, lambda image, target: tame.loss(image), rows, seed).attention
    ways["rollout"], ways["rollout, 8 shifted views"] = rollout(vit), lambda image: papers.shifted_views(
        rollout(vit, 1), image, vit.backbone.patch_embed.grid_size[0])  # fmt: skip
    ways["rollout, registers"] = rollout(networks["registers", "vit"])
    prompts = papers.PromptCam(vit, problem.classes)
    ways["Prompt-CAM"] = fit_frozen(problem, prompts, prompts.loss, rows, seed).attention
    return ways, prompts


def winner(logit: torch.Tensor) -> torch.Tensor:
    """The predicted class alone (N, K)."""
    return nn.functional.one_hot(logit.argmax(dim=1), logit.shape[1]).to(logit.dtype)


def draw_maps(args: argparse.Namespace) -> None:
    """IoU with the ideal square of the boxes that every kind of map leads to, and Prompt-CAM's predictions."""
    for name in (name for name in args.sets if name in MASKED):
        problem = SETS[name](args)
        for seed in SEEDS:
            path, (_, test) = args.output / "found" / f"{name}_maps_{seed}.npz", problem.split(seed)
            if path.exists():
                continue
            ways, prompts = map_ways(problem, seed, args)
            found = {}
            for way, attend in tqdm(ways.items(), desc=f"maps of {name}, seed {seed}"):
                parts = [attend(problem.pictures(part, ("whole",))).numpy() for part in np.array_split(test, 12)]
                found[way] = judge(problem, test, np.concatenate(parts))
            found["saliency"] = judge(problem, test, np.load(problem.maps, mmap_mode="r", allow_pickle=False)[test])
            found["whole image"] = judge(problem, test, np.ones((len(test), 8, 8), np.float32))
            with torch.inference_mode():
                logit = torch.cat([prompts(problem.pictures(part, ("whole",)))[0] for part in np.array_split(test, 12)])
            save(path, rows=test, prob=logit.softmax(dim=1).numpy(), **found)


def judge(problem: Problem, rows: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """IoU with the ideal square, of images that have one (NaN: it has none)."""
    iou = np.full(len(rows), np.nan)
    for i, (row, attention) in enumerate(zip(rows, maps, strict=True)):
        if problem.ideal[row] is not None:
            box = localize.find_box(attention, tuple(problem.sizes[row]))
            iou[i] = overlap(problem.ideal[row], box)
    return iou


# ---------------------------------------------------------------- cost
def measure_cost(args: argparse.Namespace) -> None:
    """Times of a training step and of a prediction over those of the plain network, side by side on one thread."""
    torch.set_num_threads(1)
    print("| network | technique | step | prediction |\n|---|---|---|---|")
    for what, size, kind in (("ViT of techniques.py, 64 px", 64, "vit"), ("ResNet-10-t, 32 px", 32, "cnn")):
        image = torch.randint(256, (2 * BATCH, 3, size, size), dtype=torch.uint8)
        target = np.arange(len(image)) % 2
        blank = np.zeros(len(image), int)
        problem = Problem("cost", image, image, target, blank, blank, {kind: 1}, 8, 0)
        steps, forwards, names = [], [], []
        for name, technique in papers.TRAININGS.items():
            if kind not in technique.kinds or name in ("mae", "distillation", "cross fusion"):
                continue
            way = technique(problem, kind, np.arange(len(image)), 0)
            network = way.build()
            optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
            names.append(name)
            steps.append(partial(one_step, problem, way, network, optimizer))
            forwards.append(partial(problem.predict, network, np.arange(len(image)), way.pictures, 1))
        step, forward = fastest(steps, 5), fastest(forwards, 5)
        for i, name in enumerate(names):
            print(f"| {what} | {name} | {step[i] / step[0]:.2f} | {forward[i] / forward[0]:.2f} |")
    for size in (224, 384):  # EViT at a size that people use: ViT-S/16
        make = partial(vit_small, size)
        plain, thin = make(papers.VisionTransformer).eval(), make(papers.Reorganised).eval()
        image = torch.rand(4, 3, size, size)
        with torch.inference_mode():
            seconds = fastest([partial(plain, image), partial(thin, image)], 5)
        print(f"| ViT-S/16, {size} px | evit | | {seconds[1] / seconds[0]:.2f} |")


def vit_small(size: int, make: type) -> nn.Module:
    """ViT-S/16, of which EViT thins blocks 4, 7 and 10."""
    network = make(img_size=size, embed_dim=384, depth=12, num_heads=6, num_classes=2)
    network.keep_after = (3, 6, 9)
    return network


def one_step(problem: Problem, way: Plain, network: nn.Module, optimizer) -> None:
    """A training step on the first images."""
    network.train()
    rows = np.arange(BATCH)
    image = problem.augment(problem.pictures(rows, way.pictures), way.rng)
    way.step(network, optimizer, *way.change(image, way.targets(rows)))


# ---------------------------------------------------------------- the table
def scorer_of(problem: Problem, rows: np.ndarray, value: np.ndarray):
    """weights (n,) -> score: AUC of two classes, else accuracy; of a vector of values (n,) their mean."""
    target = problem.target[rows]
    if value.ndim == 2 and problem.classes == 2:
        return scores.Ranked(target, value[:, 1]).auc
    value = value if value.ndim == 1 else (value.argmax(axis=1) == target).astype(float)
    known = ~np.isnan(value)
    return lambda weight=1.0: float(np.average(value[known], weights=np.broadcast_to(weight, value.shape)[known]))


def compare(problem: Problem, technique: str, where: str, score: str, pairs: list[tuple]) -> dict:
    """A row of pairs (rows, values of the base, values of the technique) by seed; p is two-sided, of a normal
    distribution as wide as the resampled gains."""
    sides = [[scorer_of(problem, rows, value) for rows, *both in pairs for value in (both[side],)] for side in (0, 1)]
    base, value = (float(np.mean([of() for of in side])) for side in sides)
    code, names = pd.factorize(problem.group)
    rng, gains = np.random.default_rng(0), []
    for _ in range(DRAWS):
        weight = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[code]
        seeds = rng.integers(len(pairs), size=len(pairs))
        gains.append(np.mean([sides[1][i](weight[pairs[i][0]]) - sides[0][i](weight[pairs[i][0]]) for i in seeds]))
    (low, high), p = scores.interval(np.array(gains)), 2 * norm.sf(abs(value - base) / max(np.nanstd(gains), 1e-9))
    return {"technique": technique, "where": where, "score": score, "without": base, "with": value,
            "gain": value - base, "low": low, "high": high, "p": max(float(p), SMALLEST)}  # fmt: skip


def rows_of(problem: Problem, args: argparse.Namespace) -> list[dict]:
    """All comparisons on a set of pictures whose trainings are there."""
    rows, word = [], "AUC" if problem.classes == 2 else "accuracy"

    def load(technique: str, kind: str) -> list[dict]:
        paths = [path_of(args, problem.name, technique, kind, seed) for seed in SEEDS]
        return [dict(np.load(path, allow_pickle=False)) for path in paths if path.exists()]

    def add(technique: str, where: str, pairs: list[tuple], score: str = word) -> None:
        if len(pairs) == len(SEEDS):
            rows.append(compare(problem, technique, f"{problem.name}, {where}", score, pairs))

    def pair(base: list[dict], new: list[dict], old_key: str = "prob", key: str = "prob") -> list[tuple]:
        return [(b["rows"], b[old_key], n[key]) for b, n in zip(base, new, strict=False)]

    for technique, way in papers.TRAININGS.items():
        for kind in way.kinds:
            if way.against:
                add(technique, kind, pair(load(way.against, kind), load(technique, kind)))
    for kind in ("cnn", "vit"):
        plain = load("plain", kind)
        add("soup of the best 3 epochs", f"{kind}, best epoch", pair(plain, plain, "best", "soup"))
        add("soup of the best 3 epochs", f"{kind}, last epoch", pair(plain, plain, "prob", "soup"))
    whole, crop = load("plain", "cnn"), load("crop", "cnn")
    blend = [w | {"prob": (w["prob"] + c["prob"]) / 2} for w, c in zip(whole, crop, strict=False)]
    add("cross fusion", "cnn, mean of whole and crop", pair(blend, load("cross fusion", "cnn")))
    if problem.name == "polyps":  # the others have no patients with several images
        add("patient-relative scores", "cnn, sequences", [(w["rows"], w["prob"], relative(problem, w)) for w in whole])
    maps = [args.output / "found" / f"{problem.name}_maps_{seed}.npz" for seed in SEEDS]
    maps = [dict(np.load(path, allow_pickle=False)) for path in maps if path.exists()]
    if maps:
        best = max((key for key in maps[0] if key.startswith("Grad-CAM")), key=lambda k: np.nanmean(maps[0][k]))
        for technique, base in (("T-TAME", best), ("T-TAME", "saliency"), ("rollout, 8 shifted views", "rollout"),
                                ("rollout, registers", "rollout"), ("Prompt-CAM", "rollout"),
                                ("Prompt-CAM", "whole image")):  # fmt: skip
            add(technique, f"box, {base}", pair(maps, maps, base, technique), "IoU")
        add("Prompt-CAM", "vit, its own head", pair(load("plain", "vit"), maps))
    return rows


def relative(problem: Problem, found: dict) -> np.ndarray:
    """Log-probabilities (n, K), of groups with several images less half of what the group's mean exceeds the mean."""
    value = pd.DataFrame(np.log(found["prob"] + 1e-6))
    group = pd.Series(problem.group[found["rows"]])
    away, several = value.groupby(group).transform("mean") - value.mean(), group.duplicated(keep=False)
    return (value - 0.5 * away.where(several, 0.0, axis=0)).to_numpy()


def show_table(args: argparse.Namespace) -> None:
    """Add the comparisons whose trainings are here to techniques.csv; print all, those with the smallest p first."""
    new = pd.DataFrame([row for name in args.sets for row in rows_of(SETS[name](args), args)])
    table = pd.concat([pd.read_csv(FOUND), new]).drop_duplicates(["technique", "where"], keep="last").sort_values("p")
    write_table(FOUND, table.round(dict.fromkeys(("without", "with", "gain", "low", "high"), 4) | {"p": 5}))
    print("| technique | where | score | without | with | gain [95 %] | p | p, Holm | reading |\n" + "|---" * 9 + "|")
    holm = 0.0
    for i, row in enumerate(table.to_dict("records")):
        holm = min(max(holm, (len(table) - i) * row["p"]), 1.0)
        reading = "no worse" if row["low"] > -EQUAL else "unclear"
        if holm < 0.05:
            reading = "better" if row["gain"] > 0 else "worse"
        print("| {technique} | {where} | {score} | {without:.3f} | {with:.3f} | {gain:+.3f} [{low:+.3f}, {high:+.3f}] "
              "| {p:.4f} |".format(**row), f"{holm:.3f} | {reading} |")  # fmt: skip


# ---------------------------------------------------------------- command line
COMMANDS = {"train": train, "maps": draw_maps, "cost": measure_cost, "table": show_table}


def main(args: argparse.Namespace) -> None:
    """Run a command."""
    if args.data is None and args.command != "cost":
        raise util.InputError(f"{args.command} needs DATA, a folder with isic2018, polyps256, cifar10_subset, mnist")
    COMMANDS[args.command](args)


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    add = parser.add_argument
    add("command", choices=tuple(COMMANDS), help="what to do")
    add("data", type=Path, nargs="?", help="folder with isic2018, polyps256, cifar10_subset and mnist")
    add("--weights", default="imagenet", help="ImageNet weights of EfficientNet-Lite0")
    add("--output", type=Path, default=Path("runs/techniques"), help="arrays, predictions, weights")
    add("--only", nargs="+", choices=tuple(papers.TRAININGS), default=list(papers.TRAININGS), help="techniques")
    add("--kinds", nargs="+", choices=("cnn", "vit"), default=["cnn", "vit"], help="of networks")
    add("--sets", nargs="+", choices=tuple(SETS), default=list(SETS), help="of pictures")
    add("--size", type=util.COUNT, default=64, help="of skin and polyps, in pixels")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
