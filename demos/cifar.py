"""Gated ViT on CIFAR-10: the python batches or an npz.

    python demos/cifar.py train DIR
    python demos/cifar.py infer cifar10.npz --checkpoint checkpoints/fsg_cifar.pth

DIR holds cifar-10-batches-py (torchvision checks its files against known hashes before it opens
them); an npz holds x_train, y_train, x_test, y_test with images uint8 (N, 32, 32, 3).
"""

import argparse
from pathlib import Path

import common
import numpy as np
import torch
from common import InputError, Split, small_vit, util
from torchvision.datasets import CIFAR10

KEYS = ("x_train", "y_train", "x_test", "y_test")


def load(args: argparse.Namespace) -> tuple[Split, Split, int]:
    """Training set, test set, number of classes."""
    if args.path.suffix == ".npz":
        try:
            with np.load(args.path, allow_pickle=False) as file:
                x, y, x_test, y_test = (file[key] for key in KEYS)
        except (KeyError, ValueError, EOFError) as error:
            raise InputError(f"{args.path}: {error}; it needs {', '.join(KEYS)}") from None
    else:
        try:
            parts = [CIFAR10(args.path, train=train) for train in (True, False)]
        except RuntimeError as error:
            raise InputError(f"{args.path}: {str(error).splitlines()[0]}") from None
        (x, y), (x_test, y_test) = ((part.data, np.array(part.targets)) for part in parts)
    splits = []
    for image, target in ((x, y), (x_test, y_test)):
        if image.dtype != np.uint8 or image.ndim != 4 or image.shape[1:] != x.shape[1:]:
            raise InputError(f"{args.path}: images are {image.dtype} {image.shape}, not uint8 NHWC")
        tensor = torch.from_numpy(image).permute(0, 3, 1, 2)
        splits.append(Split(tensor, torch.from_numpy(target).long()))
    return *splits, int(y.max()) + 1


def make(args: argparse.Namespace, train: Split, classes: int):
    """64 patches."""
    side = train.x.shape[-1]
    return small_vit(side, side // 8, classes)


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this demo."""
    parser = common.new_parser(__doc__)
    parser.add_argument("path", type=Path, help="folder of cifar-10-batches-py, or an npz")
    return parser


def main(args: argparse.Namespace) -> dict[str, float]:
    """Train or infer."""
    return common.run("cifar", load, make, args)


if __name__ == "__main__":
    util.run_script(main, get_args_parser(), common.models.ModelError)
