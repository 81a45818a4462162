"""Blend finished runs; the blend is a run itself.

Reads   oof.csv and test_predictions.csv of the runs named, or of all finished runs
Writes  runs/NAME/: config.json, oof.csv, test_predictions.csv, submission.csv, metrics.json,
        roc.png

    python ensemble.py weights
    python ensemble.py zoom --runs resnet cropnet
    python ensemble.py mean --runs resnet cropnet --weights resnet=.5 cropnet=.5

mean averages probabilities, logit their logits, rank their ranks inside each fold; weights
averages ranks with weights learned by greedy selection on the held-out predictions; zoom learns
how the weight of the runs on crops depends on the side of the box: a crop of nearly the whole
image says nothing new. Learned weights never score a row they were learned on: what oof.csv holds
is cross-fitted.

References:
    Caruana et al., Ensemble Selection from Libraries of Models, ICML 2004: forward selection
    with replacement.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

import util
from util import FOLD, ID, PROB, TARGET, InputError

LEARNED = ("weights", "zoom")
SELECTION_STEPS = 25
ZOOM_GRID = [(base, slope) for slope in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
             for base in (0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.6, 0.7)]  # fmt: skip
OOF_COLUMNS, TEST_COLUMNS = [ID, FOLD, TARGET, PROB], [ID, FOLD, PROB]


def find_runs(names: list[str] | None, runs_dir: Path, blend: str) -> list[Path]:
    """Directories of the runs to blend; without names all finished ones that are no blends.

    Raises InputError where the blend would take a run's place.
    """
    place = runs_dir / blend
    if (place / "config.json").exists() and "members" not in util.read_config(place):
        raise InputError(f"{place} is a trained run, not a blend; pass another --name")
    if names is None:
        found = sorted(path.parent for path in runs_dir.glob("*/metrics.json"))
        runs = [r for r in found if "members" not in util.read_config(r)]
        if not runs:
            raise InputError(f"{runs_dir} holds no finished run; train one first")
        return runs
    runs = [runs_dir / name if (runs_dir / name).is_dir() else Path(name) for name in names]
    if len({run.name for run in runs}) < len(runs) or blend in {run.name for run in runs}:
        raise InputError(f"--runs {' '.join(names)}: name each run once, and not --name {blend}")
    return runs


def align(tables: dict[str, pd.DataFrame], keys: list[str]) -> tuple[pd.DataFrame, np.ndarray]:
    """Join prediction tables on their keys: (the keys as a table, prob (N, K)).

    Raises InputError where two runs do not predict the same rows.
    """
    (first, base), *others = tables.items()
    if base.duplicated([ID, FOLD]).any():
        raise InputError(f"run {first} predicts {base[ID][base.duplicated([ID, FOLD])].iloc[0]} "
                         "more than once in a fold")  # fmt: skip
    joined = base[keys].assign(**{first: base[PROB].to_numpy()})
    for name, table in others:
        both = joined.merge(table[[*keys, PROB]], on=keys, how="outer", indicator="side")
        odd = both[both["side"] != "both"]
        if len(odd) or len(both) != len(base):
            row = odd.iloc[0] if len(odd) else both.iloc[0]
            has = name if row["side"] == "right_only" else first
            raise InputError(
                f"runs {first} and {name} do not match: only {has} predicts {row[ID]} in fold "
                f"{row[FOLD]} ({len(odd)} such rows); train the same folds of the same data or "
                "name the runs to blend with --runs"
            )
        joined = joined.merge(
            table[[*keys, PROB]].rename(columns={PROB: name}), on=keys, validate="one_to_one"
        )
    return joined[keys], joined[list(tables)].to_numpy()


def read_runs(runs: list[Path]) -> tuple:
    """Joined predictions of several runs: (oof keys, prob (N, K), test keys or None, (M, K))."""
    hashes = {}
    for run in runs:
        config = util.read_config(run)
        util.read_metrics(run)  # refuses a run that is not finished
        hashes[run.name] = config["data"]["folds_sha256"]
    for name, value in hashes.items():
        if value != hashes[runs[0].name]:
            raise InputError(
                f"runs {runs[0].name} and {name} were trained on other data or folds; name the "
                "runs to blend with --runs"
            )
    oofs = {run.name: util.read_predictions(run, "oof.csv", OOF_COLUMNS) for run in runs}
    keys, prob = align(oofs, [ID, FOLD, TARGET])
    with_test = [run for run in runs if (run / "test_predictions.csv").exists()]
    if not with_test:
        return keys, prob, None, None
    tests = {
        run.name: util.read_predictions(run, "test_predictions.csv", TEST_COLUMNS) for run in runs
    }
    return keys, prob, *align(tests, [ID, FOLD])


def check_ids(keys: pd.DataFrame, table: pd.DataFrame | None, data: util.Data) -> None:
    """Raise InputError unless all images predicted are in a table of the data."""
    known = () if table is None else table[ID]
    unknown = keys[ID][~keys[ID].isin(known)]
    if len(unknown):
        raise InputError(f"the runs predict {unknown.iloc[0]!r}, which {data.directory} does not "
                         "have; pass the --data_dir they were trained on")  # fmt: skip


def parse_weights(words: list[str], names: list[str]) -> np.ndarray:
    """Weights (K,) given as NAME=W, scaled to sum 1; runs not named get 0."""
    weights = dict.fromkeys(names, 0.0)
    for word in words:
        name, _, value = word.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            raise InputError(f"--weights {word}: write NAME=NUMBER, as in resnet=0.5") from None
        if name not in names:
            raise InputError(f"--weights {word}: the runs are {', '.join(names)}")
    given = np.array([weights[name] for name in names])
    if not np.isfinite(given).all() or given.min() < 0 or given.sum() <= 0:
        raise InputError(f"--weights {' '.join(words)}: weights are positive numbers")
    return given / given.sum()


def transform(mode: str, prob: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """What a mode blends: probabilities (N, K), or their ranks inside each fold."""
    if mode not in util.RANK_MODES:
        return prob
    return np.column_stack([util.rank_in_fold(column, fold) for column in prob.T])


def fit_weights(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weights (K,) by greedy forward selection with replacement for the AUC of values (N, K)."""
    counts = np.zeros(values.shape[1])
    best_counts, best = counts, -np.inf
    for _ in range(SELECTION_STEPS):
        scores = [util.weighted_auc(target, values @ counts + column) for column in values.T]
        counts = counts + np.eye(len(counts))[int(np.argmax(scores))]
        if max(scores) > best:  # a longer list must be better, not as good
            best_counts, best = counts, max(scores)
    return best_counts / best_counts.sum()


