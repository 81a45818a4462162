"""Networks, checkpoints and prediction.

Every network is called as model(image, meta) -> logit (N, 1), with image (N, 3, S, S) either
uint8 or float in 0..1, and meta (N, M) as dataset.MetaEncoder makes it. A network normalises its
input itself, knows its parameter groups, and is rebuilt from the spec in its checkpoint.

References:
    C. Careaga, attention_guided_cropping (2020): MetaResNet and ChipNet, their learning rates.
    Guan et al., Diagnose like a Radiologist (AG-CNN), 2018: the fusion of whole image and crop.
"""

import math
import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models as tv
from torchvision.models.regnet import BlockParams, RegNet

import fsg

CHIP = 32  # pixels; the total stride of the usual backbones, so a chip becomes one embedding
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHECKPOINT_FORMAT = 1
SPEC_KINDS = {
    "model": str, "backbone": str, "image_size": int, "meta_dim": int, "hidden": int,
    "dropout": float, "gates": (str, type(None)),
}  # fmt: skip


class ModelError(ValueError):
    """A network or checkpoint that cannot be built or read; its text says what to pass instead."""


# ---------------------------------------------------------------- backbones
def regnet_tiny(num_classes: int = 1000) -> RegNet:
    """A residual network of 0.3 M parameters for CPUs: RegNet of four blocks, no groups."""
    widths = [16, 32, 64, 128]
    params = BlockParams(
        depths=[1, 1, 1, 1],
        widths=widths,
        group_widths=widths,
        bottleneck_multipliers=[1.0] * 4,
        strides=[2] * 4,
    )
    return RegNet(params, num_classes=num_classes, stem_width=widths[0])


def vit_tiny(image_size: int = 224, num_classes: int = 1000) -> tv.VisionTransformer:
    """A vision transformer of 0.5 M parameters for CPUs: 4 blocks of width 96, 16 px patches."""
    return tv.VisionTransformer(
        image_size=image_size,
        patch_size=16,
        num_layers=4,
        num_heads=3,
        hidden_dim=96,
        mlp_dim=192,
        num_classes=num_classes,
    )


SMALL_BACKBONES = {"regnet_tiny": regnet_tiny, "vit_tiny": vit_tiny}


def torchvision_backbone(name: str, weights: str, image_size: int) -> nn.Module:
    """A torchvision classification network, or one of our small ones, with its own head."""
    size = {"image_size": image_size} if name.startswith("vit_") else {}
    if name in SMALL_BACKBONES:
        if weights == "imagenet":
            raise ModelError(f"no ImageNet weights exist for {name}; pass --weights none or a file")
        return SMALL_BACKBONES[name](**size)
    known = tv.list_models(module=tv)
    if name not in known or name.startswith(("inception", "googlenet", "squeezenet")):
        raise ModelError(
            f"backbone {name!r} is not supported; take one of {', '.join(SMALL_BACKBONES)}, a "
            "torchvision classifier such as resnet18, resnet50, efficientnet_b0 or vit_b_16, or "
            "timm:NAME"
        )
    return tv.get_model(name, weights="DEFAULT" if weights == "imagenet" else None, **size)


def timm_backbone(name: str, weights: str, image_size: int) -> nn.Module:
    """A timm network, with its own head."""
    try:
        import timm
    except ImportError:
        raise ModelError("--backbone timm:NAME needs timm; pip install timm") from None
    if not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}; timm.list_models() names them")
    size = {"img_size": image_size} if "vit" in name else {}
    return timm.create_model(name, pretrained=weights == "imagenet", **size)


