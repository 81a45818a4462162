"""Sources of maps: saliency, Grad-CAM and their product."""

import cv2
import numpy as np
import pytest
import torch
from conftest import call

import localize
import models
import util
from localize import GradCam, Product, Saliency
from util import InputError


def network(backbone="regnet_tiny", size=64, meta_dim=2):
    torch.manual_seed(0)
    spec = {"model": "resnet", "backbone": backbone, "image_size": size, "meta_dim": meta_dim,
            "hidden": 4, "dropout": 0.0, "gates": None}  # fmt: skip
    return models.build_model(spec).eval()


def discs(n=24, size=64, dark=True):
    """Noisy pictures with one disc each: (images uint8 (n, size, size, 3), masks)."""
    rng = np.random.default_rng(0)
    ground, disc = ((190, 160, 150), (110, 80, 70)) if dark else ((60, 50, 50), (170, 150, 120))
    images, masks = [], []
    for _ in range(n):
        image = rng.normal(ground, 6, (size, size, 3))
        center = tuple(int(v) for v in rng.integers(20, size - 20, 2))
        mask = cv2.circle(np.zeros((size, size), np.uint8), center, int(rng.integers(6, 11)), 1, -1)
        image[mask > 0] = rng.normal(disc, 6, (int(mask.sum()), 3))
        images.append(np.clip(image, 0, 255))
        masks.append(mask > 0)
    return np.stack(images).astype(np.uint8), np.stack(masks)


