"""Feature-Selection Gates and Gradient Routing for any network; this file needs torch alone.

    from fsg import add_gates, GradientRouting
    model = add_gates(torchvision.models.vit_b_16())      # the same function, now with gates
    routing = GradientRouting(model, optimizer, gate_optimizer)
    loss = routing.step(lambda: criterion(model(image), target))

A gate is one learnable logit w per channel of a residual branch's output y, so that the block
computes x + g(w) * y. It lives as the parameter `fsg` of the module that ends the branch and is
applied by a forward hook: no key of the plain network's state_dict changes its name.

References:
    Roffo, Biffi, Salvagnini, Cherubini. Feature Selection Gates with Gradient Routing for
    Endoscopic Image Computing. MICCAI 2024, arXiv 2407.04400. The gate, its place and the two
    passes are theirs; the identity start, the single routed pass and held_out are ours.
    Louizos, Welling, Kingma. Learning Sparse Neural Networks through L0 Regularization. ICLR
    2018: hard-concrete gates, equations 10 to 13.
    Hurley, Rickard. Comparing Measures of Sparsity. IEEE Trans. Inf. Theory 2009: Hoyer, Gini.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn

GATE = "fsg"
# class of a block -> where its residual branches end, before the skip is added; first row first
BRANCHES = (
    ("EncoderBlock", ("self_attention", "mlp")),  # torchvision ViT
    ("SwinTransformerBlock", ("attn", "mlp")),  # torchvision and timm
    ("SwinTransformerBlockV2", ("norm1", "norm2")),  # torchvision: a norm closes the branch
    ("SwinTransformerV2Block", ("norm1", "norm2")),  # timm
    ("CNBlock", ("block.5",)),  # torchvision ConvNeXt
    ("ConvNeXtBlock", ("mlp.fc2",)),  # timm
    ("BasicBlock", ("bn2",)),  # ResNet 18 and 34, torchvision and timm
    ("Bottleneck", ("bn3",)),  # ResNet 50 and deeper
    ("ResBottleneckBlock", ("f",)),  # torchvision RegNet
    ("*MBConv", ("block",)),  # torchvision EfficientNet
    ("InvertedResidual", ("bn3",)),  # timm EfficientNet, MobileNet
    ("DepthwiseSeparableConv", ("bn2",)),
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
SKIP_FLAGS = ("has_skip", "use_res_connect")  # blocks that may lack the skip say so
CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.batchnorm._BatchNorm)
PASSIVE = ("Dropout", "Identity", "StochasticDepth", "DropPath")  # commute with a gate
STARTS = {"identity": 1.0, "paper": 0.5, "hard": 1.0}  # a gate before training, by its kind
HARD_START, TEMPERATURE, LOW, HIGH = 3.0, 2 / 3, -0.1, 1.1  # of hard-concrete gates
CLOSED = -1e4  # a logit whose sigmoid is exactly 0 in every precision
MODES = ("off", "single", "sequential", "upstream", "held_out")


# ---------------------------------------------------------------- gates
def gate_of(module: nn.Module, sample: bool = False) -> torch.Tensor:
    """Gate (C,) of a gated module, by its kind: "identity" 2 sigmoid(w) in (0, 2), "paper"
    sigmoid(w), "hard" a stretched sigmoid cut to [0, 1], with noise on w where `sample` is set."""
    logit = module.fsg
    if module.fsg_kind != "hard":
        return 2 * STARTS[module.fsg_kind] * torch.sigmoid(logit)
    if sample:
        noise = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6).logit()
        logit = (logit + noise) / TEMPERATURE
    return (torch.sigmoid(logit) * (HIGH - LOW) + LOW).clamp(0, 1)


def apply_gate(module: nn.Module, inputs, output):
    """Forward hook: multiply the output (the first of a tuple) by the gate along its channels."""
    branch = output[0] if isinstance(output, tuple) else output
    shape = [1] * branch.ndim
    shape[module.fsg_axis] = -1
    # a module-level function, not a closure: a deep copy of the network must use its own gates
    gated = branch * gate_of(module, sample=module.training).view(shape).to(branch.dtype)
    return (gated, *output[1:]) if isinstance(output, tuple) else gated


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's Conv1D: a linear layer whose weight is transposed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def layers_of(branch: nn.Module) -> list[nn.Module]:
    """The layers of a branch into which a gate would fold, in order."""
    kinds = CHANNELS_LAST + CHANNELS_FIRST
    layers = [m for m in branch.modules() if isinstance(m, kinds) or is_conv1d(m)]
    return [layer for layer in layers if layer.weight is not None]  # norms may have none


def producer(branch: nn.Module) -> nn.Module:
    """The layer that makes a branch's output, into which its gate folds: the last one in it.

    Raises ValueError where there is none, or where a Sequential changes the output after it.
    """
    layers = layers_of(branch)
    if not layers:
        raise ValueError(
            f"{type(branch).__name__} has no linear, convolution or norm layer to gate"
        )
    if isinstance(branch, nn.Sequential):
        modules = list(branch.modules())
        last = next(i for i, module in enumerate(modules) if module is layers[-1])
        for module in modules[last + 1 :]:
            if not any(word in type(module).__name__ for word in PASSIVE):
                raise ValueError(
                    f"a {type(module).__name__} follows the last layer of the Sequential; name "
                    "that layer itself as the site"
                )
    return layers[-1]


def has_site(block: nn.Module, site: str) -> bool:
    """Whether a block has a submodule of that name that can be gated."""
    try:
        producer(block.get_submodule(site))
    except (AttributeError, ValueError):  # absent, or an activation ends it
        return False
    return True


def branches_of(block: nn.Module) -> tuple[str, ...]:
    """Names of the residual branches inside a block, by its class or the classes it extends."""
    if not all(getattr(block, flag, True) for flag in SKIP_FLAGS):
        return ()
    for kind in type(block).__mro__:  # the nearest class first: Swin's second version extends it
        for pattern, sites in BRANCHES:
            fits = fnmatchcase(kind.__name__, pattern)
            if fits and all(has_site(block, site) for site in sites):
                return sites
    return ()


def find_sites(model: nn.Module) -> list[str]:
    """Names of the residual branches of a known network; raises ValueError for others."""
    sites = [
        f"{name}.{branch}" if name else branch
        for name, block in model.named_modules()
        for branch in branches_of(block)
    ]
    if not sites:
        names = [name for name, m in model.named_modules() if name and layers_of(m)]
        patterns = Counter(re.sub(r"\b\d+\b", "*", name) for name in names)
        listed = ", ".join(f"{p} ({n})" if n > 1 else p for p, n in patterns.most_common(20))
        raise ValueError(
            f"no residual branch known in {type(model).__name__}; pass sites=[...], patterns of "
            f"the modules that end its branches. Candidates: {listed or 'none'}"
        )
    return sites


def add_gates(
    model: nn.Module,
    sites: Iterable[str] | None = None,
    init: str = "identity",
    hard: bool = False,
) -> nn.Module:
    """Give every residual branch of a network a gate per channel; returns the same model.

    sites: patterns of module names (`encoder.layers.*.mlp`); None for a known family.
    init: "identity" starts every gate at exactly 1 and keeps the network's function bit for bit;
    "paper" starts at sigmoid(Xavier normal), about 0.5 (equation 2 of the paper).
    hard: hard-concrete gates, which can close for good: noisy in training, 1 in evaluation at
    the start. Raises ValueError where nothing matches or a module cannot take a gate.
    """
    if init not in ("identity", "paper") or (hard and init == "paper"):
        raise ValueError(f"init {init!r}, hard {hard}: take 'identity', or 'paper' without hard")
    names = find_sites(model) if sites is None else match_sites(model, list(sites))
    layers = {}
    for name in names:  # all are checked before one is changed
        branch = model.get_submodule(name)
        if hasattr(branch, GATE):
            raise ValueError(f"{name} has a gate already")
        try:
            layers[name] = producer(branch)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, layer in layers.items():
        branch, last_axis = model.get_submodule(name), isinstance(layer, CHANNELS_LAST)
        weight = layer.weight
        channels = layer.nf if is_conv1d(layer) else len(weight)
        logit = torch.full((channels,), HARD_START if hard else 0.0, device=weight.device)
        if init == "paper":
            nn.init.xavier_normal_(logit.unsqueeze(0))
        branch.register_parameter(GATE, nn.Parameter(logit))
        branch.fsg_kind = "hard" if hard else init
        # by the layer and not by the rank: Swin's maps have four dimensions, channels last
        branch.fsg_axis = -1 if last_axis or is_conv1d(layer) else 1
        branch.register_forward_hook(apply_gate)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # nested input serves only the path without hooks
    return model


def match_sites(model: nn.Module, patterns: list[str]) -> list[str]:
    """Names of the modules that match any pattern; raises ValueError for one without a match."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no module of {type(model).__name__} matches {pattern!r}")
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]


