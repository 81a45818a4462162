"""What a target is: how labels are read, what networks learn and predict of them, and how predictions are judged.

A new kind of target is a class and a row of KINDS. Arrays: target (N, T) as the tables hold it, NaN if unknown; goal
(N, K), what the loss compares with logit (N, K); prob (N, K), the predictions.
"""

import re
import unicodedata
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

import scores
from util import FOLD, ID, PROB, TARGET, InputError

TOP = 3  # predictions in a picture's title
QUANTILES = 5  # strata of a quantity
SEPARATORS = ("|", ",", " ")  # between the words of one cell


# ---------------------------------------------------------------- kinds of target
@dataclass(frozen=True)
class Task:
    """One kind of target: reading, strata, goals, predictions. A kind has learn(cells, positive) -> the fields that it
    finds in the labels, read(cells) -> target (N, T), NaN if unknown and infinite if not of this kind, and whatever
    else differs from these defaults."""

    names: tuple[str, ...]  # of the outputs: the positive word, the classes, the labels, the quantity
    metric: str  # what early stopping and blending maximise
    ordinal: bool = False  # whether the order of the classes means something
    other: str = ""  # the word for 0 of a binary target, if it is one
    separator: str = ""  # between the labels in one cell, if they share a column
    mean: float = 0.0  # of a quantity in the training rows
    std: float = 1.0
    cuts: tuple[float, ...] = ()  # of a quantity: where classes of it begin

    kind: ClassVar[str]
    family: ClassVar[str] = "OF_LABELS"  # table of losses.py
    metrics: ClassVar[dict[str, scores.Metric]] = scores.OF_LABELS  # the first one is the default
    prefix: ClassVar[str] = PROB  # of the columns of predictions
    in_every_fold: ClassVar[bool] = True  # each class must be, or else in two folds at least
    order_is_enough: ClassVar[bool] = True  # ranks may take the place of predictions
    sums_to_1: ClassVar[bool] = False  # predictions of an image

    @property
    def columns(self) -> list[str]:
        """Columns of predictions in every table: K."""
        return [self.prefix] if len(self.names) == 1 else [f"{self.prefix}_{name}" for name in self.names]

    @property
    def probabilistic(self) -> bool:
        """Whether predictions are probabilities, which have ROC curves and can be calibrated."""
        return self.prefix == PROB

    @property
    def targets(self) -> list[str]:
        """Columns of the target in every table: T."""
        return [TARGET]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the columns of `members`."""
        return self.names

    def members(self, target: np.ndarray) -> np.ndarray:
        """Which rows are of which class: bool (N, C)."""
        return target == 1

    def strata(self, target: np.ndarray) -> np.ndarray:
        """What folds, the balanced sampler and dry runs keep in proportion: int (N,) from 0."""
        return target[:, 0].astype(int)

    def fitted(self, target: np.ndarray) -> "Task":
        """The task with what it learns from the target of training rows."""
        return self

    def goal(self, target: np.ndarray) -> np.ndarray:
        """What the loss compares with the logit: float32 (N, K)."""
        return target.astype(np.float32)

    @property
    def neutral(self) -> float:
        """Goal that says nothing, towards which label smoothing draws."""
        return 0.5

    def prob(self, logit):
        """Predictions (..., K) of a tensor of logits."""
        return logit.sigmoid()

    def evidence(self, logit, name: str | None = None):
        """Share of every output in what a map should explain (N, K), of a tensor of logits: of one class by name, or of
        the prediction."""
        if name is None:
            return self.predicted(logit)
        share = logit.new_zeros(logit.shape)
        share[:, self.names.index(name)] = 1
        return share

    def predicted(self, logit):
        """Share of every output in the prediction (N, K): the only output."""
        return logit.new_ones(logit.shape)

    def logit(self, prob: np.ndarray) -> np.ndarray:
        """Logits of predictions, of which probabilities are held within 1e-7 of 0 and 1."""
        safe = np.clip(prob, 1e-7, 1 - 1e-7)
        return np.log(safe / (1 - safe))

    def describe(self, target: np.ndarray) -> str:
        """Words for the target (T,) of one row."""
        return self.classes[int(target[0])]

    def sum_up(self, target: np.ndarray) -> str:
        """Words for the targets of a fold, after their number."""
        return ": " + ", ".join(f"{n} {name}" for name, n in self.counts(target)["counts"].items())

    @property
    def band_names(self) -> list[str]:
        """Names of the classes between the cuts of a quantity."""
        return []

    def counts(self, target: np.ndarray) -> dict:
        """Number of rows of every class."""
        return {"counts": dict(zip(self.classes, self.members(target).sum(axis=0).tolist(), strict=True))}

    def show(self, prob: np.ndarray) -> str:
        """The greatest predictions (K,) of one image, for pictures."""
        best = np.argsort(-prob)[:TOP]
        return ", ".join(f"{self.names[i]} {prob[i]:.3f}" for i in best) if len(prob) > 1 else f"{prob[0]:.3f}"

    def decide(self, prob: np.ndarray) -> str:
        """What predictions (K,) of one image amount to, in the words of the table."""
        return self.names[int(prob.argmax())]

    def submit(self, prob: np.ndarray, columns: list[str]) -> dict[str, np.ndarray]:
        """Predictions (N, K) in the columns of a submission: in one column the value or the words, else each output in
        the column of its name. Raises InputError if one has none."""
        if len(columns) == 1:
            values = prob[:, 0] if len(self.names) == 1 else np.array([self.decide(row) for row in prob])
            return {columns[0]: values}
        ends = {column: [name for name in self.names if f"_{column}".endswith(f"_{name}")] for column in columns}
        place = {column: self.names.index(max(found, key=len)) for column, found in ends.items() if found}
        if sorted(place.values()) != list(range(len(self.names))) or len(place) < len(columns):
            raise InputError(f"the sample submission has columns {some_of(columns)} for {some_of(self.names)}; name "
                             "each label once, and nothing else")  # fmt: skip
        return {column: prob[:, i] for column, i in place.items()}

    @classmethod
    def losses(cls) -> dict:
        """Losses by name; the first one is the default."""
        import losses  # needs torch, which preprocess.py does not

        return getattr(losses, cls.family)

    def facts(self) -> dict:
        """Plain values from which task_of makes the task again."""
        return asdict(self) | {"kind": self.kind, "names": list(self.names), "cuts": list(self.cuts)}


class Binary(Task):
    """One of two words; the prediction is the probability of names[0]."""

    kind = "binary"

    @classmethod
    def learn(cls, cells: pd.DataFrame, positive: str | None) -> dict:
        """The word that counts as 1, which is the one given, "1", or else the rarer one, and the other if it is one."""
        counts = cells.iloc[:, 0].value_counts()
        if len(counts) > 2 and positive is None:
            raise InputError(f"labels are {some_of(counts.index)}, not two words; pass --positive with one of them")
        rarer = "1" if set(counts.index) <= {"0", "1"} else min(counts.index, key=lambda word: (counts[word], word))
        others = set(counts.index) - {positive or rarer}
        return {"names": (positive or rarer,), "other": others.pop() if len(others) == 1 else ""}

    @property
    def classes(self) -> tuple[str, ...]:
        """Both words; the first may stand for several."""
        return (self.other or f"not {self.names[0]}", self.names[0])

    def read(self, cells: pd.DataFrame) -> np.ndarray:
        """1 for the positive word, 0 for the other, or for any other if there were several."""
        known = cells.isin(self.classes) if self.other else cells.notna()
        return (cells == self.names[0]).astype(float).where(known, np.inf).to_numpy(float)

    def members(self, target: np.ndarray) -> np.ndarray:
        return np.concatenate([target == 0, target == 1], axis=1)

    def sum_up(self, target: np.ndarray) -> str:
        return f", {self.counts(target)['positives']} positive"

    def counts(self, target: np.ndarray) -> dict:
        return {"positives": int(np.nansum(target))}


class MultiClass(Task):
    """One of several words; tables hold its place among the sorted names."""

    kind, family, metrics = "multiclass", "OF_CLASSES", scores.OF_CLASSES
    order_is_enough, sums_to_1 = False, True

    @classmethod
    def learn(cls, cells: pd.DataFrame, positive: str | None) -> dict:
        """All words, sorted as numbers if they are numbers."""
        words = cells.iloc[:, 0].dropna().unique()
        number = pd.to_numeric(pd.Series(words), errors="coerce")
        return {"names": tuple(words[np.argsort(number.to_numpy())] if number.notna().all() else sorted(words))}

    def read(self, cells: pd.DataFrame) -> np.ndarray:
        """Place of the word; an empty cell or an unknown word is not of this kind."""
        place = {name: float(i) for i, name in enumerate(self.names)}
        return cells.map(lambda word: place.get(word, np.inf)).to_numpy(float)

    def members(self, target: np.ndarray) -> np.ndarray:
        return target == np.arange(len(self.names))

    def goal(self, target: np.ndarray) -> np.ndarray:
        return self.members(target).astype(np.float32)

    @property
    def neutral(self) -> float:
        return 1 / len(self.names)

    def prob(self, logit):
        return logit.softmax(dim=-1)

    def predicted(self, logit):
        return (logit == logit.max(dim=1, keepdim=True).values).to(logit)

    def logit(self, prob: np.ndarray) -> np.ndarray:
        """Logarithm of probabilities, which are held above 1e-7."""
        return np.log(np.clip(prob, 1e-7, 1))


class MultiLabel(Task):
    """Any number of labels for one image, each of them yes, no or unknown; a column of the tables per label."""

    kind, in_every_fold = "multilabel", False
    metrics = dict(sorted(scores.OF_LABELS.items(), key=lambda item: item[0] != "ap"))  # mAP first

    @classmethod
    def learn(cls, cells: pd.DataFrame, positive: str | None) -> dict:
        """The columns, or all words in the cells of one column."""
        if not (separator := separator_of(cells)):
            return {"names": tuple(cells.columns)}
        words = set().union(*(split_words(cell, separator) for cell in cells.iloc[:, 0].dropna().unique()))
        return {"names": tuple(sorted(words)), "separator": separator}

    @property
    def columns(self) -> list[str]:
        return [f"{self.prefix}_{name}" for name in self.names]

    @property
    def targets(self) -> list[str]:
        return [f"{TARGET}_{name}" for name in self.names]

    def read(self, cells: pd.DataFrame) -> np.ndarray:
        """0 or 1 per label; an empty cell is unknown."""
        if not self.separator:
            values = {"0": 0.0, "1": 1.0}
            return cells.map(lambda word: np.nan if pd.isna(word) else values.get(word, np.inf)).to_numpy(float)
        target, known = np.full((len(cells), len(self.names)), np.nan), set(self.names)
        for row, cell in zip(target, cells.iloc[:, 0], strict=True):
            if not pd.isna(cell):
                words = split_words(cell, self.separator)
                row[:] = [name in words for name in self.names] if words <= known else np.inf
        return target

    def predicted(self, logit):
        """Every positive label, or else the likeliest."""
        return ((logit > 0) | (logit == logit.max(dim=1, keepdim=True).values)).to(logit)

    def describe(self, target: np.ndarray) -> str:
        return ", ".join(name for name, value in zip(self.names, target, strict=True) if value == 1) or "none"

    def decide(self, prob: np.ndarray) -> str:
        return (self.separator or " ").join(name for name, p in zip(self.names, prob, strict=True) if p >= 0.5)

    def strata(self, target: np.ndarray) -> np.ndarray:
        """The rarest label of every row, 0 without one."""
        has = self.members(target)
        rarest_first = np.argsort(has.sum(axis=0), kind="stable")
        return np.where(has.any(axis=1), 1 + rarest_first[np.argmax(has[:, rarest_first], axis=1)], 0)


class Regression(Task):
    """A quantity, or unknown; networks learn its standard score among the training rows."""

    kind, family, metrics = "regression", "OF_QUANTITIES", scores.OF_QUANTITIES
    prefix, order_is_enough = "pred", False

    @classmethod
    def learn(cls, cells: pd.DataFrame, positive: str | None) -> dict:
        return {"names": tuple(cells.columns[:1])}

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def read(self, cells: pd.DataFrame) -> np.ndarray:
        """Finite numbers; an empty cell is unknown."""
        number = cells.apply(pd.to_numeric, errors="coerce")
        return number.where(number.notna() | cells.isna(), np.inf).to_numpy(float)

    def members(self, target: np.ndarray) -> np.ndarray:
        return np.zeros((len(target), 0), bool)

    def strata(self, target: np.ndarray) -> np.ndarray:
        """Classes between cuts, or else quantiles of equal size; unknown values have a stratum of their own."""
        if self.cuts:
            return self.bands(target) + 1
        ranks = pd.Series(target[:, 0]).rank(method="first", pct=True)
        return np.ceil(ranks * QUANTILES).fillna(0).astype(int).to_numpy()

    def fitted(self, target: np.ndarray) -> "Regression":
        spread = float(np.nanstd(target))
        return replace(self, mean=float(np.nanmean(target)), std=spread if spread > 0 else 1.0)

    def goal(self, target: np.ndarray) -> np.ndarray:
        return ((target - self.mean) / self.std).astype(np.float32)

    @property
    def standard_cuts(self) -> tuple[float, ...]:
        """The cuts as goals."""
        return tuple(self.goal(np.array(self.cuts)).tolist())

    @property
    def neutral(self) -> float:
        return 0.0

    def prob(self, logit):
        return logit * self.std + self.mean

    def logit(self, prob: np.ndarray) -> np.ndarray:
        return (prob - self.mean) / self.std

    def describe(self, target: np.ndarray) -> str:
        return f"{target[0]:.4g}"

    def sum_up(self, target: np.ndarray) -> str:
        low, middle, high = np.nanquantile(target, [0, 0.5, 1])
        bands = "".join(f", {n} {name}" for name, n in self.counts(target).get("counts", {}).items())
        return f", median {middle:.4g}, {low:.4g} to {high:.4g}{bands}"

    def counts(self, target: np.ndarray) -> dict:
        """Number of rows of every class between cuts, if there are some."""
        if not self.cuts:
            return {}
        band = self.bands(target)
        return {"counts": {name: int((band == i).sum()) for i, name in enumerate(self.band_names)}}

    @property
    def band_names(self) -> list[str]:
        """Names of the classes between cuts."""
        cuts = [f"{cut:g}" for cut in self.cuts]
        if not cuts:
            return []
        first = f"up to {cuts[0]}" if len(cuts) > 1 else f"below {cuts[0]}"
        return [first, *(" to ".join(pair) for pair in pairwise(cuts)), f"from {cuts[-1]}"]

    def bands(self, target: np.ndarray) -> np.ndarray:
        """Class of every row (N,) between cuts, -1 if it is unknown."""
        return np.where(np.isnan(target[:, 0]), -1, scores.bands_of(target[:, 0], self.cuts))


KINDS = {task.kind: task for task in (Binary, MultiClass, MultiLabel, Regression)}


def task_of(facts: dict) -> Task:
    """The task that Task.facts described."""
    given = {key: value for key, value in facts.items() if key != "kind"}
    lists = {key: tuple(given.get(key, ())) for key in ("names", "cuts")}  # older versions know no cuts
    return KINDS[facts["kind"]](**given | lists)


# ---------------------------------------------------------------- reading labels
def as_words(column: pd.Series) -> pd.Series:
    """Values as text, the same however a file has them: 1, 1.0, 001 and True are "1"; missing ones stay missing."""

    def word(value) -> str:
        text = unicodedata.normalize("NFC", str(value)).strip()
        text = {"True": "1", "False": "0"}.get(text, text)
        whole = re.fullmatch(r"(-?)0*(\d+)(\.0*)?", text)
        return whole[1] + whole[2] if whole else text

    return column.astype(object).map({value: word(value) for value in column.dropna().unique()})


def cells_of(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The cells of some columns as words."""
    return pd.DataFrame({column: as_words(table[column]) for column in columns})


