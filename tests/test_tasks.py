"""Every kind of target from the table to the prediction of new images, on small drawn data."""

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL_MODEL, call, change, hashes, read, rewrite

import losses
import scores
import tasks
from plumbing.files import read_json
from util import InputError

ROWS = np.arange(28)  # of the drawn images: 24 to train on, 4 to test; pairs of rows are a patient
SIZE = 64


def labels_of(kind: str) -> dict[str, list]:
    """Columns of labels for the drawn images; the picture shows whether row % 4 < 2."""
    bright = ROWS % 4 < 2
    if kind == "multiclass":
        return {"diagnosis": np.where(bright, "bright one", np.where(ROWS % 8 < 4, "dark", "dull"))}
    if kind == "multilabel":
        late = np.where(ROWS % 5 == 4, np.nan, ROWS % 8 >= 4)
        return {"bright": bright.astype(int), "late": late}
    if kind == "words":  # several labels in one cell
        return {"finding": np.where(bright, "bright|left", np.where(ROWS % 8 < 4, "left", "none"))}
    return {"size": np.where(ROWS % 6 == 5, np.nan, bright * 3.5 + ROWS / 10)}


COLUMNS = {
    "multiclass": ["prob_bright one", "prob_dark", "prob_dull"],
    "multilabel": ["prob_bright", "prob_late"],
    "words": ["prob_bright", "prob_left", "prob_none"],
    "regression": ["pred"],
}


def prepare(source, folder, kind, *flags):
    """A user's tables with labels of a kind, preprocessed."""
    folder.mkdir()
    labels = pd.DataFrame(labels_of(kind))
    train, test = (read(source / f"{split}.csv").drop(columns="target", errors="ignore") for split in ("train", "test"))
    pd.concat([train, labels[:24]], axis=1).to_csv(folder / "train.csv", index=False)
    test.to_csv(folder / "test.csv", index=False)
    return call("preprocess", "--train_csv", folder / "train.csv", "--image_dir", source / "images", "--output_dir",
                folder / "data", "--size", SIZE, "--n_folds", 2, "--target_col", *labels, *flags)  # fmt: skip


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_kind_goes_from_the_table_to_new_images(source, tmp_path, kind, capsys):
    data = prepare(source, tmp_path / "my", kind)
    expected, columns = "multilabel" if kind == "words" else kind, COLUMNS[kind]
    assert f", {expected}, judged by " in capsys.readouterr().out
    where = ["--data_dir", data, "--runs_dir", tmp_path / "runs"]
    call("train", "--model", "chipnet", *where, *SMALL_MODEL, "--mixup", 0.4, "--label_smoothing", 0.1)
    small = ["--data_dir", data, "--device", "cpu", "--backbone", "regnet_tiny", "--weights", "none"]
    call("crop", "--run", tmp_path / "runs" / "chipnet", *small)
    call("train", "--model", "fusion", *where, *SMALL_MODEL, "--fsg", "--gate_l1", 0.1)
    for mode in ("mean", "rank", "logit", "weights"):
        call("ensemble", mode, "--runs_dir", tmp_path / "runs", "--name", mode)
        oof = read(tmp_path / "runs" / mode / "oof.csv")
        assert list(oof)[-len(columns) :] == columns
        assert len(oof) == 24
        assert np.isfinite(oof[columns]).all(axis=None)
        if kind == "multiclass":
            assert np.allclose(oof[columns].sum(axis=1), 1)
    metrics = read_json(tmp_path / "runs" / "mean" / "metrics.json")
    task = read_json(data / "preprocess.json")["task"]
    known = [name for name, metric in tasks.KINDS[expected].metrics.items() if task["ordinal"] or not metric.ordinal]
    assert set(known) <= metrics["pooled"].keys()
    submission = read(tmp_path / "runs" / "weights" / "submission.csv")
    assert list(submission) == ["image_name", *(["size"] if kind == "regression" else task["names"])]
    images = [source / "images" / f"{name}.jpg" for name in ("0024", "0026")]
    where = ["--run", tmp_path / "runs" / "weights", "--output", tmp_path / "out", "--device", "cpu"]
    out = call("predict", *where, *images, "--csv", source / "test.csv")
    test = read(tmp_path / "runs" / "weights" / "test_predictions.csv").groupby("image_name")[columns].mean()
    found = read(out / "predictions.csv").set_index("image_name")
    assert np.allclose(found[columns], test.loc[["0024", "0026"]], atol=1e-4)  # one image, one prediction
    assert (out / "0024.png").exists()
    call("report", tmp_path / "runs" / "weights", "--device", "cpu")


