"""Feature-Selection Gates and Gradient Routing for any network; this file needs torch alone.

    from fsg import add_gates, GradientRouting
    model = add_gates(torchvision.models.vit_b_16())      # the same function, now with gates
    routing = GradientRouting(model, optimizer, gate_optimizer)
    loss = routing.step(lambda: criterion(model(image), target))

A gated residual block computes x + g(w) * y: w holds one learnable logit per channel of the branch's output y. The
logits are the parameter `fsg` of the module that ends the branch, and a forward hook multiplies by the gate, so all
keys of the plain network's state_dict keep their names.

References:
    Roffo, Biffi, Salvagnini, Cherubini. Feature Selection Gates with Gradient Routing for Endoscopic Image Computing.
    MICCAI 2024, arXiv 2407.04400. The gate, its place and the two passes are theirs; the start at the identity, the
    single pass and held_out are ours.
    Louizos, Welling, Kingma. Learning Sparse Neural Networks through L0 Regularization. ICLR 2018: hard-concrete
    gates, equations 10 to 13.
    Hurley, Rickard. Comparing Measures of Sparsity. IEEE Trans. Inf. Theory 2009: Hoyer's and Gini's indices.
"""

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

GATE = "fsg"
# (class of a block, modules that end its residual branches before the skip is added); the first row that fits counts
BRANCHES = (
    ("EncoderBlock", ("self_attention", "mlp")),  # torchvision ViT
    ("SwinTransformer*V2*", ("norm1", "norm2")),  # torchvision and timm: a norm ends the branch
    ("SwinTransformerBlock", ("attn", "mlp")),
    ("CNBlock", ("block.5",)),  # torchvision ConvNeXt
    ("ConvNeXtBlock", ("mlp.fc2",)),  # timm
    ("BasicBlock", ("bn2",)),  # ResNet 18 and 34, torchvision and timm
    ("Bottleneck", ("bn3",)),  # ResNet 50 and deeper
    ("Bottleneck", ("conv3.bn",)),  # timm RegNet
    ("ResBottleneckBlock", ("f",)),  # torchvision RegNet
    ("PreActBasic", ("conv2",)),  # timm ResNet v2: a convolution ends the branch
    ("PreActBottleneck", ("conv3",)),
    ("*MBConv", ("block",)),  # torchvision EfficientNet
    ("MBConv", ("conv3.bn",)),  # timm TinyViT
    ("MbConvLNBlock", ("conv3_1x1",)),  # timm ViTamin
    ("GatedConvBlock", ("fc2",)),  # timm MambaOut
    ("InvertedResidual", ("bn3",)),  # timm EfficientNet, MobileNet
    ("DepthwiseSeparableConv", ("bn2",)),
    ("EdgeResidual", ("bn2",)),
    ("ConvBnAct", ("bn1",)),
    ("UniversalInvertedResidual", ("dw_end.bn",)),  # timm MobileNet v4
    ("UniversalInvertedResidual", ("pw_proj.bn",)),
    ("MobileAttention", ("attn",)),
    ("InvertedResidual", ("conv",)),  # torchvision MobileNet v2
    ("InvertedResidual", ("block",)),  # and v3
    ("Block", ("attn.proj", "mlp.fc2")),  # timm ViT
    ("Block", ("attn.proj", "mlp.w2")),  # ViTamin
    ("Block", ("attn_in.proj", "mlp_in.fc2", "attn_out.proj", "mlp.fc2")),  # TNT
    ("EvaBlock", ("attn.proj", "mlp.fc2")),  # DINOv3
    ("TinyVitBlock", ("attn.proj", "mlp.fc2")),
    ("CrossAttentionBlock", ("attn.proj",)),  # CrossViT
    ("*Block", ("attn.c_proj", "mlp.c_proj")),  # GPT-2 of Hugging Face, nanoGPT
    ("TransformerEncoderLayer", ("self_attn", "linear2")),  # torch
    ("TransformerDecoderLayer", ("self_attn", "multihead_attn", "linear2")),
    ("*Layer", ("attention.output.dense", "output.dense")),  # Hugging Face BERT, ViT before v5
    ("*Layer", ("attention.o_proj", "mlp.fc2")),  # Hugging Face ViT
    ("*DecoderLayer", ("self_attn.o_proj", "mlp.down_proj")),  # Llama, Mistral, Qwen
)
CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
LINEAR = ("Dropout", "Identity", "StochasticDepth", "DropPath")  # a gate may act before or after these modules
STARTS = {"identity": 1.0, "paper": 0.5, "hard": 1.0}  # a gate before training, by its kind
HARD_START, TEMPERATURE, LOW, HIGH = 3.0, 2 / 3, -0.1, 1.1  # hard gates: first logit; beta, gamma, zeta of Louizos
CLOSED = -1e4  # a logit whose sigmoid is exactly 0 in every precision
MODES = ("off", "single", "sequential", "upstream", "held_out")


