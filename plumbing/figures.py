"""Pictures of runs and crops, as PNG files that need no screen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from plumbing.files import atomic
from plumbing.images import Frame, frame_of
from scores import known_labels
from tasks import Task
from util import FOLD

MOST_VALUES = 24  # boxes of a box plot
COURSES = 8  # cases whose errors are drawn frame by frame


def new_figure(**options):
    """A matplotlib figure that needs no screen."""
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def save_figure(path: Path, figure) -> None:
    """Save a figure as PNG, with the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def draw_predictions(task: Task, oof: pd.DataFrame):
    """Held-out predictions: a ROC curve per fold, or per label or class; of a quantity predicted against true."""
    from sklearn.metrics import RocCurveDisplay

    figure = new_figure(figsize=(5, 5))
    axes = figure.subplots()
    target, prob = oof[task.targets].to_numpy(float), oof[task.columns].to_numpy(float)
    if not task.probabilistic:
        for fold in sorted(set(oof[FOLD])):
            axes.scatter(target[oof[FOLD] == fold], prob[oof[FOLD] == fold], s=6, label=f"fold {fold}")
        ends = np.nanquantile(target, [0, 1]) if np.isfinite(target).any() else (0, 1)
        for cut in task.cuts:
            axes.axhline(cut, color="0.7", linewidth=1, linestyle=":")
            axes.axvline(cut, color="0.7", linewidth=1, linestyle=":")
        axes.set(xlabel="target", ylabel="prediction", title="Held-out folds")
    else:
        folds = sorted(set(oof[FOLD])) if len(task.columns) == 1 else []
        parts = {f"fold {fold}": (oof[FOLD] == fold, 0) for fold in folds} or {
            name: (np.ones(len(oof), bool), column) for column, name in enumerate(task.names)
        }
        for name, (rows, column) in parts.items():
            found = {place: pair for place, _, *pair in known_labels(target[rows], prob[rows])}
            if column in found:
                RocCurveDisplay.from_predictions(*found[column], name=name, ax=axes)
        ends = 0, 1
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", title="Held-out folds")
    axes.plot(ends, ends, color="0.7", linewidth=1)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=8)
    return figure


def draw_precision(task: Task, target: np.ndarray, prob: np.ndarray):
    """Precision by recall of every label or class, with their share of positives."""
    from sklearn.metrics import PrecisionRecallDisplay

    figure = new_figure(figsize=(5, 5))
    axes = figure.subplots()
    for i, (column, _, label, values) in enumerate(known_labels(target, prob)):
        PrecisionRecallDisplay.from_predictions(label, values, name=task.names[column], ax=axes)
        axes.axhline(label.mean(), color=f"C{i}", linewidth=1, linestyle=":")
    axes.set(xlabel="sensitivity (recall)", ylabel="precision", ylim=(0, 1), title="Dotted: share of positives")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", fontsize=8)
    return figure


def draw_confusion(names: Sequence[str], counts: np.ndarray):
    """Shares of every true class that are taken for each, with their counts (scores.confusion)."""
    n, side = len(names), max(4, 0.6 * len(names) + 2)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = new_figure(figsize=(side, side))
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, count, ha="center", va="center", color="white" if share[row, column] > 0.5 else "black")
    axes.set(xticks=range(n), yticks=range(n), xlabel="taken for", ylabel="true")
    axes.set_xticklabels(names, rotation=90)
    axes.set_yticklabels(names)
    return figure


def draw_by_value(task: Task, target: np.ndarray, value: np.ndarray):
    """Box plots of predictions (n,) by the true quantity (n,): by its values, or if there are many by ranges."""
    known = ~np.isnan(target)
    target, value = pd.Series(target[known]), pd.Series(value[known])
    by = target if target.nunique() <= MOST_VALUES else pd.qcut(target, MOST_VALUES, duplicates="drop")
    parts = dict(tuple(value.groupby(by, observed=True)))
    labels = [f"{key:g}" if isinstance(key, float) else f"{key.mid:.3g}" for key in parts]
    labels = [f"{label}\n{len(part)}" for label, part in zip(labels, parts.values(), strict=True)]
    figure = new_figure(figsize=(max(5, 0.45 * len(parts)), 5))
    axes = figure.subplots()
    axes.boxplot(list(parts.values()), flierprops={"markersize": 2})
    axes.set_xticklabels(labels, fontsize=8)
    axes.plot(range(1, len(parts) + 1), [target[by == key].mean() for key in parts], color="C1", label="true")
    for cut in task.cuts:
        axes.axhline(cut, color="0.7", linewidth=1, linestyle=":")
    axes.set(xlabel="target, and images", ylabel="prediction")
    axes.legend(fontsize=8)
    return figure


