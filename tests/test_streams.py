"""Networks with streams: crop, place and depth of a thing; gates on stages; crops with a margin and depth maps."""

import argparse
import copy
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL_CROP, SMALL_MODEL, call, read
from torch import nn
from torchvision.models import resnet18

import dataset
import fsg
import localize
import models
from plumbing.data import read_data
from plumbing.images import MEAN_COLOR, box_raster, cut_depth, hide_outside, read_depth
from util import InputError

ALL = ["rgb", "location", "depth"]


def spec_of(streams=("rgb", "location"), backbone="regnet_tiny", **more):
    return models.Spec("streams", backbone, 64, hidden=8, streams=tuple(streams), **more)


def pictures(n=2, streams=2, size=64):
    return torch.randint(0, 256, (n, 3 * streams, size, size), dtype=torch.uint8)


# ---------------------------------------------------------------- networks
class Published(nn.Module):
    """The network of the paper, written down from its equations."""

    def __init__(self, streams: int, hidden: int, outputs: int):
        super().__init__()
        self.nets = nn.ModuleList(resnet18() for _ in range(streams))
        widths = (64, 128, 256, 512)
        self.gates = nn.ParameterList(nn.Parameter(torch.randn(c)) for _ in range(streams) for c in widths)
        self.fused, self.hidden = nn.Parameter(torch.randn(512 * streams)), nn.Parameter(torch.randn(hidden))
        self.first, self.last = nn.Linear(512 * streams, hidden), nn.Linear(hidden, outputs)

    def forward(self, streams):
        found, gates = [], iter(self.gates)
        for x, net in zip(streams, self.nets, strict=True):
            x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
            for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
                x = layer(x) * torch.sigmoid(next(gates)).view(1, -1, 1, 1)
            found.append(x.mean(dim=(2, 3)))
        z = torch.cat(found, dim=1) * torch.sigmoid(self.fused)
        return self.last(torch.relu(self.first(z)) * torch.sigmoid(self.hidden))


def test_streams_are_the_published_network():
    torch.manual_seed(0)
    published = Published(3, 8, 1).eval()
    own = models.build_model(spec_of(ALL, "resnet18", gates="paper", sites="stages")).eval()
    for part, net in zip(own.backbone.parts, published.nets, strict=True):
        state = {key: value for key, value in net.state_dict().items() if not key.startswith("fc.")}
        assert not part.load_state_dict(state, strict=False).unexpected_keys
    own.head[1].load_state_dict(published.first.state_dict())
    own.head[4].load_state_dict(published.last.state_dict())
    values = [*published.gates, published.fused, published.hidden]
    with torch.no_grad():
        for gate, value in zip(fsg.gate_parameters(own), values, strict=True):
            gate.copy_(value)
    image = pictures(2, 3)
    streams = [own.normalise(part) for part in image.chunk(3, dim=1)]
    torch.testing.assert_close(own(image, torch.empty(2, 0)), published(streams), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sites", ["stages", "branches"])
@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_b0", "timm:vit_tiny_patch16_224", "regnet_tiny"])
def test_gates_start_as_the_identity_learn_and_survive_a_checkpoint(backbone, sites, tmp_path):
    torch.manual_seed(0)
    plain = models.build_model(spec_of(backbone=backbone)).eval()
    spec = spec_of(backbone=backbone, gates="identity", sites=sites)
    gated = models.build_model(spec).eval()
    gated.load_state_dict(plain.state_dict(), strict=False)
    image, meta = pictures(), torch.empty(2, 0)
    assert torch.equal(gated(image, meta), plain(image, meta))
    gated.train()(image, meta).sum().backward()
    gates = fsg.gate_parameters(gated)
    assert all(gate.grad is not None for gate in gates)
    moving = sum(gate.grad.abs().sum() > 0 for gate in gates)
    assert moving >= len(gates) - 3  # a ReLU or depth dropped by chance may silence some
    with torch.no_grad():
        for gate in gates:
            gate.normal_()
    expected = gated.eval()(image, meta)
    models.save_checkpoint(tmp_path / "net.pt", gated, spec)
    for fold in (False, True):
        again = models.load_checkpoint(tmp_path / "net.pt", fold=fold)[0]
        torch.testing.assert_close(again(image, meta), expected, rtol=1e-3, atol=1e-4)
    left = len(fsg.gate_parameters(again))
    assert left == (len(gates) if sites == "stages" else 0)


@pytest.mark.parametrize(("backbone", "channels"), [
    ("resnet18", [64, 128, 256, 512]), ("vit_tiny", [96] * 4),
    ("convnext_tiny", [96, 96, 192, 192, 384, 384, 768, 768]),
    ("swin_t", [96, 96, 192, 192, 384, 384, 768, 768]), ("timm:convnext_atto", [40, 80, 160, 320]),
    ("timm:tf_efficientnet_lite0", [16, 24, 40, 80, 112, 192, 320]), ("timm:vit_tiny_patch16_224", [192] * 12),
])  # fmt: skip
def test_gates_on_stages_are_one_per_channel(backbone, channels):
    spec = models.Spec("resnet", backbone, 96, gates="paper", sites="stages")
    assert [len(gate) for gate in fsg.gate_parameters(models.build_model(spec))] == channels


def test_stages_that_are_not_known_are_refused():
    with pytest.raises(InputError, match="stages of DenseNet are not known; pass --gates branches"):
        models.build_model(models.Spec("resnet", "densenet121", 64, gates="paper", sites="stages"))
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="no telling the channels"):
        fsg.gate_outputs(network, ["1"], lambda: network(torch.zeros(1, 3, 8, 8)))


