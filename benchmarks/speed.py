"""How fast every stage is, beside a plain way to do the same and beside what limits it.

    python benchmarks/speed.py
    python benchmarks/speed.py --quick
    python benchmarks/speed.py --device cuda

Makes its own inputs: JPEGs of 24 and 1 megapixels, networks with random weights. "reference" is
how the original does a step, in our words: one thread that decodes every file in full, saves it
again and shrinks it; one image at a time through ChipNet, its 49 chips cut and stacked; one decode
per fold; torchvision's transforms on PIL images. Both take turns on the same work; printed are
medians over rounds, and of the ratio within a round. The last table shows how time and the peak
memory of whole scripts grow with the number of images.
"""

import argparse
import copy
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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

ROOT = Path(__file__).resolve().parents[1]
SIZE = 224
BATCH = 16  # images through ChipNet at a time on a CPU


@dataclass
class Stage:
    """Two ways to do the same work on `count` images, and a third that nothing can beat."""

    name: str
    count: int
    reference: Callable
    ours: Callable
    floor: Callable | None = None


# ---------------------------------------------------------------- inputs
def draw_jpegs(folder: Path, width: int, height: int, count: int) -> list[Path]:
    """Skin-like pictures: soft colour, texture and a dark disc; about 1.3 bits per pixel."""
    folder.mkdir()
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        shape = width, height
        soft = cv2.resize(rng.normal(0, 12, (height // 8, width // 8, 3)).astype(np.float32), shape)
        fine = cv2.resize(rng.normal(0, 6, (height // 3, width // 3, 3)).astype(np.float32), shape)
        picture = soft + fine + np.float32([190, 150, 130])
        centre = int(rng.integers(width // 3, width // 2)), height // 2
        cv2.circle(picture, centre, height // 6, (90, 60, 50), -1, cv2.LINE_AA)
        paths.append(folder / f"{number:04d}.jpg")
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(paths[-1], quality=88)
    return paths


def forgetful(function: Callable) -> Callable:
    """The function with Pillow's default of returning all memory between images."""

    def call():
        Image.core.set_blocks_max(0)
        try:
            return function()
        finally:
            Image.core.set_blocks_max(util.PILLOW_BLOCKS)

    return call


def decode_in_full(path: Path) -> Image.Image:
    """The centre square of a file, cut from a full decode."""
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


# ---------------------------------------------------------------- preprocess and crop
def preprocess_stage(name: str, paths: list[Path], exact: bool, folder: Path) -> Stage:
    """JPEG files to rows of an array."""
    kept = np.empty((len(paths), SIZE, SIZE, 3), np.uint8)

    def reference():
        for row, path in enumerate(paths):
            square = decode_in_full(path)
            square.save(folder / "again.jpg")
            kept[row] = square.resize((SIZE, SIZE), Image.Resampling.BILINEAR)

    array = util.PartialArray(folder / f"{name}.npy", kept.shape)

    def ours():
        def work(row: int) -> None:
            array.write(row, util.read_square(paths[row], SIZE, exact)[0])

        util.run_threads(work, range(len(paths)), os.cpu_count() or 1)

    def entropy_decode(path: Path) -> None:
        image = Image.open(path)
        image.draft("L", (image.width // 8, image.height // 8))
        image.load()

    def floor():
        util.run_threads(entropy_decode, paths, os.cpu_count() or 1)

    return Stage(name, len(paths), forgetful(reference), ours, None if exact else floor)


def chips_one_by_one(network: models.ChipNet, image: torch.Tensor) -> torch.Tensor:
    """Embeddings of one image (3, S, S): chips cut by splitting, stacked, and sent through."""
    image = network.normalise(image)
    rows = torch.split(image, models.CHIP, dim=1)
    chips = torch.stack([chip for row in rows for chip in torch.split(row, models.CHIP, dim=2)])
    grid = len(rows)
    return network.backbone(chips).view(grid, grid, -1).permute(2, 0, 1)


def make_chipnets(backbone: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The same ChipNet without and with what makes ours faster."""
    torch.manual_seed(0)
    ours = models.ChipNet(backbone, "none", SIZE, 512, 0.0)
    plain = copy.deepcopy(ours)
    for name, module in list(plain.backbone.named_modules()):
        if isinstance(module, models.SmallMapConv2d):
            conv = nn.Conv2d(module.in_channels, module.out_channels, 3, module.stride, 1,
                             bias=module.bias is not None)  # fmt: skip
            conv.load_state_dict(module.state_dict())
            plain.backbone.set_submodule(name, conv)
    return plain.to(device), ours.to(device, memory_format=torch.channels_last)


def crop_stage(paths: list[Path], device: torch.device, amp: str) -> Stage:
    """Maps of three folds' networks, and a crop per fold: boxes of a fifth to the whole of the
    short side, those of one image within 10 % of each other."""
    plain, network = (net.eval() for net in make_chipnets("resnet18", device))
    network.backbone = models.fold_batchnorms(network.backbone)
    squares = torch.from_numpy(np.stack([util.read_square(path, SIZE)[0] for path in paths]))
    squares = squares.permute(0, 3, 1, 2)
    rng, boxes = np.random.default_rng(0), []
    with Image.open(paths[0]) as image:
        size = image.size
    for _ in paths:
        side = rng.uniform(0.2, 1.0) * min(size)
        x, y = rng.uniform(0, np.array(size) - side)
        box = Box(x, y, x + side, y + side)
        boxes.append([widen(box, factor, size) for factor in (0.9, 1.0, 1.1)])

    @torch.inference_mode()
    def reference():
        for fold in range(3):
            for row, path in enumerate(paths):
                plain.weigh(chips_one_by_one(plain, squares[row].to(device))[None]).cpu()
                box = boxes[row][fold]
                image = Image.open(path).convert("RGB").crop(tuple(map(round, box.scaled(1))))
                np.asarray(image.resize((SIZE, SIZE), Image.Resampling.HAMMING))

    @torch.inference_mode()
    def ours():
        with models.autocast(device, amp):
            for _ in range(3):
                for batch in squares.split(256 if device.type == "cuda" else BATCH):
                    network.attention(batch.to(device)).cpu()
        util.run_threads(
            lambda row: util.read_crops(paths[row], boxes[row], [SIZE] * 3, size),
            range(len(paths)),
            os.cpu_count() or 1,
        )

    name = f"crop, 3 folds, {amp}" if amp != "off" else "crop, 3 folds"
    return Stage(name, len(paths), forgetful(reference), ours)


# ---------------------------------------------------------------- augmentation
def on_one_core(function: Callable) -> Callable:
    """The function with one thread of torch and OpenCV, as in a loader's worker."""

    def call():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        cv2.setNumThreads(0)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)

    return call


class HairOverlay:
    """Pastes one of a bank of drawn hair layers onto a PIL image, every second time."""

    def __init__(self, bank: list[Image.Image]):
        self.bank, self.rng = bank, np.random.default_rng(0)

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.rng.random() < 0.5:
            return image
        layer = self.bank[self.rng.integers(len(self.bank))]
        return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def some_images(count: int) -> dataset.ImageDataset:
    """Smooth images of an array, with the training augmentation."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 220, (count, 28, 28, 3), dtype=np.uint8)
    with tempfile.NamedTemporaryFile(suffix=".npy", delete=False) as file:
        np.save(file, np.stack([cv2.resize(image, (SIZE, SIZE)) for image in coarse]))
    images = dataset.ImageDataset(
        [dataset.Stored(Path(file.name), count)], range(count), np.zeros((count, 0))
    )
    images.transform = dataset.train_transform(SIZE)
    return images


def augment_on_device_stage(count: int, device: torch.device) -> Stage:
    """The same augmentation by a loader's worker, and a batch at a time on a device."""
    stored = some_images(count)
    epochs = [
        images.epoch(np.arange(count), seed=0)
        for images in (stored, dataset.DeviceImages(stored, device))
    ]

    def reference():
        return torch.stack([epochs[0][i][0] for i in range(count)]).to(device)

    def ours():
        return epochs[1].__getitems__(list(range(count)))[0]

    name = f"augmentation on {device.type}, against our worker"
    return Stage(name, count, on_one_core(reference), on_one_core(ours))


def augment_stage(count: int, normalise: bool = True) -> Stage:
    """One core: hair, flips, any rotation, colour; to a normalised float batch.

    Without `normalise` ours ends as our loader does, at bytes, which the device normalises.
    """
    stored = some_images(count)
    images, bank = stored.sources[0].images[np.arange(count)], []
    for y, x, alpha in stored.transform.transforms[0].bank:
        layer = np.zeros((SIZE, SIZE, 4), np.uint8)
        layer[y, x, :3], layer[y, x, 3] = (40, 32, 28), 255 * alpha[:, 0]
        bank.append(Image.fromarray(layer))
    plain = transforms.Compose([
        HairOverlay(bank),
        transforms.RandomHorizontalFlip(),
        transforms.RandomVerticalFlip(),
        transforms.RandomRotation(360),
        transforms.ColorJitter(0.2, 0.2, 0.2),
        transforms.ToTensor(),
        transforms.Normalize(models.IMAGENET_MEAN, models.IMAGENET_STD),
    ])  # fmt: skip
    epoch = dataset.Epoch(stored, np.arange(count), seed=0)
    network = models.MetaResNet("regnet_tiny", "none", SIZE, 0, 1, 0.0)

    def ours():
        batch = torch.stack([epoch[i][0] for i in range(count)])
        return network.normalise(batch) if normalise else batch

    def reference():
        return torch.stack([plain(Image.fromarray(image)) for image in images])

    name = "augmentation with hair" if normalise else "augmentation with hair, to bytes"
    return Stage(name, count, on_one_core(reference), on_one_core(ours))


# ---------------------------------------------------------------- networks
def attention_stage(backbone: str, amp: str, device: torch.device, count: int) -> Stage:
    """Maps of a ChipNet in eval mode."""
    plain, ours = (network.eval() for network in make_chipnets(backbone, device))
    ours.backbone = models.fold_batchnorms(ours.backbone)
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


def precision(amp: str) -> str:
    """Name of a precision."""
    return "fp32" if amp == "off" else amp


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

    return Stage(
        f"ChipNet {backbone}, training step, {precision(amp)}",
        count,
        stepper(plain, one_by_one, "off", fused=False),
        stepper(ours, lambda: ours(image, None), amp, fused=True),
    )


def loop_stage(
    model: str, backbone: str, device: torch.device, augment: Stage, count: int
) -> Stage:
    """A GPU's training loop: the reference augments on one core and steps in fp32, ours has the
    images on the device, augments them there, and steps in bf16."""
    spec = {"model": model, "backbone": backbone, "image_size": SIZE, "meta_dim": 0, "hidden": 256,
            "dropout": 0.0, "gates": "identity" if model == "fsg_vit" else None}  # fmt: skip
    target = (torch.arange(count, device=device) % 2).float()
    meta = torch.zeros(count, 0, device=device)
    epoch = dataset.DeviceImages(some_images(count), device).epoch(np.arange(count), seed=0)

    def stepper(amp: str, fused: bool, make_batch: Callable) -> Callable:
        network = models.build_model(spec).to(device).train()
        optimizer = torch.optim.Adam(network.parameters(), 1e-5, fused=fused or None)

        def step():
            optimizer.zero_grad()
            with models.autocast(device, amp):
                logit = network(make_batch(), meta)
            F.binary_cross_entropy_with_logits(logit.float().squeeze(1), target).backward()
            optimizer.step()

        return step

    def augmented():
        return augment.reference().to(device)

    def augmented_there():
        return epoch.__getitems__(list(range(count)))[0]

    return Stage(
        f"{model} {backbone}, training loop, bf16",
        count,
        stepper("off", False, augmented),
        stepper("bf16", True, augmented_there),
    )


# ---------------------------------------------------------------- measuring
def measure(stages: list[Stage], rounds: int, device: torch.device) -> pd.DataFrame:
    """Rates of all stages, both ways taking turns."""
    rows = []
    for stage in tqdm(stages, unit="stage"):
        calls = {"reference": stage.reference, "ours": stage.ours}
        calls |= {"limit": stage.floor} if stage.floor else {}
        for call in calls.values():
            call()
        times = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(seconds_of(call, device))
        found = {name: np.array(values) for name, values in times.items()}
        row = {"stage": stage.name}
        row |= {name: stage.count / np.median(values) for name, values in found.items()}
        row["ratio"] = np.median(found["reference"] / found["ours"])
        if stage.floor:
            row["of limit"] = np.median(found["limit"] / found["ours"])
        rows.append(row)
    return pd.DataFrame(rows)


def pixel_difference(paths: list[Path]) -> float:
    """Mean difference in grey levels between fast and exact squares."""
    fast, exact = (
        np.stack([util.read_square(path, SIZE, exact)[0] for path in paths]).astype(float)
        for exact in (False, True)
    )
    return float(np.abs(fast - exact).mean())


def peak_of(*words) -> tuple[float, float]:
    """Seconds of a command of this repository, and peak memory (MB) of its largest process."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, sys.executable, *map(str, words)]
    start = time.perf_counter()
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, int(run.stdout) / 1024


def growth(paths: list[Path], folder: Path, counts: list[int]) -> pd.DataFrame:
    """Seconds and peak memory of whole scripts on 1, 2 and 4 times as many images of 1 MP."""
    rows = []
    for count in counts:
        home = folder / f"images{count}"
        (home / "images").mkdir(parents=True)
        names = [f"{i:05d}" for i in range(count)]
        for i, name in enumerate(names):
            os.link(paths[i % len(paths)], home / "images" / f"{name}.jpg")
        table = pd.DataFrame({"image_name": names, "target": np.arange(count) % 2})
        table.to_csv(home / "train.csv", index=False)
        data = ["--data_dir", home / "data"]
        small = ["--weights", "none", "--backbone", "regnet_tiny"]
        commands = {
            "preprocess.py": ["--train_csv", home / "train.csv", "--output_dir", home / "data",
                              "--group_col", "none", "--n_folds", 2],
            "crop.py": [*data, *small, "--views", 1, "--device", "cpu"],
            "train.py": [*data, *small, "--model", "resnet", "--fold", 0, "--epochs", 1, "--tta", 1,
                         "--workers", 0, "--device", "cpu", "--runs_dir", home / "runs"],
        }  # fmt: skip
        for script, words in commands.items():
            seconds, memory = peak_of(script, *words)
            rows.append({"script": script, "images": count, "array MB": count * SIZE**2 * 3 / 1e6,
                         "seconds": seconds, "peak MB": memory})  # fmt: skip
    return pd.DataFrame(rows).sort_values(["script", "images"], ascending=[False, True])


def markdown(table: pd.DataFrame, digits: dict[str, int]) -> str:
    """A table in the form of the README."""
    lines = ["| " + " | ".join(table) + " |", "|" + "---|" * len(table.columns)]
    for _, row in table.iterrows():
        cells = [
            str(value) if isinstance(value, str) else
            "" if pd.isna(value) else f"{value:.{digits.get(name, 1)}f}"
            for name, value in row.items()
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_stages(folder: Path, args: argparse.Namespace, device: torch.device) -> list[Stage]:
    """All stages that the device can run."""
    few = 4 if args.quick else 8
    large = draw_jpegs(folder / "large", 6000, 4000, few)
    small = draw_jpegs(folder / "small", 1280, 960, 8 * few)
    for name, paths in (("24 MP", large), ("1 MP", small)):
        print(f"{len(paths)} files of {name}, {paths[0].stat().st_size / 1e6:.2f} MB: fast and "
              f"exact squares differ by {pixel_difference(paths):.2f} grey levels")  # fmt: skip
    stages = [
        preprocess_stage("preprocess 24 MP", large, False, folder),
        preprocess_stage("preprocess 24 MP, exact", large, True, folder),
        preprocess_stage("preprocess 1 MP", small, False, folder),
        preprocess_stage("preprocess 1 MP, exact", small, True, folder),
        crop_stage(large, device, "off"),
        crop_stage(large, device, "bf16"),
        augment_stage(64),
        augment_stage(64, normalise=False),
        augment_on_device_stage(64, device),
    ]
    backbones = ("resnet18",) if args.quick else ("resnet18", "resnet50")
    for backbone in backbones:
        for amp in ("off", "bf16"):
            count = 256 if device.type == "cuda" else BATCH
            stages.append(attention_stage(backbone, amp, device, count))
            stages.append(training_stage(backbone, amp, device, count // 2))
    if device.type == "cuda":
        networks = (("resnet", "resnet50"), ("chipnet", "resnet50"), ("fsg_vit", "vit_b_16"))
        augment = augment_stage(256)
        stages += [loop_stage(*network, device, augment, 256) for network in networks]
    return stages


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    device = models.pick_device(args.device)
    kind = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(f"{kind or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stages = make_stages(folder, args, device)
        rounds = 2 if args.quick else args.rounds
        table = measure(stages, rounds, device)
        print(markdown(table, {"ratio": 2, "of limit": 2}) + "\n")
        counts = [50, 100, 200] if args.quick else [500, 1000, 2000]
        small = sorted((folder / "small").glob("*.jpg"))
        print(markdown(growth(small, folder, counts), {"images": 0, "array MB": 0, "peak MB": 0}))


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=util.number(int, 1), default=5, help="turns of each way")
    parser.add_argument("--quick", action="store_true", help="a look in two minutes")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser(), models.ModelError)
