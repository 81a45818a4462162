"""Files from others: nothing in them is run, none leads out of its folder or fills the memory."""

import ast
import pickle
import re
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SMALL_MODEL, call
from PIL import Image

import models
import util
from models import ModelError
from util import InputError


class Marker:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def marker(tmp_path):
    """A file that must not come to be."""
    path = tmp_path / "was run"
    pickle.loads(pickle.dumps(Marker(path))).close()
    path.unlink()  # unpickled without care, it does
    yield path
    assert not path.exists()


def hostile(kind, marker, path):
    """Write a pickle in the clothes of a weights file or an array."""
    content = Marker(marker)
    if kind == "array":
        np.save(path, np.array([content], dtype=object), allow_pickle=True)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        content = {"format": models.CHECKPOINT_FORMAT, "spec": content, "a": torch.zeros(1)}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")


KINDS = ["zip", "legacy", "pickle"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_run_nothing(kind, marker, tmp_path, data_dir):
    hostile(kind, marker, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"w\.pt is not a file of plain weights"):
        call("train", "--model", "resnet", "--data_dir", data_dir, "--runs_dir", tmp_path,
             *SMALL_MODEL, "--weights", tmp_path / "w.pt")  # fmt: skip
    with pytest.raises(ModelError, match=r"w\.pt is not a file of plain weights"):
        call("crop", "--data_dir", data_dir, "--output_dir", tmp_path, "--device", "cpu",
             "--backbone", "regnet_tiny", "--weights", tmp_path / "w.pt")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_run_nothing(kind, marker, tmp_path, source, data_dir, runs_dir):
    run = shutil.copytree(runs_dir / "chipnet", tmp_path / "chipnet")
    hostile(kind, marker, run / "fold0_best.pt")
    with pytest.raises(ModelError, match=r"fold0_best\.pt is not a file of plain weights"):
        call("predict", "--run", run, "--output", tmp_path / "out", source / "images")
    with pytest.raises(ModelError, match=r"fold0_best\.pt is not a file of plain weights"):
        call("crop", "--source", "attention", "--run", run, "--data_dir", data_dir,
             "--output_dir", tmp_path)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_saliency_runs_nothing(kind, marker, tmp_path, source, runs_dir):
    run = shutil.copytree(runs_dir / "cropnet", tmp_path / "cropnet")
    config = util.read_json(run / "config.json")
    config["crop"] |= {"source": "saliency"}
    config["args"] |= {"crop_dir": str(tmp_path)}
    util.write_json(run / "config.json", config)
    hostile(kind, marker, tmp_path / "saliency.pt")
    with pytest.raises(ModelError, match=r"saliency\.pt is not a file of plain weights"):
        call("predict", "--run", run, "--output", tmp_path / "out", source / "images")


@pytest.mark.parametrize("kind", ["array", "pickle"])
def test_arrays_run_nothing(kind, marker, tmp_path, data_dir):
    data = shutil.copytree(data_dir, tmp_path / "data")
    hostile(kind, marker, data / "train_64.npy")
    for words in (["train", "--model", "resnet", "--runs_dir", tmp_path, *SMALL_MODEL],
                  ["crop", "--output_dir", tmp_path, "--backbone", "regnet_tiny"]):  # fmt: skip
        with pytest.raises(InputError, match=r"train_64\.npy is not a readable array"):
            call(*words, "--data_dir", data)
    hostile(kind, marker, tmp_path / "maps.npy")
    with pytest.raises(InputError, match=r"maps\.npy is not a readable array"):
        util.open_maps(tmp_path / "maps.npy", 1)


def test_no_source_loads_pickles():
    """torch.load and np.load are told so at every call."""
    wanted = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    calls = 0
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.t]*/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in wanted:
                calls += 1
                key, value = wanted[name]
                said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert said.get(key) == str(value), f"{path.name}:{node.lineno}"
            assert name not in {"pickle.load", "pickle.loads", "pd.read_pickle", "eval", "exec"}
    assert calls >= 6


# ---------------------------------------------------------------- names and links
@pytest.fixture
def outside(tmp_path, source):
    """A user's folder, and an image that lies outside of it."""
    folder = shutil.copytree(source, tmp_path / "mine")
    secret = tmp_path / "secret.jpg"
    shutil.copy(folder / "images" / "0003.jpg", secret)
    return folder, secret


