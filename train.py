"""Train one model on the folds asked for; predict the held-out folds and the test images.

Reads   --data_dir (preprocess.py), for cropnet also --crop_dir (crop.py)
Writes  runs/NAME/: config.json, log.csv, fold{k}_best.pt, fold{k}_last.pt, oof.csv,
        test_predictions.csv, submission.csv, metrics.json, curves.png, roc.png; with gates also
        gates.csv, prune.csv, fold{k}_gates.npy, fold{k}_gates.png

    python train.py --model resnet --fold 0
    python train.py --model resnet --fsg --name resnet_fsg
    python train.py --model chipnet --fold all --weights none --backbone regnet_tiny --lr 1e-3
    torchrun --nproc_per_node=3 train.py --model resnet

Folds may be trained in several calls, also at the same time: a run collects them. Under torchrun
every process trains folds of its own where their number allows, otherwise all train each fold
together, with a share of every batch. The defaults are the original's
recipe: focal loss, balanced sampling, Adam, learning rate x 0.95 per epoch, early stopping.
"""

import argparse
import importlib.util
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedGroupKFold
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

import dataset
import fsg
import models
import util
from dataset import ImageDataset, MetaEncoder
from util import FOLD, ID, PROB, TARGET, InputError

# what may differ between two calls that train folds of the same run
FREE_ARGUMENTS = {
    "fold", "device", "workers", "resume", "overwrite", "max_hours", "tensorboard"
}  # fmt: skip
LOG_COLUMNS = (
    "fold", "epoch", "train_loss", "valid_loss", "valid_auc", "lr", "seconds", "images_per_second"
)  # fmt: skip
UNBEGUN = {"step": 0, "loss_sum": 0.0, "images": 0}  # progress in an epoch
GATE_DEFAULTS = {"gate_init": "identity", "gate_lr": 1e-3, "gate_l1": 0.0, "routing": "single"}
GATE_PARTS = 5  # one of so many parts of the training groups is the gates' in held_out
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
PRUNE_SHARES = (0.25, 0.5, 0.75, 0.9)  # of the gates closed, for the prune curve
PRUNE_ROWS = 128  # held-out images per class that it is measured on


def focal_loss(
    logit: torch.Tensor, target: torch.Tensor, gamma: float = 2.0, pos_weight: float = 1.0
) -> torch.Tensor:
    """Mean focal loss of logit (N, 1) and target (N,) in 0..1; gamma 0 is cross-entropy.

    A target between 0 and 1 is that share of a positive's loss and the rest of a negative's.
    pos_weight: of the positives. Lin et al., Focal Loss for Dense Object Detection, 2017,
    equation 4.
    """
    logit, parts = logit.squeeze(1), []
    for label in (torch.ones_like(target), torch.zeros_like(target)):
        loss = F.binary_cross_entropy_with_logits(logit, label, reduction="none")
        parts.append((1 - torch.exp(-loss)) ** gamma * loss)
    return (pos_weight * target * parts[0] + (1 - target) * parts[1]).mean()