# ---------------------------------------------------------------- gates
def gate_of(module: nn.Module, sample: bool = False) -> torch.Tensor:
    """Gate (C,) of a gated module, computed from its logit w as its kind says: "identity" 2 sigmoid(w), "paper"
    sigmoid(w), "hard" a sigmoid stretched beyond [0, 1] and clamped to it. sample: draw hard gates at random."""
    logit = module.fsg
    if module.fsg_kind != "hard":
        return 2 * STARTS[module.fsg_kind] * torch.sigmoid(logit)
    if sample:
        noise = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6).logit()
        logit = (logit + noise) / TEMPERATURE
    return (torch.sigmoid(logit) * (HIGH - LOW) + LOW).clamp(0, 1)


def apply_gate(module: nn.Module, inputs, output):
    """Forward hook: multiply the output, or the first one of a tuple, by the gate along its channels."""
    # a function of the module and not a closure over a gate, so that a deep copy of the network uses its own gates
    branch = output[0] if isinstance(output, tuple) else output
    shape = [1] * branch.ndim
    shape[module.fsg_axis] = -1
    gated = branch * gate_of(module, sample=module.training).view(shape).to(branch.dtype)
    return (gated, *output[1:]) if isinstance(output, tuple) else gated


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The linear, convolution and norm layers with a weight in a module, in order."""
    kinds, conv1d = CHANNELS_LAST + CHANNELS_FIRST, "Conv1D"  # Hugging Face's linear layer with a transposed weight
    layers = [m for m in module.modules() if isinstance(m, kinds) or (type(m).__name__ == conv1d and hasattr(m, "nf"))]
    return [layer for layer in layers if layer.weight is not None]  # a norm may have none


def refusal(branch: nn.Module) -> str:
    """Why a gate cannot be folded into the last layer of a branch; empty if it can."""
    layers = layers_of(branch)
    if not layers:
        return f"{type(branch).__name__} has no linear, convolution or norm layer to gate"
    last = layers[-1]
    if "weight" not in last._parameters or "Std" in type(last).__name__:  # timm's StdConv2d normalises its weight
        return f"{type(last).__name__} computes its weight anew in every forward pass"
    # only a Sequential tells what comes after its last layer; timm's norm layers have their activation inside
    modules = list((branch if isinstance(branch, nn.Sequential) else last).modules())
    following = [type(module).__name__ for module in modules[modules.index(last) + 1 :]]
    changing = [name for name in following if not any(word in name for word in LINEAR)]
    return f"a {changing[0]} follows its last layer; name that layer itself as the site" if changing else ""


def has_skip(block: nn.Module) -> bool:
    """Whether a block of a known class adds its input to its output."""
    if type(block).__module__ == "timm.models.regnet" and block.downsample is None:  # elsewhere None is the identity
        return False
    return getattr(block, "has_skip", True) and getattr(block, "use_res_connect", True)


def find_sites(model: nn.Module) -> list[str]:
    """Names of the modules that end the residual branches of a known network; raises ValueError for other networks.
    Warns if blocks of known classes have a skip but can take no gate."""
    sites, ungated = [], Counter()
    for name, block in model.named_modules():
        kinds = [kind.__name__ for kind in type(block).__mro__]  # a class may extend that of another row
        rows = [row for kind in kinds for pattern, row in BRANCHES if fnmatchcase(kind, pattern)]
        if rows and has_skip(block):
            inside = dict(block.named_modules())
            rows = [row for row in rows if any(site in inside for site in row)]
            fits = [row for row in rows if all(site in inside and not refusal(inside[site]) for site in row)]
            sites += [f"{name}.{site}" if name else site for site in (fits[0] if fits else ())]
            ungated[type(block).__name__] += bool(rows and not fits)
    if not sites:
        names = [name for name, m in model.named_modules() if name and layers_of(m)]
        patterns = Counter(re.sub(r"\b\d+\b", "*", name) for name in names)
        listed = ", ".join(f"{p} ({n})" if n > 1 else p for p, n in patterns.most_common(20))
        raise ValueError(f"no residual branch known in {type(model).__name__}; pass sites=[...], patterns of the "
                         f"modules that end them. Candidates: {listed or 'none'}")  # fmt: skip
    if ungated.total():
        listed = ", ".join(f"{n} {kind}" for kind, n in (+ungated).items())
        warnings.warn(f"residual blocks without a gate, because none folds into them: {listed}", stacklevel=3)
    return sites


def match_sites(model: nn.Module, patterns: list[str]) -> list[str]:
    """Names of the modules that match any pattern; raises ValueError if a pattern matches none."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no module of {type(model).__name__} matches {pattern!r}")
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]