@pytest.mark.parametrize("name", ["../../secret.jpg", "../../secret", "{secret}", "images/../0003"])
def test_names_do_not_lead_out_of_the_folder(outside, tmp_path, name):
    folder, secret = outside
    name = name.format(secret=secret)
    table = pd.read_csv(folder / "train.csv", dtype=str)
    table.loc[3, "image_name"] = name
    table.to_csv(folder / "train.csv", index=False)
    with pytest.raises(InputError, match=rf"no image named {re.escape(repr(name))}.*; check"):
        call("preprocess", "--train_csv", folder / "train.csv", "--output_dir", tmp_path / "out",
             "--size", 32, "--n_folds", 2)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_links_do_not_lead_out_of_the_folder(outside, tmp_path, data_dir, runs_dir):
    folder, secret = outside
    link = folder / "images" / "0003.jpg"
    link.unlink()
    link.symlink_to(secret)
    words = r"0003\.jpg is a link to .*secret\.jpg, outside of its folder; put the image there"
    with pytest.raises(InputError, match=words):
        call("preprocess", "--train_csv", folder / "train.csv", "--output_dir", tmp_path / "out")
    with pytest.raises(InputError, match=words):
        call("crop", "--source", "attention", "--run", runs_dir / "chipnet", "--data_dir",
             data_dir, "--output_dir", tmp_path, "--image_dir", folder / "images")  # fmt: skip
    with pytest.raises(InputError, match=words):
        call("predict", "--run", runs_dir / "resnet", "--output", tmp_path / "out",
             folder / "images")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_linked_folder_is_a_folder(outside, tmp_path):
    folder, _ = outside
    (tmp_path / "link").symlink_to(folder / "images")
    assert len(util.index_images(tmp_path / "link")) == 2 * 28


# ---------------------------------------------------------------- sizes
def png_header(width, height):
    """A PNG that says how large it is and no more."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    parts = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_images_have_a_limit(tmp_path, recwarn):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(50_000, 50_000))
    with pytest.raises(InputError,
        match=r"bomb\.png claims 50000 x 50000 px, more than 500,000,000"):
        util.read_image(path)
    Image.new("1", (9500, 9500)).save(path)  # more than Pillow takes by itself
    assert util.read_square(path, 8)[1] == (9500, 9500)
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["EPS", "GIF", "TIFF", "BMP", "PPM", "PDF"])
def test_other_formats_are_refused_whatever_their_name(tmp_path, kind):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.jpg", kind)  # EPS would start a program
    with pytest.raises(InputError, match=r"a\.jpg is no JPEG or PNG; convert it"):
        util.read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("shape", [(10**6, 10**5, 10**5, 3), (2, 2**40, 2**40, 3), (2**63, 4, 4,
    3)])
def test_arrays_are_as_large_as_their_file(tmp_path, shape):
    (tmp_path / "a.npy").write_bytes(util.npy_header(np.dtype(np.uint8), shape) + bytes(100))
    with pytest.raises(InputError, match=r"a\.npy is not a readable array.*; write it again"):
        util.open_array(tmp_path / "a.npy", shape[0])


def test_packed_tables_are_not_unpacked(tmp_path):
    path = tmp_path / "t.csv.gz"
    pd.DataFrame({"image_name": ["a"] * 10**5}).to_csv(path)
    with pytest.raises(InputError, match="not UTF-8 text|not a readable csv"):
        util.read_table(path)


def test_packed_weights_are_not_unpacked(tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "a.pt")
    assert len(models.read_torch_file(tmp_path / "a.pt")["a"]) == 10**6
    packed = zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "a.pt") as plain, packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(ModelError, match=r"b\.pt is not a file of plain weights"):
        models.read_torch_file(tmp_path / "b.pt")


# ---------------------------------------------------------------- versions
@pytest.mark.parametrize("found", [0, 2, None, "1", [1], torch.zeros(3)])
def test_checkpoints_of_another_format_say_which(tmp_path, found):
    torch.save({"format": found, "spec": {}, "state_dict": {}}, tmp_path / "a.pt")
    words = f"has checkpoint format {found} and this version reads 1; train again"
    if not isinstance(found, int):
        words = "is no checkpoint of train.py; pass one"
    with pytest.raises(ModelError, match=rf"a\.pt {words}"):
        models.load_checkpoint(tmp_path / "a.pt")