def load_weights(network: nn.Module, head: str, path: Path) -> None:
    """Load a state_dict, or the backbone of a checkpoint, into a backbone; only the keys of its
    head may differ."""
    state = read_torch_file(path)
    if "spec" in state:  # its gates, if any, become part of the weights
        state = fsg.fold_gates(load_checkpoint(path)[0].backbone).state_dict()
    state = state.get("state_dict", state)
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path} holds no tensors by name; save a state_dict with torch.save")
    own = network.state_dict()
    body = {key: value for key, value in state.items() if not key.startswith(head + ".")}
    wrong = [key for key in own if not key.startswith(head + ".") and key not in body]
    wrong += [key for key in body if key not in own or own[key].shape != body[key].shape]
    if wrong:
        raise ModelError(
            f"{path} does not fit the backbone: {len(wrong)} keys, first {wrong[0]!r}; pass the "
            "--backbone it was saved from"
        )
    network.load_state_dict(body, strict=False)


def build_backbone(name: str, weights: str, image_size: int, head: nn.Module) -> nn.Module:
    """A network by name whose last linear layer is replaced by `head`.

    weights: "imagenet", "none" or the path of a state_dict. Raises ModelError where the name is
    unknown or the weights cannot be had.
    """
    family, _, timm_name = name.rpartition(":")
    if family not in ("", "timm"):
        raise ModelError(f"backbone {name!r}: only the prefix 'timm:' is known")
    make = timm_backbone if family else torchvision_backbone
    try:
        network = make(timm_name, weights, image_size)
    except ModelError:
        raise
    except Exception as error:  # downloads fail in as many ways as there are networks
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"cannot make {name} with --weights {weights} ({reason}); "
            "pass --weights none or the path of a weights file"
        ) from None
    layers = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ModelError(f"backbone {name} ends in no linear layer; take another")
    if weights not in ("imagenet", "none"):
        load_weights(network, layers[-1], Path(weights))
    network.set_submodule(layers[-1], head)
    return network


# ---------------------------------------------------------------- small maps
class SmallMapConv2d(nn.Conv2d):
    """A 3 x 3 convolution, padded by zeros, that skips the zeros on maps of 1 x 1 and 2 x 2.

    There 8/9 and 5/9 of a convolution's products are with padding. What is left is one matrix
    product over the whole map. The same parameters and function as nn.Conv2d.
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "SmallMapConv2d":
        """The same convolution, sharing its parameters."""
        new = cls(
            conv.in_channels, conv.out_channels, 3, conv.stride, 1, bias=conv.bias is not None,
            device="meta",
        )  # fmt: skip
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, C, m, m) -> (N, C', ceil(m / stride), ceil(m / stride))."""
        n, _, height, width = x.shape
        if height != width or width > 2:
            return super().forward(x)
        # the part of the kernel that lies on the map, for every place of the output
        places = range(0, width, self.stride[0])
        kernel = torch.stack([
            self.weight[:, :, 1 - i : 1 - i + width, 1 - j : 1 - j + width]
            for i in places for j in places
        ])  # fmt: skip
        kernel = kernel.permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1)
        y = x.permute(0, 2, 3, 1).flatten(1) @ kernel.T  # channels_last: both are views
        y = y.view(n, len(places), len(places), self.out_channels)
        y = y if self.bias is None else y + self.bias
        return y.permute(0, 3, 1, 2)


def skip_padding(network: nn.Module) -> nn.Module:
    """Make the 3 x 3 convolutions of a network SmallMapConv2d, in place; others stay."""
    for name, module in list(network.named_modules()):
        if (
            type(module) is nn.Conv2d
            and module.kernel_size == (3, 3)
            and module.padding == (1, 1)
            and module.padding_mode == "zeros"
            and module.dilation == (1, 1)
            and module.groups == 1
            and module.stride in ((1, 1), (2, 2))
        ):
            network.set_submodule(name, SmallMapConv2d.of(module))
    return network