def add_gates(
    model: nn.Module, sites: Iterable[str] | None = None, init: str = "identity", hard: bool = False
) -> nn.Module:
    """Give every residual branch of a network one gate per channel; returns the same model.

    sites: patterns of module names (`encoder.layers.*.mlp`); None takes the branches of a known network.
    init: "identity" starts every gate at exactly 1 and keeps the network's function bit for bit; "paper" starts at
    sigmoid(Xavier normal), about 0.5 (equation 2 of the paper).
    hard: hard-concrete gates, which can reach 0: random in training, at first 1 in evaluation.
    Raises ValueError if nothing matches or a module cannot take a gate.
    """
    if init not in ("identity", "paper") or (hard and init == "paper"):
        raise ValueError(f"init {init!r}, hard {hard}: take 'identity', or 'paper' without hard")
    names = find_sites(model) if sites is None else match_sites(model, list(sites))
    branches = {name: model.get_submodule(name) for name in names}
    for name, branch in branches.items():  # all are checked before one is changed
        if problem := "it has a gate already" if hasattr(branch, GATE) else refusal(branch):
            raise ValueError(f"{name}: {problem}")
    for branch in branches.values():
        layer = layers_of(branch)[-1]
        put_gate(branch, getattr(layer, "nf", len(layer.weight)), channel_axis(layer), init, hard)  # nf: of Conv1D
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # torch's fast path skips hooks, and only that path takes nested tensors
    return model


def channel_axis(layer: nn.Module) -> int:
    """Which dimension of a layer's output its channels are; Swin's maps (N, H, W, C) have four too."""
    return 1 if isinstance(layer, CHANNELS_FIRST) or type(layer).__name__.endswith("2d") else -1  # LayerNorm2d


def put_gate(module: nn.Module, channels: int, axis: int, init: str, hard: bool, stays: bool = False) -> None:
    """Give a module a gate on its output. stays: it can be folded into no layer."""
    device = next((parameter.device for parameter in module.parameters()), None)
    logit = torch.full((channels,), HARD_START if hard else 0.0, device=device)
    if init == "paper":
        nn.init.xavier_normal_(logit.unsqueeze(0))
    module.register_parameter(GATE, nn.Parameter(logit))
    module.fsg_kind, module.fsg_axis, module.fsg_stays = "hard" if hard else init, axis, stays
    module.register_forward_hook(apply_gate)