def guide_loss(attention: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of attention (N, h, w) from maps (N, h, w), both sum 1."""
    return F.kl_div(attention.clamp_min(1e-12).log(), guide, reduction="none").sum((1, 2)).mean()


LOSSES = {"focal": focal_loss, "bce": partial(focal_loss, gamma=0.0)}


def lr_factor(schedule: str, epoch: int, epochs: int) -> float:
    """Factor on the learning rates in an epoch (counted from 1): 0.95 per epoch, or one epoch of
    warm-up at a tenth and half a cosine."""
    if schedule == "exponential":
        return 0.95 ** (epoch - 1)
    if epoch == 1:
        return 0.1
    return 0.5 * (1 + math.cos(math.pi * (epoch - 2) / max(epochs - 1, 1)))


def mix_up(parts: list[torch.Tensor], alpha: float) -> list[torch.Tensor]:
    """A batch in which every image and what belongs to it is mixed with another's.

    The share is drawn from Beta(alpha, alpha). parts: image uint8 (N, C, S, S), which becomes
    float in 0..1, and further tensors (N, ...). Zhang et al., mixup, 2018.
    """
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    other = torch.randperm(len(parts[0])).to(parts[0].device)
    parts = [parts[0].float() / 255, *parts[1:]]
    return [share * part + (1 - share) * part[other] for part in parts]


def epoch_seed(seed: int, fold: int, epoch: int) -> int:
    """Seed of one epoch: a resumed run draws what an uninterrupted one would have drawn."""
    return int(np.random.SeedSequence([seed, fold, epoch]).generate_state(1)[0])


# ---------------------------------------------------------------- inputs
def fill_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """A copy of the arguments in which what depends on the model is filled in."""
    recipe = models.MODELS[args.model]
    settings = argparse.Namespace(**vars(args))
    for key in ("backbone", "lr", "head_lr", "hidden"):
        if getattr(settings, key) is None:
            setattr(settings, key, getattr(recipe, key))
    if "crop" in recipe.inputs and args.crop_dir is None:
        settings.crop_dir = args.data_dir / "crops" / "saliency"
    if settings.crop_dir is None:
        settings.jitter = None
    if settings.loader == "device":
        settings.workers = 0
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs a package: pip install tensorboard")
    if settings.guide is None:
        settings.guide_weight = None
    elif recipe.network is not models.ChipNet:
        raise InputError(f"--guide is for chipnet; {args.model} has no attention to guide")
    settings.name = args.name or args.model
    settings.fsg = args.fsg or recipe.gated
    for key, default in GATE_DEFAULTS.items():
        if settings.fsg and getattr(settings, key) is None:
            setattr(settings, key, default)
        elif not settings.fsg and getattr(settings, key) is not None:
            raise InputError(f"--{key} is for gates; {args.model} has some with --fsg")
    return settings


def parse_folds(words: list[str], n_folds: int) -> list[int]:
    """Folds named on the command line: numbers from 0, or "all"."""
    if words == ["all"]:
        return list(range(n_folds))
    for word in words:
        if not word.isdigit() or int(word) >= n_folds:
            raise InputError(f"--fold {word}: this data has folds 0 to {n_folds - 1} (or: all)")
    return sorted({int(word) for word in words})


def read_crop(crop_dir: Path, data: util.Data) -> dict:
    """crop.json of a directory; raises InputError where it was cropped for other folds."""
    kinds = {"folds_sha256": str, "source": str, "sha256": dict, "wide_size": int}
    crop = util.read_json(crop_dir / "crop.json", kinds)
    if crop["folds_sha256"] != util.folds_sha256(data.train):
        raise InputError(
            f"{crop_dir} was cropped for other folds than {data.directory} has; run crop.py again, "
            "or the validation images would have been seen"
        )
    return crop


def check_unseen(crop_dir: Path, data: util.Data, folds: list[int]) -> None:
    """Raise InputError where held-out images were cropped by networks trained on them."""
    boxes = util.read_table(crop_dir / "train_boxes.csv", ["oof"])
    seen = data.train[FOLD].isin(folds) & data.train[ID].isin(boxes[ID][boxes["oof"] == 0])
    if seen.any():
        k = data.train[FOLD][seen].iloc[0]
        raise InputError(
            f"{crop_dir}: the images of fold {k} were cropped by networks that saw them (oof = 0); "
            f"train fold {k} of that run and crop again, or leave it out of --fold"
        )


def find_arrays(settings: argparse.Namespace, data: util.Data) -> tuple[dict, dict | None]:
    """Recorded hashes of the arrays to read, and crop.json where crops are used."""
    needed, crop = {}, None
    inputs = models.MODELS[settings.model].inputs
    if settings.crop_dir is None or len(inputs) > 1 or settings.jitter:
        for split in data.tables():
            needed[util.array_path(data.directory, split, data.size)] = data.size
    if settings.crop_dir is not None:
        crop = read_crop(settings.crop_dir, data)
        splits = [(split, data.size) for split in data.tables()]
        splits += [("train_wide", crop["wide_size"])] if settings.jitter else []
        for split, size in splits:
            needed[util.array_path(settings.crop_dir, split, size)] = size
    hashes = {}
    for path, size in needed.items():
        table = data.test if path.name.startswith("test") else data.train
        util.open_array(path, len(table), size)
        listed = (data.facts if path.parent == data.directory else crop)["sha256"]
        if path.name not in listed:
            raise InputError(f"{path} is not among what its folder's json lists; make it again")
        hashes[f"{path.parent.name}/{path.name}"] = listed[path.name]
    return hashes, crop


def read_tables(settings: argparse.Namespace, data: util.Data) -> dict[str, pd.DataFrame]:
    """Tables by split; where crops are used, with the columns of their boxes."""
    if settings.crop_dir is None:
        return data.tables()
    return {
        split: util.with_box_side(table, settings.crop_dir, split)
        for split, table in data.tables().items()
    }


def image_sources(
    settings: argparse.Namespace, data: util.Data, split: str, crop: dict | None, place=None
) -> list:
    """Where the pictures of a split come from, one source per picture that the model sees.

    place: of the boxes in their wide crops (N, 3), to jitter them.
    """
    n_rows = len(data.tables()[split])
    whole = dataset.Stored(util.array_path(data.directory, split, data.size), n_rows)
    if crop is None:
        return [whole]
    if place is not None:
        path = util.array_path(settings.crop_dir, f"{split}_wide", crop["wide_size"])
        cropped = dataset.Jittered(dataset.Stored(path, n_rows), whole, place, data.size)
    else:
        path = util.array_path(settings.crop_dir, split, data.size)
        cropped = dataset.Stored(path, n_rows)
    inputs = models.MODELS[settings.model].inputs
    return [whole, cropped] if len(inputs) > 1 else [cropped]


def fold_weights(settings: argparse.Namespace, data: util.Data, k: int) -> str:
    """Weights that fold k starts from: where --weights names a run, that fold's network of it.

    Raises InputError where that run has other folds: its network would have seen held-out images.
    """
    run_dir = Path(settings.weights)
    if (run_dir.parent / "config.json").exists() and run_dir.is_file():
        raise InputError(f"--weights {run_dir} is the network of one fold; pass {run_dir.parent}: "
                         "each fold then starts from its own")  # fmt: skip
    if not run_dir.is_dir():
        return settings.weights
    if util.read_config(run_dir)["data"]["folds_sha256"] != util.folds_sha256(data.train):
        raise InputError(f"--weights {run_dir} was trained on other folds; its networks have seen "
                         "images that are held out here; pass others")  # fmt: skip
    return str(run_dir / f"fold{k}_best.pt")


def make_spec(settings: argparse.Namespace, image_size: int, meta_dim: int) -> dict:
    """What models.build_model needs to rebuild the network."""
    return {
        "model": settings.model,
        "backbone": settings.backbone,
        "image_size": image_size,
        "meta_dim": meta_dim,
        "hidden": settings.hidden,
        "dropout": settings.dropout,
        "gates": settings.gate_init,
    }


def meta_columns(settings: argparse.Namespace, table: pd.DataFrame) -> list[str]:
    """Metadata columns to use; those named on the command line must exist."""
    for name in settings.meta_cols or ():
        if name not in table:
            raise InputError(f"--meta_cols {name}: the train table has {', '.join(table)}")
    standard = [*dataset.META_COLUMNS, util.BOX_SIDE]  # a crop does not show its own size
    return standard if settings.meta_cols is None else settings.meta_cols


def gate_rows(rows: np.ndarray, group: np.ndarray, target: np.ndarray, seed: int) -> np.ndarray:
    """Which of the training rows only the gates are fitted to in held_out: bool (N,); a fifth of
    the groups, more where a class has few. Raises InputError where a part would lack a class."""
    group, target = group[rows], target[rows]
    parts = min(GATE_PARTS, *(len(np.unique(group[target == label])) for label in (0, 1)))
    apart = np.zeros(len(rows), dtype=bool)
    if parts > 1:
        split = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
        apart[next(split.split(rows, target, group))[1]] = True
    if any(len(np.unique(target[part])) < 2 for part in (apart, ~apart)):
        raise InputError("--routing held_out: too few groups of a class to keep some for the gates")
    return apart


def pick_rows(target: np.ndarray, rows: np.ndarray, limit: int | None) -> np.ndarray:
    """Rows in order, at most `limit` of each class."""
    if limit is None:
        return rows
    kept = [rows[target[rows] == label][:limit] for label in (0, 1)]
    return np.sort(np.concatenate(kept))


# ---------------------------------------------------------------- the run directory
def run_dir_of(settings: argparse.Namespace) -> Path:
    """Where a run is kept."""
    return settings.runs_dir / settings.name


def open_run(settings: argparse.Namespace, config: dict, folds: list[int]) -> tuple[Path, list]:
    """Create or continue a run directory; returns it and the folds still to train.

    Raises InputError where the run is finished, was interrupted, or was made differently.
    """
    run_dir = run_dir_of(settings)
    path = run_dir / "config.json"
    held = {file.name for file in run_dir.iterdir()} if run_dir.exists() else set()
    if held - {"config.json.tmp"} and not path.exists():  # a kill may leave that one
        raise InputError(f"{run_dir} holds files but no run; pass another --name")
    if settings.overwrite and path.exists():
        shutil.rmtree(run_dir)
    if path.exists():
        old = util.read_config(run_dir)
        if config["data"] != old["data"]:
            raise InputError(f"{run_dir} was trained on other data; pass --name or --overwrite")
        for key in sorted(config["args"].keys() - FREE_ARGUMENTS):
            mine, theirs = config["args"][key], old["args"].get(key)
            if mine != theirs:
                raise InputError(
                    f"{run_dir} was made with {key} = {theirs}, not {mine}; pass --name for a new "
                    "run or --overwrite to replace this one"
                )
        done = []
        if (run_dir / "metrics.json").exists():
            done = [fold["fold"] for fold in util.read_metrics(run_dir)["folds"]]
        for k in () if settings.resume else folds:
            state = "finished" if k in done else "interrupted"
            if k in done or (run_dir / f"fold{k}_last.pt").exists():
                raise InputError(
                    f"fold {k} of {run_dir} is {state}; pass --resume to go on with what is "
                    "missing or --overwrite to start the run anew"
                )
        folds = [k for k in folds if k not in done]
    run_dir.mkdir(parents=True, exist_ok=True)
    util.write_json(path, config)
    return run_dir, folds


# ---------------------------------------------------------------- several processes
@dataclass(frozen=True)
class Team:
    """The processes that train a fold together, and which of them this one is."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def mean(self, value: float, device: torch.device) -> float:
        """Mean of the processes' values."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.all_reduce(total)
        return total.item() / self.size

    def gather(self, prob: np.ndarray, n_rows: int) -> np.ndarray:
        """Probabilities of all rows (n_rows,) from every process's share of them."""
        if self.size == 1:
            return prob
        parts: list = [None] * self.size
        distributed.all_gather_object(parts, prob)
        whole = np.empty(n_rows)
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole


def join_team(device: str) -> tuple[Team, torch.device]:
    """All processes that torchrun started, and the device of this one."""
    team = Team(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if team.size == 1:
        return team, models.pick_device(device)
    picked = models.pick_device(device)
    if picked.type == "cuda":
        picked = models.pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(picked)
    distributed.init_process_group("nccl" if picked.type == "cuda" else "gloo")
    return team, picked


def from_leader(value):
    """The leading process's value, in all processes."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


# ---------------------------------------------------------------- logs
def read_log(run_dir: Path) -> pd.DataFrame:
    """The log so far, one row per fold and epoch."""
    path = run_dir / "log.csv"
    if not path.exists():
        return pd.DataFrame(columns=LOG_COLUMNS)
    return util.read_csv(path, LOG_COLUMNS, id_col=None)


def write_log(run_dir: Path, row: dict) -> None:
    """Add an epoch to the log; what a resumed fold trains again is replaced."""
    log = read_log(run_dir)
    log = log[(log["fold"] != row["fold"]) | (log["epoch"] < row["epoch"])]
    rows = [*log.to_dict("records"), row]
    log = pd.DataFrame(rows, columns=LOG_COLUMNS).sort_values(["fold", "epoch"])
    util.write_table(run_dir / "log.csv", log)


def open_board(settings: argparse.Namespace, fold: int, epoch: int):
    """TensorBoard's writer of a fold from an epoch on; None without --tensorboard."""
    if not settings.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run_dir_of(settings) / "tensorboard" / f"fold{fold}", purge_step=epoch)


def plot_curves(run_dir: Path) -> None:
    """Loss and validation AUC of every fold over the epochs."""
    figure = util.new_figure(figsize=(9, 4))
    left, right = figure.subplots(1, 2)
    for fold, rows in read_log(run_dir).groupby("fold"):
        color = f"C{fold}"
        left.plot(rows["epoch"], rows["train_loss"], color=color, label=f"fold {fold}, train")
        left.plot(rows["epoch"], rows["valid_loss"], color=color, linestyle="--", label="held out")
        right.plot(rows["epoch"], rows["valid_auc"], color=color, label=f"fold {fold}")
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel="AUC of the held-out fold")
    left.legend()
    right.legend()
    util.save_figure(run_dir / "curves.png", figure)


