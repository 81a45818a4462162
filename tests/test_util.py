"""Tables, arrays, json, metrics."""

import json
import pickle
import shutil
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import util
from util import InputError


def test_json_is_strict_and_whole(tmp_path):
    path = tmp_path / "a.json"
    util.write_json(path, {"b": np.float32(0.5), "a": np.int64(3), "path": tmp_path})
    assert json.loads(path.read_text()) == {"a": 3, "b": 0.5, "path": str(tmp_path)}
    with pytest.raises(ValueError, match="JSON"):
        util.write_json(path, {"a": float("nan")})
    assert util.read_json(path)["a"] == 3  # the failed write left the old file
    assert not list(tmp_path.glob("*.tmp"))


def test_what_a_killed_writer_left_is_written_over_and_a_living_one_waited_for(tmp_path):
    path = tmp_path / "a.json"
    (tmp_path / "a.json.tmp").write_text("half of a fi")
    with util.atomic(path) as temporary:
        temporary.write_text("{}\n")
        other = Thread(target=util.write_json, args=(path, {"b": 1}))
        other.start()
        other.join(0.2)
        assert other.is_alive()
    other.join()
    assert util.read_json(path) == {"b": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_array_has_its_name_once_it_is_finished(tmp_path):
    path = tmp_path / "x.npy"
    array = util.PartialArray(path, (3, 4, 4, 3))
    for row in (2, 0, 1):
        array.write(row, np.full((4, 4, 3), row + 7))
    assert not path.exists()
    with pytest.raises(ValueError, match="is \\(4, 4, 3\\), not"):
        array.write(0, np.zeros((4, 4)))
    array.finish(np.array([0, 2]))
    assert (util.open_array(path, 2)[:, 0, 0, 0] == [7, 9]).all()
    array.finish(np.arange(3))
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]
    whole = util.open_array(path, 3)
    assert (whole == np.arange(7, 10)[:, None, None, None]).all()
    rows = pickle.loads(pickle.dumps(util.Rows(path, 3)))
    assert (rows[np.array([2, 0])] == whole[[2, 0]]).all()
    assert (rows[1] == whole[1]).all()
    assert rows[1].flags.writeable


