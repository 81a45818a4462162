"""The example data, its weights and the notebook."""

import importlib
import json
import sys

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from conftest import ROOT, call

import localize
from models import load_checkpoint
from plumbing.data import read_data
from plumbing.images import frame_of, read_square
from plumbing.runs import read_run
from util import ID

EXAMPLE = ROOT / "example_data"
RUN = EXAMPLE / "runs" / "chipnet"


def test_generator_repeats_itself(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    call("make_example", "--output_dir", tmp_path, "--n_train", 3, "--n_test", 1)
    first = cv2.imread(str(tmp_path / "images" / "EX_0000.jpg")).astype(int)
    assert np.abs(first - cv2.imread(str(EXAMPLE / "images" / "EX_0000.jpg"))).mean() < 1


def test_example_weights_find_lesions_in_masks_they_have_never_seen():
    networks = [load_checkpoint(RUN / f"fold{k}_best.pt", fold=True)[0] for k in range(3)]
    hits, covered, sides = [], [], []
    for name in pd.read_csv(EXAMPLE / "test.csv")["image_name"][::2]:
        square, size = read_square(EXAMPLE / "images" / f"{name}.jpg", 224)
        attention = localize.attention_maps(networks, square[None], "cpu", 2)[0]
        box = localize.find_box(attention, size)
        mask = cv2.imread(str(EXAMPLE / "masks" / f"{name}.png"), cv2.IMREAD_GRAYSCALE) > 0
        x0, y0, x1, y1 = (round(edge) for edge in box.corners)
        covered.append(mask[y0:y1, x0:x1].sum() / mask.sum())
        sides.append(box.side / min(size))
        left, top, right, bottom = (int(edge) for edge in frame_of(*size))
        inside = mask[top:bottom, left:right].astype(np.float32)
        cells = cv2.resize(inside, attention.shape, interpolation=cv2.INTER_AREA)
        hits.append(cells.flat[attention.argmax()] > 0)
    assert (np.mean(hits) >= 0.9, np.mean(np.array(covered) >= 0.95) >= 0.9, np.mean(sides) < 0.75) == (True,) * 3


def test_example_weights_fit_the_folds_of_preprocess_py(tmp_path):
    data_dir = call("preprocess", "--train_csv", EXAMPLE / "train.csv", "--output_dir", tmp_path, "--size", 8)
    for k in range(3):
        trained_on = load_checkpoint(RUN / f"fold{k}_best.pt")[1]["trained_on"]
        assert trained_on == {"folds_sha256": read_data(data_dir).folds_sha256, "fold": k}


def test_example_weights_predict(tmp_path):
    image = EXAMPLE / "images" / "EX_0160.jpg"
    call("predict", "--run", RUN, "--output", tmp_path / "out", "--device", "cpu", image)
    assert (tmp_path / "out" / "EX_0160.png").exists()


def test_notebook_runs_top_to_bottom(monkeypatch):
    notebook = json.loads((ROOT / "notebooks" / "attention_visualization.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in cells)  # saved with its pictures
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.setattr(sys, "path", sys.path[:])
    plt.close("all")
    scope = {}
    for cell in cells:
        exec("".join(cell["source"]), scope)
    assert len(plt.get_fignums()) >= 4
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


def test_the_demo_draws_its_picture(source, data_dir, runs_dir, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "example_data"))
    report = importlib.import_module("overview")
    monkeypatch.setattr(report, "HERE", source)
    (tmp_path / "data").symlink_to(data_dir)
    labels = pd.Series([0, 1, 0, 1], read_data(data_dir).test[ID])
    report.draw_overview(tmp_path / "a.png", tmp_path, [read_run(runs_dir / "cropnet")], labels)
    assert (tmp_path / "a.png").stat().st_size > 10_000