@pytest.mark.parametrize("flags", [["--model", "resnet"], ["--model", "scout", "--scout_size", 96, "--tta", 1]])
@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "regression"])
def test_a_stopped_training_of_a_kind_goes_on_bit_equal(source, tmp_path, kind, flags):
    data = prepare(source, tmp_path / "my", kind)
    words = ["--data_dir", data, *SMALL_MODEL, *flags, "--fold", 0, "--patience", 9]
    straight = call("train", *words, "--runs_dir", tmp_path / "a", "--epochs", 2)
    stopped = call("train", *words, "--runs_dir", tmp_path / "b", "--epochs", 1)
    for path in stopped.glob("fold0_metrics.json"):
        path.unlink()  # as if it had been stopped before its last file
    change(stopped / "config.json", lambda config: config["args"].update(epochs=2))
    call("train", *words, "--runs_dir", tmp_path / "b", "--epochs", 2, "--resume")
    same = [path for path in hashes(straight) if path.endswith(("oof.csv", "best.pt"))]
    assert len(same) == 3
    for path in same:
        assert hashes(straight)[path] == hashes(stopped)[path.replace("/a/", "/b/")]


# ---------------------------------------------------------------- reading labels
def task_of(values, *columns, **options):
    table = pd.DataFrame(dict(zip(columns, values, strict=True)) if columns else {"label": values})
    table.insert(0, "image_name", [f"im{i}" for i in range(len(table))])
    labels = list(table)[1:]
    task = tasks.find_task(table, "t.csv", labels, **options)
    return task, tasks.read_target(task, table, "t.csv", labels)


@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [
        ([0, 1, 1], "binary", ("1",)),
        ([False, True, True], "binary", ("1",)),
        (["benign", "benign", "malignant"], "binary", ("malignant",)),
        ([1, 2, 1], "binary", ("2",)),
        ([10, 2, 1, 1], "multiclass", ("1", "2", "10")),
        (["basal cell carcinoma", "squamous cell carcinoma", "nevus"], "multiclass",
         ("basal cell carcinoma", "nevus", "squamous cell carcinoma")),
        (["a", "b", "a b", "b a"], "multilabel", ("a", "b")),
        (["benign", "malignant ", " benign", "benign"], "binary", ("malignant",)),
        (["caf\u00e9", "cafe\u0301", "tea", "tea", "tea"], "binary", ("caf\u00e9",)),
        (["big mass|nodule", "nodule", "big mass", "none"], "multilabel", ("big mass", "nodule", "none")),
        ([0.5, 2, 3.25], "regression", ("label",)),
        ([0.5, None, 3.25], "regression", ("label",)),
    ],
)  # fmt: skip
def test_the_kind_is_what_labels_look_like(values, kind, names):
    task, _ = task_of(values)
    assert (task.kind, task.names) == (kind, names)
    again = tasks.task_of(task.facts())
    assert again == task


def test_empty_cells_are_unknown_where_that_makes_sense():
    _, target = task_of(([0, 1, None], [1, 0, 1]), "a", "b")
    assert np.array_equal(target, [[0, 1], [1, 0], [np.nan, 1]], equal_nan=True)
    _, target = task_of(["a", None, "b", "a,b"], kind="multilabel")
    assert np.array_equal(target, [[1, 0], [np.nan, np.nan], [0, 1], [1, 1]], equal_nan=True)
    _, target = task_of([0.5, None, 3])
    assert np.array_equal(target, [[0.5], [np.nan], [3]], equal_nan=True)


@pytest.mark.parametrize(
    ("values", "options", "word"),
    [
        ([0, 1, None], {}, "im2"),
        (["a", "b", "c", None], {}, "im3"),
        ([0.5, 1.5, "x"], {}, "im2"),
        ([0.5, 1.5, np.inf], {}, "im2"),
        ([1, 1, 1], {}, "same"),
        ([0, 1, 2], {"positive": "7"}, "same.*7"),
        (["a", "b", "c"], {"kind": "binary"}, "--positive"),
        (["a", "b", "c"], {"kind": "regression"}, "im0"),
        (["a", "b", "c"], {"metric": "mae"}, "auc"),
        (["a", "b", "c"], {"metric": "kappa"}, "--ordinal"),
        (["mild", "none", "severe"], {"ordinal": True}, "--ordinal"),
        (["0,1", "2,3", "0,5"], {}, "decimal commas"),
        (["a", "b", "c"], {"kind": "multiclass", "positive": "a"}, "--positive"),
    ],
)
def test_labels_that_do_not_fit_are_named(values, options, word):
    with pytest.raises(InputError, match=word):
        task_of(values, **options)


