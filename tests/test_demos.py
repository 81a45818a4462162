"""The demos of gates on images and token sequences, trained for a moment."""

import importlib
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT

import fsg
from util import InputError


@pytest.fixture(autouse=True)
def demos_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(ROOT / "demos"), *sys.path])
    monkeypatch.chdir(tmp_path)


def run(name, *words):
    demo = importlib.import_module(name)
    return demo.main(demo.get_args_parser().parse_args([str(word) for word in words]))


def test_digits_learn_and_the_checkpoint_says_the_same(tmp_path, capsys):
    trained = run("digits", "train", "--epochs", 4)
    assert trained["accuracy"] > 0.3 > run("digits", "infer")["accuracy"]
    assert "random weights" in capsys.readouterr().out
    path = tmp_path / "checkpoints" / "fsg_digits.pth"
    assert run("digits", "infer", "--checkpoint", path) == trained
    assert trained["same answers when folded"] == 1
    with pytest.raises(InputError, match=r"fsg_digits\.pth is not a checkpoint of this demo"):
        run("tokens", "infer", "--checkpoint", path)


@pytest.mark.parametrize("network", ["encoder", "bert", "gpt2"])
def test_token_sequences(network):
    if network != "encoder":
        pytest.importorskip("transformers")
    scores = run("tokens", "train", "--network", network, "--epochs", 4)
    assert scores["accuracy"] > 0.8
    assert scores["same answers when folded"] > 0.999


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def test_real_mnist_files(tmp_path):
    rng, raw = np.random.default_rng(0), tmp_path / "real" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 20), ("t10k", 10)):
        write_idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    run("digits", "train", "--epochs", 1, "--mnist", tmp_path / "real", "--routing", "sequential")
    assert (tmp_path / "checkpoints" / "fsg_mnist.pth").exists()
    with pytest.raises(InputError, match="--mnist nowhere: Dataset not found"):
        run("digits", "train", "--mnist", "nowhere")


def test_cifar_npz(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    arrays = {"x_train": image, "y_train": np.arange(20) % 10, "x_test": image[:10],
              "y_test": np.arange(10)}  # fmt: skip
    np.savez(tmp_path / "cifar.npz", **arrays)
    run("cifar", "train", tmp_path / "cifar.npz", "--epochs", 1, "--gate_init", "paper")
    for change, message in (
        ({"x_test": arrays["x_test"].astype(float)}, "float64"),
        ({"y_test": np.arange(9)}, "10 inputs and 9 labels"),
        ({"y_test": np.array([{}] * 10)}, "allow_pickle"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays | change)
        with pytest.raises(InputError, match=message):
            run("cifar", "train", tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", x_train=arrays["x_train"])
    with pytest.raises(InputError, match=r"bad\.npz.*y_train"):
        run("cifar", "train", tmp_path / "bad.npz")
    with pytest.raises(InputError, match="nowhere: Dataset not found"):
        run("cifar", "train", "nowhere")


def test_image_folder(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(3):
                picture = rng.integers(0, 256, (40, 50, 3), np.uint8)
                cv2.imwrite(str(tmp_path / part / label / f"{i}.png"), picture)
    run("imagefolder", "train", tmp_path, "--epochs", 1, "--size", 32)
    checkpoint = tmp_path / "checkpoints" / "fsg_imagefolder.pth"
    run("imagefolder", "infer", tmp_path, "--size", 32, "--checkpoint", checkpoint)
    demo = importlib.import_module("imagefolder")
    args = demo.get_args_parser().parse_args(
        ["train", str(tmp_path), "--size", "32", "--backbone", "resnet18"]
    )
    train, _, classes = demo.load(args)
    assert train.x.shape == (6, 3, 32, 32)
    assert len(fsg.gate_parameters(fsg.add_gates(demo.make(args, train, classes)))) == 8
    (tmp_path / "val" / "dog" / "0.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"0\.png cannot be read"):
        demo.load(args)
    with pytest.raises(InputError, match="no folder of images per class"):
        run("imagefolder", "train", tmp_path / "val")
