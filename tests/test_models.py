"""Networks, checkpoints, backbones, and the same functions faster."""

import copy
from dataclasses import asdict, replace
from unittest.mock import Mock

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
from tasks import Binary
from util import InputError

BINARY = Binary(("1",), "auc")


def spec(model="resnet", **changes):
    own = {"fsg_vit": {"backbone": "vit_tiny", "gates": "identity"}, "streams": {"streams": ("rgb", "location")}}
    same = {"model": model, "backbone": "regnet_tiny", "image_size": 64, "meta_dim": 5, "hidden": 8, "dropout": 0.1}
    return Spec(**same | own.get(model, {}) | changes)


def batch(n=3, size=64, pictures=1):
    torch.manual_seed(0)
    return torch.randint(0, 256, (n, 3 * pictures, size, size), dtype=torch.uint8), torch.rand(n, 5)


def shaken(network):
    """The network in eval mode with statistics, biases and gates that are not those of an untrained one."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.2)
    biases = [parameter for name, parameter in network.named_parameters() if name.endswith("bias")]
    for parameter in (*biases, *fsg.gate_parameters(network)):
        nn.init.normal_(parameter, 0, 0.5)
    return network.eval()


@pytest.mark.parametrize("name", sorted(models.MODELS.keys() - {"scout"}))  # its backbone is frozen
def test_every_model_learns_with_every_parameter_and_is_rebuilt_from_its_checkpoint(name, tmp_path):
    model = build_model(spec(name))
    image, meta = batch(pictures=len(models.recipe_of(name, spec(name).streams).inputs))
    logit = model(image, meta)
    assert logit.shape == (3, 1)
    logit.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    groups = model.param_groups(1e-4, 1e-3)
    assert sum(len(g["params"]) for g in groups) + len(fsg.gate_parameters(model)) == len([*model.parameters()])
    assert {id(p) for p in groups[0]["params"]} <= {id(p) for p in model.backbone.parameters()}

    save_checkpoint(tmp_path / "a.pt", shaken(model), spec(name), epoch=3)
    again, content = load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(model(image, meta), again(image, meta))
    assert torch.allclose(model(image.float() / 255, meta), again(image, meta), atol=1e-5)
    assert (content["epoch"], Spec(**content["spec"]), again.training) == (3, spec(name), False)


def test_metadata_can_be_absent_or_ignored():
    image, meta = batch()
    assert build_model(spec(meta_dim=0))(image, torch.empty(3, 0)).shape == (3, 1)
    model, changed = shaken(build_model(spec())), meta.clone()
    model.ignore_meta(np.array([False, True, False, False, True]))
    changed[:, [1, 4]] = 7
    assert torch.equal(model(image, meta), model(image, changed))
    changed[:, 0] = 7
    assert not torch.equal(model(image, meta), model(image, changed))
    build_model(spec("chipnet")).ignore_meta(np.zeros(0, bool))  # it has none


def test_fusion_reads_both_pictures_with_one_backbone():
    model = build_model(spec("fusion")).eval()
    image, meta = batch(pictures=2)
    with torch.no_grad():
        features = [model.backbone(model.normalise(part)) for part in image.split(3, dim=1)]
        expected = model.head(torch.cat([*features, model.meta_branch(meta)], dim=1))
    assert torch.allclose(model(image, meta), expected, atol=1e-5)
    for part in (0, 1):  # neither is left out
        changed = torch.cat([255 - x if i == part else x for i, x in enumerate(image.split(3, dim=1))], dim=1)
        assert not torch.allclose(model(changed, meta), expected, atol=1e-4)


def test_attention_is_a_distribution_over_chips_that_see_themselves_alone():
    model, image = shaken(build_model(spec("chipnet", image_size=96))), batch(size=96)[0]
    logit, attention = model(image, None, with_attention=True)
    assert (attention.shape, attention.min() > 0) == ((3, 3, 3), True)
    assert torch.allclose(attention.sum(dim=(1, 2)), torch.ones(3))
    embedding = model.embed(image)
    assert torch.allclose(model.head(torch.einsum("nchw,nhw->nc", embedding, attention)), logit, atol=1e-5)
    for row, column in ((0, 1), (2, 0)):
        changed = image.clone()
        changed.unflatten(3, (3, 32)).unflatten(2, (3, 32))[:, :, row, :, column] = 0
        difference = (embedding - model.embed(changed)).abs().amax(dim=(0, 1))
        assert difference.nonzero().tolist() == [[row, column]]
    whole = model.attention(image, views=8)  # in the image's frame
    for view in range(8):
        assert torch.allclose(model.attention(dihedral(image, view), views=8), dihedral(whole, view), atol=1e-5)
    with pytest.raises(InputError, match="--size"):
        build_model(spec("chipnet", image_size=80))


def test_fine_attention_is_registered_to_the_chips():
    model, (image, _) = build_model(spec("chipnet")).eval(), batch(n=2, size=128)
    assert model.attention(image).shape == (2, 4, 4)
    model.shifts = 2
    fine = model.attention(image)
    assert (fine.shape, fine.sum().item()) == ((2, 8, 8), pytest.approx(2))
    # cell i is the chip centred on 8 + 16 i pixels; scores are relative, so compare within one of the four grids
    padded = nn.functional.pad(image.float() / 255, (8, 8, 8, 8), mode="reflect")
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        coarse = model.weigh(model.embed(padded[..., 16 * y : 16 * y + 128, 16 * x : 16 * x + 128]))
        part = fine[:, y::2, x::2]
        assert torch.allclose(part / part.sum(dim=(1, 2), keepdim=True), coarse, atol=1e-6)


def test_predict_averages_views_takes_no_rows_and_refuses_what_is_no_number():
    views = [dihedral(torch.arange(9.0).view(3, 3), view) for view in range(8)]
    assert len({tuple(turned.flatten().tolist()) for turned in views}) == 8
    assert all(torch.equal(dihedral(turned, view, inverse=True), views[0]) for view, turned in enumerate(views))
    model, (image, meta), device = build_model(spec()), batch(), torch.device("cpu")
    one, flipped = (models.predict(model, BINARY, [(x, meta, None)], device) for x in (image, image.flip(-1)))
    assert np.allclose(one, model(image, meta).sigmoid().detach(), atol=1e-6)
    both = models.predict(model, BINARY, [(image, meta, None)], device, tta=2)
    assert np.allclose(both, (one + flipped) / 2, atol=1e-6)
    assert models.predict(model, BINARY, [], device).shape == (0, 1)  # of a process without a row
    nn.init.constant_(model.head[-1].bias, float("nan"))
    with pytest.raises(InputError, match="--amp"):
        models.predict(model, BINARY, [(image, meta)], device)


# ---------------------------------------------------------------- backbones and weights
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "timm:tf_efficientnet_lite0"])
def test_backbones_of_torchvision_and_timm(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model = build_model(spec("chipnet", backbone=name)).eval()
    assert model(*batch(1)).shape == (1, 1)
    assert model.mean[0].item() == pytest.approx(0.5 if name.startswith("timm") else 0.485)  # as it was trained


@pytest.mark.parametrize(("changes", "weights", "word"), [
    ({"backbone": "hub:x"}, "none", "hub"), ({"backbone": "squeezenet1_0"}, "none", "squeezenet1_0"),
    ({"backbone": "regnet_tiny"}, "imagenet", "--weights"), ({"backbone": "resnet18"}, "imagenet", "no route.*--w"),
    ({"model": "chipnet", "backbone": "vit_tiny"}, "none", "32 px"),
    ({"backbone": "alexnet", "gates": "hard"}, "none", "--fsg"),
])  # fmt: skip
def test_impossible_models_say_what_to_pass(changes, weights, word, monkeypatch):
    if weights == "imagenet":
        monkeypatch.setattr(tv, "get_model", lambda *_, **__: open("no route to host"))
    with pytest.raises(InputError, match=word):
        build_model(replace(spec(), **changes), weights)


def test_weights_from_a_file(tmp_path):
    plain, path = regnet_tiny(num_classes=7), tmp_path / "w.pth"  # another head than ours
    torch.save(plain.state_dict(), path)
    assert torch.equal(build_model(spec(), str(path)).backbone.stem[0].weight, plain.stem[0].weight)
    torch.save({"stem.0.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"w\.pth"):
        build_model(spec(), str(path))
    for gates in ("paper", "hard"):  # a network starts from the function of a gated one, its own gates at 1
        trained = shaken(build_model(spec(gates=gates)))
        save_checkpoint(path, trained, spec(gates=gates))
        image = torch.rand(2, 3, 64, 64)
        for start in (spec(), spec(gates="identity")):
            network = build_model(start, str(path)).eval()
            assert torch.allclose(network.backbone(image), trained.backbone(image), atol=1e-5)


def test_checkpoints_of_others_or_cut_off_are_refused_and_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    path, one = tmp_path / "a.pt", spec()
    save_checkpoint(path, build_model(one), one)
    whole, before = torch.load(path, weights_only=True), path.read_bytes()
    for content in ({"format": whole["format"]}, whole | {"format": 1}, whole | {"spec": asdict(spec("chipnet"))},
                    whole | {"spec": asdict(one) | {"x": 1}}, before[:5000]):  # fmt: skip
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(InputError, match=r"a\.pt"):
            load_checkpoint(path)
    monkeypatch.setattr(torch, "save", Mock(side_effect=RuntimeError("unexpected pos 4 vs 0")))
    with pytest.raises(InputError, match=r"a\.pt.*disk"):
        save_checkpoint(path, build_model(one), one)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before[:5000]]


@pytest.mark.parametrize("one", [
    spec(backbone="resnet18"), spec(), spec(backbone="mobilenet_v3_small"), spec("chipnet"), spec("fsg_vit"),
    spec(gates="hard"), spec("chipnet", backbone="resnet18", gates="paper"),
], ids=lambda one: f"{one.model} {one.backbone} {one.gates}")  # fmt: skip
def test_a_folded_checkpoint_is_the_same_function_without_gates_and_batch_norms(one, tmp_path):
    network, (image, meta) = shaken(build_model(one)), batch(4)
    save_checkpoint(tmp_path / "a.pt", network, one)
    folded, _ = load_checkpoint(tmp_path / "a.pt", fold=True)
    assert not fsg.gate_parameters(folded)
    assert not [m for m in folded.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        plain = network(image, meta)
        assert torch.allclose(folded(image, meta), plain, atol=1e-4, rtol=1e-4)
    assert plain.std() > 1e-3  # else nothing was compared


# ---------------------------------------------------------------- the same functions, faster
@pytest.mark.parametrize("backbone", ["resnet18", "regnet_tiny"])
def test_skipping_padding_changes_neither_outputs_nor_gradients(backbone):
    torch.manual_seed(0)
    plain = make_backbone(backbone, "none", 32)[0].double()
    fast = skip_padding(copy.deepcopy(plain))
    assert any(isinstance(m, SmallMapConv2d) for m in fast.modules())
    assert fast.state_dict().keys() == plain.state_dict().keys()
    chips, weights = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.randn(6, 1000, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        outputs = [net.to(memory_format=layout)(chips) for net in (plain, fast)]
        assert torch.allclose(*outputs, rtol=1e-10, atol=1e-10)
        gradients = [torch.autograd.grad((output * weights).sum(), net.parameters())
                     for net, output in zip((plain, fast), outputs, strict=True)]  # fmt: skip
        for one, other in zip(*gradients, strict=True):
            assert torch.allclose(one, other, rtol=1e-8, atol=1e-9 * one.abs().max())


def test_only_plain_padded_convolutions_are_rewritten():
    make = nn.Conv2d
    others = [make(4, 4, 3, padding=1, groups=2), make(4, 4, 3), make(4, 4, 1), make(4, 4, 3, padding=2, dilation=2),
              make(4, 4, 3, padding=1, stride=(1, 2)), make(4, 4, 3, padding=1, padding_mode="reflect")]  # fmt: skip
    network = skip_padding(nn.Sequential(*others, make(4, 4, 3, padding=1)))
    assert [isinstance(module, SmallMapConv2d) for module in network] == [False] * len(others) + [True]
    plain, x = make(3, 5, 3, padding=1, bias=True), torch.randn(4, 3, 2, 2)  # backbones have no biases
    assert torch.allclose(SmallMapConv2d.of(plain)(x), plain(x), atol=1e-6)


@pytest.mark.parametrize("layers", [2, 3])
def test_batch_norms_that_cannot_be_folded_stay(layers):
    class Odd(nn.Sequential):
        def forward(self, x):  # its convolution has two readers, or nothing can be traced
            y = self[0](x)
            return self[1](y) + y if len(self) == 2 or x.sum() > 0 else x

    network, image = shaken(Odd(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity())[:layers]), torch.rand(1, 3, 4, 4)
    expected = network(image)
    assert torch.equal(fold_batchnorms(network)(image), expected)
