"""Files, arrays, tables, groups, metadata, names and pixels: what lies below the scripts."""

import json
import os
import pickle
import shutil
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import rewrite
from PIL import Image

from plumbing.arrays import PartialArray, Rows, open_array
from plumbing.data import MetaEncoder, as_words, check_groups, groups_of, read_data, read_table
from plumbing.files import atomic, open_output, read_json, write_json
from plumbing.images import ImageIndex, frame_of, name_key, read_crops, read_image, read_square
from util import ID, InputError


# ---------------------------------------------------------------- files
def test_json_is_strict_and_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": np.float32(0.5), "a": np.int64(3), "path": tmp_path})
    assert json.loads(path.read_text()) == {"a": 3, "b": 0.5, "path": str(tmp_path), "format": 3}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert read_json(path)["a"] == 3  # the failed write left the old file
    with pytest.raises(InputError, match=r"a\.json.*'c'"):
        read_json(path)["c"]
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text("half of the n") / 0
    assert read_json(path)["b"] == 0.5
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("marker", "gone"),
    [('{"sha256": {"old.npy": "0", "../mine": "0"}}', {"old.npy"}), ('{"sha256": {"old.n', set()), ("", set())],
)
def test_overwriting_removes_what_the_marker_lists_what_is_unfinished_and_nothing_foreign(tmp_path, marker, gone):
    (out := tmp_path / "out").joinpath("crops").mkdir(parents=True)
    for name in ("old.npy", "crops/x.npy", "notes.txt", "../mine", "done.json.part", "new.npy.part"):
        (out / name).write_text("x")
    if marker:
        (out / "done.json").write_text(marker)
    open_output(out, "done.json", True, {"size": 3})
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {f"out/{n}" for n in {"old.npy", "crops/x.npy", "notes.txt", "done.json.part"} - gone} | {"mine"}
    assert read_json(out / "done.json.part")["size"] == 3


# ---------------------------------------------------------------- arrays
def test_a_finished_array_is_filled_on_unless_rows_were_left_out(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)  # as on macOS
    path, array = tmp_path / "x.npy", PartialArray(tmp_path / "x.npy", (3, 4, 4, 3))
    for row in (2, 0, 1):
        array.write(row, np.full((4, 4, 3), row + 7))
    assert not path.exists()
    array.finish(np.arange(3))
    rows = pickle.loads(pickle.dumps(Rows(path, 3)))
    assert ([*rows[np.array([2, 0])][:, 0, 0, 0], rows[1][0, 0, 0]]) == [9, 7, 8]
    assert not PartialArray(path, (3, 4, 4, 3)).is_new  # stopped after this array had its name, before the next had
    array.finish(np.array([0, 2]))
    assert (open_array(path, 2)[:, 0, 0, 0] == [7, 9]).all()
    assert PartialArray(path, (3, 4, 4, 3)).is_new  # what is there is no longer row by row


def test_processes_and_threads_that_share_an_array_read_their_own_rows(tmp_path):
    np.save(tmp_path / "x.npy", np.repeat(np.arange(200, dtype=np.uint8), 48).reshape(200, 4, 4, 3))
    rows = Rows(tmp_path / "x.npy", 200)
    assert rows[7].max() == 7  # opened here, before there are others
    mine = [int(rows[i].max()) for i in range(200)]

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return 20_000

        def __getitem__(self, i):
            return int(rows[i % 200].max())

    for batch, found in enumerate(torch.utils.data.DataLoader(Pictures(), 500, num_workers=2)):
        assert found.tolist() == [i % 200 for i in range(500 * batch, 500 * batch + 500)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: int(rows[i % 200].max()), range(4000))) == mine * 20


# ---------------------------------------------------------------- tables and groups
def test_tables_keep_names_and_groups_as_text(tmp_path):
    content = "\ufefffile,patient,image_name\n0012,007,other\nMüller,,other\n"
    (tmp_path / "t.csv").write_text(content, encoding="utf-8")
    table = read_table(tmp_path / "t.csv", id_col="file", text=("patient",))
    assert [*table[ID], table["patient"][0]] == ["0012", "Müller", "007"]


def test_rows_without_group_are_groups_of_their_own():
    table = pd.DataFrame({ID: list("abcd"), "p": ["x", None, "x", None]})
    group = groups_of(table, "p")
    assert group[0] == group[2]
    assert [len(set(groups_of(table, column))) for column in ("p", None)] == [3, 4]
    check_groups(group, np.array([0, 1, 0, 2]), "t.csv")
    with pytest.raises(InputError, match=r"t\.csv: x .*0 and 2.*; "):
        check_groups(group, np.array([2, 1, 0, 2]), "t.csv")


@pytest.mark.parametrize("column", [[1, 2], [1.0, np.nan], [True, None], ["1", "2"], ["1.0"], ["001"], ["True"]])
def test_a_value_is_one_word_however_a_table_spells_it(column):
    table = pd.DataFrame({"p": column}).assign(**{ID: "a"})
    assert (as_words(table["p"])[0], groups_of(table, "p")[0]) == ("1", "group:1")
    encoder = MetaEncoder.fit(pd.DataFrame({"p": ["01", "x"]}), ("p",))
    assert encoder.encode(table).tolist()[0] == [1, 0, 0, 0]


