"""Train one model on the folds asked for; predict the held-out folds and the test images.

Reads   --data_dir (preprocess.py), for cropnet, fusion and streams also --crop_dir (crop.py)
Writes  runs/NAME/: config.json, for each fold fold{k}_best.pt, fold{k}_last.pt and its tables, and from all folds
        log.csv, oof.csv, test_predictions.csv, submission.csv, metrics.json, curves.png; with gates also gates.csv,
        prune.csv, fold{k}_gates.npy

    python train.py --model probe
    python train.py --model resnet --fold 0
    python train.py --model resnet --fsg --name resnet_fsg
    python train.py --model streams --streams rgb location depth --gates stages
    python train.py --model chipnet --fold all --weights none --backbone regnet_tiny --lr 1e-3
    torchrun --nproc_per_node=3 train.py --model resnet

Folds may be trained in several calls, also at the same time: a run collects them. Under torchrun every process trains
folds of its own if their number allows, otherwise all train each fold together, with a share of every batch.
"""

import argparse
import math
import os
import time
from argparse import BooleanOptionalAction
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import save_image
from tqdm import tqdm

import dataset
import fsg
import models
import probe
import util
from losses import NEED_CUTS, average_of, epoch_seed, guide_loss, loss_of, loss_of_prob, lr_factor, mix_and_smooth
from plumbing import gates, runs
from plumbing.backbones import read_torch_file
from plumbing.cells import Cells, make_cells
from plumbing.data import Data, MetaEncoder, read_data
from plumbing.distributed import Team
from plumbing.files import atomic, provenance, read_json, write_table
from plumbing.guards import check_inputs, fold_weights
from tasks import KINDS, Task, main_score, pick_rows, plain, prob_of
from util import FOLD, ID, InputError, Stopped

SCOUT_FLAGS = ("tile", "finetune", "top_m", "place", "witness")  # off unless given, for scouts alone
# of no use where nothing is trained
NOT_FOR_PROBES = ("mixup", "fsg", "guide", "layer_decay", "label_smoothing", "ema", "per_case", "meta_cols")
INPUTS = 8  # training images that are drawn as the network sees them
GATE_DEFAULTS = {"gate_init": "identity", "gate_lr": 1e-3, "gate_l1": 0.0, "routing": "single"}


# ---------------------------------------------------------------- one fold
@dataclass
class Progress:
    """Where the training of a fold stands after its last whole epoch."""

    epochs: int = 0
    best_epoch: int = 0
    last_score: float | None = None  # the main score of the held-out fold, negative if less of it is better
    best_score: float | None = None  # None while it is undefined: the first epoch is kept
    seconds: float = 0.0
    log: list[dict] = field(default_factory=list)  # a row per epoch
    gates: list[torch.Tensor] = field(default_factory=list)  # all gates after each epoch

    def note(self, row: dict, score: float) -> bool:
        """Add an epoch by its row of the log and its score; returns whether it is the best so far."""
        self.epochs, self.seconds = row["epoch"], self.seconds + row["seconds"]
        self.last_score = None if math.isnan(score) else score
        self.log.append(row)
        best = -math.inf if self.best_score is None else self.best_score
        if self.best_epoch == 0 or score > best:
            self.best_score, self.best_epoch = self.last_score, self.epochs
        return self.best_epoch == self.epochs


