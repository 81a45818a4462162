"""How fast every stage is, beside a plain way to do the same and beside what limits it.

    python benchmarks/speed.py
    python benchmarks/speed.py --quick
    python benchmarks/speed.py --device cuda

Makes its own inputs: JPEGs of 24 and 1 megapixels, networks with random weights. "reference" is how the original does a
step, in our words: one thread that decodes every file in full, saves it again and shrinks it; one image at a time
through ChipNet, its 49 chips cut and stacked; one decode per fold; torchvision's transforms on PIL images. One row has
albumentations' own transforms for a reference. Both ways take turns on the same work; printed are medians over rounds,
and of the ratio within a round. The last table shows how time and the peak memory of whole scripts grow with the number
of images.
"""

import argparse
import copy
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
from fsg_cost import seconds_of
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import transforms
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dataset
import models
import util
from localize import Box, widen
from plumbing.arrays import PartialArray
from plumbing.distributed import pick_device
from plumbing.images import configure_pillow, read_crops, read_square
from plumbing.speedups import SmallMapConv2d, fold_batchnorms

ROOT = Path(__file__).resolve().parents[1]
SIZE = 224
BATCH = 16  # images through ChipNet at a time on a CPU


@dataclass
class Stage:
    """Two ways to do the same work on `count` images, and perhaps its part that takes the least possible time."""

    name: str
    count: int
    reference: Callable
    ours: Callable
    limit: Callable | None = None