@pytest.mark.parametrize(("model", "boxes", "pictures_seen"), [("resnet", 3, 3), ("fusion", 1, 2), ("chipnet", 1, 1)])
def test_other_networks_take_gates_on_stages_too(model, boxes, pictures_seen):
    spec = models.Spec(model, "resnet18", 64, hidden=8, gates="paper", sites="stages", boxes=boxes)
    network = models.build_model(spec).eval()
    assert list(fsg.gated_modules(network)) == [f"backbone.layer{i}" for i in (1, 2, 3, 4)]
    assert network(pictures(2, pictures_seen), torch.empty(2, 0)).shape == (2, 1)


def test_a_gate_on_an_output_closes_its_channel():
    model = models.build_model(spec_of(["rgb"], "resnet18", gates="identity", sites="stages")).eval()
    stage = model.backbone.parts[0].layer2
    with torch.no_grad():
        stage.fsg[3] = fsg.CLOSED
    out = stage(torch.rand(1, 64, 8, 8))
    assert out.shape[1] == 128
    assert (out[:, 3] == 0).all()
    assert (out[:, 4] != 0).any()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.backbone.parts[0].layer2.fsg[4] = fsg.CLOSED
    assert (stage(torch.rand(1, 64, 8, 8))[:, 4] != 0).any()  # a copy has gates of its own
    with pytest.raises(ValueError, match=r"layer2: it has a gate"):
        fsg.gate_outputs(model, ["backbone.parts.0.layer2"], lambda: model(pictures(1, 1), torch.empty(1, 0)))


@pytest.mark.parametrize("backbone", ["regnet_tiny", "vit_tiny"])
def test_one_backbone_or_one_each(backbone):
    each, shared = (models.build_model(spec_of(ALL, backbone, share_backbone=share)) for share in (False, True))
    count = [sum(p.numel() for p in model.backbone.parameters()) for model in (each, shared)]
    assert count[0] == 3 * count[1]
    image, meta = pictures(2, 3), torch.empty(2, 0)
    assert shared.eval()(image, meta).shape == each.eval()(image, meta).shape == (2, 1)
    for part in each.backbone.parts:  # the same weights in all are one backbone for all
        part.load_state_dict(shared.backbone.state_dict())
    each.head.load_state_dict(shared.head.state_dict())
    torch.testing.assert_close(each(image, meta), shared(image, meta))


# ---------------------------------------------------------------- pictures
def test_a_depth_map_is_cut_at_any_resolution():
    ramp = np.tile(np.linspace(0, 9, 200, dtype=np.float32), (100, 1))  # of an image of 400 x 200
    part = cut_depth(ramp, (100, 50, 200, 150), 50, (400, 200))
    assert part.shape == (50, 50, 3)
    expected = np.rint(np.linspace(0, 255, 50))
    assert np.abs(part[25, :, 1].astype(float) - expected).max() <= 1
    assert (np.ptp(part, axis=0) == 0).all()
    flat = cut_depth(np.ones((4, 4), np.float32), (0, 0, 8, 8), 6, (8, 8))
    assert (flat == 0).all()
    beyond = cut_depth(ramp, (0, -100, 400, 300), 40, (400, 200))  # mirrored where it leaves the image
    assert (np.ptp(beyond, axis=0) <= 1).all()


def test_all_but_a_box_is_hidden():
    raster = box_raster((10, 20, 30, 25), (0, 0, 40, 40), 8)  # pixels of 5 px
    assert raster.sum() == pytest.approx(20 * 5 / 25)
    assert raster[4, 2:6].tolist() == [1, 1, 1, 1]
    assert box_raster((1, 0, 4, 5), (0, 0, 40, 40), 8)[0, 0] == pytest.approx(0.6)
    hidden = hide_outside(np.full((8, 8, 3), 200, np.uint8), raster)
    assert (hidden[4, 2:6] == 200).all()
    assert (hidden[0, 0] == MEAN_COLOR).all()
    assert (box_raster((-30, 0, -10, 10), (0, 0, 40, 40), 8) == 0).all()  # outside of what is seen


