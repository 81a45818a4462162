"""Backbones of the papers, by name and from weights in foreign formats: what works with which part of the pipeline."""

import argparse
import importlib
from functools import partial

import pytest
import torch
from conftest import ROOT
from torch import nn

import fsg
import maps
import plumbing.backbones
from localize import Saliency, find_box
from models import Spec, build_model, load_checkpoint, save_checkpoint
from plumbing.backbones import find_stages, make_backbone, run_backbone
from util import InputError

timm = pytest.importorskip("timm")
CREATE = timm.create_model
STAGES = {"depths": (1, 1, 1, 1)}
# the first word that fits: how a network is made small enough for a test
SMALLER = {
    "crossvit": {"depth": ((1, 1, 0), (1, 1, 0))}, "convnext": STAGES | {"dims": (24, 48, 96, 192)},
    "tnt": {"depth": 2}, "swin": STAGES | {"embed_dim": 48}, "tiny_vit": STAGES, "mambaout": STAGES,
    "vitamin": {"depth": 2}, "dinov3": {"depth": 2}, "vit": {"depth": 2, "embed_dim": 192, "num_heads": 3},
    "deit": {"depth": 2, "embed_dim": 192, "num_heads": 3},
}  # fmt: skip
# name: pixels, gates on branches, gates on stages (None: refused), ways of making maps, serves ChipNet, has a saliency
VIT, CNN = ({"gradcam", "rollout"}, False, False), ({"gradcam"}, True, True)
PAPERS = {
    "vit_base_patch16_224.sam_in1k": (64, 4, 2, *VIT),
    "crossvit_9_dagger_240": (120, 12, None, {"gradcam"}, False, False),
    "convnext_tiny": (64, 4, 4, *CNN),
    "tnt_s_patch16_224": (64, 8, None, {"gradcam"}, False, False),
    "swin_tiny_patch4_window7_224": (64, 8, 4, {"cam", "gradcam"}, False, True),
    "swinv2_tiny_window8_256": (64, 8, 4, {"cam", "gradcam"}, False, True),
    "vit_small_patch16_dinov3": (64, 4, 2, {"gradcam", "rollout"}, True, False),
    "tiny_vit_5m_224": (64, 7, 4, *CNN),
    "vitamin_small_224": (64, 10, 2, {"gradcam", "rollout"}, False, True),
    "vit_large_patch16_224.mae": (64, 4, 2, *VIT),  # Phikon-v2, mSTAR, UNI
    "vit_base_patch32_clip_quickgelu_224.openai": (64, 4, 2, *VIT),  # QuiltNet
    "vit_base_patch16_clip_224.openai": (64, 4, 2, *VIT),  # PathGen-CLIP
    "vit_small_patch16_224.dino": (64, 4, 2, *VIT),  # MAE of X-rays, and in place of CytoFM
    "vit_small_patch8_224.dino": (64, 4, 2, *VIT),  # in place of Path Foundation
    "vit_giant_patch14_reg4_dinov2": (56, 4, 2, *VIT),  # H-optimus-0, in place of PLUTO
    "mambaout_femto": (64, 4, 4, *CNN),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Networks of few blocks, with random weights."""
    def create(name, **options):
        less = next((less for word, less in SMALLER.items() if word in name), {})
        return CREATE(name, **options | less | {"pretrained": False})

    monkeypatch.setattr(timm, "create_model", create)
    plumbing.backbones.say.cache_clear()


def images(size, n=2):
    torch.manual_seed(0)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


def shake(network):
    """The network in eval mode with gates and biases that are not those of an untrained one."""
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.endswith(("bias", "fsg", "gamma", "gamma_1", "gamma_2")) or not parameter.any():
            nn.init.normal_(parameter, 0.5 if "gamma" in name else 0, 0.2)
    return network.eval()


def refuses(build, word="; "):
    with pytest.raises(InputError, match=word):
        build()


@pytest.mark.parametrize("name", PAPERS)
def test_a_backbone_of_a_paper_with_every_part_it_serves(name, tmp_path):
    size, branches, stages, ways, chips, salient = PAPERS[name]
    spec = partial(Spec, backbone=f"timm:{name}", image_size=size, outputs=2)
    image, meta = images(size), torch.zeros(2, 0)

    gated = spec("resnet", gates="identity")
    network = build_model(gated)
    assert len(fsg.gated_modules(network)) == branches
    before = [parameter.clone() for parameter in network.parameters()]
    optimizer = torch.optim.SGD(network.param_groups(0.1, 0.1), 0.1)
    optimizer.add_param_group({"params": fsg.gate_parameters(network)})
    (shake(network).train()(image, meta) - 1).square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)

    save_checkpoint(tmp_path / "a.pt", shake(network), gated)
    with torch.no_grad():
        expected = network(image, meta)
        assert expected.std() > 1e-3
        assert torch.equal(load_checkpoint(tmp_path / "a.pt")[0](image, meta), expected)
        folded, _ = load_checkpoint(tmp_path / "a.pt", fold=True)
        assert not fsg.gated_modules(folded)
        assert torch.allclose(folded(image, meta), expected, atol=1e-4, rtol=1e-3)

    for way in ("cam", "gradcam", "rollout"):
        if way not in ways:
            refuses(lambda way=way: maps.WAYS[way](network).explain(image), "take")
            continue
        explainer = maps.WAYS[way](network)
        found = explainer.explain(image)[1].detach()
        assert found.shape[:2] == (2, 2)
        assert found.shape[2] == found.shape[3] > 1
        assert found.flatten(2).std(dim=2).min() > 0
        attention = explainer.attention(image).detach().numpy()
        box = find_box(attention[0], (300, 200))
        assert 0 <= box.x0 < box.x1 <= 300
    assert maps.default_way(network, size) in ways

    one = spec("resnet", gates="identity", sites="stages")
    if stages is None:
        refuses(lambda: build_model(one), "--fsg")
    else:
        assert len(fsg.gated_modules(build_model(one))) == stages
    if chips:
        with torch.no_grad():
            assert build_model(spec("chipnet", image_size=64)).eval()(images(64), meta).shape == (2, 2)
    else:
        refuses(lambda: build_model(spec("chipnet", image_size=96)), "32 px|multiple")
    saliency = Saliency(network)
    if salient:
        assert saliency.attention(image).shape == (2, size // 4, size // 4)
    else:
        refuses(lambda: saliency.attention(image))


def network_of(name, size, **options):
    return shake(build_model(Spec("resnet", f"timm:{name}", size, outputs=2, **options)))


@pytest.mark.parametrize("size", [64, 192])  # at 192 px the first stage of this Swin is a cube: 48 channels, 48 x 48
def test_maps_with_channels_last_are_turned_and_cam_is_grad_cam_of_them(size):
    network, kept = network_of("swin_tiny_patch4_window7_224", size), {}
    for name in ("layers.0", "layers.2"):
        network.backbone.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: kept.update({name: o}))
    forward = partial(network.backbone, torch.rand(1, 3, size, size))
    features, outputs = run_backbone(network, ["layers.0", "layers.2", "norm"], forward)
    for name, raw in kept.items():
        assert torch.equal(outputs[name], raw.permute(0, 3, 1, 2))
    assert torch.allclose(outputs["norm"].mean(dim=(2, 3)), features, atol=1e-5)
    assert [find_stages(network, images(size), (4, 8, 16, 32))[stride] for stride in (8, 32)] == ["layers.1", "norm"]
    one, other = (way(network).explain(images(size))[1] for way in (maps.Cam, maps.GradCam))
    assert torch.allclose(one, other, atol=1e-5 * one.abs().max().item())


def test_rollout_of_dinov3_counts_its_rotary_attention(monkeypatch):
    network, image, taken = network_of("vit_small_patch16_dinov3", 96), images(96), []
    fused = nn.functional.scaled_dot_product_attention

    def keep(query, key, value, **options):
        taken.append((query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=3).mean(dim=1))
        return fused(query, key, value, **options)

    found = maps.Rollout(network).explain(image)[1][:, 0]
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", keep)
    with torch.no_grad():
        network(image, torch.zeros(2, 0))
    first, second = (attention + torch.eye(attention.shape[-1]) for attention in taken)
    expected = (second / 2) @ (first / 2)
    assert torch.allclose(found.flatten(1), expected[:, 5:, 5:].mean(dim=1), atol=1e-6)  # mean over patches, 5 others


@pytest.mark.parametrize(("name", "size", "layer"), [
    ("vit_small_patch16_224.dino", 64, "blocks.1.norm1"),  # the class token alone goes on
    ("vit_little_patch16_reg1_gap_256", 64, "blocks.1"),  # the mean over patches does
    ("vit_small_patch16_dinov3", 64, "norm"), ("vitamin_small_224", 64, "blocks.1"),
    ("tnt_s_patch16_224", 64, "blocks.1.norm_out"), ("crossvit_9_dagger_240", 120, "blocks.1.fusion.0.norm1"),
    ("swin_tiny_patch4_window7_224", 64, "norm"), ("mambaout_femto", 64, "stages"),
])  # fmt: skip
def test_grad_cam_looks_at_the_last_layer_whose_places_reach_the_features(name, size, layer):
    assert maps.default_layer(network_of(name, size), images(size)) == layer


def test_attention_and_patches_of_patches_are_no_maps():
    assert find_stages(network_of("tnt_s_patch16_224", 96), images(96), ()) == {}


def test_all_heads_of_a_network_are_taken_off():
    network, head = make_backbone("timm:deit_small_distilled_patch16_224", "none", 64)  # it has two
    assert network.get_submodule(head).in_features == 192
    assert network_of("deit_small_distilled_patch16_224", 64).features == 192
    network, head = make_backbone("timm:vit_small_patch16_dinov3", "none", 64)  # of timm it has none
    assert network.get_submodule(head).in_features == 384


@pytest.mark.parametrize("name", ["tnt_s_patch16_224", "vit_small_patch16_224.dino"])
def test_a_transformer_of_one_size_is_no_scout_and_says_so(name):
    refuses(lambda: build_model(Spec("scout", f"timm:{name}", 64)), "256 px")


# ---------------------------------------------------------------- weights in the formats of others
VIT_NAME, CLIP_NAME = "vit_small_patch16_224.dino", "vit_base_patch16_clip_224.openai"
TEXT = {"positional_embedding": 7, "text_projection": 7, "token_embedding.weight": 7, "logit_scale": 1}
DECODER = {"mask_token": 3, "decoder_pos_embed": 3, "decoder_blocks.0.norm1.weight": 3}


def trained(name=VIT_NAME, size=64, **options):
    """A network of timm by another hand: with a head of its own, and no weight that is 0 or 1."""
    torch.manual_seed(3)
    network = timm.create_model(name, img_size=size, num_classes=5, **options)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    return network.eval()


def features(network, image):
    with torch.no_grad():
        return network.forward_head(network.forward_features(image), pre_logits=True)


def others(sizes, prefix=""):
    return {prefix + key: torch.rand(size) for key, size in sizes.items()}


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def open_clip(network):
    """Weights of a CLIP as OpenCLIP names them, with its text tower."""
    names = {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1",
             "norm_pre": "ln_pre", "blocks.": "transformer.resblocks.", "norm1": "ln_1", "norm2": "ln_2",
             "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "norm.": "ln_post."}  # fmt: skip
    state = {}
    for key, value in network.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[f"visual.{key}"] = value
    state["visual.proj"] = state.pop("visual.head.weight").T
    del state["visual.head.bias"]
    state["visual.class_embedding"] = state["visual.class_embedding"].flatten()
    state["visual.positional_embedding"] = state["visual.positional_embedding"][0]
    return state | others(TEXT)


# name: (what makes the content of a file of a network, words for what is left out)
FORMATS = {
    "plain": (dict, "head"),
    "of DDP": (lambda state: under("module.", state) | {"epoch": 3}, "head"),
    "MAE": (lambda state: {"model": state | others(DECODER), "args": argparse.Namespace(lr=1.0), "epoch": 3},
            "decoder_blocks decoder_pos_embed head mask_token"),
    "DINO": (lambda state: {"student": others(TEXT), "teacher": under("backbone.", state) | others(TEXT, "head."),
                            "epoch": 3}, "head"),
    "student": (lambda state: {"student": under("module.backbone.", state) | others(TEXT, "module.head.")},
                "head module"),
    "ViT of timm in OpenCLIP": (lambda state: under("visual.trunk.", state) | others(TEXT),
                                "head logit_scale positional_embedding text_projection token_embedding"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_of_others_gives_the_features_it_gave_them(kind, tmp_path, capsys):
    network, image = trained(), torch.rand(2, 3, 64, 64)
    content, words = FORMATS[kind]
    torch.save(content(network.state_dict()), tmp_path / "w.pth")
    spec = Spec("resnet", f"timm:{VIT_NAME}", 64)
    for _ in range(2):  # folds
        found = build_model(spec, str(tmp_path / "w.pth")).backbone.eval()(image)
    assert torch.equal(found, features(network, image))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert f"left out {words}, changed nothing;" in printed
    assert "0.485" in printed


@pytest.mark.parametrize("size", [64, 96])
def test_an_open_clip_file_gives_its_image_tower_at_any_size(size, tmp_path, capsys):
    network, image = trained(CLIP_NAME), torch.rand(2, 3, 64, 64)
    torch.save(open_clip(network), tmp_path / "w.pt")
    found = build_model(Spec("resnet", f"timm:{CLIP_NAME}", size), str(tmp_path / "w.pt")).backbone.eval()
    printed = capsys.readouterr().out
    changed = "nothing" if size == 64 else "pos_embed"
    assert f"left out logit_scale positional_embedding text_projection token_embedding, changed {changed};" in printed
    assert "0.4814" in printed
    if size == 64:
        assert torch.equal(found(image), features(network, image))
    else:  # the position embedding is enlarged
        assert found(torch.rand(1, 3, 96, 96)).shape == (1, 192)
        middle = found.pos_embed[0, 1:].unflatten(0, (6, 6))[2:4, 2:4].mean(dim=(0, 1))
        before = network.pos_embed[0, 1:].unflatten(0, (4, 4))[1:3, 1:3].mean(dim=(0, 1))
        assert torch.allclose(middle, before, atol=0.1)


@pytest.mark.parametrize("kind", ["names of the file", "names of version 5", "with a prefix"])
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_large_patch16_224.mae"])
def test_dinov2_of_transformers_gives_the_class_token_it_gave(name, kind, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    patch = 14 if "14" in name else 16
    config = transformers.Dinov2Config(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, patch_size=patch,
                                       image_size=4 * patch, mlp_ratio=4)  # fmt: skip
    network, image = transformers.Dinov2Model(config).eval(), torch.rand(2, 3, 4 * patch, 4 * patch)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    path = tmp_path / "model.safetensors"
    if kind == "names of the file":
        network.save_pretrained(tmp_path)
        monkeypatch.setattr(torch, "load", None)  # the versions before 2.14 do not read it
    else:
        path = tmp_path / "w.pth"
        torch.save(under("dinov2." if "prefix" in kind else "", network.state_dict()), path)
    found = build_model(Spec("resnet", f"timm:{name}", 4 * patch), str(path)).backbone.eval()(image)
    with torch.no_grad():
        expected = network(image).last_hidden_state[:, 0]
    # without a LayerScale of its own the network has it in the layers before
    assert torch.allclose(found, expected, atol=1e-5 if "dinov2" in name else 1e-4)
    assert expected.std() > 0.1


def test_a_published_swin_is_renamed_as_timm_does(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    network, image = trained(name), torch.rand(2, 3, 64, 64)
    state = {}
    for key, value in network.state_dict().items():  # there a stage ends with what timm starts the next one with
        stage = int(key.split(".")[1]) - ("downsample" in key) if key.startswith("layers.") else 0
        rest = key.split(".", 2)[-1]
        state[f"layers.{stage}.{rest}" if key.startswith("layers.") else key.replace("head.fc", "head")] = value
    assert "layers.0.downsample.norm.weight" in state
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "w.pth")
    found = build_model(Spec("resnet", f"timm:{name}", 64), str(tmp_path / "w.pth")).backbone.eval()(image)
    assert torch.equal(found, features(network, image))


def test_a_layer_scale_that_a_network_has_not_is_multiplied_in(tmp_path):
    network, image = trained(init_values=1e-5), torch.rand(2, 3, 64, 64)  # as UNI, mSTAR
    torch.save(network.state_dict(), tmp_path / "w.bin")
    found = build_model(Spec("resnet", f"timm:{VIT_NAME}", 64), str(tmp_path / "w.bin")).backbone.eval()
    assert "ls1" not in " ".join(found.state_dict())
    assert torch.allclose(found(image), features(network, image), atol=1e-4)


def test_what_is_missing_or_not_known_is_never_silent(tmp_path):
    path, dinov2 = tmp_path / "w.pth", {"embeddings.patch_embeddings.projection.weight": torch.rand(192, 3, 16, 16),
                                        "encoder.layer.0.attention.attention.query.weight": torch.rand(192, 192)}
    state = trained().state_dict()
    unknown = {"blocks.0.attn.rel_pos": torch.rand(3)}
    for backbone, content, word in (
        (VIT_NAME, {key: value for key, value in state.items() if key != "norm.weight"}, "1 keys, first 'norm.weight'"),
        (VIT_NAME, state | unknown, "1 keys, first 'blocks.0.attn.rel_pos'"),
        (VIT_NAME, {"model": state | unknown}, "rel_pos"),
        (VIT_NAME, state | {"dist_token": torch.rand(1, 1, 192)}, "dist_token"),
        (VIT_NAME, {"epoch": 3}, "cls_token"),
        (VIT_NAME, dinov2, "w.pth does not fit"),
        ("deit_small_distilled_patch16_224", state, r"w.pth does not fit.*Error"),
        ("vit_medium_patch16_gap_240", state, "w.pth does not fit"),  # its last norm comes after the pooling
        ("convnext_tiny", state, "w.pth does not fit"),
        ("crossvit_9_dagger_240", CREATE("crossvit_9_dagger_240", **SMALLER["crossvit"]).state_dict(), "pos_embed_0"),
    ):  # fmt: skip
        torch.save(content, path)
        spec = Spec("resnet", f"timm:{backbone}", 120 if "crossvit" in backbone else 64)
        refuses(lambda spec=spec: build_model(spec, str(path)), word)


def test_a_norm_after_the_pooling_is_not_made_of_one_before(tmp_path):
    name = "vit_medium_patch16_reg1_gap_256"
    state = {key.replace("fc_norm", "norm"): value for key, value in trained(name).state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    refuses(lambda: build_model(Spec("resnet", f"timm:{name}", 64), str(tmp_path / "w.pth")), "'fc_norm.weight'")


# ---------------------------------------------------------------- sizes and licences
@pytest.mark.parametrize(("name", "size", "word"), [
    ("crossvit_9_dagger_240", 96, "96 px"), ("tnt_s_patch16_224", 8, "tnt_s"), ("vit_no", 64, "vit_no"),
])  # fmt: skip
def test_a_size_that_a_network_cannot_take_is_one_line(name, size, word):
    refuses(lambda: build_model(Spec("resnet", f"timm:{name}", size)), word)


@pytest.mark.parametrize(("name", "word"), [
    ("vit_large_patch16_224.mae", "cc-by-nc-4.0"), ("vit_small_patch16_dinov3", "dinov3-license"),
    ("swin_tiny_patch4_window7_224", "mit"), ("csatv2", "not stated by timm"),
])  # fmt: skip
def test_the_licence_of_weights_is_printed_once(name, word, capsys, monkeypatch):
    for weights in ("none", "imagenet", "imagenet"):  # all folds
        build_model(Spec("resnet", f"timm:{name}", 64), weights)
    assert capsys.readouterr().out == f"timm:{name}: weights licence {word}\n"
    plumbing.backbones.say.cache_clear()
    monkeypatch.setenv("RANK", "1")  # of torchrun
    make_backbone(f"timm:{name}", "imagenet", 64)
    assert capsys.readouterr().out == ""


def test_the_table_of_the_docs_has_a_row(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("backbones")
    words = ["--names", "crossvit_9_dagger_240", "swin_tiny_patch4_window7_224", "--sizes", "96", "240", "--no-export"]
    benchmark.main(benchmark.get_args_parser().parse_args(words))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[3:9] for row in rows[2:]] == [["240", "12 / no", "gradcam 14", "no", "no", "no"],
                                              ["all", "8 / 4", "cam 8, gradcam 8", "no", "60", "no"]]  # fmt: skip