# ---------------------------------------------------------------- networks
class Network(nn.Module):
    """What all networks share: a backbone (N, 3, s, s) -> (N, C) and its normalisation."""

    def __init__(self, backbone: str, weights: str, image_size: int, input_size: int):
        super().__init__()
        self.backbone = build_backbone(backbone, weights, image_size, nn.Identity())
        config = getattr(self.backbone, "pretrained_cfg", {})  # timm says what it was trained on
        mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.features = self._count_features(backbone, input_size)

    @torch.no_grad()
    def _count_features(self, name: str, size: int) -> int:
        self.backbone.eval()
        try:
            shape = self.backbone(torch.zeros(1, 3, size, size)).shape
        except Exception as error:  # whatever a network says to a size it cannot take
            raise ModelError(f"backbone {name} cannot take {size} px images ({error})") from None
        finally:
            self.backbone.train()
        if len(shape) != 2:
            raise ModelError(f"backbone {name} gives {tuple(shape)}, not (N, C); take another")
        return shape[1]

    def normalise(self, image: torch.Tensor) -> torch.Tensor:
        """Bring uint8, or float in 0..1, to the distribution the backbone was trained on."""
        if image.dtype == torch.uint8:  # one new tensor, not three: on a CPU this is page faults
            return image.float().sub_(255 * self.mean).div_(255 * self.std)
        return (image - self.mean) / self.std

    def param_groups(
        self, lr: float, head_lr: float, layer_decay: float | None = None
    ) -> list[dict]:
        """Parameter groups: the backbone at `lr`, everything else but gates at `head_lr`.

        layer_decay: factor on `lr` from each layer of a ViT to the one before; the last group of
        the backbone comes first. Raises ModelError where the backbone is none.
        """
        body = fsg.weight_parameters(self.backbone)
        ids = {id(p) for p in body}
        rest = [p for p in fsg.weight_parameters(self) if id(p) not in ids]
        groups = [{"params": body, "lr": lr}]
        if layer_decay is not None:
            layers = layers_of(self.backbone, ids)
            groups = [
                {"params": layer, "lr": lr * layer_decay**above}
                for above, layer in enumerate(reversed(layers))
            ]
        return [*groups, {"params": rest, "lr": head_lr}]


def layers_of(backbone: nn.Module, ids: set[int]) -> list[list[nn.Parameter]]:
    """Parameters (those of some ids) of a ViT by layer: embeddings, blocks, what follows them."""
    layers: dict[float, list] = {}
    place = 0.0
    for name, parameter in backbone.named_parameters():
        block = re.match(r"(?:encoder\.layers\.encoder_layer_|blocks\.)(\d+)\.", name)
        if block:
            place = int(block[1]) + 1
        elif place > 0:
            place = math.inf
        if id(parameter) in ids:
            layers.setdefault(place, []).append(parameter)
    if place == 0:
        raise ModelError("--layer_decay is for ViTs of torchvision and timm; leave it out")
    return [layers[place] for place in sorted(layers)]