@pytest.fixture(scope="module")
def cropped(source, data_dir, tmp_path_factory):
    """Crops of given boxes with a margin, and depth maps: a ramp in each image."""
    folder = tmp_path_factory.mktemp("cropped")
    tables = [read(data_dir / f"{split}.csv") for split in ("train", "test")]
    table = pd.concat(tables)[["image_name", "width", "height"]]
    table["x0"], table["y0"] = table["width"] // 4, table["height"] // 4
    table["x1"], table["y1"] = table["x0"] + 20, table["y0"] + 12
    table.drop(columns=["width", "height"]).to_csv(folder / "boxes.csv", index=False)
    (folder / "depth").mkdir()
    for i, (name, width, height) in enumerate(table[["image_name", "width", "height"]].itertuples(index=False)):
        ramp = np.add.outer(np.arange(height), 2 * np.arange(width)) * 60.0
        if i % 2:
            np.save(folder / "depth" / f"{name}.npy", ramp)
        else:
            cv2.imwrite(str(folder / "depth" / f"{name}.png"), ramp.astype(np.uint16))
    crops = call("crop", "--source", "boxes", "--boxes", folder / "boxes.csv", "--margin", 0.5, "--data_dir", data_dir,
                 "--depth_dir", folder / "depth", "--output_dir", folder, "--device", "cpu")  # fmt: skip
    return folder, crops