def draw_courses(task: Task, table: pd.DataFrame):
    """Error over the images of the cases that have most of them; table: case, place (number of the frame), error."""
    names = table["case"].value_counts().index[:COURSES]
    figure = new_figure(figsize=(10, 1.5 * len(names)))
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        rows = table[table["case"] == name].sort_values("place", kind="stable")
        axes.plot(rows["place"], rows["error"], marker=".", linewidth=1)
        axes.axhline(0, color="0.7", linewidth=1)
        axes.set_title(f"{name}, {task.names[0]} {rows['target'].iloc[0]:g}", fontsize=8)
        axes.set_ylabel("error", fontsize=8)
    return figure


def draw_reliability(task: Task, target: np.ndarray, before: np.ndarray, after: np.ndarray):
    """Share of positives by predicted probability (N, K), as predicted and calibrated, all labels or classes together;
    the calibration has seen these rows."""
    from sklearn.calibration import calibration_curve

    figure = new_figure(figsize=(5, 5))
    axes = figure.subplots()
    for name, prob in (("as predicted", before), ("calibrated", after)):
        pairs = [pair for _, _, *pair in known_labels(target, prob)]
        if not pairs:
            continue
        label, value = (np.concatenate(part) for part in zip(*pairs, strict=True))
        share, mean = calibration_curve(label, value.clip(0, 1), n_bins=10)  # means may be rounded to above 1
        axes.plot(mean, share, marker="o", label=name)
    axes.plot((0, 1), (0, 1), color="0.7", linewidth=1)
    axes.set(xlabel="predicted probability", ylabel="share of positives")
    axes.legend(loc="upper left", fontsize=8)
    return figure


def draw_curves(log: pd.DataFrame, metric: str):
    """Training loss, held-out loss and held-out score of every fold over the epochs. The losses have axes of their own:
    the sampler, smoothing and penalties of training make them incomparable."""
    figure = new_figure(figsize=(12, 3.6))
    columns = {"train_loss": "training loss", "valid_loss": "held-out loss", f"valid_{metric}": f"held-out {metric}"}
    for axes, (column, label) in zip(figure.subplots(1, 3), columns.items(), strict=True):
        for fold, rows in log.groupby(FOLD):
            axes.plot(rows["epoch"], rows[column], color=f"C{fold}", label=f"fold {fold}")
        axes.set(xlabel="epoch", ylabel=label)
        axes.legend()
    return figure


def draw_picture(axis, image: np.ndarray, size: tuple[int, int], boxes=(), attention=None, view=None) -> None:
    """Draw a picture (H, W, 3) of an original of `size` (width, height), over it a map (h, w) of its part `view`
    (x0, y0, x1, y1), and boxes (of localize.Box)."""
    height, width = image.shape[:2]
    axis.set_axis_off()
    axis.imshow(image)
    if attention is not None:
        left, top, right, bottom = (edge * width / size[0] for edge in view)
        axis.imshow(attention, cmap="inferno", alpha=0.6, extent=(left, right, bottom, top), interpolation="bilinear")
    for box in boxes:
        x0, y0, x1, y1 = (edge * width / size[0] for edge in box.corners)
        axis.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="lime", linewidth=1.5, clip_on=False)
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))  # neither box nor map may widen the frame


def draw_row(axes, image: np.ndarray, size: tuple[int, int], boxes, attention, crop, frame: Frame = "square") -> None:
    """Draw one image on three axes: with its boxes, its attention, and the crop; boxes, attention and crop may be None.
    image and boxes as of draw_picture; attention (h, w) covers what frame_of says."""
    draw_picture(axes[0], image, size, boxes or ())
    draw_picture(axes[1], image, size, attention=attention, view=frame_of(*size, frame))
    for axis in axes[2:]:
        axis.set_axis_off()
    if crop is not None:
        axes[2].imshow(crop)
