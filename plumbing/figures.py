"""Pictures of runs and crops, as PNG files that need no screen."""

from pathlib import Path

import numpy as np
import pandas as pd

from plumbing.files import atomic
from plumbing.images import Frame, frame_of
from scores import auc, known_labels
from tasks import Task
from util import FOLD


def new_figure(**options):
    """A matplotlib figure that needs no screen."""
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def save_figure(path: Path, figure) -> None:
    """Save a figure as PNG."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def plot_predictions(run_dir: Path, task: Task, oof: pd.DataFrame) -> None:
    """Held-out predictions: roc.png with a curve per fold, or per label or class; of a quantity scatter.png."""
    figure = new_figure(figsize=(5, 5))
    axes = figure.subplots()
    target, prob = oof[task.targets].to_numpy(float), oof[task.columns].to_numpy(float)
    if not task.probabilistic:
        for fold in sorted(set(oof[FOLD])):
            axes.scatter(target[oof[FOLD] == fold], prob[oof[FOLD] == fold], s=6, label=f"fold {fold}")
        ends = np.nanquantile(target, [0, 1]) if np.isfinite(target).any() else (0, 1)
        axes.set(xlabel="target", ylabel="prediction", title="Held-out folds")
    else:
        folds = sorted(set(oof[FOLD])) if len(task.columns) == 1 else []
        parts = {f"fold {fold}": (oof[FOLD] == fold, 0) for fold in folds} or {
            name: (np.ones(len(oof), bool), column) for column, name in enumerate(task.names)
        }
        for name, (rows, column) in parts.items():
            found = {place: pair for place, _, *pair in known_labels(target[rows], prob[rows])}
            if column in found:
                draw_roc(axes, name, *found[column])
        ends = 0, 1
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", title="Held-out folds")
    axes.plot(ends, ends, color="0.7", linewidth=1)
    axes.legend(loc="lower right", fontsize=8)
    save_figure(run_dir / ("roc.png" if task.probabilistic else "scatter.png"), figure)


def draw_roc(axes, name: str, target: np.ndarray, prob: np.ndarray) -> None:
    """Draw one ROC curve."""
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(target, prob)
    axes.plot(fpr, tpr, label=f"{name}: AUC {auc(target, prob):.3f}")


def plot_curves(path: Path, log: pd.DataFrame, metric: str) -> None:
    """Training loss, held-out loss and held-out score of every fold over the epochs. The losses have axes of their own:
    the sampler, smoothing and penalties of training make them incomparable."""
    figure = new_figure(figsize=(12, 3.6))
    columns = {"train_loss": "training loss", "valid_loss": "held-out loss", f"valid_{metric}": f"held-out {metric}"}
    for axes, (column, label) in zip(figure.subplots(1, 3), columns.items(), strict=True):
        for fold, rows in log.groupby(FOLD):
            axes.plot(rows["epoch"], rows[column], color=f"C{fold}", label=f"fold {fold}")
        axes.set(xlabel="epoch", ylabel=label)
        axes.legend()
    save_figure(path, figure)


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
    axes[2].set_axis_off()
    if crop is not None:
        axes[2].imshow(crop)