def train_fold(k: int, args: argparse.Namespace, data: Data, run_dir: Path, team: Team, deadline: float) -> None:
    """Fit a network on all folds but k, keep its best epoch, predict fold k and the test images."""
    images, encoder, task = dataset.make_images(data, k, args, models.recipe_of(args.model, args.streams))
    train, valid, device = images["train"], images["valid"], team.device
    torch.manual_seed(epoch_seed(args.seed, k, 0))  # initial weights
    spec, weight = make_spec(args, data, encoder.dim), torch.tensor(args.pos_weight, device=device)
    model = models.build_model(spec, fold_weights(args.weights, data, k)).to(device)
    model.ignore_meta((train.meta == 0).all(axis=0))  # columns that were never filled in training shift nothing
    average = average_of(model, args.ema)
    scored = model if average is None else average.module
    network = DistributedDataParallel(model) if team.size > 1 else model
    network = torch.compile(network, mode=args.compile) if args.compile else network
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    routing = make_routing(args, model, network, scaler)
    loader = dataset.TrainLoader(train, task.strata(data.target[train.rows]), data.case, args, team)
    valid_loader = dataset.eval_loader(valid, team.rows(len(valid)), args.batch_size, args.workers)
    parts = {"model": model, "average": average, "scaler": scaler}
    parts |= {"optimizer": routing.optimizer, "gate_optimizer": routing.gate_optimizer}
    last_path, best_path = run_dir / f"fold{k}_last.pt", run_dir / f"fold{k}_best.pt"
    progress = load_progress(last_path, parts) if args.resume and last_path.exists() else Progress()
    show_inputs(train, args.seed, run_dir / f"fold{k}_inputs.png", team)

    while progress.epochs < args.epochs and progress.epochs - progress.best_epoch < args.patience:
        epoch, started = progress.epochs + 1, time.monotonic()
        where, seed = f"fold {k} epoch {epoch}", epoch_seed(args.seed, k, epoch)
        routing.scale_lr(lr_factor(args.schedule, epoch, args.epochs))
        # ---- train one epoch
        train.choose(model, models.autocast(device, args.amp))
        model.train()
        losses, counts, before = [], [], None
        bar = tqdm(loader.epoch(seed), desc=where, leave=False, unit="batch", disable=None if team.leads else True)
        for step, (n_images, batches) in enumerate(bar):  # batches: the parts of this process, --accumulate of them
            torch.manual_seed(seed + step * team.size + team.rank)  # dropout and mixup

            def loss_of_part(batch: dataset.Batch) -> torch.Tensor:
                batch = mix_and_smooth(batch.to(device), args.mixup, args.label_smoothing, task.neutral)
                guided = batch.guide.numel() > 0
                with models.autocast(device, args.amp):
                    output = network(batch.image, batch.meta, **({"with_attention": True} if guided else {}))
                logit, attention = output if guided else (output, None)
                loss = loss_of(task, args.loss, logit, batch.goal, weight)
                if guided:
                    loss = loss + args.guide_weight * guide_loss(attention.float(), batch.guide)
                if args.gate_l1:
                    loss = loss + args.gate_l1 * fsg.gate_penalty(model)
                # gradients of parts add up, those of processes are averaged: together the mean over the whole batch
                return (batch.weight * loss).sum() * team.size / n_images  # noqa: B023

            losses.append(routing.step(loss_of_part, batches))  # backward, clip, step
            counts.append(n_images)
            if average is not None:
                average.update_parameters(model)
            check_finite(losses[-2:-1], before, run_dir, where)  # a step later, so that a GPU need not wait
            before = batches
        check_finite(losses[-1:], before, run_dir, where)
        train_loss = team.mean(sum(loss.item() * n for loss, n in zip(losses, counts, strict=True)) / sum(counts))
        rate = sum(counts) / (time.monotonic() - started)
        team.sync_buffers(*(part for part in (model, average) if part is not None))

        # ---- score the held-out fold
        prob = predict(scored, task, valid_loader, args, team)
        row = {FOLD: k, "epoch": epoch, "train_loss": train_loss}
        score = main_score(task, data.target[valid.rows], prob)
        row |= {"valid_loss": loss_of_prob(task, args.loss, prob, valid.goal)}
        row |= {f"valid_{task.metric}": task.metrics[task.metric].sign * score}
        row |= {"lr": routing.optimizer.param_groups[0]["lr"], "seconds": time.monotonic() - started}
        improved = progress.note(row | {"images_per_second": rate}, score)
        progress.gates += [gates.flat_gates(scored)] if args.fsg else []

        # ---- write; a stop after this loses nothing
        if team.leads:
            if improved:
                models.save_checkpoint(best_path, scored, spec, epoch=epoch, **about(k, data, encoder, task))
            save_progress(last_path, parts, progress, task.metric)
        if team.mean(time.monotonic() > deadline) > 0:
            raise Stopped(f"--max_hours {args.max_hours:g} are over after {where}; the same with --resume goes on")

    team.wait()  # the best epoch is on the disk
    finish_fold(k, args, data, run_dir, team, images, task, progress)


