"""Run directories: what training and blending leave behind.

Every fold writes files of its own; `collect` makes the shared ones of them. A blend is a run too, so blends nest.
"""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from calibration import calibrate, calibrated
from plumbing.data import Data
from plumbing.figures import draw_curves, save_figure
from plumbing.files import check_hashes, copy, read_csv, read_json, remove, sha256, write_json, write_table
from plumbing.images import name_key
from tasks import Task, score_folds, task_of
from util import FOLD, ID, InputError

STACK = "stack.npz"  # in a stack: what it learns from
FINDER = "finder"  # folder in a run on crops: all that finds the boxes of new images
# arguments that may differ between two calls that train folds of one run; inputs are compared by their hashes
FREE_ARGUMENTS = {"fold", "device", "workers", "resume", "overwrite", "max_hours", "data_dir",
                  "crop_dir", "guide", "weights", "runs_dir"}  # fmt: skip


# ---------------------------------------------------------------- reading
@dataclass
class Run:
    """A finished run of train.py, or a blend of ensemble.py."""

    path: Path
    config: dict  # config.json
    metrics: dict  # metrics.json

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.path.name

    @property
    def task(self) -> Task:
        """What it predicts."""
        return task_of(self.config["task"])

    @property
    def folds(self) -> list[int]:
        """The finished folds."""
        return [fold["fold"] for fold in self.metrics["folds"]]

    @property
    def is_blend(self) -> bool:
        """Whether it was blended of other runs."""
        return "members" in self.config

    def table(self, name: str) -> pd.DataFrame:
        """oof.csv or test_predictions.csv; raises InputError if it was changed since it was scored."""
        check_hashes(self.path, {name: self.metrics["sha256"][name]}, "train or blend again")
        return read_csv(self.path / name, (ID, FOLD, *self.task.columns), text=(ID,))

    def checkpoint(self, k: int) -> Path:
        """The best network of a fold; raises InputError if it is not the one that was scored."""
        name, scored = f"fold{k}_best.pt", {fold["fold"]: fold["checkpoint"] for fold in self.metrics["folds"]}
        check_hashes(self.path, {name: scored[k]}, "it is not the network that was scored; train the fold again")
        return self.path / name

    def members(self) -> list[tuple["Run", float]]:
        """Members of a blend with their weights; raises InputError if one was trained again since."""
        found = []
        for member in self.config["members"]:
            path = (self.path / member["run"]).resolve()
            check_hashes(path, {"metrics.json": member["metrics"]}, f"blend {self.path} again")
            found.append((read_run(path), member["weight"]))
        return found


def read_run(path: Path) -> Run:
    """Read a finished run; raises InputError if it is none."""
    config = read_json(path / "config.json")
    if not (path / "metrics.json").exists():
        raise InputError(f"{path} is not finished; train it or go on with --resume")
    return Run(path, config, read_json(path / "metrics.json"))


def find_probe(runs_dir: Path, folds_sha256: str) -> Run | None:
    """A finished probe on the same folds in a directory of runs."""
    for path in sorted(runs_dir.glob("*/metrics.json")):
        with suppress(InputError, OSError):  # a neighbour may be broken, or be written now
            run = read_run(path.parent)
            if run.config["args"].get("model") == "probe" and run.config["inputs"]["folds"] == folds_sha256:
                return run
    return None


def score_line(name: str, metrics: dict) -> str:
    """One line of a result table: main score of the folds and its mean, and out of fold with its interval (of an AUC:
    of ranks inside folds)."""
    metric, pooled = metrics["metric"], metrics.get("ranked", metrics["pooled"])
    values = [*(fold[metric] for fold in metrics["folds"]), metrics[f"mean_{metric}"], pooled[metric]]
    values += pooled[f"{metric}_interval"] or [None, None]
    *folds, mean, oof, low, high = ("-" if value is None else f"{value:.3f}" for value in values)
    return f"{name:<12} {metric} of folds {' '.join(folds)}   mean {mean}   oof {oof} [{low}, {high}]"


