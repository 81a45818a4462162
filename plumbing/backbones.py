"""Backbones by name: torchvision's, timm's, three small ones for CPUs, and their weights from files."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
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
    """A timm network, with its own head."""
    import timm

    size = {"img_size": image_size} if "vit" in name else {}
    return timm.create_model(name, pretrained=pretrained, **size)


FAMILIES: dict[str, Callable] = {"": torchvision_backbone, "timm": timm_backbone}  # by the prefix before the colon


def make_backbone(name: str, weights: str, image_size: int) -> tuple[nn.Module, str]:
    """A network by name, and the name of its last linear layer, the head. weights: "imagenet", or anything else for
    random ones. Raises InputError if the name is unknown or the weights cannot be had."""
    family, _, plain = name.rpartition(":")
    try:
        network = FAMILIES[family](plain, weights == "imagenet", image_size)
        return network, [key for key, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    except InputError:
        raise
    except Exception as error:  # an unknown name, a package or a download that fails, no linear layer
        raise InputError(
            f"cannot make {name} with --weights {weights} ({type(error).__name__}: {str(error)[:200]}); pass --weights "
            "none or a file of weights, or another --backbone (timm:NAME needs timm)"
        ) from None


def read_torch_file(path: Path) -> dict:
    """Read a file of plain types and tensors; nothing in it is ever executed."""
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception:  # torch raises as many types as there are ways to break a file
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no plain weights by name, or is cut off; save a state_dict, or copy it again")
    return content


def load_backbone(network: nn.Module, head: str, state: dict, path: Path) -> None:
    """Load a state_dict into a backbone; only the keys of its head may differ. Raises InputError otherwise."""
    state = state.get("state_dict", state)
    own, in_head = network.state_dict(), f"{head}."
    body = {key: value for key, value in state.items() if not str(key).startswith(in_head)}
    wrong = [key for key in own if not key.startswith(in_head) and key not in body]
    wrong += [key for key, value in body.items() if key not in own or own[key].shape != getattr(value, "shape", None)]
    if wrong:
        raise InputError(f"{path} does not fit the backbone: {len(wrong)} keys, first {wrong[0]!r}; pass another")
    network.load_state_dict(body, strict=False)


# ---------------------------------------------------------------- what a backbone makes on its way
def run_backbone(network: nn.Module, names: list[str], forward: Callable) -> tuple:
    """(what forward() returns, outputs of the named modules of network.backbone by name, the last to finish last)."""
    outputs: dict[str, torch.Tensor] = {}

    def record(name: str):
        def hook(module, inputs, output):
            outputs.pop(name, None)
            outputs[name] = output

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
    names = [name for name, _ in network.backbone.named_modules() if name]
    _, outputs = run_backbone(network, names, lambda: network.backbone(network.normalise(image[:1])))
    found: dict[int, str] = {}
    for name, output in outputs.items():
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[-1] == output.shape[-2] > 1:
            stride = round(image.shape[-1] / output.shape[-1])
            if stride not in found or name.count(".") <= found[stride].count("."):
                found[stride] = name
    if not set(needed) <= found.keys():  # a transformer has one stride only
        words = ", ".join(map(str, needed))
        raise InputError(f"maps need a convolutional backbone with strides {words}, such as resnet50; pass another")
    return found
