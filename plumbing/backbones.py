"""Backbones by name: torchvision's, timm's, three small ones for CPUs, and their weights from files, also those of
others (docs/backbones.md)."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torchvision import models as tv
from torchvision.models.regnet import BlockParams, RegNet

from util import InputError


def regnet_tiny(num_classes: int = 1000) -> RegNet:
    """A residual network of 0.3 M parameters for CPUs: RegNet of four blocks, no groups."""
    widths = [16, 32, 64, 128]
    ones = [1, 1, 1, 1]
    params = BlockParams(
        depths=ones, widths=widths, group_widths=widths, bottleneck_multipliers=[1.0] * 4, strides=[2] * 4
    )
    return RegNet(params, num_classes=num_classes, stem_width=widths[0])


def vit_tiny(image_size: int = 224, num_classes: int = 1000) -> tv.VisionTransformer:
    """A vision transformer of 0.5 M parameters for CPUs: 4 blocks of width 96, 16 px patches."""
    return tv.VisionTransformer(
        image_size=image_size, patch_size=16, num_layers=4, num_heads=3, hidden_dim=96, mlp_dim=192,
        num_classes=num_classes,
    )  # fmt: skip


def conv_tiny(num_classes: int = 1000) -> nn.Sequential:
    """Three convolutions with 30,000 parameters for tiles of about 32 px, all of whose places it tells apart."""
    layers = [nn.Conv2d(3, 32, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
    for before, after in ((32, 32), (32, 64)):
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers += [convolution, nn.MaxPool2d(2), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * 64, num_classes))


SMALL_BACKBONES: dict[str, Callable] = {"regnet_tiny": regnet_tiny, "vit_tiny": vit_tiny, "conv_tiny": conv_tiny}


def torchvision_backbone(name: str, pretrained: bool, image_size: int) -> nn.Module:
    """A torchvision classification network, or one of our small ones, with its own head."""
    size = {"image_size": image_size} if name.startswith("vit_") else {}
    if name in SMALL_BACKBONES and not pretrained:
        return SMALL_BACKBONES[name](**size)
    if name not in tv.list_models(module=tv) or name.startswith(("inception", "googlenet", "squeezenet")):
        raise InputError(
            f"backbone {name!r} is unknown or has no ImageNet weights; take a torchvision classifier such as resnet50, "
            f"timm:NAME, or with --weights none {' or '.join(SMALL_BACKBONES)}"
        )
    return tv.get_model(name, weights="DEFAULT" if pretrained else None, **size)


def timm_backbone(name: str, pretrained: bool, image_size: int) -> nn.Module:
    """A timm network with a head, made for a size of images where timm makes it for one."""
    import timm

    size = {"img_size": image_size} if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False) else {}
    return timm.create_model(name, pretrained=pretrained, num_classes=1000, **size)


FAMILIES: dict[str, Callable] = {"": torchvision_backbone, "timm": timm_backbone}  # by the prefix before the colon


def heads_of(network: nn.Module) -> list[str]:
    """Names of the layers of a network's head: as timm says, elsewhere the last linear layer."""
    if not hasattr(network, "pretrained_cfg"):
        return [key for key, module in network.named_modules() if isinstance(module, nn.Linear)][-1:]
    names = network.pretrained_cfg["classifier"]
    return [names] if isinstance(names, str) else list(names)


def drop_head(network: nn.Module, head: str) -> None:
    """Take the head off a network, in place: it then makes features (N, C)."""
    if hasattr(network, "reset_classifier"):
        network.reset_classifier(0)  # timm's: some have several heads
    else:
        network.set_submodule(head, nn.Identity())