@pytest.mark.parametrize("dark", [True, False])
def test_saliency_finds_what_differs_from_the_border_dark_or_bright(dark):
    images, masks = discs(dark=dark)
    saliency = localize.fit_saliency(network(), images, np.arange(16), "cpu")
    maps = localize.attention_maps([saliency], images[16:], "cpu", views=2)
    assert maps.shape == (8, 16, 16)
    assert np.allclose(maps.sum(axis=(1, 2)), 1, atol=1e-5)
    for attention, mask in zip(maps, masks[16:], strict=True):
        box = localize.find_box(attention, (640, 640))
        assert box.reason == ""
        assert box.confidence > 0.2
        rows, columns = (10 * np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        assert box.x0 <= columns[0] + 15
        assert box.x1 >= columns[-1] - 5
        assert box.y0 <= rows[0] + 15
        assert box.y1 >= rows[-1] - 5
        assert box.side < 450


def test_saliency_is_learned_from_the_rows_named_alone():
    images, _ = discs()
    changed = images.copy()
    changed[16:] = 255 - changed[16:]
    first, second = (
        localize.fit_saliency(network(), array, np.arange(16), "cpu") for array in (images, changed)
    )
    assert torch.equal(first.weight, second.weight)
    other = localize.fit_saliency(network(), changed, np.arange(24), "cpu")
    assert not torch.allclose(first.weight, other.weight)


def test_background_distance_ignores_a_minority_of_the_border():
    color = torch.rand(2, 3, 16, 16) * 0.02 + 0.5
    color[:, :, :3, :5] = 0.9  # a sticker in a corner
    color[0, :, 8, 8] = 0.1
    border = torch.ones(16, 16, dtype=torch.bool)
    border[3:-3, 3:-3] = False
    distance = localize.background_distance(color, border)
    assert distance[0, 8, 8] > 5 * distance[0, 5:11, 5:11].median()
    assert (distance[:, :3, :5] > 5 * distance[1, 8, 8]).all()


@pytest.mark.parametrize("backbone", ["regnet_tiny", "resnet18", "efficientnet_b0"])
def test_grad_cam_in_closed_form_is_grad_cam(backbone):
    cam = GradCam(network(backbone))
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        closed, by_gradient = cam.cam(image), cam.cam_by_gradient(image)
    assert closed.shape == by_gradient.shape
    assert closed.std() > 0
    assert torch.allclose(closed, by_gradient, atol=1e-5 * float(closed.abs().max()) + 1e-9)
    maps = localize.attention_maps([cam], image.permute(0, 2, 3, 1).numpy(), "cpu", 8)
    assert np.allclose(maps.sum(axis=(1, 2)), 1, atol=1e-5)


def test_grad_cam_shows_evidence_for_either_class():
    cam = GradCam(network())
    cam.cam = lambda image: torch.tensor([[[0.0, 0.0, 2.0], [0.0, 0.0, 0.0], [-3.0, 0.0, 0.0]]])
    attention = cam.attention(torch.zeros(1, 3, 64, 64), 1)[0]
    assert attention[2, 0] == pytest.approx(0.6)
    assert attention[0, 2] == pytest.approx(0.4)


def test_stages_are_outputs_of_stages():
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with torch.no_grad():
        found = localize.find_stages(network("resnet18"), image)
        assert found == {2: "relu", 4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"}
        found = localize.find_stages(network("efficientnet_b0"), image)
        assert (found[8], found[32]) == ("features.3", "features")


def test_transformers_have_no_feature_maps():
    net = network("vit_tiny")
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    for source in (Saliency(net), GradCam(net)):
        with pytest.raises(localize.SourceError, match="convolutional backbone"):
            source.attention(image)


def test_pictures_of_nothing_have_no_saliency():
    blank = np.full((4, 64, 64, 3), 128, np.uint8)
    with pytest.raises(localize.SourceError, match="another --source"):
        localize.fit_saliency(network(), blank, np.arange(4), "cpu")


def test_views_turn_maps_back_as_the_networks_do():
    image = torch.rand(1, 1, 6, 6)
    attend = lambda x: x[:, 0] + torch.arange(36.0).view(6, 6)  # noqa: E731
    for views in (1, 2, 4, 8):
        expected = [
            models.dihedral(attend(models.dihedral(image, v)), v, inverse=True)
            for v in range(views)
        ]
        found = localize.mean_over_views(attend, image, views)
        assert torch.allclose(found, torch.stack(expected).mean(dim=0))


def test_product_is_where_both_look():
    class Map:
        def __init__(self, cells, size):
            self.map = torch.full((1, size, size), 1e-4)
            for row, column in cells:
                self.map[0, row, column] = 1.0

        def attention(self, image, views):
            return self.map

    both = Product(Map([(1, 1), (6, 6)], 8), Map([(3, 3)], 4)).attention(None)
    assert both.shape == (1, 8, 8)
    assert both.sum() == pytest.approx(1, abs=1e-5)
    assert both.argmax() == 6 * 8 + 6


def test_lesions_that_fill_touch_or_miss_the_picture_still_give_squares():
    images, _ = discs()
    saliency = localize.fit_saliency(network(), images, np.arange(16), "cpu")
    odd = images[:4].copy()
    odd[0] = (190, 160, 150)  # nothing there
    odd[1] = (110, 80, 70)  # nothing but lesion
    odd[2, :, :30] = (110, 80, 70)  # cut off by the frame
    odd[3, 20:44, :] = (110, 80, 70)  # from one side to the other
    maps = localize.attention_maps([saliency], odd, "cpu", views=8)
    assert np.isfinite(maps).all()
    boxes = [localize.find_box(attention, (900, 600)) for attention in maps]
    for box in boxes:
        assert box.x1 - box.x0 == pytest.approx(box.y1 - box.y0)
        assert 0 <= box.x0 < box.x1 <= 900
        assert 0 <= box.y0 < box.y1 <= 600 + 1e-9
    assert boxes[0].reason
    assert boxes[3].reason == "fills the image"
    assert boxes[2].x0 < 200 + 150 < boxes[2].x1 + 1e-9 or boxes[2].reason


# ---------------------------------------------------------------- through the scripts
SALIENCY = ["--source", "saliency", "--backbone", "regnet_tiny", "--weights", "none",
            "--views", "1", "--device", "cpu"]  # fmt: skip


def test_saliency_crops_are_out_of_fold_and_predict_finds_the_same(
    data_dir, runs_dir, source, tmp_path
):
    from conftest import SMALL_MODEL

    crops = call("crop", *SALIENCY, "--data_dir", data_dir, "--output_dir", tmp_path)
    assert crops.name == "saliency"
    maps = np.load(crops / "train_attention.npy")
    network, content = models.load_checkpoint(crops / "saliency.pt")
    fold = util.read_data(data_dir).train["fold"].to_numpy()
    array = util.open_array(data_dir / "train_64.npy", 24)
    for k in (0, 1):
        again = localize.fit_saliency(network, array, np.flatnonzero(fold != k), "cpu", seed=k)
        assert torch.allclose(again.weight, content["saliency"][str(k)]["weight"], atol=1e-4)
        own = localize.attention_maps([again], array[fold == k], "cpu")
        assert np.allclose(maps[fold == k], own, atol=1e-5)
    run = call("train", "--model", "fusion", "--data_dir", data_dir, "--runs_dir", tmp_path,
               "--crop_dir", crops, *SMALL_MODEL)  # fmt: skip
    images = [source / "images" / f"{i:04d}.jpg" for i in range(24, 28)]
    out = call("predict", "--run", run, "--output", tmp_path / "out", "--csv", source / "test.csv",
               "--device", "cpu", "--no-pictures", *images)  # fmt: skip
    table = util.read_table(out / "predictions.csv")
    expected = util.read_table(run / "submission.csv").set_index("image_name")["target"]
    assert np.allclose(table["prob"], expected[table["image_name"]], atol=1e-5)


def test_grad_cam_and_product_of_runs(data_dir, runs_dir, tmp_path):
    where = ["--data_dir", data_dir, "--output_dir", tmp_path, "--device", "cpu", "--views", 1]
    crops = call("crop", "--source", "gradcam", "--run", runs_dir / "resnet", *where)
    assert crops.name == "resnet_gradcam"
    assert np.load(crops / "train_attention.npy").shape == (24, 2, 2)
    crops = call("crop", *SALIENCY, "--source", "attention*saliency", "--run",
                 runs_dir / "chipnet", *where)  # fmt: skip
    assert crops.name == "chipnet_saliency"
    assert np.load(crops / "train_attention.npy").shape == (24, 16, 16)
    with pytest.raises(InputError, match="does not look at whole images"):
        call("crop", "--source", "gradcam", "--run", runs_dir / "cropnet", *where)
    with pytest.raises(InputError, match="no ChipNet run"):
        call("crop", *SALIENCY, "--source", "attention*saliency", "--run", runs_dir / "resnet",
             *where)  # fmt: skip


def test_boxes_of_a_user(data_dir, source, tmp_path):
    where = ["--data_dir", data_dir, "--output_dir", tmp_path, "--device", "cpu"]
    data = util.read_data(data_dir)
    path = tmp_path / "mine.csv"
    path.write_text("image_name,x0,y0,x1,y1\n0000,10,20,40,30\n0001,,,,\n0024,0,0,20,20\n")
    crops = call("crop", "--source", "boxes", "--boxes", path, *where)
    boxes = util.read_table(crops / "train_boxes.csv").set_index("image_name")
    assert boxes.loc["0000", ["x0", "y0", "x1", "y1"]].tolist() == [10, 10, 40, 40]
    assert boxes["fallback"].notna().sum() == 23
    assert set(boxes["fallback"].dropna()) == {"no box in mine.csv"}
    assert not (crops / "train_attention.npy").exists()
    array = util.open_array(crops / "train_64.npy", len(data.train))
    image = util.read_image(source / "images" / "0000.jpg")[0]
    assert (array[0] == util.resize_box(image, (10, 10, 40, 40), 64)).all()
    for words, message in (
        (["--source", "boxes"], "go together"),
        (["--boxes", path], "go together"),
        (["--source", "boxes", "--boxes", tmp_path / "none.csv"], r"none\.csv is missing"),
    ):
        with pytest.raises(InputError, match=message):
            call("crop", *words, *where, "--overwrite")
    path.write_text("image_name,x0,y0,x1,y1\n0000,10,20,400,30\n")
    with pytest.raises(InputError, match="box of 0000, 10 20 400 30, does not lie"):
        call("crop", "--source", "boxes", "--boxes", path, *where, "--overwrite")