def write_gates(run_dir: Path, fold: int, epoch: int, model: torch.nn.Module) -> None:
    """Add the gates of an epoch: their sparsity by branch to gates.csv, and all of them, relative
    to their start, to fold{k}_gates.npy (epochs, gates). A resumed fold replaces its epochs."""
    gates = fsg.gate_values(model, relative=True)
    values = torch.cat([gate.float().cpu() for gate in gates.values()])
    place = {"fold": fold, "epoch": epoch}
    rows = [
        {**place, "branch": name, "channels": len(gate), **fsg.gate_statistics(gate)}
        for name, gate in [("all", values), *gates.items()]
    ]
    path = run_dir / "gates.csv"
    if path.exists():
        old = util.read_csv(path, ("fold", "epoch"), id_col=None)
        old = old[(old["fold"] != fold) | (old["epoch"] < epoch)]
        rows = [*old.to_dict("records"), *rows]
    table = pd.DataFrame(rows).sort_values(["fold", "epoch"], kind="stable")
    util.write_table(path, table)
    path, history = run_dir / f"fold{fold}_gates.npy", values.numpy()[None]
    if epoch > 1:
        earlier = np.load(path, allow_pickle=False)[: epoch - 1]
        history = np.concatenate([earlier, history])
    with util.atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, history)


