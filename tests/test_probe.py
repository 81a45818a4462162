"""A linear model of frozen features: its fit, its run, what it is good for."""

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, call, read
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

import models
import probe
import tasks
from losses import loss_of_prob
from plumbing.runs import read_run
from util import InputError

RNG = np.random.default_rng(0)
X = RNG.normal(3, [1, 5, 0.1, 2, 1e-9, 1], (120, 6)).astype(np.float32)
SIGNAL = (X[:, 1] - 3) / 5 + RNG.normal(0, 0.5, 120)
GROUP = np.arange(120) // 2
TARGETS = {
    "binary": (tasks.Binary(("1",), "auc"), (SIGNAL > 0)[:, None].astype(float)),
    "classes": (tasks.MultiClass(("a", "b", "c"), "auc"), np.digitize(SIGNAL, [-0.5, 0.5])[:, None].astype(float)),
    "labels": (tasks.MultiLabel(("p", "q"), "ap"), np.stack([SIGNAL > 0, X[:, 3] > 3], axis=1).astype(float)),
    "quantity": (tasks.Regression(("mm",), "mae"), (10 + 3 * SIGNAL)[:, None]),
}
LOSS = {"binary": "bce", "classes": "ce", "labels": "bce", "quantity": "mse"}


def fit(kind, target=None):
    task, known = TARGETS[kind]
    target = known if target is None else target
    task = task.fitted(target)

    def loss(logit, rows):
        return loss_of_prob(task, LOSS[kind], tasks.prob_of(task, logit), task.goal(target[rows]))

    weight, bias, strength = probe.fit_head(task, X, target, GROUP, loss)
    return task, tasks.prob_of(task, X @ weight.T + bias), strength


@pytest.mark.parametrize("kind", TARGETS)
def test_a_head_is_scikit_learns_model_of_standardised_features(kind):
    task, prob, strength = fit(kind)
    target = TARGETS[kind][1]
    x = StandardScaler().fit_transform(np.where(np.arange(6) == 4, 0, X))  # the fifth never varies
    assert strength in probe.STRENGTHS
    if kind == "quantity":
        expected = Ridge(1 / strength).fit(x, target[:, 0]).predict(x)[:, None]
    else:
        parts = [LogisticRegression(C=strength, max_iter=300).fit(x, label.astype(int)) for label in target.T]
        expected = parts[0].predict_proba(x) if kind == "classes" else np.column_stack(
            [part.predict_proba(x)[:, 1] for part in parts])  # fmt: skip
    assert np.allclose(prob, expected, atol=2e-3)
    score = tasks.main_score(task, target, prob)
    assert score > (-2 if kind == "quantity" else 0.85)


def test_the_penalty_is_strong_where_nothing_can_be_learned():
    noise = RNG.integers(0, 2, (120, 1)).astype(float)
    assert fit("binary", noise)[2] <= fit("binary")[2] / 10


def test_classes_and_labels_that_some_rows_lack():
    target = TARGETS["labels"][1].copy()
    target[:, 1] = 0
    target[::3, 0] = np.nan
    prob = fit("labels", target)[1]
    assert (prob[:, 1] < 1e-6).all()
    task, classes = TARGETS["classes"]
    two = np.where(classes == 1, 2.0, classes)
    weight, bias = probe.fit_linear(task, X, two, 1.0)
    assert (tasks.prob_of(task, X @ weight.T + bias)[:, 1] < 1e-6).all()
    with pytest.raises(InputError, match="one group alone"):
        probe.fit_head(task, X, classes, np.zeros(120), None)


@pytest.fixture(scope="module")
def probed(data_dir, tmp_path_factory):
    runs = tmp_path_factory.mktemp("probes")
    return call("train", "--model", "probe", "--data_dir", data_dir, "--runs_dir", runs, *SMALL_MODEL)