def test_hashes_and_long_numbers_stay_what_they_are():
    odd = ["5a", "0e123", "0e456", "1.5", "1.2.840", "12345678901234567890", "12345678901234567891"]
    assert as_words(pd.Series(odd)).tolist() == odd


def test_groups_on_both_sides_of_a_fold_are_noticed_in_data_that_is_as_hashed(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns("crops"))
    rewrite(copy / "train.csv", lambda table: table.assign(fold=np.arange(24) % 2), "preprocess.json")
    with pytest.raises(InputError, match=r"train\.csv: p\d+ "):
        read_data(copy)


# ---------------------------------------------------------------- metadata
def test_encoder_marks_known_unknown_and_missing():
    table = pd.DataFrame({"sex": ["male", "female", None, "male"], "age": [20, 40, None, 30], "empty": None})
    encoder = MetaEncoder(pickle.loads(pickle.dumps(MetaEncoder.fit(table, ("sex", "age", "empty", "lost")).columns)))
    assert encoder.dim == 4 + 2
    new = pd.DataFrame({"sex": ["female", "other", None], "age": [30, None, np.inf]})
    assert encoder.encode(new).tolist() == [[1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1]]
    assert encoder.encode(pd.DataFrame(index=range(2))).tolist() == [[0, 0, 0, 1, 0, 1]] * 2
    assert MetaEncoder.fit(table[3:], ("sex",)).columns["sex"]["values"] == ["male"]  # of the rows it is given


def test_yes_and_no_are_numbers():
    yes = MetaEncoder.fit(pd.DataFrame({"scar": [True, None, False]}, dtype=object), ("scar",))  # numbers, with a gap
    for later in ([True, False], ["True", "False"], [1, 0], [1.0, 0.0]):
        assert yes.encode(pd.DataFrame({"scar": later})).tolist() == [[1, 0], [-1, 0]]


# ---------------------------------------------------------------- names and pixels
def test_images_are_found_by_any_spelling_of_their_name_or_path(tmp_path):
    for name in ("a/é1.JPG", "a/x.png", "b/x.jpeg", "b/jpg.jpg", "b/n.txt"):
        path = tmp_path / unicodedata.normalize("NFD", name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    index = ImageIndex(tmp_path, tmp_path / "b", tmp_path)  # overlapping folders hold no image twice
    for name in ("é1", "é1.jpg", "a/é1", unicodedata.normalize("NFD", "a/é1.Jpg")):
        assert index.find(name).name == unicodedata.normalize("NFD", "é1.JPG")
    assert (index.find("a/x").name, index.find("jpg").name) == ("x.png", "jpg.jpg")
    assert index.find("n") is index.find("../b/x") is index.find(str(tmp_path / "a/x")) is None
    with pytest.raises(InputError, match=r"a/x\.png.*b/x\.jpeg.*; "):
        index.find("x")
    assert len(index.paths()) == 4
    assert [name_key(name) for name in ("a.b", "a.b.PNG", "12.jpeg")] == ["a.b", "a.b", "12"]


def test_scaled_decoding_shifts_no_crop_by_a_fraction_of_a_pixel(tmp_path):
    width, height, size = 3337, 2503, 96  # no multiples of 8: the sides of reduced images are rounded up
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = 127 + 60 * np.sin(x / 50) + 60 * np.cos(y / 45)
    Image.fromarray(np.dstack([waves] * 3).astype(np.uint8)).save(tmp_path / "a.jpg", quality=97)
    corner = (width - 1600.0, height - 1600.0, float(width), float(height))
    pairs = [(read_crops(tmp_path / "a.jpg", [corner], [size], (width, height))[0], corner),
             (read_square(tmp_path / "a.jpg", size)[0], frame_of(width, height))]  # fmt: skip
    original = Image.open(tmp_path / "a.jpg")
    for found, box in pairs:
        exact = np.asarray(original.resize((size, size), Image.Resampling.BILINEAR, box=box)).astype(float)[..., 0]
        for axis in (0, 1):
            slope = np.gradient(exact, axis=axis)
            shift = ((found[..., 0] - exact) * slope).sum() / (slope**2).sum()  # in pixels of the crop
            assert abs(shift) < 0.03


def test_all_kinds_of_pixels_become_upright_rgb(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (30, 1))
    colour = np.stack([ramp, ramp[:, ::-1], ramp // 2], axis=2)
    grey, alpha = np.stack([ramp] * 3, axis=2), np.dstack([colour, np.zeros_like(ramp)])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    kinds = {
        "grey.png": (Image.fromarray(ramp), grey, 0), "alpha.png": (Image.fromarray(alpha), colour, 0),
        "16.png": (Image.fromarray(ramp.astype(np.uint16) * 257), grey, 0),
        "1.png": (Image.fromarray(ramp > 127), (grey > 127) * 255, 0),
        "palette.png": (Image.fromarray(colour).convert("P"), colour, 60),
        "cmyk.jpg": (Image.fromarray(colour).convert("CMYK"), colour, 12),
        "turned.png": (Image.fromarray(colour), np.rot90(colour, -1), 0),
    }  # fmt: skip
    for name, (image, expected, tolerance) in kinds.items():
        image.save(tmp_path / name, **({"exif": exif} if name == "turned.png" else {}))
        found, size = read_image(tmp_path / name)
        assert found.mode == "RGB"
        assert found.size == size == expected.shape[1::-1]
        assert np.abs(np.asarray(found).astype(int) - expected).max() <= tolerance, name

