"""The scout: cells of large pictures, attention over them, crops where it looks, and new images."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL_CROP, SMALL_MODEL, call, hashes, read

import models
import plumbing.cells as cells_of_pictures
from localize import find_box
from models import Spec, build_model
from plumbing.cells import Bag, Cells, make_cells, place_tiles, read_cells
from plumbing.data import read_data
from plumbing.files import read_json
from plumbing.images import read_square
from util import ID, PROB, InputError, Stopped

SCOUT = ["--model", "scout", "--scout_size", 96, "--stride", 16, *SMALL_MODEL]
SCOUT[SCOUT.index("--tta") + 1] = 1
CPU = torch.device("cpu")


def scout(**changes):
    parts = {"hidden": 8, "scout_size": 128, "strides": (16, 32)} | changes
    return build_model(Spec("scout", "regnet_tiny", 64, **parts))


def write(path, width, height):
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    return path


def a_bag(network, *counts, seed=0):
    """Random cells of pictures, so many of each."""
    rng, bags = np.random.default_rng(seed), []
    shape = np.atleast_1d(network.shape)
    for count in counts:
        cells = np.empty(count, [("place", np.float32, 2), ("values", network.kept, network.shape)])
        cells["place"], cells["values"] = rng.random((count, 2)), rng.integers(0, 9, (count, *shape))
        bags.append(cells)
    return Bag.of(bags)


def test_the_head_alone_learns_and_starts_from_one_backbone_in_every_fold():
    torch.manual_seed(0)
    one = scout()
    torch.manual_seed(1)
    two = scout().train()
    assert all(torch.equal(*pair) for pair in zip(one.backbone.buffers(), two.backbone.buffers(), strict=True))
    assert one.fingerprint() == two.fingerprint() != scout(strides=(32,)).fingerprint()
    assert not torch.equal(one.head[1].weight, two.head[1].weight)
    before = two.fingerprint()
    optimizer = torch.optim.Adam(two.param_groups(1e-2, 1e-2))
    two(a_bag(two, 16, 12, 3), torch.zeros(3, 0)).square().sum().backward()
    optimizer.step()
    assert two.fingerprint() == before
    learned = {name for name, parameter in two.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in two.named_parameters() if not name.startswith("backbone.")}


def test_cells_are_what_the_backbone_finds_of_a_coarse_and_a_fine_map():
    network = scout().eval()
    picture = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        found, maps = network.read_maps(picture), {}
        trunk = network.backbone.stem(network.normalise(picture))
        for block in network.backbone.trunk_output:
            trunk = block(trunk)
            maps[trunk.shape[-1]] = trunk
    fine, coarse = maps[6], maps[3]
    assert found.shape == (1, 2, 3, 2 * fine.shape[1] + coarse.shape[1])
    wide = fine[0].unfold(1, 2, 2).unfold(2, 2, 2)  # (C, 2, 3, 2, 2)
    expected = torch.cat([wide.mean(dim=(3, 4)), wide.amax(dim=(3, 4)), coarse[0]]).permute(1, 2, 0)
    assert torch.allclose(found[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "height", "rows", "columns"),
    [(256, 128, (1, 3), (0, 4)), (128, 256, (0, 4), (1, 3)), (64, 64, (1, 3), (1, 3)), (128, 128, (0, 4), (0, 4))],
)
def test_cells_lie_where_their_pixels_lie_and_small_pictures_are_not_enlarged(tmp_path, width, height, rows, columns):
    network, path = scout().eval(), write(tmp_path / "a.png", width, height)
    inner = read_square(path, 128, frame=128)[0][rows[0] * 32 : rows[1] * 32, columns[0] * 32 : columns[1] * 32]
    if max(width, height) <= 128:  # pixel by pixel
        assert (inner == cv2.imread(str(path))[..., ::-1]).all()
    with torch.no_grad():
        expected = network.read_maps(torch.from_numpy(inner.copy()).permute(2, 0, 1)[None])[0].numpy()
    cells = read_cells(network, path, (width, height))
    assert np.allclose(cells["values"], expected.reshape(-1, network.channels), rtol=2e-3, atol=1e-3)
    bag, seen = Bag.of([cells]), np.zeros((4, 4))
    seen[slice(*rows), slice(*columns)] = np.arange(1, len(cells) + 1).reshape(expected.shape[:2])
    assert np.array_equal(network.on_map(torch.arange(1.0, len(cells) + 1)[None], bag)[0].numpy(), seen)
    assert network.bytes_of((width, height)) == cells["values"].nbytes


def test_attention_is_on_cells_alone_and_what_fills_up_a_bag_changes_nothing():
    network = scout(heads=2).eval()
    bag = a_bag(network, 8, 4)
    alone = Bag(bag.values[8:], bag.place[1:, :4])
    with torch.no_grad():
        attention, logit = network.attention(bag), network(bag, torch.zeros(2, 0))
        assert torch.allclose(logit[1:], network(alone, torch.zeros(1, 0)), atol=1e-6)
        assert torch.allclose(attention[1:], network.attention(alone), atol=1e-6)
        assert (network.take_in(bag)[1][1, :, 4:] == 0).all()
    assert torch.allclose(attention.sum(dim=(1, 2)), torch.ones(2))


def test_what_several_heads_pool_is_joined():
    network = scout(heads=3, outputs=4, dropout=0.0).eval()
    bag = a_bag(network, 6)
    embedding, attention = network.take_in(bag)
    assert attention.shape == (1, 3, 6)
    weight, bias = network.head[1].weight, network.head[1].bias
    expected = weight @ (attention[0] @ embedding[0]).flatten() + bias
    assert torch.allclose(network(bag, torch.zeros(1, 0))[0], expected, atol=1e-6)


def test_a_witness_answers_too_in_training_and_draws_the_attention():
    network, meta = scout(witness=True, outputs=2, dropout=0.0), torch.zeros(2, 0)
    bag = a_bag(network, 6, 3)
    network.eval()
    embedding = network.embed(bag).detach()
    said = network.witness(embedding).masked_fill(~bag.known.unsqueeze(2), -9e9)
    with torch.no_grad():
        network.trust.fill_(1e3)
        assert torch.equal(network.take_in(bag)[1][:, 0].argmax(dim=1), said.amax(dim=2).argmax(dim=1))
        pooled = network(bag, meta)
    network.train()
    network.trunk[0].eval()  # batch norm as before
    logit, alone = network(bag, meta)
    assert torch.allclose(logit, pooled)
    assert torch.allclose(alone, said.amax(dim=1))
    logit.sum().backward()
    assert network.witness.weight.grad is None
    assert network.trust.grad is not None


def test_attention_may_depend_on_the_place_of_a_cell():
    network = scout(place=True).eval()
    bag = a_bag(network, 5)
    bag.values[:] = bag.values[:1]  # all look alike
    with torch.no_grad():
        network.slope.weight[:] = torch.tensor([[-0.2, 0.0]])  # upwards
        attention = network.take_in(bag)[1][0, 0]
    assert attention.argsort(descending=True).tolist() == bag.place[0, :, 0].argsort().tolist()


# ---------------------------------------------------------------- tiles
def draw_things(side, boxes, plain=(7, 20, 90)):
    """A picture of one colour with things of noise."""
    rng, picture = np.random.default_rng(0), np.full((side, side, 3), plain, np.uint8)
    for y, x, height, width in boxes:
        picture[y : y + height, x : x + width] = rng.integers(100, 256, (height, width, 3))
    return picture


@pytest.mark.parametrize("boxes", [
    [(40, 70, 20, 25)], [(0, 0, 10, 10), (100, 118, 28, 10)], [(10, 10, 90, 32)], [(64, 60, 30, 30), (104, 60, 20, 20)],
    [(0, 0, 128, 128)], [(y, x, 2, 2) for y in range(0, 128, 9) for x in range(0, 128, 9)], []])  # fmt: skip
def test_tiles_hold_all_of_a_picture_but_what_is_plain(boxes):
    picture = draw_things(128, boxes)
    corners = place_tiles(picture, 32)
    covered = np.zeros((128, 128), bool)
    for y, x in corners:
        assert 0 <= min(y, x) <= max(y, x) <= 96
        covered[y : y + 32, x : x + 32] = True
    assert covered[(picture != picture[127, 64]).any(axis=2)].all() or len(boxes) == 1 and covered.all()
    assert len(corners) == {0: 1, 1: len(corners), 2: 2}.get(len(boxes), min(len(corners), 16))
    if len(boxes) == 1 and max(boxes[0]) <= 70:
        assert corners.tolist() == [[34, 66]]  # around its middle


def test_what_is_plain_is_neither_forwarded_nor_pooled_and_the_answer_is_the_same(tmp_path, monkeypatch):
    network = tiled().eval()
    picture, seen = draw_things(128, [(40, 70, 20, 25), (100, 10, 20, 20)]), []
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    monkeypatch.setattr(network.backbone, "forward", lambda x: seen.append(len(x)) or torch.zeros(len(x), 1024))
    bag = Bag.of([read_cells(network, tmp_path / "a.png", (128, 128))])
    network.take_in(bag)
    assert seen == [2]
    monkeypatch.undo()
    wide = np.full((300, 300, 3), picture[0, 0], np.uint8)  # more of what is plain
    wide[:128, :128] = picture
    cv2.imwrite(str(tmp_path / "b.png"), wide)
    more = Bag.of([read_cells(tiled(scout_size=300), tmp_path / "b.png", (300, 300))])
    assert torch.equal(*(network(each, torch.zeros(1, 0)) for each in (bag, more)))


def tiled(**changes):
    parts = {"hidden": 8, "scout_size": 128, "tile": 32, "finetune": "all"} | changes
    torch.manual_seed(0)
    return build_model(Spec("scout", "conv_tiny", 64, **parts))


def test_the_best_tiles_alone_are_read_and_trained_on(tmp_path):
    network = tiled(top_m=3).eval()
    bag = a_bag(network, 10)
    cells = Cells(tmp_path, 2)
    for row in range(2):
        kept = np.empty(10 - 8 * row, [("place", np.float32, 2), ("values", np.uint8, (3, 32, 32))])
        kept["place"], kept["values"] = bag.place[0, : len(kept)], bag.values[: len(kept)]
        np.save(cells.path(row), kept)
    network.piece = 4
    cells.choose(network, np.arange(2), models.autocast(CPU, "off"))
    attention = network.take_in(bag)[1][0].mean(dim=0)
    best = attention.topk(3).indices.sort().values
    assert (attention > 0).sum() == 3
    found = cells[np.array([0, 1])]
    assert torch.equal(found.values[:3], bag.values[best])
    assert found.known.tolist() == [[True, True, True], [True, True, False]]
    both = [network(each, torch.zeros(len(each.place), 0))[0] for each in (bag, found)]
    assert torch.allclose(*both, atol=1e-6)


def test_the_last_stage_learns_and_the_rest_keeps_its_statistics():
    network = build_model(Spec("scout", "regnet_tiny", 64, hidden=8, tile=64, finetune="last", scout_size=128)).train()
    before = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    groups = network.param_groups(1e-2, 1e-3)
    assert [group["lr"] for group in groups] == [1e-2, 1e-3]
    optimizer = torch.optim.Adam(groups)
    network(a_bag(network, 4, 2), torch.zeros(2, 0)).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in network.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] for name in changed} == {"block4"}
    assert not any("running" in name for name in changed)


def peak_memory(*words) -> int:
    """Largest memory of a script in kB; that of its parent, which ru_maxrss would inherit, does not count."""
    code = "import re, runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    code += "; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=Path(models.__file__).parent, text=True,
                          capture_output=True, check=True)  # fmt: skip
    return int(done.stdout.split()[-1])


TILES = ["--model", "scout", "--tile", 150, "--finetune", "all", "--top_m", 8, "--weights", "none", "--backbone",
         "regnet_tiny", "--batch_size", 2, "--fold", 0, "--workers", 0, "--device", "cpu"]  # fmt: skip


def draw_large(folder, side):
    """Four pictures without a tile of one colour, and their cells; returns flags of train.py."""
    (folder / "images").mkdir(parents=True)
    rng, names = np.random.default_rng(0), [f"{i}.png" for i in range(4)]
    for name in names:
        picture = cv2.resize(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8), (side, side))
        cv2.imwrite(str(folder / "images" / name), picture, [cv2.IMWRITE_PNG_COMPRESSION, 0])
    pd.DataFrame({ID: names, "target": [0, 1] * 2}).to_csv(folder / "train.csv", index=False)
    data_dir = call("preprocess", "--train_csv", folder / "train.csv", "--group_col", "none", "--n_folds", 2,
                    "--size", 32, "--output_dir", folder / "data")  # fmt: skip
    spec = Spec("scout", "regnet_tiny", 32, scout_size=side, tile=150, finetune="all")
    cells = make_cells(build_model(spec), read_data(data_dir), 1)["train"]
    assert len(cells.read(0)) == (side / 150) ** 2
    return ["--scout_size", side, "--data_dir", data_dir, "--runs_dir", folder / "runs"]


def test_training_through_the_best_tiles_resumes_to_the_same_bytes_by_any_number_of_loaders(tmp_path):
    words = [*TILES, *draw_large(tmp_path, 600), "--epochs", 2, "--augment", "upright"]
    once = call("train", *words)
    with pytest.raises(Stopped):
        call("train", *words, "--name", "again", "--max_hours", 1e-9)
    again = call("train", *words, "--name", "again", "--resume", "--workers", 1)
    assert (once / "fold0_best.pt").read_bytes() == (again / "fold0_best.pt").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells the memory of a process on Linux alone")
def test_training_through_the_best_tiles_needs_no_more_memory_for_larger_pictures(tmp_path):
    peaks = [peak_memory("train.py", *TILES, "--epochs", 1, *draw_large(tmp_path / str(side), side))
             for side in (750, 2250)]  # fmt: skip
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_a_peak_gets_a_square_of_the_size_asked_for():
    attention = np.full((40, 40), 1e-6, np.float32)
    attention[20, 35] = 1
    box = find_box(attention, (1920, 1080), rule="peak", frame=1280, box_size=200)
    assert (box.side, box.confidence > 0.5) == (pytest.approx(200), True)
    assert ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) == pytest.approx((35.5 * 48, 20.5 * 48 - 420), abs=10)
    assert find_box(attention, (1920, 1080), rule="peak", frame=1280).side == pytest.approx(4 * 48)
    corner = np.zeros((40, 40), np.float32)
    corner[9, 0] = 1
    box = find_box(corner, (1920, 1080), rule="peak", frame=1280, box_size=200)
    assert (box.x0, box.y0) == (0, 0)  # shifted into the picture
    assert find_box(np.ones((40, 40), np.float32), (1920, 1080), rule="peak", frame=1280).reason == "flat map"


@pytest.fixture(scope="module")
def trained(source, data_dir, tmp_path_factory):
    """A scout on all folds, crops where it looks, and a network on these."""
    runs = tmp_path_factory.mktemp("scouts")
    where = ["--data_dir", data_dir, "--runs_dir", runs]
    call("train", *SCOUT, "--witness", *where)
    crops = call("crop", "--run", runs / "scout", "--data_dir", data_dir, *SMALL_CROP, "--box_size", 40)
    call("train", "--model", "cropnet", "--crop_dir", crops, *where, *SMALL_MODEL)
    call("ensemble", "mean", "--runs_dir", runs)
    return runs, crops


def test_held_out_predictions_and_maps_are_those_of_the_folds_own_network(source, data_dir, trained):
    runs, crops = trained
    data, oof = read_data(data_dir), read(runs / "scout" / "oof.csv").set_index(ID)
    maps = np.load(crops / "train_attention.npy")
    for k in (0, 1):
        network, content = models.load_checkpoint(runs / "scout" / f"fold{k}_best.pt")
        found = make_cells(network, data, 1)["train"]
        for row in np.flatnonzero(data.train["fold"] == k)[:3]:
            name, size = data.train[ID][row], tuple(data.train.loc[row, ["width", "height"]])
            cells = read_cells(network, source / "images" / f"{name}.jpg", size)
            assert np.array_equal(found.read(row), cells)
            bag = Bag.of([cells])
            with torch.no_grad():
                assert network(bag, torch.zeros(1, 0)).sigmoid().item() == pytest.approx(oof[PROB][name], abs=1e-5)
                assert np.allclose(network.attention(bag)[0], maps[row], atol=1e-5)
    boxes = read(crops / "train_boxes.csv")
    assert boxes["oof"].eq(1).all()
    assert ((boxes["x1"] - boxes["x0"]).round() == 40)[boxes["fallback"].isna()].all()


def test_new_images_are_seen_as_the_test_images_were(source, data_dir, trained, tmp_path):
    runs, crops = trained
    (tmp_path / "new").mkdir()
    for name in read_data(data_dir).test[ID]:
        (tmp_path / "new" / f"{name}.jpg").write_bytes((source / "images" / f"{name}.jpg").read_bytes())
    for run in ("scout", "cropnet", "ensemble"):
        expected = read(runs / run / "test_predictions.csv").groupby(ID)[PROB].mean()
        found = call("predict", "--run", runs / run, "--output", tmp_path / run, "--device", "cpu", "--csv",
                     source / "test.csv", tmp_path / "new")  # fmt: skip
        table = read(found / "predictions.csv").set_index(ID)
        assert np.allclose(table[PROB], expected[table.index], atol=1e-4), run
        if run != "scout":
            boxes = read(crops / "test_boxes.csv").set_index(ID).loc[table.index]
            assert np.allclose(table[["x0", "y1"]], boxes[["x0", "y1"]], atol=1e-3)
    for name in ("scout", "ensemble"):
        call("report", runs / name, "--data_dir", data_dir, "--device", "cpu")


def test_stopped_cells_go_on_to_the_same_bytes_and_are_made_once(data_dir, tmp_path, monkeypatch):
    data, network = read_data(data_dir), scout(scout_size=96).eval()
    data.directory = tmp_path
    seen = []

    def stop_at(count):
        def read_some(*words):
            seen.append(words[1])
            if len(seen) == count:
                raise KeyboardInterrupt
            return read_cells(*words)

        return read_some

    monkeypatch.setattr(cells_of_pictures, "read_cells", stop_at(11))
    with pytest.raises(KeyboardInterrupt):
        make_cells(network, data, 1)
    monkeypatch.setattr(cells_of_pictures, "read_cells", stop_at(0))
    make_cells(network, data, 1)
    assert len(seen) == len(data.train) + len(data.test) + 1  # the one that was stopped
    stopped = {path.name: path.read_bytes() for path in tmp_path.glob("cells/*/*/*")}
    assert len(stopped) == len(data.train)
    count, again = len(seen), make_cells(network, data, 1)
    assert (len(seen), isinstance(again["train"], Cells)) == (count, True)
    data.directory = tmp_path / "other"
    make_cells(network, data, 2)
    assert stopped == {path.name: path.read_bytes() for path in (tmp_path / "other").glob("cells/*/*/*")}


@pytest.mark.parametrize(("words", "said"), [
    (["--scout_size", 100], "multiple of 16"), (["--mixup", 0.4], "--mixup"), (["--fsg"], "--fsg"),
    (["--guide", "crops"], "--guide"), (["--finetune", "all"], "pass --tile"),
    (["--tile", 500], "--scout_size 96"), (["--model", "resnet", "--top_m", 4], "--top_m is for scouts"),
    (["--crop_dir", "crops"], "--crop_dir"), (["--tta", 4], "--tta"),
])  # fmt: skip
def test_what_a_scout_cannot_do_is_said_before_anything_is_written(data_dir, tmp_path, words, said):
    before = hashes(data_dir)
    with pytest.raises(InputError, match=said):
        call("train", *SCOUT, "--data_dir", data_dir, "--runs_dir", tmp_path / "runs", *words)
    assert not (tmp_path / "runs").exists()
    assert hashes(data_dir) == before


def test_lines_and_changed_pictures_are_named(source, tmp_path):
    table = pd.read_csv(source / "train.csv", dtype={ID: str})
    (tmp_path / "images").mkdir()
    for name in table[ID]:
        (tmp_path / "images" / f"{name}.jpg").write_bytes((source / "images" / f"{name}.jpg").read_bytes())
    table.to_csv(tmp_path / "train.csv", index=False)
    data_dir = call("preprocess", "--train_csv", tmp_path / "train.csv", "--output_dir", tmp_path / "data",
                    "--size", 64, "--n_folds", 2)  # fmt: skip
    network, data = scout(scout_size=96), read_data(data_dir)
    write(tmp_path / "images" / f"{table[ID][3]}.jpg", 50, 50)
    with pytest.raises(InputError, match=f"{table[ID][3]}.jpg is 50 x 50 px"):
        make_cells(network, data, 1)
    data.train.loc[5, ["width", "height"]] = 20_000, 1
    with pytest.raises(InputError, match=f"{table[ID][5]} is 20000 x 1 px, a line"):
        make_cells(network, data, 1)


def test_maps_of_a_scout_go_alone(trained, data_dir, tmp_path):
    runs, _ = trained
    where = ["--run", runs / "scout", "--data_dir", data_dir, "--output_dir", tmp_path, *SMALL_CROP]
    with pytest.raises(InputError, match="--source attention"):
        call("crop", *where, "--source", "attention*saliency")
    with pytest.raises(InputError, match="--rule peak"):
        call("crop", *where, "--rule", "component", "--box_size", 40)
    folder = call("crop", *where, "--class", "1")
    assert read_json(folder / "crop.json")["frame"] == 96
