"""Networks and checkpoints."""

import copy

import numpy as np
import pytest
import torch
from torchvision import models as tv

import fsg
import models
from models import ModelError


def spec(model, **changes):
    base = {"model": model, "backbone": "regnet_tiny", "image_size": 64, "meta_dim": 5,
            "hidden": 8, "dropout": 0.1, "gates": None}  # fmt: skip
    if model == "fsg_vit":
        base |= {"backbone": "vit_tiny", "gates": "identity"}
    return base | changes


def batch(n=3, size=64, pictures=1):
    torch.manual_seed(0)
    return torch.randint(0, 256, (n, 3 * pictures, size, size), dtype=torch.uint8), torch.rand(n, 5)


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_model_learns_with_every_parameter(name):
    torch.manual_seed(0)
    model = models.build_model(spec(name))
    image, meta = batch(pictures=len(models.MODELS[name].inputs))
    logit = model(image, meta)
    assert logit.shape == (3, 1)
    logit.square().sum().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None]
    assert without == []
    groups = model.param_groups(1e-4, 1e-3)
    grouped = sum(len(group["params"]) for group in groups) + len(fsg.gate_parameters(model))
    assert grouped == len(list(model.parameters()))
    assert {id(p) for p in groups[0]["params"]} <= {id(p) for p in model.backbone.parameters()}


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_checkpoints_rebuild_their_model(name, tmp_path):
    torch.manual_seed(1)
    model = models.build_model(spec(name)).eval()
    path = tmp_path / "a.pt"
    models.save_checkpoint(path, model, spec(name), epoch=3)
    torch.load(path, weights_only=True)
    again, content = models.load_checkpoint(path)
    image, meta = batch(pictures=len(models.MODELS[name].inputs))
    assert torch.equal(model(image, meta), again(image, meta))
    assert content["epoch"] == 3


def test_uint8_and_float_images_are_the_same():
    model = models.build_model(spec("resnet")).eval()
    image, meta = batch()
    assert torch.allclose(model(image, meta), model(image.float() / 255, meta), atol=1e-6)


def test_fusion_reads_both_pictures_with_one_backbone():
    model = models.build_model(spec("fusion")).eval()
    image, meta = batch(pictures=2)
    logit = model(image, meta)
    with torch.no_grad():
        features = [model.backbone(model.normalise(part)) for part in image.split(3, dim=1)]
        joined = torch.cat([*features, model.meta_branch(meta)], dim=1)
        assert torch.allclose(model.head(joined), logit, atol=1e-5)
    for part in (0, 1):
        changed = image.clone()
        changed[:, 3 * part : 3 * part + 3] = 255 - changed[:, 3 * part : 3 * part + 3]
        assert not torch.allclose(model(changed, meta), logit, atol=1e-4)


def test_fine_attention_is_registered_to_the_chips():
    model = models.build_model(spec("chipnet")).eval()
    image, _ = batch(n=2, size=128)
    model.shifts = 2
    fine = model.attention(image)
    assert fine.shape == (2, 8, 8)
    assert torch.allclose(fine.sum(dim=(1, 2)), torch.ones(2))
    # cell (i, j) of the grid shifted by half a chip is the chip centred on 8 + 16 i pixels:
    # scores are relative to each other only, so compare ratios within one of the four grids
    padded = torch.nn.functional.pad(image.float() / 255, (8, 8, 8, 8), mode="reflect")
    for y in (0, 1):
        for x in (0, 1):
            grid = padded[..., 16 * y : 16 * y + 128, 16 * x : 16 * x + 128]
            coarse = model.weigh(model.embed(grid))
            part = fine[:, y::2, x::2]
            part = part / part.sum(dim=(1, 2), keepdim=True)
            assert torch.allclose(part, coarse, atol=1e-6)
    model.shifts = 1
    assert model.attention(image).shape == (2, 4, 4)


def test_model_without_metadata():
    model = models.build_model(spec("resnet", meta_dim=0))
    assert model(batch()[0], torch.empty(3, 0)).shape == (3, 1)


# ---------------------------------------------------------------- ChipNet
@pytest.fixture
def chipnet():
    torch.manual_seed(0)
    return models.build_model(spec("chipnet", image_size=96)).eval()


def test_attention_is_a_distribution_over_the_grid(chipnet):
    attention = chipnet.attention(batch(size=96)[0])
    assert attention.shape == (3, 3, 3)
    assert attention.min() > 0
    assert torch.allclose(attention.sum(dim=(1, 2)), torch.ones(3))