def prune_curve(
    predict: Callable, model: torch.nn.Module, target: np.ndarray
) -> list[tuple[str, float, float]]:
    """AUC with shares of the gates closed, lowest first: (ranking, share, AUC).

    predict: model -> probabilities of the images of `target` (N,). Rankings: the gates, what they
    contribute on these images, and chance. The model is left as it is.
    """
    gates = fsg.gate_values(model)
    generator = torch.Generator().manual_seed(0)
    rankings = {
        "gate": gates,
        "contribution": fsg.gate_contributions(model, lambda: predict(model)),
        "chance": {name: torch.rand(len(g), generator=generator) for name, g in gates.items()},
    }
    whole = util.weighted_auc(target, predict(model))
    curve = [(ranking, 0.0, whole) for ranking in rankings]
    for ranking, scores in rankings.items():
        for share in PRUNE_SHARES:
            with fsg.pruned(model, share, scores):
                curve.append((ranking, share, util.weighted_auc(target, predict(model))))
    return curve


def plot_gates(path: Path, model: torch.nn.Module, curve: pd.DataFrame) -> None:
    """Gates relative to their start as layer x channel, and the prune curve."""
    gates = list(fsg.gate_values(model, relative=True).values())
    grid = np.full((len(gates), max(len(gate) for gate in gates)), np.nan)
    for row, gate in zip(grid, gates, strict=True):
        row[: len(gate)] = gate.cpu().numpy()
    figure = util.new_figure(figsize=(12, 4))
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    picture = left.imshow(grid, aspect="auto", cmap="RdBu", vmin=0, vmax=2, interpolation="nearest")
    figure.colorbar(picture, ax=left, label="gate / start")
    left.set(xlabel="channel", ylabel="branch", title="Gates of the best epoch")
    for ranking, rows in curve.groupby("ranking", sort=False):
        rows = rows.sort_values("share")
        right.plot(rows["share"], rows["auc"], marker="o", label=f"by {ranking}")
    right.set(xlabel="share of gates closed, lowest first", ylabel="AUC, held-out images")
    right.set_title("Prune curve")
    right.legend()
    util.save_figure(path, figure)


def record_gates(run_dir: Path, fold: int, trainer: "Trainer", valid: ImageDataset) -> None:
    """Prune curve of a fold's best network on held-out images: prune.csv, fold{k}_gates.png."""
    settings, model = trainer.settings, trainer.scored
    chosen = pick_rows(valid.target, np.arange(len(valid)), PRUNE_ROWS)
    some = Subset(valid, chosen.tolist())
    loader = dataset.make_loader(some, workers=0, batch_size=settings.batch_size)
    predict = partial(models.predict, loader=loader, device=trainer.device, amp=settings.amp)
    curve = prune_curve(predict, model, valid.target[chosen])
    table = pd.DataFrame(curve, columns=["ranking", "share", "auc"])
    plot_gates(run_dir / f"fold{fold}_gates.png", model, table)
    table.insert(0, "fold", fold)
    path = run_dir / "prune.csv"
    if path.exists():
        old = util.read_csv(path, table.columns, id_col=None)
        table = pd.concat([old[old["fold"] != fold], table]).sort_values("fold", kind="stable")
    util.write_table(path, table)


def record_fold(
    run_dir: Path, data: util.Data, facts: dict, oof: pd.DataFrame, test: pd.DataFrame | None
) -> dict:
    """Add a fold's predictions to the run's files, in table order; returns the metrics."""

    def read_others(name: str, columns) -> pd.DataFrame:
        table = util.read_predictions(run_dir, name, columns)
        return table[table[FOLD] != facts["fold"]]  # a killed call may have written this fold

    facts["checkpoint"] = util.sha256(run_dir / f"fold{facts['fold']}_best.pt")
    folds = [facts]
    if (run_dir / "metrics.json").exists():
        folds += util.read_metrics(run_dir)["folds"]
        oof = pd.concat([read_others("oof.csv", oof.columns), oof])
        if test is not None:
            earlier = read_others("test_predictions.csv", test.columns)
            test = pd.concat([earlier, test]).sort_values(FOLD, kind="stable")
    order = pd.Series(np.arange(len(data.train)), index=data.train[ID])
    oof = oof.iloc[np.argsort(order[oof[ID]].to_numpy())]
    folds.sort(key=lambda fold: fold["fold"])
    plot_curves(run_dir)
    return util.write_run(run_dir, oof, test, data, folds)