def test_a_probe_is_a_run_like_any_other(probed, data_dir, source, tmp_path):
    run = read_run(probed)
    oof = run.table("oof.csv")
    network = models.load_checkpoint(run.checkpoint(0))[0]
    rows = np.flatnonzero(read(data_dir / "train.csv")["fold"] == 0)
    image = torch.from_numpy(np.load(data_dir / "train_64.npy")[rows]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        prob = network(image, torch.empty(len(rows), 0)).sigmoid()[:, 0].numpy()
    assert np.allclose(oof[oof["fold"] == 0]["prob"], prob, atol=1e-5)
    call("report", probed)
    mean = read(probed / "test_predictions.csv").groupby("image_name")["prob"].mean()
    files = [source / "images" / f"{name}.jpg" for name in mean.index]
    call("predict", "--run", probed, "--output", tmp_path / "new", "--device", "cpu", *files)
    found = read(tmp_path / "new" / "predictions.csv").set_index("image_name")["prob"]
    assert np.allclose(found.loc[mean.index], mean, atol=1e-5)
    crops = call("crop", "--source", "cam", "--run", probed, "--data_dir", data_dir, "--output_dir", tmp_path / "crops",
                 "--views", 1, "--device", "cpu")  # fmt: skip
    assert len(read(crops / "train_boxes.csv")) == 24


def test_features_are_made_once_for_a_backbone_and_its_pictures(probed, data_dir, tmp_path, monkeypatch):
    made = list((data_dir / "features").glob("*/features.json"))
    reads = []
    real = models.MetaResNet.read
    monkeypatch.setattr(models.MetaResNet, "read", lambda self, image: reads.append(len(image)) or real(self, image))
    again = call("train", "--model", "probe", "--data_dir", data_dir, "--runs_dir", tmp_path, *SMALL_MODEL)
    assert (again / "oof.csv").read_bytes() == (probed / "oof.csv").read_bytes()
    assert sum(reads) <= 1  # of the run's start, which tries the network
    assert list((data_dir / "features").glob("*/features.json")) == made
    call("train", "--model", "probe", "--name", "other", "--data_dir", data_dir, "--runs_dir", tmp_path, *SMALL_MODEL,
         "--backbone", "conv_tiny")  # fmt: skip
    assert sum(reads) > 24
    assert len(list((data_dir / "features").glob("*/features.json"))) == len(made) + 1


def test_a_probe_sees_whole_images_crops_or_both(probed, data_dir, runs_dir, tmp_path):
    where = ["--model", "probe", "--data_dir", data_dir, "--runs_dir", tmp_path, *SMALL_MODEL]
    crop = call("train", *where, "--name", "crop", "--crop_dir", data_dir / "crops" / "chipnet")
    both = call("train", *where, "--name", "both", "--streams", "whole", "rgb")
    widths = [models.load_checkpoint(run / "fold0_best.pt")[0].head[-1].in_features for run in (probed, crop, both)]
    assert widths == [128, 128, 256]
    assert read(crop / "oof.csv")["prob"].tolist() != read(probed / "oof.csv")["prob"].tolist()
    call("report", both)


def test_a_trained_run_says_what_the_probe_reached(probed, data_dir, capsys):
    run = call("train", "--model", "resnet", "--data_dir", data_dir, "--runs_dir", probed.parent, *SMALL_MODEL)
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("probe ")
    assert ">probe</th>" in call("report", run).read_text()


@pytest.mark.parametrize(("flags", "words"), [
    (["--mixup", 0.2], "--mixup is for what is trained"), (["--pos_weight", 2], "--pos_weight is for what is trained"),
    (["--meta_cols", "sex"], "--meta_cols is for"), (["--share_backbone"], "--share_backbone"),
])  # fmt: skip
def test_what_a_probe_cannot_use_is_refused(data_dir, tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        call("train", "--model", "probe", "--data_dir", data_dir, "--runs_dir", tmp_path, *SMALL_MODEL, *flags)


def test_a_stopped_probe_goes_on(probed, data_dir, tmp_path, monkeypatch):
    where = ["--model", "probe", "--data_dir", data_dir, "--runs_dir", tmp_path, *SMALL_MODEL]
    real = probe.fit_head
    calls = []

    def stop(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(probe, "fit_head", stop)
    with pytest.raises(KeyboardInterrupt):
        call("train", *where)
    again = call("train", *where, "--resume")
    assert (again / "oof.csv").read_bytes() == (probed / "oof.csv").read_bytes()
