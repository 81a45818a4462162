"""Check what runs and blends claim against their files, one line a check.

Reads   runs/NAME/ (train.py or ensemble.py), and the data and crops they were trained on
Writes  nothing

    python audit.py runs/resnet runs/ensemble

It re-adds numbers: tables and networks are those that were hashed, every held-out row is there once, scores follow from
predictions, blends from their members. And it predicts a sample of held-out rows again from the checkpoints.
"""

import argparse
from pathlib import Path

import numpy as np

import dataset
import models
import util
from blends import BLENDS, values_of
from plumbing.data import Data, read_data
from plumbing.distributed import pick_device
from plumbing.files import check_hashes
from plumbing.runs import Run, read_run
from tasks import score_folds
from util import FOLD, ID, PROB, TARGET, InputError

SAMPLE = 16  # held-out rows of each fold that are predicted again
TOLERANCE = 1e-3  # of probabilities: batches of another size, folded batch norms


def check_tables(run: Run, data: Data) -> str:
    """Every held-out row of the finished folds is in oof.csv once, with its target, and scores follow from it."""
    oof, train = run.table("oof.csv"), data.train
    expected = train[train[FOLD].isin(run.folds)]
    rows = oof.merge(expected[[ID, FOLD, TARGET]], on=[ID, FOLD, TARGET])
    limit = run.config["args"].get("limit")
    if len(rows) != len(oof) or (len(oof) < len(expected) and not limit and not run.is_blend):
        raise InputError(f"{len(oof)} rows of oof.csv, {len(rows)} of them held out with that target, "
                         f"{len(expected)} expected")  # fmt: skip
    found, expected = run.metrics, score_folds(oof, data.group, run.folds)
    for part in ("pooled", "ranked"):
        for key, value in expected[part].items():
            if not np.allclose(np.array(found[part][key], float), np.array(value, float), 1e-9, 1e-9, equal_nan=True):
                raise InputError(f"{part} {key} is {found[part][key]}, but oof.csv gives {value}")
    return f"{len(oof)} held-out rows, each once; ranked AUC {found['ranked']['auc']:.4f} follows from them"


def check_data(run: Run, data: Data) -> str:
    """The folds are those it was trained on, and the arrays are as hashed."""
    if run.config["inputs"]["folds"] != data.folds_sha256:
        raise InputError(f"{data.directory} has other folds than it was trained on")
    check_hashes(data.directory, data.facts["sha256"], "preprocess and train again")
    return f"{len(data.facts['sha256'])} files as hashed, {data.group.nunique()} groups whole"


def check_networks(run: Run, data: Data, device: str) -> str:
    """A sample of the held-out rows of every fold, predicted again by its checkpoint."""
    args, oof, worst = argparse.Namespace(**run.config["args"]), run.table("oof.csv").set_index([ID, FOLD])[PROB], 0.0
    args.crop_dir, args.guide = args.crop_dir and Path(args.crop_dir), None
    for k in run.folds:
        model, content = models.load_checkpoint(run.checkpoint(k), device)
        if content["trained_on"] != {"folds_sha256": data.folds_sha256, "fold": k}:
            raise InputError(f"fold{k}_best.pt was trained on {content['trained_on']}")
        images, encoder = dataset.make_images(data, k, args, models.MODELS[args.model])
        if encoder.columns != content["encoder"]:
            raise InputError(f"the metadata encoder of fold {k} is not fitted to its training rows")
        some = np.linspace(0, len(images["valid"]) - 1, min(SAMPLE, len(images["valid"]))).astype(int)
        loader = dataset.eval_loader(images["valid"], some, args.batch_size, workers=0)
        prob = models.predict(model, loader, pick_device(device), args.tta, args.amp)
        names = data.train[ID].to_numpy()[images["valid"].rows[some]]
        worst = max(worst, np.abs(prob - oof[[(name, k) for name in names]].to_numpy()).max())
    if worst > TOLERANCE:
        raise InputError(f"a held-out row predicted again is {worst:.4f} away from oof.csv")
    return f"up to {SAMPLE} rows of {len(run.folds)} folds predicted again, at most {worst:.1e} away"


def check_blend(run: Run) -> str:
    """Test predictions follow from the members and their weights."""
    members, blend = run.members(), BLENDS[run.config["args"]["mode"]]
    weights = np.array([weight for _, weight in members])
    if "test_predictions.csv" not in run.metrics["sha256"]:
        return f"{len(members)} members as blended, no test images"
    test = run.table("test_predictions.csv").set_index([ID, FOLD])[PROB]
    probs = [member.table("test_predictions.csv").set_index([ID, FOLD])[PROB][test.index] for member, _ in members]
    oofs = [member.table("oof.csv").set_index([ID, FOLD])[PROB] for member, _ in members]
    held = oofs[0].index.get_level_values(FOLD).to_numpy()
    history = np.column_stack([oof[oofs[0].index] for oof in oofs])
    values = values_of(blend, np.column_stack(probs), test.index.get_level_values(FOLD).to_numpy(), history, held)
    if not np.allclose(blend.score(values @ weights), test, atol=1e-9):
        raise InputError("test_predictions.csv does not follow from the members")
    return f"{len(test)} test predictions follow from {len(members)} members"


def main(args: argparse.Namespace) -> None:
    """Print the checks of the runs and of their members; raises InputError if one fails."""
    wrong, count, runs = [], 0, [read_run(path) for path in args.runs]
    for run in runs:  # grows by the members of blends
        data = read_data(args.data_dir or Path(run.config["args"]["data_dir"]))
        checks = {"data": lambda: check_data(run, data), "tables": lambda: check_tables(run, data)}  # noqa: B023
        if run.is_blend:
            checks["blend"] = lambda: check_blend(run)  # noqa: B023
            known = {other.path.resolve() for other in runs}
            runs += [member for member, _ in run.members() if member.path.resolve() not in known]
        else:
            checks["networks"] = lambda: check_networks(run, data, args.device)  # noqa: B023
        for name, check in checks.items():
            count += 1
            try:
                print(f"ok     {run.name}, {name}: {check()}")
            except (InputError, KeyError) as error:
                wrong.append(f"{run.name}, {name}: {error}")
                print(f"WRONG  {wrong[-1]}")
    if wrong:
        raise InputError(f"{len(wrong)} of {count} checks failed; {wrong[0]}")
    print(f"{count} checks of {len(runs)} runs passed")


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__, "device")
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs or blends")
    parser.add_argument("--data_dir", type=Path, help="from preprocess.py [as the runs say]")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
