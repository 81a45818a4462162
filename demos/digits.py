"""Gated ViT on handwritten digits: scikit-learn's 8 x 8 digits, or MNIST with --mnist.

    python demos/digits.py train
    python demos/digits.py infer --checkpoint checkpoints/fsg_digits.pth
    python demos/digits.py train --mnist DIR --epochs 3

DIR holds MNIST/raw/*-ubyte, as torchvision.datasets.MNIST lays it out.
"""

import argparse
from pathlib import Path

import common
import torch
from common import InputError, Split, small_vit, util
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import MNIST


def load(args: argparse.Namespace) -> tuple[Split, Split, int]:
    """Training set, test set, number of classes."""
    if args.mnist is not None:
        try:
            parts = [MNIST(args.mnist, train=train) for train in (True, False)]
        except (RuntimeError, ValueError, AssertionError) as error:
            raise InputError(f"--mnist {args.mnist}: {str(error).splitlines()[0]}") from None
        return *(Split(part.data.unsqueeze(1), part.targets.long()) for part in parts), 10
    digits = load_digits()
    image = torch.from_numpy(digits.images * 15.9375).byte().unsqueeze(1)  # 0..16 to 0..255
    rows = train_test_split(
        range(len(image)), test_size=1 / 3, random_state=0, stratify=digits.target
    )
    target = torch.from_numpy(digits.target).long()
    return *(Split(image[part], target[part]) for part in rows), 10


def make(args: argparse.Namespace, train: Split, classes: int):
    """16 patches of 2 x 2 pixels; of 7 x 7 for MNIST's 28."""
    side = train.x.shape[-1]
    return small_vit(side, side // 4, classes)


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this demo."""
    parser = common.new_parser(__doc__)
    parser.add_argument("--mnist", type=Path, help="folder of the real MNIST files")
    return parser


def main(args: argparse.Namespace) -> dict[str, float]:
    """Train or infer."""
    return common.run("mnist" if args.mnist else "digits", load, make, args)


if __name__ == "__main__":
    util.run_script(main, get_args_parser(), common.models.ModelError)