@torch.no_grad()
def gate_outputs(
    model: nn.Module, sites: Iterable[str], run: Callable[[], object], init: str = "identity", hard: bool = False
) -> nn.Module:
    """Give the outputs of some modules, such as whole stages or a vector of features, one gate per channel, as the
    paper does in CNNs; returns the same model. These gates fold into no layer, since a skip or a ReLU lies before them.

    sites: names of modules, patterns allowed. run: passes a square example through the model, which shows what are the
    channels of an output. init, hard: as of add_gates. Raises ValueError if nothing matches or an output is no tensor.
    """
    names, shapes = match_sites(model, list(sites)), {}

    def record(name: str, module: nn.Module, inputs, output) -> None:
        shapes[name] = getattr(output, "shape", None)

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(model.get_submodule(name).register_forward_hook(partial(record, name)))
        run()
    for name in names:
        module, shape = model.get_submodule(name), shapes.get(name)
        if problem := "it has a gate already" if hasattr(module, GATE) else "" if shape else "its output is no tensor":
            raise ValueError(f"{name}: {problem}")
        axis, last = -1, layers_of(module)[-1:]
        if len(shape) == 4:  # of a square picture the two equal sides are places, the third is channels
            axis = 1 if shape[2] == shape[3] else -1
            if shape[1] == shape[2] == shape[3]:  # a convolution tells, a linear layer does not
                axis = channel_axis(last[0]) if last else -1
                if axis == -1:
                    raise ValueError(f"{name}: no telling the channels of {tuple(shape)}; run a square of another size")
        put_gate(module, shape[axis], axis, init, hard, stays=True)
    return model


def vit_with_fsg(vit_backbone: nn.Module) -> nn.Module:
    """The call of the published example: gate a torchvision ViT and keep its function."""
    return add_gates(vit_backbone)


# ---------------------------------------------------------------- reading and closing gates
def gated_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have a gate, by name."""
    return {name: module for name, module in model.named_modules() if GATE in module._parameters}


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The logits of the gates, one (C,) parameter per branch."""
    return [module.fsg for module in gated_modules(model).values()]


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but the logits of the gates."""
    gates = {id(gate) for gate in gate_parameters(model)}
    return [p for p in model.parameters() if id(p) not in gates]


def gate_values(model: nn.Module, relative: bool = False) -> dict[str, torch.Tensor]:
    """The gates, detached, as {branch name: (C,)}; relative: divided by the value they started at."""
    gates = {name: (gate_of(module).detach(), STARTS[module.fsg_kind]) for name, module in gated_modules(model).items()}
    return {name: gate / start if relative else gate for name, (gate, start) in gates.items()}


def gate_penalty(model: nn.Module) -> torch.Tensor:
    """Scalar that closes gates if it is added to the loss with a weight: the mean gate (L1), or for hard gates the
    mean probability of being open (L0; equation 12 of Louizos et al.)."""
    shift = TEMPERATURE * math.log(-LOW / HIGH)
    modules = gated_modules(model).values()
    terms = [torch.sigmoid(m.fsg - shift) if m.fsg_kind == "hard" else gate_of(m) for m in modules]
    return torch.cat(terms).mean()


def gate_statistics(gate: torch.Tensor) -> dict[str, float]:
    """Sparsity of gates (n,) relative to their start: the mean, the shares below .05 and .01, Hoyer's and Gini's index
    (0 if all are equal, 1 if all but one are closed) and the effective share (participation ratio / n)."""
    gate = gate.double().sort().values
    n, total, square = len(gate), gate.sum().item(), gate.square().sum().item()
    some = total > 0 and n > 1  # if all are closed, both indices are 1
    rank = torch.arange(1, n + 1, dtype=gate.dtype, device=gate.device)
    return {
        "mean": total / n,
        "closed_05": (gate < 0.05).double().mean().item(),
        "closed_01": (gate < 0.01).double().mean().item(),
        "hoyer": (n**0.5 - total / square**0.5) / (n**0.5 - 1) if some else 1.0,
        "gini": (2 * (rank * gate).sum().item() / total - (n + 1)) / (n - 1) if some else 1.0,
        "effective": total**2 / (n * square) if total > 0 else 0.0,
    }


@torch.no_grad()
def gate_contributions(model: nn.Module, run: Callable[[], object]) -> dict[str, torch.Tensor]:
    """Mean absolute output of each gated channel over the forward passes of run(), (C,) divided by the branch's mean.
    Unlike the gate itself it stays the same if the gate is scaled up and the weight before it down."""
    sums = {name: torch.zeros_like(gate) for name, gate in gate_values(model).items()}

    def record(name: str, module: nn.Module, inputs, output) -> None:  # runs after apply_gate and gets its result
        branch = output[0] if isinstance(output, tuple) else output
        sums[name] += branch.abs().float().movedim(module.fsg_axis, -1).flatten(0, -2).sum(0)

    with ExitStack() as stack:
        for name, module in gated_modules(model).items():
            stack.enter_context(module.register_forward_hook(partial(record, name)))
        run()
    return {name: value / value.mean().clamp_min(1e-30) for name, value in sums.items()}


@torch.no_grad()
def prune_gates(model: nn.Module, share: float, scores: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """Close the `share` (0 to 1) of all gates with the lowest scores for good; returns the model.
    scores: {branch name: (C,)}, for example gate_contributions; None takes the gates' values."""
    scores, modules = scores or gate_values(model), gated_modules(model)
    score = torch.cat([scores[name] for name in modules])
    closed = score.argsort(stable=True).argsort() < round(share * len(score))  # by rank: gates may be equal
    for module, mine in zip(modules.values(), closed.split([len(m.fsg) for m in modules.values()]), strict=True):
        module.fsg[mine] = CLOSED
    return model