# ---------------------------------------------------------------- training
class Watch:
    """Tells when to stop: a signal (Ctrl-C, SIGTERM) has come, or the hours are over.

    A second signal acts at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, hours: float | None = None):
        self.hours = hours
        self.end = math.inf if hours is None else time.monotonic() + 3600 * hours
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "Watch":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, self._before[number])

    @property
    def due(self) -> bool:
        """Whether to stop."""
        return self.signal is not None or time.monotonic() > self.end

    def stop(self, where: str) -> util.Stopped:
        """The exception that says so."""
        if self.signal is not None:
            why = self.signal.name
        elif self.hours is not None:
            why = f"--max_hours {self.hours:g} are over"
        else:
            why = "another process was told to stop"
        message = f"{why}: stopped in {where}; the same command with --resume goes on"
        return util.Stopped(message, 3 if self.signal is None else 128 + self.signal)


def repeated(loader_from: Callable, start: int) -> Iterator:
    """The batches of a loader over and over, from any; loader_from: number of the first batch ->
    loader."""
    whole = loader_from(start=0)
    if start:
        yield from loader_from(start=start % len(whole))
    while True:
        yield from whole


class Trainer:
    """A network with its optimizers and where its training stands."""

    def __init__(
        self,
        settings: argparse.Namespace,
        spec: dict,
        weights: str,
        device: torch.device,
        team: Team,
        watch: Watch,
    ):
        self.settings, self.spec, self.device = settings, spec, device
        self.team, self.watch = team, watch
        self.model = models.build_model(spec, weights).to(device)
        adam = partial(torch.optim.Adam, fused=device.type in ("cpu", "cuda"))
        groups = self.model.param_groups(settings.lr, settings.head_lr, settings.layer_decay)
        self.optimizer = adam(groups)
        gates, gate_optimizer = fsg.gate_parameters(self.model), None
        mode = settings.routing if gates else "off"
        if gates and mode == "off":
            self.optimizer.add_param_group({"params": gates, "lr": settings.gate_lr})
        elif gates:
            gate_optimizer = adam(gates, lr=settings.gate_lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        self.routing = fsg.GradientRouting(
            self.model, self.optimizer, gate_optimizer, mode, self.scaler,
            settings.clip_grad, settings.clip_grad,
        )  # fmt: skip
        self.average, self.scored = None, self.model
        if settings.ema is not None:
            decay = get_ema_multi_avg_fn(settings.ema)
            self.average = AveragedModel(self.model, multi_avg_fn=decay, use_buffers=True)
            self.scored = self.average.module
        self.parallel = self.model
        if team.size > 1:
            self.parallel = DistributedDataParallel(self.model)
        if settings.compile:
            self.parallel = torch.compile(self.parallel, mode=settings.compile)
        self.progress = {"epoch": 0, "best_epoch": 0, "auc": -1.0, "best_auc": -1.0, "seconds": 0.0}
        self.progress |= UNBEGUN

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or the held-out AUC stopped improving."""
        waited = self.progress["epoch"] - self.progress["best_epoch"]
        return self.progress["epoch"] >= self.settings.epochs or waited >= self.settings.patience

    def set_lr(self, epoch: int) -> float:
        """Set the learning rates of an epoch; returns the backbone's."""
        self.routing.scale_lr(lr_factor(self.settings.schedule, epoch, self.settings.epochs))
        return self.optimizer.param_groups[0]["lr"]

    def compute_loss(self, image, meta, target, guide=None) -> torch.Tensor:
        """Loss of a batch or a part of it, with what --guide and --gate_l1 add."""
        settings = self.settings
        with models.autocast(self.device, settings.amp):
            if guide is None:
                logit = self.parallel(image, meta)
            else:
                logit, attention = self.parallel(image, meta, with_attention=True)
        loss = LOSSES[settings.loss](logit.float(), target, pos_weight=settings.pos_weight)
        if guide is not None:
            loss = loss + settings.guide_weight * guide_loss(attention.float(), guide)
        if settings.gate_l1:
            loss = loss + settings.gate_l1 * fsg.gate_penalty(self.model)
        return loss

    def loss_on(self, batch: list[torch.Tensor], share: float) -> Callable[[], torch.Tensor]:
        """The loss of a batch as a function of nothing, as GradientRouting takes it.

        share: of this process in the batch, over an equal share: the mean of the processes'
        gradients is then that of the whole batch.
        """
        settings = self.settings
        batch = [part.to(self.device, non_blocking=True) for part in batch]
        if settings.mixup:
            batch = mix_up(batch, settings.mixup)
        if settings.label_smoothing:
            batch[2] = batch[2].lerp(torch.full_like(batch[2], 0.5), settings.label_smoothing)
        n = len(batch[0])
        parts = list(zip(*(part.tensor_split(settings.accumulate) for part in batch), strict=True))
        parts = [part for part in parts if len(part[0])]

        def loss() -> torch.Tensor:
            total = 0.0
            for i, part in enumerate(parts, 1):
                part_loss = share * len(part[0]) / n * self.compute_loss(*part)
                if i < len(parts):  # the last one's gradient is taken by GradientRouting
                    self.scaler.scale(part_loss).backward()
                    part_loss = part_loss.detach()
                total = total + part_loss
            return total

        return loss

    def train_epoch(self, loader, seed: int, description: str, gate_batches=None) -> float:
        """The steps of an epoch that are still to do; returns the epoch's mean loss.

        gate_batches: endless batches for the gates' own pass in held_out. Raises InputError where
        the loss is not finite, and util.Stopped when it is time to.
        """
        self.model.train()
        progress, team, batch_size = self.progress, self.team, self.settings.batch_size
        before = None  # a step's loss is read one step later, so that a GPU need not wait
        silent = None if team.leads else True  # None: without a terminal, no bar
        bar = tqdm(loader, desc=description, leave=False, unit="batch", disable=silent)
        for batch in bar:
            step = progress["step"]
            torch.manual_seed(seed + step * team.size + team.rank)
            whole = min(batch_size, len(loader.dataset) - step * batch_size)
            losses = [self.loss_on(batch, len(batch[0]) * team.size / whole)]
            if gate_batches is not None:
                losses.append(self.loss_on(next(gate_batches), 1.0))
            loss = self.routing.step(*losses)
            if self.average is not None:
                self.average.update_parameters(self.model)
            self.count_loss(before, description)
            before = loss, whole, batch
            progress["step"] += 1
            if progress["step"] % (1 if team.size == 1 else 16) == 0 and self.told_to_stop():
                break
        self.count_loss(before, description)
        progress["loss_sum"] = team.mean(progress["loss_sum"], self.device)
        if self.told_to_stop():
            raise self.watch.stop(f"{description} after {progress['step']} steps")
        if team.size > 1:
            for buffer in self.model.buffers():  # the leader's batch norms for all
                distributed.broadcast(buffer, 0)
        return progress["loss_sum"] / progress["images"]

    def count_loss(self, step: tuple | None, description: str) -> None:
        """Add a step (loss, images, batch) to the epoch's loss; where it is not finite, save the
        batch and raise InputError."""
        if step is None:
            return
        loss, images, batch = step[0].item(), *step[1:]
        if not math.isfinite(loss):
            path = run_dir_of(self.settings) / "nonfinite_batch.pt"
            with util.atomic(path) as temporary:
                torch.save(batch, temporary)
            raise InputError(
                f"{description}: the loss is {loss} (its batch is in {path}); pass a lower --lr, "
                "--clip_grad or --amp off"
            )
        self.progress["loss_sum"] += loss * images
        self.progress["images"] += images

    def told_to_stop(self) -> bool:
        """Whether any of the processes is."""
        return self.team.mean(self.watch.due, self.device) > 0

    def watched(self, loader) -> Iterator:
        """The batches of a loader until it is time to stop."""
        for batch in loader:
            if self.team.size == 1 and self.watch.due:
                raise self.watch.stop("prediction")
            yield batch

    def predict(self, images: Dataset, tta: int = 1) -> np.ndarray:
        """Probabilities of images (N,)."""
        settings, team = self.settings, self.team
        own = Subset(images, range(team.rank, len(images), team.size))
        loader = dataset.make_loader(own, settings.workers, batch_size=settings.batch_size)
        prob = models.predict(self.scored, self.watched(loader), self.device, tta, settings.amp)
        return team.gather(prob, len(images))

    def save(self, path: Path, **extra) -> None:
        """Save everything that training needs to go on."""
        models.save_checkpoint(
            path,
            self.model,
            self.spec,
            optimizers=[optimizer.state_dict() for optimizer in self.routing.optimizers],
            scaler=self.scaler.state_dict(),
            average=None if self.average is None else self.average.state_dict(),
            progress=self.progress,
            **extra,
        )

    def load(self, path: Path) -> None:
        """Take up training where `save` left it; raises InputError where the file is of another
        version or network."""
        content = models.load_checkpoint(path)[1]
        try:
            self.model.load_state_dict(content["state_dict"])
            for one, state in zip(self.routing.optimizers, content["optimizers"], strict=True):
                one.load_state_dict(state)
            self.scaler.load_state_dict(content["scaler"])
            if self.average is not None:
                self.average.load_state_dict(content["average"])
            self.progress = {key: content["progress"][key] for key in self.progress}
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(
                f"{path} cannot be gone on with ({error}); pass --overwrite to start the run anew"
            ) from None


