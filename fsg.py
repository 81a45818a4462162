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
    ("SwinTransformerBlock", ("attn", "mlp")),  # torchvision and timm
    ("SwinTransformerBlockV2", ("norm1", "norm2")),  # torchvision: a norm ends the branch
    ("SwinTransformerV2Block", ("norm1", "norm2")),  # timm
    ("CNBlock", ("block.5",)),  # torchvision ConvNeXt
    ("ConvNeXtBlock", ("mlp.fc2",)),  # timm
    ("BasicBlock", ("bn2",)),  # ResNet 18 and 34, torchvision and timm
    ("Bottleneck", ("bn3",)),  # ResNet 50 and deeper
    ("Bottleneck", ("conv3.bn",)),  # timm RegNet
    ("ResBottleneckBlock", ("f",)),  # torchvision RegNet
    ("PreActBasic", ("conv2",)),  # timm ResNet v2: a convolution ends the branch
    ("PreActBottleneck", ("conv3",)),
    ("*MBConv", ("block",)),  # torchvision EfficientNet
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
    """Gate (C,) of a gated module.

    The kind decides how it is computed from the logit w: "identity" 2 sigmoid(w), "paper" sigmoid(w), "hard" a sigmoid
    stretched beyond [0, 1] and clamped to it. sample: draw a hard gate at random, as in training.
    """
    logit = module.fsg
    if module.fsg_kind != "hard":
        return 2 * STARTS[module.fsg_kind] * torch.sigmoid(logit)
    if sample:
        noise = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6).logit()
        logit = (logit + noise) / TEMPERATURE
    return (torch.sigmoid(logit) * (HIGH - LOW) + LOW).clamp(0, 1)


def apply_gate(module: nn.Module, inputs, output):
    """Forward hook: multiply the output, or the first one of a tuple, by the gate along its channels.

    It is a function of the module and no closure, so that a deep copy of the network uses its own gates.
    """
    branch = output[0] if isinstance(output, tuple) else output
    shape = [1] * branch.ndim
    shape[module.fsg_axis] = -1
    gated = branch * gate_of(module, sample=module.training).view(shape).to(branch.dtype)
    return (gated, *output[1:]) if isinstance(output, tuple) else gated


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's Conv1D: a linear layer whose weight is transposed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The linear, convolution and norm layers with a weight in a module, in order."""
    kinds = CHANNELS_LAST + CHANNELS_FIRST
    layers = [m for m in module.modules() if isinstance(m, kinds) or is_conv1d(m)]
    return [layer for layer in layers if layer.weight is not None]  # a norm may have none


def last_layer(branch: nn.Module) -> nn.Module:
    """The last layer of a branch: it makes the branch's output, so that the gate can be multiplied into its weight.

    Raises ValueError if there is none, if an activation changes its output, or if its weight is not a plain parameter.
    """
    layers = layers_of(branch)
    if not layers:
        raise ValueError(f"{type(branch).__name__} has no linear, convolution or norm layer to gate")
    layer = layers[-1]
    if "weight" not in layer._parameters or "Std" in type(layer).__name__:  # timm's StdConv2d normalises its weight
        raise ValueError(f"{type(layer).__name__} computes its weight in every forward pass, so no gate folds into it")
    # only a Sequential tells what comes after its last layer; timm's norm layers have their activation inside
    modules = list((branch if isinstance(branch, nn.Sequential) else layer).modules())
    for module in modules[modules.index(layer) + 1 :]:
        if not any(word in type(module).__name__ for word in LINEAR):
            raise ValueError(f"a {type(module).__name__} follows the last layer; name that layer itself as the site")
    return layer


def takes_gate(branch: nn.Module) -> bool:
    """Whether a gate after this branch could be folded into its last layer."""
    try:
        return last_layer(branch) is not None
    except ValueError:
        return False


def has_skip(block: nn.Module) -> bool:
    """Whether a block of a known class adds its input to its output."""
    if type(block).__module__ == "timm.models.regnet" and block.downsample is None:  # elsewhere None is the identity
        return False
    return getattr(block, "has_skip", True) and getattr(block, "use_res_connect", True)