def test_a_label_that_the_sample_submission_lacks_is_named():
    task, _ = task_of(["a", "b", "c"])
    prob = np.array([[0.2, 0.5, 0.3]])
    assert task.submit(prob, ["label"])["label"].tolist() == ["b"]
    assert task.submit(prob, ["p_c", "p_a", "p_b"])["p_c"].tolist() == [0.3]
    with pytest.raises(InputError, match="sample submission"):
        task.submit(prob, ["a", "b"])
    close = tasks.MultiLabel(("big_mass", "mass"), "ap")  # one is the end of the other
    assert close.submit(prob[:, :2], ["mass", "big_mass"])["mass"].tolist() == [0.5]
    assert close.submit(prob[:, :2], ["p_mass", "p_big_mass"])["p_mass"].tolist() == [0.5]


# ---------------------------------------------------------------- scores and losses
def test_unknown_labels_are_neither_trained_on_nor_scored():
    import torch

    task, target = task_of(([0, 1, None, 1], [1, 0, 1, None]), "a", "b")
    prob = np.array([[0.2, 0.7], [0.6, 0.4], [0.9, 0.8], [0.7, 0.1]])
    assert scores.OF_LABELS["auc"].of(target, prob) == 1.0  # of both labels, over what is known
    logit = torch.zeros(4, 2, requires_grad=True)
    losses.loss_of(task, "bce", logit, torch.from_numpy(task.goal(target))).sum().backward()
    assert (logit.grad == 0).tolist() == np.isnan(target).tolist()


def test_scores_are_sklearns():
    from sklearn import metrics

    rng = np.random.default_rng(0)
    target, prob = rng.integers(0, 4, (200, 1)).astype(float), rng.dirichlet(np.ones(4), 200)
    group, (task, _) = np.arange(200), task_of([0, 1, 2, 3], ordinal=True)
    found = tasks.score(task, target, prob, group)
    decided = prob.argmax(axis=1)
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(target[:, 0], prob, multi_class="ovr"))
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(target[:, 0], decided))
    assert found["balanced_accuracy_of_baseline"] == 0.25
    assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score(target[:, 0], decided, weights="quadratic"))
    assert found["logloss"] == pytest.approx(metrics.log_loss(target[:, 0], prob))
    assert found["auc_interval"][0] < found["auc"] < found["auc_interval"][1]
    assert found["counts"] == {str(i): int((target == i).sum()) for i in range(4)}

    value = rng.normal(size=(200, 1))
    close = value + rng.normal(size=(200, 1))
    value[:10] = np.nan
    task = tasks.task_of({"kind": "regression", "names": ["size"], "metric": "r2"})
    found = tasks.score(task, value, close, group)
    assert found["rows"] == 190
    assert found["r2"] == pytest.approx(metrics.r2_score(value[10:], close[10:]))
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(value[10:], close[10:]))
    assert found["mae_of_baseline"] < found["mae"] * 2
    assert tasks.main_score(task, value, close) == found["r2"]
    worse = tasks.task_of({"kind": "regression", "names": ["size"], "metric": "mae"})
    assert tasks.main_score(worse, value, close) == -found["mae"]


def test_a_quantity_is_standardised_by_training_rows_and_comes_back():
    task = tasks.task_of({"kind": "regression", "names": ["size"], "metric": "mae"})
    fitted = task.fitted(np.array([[10.0], [np.nan], [30.0]]))
    assert (fitted.mean, fitted.std) == (20, 10)
    values = np.array([[0.0], [25.0]])
    assert np.allclose(fitted.prob(fitted.logit(values)), values)
    assert np.allclose(fitted.goal(values), [[-2], [0.5]])


def test_strata_are_classes_rarest_labels_and_quantiles():
    task, target = task_of([3, 1, 2, 1])
    assert task.strata(target).tolist() == [2, 0, 1, 0]
    task, target = task_of(([1, 1, 0, 1], [0, 1, 0, 0]), "a", "b")
    assert task.strata(target).tolist() == [1, 2, 0, 1]
    task, target = task_of([0.5, *range(10, 19), None])
    strata = task.strata(target)
    assert strata[-1] == 0
    assert np.bincount(strata[:-1])[1:].tolist() == [2, 2, 2, 2, 2]


def test_none_is_a_word_among_words_and_a_gap_among_numbers(source, tmp_path):
    words = np.where(ROWS % 4 < 2, "None", np.where(ROWS % 8 < 4, "tumor", "tumor|cyst"))[:24]
    table = read(source / "train.csv").drop(columns="target").assign(finding=words)
    table.to_csv(tmp_path / "train.csv", index=False)
    flags = ["--image_dir", source / "images", "--size", 32, "--n_folds", 2]
    data = call("preprocess", "--train_csv", tmp_path / "train.csv", "--output_dir", tmp_path / "a", *flags,
                "--target_col", "finding")  # fmt: skip
    assert read_json(data / "preprocess.json")["task"]["names"] == ["None", "cyst", "tumor"]
    table["size"] = np.where(ROWS % 5, ROWS / 2, np.nan)[:24]
    table.to_csv(tmp_path / "train.csv", index=False, na_rep="NA")
    data = call("preprocess", "--train_csv", tmp_path / "train.csv", "--output_dir", tmp_path / "b", *flags,
                "--target_col", "size")  # fmt: skip
    assert read(data / "train.csv")["target"].isna().sum() == 5


