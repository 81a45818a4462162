"""What in a picture speaks for which output of a trained network.

    logit, found = Cam(network).explain(image, every)       # (N, K), (N, K, h, w)

A map covers what the network sees. Its values are signed and never scaled to a range, so that a map can say nothing.
Four ways, of which each serves some networks:

    attention   ChipNet and scout: attention times each cell's share in the linearised logit
    cam         networks that end in pooling and one linear layer: that layer at every cell, all outputs in one pass
    gradcam     any layer whose output is a map or tokens: mean gradient times activation, a backward pass per output
    rollout     vision transformers: how attention mixes the patches up to the last block; the same for all outputs

A new way is a subclass of Explainer and a row of WAYS.

References:
    Zhou et al., Learning Deep Features for Discriminative Localization (CAM), CVPR 2016.
    Selvaraju et al., Grad-CAM, ICCV 2017, equations 1 and 2.
    Abnar, Zuidema, Quantifying Attention Flow in Transformers, ACL 2020: rollout.
    Pang et al., Rethinking Feature Extraction: Gradient-Based Localized Feature Extraction for End-to-End Surgical
    Downstream Tasks, RA-L 2022: maps of all predicted classes of a frame.
"""

import math
import re
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import fsg
from models import mean_over_views
from plumbing.backbones import find_stages, run_backbone
from util import InputError

TOLERANCE = 1e-3  # relative, by which pooled features may differ from the mean of the last map


def every(logit: torch.Tensor) -> torch.Tensor:
    """Each output by itself, as shares (N, K, K) for Explainer.explain."""
    return torch.eye(logit.shape[1], device=logit.device).expand(len(logit), -1, -1)


def normalised(score: torch.Tensor) -> torch.Tensor:
    """Maps (N, h, w), not negative, scaled to sum 1; a map of zeros becomes uniform."""
    score = score + torch.finfo(torch.float32).tiny
    return score / score.sum(dim=(1, 2), keepdim=True)


class Explainer:
    """Maps of a trained network in eval mode. meta: encoded (1, M), used where explain is given none; evidence: the
    mixture of outputs that `attention` explains, logit (N, K) -> (N, K), as tasks.Task.evidence; layer: a module of the
    backbone whose output is explained, for ways that can choose."""

    def __init__(self, network: nn.Module, meta: np.ndarray | None = None, evidence: Callable = torch.ones_like,
                 layer: str | None = None):  # fmt: skip
        self.network, self.evidence, self.layer = network, evidence, layer
        self.meta = torch.zeros(1, 0) if meta is None else torch.from_numpy(meta)

    def explain(self, image, shares: Callable = every, meta: torch.Tensor | None = None) -> tuple:
        """image uint8 (N, 3, S, S), or a scout's cells -> logit (N, K), maps (N, C, h, w) of what speaks for the C
        mixtures shares(logit) (N, C, K) of the outputs. Raises InputError if the network has no such maps."""
        raise NotImplementedError

    def forward(self, image, meta: torch.Tensor | None, names: list[str]) -> tuple[torch.Tensor, dict]:
        """Logit (N, K), and outputs of modules of the backbone by name ("": the backbone's own)."""
        meta = self.meta if meta is None else meta
        meta = meta.to(image.device).expand(len(image), -1)
        return run_backbone(self.network, names, lambda: self.network(image, meta))

    def attention(self, image, views: int = 1) -> torch.Tensor:
        """Where there is evidence for or against (N, h, w), positive, sums to 1: |map - its median|."""

        def attend(image) -> torch.Tensor:
            found = self.explain(image, lambda logit: self.evidence(logit).unsqueeze(1))[1].squeeze(1)
            median = found.flatten(1).median(dim=1).values[:, None, None]
            return normalised((found - median).abs())

        return mean_over_views(attend, image, views)


