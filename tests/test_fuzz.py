"""Readers on whatever bytes: what they promise, or one line that names the file.

The short profile of conftest.py draws the same few cases every time; for thousands of new ones

    python -m pytest tests/test_fuzz.py --hypothesis-profile long
"""

import csv
import io
import json
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import crop
import localize
import models
import util
from localize import SourceError
from models import ModelError
from util import FOLD, ID, PROB, TARGET, InputError

SPEC = {"model": "resnet", "backbone": "regnet_tiny", "image_size": 32, "meta_dim": 0,
        "hidden": 4, "dropout": 0.0, "gates": None}  # fmt: skip


def accepted(read, path: Path):
    """What read(path) returns; None where it refuses the file as it should."""
    try:
        return read(path)
    except (InputError, ModelError, SourceError) as error:
        text = str(error)
        assert path.name in text
        assert text.isprintable(), text
        assert len(text) < 1000
        return None


# ---------------------------------------------------------------- what is drawn
def mutate(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """Content with bytes flipped, put in, taken out, or without its end."""
    for kind, place, new in changes:
        at = place % (len(content) + 1)
        if kind == "flip":
            old = content[at : at + len(new)]
            mixed = bytes(a ^ b for a, b in zip(old, new, strict=False))
            content = content[:at] + mixed + content[at + len(old) :]
        elif kind == "insert":
            content = content[:at] + new + content[at:]
        else:
            content = content[:at] + (b"" if kind == "cut" else content[at + len(new) :])
    return content


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "remove", "cut"]),
        st.integers(0, 2**14),
        st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=4,
)
WORDS = st.sampled_from(
    ["0", "1", "0.5", "-1", "nan", "inf", "1e400", "9" * 30, "0012", "", " ", "NA", "True", "a",
     '"', "\n", "\r", "\0", "\ufeff", "=1+1", "Müller", "\x1b[2J", "../x", "a,b", "2020-01-01"]
) | st.text(max_size=5)  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from([10**400, -1, "x" * 2000])
)  # fmt: skip
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


def mutants(*contents: bytes):
    """Mutated files, or any bytes."""
    return st.builds(mutate, st.sampled_from(contents), CHANGES) | st.binary(max_size=100)


def csv_of(rows: list[list]) -> bytes:
    """Rows as a csv."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def npy_of(array: np.ndarray) -> bytes:
    """An array as a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def torch_of(content) -> bytes:
    """Content as torch.save writes it."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def picture(kind: str, mode: str = "RGB", **options) -> bytes:
    """A small picture as a file."""
    file = io.BytesIO()
    ramp = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3)
    image = Image.fromarray(ramp).convert(mode.partition(";")[0])
    image = Image.fromarray(np.asarray(image).astype(np.uint16)) if mode == "L;16" else image
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the drawn files lie, one after the other."""
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------- tables
TABLE = csv_of([[ID, TARGET, FOLD, PROB], *([f"{i:04d}", i % 2, i % 3, i / 9] for i in range(9))])


def check_table(path: Path) -> None:
    table = accepted(lambda p: util.read_table(p, [TARGET]), path)
    if table is None:
        return
    assert len(table) > 0
    assert table[ID].map(type).eq(str).all()
    assert table[ID].is_unique
    target = accepted(lambda p: util.check_target(table, p), path)
    assert target is None or set(target) == {0, 1}


@given(content=mutants(TABLE, TABLE[:60]))
@example(content=b"image_name,target\na,1,2\nb,0,3\n")
@example(content=b"image_name,target\na,1\n,0\n")
def test_tables_of_any_bytes(folder, content):
    path = folder / "t.csv"
    path.write_bytes(content)
    check_table(path)


@given(
    header=st.lists(st.sampled_from([ID, TARGET, "sex", "", "0"]) | WORDS, min_size=1, max_size=4),
    rows=st.lists(st.lists(WORDS, min_size=1, max_size=5), max_size=5),
)
def test_tables_of_any_cells(folder, header, rows):
    path = folder / "t.csv"
    path.write_bytes(csv_of([header, *rows]))
    check_table(path)


@given(rows=st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=6))
def test_predictions_of_any_cells(folder, rows):
    table = [["0001", 0, 0.5], *rows]
    (folder / "oof.csv").write_bytes(csv_of([[ID, FOLD, PROB], *table]))
    read = accepted(lambda p: util.read_predictions(p.parent, p.name, [FOLD, PROB]),
                    folder / "oof.csv")  # fmt: skip
    if read is not None:
        assert read[PROB].between(0, 1).all()
        assert read[FOLD].dtype == int
        assert read[ID].notna().all()