def epoch_loaders(trainer: Trainer, images: dict, seed: int) -> tuple:
    """Loader of the steps that an epoch still has to do, and the gates' batches, if any."""
    settings, team, start = trainer.settings, trainer.team, trainer.progress["step"]
    train_loader = partial(
        dataset.train_loader,
        batch_size=settings.batch_size,
        sampler=settings.sampler,
        workers=settings.workers,
        seed=seed,
        share=(team.rank, team.size),
    )
    gate_batches = None
    if "gates" in images:
        gate_batches = repeated(partial(train_loader, images["gates"]), start)
    return train_loader(images["train"], start=start), gate_batches


def fit(trainer: Trainer, k: int, images: dict[str, Dataset], run_dir: Path, extra: dict):
    """Train fold k until it is finished; its best epoch is in fold{k}_best.pt."""
    settings, progress, valid = trainer.settings, trainer.progress, images["valid"]
    team, last_path = trainer.team, run_dir / f"fold{k}_last.pt"
    board = open_board(settings, k, progress["epoch"] + 1) if team.leads else None
    while not trainer.finished:
        epoch, start = progress["epoch"] + 1, time.monotonic()
        seed = epoch_seed(settings.seed, k, epoch)
        lr = trainer.set_lr(epoch)
        loader, gate_batches = epoch_loaders(trainer, images, seed)
        to_do = len(loader.dataset) - progress["images"]
        try:
            name = f"fold {k} epoch {epoch}"
            train_loss = trainer.train_epoch(loader, seed, name, gate_batches)
            rate = to_do / (time.monotonic() - start)
            prob = trainer.predict(valid)
        except util.Stopped:
            progress["seconds"] += time.monotonic() - start
            if team.leads:
                trainer.save(last_path, **extra)
            raise
        except RuntimeError as error:
            if trainer.watch.signal is None or "DataLoader worker" not in str(error):
                raise
            # the signal ended loader processes too, and torch may have said so within a step
            raise trainer.watch.stop(f"{name}; it will begin anew") from None
        auc = util.weighted_auc(valid.target, prob)
        seconds = time.monotonic() - start
        logit = torch.from_numpy(prob).clamp(1e-7, 1 - 1e-7).logit().unsqueeze(1)
        valid_loss = LOSSES[settings.loss](logit, torch.from_numpy(valid.target).double()).item()
        progress |= {"epoch": epoch, "auc": auc, "seconds": progress["seconds"] + seconds}
        progress |= UNBEGUN
        improved = auc > progress["best_auc"]
        if improved:
            progress |= {"best_auc": auc, "best_epoch": epoch}
        if not team.leads:
            continue
        values = (k, epoch, train_loss, valid_loss, auc, lr, seconds, rate)
        row = dict(zip(LOG_COLUMNS, values, strict=True))
        if board is not None:
            for name in LOG_COLUMNS[2:]:
                board.add_scalar(name, row[name], epoch)
            board.flush()
        with util.locked(run_dir):  # other folds may be trained at the same time
            write_log(run_dir, row)
            if settings.fsg:
                write_gates(run_dir, k, epoch, trainer.scored)
        if improved:
            models.save_checkpoint(
                run_dir / f"fold{k}_best.pt", trainer.scored, trainer.spec, epoch=epoch, **extra
            )
        trainer.save(last_path, **extra)
        tqdm.write(
            f"fold {k} epoch {epoch:2d}: train loss {train_loss:.4f}, held-out loss "
            f"{valid_loss:.4f}, AUC {auc:.4f}, {rate:.0f} images/s"
        )
    if team.size > 1:
        distributed.barrier()  # the best epoch is on the disk