def test_a_chip_is_seen_by_its_own_cell_alone(chipnet):
    image = batch(size=96)[0]
    changed = image.clone()
    changed[:, :, 0:32, 32:64] = 0  # row 0, column 1
    difference = (chipnet.embed(image) - chipnet.embed(changed)).abs().amax(dim=(0, 1))
    assert difference[0, 1] > 0
    assert difference.count_nonzero() == 1


def test_views_average_maps_in_the_images_frame(chipnet):
    image = batch(size=96)[0]
    all_views = chipnet.attention(image, views=8)
    for view in range(8):
        turned = chipnet.attention(models.dihedral(image, view), views=8)
        assert torch.allclose(turned, models.dihedral(all_views, view), atol=1e-5)


def test_chipnet_refuses_sizes_that_leave_a_rest():
    with pytest.raises(ModelError, match="multiple of 32"):
        models.build_model(spec("chipnet", image_size=80))


def test_dihedral_has_eight_views_and_inverts():
    x = torch.arange(9.0).view(1, 3, 3)
    views = [models.dihedral(x, view) for view in range(8)]
    assert len({tuple(v.flatten().tolist()) for v in views}) == 8
    assert torch.equal(views[0], x)
    for view, turned in enumerate(views):
        assert torch.equal(models.dihedral(turned, view, inverse=True), x)


def test_predict_averages_views():
    model = models.build_model(spec("resnet"))
    image, meta = batch()
    loader = [(image, meta, None)]
    model.eval()
    one = models.predict(model, loader, torch.device("cpu"))
    assert np.allclose(one, model(image, meta).sigmoid().squeeze(1).detach(), atol=1e-6)
    flipped = models.predict(model, [(image.flip(-1), meta, None)], torch.device("cpu"))
    both = models.predict(model, loader, torch.device("cpu"), tta=2)
    assert np.allclose(both, (one + flipped) / 2, atol=1e-6)


# ---------------------------------------------------------------- backbones and weights
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_torchvision_backbones(name):
    model = models.build_model(spec("chipnet", backbone=name)).eval()
    assert model(*batch(1)).shape == (1, 1)


def test_timm_backbones():
    pytest.importorskip("timm")
    model = models.build_model(spec("resnet", backbone="timm:tf_efficientnet_lite0")).eval()
    assert model(*batch(1)).shape == (1, 1)
    assert model.mean.flatten().tolist() == [0.5, 0.5, 0.5]  # not ImageNet's


@pytest.mark.parametrize(
    ("changes", "weights", "words"),
    [
        ({"backbone": "resnet5"}, "none", "'resnet5' is not supported"),
        ({"backbone": "hub:x"}, "none", "only the prefix 'timm:'"),
        ({"backbone": "squeezenet1_0"}, "none", "not supported"),
        ({"backbone": "regnet_tiny"}, "imagenet", "pass --weights none"),
        ({"backbone": "regnet_tiny"}, "nowhere.pth", "nowhere.pth is missing"),
        ({"model": "chipnet", "backbone": "vit_tiny"}, "none", "cannot take 32 px"),
    ],
)
def test_impossible_models_say_what_to_pass(changes, weights, words):
    with pytest.raises(ModelError, match=words):
        models.build_model(spec("resnet") | changes, weights)


def test_failed_download_says_what_to_pass(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(tv, "get_model", offline)
    with pytest.raises(ModelError, match=r"no route to host.*--weights none"):
        models.build_model(spec("resnet", backbone="resnet18"), "imagenet")


def test_weights_from_a_file(tmp_path):
    plain = models.regnet_tiny(num_classes=7)  # another head than ours
    torch.save(plain.state_dict(), tmp_path / "w.pth")
    model = models.build_model(spec("resnet"), str(tmp_path / "w.pth"))
    assert torch.equal(model.backbone.stem[0].weight, plain.stem[0].weight)
    torch.save({"stem.0.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="does not fit"):
        models.build_model(spec("resnet"), str(tmp_path / "w.pth"))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("content", ["text", "bomb", "list", "foreign", "spec", "cut"])
def test_foreign_checkpoints_are_refused(tmp_path, content):
    path = tmp_path / "a.pt"
    model = models.build_model(spec("resnet"))
    if content == "text":
        path.write_text("hello")
    elif content == "cut":
        models.save_checkpoint(path, model, spec("resnet"))
        path.write_bytes(path.read_bytes()[:5000])
    else:
        torch.save({
            "bomb": Bomb(), "list": [1], "foreign": {"state_dict": {}},
            "spec": {"format": 1, "spec": spec("chipnet"), "state_dict": model.state_dict()},
        }[content], path)  # fmt: skip
    with pytest.raises(ModelError, match=r"a\.pt"):
        models.load_checkpoint(path)


@pytest.mark.parametrize("gates", ["paper", "hard"])
def test_weights_of_a_gated_checkpoint_start_from_its_function(tmp_path, gates):
    gated = spec("resnet") | {"gates": gates}
    trained = models.build_model(gated).eval()
    for gate in fsg.gate_parameters(trained):
        torch.nn.init.normal_(gate)
    models.save_checkpoint(tmp_path / "a.pt", trained, gated)
    image = torch.rand(2, 3, 64, 64)
    for start in (spec("resnet"), spec("resnet") | {"gates": "identity"}):
        network = models.build_model(start, str(tmp_path / "a.pt")).eval()
        assert torch.allclose(network.backbone(image), trained.backbone(image), atol=1e-5)


# ---------------------------------------------------------------- the same function, faster
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "regnet_tiny"])
def test_skipping_padding_changes_neither_outputs_nor_gradients(backbone):
    torch.manual_seed(0)
    plain = models.build_backbone(backbone, "none", 32, torch.nn.Identity()).double()
    fast = models.skip_padding(copy.deepcopy(plain))
    assert any(isinstance(m, models.SmallMapConv2d) for m in fast.modules())
    assert fast.state_dict().keys() == plain.state_dict().keys()
    chips = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        outputs = [net.to(memory_format=layout)(chips) for net in (plain, fast)]
        assert torch.allclose(*outputs, rtol=1e-10, atol=1e-10)
        weights = torch.randn_like(outputs[0])
        for net, output in zip((plain, fast), outputs, strict=True):
            net.zero_grad()
            (output * weights).sum().backward()
        for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, rtol=1e-8, atol=1e-9 * one.grad.abs().max())