@given(column=st.integers(1, 7), value=WORDS | st.floats(-1, 2).map(str), change=CHANGES)
@example(column=2, value="0", change=[("flip", 0, b"\0")])
@example(column=5, value="0.9", change=[("flip", 0, b"\0")])
def test_boxes_of_any_cells(folder, column, value, change):
    columns = [ID, "x0", "x1", "y0", "y1", *util.PLACE]
    rows = [[name, 10, 40, 10, 40, 0.1, 0.1, 0.7] for name in ("0000", "0001")]
    rows[1][column] = value
    table = pd.DataFrame({ID: ["0000", "0001"], "width": 60, "height": 50})
    path = folder / "train_boxes.csv"
    for content in (csv_of([columns, *rows]), mutate(csv_of([columns, *rows]), change)):
        path.write_bytes(content)
        read = accepted(lambda p: util.with_box_side(table, p.parent, "train"), path)
        if read is not None:
            assert read[util.BOX_SIDE].between(0, 1.001, inclusive="right").all()
            x, y, side = read[list(util.PLACE)].to_numpy().T
            assert min(x.min(), y.min()) >= 0
            assert (np.maximum(x, y) + side).max() <= 1.001
        for box in accepted(lambda p: crop.read_boxes(p, table), path) or ():
            assert 0 <= box.x0 < box.x1 <= 60.001
            assert box.side == pytest.approx(box.y1 - box.y0)


# ---------------------------------------------------------------- json
CONFIG = {
    "args": {"data_dir": "d", "model": "resnet", "tta": 8, "crop_dir": None}, "crop": None,
    "spec": SPEC, "data": {"folds_sha256": "0"},
}  # fmt: skip
BLEND = CONFIG | {"args": {"data_dir": "d", "mode": "mean"}, "zoom": [0.5, 1.0],
                  "members": [{"run": "r", "weight": 0.5}]}  # fmt: skip
METRICS = {"folds": [{"fold": 0, "auc": 0.5}], "pooled": {},
           "ranked": {"auc": 0.5, "auc_interval": [0.1, 0.9]}}  # fmt: skip
FACTS = {"size": 64, "n_folds": 2, "group_col": None, "image_dirs": ["i"], "sha256": {}}
PATHS = st.lists(st.integers(0, 5), min_size=1, max_size=3)


def replaced(content, path: list[int], value):
    """Content with another value somewhere inside."""
    if not path or not isinstance(content, (dict, list)) or not content:
        return value
    keys = list(content) if isinstance(content, dict) else range(len(content))
    key = keys[path[0] % len(keys)]
    new = dict(content) if isinstance(content, dict) else list(content)
    new[key] = replaced(content[key], path[1:], value)
    return new


def check_jsons(folder: Path, content: bytes) -> None:
    for name in ("config", "metrics", "preprocess"):
        (folder / f"{name}.json").write_bytes(content)
    config = accepted(lambda p: util.read_config(p.parent), folder / "config.json")
    if config is not None and "members" in config:
        assert all(Path(member["run"]) for member in config["members"])
        assert sum(member["weight"] for member in config["members"]) is not None
        assert config["zoom"] is None or len(config["zoom"]) == 2
    elif config is not None:
        assert isinstance(config["args"]["model"], str)
        assert config["crop"] is None or config["crop"].keys() is not None
    metrics = accepted(lambda p: util.read_metrics(p.parent), folder / "metrics.json")
    if metrics is not None:
        assert util.metrics_line("x", metrics).count("\n") == 0
    with pytest.raises(InputError, match=r"preprocess\.json|train\.csv"):
        util.read_data(folder)


@given(content=mutants(*(json.dumps(c).encode() for c in (CONFIG, BLEND, METRICS, FACTS))))
@example(content=b"[" * 100_000)
@example(content=b'{"size": ' + b"9" * 5000 + b"}")
def test_json_of_any_bytes(folder, content):
    check_jsons(folder, content)


@given(content=st.sampled_from([CONFIG, BLEND, METRICS, FACTS]), path=PATHS, value=JSON)
@example(content=METRICS, path=[2, 1, 0], value=None)
@example(content=METRICS, path=[2, 1], value=[0.1])
@example(content=METRICS, path=[2, 1, 0], value=10**400)
@example(content=BLEND, path=[4], value=[0.5])
@example(content=BLEND, path=[4, 0], value="x")
def test_json_of_any_values(folder, content, path, value):
    check_jsons(folder, json.dumps(replaced(content, path, value)).encode())


# ---------------------------------------------------------------- arrays
IMAGES = npy_of(np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3))
MAPS = npy_of(np.ones((2, 4, 4), np.float32))


def check_array(path: Path) -> None:
    images = accepted(lambda p: util.open_array(p, 2), path)
    if images is not None:
        assert images.dtype == np.uint8
        assert images.shape[0] == 2
        assert (util.Rows(path, 2)[np.array([1, 0])] == images[::-1]).all()
    maps = accepted(lambda p: util.open_maps(p, 2), path)
    assert maps is None or maps.dtype == np.float32