class Cam(Explainer):
    """The linear layer at every cell of the last map instead of at their mean: in one forward pass the Grad-CAM of all
    outputs. A map adds up to its logit less what bias and metadata contribute."""

    def explain(self, image, shares: Callable = every, meta: torch.Tensor | None = None) -> tuple:
        """As of Explainer; (N, C, h, w) of the last feature map."""
        if self.layer is None:
            self.layer = last_stage(self.network, image)
        logit, outputs = self.forward(image, meta, [self.layer, ""])
        if not is_pooled(self.network, outputs[self.layer], outputs[""]):
            raise InputError("cam needs a network that ends in pooling and one linear layer; take gradcam")
        maps = outputs[self.layer]
        weight = shares(logit).to(maps.dtype) @ self.network.head[-1].weight[:, : maps.shape[1]].to(maps.dtype)
        return logit, torch.einsum("nfhw,ncf->nchw", maps, weight) / maps[0, 0].numel()


class GradCam(Explainer):
    """Gradient of an output on a layer, averaged over the cells, times the layer's output, summed over its channels; a
    backward pass for each mixture, of all images of a batch. The default layer is the last map of a CNN, or of a
    transformer the last tokens of patches that reach its features: before a class token's last attention."""

    def explain(self, image, shares: Callable = every, meta: torch.Tensor | None = None) -> tuple:
        """As of Explainer; (N, C, h, w) of the layer."""
        if self.layer is None:
            self.layer = default_layer(self.network, image)
        if self.layer not in dict(self.network.backbone.named_modules()):
            raise InputError(f"--layer {self.layer}: the backbone has no such module; its last map is "
                             f"{default_layer(self.network, image)}")  # fmt: skip
        found = []
        with torch.enable_grad():
            logit, outputs = self.forward(image, meta, [self.layer])
            output = outputs.get(self.layer)  # of a module that is never called: none
            as_map(self.network.backbone, output)
            wanted = (shares(logit.detach()) * logit.unsqueeze(1)).sum(dim=(0, 2))  # (C,)
            for k, one in enumerate(wanted):
                (gradient,) = torch.autograd.grad(one, output, retain_graph=k + 1 < len(wanted))
                values, slope = (as_map(self.network.backbone, x) for x in (output.detach(), gradient))
                found.append((slope.mean(dim=(2, 3), keepdim=True) * values).sum(dim=1))
        return logit.detach(), torch.stack(found, dim=1)


class ClassAttention(Explainer):
    """A ChipNet's or a scout's attention, times what each chip or cell adds to the logit, linearised at what the
    network has pooled."""

    def explain(self, image, shares: Callable = every, meta: torch.Tensor | None = None) -> tuple:
        """As of Explainer; (N, C, h, w) of chips or cells."""
        embedding, attention = self.network.take_in(image)  # (N, B, D), (N, H, B)
        pooled = (attention.to(embedding.dtype) @ embedding).detach()
        found = []
        with torch.enable_grad():
            logit = self.network.answer(pooled.requires_grad_())
            wanted = (shares(logit.detach()) * logit.unsqueeze(1)).sum(dim=(0, 2))
            for k, one in enumerate(wanted):
                (gradient,) = torch.autograd.grad(one, pooled, retain_graph=k + 1 < len(wanted))
                share = torch.einsum("nbd,nhd->nhb", embedding, gradient.to(embedding.dtype))
                found.append(self.network.on_map((attention * share).sum(dim=1).detach(), image))
        return logit.detach(), torch.stack(found, dim=1)

    def attention(self, image, views: int = 1) -> torch.Tensor:
        """The network's own attention (N, h, w), weighted by how much a chip speaks for the evidence, if positive."""

        def share(image) -> torch.Tensor:
            speaks = self.explain(image, lambda logit: self.evidence(logit).unsqueeze(1))[1].squeeze(1).clamp_min(0)
            looked = self.network.on_map(self.network.take_in(image)[1].mean(dim=1), image)
            return normalised(speaks / looked.clamp_min(torch.finfo(torch.float32).tiny))

        maps = self.network.attention(image, views)
        fine = F.interpolate(mean_over_views(share, image, views).unsqueeze(1), size=maps.shape[-2:], mode="bilinear")
        return normalised(maps * fine.squeeze(1))


