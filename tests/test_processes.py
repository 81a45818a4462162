"""Several processes: together on a fold they do what one does, side by side they take a fold each, and none hangs."""

import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SMALL_MODEL, read
from test_runs import TABLES, assert_same_tables, names
from test_train import NO_NORM, TWO_EPOCHS, fit
from torch import distributed

from plumbing.distributed import Team

# calls of train.py in several processes, each call in a process group of its own; notes what each process scored with
PROGRAM = """
import json, multiprocessing, os, sys, dataset, torch, train

def record(model, *more, predict=train.predict):
    noted.append(sum(buffer.double().sum().item() for buffer in model.buffers()))
    return predict(model, *more)

def work(rank):
    global noted
    os.environ["RANK"] = str(rank)
    for name, port, *words in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"], noted = port, []
        try:
            train.main(train.get_args_parser().parse_args(words))
        except Exception as error:
            noted = [f"{type(error).__name__}: {error}"]
            torch.distributed.destroy_process_group()
        with open(f"{name}_{rank}.json", "w") as file:
            json.dump(noted, file)

train.predict = record
dataset.hair_bank(64)  # drawn once, not in each process
fork = multiprocessing.get_context("fork")
processes = [fork.Process(target=work, args=(rank,)) for rank in range(int(os.environ["WORLD_SIZE"]))]
for process in processes:
    process.start()
for process in processes:
    process.join(200)
    process.kill()
sys.exit(any(process.exitcode != 0 for process in processes))
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def run_team(size, folder, data_dir, calls):
    """Run calls {name: words} of train.py in so many processes; returns what each process noted, by name."""
    words = []
    for name, more in calls.items():
        words.append([name, free_port(), "--data_dir", data_dir, "--runs_dir", folder / name, *SMALL_MODEL, *more])
    program = [sys.executable, "-c", PROGRAM, json.dumps([[str(word) for word in call] for call in words])]
    env = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=env | {"GLOO_SOCKET_IFNAME": "lo"}, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in range(size)] for name in calls}


TOGETHER = [*TWO_EPOCHS, *NO_NORM, "--batch_size", 5]
CALLS = {
    "parts": ["--model", "resnet", *TOGETHER, "--accumulate", 3],
    "gates": ["--model", "fsg_vit", *TOGETHER, "--gate_l1", 0.1, "--clip_grad", 0.5],
    "average": ["--model", "resnet", *TWO_EPOCHS, "--ema", 0.5, "--batch_size", 5],
    "few": ["--model", "chipnet", "--fold", 0, "--limit", 1],  # two rows to train on, one test image
    "again": ["--model", "resnet", *TOGETHER, "--accumulate", 3, "--runs_dir", "parts"],
    "apart": ["--model", "resnet"],
}


@pytest.fixture(scope="module")
def two(data_dir, tmp_path_factory):
    """What two processes left, and what each of them noted."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_team(2, folder, data_dir, CALLS)


def assert_same_numbers(one, other):
    logs = [pd.read_csv(run / "log.csv").drop(columns=["seconds", "images_per_second"]) for run in (one, other)]
    assert np.allclose(*logs, rtol=1e-3)
    for name in TABLES:
        tables = [read(run / name) for run in (one, other)]
        pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-4)
    assert names(one) == names(other)


@pytest.mark.parametrize(("name", "model"), [("parts", "resnet"), ("gates", "fsg_vit")])
def test_two_processes_train_a_fold_as_one_would(two, data_dir, tmp_path, name, model):
    one = fit(data_dir, tmp_path, *CALLS[name], "--accumulate", 1, model=model)
    assert_same_numbers(one, two[0] / name / model)


def test_all_processes_score_with_the_same_statistics_if_there_are_fewer_rows_too(two):
    for name in ("parts", "average", "few"):
        assert two[1][name][0] == two[1][name][1], name
    assert len(set(two[1]["average"][0])) > 1  # which change
    run = two[0] / "few" / "chipnet"
    assert [len(pd.read_csv(run / name)) for name in TABLES] == [2, 1, 1]
    assert np.isfinite(pd.read_csv(run / "log.csv")["train_loss"][0])


def test_what_the_leader_refuses_ends_all_processes(two):
    (first,), (second,) = two[1]["again"]
    assert (first.startswith("InputError: fold 0 of parts"), "Error" in second) == (True, True)


def test_folds_side_by_side_are_those_of_one_process(two, runs_dir):
    assert_same_tables(two[0] / "apart" / "resnet", runs_dir / "resnet")


def test_more_processes_than_rows(data_dir, tmp_path):
    few = ["--model", "resnet", "--limit", 1, "--fold", 0]
    calls = {"norms": [*few, "--ema", 0.5], "plain": [*few, *NO_NORM]}
    norms = run_team(3, tmp_path, data_dir, calls)["norms"]
    assert norms[0] == norms[1] == norms[2]
    assert_same_numbers(fit(data_dir, tmp_path, *calls["plain"]), tmp_path / "plain" / "resnet")


# ---------------------------------------------------------------- several machines
def test_two_nodes_train_a_fold_as_one_process_would(data_dir, tmp_path):
    more = ["--fold", 0, *NO_NORM, "--augment", "square"]
    where = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--local_addr", "127.0.0.1"]
    words = [*where, "--rdzv_endpoint", f"127.0.0.1:{free_port()}", ROOT / "train.py", "--model", "resnet",
             "--data_dir", data_dir, "--runs_dir", tmp_path / "two", *SMALL_MODEL, *more]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    agents = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    try:
        said = [agent.communicate(timeout=200)[0].decode() for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert_same_numbers(fit(data_dir, tmp_path / "one", *more), tmp_path / "two" / "resnet")


def test_processes_wait_for_folds_that_take_hours_longer(monkeypatch):
    waits = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "init_process_group", lambda *_, timeout=timedelta(0): waits.append(timeout))
    Team.join("cpu")
    assert waits[0] >= timedelta(days=1)


def test_folds_of_several_machines_are_merged_by_copying(data_dir, runs_dir, tmp_path):
    elsewhere = shutil.copytree(data_dir, tmp_path / "data")
    first, second = (fit(where, tmp_path / str(k), "--fold", k) for k, where in enumerate((data_dir, elsewhere)))
    shutil.copytree(second, first, dirs_exist_ok=True)  # cp -r
    assert_same_tables(fit(data_dir, tmp_path / "0", "--resume"), runs_dir / "resnet")
    assert names(first) == names(runs_dir / "resnet")
