"""Check what runs and blends claim against their files, one line a check.

Reads   runs/NAME/ (train.py or ensemble.py), and the data and crops they were trained on
Writes  nothing

    python audit.py runs/resnet runs/ensemble

It re-adds numbers: files are those that were hashed, every held-out row is there once, scores follow from predictions.
And it predicts a sample of the held-out rows again from the checkpoints.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import dataset
import models
import util
from plumbing.cells import make_cells
from plumbing.data import Data, read_data
from plumbing.distributed import pick_device
from plumbing.files import check_hashes
from plumbing.runs import Run, read_run, score_line
from tasks import score_folds
from util import FOLD, ID, InputError

SAMPLE = 16  # held-out rows of each fold that are predicted again
TOLERANCE = 1e-3  # of probabilities: batches of another size round otherwise


def check_data(run: Run, data: Data, device: torch.device) -> tuple[bool, str]:
    """The folds are those of the run, and the arrays are as hashed."""
    check_hashes(data.directory, data.facts["sha256"], "preprocess and train again")
    return run.config["inputs"]["folds"] == data.folds_sha256, f"folds and {len(data.facts['sha256'])} files as hashed"


def check_scores(run: Run, data: Data, device: torch.device) -> tuple[bool, str]:
    """oof.csv has every held-out row of the finished folds once, and all scores follow from it."""
    oof, expected = run.table("oof.csv"), data.train[data.train[FOLD].isin(run.folds)]
    keys = [ID, FOLD, *data.task.targets]
    known = oof[ID].is_unique and len(oof.merge(expected[keys], on=keys)) == len(oof)
    complete = len(oof) == len(expected) or run.is_blend or run.config["args"]["limit"] is not None
    again, same = score_folds(data.task, oof, data.group, run.folds, run.metrics["ranks"]), True
    for part in again.keys() & {"pooled", "ranked"}:
        for key, value in again[part].items():
            both = [list(x.values()) if isinstance(x, dict) else x for x in (value, run.metrics[part][key])]
            same &= np.allclose(*(np.array(x, float) for x in both), equal_nan=True)
    found = score_line(run.name, again).partition("oof ")[2]
    return known and complete and same, f"{len(oof)} held-out rows, out of fold {found}"


def check_networks(run: Run, data: Data, device: torch.device) -> tuple[bool, str]:
    """A sample of every fold's held-out rows is predicted as in oof.csv; what is fitted saw training rows."""
    if run.is_blend:
        return True, f"{len(run.members())} members as blended"
    known = {"tile": 0, "finetune": None} | run.config["args"]  # runs of older versions know no tiles
    args, oof, worst, fitted = argparse.Namespace(**known), run.table("oof.csv"), 0.0, True
    args.crop_dir, args.guide = args.crop_dir and Path(args.crop_dir), None
    for k in run.folds:
        model, content = models.load_checkpoint(run.checkpoint(k), device)
        if isinstance(model, models.Scout):
            data.cells = data.cells or make_cells(model, data, util.CPUS)
        images, encoder, task = dataset.make_images(data, k, args, models.MODELS[args.model])
        fitted &= encoder.columns == content["encoder"] and task.facts() == content["task"]
        valid, expected = images["valid"], oof[oof[FOLD] == k].set_index(ID)[task.columns]
        some = np.linspace(0, len(valid) - 1, min(SAMPLE, len(valid))).astype(int)
        loader = dataset.eval_loader(valid, some, args.batch_size, workers=0)
        prob = models.predict(model, task, loader, device, args.tta, args.amp)
        away = np.abs(prob - expected.loc[data.train[ID].to_numpy()[valid.rows[some]]].to_numpy()) / task.std
        worst = max(worst, away.max())
    return fitted and worst < TOLERANCE, f"up to {SAMPLE} rows of each fold predicted again, at most {worst:.1e} away"


def main(args: argparse.Namespace) -> None:
    """Print the checks of the runs and of their members; raises InputError if one fails."""
    runs, wrong, device = [read_run(path) for path in args.runs], [], pick_device(args.device)
    for run in runs:  # grows by the members of blends
        data = read_data(args.data_dir or Path(run.config["args"]["data_dir"]))
        for check in (check_data, check_scores, check_networks):
            try:
                good, text = check(run, data, device)
            except (InputError, OSError, KeyError) as error:
                good, text = False, f"{error}"
            print(f"{'ok   ' if good else 'WRONG'} {run.name}, {check.__name__[6:]}: {text}")
            wrong += [] if good else [f"{run.name}, {check.__name__[6:]}: {text}"]
        known = {other.path.resolve() for other in runs}
        runs += [member for member, _ in run.members() if member.path.resolve() not in known] if run.is_blend else []
    if wrong:
        raise InputError(f"{len(wrong)} checks failed: {wrong[0]}")
    print(f"{3 * len(runs)} checks of {len(runs)} runs passed")


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__, "device")
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs or blends")
    parser.add_argument("--data_dir", type=Path, help="from preprocess.py [as the runs say]")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
