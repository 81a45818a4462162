"""What the demos share: a gated network, its training by routed gradients, its scores."""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fsg
import models
import util
from util import InputError

VIT = {"num_layers": 4, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}


@dataclass
class Split:
    """Inputs (N, ...), uint8 images or token ids, and their classes (N,)."""

    x: torch.Tensor
    y: torch.Tensor

    def __post_init__(self):
        if len(self.x) != len(self.y) or not len(self.x):
            raise InputError(f"{len(self.x)} inputs and {len(self.y)} labels do not match")


def small_vit(image_size: int, patch_size: int, classes: int) -> VisionTransformer:
    """A vision transformer of four blocks for small images."""
    return VisionTransformer(image_size, patch_size, num_classes=classes, **VIT)


def network_input(x: torch.Tensor) -> torch.Tensor:
    """uint8 images (N, C, S, S) to three float channels about 0; token ids as they are."""
    if x.dtype != torch.uint8:
        return x
    return (x.float() / 255 - 0.5).expand(-1, 3, -1, -1) * 4


def make_routing(model: nn.Module, args: argparse.Namespace) -> fsg.GradientRouting:
    """AdamW for the weights, and one of its own, without weight decay, for the gates."""
    return fsg.GradientRouting(
        model,
        torch.optim.AdamW(fsg.weight_parameters(model), args.lr, weight_decay=0.05),
        torch.optim.AdamW(fsg.gate_parameters(model), args.gate_lr, weight_decay=0.0),
        args.routing,
    )


def fit(model: nn.Module, train: Split, args: argparse.Namespace) -> None:
    """Train on cross-entropy, learning rates falling along half a cosine."""
    routing, batch = make_routing(model, args), min(args.batch_size, len(train.x))
    steps = len(train.x) // batch
    model.train()
    for epoch in (bar := tqdm(range(args.epochs), unit="epoch")):
        total = 0.0
        for i, rows in enumerate(torch.randperm(len(train.x))[: steps * batch].split(batch)):
            routing.scale_lr(0.5 + 0.5 * math.cos(math.pi * (epoch + i / steps) / args.epochs))
            x = network_input(train.x[rows].to(args.device))
            y = train.y[rows].to(args.device)
            total += routing.step(lambda x=x, y=y: F.cross_entropy(model(x), y)).item()
        if not math.isfinite(total):
            raise InputError(f"epoch {epoch + 1}: the loss is {total}; pass a lower --lr")
        bar.set_postfix(loss=f"{total / steps:.3f}")


@torch.inference_mode()
def predict(model: nn.Module, x: torch.Tensor, device: str) -> np.ndarray:
    """Most probable class of every input (N,)."""
    model.eval()
    parts = [model(network_input(part.to(device))).argmax(1).cpu() for part in x.split(256)]
    return torch.cat(parts).numpy()


def report(model: nn.Module, test: Split, device: str) -> dict[str, float]:
    """Print and return the scores on the test set, the gates, and what folding them changes."""
    y, guess = test.y.numpy(), predict(model, test.x, device)
    scores = {
        "accuracy": accuracy_score(y, guess),
        "macro-F1": f1_score(y, guess, average="macro"),
        "accuracy of the commonest class": np.bincount(y).max() / len(y),
    }
    gates = torch.cat(list(fsg.gate_values(model, relative=True).values()))
    folded = predict(fsg.fold_gates(model), test.x, device)
    scores["same answers when folded"] = float((folded == guess).mean())
    print(f"{len(y)} test inputs: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    numbers = ", ".join(f"{key} {value:.3f}" for key, value in fsg.gate_statistics(gates).items())
    print(f"{len(gates)} gates, relative to their start: {numbers}")
    return scores


def run(name: str, load: Callable, make: Callable, args: argparse.Namespace) -> dict[str, float]:
    """Train or infer; load(args) -> (train, test, classes), make(args, train, classes) -> network.

    Raises InputError where the checkpoint does not fit.
    """
    torch.manual_seed(args.seed)
    train, test, classes = load(args)
    model = fsg.add_gates(make(args, train, classes), init=args.gate_init).to(args.device)
    path = args.checkpoint or Path("checkpoints") / f"fsg_{name}.pth"
    if args.mode == "train":
        fit(model, train, args)
        path.parent.mkdir(parents=True, exist_ok=True)
        with util.atomic(path) as temporary:
            torch.save({"demo": name, "state_dict": model.state_dict()}, temporary)
        print(f"wrote {path}")
    elif args.checkpoint is not None:
        content = models.read_torch_file(path)
        try:
            model.load_state_dict(content.get("state_dict", {}))
        except RuntimeError:
            raise InputError(f"{path} is not a checkpoint of this demo and network") from None
    else:
        print("no --checkpoint: a network with random weights")
    return report(model, test, args.device)


def new_parser(doc: str) -> argparse.ArgumentParser:
    """The command line that all demos have."""
    parser = util.new_parser(doc)
    count, positive = util.number(int, 1), util.number(float, 0)
    parser.add_argument("mode", choices=("train", "infer"), help="infer: only predict and score")
    parser.add_argument("--checkpoint", type=Path, help="to write or to read [train: checkpoints/; "
                        "infer: random weights]")  # fmt: skip
    parser.add_argument("--epochs", type=count, default=20, help="passes over the training set")
    parser.add_argument("--batch_size", type=count, default=64, help="inputs per step")
    parser.add_argument("--lr", type=positive, default=1e-3, help="of the weights")
    parser.add_argument("--gate_lr", type=positive, default=1e-2, help="of the gates")
    parser.add_argument("--gate_init", choices=("identity", "paper"), default="identity",
                        help="start of the gates")  # fmt: skip
    parser.add_argument("--routing", choices=("single", "sequential", "upstream"),
                        default="single", help="see fsg.py")  # fmt: skip
    parser.add_argument("--seed", type=util.number(int, 0), default=0, help="of the random numbers")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser
