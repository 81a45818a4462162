"""Readers on whatever bytes: what they promise, or one line that names the file.

The short profile of conftest.py draws the same few cases every time; for thousands of new ones

    python -m pytest tests/test_fuzz.py --hypothesis-profile long
"""

import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import crop
import models
from plumbing.arrays import Rows, open_array
from plumbing.backbones import read_torch_file
from plumbing.data import read_table, with_boxes
from plumbing.files import FORMAT, read_json
from plumbing.images import read_image, read_square
from tasks import read_target
from util import BOX_SIDE, ID, PLACE, TARGET, InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the drawn files lie, one after the other."""
    return tmp_path_factory.mktemp("fuzz")


def accepted(read, path: Path, content: bytes):
    """What read(path) returns of a file with this content; None where it refuses it as it should."""
    path.write_bytes(content)
    try:
        return read(path)
    except InputError as error:
        line = str(error)
    assert path.name in line
    assert line.isprintable()
    assert len(line) < 1000


def written(write, *args, **options) -> bytes:
    """What write(file, ...) puts into a file."""
    file = io.BytesIO()
    write(file, *args, **options)
    return file.getvalue()


def picture(kind: str, mode: str = "RGB", **options) -> bytes:
    image = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3)).convert(mode)
    return written(image.save, kind, **options)


# ---------------------------------------------------------------- what is drawn
def mutate(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """Content with bytes flipped, put in, taken out, or without its end."""
    for kind, place, new in changes:
        at = place % (len(content) + 1)
        end = {"insert": at, "cut": len(content)}.get(kind, at + len(new))
        flipped = bytes(a ^ b for a, b in zip(content[at:end], new, strict=False))
        content = content[:at] + {"flip": flipped, "insert": new}.get(kind, b"") + content[end:]
    return content


def mutants(*contents: bytes):
    """Mutated files, or any bytes."""
    kind, place, new = st.sampled_from(["flip", "insert", "remove", "cut"]), st.integers(0, 2**14), st.binary(min_size=1)
    changes = st.lists(st.tuples(kind, place, new), min_size=1, max_size=4)
    return st.builds(mutate, st.sampled_from(contents), changes) | st.binary(max_size=100)


CELLS = st.sampled_from(
    ["0", "1", "0.5", "-1", "nan", "inf", "1e400", "9" * 30, "", " ", "NA", "True", '"', "\n", "\0", "\ufeff", "Müller",
     "\x1b[2J", "../x", "a,b", ".jpg", ID, TARGET]
) | st.text(max_size=5)  # fmt: skip
TABLES = st.lists(st.lists(CELLS, min_size=1, max_size=4).map(",".join), max_size=6).map(
    lambda rows: "\n".join(rows).encode("utf-8", "surrogatepass"))  # fmt: skip


# ---------------------------------------------------------------- tables
@given(content=mutants(b"image_name,target,fold\n0000,0,1\n0001,1,0\n") | TABLES | TABLES.map(b"image_name,target\n".__add__))
@example(content=b"image_name,target\na,1,2\nb,0,3\n")
@example(content=b"image_name,target\na,1\n,0\n")
def test_tables(folder, content):
    table = accepted(lambda path: read_table(path, [TARGET]), folder / "t.csv", content)
    if table is not None:
        assert len(table) > 0
        assert table[ID].map(type).eq(str).all()
        assert table[ID].is_unique
        target = accepted(lambda path: read_target(table, path), folder / "t.csv", content)
        assert target is None or set(target) <= {0, 1}


@given(cells=st.lists(CELLS | st.floats(-1, 60).map(str), min_size=7, max_size=7), place=st.integers(0, 6))
@example(cells=["0"] * 7, place=1)
def test_boxes(folder, cells, place):
    row = ["10", "10", "40", "40", ".1", ".1", ".7"]
    row[place] = cells[place]
    text = "\n".join(",".join(row) for row in ([ID, *crop.CORNERS, *PLACE], ["0001", *row], ["0002", *cells[:4], *row[4:]]))
    table = pd.DataFrame({ID: ["0001", "0002"], "width": 60, "height": 50})
    read = accepted(lambda path: with_boxes(table, path.parent, "train"), folder / "train_boxes.csv", text.encode("utf-8", "replace"))
    assert read is None or read[BOX_SIDE].between(0, 1.001, inclusive="right").all()
    for box in accepted(lambda path: crop.read_boxes(path, table), folder / "b.csv", text.encode("utf-8", "replace")) or ():
        assert 0 <= box.x0 < box.x1 <= 60.001


# ---------------------------------------------------------------- everything else
@given(content=mutants(json.dumps({"format": FORMAT, "folds": [{"auc": 0.5}]}).encode()))
@example(content=b"[" * 100_000)
@example(content=b'{"size": ' + b"9" * 5000 + b"}")
def test_json(folder, content):
    read = accepted(read_json, folder / "a.json", content)
    assert read is None or read["format"] == FORMAT


IMAGES = written(np.save, np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3))


@given(content=mutants(IMAGES, IMAGES.replace(b"|u1", b"|O1")))
@example(content=IMAGES.replace(b"(2, 4, 4, 3), ", f"(2, {2**40}, {2**40}, 3), ".encode())[:-14])
@example(content=IMAGES.replace(b"(2, 4, 4, 3)", b"(2, 4, -4, 3)"))
def test_arrays(folder, content):
    images = accepted(lambda path: open_array(path, 2), folder / "x.npy", content)
    if images is not None:
        assert (images.dtype, images.shape[0], images.shape[3]) == (np.uint8, 2, 3)
        assert (Rows(folder / "x.npy", 2)[np.array([1, 0])] == images[::-1]).all()


PICTURES = (
    picture("JPEG"), picture("JPEG", "L", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x06\0\0" + bytes(4)),
    picture("JPEG", "CMYK", progressive=True), picture("PNG"), picture("PNG", "P", transparency=bytes(range(256))),
    picture("PNG", "RGBA"), picture("PNG", "I;16"), picture("PNG", "1"), picture("GIF"), picture("TIFF"),
)  # fmt: skip


@given(content=mutants(*PICTURES))
@example(content=PICTURES[5][:-40] + PICTURES[5][-39:])  # a chunk one byte short
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_images(folder, content):
    read = accepted(read_image, folder / "x.jpg", content)
    assert read is None or (read[0].mode, read[0].size) == ("RGB", read[1])
    square = accepted(lambda path: read_square(path, 8), folder / "x.jpg", content)
    assert square is None or (square[0].shape, square[0].dtype) == ((8, 8, 3), np.uint8)


SPEC = models.Spec("resnet", "regnet_tiny", 32, hidden=4)
STATE = models.build_model(SPEC).state_dict()
CHECKPOINTS = [{"format": FORMAT, "spec": spec, "state_dict": state} for spec, state in (
    (asdict(SPEC), STATE), (asdict(SPEC), {**STATE, "head.1.bias": 0}), (asdict(SPEC) | {"hidden": -1}, STATE), ([], STATE))]


@given(content=mutants(*(written(lambda file, c=content: torch.save(c, file)) for content in CHECKPOINTS)))
@example(content=written(lambda file: torch.save([1], file)))
def test_checkpoints(folder, content):
    read = accepted(read_torch_file, folder / "a.pt", content)
    assert read is None or isinstance(read, dict)
    read = accepted(models.load_checkpoint, folder / "a.pt", content)
    assert read is None or read[0](torch.zeros(1, 3, 32, 32), torch.zeros(1, 0)).shape == (1, 1)
    accepted(lambda path: models.build_model(SPEC, str(path)), folder / "a.pt", content)
