"""Feature-Selection Gates and Gradient Routing for any network; this file needs torch alone.

    from fsg import add_gates, GradientRouting
    model = add_gates(torchvision.models.vit_b_16())      # the same function, now with gates
    routing = GradientRouting(model, optimizer, gate_optimizer)
    loss = routing.step(lambda: criterion(model(image), target))

A gate is one learnable logit w per channel of a residual branch's output y, so that the block
computes x + g(w) * y. It lives as the parameter `fsg` of the branch's own module and is applied
by a forward hook: no key of the plain network's state_dict changes its name.

References:
    Roffo, Biffi, Salvagnini, Cherubini. Feature Selection Gates with Gradient Routing for
    Endoscopic Image Computing. MICCAI 2024, arXiv 2407.04400. The gate, its place and the two
    passes are theirs; the identity start and the single routed pass are ours.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn

GATE = "fsg"
# residual branches by the class name of their block; the branch is gated before the skip is added
BRANCHES = {
    "EncoderBlock": ("self_attention", "mlp"),  # torchvision ViT
    "BasicBlock": ("bn2",),  # torchvision ResNet 18 and 34
    "Bottleneck": ("bn3",),  # torchvision ResNet 50 and deeper
    "ResBottleneckBlock": ("f",),  # torchvision RegNet
}
CHANNELS_LAST = (nn.Linear,)
CHANNELS_FIRST = (nn.Conv2d, nn.BatchNorm2d)
MODES = ("off", "single", "sequential", "upstream")


def gate_of(module: nn.Module) -> torch.Tensor:
    """Gate (C,) of a gated module: 2 * sigmoid(w) in (0, 2), or the paper's sigmoid(w)."""
    return module.fsg_scale * torch.sigmoid(module.fsg)


def apply_gate(module: nn.Module, inputs, output):
    """Forward hook: multiply the output (the first of a tuple) by the gate along its channels."""
    branch = output[0] if isinstance(output, tuple) else output
    shape = [1] * branch.ndim
    shape[module.fsg_axis] = -1
    # a module-level function, not a closure: a deep copy of the network must use its own gates
    gated = branch * gate_of(module).view(shape).to(branch.dtype)
    return (gated, *output[1:]) if isinstance(output, tuple) else gated


def producer(branch: nn.Module) -> nn.Module:
    """The layer that makes a branch's output: the last linear, convolution or batch norm in it."""
    layers = [m for m in branch.modules() if isinstance(m, CHANNELS_LAST + CHANNELS_FIRST)]
    if not layers:
        raise ValueError(f"a gate needs a linear, convolution or batch norm in {branch}")
    return layers[-1]


def find_sites(model: nn.Module) -> list[str]:
    """Names of the residual branches of a known network; raises ValueError for others."""
    sites = [
        f"{name}.{branch}" if name else branch
        for name, module in model.named_modules()
        for branch in BRANCHES.get(type(module).__name__, ())
        if hasattr(module, branch)
    ]
    if not sites:
        blocks = sorted({type(m).__name__ for m in model.modules() if len(list(m.children())) > 1})
        raise ValueError(
            f"no residual branch known in {type(model).__name__}; pass sites=[...], patterns of "
            f"module names. Its composite modules are {', '.join(blocks)}"
        )
    return sites


