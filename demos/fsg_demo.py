"""Feature-Selection Gates on data at hand: digits, CIFAR-10, a folder of images, token sequences.

    python demos/fsg_demo.py train --data digits
    python demos/fsg_demo.py infer --data digits --checkpoint checkpoints/fsg_digits.pth
    python demos/fsg_demo.py train --data mnist --path DIR --epochs 3
    python demos/fsg_demo.py infer --data mnist --path DIR --checkpoint checkpoints/fsg_mnist.pth
    python demos/fsg_demo.py train --data cifar --path cifar-10-python.tar.gz
    python demos/fsg_demo.py train --data folder --path imagenette2-160 --network vit_b_16 --weights imagenet --size 224
    python demos/fsg_demo.py infer --data folder --path imagenette2-160 --network vit_b_16 --size 224
    python demos/fsg_demo.py train --data tokens --network bert

digits: scikit-learn's 8 x 8 digits. mnist: a folder with the four original files, gzipped or not. cifar: CIFAR-10 or
CIFAR-100, see cifar.py, or an npz of x_train, y_train, x_test, y_test with images uint8 (N, 32, 32, 3). folder:
train/CLASS/*.jpg and val/CLASS/*.jpg, such as Imagenette. tokens: random sequences of 16 tokens that hold the tokens 1
and 2 once each; the class says whether 1 stands before 2. All are trained on their training set and scored on their
test set; infer without --checkpoint scores random weights.

Networks: for images a small ViT, or any backbone of train.py; for tokens torch's TransformerEncoder, or BERT or GPT-2
built from a configuration if transformers is installed.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.models import VisionTransformer
from torchvision.transforms import v2
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from archives import read_cifar, read_mnist

import fsg
import models
import util
from plumbing.backbones import load_backbone, make_backbone, read_torch_file
from plumbing.distributed import pick_device
from plumbing.images import read_image
from util import InputError

MAX_CLASSES = 10_000
LENGTH, VOCABULARY, WIDTH = 16, 32, 64  # of token sequences, and of the networks that read them


# ---------------------------------------------------------------- data
class Split(NamedTuple):
    """Inputs (N, ...), uint8 images (N, C, S, S) or token ids (N, L), and their classes (N,)."""

    x: torch.Tensor
    y: torch.Tensor


def read_digits(args: argparse.Namespace) -> tuple[Split, Split]:
    """Two thirds of scikit-learn's digits to train on, one to test on."""
    digits = load_digits()
    image = torch.from_numpy(digits.images * 15.9375).byte().unsqueeze(1)  # 0..16 to 0..255
    rows = train_test_split(range(len(image)), test_size=1 / 3, random_state=0, stratify=digits.target)
    target = torch.from_numpy(digits.target).long()
    return tuple(Split(image[part], target[part]) for part in rows)


