"""Blend finished runs; the blend is a run itself.

Reads   oof.csv and test_predictions.csv of the runs named, or of all finished runs
Writes  runs/NAME/: config.json, oof.csv, test_predictions.csv, submission.csv, metrics.json; of a stack also stack.npz,
        which it learns from

    python ensemble.py weights
    python ensemble.py mean --runs resnet cropnet --weights resnet=.5 cropnet=.5
    python ensemble.py stack --runs resnet cropnet --meta_cols sex age_approx --features features

mean averages probabilities, logit their logits, rank their ranks among the held-out rows of each fold; weights averages
ranks, or predictions if more than their order counts, with weights learned by greedy selection on the held-out
predictions (blends.py). stack boosts trees on the same, on metadata and with --features on what features.py found in
the images. What is learned never scores a row it was learned on: what oof.csv holds is cross-fitted.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import pandas as pd

import util
from blends import BLENDS, Blend, Weighted, average_of, by_order, scores_of, values_of
from calibration import parts_of
from plumbing.data import Data, MetaEncoder, meta_columns, read_data
from plumbing.files import atomic, check_hashes, provenance, read_json, sha256, write_json
from plumbing.runs import STACK, Run, band_lines, read_run, remove_run, score_line, write_run
from scores import bootstrap_weights, interval, rank_in_fold
from tasks import Task
from util import BOX_SIDE, FOLD, ID, InputError


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


def cross_fit(blend: Blend, task: Task, values: np.ndarray, extra, target: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Mixture (N, K) in which the rows of each part are mixed by what the other parts taught."""
    mixture = np.empty((len(values), values.shape[2]))
    for label in np.unique(part):
        held_out = part == label
        mix = blend.learn(task, values[~held_out], extra[~held_out], target[~held_out])
        mixture[held_out] = mix(values[held_out], extra[held_out])
    return mixture


class Extra:
    """What a stack knows of images besides predictions: metadata, and features of one of the runs."""

    def __init__(self, args: argparse.Namespace, data: Data, runs: list[Run]):
        self.data, self.folder, self.facts = data, args.features, None
        names = meta_columns(data.train, args.meta_cols)
        self.encoder = MetaEncoder.fit(data.train, [name for name in names if name != BOX_SIDE])
        if args.features is not None:
            self.facts = read_json(args.features / "features.json")
            check_hashes(args.features, self.facts["sha256"], "run features.py again")
            hashes = {sha256(run.path / "metrics.json"): i for i, run in enumerate(runs)}
            if self.facts["limit"] is not None:
                raise InputError(f"--features {args.features} are of a dry run; run features.py without --limit")
            if self.facts["run"] not in hashes or "train" not in self.facts["rows"]:
                raise InputError(f"--features {args.features} are not of the tables of a run that is blended; run "
                                 "features.py --run on one of them, without images")  # fmt: skip
            self.facts = {**self.facts, "member": hashes[self.facts["run"]]}

    def of(self, split: str, keys: pd.DataFrame) -> np.ndarray:
        """(n, E) of rows with image_name and fold."""
        table = self.data.tables()[split].set_index(ID).loc[keys[ID]]
        extra = self.encoder.encode(table)
        if self.facts is None:
            return extra
        from places import read_rows, widen  # torch, which other blends do without

        rows = read_rows(self.folder / f"{split}.csv")
        vectors = np.load(self.folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)
        return np.concatenate([extra, widen(rows, vectors, keys, self.data.task.names, vectors.shape[1])], axis=1)

    def describe(self) -> dict:
        """What predict.py needs to know them of new images."""
        return {"encoder": self.encoder.columns, "features": self.facts}


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


def report(runs: list[Run], weights: np.ndarray, name: str, metrics: dict, blend: Blend) -> None:
    """Print the runs with their weights, the blend, and what learning gained."""
    for run, weight in zip(runs, weights, strict=True):
        print(score_line(run.name, run.metrics) + ("" if blend.stacks else f"   weight {weight:.2f}"))
    print(score_line(name, metrics), *band_lines(metrics), sep="\n")
    if (gain := metrics["learned"]) is not None:
        (low, high), metric = gain["gain_interval"], metrics["metric"]
        print(f"equal weights: oof {gain[f'equal_weights_{metric}']:.3f}")
        what = "stack over equal weights" if blend.stacks else "learned weights over equal ones"
        print(f"{what}, cross-fitted: {gain['gain']:+.4f} {metric} [{low:+.4f}, {high:+.4f}]"
              + ("" if low > 0 else ", not proven"))  # fmt: skip


