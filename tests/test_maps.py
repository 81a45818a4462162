"""Maps of the outputs of trained networks: every way against its definition."""

from functools import partial

import numpy as np
import pytest
import torch
from test_scout import a_bag, scout
from torch import nn

import fsg
from maps import WAYS, Cam, ClassAttention, GradCam, Rollout, default_way, every
from models import Spec, build_model
from tasks import MultiClass
from util import InputError

NAMES = ("a", "b", "c")
META = np.ones((1, 2), np.float32)


def network(backbone="regnet_tiny", model="resnet", size=64, **options):
    torch.manual_seed(0)
    return build_model(Spec(model, backbone, size, **{"meta_dim": 2, "hidden": 4, "outputs": 3} | options)).eval()


def images(n=2, size=64):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, size, size), dtype=np.uint8))


@pytest.mark.parametrize("backbone", ["regnet_tiny", "resnet18", "efficientnet_b0", "convnext_tiny", "densenet121"])
def test_cam_is_grad_cam_of_all_outputs_from_one_forward_pass(backbone):
    trained = network(backbone)
    if backbone == "convnext_tiny":  # a norm between pooling and head: only gradients see through it
        with pytest.raises(InputError, match="gradcam"):
            Cam(trained, META).explain(images())
        return
    logit, maps = Cam(trained, META).explain(images())
    again, slow = GradCam(trained, META).explain(images())
    assert maps.shape[:2] == (2, 3)
    assert maps.std() > 0
    assert torch.allclose(maps, slow, atol=1e-5 * float(slow.abs().max()))
    without = logit - trained.head[-1].bias - trained.meta_branch(torch.ones(2, 2)) @ trained.head[-1].weight[:, -4:].T
    assert torch.allclose(maps.sum(dim=(2, 3)), without, atol=1e-4)
    assert torch.equal(logit, again)


def test_grad_cam_of_a_layer_follows_its_equations_output_by_output():
    trained, kept = network(), {}
    layer = trained.backbone.get_submodule("trunk_output.block2")
    layer.register_forward_hook(lambda module, inputs, output: kept.update(x=output))
    image = images()
    _, maps = GradCam(trained, META, layer="trunk_output.block2").explain(image)
    for row in range(2):
        for output in range(3):
            logit = trained(image[row : row + 1], torch.ones(1, 2))[0, output]
            (gradient,) = torch.autograd.grad(logit, kept["x"])
            expected = (gradient[0].mean(dim=(1, 2))[:, None, None] * kept["x"][0]).sum(dim=0)
            assert torch.allclose(maps[row, output], expected, atol=1e-5 * expected.abs().max().item())
    with pytest.raises(InputError, match="nothing_here"):
        GradCam(trained, META, layer="nothing_here").explain(image)
    with pytest.raises(InputError, match="no map"):
        GradCam(network("resnet18"), META, layer="fc").explain(image)


@pytest.mark.parametrize("way", ["cam", "attention", "gradcam"])
def test_maps_of_a_class_are_where_it_has_evidence(way):
    task, image = MultiClass(NAMES[:2], "auc"), images()
    model = "chipnet" if way == "attention" else "resnet"
    trained = network(model=model, meta_dim=0, outputs=2)
    with torch.no_grad():
        trained.head[-1].weight[1] = -trained.head[-1].weight[0]  # what speaks for one speaks against the other
    both = WAYS[way](trained).explain(image)[1]
    assert torch.allclose(both[:, 0], -both[:, 1], atol=1e-6)
    assert both.std() > 0
    named = [WAYS[way](trained, evidence=partial(task.evidence, name=name)) for name in NAMES[:2]]
    likeliest = WAYS[way](trained, evidence=task.evidence).attention(image)
    predicted = trained(image, torch.zeros(2, 0)).argmax(dim=1)
    for row, label in enumerate(predicted):
        assert torch.allclose(likeliest[row], named[label].attention(image)[row], atol=1e-6)
    maps = likeliest.flatten(1)
    assert torch.allclose(maps.sum(dim=1), torch.ones(2), atol=1e-5)
    assert (maps >= 0).all()
    assert not torch.allclose(named[0].attention(image), named[1].attention(image), atol=1e-6)


