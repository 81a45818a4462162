"""The demo of gates on images and token sequences, trained for a moment."""

import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT

from util import InputError

sys.path.insert(0, str(ROOT / "demos"))

import fsg_demo


def parse(*words):
    return fsg_demo.get_args_parser().parse_args([str(word) for word in words])


def run(*words):
    return fsg_demo.main(parse(*words))


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_digits_learn_and_the_checkpoint_says_the_same(tmp_path, capsys):
    trained = run("train", "--epochs", 3)
    assert trained["accuracy"] > 0.3 > run("infer")["accuracy"]
    assert "random weights" in capsys.readouterr().out
    path = tmp_path / "checkpoints" / "fsg_digits.pth"
    assert run("infer", "--checkpoint", path) == trained
    assert trained["same answers when folded"] == 1
    with pytest.raises(InputError, match=r"fsg_digits\.pth"):
        run("infer", "--data", "tokens", "--checkpoint", path)


@pytest.mark.parametrize(("network", "rows", "epochs"), [("encoder", 4000, 4), ("bert", 99, 1), ("gpt2", 99, 1)])
def test_token_sequences(monkeypatch, network, rows, epochs):
    splits = [fsg_demo.Split(x[:rows], y[:rows]) for x, y in fsg_demo.draw_tokens(parse("train"))]
    monkeypatch.setitem(fsg_demo.DATA, "tokens", lambda args: splits)
    scores = run("train", "--data", "tokens", "--network", network, "--epochs", epochs)
    assert scores["accuracy"] > 0.8 or epochs == 1  # one epoch shows that gates fit, not that they learn
    assert scores["same answers when folded"] > 0.98


def test_cifar_npz(tmp_path):
    path = tmp_path / "cifar.npz"
    image = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    arrays = {"x_train": image, "y_train": np.arange(20) % 10, "x_test": image[:10], "y_test": np.arange(10)}
    np.savez(path, **arrays)
    run("train", "--data", "cifar", "--path", path, "--epochs", 1, "--gate_init", "paper", "--routing", "sequential")
    for word, y_test in (("9 labels", np.arange(9)), ("pickle", np.array([{}] * 10))):
        np.savez(path, **arrays | {"y_test": y_test})
        with pytest.raises(InputError, match=word):
            run("train", "--data", "cifar", "--path", path)


def test_image_folder(tmp_path):
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            cv2.imwrite(str(tmp_path / folder / f"{i}.png"), np.full((40, 50, 3), 80 * i, np.uint8))
    args = parse("train", "--data", "folder", "--path", tmp_path, "--size", 32, "--network", "resnet18", "--epochs", 1)
    fsg_demo.main(args)
    assert [tuple(split.x.shape) for split in fsg_demo.load(args)] == [(6, 3, 32, 32)] * 2
    (tmp_path / "val" / "dog" / "0.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"0\.png"):
        fsg_demo.load(args)


def test_what_is_not_there_is_named():
    for name in fsg_demo.NEED_PATH:
        for words, word in (([name, "--path", "nowhere"], "nowhere"), ([name], "--path"),
                            (["tokens", "--network", "vit_b_16"], "vit_b_16")):  # fmt: skip
            with pytest.raises(InputError, match=word):
                run("train", "--data", *words)