def split_words(cell: str, separator: str) -> set[str]:
    """The words of one cell."""
    return {word.strip() for word in cell.split(separator) if word.strip()}


def separator_of(cells: pd.DataFrame) -> str:
    """What joins several words in the cells of one column, empty if nothing does."""
    different = cells.iloc[:, 0].dropna().unique() if cells.shape[1] == 1 else ()
    return next((separator for separator in SEPARATORS if any(separator in cell for cell in different)), "")


def kind_of(cells: pd.DataFrame, names: pd.Series, path: Path, positive: str | None) -> str:
    """The kind of target that labels look like; raises InputError if there is a word among numbers."""
    column = cells.iloc[:, 0].dropna()
    number = pd.to_numeric(column, errors="coerce")
    if cells.shape[1] > 1:
        return "multilabel"
    if 0.5 < number.notna().mean() < 1 and positive is None:
        row = number.index[number.isna()][0]
        raise InputError(f"{path}: {column.name} of {names[row]} is {column[row]!r} among numbers; repair it, or pass "
                         "--task")  # fmt: skip
    if (number % 1 != 0).any() and number.notna().all():
        return "regression"
    separator, different = separator_of(cells), column.unique()
    words = set().union(*(split_words(cell, separator or "|") for cell in different))
    if separator == "," and pd.to_numeric(pd.Series(list(words)), errors="coerce").notna().all():
        raise InputError(f"{path}: {column.name} has decimal commas, such as {different[0]!r}; write points")
    # fewer words than cells, one of them alone, because those of "basal cell carcinoma" are no labels
    labels = separator == "|" or (separator and len(words) < len(different) and words & set(different))
    if positive is None and number.isna().any() and labels:
        return "multilabel"
    return "binary" if positive is not None or column.nunique() <= 2 else "multiclass"