# ---------------------------------------------------------------- inputs
def draw_jpegs(folder: Path, width: int, height: int, count: int) -> list[Path]:
    """Skin-like pictures: soft colour, texture and a dark disc; about 1.3 bits per pixel."""
    folder.mkdir()
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        soft, fine = (
            cv2.resize(rng.normal(0, sigma, (height // cell, width // cell, 3)).astype(np.float32), (width, height))
            for sigma, cell in ((12, 8), (6, 3))
        )
        picture = soft + fine + np.float32([190, 150, 130])
        centre = int(rng.integers(width // 3, width // 2)), height // 2
        cv2.circle(picture, centre, height // 6, (90, 60, 50), -1, cv2.LINE_AA)
        paths.append(folder / f"{number:04d}.jpg")
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(paths[-1], quality=88)
    return paths


def in_threads(function: Callable, items: Iterable) -> list:
    """function(item) of all items, in as many threads as there are cores."""
    with ThreadPoolExecutor(util.CPUS) as pool:
        return list(pool.map(function, items))


def forgetful(function: Callable) -> Callable:
    """The function with Pillow's default of returning all memory between images."""

    def call():
        Image.core.set_blocks_max(0)
        try:
            return function()
        finally:
            configure_pillow()

    return call


# ---------------------------------------------------------------- preprocess and crop
def preprocess_stage(name: str, paths: list[Path], exact: bool, folder: Path) -> Stage:
    """JPEG files to rows of an array. The limit is their entropy decoding, which no scaled decode avoids."""
    kept = np.empty((len(paths), SIZE, SIZE, 3), np.uint8)
    array = PartialArray(folder / f"{name}.npy", kept.shape)

    def reference():
        for row, path in enumerate(paths):
            image = Image.open(path).convert("RGB")
            side = min(image.size)
            left, top = round((image.width - side) / 2), round((image.height - side) / 2)
            square = image.crop((left, top, left + side, top + side))
            square.save(folder / "again.jpg")
            kept[row] = square.resize((SIZE, SIZE), Image.Resampling.BILINEAR)

    def ours():
        in_threads(lambda row: array.write(row, read_square(paths[row], SIZE, exact)[0]), range(len(paths)))

    def entropy_decode(path: Path) -> None:
        image = Image.open(path)
        image.draft("L", (image.width // 8, image.height // 8))
        image.load()

    limit = None if exact else lambda: in_threads(entropy_decode, paths)
    return Stage(name, len(paths), forgetful(reference), ours, limit)


def crop_stage(paths: list[Path], device: torch.device, amp: str) -> Stage:
    """Maps of three folds' networks, and a crop per fold: boxes of a fifth to the whole of the short side, those of one
    image within 10 % of each other."""
    plain, network = (net.eval() for net in make_chipnets("resnet18", device))
    network.backbone = fold_batchnorms(network.backbone)
    squares = torch.from_numpy(np.stack([read_square(path, SIZE)[0] for path in paths])).permute(0, 3, 1, 2)
    rng, boxes = np.random.default_rng(0), []
    with Image.open(paths[0]) as image:
        size = image.size
    for _ in paths:
        side = rng.uniform(0.2, 1.0) * min(size)
        x, y = rng.uniform(0, np.array(size) - side)
        boxes.append([widen(Box(x, y, x + side, y + side), factor, size).corners for factor in (0.9, 1.0, 1.1)])

    @torch.inference_mode()
    def reference():
        for fold in range(3):
            for row, path in enumerate(paths):
                plain.weigh(chips_one_by_one(plain, squares[row].to(device))[None]).cpu()
                crop = Image.open(path).convert("RGB").crop(tuple(map(round, boxes[row][fold])))
                np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.HAMMING))

    @torch.inference_mode()
    def ours():
        with models.autocast(device, amp):
            for _ in range(3):
                for batch in squares.split(256 if device.type == "cuda" else BATCH):
                    network.attention(batch.to(device)).cpu()
        in_threads(lambda row: read_crops(paths[row], boxes[row], [SIZE] * 3, size), range(len(paths)))

    return Stage(f"crop, 3 folds, {precision(amp)}", len(paths), forgetful(reference), ours)


# ---------------------------------------------------------------- augmentation
def on_one_core(function: Callable) -> Callable:
    """The function with one thread of torch and OpenCV, as in a loader's worker."""

    def call():
        threads = torch.get_num_threads(), cv2.getNumThreads()
        torch.set_num_threads(1)
        cv2.setNumThreads(0)
        try:
            return function()
        finally:
            torch.set_num_threads(threads[0])
            cv2.setNumThreads(threads[1])

    return call


class PasteHair:
    """Pastes one of a bank of drawn layers of hair onto a PIL image, eight times in ten."""

    def __init__(self, bank: list[np.ndarray]):
        self.rng, self.layers = np.random.default_rng(0), []
        for opacity in bank:
            color = np.broadcast_to(self.rng.choice(dataset.HAIR_COLORS), (*opacity.shape, 3))
            self.layers.append(Image.fromarray(np.dstack([color, opacity]).astype(np.uint8)))

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.rng.random() >= 0.8:
            return image
        layer = self.layers[self.rng.integers(len(self.layers))]
        return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def some_images(count: int) -> np.ndarray:
    """Smooth images: uint8 (count, S, S, 3)."""
    coarse = np.random.default_rng(0).integers(60, 220, (count, 28, 28, 3), dtype=np.uint8)
    return np.stack([cv2.resize(image, (SIZE, SIZE)) for image in coarse])


def augment_stage(count: int, normalise: bool = True) -> Stage:
    """One core: hair, flips, any rotation, colour; to a normalised float batch. Without `normalise` ours ends as our
    loader does, at bytes, which the device normalises."""
    images = some_images(count)
    skin = A.Compose(dataset.AUGMENTATIONS["skin"].transforms(SIZE, 0))
    ours_of = dataset.ImageDataset([lambda row, rng: images[row]], range(count), np.zeros((count, 0)), transform=skin)
    plain = transforms.Compose([
        PasteHair(dataset.hair_bank(SIZE)),
        transforms.RandomHorizontalFlip(),
        transforms.RandomVerticalFlip(),
        transforms.RandomRotation(360),
        transforms.ColorJitter(0.2, 0.2, 0.2),
        transforms.ToTensor(),
        transforms.Normalize(models.IMAGENET_MEAN, models.IMAGENET_STD),
    ])  # fmt: skip
    network = models.MetaResNet(models.Spec("resnet", "regnet_tiny", SIZE))

    def reference():
        return torch.stack([plain(Image.fromarray(image)) for image in images])

    def ours():
        batch = torch.stack([ours_of[i, 1.0, (0, i)].image for i in range(count)])
        return network.normalise(batch) if normalise else batch

    name = "augmentation with hair" if normalise else "augmentation with hair, to bytes"
    return Stage(name, count, on_one_core(reference), on_one_core(ours))


def turn_stage(count: int) -> Stage:
    """One core: albumentations' D4, Affine and ColorJitter, and our TurnAndTint, which does the same."""
    images, tint = some_images(count), (0.8, 1.2)
    theirs = A.Compose([
        A.D4(p=1),
        A.Affine(rotate=(-180, 180), border_mode=cv2.BORDER_REFLECT_101, p=1),
        A.ColorJitter(brightness=tint, contrast=tint, saturation=tint, hue=(0, 0), p=1),
    ])  # fmt: skip

    def run(transform: Callable) -> Callable:
        return on_one_core(lambda: np.stack([transform(image=image)["image"] for image in images]))

    ours = run(A.Compose([dataset.TurnAndTint()]))
    return Stage("albumentations D4 + Affine + ColorJitter, our TurnAndTint", count, run(theirs), ours)


# ---------------------------------------------------------------- networks
def precision(amp: str) -> str:
    """Name of a precision."""
    return "fp32" if amp == "off" else amp


def make_chipnets(backbone: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The same ChipNet without and with what makes ours faster."""
    torch.manual_seed(0)
    ours = models.ChipNet(models.Spec("chipnet", backbone, SIZE, hidden=512))
    plain = copy.deepcopy(ours)
    for name, module in list(plain.backbone.named_modules()):
        if isinstance(module, SmallMapConv2d):
            bias = module.bias is not None
            conv = nn.Conv2d(module.in_channels, module.out_channels, 3, module.stride, 1, bias=bias)
            conv.load_state_dict(module.state_dict())
            plain.backbone.set_submodule(name, conv)
    return plain.to(device), ours.to(device, memory_format=torch.channels_last)


def chips_one_by_one(network: models.ChipNet, image: torch.Tensor) -> torch.Tensor:
    """Embeddings of one image (3, S, S): chips cut by splitting, stacked, and sent through."""
    rows = torch.split(network.normalise(image), models.CHIP, dim=1)
    chips = torch.stack([chip for row in rows for chip in torch.split(row, models.CHIP, dim=2)])
    return network.backbone(chips).view(len(rows), len(rows), -1).permute(2, 0, 1)


def attention_stage(backbone: str, amp: str, device: torch.device, count: int) -> Stage:
    """Maps of a ChipNet in eval mode."""
    plain, ours = (network.eval() for network in make_chipnets(backbone, device))
    ours.backbone = fold_batchnorms(ours.backbone)
    image = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, device=device)

    @torch.inference_mode()
    def reference():
        for one in image:
            plain.weigh(chips_one_by_one(plain, one)[None])

    @torch.inference_mode()
    def fast():
        with models.autocast(device, amp):
            ours.attention(image)

    return Stage(f"ChipNet {backbone}, maps, {precision(amp)}", count, reference, fast)


def training_stage(backbone: str, amp: str, device: torch.device, count: int) -> Stage:
    """Forward, backward and Adam on one batch of a ChipNet."""
    plain, ours = (network.train() for network in make_chipnets(backbone, device))
    image = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    target = (torch.arange(count, device=device) % 2).float()

    def stepper(network: nn.Module, forward: Callable, amp: str, fused: bool) -> Callable:
        optimizer = torch.optim.Adam(network.parameters(), 1e-5, fused=fused or None)

        def step():
            optimizer.zero_grad()
            with models.autocast(device, amp):
                logit = forward()
            F.binary_cross_entropy_with_logits(logit.float().squeeze(1), target).backward()
            optimizer.step()

        return step

    def one_by_one():
        embedding = torch.stack([chips_one_by_one(plain, one) for one in image])
        attention = plain.weigh(embedding).unsqueeze(1)
        return plain.head((embedding * attention).sum(dim=(2, 3)))

    reference = stepper(plain, one_by_one, "off", fused=False)
    fast = stepper(ours, lambda: ours(image, None), amp, fused=True)
    return Stage(f"ChipNet {backbone}, training step, {precision(amp)}", count, reference, fast)


# ---------------------------------------------------------------- measuring
def summarise(stage: Stage, seconds: dict[str, list[float]]) -> list[str]:
    """Cells of a stage's row: images per second of each way, ours over the reference's and over the limit's; seconds:
    of every round, by way."""
    times = {name: np.array(values) for name, values in seconds.items()}
    rates = {name: f"{stage.count / np.median(values):.1f}" for name, values in times.items()}
    shares = {name: f"{np.median(values / times['ours']):.2f}" for name, values in times.items()}
    return [stage.name, rates["reference"], rates["ours"], rates.get("limit", ""), shares["reference"],
            shares.get("limit", "")]  # fmt: skip


def measure(stages: list[Stage], rounds: int, device: torch.device) -> Iterable[list[str]]:
    """Rows of the table; both ways, and the limit, take turns."""
    for stage in tqdm(stages, unit="stage"):
        calls = {"reference": stage.reference, "ours": stage.ours, "limit": stage.limit}
        calls = {name: call for name, call in calls.items() if call}
        for call in calls.values():
            call()  # warm-up
        turns = [{name: seconds_of(call, device) for name, call in calls.items()} for _ in range(rounds)]
        yield summarise(stage, {name: [turn[name] for turn in turns] for name in calls})


def peak_of(*words) -> tuple[float, float]:
    """Seconds of a command of this repository, and peak memory (MB) of its largest process."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, "
        "stderr=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, sys.executable, *map(str, words)]
    start = time.perf_counter()
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, int(run.stdout) / 1024


def growth(paths: list[Path], folder: Path, counts: list[int]) -> Iterable[list[str]]:
    """Seconds and peak memory of whole scripts on several numbers of images, of 1 MP: rows of a table."""
    data, small = ["--data_dir", folder / "data"], ["--weights", "none", "--backbone", "regnet_tiny"]
    commands = {
        "preprocess.py": ["--train_csv", folder / "train.csv", "--output_dir", folder / "data", "--group_col", "none",
                          "--n_folds", 2, "--overwrite"],
        "crop.py": [*data, *small, "--source", "saliency", "--views", 1, "--device", "cpu", "--overwrite"],
        "train.py": [*data, *small, "--model", "resnet", "--fold", 0, "--epochs", 1, "--tta", 1, "--workers", 0,
                     "--device", "cpu", "--runs_dir", folder / "runs", "--overwrite"],
    }  # fmt: skip
    (folder / "images").mkdir()
    for count in counts:
        names = [f"{i:05d}" for i in range(count)]
        for i, name in enumerate(names):
            if not (folder / "images" / f"{name}.jpg").exists():
                os.link(paths[i % len(paths)], folder / "images" / f"{name}.jpg")
        pd.DataFrame({"image_name": names, "target": np.arange(count) % 2}).to_csv(folder / "train.csv", index=False)
        for script, words in commands.items():
            seconds, memory = peak_of(script, *words)
            yield [script, str(count), f"{count * SIZE**2 * 3 / 1e6:.0f}", f"{seconds:.1f}", f"{memory:.0f}"]


def print_table(header: str, rows: Iterable[list[str]]) -> None:
    """Print a table in the form of the README."""
    names = header.split(", ")
    for cells in [names, ["---"] * len(names), *list(rows)]:  # not line by line: measuring has a progress bar
        print("| " + " | ".join(cells) + " |")


def make_stages(folder: Path, quick: bool, device: torch.device) -> list[Stage]:
    """All stages that the device can run."""
    few, count = 4 if quick else 8, 256 if device.type == "cuda" else BATCH
    large, small = draw_jpegs(folder / "large", 6000, 4000, few), draw_jpegs(folder / "small", 1280, 960, 8 * few)
    stages = []
    for name, paths in (("24 MP", large), ("1 MP", small)):
        pairs = [[read_square(path, SIZE, exact)[0].astype(float) for exact in (False, True)] for path in paths]
        print(f"{len(paths)} files of {name}, {paths[0].stat().st_size / 1e6:.2f} MB: fast and exact squares differ by "
              f"{np.mean([np.abs(fast - exact) for fast, exact in pairs]):.2f} grey levels")  # fmt: skip
        stages.append(preprocess_stage(f"preprocess {name}", paths, False, folder))
        stages.append(preprocess_stage(f"preprocess {name}, exact", paths, True, folder))
    stages += [crop_stage(large, device, amp) for amp in ("off", "bf16")]
    stages += [augment_stage(64), augment_stage(64, normalise=False), turn_stage(64)]
    for backbone in ("resnet18",) if quick else ("resnet18", "resnet50"):
        for amp in ("off", "bf16"):
            stages.append(attention_stage(backbone, amp, device, count))
            stages.append(training_stage(backbone, amp, device, count // 2))
    return stages


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    configure_pillow()
    device = pick_device(args.device)
    kind = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(
        f"{kind or platform.machine()}, {util.CPUS} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stages = make_stages(folder, args.quick, device)
        rows = measure(stages, 2 if args.quick else args.rounds, device)
        print_table("stage, reference, ours, limit, ratio, of limit", rows)
        small = sorted((folder / "small").glob("*.jpg"))
        rows = growth(small, folder, [50, 100, 200] if args.quick else [500, 1000, 2000])
        print()
        print_table("script, images, array MB, seconds, peak MB", sorted(rows, key=lambda cells: cells[0]))


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=util.COUNT, default=5, help="turns of each way")
    parser.add_argument("--quick", action="store_true", help="a look in two minutes")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
