"""CIFAR-100 or CIFAR-10 with a ViT-Tiny, with and without Feature-Selection Gates: as published, or like for like.

    python demos/cifar.py train --path cifar-100-python.tar.gz --gates
    python demos/cifar.py train --path cifar-100-python.tar.gz
    python demos/cifar.py train --path cifar-100-python.tar.gz --gates --recipe published
    python demos/cifar.py train --path cifar-100-python --gates --network timm:vit_tiny_patch16_384 --weights FILE
    python demos/cifar.py train --path cifar-10-binary.tar.gz --gates --size 32 --patch 4 --limit 5000 --epochs 5
    python demos/cifar.py infer --path cifar-100-python.tar.gz --gates --checkpoint checkpoints/cifar_matched_gates.pth
    python demos/cifar.py infer --path cifar-100-python.tar.gz --gates

--path is the official python or binary version of CIFAR-100 or CIFAR-10, as archive or as the folder in it, or an npz
as in fsg_demo.py. No pickle in it is run (archives.py).

--recipe published: the released configurations. Those with and without gates differ in learning rate schedule, weight
decay, clipping and jitter too, so their difference says nothing about gates. Gates start at about one half and step
first, in a pass of their own. The original weights are timm's, see the fourth command; by default they are random.
--recipe matched: both networks take the settings of the published one with gates. The gates start at the identity and
step in the same pass, so with one --seed both networks start as the same function and see the same images in the same
order. --gate_init paper --routing upstream gives the published gates.

The last epoch is scored on the official test set, once. No epoch is chosen; the original chose on a validation set that
was its test set.

References:
    Roffo, Biffi, Salvagnini, Cherubini. Feature Selection Gates with Gradient Routing for Endoscopic Image Computing.
    MICCAI 2024: the configurations.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fsg_demo import fit, half_cosine, learn_or_load, load, make_backbone_for, report

import fsg
import util
from plumbing.distributed import pick_device
from util import InputError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR, as published


class Recipe(NamedTuple):
    """Settings of one network; Adam's learning rate falls along half a cosine, and jitter is of brightness, contrast
    and saturation."""

    lr: float
    min_lr: float
    weight_decay: float
    clip: float  # largest norm of the weights' gradient
    jitter: float
    hue: float


PLAIN = Recipe(lr=1e-4, min_lr=1e-4, weight_decay=1e-5, clip=8.0, jitter=0.05, hue=0.005)
GATED = Recipe(lr=1e-4, min_lr=1e-7, weight_decay=1e-10, clip=10.0, jitter=0.1, hue=0.008)
RECIPES = {"published": (PLAIN, GATED), "matched": (GATED, GATED)}  # without gates, with gates
GATES = {"published": ("paper", "upstream"), "matched": ("identity", "single")}  # their start and their passes
GATE_LR, GATE_CLIP = 1e-2, 128.0  # of the gates; their learning rate stays


# ---------------------------------------------------------------- data
def draw_rows(y: torch.Tensor, per_class: int) -> torch.Tensor:
    """Rows of an epoch: up to `per_class` of each class, drawn anew, in random order."""
    rows = torch.randperm(len(y))
    rows = torch.cat([rows[y[rows] == label][:per_class] for label in y.unique()])
    return rows[torch.randperm(len(rows))]


def make_augmentation(recipe: Recipe) -> nn.Module:
    """The published augmentation of one image, float in 0..1."""
    return v2.Compose([
        v2.RandomRotation(30), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(),
        v2.ColorJitter(recipe.jitter, recipe.jitter, recipe.jitter, recipe.hue), v2.GaussianNoise(sigma=0.002),
    ])  # fmt: skip


def network_input(x: torch.Tensor, size: int, augment: nn.Module | None = None) -> torch.Tensor:
    """uint8 images (N, 3, S, S) to normalised ones (N, 3, size, size), each augmented by itself."""
    x = v2.functional.resize(x, [size, size]).float() / 255
    x = torch.stack([augment(image) for image in x]) if augment else x
    return v2.functional.normalize(x, MEAN, STD)


# ---------------------------------------------------------------- networks
def make_network(args: argparse.Namespace, classes: int) -> nn.Module:
    """ViT-Tiny with random weights, or --network; with gates if they are asked for."""
    if args.network is not None:
        network = make_backbone_for(args, args.size, classes)
    elif args.size % args.patch:
        raise InputError(f"--size {args.size} is no multiple of --patch {args.patch}; pass one that is")
    else:
        network = VisionTransformer(args.size, args.patch, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
        network.set_submodule("heads.head", nn.Linear(192, classes))  # torchvision's own starts at 0
    try:
        return fsg.add_gates(network, init=args.gate_init or GATES[args.recipe][0]) if args.gates else network
    except ValueError as error:
        raise InputError(f"--network {args.network}: {error}; pass another, or no --gates") from None


def make_routing(model: nn.Module, args: argparse.Namespace) -> tuple[fsg.GradientRouting, Recipe]:
    """Optimizers as the recipe says, and the recipe."""
    recipe = RECIPES[args.recipe][args.gates]
    weights, gates = fsg.weight_parameters(model), fsg.gate_parameters(model)
    optimizer = torch.optim.Adam(weights, recipe.lr, weight_decay=recipe.weight_decay)
    if not args.gates:
        return fsg.GradientRouting(model, optimizer, mode="off", clip=recipe.clip), recipe
    mode = args.routing or GATES[args.recipe][1]
    gate_optimizer = torch.optim.Adam(gates, GATE_LR)
    return fsg.GradientRouting(model, optimizer, gate_optimizer, mode, clip=recipe.clip, gate_clip=GATE_CLIP), recipe


def main(args: argparse.Namespace) -> dict[str, float]:
    """Train or infer; returns the scores."""
    device, (train, test) = pick_device(args.device), load(args)
    torch.manual_seed(args.seed)
    model = make_network(args, int(train.y.max()) + 1).to(device)
    torch.manual_seed(args.seed)  # gates may draw their start: images come in the same order without them

    def learn() -> None:
        routing, recipe = make_routing(model, args)

        def set_lr(done: float) -> None:
            for group in routing.optimizer.param_groups:
                group["lr"] = recipe.min_lr + (recipe.lr - recipe.min_lr) * half_cosine(done)

        prepare = partial(network_input, size=args.size, augment=make_augmentation(recipe))
        fit(routing, train, args, device, prepare, set_lr, partial(draw_rows, per_class=args.per_class))

    learn_or_load(model, args, f"cifar_{args.recipe}_{'gates' if args.gates else 'plain'}", learn)
    return report(model, test, device, partial(network_input, size=args.size))


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this demo."""
    parser = util.new_parser(__doc__, "device")
    parser.set_defaults(data="cifar")
    add = parser.add_argument
    add("mode", choices=("train", "infer"), help="infer: only predict and score")
    add("--path", type=Path, required=True, help="archive or folder")
    add("--gates", action="store_true", help="with gates")
    add("--recipe", choices=tuple(RECIPES), default="matched", help="settings, see above")
    add("--gate_init", choices=("identity", "paper"), help="start of the gates [as the recipe says]")
    add("--routing", choices=("single", "sequential", "upstream"), help="see fsg.py [as the recipe says]")
    add("--network", help="a backbone as in train.py [ViT-Tiny: 12 blocks, 3 heads, width 192]")
    add("--weights", default="none", help="of a backbone: none, imagenet or a file")
    add("--size", type=util.COUNT, default=384, help="pixels that images are brought to")
    add("--patch", type=util.COUNT, default=16, help="pixels of a patch of ViT-Tiny")
    add("--limit", type=util.COUNT, help="images to train on, and to test on, at most")
    add("--per_class", type=util.COUNT, default=256, help="images of each class drawn in each epoch")
    add("--checkpoint", type=Path, help="to write or to read [train: checkpoints/; infer: random weights]")
    add("--epochs", type=util.COUNT, default=200, help="training length")
    add("--batch_size", type=util.COUNT, default=64, help="images per step")
    add("--seed", type=util.number(int, 0), default=0, help="of the random numbers")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