class MetaResNet(Network):
    """Image features and metadata features, concatenated, one linear head.

    Any backbone serves; without metadata (meta_dim 0) the second branch is absent. With several
    pictures of a case (whole image and crop) one backbone reads each, and the head reads all.
    """

    def __init__(
        self,
        backbone: str,
        weights: str,
        image_size: int,
        meta_dim: int,
        meta_hidden: int,
        dropout: float,
        pictures: int = 1,
    ):
        super().__init__(backbone, weights, image_size, input_size=image_size)
        self.meta_dim, self.pictures = meta_dim, pictures
        self.meta_branch = None
        if meta_dim:
            self.meta_branch = nn.Sequential(
                nn.Linear(meta_dim, meta_hidden),
                nn.ReLU(inplace=True),
                nn.Linear(meta_hidden, meta_hidden),
                nn.ReLU(inplace=True),
            )
        width = self.features * pictures + (meta_hidden if meta_dim else 0)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, 1))

    def forward(self, image: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        """image (N, 3 * pictures, S, S), meta (N, M) -> logit (N, 1)."""
        n, _, height, width = image.shape
        image = image.reshape(n * self.pictures, 3, height, width)
        features = self.backbone(self.normalise(image)).view(n, -1)  # (N, C * pictures)
        if self.meta_branch is not None:
            features = torch.cat([features, self.meta_branch(meta)], dim=1)
        return self.head(features)


def spatial_softmax(score: torch.Tensor) -> torch.Tensor:
    """Softmax over the cells of maps (N, h, w)."""
    return score.flatten(1).softmax(dim=1).view_as(score)


class ChipNet(Network):
    """Attention over chips that cannot see each other: says where the evidence lies.

    Chips of 32 px go through the backbone one by one; two 3x3 convolutions over their grid of
    embeddings and a softmax weigh them; the weighted sum is classified. Metadata is not used.
    """

    shifts = 1  # 2: attention of chips that overlap by half, on a grid twice as fine

    def __init__(
        self, backbone: str, weights: str, image_size: int, attention_hidden: int, dropout: float
    ):
        if image_size % CHIP:
            raise ModelError(f"ChipNet needs a multiple of {CHIP} px, not {image_size}")
        super().__init__(backbone, weights, image_size, input_size=CHIP)
        skip_padding(self.backbone)  # a chip ends as a map of one pixel
        self.scorer = nn.Sequential(
            nn.Dropout2d(dropout),
            nn.Conv2d(self.features, attention_hidden, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(attention_hidden),
            nn.Conv2d(attention_hidden, 1, 3, padding=1),
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.features, 1))

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """image (N, 3, S, S) -> one embedding per chip (N, C, h, w) with h = w = S / 32."""
        n, grid = len(image), image.shape[-1] // CHIP
        # cut while the pixels are bytes, and into the channels-last layout that convolutions like
        chips = image.unflatten(3, (grid, CHIP)).unflatten(2, (grid, CHIP))
        chips = chips.permute(0, 2, 4, 3, 5, 1).reshape(-1, CHIP, CHIP, 3).permute(0, 3, 1, 2)
        embedding = self.backbone(self.normalise(chips))  # (N * h * w, C)
        return embedding.view(n, grid, grid, -1).permute(0, 3, 1, 2)

    def weigh(self, embedding: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, C, h, w) -> attention (N, h, w), positive, sums to 1."""
        return spatial_softmax(self.scorer(embedding).squeeze(1))

    def fine_attention(self, image: torch.Tensor) -> torch.Tensor:
        """image (N, 3, S, S) -> attention (N, 2h, 2w) of chips that overlap by half.

        The chips of four grids, shifted by half a chip, lie centred on 8 + 16 i pixels; their
        scores are interleaved before one softmax.
        """
        half = CHIP // 2
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        padded = F.pad(image, (half // 2,) * 4, mode="reflect")
        rows = []
        for y in (0, half):
            row = []
            for x in (0, half):
                shifted = padded[..., y : y + image.shape[-2], x : x + image.shape[-1]]
                row.append(self.scorer(self.embed(shifted)).squeeze(1))
            rows.append(torch.stack(row, dim=-1).flatten(2))  # (N, h, 2w)
        return spatial_softmax(torch.stack(rows, dim=2).flatten(1, 2))

    def attention(self, image: torch.Tensor, views: int = 1) -> torch.Tensor:
        """Attention averaged over the first `views` symmetries of the square, positive, sums to 1:
        (N, h, w), or (N, 2h, 2w) with self.shifts 2."""
        maps = []
        for view in range(views):
            turned = dihedral(image, view)
            fine = self.shifts == 2
            attention = self.fine_attention(turned) if fine else self.weigh(self.embed(turned))
            maps.append(dihedral(attention, view, inverse=True))
        return torch.stack(maps).mean(dim=0)

    def forward(self, image: torch.Tensor, meta: torch.Tensor, with_attention: bool = False):
        """image (N, 3, S, S) -> logit (N, 1), and on demand the attention (N, h, w) behind it."""
        embedding = self.embed(image)
        attention = self.weigh(embedding)
        logit = self.head((embedding * attention.unsqueeze(1)).sum(dim=(2, 3)))
        return (logit, attention) if with_attention else logit


@dataclass(frozen=True)
class Recipe:
    """How a name of --model is built and, unless flags say otherwise, trained."""

    network: type[Network]
    backbone: str
    lr: float  # of the backbone
    head_lr: float  # of everything else
    hidden: int  # width of the metadata branch or of the attention
    gated: bool = False
    inputs: tuple[str, ...] = ("whole",)  # pictures it sees: the whole image, the crop of crop.py


MODELS = {
    "resnet": Recipe(MetaResNet, "resnet50", 1e-5, 5e-5, 256),
    "chipnet": Recipe(ChipNet, "resnet50", 5e-5, 1e-4, 512),
    "cropnet": Recipe(MetaResNet, "resnet50", 1e-5, 5e-5, 256, inputs=("crop",)),
    "fusion": Recipe(MetaResNet, "resnet50", 1e-5, 5e-5, 256, inputs=("whole", "crop")),
    "fsg_vit": Recipe(MetaResNet, "vit_b_16", 1e-5, 5e-5, 256, gated=True),
}


def build_model(spec: dict, weights: str = "none") -> Network:
    """Build a network from its spec: model, backbone, image_size, meta_dim, hidden, dropout, gates.

    Raises ModelError where the parts do not fit together.
    """
    recipe = MODELS[spec["model"]]
    make = partial(recipe.network, spec["backbone"], weights, spec["image_size"])
    if recipe.network is ChipNet:
        model = make(attention_hidden=spec["hidden"], dropout=spec["dropout"])
    else:
        model = make(
            spec["meta_dim"],
            meta_hidden=spec["hidden"],
            dropout=spec["dropout"],
            pictures=len(recipe.inputs),
        )
    if spec["gates"] is not None:
        try:
            hard = spec["gates"] == "hard"
            fsg.add_gates(model.backbone, init="identity" if hard else spec["gates"], hard=hard)
        except ValueError as error:
            raise ModelError(str(error)) from None
    return model.to(memory_format=torch.channels_last)  # faster convolutions, the same function


# ---------------------------------------------------------------- checkpoints
def read_torch_file(path: Path) -> dict:
    """Read a file of plain types and tensors; nothing in it is ever executed."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of files that torch did not write
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; check its name, or train first") from None
    except Exception:  # torch raises as many types as there are ways to break a file
        raise ModelError(
            f"{path} is not a file of plain weights, or is cut off; save a state_dict with "
            "torch.save, or copy the file again"
        ) from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ModelError(f"{path} holds a {kind}; save weights by name, a state_dict")
    return content


def save_checkpoint(path: Path, model: Network, spec: dict, **extra) -> None:
    """Save a network with its spec and further plain values; `path` is replaced when complete."""
    temporary = path.with_name(path.name + ".tmp")
    content = {"format": CHECKPOINT_FORMAT, "spec": spec, "state_dict": model.state_dict(), **extra}
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # torch's word for a full disk too
        raise ModelError(f"{path} cannot be written; is the disk full? ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[Network, dict]:
    """Rebuild a network from its checkpoint: (model in eval mode, everything saved with it).

    Raises ModelError where the file is no checkpoint of this project.
    """
    content = read_torch_file(path)
    found, spec = content.get("format"), content.get("spec")
    if not isinstance(found, int):
        raise ModelError(f"{path} is no checkpoint of train.py; pass one, or train again")
    if found != CHECKPOINT_FORMAT:
        raise ModelError(
            f"{path} has checkpoint format {found} and this version reads {CHECKPOINT_FORMAT}; "
            "train again, or use the version that wrote it"
        )
    try:
        known = isinstance(spec, dict) and spec.get("model") in MODELS
        if not known or not all(isinstance(spec[key], kind) for key, kind in SPEC_KINDS.items()):
            raise ValueError(f"its spec is {spec}")
        model = build_model(spec)
        model.load_state_dict(content["state_dict"])
    except Exception as error:  # whatever a foreign spec or state leads to
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{path} does not fit its own spec ({reason}); copy it again or train again"
        ) from None
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise ModelError(f"{path} holds weights that are NaN or infinite; train again")
    return model.to(device).eval(), content


def fold_batchnorms(network: nn.Module) -> nn.Module:
    """Multiply every batch norm of an eval network into the convolution before it, in place.

    The same function in fewer passes over memory. What torch.fx cannot trace stays as it is.
    """

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Conv2d) or super().is_leaf_module(module, name)

    modules = dict(network.named_modules())
    try:
        nodes = [node for node in Tracer().trace(network).nodes if node.op == "call_module"]
    except Exception:  # fx raises whatever a network does with what is no tensor
        return network
    calls = Counter(node.target for node in nodes)
    for node in nodes:
        norm, before = modules[node.target], node.args[0]
        if type(norm) is not nn.BatchNorm2d or before.op != "call_module":
            continue
        conv = modules[before.target]
        alone = len(before.users) == calls[node.target] == calls[before.target] == 1
        if alone and isinstance(conv, nn.Conv2d):
            network.set_submodule(before.target, fuse_conv_bn_eval(conv, norm))
            network.set_submodule(node.target, nn.Identity())
    return network


