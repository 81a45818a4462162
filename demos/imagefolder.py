"""Gated ViT on a folder of images by class, such as Imagenette.

    python demos/imagefolder.py train imagenette2-160 --backbone vit_b_16 --weights imagenet
    python demos/imagefolder.py infer imagenette2-160 --checkpoint checkpoints/fsg_imagefolder.pth

The folder holds train/CLASS/*.jpg and val/CLASS/*.jpg. Without --backbone a small network is
trained from scratch on 64 px.
"""

import argparse
from pathlib import Path

import common
import torch
from common import InputError, Split, models, util
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm


def read_folder(folder: Path, size: int, limit: int | None) -> tuple[Split, list[str]]:
    """All images of a folder as uint8 (N, 3, size, size), and the names of its classes."""
    shrink = v2.Compose([v2.PILToTensor(), v2.Resize(size), v2.CenterCrop(size)])
    try:
        data = ImageFolder(str(folder), transform=shrink)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder} holds no folder of images per class ({error})") from None
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:limit].tolist()
    images, targets = [], []
    for row in tqdm(rows, desc=folder.name, unit="image"):
        try:
            image, target = data[row]
        except OSError as error:
            name = data.samples[row][0]
            raise InputError(f"{name} cannot be read ({error}); remove it") from None
        images.append(image)
        targets.append(target)
    return Split(torch.stack(images), torch.tensor(targets)), data.classes


def load(args: argparse.Namespace) -> tuple[Split, Split, int]:
    """Training set, test set, number of classes."""
    train, classes = read_folder(args.path / "train", args.size, args.limit)
    test, test_classes = read_folder(args.path / "val", args.size, args.limit)
    if classes != test_classes:
        raise InputError(f"{args.path}: train has classes {classes}, val has {test_classes}")
    return train, test, len(classes)


def make(args: argparse.Namespace, train: Split, classes: int):
    """The backbone with a new linear layer at its end."""
    weights = "none" if args.mode == "infer" else args.weights  # a checkpoint brings its own
    network = models.build_backbone(args.backbone, weights, args.size, nn.Identity())
    with torch.no_grad():
        width = network.eval()(torch.zeros(1, 3, args.size, args.size)).shape[1]
    return nn.Sequential(network, nn.Linear(width, classes))


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this demo."""
    parser = common.new_parser(__doc__)
    parser.add_argument("path", type=Path, help="folder with train/ and val/")
    parser.add_argument("--backbone", default="vit_tiny", help="as of train.py")
    parser.add_argument("--weights", default="none", help="imagenet, none, or a file")
    parser.add_argument("--size", type=util.number(int, 1), default=64, help="pixels")
    parser.add_argument("--limit", type=util.number(int, 1), help="images of each part at most")
    return parser


def main(args: argparse.Namespace) -> dict[str, float]:
    """Train or infer."""
    return common.run("imagefolder", load, make, args)


if __name__ == "__main__":
    util.run_script(main, get_args_parser(), models.ModelError)
