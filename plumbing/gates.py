"""What training leaves about Feature-Selection Gates: their course, their sparsity, and what closing them costs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

import fsg
from plumbing.figures import new_figure
from plumbing.files import atomic, write_table
from util import FOLD

PRUNE_SHARES = (0.25, 0.5, 0.75, 0.9)  # of the gates closed, for the prune curve
PRUNE_ROWS = 128  # held-out images per class that it is measured on


def flat_gates(model: nn.Module) -> torch.Tensor:
    """All gates relative to their start, one after the other (G,)."""
    return torch.cat([gate.float().cpu() for gate in fsg.gate_values(model, relative=True).values()])


def prune_curve(predict: Callable, model: nn.Module, judge: Callable) -> list[tuple[str, float, float]]:
    """Score with shares of the gates closed, lowest first: (ranking, share, score). predict: model -> predictions of
    some images; judge: predictions -> score. Rankings: the gates, what they contribute on these
    images, and chance. The model is left as it is."""
    gates, generator = fsg.gate_values(model), torch.Generator().manual_seed(0)
    rankings = {
        "gate": gates,
        "contribution": fsg.gate_contributions(model, lambda: predict(model)),
        "chance": {name: torch.rand(len(g), generator=generator) for name, g in gates.items()},
    }
    whole = judge(predict(model))
    curve = [(ranking, 0.0, whole) for ranking in rankings]
    for ranking, scores in rankings.items():
        for share in PRUNE_SHARES:
            with fsg.pruned(model, share, scores):
                curve.append((ranking, share, judge(predict(model))))
    return curve


def record_gates(
    run_dir: Path, fold: int, model: nn.Module, history: list[torch.Tensor], predict: Callable, judge: Callable
) -> None:
    """Write a fold's gates: fold{k}_gates.npy (epochs, gates), their sparsity by branch and epoch, prune curve.
    history: flat_gates of every epoch; predict, judge: of held-out images, as in prune_curve."""
    names = {name: len(gate) for name, gate in fsg.gate_values(model).items()}
    rows = []
    for epoch, gates in enumerate(history, 1):
        parts = {"all": gates} | dict(zip(names, gates.split(list(names.values())), strict=True))
        for name, gate in parts.items():
            place = {FOLD: fold, "epoch": epoch, "branch": name, "channels": len(gate)}
            rows.append(place | fsg.gate_statistics(gate))
    write_table(run_dir / f"fold{fold}_gates.csv", pd.DataFrame(rows))
    with atomic(run_dir / f"fold{fold}_gates.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, torch.stack(history).numpy())
    curve = pd.DataFrame(prune_curve(predict, model, judge), columns=["ranking", "share", "score"])
    curve.insert(0, FOLD, fold)
    write_table(run_dir / f"fold{fold}_prune.csv", curve)


def draw_gates(model: nn.Module, curve: pd.DataFrame):
    """Picture of gates relative to their start as layer x channel, and the prune curve."""
    gates = list(fsg.gate_values(model, relative=True).values())
    grid = np.full((len(gates), max(len(gate) for gate in gates)), np.nan)
    for row, gate in zip(grid, gates, strict=True):
        row[: len(gate)] = gate.cpu().numpy()
    figure = new_figure(figsize=(12, 4))
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    picture = left.imshow(grid, aspect="auto", cmap="RdBu", vmin=0, vmax=2, interpolation="nearest")
    figure.colorbar(picture, ax=left, label="gate / start")
    left.set(xlabel="channel", ylabel="branch", title="Gates of the best epoch")
    for ranking, rows in curve.groupby("ranking", sort=False):
        right.plot(rows["share"], rows["score"], marker="o", label=f"by {ranking}")
    right.set(xlabel="share of gates closed, lowest first", ylabel="score, held-out images", title="Prune curve")
    right.legend()
    return figure