class Rollout(Explainer):
    """How much of each patch reaches the class token, or the mean over tokens: the product over the blocks of the mean
    attention of their heads, to which the identity is added for the skip. A gated block's attention counts by its mean
    gate. timm's attention is not fused meanwhile, torchvision's is computed again from the blocks' inputs."""

    def explain(self, image, shares: Callable = every, meta: torch.Tensor | None = None) -> tuple:
        """As of Explainer; (N, C, h, w) of patches, C times the same map, positive."""
        backbone, mixed = self.network.backbone, None
        blocks = attention_modules(backbone)
        if not blocks:
            raise InputError("rollout needs a vision transformer such as vit_b_16; take cam or gradcam")

        def mix(module: nn.Module, attention: torch.Tensor) -> None:
            nonlocal mixed
            gates = [fsg.gate_of(part).mean() for part in module.modules() if hasattr(part, fsg.GATE)]
            gate = gates[0] if gates else 1.0
            step = (gate * attention + torch.eye(attention.shape[-1], device=attention.device)) / (gate + 1)
            mixed = step if mixed is None else step @ mixed

        def listen(module: nn.Module):
            if isinstance(module, nn.MultiheadAttention):
                return module.register_forward_pre_hook(lambda _, seen: mix(module, mean_attention(module, seen[0])))
            return module.attn_drop.register_forward_pre_hook(lambda _, seen: mix(module, seen[0].mean(dim=1)))

        fused = [module for module in blocks.values() if hasattr(module, "fused_attn")]
        with ExitStack() as hooks, torch.no_grad(), fsg.switched_off("fused_attn", fused):
            for module in blocks.values():
                hooks.enter_context(listen(module))
            logit, _ = self.forward(image, meta, [])
        prefix = prefix_of(backbone)
        pooled = getattr(backbone, "global_pool", "token")  # of timm
        reached = mixed[:, 0] if prefix and pooled == "token" else mixed[:, prefix:].mean(dim=1)
        patches = as_map(backbone, reached.unsqueeze(2))
        return logit, patches.expand(-1, shares(logit).shape[1], -1, -1)

    def attention(self, image, views: int = 1) -> torch.Tensor:
        """The map itself (N, h, w), sums to 1."""
        return mean_over_views(lambda turned: normalised(self.explain(turned)[1][:, 0]), image, views)


WAYS = {"attention": ClassAttention, "cam": Cam, "gradcam": GradCam, "rollout": Rollout}


def default_way(network: nn.Module, size: int) -> str:
    """The way that suits a network of images of `size` pixels, by a look at an empty one."""
    if hasattr(network, "take_in"):
        return "attention"
    backbone = network.backbone
    if attention_modules(backbone):
        return "rollout"
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=next(network.parameters()).device)
    try:
        layer = last_stage(network, image)
    except InputError:
        return "gradcam"
    pooled, outputs = run_backbone(network, [layer], lambda: backbone(network.normalise(image)))
    return "cam" if is_pooled(network, outputs[layer], pooled) else "gradcam"


def choose_way(way: str | None, network: nn.Module, size: int) -> str:
    """The way asked for, or the default; raises InputError if it is not for such a network."""
    if way is None:
        return default_way(network, size)
    if (way == "attention") != hasattr(network, "take_in"):
        raise InputError(f"maps by {way} are not for this network; pass {default_way(network, size)}")
    return way


# ---------------------------------------------------------------- layers
def is_pooled(network: nn.Module, maps: torch.Tensor, pooled: torch.Tensor) -> bool:
    """Whether features (N, F) are the means of maps (N, F, h, w), and one linear layer makes the logit of them."""
    alike = maps.shape[:2] == pooled.shape and torch.allclose(maps.mean(dim=(2, 3)), pooled, TOLERANCE, 1e-5)
    return alike and isinstance(network.head[-1], nn.Linear)


def has_class_token(backbone: nn.Module) -> bool:
    """Whether a network is a transformer with a class token: its only maps are its first."""
    return any("cls_token" in name or "class_token" in name for name, _ in backbone.named_parameters())


def last_stage(network: nn.Module, image: torch.Tensor) -> str:
    """Name of the module of the backbone that ends its last stage. Raises InputError if it is no CNN."""
    found = {} if has_class_token(network.backbone) else find_stages(network, image, ())
    if not found:
        raise InputError("cam needs a convolutional backbone such as resnet50; take gradcam or rollout")
    return found[max(found)]


