"""Blend finished runs; the blend is a run itself.

Reads   oof.csv and test_predictions.csv of the runs named, or of all finished runs
Writes  runs/NAME/: config.json, oof.csv, test_predictions.csv, submission.csv, metrics.json, roc.png

    python ensemble.py weights
    python ensemble.py mean --runs resnet cropnet --weights resnet=.5 cropnet=.5

mean averages probabilities, logit their logits, rank their ranks among the held-out rows of each fold; weights averages
ranks, or predictions if more than their order counts, with weights learned by greedy selection on the held-out
predictions (blends.py). Learned weights never score a row they were learned on: what oof.csv holds is cross-fitted.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import pandas as pd

import util
from blends import BLENDS, Blend, average_of, by_order, scores_of, values_of
from calibration import parts_of
from plumbing.data import Data, read_data
from plumbing.files import provenance, read_json, sha256, write_json
from plumbing.runs import Run, read_run, remove_run, score_line, write_run
from scores import bootstrap_weights, interval, rank_in_fold
from tasks import Task
from util import FOLD, ID, InputError


def find_runs(names: list[str] | None, runs_dir: Path, blend: str) -> list[Run]:
    """Runs to blend; without names all finished ones that are no blends."""
    found = [path.parent for path in sorted(runs_dir.glob("*/metrics.json"))]
    if names is not None:
        found = [runs_dir / name if (runs_dir / name).is_dir() else Path(name) for name in names]
    runs = [run for run in map(read_run, found) if names is not None or not run.is_blend]
    if not runs or len({run.name for run in runs} | {blend}) <= len(runs):
        given = " ".join(names or [str(runs_dir)])
        raise InputError(f"--runs {given}: name finished runs, each once, and not {blend}; or train one first")
    return runs


def align(runs: list[Run], name: str, targets: list[str]) -> tuple[pd.DataFrame, np.ndarray]:
    """A table of several runs joined by image and fold: (these and the targets, prob (N, M, K)); raises InputError if
    rows do not match."""
    keys = [ID, FOLD]
    tables = {run.name: run.table(name).set_index(keys) for run in runs}
    first = next(iter(tables.values()))
    for run in runs:
        table = tables[run.name]
        same = len(table) == len(first) and first.index.isin(table.index).all()
        same = same and first[targets].equals(table.loc[first.index, targets])
        if not same or table[run.task.columns].isna().any(axis=None):
            raise InputError(f"{run.name} predicts other rows of {name} than {runs[0].name}; train the same folds, or "
                             "pass --runs")  # fmt: skip
    prob = [tables[run.name].loc[first.index, run.task.columns].to_numpy() for run in runs]
    return first.reset_index()[[*keys, *targets]], np.stack(prob, axis=1)


def parse_weights(words: list[str], names: list[str]) -> np.ndarray:
    """Weights (K,) given as NAME=W, scaled to sum 1; runs not named get 0."""
    given = dict(word.rpartition("=")[::2] for word in words)
    try:
        weights = np.array([float(given.pop(name, 0)) for name in names])
        if given or not 0 < weights.sum() < np.inf or weights.min() < 0:
            raise ValueError
    except ValueError:
        how = f"write NAME=NUMBER, with a positive number and a name of {', '.join(names)}"
        raise InputError(f"--weights {' '.join(words)}; {how}") from None
    return weights / weights.sum()


def cross_fit(blend: Blend, task: Task, values: np.ndarray, target: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Average (N, K) in which the rows of each part are weighted by what the other parts taught."""
    average = np.empty((len(values), values.shape[2]))
    for label in np.unique(part):
        held_out = part == label
        weights = blend.learn(task, values[~held_out], target[~held_out])
        average[held_out] = average_of(values[held_out], weights)
    return average


def gain_over_equal_weights(task: Task, prob, values, target, fold, group) -> dict:
    """Main score of a blend less that of equal weights (greater is better) with its 95 % bootstrap interval over
    groups; an AUC is taken of ranks inside folds."""
    metric, both = task.metrics[task.metric], [prob, values.mean(axis=1)]
    if metric.ranks:
        both = [rank_in_fold(average, fold) for average in both]
    ours, equal = (metric.resampled(target, average) for average in both)
    gains = [metric.sign * (ours(weight) - equal(weight)) for weight in bootstrap_weights(group)]
    once = np.ones(len(target), dtype=int)
    found = {f"equal_weights_{task.metric}": equal(once), "gain": metric.sign * (ours(once) - equal(once))}
    return found | {"gain_interval": interval(gains)}