@pytest.mark.parametrize("side", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_small_map_convolution(side, stride, bias):
    conv = torch.nn.Conv2d(3, 5, 3, stride, 1, bias=bias).double()
    x = torch.randn(4, 3, side, side, dtype=torch.float64)
    fast = models.SmallMapConv2d.of(conv)
    assert fast.weight is conv.weight
    assert torch.allclose(fast(x), conv(x), atol=1e-12)


def test_only_plain_padded_convolutions_are_rewritten():
    make = torch.nn.Conv2d
    others = [make(4, 4, 3, padding=1, groups=2), make(4, 4, 3), make(4, 4, 1),
              make(4, 4, 3, padding=2, dilation=2), make(4, 4, 3, padding=1, stride=(1, 2)),
              make(4, 4, 3, padding=1, padding_mode="reflect")]  # fmt: skip
    network = models.skip_padding(torch.nn.Sequential(*others, make(4, 4, 3, padding=1)))
    rewritten = [isinstance(module, models.SmallMapConv2d) for module in network]
    assert rewritten == [False] * len(others) + [True]


def shake_statistics(network):
    """Running statistics that are not those of an untrained network."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight, 1, 0.2)


@pytest.mark.parametrize("backbone", ["resnet18", "regnet_tiny", "mobilenet_v2", "vit_tiny"])
def test_folding_batchnorms_keeps_the_function(backbone):
    torch.manual_seed(0)
    network = models.build_backbone(backbone, "none", 64, torch.nn.Identity()).double().eval()
    shake_statistics(network)
    folded = models.fold_batchnorms(copy.deepcopy(network))
    norms = [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not norms
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert torch.allclose(folded(image), network(image), rtol=1e-9, atol=1e-10)


def test_batchnorms_whose_convolution_has_other_readers_stay():
    class Reused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    network = Reused().eval()
    shake_statistics(network)
    image = torch.randn(1, 3, 4, 4)
    expected = network(image)
    assert torch.equal(models.fold_batchnorms(network)(image), expected)


def test_checkpoint_for_prediction_has_gates_and_batchnorms_folded(tmp_path):
    gated = spec("chipnet", gates="identity")
    network = models.build_model(gated).eval()
    shake_statistics(network.backbone)
    for gate in fsg.gate_parameters(network):
        torch.nn.init.normal_(gate)
    models.save_checkpoint(tmp_path / "a.pt", network, gated)
    folded, _ = models.load_for_prediction(tmp_path / "a.pt")
    assert not fsg.gate_parameters(folded)
    assert not [m for m in folded.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    image, meta = torch.rand(2, 3, 64, 64), torch.zeros(2, 0)
    with torch.no_grad():
        assert torch.allclose(folded(image, meta), network(image, meta), atol=1e-5)


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path, network = tmp_path / "a.pt", models.regnet_tiny(1)
    models.save_checkpoint(path, network, {})
    before = path.read_bytes()

    def save(content, temporary):
        temporary.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 4 vs 0")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(models.ModelError, match=r"a\.pt cannot be written; is the disk full\?"):
        models.save_checkpoint(path, network, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
