"""What gates and gradient routing are worth: every arm under one recipe, paired over seeds.

    python benchmarks/fsg_ablation.py digits
    python benchmarks/fsg_ablation.py cifar10.npz --backbone regnet_tiny --lr 3e-3
    python benchmarks/fsg_ablation.py data --size 96 --backbone timm:tf_efficientnet_lite0 --weights lite0.pth

The data: scikit-learn's digits, an npz with x_train, y_train, x_test, y_test, or a directory of preprocess.py (fold
seed % n_folds is the test set). Finished trainings are kept in --output, one line of json each, and are not repeated;
the table is printed from that file at the end.

Differences to the baseline are paired over seeds. Seeds share images to train and to test on, so a plain t interval
would be too narrow: intervals and p-values take the variance s^2 (1 / n + test / train) of Nadeau and Bengio for n
seeds, where train counts all images to train on, also those that --share leaves out. Holm's correction is for the
number of arms.

Arms, all with the same networks, batches, steps, and learning rate of the weights:
    baseline     no gates
    layerscale   a plain factor per channel, starting at 1, in the gates' place
    joint        gates in the optimizer of the weights, at their learning rate
    single       gates with an optimizer and --gate_lr of their own, one backward pass
    sequential   gates first, then weights, two passes
    held_out     the same, a fifth of the training groups kept for the gates' pass
    paper        single, gates that start at one half
    upstream     as published: that start, two passes, gradients that add up
    l1           single, plus a --penalty times the mean gate
    layerscale_l1   layerscale with the gates' learning rate and that penalty
    hard         single, with hard-concrete gates and the penalty on the share that is open
The last three are trained once for every --penalty.

References:
    Touvron et al., Going Deeper with Image Transformers, ICCV 2021: LayerScale.
    Nadeau, Bengio, Inference for the Generalization Error, Machine Learning 2003.
    Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fsg
import models
import util
from losses import lr_factor
from plumbing.arrays import open_array
from plumbing.data import groups_of, read_data
from util import FOLD, TARGET, InputError

ARMS = ("baseline", "layerscale", "joint", "single", "sequential", "held_out", "paper",
        "upstream", "l1", "layerscale_l1", "hard")  # fmt: skip
SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)  # of the channels closed for the prune curve
SPARSE = ("l1", "layerscale_l1", "hard")
GATE_SHARE = 0.2  # of the training groups, for the gates alone in held_out


# ---------------------------------------------------------------- data
def load_data(name: str, seed: int) -> dict[str, np.ndarray]:
    """Images uint8 (N, S, S, 3), labels and training groups of one seed."""
    if name == "digits":
        digits = load_digits()
        image = np.repeat((digits.images * 15.9375).astype(np.uint8)[..., None], 3, axis=3)
        x, x_test, y, y_test = train_test_split(
            image, digits.target, test_size=1 / 3, random_state=seed, stratify=digits.target
        )
        return {"x": x, "y": y, "x_test": x_test, "y_test": y_test, "group": np.arange(len(y))}
    if name.endswith(".npz"):
        with np.load(name, allow_pickle=False) as file:
            x, y, x_test, y_test = (file[k] for k in ("x_train", "y_train", "x_test", "y_test"))
        return {"x": x, "y": y, "x_test": x_test, "y_test": y_test, "group": np.arange(len(y))}
    data = read_data(Path(name))
    images = open_array(data.array_path("train"), len(data.train))
    test = data.train[FOLD].to_numpy() == seed % data.facts["n_folds"]
    target = data.train[TARGET].to_numpy()
    group = groups_of(data.train, data.facts["group_col"])
    return {
        "x": images[~test], "y": target[~test], "group": group[~test],
        "x_test": images[test], "y_test": target[test],
    }  # fmt: skip


def to_tensor(image: np.ndarray, size: int) -> torch.Tensor:
    """uint8 (N, s, s, 3) -> uint8 (N, 3, size, size): enlarged by repetition, else resampled."""
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(0, 3, 1, 2)
    if size % x.shape[-1]:
        parts = [F.interpolate(part.float(), size=(size, size), mode="area").round().byte() for part in x.split(256)]
        x = torch.cat(parts)
    else:
        x = x.repeat_interleave(size // x.shape[-1], 2).repeat_interleave(size // x.shape[-1], 3)
    return x.contiguous(memory_format=torch.channels_last)


def augment(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Flip or turn a batch and shift it by up to an eighth; "none" leaves it as it is."""
    if kind == "dihedral":
        x = models.dihedral(x, int(torch.randint(8, ())))
    elif kind == "flip":
        x = x.flip(-1) if torch.rand(()) < 0.5 else x
    if kind == "none":
        return x.float() / 255
    pad = x.shape[-1] // 8
    top, left = (int(torch.randint(2 * pad + 1, ())) for _ in range(2))
    padded = F.pad(x.float(), (pad,) * 4, mode="reflect")
    return padded[..., top : top + x.shape[-2], left : left + x.shape[-1]] / 255