def some_of(words) -> str:
    """The first words of a list, for messages."""
    return ", ".join(map(str, list(words)[:5]))


def read_target(task: Task, table: pd.DataFrame, path: Path, columns: list[str]) -> np.ndarray:
    """Target (N, T) of a table; raises InputError that names the first cell that is not of the task."""
    target = task.read(cells_of(table, columns))
    bad = np.isinf(target).any(axis=1)
    if bad.any():
        row, known = table[bad].iloc[0], f" of {some_of(task.names)}" if len(task.names) > 1 else ""
        cell = ", ".join(f"{column} of {row[ID]} is {str(row[column])!r}" for column in columns)
        raise InputError(f"{path}: {cell}, which is no {task.kind} label{known}; repair it, or pass another --task")
    return target


def find_task(table: pd.DataFrame, path: Path, columns: list[str], kind: str | None = None,
              positive: str | None = None, metric: str | None = None, ordinal: bool = False,
              cuts: tuple[float, ...] = ()) -> Task:  # fmt: skip
    """The task that the labels in some columns of a train table ask for. Raises InputError if they do not fit a kind,
    or a label is the same in every row."""
    cells = cells_of(table, columns)
    positive = None if positive is None else as_words(pd.Series([positive]))[0]
    if cells.isna().all(axis=None):
        raise InputError(f"{path}: {', '.join(columns)} is empty; nothing can be learned from it")
    kind = "regression" if cuts and kind is None else kind
    chosen = KINDS[kind or kind_of(cells, table[ID], path, positive)]
    if cuts and (chosen is not Regression or list(cuts) != sorted(set(cuts))):
        words = " ".join(f"{cut:g}" for cut in cuts)
        raise InputError(f"--cut {words}: cuts are for quantities, from the lowest to the highest; pass others")
    if len(columns) > 1 and chosen.in_every_fold:
        raise InputError(f"--target_col names {len(columns)} columns; pass one, or --task multilabel")
    if positive is not None and chosen is not Binary:
        raise InputError(f"--positive is for two classes; leave it out for {chosen.kind}")
    known = {name: it for name, it in chosen.metrics.items() if ordinal or not it.ordinal}
    metric = metric or next(iter(known))
    if metric not in known:
        raise InputError(f"--metric {metric} is not for {chosen.kind}; pass {', '.join(known)} (kappa with --ordinal)")
    task = chosen(**chosen.learn(cells, positive), metric=metric, ordinal=ordinal, cuts=tuple(cuts))
    if ordinal and (chosen is not MultiClass or pd.to_numeric(pd.Series(task.names), errors="coerce").isna().any()):
        raise InputError("--ordinal is for classes that are numbers; write numbers for words, or leave it out")
    target = read_target(task, table, path, columns)
    for name, values in zip(task.names if len(task.targets) > 1 else columns, target.T, strict=True):
        if len(np.unique(values[~np.isnan(values)])) < 2:
            known = f"{positive!r}, " * (positive is not None) + some_of(cells.iloc[:, 0].dropna().unique())
            raise InputError(f"{path}: {name} is the same in every row ({known}); nothing can be learned from it")
    for name, count in task.counts(target)["counts"].items() if cuts else ():
        if not count:
            raise InputError(f"{path}: {columns[0]} is {name} in no row; pass another --cut")
    return task