@contextmanager
def pruned(model: nn.Module, share: float, scores: dict[str, torch.Tensor] | None = None) -> Iterator[nn.Module]:
    """Close gates as prune_gates does inside the block and restore them after it."""
    gates = gate_parameters(model)
    kept = [gate.detach().clone() for gate in gates]
    try:
        yield prune_gates(model, share, scores)
    finally:
        for gate, value in zip(gates, kept, strict=True):
            gate.data.copy_(value)


@torch.no_grad()
def fold_gates(model: nn.Module) -> nn.Module:
    """Multiply every gate into the last layer of its branch and remove it, which leaves the plain network; gates on
    outputs (gate_outputs) stay. Raises ValueError if another part of the model uses that layer or its weight as well,
    as it would change too."""
    paths = defaultdict(list)  # all names of a parameter: a shared one has more than the gate after it
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths[id(parameter)].append(path)
    modules = {name: module for name, module in gated_modules(model).items() if not module.fsg_stays}
    for name, module in modules.items():
        if problem := refusal(module):
            raise ValueError(f"{name}: {problem}")
        for parameter in layers_of(module)[-1].parameters(recurse=False):
            if parameter is not module.fsg and len(paths[id(parameter)]) > len(paths[id(module.fsg)]):
                raise ValueError(f"the gate of {name} does not fold: {', '.join(paths[id(parameter)])} are one tensor")
    for module in modules.values():
        layer, gate = layers_of(module)[-1], gate_of(module)
        transposed = hasattr(layer, "nf")
        layer.weight.mul_(gate if transposed else gate.view(-1, *[1] * (layer.weight.ndim - 1)))
        if layer.bias is not None:
            layer.bias.mul_(gate)
        del module.fsg, module.fsg_kind, module.fsg_axis, module.fsg_stays
        for key in [k for k, hook in module._forward_hooks.items() if hook is apply_gate]:
            del module._forward_hooks[key]
    return model


# ---------------------------------------------------------------- gradient routing
@contextmanager
def switched_off(flag: str, objects: Iterable) -> Iterator[None]:
    """Set an attribute that is True to False inside the block."""
    objects = [o for o in objects if getattr(o, flag)]
    for o in objects:
        setattr(o, flag, False)
    try:
        yield
    finally:
        for o in objects:
            setattr(o, flag, True)


