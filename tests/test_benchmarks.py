"""The benchmarks: their scores, and their tables on small data."""

import os
import shutil
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, change
from PIL import Image

import scores
from localize import Box
from plumbing.files import read_json
from tasks import Binary, MultiClass, MultiLabel, Regression
from util import InputError

sys.path.insert(0, str(ROOT / "benchmarks"))

import crop_gain
import crop_quality
import fsg_ablation
import fsg_cost
import kill_test
import lesions
import megapixel_mnist
import polyp_size
import prepare_speed
import speed
import streets
import targets


def run(module, *words):
    return module.main(module.get_args_parser().parse_args([str(word) for word in words]))


def table_of(text):
    """Cells of a printed table by the first cell of their row."""
    rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|")
    return {name: cells for name, *cells in rows}


@pytest.fixture(scope="module")
def mask_dir(source, tmp_path_factory):
    """Masks of the discs of conftest.write_images, found by their contrast."""
    folder = tmp_path_factory.mktemp("masks")
    for path in (source / "images").iterdir():
        dark = cv2.GaussianBlur(cv2.imread(str(path)), (5, 5), 0).min(axis=2) < 125
        cv2.imwrite(str(folder / f"{path.stem}_segmentation.png"), dark.astype(np.uint8) * 255)
    return folder


def test_scores_of_boxes_and_maps():
    assert crop_quality.overlap(Box(0, 0, 4, 4), Box(2, 0, 6, 4)) == pytest.approx(8 / 24)
    mask = np.zeros((100, 200), bool)
    mask[40:60, 100:110] = True
    assert crop_quality.coverage(mask, Box(100, 40, 105, 60)) == 0.5
    assert lesions.ideal_square(mask).corners == pytest.approx((92, 37, 118, 63))
    mask[:], mask[0:50, 0:20] = False, True
    assert lesions.ideal_square(mask).corners == pytest.approx((0, 0, 65, 65))  # shifted into the picture
    mask = np.zeros((224, 224), bool)
    mask[64:128, 96:160] = True
    attention = cv2.resize(mask.astype(np.float32), (56, 56), interpolation=cv2.INTER_AREA)
    assert crop_quality.best_boxes(attention, mask).max() > 0.95
    assert crop_quality.hits(attention, mask)
    assert not crop_quality.hits(np.ones((7, 7)), np.roll(mask, 96, axis=0))  # the centre is outside
    attention = np.full((7, 7), 0.001)
    attention[0, 0:3] = 1
    clipped = crop_quality.clipped_box(attention, 1.0, (448, 448))
    assert clipped.x1 - clipped.x0 > clipped.y1 - clipped.y0  # as the original: no square


