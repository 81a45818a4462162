"""The demos of gates on images and token sequences, trained for a moment, and the files they read."""

import gzip
import io
import os
import pickle
import struct
import sys
import tarfile

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT

from util import InputError

sys.path.insert(0, str(ROOT / "demos"))

import archives
import cifar
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


def test_image_folder(tmp_path, capsys):
    for folder in ("train/n02", "train/n01", "val/n01", "val/n02"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            cv2.imwrite(str(tmp_path / folder / f"{i}.JPEG"), np.full((40, 50, 3), 80 * i, np.uint8))
    words = ("--data", "folder", "--path", tmp_path, "--size", 32, "--network", "resnet18")
    trained = run("train", *words, "--epochs", 1)
    assert run("infer", *words, "--checkpoint", "checkpoints/fsg_folder_resnet18.pth") == trained
    assert "random" not in capsys.readouterr().out
    run("infer", *words)
    assert "random weights" in capsys.readouterr().out
    for split in fsg_demo.load(parse("train", *words)):
        assert split.x.shape == (6, 3, 32, 32)
        assert split.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert [len(split.x) for split in fsg_demo.load(parse("train", *words, "--limit", 4))] == [4, 4]
    (tmp_path / "val" / "n02" / "0.JPEG").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"0\.JPEG"):
        run("train", *words)
    (tmp_path / "val" / "n02").rename(tmp_path / "val" / "n03")
    with pytest.raises(InputError, match="n03"):
        run("train", *words)


def test_what_is_not_there_is_named():
    for name in fsg_demo.NEED_PATH:
        for words, word in (([name, "--path", "nowhere"], "nowhere"), ([name], "--path"),
                            (["tokens", "--network", "vit_b_16"], "vit_b_16"), (["digits", "--size", 50], "--size"),
                            (["digits", "--network", "resnet18", "--weights", "no.pth"], r"no\.pth")):  # fmt: skip
            with pytest.raises((InputError, FileNotFoundError), match=word):
                run("train", "--data", *words)


# ---------------------------------------------------------------- MNIST
def write_mnist(folder, dash="-", suffix="", subfolder=""):
    """The four original files with 12 and 6 images."""
    pack, where, random = (gzip.compress if suffix else bytes), folder / subfolder, np.random.default_rng(0)
    where.mkdir(parents=True)
    for part, n in (("train", 12), ("t10k", 6)):
        image, label = random.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8) % 3
        for name, array in (("images", image), ("labels", label)):
            header = struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape)
            path = where / f"{part}-{name}{dash}idx{array.ndim}-ubyte{suffix}"
            path.write_bytes(pack(header + array.tobytes()))
    return folder


def test_mnist_from_its_original_files(tmp_path):
    plain = archives.read_mnist(write_mnist(tmp_path / "a"))
    assert [x.shape for x, _ in plain] == [(12, 1, 28, 28), (6, 1, 28, 28)]
    assert plain[1][1].tolist() == [0, 1, 2, 0, 1, 2]
    for more in ((".", ".gz", "raw"), ("-", ".gz", "MNIST/raw")):
        for pair, other in zip(plain, archives.read_mnist(write_mnist(tmp_path / more[2], *more)), strict=True):
            assert all(map(np.array_equal, pair, other))
    words = ("--data", "mnist", "--path", tmp_path / "a")
    trained = run("train", *words, "--epochs", 1)
    assert run("infer", *words, "--checkpoint", "checkpoints/fsg_mnist.pth") == trained
    run("infer", *words, "--network", "vit_tiny", "--size", 32)  # a backbone for larger images
    labels = (tmp_path / "a" / "t10k-labels-idx1-ubyte").read_bytes()
    path = tmp_path / "a" / "train-images-idx3-ubyte"
    for content in (path.read_bytes()[:-1], path.read_bytes()[:9], b"", labels, gzip.compress(labels)[:-9],
                    struct.pack(">4I", 2051, 2**32 - 1, 28, 28), struct.pack(">4I", 2051, 9, 0, 28)):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(InputError, match="train-images.*copy it again"):
            run("infer", *words)