def load_for_prediction(path: Path, device: torch.device | str = "cpu") -> tuple[Network, dict]:
    """load_checkpoint, with gates and batch norms multiplied into the layers before them."""
    network, content = load_checkpoint(path, device)
    network.backbone = fold_batchnorms(fsg.fold_gates(network.backbone))
    return network, content


def load_fold(run_dir: Path, fold: int, spec: dict, device: torch.device | str) -> tuple:
    """load_for_prediction of a run's fold; spec: of the run, in its config.json.

    Raises ModelError where the file is of another fold, which may have seen what this one held
    out, or of another network.
    """
    path = run_dir / f"fold{fold}_best.pt"
    network, content = load_for_prediction(path, device)
    own = content["spec"]
    same = all(own[key] == spec.get(key) for key in SPEC_KINDS if key != "meta_dim")
    if content.get("fold") != fold or not same:
        raise ModelError(
            f"{path} is of another run or fold; put the right file in its place or train again"
        )
    return network, content


# ---------------------------------------------------------------- prediction
def dihedral(x: torch.Tensor, view: int, inverse: bool = False) -> torch.Tensor:
    """One of the 8 symmetries of the square on (..., S, S): two flips and a transposition.

    View 0 is the identity; 0..1 add the horizontal, 0..3 the vertical flip, 0..7 all of them.
    """
    flips = [dim for dim, bit in ((-1, 1), (-2, 2)) if view & bit]
    if view & 4 and inverse:
        x = x.transpose(-1, -2)
    x = x.flip(flips) if flips else x
    if view & 4 and not inverse:
        x = x.transpose(-1, -2)
    return x


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" takes CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        found = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()]
        name = found[0] if found else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"--device {name} cannot be used ({reason}); pass cpu") from None
    return torch.device(name)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision: amp is "off", "bf16" or "fp16"."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


@torch.inference_mode()
def predict(model: Network, loader, device: torch.device, tta: int = 1, amp: str = "off"):
    """Probability of every image of a loader, averaged over `tta` symmetries: float64 (N,)."""
    model.eval()
    probs = []
    for image, meta, _ in loader:
        image, meta = image.to(device), meta.to(device)
        with autocast(device, amp):
            views = [model(dihedral(image, view), meta) for view in range(tta)]
        logit = torch.stack(views).float().cpu().double()  # MPS knows no double
        probs.append(logit.sigmoid().mean(dim=0).squeeze(1).numpy())
    return np.concatenate(probs)