def fit_probe(k: int, args: argparse.Namespace, data: Data, run_dir: Path, team: Team, deadline: float) -> None:
    """Fit a linear head to frozen features of all folds but k; predict fold k and the test images."""
    started = time.monotonic()
    images, encoder, task = dataset.make_images(data, k, args, models.recipe_of(args.model, args.streams))
    spec, rows = make_spec(args, data), {part: each.rows for part, each in images.items()}
    torch.manual_seed(args.seed)  # random weights are the same in every fold
    model = models.build_model(spec, fold_weights(args.weights, data, k)).to(team.device)
    sources = {"train": images["valid"].sources} | ({"test": images["test"].sources} if "test" in images else {})
    whole = {split: dataset.ImageDataset(each, np.arange(n := len(data.tables()[split])), np.empty((n, 0)))
             for split, each in sources.items()}  # fmt: skip
    crops = args.crop_dir and read_json(args.crop_dir / "crop.json")["sha256"]
    key = [args.streams, data.facts["sha256"], crops]
    x = probe.make_features(model, data, whole, key, team.device, args.amp)
    target = data.target[rows["train"]]

    def loss(logit: np.ndarray, some: np.ndarray) -> float:
        return loss_of_prob(task, args.loss, prob_of(task, logit), task.goal(target[some]))

    group = data.group.to_numpy()[rows["train"]]
    weight, bias, strength = probe.fit_head(task, x["train"][rows["train"]], target, group, loss)
    prob = {part: prob_of(task, x["test" if part == "test" else "train"][each] @ weight.T + bias)
            for part, each in rows.items()}  # fmt: skip
    model.head[-1].load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    models.save_checkpoint(run_dir / f"fold{k}_best.pt", model, spec, epoch=1, **about(k, data, encoder, task))
    score, seconds = main_score(task, data.target[rows["valid"]], prob["valid"]), time.monotonic() - started
    row = {FOLD: k, "epoch": 1, "train_loss": loss_of_prob(task, args.loss, prob["train"], task.goal(target))}
    row |= {"valid_loss": loss_of_prob(task, args.loss, prob["valid"], images["valid"].goal)}
    row |= {f"valid_{task.metric}": task.metrics[task.metric].sign * score, "strength": strength, "seconds": seconds}
    write_table(run_dir / f"fold{k}_log.csv", pd.DataFrame([row]))
    facts = {"epochs": 1, "best_epoch": 1, "best_score": plain(score), "last_score": plain(score), "strength": strength}
    write_fold(run_dir, k, data, images, task, prob, facts | {"seconds": seconds})


def about(k: int, data: Data, encoder: MetaEncoder, task: Task) -> dict:
    """What a checkpoint says besides its network: the fold held out from it, its metadata, its task."""
    trained_on = {"folds_sha256": data.folds_sha256, "fold": k}
    return {"trained_on": trained_on, "encoder": encoder.columns, "task": task.facts()}


def write_fold(run_dir: Path, k: int, data: Data, images: dict, task: Task, prob: dict, facts: dict) -> None:
    """Write the predictions (N, K) of fold k's network for its held-out images, with their targets, and for the test
    images, if there are any; then the facts about it."""
    tables = {}
    for part, table, targets in (("valid", data.train, task.targets), ("test", data.test, [])):
        if part in images:
            rows = table.iloc[images[part].rows]
            tables[part] = pd.DataFrame({ID: rows[ID].to_numpy(), FOLD: k})
            tables[part][targets] = rows[targets].to_numpy()
            tables[part][task.columns] = prob[part]
    facts = facts | {"train_rows": len(images["train"])} | provenance()
    runs.write_fold(run_dir, k, facts, tables["valid"], tables.get("test"))