def default_layer(network: nn.Module, image: torch.Tensor) -> str:
    """The layer that Grad-CAM explains: of a CNN its last map, of a transformer the last norm or block whose tokens of
    patches reach its features."""
    backbone = network.backbone
    if not (attention_modules(backbone) or has_class_token(backbone)):
        return last_stage(network, image)
    names = [name for name, module in backbone.named_modules() if re.search("Norm|Block", type(module).__name__)]
    with torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
        feature, outputs = run_backbone(network, names, lambda: backbone(network.normalise(image[:1]))[0, 0])
        tokens = {name: output for name, output in outputs.items()
                  if getattr(output, "ndim", 0) == 3 and len(output) == 1}  # fmt: skip
        slopes = torch.autograd.grad(feature, list(tokens.values()), allow_unused=True)
    reach = [name for name, slope in zip(tokens, slopes, strict=True)
             if slope is not None and slope[:, prefix_of(backbone) :].any()]  # fmt: skip
    if not reach:
        raise InputError("no tokens of patches are known to reach the features of the backbone; pass --layer")
    return reach[-1]


def attention_modules(backbone: nn.Module) -> dict[str, nn.Module]:
    """Self-attentions of a plain vision transformer of torchvision or timm by name, in order; of others, whose
    attention has windows or biases of its own, none."""
    if not {"VisionTransformer", "Eva"} & {kind.__name__ for kind in type(backbone).__mro__}:
        return {}
    names = ("MultiheadAttention", "Attention", "EvaAttention", "AttentionRope")
    return {name: module for name, module in backbone.named_modules() if type(module).__name__ in names}


def mean_attention(module: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """What an attention does to its input (N, T, D), as the mean over its heads (N, T, T), rows sum to 1."""
    both = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=2)[:2]
    query, key = (part.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for part in both)
    return (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])).softmax(dim=3).mean(dim=1)


def prefix_of(backbone: nn.Module) -> int:
    """Tokens of a transformer before those of the patches."""
    return getattr(backbone, "num_prefix_tokens", 1)


def as_map(backbone: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """Output of a layer as a map (N, C, h, w): a map as it is, of tokens (N, T, C) those of the patches. Raises
    InputError if it is neither."""
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else ()
    if len(shape) == 4 and shape[2] == shape[3]:
        return output
    side = math.isqrt(max(shape[1] - prefix_of(backbone), 0)) if len(shape) == 3 else 0
    if side == 0 or side**2 != shape[1] - prefix_of(backbone):
        raise InputError(f"the layer's output has shape {shape}, which is no map; pass another --layer")
    return output[:, prefix_of(backbone) :].transpose(1, 2).unflatten(2, (side, side))


# ---------------------------------------------------------------- features where maps are
def feature_layer(network: nn.Module, image) -> str:
    """Name of the layer whose output is what a network knows of every place: of a CNN its last map, of a ViT the norm
    after its last block, "" of a ChipNet or scout, whose chips or cells are their own map."""
    if hasattr(network, "take_in"):
        return ""
    if not attention_modules(network.backbone):
        return last_stage(network, image)
    return "encoder.ln" if hasattr(network.backbone, "encoder") else "norm"  # torchvision's, timm's


@torch.no_grad()
def read_features(network: nn.Module, image, layers: list[str], forward: Callable | None = None) -> tuple:
    """What forward() returns, and by layer the features (N, C, h, w) in that pass, or without forward in one of the
    backbone; those of a ChipNet or scout are the embeddings of its chips or cells, where they lie."""
    if hasattr(network, "take_in"):
        each = network.take_in(image)[0].unbind(dim=2)
        found = torch.stack([network.on_map(values, image) for values in each], dim=1)
        return forward() if forward else None, {"": found}
    forward = forward or (lambda: network.backbone(network.normalise(image)))
    result, outputs = run_backbone(network, layers, forward)
    return result, {name: as_map(network.backbone, outputs.get(name)).detach() for name in layers}