def check_data(runs: list[Run], data: Data) -> None:
    """Raise InputError unless all runs were trained on the folds of the data."""
    for run in runs:
        if run.config["inputs"]["folds"] != data.folds_sha256 or run.task != data.task:
            raise InputError(f"{run.path} has other folds or another target than {data.directory}; pass its --data_dir "
                             "or other --runs")  # fmt: skip


def main(args: argparse.Namespace) -> Path:
    """Blend the runs; returns the directory of the blend."""
    blend, folder = BLENDS[args.mode], args.runs_dir / args.name
    if blend.stacks and args.weights:
        raise InputError("--weights are not for a stack; pass mean")
    for key in ("features", "meta_cols") if not blend.stacks else ():
        if getattr(args, key) is not None:
            raise InputError(f"--{key} is for a stack; leave it out")
    runs = find_runs(args.runs, args.runs_dir, args.name)
    data = read_data(args.data_dir or Path(runs[0].config["args"]["data_dir"]))
    check_data(runs, data)
    task, (oof, prob) = data.task, align(runs, "oof.csv", data.task.targets)
    target, fold, group = oof[task.targets].to_numpy(float), oof[FOLD].to_numpy(), data.group[oof[ID]].to_numpy()

    values, gain, names = values_of(blend, task, prob, fold, prob, fold), None, [run.name for run in runs]
    stack = Extra(args, data, runs) if blend.stacks else None
    extra = stack.of("train", oof) if stack else np.empty((len(oof), 0))
    mix = Weighted(parse_weights(args.weights or [f"{name}=1" for name in names], names))
    mixture = mix(values)
    if blend.learn and not args.weights:
        mix = blend.learn(task, values, extra, target)
        if (part := parts_of(task, target, group, fold)) is None:
            raise InputError("too few rows of a class to learn from one fold; train more, or pass mean")
        mixture = cross_fit(blend, task, values, extra, target, part)
        gain = gain_over_equal_weights(task, mixture, values, target, fold, group)
    history = average_of(prob, mix.weights), fold
    oof[task.columns], test = scores_of(blend, task, mixture, fold, *history), None
    if any("test_predictions.csv" in run.metrics["sha256"] for run in runs):
        test, test_prob = align(runs, "test_predictions.csv", [])
        test_fold = test[FOLD].to_numpy()
        test_values = values_of(blend, task, test_prob, test_fold, prob, fold)
        test_extra = stack.of("test", test) if stack else None
        test[task.columns] = scores_of(blend, task, mix(test_values, test_extra), test_fold, *history)

    if any(path.suffix != ".tmp" for path in folder.glob("*")):  # else a call was stopped before its first file
        is_blend = (folder / "config.json").exists() and "members" in read_json(folder / "config.json")
        if not is_blend or ((folder / "metrics.json").exists() and not args.overwrite):
            raise InputError(f"{folder} is already there; pass another --name, or --overwrite to replace a blend")
    remove_run(folder)
    folder.mkdir(parents=True)
    places = [{"run": os.path.relpath(run.path, folder), "metrics": sha256(run.path / "metrics.json")} for run in runs]
    members = [place | {"weight": weight} for place, weight in zip(places, mix.weights, strict=True)]
    config = {"args": vars(args) | {"data_dir": data.directory.resolve()}, "members": members,
              "inputs": {"folds": data.folds_sha256}, "task": task.facts()}  # fmt: skip
    if stack:
        with atomic(folder / STACK) as temporary, open(temporary, "wb") as file:
            np.savez(file, values=values, extra=extra, target=target)
        config["stack"] = stack.describe() | {"sha256": sha256(folder / STACK)}
    write_json(folder / "config.json", config | provenance())
    ranks = blend.ranks and by_order(task)
    metrics = write_run(folder, oof, test, data, [{"fold": int(k)} for k in np.unique(fold)], ranks, learned=gain)
    report(runs, mix.weights, args.name, metrics, blend)
    return folder


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__, "runs_dir", "overwrite")
    parser.add_argument("mode", choices=tuple(BLENDS), help="how to blend")
    parser.add_argument("--runs", nargs="+", help="names or paths [all finished runs]")
    parser.add_argument("--weights", nargs="+", metavar="NAME=W", help="fixed weights")
    parser.add_argument("--meta_cols", nargs="*", help="metadata columns of a stack [sex, age and site]")
    parser.add_argument("--features", type=Path, help="of a stack: from features.py, of one of the runs")
    parser.add_argument("--name", default="ensemble", help="of the blend's run directory")
    parser.add_argument("--data_dir", type=Path, help="from preprocess.py [as the runs say]")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