def band_lines(metrics: dict) -> list[str]:
    """Lines of a result table for the classes of a quantity, of images and of cases; none without cuts."""
    lines = []
    for what, part in (("images", metrics), ("cases", metrics.get("cases", {}))):
        for cut, of in part.get("bands", {}).items():
            if isinstance(of, dict):
                f1, low, high = of["f1"], *of["f1_interval"]
                lines.append(f"  {what} cut at {cut}: macro F1 {f1:.3f} [{low:.3f}, {high:.3f}], weighted "
                             f"{of['f1_weighted']:.3f}; always the commonest {of['f1_of_baseline']:.3f}, "
                             f"{of['f1_weighted_of_baseline']:.3f}")  # fmt: skip
    return lines


# ---------------------------------------------------------------- writing
def write_run(run_dir: Path, oof: pd.DataFrame, test, data: Data, folds: list, ranks=False, **extra) -> dict:
    """Write what every run, blends included, leaves behind; returns the metrics. oof: image_name, fold, target, prob
    (the columns of the task). test: image_name, fold, prob, or None. folds: facts about each fold (at least its
    number), to which the scores are added. ranks: predictions are ranks, only their order means something. extra:
    further metrics."""
    metrics = score_folds(data.task, oof, data.group, [fold["fold"] for fold in folds], ranks, data.case) | extra
    arrays = [oof[columns].to_numpy(float) for columns in (data.task.targets, data.task.columns)]
    metrics["calibration"] = calibrate(data.task, *arrays, data.group[oof[ID]].to_numpy(), oof[FOLD].to_numpy())
    metrics["folds"] = [facts | new for facts, new in zip(folds, metrics["folds"], strict=True)]
    tables = {"oof.csv": oof}
    if test is not None:
        tables |= {"test_predictions.csv": test, "submission.csv": make_submission(test, data, metrics["calibration"])}
    for name, table in tables.items():
        write_table(run_dir / name, table)
    metrics["sha256"] = {name: sha256(run_dir / name) for name in tables}
    write_json(run_dir / "metrics.json", metrics)
    return metrics


def make_submission(test: pd.DataFrame, data: Data, fit: dict | None = None) -> pd.DataFrame:
    """Mean prediction over folds of the test images predicted, in the sample submission's order and columns; words of
    several labels by the calibration `fit`."""
    mean = test.groupby(test[ID].map(name_key))[data.task.columns].mean()
    id_col, *columns = data.facts["submission_columns"]
    ids = data.test[ID] if data.submission is None else data.submission[id_col]
    ids = ids[ids.map(name_key).isin(mean.index)]  # a dry run with --limit predicts some
    prob = mean.loc[ids.map(name_key)].to_numpy()
    if fit and len(columns) == 1 and len(data.task.names) > 1 and not data.task.sums_to_1:
        prob = calibrated(data.task, prob, fit)
    values = data.task.submit(prob, columns)
    return pd.DataFrame({id_col: ids.to_numpy(), **values})


