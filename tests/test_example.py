"""The example data, its weights and the notebook."""

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, call

import localize
from models import load_checkpoint
from plumbing.images import centre_square, read_image, read_square

EXAMPLE = ROOT / "example_data"
RUN = EXAMPLE / "runs" / "chipnet"


def test_tables_images_and_masks_are_like_isic_2020_and_small():
    train, test = (pd.read_csv(EXAMPLE / f"{split}.csv") for split in ("train", "test"))
    site = "anatom_site_general_challenge"
    assert [*test, "target"] == list(train) == ["image_name", "patient_id", "sex", "age_approx", site, "target"]
    assert not set(train["patient_id"]) & set(test["patient_id"])
    assert (train["patient_id"].value_counts().max() > 1, train["sex"].isna().any()) == (True, True)
    assert 0.15 < train["target"].mean() < 0.25
    assert sum(path.stat().st_size for path in EXAMPLE.rglob("*") if path.is_file()) < 10e6
    shares = []
    for name in test["image_name"]:
        mask = cv2.imread(str(EXAMPLE / "masks" / f"{name}.png"), cv2.IMREAD_GRAYSCALE)
        assert read_image(EXAMPLE / "images" / f"{name}.jpg")[1] == mask.shape[::-1]
        assert 640 <= mask.shape[1] <= 1600
        shares.append((mask > 0).mean())
    assert 0.015 < min(shares) < max(shares) < 0.3


def test_generator_repeats_itself(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    call("make_example", "--output_dir", tmp_path, "--n_train", 6, "--n_test", 2)
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
        left, top, right, bottom = (int(edge) for edge in centre_square(*size))
        inside = mask[top:bottom, left:right].astype(np.float32)
        cells = cv2.resize(inside, attention.shape, interpolation=cv2.INTER_AREA)
        hits.append(cells.flat[attention.argmax()] > 0)
    assert (np.mean(hits) >= 0.9, np.mean(np.array(covered) >= 0.95) >= 0.9, np.mean(sides) < 0.75) == (True,) * 3


def test_example_weights_fit_the_folds_of_preprocess_py(tmp_path):
    data_dir = call("preprocess", "--train_csv", EXAMPLE / "train.csv", "--output_dir", tmp_path / "data")
    call("crop", "--source", "attention", "--run", RUN, "--data_dir", data_dir, "--views", 1, "--device", "cpu",
         "--limit", 8)  # fmt: skip
    boxes = pd.read_csv(data_dir / "crops" / "chipnet_attention" / "train_boxes.csv")
    assert boxes["oof"].tolist() == [1] * 8


def test_notebook_runs_top_to_bottom():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    path = ROOT / "notebooks" / "attention_visualization.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells)  # saved with its pictures
    where = {"metadata": {"path": str(ROOT / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", [])
                if "image/png" in output.get("data", {})]  # fmt: skip
    assert len(pictures) >= 4