@given(content=mutants(IMAGES, MAPS))
@example(content=b"PK\x03\x04")
def test_arrays_of_any_bytes(folder, content):
    path = folder / "x.npy"
    path.write_bytes(content)
    check_array(path)


@given(
    shape=st.lists(st.integers(-1, 2**64) | st.integers(0, 4), max_size=5) | LEAVES,
    descr=st.sampled_from(["|u1", "<f4", ">f4", "|O", "<M8[s]", "|V0", "S0", [("a", "<f4")], "x"]),
    fortran=st.booleans() | st.none(),
    rest=st.binary(max_size=200),
)
@example(shape=[2, 2**40, 2**40, 3], descr="|u1", fortran=False, rest=b"")
@example(shape="x" * 2000, descr="|u1", fortran=False, rest=b"")
@example(shape=[2, 2**62, 4], descr="<f4", fortran=False, rest=b"")
def test_arrays_of_any_header(folder, shape, descr, fortran, rest):
    shape = tuple(shape) if isinstance(shape, list) else shape
    header = repr({"descr": descr, "fortran_order": fortran, "shape": shape}) + "\n"
    header = header.encode("utf-8", "replace")[:60_000]
    path = folder / "x.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + rest)
    check_array(path)


# ---------------------------------------------------------------- images
EXIF = Image.Exif()
EXIF[0x0112] = 6
PICTURES = (
    picture("JPEG"), picture("JPEG", "L", exif=EXIF), picture("JPEG", "CMYK", progressive=True),
    picture("PNG"), picture("PNG", "P", transparency=bytes(range(256))), picture("PNG", "RGBA"),
    picture("PNG", "L;16"), picture("PNG", "1", exif=EXIF),
    picture("GIF"), picture("TIFF"), picture("BMP"),
)  # fmt: skip


@given(content=mutants(*PICTURES))
@example(content=PICTURES[5][:-40] + PICTURES[5][-39:])  # a chunk one byte short
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as util does outside of tests
def test_images_of_any_bytes(folder, content):
    path = folder / "x.jpg"
    path.write_bytes(content)
    read = accepted(util.read_image, path)
    square = accepted(lambda p: util.read_square(p, 8), path)
    if read is not None:
        image, size = read
        assert image.mode == "RGB"
        assert image.size == size
    if square is not None:
        assert square[0].shape == (8, 8, 3)
        assert square[0].dtype == np.uint8


# ---------------------------------------------------------------- checkpoints
NETWORK = models.build_model(SPEC)
CHECKPOINT = {"format": models.CHECKPOINT_FORMAT, "spec": SPEC, "fold": 0,
              "state_dict": dict(NETWORK.state_dict())}  # fmt: skip
SMALL = torch_of({"format": 1, "spec": SPEC, "state_dict": {"a": torch.zeros(3)}})
ODD = JSON | st.sampled_from([torch.zeros(2, 2), torch.tensor(float("nan")), torch.zeros(0),
                              {"a": torch.zeros(3)}, {1: torch.zeros(3)}])  # fmt: skip


@given(content=mutants(SMALL, SMALL[:200]))
def test_weights_of_any_bytes(folder, content):
    path = folder / "a.pt"
    path.write_bytes(content)
    read = accepted(models.read_torch_file, path)
    assert read is None or isinstance(read, dict)
    accepted(models.load_checkpoint, path)
    accepted(lambda p: models.load_weights(NETWORK.backbone, "fc", p), path)


@given(change=CHANGES)
def test_checkpoints_of_any_bytes(folder, change):
    path = folder / "a.pt"
    path.write_bytes(mutate(torch_of(CHECKPOINT), change))
    read = accepted(models.load_checkpoint, path)
    if read is not None:
        with torch.inference_mode():
            assert read[0](torch.zeros(1, 3, 32, 32), torch.zeros(1, 0)).shape == (1, 1)


@given(path=st.lists(st.integers(0, 200), min_size=1, max_size=2), value=ODD)
@example(path=[1], value="\x80")
@example(path=[0, 0], value=[])
def test_checkpoints_of_any_values(folder, path, value):
    content = replaced(CHECKPOINT, path, value)
    file = folder / "a.pt"
    torch.save(content, file)
    read = accepted(models.load_checkpoint, file)
    if read is not None:
        assert read[0].training is False
    accepted(lambda p: models.load_weights(NETWORK.backbone, "fc", p), file)
    if isinstance(content, dict):
        parts = {"saliency": {"0": {"weight": torch.zeros(3), "bias": 0.0}}}
        odd = replaced(parts, [0, *path], value)
        found = accepted(lambda p: localize.read_saliencies(p, NETWORK, odd), file)
        assert found is None or all(isinstance(fold, int) for fold in found)
