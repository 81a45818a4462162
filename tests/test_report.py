"""One page that shows a run: what it claims is checked against its files, and where it fails is seen."""

import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import call, change, read, write_images
from PIL import Image
from test_train import fit

from plumbing.card import licence_of
from plumbing.data import MetaEncoder, read_data
from plumbing.files import read_json, sha256
from plumbing.runs import read_run, write_run
from report import Subject, doubtful_labels
from util import InputError


def report(run, *words):
    return call("report", run, *words, "--device", "cpu")


def test_whole_runs_and_blends_pass_with_their_members(runs, capsys):
    report(runs / "ensemble")
    lines = capsys.readouterr().out.splitlines()
    for name in ("ensemble", "resnet", "chipnet", "cropnet"):
        assert sum(line.startswith(f"ok    {name}, ") for line in lines) == 3, lines
    assert not any("WRONG" in line for line in lines)


@pytest.mark.parametrize("more", [["--fold", 1], ["--limit", 3, "--fsg", "--ema", 0.9]])
def test_runs_of_one_fold_and_dry_runs_pass(data_dir, tmp_path, more):
    report(fit(data_dir, tmp_path, *more))


# ways to spoil a run
def edit_oof(edit):
    """Change oof.csv, and write all scores and hashes anew, as if it had always been so."""

    def spoil(run, data_dir):
        tables = [read(run / name) for name in ("oof.csv", "test_predictions.csv")]
        folds = read_json(run / "metrics.json")["folds"]
        facts = [{key: fold[key] for key in ("fold", "checkpoint")} for fold in folds]
        write_run(run, edit(tables[0]), tables[1], read_data(data_dir), facts)

    return spoil


def edit_network(edit):
    """Change the network of fold 0, and its hash."""

    def spoil(run, data_dir):
        change(run / "fold0_best.pt", lambda content: edit(content, read_data(data_dir).train))
        digest = sha256(run / "fold0_best.pt")
        change(run / "metrics.json", lambda metrics: metrics["folds"][0].update(checkpoint=digest))

    return spoil