def open_run(run_dir: Path, config: dict, folds: list[int], resume: bool, overwrite: bool) -> list[int]:
    """Create a run directory or add to it; returns the folds that are still to train. Raises InputError if the run was
    made differently, or if a fold is finished or begun and `resume` is not set."""
    path = run_dir / "config.json"
    if run_dir.exists() and not path.exists() and any(not p.name.endswith(".tmp") for p in run_dir.iterdir()):
        raise InputError(f"{run_dir} holds files but no run; pass another --name")
    if overwrite and path.exists():
        remove_run(run_dir)
    if path.exists():
        kept = config["args"].keys() - FREE_ARGUMENTS
        new, old = ({"task": c["task"], **c["inputs"]} | {key: c["args"][key] for key in kept}
                    for c in (config, read_json(path)))  # fmt: skip
        for key in sorted(key for key in new if new[key] != old.get(key)):
            raise InputError(f"{run_dir} has {key} = {old.get(key)}, not {new[key]}; pass --name or --overwrite")
    run_dir.mkdir(parents=True, exist_ok=True)
    for pattern in ("[!f]*.tmp", *(f"fold{k}_*.tmp" for k in folds)):  # other folds may be training
        remove(run_dir, pattern)
    done = {k for k in folds if (run_dir / f"fold{k}_metrics.json").exists()}
    for k in () if resume else folds:
        if k in done or (run_dir / f"fold{k}_last.pt").exists():
            state = "finished" if k in done else "interrupted"
            raise InputError(f"fold {k} of {run_dir} is {state}; pass --resume to go on or --overwrite to start anew")
    if not path.exists():
        write_json(path, config)
    if config["crop"] is not None:  # after config.json: stopped in between it is a run, and goes on
        copy_finder(Path(config["args"]["crop_dir"]), run_dir / FINDER)
    return [k for k in folds if k not in done]


def remove_run(run_dir: Path) -> None:
    """Remove a run, if it exists, its config.json last: stopped halfway it is an unfinished run."""
    for path in sorted(run_dir.glob("*"), key=lambda path: path.name != "metrics.json"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "config.json":
            path.unlink()
    if run_dir.exists():
        shutil.rmtree(run_dir)


def copy_finder(crop_dir: Path, finder: Path) -> None:
    """Copy into a run what finds boxes: crop.json and the networks it names, so that the run can be moved."""
    finder.mkdir(exist_ok=True)
    networks = read_json(crop_dir / "crop.json")["networks"]
    check_hashes(crop_dir, networks, "run crop.py again")
    for name in (*networks, "crop.json"):
        if not (finder / name).exists():
            copy(crop_dir / name, finder / name)  # calls for other folds may do the same


def write_fold(run_dir: Path, k: int, facts: dict, oof: pd.DataFrame, test: pd.DataFrame | None) -> None:
    """Write the predictions of a fold, and last its metrics: a fold is finished once they exist."""
    write_table(run_dir / f"fold{k}_oof.csv", oof)
    if test is not None:
        write_table(run_dir / f"fold{k}_test.csv", test)
    facts = {"fold": k, "checkpoint": sha256(run_dir / f"fold{k}_best.pt"), **facts}
    write_json(run_dir / f"fold{k}_metrics.json", facts)


def collect(run_dir: Path, data: Data) -> dict:
    """Make the shared files of a run of those of its finished folds; returns the metrics. Calls that finish at the same
    time may both collect: each starts over if a fold came in meanwhile."""

    def gather(name: str) -> pd.DataFrame | None:
        paths = [run_dir / f"fold{k}_{name}.csv" for k in folds]
        tables = [read_csv(path, text=(ID,)) for path in paths if path.exists()]
        return pd.concat(tables, ignore_index=True) if tables else None

    def finished() -> list[int]:
        return sorted(int(path.name[4:-13]) for path in run_dir.glob("fold*_metrics.json"))

    remove(run_dir / FINDER, "*.tmp")  # of a call that was killed while it copied; not at the start: others may copy
    folds = None
    while folds != finished():
        folds = finished()
        oof, log = gather("oof"), gather("log")
        place = pd.Series(np.arange(len(data.train)), index=data.train[ID])
        oof = oof.iloc[np.argsort(place[oof[ID]].to_numpy())]
        for name in ("log", "boxes", "gates", "prune"):
            if (table := gather(name)) is not None:
                write_table(run_dir / f"{name}.csv", table)
        save_figure(run_dir / "curves.png", draw_curves(log, data.task.metric))
        facts = [read_json(run_dir / f"fold{k}_metrics.json") for k in folds]
        metrics = write_run(run_dir, oof, gather("test"), data, facts)
    return metrics
