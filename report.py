"""One page that shows a run or a blend: what it is worth, where it fails, and whether its files hold what they claim.

Reads   runs/NAME/ (train.py or ensemble.py), and the data and crops that it was trained on
Writes  runs/NAME/report.html: one file, pictures inside, nothing loaded from elsewhere; runs/NAME/model_card.md, if all
        checks hold

    python report.py runs/resnet
    python report.py runs/ensemble --data_dir data

All scores are of held-out predictions, with 95 % intervals over groups. The page ends with checks of the run and of the
members of a blend, which are printed too: files are those that were hashed, every held-out row is there once, scores
follow from predictions, and a sample of the rows is predicted again from the checkpoints. If one fails the page says so
and the exit status is 2.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from html import escape
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import dataset
import models
import util
from calibration import calibrated
from localize import GRID, blank_meta, upsample
from maps import WAYS, default_way
from plumbing import html
from plumbing.arrays import array_path, open_array
from plumbing.card import fill_card
from plumbing.cells import make_cells
from plumbing.data import CORNERS, Data, best_boxes, read_data
from plumbing.distributed import pick_device
from plumbing.figures import (
    draw_by_value,
    draw_confusion,
    draw_courses,
    draw_curves,
    draw_precision,
    draw_predictions,
    draw_reliability,
)
from plumbing.files import atomic, check_hashes, read_json, remove
from plumbing.gates import draw_gates
from plumbing.images import frame_of
from plumbing.runs import STACK, Run, find_probe, read_run, score_line
from scores import bootstrap_weights, confusion, interval, rank_in_fold
from tasks import score_folds, task_of
from util import BOX_SIDE, FOLD, ID, InputError

SAMPLE = 16  # held-out rows of each fold that are predicted again
TOLERANCE = 1e-3  # of probabilities: batches of another size round otherwise
SAMPLES = 300  # bootstrap samples of a subgroup
MOST_VALUES = 12  # of a metadata column whose values are subgroups; numbers with more are cut into BANDS
BANDS, FEWEST_ROWS = 4, 20  # of numbers; rows of a subgroup that is shown
SHOWN, THUMB = 20, 112  # pictures of a kind, and their side in pixels
OWN_KINDS = 6  # classes up to which each has worst errors of its own


@dataclass
class Subject:
    """A run, its data, and its held-out predictions by row."""

    run: Run
    data: Data
    device: torch.device

    def __post_init__(self):
        oof = self.run.table("oof.csv")
        self.task, self.metrics, self.oof = self.run.task, self.run.metrics, oof
        self.rows = pd.Series(np.arange(len(self.data.train)), index=self.data.train[ID])[oof[ID]].to_numpy()
        self.table = self.data.train.iloc[self.rows].reset_index(drop=True)
        self.target, self.prob = oof[self.task.targets].to_numpy(float), oof[self.task.columns].to_numpy(float)
        self.fold, self.group = oof[FOLD].to_numpy(), self.data.group[oof[ID]].to_numpy()
        fit = self.metrics["calibration"]
        self.sure = calibrated(self.task, self.prob, fit) if fit else self.prob  # predictions as probabilities

    @cached_property
    def crop_dir(self) -> Path | None:
        """Crops that the run, or the first member that has some, was trained on, if they are still there."""
        runs = [self.run] if not self.run.is_blend else [member for member, _ in self.run.members()]
        folders = [Path(run.config["args"]["crop_dir"]) for run in runs if run.config.get("crop")]
        return next((folder for folder in folders if (folder / "crop.json").exists()), None)

    @cached_property
    def pictures(self) -> "Pictures":
        """Thumbnails of the rows."""
        return Pictures(self)

    @cached_property
    def boxes(self) -> pd.DataFrame | None:
        """Best boxes of the rows."""
        if self.crop_dir is None:
            return None
        return best_boxes(self.crop_dir, "train").set_index(ID).loc[self.table[ID]].reset_index()


# ---------------------------------------------------------------- what it is
def about(s: Subject) -> str:
    """What was trained on what."""
    args, task = s.run.config["args"], s.task
    facts = {"run": s.run.name, "kind": f"{task.kind}: {', '.join(task.names)}", "main score": task.metric,
             "held-out images": f"{len(s.oof)} of {len(s.data.train)}{task.sum_up(s.target)}",
             "groups": len(np.unique(s.group)), "folds": ", ".join(map(str, s.run.folds))}  # fmt: skip
    keys = ("mode", "model", "backbone", "weights", "epochs", "batch_size", "lr", "head_lr", "loss", "augment", "seed")
    facts |= {key: args[key] for key in keys if args.get(key) is not None}
    facts |= size_of(s) | {"commit": s.run.config.get("commit"),
              "versions": ", ".join(f"{k} {v}" for k, v in s.run.config.get("versions", {}).items()),
              "command": " ".join(map(str, s.run.config.get("argv", [])))}  # fmt: skip
    return html.facts({key: str(value) for key, value in facts.items() if value not in ("", None)})


def size_of(s: Subject) -> dict[str, str]:
    """Parameters of a network, and the multiplications and additions that an image costs it; of a blend nothing."""
    if s.run.is_blend:
        return {}
    network, content = models.load_checkpoint(s.run.checkpoint(s.run.folds[0]))
    found = {"parameters": f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f} million"}
    if not isinstance(network, models.Scout):
        spec = models.Spec(**content["spec"])
        pictures = getattr(network, "wholes", 0) + spec.boxes
        image = torch.ones(1, 3 * pictures, spec.image_size, spec.image_size)  # a black one would be no crop
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            network(image, torch.zeros(1, spec.meta_dim))
        found["cost of an image"] = f"{counter.get_total_flops() / 1e9:.2f} GFLOP"
    return found


def scores_of(s: Subject) -> str:
    """Scores beside those of the best constant prediction."""
    main, task = s.metrics.get("ranked", s.metrics["pooled"]), s.task
    other = find_probe(s.run.path.parent, s.data.folds_sha256)
    known = [] if other is None or other.path == s.run.path else [other.metrics]  # of a probe, if there is one
    low, high = main[f"{task.metric}_interval"] or (None, None)
    rows = [[f"{task.metric} (main)", main[task.metric], f"{html.number(low)} to {html.number(high)}",
             *(probe.get("ranked", probe["pooled"])[task.metric] for probe in known),
             constant(s, task.metric)]]  # fmt: skip
    pooled = s.metrics["pooled"]
    rows += [[name, pooled[name], "", *(probe["pooled"][name] for probe in known), constant(s, name)]
             for name in task.metrics if name in pooled and name != task.metric]  # fmt: skip
    head = ["out of fold", "score", "95 %", *("probe" for _ in known), "constant prediction"]
    text = html.table(head, rows)
    if "cases" in s.metrics:
        column, of = s.data.facts["case_col"], s.metrics["cases"]
        words = f"{task.metric} {html.number(of[task.metric])} of {of['rows']} cases ({column})"
        words += f", {of['left_out']} of several classes left out" * (of["left_out"] > 0)
        text += f"<p>{escape(words)}; a case is predicted by the mean, a quantity by the median, of its images.</p>"
    if "ranked" in s.metrics:
        text += "<p>The main score is of ranks inside folds; the others are of all rows together.</p>"
    each = pooled.get("auc_of_each")
    if each:
        rows = [[name, auc, pooled["ap_of_each"][name]] for name, auc in each.items()]
        text += html.table(["class", "AUC", "AP"], rows)
    return text


def constant(s: Subject, name: str) -> float | None:
    """Score of the best constant prediction, as metrics.json has it."""
    return s.metrics["pooled"].get(f"{name}_of_baseline", 0.5 if name == "auc" else None)


def folds_of(s: Subject) -> str:
    """A row per fold."""
    names = [name for name in s.task.metrics if name in s.metrics["folds"][0]]
    rows = [[fold["fold"], fold["rows"], *(fold[name] for name in names), fold.get("best_epoch"), fold.get("seconds")]
            for fold in s.metrics["folds"]]  # fmt: skip
    return html.table(["fold", "rows", *names, "best epoch", "seconds"], rows)


def curves(s: Subject) -> str:
    """Training by epoch."""
    if not (s.run.path / "log.csv").exists():
        return ""
    log = pd.read_csv(s.run.path / "log.csv")
    return html.drawing(draw_curves(log, s.task.metric), "Training loss, held-out loss and held-out score by epoch")


def shape(s: Subject) -> str:
    """ROC and precision, confusion, or predicted against true."""
    known = ~np.isnan(s.target).all(axis=1)
    what = "ROC curves of held-out predictions" if s.task.probabilistic else "Predicted against true values"
    text = html.drawing(draw_predictions(s.task, s.oof), what)
    if s.task.probabilistic:
        text += html.drawing(draw_precision(s.task, s.target, s.prob), "Precision by recall")
    if s.task.sums_to_1:
        counts = confusion(s.target[known, 0].astype(int), s.prob[known].argmax(axis=1), len(s.task.names))
        text += html.drawing(draw_confusion(s.task.names, counts), "Confusion matrix")
    return text


def quantity(s: Subject) -> str:
    """A quantity by its true value, as classes between cuts, and over the images of a case."""
    if s.task.probabilistic:
        return ""
    text = html.drawing(draw_by_value(s.task, s.target[:, 0], s.prob[:, 0]), "Predictions by the true value")
    parts = {"images": s.metrics, "cases": s.metrics.get("cases", {})}
    found = {what: part["bands"] for what, part in parts.items() if "bands" in part}
    names = ["f1", "f1_weighted", "balanced_accuracy", "accuracy"]
    rows = [[what, cut, *(value for name in names for value in (scores[name], scores[f"{name}_of_baseline"])),
             "{:.3f} to {:.3f}".format(*scores["f1_interval"])]
            for what, bands in found.items() for cut, scores in bands.items() if isinstance(scores, dict)]  # fmt: skip
    if rows:
        head = [word for name in names for word in (name, "constant")]
        text += html.table(["of", "classes cut at", *head, "95 % of f1"], rows)
    for what, bands in found.items():
        limits = ", ".join(f"{limit:.3g}" for limit in bands["thresholds"])
        how = "learned on all rows; scores use those of the other folds" if bands["learned"] else "the cuts themselves"
        counts = np.array(bands[", ".join(f"{cut:g}" for cut in s.task.cuts)]["confusion"])
        text += html.drawing(draw_confusion(s.task.band_names, counts), f"Confusion matrix of {what}")
        text += f"<p>Thresholds on predictions of {what}: {limits} ({how}).</p>"
    if s.data.case is not None:
        table = s.table[["frame"] if "frame" in s.table else []].assign(target=s.target[:, 0])
        table["place"] = table["frame"] if "frame" in table else np.arange(len(table))
        names = s.data.case[s.table[ID]].str.partition(":")[2].to_numpy()
        table = table.assign(case=names, error=s.prob[:, 0] - s.target[:, 0]).dropna(subset="error")
        text += html.drawing(draw_courses(s.task, table), "Error over the images of cases")
    return text


def calibration(s: Subject) -> str:
    """Calibration before and after, on rows it was not learned from."""
    if (fit := s.metrics["calibration"]) is None:
        return ""
    rows = [[when, fit[when]["ece"], fit[when]["brier"]] for when in ("before", "after")]
    text = html.table(["calibration", "expected error", "Brier"], rows)
    text += html.drawing(draw_reliability(s.task, s.target, s.prob, s.sure), "Share of positives by probability")
    text += "<p>The table is of rows that the calibration was not learned from; the picture's has seen all of them.</p>"
    head = ["label", "threshold for", "threshold", "sensitivity", "specificity"]
    rows = [[label, name, *(value[key] for key in head[2:])] for label, each in fit["thresholds"].items()
            for name, value in each.items()]  # fmt: skip
    return text + (html.table(head, rows) if rows else "")


# ---------------------------------------------------------------- where it fails
def subgroups(s: Subject) -> dict[str, np.ndarray]:
    """Rows (N,) bool of every subgroup by name."""
    table = s.table.drop(columns=[ID, FOLD, *s.task.targets, s.data.facts["group_col"] or ID], errors="ignore")
    table["image size"] = table.pop("width") * table.pop("height") / 1e6
    if s.boxes is not None:
        table[BOX_SIDE] = (s.boxes["x1"] - s.boxes["x0"]) / s.table[["width", "height"]].min(axis=1)
    found = {}
    for column, values in table.items():
        if pd.api.types.is_numeric_dtype(values):
            values = values.where(np.isfinite(values))
        if values.nunique() <= MOST_VALUES:
            some = sorted(values.dropna().unique(), key=str)
            found |= {f"{column} = {value}": (values == value).to_numpy() for value in some}
        elif pd.api.types.is_numeric_dtype(values):
            bands = pd.qcut(values, BANDS, duplicates="drop")
            found |= {f"{column} {band.left:g} to {band.right:g}": (bands == band).to_numpy()
                      for band in bands.cat.categories}  # fmt: skip
        if values.isna().any() and not values.isna().all():
            found[f"{column} missing"] = values.isna().to_numpy()
    return {name: rows for name, rows in found.items() if FEWEST_ROWS <= rows.sum() < len(s.table)}


def by_subgroup(s: Subject) -> str:
    """The main score of every subgroup, marked where its interval excludes the whole's score."""
    metric, known = s.task.metrics[s.task.metric], ~np.isnan(s.target).all(axis=1)
    prob = rank_in_fold(s.prob, s.fold) if metric.ranks else s.prob
    whole, rows, marks = metric.of(s.target[known], prob[known]), [], {}
    for name, chosen in subgroups(s).items():
        chosen = chosen & known
        value = metric.of(s.target[chosen], prob[chosen]) if chosen.any() else math.nan
        if math.isnan(value):
            continue
        again = metric.resampled(s.target[chosen], prob[chosen])
        low, high = interval([again(weight) for weight in islice(bootstrap_weights(s.group[chosen]), SAMPLES)])
        if not low <= whole <= high:
            marks[len(rows)] = "good" if (value > whole) == (metric.sign > 0) else "bad"
        rows.append([name, int(chosen.sum()), value, f"{low:.3f} to {high:.3f}",
                     {"good": "better", "bad": "worse"}.get(marks.get(len(rows)), "")])  # fmt: skip
    if not rows:
        return ""
    text = html.table(["subgroup", "rows", s.task.metric, "95 %", "than the whole"], rows, marks)
    return (text + f"<p>All rows: {whole:.3f}. Marked: the interval excludes that; of {len(rows)} subgroups about "
            f"{0.05 * len(rows):.1f} would be by chance. Intervals of small "
            "subgroups are too narrow.</p>")  # fmt: skip