def test_full_disk_is_an_error_and_known_beforehand(tmp_path, monkeypatch):
    array = util.PartialArray(tmp_path / "x.npy", (2, 4, 4, 3))
    monkeypatch.setattr(util.os, "pwrite", lambda *_: 5)  # as many bytes as there was room for
    with pytest.raises(OSError, match="No space"):
        array.write(0, np.zeros((4, 4, 3)))
    monkeypatch.setattr(util.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(InputError, match="y.npy needs 0.00 GB.*make room"):
        util.PartialArray(tmp_path / "y.npy", (2, 4, 4, 3))


def test_progress_is_found_again_unless_its_array_is_gone(tmp_path):
    def begin():
        array = util.PartialArray(tmp_path / "x.npy", (600, 2))
        return array, util.Progress(tmp_path / "x_done.npy", [array], facts=2)

    array, progress = begin()
    everything = np.arange(600)
    shards = [list(util.chunked(progress.todo(everything), (i, 2))) for i in range(2)]
    assert [[len(rows) for rows in shard] for shard in shards] == [[256, 44], [256, 44]]
    assert sorted(np.concatenate([*shards[0], *shards[1]])) == list(range(600))
    rows = shards[1][0]
    progress.add(rows, np.stack([rows, rows], axis=1))
    array, progress = begin()
    assert set(progress.todo(everything)) == set(range(600)) - set(rows)
    assert progress.facts[rows[5]].tolist() == [rows[5], rows[5]]
    array.finish(everything)
    array, progress = begin()  # stopped after this array had its name, before the next had
    assert len(progress.todo(everything)) == 600 - 256
    (tmp_path / "x.npy.part").unlink()
    array, progress = begin()
    assert len(progress.todo(everything)) == 600


def test_unfinished_directory_goes_on_only_with_the_same_settings(tmp_path):
    def claim(overwrite=False, shard=None, **settings):
        args = SimpleNamespace(overwrite=overwrite, shard=shard)
        return util.claim_filling(tmp_path / "out", "done.json", args, settings)

    out = claim(size=3)
    (out / "x.npy.part").write_bytes(b"x")
    claim(size=3, shard=(0, 2))
    with pytest.raises(InputError, match="begun with size = 3, not 4; pass --overwrite"):
        claim(size=4)
    with pytest.raises(InputError, match="other shards"):
        claim(size=3, overwrite=True, shard=(0, 2))
    assert (out / "x.npy.part").exists()
    claim(size=4, overwrite=True)
    assert not (out / "x.npy.part").exists()
    util.finish_filling(out, "done.json", {})
    assert [p.name for p in out.iterdir()] == ["done.json"]
    (out / "x.npy.part").write_bytes(b"x")  # killed between its last two steps
    with pytest.raises(InputError, match="already finished"):
        claim(size=4)
    assert [p.name for p in out.iterdir()] == ["done.json"]


@pytest.mark.parametrize(
    ("array", "rows", "words"),
    [
        (np.zeros((2, 4, 4, 3), np.uint8), 3, "has 2 images but its table has 3 rows"),
        (np.zeros((2, 4, 4, 3), np.float32), 2, "float32"),
        (np.zeros((2, 4, 5, 3), np.uint8), 2, "size, size, 3"),
        (np.array([{"a": 1}], dtype=object), 1, "not a readable array"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, array, rows, words):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=words):
        util.open_array(tmp_path / "x.npy", rows)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a readable csv"),
        ("image_name,target\n", "no rows"),
        ("name,target\na,1\n", "no column 'image_name'; it has name, target"),
        ("image_name\na\n", "no column 'target'"),
        ("image_name,target\na,1\n,0\n", "line 3: image_name is empty"),
        ("image_name,target\na,1\na,0\n", "'a' more than once"),
        ('image_name,target\n"a,1\n', "not a readable csv"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, text, words):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        util.read_table(path, ["target"])


def test_tables_keep_ids_as_text_and_read_bom_and_refuse_latin1(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("\ufeffimage_name,target\n0012,1\n".encode())
    assert util.read_table(path)["image_name"].tolist() == ["0012"]
    path.write_bytes("image_name,target\nM\xfcller,1\n".encode("cp1252"))
    with pytest.raises(InputError, match="UTF-8"):
        util.read_table(path)


@pytest.mark.parametrize(
    ("targets", "words"),
    [([0, 0], "every target is 0"), ([0, None], "target of b"), ([0, 2], "must be 0 or 1")],
)
def test_wrong_targets_are_refused(targets, words, tmp_path):
    table = pd.DataFrame({"image_name": ["a", "b"], "target": targets})
    with pytest.raises(InputError, match=words):
        util.check_target(table, tmp_path / "t.csv")


def test_weighted_auc_is_sklearns_with_ties_and_weights():
    rng = np.random.default_rng(0)
    target, prob = rng.integers(0, 2, 200), rng.integers(0, 12, 200) / 12
    weight = rng.integers(0, 3, 200)
    expected = roc_auc_score(target, prob, sample_weight=weight)
    assert util.weighted_auc(target, prob, weight) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(util.weighted_auc(np.ones(3), prob[:3], np.ones(3)))


def test_partial_auc_spans_its_range():
    target = np.array([0, 0, 1, 1])
    assert util.partial_auc(target, np.array([0.1, 0.2, 0.8, 0.9])) == pytest.approx(0.2)
    assert util.partial_auc(target, np.array([0.9, 0.8, 0.2, 0.1])) == pytest.approx(0, abs=1e-9)
    assert util.partial_auc(target, np.full(4, 0.5)) == pytest.approx(0.02)


def test_interval_covers_auc_and_widens_with_groups():
    rng = np.random.default_rng(1)
    target = np.repeat(rng.integers(0, 2, 60), 5)  # five like images a patient
    prob = np.repeat(rng.normal(size=60), 5) + target
    rows, groups = np.arange(300), np.repeat(np.arange(60), 5)
    alone, together = (util.auc_interval(target, prob, g) for g in (rows, groups))
    auc = roc_auc_score(target, prob)
    weights = next(util.bootstrap_weights(groups)).reshape(60, 5)
    assert (weights == weights[:, :1]).all()  # a patient is drawn whole
    assert weights.sum() == 300
    assert together[0] < alone[0] < auc < alone[1] < together[1]


def test_score_of_one_class_is_null():
    result = util.score(np.zeros(3, int), np.arange(3.0), np.arange(3))
    assert result["auc"] is None
    assert result["rows"] == 3


def test_ranks_are_taken_inside_folds():
    prob, fold = np.array([0.1, 0.9, 0.8, 0.2]), np.array([0, 0, 1, 1])
    assert util.rank_in_fold(prob, fold).tolist() == [0.5, 1, 1, 0.5]


def test_rows_without_group_are_groups_of_their_own():
    table = pd.DataFrame({"image_name": ["a", "b", "c", "d"], "p": ["x", None, "x", None]})
    group = util.groups_of(table, "p")
    assert group[0] == group[2]
    assert len(set(group)) == 3
    assert len(set(util.groups_of(table, None))) == 4


def test_group_on_both_sides_of_a_fold_is_named(data_dir, tmp_path):
    def move(name, group_col="patient_id"):
        """A copy of the data whose first row lies in the other fold, hashed as if it had to."""
        copy = shutil.copytree(data_dir, tmp_path / name, ignore=shutil.ignore_patterns("crops"))
        table = pd.read_csv(copy / "train.csv", dtype={"image_name": str})
        table.loc[0, "fold"] = 1 - table.loc[0, "fold"]
        table.to_csv(copy / "train.csv", index=False)
        facts = util.read_json(copy / "preprocess.json") | {"group_col": group_col}
        facts["sha256"]["train.csv"] = util.sha256(copy / "train.csv")
        util.write_json(copy / "preprocess.json", facts)
        return copy

    with pytest.raises(InputError, match=r"train\.csv: patient_id p0 lies in folds . and ., so"):
        util.read_data(move("split"))
    assert util.check_groups(util.read_data(move("alone", None))) == 24  # every row by itself


def test_changed_table_is_noticed(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "data")
    util.read_data(copy)
    text = (copy / "train.csv").read_text()
    (copy / "train.csv").write_text(text.replace(",male,", ",female,", 1))
    with pytest.raises(InputError, match="changed after preprocessing"):
        util.read_data(copy)