def find_sites(model: nn.Module) -> list[str]:
    """Names of the modules that end the residual branches of a known network.

    Warns if some blocks of known classes have a skip but can take no gate; raises ValueError if no branch is known.
    """
    sites, ungated = [], Counter()
    for name, block in model.named_modules():
        kinds = [kind.__name__ for kind in type(block).__mro__]  # the nearest first: Swin v2 extends Swin
        rows = [row for kind in kinds for pattern, row in BRANCHES if fnmatchcase(kind, pattern)]
        if rows and has_skip(block):
            inside = dict(block.named_modules())
            known = [row for row in rows if any(site in inside for site in row)]
            whole = [row for row in known if all(site in inside and takes_gate(inside[site]) for site in row)]
            sites += [f"{name}.{site}" if name else site for site in (whole[0] if whole else ())]
            ungated[type(block).__name__] += bool(known and not whole)
    if not sites:
        names = [name for name, m in model.named_modules() if name and layers_of(m)]
        patterns = Counter(re.sub(r"\b\d+\b", "*", name) for name in names)
        listed = ", ".join(f"{p} ({n})" if n > 1 else p for p, n in patterns.most_common(20))
        raise ValueError(f"no residual branch known in {type(model).__name__}; pass sites=[...], patterns of the modules "
                         f"that end its branches. Candidates: {listed or 'none'}")  # fmt: skip
    if listed := ", ".join(f"{n} {kind}" for kind, n in ungated.items() if n):
        warnings.warn(f"residual blocks without a gate, because none would fold into them: {listed}", stacklevel=2)
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
    layers = {}
    for name in find_sites(model) if sites is None else match_sites(model, list(sites)):
        branch = model.get_submodule(name)
        if hasattr(branch, GATE):
            raise ValueError(f"{name} has a gate already")
        try:
            layers[name] = last_layer(branch)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, layer in layers.items():  # all of them are checked before the first is changed
        branch, weight = model.get_submodule(name), layer.weight
        logit = torch.full((layer.nf if is_conv1d(layer) else len(weight),), HARD_START if hard else 0.0,
                           device=weight.device)  # fmt: skip
        if init == "paper":
            nn.init.xavier_normal_(logit.unsqueeze(0))
        branch.register_parameter(GATE, nn.Parameter(logit))
        branch.fsg_kind = "hard" if hard else init
        # the layer decides and not the number of dimensions: Swin's maps (N, H, W, C) have four too
        channels_last = isinstance(layer, CHANNELS_LAST) and not type(layer).__name__.endswith("2d")  # LayerNorm2d
        branch.fsg_axis = -1 if channels_last or is_conv1d(layer) else 1
        branch.register_forward_hook(apply_gate)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # torch's fast path skips hooks, and only that path takes nested tensors
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
    return {
        name: gate_of(module).detach() / (STARTS[module.fsg_kind] if relative else 1.0)
        for name, module in gated_modules(model).items()
    }


def gate_penalty(model: nn.Module) -> torch.Tensor:
    """Scalar that closes gates if it is added to the loss with a weight: the mean gate (L1), or for hard gates the
    mean probability of being open (L0; equation 12 of Louizos et al.)."""
    shift = TEMPERATURE * math.log(-LOW / HIGH)
    terms = [
        torch.sigmoid(module.fsg - shift) if module.fsg_kind == "hard" else gate_of(module)
        for module in gated_modules(model).values()
    ]
    return torch.cat(terms).mean()


def gate_statistics(gate: torch.Tensor) -> dict[str, float]:
    """Sparsity of gates (n,) relative to their start: the mean, the shares below .05 and .01, Hoyer's and Gini's indices
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

    Unlike the gate itself it stays the same if the gate is scaled up and the weight before it down.
    """
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

    scores: {branch name: (C,)}, for example gate_contributions; None takes the gates' values.
    Raises ValueError if the share is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share} does not lie in 0 to 1")
    scores, modules = scores or gate_values(model), gated_modules(model)
    score = torch.cat([scores[name] for name in modules])
    closed = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    closed[score.argsort(stable=True)[: round(share * len(score))]] = True
    sizes = [len(module.fsg) for module in modules.values()]
    for module, mine in zip(modules.values(), closed.split(sizes), strict=True):
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
        with torch.no_grad():
            for gate, value in zip(gates, kept, strict=True):
                gate.copy_(value)


@torch.no_grad()
def fold_gates(model: nn.Module) -> nn.Module:
    """Multiply every gate into the last layer of its branch and remove it, which leaves the plain network.

    Raises ValueError if another part of the model uses that layer or its weight as well, because it would change too.
    """
    paths = defaultdict(list)  # all names of a parameter: a shared one has more than the gate after it
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths[id(parameter)].append(path)
    layers = {name: last_layer(module) for name, module in gated_modules(model).items()}
    for name, module in gated_modules(model).items():
        for parameter in layers[name].parameters(recurse=False):
            if parameter is not module.fsg and len(paths[id(parameter)]) > len(paths[id(module.fsg)]):
                raise ValueError(f"the gate of {name} does not fold: {', '.join(paths[id(parameter)])} are one tensor")
    for name, module in gated_modules(model).items():
        layer, gate = layers[name], gate_of(module)
        shape = [1] * layer.weight.ndim
        shape[-1 if is_conv1d(layer) else 0] = -1
        layer.weight.mul_(gate.view(shape))
        if layer.bias is not None:
            layer.bias.mul_(gate)
        del module.fsg, module.fsg_kind, module.fsg_axis
        for key in [k for k, hook in module._forward_hooks.items() if hook is apply_gate]:
            del module._forward_hooks[key]
    return model