def predict(model: models.Network, task: Task, loader, args, team: Team, tta: int = 1) -> np.ndarray:
    """Predictions of a whole data set (N, K), of which every process loads and predicts its own rows."""
    loader.dataset.dataset.choose(model, models.autocast(team.device, args.amp))
    return team.gather(models.predict(model, task, loader, team.device, tta, args.amp), len(loader.dataset.dataset))


def show_inputs(train: dataset.ImageDataset, seed: int, path: Path, team: Team) -> None:
    """Draw some training images as the network sees them; a scout sees none. The leader does."""
    if not team.leads or isinstance(train.sources[0], Cells):
        return
    some = np.linspace(0, len(train) - 1, INPUTS).astype(int)
    images = torch.stack([train[i, 1.0, (seed, i)].image for i in some]).unflatten(1, (-1, 3))
    with atomic(path) as new:  # a column for each image, a row for each of its pictures
        save_image(images.transpose(0, 1).flatten(0, 1) / 255, new, nrow=INPUTS, padding=0, format="png")


def make_routing(args: argparse.Namespace, model, network, scaler) -> fsg.GradientRouting:
    """Adam for the weights and, unless --routing off, one for the gates; network: the model, perhaps wrapped."""
    adam = partial(torch.optim.Adam, fused=next(model.parameters()).device.type in ("cpu", "cuda"))
    optimizer, gate_optimizer = adam(model.param_groups(args.lr, args.head_lr, args.layer_decay)), None
    logits, mode = fsg.gate_parameters(model), args.routing if args.fsg else "off"
    if logits and mode == "off":
        optimizer.add_param_group({"params": logits, "lr": args.gate_lr})
    elif logits:
        gate_optimizer = adam(logits, lr=args.gate_lr)
    return fsg.GradientRouting(network, optimizer, gate_optimizer, mode, scaler, args.clip_grad, args.clip_grad)


def check_finite(losses: list[torch.Tensor], batches: list | None, run_dir: Path, where: str) -> None:
    """Keep the batches of a step and raise InputError if its loss is not finite."""
    if losses and not losses[0].isfinite():
        path = run_dir / "nonfinite_batch.pt"
        with atomic(path) as temporary:
            torch.save([tuple(batch) for batch in batches], temporary)
        raise InputError(f"{where}: the loss is {losses[0].item()}, see {path}; pass a lower --lr or --clip_grad")


def save_progress(path: Path, parts: dict, progress: Progress, metric: str) -> None:
    """Save all that training needs to go on, and the log of the epochs."""
    write_table(path.with_name(path.name.replace("_last.pt", "_log.csv")), pd.DataFrame(progress.log))
    state = {name: part.state_dict() for name, part in parts.items() if part is not None}
    models.save_plain(path, state=state, progress=asdict(progress))
    tqdm.write("fold {fold} epoch {epoch:2d}: train loss {train_loss:.4f}, held-out loss {valid_loss:.4f}, "
               "{metric} {score:.4f}, {images_per_second:.0f} images/s".format(
                   metric=metric, score=progress.log[-1][f"valid_{metric}"], **progress.log[-1]))  # fmt: skip


