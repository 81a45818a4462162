"""The Kaggle notebook in two sessions without network, of which the first one runs out of time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read

from plumbing.files import read_json

EXAMPLE = ROOT / "example_data"
# every Python process that finds this on its path refuses to call other machines, and keeps a note of it
OFFLINE = """
import os, socket

def refuse(*args, **kwargs):
    open(os.environ["CALLED"], "a").close()
    raise OSError("there is no network")

socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = refuse
"""
# put before the cells: scripts run in forks of a process that has imported all they need, which saves most of the time
QUICK = """
import multiprocessing, os, runpy, subprocess, sys
sys.path.insert(0, os.environ["CODE"])
import crop, ensemble, preprocess, train

def fork(line, cwd, plain=subprocess.run, **_):
    def work():
        os.chdir(cwd)
        sys.argv, subprocess.run = line[1:], plain
        runpy.run_path(line[1], run_name="__main__")

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    return subprocess.CompletedProcess(line, child.exitcode)

subprocess.run = fork
"""
SETTINGS = {"CODE": ROOT, "DATA": EXAMPLE, "WEIGHTS": "none", "BACKBONE": "regnet_tiny", "FOLD": "0",
            "PREPROCESS": "--size 64 --n_folds 2 --limit 64"}  # fmt: skip
TRAIN = "--hidden 8 --epochs 1 --lr 1e-3 --head_lr 1e-3 --tta 1 --workers 0 --device cpu --augment upright"


@pytest.fixture
def offline(tmp_path):
    """A function that runs Python with given words, offline, in a folder with output/, scratch/ and earlier/."""
    (tmp_path / "sitecustomize.py").write_text(OFFLINE)
    folders = {name.upper(): tmp_path / name for name in ("output", "scratch", "earlier", "called")}
    env = {name: str(value) for name, value in (os.environ | SETTINGS | folders).items()}

    def run(*words, **more):
        env_of_run = env | {"PYTHONPATH": str(tmp_path), **more}
        return subprocess.run([sys.executable, *words], cwd=tmp_path, env=env_of_run, capture_output=True, text=True)

    return run


def run_session(folder: Path, offline, train: str) -> tuple[str, set[str]]:
    """Run all cells in one process; returns what was printed and the names of the runs that were blended."""
    cells = json.loads((ROOT / "notebooks" / "kaggle_submission.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (folder / "notebook.py").write_text("\n".join([QUICK, *code]))
    for name in ("output", "scratch"):
        (folder / name).mkdir()
    done = offline("notebook.py", TRAIN=train)
    assert done.returncode == 0, done.stdout + done.stderr
    submission, sample = read(folder / "output" / "submission.csv"), read(EXAMPLE / "sample_submission.csv")
    assert submission.columns.tolist() == sample.columns.tolist()
    assert submission["image_name"].tolist() == sample["image_name"].tolist()
    assert submission["target"].between(0, 1).all()
    assert submission["target"].nunique() > 10
    members = read_json(folder / "output" / "runs" / "ensemble" / "config.json")["members"]
    return done.stdout, {Path(member["run"]).name for member in members}


def test_a_session_that_is_stopped_leaves_a_submission_and_the_next_one_goes_on(tmp_path, offline):
    said, names = run_session(tmp_path, offline, f"{TRAIN} --max_hours 0")
    assert names == {"probe"}
    assert "Not all is finished" in said
    shutil.move(tmp_path / "output", tmp_path / "earlier")
    shutil.rmtree(tmp_path / "scratch")
    said, names = run_session(tmp_path, offline, TRAIN)
    assert names == {"probe", "resnet", "chipnet", "cropnet"}
    assert "Not all is finished" not in said
    log = Path("runs") / "resnet" / "fold0_log.csv"
    assert (tmp_path / "output" / log).read_bytes() == (tmp_path / "earlier" / log).read_bytes()  # not trained again
    assert not (tmp_path / "called").exists()


def test_the_network_is_off(tmp_path, offline):
    done = offline("-c", "import urllib.request; urllib.request.urlopen('http://localhost')")
    assert ("there is no network" in done.stderr, (tmp_path / "called").exists()) == (True, True)