@cache
def say(line: str) -> None:
    """Print a line, once: backbones are made for every fold, and by every process of torchrun."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def make_backbone(name: str, weights: str, image_size: int) -> tuple[nn.Module, str]:
    """A network by name, and the name of its head. weights: "imagenet", of which the licence is printed, or anything
    else for random ones. Raises InputError if the name is unknown or the weights cannot be had."""
    family, _, plain = name.rpartition(":")
    try:
        network = FAMILIES[family](plain, weights == "imagenet", image_size)
        if weights == "imagenet" and family == "timm":
            say(f"{name}: weights licence {network.pretrained_cfg.get('license') or 'not stated by timm'}")
        return network, heads_of(network)[0]
    except InputError:
        raise
    except Exception as error:  # an unknown name, a package or a download that fails, no linear layer
        raise InputError(
            f"cannot make {name} with --weights {weights} ({type(error).__name__}: {str(error)[:200]}); pass --weights "
            "none or a file of weights, or another --backbone (timm:NAME needs timm)"
        ) from None


def read_torch_file(path: Path) -> dict:
    """Read a file of plain types and tensors, of torch or safetensors; nothing in it is ever executed."""
    try:
        if path.suffix == ".safetensors":
            if find_spec("safetensors") is None:
                raise InputError(f"{path} needs the package safetensors; pip install safetensors")
            from safetensors.torch import load_file

            return load_file(path)
        # what training codes such as MAE's keep beside the weights
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, InputError):
        raise
    except Exception:  # torch raises as many types as there are ways to break a file
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no plain weights by name, or is cut off; save a state_dict, or copy it again")
    return content


# ---------------------------------------------------------------- weights in the formats of others
# where a file keeps its weights; of several the first: averages before what was averaged, teachers before students
WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model", "student")
# names of transformers (Dinov2Model, before and since its fifth version) and of timm
TRANSFORMERS = (
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.", ""), ("encoder.layer.", "blocks."), ("layernorm.", "norm."), ("lambda1", "gamma"),
    ("layer_scale", "ls"), ("attention.attention.", "attn."), ("attention.output.dense", "attn.proj"),
    ("attention.", "attn."), ("query.", "q_proj."), ("key.", "k_proj."), ("value.", "v_proj."), ("o_proj.", "proj."),
    ("weights_in.", "w12."), ("weights_out.", "w3."),
)  # fmt: skip


def from_transformers(state: dict) -> dict:
    """The state_dict of a Dinov2Model of transformers by the names of timm, with query, key and value in one."""
    named = {}
    for key, value in state.items():
        for old, new in TRANSFORMERS:
            key = key.replace(old, new)
        named[key] = value
    for key in [key for key in named if "attn.q_proj" in key]:
        parts = [named.pop(key.replace("q_proj", f"{one}_proj")) for one in "qkv"]
        named[key.replace("q_proj", "qkv")] = torch.cat(parts)
    return named


def as_timm(network: nn.Module, state: dict) -> dict:
    """A state_dict of others by the names and in the sizes of a timm network, as timm itself converts its sources. A
    LayerScale that the network has not is multiplied into the layers before it."""
    import timm

    module = sys.modules[timm.models.model_entrypoint(network.pretrained_cfg["architecture"]).__module__]
    convert, own = getattr(module, "checkpoint_filter_fn", lambda state, network: state), network.state_dict()
    state = dict(convert(dict(state), network))
    for key in [key for key in state if key.endswith((".ls1.gamma", ".ls2.gamma")) and key not in own]:
        layer, scale = key.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2"), state.pop(key)
        state[f"{layer}.weight"] = state[f"{layer}.weight"] * scale[:, None]
        state[f"{layer}.bias"] = state[f"{layer}.bias"] * scale
    return state


def storage_of(value: torch.Tensor) -> int:
    """Where a tensor's values lie: the same for all views of them."""
    return value.untyped_storage().data_ptr()


