"""Networks, checkpoints, backbones, and the same functions faster."""

import copy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models as tv

import fsg
import models
from models import Spec, build_model, dihedral, load_checkpoint, save_checkpoint
from plumbing.backbones import make_backbone, regnet_tiny
from plumbing.speedups import SmallMapConv2d, fold_batchnorms, skip_padding
from util import InputError


def spec(model="resnet", **changes):
    vit = {"backbone": "vit_tiny", "gates": "identity"} if model == "fsg_vit" else {"backbone": "regnet_tiny"}
    return Spec(**{"model": model, "image_size": 64, "meta_dim": 5, "hidden": 8, "dropout": 0.1} | vit | changes)


def batch(n=3, size=64, pictures=1):
    torch.manual_seed(0)
    return torch.randint(0, 256, (n, 3 * pictures, size, size), dtype=torch.uint8), torch.rand(n, 5)


def shaken(network):
    """The network in eval mode with statistics, scales and gates that are not those of an untrained one."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.2)
    for gate in fsg.gate_parameters(network):
        nn.init.normal_(gate)
    return network.eval()


# ---------------------------------------------------------------- all networks
@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_model_learns_with_every_parameter_and_is_rebuilt_from_its_checkpoint(name, tmp_path):
    torch.manual_seed(0)
    model = build_model(spec(name))
    image, meta = batch(pictures=len(models.MODELS[name].inputs))
    logit = model(image, meta)
    assert logit.shape == (3, 1)
    logit.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    groups = model.param_groups(1e-4, 1e-3)
    assert sum(len(g["params"]) for g in groups) + len(fsg.gate_parameters(model)) == len(list(model.parameters()))
    assert {id(p) for p in groups[0]["params"]} <= {id(p) for p in model.backbone.parameters()}

    save_checkpoint(tmp_path / "a.pt", shaken(model), spec(name), epoch=3)
    torch.load(tmp_path / "a.pt", weights_only=True)
    again, content = load_checkpoint(tmp_path / "a.pt")
    assert not again.training
    assert torch.equal(model(image, meta), again(image, meta))
    assert (content["epoch"], Spec(**content["spec"])) == (3, spec(name))


def test_uint8_and_float_images_are_the_same():
    model = build_model(spec()).eval()
    image, meta = batch()
    assert torch.allclose(model(image, meta), model(image.float() / 255, meta), atol=1e-6)


def kinds(network):
    return [type(module).__name__ for module in network]


def test_metadata_branch_and_chipnet_head_are_the_published_ones():
    branch = build_model(spec()).meta_branch
    assert kinds(branch) == ["Linear", "ReLU", "BatchNorm1d"] * 2
    chipnet = build_model(spec("chipnet"))
    assert kinds(chipnet.head) == ["Dropout", "ReLU", "BatchNorm1d", "Linear"]
    assert kinds(chipnet.scorer) == ["Dropout2d", "Conv2d", "ReLU", "BatchNorm2d", "Conv2d"]


def test_metadata_can_be_absent_or_ignored():
    image, meta = batch()
    assert build_model(spec(meta_dim=0))(image, torch.empty(3, 0)).shape == (3, 1)
    model = shaken(build_model(spec()))
    model.ignore_meta(np.array([False, True, False, False, True]))
    changed = meta.clone()
    changed[:, [1, 4]] = 7
    assert torch.equal(model(image, meta), model(image, changed))
    changed[:, 0] = 7
    assert not torch.equal(model(image, meta), model(image, changed))
    build_model(spec("chipnet")).ignore_meta(np.zeros(0, bool))  # it has none


def test_fusion_reads_both_pictures_with_one_backbone():
    model = build_model(spec("fusion")).eval()
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


# ---------------------------------------------------------------- ChipNet
@pytest.fixture
def chipnet():
    torch.manual_seed(0)
    return build_model(spec("chipnet", image_size=96)).eval()


def test_attention_is_a_distribution_over_the_grid_and_weighs_the_embeddings(chipnet):
    image = batch(size=96)[0]
    logit, attention = chipnet(image, None, with_attention=True)
    assert attention.shape == (3, 3, 3)
    assert attention.min() > 0
    assert torch.allclose(attention.sum(dim=(1, 2)), torch.ones(3))
    assert torch.allclose(chipnet.attention(image), attention, atol=1e-6)
    mean = torch.einsum("nchw,nhw->nc", chipnet.embed(image), attention)
    assert torch.allclose(chipnet.head(mean), logit, atol=1e-5)


def test_a_chip_is_seen_by_its_own_cell_alone(chipnet):
    image = batch(size=96)[0]
    embedding = chipnet.embed(image)
    for row, column in ((0, 1), (2, 0)):
        changed = image.clone()
        changed[:, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = 0
        difference = (embedding - chipnet.embed(changed)).abs().amax(dim=(0, 1))
        assert difference[row, column] > 0
        assert difference.count_nonzero() == 1


def test_fine_attention_is_registered_to_the_chips():
    model = build_model(spec("chipnet")).eval()
    image, _ = batch(n=2, size=128)
    model.shifts = 2
    fine = model.attention(image)
    assert fine.shape == (2, 8, 8)
    assert torch.allclose(fine.sum(dim=(1, 2)), torch.ones(2))
    # cell (i, j) of the grid shifted by half a chip is the chip centred on 8 + 16 i pixels:
    # scores are relative to each other only, so compare ratios within one of the four grids
    padded = nn.functional.pad(image.float() / 255, (8, 8, 8, 8), mode="reflect")
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        coarse = model.weigh(model.embed(padded[..., 16 * y : 16 * y + 128, 16 * x : 16 * x + 128]))
        part = fine[:, y::2, x::2]
        assert torch.allclose(part / part.sum(dim=(1, 2), keepdim=True), coarse, atol=1e-6)
    model.shifts = 1
    assert model.attention(image).shape == (2, 4, 4)


def test_views_average_maps_in_the_images_frame(chipnet):
    image = batch(size=96)[0]
    all_views = chipnet.attention(image, views=8)
    for view in range(8):
        turned = chipnet.attention(dihedral(image, view), views=8)
        assert torch.allclose(turned, dihedral(all_views, view), atol=1e-5)


def test_chipnet_refuses_sizes_that_leave_a_rest():
    with pytest.raises(InputError, match="--size"):
        build_model(spec("chipnet", image_size=80))


# ---------------------------------------------------------------- views
def test_dihedral_has_eight_views_and_inverts():
    x = torch.arange(9.0).view(1, 3, 3)
    views = [dihedral(x, view) for view in range(8)]
    assert len({tuple(v.flatten().tolist()) for v in views}) == 8
    assert torch.equal(views[0], x)
    for view, turned in enumerate(views):
        assert torch.equal(dihedral(turned, view, inverse=True), x)


def test_predict_averages_views_and_takes_no_rows():
    model = build_model(spec())
    image, meta = batch()
    device = torch.device("cpu")
    one = models.predict(model, [(image, meta, None)], device)
    assert np.allclose(one, model(image, meta).sigmoid().squeeze(1).detach(), atol=1e-6)
    flipped = models.predict(model, [(image.flip(-1), meta, None)], device)
    both = models.predict(model, [(image, meta, None)], device, tta=2)
    assert np.allclose(both, (one + flipped) / 2, atol=1e-6)
    assert models.predict(model, [], device).shape == (0,)  # of a process without a row
    nn.init.constant_(model.head[-1].bias, float("nan"))
    with pytest.raises(InputError, match="--amp"):
        models.predict(model, [(image, meta)], device)


# ---------------------------------------------------------------- backbones and weights
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_torchvision_backbones(name):
    assert build_model(spec("chipnet", backbone=name)).eval()(*batch(1)).shape == (1, 1)


def test_timm_backbones_are_normalised_as_they_were_trained():
    pytest.importorskip("timm")
    model = build_model(spec(backbone="timm:tf_efficientnet_lite0")).eval()
    assert model(*batch(1)).shape == (1, 1)
    assert model.mean.flatten().tolist() == [0.5, 0.5, 0.5]  # not ImageNet's


@pytest.mark.parametrize(
    ("changes", "weights", "word"),
    [
        ({"backbone": "resnet5"}, "none", "resnet5"),
        ({"backbone": "hub:x"}, "none", "hub"),
        ({"backbone": "squeezenet1_0"}, "none", "squeezenet1_0"),
        ({"backbone": "regnet_tiny"}, "imagenet", "--weights none"),
        ({"model": "chipnet", "backbone": "vit_tiny"}, "none", "32 px"),
        ({"backbone": "alexnet", "gates": "identity"}, "none", "--fsg"),
    ],
)
def test_impossible_models_say_what_to_pass(changes, weights, word):
    with pytest.raises(InputError, match=word):
        build_model(replace(spec(), **changes), weights)


def test_failed_download_says_what_to_pass(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(tv, "get_model", offline)
    with pytest.raises(InputError, match=r"no route to host.*--weights"):
        build_model(spec(backbone="resnet18"), "imagenet")


def test_weights_from_a_file(tmp_path):
    plain, path = regnet_tiny(num_classes=7), tmp_path / "w.pth"  # another head than ours
    torch.save(plain.state_dict(), path)
    model = build_model(spec(), str(path))
    assert torch.equal(model.backbone.stem[0].weight, plain.stem[0].weight)
    torch.save({"stem.0.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"w\.pth"):
        build_model(spec(), str(path))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        build_model(spec(), "nowhere.pth")


@pytest.mark.parametrize("gates", ["paper", "hard"])
def test_weights_of_a_gated_checkpoint_start_from_its_function(tmp_path, gates):
    trained = shaken(build_model(spec(gates=gates)))
    save_checkpoint(tmp_path / "a.pt", trained, spec(gates=gates))
    image = torch.rand(2, 3, 64, 64)
    for start in (spec(), spec(gates="identity")):
        network = build_model(start, str(tmp_path / "a.pt")).eval()
        assert torch.allclose(network.backbone(image), trained.backbone(image), atol=1e-5)


# ---------------------------------------------------------------- checkpoints
class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("content", ["text", "cut", "bomb", "list", "foreign", "format", "spec", "field"])
def test_foreign_checkpoints_are_refused(tmp_path, content):
    path, model = tmp_path / "a.pt", build_model(spec())
    save_checkpoint(path, model, spec())
    whole = torch.load(path, weights_only=True)
    if content == "text":
        path.write_text("hello")
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        torch.save({
            "bomb": Bomb(), "list": [1], "foreign": {"state_dict": {}}, "format": whole | {"format": 1},
            "spec": whole | {"spec": asdict(spec("chipnet"))}, "field": whole | {"spec": asdict(spec()) | {"x": 1}},
        }[content], path)  # fmt: skip
    with pytest.raises(InputError, match=r"a\.pt"):
        load_checkpoint(path)


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path, network = tmp_path / "a.pt", regnet_tiny(1)
    save_checkpoint(path, network, spec())
    before = path.read_bytes()

    def save(content, temporary):
        temporary.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 4 vs 0")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(InputError, match=r"a\.pt.*disk"):
        save_checkpoint(path, network, spec())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "one",
    [spec(backbone=name) for name in ("resnet18", "regnet_tiny", "mobilenet_v3_small")]
    + [spec("chipnet"), spec("chipnet", backbone="resnet18", gates="paper"), spec("fsg_vit"), spec(gates="hard")],
    ids=lambda one: f"{one.model} {one.backbone} {one.gates}",
)
def test_a_folded_checkpoint_is_the_same_function_without_gates_and_batch_norms(one, tmp_path):
    torch.manual_seed(0)
    network = shaken(build_model(one))
    save_checkpoint(tmp_path / "a.pt", network, one)
    folded, _ = load_checkpoint(tmp_path / "a.pt", fold=True)
    assert not fsg.gate_parameters(folded)
    assert not [m for m in folded.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    image, meta = batch(4)
    with torch.no_grad():
        plain = network(image, meta)
        assert torch.allclose(folded(image, meta), plain, atol=1e-4, rtol=1e-4)
    assert plain.std() > 1e-3  # else nothing was compared


# ---------------------------------------------------------------- the same functions, faster
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "regnet_tiny"])
def test_skipping_padding_changes_neither_outputs_nor_gradients(backbone):
    torch.manual_seed(0)
    plain = make_backbone(backbone, "none", 32)[0].double()
    fast = skip_padding(copy.deepcopy(plain))
    assert any(isinstance(m, SmallMapConv2d) for m in fast.modules())
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
    conv = nn.Conv2d(3, 5, 3, stride, 1, bias=bias).double()
    x = torch.randn(4, 3, side, side, dtype=torch.float64)
    fast = SmallMapConv2d.of(conv)
    assert fast.weight is conv.weight
    assert torch.allclose(fast(x), conv(x), atol=1e-12)


def test_only_plain_padded_convolutions_are_rewritten():
    make = nn.Conv2d
    others = [make(4, 4, 3, padding=1, groups=2), make(4, 4, 3), make(4, 4, 1), make(4, 4, 3, padding=2, dilation=2),
              make(4, 4, 3, padding=1, stride=(1, 2)), make(4, 4, 3, padding=1, padding_mode="reflect")]  # fmt: skip
    network = skip_padding(nn.Sequential(*others, make(4, 4, 3, padding=1)))
    assert [isinstance(module, SmallMapConv2d) for module in network] == [False] * len(others) + [True]


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Branching(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize("network", [Reused(), Branching(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))])
def test_batch_norms_that_cannot_be_folded_stay(network):
    network, image = shaken(network), torch.rand(1, 3, 4, 4)
    expected = network(image)
    assert torch.equal(fold_batchnorms(network)(image), expected)