def load_progress(path: Path, parts: dict) -> Progress:
    """Put back what save_progress saved; raises InputError if it is of another version or network."""
    content = read_torch_file(path)
    try:
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(content["state"][name])
        return Progress(**content["progress"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path} cannot be resumed ({error}); pass --overwrite to start the run anew") from None


def finish_fold(k: int, args, data: Data, run_dir: Path, team: Team, images: dict, task: Task, progress) -> None:
    """Predict with the best epoch; write what a finished fold leaves: its gates, predictions, and last its facts."""
    model = models.load_checkpoint(run_dir / f"fold{k}_best.pt", team.device)[0]
    valid, prob = images["valid"], {}
    for part in sorted(images.keys() - {"train"}):  # in the same order in all processes
        loader = dataset.eval_loader(images[part], team.rows(len(images[part])), args.batch_size, args.workers)
        prob[part] = predict(model, task, loader, args, team, args.tta)
    if not team.leads:
        return
    if getattr(model, "boxes", 1) > 1:
        loader = dataset.eval_loader(valid, np.arange(len(valid)), args.batch_size, args.workers)
        weights = models.box_weights(model, loader, team.device, args.amp)
        table = pd.DataFrame(weights, data.train[ID].to_numpy()[valid.rows]).rename_axis(ID).melt(
            ignore_index=False, var_name="box", value_name="weight")  # fmt: skip
        write_table(run_dir / f"fold{k}_boxes.csv", table.reset_index().assign(**{FOLD: k}))
    if args.fsg:
        target = data.target[valid.rows]
        some = pick_rows(task.strata(target), np.arange(len(valid)), gates.PRUNE_ROWS)
        loader = dataset.eval_loader(valid, some, args.batch_size, workers=0)
        prob_of = partial(models.predict, task=task, loader=loader, device=team.device, amp=args.amp)
        gates.record_gates(run_dir, k, model, progress.gates, prob_of, partial(main_score, task, target[some]))
    facts = {key: value for key, value in asdict(progress).items() if key not in ("log", "gates")}
    write_fold(run_dir, k, data, images, task, prob, facts)


# ---------------------------------------------------------------- inputs
def fill_defaults(args: argparse.Namespace, task: Task) -> argparse.Namespace:
    """A copy of the arguments in which what depends on model and task is filled in; InputError if they contradict."""
    args = argparse.Namespace(**vars(args))
    if models.MODELS[args.model].network is models.Streams:
        args.streams = list(dict.fromkeys(args.streams or ["rgb", "location"]))
    elif args.share_backbone or (args.streams and args.model != "probe"):
        raise InputError(f"--streams and --share_backbone are for --model streams; leave them out for {args.model}")
    recipe = models.recipe_of(args.model, args.streams)
    for key in ("backbone", "lr", "head_lr", "hidden", "dropout", "batch_size", "patience"):
        if getattr(args, key) is None:
            setattr(args, key, getattr(recipe, key))
    if args.crop_dir is None and set(recipe.inputs) & {"crop", "location", "depth"}:
        args.crop_dir = args.data_dir / "crops" / "chipnet"
    args.name, args.fsg = args.name or args.model, args.fsg or ("branches" if recipe.gated else None)
    if args.workers is None:  # features are sent between processes more slowly than they are read (on two CPU cores)
        args.workers = 0 if recipe.scouts and not args.finetune else min(util.CPUS, 8)
    if recipe.scouts:
        given = [key for key in ("mixup", "fsg", "guide", "crop_dir", "layer_decay") if getattr(args, key)]
        given += ["tta"] if (args.tta or 1) > 1 else []
        given += ["weights RUN"] if Path(args.weights).is_dir() else []  # another backbone in every fold
        if given:
            raise InputError(f"--{given[0]} changes pictures or backbone, which a scout has seen before; leave it out")
    elif given := [key for key in SCOUT_FLAGS if getattr(args, key)]:
        raise InputError(f"--{given[0]} is for scouts; leave it out for {args.model}")
    args.jitter = args.jitter and "depth" not in recipe.inputs  # depth maps are of the boxes themselves
    if args.model == "probe":
        given = [key for key in NOT_FOR_PROBES if getattr(args, key)] + ["pos_weight"] * (args.pos_weight != [1.0])
        if given:
            raise InputError(f"--{given[0]} is for what is trained; a probe is fitted to frozen features: leave it out")
        args.jitter, args.meta_cols, args.tta = False, [], 1
        args.loss = args.loss or {"OF_LABELS": "bce", "OF_CLASSES": "ce", "OF_QUANTITIES": "mse"}[task.family]
    args.tta = args.tta or (1 if recipe.scouts else dataset.AUGMENTATIONS[args.augment].views)
    args.loss = args.loss or next(iter(task.losses()))
    if args.loss not in task.losses():
        raise InputError(f"--loss {args.loss} is not for {task.kind} targets; pass {', '.join(task.losses())}")
    if args.loss in NEED_CUTS and not task.cuts:
        raise InputError(f"--loss {args.loss} needs classes of the quantity; pass preprocess.py --cut")
    weighed = task.band_names if task.cuts else task.names
    if len(args.pos_weight) not in (1, len(weighed)):
        raise InputError(f"--pos_weight has {len(args.pos_weight)} values; pass one, or {len(weighed)}: of "
                         f"{', '.join(weighed)[:200]}")  # fmt: skip
    if args.guide is not None and not hasattr(recipe.network, "attention"):
        raise InputError(f"--guide is for networks with an attention such as chipnet; leave it out for {args.model}")
    for key, default in GATE_DEFAULTS.items():
        if getattr(args, key) is not None and not args.fsg:
            raise InputError(f"--{key} is for gates; {args.model} has some with --fsg")
        if getattr(args, key) is None and args.fsg:
            setattr(args, key, default)
    return args


def parse_folds(words: list[str], n_folds: int) -> list[int]:
    """Folds named on the command line: numbers from 0, or "all"."""
    known = [str(k) for k in range(n_folds)]
    for word in (word for word in words if words != ["all"] and word not in known):
        raise InputError(f"--fold {word}: this data has folds {' '.join(known)}; name some of them, or all")
    return sorted(range(n_folds) if words == ["all"] else {int(word) for word in words})


def make_spec(args: argparse.Namespace, data: Data, meta_dim: int = 0) -> models.Spec:
    """What models.build_model needs to rebuild the network. Raises InputError if it cannot take so many crops."""
    boxes = 1 if args.crop_dir is None else read_json(args.crop_dir / "crop.json").get("n_boxes", 1)
    if boxes > 1 and (models.MODELS[args.model].network is not models.MetaResNet or args.model == "probe"):
        raise InputError(f"{args.crop_dir} has {boxes} boxes of an image, {args.model} takes one; pass other crops")
    sizes = {"image_size": data.size, "meta_dim": meta_dim, "outputs": len(data.task.names)}
    parts = {"hidden": args.hidden, "dropout": args.dropout, "gates": args.gate_init, "boxes": boxes}
    parts |= {key: getattr(args, key) for key in ("scout_size", *SCOUT_FLAGS, "heads", "share_backbone")}
    parts |= {"strides": tuple(args.stride), "streams": tuple(args.streams), "sites": args.fsg or models.Spec.sites}
    return models.Spec(args.model, args.backbone, **sizes, **parts)


def main(args: argparse.Namespace) -> Path:
    """Train the folds asked for; returns the run directory."""
    deadline = time.monotonic() + (math.inf if args.max_hours is None else 3600 * args.max_hours)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    team, data = Team.join(args.device), read_data(args.data_dir)
    args = fill_defaults(args, data.task)
    if args.per_case is not None and data.case is None:
        raise InputError("--per_case needs cases with several images; name their column with preprocess.py --case_col")
    run_dir = args.runs_dir / args.name
    folds = parse_folds(args.fold, data.facts["n_folds"])
    inputs, crop = check_inputs(args, data, folds, models.MODELS[args.model].network.uses_meta)
    network = models.build_model(make_spec(args, data), fold_weights(args.weights, data, folds[0]))  # fails early
    paths = {key: str(value.resolve()) for key, value in vars(args).items() if isinstance(value, Path)}
    config = {"args": vars(args) | paths, "inputs": inputs, "crop": crop, "task": data.task.facts()}
    config |= {key: data.facts[key] for key in ("exact", "frame")}
    config["views"] = dataset.AUGMENTATIONS[args.augment].views  # symmetries of the pictures
    opened = runs.open_run(run_dir, config | provenance(), folds, args.resume, args.overwrite) if team.leads else None
    folds = team.from_leader(opened)
    if models.MODELS[args.model].scouts:
        data.cells = make_cells(network.to(team.device), data, util.CPUS) if team.leads else {}
        team.wait()
        data.cells = data.cells or make_cells(network, data, util.CPUS)
    # folds side by side if every process gets as many, else all processes together on one fold after the other
    together = Team(team.device) if len(folds) % team.size == 0 else team
    if together.size == 1:
        folds = folds[team.rank :: team.size]
    elif args.fsg and args.routing not in ("off", "single"):
        raise InputError(f"--routing {args.routing} takes one process per fold; start one for each fold, or one")
    if args.model == "probe" and team.size > 1:
        raise InputError("a probe takes one process; start it without torchrun")
    fit = fit_probe if args.model == "probe" else train_fold
    for k in folds:
        fit(k, args, data, run_dir, together, deadline)
        if together.leads and k != folds[-1]:  # the last one is collected below
            runs.collect(run_dir, data)
    team.leave()
    if team.leads:
        metrics = runs.collect(run_dir, data)
        print(runs.score_line(args.name, metrics), *runs.band_lines(metrics), sep="\n")
        other = runs.find_probe(args.runs_dir, data.folds_sha256)
        if other is not None and args.model != "probe":
            print(runs.score_line(other.name, other.metrics))
    return run_dir


# ---------------------------------------------------------------- command line
def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser, count, positive, share = util.new_parser(__doc__), util.COUNT, util.POSITIVE, util.SHARE
    model = parser.add_argument_group("model").add_argument
    model("--model", choices=sorted(models.MODELS), required=True, help="what to fit")
    model("--backbone", help="torchvision name, timm:NAME, regnet_tiny, vit_tiny [resnet50; vit_b_16 for fsg_vit]")
    model("--weights", default="imagenet", help="imagenet, none, a file, or a run: its network of the fold")
    model("--hidden", type=count, help="width of the metadata branch or attention [256; chipnet 512, scout 128]")
    model("--share_backbone", action="store_true", help="of streams: one backbone for all")
    model("--dropout", type=share, help="before the head, 0 to 1 [0.7; scout 0.2]")
    data = parser.add_argument_group("data").add_argument
    data("--data_dir", **util.COMMON_FLAGS["data_dir"])
    data("--crop_dir", type=Path, help="train on these crops [cropnet, fusion, streams: crops/chipnet in data_dir]")
    data("--streams", nargs="+", choices=tuple(models.STREAMS), default=[],
         help="of --model streams: pictures that it sees [rgb location]")
    data("--augment", choices=tuple(dataset.AUGMENTATIONS), default="skin",
         help="skin: hair, any turn, mirrored, tint; square: quarter turns, mirrored, tint; upright: few degrees, tint")
    data("--jitter", action=BooleanOptionalAction, default=True, help="move boxes in training; not with depth")
    data("--meta_cols", nargs="*", help="metadata columns [sex, age and site; with crops also box_side]")
    data("--scout_size", type=count, default=models.Spec.scout_size,
         help="of a scout: longest side of what it sees, in pixels")
    data("--stride", type=int, nargs="+", choices=(8, 16, 32), default=list(models.Spec.strides),
         help="of a scout: of its feature maps")
    data("--tile", type=util.number(int, 0), default=0, help="of a scout: side in pixels of tiles to read instead")
    data("--limit", type=count, help="use this many images per class: a dry run")
    fit = parser.add_argument_group("optimisation").add_argument
    fit("--fold", nargs="+", default=["all"], help="held-out folds from 0, or all")
    fit("--epochs", type=count, default=20, help="at most")
    fit("--patience", type=count, help="epochs without a better main score [3; scout 8]")
    fit("--batch_size", type=count, help="images per step [64; scout 4]")
    losses = dict.fromkeys(loss for kind in KINDS.values() for loss in kind.losses())
    fit("--loss", choices=tuple(losses), help="focal has gamma 2 [focal; of a quantity smooth_l1]")
    fit("--sampler", choices=("balanced", "shuffle"), default="balanced", help="balanced: all classes equally often")
    fit("--per_case", type=count, help="images of a case, such as a lesion, in an epoch, drawn anew each time [all]")
    fit("--lr", type=positive, help="of the backbone [1e-5; chipnet 5e-5]")
    fit("--head_lr", type=positive, help="of the rest [5e-5; chipnet 1e-4, scout 1e-3]")
    fit("--schedule", choices=("exponential", "cosine"), default="exponential", help="x .95 per epoch; or with warm-up")
    fit("--seed", type=util.number(int, 0), default=0, help="of weights and augmentation")
    fit("--guide", type=Path, help="crops of crop.py --source saliency whose maps the attention should resemble")
    fit("--guide_weight", type=positive, default=1.0, help="of that likeness")
    extra = parser.add_argument_group("extras").add_argument
    extra("--heads", type=count, default=1, help="of a scout: of its attention")
    extra("--place", action="store_true", help="of a scout: its attention may depend on where a cell lies")
    extra("--witness", action="store_true", help="of a scout: single cells answer too, and draw its attention")
    extra("--finetune", choices=("last", "all"), help="of a scout with --tile: stages of its backbone to train")
    extra("--top_m", type=util.number(int, 0), default=0, help="of a scout: tiles of a picture to train on [all]")
    extra("--pos_weight", type=positive, nargs="+", default=[1.0], help="of positives in the loss, or of each class, "
          "of a quantity between its cuts")
    extra("--label_smoothing", type=share, default=0.0, help="share of all labels in every target")
    extra("--mixup", type=positive, default=0.0, help="mix pairs of a batch, or of its parts, by Beta(MIXUP, MIXUP)")
    extra("--clip_grad", type=positive, help="largest norm of the gradients of the weights, and of the gates")
    extra("--accumulate", type=count, default=1, help="parts in which a batch is forwarded, for less memory")
    extra("--ema", type=share, help="score and keep a moving average of the weights, such as .999 per step")
    extra("--layer_decay", type=share, help="factor on a ViT's learning rate from layer to layer, such as .75")
    gate = parser.add_argument_group("gates").add_argument
    gate("--fsg", "--gates", dest="fsg", nargs="?", const="branches", choices=("branches", "stages"),
         help="Feature-Selection Gates: on residual branches [always in fsg_vit], or on the outputs of stages, and of "
         "streams on the fused and the hidden vector")
    gate("--gate_init", choices=("identity", "paper", "hard"), help="start [identity]; hard gates can close")
    gate("--gate_lr", type=positive, help="their learning rate [1e-3]")
    gate("--gate_l1", type=positive, help="weight in the loss of the mean gate, or of the open share of hard ones [0]")
    gate("--routing", choices=fsg.MODES[:-1], help="how gates and weights are stepped (fsg.py) [single]")
    run = parser.add_argument_group("run").add_argument
    run("--name", help="of the run directory [the model's]")
    run("--runs_dir", **util.COMMON_FLAGS["runs_dir"])
    run("--tta", type=int, choices=(1, 2, 4, 8), help="symmetries to average [8; with --augment upright 1]")
    run("--device", **util.COMMON_FLAGS["device"])
    run("--amp", **util.COMMON_FLAGS["amp"])
    run("--workers", type=util.number(int, 0), help="loader processes [a CPU each, up to 8; 0 for a scout's features]")
    modes = ("default", "reduce-overhead", "max-autotune")
    run("--compile", nargs="?", const="default", choices=modes, help="torch.compile [default]; others use CUDA graphs")
    run("--deterministic", action="store_true", help="the same numbers in every run on a GPU too; may be slower")
    run("--max_hours", type=positive, help="stop after the epoch in which so many hours are over")
    run("--resume", action="store_true", help="go on with an interrupted run")
    run("--overwrite", action="store_true", help="start the run anew, all its folds")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