def test_quality_table(data_dir, runs_dir, mask_dir, tmp_path, capsys):
    words = ["--show", "chipnet", "--montage", tmp_path / "montage.png"]
    run(crop_quality, data_dir, "--mask_dir", mask_dir, *words)
    table = table_of(capsys.readouterr().out)
    assert float(table["whole image"][0]) > 0.9
    assert float(table["dark by Otsu's threshold"][3]) > 0.5
    assert {"chipnet, ours", "chipnet, original k = 1.5"} <= table.keys()
    assert (tmp_path / "montage.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="--mask_dir"):
        run(crop_quality, data_dir, "--mask_dir", tmp_path)


def test_intervals_of_gains_know_that_other_trainings_would_differ(monkeypatch):
    monkeypatch.setattr(scores, "BOOTSTRAP_SAMPLES", 100)
    perfect, useless = np.arange(40) % 2, np.zeros(40)  # AUC 1 and 1/2, of whatever rows
    found = {"full": [perfect, perfect], "crop": [perfect, useless], "fusion": [useless, useless]}
    table = crop_gain.compare(crop_gain.make_blends(found), perfect, np.arange(40))
    assert table["crop"] == pytest.approx((0.75, 0.5 / 2**0.5, -0.25, -0.5, 0))
    assert table["full + crop"][3:] == pytest.approx((0, 0))
    assert table["fusion"][3:] == pytest.approx((-0.5, -0.5))


def test_gain_table(data_dir, runs_dir, mask_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scores, "BOOTSTRAP_SAMPLES", 20)
    for name, origin in (("full", "resnet"), ("crop", "cropnet"), ("fusion", "cropnet")):
        for seed in (0, 1):  # finished runs are not trained again
            shutil.copytree(runs_dir / origin, tmp_path / f"{name}_seed{seed}")
    words = [data_dir, "--crop_dir", data_dir / "crops" / "chipnet", "--runs_dir", tmp_path, "--mask_dir", mask_dir]
    run(crop_gain, *words, "--seeds", 0, 1)
    table = table_of(capsys.readouterr().out.partition("small:")[0])
    auc = read_json(runs_dir / "resnet" / "metrics.json")["ranked"]["auc"]
    assert table["full"][:2] == [f"{auc:.3f}", "0.000"]
    assert table[crop_gain.CONTROL][0] == f"{auc:.3f}"  # twice the same net
    assert "full + crop" in table
    assert "full + fusion" in table
    run(crop_gain, *words, "--seeds", 0, 1, "--arms", "full", "crop")
    fewer = table_of(capsys.readouterr().out.partition("small:")[0])
    assert fewer == {name: row for name, row in table.items() if "fusion" not in name}


def test_ablation_pairs_arms_and_repeats_nothing(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    words = ["digits", "--seeds", 2, "--share", 0.1, "--epochs", 1, "--small_epochs", 1, "--size", 32, "--backbone",
             "regnet_tiny", "--output", output, "--arms", "baseline", "held_out", "hard"]  # fmt: skip
    run(fsg_ablation, *words)
    first, rows = capsys.readouterr().out, fsg_ablation.read_rows(output)
    assert table_of(first).keys() >= {"baseline", "held_out", "hard 10"}
    assert len(rows) == 6
    assert all(("gate" in row) == (row["arm"] != "baseline") for row in rows)
    run(fsg_ablation, *words)
    assert capsys.readouterr().out == first  # read from the file


def test_ablation_arms_start_from_the_same_function_and_test_sets_share_no_image(data_dir):
    parts = [fsg_ablation.load_data(str(data_dir), seed) for seed in (0, 1)]
    assert len({image.tobytes() for part in parts for image in part["x_test"]}) == 24
    args = fsg_ablation.get_args_parser().parse_args(["digits", "--size", "32", "--backbone", "regnet_tiny"])
    outputs = {}
    for arm in fsg_ablation.ARMS:
        torch.manual_seed(0)
        network = fsg_ablation.make_network(args, 10)
        fsg_ablation.add_arm(network, arm)
        outputs[arm] = network.eval()(torch.ones(2, 3, 32, 32), None)
    same = {arm for arm, out in outputs.items() if torch.equal(out, outputs["baseline"])}
    assert same == set(fsg_ablation.ARMS) - {"paper", "upstream"}


def test_ablation_statistics():
    low, high, p = fsg_ablation.corrected(np.array([0.01, 0.02, 0.03]), ratio=0.5)
    half = 4.302653 * 0.01 * (1 / 3 + 0.5) ** 0.5  # t of 2 degrees of freedom; plainly it were (1/3) ** .5
    assert (low, high) == pytest.approx((0.02 - half, 0.02 + half))
    assert p == pytest.approx(0.16, abs=0.005)  # plainly .07
    assert fsg_ablation.corrected(np.zeros(3), 0.5) == (0, 0, 1)
    assert fsg_ablation.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    rows = [{"metric": "auc", "auc": auc, "gate": [auc, auc - 0.05, 0.5, 0.5, 0.5]} for auc in (0.8, 0.9)]
    assert fsg_ablation.prunable(rows, "gate") == "50%"  # .80 is within .071 of .85, .5 is not


def test_cost_of_gates(capsys):
    run(fsg_cost, "--backbone", "regnet_tiny", "--size", 32, "--batch_size", 2, "--rounds", 1)
    assert table_of(capsys.readouterr().out).keys() >= {*fsg_cost.STEPS, *fsg_cost.PREDICTIONS}
    plain = fsg_cost.make_backbone("regnet_tiny", "none", 32)[0]
    ways = [fsg_cost.make_step(plain, way, torch.ones(2, 3, 32, 32), "off") for way in ("single", "two passes")]
    for step, _ in ways:  # the reference takes the same step
        step()
    assert all(map(torch.equal, *(model.parameters() for _, model in ways)))


def test_both_ways_of_the_speed_benchmark_do_the_same(tmp_path):
    stage = speed.preprocess_stage("small", speed.draw_jpegs(tmp_path / "jpegs", 640, 480, 2), True, tmp_path)
    stage.reference()
    stage.ours()
    saved = np.asarray(Image.open(tmp_path / "again.jpg").resize((224, 224), 2)).astype(float)
    written = np.load(tmp_path / "small.npy.part")[-1]
    assert np.abs(written - saved).mean() < 3  # but for the reference's second compression
    plain, ours = (network.eval() for network in speed.make_chipnets("regnet_tiny", torch.device("cpu")))
    assert "SmallMapConv2d" not in str(plain)
    image = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(speed.chips_one_by_one(plain, image[0]), ours.embed(image)[0], atol=1e-4)
    for stage in (speed.augment_stage(3), speed.turn_stage(3)):
        theirs, ours = (np.asarray(way(), dtype=float) for way in (stage.reference, stage.ours))
        assert theirs.shape == ours.shape
        assert abs(theirs.mean() - ours.mean()) < 1.5 * ours.std()  # of one range of values


def test_killed_preprocessing_goes_on_to_the_same_end(capsys):
    run(kill_test, "--kills", 1, "--only", "preprocess", "--no-full_disk")
    *_, kills, calls, _, differences = map(float, table_of(capsys.readouterr().out)["preprocess"])
    assert (kills >= 1, calls, differences) == (True, kills, 0)


def test_kill_test_names_what_differs(data_dir, tmp_path):
    before, after = (kill_test.fresh(tmp_path / name, data_dir) for name in "ab")
    change(after / "preprocess.json", lambda facts: facts.update(argv=["other"], commit=None))
    assert kill_test.compare(after, before) == kill_test.torn(after, before) == []
    change(after / "preprocess.json", lambda facts: facts.update(seed=7))
    (after / "test.csv").unlink()
    (after / "train.csv.1.tmp").touch()
    os.truncate(after / "train_64.npy", 5000)
    left, damaged = "train.csv.1.tmp is left over", "train_64.npy is torn"
    found = kill_test.compare(after, before)
    assert found == [left, "test.csv is missing", "preprocess.json differs", damaged]
    assert [line.split(":")[0] for line in sorted(kill_test.torn(after, before))] == [left, damaged]
    assert kill_test.complaint(2, "bar 3%\ncrop.py: error: no room\n") == []
    assert kill_test.complaint(1, "Traceback\nOSError: no room\n")


def test_scenes_have_one_sign_each_and_crops_are_judged_by_it(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "bccd" / "images").mkdir(parents=True)
    (tmp_path / "data" / "mnist").mkdir()
    cv2.imwrite(str(tmp_path / "data" / "bccd" / "images" / "a.jpg"), rng.integers(0, 256, (50, 60, 3), dtype=np.uint8))
    digits = {"x": np.full((10, 28, 28), 255, np.uint8), "y": np.arange(10) % 5}
    np.savez(tmp_path / "data" / "mnist" / "train.npz", **digits)
    run(streets, "draw", tmp_path / "data", tmp_path / "out", "--count", 2)
    objects = pd.read_csv(tmp_path / "out" / "objects.csv", dtype={"image_name": str})
    for name, x0, y0, x1, y1 in objects.itertuples(index=False):
        height, width, _ = cv2.imread(str(tmp_path / "out" / "images" / f"{name}.jpg")).shape
        assert 0.019 < (x1 - x0) / width < 0.081
        assert (x0 >= 0, y0 >= 0, x1 <= width, y1 <= height) == (True,) * 4
    boxes = objects.assign(oof=1)
    boxes.loc[1, ["x0", "x1"]] += objects["x1"][1] - objects["x0"][1]  # beside its sign
    boxes.to_csv(tmp_path / "train_boxes.csv", index=False)
    run(streets, "judge", tmp_path, "--boxes", tmp_path / "out" / "objects.csv")
    assert "0.500 of 2 images" in capsys.readouterr().out
    boxes.assign(oof=[1, 0]).to_csv(tmp_path / "train_boxes.csv", index=False)
    run(streets, "judge", tmp_path, "--boxes", tmp_path / "out" / "objects.csv")
    assert "1.000 of 1 images" in capsys.readouterr().out
    pd.concat([boxes, objects.assign(oof=1)]).sort_values("image_name", kind="stable").to_csv(
        tmp_path / "train_boxes.csv", index=False)  # fmt: skip
    run(streets, "judge", tmp_path, "--boxes", tmp_path / "out" / "objects.csv")
    assert "0.500 of 2 images have their sign in the best crop, 1.000 in one of up to 2" in capsys.readouterr().out


def test_megapixel_pictures_hold_their_digits_and_answers_are_counted(tmp_path, capsys):
    (tmp_path / "mnist").mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        digits = {"x": rng.integers(1, 256, (20, 28, 28), dtype=np.uint8), "y": np.arange(20) % 10}
        np.savez(tmp_path / "mnist" / f"{split}.npz", **digits)
    words = ["--side", 300, "--noise", 3, "--train", 12, "--test", 4]
    run(megapixel_mnist, "draw", tmp_path / "mnist", tmp_path / "out", *words)
    truth, boxes = (pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("test", "digits"))
    for name, shown in boxes.groupby("image_name"):
        picture = cv2.imread(str(tmp_path / "out" / "images" / f"{name}.png"), cv2.IMREAD_GRAYSCALE)
        assert len(shown) == 5
        assert all((picture[y0:y1, x0:x1] > 0).all() for x0, y0, x1, y1 in shown[["x0", "y0", "x1", "y1"]].to_numpy())
        if name.startswith("test"):
            row = truth[truth["image_name"] == name].iloc[0]
            assert sorted(shown["digit"].unique()) == [k for k in range(10) if row[f"multi_{k}"]]
            assert row[f"majority_{shown['digit'].mode()[0]}"] == row[f"max_{shown['digit'].max()}"] == 1
            assert row[f"top_{shown['digit'].iloc[shown['y0'].argmin()]}"] == 1
    names = truth.columns[1:].tolist()
    prob = truth[names].to_numpy(float)
    prob[0, names.index("multi_3")] = 1 - prob[0, names.index("multi_3")]  # one wrong answer
    found = pd.DataFrame(prob, columns=[f"prob_{name}" for name in names]).assign(image_name=truth["image_name"])
    task = MultiLabel(tuple(names), "ap")
    fake = SimpleNamespace(task=task, table=lambda _: found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megapixel_mnist, "read_run", lambda _: fake)
        run(megapixel_mnist, "judge", "run", "--pictures", tmp_path / "out")
    said = capsys.readouterr().out
    assert "majority 1.0000  max 1.0000  top 1.0000  multi 0.7500  of 4 pictures" in said
    run(megapixel_mnist, "speed", tmp_path / "mnist", "--repeats", 1, "--sides", 500)
    assert "| 500 px" in capsys.readouterr().out


@pytest.mark.parametrize("task", [
    Binary(("1",), "auc"), MultiClass(("a", "b", "c"), "auc"), MultiLabel(("a", "b"), "ap"), Regression(("q",), "mae")],
    ids=lambda task: task.kind)  # fmt: skip
def test_linear_models_of_features_are_compared_in_the_right_direction(task):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 6))
    target = {"binary": x[:, :1] > 0, "multiclass": x[:, :3].argmax(axis=1)[:, None], "multilabel": x[:, :2] > 0,
              "regression": 3 * x[:, :1] + 10}[task.kind].astype(float)  # fmt: skip
    group = np.repeat(np.arange(40), 3)
    prob = targets.fit_linear(task, x[:90], target[:90], group[:90])(x[90:])
    assert prob.shape == (30, len(task.columns))
    good = task.metrics[task.metric].of(target[90:], prob)
    assert good < 0.5 if task.kind == "regression" else good > 0.95
    worse = np.roll(prob, 1, axis=0)
    score, (first, _), gain, gains = targets.compare(task, target[90:], group[90:], worse, [prob, prob])
    assert (first, score) == (pytest.approx(good), pytest.approx(task.metrics[task.metric].of(target[90:], worse)))
    assert 0 < np.quantile(gains, 0.02) < gain
    constant = {"binary": 0.5, "multiclass": 0.5, "multilabel": target[90:].mean(),
                "regression": np.abs(target[90:] - np.median(target[:90])).mean()}[task.kind]  # fmt: skip
    assert targets.best_constant(task, target[:90], target[90:]) == pytest.approx(constant)


