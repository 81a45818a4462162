"""What gates and gradient routing cost: training steps and predictions side by side.

    python benchmarks/fsg_cost.py --backbone vit_b_16
    python benchmarks/fsg_cost.py --backbone resnet50 --device cuda --batch_size 64

All variants take turns on the same batch, in a new order every round; printed are median times, and the median over
rounds of the ratio to the plain network's time in the same round. "two passes" is the plain way to route: a full
forward and backward pass for the gates, another at the same point for the weights, then both optimizers step.
"""

import argparse
import copy
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fsg
import models
import util
from plumbing.backbones import make_backbone
from plumbing.distributed import pick_device

STEPS = ("plain", "off", "single", "two passes", "sequential", "upstream")
PREDICTIONS = ("plain, predict", "gates, predict", "folded, predict")


def two_passes(routing: fsg.GradientRouting, loss_fn: Callable) -> torch.Tensor:
    """Reference: the gradients of gates and weights from a full pass each, at one point."""
    routing.optimizer.zero_grad()
    routing.gate_optimizer.zero_grad()
    loss_fn().backward()
    gate_grads = [gate.grad for gate in routing.gates]
    for parameter in routing.model.parameters():
        parameter.grad = None
    loss = loss_fn()
    loss.backward()
    for gate, grad in zip(routing.gates, gate_grads, strict=True):
        gate.grad = grad
    routing.optimizer.step()
    routing.gate_optimizer.step()
    return loss


def make_step(plain: nn.Module, variant: str, x: torch.Tensor, amp: str) -> tuple:
    """A function that takes one training step of a variant, and the network it trains."""
    model = copy.deepcopy(plain).train()
    if variant != "plain":
        fsg.add_gates(model)
    gates, weights = fsg.gate_parameters(model), fsg.weight_parameters(model)
    if variant in ("plain", "off"):
        optimizer = torch.optim.AdamW([*weights, *gates], 1e-5)
        routing = fsg.GradientRouting(model, optimizer, mode="off")
    else:
        mode = "single" if variant == "two passes" else variant
        optimizers = torch.optim.AdamW(weights, 1e-5), torch.optim.AdamW(gates, 1e-3)
        routing = fsg.GradientRouting(model, *optimizers, mode)

    def loss_fn():
        with models.autocast(x.device, amp):
            return model(x).float().square().mean()

    if variant == "two passes":
        return lambda: two_passes(routing, loss_fn), model
    return lambda: routing.step(loss_fn), model


def make_prediction(plain: nn.Module, variant: str, x: torch.Tensor, amp: str) -> Callable:
    """A function that predicts one batch."""
    model = copy.deepcopy(plain).eval()
    if not variant.startswith("plain"):
        fsg.add_gates(model)
    if variant.startswith("folded"):
        fsg.fold_gates(model)

    @torch.inference_mode()
    def predict():
        with models.autocast(x.device, amp):
            return model(x)

    return predict


def seconds_of(function: Callable, device: torch.device) -> float:
    """Wall time of one call, with the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    torch.manual_seed(0)
    device = pick_device(args.device)
    plain, head = make_backbone(args.backbone, "none", args.size)
    plain.set_submodule(head, nn.Identity())
    plain = plain.to(device, memory_format=torch.channels_last)
    x = torch.rand(args.batch_size, 3, args.size, args.size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    calls = {name: make_step(plain, name, x, args.amp)[0] for name in STEPS}
    calls |= {name: make_prediction(plain, name, x, args.amp) for name in PREDICTIONS}
    for call in calls.values():
        call()  # warm-up
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, rng = list(calls), np.random.default_rng(0)
    for _ in tqdm(range(args.rounds), unit="round"):
        rng.shuffle(order)
        for name in order:
            times[name].append(seconds_of(calls[name], device))
    kind = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(f"{args.backbone}, {args.batch_size} x {args.size} px, {args.amp}, {args.rounds} rounds, "
          f"{kind or platform.machine()}, {torch.get_num_threads()} threads")  # fmt: skip
    print("| variant | ms | against plain |\n|---|---|---|")
    for name, values in times.items():
        base = times["plain, predict" if name in PREDICTIONS else "plain"]
        ratio = np.median(np.array(values) / np.array(base))
        print(f"| {name} | {1000 * np.median(values):.0f} | {ratio:.3f} |")
    ratio = np.median(np.array(times["two passes"]) / np.array(times["single"]))
    print(f"single is {ratio:.2f} times as fast as two passes")


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    count = util.number(int, 1)
    parser.add_argument("--backbone", default="vit_b_16", help="as of train.py, without weights")
    parser.add_argument("--size", type=count, default=224, help="pixels")
    parser.add_argument("--batch_size", type=count, default=4, help="images per step")
    parser.add_argument("--rounds", type=count, default=15, help="times each variant is run")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="precision")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
