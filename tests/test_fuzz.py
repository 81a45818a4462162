"""Readers on whatever bytes: what they promise, or one line that names the file.

The short profile of conftest.py draws the same few cases every time; for thousands of new ones

    python -m pytest tests/test_fuzz.py --hypothesis-profile long
"""

import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import models
import tasks
from plumbing.arrays import Rows, open_array
from plumbing.data import read_table
from plumbing.files import FORMAT, read_json
from plumbing.images import read_image, read_square
from tasks import find_task, read_target
from util import ID, TARGET, InputError


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
    kind = st.sampled_from(["flip", "insert", "remove", "cut"])
    changes = st.lists(st.tuples(kind, st.integers(0, 2**14), st.binary(min_size=1)), min_size=1, max_size=4)
    return st.builds(mutate, st.sampled_from(contents), changes) | st.binary(max_size=100)


CELLS = st.text(max_size=5) | st.sampled_from(
    ["0", "1", "0.5", "-1", "nan", "inf", "1e400", "9" * 30, "", " ", "NA", "True", '"', "\n", "\0", "\ufeff", "Müller",
     "\x1b[2J", "../x", "a,b", ".jpg", ID, TARGET]
)  # fmt: skip
ROWS = st.lists(st.lists(CELLS, min_size=1, max_size=4).map(",".join), max_size=6).map("\n".join)
TABLES = ROWS.map(lambda rows: rows.encode("utf-8", "surrogatepass"))


@given(content=mutants(b"image_name,target\n0000,0\n0001,1\n") | TABLES | TABLES.map(b"image_name,target\n".__add__))
@example(content=b"image_name,target\na,1,2\nb,0,3\n")
def test_tables(tmp_path, content):
    table = accepted(lambda path: read_table(path, [TARGET]), tmp_path / "t.csv", content)
    if table is not None:
        assert len(table) > 0
        assert table[ID].map(type).eq(str).all()
        assert table[ID].is_unique
        task = accepted(lambda path: find_task(table, path, [TARGET]), tmp_path / "t.csv", content)
        for kind in tasks.KINDS:  # whatever is asked for
            accepted(lambda path, kind=kind: find_task(table, path, [TARGET], kind), tmp_path / "t.csv", content)
        if task is not None:
            target = read_target(task, table, tmp_path / "t.csv", [TARGET])
            assert target.shape == (len(table), len(task.targets))
            assert not np.isinf(target).any()


@given(content=mutants(json.dumps({"format": FORMAT, "folds": [{"auc": 0.5}]}).encode()))
@example(content=b"[" * 100_000)
@example(content=b'{"size": ' + b"9" * 5000 + b"}")
def test_json(tmp_path, content):
    read = accepted(read_json, tmp_path / "a.json", content)
    assert read is None or read["format"] == FORMAT


IMAGES = written(np.save, np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3))


@given(content=mutants(IMAGES, IMAGES.replace(b"|u1", b"|O1")))
@example(content=IMAGES.replace(b"(2, 4, 4, 3)", b"(2, 4, -4, 3)"))
def test_arrays(tmp_path, content):
    images = accepted(lambda path: open_array(path, 2), tmp_path / "x.npy", content)
    if images is not None:
        assert (images.dtype, images.shape[0], images.shape[3]) == (np.uint8, 2, 3)
        assert (Rows(tmp_path / "x.npy", 2)[np.array([1, 0])] == images[::-1]).all()


EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x06\0\0" + bytes(4)
KINDS = [("JPEG", "RGB", {}), ("JPEG", "L", {"exif": EXIF}), ("JPEG", "CMYK", {"progressive": True}),
         ("PNG", "RGBA", {}), ("PNG", "P", {"transparency": bytes(256)}), ("PNG", "I;16", {}), ("GIF", "RGB", {})]
RAMP = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3))
PICTURES = [written(RAMP.convert(mode).save, kind, **options) for kind, mode, options in KINDS]


@given(content=mutants(*PICTURES))
@example(content=PICTURES[3][:-40] + PICTURES[3][-39:])  # a chunk one byte short
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_images(tmp_path, content):
    read = accepted(read_image, tmp_path / "x.jpg", content)
    assert read is None or (read[0].mode, read[0].size) == ("RGB", read[1])
    square = accepted(lambda path: read_square(path, 8), tmp_path / "x.jpg", content)
    assert square is None or (square[0].shape, square[0].dtype) == ((8, 8, 3), np.uint8)


SPEC = models.Spec("resnet", "regnet_tiny", 32)
WHOLE = {"format": FORMAT, "spec": asdict(SPEC), "state_dict": dict(models.build_model(SPEC).state_dict())}
ODD = [{}, {"spec": []}, {"spec": asdict(SPEC) | {"image_size": -1}}, {"state_dict": WHOLE["state_dict"] | {"mean": 0}}]
CHECKPOINTS = [written(lambda file, odd=odd: torch.save(WHOLE | odd, file)) for odd in ODD]


@given(content=mutants(*CHECKPOINTS))
@example(content=CHECKPOINTS[3])
def test_checkpoints(tmp_path, content):
    read = accepted(models.load_checkpoint, tmp_path / "a.pt", content)
    assert read is None or read[0](torch.zeros(1, 3, 32, 32), torch.zeros(1, 0)).shape == (1, 1)
    accepted(lambda path: models.build_model(SPEC, str(path)), tmp_path / "a.pt", content)