def pick_rows(strata: np.ndarray, rows: np.ndarray, limit: int | None) -> np.ndarray:
    """Those rows, in order, or the first `limit` of each stratum among them."""
    if limit is None:
        return rows
    return np.sort(np.concatenate([rows[strata[rows] == stratum][:limit] for stratum in np.unique(strata)]))


# ---------------------------------------------------------------- scores
def main_score(task: Task, target: np.ndarray, prob: np.ndarray) -> float:
    """What is maximised: the task's metric, negative if less of it is better; NaN if it is undefined."""
    metric = task.metrics[task.metric]
    return metric.sign * metric.of(target, prob) if np.isfinite(prob).all() else float("nan")


def prob_of(task: Task, logit: np.ndarray) -> np.ndarray:
    """Predictions (N, K) of an array of logits."""
    import torch  # which preprocess.py does not need

    return task.prob(torch.from_numpy(logit)).numpy()


def score(task: Task, target: np.ndarray, prob: np.ndarray, group: np.ndarray, only_ranks: bool = False) -> dict:
    """All metrics of the task's family, with a 95 % interval of its main one over groups; None if undefined. With
    baselines, and of several labels or classes the AUC of each. only_ranks: those that depend on the order alone."""
    known = ~np.isnan(target).all(axis=1)
    target, prob, group = target[known], prob[known], group[known]
    result = {"rows": len(target), **task.counts(target)}
    for name, metric in task.metrics.items():
        if metric.ranks >= only_ranks and task.ordinal >= metric.ordinal:
            result[name] = plain(metric.of(target, prob)) if len(target) else None
            if metric.baseline and len(target):
                result[f"{name}_of_baseline"] = plain(metric.baseline(target))
    again = task.metrics[task.metric].resampled(target, prob)
    defined = result[task.metric] is not None
    drawn = [again(weight) for weight in scores.bootstrap_weights(group)] if defined else []
    result[f"{task.metric}_interval"] = scores.interval(drawn) if defined else None
    if len(task.names) > 1 and not only_ranks:
        parts = [(task.names[column], *pair) for column, _, *pair in scores.known_labels(target, prob)]
        result["auc_of_each"] = {name: scores.auc(*pair) for name, *pair in parts}
        result["ap_of_each"] = {name: scores.average_precision(*pair) for name, *pair in parts}
    return result