def some_rows(n: int, limit: int | None) -> torch.Tensor:
    """Up to `limit` of n rows, the same ones in every run."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:limit] if limit else torch.arange(n)


def read_folder(args: argparse.Namespace) -> tuple[Split, Split]:
    """Images by class, at --size pixels."""
    size = args.size or 64
    shrink = v2.Compose([v2.PILToTensor(), v2.Resize(size), v2.CenterCrop(size)])
    splits, classes = [], []
    for part in ("train", "val"):
        data = ImageFolder(str(args.path / part), shrink, loader=lambda path: read_image(Path(path))[0])
        rows = some_rows(len(data), args.limit).tolist()
        image, label = zip(*(data[row] for row in tqdm(rows, desc=part, unit="image")), strict=True)
        splits.append(Split(torch.stack(image), torch.tensor(label)))
        classes.append(data.classes)
    if classes[0] != classes[1]:
        raise ValueError(f"train has classes {classes[0]}, val has {classes[1]}")
    return tuple(splits)


def draw_tokens(args: argparse.Namespace) -> tuple[Split, Split]:
    """Random sequences with a 1 and a 2."""
    generator, splits = torch.Generator().manual_seed(args.seed), []
    for n in (4000, 1000):
        x = torch.randint(3, VOCABULARY, (n, LENGTH), generator=generator)
        places = torch.rand(n, LENGTH, generator=generator).argsort(1)[:, :2]  # two different ones
        x.scatter_(1, places, torch.tensor([[1, 2]]).expand(n, 2))
        splits.append(Split(x, (places[:, 0] < places[:, 1]).long()))
    return tuple(splits)


def from_files(read: Callable) -> Callable:
    """A reader of archives.py as one that takes the command line."""
    return lambda args: tuple(Split(torch.tensor(x), torch.tensor(y).long()) for x, y in read(args.path))


DATA = {"digits": read_digits, "mnist": from_files(read_mnist), "cifar": from_files(read_cifar), "folder": read_folder,
        "tokens": draw_tokens}  # fmt: skip
NEED_PATH = ("mnist", "cifar", "folder")


def load(args: argparse.Namespace) -> tuple[Split, Split]:
    """Training set and test set; raises InputError if they cannot be read."""
    if (args.path is None) == (args.data in NEED_PATH):
        raise InputError(f"--path is for --data {', '.join(NEED_PATH)}; pass both or neither")
    try:
        splits = DATA[args.data](args)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:  # readers raise many types
        raise InputError(f"--data {args.data} --path {args.path}: {error}; pass another --path") from None
    for x, y in splits:
        if len(x) != len(y) or not len(x):
            raise InputError(f"{args.path}: {len(x)} inputs and {len(y)} labels do not match; pass another --path")
        if not 0 <= y.min() <= y.max() < MAX_CLASSES:
            raise InputError(f"{args.path}: labels from {y.min()} to {y.max()}; number the classes from 0 on")
    rows = [some_rows(len(x), args.limit) for x, _ in splits]
    return tuple(Split(x[part], y[part]) for (x, y), part in zip(splits, rows, strict=True)) if args.limit else splits


# ---------------------------------------------------------------- networks
class Classifier(nn.Module):
    """Token and place embeddings, a torch encoder, and a linear layer on the mean token."""

    def __init__(self, classes: int):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """ids (N, L) -> logits (N, classes)."""
        return self.head(self.encoder(self.embed(x) + self.place).mean(1))


class HuggingFace(nn.Module):
    """A small BERT or GPT-2 and a linear layer on its mean token."""

    def __init__(self, name: str, classes: int):
        super().__init__()
        try:
            import transformers
        except ImportError:
            raise InputError(f"--network {name} needs transformers; pip install it") from None
        if name == "bert":
            config = transformers.BertConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=2 * WIDTH, hidden_dropout_prob=0.0,
            )  # fmt: skip
            self.body = transformers.BertModel(config, add_pooling_layer=False)
        else:
            config = transformers.GPT2Config(
                vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, resid_pdrop=0.0, bos_token_id=0,
                eos_token_id=0,
            )  # fmt: skip
            self.body = transformers.GPT2Model(config)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """ids (N, L) -> logits (N, classes)."""
        return self.head(self.body(x).last_hidden_state.mean(1))


def make_network(args: argparse.Namespace, train: Split, classes: int) -> nn.Module:
    """The network asked for, without gates."""
    if args.data == "tokens":
        kinds: dict[str | None, Callable] = {None: Classifier, "encoder": Classifier}
        kinds |= {name: lambda classes, name=name: HuggingFace(name, classes) for name in ("bert", "gpt2")}
        if args.network not in kinds:
            raise InputError(f"--network {args.network} reads images; for tokens pass encoder, bert or gpt2")
        return kinds[args.network](classes)
    side = args.size or train.x.shape[-1]
    if args.network is not None:
        return make_backbone_for(args, side, classes)
    patch = side // (8 if side >= 32 else 4)
    if not patch or side % patch:
        raise InputError(f"images of {side} px do not divide into patches of {patch}; pass another --size, such as 64")
    network = VisionTransformer(side, patch, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128)
    network.set_submodule("heads.head", nn.Linear(64, classes))  # torchvision's own starts at 0
    return network


def make_backbone_for(args: argparse.Namespace, side: int, classes: int) -> nn.Module:
    """The backbone --network with its --weights and a new head."""
    weights = "none" if args.mode == "infer" else args.weights  # a checkpoint brings its own
    network, head = make_backbone(args.network, weights, side)
    if weights not in ("none", "imagenet"):
        load_backbone(network, head, models.backbone_state(Path(weights)), Path(weights))
    network.set_submodule(head, nn.Linear(network.get_submodule(head).in_features, classes))
    return network


def network_input(x: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """uint8 images (N, C, S, S) to three float channels about 0, at `size` pixels; token ids as they are."""
    if x.dtype != torch.uint8:
        return x
    x = v2.functional.resize(x, [size, size]) if size else x
    return (x.float() / 255 - 0.5).expand(-1, 3, -1, -1) * 4


# ---------------------------------------------------------------- train and score
def half_cosine(done: float) -> float:
    """From 1 to 0 while `done`, the share of the training that is over, goes from 0 to 1."""
    return 0.5 + 0.5 * math.cos(math.pi * done)


def fit(
    routing: fsg.GradientRouting, train: Split, args: argparse.Namespace, device: torch.device, prepare: Callable,
    set_lr: Callable, draw: Callable = lambda y: torch.randperm(len(y)),
) -> None:  # fmt: skip
    """Train on cross-entropy. prepare: inputs of a batch -> what the network takes; set_lr: called before each step
    with the share of the training that is over; draw: labels -> rows of an epoch, in order."""
    model = routing.model.train()
    for epoch in (bar := tqdm(range(args.epochs), unit="epoch")):
        rows, total = draw(train.y), 0.0
        batch = min(args.batch_size, len(rows))
        steps = len(rows) // batch
        for i, part in enumerate(rows[: steps * batch].split(batch)):
            set_lr((epoch + i / steps) / args.epochs)
            x, y = prepare(train.x[part].to(device)), train.y[part].to(device)
            total += routing.step(lambda x=x, y=y: F.cross_entropy(model(x), y)).item()
        if not math.isfinite(total):
            raise InputError(f"epoch {epoch + 1}: the loss is {total}; pass a lower --lr or another --seed")
        bar.set_postfix(loss=f"{total / steps:.3f}")


@torch.inference_mode()
def predict(model: nn.Module, x: torch.Tensor, device: torch.device, prepare: Callable) -> np.ndarray:
    """Most probable class of every input (N,)."""
    model.eval()
    return torch.cat([model(prepare(part.to(device))).argmax(1).cpu() for part in x.split(256)]).numpy()


def report(model: nn.Module, test: Split, device: torch.device, prepare: Callable) -> dict[str, float]:
    """Print and return the scores on the test set, the gates if there are any, and what folding them changes."""
    y, guess = test.y.numpy(), predict(model, test.x, device, prepare)
    scores = {
        "accuracy": accuracy_score(y, guess),
        "macro-F1": f1_score(y, guess, average="macro"),
        "accuracy of the commonest class": np.bincount(y).max() / len(y),
    }
    if gates := list(fsg.gate_values(model, relative=True).values()):
        numbers = ", ".join(f"{key} {value:.3f}" for key, value in fsg.gate_statistics(torch.cat(gates)).items())
        print(f"{sum(map(len, gates))} gates, relative to their start: {numbers}")
        folded = predict(fsg.fold_gates(model), test.x, device, prepare)
        scores["same answers when folded"] = float((folded == guess).mean())
    print(f"{len(y)} test inputs: " + ", ".join(f"{key} {value:.3f}" for key, value in scores.items()))
    return scores


def learn_or_load(model: nn.Module, args: argparse.Namespace, name: str, learn: Callable) -> None:
    """train: call learn() and save the weights; infer: load those of --checkpoint, or say that there are none."""
    path = args.checkpoint or Path("checkpoints") / f"{name}.pth".replace(":", "_")
    kinds = sorted({module.fsg_kind for module in fsg.gated_modules(model).values()})  # what a logit means
    if args.mode == "train":
        learn()
        path.parent.mkdir(parents=True, exist_ok=True)
        models.save_plain(path, state_dict=model.state_dict(), gates=kinds)
        print(f"wrote {path}")
    elif args.checkpoint is not None:
        content = read_torch_file(path)
        try:
            model.load_state_dict(content.get("state_dict", {}))
            fits = content.get("gates", kinds) == kinds
        except (RuntimeError, TypeError):
            fits = False
        if not fits:
            raise InputError(f"{path} is no checkpoint of this data and network; pass the flags it was trained with")
    else:
        print("no --checkpoint: a network with random weights")


def main(args: argparse.Namespace) -> dict[str, float]:
    """Train or infer; returns the scores."""
    torch.manual_seed(args.seed)
    device, (train, test) = pick_device(args.device), load(args)
    try:
        model = fsg.add_gates(make_network(args, train, int(train.y.max()) + 1), init=args.gate_init).to(device)
    except InputError:
        raise
    except ValueError as error:  # gates do not fit
        raise InputError(f"--network {args.network}: {error}") from None
    prepare = partial(network_input, size=args.size)

    def learn() -> None:
        """AdamW for the weights, one of its own without weight decay for the gates; learning rates fall to 0."""
        optimizer = torch.optim.AdamW(fsg.weight_parameters(model), args.lr, weight_decay=0.05)
        gate_optimizer = torch.optim.AdamW(fsg.gate_parameters(model), args.gate_lr, weight_decay=0.0)
        routing = fsg.GradientRouting(model, optimizer, gate_optimizer, args.routing)
        fit(routing, train, args, device, prepare, lambda done: routing.scale_lr(half_cosine(done)))

    learn_or_load(model, args, "_".join(filter(None, ("fsg", args.data, args.network))), learn)
    return report(model, test, device, prepare)


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this demo."""
    parser = util.new_parser(__doc__)
    add = parser.add_argument
    add("mode", choices=("train", "infer"), help="infer: only predict and score")
    add("--data", choices=tuple(DATA), default="digits", help="what to classify")
    add("--path", type=Path, help="where mnist, cifar and folder are")
    add("--network", help="a backbone as in train.py [a small ViT]; for tokens encoder, bert or gpt2 [encoder]")
    add("--weights", default="none", help="of a backbone: none, imagenet or a file")
    add("--size", type=util.COUNT, help="pixels of images [as they are; from a folder 64]")
    add("--limit", type=util.COUNT, help="inputs to train on, and to test on, at most")
    add("--checkpoint", type=Path, help="to write or to read [train: checkpoints/; infer: random weights]")
    add("--epochs", type=util.COUNT, default=20, help="passes over the training set")
    add("--batch_size", type=util.COUNT, default=64, help="inputs per step")
    add("--lr", type=util.POSITIVE, default=1e-3, help="of the weights")
    add("--gate_lr", type=util.POSITIVE, default=1e-2, help="of the gates")
    add("--gate_init", choices=("identity", "paper"), default="identity", help="start of the gates")
    add("--routing", choices=("single", "sequential", "upstream"), default="single", help="see fsg.py")
    add("--seed", type=util.number(int, 0), default=0, help="of the random numbers")
    add("--device", default="cpu", help="cpu or cuda")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
