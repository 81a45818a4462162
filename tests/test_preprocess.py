"""Images and csv to arrays, tables and folds."""

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL_MODEL, call, hashes, write_images
from PIL import Image

import preprocess
import util
from util import InputError


def run(source, output, *more):
    return call("preprocess", "--train_csv", source / "train.csv", "--output_dir", output,
                "--size", 32, "--n_folds", 2, *more)  # fmt: skip


def test_arrays_and_tables_agree(source, data_dir):
    data = util.read_data(data_dir)
    array = util.open_array(util.array_path(data_dir, "train", 64), 24)
    assert array.shape == (24, 64, 64, 3)
    assert data.train["image_name"].iloc[3] == "0003"
    assert (data.train["width"].iloc[0], data.train["height"].iloc[0]) == (96, 72)
    image = Image.open(source / "images" / "0000.jpg").resize((64, 64), 2, box=(12, 0, 84, 72))
    assert np.abs(array[0].astype(int) - np.asarray(image)).max() <= 1
    assert data.submission_ids == ["0027", "0026", "0025", "0024"]


def test_sources_stay_as_they_are_and_workers_do_not_matter(source, tmp_path):
    before = hashes(source)
    one = run(source, tmp_path / "one", "--workers", 1)
    four = run(source, tmp_path / "four", "--workers", 4)
    assert hashes(source) == before
    assert (one / "train_32.npy").read_bytes() == (four / "train_32.npy").read_bytes()
    assert (one / "train.csv").read_bytes() == (four / "train.csv").read_bytes()