def vit_with_fsg(vit_backbone: nn.Module) -> nn.Module:
    """The call of the published example: gate a torchvision ViT, starting from its function."""
    return add_gates(vit_backbone)


# ---------------------------------------------------------------- reading and closing gates
def gated_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The gated branches by name."""
    return {name: module for name, module in model.named_modules() if GATE in module._parameters}


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The gates' logits, one (C,) parameter per branch."""
    return [module.fsg for module in gated_modules(model).values()]


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but the gates' logits."""
    gates = {id(gate) for gate in gate_parameters(model)}
    return [p for p in model.parameters() if id(p) not in gates]


def gate_values(model: nn.Module, relative: bool = False) -> dict[str, torch.Tensor]:
    """The gates themselves, detached, {branch name: (C,)}; relative: over their start value."""
    return {
        name: gate_of(module).detach() / (STARTS[module.fsg_kind] if relative else 1.0)
        for name, module in gated_modules(model).items()
    }


def gate_penalty(model: nn.Module) -> torch.Tensor:
    """Scalar to add to the loss, times a weight, so that gates close: the mean gate (L1), or for
    hard gates the mean probability of being open (L0; equation 12 of Louizos et al.)."""
    shift = TEMPERATURE * math.log(-LOW / HIGH)
    terms = [
        torch.sigmoid(module.fsg - shift) if module.fsg_kind == "hard" else gate_of(module)
        for module in gated_modules(model).values()
    ]
    return torch.cat(terms).mean()


