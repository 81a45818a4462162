"""Several crops of an image: where they lie, what is cut, how a network weighs them."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL_CROP, SMALL_MODEL, call, read

from localize import cut_out, find_box, find_boxes
from models import Spec, build_model
from plumbing.arrays import open_array
from plumbing.data import CORNERS, read_data
from plumbing.files import read_json
from plumbing.images import read_crops
from util import ID, PROB, InputError

K = 3


def peaks(*cells, size=40, floor=1e-6):
    attention = np.full((size, size), floor, np.float32)
    for row, column, weight in cells:
        attention[row, column] = weight
    return attention / attention.sum()


@pytest.mark.parametrize("frame", ["square", "whole", 1280])
def test_the_best_places_come_first_and_places_that_do_not_exist_are_not_invented(frame):
    size = (1280, 1280)
    attention = peaks((5, 30, 0.2), (20, 10, 0.5), (33, 33, 0.3))
    how = {"rule": "peak", "box_size": 128, "frame": frame}
    boxes = find_boxes(attention, size, 9, **how)
    middles = [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in boxes]
    expected = [(32 * x + 16, 32 * y + 16) for x, y in ((10, 20), (33, 33), (30, 5))]
    assert [middle == pytest.approx(each, abs=20) for middle, each in zip(middles, expected, strict=True)] == [True] * 3
    assert [box.confidence for box in boxes] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    assert find_boxes(attention, size, **how) == [find_box(attention, size, **how)] == boxes[:1]
    assert find_boxes(attention, size, 2, **how) == boxes[:2]


@pytest.mark.parametrize(("attention", "count"), [(np.ones((40, 40), np.float32), 1), (np.full((40, 40), np.nan), 1),
                                                  (peaks((20, 10, 1), floor=0), 1)])  # fmt: skip
def test_there_always_is_a_first_box(attention, count):
    assert len(find_boxes(attention, (500, 500), 4, rule="component")) == count


def test_blobs_get_boxes_of_their_own_size():
    attention = peaks(*((row, column, 1.0) for row in range(5, 15) for column in range(5, 15)))
    attention[30:35, 30:35] = attention[10, 10] / 2
    first, second = find_boxes(attention, (400, 400), 2, rule="component", centre=0.0)
    assert first == find_box(attention, (400, 400), centre=0.0)
    assert (first.x0 < 50, second.x1 > 350) == (True, True)
    assert second.side < first.side


def test_of_a_cell_that_lies_in_a_box_in_part_that_part_is_taken_away():
    left = cut_out(np.ones((4, 4)), find_box(peaks((1, 1, 1), size=4), (40, 40), "peak", box_size=20), (0, 0, 40, 40))
    assert left.sum() == pytest.approx(16 - 4)
    assert (left[:, 3] == 1).all()


@pytest.fixture(scope="module")
def trained(data_dir, runs_dir, tmp_path_factory):
    """Crops of three places, one of which does not exist, and networks on them."""
    runs, boxes = tmp_path_factory.mktemp("several"), data_dir.parent / "several.csv"
    table = read_data(data_dir).train
    rows = [(name, 5 * i, 4, 5 * i + 20, 24) for j, name in enumerate(table[ID]) for i in range(1 + j % K)]
    pd.DataFrame(rows, columns=[ID, *CORNERS]).to_csv(boxes, index=False)
    words = ["--data_dir", data_dir, "--run", runs_dir / "chipnet", *SMALL_CROP, "--n_boxes", K, "--output_dir", runs]
    crops = [call("crop", *words, "--source", "boxes", "--boxes", boxes),
             call("crop", *words, "--source", "saliency", "--rule", "peak", "--box_size", 15)]  # fmt: skip
    where = ["--data_dir", data_dir, "--runs_dir", runs, "--crop_dir", crops[1], *SMALL_MODEL]
    for model in ("cropnet", "fusion", "resnet"):
        call("train", "--model", model, *where)
    call("ensemble", "mean", "--runs_dir", runs, "--runs", "cropnet", "fusion")
    return runs, crops


def test_arrays_hold_all_crops_of_an_image_and_black_where_there_is_no_place(source, data_dir, trained):
    table = read_data(data_dir).train
    for crops in trained[1]:
        boxes, facts = read(crops / "train_boxes.csv"), read_json(crops / "crop.json")
        array = open_array(crops / "train_64.npy", 24, 64)
        wide = open_array(crops / f"train_wide_{facts['wide_size']}.npy", 24)
        assert (array.shape, wide.shape[:2], facts["n_boxes"]) == ((24, K, 64, 64, 3), (24, K), K)
        assert boxes.columns[:2].tolist() == [ID, "box"]
        assert boxes.groupby(ID, sort=False)["box"].first().tolist() == [0] * 24
        counts = boxes[ID].value_counts()[table[ID]].tolist()
        assert array.any(axis=(2, 3, 4)).sum(axis=1).tolist() == counts
        if crops.name == "several":
            assert counts == [1 + j % K for j in range(24)]
        row = counts.index(max(counts))
        corners = boxes[boxes[ID] == table[ID][row]][CORNERS].to_numpy()
        size = tuple(table.loc[row, ["width", "height"]])
        cuts = read_crops(source / "images" / f"{table[ID][row]}.jpg", list(corners), [64] * len(corners), size)
        assert (array[row, : len(cuts)] == np.stack(cuts)).all()
        assert (crops / "montage.png").exists()


def test_a_run_says_how_much_each_crop_weighed_and_sees_new_images_as_in_training(source, data_dir, trained, tmp_path):
    runs, crops = trained
    for run in ("cropnet", "fusion", "resnet"):
        weights = read(runs / run / "boxes.csv")
        assert weights.groupby(ID)["weight"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
        found = weights[weights["weight"] > 0].groupby(ID)["box"].max()
        boxes = read(crops[1] / "train_boxes.csv").groupby(ID)["box"].max()
        assert (found == boxes[found.index]).all()
    for name in read_data(data_dir).test[ID]:
        (tmp_path / f"{name}.jpg").write_bytes((source / "images" / f"{name}.jpg").read_bytes())
    for run in ("cropnet", "fusion", "ensemble"):
        expected = read(runs / run / "test_predictions.csv").groupby(ID)[PROB].mean()
        found = call("predict", "--run", runs / run, "--output", tmp_path / run, "--device", "cpu", "--csv",
                     source / "test.csv", *sorted(tmp_path.glob("*.jpg")))  # fmt: skip
        table = read(found / "predictions.csv").set_index(ID)
        assert np.allclose(table[PROB], expected[table.index], atol=0.02 if run == "ensemble" else 1e-4), run
    assert len(read(crops[1] / "test_boxes.csv")) > 4
    boxes, expected = read(found / "boxes.csv"), read(crops[1] / "test_boxes.csv")
    assert np.allclose(boxes[CORNERS], expected[CORNERS], atol=1e-3)
    assert boxes["box"].tolist() == expected["box"].tolist()


@pytest.mark.parametrize("model", ["cropnet", "fusion"])
def test_a_place_that_does_not_exist_changes_nothing(model):
    torch.manual_seed(0)
    network = build_model(Spec(model, "regnet_tiny", 64, hidden=8, boxes=K)).eval()
    wholes = int(model == "fusion")
    image = torch.randint(1, 256, (2, 3 * (wholes + K), 64, 64), dtype=torch.uint8)
    image[:, -3:] = 0
    seen = []
    network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        features, weight = network.read(image)
        assert seen == [2 * (wholes + K - 1)]
        assert (weight[:, -1] == 0).all()
        fewer, same = build_model(Spec(model, "regnet_tiny", 64, hidden=8, boxes=K - 1)).eval(), network.state_dict()
        fewer.load_state_dict(same)
        assert torch.allclose(fewer.read(image[:, :-3])[0], features, atol=1e-6)
    assert network.read(torch.zeros_like(image))[1][:, 0].tolist() == [1, 1]  # one always exists


def test_what_cannot_be_is_said_in_one_line(data_dir, runs_dir, trained, tmp_path):
    runs, crops = trained
    words = ["--data_dir", data_dir, "--output_dir", tmp_path, *SMALL_CROP, "--run", runs_dir / "chipnet", "--n_boxes"]
    with pytest.raises(InputError, match="the map has 2 x 2 cells; pass fewer"):
        call("crop", *words, 5, "--source", "attention", "--shifts", 1)
    assert not list(tmp_path.rglob("*.npy"))
    with pytest.raises(InputError, match="has 3 boxes of an image, chipnet takes one"):
        call("train", "--model", "chipnet", "--crop_dir", crops[0], "--data_dir", data_dir, "--runs_dir", tmp_path,
             *SMALL_MODEL)  # fmt: skip