def test_a_map_of_evidence_is_how_far_it_is_from_its_median():
    cam = Cam(network())
    cam.explain = lambda image, shares: (None, torch.tensor([[[[0.0, 2.0], [0.0, 0.0], [-3.0, 0.0]]]]))
    assert cam.attention(None)[0].flatten().tolist() == pytest.approx([0, 0.4, 0, 0, 0.6, 0])


def test_attention_of_a_scout_adds_up_to_its_logit():
    trained = scout(heads=2, outputs=3, place=True, witness=True).eval()
    bag = a_bag(trained, 9, 5)
    logit, maps = ClassAttention(trained).explain(bag)
    assert torch.allclose(logit, trained(bag, torch.zeros(2, 0)), atol=1e-6)
    assert torch.allclose(maps.sum(dim=(2, 3)), logit - trained.head[1].bias, atol=1e-5)


@pytest.mark.parametrize("gates", [None, "paper"])
@pytest.mark.parametrize("backbone", ["vit_tiny", "timm:vit_tiny_patch16_224", "timm:vit_little_patch16_reg1_gap_256"])
def test_rollout_is_the_product_of_mean_attentions(backbone, gates):
    if backbone.startswith("timm"):
        pytest.importorskip("timm")
    trained, image, taken = network(backbone, gates=gates), images(), []
    if gates:
        for parameter in fsg.gate_parameters(trained):
            nn.init.normal_(parameter)
    logit, maps = Rollout(trained, META).explain(image)
    blocks = trained.backbone.encoder.layers if backbone == "vit_tiny" else trained.backbone.blocks
    for block in blocks:
        own = block.self_attention if backbone == "vit_tiny" else block.attn

        def keep(module, inputs):
            if backbone == "vit_tiny":
                taken.append(nn.MultiheadAttention.forward(module, *inputs[:1] * 3, need_weights=True)[1])
            else:  # timm's own attention without fusion
                module.fused_attn = False
                module.attn_drop.register_forward_pre_hook(lambda drop, x: taken.append(x[0].mean(dim=1)))

        own.register_forward_pre_hook(keep)
    assert torch.allclose(trained(image, torch.ones(2, 2)), logit, atol=1e-5)
    expected = torch.eye(taken[0].shape[-1])
    for block, attention in zip(blocks, taken, strict=True):
        own = block.self_attention if backbone == "vit_tiny" else block.attn
        gate = [fsg.gate_of(part).mean() for part in own.modules() if hasattr(part, "fsg")] or [1.0]
        expected = (gate[0] * attention + torch.eye(attention.shape[-1])) / (1 + gate[0]) @ expected
    mean = "gap" in backbone  # has no class token, but a register
    expected = expected[:, 1:, 1:].mean(dim=1) if mean else expected[:, 0, 1:]
    assert torch.allclose(maps[:, 1].flatten(1), expected, atol=1e-5)
    assert torch.equal(maps[:, 0], maps[:, 2])


def test_every_network_has_a_way_and_grad_cam_sees_tokens():
    chosen = [default_way(network(*pair), 64) for pair in (("regnet_tiny",), ("regnet_tiny", "chipnet"), ("vit_tiny",))]
    assert chosen == ["cam", "attention", "rollout"]
    logit, maps = GradCam(network("vit_tiny"), META).explain(images())
    assert maps.shape == (2, 3, 4, 4)
    assert maps.std() > 0
    for way, backbone in ((Cam, "vit_tiny"), (Rollout, "regnet_tiny")):
        with pytest.raises(InputError, match="take"):
            way(network(backbone), META).explain(images())
    assert torch.equal(every(torch.zeros(2, 3))[1], torch.eye(3))