def load_backbone(network: nn.Module, head: str, state: dict, path: Path) -> str:
    """Load a state_dict, or the content of a file that has one, into a backbone; of the file only a head, a decoder and
    networks beside the backbone may be left out. Returns in words what was left out, and what was not loaded as it is
    but resized or multiplied. Raises InputError if anything else differs."""
    for wrapper in WRAPPERS:
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    state = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    own, heads = network.state_dict(), tuple(f"{name}." for name in {head, *heads_of(network)})
    try:
        if any("embeddings.patch_embeddings.projection" in key for key in state):
            state = from_transformers(state)
        first = next(iter(own))
        ends = [key for key in state if key.endswith(f".{first}")]  # of "module.", "backbone.", "visual.trunk."
        prefix = ends[0].removesuffix(first) if ends and first not in state else ""
        given = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        given = as_timm(network, given) if hasattr(network, "pretrained_cfg") else given
        given = {key: value for key, value in given.items() if not key.startswith((*heads, "decoder"))}
        wrong = [key for key in own if not key.startswith(heads) and key not in given]
        wrong += [key for key, value in given.items() if key not in own or own[key].shape != value.shape]
    except Exception as error:  # whatever timm meets in a file that is not what it takes it for
        raise InputError(f"{path} does not fit the backbone ({type(error).__name__}: {error}); pass another") from None
    if wrong:
        raise InputError(f"{path} does not fit the backbone: {len(wrong)} keys, first {wrong[0]!r}; pass another")
    network.load_state_dict(given, strict=False)
    parts = {key: key.removeprefix(prefix).partition(".")[0] for key in state}
    before, after = ({storage_of(value) for value in each.values()} for each in (state, given))
    used = {parts[key] for key, value in state.items()
            if key.removeprefix(prefix) in given or storage_of(value) in after}  # fmt: skip
    changed = {key.partition(".")[0] for key, value in given.items() if storage_of(value) not in before}
    said = {"left out": set(parts.values()) - used, "changed": changed}
    return ", ".join(f"{word} {' '.join(sorted(names)) or 'nothing'}" for word, names in said.items())


# ---------------------------------------------------------------- what a backbone makes on its way
def run_backbone(network: nn.Module, names: list[str], forward: Callable) -> tuple:
    """(what forward() returns, outputs of the named modules of network.backbone by name, the last to finish last).
    Maps (N, h, w, C), as Swin makes them, become (N, C, h, w)."""
    outputs: dict[str, torch.Tensor] = {}
    nhwc = getattr(network.backbone, "output_fmt", "") == "NHWC"  # of timm

    def record(name: str):
        def hook(module, inputs, output):
            outputs.pop(name, None)
            shape = output.shape if isinstance(output, torch.Tensor) else ()
            turned = len(shape) == 4 and shape[1] == shape[2] and (shape[2] != shape[3] or nhwc)
            outputs[name] = output.permute(0, 3, 1, 2) if turned else output
            return outputs[name].permute(0, 2, 3, 1) if turned else None  # what follows depends on what is recorded

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(network.backbone.get_submodule(name).register_forward_hook(record(name)))
        result = forward()
    return result, outputs


def find_stages(network: nn.Module, image: torch.Tensor, needed: tuple[int, ...]) -> dict[int, str]:
    """Names of the modules of network.backbone that end a stage, by their stride. Of all modules with an output (N, C,
    S / stride, S / stride), the least nested and of those the last: the output of a stage, not of a layer inside one of
    its blocks. Raises InputError if one of the strides needed is missing."""
    attention = (nn.Softmax, nn.Dropout)  # of heads and tokens may look like a map
    names = [name for name, module in network.backbone.named_modules() if name and not isinstance(module, attention)]
    try:
        _, outputs = run_backbone(network, names, lambda: network.backbone(network.normalise(image[:1])))
    except Exception as error:  # whatever a network says to a size that it was not made for
        raise InputError(f"the backbone takes no images of {image.shape[-1]} px ({error}); pass another") from None
    found: dict[int, str] = {}
    for name, output in outputs.items():
        if getattr(output, "ndim", 0) == 4 and len(output) == 1 and output.shape[-1] == output.shape[-2] > 1:
            stride = round(image.shape[-1] / output.shape[-1])
            if stride not in found or name.count(".") <= found[stride].count("."):
                found[stride] = name
    if not set(needed) <= found.keys():  # a transformer has one stride only
        words = ", ".join(map(str, needed))
        raise InputError(f"maps need a convolutional backbone with strides {words}, such as resnet50; pass another")
    return found