def by_case(task: Task, oof: pd.DataFrame, case: pd.Series) -> pd.DataFrame:
    """Held-out predictions of cases seen in several images, such as lesions (case: of every image, by image_name): the
    median of a quantity and of its prediction, the mean of probabilities, under the name of the first image. Cases
    whose images are of different classes are left out; one in several folds counts in each."""
    parts = oof.assign(case=case[oof[ID]].to_numpy()).groupby(["case", FOLD], sort=False)
    found = parts[task.columns].agg("mean" if task.probabilistic else "median")
    found[ID] = parts[ID].first()
    found[task.targets] = parts[task.targets].first() if task.probabilistic else parts[task.targets].median()
    alike = (parts[task.targets].nunique() <= 1).all(axis=1) | (not task.probabilistic)
    return found[alike].reset_index()


def score_folds(task: Task, oof: pd.DataFrame, group: pd.Series, folds: list[int], ranks: bool = False,
                case: pd.Series | None = None) -> dict:  # fmt: skip
    """Scores of held-out predictions: of every fold, their mean, over all rows, if the main score depends on the order
    alone over ranks inside folds, of cases, and of the classes of a quantity. group, case: of every image, by
    image_name; ranks: the predictions are ranks."""
    groups, fold = group[oof[ID]].to_numpy(), oof[FOLD].to_numpy()
    target, prob = oof[task.targets].to_numpy(float), oof[task.columns].to_numpy(float)
    rows = {k: fold == k for k in folds}
    each = [{"fold": k, **score(task, target[i], prob[i], groups[i], ranks)} for k, i in rows.items()]
    defined = [part[task.metric] for part in each if part[task.metric] is not None]
    found = {
        "metric": task.metric,
        "ranks": ranks,
        "folds": each,
        f"mean_{task.metric}": float(np.mean(defined)) if defined else None,
        "pooled": score(task, target, prob, groups, ranks),
    }
    if task.metrics[task.metric].ranks:
        found["ranked"] = score(task, target, scores.rank_in_fold(prob, fold), groups, only_ranks=True)
    known = ~np.isnan(target[:, 0])
    if task.cuts and known.any():
        parts = target[:, 0], prob[:, 0], groups, fold
        found["bands"] = scores.score_bands(task.cuts, *(part[known] for part in parts))
    table = oof[:0] if case is None else by_case(task, oof, case)
    if len(table):
        whole = score_folds(task, table, group, sorted(set(table[FOLD])), ranks)
        main = {key: value for key, value in whole.get("ranked", {}).items() if key.startswith(task.metric)}
        found["cases"] = whole["pooled"] | main | ({"bands": whole["bands"]} if "bands" in whole else {})
        found["cases"]["left_out"] = len(set(zip(case[oof[ID]], oof[FOLD], strict=True))) - len(table)
    return found


def plain(value: float) -> float | None:
    """A number for JSON, which knows no NaN."""
    return float(value) if np.isfinite(value) else None