def make_datasets(
    k: int, settings: argparse.Namespace, data: util.Data, crop: dict | None
) -> tuple[dict[str, ImageDataset], MetaEncoder]:
    """Images of fold k to "train" on, "valid" (held out) and "test", if any; their encoder. With
    --routing held_out also the "gates"' own training images."""
    tables, is_chipnet = read_tables(settings, data), settings.model == "chipnet"
    table = tables["train"]
    target = util.check_target(table, data.directory / "train.csv")
    held_out = table[FOLD].to_numpy() == k
    rows = {
        "train": pick_rows(target, np.flatnonzero(~held_out), settings.limit),
        "valid": pick_rows(target, np.flatnonzero(held_out), settings.limit),
    }
    fitted_rows = rows["train"]
    if settings.routing == "held_out":
        group = util.groups_of(table, data.facts["group_col"])
        apart = gate_rows(rows["train"], group, target, epoch_seed(settings.seed, k, 0) % 2**32)
        rows |= {"train": rows["train"][~apart], "gates": rows["train"][apart]}
    encoder = MetaEncoder({})  # ChipNet takes no metadata
    if not is_chipnet:
        encoder = MetaEncoder.fit(table.iloc[fitted_rows], meta_columns(settings, table))
    meta, images = encoder.encode(table), {}
    place = table[list(util.PLACE)].to_numpy() if settings.jitter else None
    shift = models.CHIP // 2 if is_chipnet else 0  # as much as crop.py shifts the chips
    for part, chosen in rows.items():
        fitted = part != "valid"
        sources = image_sources(settings, data, "train", crop, place if fitted else None)
        images[part] = ImageDataset(sources, chosen, meta[chosen], target[chosen])
        if fitted:
            images[part].transform = dataset.train_transform(data.size, shift)
        if fitted and settings.guide is not None:
            path = settings.guide / "train_attention.npy"
            images[part].guide = dataset.Guide(path, len(table), data.size // models.CHIP)
    if data.test is not None:
        chosen = np.arange(len(data.test))[: settings.limit]
        sources = image_sources(settings, data, "test", crop)
        images["test"] = ImageDataset(sources, chosen, encoder.encode(tables["test"])[chosen])
    return images, encoder


def run_fold(
    k: int,
    settings: argparse.Namespace,
    data: util.Data,
    crop: dict | None,
    run_dir: Path,
    device: torch.device,
    team: Team,
    watch: Watch,
) -> None:
    """Train fold k, predict its held-out rows and the test images, and add them to the run."""
    images, encoder = make_datasets(k, settings, data, crop)
    if settings.loader == "device":
        images = {part: dataset.DeviceImages(some, device) for part, some in images.items()}
    torch.manual_seed(epoch_seed(settings.seed, k, 0))  # initial weights
    spec = make_spec(settings, data.size, encoder.dim)
    trainer = Trainer(settings, spec, fold_weights(settings, data, k), device, team, watch)
    last_path = run_dir / f"fold{k}_last.pt"
    if settings.resume and last_path.exists():
        trainer.load(last_path)
    extra = {"fold": k, "encoder": encoder.columns}
    fit(trainer, k, images, run_dir, extra)

    trainer.scored = models.load_checkpoint(run_dir / f"fold{k}_best.pt", device)[0]
    tables = {}
    for part in sorted(images.keys() - {"train", "gates"}):  # in one order in all processes
        prob, rows = trainer.predict(images[part], settings.tta), images[part].rows
        ids = (data.test if part == "test" else data.train)[ID].to_numpy()[rows]
        tables[part] = pd.DataFrame({ID: ids, FOLD: k, PROB: prob})
    if not team.leads:
        return
    tables["valid"].insert(2, TARGET, images["valid"].target)
    progress = trainer.progress
    facts = {
        "fold": k,
        "train_rows": len(images["train"]),
        "epochs": progress["epoch"],
        "best_epoch": progress["best_epoch"],
        "best_valid_auc": progress["best_auc"],
        "last_valid_auc": progress["auc"],
        "seconds": progress["seconds"],
    }
    with util.locked(run_dir):
        if settings.fsg:
            record_gates(run_dir, k, trainer, images["valid"])
        record_fold(run_dir, data, facts, tables["valid"], tables.get("test"))


def main(args: argparse.Namespace) -> Path:
    """Train the folds asked for; returns the run directory."""
    settings = fill_defaults(args)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    team, device = join_team(settings.device)
    data = util.read_data(settings.data_dir)
    folds = parse_folds(settings.fold, data.facts["n_folds"])
    arrays, crop = find_arrays(settings, data)
    meta_columns(settings, read_tables(settings, data)["train"])
    if settings.guide is not None:
        read_crop(settings.guide, data)
        util.open_maps(settings.guide / "train_attention.npy", len(data.train))
    if settings.crop_dir is not None:
        check_unseen(settings.crop_dir, data, folds)
    spec = make_spec(settings, data.size, meta_dim=0)
    for k in folds:  # fails here, before anything is written
        models.build_model(spec, fold_weights(settings, data, k))
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(settings).items()}
    config = {
        "args": plain,
        "spec": spec,
        "data": {"folds_sha256": util.folds_sha256(data.train), "arrays": arrays},
        "crop": crop,
        **util.provenance(),
    }
    opened = open_run(settings, config, folds) if team.leads else None
    run_dir, folds = from_leader(opened)
    together = Team() if len(folds) % team.size == 0 else team
    if together.size == 1:
        folds = folds[team.rank :: team.size]
    elif settings.fsg and settings.routing not in ("off", "single"):
        raise InputError(f"--routing {settings.routing} takes one process per fold; start as many "
                         "as there are folds, or one")  # fmt: skip
    with Watch(settings.max_hours) as watch:
        for k in folds:
            run_fold(k, settings, data, crop, run_dir, device, together, watch)
    if team.size > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    if team.leads:
        print(util.metrics_line(settings.name, util.read_metrics(run_dir)))
    return run_dir