def gate_statistics(gate: torch.Tensor) -> dict[str, float]:
    """Sparsity of gates (n,) relative to their start: mean, shares below .05 and .01, Hoyer's and
    Gini's indices (0 all alike, 1 all but one closed) and the effective share (participation)."""
    gate = gate.double().sort().values
    n, total, square = len(gate), gate.sum().item(), gate.square().sum().item()
    some = total > 0  # all closed counts as sparse
    rank = torch.arange(1, n + 1, dtype=gate.dtype, device=gate.device)
    gini = (2 * (rank * gate).sum().item() / total - (n + 1)) / (n - 1) if some and n > 1 else 1.0
    hoyer = (n**0.5 - total / square**0.5) / (n**0.5 - 1) if some and n > 1 else 1.0
    return {
        "mean": total / n,
        "closed_05": (gate < 0.05).double().mean().item(),
        "closed_01": (gate < 0.01).double().mean().item(),
        "hoyer": hoyer,
        "gini": gini,
        "effective": total**2 / (n * square) if some else 0.0,
    }


@torch.no_grad()
def gate_contributions(model: nn.Module, run: Callable[[], object]) -> dict[str, torch.Tensor]:
    """What each gated channel adds to its branch over the forward passes of run(): (C,) of mean
    1, the mean size of its output. Unlike a gate it does not change when gate and weight are
    rescaled against each other."""
    sums = {name: torch.zeros_like(gate) for name, gate in gate_values(model).items()}

    def record(name: str):
        def hook(module, inputs, output):  # comes after apply_gate and sees what that returned
            branch = output[0] if isinstance(output, tuple) else output
            sums[name] += branch.abs().float().movedim(module.fsg_axis, -1).flatten(0, -2).sum(0)

        return hook

    with ExitStack() as stack:
        for name, module in gated_modules(model).items():
            stack.enter_context(module.register_forward_hook(record(name)))
        run()
    return {name: value / value.mean().clamp_min(1e-30) for name, value in sums.items()}


