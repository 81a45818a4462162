"""Derive everything that runs and blends claim from their files again, one line a check.

Reads   runs/NAME/ (train.py or ensemble.py), and the data and crops they were made on
Writes  nothing

    python audit.py runs/resnet runs/ensemble
"""

import argparse
import io
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import ensemble
import models
import util
from dataset import MetaEncoder
from util import FOLD, ID, PROB, TARGET, InputError


@dataclass
class Claims:
    """What a run or blend left behind, and the data it was made on."""

    run_dir: Path
    config: dict
    data: util.Data
    metrics: dict
    oof: pd.DataFrame
    test: pd.DataFrame | None
    crop_dir: Path | None
    limit: int | None  # of a dry run; a blend has that of its members

    @property
    def folds(self) -> list[int]:
        """The finished folds."""
        return [fold["fold"] for fold in self.metrics["folds"]]


def read_claims(run_dir: Path, data_dir: Path | None) -> Claims:
    """Read a finished run; its data from data_dir, or from where the run says."""
    config = origin = util.read_config(run_dir)
    while "members" in origin:
        origin = util.read_config(Path(origin["members"][0]["run"]))
    data = util.read_data(data_dir or Path(config["args"]["data_dir"]))
    oof, test = util.read_predictions(run_dir, "oof.csv", [ID, FOLD, TARGET, PROB]), None
    if data.test is not None:
        test = util.read_predictions(run_dir, "test_predictions.csv", [ID, FOLD, PROB])
    crop_dir = Path(config["args"]["crop_dir"]) if config.get("crop") else None
    limit = origin["args"]["limit"]
    return Claims(run_dir, config, data, util.read_metrics(run_dir), oof, test, crop_dir, limit)


def demand(good: bool, problem: str) -> None:
    """Raise InputError unless all is well."""
    if not good:
        raise InputError(problem)


def same(one, other) -> bool:
    """Whether numbers are equal but for the last digits, or other values exactly."""
    try:
        return np.allclose(np.array(one, float), np.array(other, float), 1e-9, 1e-9, True)
    except (TypeError, ValueError):
        return one == other


def demand_same(where: str, found: dict, expected: dict) -> int:
    """Raise InputError where an expected value is not the one found; returns their number."""
    for key, value in expected.items():
        demand(same(found[key], value), f"{where}: {key} is {found[key]}, it should be {value}")
    return len(expected)


def demand_rows(where: str, found: pd.DataFrame, expected: pd.DataFrame) -> str:
    """Raise InputError unless the expected rows are there, each once."""
    both = expected.merge(found[list(expected)], how="outer", indicator="side")
    for row in both[both["side"] != "both"].to_dict("records"):
        what = "lacks" if row.pop("side") == "left_only" else "should not have"
        raise InputError(f"{where} {what} " + ", ".join(f"{key} {row[key]}" for key in row))
    for name in found[ID][found.duplicated([ID, FOLD])]:
        raise InputError(f"{where} has {name} more than once")
    return f"{len(found)} rows, each once"


def check_data(run: Claims) -> str:
    """Folds, tables and arrays are those of the run, and no group is in two folds."""
    demand_same("folds of the data, sha256", run.config["data"],
                {"folds_sha256": util.folds_sha256(run.data.train)})  # fmt: skip
    sources, hashes = [("data_dir", run.data.directory, run.data.facts)], {}
    if run.crop_dir is not None:
        sources.append(("crop_dir", run.crop_dir, run.config["crop"]))
    for key, folder, facts in sources:
        found = {name: util.sha256(folder / name) for name in facts["sha256"]}
        demand_same(f"sha256 in {folder}", found, facts["sha256"])
        hashes |= {f"{Path(run.config['args'][key]).name}/{name}": found[name] for name in found}
    demand_same("sha256 of arrays", hashes, run.config["data"].get("arrays", {}))
    groups = util.check_groups(run.data)
    return f"{len(hashes)} files as hashed; {len(run.data.train)} rows, {groups} groups whole"