def worst_errors(s: Subject) -> dict[str, np.ndarray]:
    """Rows of the worst errors, worst first, by kind."""
    task, found = s.task, {}
    if not task.probabilistic:
        error = np.nan_to_num(s.prob[:, 0] - s.target[:, 0])
        found = {"predicted too high": np.argsort(-error)[:SHOWN], "predicted too low": np.argsort(error)[:SHOWN]}
        return {kind: rows[error[rows] != 0] for kind, rows in found.items()}
    if task.sums_to_1:
        own = np.take_along_axis(s.prob, np.nan_to_num(s.target).astype(int), axis=1)[:, 0]
        wrong = (s.prob.argmax(axis=1) != s.target[:, 0]) & ~np.isnan(s.target[:, 0])
        parts = {"worst errors": wrong}
        if len(task.names) <= OWN_KINDS:
            parts = {f"{name} taken for another": wrong & (s.target[:, 0] == i) for i, name in enumerate(task.names)}
        return {kind: rows[np.argsort(own[rows])][:SHOWN] for kind, rows in
                ((kind, np.flatnonzero(part)) for kind, part in parts.items())}  # fmt: skip
    label = s.target  # of several labels the worst of a row counts
    missed, false = np.where(label == 1, s.prob, np.inf).min(axis=1), np.where(label == 0, s.prob, -np.inf).max(axis=1)
    middle = 0.5 if not s.metrics["ranks"] else np.nanmean(label == 0)
    found = {"missed": np.argsort(missed)[:SHOWN], "false alarms": np.argsort(-false)[:SHOWN]}
    return {"missed": found["missed"][missed[found["missed"]] < middle],
            "false alarms": found["false alarms"][false[found["false alarms"]] >= middle]}  # fmt: skip