def frozen_statistics(model: nn.Module):
    """Context in which batch norms in training mode still normalise by the batch but keep their running statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    return switched_off("track_running_stats", norms)


class GradientRouting:
    """One optimisation step in which the gates and the weights have an optimizer each.

    mode: "off": one optimizer holds all parameters.
    "single": one forward and one backward pass; both optimizers step from the same point.
    "sequential": the gates step first on a pass of their own, then the weights on a second pass at the new gates; the
    parameters that do not step are frozen.
    "held_out": as "sequential", but the gates step on images that the weights are not fitted to (bilevel, first order).
    "upstream": as published: both passes give gradients to all parameters, those of the weights add up, and clipping
    takes the norm over everything.
    clip, gate_clip: largest gradient norm of the weights and of the gates, each by itself.
    Raises ValueError if mode and optimizers contradict each other or the model has no gates.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gate_optimizer: torch.optim.Optimizer | None = None,
        mode: str = "single",
        scaler: torch.amp.GradScaler | None = None,
        clip: float | None = None,
        gate_clip: float | None = None,
    ):
        if mode not in MODES or (gate_optimizer is None) != (mode == "off"):
            raise ValueError(f"mode {mode!r}, gate_optimizer {gate_optimizer}: take one of {', '.join(MODES)}, and a "
                             "gate_optimizer unless it is off")  # fmt: skip
        self.model, self.mode, self.optimizer, self.gate_optimizer = model, mode, optimizer, gate_optimizer
        self.optimizers = [o for o in (optimizer, gate_optimizer) if o is not None]
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.clips = {id(optimizer): clip, id(gate_optimizer): gate_clip}
        self.base_lrs = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.gates, self.weights = gate_parameters(model), weight_parameters(model)
        gates = {id(gate) for gate in self.gates}
        owned = [{id(p) for group in o.param_groups for p in group["params"]} for o in self.optimizers]
        if gate_optimizer is not None and not (gates and owned[1] == gates and owned[0].isdisjoint(gates)):
            raise ValueError(f"gate_optimizer holds {len(owned[1])} parameters and optimizer {len(owned[0] & gates)} "
                             f"of the {len(gates)} gates; give them gate_parameters(model) and the others")  # fmt: skip

    def scale_lr(self, factor: float) -> None:
        """Set all learning rates to `factor` times what they were at construction."""
        for optimizer, base_lrs in zip(self.optimizers, self.base_lrs, strict=True):
            for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base_lr * factor

    def step(self, loss_fn: Callable, parts: list | None = None, gate_loss_fn: Callable | None = None) -> torch.Tensor:
        """Take one step on the loss that `loss_fn()` computes; returns the loss, detached.

        parts: accumulate gradients: the loss is the sum of `loss_fn(part)` over the parts, with a backward pass after
        each, so loss_fn has to scale the loss of a part to its share of the batch.
        gate_loss_fn: the loss that the gates step on if they have a pass of their own, called like loss_fn.
        "held_out" needs one and calls it once, without a part. Raises ValueError if the mode does not go with it.
        """
        two_passes, upstream = self.mode in ("sequential", "held_out", "upstream"), self.mode == "upstream"
        if (gate_loss_fn is None and self.mode == "held_out") or (gate_loss_fn and not two_passes):
            raise ValueError(f"mode {self.mode!r} does not go with gate_loss_fn {gate_loss_fn}")
        passes = [(loss_fn, parts, self.optimizers, nullcontext())]
        if two_passes:
            gate_parts = None if self.mode == "held_out" else parts
            passes = [(gate_loss_fn or loss_fn, gate_parts, [self.gate_optimizer], self._only(self.weights)),
                      (loss_fn, parts, [self.optimizer], self._only(self.gates))]  # fmt: skip
        no_sync = getattr(self.model, "no_sync", nullcontext)  # DistributedDataParallel averages gradients after it
        for number, (loss_of, own_parts, optimizers, alone) in enumerate(passes):
            for optimizer in self.optimizers if number == 0 or not upstream else ():
                optimizer.zero_grad()
            total, calls = 0.0, [()] if own_parts is None else [(part,) for part in own_parts]
            with alone:
                for i, arguments in enumerate(calls, 1):
                    with no_sync() if i < len(calls) else nullcontext():
                        loss = loss_of(*arguments)
                        self.scaler.scale(loss).backward()
                    total = total + loss.detach()
            for optimizer in optimizers:
                if (clip := self.clips[id(optimizer)]) is not None:
                    self.scaler.unscale_(optimizer)
                    own = [p for group in optimizer.param_groups for p in group["params"]]
                    nn.utils.clip_grad_norm_(self.model.parameters() if upstream else own, clip)
                self.scaler.step(optimizer)
            self.scaler.update()
        return total

    @contextmanager
    def _only(self, others: list[nn.Parameter]) -> Iterator[None]:
        """Freeze `others` inside the block, and batch norm statistics if these are the weights; "upstream" does not."""
        # freezing only saves time; DistributedDataParallel waits for the gradients of all parameters it started with
        upstream, parallel = self.mode == "upstream", hasattr(self.model, "no_sync")
        keep = frozen_statistics(self.model) if others is self.weights and not upstream else nullcontext()
        with switched_off("requires_grad", [] if upstream or parallel else others), keep:
            yield