def check_oof(run: Claims) -> str:
    """oof.csv has every held-out row of the finished folds, as the data has it."""
    held_out = run.data.train[run.data.train[FOLD].isin(run.folds)]
    if run.limit:
        held_out = held_out.groupby([FOLD, TARGET]).head(run.limit)
    return demand_rows("oof.csv", run.oof, held_out[[ID, FOLD, TARGET]])


def check_test(run: Claims) -> str:
    """test_predictions.csv has every test image in every fold; submission.csv is their mean."""
    if run.test is None:
        return "no test images"
    folds = pd.DataFrame({FOLD: run.folds})
    expected = run.data.test[[ID]][: run.limit].merge(folds, how="cross")
    rows = demand_rows("test_predictions.csv", run.test, expected)
    found = util.read_csv(run.run_dir / "submission.csv", [TARGET])
    mean = util.mean_over_folds(run.test, run.data)
    demand(found[ID].tolist() == mean[ID].tolist(), "submission.csv has other rows or order")
    demand_same("submission.csv", *(t.set_index(ID)[TARGET].to_dict() for t in (found, mean)))
    return f"{rows}; {len(found)} rows of submission.csv, the mean over folds in the sample's order"


def check_metrics(run: Claims) -> str:
    """Every score of metrics.json is what oof.csv gives; the tables are those it was written by."""
    tested = [] if run.test is None else ["test_predictions.csv", "submission.csv"]
    hashes = {name: util.sha256(run.run_dir / name) for name in ("oof.csv", *tested)}
    demand_same("metrics.json: sha256", run.metrics["sha256"], hashes)
    expected = util.score_folds(run.oof, run.data, run.folds)
    count = sum(demand_same(f"metrics.json: fold {k}", *both) for k, *both in
                zip(run.folds, run.metrics["folds"], expected["folds"], strict=True))  # fmt: skip
    for part in ("pooled", "ranked"):
        count += demand_same(f"metrics.json: {part}", run.metrics[part], expected[part])
    return f"{count} scores as oof.csv gives them, {len(hashes)} tables as hashed"


def check_log(run: Claims) -> str:
    """The epochs of metrics.json are those of log.csv."""
    log = util.read_csv(run.run_dir / "log.csv", ("epoch", "valid_auc"), FOLD)
    for k, fold in zip(run.folds, run.metrics["folds"], strict=True):
        rows = log[log[FOLD] == str(k)]
        auc, epochs = rows["valid_auc"].to_numpy(), rows["epoch"].tolist()
        demand(epochs == [*range(1, fold["epochs"] + 1)], f"log.csv: fold {k} has epochs {epochs}")
        seen = {"best_epoch": auc.argmax() + 1, "best_valid_auc": auc.max()}
        demand_same(f"fold {k} by log.csv", fold, seen | {"last_valid_auc": auc[-1]})
    return f"{len(log)} epochs, best and last as in metrics.json"


def read_network(path: Path, fold: int, hashed: str) -> dict:
    """A checkpoint; raises InputError where it is another fold's or has another hash."""
    content = models.read_torch_file(path)
    demand(content.get("fold") == fold, f"{path} is the network of fold {content.get('fold')}")
    demand(util.sha256(path) == hashed, f"{path} is not the network that was scored")
    return content


def check_networks(run: Claims) -> str:
    """Checkpoints are those that were scored; their encoders know the training rows alone."""
    table, columns = run.data.train, 0
    if run.crop_dir is not None:
        table = util.with_box_side(table, run.crop_dir, "train")
    for k, fold in zip(run.folds, run.metrics["folds"], strict=True):
        content = read_network(run.run_dir / f"fold{k}_best.pt", k, fold["checkpoint"])
        found = {"spec": content["spec"] | {"meta_dim": 0}, "epoch": content["epoch"]}
        expected = {"spec": run.config["spec"], "epoch": fold["best_epoch"]}
        demand_same(f"fold{k}_best.pt", found, expected)
        rows = table[table[FOLD] != k]
        rows = rows.groupby(TARGET).head(run.limit) if run.limit else rows
        fitted = MetaEncoder.fit(rows, list(content["encoder"])).columns
        for name, column in content["encoder"].items():
            where = f"encoder of fold {k}, fitted to its training rows, {name}"
            columns += demand_same(where, column, fitted[name]) > 0
    return f"{len(run.folds)} as scored; {columns} metadata columns fitted to training rows alone"


