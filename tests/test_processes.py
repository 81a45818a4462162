"""Several processes: together on a fold they do what one does, side by side they take a fold each, and none hangs."""

import os
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SMALL_MODEL
from test_runs import TABLES
from test_train import NO_NORM, fit

from dataset import cut_batches
from plumbing.files import read_json

# what every process runs: calls of train.py one after the other, each in a process group of its own
PROGRAM = """
import json, os, sys
import torch
import train

torch.set_num_threads(1)
scored, predict = [], train.predict

def record(model, *more):
    scored.append(sum(buffer.double().sum().item() for buffer in model.buffers()))
    return predict(model, *more)

train.predict = record
for port, name, *words in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = port
    scored.clear()
    try:
        train.main(train.get_args_parser().parse_args(words))
    except Exception as error:
        scored[:] = [f"{type(error).__name__}: {error}"]
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    with open(f"{name}_{os.environ['RANK']}.json", "w") as file:
        json.dump(scored, file)
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def run_team(size, folder, data_dir, calls):
    """Run calls {name: (model, words)} of train.py in so many processes; returns what each process noted, by name."""
    import json

    words = [[free_port(), name, "--model", model, "--data_dir", data_dir, "--runs_dir", folder / name,
              *SMALL_MODEL, *more] for name, (model, *more) in calls.items()]  # fmt: skip
    program = [sys.executable, "-c", PROGRAM, json.dumps([[str(word) for word in call] for call in words])]
    env = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
                        "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    processes = [subprocess.Popen(program, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=folder,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                 for rank in range(size)]  # fmt: skip
    try:
        output = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(output)
    return {name: [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in range(size)] for name in calls}


TOGETHER = ["--fold", 0, "--epochs", 2, "--patience", 2, *NO_NORM, "--batch_size", 5]
CALLS = {
    "parts": ("resnet", *TOGETHER, "--accumulate", 3),
    "gates": ("fsg_vit", *TOGETHER, "--gate_l1", 0.1, "--clip_grad", 0.5),
    "average": ("resnet", "--fold", 0, "--epochs", 2, "--patience", 2, "--ema", 0.5, "--batch_size", 5),
    "few": ("chipnet", "--fold", 0, "--limit", 1),  # two rows to train on, one test image
    "again": ("resnet", *TOGETHER, "--accumulate", 3, "--runs_dir", "parts"),
    "apart": ("resnet",),
}


@pytest.fixture(scope="module")
def two(data_dir, tmp_path_factory):
    """What two processes left, and what each of them noted."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_team(2, folder, data_dir, CALLS)


def assert_same_numbers(one, other):
    logs = [pd.read_csv(run / "log.csv") for run in (one, other)]
    for column in ("fold", "epoch", "train_loss", "valid_loss", "valid_auc", "lr"):
        assert np.allclose(logs[0][column], logs[1][column], rtol=1e-3), column
    for name in TABLES[:2]:
        tables = [pd.read_csv(run / name, dtype={"image_name": str}) for run in (one, other)]
        assert tables[0]["image_name"].tolist() == tables[1]["image_name"].tolist()
        assert np.allclose(tables[0]["prob"], tables[1]["prob"], atol=1e-4), name
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}


@pytest.mark.parametrize("name", ["parts", "gates"])
def test_two_processes_train_a_fold_as_one_would(two, data_dir, tmp_path, name):
    model, *more = CALLS[name]
    one = fit(data_dir, tmp_path, *more, "--accumulate", 1, model=model)
    assert_same_numbers(one, two[0] / name / model)


def test_all_processes_score_with_the_same_statistics(two):
    for name in ("parts", "average", "few"):
        first, second = two[1][name]
        assert first == second, name
    assert len(set(two[1]["average"][0])) > 1  # they do change


def test_fewer_rows_than_processes(two):
    run = two[0] / "few" / "chipnet"
    assert len(pd.read_csv(run / "test_predictions.csv")) == 1
    assert len(pd.read_csv(run / "oof.csv")) == 2
    assert np.isfinite(pd.read_csv(run / "log.csv")["train_loss"][0])


def test_what_the_leader_refuses_ends_all_processes(two):
    first, second = two[1]["again"]
    assert "InputError" in first[0]
    assert "finished" in first[0]
    assert "Error" in second[0]


def test_folds_side_by_side_are_those_of_one_process(two, runs_dir):
    for name in TABLES:
        assert (two[0] / "apart" / "resnet" / name).read_bytes() == (runs_dir / "resnet" / name).read_bytes()
    log = pd.read_csv(two[0] / "apart" / "resnet" / "log.csv")
    assert log["fold"].tolist() == [0, 1]


def test_more_processes_than_rows(data_dir, tmp_path):
    noted = run_team(3, tmp_path, data_dir, {
        "norms": ("resnet", "--limit", 1, "--ema", 0.5),
        "plain": ("resnet", "--limit", 1, *NO_NORM, "--fold", 0),
    })  # fmt: skip
    assert noted["norms"][0] == noted["norms"][1] == noted["norms"][2]
    assert read_json(tmp_path / "norms" / "resnet" / "metrics.json")["pooled"]["rows"] == 4
    one = fit(data_dir, tmp_path, "--limit", 1, *NO_NORM, "--fold", 0)
    assert_same_numbers(one, tmp_path / "plain" / "resnet")


@pytest.mark.parametrize("n_items", [2, 5, 7, 12, 15])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 9])
def test_shares_make_up_every_batch_and_all_processes_step_as_often(n_items, size, accumulate):
    shares = [cut_batches(n_items, 7, accumulate, rank, size) for rank in range(size)]
    for batch in zip(*shares, strict=True):
        assert len({n for n, _ in batch}) == 1
        assert len({len(parts) for _, parts in batch}) == 1
        rows = [row for _, parts in batch for part in parts for row in part]
        assert len([row for row, weight in rows if weight]) == len({row for row, weight in rows}) == batch[0][0]
        for _, parts in batch:
            assert all(len(part) > 1 and len(set(part)) == len(part) for part in parts)  # batch norms need two
    assert sum(n for n, _ in shares[0]) == n_items