def files(folder):
    """Content of all files but the json, which names the command."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".json"}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(util, "CHUNK", 5)


def test_stopped_run_goes_on_where_it_was(source, tmp_path, monkeypatch, small_chunks):
    whole = run(source, tmp_path / "whole")
    read, seen = util.read_square, []

    def stop_at(count):
        def read_square(path, *more):
            if len(seen) == count:
                raise KeyboardInterrupt
            seen.append(path.name)
            return read(path, *more)

        monkeypatch.setattr(util, "read_square", read_square)

    stop_at(13)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", "--workers", 1)
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".part"}
    with pytest.raises(InputError, match="begun with exact = False, not True"):
        run(source, tmp_path / "out", "--exact")
    del seen[:]
    stop_at(1000)
    run(source, tmp_path / "out", "--workers", 1)
    assert len(seen) == 28 - 10  # two chunks of five were recorded
    assert files(tmp_path / "out") == files(whole)


def test_shards_in_any_order_make_the_same_files(source, tmp_path, small_chunks):
    whole = run(source, tmp_path / "whole")
    for shard in ("2/3", "0/3", "1/3"):
        run(source, tmp_path / "out", "--shard", shard)
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".part"}
    run(source, tmp_path / "out")
    assert files(tmp_path / "out") == files(whole)


def test_finished_directory_is_refused(source, tmp_path):
    run(source, tmp_path / "out")
    with pytest.raises(InputError, match="--overwrite"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", "--overwrite")


def test_fast_decoding_is_close_to_exact(tmp_path):
    rng = np.random.default_rng(0)
    small = rng.integers(60, 200, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(small).resize((1200, 800), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg")
    fast, size = util.read_square(tmp_path / "a.jpg", 64)
    exact, _ = util.read_square(tmp_path / "a.jpg", 64, exact=True)
    assert size == (1200, 800)
    plain = Image.open(tmp_path / "a.jpg").convert("RGB")
    plain = plain.resize((64, 64), Image.Resampling.BILINEAR, box=(200, 0, 1000, 800))
    assert (exact == np.asarray(plain)).all()
    assert (fast != exact).any()
    assert np.abs(fast.astype(float) - exact).mean() < 1.0


def test_folds_keep_patients_whole_and_both_classes(data_dir):
    table = util.read_data(data_dir).train
    assert (table.groupby("patient_id")["fold"].nunique() == 1).all()
    assert (table.groupby("fold")["target"].nunique() == 2).all()
    assert set(table["fold"]) == {0, 1}


def test_folds_that_cannot_be_are_refused():
    group = np.array(["a", "a", "b", "c", "d", "e"])
    target = np.array([1, 1, 0, 0, 0, 0])
    with pytest.raises(InputError, match="class 1 has only 1 groups"):
        preprocess.assign_folds(target, group, 2, seed=0)


def edit(source, column, value):
    table = pd.read_csv(source / "train.csv", dtype={"image_name": str})
    table[column] = value
    table.to_csv(source / "train.csv", index=False)


@pytest.mark.parametrize(
    ("column", "value", "more", "words"),
    [
        ("patient_id", None, [], "'patient_id' of .* is empty"),
        ("x", 0, ["--group_col", "lesion"], "no column 'lesion'.*--group_col none"),
        ("target", 1, [], "every target is 1"),
        ("fold", 0, [], "'fold' already"),
        ("x", 0, ["--image_col", "file"], "no column 'file'"),
        ("x", 0, ["--image_col", "patient_id"], "more than once"),
        ("x", 0, ["--test_csv", "nowhere.csv"], "nowhere.csv is missing"),
        ("x", 0, ["--image_dir", "nowhere"], "--image_dir"),
        ("x", 0, ["--n_folds", "5"], "class . has only"),
    ],
)
def test_bad_input_is_named_and_nothing_written(tmp_path, column, value, more, words):
    source = write_images(tmp_path / "source", n_train=8)
    edit(source, column, value)
    with pytest.raises(InputError, match=words):
        run(source, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "text"])
def test_bad_image_is_named_or_skipped(tmp_path, fault):
    source = write_images(tmp_path / "source", n_train=12)
    path = source / "images" / "0003.jpg"
    content = path.read_bytes()
    path.unlink()
    if fault != "missing":
        path.write_bytes({"empty": b"", "truncated": content[:900], "text": b"no image"}[fault])
    with pytest.raises(InputError, match="0003"):
        run(source, tmp_path / "out")
    assert not [p for p in tmp_path.glob("out/*") if p.suffix != ".part"]
    out = run(source, tmp_path / "out", "--on_error", "skip")
    data = util.read_data(out)
    assert "0003" not in set(data.train["image_name"])
    array = util.open_array(out / "train_32.npy", 11)
    expected = util.read_square(source / "images" / "0006.jpg", 32)[0]
    assert data.train["image_name"].iloc[5] == "0006"
    assert (array[5] == expected).all()  # the rows behind the gap moved up


def test_two_files_of_one_name_are_refused(tmp_path):
    source = write_images(tmp_path / "source", n_train=8)
    (source / "images" / "0000.png").write_bytes(b"")
    with pytest.raises(InputError, match="share a name"):
        run(source, tmp_path / "out")


def test_suffix_case_and_names_with_suffix(tmp_path):
    source = write_images(tmp_path / "source", n_train=8)
    (source / "images" / "0000.jpg").rename(source / "images" / "0000.JPG")
    table = pd.read_csv(source / "train.csv", dtype=str)
    table.loc[1, "image_name"] = "0001.jpg"
    table.to_csv(source / "train.csv", index=False)
    run(source, tmp_path / "out")


def test_columns_by_flag(tmp_path):
    source = write_images(tmp_path / "source", n_train=8)
    for name in ("train.csv", "test.csv", "sample_submission.csv"):
        table = pd.read_csv(source / name, dtype=str).rename(
            columns={"image_name": "file", "target": "label", "patient_id": "person"}
        )
        table.to_csv(source / name, index=False)
    out = run(source, tmp_path / "out", "--image_col", "file", "--target_col", "label",
              "--group_col", "person")  # fmt: skip
    data = util.read_data(out)
    assert {"image_name", "target", "person", "fold"} <= set(data.train)
    assert data.facts["group_col"] == "person"


def save(folder, name, array, mode=None, **options):
    Image.fromarray(array, mode).save(folder / name, **options)
    return util.read_image(folder / name)


def test_modes_follow_one_rule(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (30, 1))
    colour = np.stack([ramp, ramp[:, ::-1], ramp // 2], axis=2)
    sixteen = ramp.astype(np.uint16) * 257
    alpha = np.dstack([colour, np.zeros_like(ramp)])

    def pixels(result):
        assert result[0].mode == "RGB"
        assert result[1] == (40, 30)
        return np.asarray(result[0])

    grey = np.stack([ramp] * 3, axis=2)
    assert (pixels(save(tmp_path, "grey.png", ramp)) == grey).all()
    assert (pixels(save(tmp_path, "sixteen.png", sixteen)) == grey).all()
    assert (pixels(save(tmp_path, "alpha.png", alpha)) == colour).all()
    Image.fromarray(colour).convert("P").save(tmp_path / "p.png")
    assert np.abs(pixels(util.read_image(tmp_path / "p.png")).astype(int) - colour).max() < 60
    Image.fromarray(colour).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(pixels(util.read_image(tmp_path / "cmyk.jpg")).astype(int) - colour).mean() < 5
    Image.fromarray(ramp > 127).save(tmp_path / "bit.png")
    assert set(np.unique(pixels(util.read_image(tmp_path / "bit.png")))) == {0, 255}


def test_exif_orientation_is_applied(tmp_path):
    image = np.zeros((30, 40, 3), np.uint8)
    image[:, :20] = (200, 0, 0)  # red on the left as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: red on top
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    upright, size = util.read_image(tmp_path / "a.png")
    assert size == upright.size == (30, 40)
    assert np.asarray(upright)[0, 0, 0] == 200
    assert np.asarray(upright)[-1, 0, 0] == 0


# ---------------------------------------------------------------- external images
def add_extra(source, tmp_path, **change):
    """Three positive images of other patients in a folder of their own; returns their table."""
    folder = tmp_path / "external"
    (folder / "images").mkdir(parents=True)
    for i in range(3):
        shutil.copy(source / "images" / f"{i:04d}.jpg", folder / "images" / f"ex{i}.jpg")
    table = pd.DataFrame({"image_name": ["ex0", "ex1", "ex2"], "target": 1,
                          "patient_id": ["q0", None, "q2"], "sex": "male"})  # fmt: skip
    table.assign(**change).to_csv(folder / "extra.csv", index=False)
    return folder / "extra.csv"


def test_external_images_are_in_no_fold(source, tmp_path):
    words = ["--train_csv", source / "train.csv", "--size", 64, "--n_folds", 2]
    plain = call("preprocess", *words, "--output_dir", tmp_path / "plain")
    extra = call("preprocess", *words, "--output_dir", tmp_path / "data",
                 "--extra_csv", add_extra(source, tmp_path))  # fmt: skip
    data, alone = util.read_data(extra), util.read_data(plain)
    assert data.train[util.FOLD].tolist() == [*alone.train[util.FOLD], -1, -1, -1]
    assert data.train[util.ID].tolist() == [*alone.train[util.ID], "ex0", "ex1", "ex2"]
    array = util.open_array(extra / "train_64.npy", 27)
    assert (array[24:] == array[:3]).all()
    assert (array[:24] == util.open_array(plain / "train_64.npy", 24)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patient_id": ["q0", "p3", None]}, "patient_id 'p3', and so has the train table"),
        ({"patient_id": ["q0", "p13", None]}, "patient_id 'p13', and so has the test table"),
        ({"image_name": ["ex0", "0004", "ex2"]}, "image_name '0004', and so has the train table"),
        ({"target": [1, 2, 1]}, "target of ex1 is '2'"),
    ],
)
def test_external_images_share_nothing_with_others(source, tmp_path, change, message):
    table = add_extra(source, tmp_path, **change)
    with pytest.raises(InputError, match=message):
        call("preprocess", "--train_csv", source / "train.csv", "--extra_csv", table,
             "--output_dir", tmp_path / "data")  # fmt: skip
    assert not (tmp_path / "data").exists()


def test_external_images_are_trained_on_and_never_scored(source, tmp_path):
    data_dir = call("preprocess", "--train_csv", source / "train.csv", "--size", 64, "--n_folds", 2,
                    "--extra_csv", add_extra(source, tmp_path), "--output_dir", tmp_path / "data")
    where = ["--data_dir", data_dir, "--runs_dir", tmp_path, *SMALL_MODEL]
    run = call("train", "--model", "chipnet", *where)
    crops = call("crop", "--source", "attention", "--run", run, "--data_dir", data_dir,
                 "--device", "cpu")  # fmt: skip
    boxes = pd.read_csv(crops / "train_boxes.csv")
    assert boxes["oof"].tolist() == [1] * 24 + [0] * 3
    run = call("train", "--model", "cropnet", "--crop_dir", crops, *where)
    assert len(pd.read_csv(run / "oof.csv")) == 24
    folds = util.read_metrics(run)["folds"]
    assert sum(fold["train_rows"] for fold in folds) == 24 + 2 * 3
    call("audit", run)