def test_a_fold_without_a_score_is_trained_all_the_same(source, tmp_path):
    data = prepare(source, tmp_path / "my", "regression")
    table = read(data / "train.csv")
    rewrite(data / "train.csv", lambda t: t.assign(target=t["target"].where(t["fold"] == 1)), "preprocess.json")
    assert table["target"].notna().sum() > 12
    run = call("train", "--model", "resnet", "--data_dir", data, "--runs_dir", tmp_path, *SMALL_MODEL, "--fold", 0)
    metrics = read_json(run / "metrics.json")
    assert (metrics["folds"][0]["mae"], metrics["folds"][0]["best_epoch"]) == (None, 1)


def test_a_run_has_one_target(source, tmp_path):
    words = ["--model", "resnet", "--runs_dir", tmp_path, *SMALL_MODEL]
    data = prepare(source, tmp_path / "my", "multiclass")
    call("train", "--data_dir", data, "--fold", 0, *words)
    other = prepare(source, tmp_path / "other", "multiclass", "--metric", "accuracy")
    with pytest.raises(InputError, match="task"):
        call("train", "--data_dir", other, "--fold", 1, *words)
    with pytest.raises(InputError, match="another target"):
        call("ensemble", "mean", "--runs_dir", tmp_path, "--data_dir", other)


@pytest.mark.parametrize("flags", [["--n_folds", 12], ["--n_folds", 12, "--group_col", "none"]])
def test_more_folds_than_rows_of_a_stratum_end_in_one_line(source, tmp_path, flags):
    with pytest.raises(InputError, match="--n_folds"):
        prepare(source, tmp_path / "my", "regression", *flags)


# ---------------------------------------------------------------- a kind from outside
class Count(tasks.Regression):
    """A number of things: the exponential of the output, learned as it is."""

    kind = "count"

    def goal(self, target):
        return np.log1p(target).astype(np.float32)

    def prob(self, logit):
        return logit.exp() - 1

    def logit(self, prob):
        return np.log1p(np.maximum(prob, 0))


def test_a_new_kind_is_one_class_and_one_row(source, tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.KINDS, "count", Count)
    data = prepare(source, tmp_path / "my", "regression", "--task", "count")
    run = call("train", "--model", "resnet", "--data_dir", data, "--runs_dir", tmp_path, *SMALL_MODEL, "--fold", 0)
    oof = read(run / "oof.csv")
    assert (oof["pred"] > -1).all()
    assert read_json(run / "metrics.json")["pooled"]["mae"] > 0


# ---------------------------------------------------------------- folders instead of a table
def test_folders_of_classes_need_no_table(source, tmp_path, capsys):
    labels = read(source / "train.csv").set_index("image_name")["target"]
    for name, target in labels.items():
        folder = tmp_path / "photos" / ("dull" if target else "bright")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jpg").write_bytes((source / "images" / f"{name}.jpg").read_bytes())
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "new" / "deep" / "0003.jpg").write_bytes((source / "images" / "0026.jpg").read_bytes())
    words = ["--image_dir", tmp_path / "photos", "--test_image_dir", tmp_path / "new", "--size", 32, "--n_folds", 2]
    data = call("preprocess", *words, "--output_dir", tmp_path / "data", "--positive", "dull")
    table = read(data / "train.csv").set_index("image_name")
    assert table["target"].to_dict() == {f"{'dull' if t else 'bright'}/{name}": t for name, t in labels.items()}
    assert read(data / "test.csv")["image_name"].tolist() == ["deep/0003"]
    assert "2 classes (bright, dull), binary" in capsys.readouterr().out
    run = call("train", "--model", "resnet", "--data_dir", data, "--runs_dir", tmp_path, *SMALL_MODEL, "--fold", 0)
    assert list(read(run / "submission.csv")) == ["image_name", "target"]
    dry = call("preprocess", *words, "--output_dir", tmp_path / "dry", "--limit", 12)
    assert len(read(dry / "train.csv")) == 12  # of both classes
    (tmp_path / "photos" / "stray.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="stray.*class folder"):
        call("preprocess", *words, "--output_dir", tmp_path / "other")