def fit_zoom(
    values: np.ndarray, target: np.ndarray, side: np.ndarray, cropped: np.ndarray
) -> tuple[float, float]:
    """Base and slope of util.zoom_weights with the best AUC; equal ones go to the first."""
    scores = [
        util.weighted_auc(
            target, util.combine("zoom", values, util.zoom_weights(side, cropped, *p))
        )
        for p in ZOOM_GRID
    ]
    return ZOOM_GRID[int(np.argmax(scores))]


def learn_weights(values: np.ndarray, target: np.ndarray, rows: np.ndarray) -> Callable:
    """Weights learned on some rows, as a function of rows: the same for all."""
    weights = fit_weights(values[rows], target[rows])
    return lambda others: weights


def learn_zoom(values, target, side, cropped, rows: np.ndarray) -> Callable:
    """Zoom weights learned on some rows, as a function of rows."""
    base, slope = fit_zoom(values[rows], target[rows], side[rows], cropped)
    return lambda others: util.zoom_weights(side[others], cropped, base, slope)


def cross_fit(learn: Callable, values: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Blend (N,) in which the rows of each part are weighted by what the other parts taught.

    learn(rows) -> a function from rows to the weights of their values.
    """
    blend = np.empty(len(values))
    for label in np.unique(part):
        held_out = part == label
        weigh = learn(~held_out)
        blend[held_out] = util.combine("rank", values[held_out], weigh(held_out))
    return blend


def read_sides(runs: list[Path], data: util.Data, keys: pd.DataFrame, split: str) -> tuple:
    """(mean side of the boxes that runs on crops see, over the short side of the image (N,);
    which runs these are (K,)). Raises InputError unless there are runs of both kinds."""
    configs = [util.read_config(run) for run in runs]
    cropped = np.array([c.get("crop") is not None for c in configs])
    if cropped.all() or not cropped.any():
        raise InputError("zoom blends runs on whole images with runs on crops; name both in --runs")
    tables = [
        util.with_box_side(data.tables()[split], Path(config["args"]["crop_dir"]), split)
        for config, crop in zip(configs, cropped, strict=True)
        if crop
    ]
    sides = [table.set_index(ID)[util.BOX_SIDE][keys[ID]].to_numpy() for table in tables]
    return np.mean(sides, axis=0), cropped


def halves(target: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Two parts (N,) with whole groups, for runs of which one fold alone was trained."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(2, shuffle=True, random_state=0)
    part = np.zeros(len(target), dtype=int)
    part[next(splitter.split(target, target, group))[1]] = 1
    if any(len(np.unique(target[part == label])) < 2 for label in (0, 1)):
        raise InputError("too few positives to learn weights from one fold; train more folds "
                         "or give the weights with --weights")  # fmt: skip
    return part


def difference_interval(target, prob, baseline, group) -> list[float]:
    """95 % bootstrap interval, over groups, of AUC(prob) - AUC(baseline)."""
    weights = util.bootstrap_weights(group)
    gains = [
        util.weighted_auc(target, prob, w) - util.weighted_auc(target, baseline, w) for w in weights
    ]
    return [float(bound) for bound in np.nanquantile(gains, [0.025, 0.975])]


def learn_blend(values, target, fold, group, side: tuple | None) -> tuple:
    """Learn to blend values (N, K): (cross-fitted blend (N,), weights (K,), zoom parameters).

    side: what read_sides says, for weights that depend on the zoom; None for constant ones.
    """
    if side is None:
        zoom, weights = None, fit_weights(values, target)
        learn = partial(learn_weights, values, target)
    else:
        zoom = fit_zoom(values, target, *side)
        weights = util.zoom_weights(*side, *zoom).mean(axis=0)
        learn = partial(learn_zoom, values, target, *side)
    part = fold if len(np.unique(fold)) > 1 else halves(target, group)
    return cross_fit(learn, values, part), weights, zoom


def gain_over_equal_weights(prob, values, target, fold, group) -> dict:
    """AUC of a blend less that of equal weights, ranked inside folds, with its interval."""
    ranks, base = util.rank_in_fold(prob, fold), util.rank_in_fold(values.mean(axis=1), fold)
    return {
        "equal_weights_auc": util.weighted_auc(target, base),
        "gain": util.weighted_auc(target, ranks) - util.weighted_auc(target, base),
        "gain_interval": difference_interval(target, ranks, base, group),
    }


def report(runs: list[Path], config: dict, name: str, metrics: dict) -> None:
    """Print the runs with their weights, the blend, and what learning the weights gained."""
    for run, member in zip(runs, config["members"], strict=True):
        line = util.metrics_line(run.name, util.read_metrics(run))
        print(f"{line}   weight {member['weight']:.2f}")
    if config["zoom"] is not None:
        base, slope = config["zoom"]
        print(f"weight of the crops: {base:g} + {slope:g} x (1 - side of the box)")
    print(util.metrics_line(name, metrics))
    gain = metrics.get("learned")
    if gain is not None:
        print(f"equal weights: oof {gain['equal_weights_auc']:.3f}")
        low, high = gain["gain_interval"]
        print(f"learned weights over equal ones, cross-fitted: {gain['gain']:+.4f} AUC "
              f"[{low:+.4f}, {high:+.4f}]" + ("" if low > 0 else ", not proven"))  # fmt: skip


def main(args: argparse.Namespace) -> Path:
    """Blend the runs; returns the directory of the blend."""
    runs = find_runs(args.runs, args.runs_dir, args.name)
    names = [run.name for run in runs]
    keys, prob, test_keys, test_prob = read_runs(runs)
    member = util.read_config(runs[0])
    data = util.read_data(args.data_dir or Path(member["args"]["data_dir"]))
    check_ids(keys, data.train, data)
    if member["data"]["folds_sha256"] != util.folds_sha256(data.train):
        raise InputError(f"the runs were trained on other folds than {data.directory} has; pass "
                         "their --data_dir or train again")  # fmt: skip
    target, fold = keys[TARGET].to_numpy(), keys[FOLD].to_numpy()
    group = data.group[keys[ID]].to_numpy()

    values = transform(args.mode, prob, fold)
    weights, zoom, gain = np.full(len(runs), 1 / len(runs)), None, None
    if args.weights:
        weights = parse_weights(args.weights, names)
    oof_prob = util.combine(args.mode, values, weights)
    if args.mode in LEARNED and not args.weights:
        side = read_sides(runs, data, keys, "train") if args.mode == "zoom" else None
        oof_prob, weights, zoom = learn_blend(values, target, fold, group, side)
        gain = gain_over_equal_weights(oof_prob, values, target, fold, group)

    oof, test = keys.assign(**{PROB: oof_prob}), None
    if test_keys is not None:
        check_ids(test_keys, data.test, data)
        test_values = transform(args.mode, test_prob, test_keys[FOLD].to_numpy())
        test_weights = weights
        if zoom is not None:
            side, cropped = read_sides(runs, data, test_keys, "test")
            test_weights = util.zoom_weights(side, cropped, *zoom)
        test = test_keys.assign(**{PROB: util.combine(args.mode, test_values, test_weights)})

    output_dir = util.claim_dir(args.runs_dir / args.name, "metrics.json", args.overwrite)
    config = {
        "args": vars(args) | {"data_dir": data.directory},
        "members": [{"run": str(r), "weight": w} for r, w in zip(runs, weights, strict=True)],
        "zoom": zoom,  # base and slope; the weights are their mean
        "data": {"folds_sha256": util.folds_sha256(data.train)},
        **util.provenance(),
    }
    util.write_json(output_dir / "config.json", config)
    folds = [{"fold": int(k)} for k in np.unique(fold)]
    metrics = util.write_run(output_dir, oof, test, data, folds, learned=gain)
    report(runs, config, args.name, metrics)
    return output_dir


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__)
    parser.add_argument("mode", choices=("mean", "rank", "logit", *LEARNED), help="how to blend")
    parser.add_argument("--runs", nargs="+", help="names or paths [all finished runs]")
    parser.add_argument("--weights", nargs="+", metavar="NAME=W", help="fixed weights")
    parser.add_argument("--name", default="ensemble", help="of the blend's run directory")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--data_dir", type=Path, help="from preprocess.py [as the runs say]")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished blend")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