# ---------------------------------------------------------------- gradient routing
@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters get no gradient inside the block."""
    parameters = [p for p in parameters if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms in training mode normalise by the batch but leave their running statistics inside the block."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class GradientRouting:
    """One optimisation step in which the gates and the weights have an optimizer each.

    mode: "off": one optimizer holds all parameters.
    "single": one forward and one backward pass; both optimizers step from the same point.
    "sequential": the gates step first on a pass of their own, then the weights on a second pass at the new gates; the
    parameters that do not step are frozen.
    "held_out": as "sequential", but the gates step on a batch that the weights are not fitted to, which is a first-order
    step of bilevel optimisation.
    "upstream": as published: both passes give gradients to all parameters, those of the weights add up, and clipping
    takes the norm over everything.
    clip, gate_clip: largest gradient norm of the weights and of the gates, each by itself.
    model may be wrapped in DistributedDataParallel or torch.compile.
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
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        if (gate_optimizer is None) != (mode == "off"):
            raise ValueError(f"mode {mode!r} and gate_optimizer {gate_optimizer} contradict")
        self.model, self.mode = model, mode
        self.optimizer, self.gate_optimizer = optimizer, gate_optimizer
        self.optimizers = [o for o in (optimizer, gate_optimizer) if o is not None]
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.clips = {id(optimizer): clip, id(gate_optimizer): gate_clip}
        self.base_lrs = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.gates, self.weights = gate_parameters(model), weight_parameters(model)
        self._check_owners()

    def _check_owners(self) -> None:
        """Raise ValueError if gate_optimizer does not hold all gates and nothing else; compares by identity."""
        if self.gate_optimizer is None:
            return
        gate_ids = {id(gate) for gate in self.gates}
        owned = [{id(p) for g in o.param_groups for p in g["params"]} for o in self.optimizers]
        if not gate_ids or owned[1] != gate_ids or owned[0] & gate_ids:
            raise ValueError(
                f"the model has {len(gate_ids)} gates, gate_optimizer {len(owned[1])} parameters, optimizer "
                f"{len(owned[0] & gate_ids)} of the gates; gate_optimizer should hold gate_parameters(model) and "
                "optimizer the rest"
            )

    def scale_lr(self, factor: float) -> None:
        """Set all learning rates to `factor` times what they were at construction."""
        for optimizer, base_lrs in zip(self.optimizers, self.base_lrs, strict=True):
            for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base_lr * factor

    def step(self, loss_fn: Callable, parts: list | None = None, gate_loss_fn: Callable | None = None) -> torch.Tensor:
        """Take one step on the loss that `loss_fn()` computes; returns the loss, detached.

        parts: gradient accumulation. The loss is then the sum of `loss_fn(part)` over the parts, each with a backward
        pass of its own, so loss_fn scales each part's loss to its share of the batch.
        gate_loss_fn: the loss that the gates step on if they have a pass of their own. "held_out" needs one and calls
        it once, without a part. Raises ValueError if the mode does not go with it or parts is empty.
        """
        two_passes = self.mode in ("sequential", "held_out", "upstream")
        if (gate_loss_fn is None and self.mode == "held_out") or (gate_loss_fn and not two_passes):
            raise ValueError(f"mode {self.mode!r} does not go with gate_loss_fn {gate_loss_fn}")
        if parts is not None and not len(parts):
            raise ValueError("parts is empty")
        losses = losses_of(loss_fn, parts)
        gate_losses = losses_of(gate_loss_fn or loss_fn, None if self.mode == "held_out" else parts)
        self._zero_grad()
        if not two_passes:
            return self._pass(losses, self.optimizers)
        if self.mode == "upstream":
            self._pass(gate_losses, [self.gate_optimizer])
            return self._pass(losses, [self.optimizer])
        with self._frozen(self.weights), frozen_statistics(self.model):
            self._pass(gate_losses, [self.gate_optimizer])
        self._zero_grad()
        with self._frozen(self.gates):
            return self._pass(losses, [self.optimizer])

    def _frozen(self, parameters: list[nn.Parameter]):
        # freezing only saves time; DistributedDataParallel waits for the gradients of all parameters it started with
        return frozen([] if hasattr(self.model, "no_sync") else parameters)

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _pass(self, losses: list[Callable], optimizers: list[torch.optim.Optimizer]) -> torch.Tensor:
        """Add up the gradients of all losses, then step; returns the sum of the losses."""
        values = []
        for i, loss_fn in enumerate(losses, 1):
            # DistributedDataParallel averages the gradients over the processes in the last backward pass only
            no_sync = getattr(self.model, "no_sync", nullcontext) if i < len(losses) else nullcontext
            with no_sync():
                loss = loss_fn()
                self.scaler.scale(loss).backward()
            values.append(loss.detach())
        for optimizer in optimizers:
            if (clip := self.clips[id(optimizer)]) is not None:
                self.scaler.unscale_(optimizer)
                own = [p for group in optimizer.param_groups for p in group["params"]]
                norm_of = self.model.parameters() if self.mode == "upstream" else own
                nn.utils.clip_grad_norm_(norm_of, clip)
            self.scaler.step(optimizer)
        self.scaler.update()
        return sum(values[1:], values[0])


def losses_of(loss_fn: Callable, parts: list | None) -> list[Callable]:
    """The losses of one pass, as functions without arguments."""
    return [loss_fn] if parts is None else [partial(loss_fn, part) for part in parts]