def least_certain(s: Subject) -> np.ndarray:
    """Rows whose prediction says least, least first."""
    if not s.task.probabilistic:
        return np.empty(0, int)
    if s.task.sums_to_1:
        top = np.sort(s.sure, axis=1)
        return np.argsort(top[:, -1] - top[:, -2])[:SHOWN]
    return np.argsort(np.abs(s.sure - 0.5).mean(axis=1))[:SHOWN]


def doubtful_labels(s: Subject) -> list[list]:
    """Rows whose label is likely wrong: the network, which did not see them, is surer of another class than it is on
    average of that class's own images. Northcutt, Jiang, Chuang, Confident Learning, JAIR 2021."""
    if not s.task.probabilistic:
        return []
    sure = s.sure if s.task.sums_to_1 else np.stack([1 - s.sure, s.sure], axis=2)  # per label: no, yes
    labels = s.target if not s.task.sums_to_1 else s.target[:, :1]
    found = []
    for column in range(labels.shape[1]):
        prob = sure if s.task.sums_to_1 else sure[:, column]
        label, names = labels[:, column], s.task.names if s.task.sums_to_1 else None
        known = ~np.isnan(label)
        usual = np.array([prob[known & (label == c), c].mean() if (known & (label == c)).any() else np.inf
                          for c in range(prob.shape[1])])  # fmt: skip
        other = np.where(np.arange(prob.shape[1]) == np.nan_to_num(label)[:, None], -1, prob - usual)
        for row in np.flatnonzero(known & (other.max(axis=1) >= 0)):
            best = int(other[row].argmax())
            given = names[int(label[row])] if names else f"{s.task.names[column]} {'yes' if label[row] else 'no'}"
            says = names[best] if names else f"{s.task.names[column]} {'yes' if best else 'no'}"
            found.append([s.table[ID][row], given, says, float(prob[row, best]), float(other[row, best])])
    return sorted(found, key=lambda row: -row[-1])[:SHOWN]