# ---------------------------------------------------------------- arms
def apply_scale(module: nn.Module, inputs, output):
    """Forward hook of LayerScale: the raw parameter in the gate's place."""
    branch = output[0] if isinstance(output, tuple) else output
    shape = [1] * branch.ndim
    shape[module.fsg_axis] = -1
    scaled = branch * module.fsg.view(shape)
    return (scaled, *output[1:]) if isinstance(output, tuple) else scaled


def add_arm(network: nn.Module, arm: str) -> None:
    """Give a network what the arm asks for."""
    if arm == "baseline":
        return
    fsg.add_gates(network, init="paper" if arm in ("paper", "upstream") else "identity",
                  hard=arm == "hard")  # fmt: skip
    if arm.startswith("layerscale"):
        for module in fsg.gated_modules(network).values():
            module._forward_hooks.clear()
            module.register_forward_hook(apply_scale)
            nn.init.ones_(module.fsg)


def penalty_of(network: nn.Module, arm: str) -> torch.Tensor:
    """What --penalty weighs."""
    if arm == "layerscale_l1":
        return torch.cat(fsg.gate_parameters(network)).abs().mean()
    return fsg.gate_penalty(network)


def make_routing(network: nn.Module, arm: str, args) -> fsg.GradientRouting:
    """Optimizers of an arm: AdamW, weight decay on the weights only."""
    gates = fsg.gate_parameters(network)
    groups = network.param_groups(args.lr, args.head_lr or args.lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    if arm == "baseline":
        return fsg.GradientRouting(network, optimizer, mode="off")
    if arm in ("joint", "layerscale"):
        optimizer.add_param_group({"params": gates, "lr": args.lr, "weight_decay": 0.0})
        return fsg.GradientRouting(network, optimizer, mode="off")
    gate_optimizer = torch.optim.AdamW(gates, lr=args.gate_lr, weight_decay=0.0)
    mode = arm if arm in fsg.MODES else "single"
    return fsg.GradientRouting(network, optimizer, gate_optimizer, mode)


def make_network(args, classes: int) -> nn.Module:
    """The plain network: a backbone and one linear layer, no metadata."""
    network = models.build_model(models.Spec("resnet", args.backbone, args.size), args.weights)
    network.head = nn.Linear(network.features, classes)
    return network.to(memory_format=torch.channels_last)


def subset(y: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Rows of a share of the training set, stratified."""
    rows = np.arange(len(y))
    if share < 1:
        rows = train_test_split(rows, train_size=share, random_state=seed, stratify=y)[0]
    return np.sort(rows)


def train_network(network: nn.Module, arm: str, penalty: float, data: dict, rows, share: float,
                  seed: int, args) -> float:  # fmt: skip
    """Fit an arm; returns the median seconds of a step."""
    device = torch.device(args.device)
    x = to_tensor(data["x"][rows], args.size).to(device)
    y = torch.from_numpy(data["y"][rows]).long().to(device)
    mine, gates_own = np.arange(len(rows)), np.array([], dtype=int)
    if arm == "held_out":
        groups = np.unique(data["group"][rows])
        chosen = np.random.default_rng(seed).permutation(groups)[: round(GATE_SHARE * len(groups))]
        apart = np.isin(data["group"][rows], chosen)
        mine, gates_own = np.flatnonzero(~apart), np.flatnonzero(apart)
    routing = make_routing(network, arm, args)
    epochs = round(args.epochs * (1 if share == 1 else args.small_epochs))
    steps = max(len(rows) // args.batch_size, 1)
    draw, seconds = np.random.default_rng(seed), []

    def loss_on(image, target):
        loss = F.cross_entropy(network(image, None), target)
        return loss + penalty * penalty_of(network, arm) if penalty else loss

    network.train()
    for epoch in range(1, epochs + 1):
        routing.scale_lr(lr_factor("cosine", epoch, epochs))
        order = np.random.default_rng([seed, epoch]).permutation(mine)
        order = np.resize(order, steps * args.batch_size)  # every arm takes as many steps
        for batch in order.reshape(steps, args.batch_size):
            image, target = augment(x[batch], args.augment), y[batch]
            gate_loss = None
            if arm == "held_out":
                other = draw.choice(gates_own, args.batch_size)
                gate_loss = partial(loss_on, augment(x[other], args.augment), y[other])
            start = time.perf_counter()
            loss = routing.step(partial(loss_on, image, target), gate_loss_fn=gate_loss)
            seconds.append(time.perf_counter() - start)
        if not torch.isfinite(loss):
            raise InputError(f"{arm}, seed {seed}: the loss is {loss}; pass a lower --lr")
    return float(np.median(seconds))


# ---------------------------------------------------------------- scores
@torch.inference_mode()
def predict(network: nn.Module, x: torch.Tensor) -> np.ndarray:
    """Class probabilities (N, K)."""
    network.eval()
    return torch.cat([network(part, None).softmax(1) for part in x.split(128)]).cpu().numpy()


def score(y: np.ndarray, prob: np.ndarray) -> dict[str, float]:
    """Accuracy, macro-F1 and AUC (one against the rest)."""
    guess = prob.argmax(axis=1)
    auc = roc_auc_score(y, prob[:, 1]) if prob.shape[1] == 2 else \
        roc_auc_score(y, prob, multi_class="ovr")  # fmt: skip
    return {"accuracy": accuracy_score(y, guess), "f1": f1_score(y, guess, average="macro"),
            "auc": auc}  # fmt: skip


@torch.no_grad()
def prune_curve(network: nn.Module, arm: str, x_train, x_test, y_test, metric: str) -> dict:
    """Score on the test set with shares of the channels closed, by gate and by contribution."""
    if arm == "baseline":
        fsg.add_gates(network)  # all 1: contributions rank what a plain network would miss least
    modules = fsg.gated_modules(network)
    network.eval()
    rankings = {"contribution": fsg.gate_contributions(network, lambda: predict(network, x_train[:512]))}
    if arm != "baseline":
        raw = arm.startswith("layerscale")
        rankings["gate"] = {name: module.fsg.abs() if raw else fsg.gate_of(module) for name, module in modules.items()}
    curves = {}
    for kind, scores in rankings.items():
        curves[kind] = []
        for share in SHARES:
            with fsg.pruned(network, share, scores):
                if arm.startswith("layerscale"):
                    for module in modules.values():
                        module.fsg[module.fsg == fsg.CLOSED] = 0.0
                curves[kind].append(score(y_test, predict(network, x_test))[metric])
    return curves


def run_arm(label: str, share: float, seed: int, args) -> dict:
    """Train and judge one arm of one seed; label: the arm, for a sparse one "arm penalty"."""
    arm, _, penalty = label.partition(" ")
    data = load_data(args.data, seed)
    metric = "auc" if len(np.unique(data["y"])) == 2 else "accuracy"
    torch.manual_seed(seed)
    network = make_network(args, int(data["y"].max()) + 1).to(args.device)
    torch.manual_seed(seed)  # gates of some arms draw; what follows should not depend on that
    add_arm(network, arm)
    rows = subset(data["y"], share, seed)
    torch.manual_seed(seed)
    seconds = train_network(network, arm, float(penalty or 0), data, rows, share, seed, args)
    x_test = to_tensor(data["x_test"], args.size).to(args.device)
    x_train = to_tensor(data["x"][rows[:2000]], args.size).to(args.device)
    result = score(data["y_test"], predict(network, x_test))
    train = score(data["y"][rows[:2000]], predict(network, x_train))
    row = {"data": Path(args.data).stem, "share": share, "arm": label, "seed": seed,
           "images": len(rows), "test_images": len(x_test), "metric": metric, **result,
           "gap": train[metric] - result[metric], "ms": 1000 * seconds}  # fmt: skip
    if arm != "baseline":
        gate = torch.cat(list(fsg.gate_values(network, relative=True).values()))
        if arm.startswith("layerscale"):
            gate = torch.cat(fsg.gate_parameters(network)).detach().abs()
        row |= fsg.gate_statistics(gate)
    return row | prune_curve(network, arm, x_train, x_test, data["y_test"], metric)


# ---------------------------------------------------------------- the table
def read_rows(path: Path) -> list[dict]:
    """Finished trainings."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def prunable(rows: list[dict], kind: str) -> str:
    """Largest share of SHARES that can be closed within one standard deviation over seeds."""
    if kind not in rows[0]:
        return ""
    whole = np.array([row[row["metric"]] for row in rows])
    means = np.array([row[kind] for row in rows]).mean(axis=0)
    good = [s for s, mean in zip(SHARES, means, strict=True)
            if mean >= whole.mean() - whole.std(ddof=1)]  # fmt: skip
    return f"{max(good, default=0):.0%}"


def corrected(differences: np.ndarray, ratio: float) -> tuple[float, float, float]:
    """95 % t interval of the mean difference over seeds (n,), and its p-value, by the variance of Nadeau and Bengio;
    ratio: images to test on over images to train on."""
    n, mean = len(differences), differences.mean()
    error = differences.std(ddof=1) * np.sqrt(1 / n + ratio)
    half = stats.t.ppf(0.975, n - 1) * error
    p = 2 * stats.t.sf(abs(mean) / error, n - 1) if error > 0 else float(mean == 0)
    return mean - half, mean + half, p


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p-values adjusted for the number of arms compared."""
    adjusted, running = {}, 0.0
    for i, (arm, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min((len(p_values) - i) * p, 1.0))
        adjusted[arm] = running
    return adjusted


def print_table(rows: list[dict]) -> None:
    """One table per data set and share, arms paired with the baseline over seeds."""
    labels = sorted({row["arm"] for row in rows}, key=lambda a: (ARMS.index(a.split()[0]), a))
    for data, share in sorted({(row["data"], row["share"]) for row in rows}):
        chosen = {arm: sorted((r for r in rows if (r["data"], r["share"], r["arm"]) ==
                               (data, share, arm)), key=lambda r: r["seed"])
                  for arm in labels}  # fmt: skip
        chosen = {arm: each for arm, each in chosen.items() if len(each) > 1}
        base = chosen["baseline"]
        metric, first = base[0]["metric"], base[0]
        print(f"\n{data}, {first['images']} training and {first['test_images']} test images, "
              f"{len(base)} seeds\n")  # fmt: skip
        print(f"| arm | accuracy | macro-F1 | AUC | {metric} - baseline [95 %] | p (Holm) | gap | "
              "closed | effective | prunable by gate | by contribution | step |")  # fmt: skip
        print("|" + "---|" * 12)
        differences = {}
        for arm, each in chosen.items():
            other = {r["seed"]: r[metric] for r in base}
            differences[arm] = np.array([r[metric] - other[r["seed"]] for r in each])
        ratio = first["test_images"] * share / first["images"]
        tests = {arm: corrected(d, ratio) for arm, d in differences.items() if arm != "baseline"}
        p_values = holm({arm: p for arm, (*_, p) in tests.items()})
        for arm, each in chosen.items():
            cells = [spread([r[key] for r in each]) for key in ("accuracy", "f1", "auc")]
            if arm == "baseline":
                cells += ["", ""]
            else:
                low, high, _ = tests[arm]
                cells += [f"{differences[arm].mean():+.3f} [{low:+.3f}, {high:+.3f}]", f"{p_values[arm]:.3f}"]
            cells.append(f"{np.mean([r['gap'] for r in each]):.3f}")
            cells += [f"{np.mean([r[key] for r in each]):.2f}" if key in each[0] else ""
                      for key in ("closed_05", "effective")]  # fmt: skip
            cells += [prunable(each, "gate"), prunable(each, "contribution")]
            times = [np.mean([r["ms"] for r in each_arm]) for each_arm in (each, base)]
            cells.append(f"{times[0] / times[1]:.2f}")
            print(f"| {arm} | " + " | ".join(cells) + " |")


def main(args: argparse.Namespace) -> None:
    """Run what is missing, print the table."""
    rows = read_rows(args.output)
    name = Path(args.data).stem
    done = {(row["data"], row["share"], row["arm"], row["seed"]) for row in rows}
    labels = [arm for arm in args.arms if arm not in SPARSE]
    labels += [f"{arm} {p:g}" for arm in args.arms if arm in SPARSE for p in args.penalty]
    todo = [(label, share, seed) for seed in range(args.seeds) for share in args.share
            for label in labels if (name, share, label, seed) not in done]  # fmt: skip
    for label, share, seed in tqdm(todo, unit="training"):
        row = run_arm(label, share, seed, args)
        with args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print_table(read_rows(args.output))


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    count, positive = util.number(int, 1), util.number(float, 0)
    parser.add_argument("data", help="digits, a npz file, or a directory of preprocess.py")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="which to compare")
    parser.add_argument("--seeds", type=count, default=3, help="trainings of each arm")
    parser.add_argument("--share", type=positive, nargs="+", default=[1.0, 0.1],
                        help="of the training images")  # fmt: skip
    parser.add_argument("--backbone", default="vit_tiny", help="as of train.py")
    parser.add_argument("--weights", default="none", help="as of train.py")
    parser.add_argument("--size", type=count, default=64, help="pixels")
    parser.add_argument("--augment", choices=("none", "flip", "dihedral"), default="none",
                        help="flip and turn adds shifts by up to an eighth")  # fmt: skip
    parser.add_argument("--epochs", type=count, default=20, help="with all images")
    parser.add_argument("--small_epochs", type=positive, default=3.0,
                        help="times as many epochs with a share of them")  # fmt: skip
    parser.add_argument("--batch_size", type=count, default=32, help="images per step")
    parser.add_argument("--lr", type=positive, default=1e-3, help="of the weights")
    parser.add_argument("--head_lr", type=positive, help="of the head [the same]")
    parser.add_argument("--gate_lr", type=positive, default=3e-2, help="of gates routed apart")
    parser.add_argument("--weight_decay", type=positive, default=0.05, help="of the weights")
    parser.add_argument("--penalty", type=positive, nargs="+", default=[10.0],
                        help="of the sparse arms")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("fsg_ablation.jsonl"),
                        help="finished trainings")  # fmt: skip
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