def add_gates(
    model: nn.Module, sites: Iterable[str] | None = None, init: str = "identity"
) -> nn.Module:
    """Give every residual branch of a network a gate per channel; returns the same model.

    sites: patterns of module names (`encoder.layers.*.mlp`); None for a known family.
    init: "identity" starts every gate at exactly 1 and keeps the network's function bit for bit;
    "paper" starts at sigmoid(Xavier normal), about 0.5 (equation 2 of the paper).
    Raises ValueError where nothing matches or a branch is gated already.
    """
    if init not in ("identity", "paper"):
        raise ValueError(f"init {init!r} is neither 'identity' nor 'paper'")
    if sites is None:
        names = find_sites(model)
    else:
        patterns = list(sites)
        names = [n for n, _ in model.named_modules() if any(fnmatchcase(n, p) for p in patterns)]
        if not names:
            raise ValueError(f"no module of {type(model).__name__} matches {patterns}")
    for name in names:
        branch = model.get_submodule(name)
        if hasattr(branch, GATE):
            raise ValueError(f"{name} has a gate already")
        layer = producer(branch)
        logit = torch.zeros(len(layer.weight), device=layer.weight.device)
        if init == "paper":
            nn.init.xavier_normal_(logit.unsqueeze(0))
        branch.register_parameter(GATE, nn.Parameter(logit))
        branch.fsg_scale = 2.0 if init == "identity" else 1.0
        # by the layer and not by the rank: Swin's maps have four dimensions, channels last
        branch.fsg_axis = -1 if isinstance(layer, CHANNELS_LAST) else 1
        branch.register_forward_hook(apply_gate)
    return model


def vit_with_fsg(vit_backbone: nn.Module) -> nn.Module:
    """The call of the published example: gate a torchvision ViT, starting from its function."""
    return add_gates(vit_backbone)


def gated_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The gated branches by name."""
    return {name: module for name, module in model.named_modules() if GATE in module._parameters}


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The gates' logits, one (C,) parameter per branch."""
    return [module.fsg for module in gated_modules(model).values()]


def gate_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gates themselves, detached, as {branch name: (C,)}."""
    return {name: gate_of(module).detach() for name, module in gated_modules(model).items()}


@torch.no_grad()
def fold_gates(model: nn.Module) -> nn.Module:
    """Multiply every gate into the layer before it and remove it: the plain network, its keys."""
    for module in gated_modules(model).values():
        layer, gate = producer(module), gate_of(module)
        layer.weight.mul_(gate.view(-1, *[1] * (layer.weight.ndim - 1)))
        if layer.bias is not None:
            layer.bias.mul_(gate)
        del module.fsg, module.fsg_scale, module.fsg_axis
        for key in [k for k, hook in module._forward_hooks.items() if hook is apply_gate]:
            del module._forward_hooks[key]
    return model


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
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class GradientRouting:
    """One optimisation step in which gates and weights have an optimizer each.

    mode "single": one forward and one backward pass, both optimizers step from the same point;
    "sequential": the gates step first on a pass of their own, then the weights on a second pass
    at the new gates, each with the other frozen; "upstream": as published, both passes reach all
    parameters and gradients of the weights add up; "off": one optimizer holds all parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gate_optimizer: torch.optim.Optimizer | None = None,
        mode: str = "single",
        scaler: torch.amp.GradScaler | None = None,
    ):
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        if (gate_optimizer is None) != (mode == "off"):
            raise ValueError(f"mode {mode!r} and gate_optimizer {gate_optimizer} contradict")
        self.model, self.mode = model, mode
        self.optimizer, self.gate_optimizer = optimizer, gate_optimizer
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self.gates = gate_parameters(model)
        ids = {id(gate) for gate in self.gates}
        self.weights = [p for p in model.parameters() if id(p) not in ids]

    def step(self, loss_fn: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Take one step on the loss that `loss_fn()` computes; returns it, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.gate_optimizer is not None:
            self.gate_optimizer.zero_grad(set_to_none=True)
        if self.mode == "sequential":
            with frozen(self.weights), frozen_statistics(self.model):
                self._pass(loss_fn, self.gate_optimizer)
            with frozen(self.gates):
                return self._pass(loss_fn, self.optimizer)
        if self.mode == "upstream":
            self._pass(loss_fn, self.gate_optimizer)
            return self._pass(loss_fn, self.optimizer)
        both = [self.optimizer, self.gate_optimizer]
        return self._pass(loss_fn, *[each for each in both if each is not None])

    def _pass(self, loss_fn: Callable, *optimizers: torch.optim.Optimizer) -> torch.Tensor:
        loss = loss_fn()
        self.scaler.scale(loss).backward()
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        return loss.detach()