def check_crops(run: Claims) -> str:
    """No held-out image was cropped by a network that saw it."""
    if run.crop_dir is None:
        return "none used"
    crop, fold = util.read_json(run.crop_dir / "crop.json"), run.data.train[FOLD]
    demand(crop == run.config["crop"], f"{run.crop_dir} was cropped again since")
    demand_same("crop.json", crop, {"folds_sha256": util.folds_sha256(run.data.train)})
    boxes = util.read_table(run.crop_dir / "train_boxes.csv", ["oof"])
    unseen = fold.isin(crop["folds"]) | (not crop["folds"])  # boxes from a csv saw no image
    said, is_so = (dict(zip(boxes[ID], oof, strict=True)) for oof in (boxes["oof"], unseen))
    demand_same("oof in train_boxes.csv", said, is_so)
    demand(unseen[fold.isin(run.folds)].all(), "networks cropped held-out images they had seen")
    for key, value in crop["checkpoints"].items():
        read_network(Path(crop["run"]) / f"{key}_best.pt", int(key.removeprefix("fold")), value)
    return f"{len(boxes)} boxes, by {len(crop['checkpoints'])} networks as hashed, oof as recorded"


def check_blend(run: Claims) -> str:
    """ensemble.py makes the same blend of the members again, with weights learned anew."""
    args, members = run.config["args"], [member["run"] for member in run.config["members"]]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        words = [args["mode"], "--runs", *members, "--runs_dir", folder, "--name", args["name"],
                 "--data_dir", str(run.data.directory)]  # fmt: skip
        words += ["--weights", *args["weights"]] if args["weights"] else []
        made = ensemble.main(ensemble.get_args_parser().parse_args(words))
        again = read_claims(made, run.data.directory)
    for key in ("members", "zoom"):
        demand_same("config.json", run.config, {key: again.config[key]})
    demand_same("metrics.json", run.metrics, {"learned": again.metrics["learned"]})
    for name in ("oof", "test") if run.test is not None else ("oof",):
        tables = getattr(run, name), getattr(again, name)
        probs = (table.set_index([ID, FOLD])[PROB].to_dict() for table in tables)
        demand_same(f"prob of {name}", *probs)
    how = "cross-fitted" if run.metrics["learned"] else "given"
    return f"{len(run.oof)} rows of {len(members)} members blended again, weights {how}"


CHECKS = (check_data, check_oof, check_test, check_metrics)
MODEL_CHECKS, BLEND_CHECKS = (check_log, check_networks, check_crops), (check_blend,)


def main(args: argparse.Namespace) -> None:
    """Print the checks of the runs and of their members; raises InputError where one fails."""
    wrong, count, runs = [], 0, list(args.runs)

    def attempt(name: str, check: Callable, *words):
        try:
            return check(*words)
        except Exception as error:  # a file may be broken in any way
            text = str(error) if isinstance(error, InputError) else repr(error)
            if isinstance(error, KeyError):
                text = f"{error} is nowhere recorded: another version wrote the run"
            wrong.append(f"{name}: {' '.join(text.split())}")
            print(f"WRONG  {wrong[-1]}")

    for run_dir in runs:  # grows by the members of blends
        run = attempt(f"{run_dir.name}: files", read_claims, run_dir, args.data_dir)
        if run is None:
            continue
        members = [Path(member["run"]) for member in run.config.get("members", ())]
        for check in (*CHECKS, *(BLEND_CHECKS if members else MODEL_CHECKS)):
            name, count = f"{run_dir.name}: {check.__name__.removeprefix('check_')}", count + 1
            result = attempt(name, check, run)
            if result is not None:
                print(f"ok     {name}: {result}")
        known = {path.resolve() for path in runs}
        runs += [member for member in members if member.resolve() not in known]
    demand(not wrong, f"{len(wrong)} checks failed; {' '.join(wrong[:1])}")
    print(f"{count} checks of {len(runs)} runs: what they claim follows from their files")


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs or blends")
    parser.add_argument("--data_dir", type=Path, help="from preprocess.py [as the runs say]")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser(), models.ModelError)