def report(runs: list[Run], weights: np.ndarray, name: str, metrics: dict) -> None:
    """Print the runs with their weights, the blend, and what learning the weights gained."""
    for run, weight in zip(runs, weights, strict=True):
        print(f"{score_line(run.name, run.metrics)}   weight {weight:.2f}")
    print(score_line(name, metrics))
    if (gain := metrics["learned"]) is not None:
        (low, high), metric = gain["gain_interval"], metrics["metric"]
        print(f"equal weights: oof {gain[f'equal_weights_{metric}']:.3f}")
        print(f"learned weights over equal ones, cross-fitted: {gain['gain']:+.4f} {metric} [{low:+.4f}, {high:+.4f}]"
              + ("" if low > 0 else ", not proven"))  # fmt: skip


def check_data(runs: list[Run], data: Data) -> None:
    """Raise InputError unless all runs were trained on the folds of the data."""
    for run in runs:
        if run.config["inputs"]["folds"] != data.folds_sha256 or run.config["task"] != data.task.facts():
            raise InputError(f"{run.path} has other folds or another target than {data.directory}; pass its --data_dir "
                             "or other --runs")  # fmt: skip


def main(args: argparse.Namespace) -> Path:
    """Blend the runs; returns the directory of the blend."""
    blend, folder = BLENDS[args.mode], args.runs_dir / args.name
    runs = find_runs(args.runs, args.runs_dir, args.name)
    data = read_data(args.data_dir or Path(runs[0].config["args"]["data_dir"]))
    check_data(runs, data)
    task, (oof, prob) = data.task, align(runs, "oof.csv", data.task.targets)
    target, fold, group = oof[task.targets].to_numpy(float), oof[FOLD].to_numpy(), data.group[oof[ID]].to_numpy()

    values, gain = values_of(blend, task, prob, fold, prob, fold), None
    names = [run.name for run in runs]
    weights = parse_weights(args.weights or [f"{name}=1" for name in names], names)
    average = average_of(values, weights)
    if blend.learn and not args.weights:
        weights = blend.learn(task, values, target)
        if (part := parts_of(task, target, group, fold)) is None:
            raise InputError("too few rows of a class to learn weights from one fold; train more, or pass --weights")
        average = cross_fit(blend, task, values, target, part)
        gain = gain_over_equal_weights(task, average, values, target, fold, group)
    history = average_of(prob, weights), fold
    oof[task.columns], test = scores_of(blend, task, average, fold, *history), None
    if any("test_predictions.csv" in run.metrics["sha256"] for run in runs):
        test, test_prob = align(runs, "test_predictions.csv", [])
        test_fold = test[FOLD].to_numpy()
        test_values = values_of(blend, task, test_prob, test_fold, prob, fold)
        test[task.columns] = scores_of(blend, task, average_of(test_values, weights), test_fold, *history)

    if any(path.suffix != ".tmp" for path in folder.glob("*")):  # else a call was stopped before its first file
        is_blend = (folder / "config.json").exists() and "members" in read_json(folder / "config.json")
        if not is_blend or ((folder / "metrics.json").exists() and not args.overwrite):
            raise InputError(f"{folder} is already there; pass another --name, or --overwrite to replace a blend")
    remove_run(folder)
    folder.mkdir(parents=True)
    places = [{"run": os.path.relpath(run.path, folder), "metrics": sha256(run.path / "metrics.json")} for run in runs]
    members = [place | {"weight": weight} for place, weight in zip(places, weights, strict=True)]
    config = {"args": vars(args) | {"data_dir": data.directory.resolve()}, "members": members,
              "inputs": {"folds": data.folds_sha256}, "task": task.facts()}  # fmt: skip
    write_json(folder / "config.json", config | provenance())
    ranks = blend.ranks and by_order(task)
    metrics = write_run(folder, oof, test, data, [{"fold": int(k)} for k in np.unique(fold)], ranks, learned=gain)
    report(runs, weights, args.name, metrics)
    return folder


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__, "runs_dir", "overwrite")
    parser.add_argument("mode", choices=tuple(BLENDS), help="how to blend")
    parser.add_argument("--runs", nargs="+", help="names or paths [all finished runs]")
    parser.add_argument("--weights", nargs="+", metavar="NAME=W", help="fixed weights")
    parser.add_argument("--name", default="ensemble", help="of the blend's run directory")
    parser.add_argument("--data_dir", type=Path, help="from preprocess.py [as the runs say]")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