# ---------------------------------------------------------------- CIFAR
class Python2Pickler(pickle._Pickler):
    """Writes strings as the official files have them."""

    def save_string(self, text):
        raw = text if isinstance(text, bytes) else text.encode("latin-1")
        self.write(b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


def as_python2(content):
    Python2Pickler(file := io.BytesIO(), 2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def as_python3(content):
    """With keys of bytes, as `encoding="bytes"` gives them."""
    return pickle.dumps({key.encode(): value for key, value in content.items()}, 2)


def write_cifar(folder, fine, binary=False, dump=as_python2):
    """The official files of CIFAR-100 (fine) or CIFAR-10, with 4 images each."""
    folder.mkdir()
    parts = ["train", "test"] if fine else [*archives.BATCHES, "test_batch"]
    for i, name in enumerate(parts):
        random = np.random.default_rng(i)
        x, y = random.integers(0, 256, (4, 3072), np.uint8), [i, 0, 1, 2]
        keys = {"fine_labels": y, "coarse_labels": [9] * 4} if fine else {"labels": y}
        content = {"filenames": [f"a_s_{k}.png" for k in range(4)], "batch_label": f"part {i}", **keys, "data": x}
        rows = np.column_stack([*reversed(keys.values()), x]).astype(np.uint8)
        (folder / (f"{name}.bin" if binary else name)).write_bytes(rows.tobytes() if binary else dump(content))
    (folder / "meta").write_bytes(dump({"fine_label_names": ["apple"]}))
    return folder


def pack(folder, name="cifar.tar.gz"):
    with tarfile.open(folder.parent / name, "w:gz") as tar:
        tar.add(folder, folder.name)
    return folder.parent / name


@pytest.mark.parametrize("fine", [True, False])
def test_cifar_is_the_same_in_all_its_versions(tmp_path, fine):
    python, binary = write_cifar(tmp_path / "a", fine), write_cifar(tmp_path / "b", fine, binary=True)
    again = write_cifar(tmp_path / "c", fine, dump=as_python3)
    (x, y), (x_test, y_test) = wanted = archives.read_cifar(python)
    assert x.shape == (4 if fine else 20, 3, 32, 32)
    assert x_test.shape == (4, 3, 32, 32)
    assert y.tolist() == ([0, 0, 1, 2] if fine else [label for i in range(5) for label in (i, 0, 1, 2)])
    assert y_test.tolist() == [1 if fine else 5, 0, 1, 2]
    assert np.array_equal(x[0, 2, 31], np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)[0, -32:])
    for path in (binary, again, pack(python), pack(binary, "b.tar.gz")):
        for pair, other in zip(wanted, archives.read_cifar(path), strict=True):
            assert all(map(np.array_equal, pair, other)), path


class Hostile:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_hostile_and_broken_cifar_runs_nothing_and_is_refused(tmp_path, monkeypatch):
    path, mark = write_cifar(tmp_path / "a", fine=True) / "train", tmp_path / "mark"
    good, system = path.read_bytes(), (os.system, (f"touch {mark}",))
    pickle.loads(pickle.dumps(Hostile(*system), 2))
    assert mark.exists()  # that is what it would do
    mark.unlink()
    image, endless = np.zeros((1, 3072), np.uint8), [0]
    for _ in range(99):
        endless = [endless] * 99
    opened, protocols = (eval, (f"open({str(mark)!r}, 'w')",)), range(pickle.HIGHEST_PROTOCOL + 1)
    kinds = [
        *(pickle.dumps(Hostile(*call), protocol) for call in (system, opened) for protocol in protocols),
        *(dump({"data": Hostile(*system), "fine_labels": [0]}) for dump in (as_python2, as_python3)),
        as_python2({"data": np.array([[Hostile(*system)] * 3072]), "fine_labels": [0]}),
        as_python2({"data": image.astype(np.int64), "fine_labels": [0]}),
        as_python2({"data": image, "fine_labels": endless}),
        as_python2({"data": image, "fine_labels": [Hostile(*system)]}),
        as_python2({"data": image}), as_python2([image]), good[: len(good) // 2], good[:-1], b"", b"no pickle",
        good.replace(struct.pack("<i", 4 * 3072), struct.pack("<i", 2**31 - 1)),
        b"\x80\x02}r\xff\xff\xff\x7f.",
    ]  # fmt: skip
    for content in kinds:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a: train cannot be read \(.*; pass the official file$"):
            cifar_run("infer", tmp_path / "a")
        assert not mark.exists()
    monkeypatch.setattr(archives, "MAX_STEPS", 9)
    path.write_bytes(good)
    with pytest.raises(InputError, match="more than 9 steps"):
        cifar_run("infer", tmp_path / "a")


def test_broken_archives_are_refused(tmp_path, monkeypatch):
    folder = write_cifar(tmp_path / "a", fine=False, binary=True)
    path = pack(folder)
    whole = path.read_bytes()
    cut = gzip.compress(gzip.decompress(whole)[:20000])
    for content in (whole[: len(whole) // 2], whole[:1], cut, gzip.compress(b"no tar" * 999), b"\x1f\x8b", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cifar\.tar\.gz.*; .*copy it again|no complete CIFAR"):
            cifar_run("infer", path)
    (folder / "data_batch_3.bin").write_bytes(bytes(3072))
    with pytest.raises(InputError, match="data_batch_1.bin or the files beside it"):
        cifar_run("infer", folder)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(InputError, match="no complete CIFAR"):
        cifar_run("infer", folder)
    monkeypatch.setattr(archives, "MAX_BYTES", 10**5)
    path.write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(InputError, match="more than 100,000 bytes"):
        cifar_run("infer", path)


def cifar_run(mode, path, *words):
    words = (mode, "--path", path, "--device", "cpu", "--size", 32, "--epochs", 1, *words)
    return cifar.main(cifar.get_args_parser().parse_args([str(word) for word in words]))


@pytest.mark.parametrize("words", [(), ("--gates", "--recipe", "published")])
def test_cifar_trains_and_the_checkpoint_says_the_same(tmp_path, capsys, words):
    path = pack(write_cifar(tmp_path / "a", fine=True))
    trained = cifar_run("train", path, *words)
    name = "cifar_published_gates" if words else "cifar_matched_plain"
    assert cifar_run("infer", path, *words, "--checkpoint", f"checkpoints/{name}.pth") == trained
    assert ("same answers when folded" in trained) == bool(words)
    assert "random" not in capsys.readouterr().out
    cifar_run("infer", path, *words)
    assert "random weights" in capsys.readouterr().out
    with pytest.raises(InputError, match=rf"{name}\.pth.*; "):
        cifar_run("infer", path, *words, "--patch", 8, "--checkpoint", f"checkpoints/{name}.pth")
    if words:  # the logits mean other gates
        with pytest.raises(InputError, match=rf"{name}\.pth.*; "):
            cifar_run("infer", path, "--gates", "--checkpoint", f"checkpoints/{name}.pth")
    with pytest.raises(InputError, match="--patch 5"):
        cifar_run("infer", path, "--patch", 5)


@pytest.fixture
def start(monkeypatch, tmp_path):
    """What a training begins with: its optimizers, learning rates first and last, rows and logits of one epoch."""
    path = write_cifar(tmp_path / "a", fine=False)

    def begin(*words):
        found = {}

        def fit(routing, train, args, device, prepare, set_lr, draw):
            lrs = []
            for done in (0, 1):
                set_lr(done)
                lrs.append([o.param_groups[0]["lr"] for o in routing.optimizers])
            rows = draw(train.y)
            x = prepare(train.x[rows])
            logits = routing.model(x)
            found.update(routing=routing, lrs=lrs, rows=rows, x=x, logits=logits)

        monkeypatch.setattr(cifar, "fit", fit)
        cifar_run("train", path, *words)
        return found

    return begin


@pytest.mark.parametrize(("words", "lrs", "decay", "clips", "mode"), [
    ("--recipe published", ([1e-4], [1e-4]), 1e-5, [8], "off"),
    ("--recipe published --gates", ([1e-4, 1e-2], [1e-7, 1e-2]), 1e-10, [10, 128], "upstream"),
    ("--recipe matched", ([1e-4], [1e-7]), 1e-10, [10], "off"),
    ("--recipe matched --gates", ([1e-4, 1e-2], [1e-7, 1e-2]), 1e-10, [10, 128], "single"),
])  # fmt: skip
def test_recipes_set_what_they_say(start, words, lrs, decay, clips, mode):
    routing = (found := start(*words.split()))["routing"]
    assert found["lrs"] == [pytest.approx(lr) for lr in lrs]
    assert [type(o) for o in routing.optimizers] == [torch.optim.Adam] * len(clips)
    assert [o.param_groups[0]["weight_decay"] for o in routing.optimizers] == [decay, 0][: len(clips)]
    assert [routing.clips[id(o)] for o in routing.optimizers] == clips
    assert routing.mode == mode


def test_matched_networks_start_alike_and_see_the_same(start):
    plain, gated = start(), start("--gates")
    for key in ("rows", "x", "logits"):
        assert torch.equal(plain[key], gated[key]), key
    assert not torch.equal(plain["logits"], start("--gates", "--gate_init", "paper")["logits"])
    published = [start("--recipe", "published", *words)["x"] for words in ((), ("--gates",))]
    assert not torch.equal(*published)  # their jitter differs


def test_an_epoch_draws_as_many_of_each_class():
    y = torch.tensor([0] * 50 + [1] * 9 + [2] * 2)
    first, second = (cifar.draw_rows(y, 5) for _ in range(2))
    assert y[first].bincount().tolist() == [5, 5, 2]
    assert len(first.unique()) == 12
    assert set(first.tolist()) != set(second.tolist())
