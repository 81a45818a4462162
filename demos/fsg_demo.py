"""Feature-Selection Gates on data at hand: digits, CIFAR-10, a folder of images, token sequences.

    python demos/fsg_demo.py train --data digits
    python demos/fsg_demo.py infer --data digits --checkpoint checkpoints/fsg_digits.pth
    python demos/fsg_demo.py train --data mnist --path DIR --epochs 3
    python demos/fsg_demo.py train --data cifar --path cifar10.npz
    python demos/fsg_demo.py train --data folder --path imagenette2-160 --network vit_b_16 --weights imagenet --size 224
    python demos/fsg_demo.py train --data tokens --network bert

digits: scikit-learn's 8 x 8 digits. mnist: DIR/MNIST/raw/*-ubyte, as torchvision lays it out. cifar: a folder with
cifar-10-batches-py in it, or an npz of x_train, y_train, x_test, y_test with images uint8 (N, 32, 32, 3). folder:
train/CLASS/*.jpg and val/CLASS/*.jpg, such as Imagenette. tokens: random sequences of 16 tokens that hold the tokens 1
and 2 once each; the class says whether 1 stands before 2.

Networks: for images a small ViT, or any backbone of train.py; for tokens torch's TransformerEncoder, or BERT or GPT-2
built from a configuration if transformers is installed.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import CIFAR10, MNIST, ImageFolder
from torchvision.models import VisionTransformer
from torchvision.transforms import v2
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fsg
import models
import util
from plumbing.backbones import make_backbone, read_torch_file
from plumbing.distributed import pick_device
from util import InputError

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
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


def read_mnist(args: argparse.Namespace) -> tuple[Split, Split]:
    """The real MNIST."""
    parts = [MNIST(args.path, train=train) for train in (True, False)]
    return tuple(Split(part.data.unsqueeze(1), part.targets.long()) for part in parts)


def read_cifar(args: argparse.Namespace) -> tuple[Split, Split]:
    """CIFAR-10 from its python batches, whose hashes torchvision checks before it opens them, or an npz."""
    if args.path.suffix == ".npz":
        with np.load(args.path, allow_pickle=False) as file:
            x, y, x_test, y_test = (file[key] for key in NPZ_KEYS)
    else:
        parts = [CIFAR10(args.path, train=train) for train in (True, False)]
        (x, y), (x_test, y_test) = ((part.data, np.array(part.targets)) for part in parts)
    for image in (x, x_test):
        if image.dtype != np.uint8 or image.shape[1:] != (*x.shape[1:3], 3):
            raise ValueError(f"images are {image.dtype} {image.shape}, not uint8 (N, S, S, 3)")
    pairs = (x, y), (x_test, y_test)
    return tuple(Split(torch.from_numpy(a).permute(0, 3, 1, 2), torch.from_numpy(b).long()) for a, b in pairs)


def read_folder(args: argparse.Namespace) -> tuple[Split, Split]:
    """Images by class, at --size pixels."""
    shrink = v2.Compose([v2.PILToTensor(), v2.Resize(args.size), v2.CenterCrop(args.size)])
    splits, classes = [], []
    for part in ("train", "val"):
        data = ImageFolder(str(args.path / part), transform=shrink)
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: args.limit].tolist()
        pairs = []
        for row in tqdm(rows, desc=part, unit="image"):
            try:
                pairs.append(data[row])
            except OSError as error:
                raise InputError(f"{data.samples[row][0]} cannot be read ({error}); remove it") from None
        splits.append(Split(torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])))
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


DATA = {"digits": read_digits, "mnist": read_mnist, "cifar": read_cifar, "folder": read_folder, "tokens": draw_tokens}
NEED_PATH = ("mnist", "cifar", "folder")


def load(args: argparse.Namespace) -> tuple[Split, Split]:
    """Training set and test set; raises InputError if they cannot be read."""
    if (args.path is None) == (args.data in NEED_PATH):
        raise InputError(f"--path is for --data {', '.join(NEED_PATH)}; pass both or neither")
    try:
        splits = DATA[args.data](args)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, AssertionError) as error:  # readers raise many types
        raise InputError(f"--data {args.data} --path {args.path}: {error}") from None
    for split in splits:
        if len(split.x) != len(split.y) or not len(split.x):
            raise InputError(f"{args.path}: {len(split.x)} inputs and {len(split.y)} labels do not match")
    return splits


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
    side = train.x.shape[-1]
    if args.network is None:
        patch = side // (8 if side >= 32 else 4)
        return VisionTransformer(
            side, patch, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=classes
        )
    weights = "none" if args.mode == "infer" else args.weights  # a checkpoint brings its own
    network, head = make_backbone(args.network, weights, side)
    network.set_submodule(head, nn.Linear(network.get_submodule(head).in_features, classes))
    return network


def network_input(x: torch.Tensor) -> torch.Tensor:
    """uint8 images (N, C, S, S) to three float channels about 0; token ids as they are."""
    return (x.float() / 255 - 0.5).expand(-1, 3, -1, -1) * 4 if x.dtype == torch.uint8 else x


# ---------------------------------------------------------------- train and score
def fit(model: nn.Module, train: Split, args: argparse.Namespace, device: torch.device) -> None:
    """Train on cross-entropy: AdamW for the weights, one of its own without weight decay for the gates, learning rates
    falling along half a cosine."""
    optimizer = torch.optim.AdamW(fsg.weight_parameters(model), args.lr, weight_decay=0.05)
    gate_optimizer = torch.optim.AdamW(fsg.gate_parameters(model), args.gate_lr, weight_decay=0.0)
    routing = fsg.GradientRouting(model, optimizer, gate_optimizer, args.routing)
    batch = min(args.batch_size, len(train.x))
    steps = len(train.x) // batch
    model.train()
    for epoch in (bar := tqdm(range(args.epochs), unit="epoch")):
        total = 0.0
        for i, rows in enumerate(torch.randperm(len(train.x))[: steps * batch].split(batch)):
            routing.scale_lr(0.5 + 0.5 * math.cos(math.pi * (epoch + i / steps) / args.epochs))
            x, y = network_input(train.x[rows].to(device)), train.y[rows].to(device)
            total += routing.step(lambda x=x, y=y: F.cross_entropy(model(x), y)).item()
        if not math.isfinite(total):
            raise InputError(f"epoch {epoch + 1}: the loss is {total}; pass a lower --lr")
        bar.set_postfix(loss=f"{total / steps:.3f}")


@torch.inference_mode()
def predict(model: nn.Module, x: torch.Tensor, device: torch.device) -> np.ndarray:
    """Most probable class of every input (N,)."""
    model.eval()
    return torch.cat([model(network_input(part.to(device))).argmax(1).cpu() for part in x.split(256)]).numpy()


def report(model: nn.Module, test: Split, device: torch.device) -> dict[str, float]:
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
    print(f"{len(y)} test inputs: " + ", ".join(f"{key} {value:.3f}" for key, value in scores.items()))
    numbers = ", ".join(f"{key} {value:.3f}" for key, value in fsg.gate_statistics(gates).items())
    print(f"{len(gates)} gates, relative to their start: {numbers}")
    return scores


def main(args: argparse.Namespace) -> dict[str, float]:
    """Train or infer; returns the scores."""
    torch.manual_seed(args.seed)
    device, (train, test) = pick_device(args.device), load(args)
    try:
        model = fsg.add_gates(make_network(args, train, int(train.y.max()) + 1), init=args.gate_init).to(device)
    except ValueError as error:  # gates do not fit
        raise InputError(f"--network {args.network}: {error}") from None
    path = args.checkpoint or Path("checkpoints") / ("_".join(filter(None, ("fsg", args.data, args.network))) + ".pth")
    if args.mode == "train":
        fit(model, train, args, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        models.save_plain(path, state_dict=model.state_dict())
        print(f"wrote {path}")
    elif args.checkpoint is not None:
        try:
            model.load_state_dict(read_torch_file(path).get("state_dict", {}))
        except RuntimeError:
            raise InputError(f"{path} is not a checkpoint of this --data and --network") from None
    else:
        print("no --checkpoint: a network with random weights")
    return report(model, test, device)


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this demo."""
    parser = util.new_parser(__doc__)
    add = parser.add_argument
    add("mode", choices=("train", "infer"), help="infer: only predict and score")
    add("--data", choices=tuple(DATA), default="digits", help="what to classify")
    add("--path", type=Path, help="where mnist, cifar and folder are")
    add("--network", help="a backbone as in train.py [a small ViT]; for tokens encoder, bert or gpt2 [encoder]")
    add("--weights", default="none", help="of a backbone: none or imagenet")
    add("--size", type=util.COUNT, default=64, help="pixels of images from a folder")
    add("--limit", type=util.COUNT, help="images of each part of a folder at most")
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