def labels_section(s: Subject) -> str:
    """Likely wrong labels."""
    rows = [row[:-1] for row in doubtful_labels(s)]
    return html.table(["image", "label", "rather", "probability"], rows) if rows else ""


def disagreeing_groups(s: Subject) -> str:
    """Groups whose images are predicted, or labelled, most differently."""
    if s.data.facts["group_col"] is None:
        return ""
    prob, labels = pd.DataFrame(s.prob, columns=s.task.names), [s.task.describe(target) for target in s.target]
    each, rows = prob.groupby(s.group), []
    spread, sizes = each.max() - each.min(), each.size()
    kinds = pd.Series(labels).groupby(s.group).nunique()
    for name in spread.max(axis=1)[sizes > 1].nlargest(SHOWN).index:
        most = spread.loc[name].idxmax()
        low, high = (float(getattr(each[most], end)()[name]) for end in ("min", "max"))
        rows.append([name.partition(":")[2], int(sizes[name]), str(most), low, high, int(kinds[name])])
    head = ["group", "images", "most different in", "lowest", "highest", "different labels"]
    return html.table(head, rows) if rows else ""


# ---------------------------------------------------------------- pictures
class Pictures:
    """Thumbnails of rows: the image with its box, the map, the crop."""

    def __init__(self, s: Subject):
        self.s, size = s, s.data.size
        self.whole = open_array(s.data.array_path("train"), len(s.data.train), size)
        self.crops, self.maps, self.explainers = None, None, {}
        if s.crop_dir is not None:
            self.crops = open_array(array_path(s.crop_dir, "train", size), len(s.data.train))
            path, self.frame = s.crop_dir / "train_attention.npy", read_json(s.crop_dir / "crop.json")["frame"]
            self.maps = open_array(path, len(s.data.train), dtype=np.float32) if path.exists() else None

    def explain(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Maps (h, w) of rows by the networks of their folds, if the run looks at whole small images."""
        s, found = self.s, {}
        if s.run.is_blend or s.run.config["crop"] is not None or models.MODELS[s.run.config["args"]["model"]].scouts:
            return {}
        for k in np.unique(s.fold[rows]):
            if k not in self.explainers:
                network, content = models.load_checkpoint(s.run.checkpoint(int(k)), s.device)
                way = WAYS[default_way(network, self.whole.shape[1])]
                self.explainers[k] = way(network, blank_meta(content), s.task.evidence)
            own, explainer = rows[s.fold[rows] == k], self.explainers[k]
            image = torch.from_numpy(self.whole[s.rows[own]]).permute(0, 3, 1, 2).to(s.device)
            try:
                maps = [explainer.attention(part, 1).detach().float().cpu().numpy() for part in image.split(16)]
            except InputError:  # its last map has one cell, or no linear layer follows: there is nothing to show
                return {}
            found |= dict(zip(own.tolist(), np.concatenate(maps), strict=True))
        return found

    def show(self, rows: np.ndarray) -> str:
        """Pictures of rows, with what is true and what was predicted."""
        s, text = self.s, []
        maps = {row: self.maps[s.rows[row]] for row in rows} if self.maps is not None else self.explain(rows)
        for row in rows:
            size = tuple(s.table[["width", "height"]].iloc[row].tolist())
            left, top, right, _ = frame_of(*size, s.data.facts["frame"])
            image = cv2.resize(self.whole[s.rows[row]], (THUMB, THUMB), interpolation=cv2.INTER_AREA)
            parts = [image]
            if s.boxes is not None:
                corners = s.boxes.iloc[row][CORNERS].to_numpy(float) - [left, top, left, top]
                corners = corners * THUMB / (right - left)
                x0, y0, x1, y1 = np.rint(corners).astype(int).tolist()
                parts = [cv2.rectangle(image.copy(), (x0, y0), (x1 - 1, y1 - 1), (0, 255, 0), 1)]
            if row in maps:
                x, y, end, _ = frame_of(*size, s.data.facts["frame"] if self.maps is None else self.frame)
                unit = THUMB / (right - left)  # of pixels of the original; a scout's map covers another square
                moved = np.array([[unit * (end - x) / GRID, 0, unit * (x - left)], [0, 0, unit * (y - top)]])
                moved[1, 1] = moved[0, 0]
                raster = cv2.warpAffine(upsample(maps[row]), moved, (THUMB, THUMB))
                level = np.uint8(255 * np.clip(raster / max(raster.max(), 1e-12), 0, 1))
                colour = cv2.applyColorMap(level, cv2.COLORMAP_INFERNO)[..., ::-1]
                parts.append(cv2.addWeighted(image, 0.45, np.ascontiguousarray(colour), 0.55, 0))
            if self.crops is not None:
                crop = self.crops[s.rows[row]]
                crop = crop[0] if crop.ndim == 4 else crop  # the best
                parts.append(cv2.resize(crop, (THUMB, THUMB), interpolation=cv2.INTER_AREA))
            name, truth = s.table[ID][row], s.task.describe(s.target[row])
            says = s.task.show(s.prob[row])
            text.append(html.photograph(np.concatenate(parts, axis=1), f"{name}, labelled {truth}, predicted {says}",
                                        f"{name}: {truth}, predicted {says}"))  # fmt: skip
        return "".join(text)


def errors_section(s: Subject) -> str:
    """The worst errors of each kind."""
    kinds = {kind: rows for kind, rows in worst_errors(s).items() if len(rows)}
    return "".join(f"<h3>{escape(kind)}</h3>{s.pictures.show(rows)}" for kind, rows in kinds.items())


# ---------------------------------------------------------------- what it is made of
def gates_section(s: Subject) -> str:
    """Gates and prune curves of every fold."""
    text = []
    for k in s.run.folds:
        if (s.run.path / f"fold{k}_gates.npy").exists():
            network, curve = models.load_checkpoint(s.run.checkpoint(k))[0], s.run.path / f"fold{k}_prune.csv"
            picture = draw_gates(network, pd.read_csv(curve))
            text.append(html.drawing(picture, f"Gates of fold {k}, and the score with gates closed"))
    return "".join(text)


def crops_section(s: Subject) -> str:
    """What the crops look like."""
    if s.boxes is None:
        return ""
    side = (s.boxes["x1"] - s.boxes["x0"]) / s.table[["width", "height"]].min(axis=1)
    share = side.quantile([0.05, 0.25, 0.5, 0.75, 0.95])
    reasons = s.boxes["fallback"].astype(object).fillna("cropped").value_counts()
    text = html.table(["side over the short side", *(f"{q:.0%}" for q in share.index)], [["", *share.tolist()]])
    text += html.table(["crop", "images"], [[name, int(count)] for name, count in reasons.items()])
    montage = cv2.imread(str(s.crop_dir / "montage.png"))
    return text if montage is None else text + html.photograph(montage[..., ::-1], "Images with box, map and crop")


def members_section(s: Subject) -> str:
    """Members of a blend, their weights, and how alike their predictions are."""
    if not s.run.is_blend:
        return ""
    members = s.run.members()
    main = [run.metrics.get("ranked", run.metrics["pooled"])[s.task.metric] for run, _ in members]
    rows = [[run.name, weight, score] for (run, weight), score in zip(members, main, strict=True)]
    tables = [run.table("oof.csv").set_index(ID).loc[s.table[ID], s.task.columns] for run, _ in members]
    values = [table.to_numpy().ravel() for table in tables]
    alike = pd.DataFrame(np.transpose(values)).corr("spearman").to_numpy().reshape(len(members), -1)
    names = [run.name for run, _ in members]
    text = html.table(["member", "weight", s.task.metric], rows)
    rows = [[name, *row] for name, row in zip(names, alike.tolist(), strict=True)]
    return text + html.table(["rank correlation", *names], rows)


SECTIONS: dict[str, Callable[[Subject], str]] = {
    "What was trained": about, "Scores": scores_of, "Folds": folds_of, "Training": curves, "Predictions": shape,
    "Quantity": quantity, "Calibration": calibration, "Subgroups": by_subgroup, "Worst errors": errors_section,
    "Least certain": lambda s: s.pictures.show(least_certain(s)), "Labels that may be wrong": labels_section,
    "Groups whose images disagree": disagreeing_groups, "Gates": gates_section, "Crops": crops_section,
    "Members": members_section,
}  # fmt: skip


# ---------------------------------------------------------------- checks
def check_data(run: Run, data: Data, device: torch.device) -> tuple[bool, str]:
    """The folds are those of the run, its tables and the arrays are as hashed."""
    tables = dict(run.metrics["sha256"])
    if run.config.get("stack"):
        tables[STACK] = run.config["stack"]["sha256"]
    check_hashes(run.path, tables, "train or blend again")
    check_hashes(data.directory, data.facts["sha256"], "preprocess and train again")
    same = run.config["inputs"]["folds"] == data.folds_sha256
    return same, f"folds, and {len(data.facts['sha256']) + len(tables)} files as hashed"


def check_scores(run: Run, data: Data, device: torch.device) -> tuple[bool, str]:
    """oof.csv has every held-out row of the finished folds once, and all scores follow from it."""
    oof, expected = run.table("oof.csv"), data.train[data.train[FOLD].isin(run.folds)]
    keys = [ID, FOLD, *data.task.targets]
    known = oof[ID].is_unique and len(oof.merge(expected[keys], on=keys)) == len(oof)
    complete = len(oof) == len(expected) or run.is_blend or run.config["args"]["limit"] is not None
    again, same = score_folds(data.task, oof, data.group, run.folds, run.metrics["ranks"], data.case), True
    for part in again.keys() & {"pooled", "ranked"}:
        for key, value in again[part].items():
            kept = run.metrics[part][key]
            if isinstance(value, dict):  # of each class; JSON sorts them
                same &= value.keys() == kept.keys()
                value, kept = ([each[name] for name in value if name in kept] for each in (value, kept))
            same &= np.allclose(np.array(value, float), np.array(kept, float), equal_nan=True)
    found = score_line(run.name, again).partition("oof ")[2]
    return known and complete and same, f"{len(oof)} held-out rows, out of fold {found}"


def check_networks(run: Run, data: Data, device: torch.device) -> tuple[bool, str]:
    """A sample of every fold's held-out rows is predicted as in oof.csv; what is fitted saw training rows."""
    if run.is_blend:
        return True, f"{len(run.members())} members as blended"
    known = {"tile": 0, "finetune": None, "streams": []} | run.config["args"]  # unknown to older versions
    args, oof, worst, fitted = argparse.Namespace(**known), run.table("oof.csv"), 0.0, True
    args.crop_dir, args.guide = args.crop_dir and Path(args.crop_dir), None
    for k in run.folds:
        model, content = models.load_checkpoint(run.checkpoint(k), device)
        if isinstance(model, models.Scout):
            data.cells = data.cells or make_cells(model, data, util.CPUS)
        images, encoder, task = dataset.make_images(data, k, args, models.recipe_of(args.model, args.streams))
        fitted &= encoder.columns == content["encoder"] and task == task_of(content["task"])
        valid, expected = images["valid"], oof[oof[FOLD] == k].set_index(ID)[task.columns]
        some = np.linspace(0, len(valid) - 1, min(SAMPLE, len(valid))).astype(int)
        loader = dataset.eval_loader(valid, some, args.batch_size, workers=0)
        prob = models.predict(model, task, loader, device, args.tta, args.amp)
        away = np.abs(prob - expected.loc[data.train[ID].to_numpy()[valid.rows[some]]].to_numpy()) / task.std
        worst = max(worst, away.max())
    return fitted and worst < TOLERANCE, f"up to {SAMPLE} rows of each fold predicted again, at most {worst:.1e} away"


def check_all(run: Run, data_dir: Path | None, device: torch.device) -> list[tuple[bool, str]]:
    """(whether it holds, what was checked) of a run and the members of a blend, printed as they come."""
    runs, found = [run], []
    for one in runs:  # grows by the members of blends
        data_of = cache(read_data)  # once per run: cells of its scout are kept in it
        for check in (check_data, check_scores, check_networks):
            try:
                good, text = check(one, data_of(data_dir or Path(one.config["args"]["data_dir"])), device)
            except (InputError, OSError, KeyError) as error:
                good, text = False, f"{error}"
            found.append((good, f"{one.name}, {check.__name__[6:]}: {text}"))
            print(("ok    " if good else "WRONG ") + found[-1][1])
        known = {other.path.resolve() for other in runs}
        if one.is_blend and found[-1][0]:
            runs += [member for member, _ in one.members() if member.path.resolve() not in known]
    return found


def main(args: argparse.Namespace) -> Path:
    """Write the page; raises InputError if a check fails."""
    run, device = read_run(args.run), pick_device(args.device)
    checked = check_all(run, args.data_dir, device)
    wrong = [text for good, text in checked if not good]
    path = run.path / "report.html"
    rows = [["holds" if good else "WRONG", text] for good, text in checked]
    marks = {i: "good" if good else "bad" for i, (good, _) in enumerate(checked)}
    sections = {}
    try:
        subject = Subject(run, read_data(args.data_dir or Path(run.config["args"]["data_dir"])), device)
        for name, section in tqdm(SECTIONS.items(), unit="section"):
            sections[name] = section(subject)
    except (InputError, OSError, KeyError):
        if not wrong:
            raise  # else what cannot be read is among what is wrong
    sections["Checks"] = html.table(["", "what was checked"], rows, marks)
    remove(run.path, "report.html.*.tmp")  # of a killed call
    with atomic(path) as temporary:
        temporary.write_text(html.page(f"{run.name}: report", sections), encoding="utf-8")
    print(f"{len(checked)} checks, wrote {path}")
    remove(run.path, "model_card.md*")  # of an earlier or a killed call
    if wrong:
        raise InputError(f"{len(wrong)} checks failed: {wrong[0]}; see {path}")
    with atomic(run.path / "model_card.md") as temporary:
        temporary.write_text(fill_card(run, sections, subject.data.facts["group_col"]), encoding="utf-8")
    return path


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__, "device")
    parser.add_argument("run", type=Path, help="directory of a run or blend")
    parser.add_argument("--data_dir", type=Path, help="from preprocess.py [as the run says]")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
