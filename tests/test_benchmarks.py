"""The benchmarks: their scores, and their tables on small data."""

import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import localize
import models
import util
from localize import Box
from util import InputError

sys.path.insert(0, str(ROOT / "benchmarks"))

import crop_gain
import crop_quality
import fsg_ablation
import fsg_cost
import kill_test
import lesions
import speed


def run(module, *words):
    module.main(module.get_args_parser().parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def mask_dir(source, tmp_path_factory):
    """Masks of the discs of conftest.write_images, found by their contrast."""
    folder = tmp_path_factory.mktemp("masks")
    for path in (source / "images").iterdir():
        image = cv2.GaussianBlur(cv2.imread(str(path)), (5, 5), 0).astype(int)
        mask = (image.min(axis=2) < 125).astype(np.uint8) * 255
        cv2.imwrite(str(folder / f"{path.stem}_segmentation.png"), mask)
    return folder


def test_overlap_and_coverage():
    assert crop_quality.overlap(Box(0, 0, 4, 4), Box(2, 0, 6, 4)) == pytest.approx(8 / 24)
    assert crop_quality.overlap(Box(0, 0, 1, 1), Box(2, 2, 3, 3)) == 0
    mask = np.zeros((10, 10), bool)
    mask[2:6, 2:6] = True
    assert crop_quality.coverage(mask, Box(2, 2, 4, 6)) == 0.5


def test_ideal_square_is_padded_and_shifted_into_the_picture():
    mask = np.zeros((100, 200), bool)
    mask[40:60, 100:110] = True
    box = lesions.ideal_square(mask)
    assert box.scaled(1) == pytest.approx((92, 37, 118, 63))
    mask[:, :] = False
    mask[0:50, 0:20] = True
    assert lesions.ideal_square(mask).scaled(1) == pytest.approx((0, 0, 65, 65))
    assert lesions.ideal_square(np.zeros((5, 5), bool)) is None


def test_boxes_of_a_perfect_map():
    mask = np.zeros((224, 224), bool)
    mask[64:128, 96:160] = True
    attention = cv2.resize(mask.astype(np.float32), (56, 56), interpolation=cv2.INTER_AREA)
    best = crop_quality.best_boxes(attention, mask)
    assert best.max() > 0.95
    assert crop_quality.hits(attention, mask)
    assert not crop_quality.hits(np.ones((7, 7)), np.roll(mask, 96, axis=0))  # centre: outside
    assert crop_quality.hits(np.ones((7, 7)), np.roll(mask, 16, axis=0))


def test_clipping_makes_the_original_box_not_square():
    attention = np.full((7, 7), 0.001)
    attention[0, 0:3] = 1
    clipped = crop_quality.clipped_box(attention, 1.0, (448, 448))
    assert clipped.x1 - clipped.x0 > clipped.y1 - clipped.y0
    square = localize.find_box(attention, (448, 448), "original", 1.0)
    assert square.x1 - square.x0 == pytest.approx(square.y1 - square.y0)


def test_quality_table(data_dir, runs_dir, mask_dir, tmp_path, capsys):
    picture = tmp_path / "montage.png"
    run(crop_quality, data_dir, "--mask_dir", mask_dir, "--show", "chipnet", "--montage", picture)
    lines = capsys.readouterr().out.splitlines()
    table = {words[1].strip(): words[2:-1] for line in lines if (words := line.split("|"))[1:]}
    assert float(table["whole image"][0]) > 0.9
    assert float(table["whole image"][7]) == 1
    assert float(table["dark by Otsu's threshold"][3]) > 0.5
    assert {"chipnet, ours", "chipnet, original k = 1.5"} <= table.keys()
    assert picture.stat().st_size > 10_000
    with pytest.raises(InputError, match="--mask_dir"):
        run(crop_quality, data_dir, "--mask_dir", tmp_path)


def test_gain_table(data_dir, runs_dir, mask_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(util, "BOOTSTRAP_SAMPLES", 20)
    runs, crops = tmp_path / "runs", data_dir / "crops" / "chipnet"
    for name, origin in (("full", "resnet"), ("crop", "cropnet"), ("fusion", "cropnet")):
        for seed in (0, 1):  # finished runs are not trained again
            shutil.copytree(runs_dir / origin, runs / f"{name}_seed{seed}")
    run(crop_gain, data_dir, "--crop_dir", crops, "--runs_dir", runs, "--seeds", 0, 1,
        "--mask_dir", mask_dir)  # fmt: skip
    out = capsys.readouterr().out
    data = util.read_data(data_dir)
    auc = util.weighted_auc(
        data.train["target"].to_numpy(), crop_gain.ranks(runs / "full_seed0", data)
    )
    assert f"| full | {auc:.3f} | 0.000 |" in out
    assert f"| full + full (control) | {auc:.3f} |" in out  # twice the same net
    assert "| full + crop, zoom |" in out
    assert "small:" in out


def test_ablation_pairs_arms_and_repeats_nothing(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    words = ["digits", "--seeds", 2, "--share", 0.1, "--epochs", 1, "--small_epochs", 1,
             "--size", 32, "--backbone", "regnet_tiny", "--output", output]  # fmt: skip
    arms = ["baseline", "layerscale_l1", "held_out", "upstream", "hard"]
    run(fsg_ablation, *words, "--arms", *arms)
    first = capsys.readouterr().out
    rows = fsg_ablation.read_rows(output)
    assert len(rows) == 10
    assert "119 training and 599 test images, 2 seeds" in first
    lines = {line.split("|")[1].strip(): line for line in first.splitlines() if line[:1] == "|"}
    assert lines.keys() >= {"baseline", "layerscale_l1 10", "held_out", "upstream", "hard 10"}
    for row in rows:
        assert len(row["contribution"]) == len(fsg_ablation.SHARES)
        assert ("gate" in row) == (row["arm"] != "baseline")
    run(fsg_ablation, *words, "--arms", *arms)
    assert capsys.readouterr().out == first  # read from the file


def test_ablation_arms_start_from_the_same_function(tmp_path):
    words = ["digits", "--size", "32", "--backbone", "regnet_tiny"]
    args = fsg_ablation.get_args_parser().parse_args(words)
    x, outputs = torch.rand(2, 3, 32, 32), {}
    for arm in fsg_ablation.ARMS:
        torch.manual_seed(0)
        network = fsg_ablation.make_network(args, 10)
        fsg_ablation.add_arm(network, arm)
        outputs[arm] = network.eval()(x, None)
    same = {arm for arm, out in outputs.items() if torch.equal(out, outputs["baseline"])}
    assert same == set(fsg_ablation.ARMS) - {"paper", "upstream"}


def test_ablation_reads_a_data_directory(data_dir):
    parts = [fsg_ablation.load_data(str(data_dir), seed) for seed in (0, 1)]
    for part in parts:
        assert len(part["x"]) + len(part["x_test"]) == 24
        assert len(part["x"]) == len(part["y"]) == len(part["group"])
    tests = [{image.tobytes() for image in part["x_test"]} for part in parts]
    assert not tests[0] & tests[1]


def test_ablation_statistics():
    assert fsg_ablation.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )
    rows = [{"metric": "auc", "auc": auc, "gate": [auc, auc - 0.05, 0.5, 0.5, 0.5]}
            for auc in (0.8, 0.9)]  # fmt: skip
    assert fsg_ablation.prunable(rows, "gate") == "50%"  # .80 is within .071 of .85, .5 is not
    assert fsg_ablation.prunable(rows, "contribution") == ""


def test_cost_of_gates(capsys):
    run(fsg_cost, "--backbone", "regnet_tiny", "--size", 32, "--batch_size", 2, "--rounds", 2)
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in (*fsg_cost.STEPS, *fsg_cost.PREDICTIONS))
    assert "times as fast as two passes" in out


def test_reference_of_the_cost_benchmark_takes_the_step_of_single():
    plain, states = fsg_cost.models.regnet_tiny(2), []
    x = torch.rand(2, 3, 32, 32)
    for variant in ("single", "two passes"):
        torch.manual_seed(0)
        step, model = fsg_cost.make_step(plain, variant, x, "off")
        step()
        states.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


# ---------------------------------------------------------------- speed
def test_both_ways_of_the_speed_benchmark_do_the_same(tmp_path):
    paths = speed.draw_jpegs(tmp_path / "jpegs", 640, 480, 2)
    assert speed.pixel_difference(paths) < 1
    stage = speed.preprocess_stage("small", paths, exact=True, folder=tmp_path)
    stage.reference()
    stage.ours()
    written = np.load(tmp_path / "small.npy.part")
    saved = np.asarray(Image.open(tmp_path / "again.jpg").resize((224, 224), 2)).astype(float)
    assert np.abs(written[-1] - saved).mean() < 3  # but for the reference's second compression
    device = torch.device("cpu")
    plain, ours = (network.eval() for network in speed.make_chipnets("regnet_tiny", device))
    assert not any(isinstance(m, models.SmallMapConv2d) for m in plain.modules())
    image = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        one_by_one = torch.stack([speed.chips_one_by_one(plain, one) for one in image])
        assert torch.allclose(one_by_one, ours.embed(image), atol=1e-4)
    stage = speed.augment_stage(3)
    for batch in (stage.reference(), stage.ours()):
        assert (batch.shape, batch.dtype) == ((3, 3, 224, 224), torch.float32)
        assert -3 < batch.min() < batch.max() < 3
    cpu = torch.device("cpu")
    stages = [speed.augment_on_device_stage(3, cpu)]
    stages.append(speed.loop_stage("resnet", "regnet_tiny", cpu, stage, 3))
    assert stages[0].reference().shape == stages[0].ours().shape == (3, 3, 224, 224)
    stages[1].ours()
    stages[1].reference()


def test_speed_table(monkeypatch):
    monkeypatch.setattr(speed, "seconds_of", lambda call, device: call())
    stage = speed.Stage("nap", 10, lambda: 0.4, lambda: 0.1, lambda: 0.05)
    table = speed.measure([stage], 3, torch.device("cpu"))
    assert speed.markdown(table, {"ratio": 2}) == (
        "| stage | reference | ours | limit | ratio | of limit |\n|---|---|---|---|---|---|\n"
        "| nap | 25.0 | 100.0 | 200.0 | 4.00 | 0.5 |"
    )


# ---------------------------------------------------------------- kills
def test_killed_preprocessing_goes_on_to_the_same_end(capsys):
    run(kill_test, "--kills", 1, "--only", "preprocess", "--no-full_disk")
    cells = capsys.readouterr().out.splitlines()[2].split("|")
    kills, calls, _, differences = (int(cell) for cell in cells[4:8])
    assert kills == calls >= 1
    assert differences == 0


def test_kill_test_names_what_differs(data_dir, tmp_path):
    before = kill_test.fresh(tmp_path / "a", data_dir)
    after = kill_test.fresh(tmp_path / "b", data_dir)
    facts = util.read_json(after / "preprocess.json")
    util.write_json(after / "preprocess.json", facts | {"argv": ["other"], "commit": None})
    assert kill_test.compare(after, before) == []
    assert kill_test.torn(after, before) == []
    util.write_json(after / "preprocess.json", facts | {"seed": 7})
    (after / "test.csv").unlink()
    (after / "train.csv.tmp").touch()
    with open(after / "train_64.npy", "r+b") as file:
        file.truncate(5000)
    assert kill_test.compare(after, before) == [
        "train.csv.tmp is left over", "test.csv is missing", "preprocess.json differs",
        "train_64.npy is torn",
    ]  # fmt: skip
    assert [line.split(":")[0] for line in sorted(kill_test.torn(after, before))] == [
        "train.csv.tmp is left over", "train_64.npy is torn",
    ]  # fmt: skip
    assert kill_test.complaint(2, "bar 3%\ncrop.py: error: no room\n") == []
    assert kill_test.complaint(1, "Traceback\nOSError: no room\n")