def add_gate_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of Feature-Selection Gates."""
    gates, positive = parser.add_argument_group("gates"), util.number(float, 0)
    gates.add_argument("--fsg", action="store_true", help="Feature-Selection Gates in the backbone "
                       "[always in fsg_vit]")  # fmt: skip
    gates.add_argument("--gate_init", choices=("identity", "paper", "hard"), help="their start "
                       "[identity]; hard: hard-concrete gates, which can close")  # fmt: skip
    gates.add_argument("--gate_lr", type=positive, help="their learning rate [1e-3]")
    gates.add_argument("--gate_l1", type=positive, help="weight in the loss of the mean gate, or "
                       "of the share of hard gates that is open [0]")  # fmt: skip
    gates.add_argument("--routing", choices=fsg.MODES, help="how gates and weights are stepped "
                       "(fsg.py) [single]")  # fmt: skip


def add_extra_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of what goes beyond the original's recipe."""
    extra, positive = parser.add_argument_group("extras"), util.number(float, 0)
    share = util.number(float, 0, 1)
    extra.add_argument("--pos_weight", type=positive, default=1.0,
                       help="of positive images in the loss")  # fmt: skip
    extra.add_argument("--label_smoothing", type=share, default=0.0,
                       help="share of both labels in every target")  # fmt: skip
    extra.add_argument("--mixup", type=positive, default=0.0,
                       help="mix pairs of images by shares of Beta(MIXUP, MIXUP)")  # fmt: skip
    extra.add_argument("--clip_grad", type=positive, help="largest norm of the gradients of the "
                       "weights, and of the gates")  # fmt: skip
    extra.add_argument("--accumulate", type=util.number(int, 1), default=1, help="parts in which "
                       "a batch goes through the network, for less memory")  # fmt: skip
    extra.add_argument("--ema", type=share, help="score and keep a moving average of the weights "
                       "with this decay per step, such as .999")  # fmt: skip
    extra.add_argument("--layer_decay", type=share, help="factor on the learning rate of a ViT "
                       "from each layer to the one before, such as .75")  # fmt: skip


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of where and how a run is made."""
    run = parser.add_argument_group("run")
    run.add_argument("--name", help="of the run directory [the model's]")
    run.add_argument("--runs_dir", type=Path, default=Path("runs"), help="where runs are kept")
    run.add_argument("--tta", type=int, choices=(1, 2, 4, 8), default=8, help="views to average")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    run.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="precision")
    run.add_argument("--loader", choices=("workers", "device"), default="workers",
                     help="device: keep all images there and augment them there")  # fmt: skip
    run.add_argument("--workers", type=util.number(int, 0), default=min(os.cpu_count() or 1, 8),
                     help="loader processes")  # fmt: skip
    run.add_argument("--compile", nargs="?", const="default", choices=COMPILE_MODES,
                     help="torch.compile [default]; the other modes use CUDA graphs")  # fmt: skip
    run.add_argument("--deterministic", action="store_true", help="the same numbers in every run "
                     "on a GPU too, where that is slower")  # fmt: skip
    run.add_argument("--tensorboard", action="store_true", help="also log to RUN/tensorboard")
    run.add_argument("--max_hours", type=util.number(float, 0),
                     help="stop in good order after so long")  # fmt: skip
    run.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    run.add_argument("--overwrite", action="store_true", help="start the run anew, all its folds")


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__)
    count, positive = util.number(int, 1), util.number(float, 0)
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=sorted(models.MODELS), required=True, help="what to fit")
    model.add_argument("--backbone", help="torchvision name, timm:NAME, regnet_tiny or vit_tiny "
                       "[resnet50; vit_b_16 for fsg_vit]")  # fmt: skip
    model.add_argument(
        "--weights",
        default="imagenet",
        help="imagenet, none, a file, or a run: its network of the fold",
    )
    model.add_argument("--hidden", type=count, help="width of the metadata branch or attention "
                       "[256; chipnet 512]")  # fmt: skip
    model.add_argument("--dropout", type=util.number(float, 0, 1), default=0.7,
                       help="before the head, 0 to 1")  # fmt: skip
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", type=Path, default=Path("data"), help="from preprocess.py")
    data.add_argument("--crop_dir", type=Path, help="train on these crops of crop.py "
                      "[crops/saliency in --data_dir for cropnet and fusion]")  # fmt: skip
    data.add_argument("--jitter", action=argparse.BooleanOptionalAction, default=True,
                      help="move and scale the boxes while training on crops")  # fmt: skip
    data.add_argument("--meta_cols", nargs="*", help="metadata columns [sex, age and site; "
                      "with crops also box_side]")  # fmt: skip
    data.add_argument("--limit", type=count, help="use this many images per class: a dry run")
    fitting = parser.add_argument_group("optimisation")
    fitting.add_argument("--fold", nargs="+", default=["all"], help="held-out folds from 0, or all")
    fitting.add_argument("--epochs", type=count, default=20, help="at most")
    fitting.add_argument("--patience", type=count, default=3, help="epochs without a better AUC")
    fitting.add_argument("--batch_size", type=count, default=64, help="images per step")
    fitting.add_argument("--loss", choices=sorted(LOSSES), default="focal", help="focal: gamma 2")
    fitting.add_argument("--sampler", choices=("balanced", "shuffle"), default="balanced",
                         help="balanced draws both classes equally often")  # fmt: skip
    fitting.add_argument("--lr", type=positive, help="of the backbone [1e-5; chipnet 5e-5]")
    fitting.add_argument("--head_lr", type=positive, help="of the rest [5e-5; chipnet 1e-4]")
    fitting.add_argument("--schedule", choices=("exponential", "cosine"), default="exponential",
                         help="x 0.95 per epoch, or warm-up and cosine")  # fmt: skip
    fitting.add_argument("--seed", type=util.number(int, 0), default=0,
                         help="of weights and augmentation")  # fmt: skip
    fitting.add_argument("--guide", type=Path, help="crops of crop.py whose maps the attention of "
                         "chipnet should resemble")  # fmt: skip
    fitting.add_argument("--guide_weight", type=positive, default=1.0, help="of that likeness")
    add_extra_arguments(parser)
    add_gate_arguments(parser)
    add_run_arguments(parser)
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser(), models.ModelError)