SPOILT = {
    "another network": (lambda run, _: shutil.copy(run / "fold1_best.pt", run / "fold0_best.pt"), "networks: .*0_best"),
    "another network, hashed": (edit_network(lambda c, _: c["state_dict"]["head.1.bias"].add_(1)), "networks: .*again"),
    "an encoder that saw fold 0": (
        edit_network(lambda c, train: c["encoder"].update(MetaEncoder.fit(train, ["age_approx"]).columns)), "networks"),
    "no network's predictions": (edit_oof(lambda oof: oof.assign(prob=0.1 + 0.8 * oof["target"])), "networks: .*again"),
    "other targets": (edit_oof(lambda oof: oof.assign(target=np.roll(oof["target"], 1))), "scores"),
    "a lost row": (edit_oof(lambda oof: oof[1:]), "scores: 23"),
    "a row twice": (edit_oof(lambda oof: pd.concat([oof[1:], oof[1:2]])), "scores: 24"),
    "a better score": (lambda run, _: change(run / "metrics.json", lambda m: m["ranked"].update(auc=0.99)), "scores"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_what_was_changed_is_named(runs, data_dir, what):
    spoil, named = SPOILT[what]
    spoil(runs / "cropnet", data_dir)
    with pytest.raises(InputError, match=f"cropnet, {named}"):
        report(runs / "cropnet")


def test_a_foreign_or_changed_data_folder_is_named(runs, data_dir, source, tmp_path):
    words = ["--train_csv", source / "train.csv", "--size", 64, "--n_folds", 2, "--seed", 5]
    other = call("preprocess", *words, "--output_dir", tmp_path / "other")
    moved = shutil.copytree(data_dir, tmp_path / "moved")
    report(runs / "resnet", "--data_dir", moved)
    np.save(moved / "train_64.npy", np.load(moved / "train_64.npy") + 1)
    for folder, named in ((other, "data: "), (moved, "data: .*train_64.npy")):
        with pytest.raises(InputError, match=f"resnet, {named}"):
            report(runs / "resnet", "--data_dir", folder)


# ---------------------------------------------------------------- the page
class Reader(HTMLParser):
    """Tables and pictures of a page, and whether it loads anything."""

    def __init__(self, path):
        super().__init__()
        self.rows, self.pictures, self.loaded, self.text = [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.loaded += [v for k, v in found.items() if k in ("src", "href") and not v.startswith(("data:image/", "#"))]
        if tag == "img":
            self.pictures.append(found)
        if tag == "tr":
            self.rows.append([found.get("class")])

    def handle_data(self, data):
        self.text += data
        if self.rows:
            self.rows[-1].append(data)


def test_a_page_needs_nothing_but_itself_and_every_picture_has_words(runs, data_dir):
    shutil.copytree(data_dir, runs / "data")  # as a user may have moved it
    for name in ("cropnet", "ensemble"):
        page = Reader(report(runs / name, "--data_dir", runs / "data"))
        assert page.loaded == []
        assert len(page.pictures) > 5
        for picture in page.pictures:
            assert int(picture["width"]) > 0 < int(picture["height"])
            assert len(picture["alt"]) > 10
        for section in ("Scores", "Predictions", "Worst errors", "Groups whose images disagree", "Crops", "Checks"):
            assert section in page.text, section
    assert "rank correlation" in page.text


def test_a_page_opens_in_a_browser(runs, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser")
    page, shot = report(runs / "resnet"), tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'user'}",
             "--window-size=1200,3000", f"--screenshot={shot}"]  # fmt: skip
    subprocess.run([chromium, *flags, page.as_uri()], check=True, capture_output=True, timeout=120)
    picture = np.asarray(Image.open(shot).convert("L"))
    assert (picture < 128).any(axis=1).sum() > 500  # rows with words or pictures


def fake_run(runs, data, prob):
    """The run resnet as if it had predicted this, by row of the train table."""
    run = read_run(runs / "resnet")
    oof = run.table("oof.csv")
    place = pd.Series(np.arange(len(data.train)), index=data.train["image_name"])[oof["image_name"]]
    facts = [{key: fold[key] for key in ("fold", "checkpoint")} for fold in run.metrics["folds"]]
    write_run(run.path, oof.assign(prob=prob[place.to_numpy()]), None, data, facts)
    return run.path


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """400 images of two sites and two cameras, with a run on them: (runs, data)."""
    folder = tmp_path_factory.mktemp("many")
    write_images(folder, n_train=400)
    table = read(folder / "train.csv")
    table["camera"], table["site"] = np.arange(400) % 5 // 4, np.where(np.arange(400) % 20 < 4, "knee", "arm")
    table.to_csv(folder / "train.csv", index=False)
    words = ["--train_csv", folder / "train.csv", "--output_dir", folder / "data", "--size", 32, "--n_folds", 2]
    data_dir = call("preprocess", *words)
    fit(data_dir, folder / "runs")
    return folder / "runs", read_data(data_dir)


@pytest.mark.parametrize("weak", ["site = knee", "camera = 1"])
def test_a_planted_weakness_is_marked(many, weak):
    runs, data = many
    rng, column, value = np.random.default_rng(0), *weak.split(" = ")
    bad = (data.train[column].astype(str) == value).to_numpy()
    prob = np.clip(0.35 + 0.3 * data.target[:, 0] + rng.normal(0, 0.1, 400), 0, 1)
    prob[bad] = rng.uniform(0, 1, bad.sum())  # as if labels were shuffled, or pictures blurred
    with pytest.raises(InputError, match="networks"):  # no network has predicted this
        report(fake_run(runs, data, prob))
    rows = Reader(runs / "resnet" / "report.html").rows
    marked = {row[1]: row[0] for row in rows if len(row) > 4 and " = " in row[1]}
    assert marked[weak] == "bad"
    assert [name for name, mark in marked.items() if mark == "bad" and "sex" not in name] == [weak]


def test_planted_label_errors_are_found(many):
    runs, data = many
    prob = np.where(data.target[:, 0] == 1, 0.9, 0.1) + np.random.default_rng(1).normal(0, 0.02, 400)
    wrong = [7, 90, 200]
    prob[wrong] = 1 - prob[wrong]
    run = read_run(fake_run(runs, data, prob))
    found = [row[0] for row in doubtful_labels(Subject(run, data, torch.device("cpu")))]
    assert set(data.train["image_name"].iloc[wrong]) <= set(found[:3])


def test_the_card_says_what_the_run_says_and_a_wrong_run_has_none(runs):
    report(runs / "ensemble")
    path, metrics = runs / "ensemble" / "model_card.md", read_json(runs / "ensemble" / "metrics.json")
    header, body = path.read_text().removeprefix("---\n").split("\n---\n")
    facts = yaml.safe_load(header)
    (result,) = facts["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(metrics["ranked"]["auc"], 3)
    for part in ("cropnet", "random weights: none", "Not for clinical use", "<th scope=col>out of fold", "holds"):
        assert part in body, part
    assert "{" not in body  # every field is filled
    shutil.copy(runs / "ensemble" / "oof.csv", runs / "ensemble" / "test_predictions.csv")
    with pytest.raises(InputError):
        report(runs / "ensemble")
    assert not path.exists()


def test_the_card_names_the_licence_of_the_weights():
    assert licence_of("timm:vit_base_patch16_224.mae", "imagenet").endswith("cc-by-nc-4.0")
    assert licence_of("timm:resnet10t", "none").endswith("random weights: none")
    assert "its source" in licence_of("resnet50", "uni.pt")
