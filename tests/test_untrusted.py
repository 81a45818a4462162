"""Files from others: nothing in them is run, and none fills the memory. Pickles and names that lead out of their folder
are kinds of bad input (test_bad_input.py)."""

import ast
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

from plumbing.arrays import open_array
from plumbing.data import read_table
from plumbing.images import configure_pillow, read_image, read_square
from util import InputError


def test_no_source_loads_pickles():
    """torch.load and np.load are told so at every call."""
    wanted, calls = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}, 0
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.t]*/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name not in {"pickle.load", "pickle.loads", "pd.read_pickle", "eval", "exec"}
            if name in wanted:
                calls += 1
                said = [(word.arg, ast.unparse(word.value)) for word in node.keywords]
                assert wanted[name] in said, f"{path.name}:{node.lineno}"
    assert calls >= 3


def test_images_have_a_limit(tmp_path, recwarn):
    configure_pillow()
    header = struct.pack(">4sIIBBBBB", b"IHDR", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, b"IDAT")]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(InputError, match=r"bomb\.png.*2500000000.*; "):
        read_image(tmp_path / "bomb.png")
    Image.new("1", (9500, 9500)).save(tmp_path / "large.png")  # of which Pillow by itself warns
    assert read_square(tmp_path / "large.png", 8)[1] == (9500, 9500)
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["EPS", "GIF", "BMP", "PPM", "PDF"])
def test_other_formats_are_refused_whatever_their_name(tmp_path, kind):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.jpg", kind)  # EPS would start a program
    with pytest.raises(InputError, match=r"a\.jpg.*; "):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("shape", [(10**6, 10**5, 10**5, 3), (2, 2**40, 2**40, 3), (2**63, 4, 4, 3)])
def test_arrays_are_as_large_as_their_file(tmp_path, shape):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.write(bytes(100))
    with pytest.raises(InputError, match=r"a\.npy.*; "):
        open_array(tmp_path / "a.npy", shape[0])


def test_packed_tables_are_not_unpacked(tmp_path):
    pd.DataFrame({"image_name": range(10**5)}).to_csv(tmp_path / "t.csv.gz")
    with pytest.raises(InputError, match=r"t\.csv\.gz.*; "):
        read_table(tmp_path / "t.csv.gz")