def test_a_margin_is_added_on_each_side_and_the_box_is_kept(cropped, data_dir):
    boxes, table = read(cropped[1] / "train_boxes.csv"), read(data_dir / "train.csv")
    assert ((boxes["x1"] - boxes["x0"]) == 40).all()  # 20 x 12 made square, 10 added on each side
    assert (boxes["inner_x0"] == table["width"] // 4).all()
    assert (boxes["inner_y1"] - boxes["inner_y0"] == 12).all()
    near_edge = localize.enlarge(localize.Box(0, 0, 20, 20, "why", 0.5), 0.5, (100, 90))
    assert near_edge.corners == (0, 0, 40, 40)
    assert (near_edge.reason, near_edge.confidence, near_edge.inner) == ("why", 0.5, (0, 0, 20, 20))


def test_pictures_of_the_streams(cropped, data_dir):
    data = read_data(data_dir)
    known = {"augment": "square", "jitter": False, "limit": None, "meta_cols": [], "guide": None, "tile": 0}
    args = argparse.Namespace(crop_dir=cropped[1], **known)
    images = dataset.make_images(data, 0, args, models.recipe_of("streams", ALL))[0]
    valid = images["valid"]
    crop, place, depth = valid[0].image.numpy().reshape(3, 3, 64, 64).transpose(0, 2, 3, 1)
    name = data.train["image_name"].iloc[valid.rows[0]]
    row = data.train["image_name"].tolist().index(name)
    assert (crop == np.load(cropped[1] / "train_64.npy")[row]).all()
    whole = np.load(data_dir / "train_64.npy")[row]
    shown = (place == whole).all(axis=2)
    width, height = data.train[["width", "height"]].iloc[row]
    share = 20 * 12 / min(width, height) ** 2
    assert share * 0.7 < shown.mean() < share * 1.2
    assert (place[0, 0] == MEAN_COLOR).all()
    assert (depth == np.load(cropped[1] / "train_depth_64.npy")[row]).all()
    assert depth.min() == 0
    assert depth.max() == 255
    row, found = images["train"].rows[0], set()
    originals = [np.load(cropped[1] / f"train_{name}64.npy")[row].astype(float) for name in ("", "depth_")]
    for draw in range(8):
        crop, _, depth = images["train"][(0, 1.0, (3, draw))].image.numpy().reshape(3, 3, 64, 64)
        assert (depth[0] == depth[1]).all()  # grey: not tinted
        turns = [turn_of(*pair) for pair in zip(originals, (crop, depth), strict=True)]
        assert turns[0] == turns[1]
        found.add(turns[0])
    assert len(found) > 2


def turn_of(plain: np.ndarray, seen: np.ndarray) -> int:
    """Which symmetry of a picture (S, S, 3) one (3, S, S) resembles most, however it is tinted."""
    grey = plain.mean(axis=2)
    turned = [np.rot90(side, k) for side in (grey, grey.T) for k in range(4)]
    return int(np.argmax([np.corrcoef(one.ravel(), seen.mean(axis=0).ravel())[0, 1] for one in turned]))


def test_streams_train_resume_and_predict_new_images(data_dir, source, cropped, tmp_path):
    """Boxes from our own maps, depth from a folder: predict.py takes the way of the test images."""
    crops = call("crop", "--source", "saliency", "--data_dir", data_dir, *SMALL_CROP, "--views", 2, "--margin", 0.5,
                 "--depth_dir", cropped[0] / "depth", "--output_dir", tmp_path)  # fmt: skip
    flags = ["--model", "streams", "--streams", *ALL, "--gates", "stages", "--augment", "square", "--no-jitter",
             "--crop_dir", crops, "--data_dir", data_dir, *SMALL_MODEL, "--epochs", 2, "--fold", 0]  # fmt: skip
    run = call("train", *flags, "--runs_dir", tmp_path / "a")
    call("report", run)  # its checks predict again
    mean = read(run / "test_predictions.csv").groupby("image_name")["prob"].mean()
    files = [source / "images" / f"{name}.jpg" for name in mean.index]
    where = ["--run", run, "--output", tmp_path / "new", "--device", "cpu", "--csv", source / "test.csv", *files]
    for more in ([], ["--maps", "--depth_dir", cropped[0] / "depth"]):
        with pytest.raises(InputError, match="looks at depth maps; pass predict.py --depth_dir"):
            call("predict", *where, *more)
    call("predict", *where, "--depth_dir", cropped[0] / "depth")
    found = read(tmp_path / "new" / "predictions.csv").set_index("image_name")["prob"]
    assert np.allclose(found.loc[mean.index], mean, atol=1e-5)
    halves = ["--runs_dir", tmp_path / "b"]
    with pytest.raises(Exception, match="max_hours"):
        call("train", *flags, *halves, "--max_hours", 0)
    again = call("train", *flags, *halves, "--resume")
    assert (again / "oof.csv").read_bytes() == (run / "oof.csv").read_bytes()


@pytest.mark.parametrize(("flags", "words"), [
    (["--model", "resnet", "--streams", "rgb"], "for --model streams"),
    (["--model", "resnet", "--share_backbone"], "for --model streams"),
    (["--model", "streams", "--streams", "rgb", "depth", "--crop_dir", "runs"], "crops of --depth_dir|depth_dir"),
    (["--model", "streams", "--gate_lr", 1], "--gate_lr is for gates"),
    (["--model", "resnet", "--weights", "gated"], "gates that fold into no layer"),
])  # fmt: skip
def test_flags_that_do_not_go_together(data_dir, runs_dir, tmp_path, flags, words):
    flags = [data_dir / "crops" / "chipnet" if flag == "runs" else flag for flag in flags]
    if "gated" in flags:
        spec = models.Spec("resnet", "regnet_tiny", 64, gates="paper", sites="stages")
        models.save_checkpoint(tmp_path / "gated.pt", models.build_model(spec), spec)
        flags, runs_dir = [*flags[:2]], [*SMALL_MODEL[2:], "--weights", tmp_path / "gated.pt"]
        with pytest.raises(InputError, match=words):
            call("train", *flags, "--data_dir", data_dir, "--runs_dir", tmp_path / "runs", *runs_dir)
        return
    with pytest.raises(InputError, match=words):
        call("train", *flags, "--data_dir", data_dir, "--runs_dir", tmp_path, *SMALL_MODEL)


def test_depth_maps_that_are_none(tmp_path, cropped, data_dir):
    for name, content in (("a.npy", b"no"), ("b.png", b"no"), ("d.npy", None)):
        (tmp_path / name).write_bytes(content or b"")
    np.save(tmp_path / "d.npy", np.zeros((3, 4, 3)))
    (tmp_path / "sub").mkdir()
    shutil.copy(next((cropped[0] / "depth").glob("*.png")), tmp_path / "sub" / "l\u00e4sion.PNG")
    np.save(tmp_path / "e.npy", np.array([[np.nan, 1]]))
    np.save(tmp_path / "f.npy", np.array([["x"]], dtype=object), allow_pickle=True)
    for name in "abdef":
        with pytest.raises(InputError, match="is no depth map"):
            read_depth(tmp_path, f"{name}.jpg")
    with pytest.raises(InputError, match=r"no depth map of c\.jpg"):
        read_depth(tmp_path, "c.jpg")
    assert read_depth(tmp_path, "sub/la\u0308sion.jpg").dtype == np.float32
    with pytest.raises(InputError, match="--depth_dir is for one box"):
        call("crop", "--source", "boxes", "--boxes", cropped[0] / "boxes.csv", "--depth_dir", tmp_path, "--n_boxes", 2,
             "--data_dir", data_dir, "--output_dir", tmp_path, "--device", "cpu")  # fmt: skip