def test_prepare_is_measured_on_films_it_draws(capsys):
    prepare_speed.main(prepare_speed.get_args_parser().parse_args(["--frames", "40"]))
    assert capsys.readouterr().out.startswith("40 frames, 30 rows: ")


def test_polyps_without_millimetres_become_the_tables_of_prepare(tmp_path):
    names = ["a.jpg", "b.jpg"]
    labels = {"image_name": names, "group": ["s1", "s1"], "width": 200, "height": 100, "rel_diameter": [0.2, 0.5]}
    pd.DataFrame(labels).to_csv(tmp_path / "labels.csv", index=False)
    boxes = {"image_name": ["a.jpg", "a.jpg"], "xmin": [0.1, 0.3], "ymin": [0.2, 0.1], "xmax": [0.2, 0.5],
             "ymax": [0.4, 0.3]}  # fmt: skip
    pd.DataFrame(boxes).to_csv(tmp_path / "boxes.csv", index=False)
    output = tmp_path / "out"
    output.mkdir()
    images, cuts = polyp_size.read_polyps(tmp_path, output)
    assert (images, cuts) == (tmp_path / "images", [25.23, 43.7])
    assert pd.read_csv(output / "train.csv")[["lesion_id", "size"]].to_numpy().tolist() == [["s1", 20.0], ["s1", 50.0]]
    box = pd.read_csv(output / "boxes.csv")
    assert box.loc[0, ["x0", "y0", "x1", "y1"]].tolist() == [20, 10, 100, 40]  # around both parts
    assert box.loc[1, ["x0", "y0", "x1", "y1"]].isna().all()
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), np.dstack([np.tile(np.linspace(10, 250, 64), (64, 1))] * 3))
    polyp_size.shade([path], ["a.jpg"], output / "depth")
    depth = cv2.imread(str(output / "depth" / "a.png"), cv2.IMREAD_UNCHANGED)
    assert depth.dtype == np.uint16
    assert (np.diff(depth[60].astype(int)) <= 0).all()  # what is bright is near