@torch.no_grad()
def prune_gates(
    model: nn.Module, share: float, scores: dict[str, torch.Tensor] | None = None
) -> nn.Module:
    """Close the `share` (0 to 1) of all gates with the lowest score for good; returns the model.

    scores: {branch name: (C,)} such as gate_contributions; None for the gates' values. Raises
    ValueError where the share is out of range.
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
def pruned(
    model: nn.Module, share: float, scores: dict[str, torch.Tensor] | None = None
) -> Iterator[nn.Module]:
    """Gates closed as by prune_gates inside the block, as they were after it."""
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
    """Multiply every gate into the layer before it and remove it: the plain network, its keys."""
    for module in gated_modules(model).values():
        layer, gate = producer(module), gate_of(module)
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
    """Parameters that take no gradient inside the block."""
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
    """Batch norms that use the batch but do not learn from it inside the block."""
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
    """One optimisation step in which gates and weights have an optimizer each.

    mode "single": one forward and one backward pass, both optimizers step from the same point;
    "sequential": the gates step first on a pass of their own, then the weights on a second pass
    at the new gates, each with the other frozen; "held_out": the same with the gates' pass on a
    batch that the weights are not fitted to, a first-order bilevel step; "upstream": as published,
    both passes reach all parameters, the gradients of the weights add up, and clipping takes the
    norm over everything; "off": one optimizer holds all parameters.
    clip, gate_clip: largest norm of the gradients of weights and gates, each by itself.
    Raises ValueError where mode and optimizers contradict or the model has no gates.
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
        """Every gate belongs to the gate optimizer alone: found by identity, not by name."""
        if self.gate_optimizer is None:
            return
        gate_ids = {id(gate) for gate in self.gates}
        owned = [{id(p) for g in o.param_groups for p in g["params"]} for o in self.optimizers]
        if not gate_ids or owned[1] != gate_ids or owned[0] & gate_ids:
            raise ValueError(
                f"the model has {len(gate_ids)} gates, gate_optimizer {len(owned[1])} parameters, "
                f"optimizer {len(owned[0] & gate_ids)} of the gates; gate_optimizer should hold "
                "gate_parameters(model) and optimizer the rest"
            )

    def scale_lr(self, factor: float) -> None:
        """Set all learning rates to `factor` times what they were at construction."""
        for optimizer, base_lrs in zip(self.optimizers, self.base_lrs, strict=True):
            for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base_lr * factor

    def step(self, loss_fn: Callable, gate_loss_fn: Callable | None = None) -> torch.Tensor:
        """Take one step on the loss that `loss_fn()` computes; returns it, detached.

        gate_loss_fn: the loss that the gates step on where they have a pass of their own;
        "held_out" asks for one, on other images. Raises ValueError where it does not fit the mode.
        """
        alone = self.mode in ("sequential", "held_out", "upstream")
        if (gate_loss_fn is None and self.mode == "held_out") or (gate_loss_fn and not alone):
            raise ValueError(f"mode {self.mode!r} does not go with gate_loss_fn {gate_loss_fn}")
        self._zero_grad()
        if not alone:
            return self._pass(loss_fn, self.optimizers)
        if self.mode == "upstream":
            self._pass(gate_loss_fn or loss_fn, [self.gate_optimizer])
            return self._pass(loss_fn, [self.optimizer])
        with self._frozen(self.weights), frozen_statistics(self.model):
            self._pass(gate_loss_fn or loss_fn, [self.gate_optimizer])
        self._zero_grad()
        with self._frozen(self.gates):
            return self._pass(loss_fn, [self.optimizer])

    def _frozen(self, parameters: list[nn.Parameter]):
        # freezing only saves time; DistributedDataParallel waits for every gradient it was made for
        parallel = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return frozen([] if parallel else parameters)

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _pass(self, loss_fn: Callable, optimizers: list[torch.optim.Optimizer]) -> torch.Tensor:
        loss = loss_fn()
        self.scaler.scale(loss).backward()
        for optimizer in optimizers:
            if (clip := self.clips[id(optimizer)]) is not None:
                self.scaler.unscale_(optimizer)
                own = [p for group in optimizer.param_groups for p in group["params"]]
                norm_of = self.model.parameters() if self.mode == "upstream" else own
                nn.utils.clip_grad_norm_(norm_of, clip)
            self.scaler.step(optimizer)
        self.scaler.update()
        return loss.detach()
