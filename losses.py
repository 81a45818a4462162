"""What training minimises and how fast: losses, mixup, learning rate schedules, moving averages of weights.

A new loss is a function (logit (N, K), goal (N, K), weight (K,)) -> (N, K), or (N, 1) if it couples the outputs, and a
row of a table below.

References:
    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017. Zhang et al., mixup, ICLR 2018.
    Roffo et al., Feature Selection Gates with Gradient Routing, MICCAI 2024: the loss of sizes.
    McCullagh, Regression Models for Ordinal Data, JRSS B 1980: the cumulative link.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import sigmoid_focal_loss

from scores import bands_of

STEEPNESS = 4.0  # of ordinal cross-entropy: one standard deviation above a cut is above it with probability .98


def focal_loss(logit: torch.Tensor, goal: torch.Tensor, weight=1.0, gamma: float = 2.0) -> torch.Tensor:
    """Focal loss of every label; gamma 0 is cross-entropy. A goal between 0 and 1 is that share of a positive's loss
    and the rest of a negative's. weight: of the positives. Lin et al. 2017, equation 4."""
    loss = partial(sigmoid_focal_loss, alpha=-1, gamma=gamma)
    positive, negative = loss(logit, torch.ones_like(goal)), loss(logit, torch.zeros_like(goal))
    return weight * goal * positive + (1 - goal) * negative


def focal_loss_of_classes(logit: torch.Tensor, goal: torch.Tensor, weight=1.0, gamma: float = 2.0) -> torch.Tensor:
    """Focal loss over classes (N, 1), of which the goal is a distribution; gamma 0 is cross-entropy."""
    log_prob = logit.log_softmax(dim=1)
    return -(weight * goal * (1 - log_prob.exp()) ** gamma * log_prob).sum(dim=1, keepdim=True)


def weighted(loss: Callable) -> Callable:
    """A loss of torch for quantities, with a weight."""
    return lambda logit, goal, weight=1.0: weight * loss(logit, goal, reduction="none")


def weighted_size_loss(
    logit: torch.Tensor, goal: torch.Tensor, weight=1.0, alpha: float = 0.25, beta: float = 0.25, gamma: float = 0.5
) -> torch.Tensor:
    """alpha |e| + beta e^2 + gamma smooth L1 of the error e in standard deviations. Roffo et al. 2024, whose weights of
    sizes are `weight`."""
    error = logit - goal
    smooth = F.smooth_l1_loss(logit, goal, reduction="none")
    return weight * (alpha * error.abs() + beta * error.square() + gamma * smooth)


def cumulative_loss(logit: torch.Tensor, goal: torch.Tensor, weight=1.0, cuts: tuple = ()) -> torch.Tensor:
    """Ordinal cross-entropy: mean over the cuts of the cross-entropy of lying above it. A cumulative link (McCullagh
    1980) whose thresholds are the cuts themselves, so that the logit stays the standardised quantity."""
    band = bands_of(goal, cuts)
    each = [F.binary_cross_entropy_with_logits(STEEPNESS * (logit - cut), (band > j).to(logit), reduction="none")
            for j, cut in enumerate(cuts)]  # fmt: skip
    return weight * torch.stack(each).mean(dim=0)


# by kind of output (tasks.py names them); the first row is what train.py takes by default
OF_LABELS: dict[str, Callable] = {"focal": focal_loss, "bce": partial(focal_loss, gamma=0.0)}
OF_CLASSES = {"focal": focal_loss_of_classes, "ce": partial(focal_loss_of_classes, gamma=0.0)}
OF_QUANTITIES = {"smooth_l1": weighted(F.smooth_l1_loss), "l1": weighted(F.l1_loss), "mse": weighted(F.mse_loss),
                 "weighted": weighted_size_loss, "cumulative": cumulative_loss}  # fmt: skip
NEED_CUTS = ("cumulative",)


def loss_of(task, name: str, logit: torch.Tensor | list, goal: torch.Tensor, weight=1.0) -> torch.Tensor:
    """Loss (N,) of logit (N, K) for goal (N, K): the mean over the outputs whose goal is known, 0 if none is. Of
    several logits, as a scout with witnesses has, their mean."""
    if isinstance(logit, list):
        return torch.stack([loss_of(task, name, one, goal, weight) for one in logit]).mean(dim=0)
    logit, goal_ = logit if logit.dtype == torch.float64 else logit.float(), goal.nan_to_num()
    more = {"cuts": task.standard_cuts} if name in NEED_CUTS else {}
    if task.cuts and torch.is_tensor(weight) and len(weight) > 1:  # of the classes between cuts
        weight = weight[bands_of(goal_, task.standard_cuts)]
    each = task.losses()[name](logit, goal_, weight, **more)
    known = ~goal.isnan()[:, : each.shape[1]]
    return each.where(known, 0).sum(dim=1) / known.sum(dim=1).clamp_min(1)


def loss_of_prob(task, name: str, prob: np.ndarray, goal: np.ndarray) -> float:
    """Mean loss of predictions (N, K) for goals (N, K), of rows in which one is known."""
    known = ~np.isnan(goal).all(axis=1)
    logit, goal = (torch.from_numpy(part[known]).double() for part in (task.logit(prob), goal))
    return loss_of(task, name, logit, goal).mean().item()


def guide_loss(attention: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence (N,) of attention (N, h, w) from maps (N, h, w); both sum to 1."""
    return F.kl_div(attention.clamp_min(1e-12).log(), guide, reduction="none").sum((1, 2))


def mix_and_smooth(batch, mixup: float, smoothing: float, neutral: float):
    """A dataset.Batch whose rows are mixed in pairs by a share from Beta(mixup, mixup), goals drawn towards neutral."""
    if mixup:
        share = torch.distributions.Beta(mixup, mixup).sample().item()
        other = torch.randperm(len(batch.image)).to(batch.image.device)

        def mix(part: torch.Tensor) -> torch.Tensor:
            return share * part + (1 - share) * part[other] if part.numel() else part

        image = batch.image.float() / 255
        batch = batch._replace(image=mix(image), meta=mix(batch.meta), goal=mix(batch.goal), guide=mix(batch.guide))
    return batch._replace(goal=batch.goal.lerp(torch.full_like(batch.goal, neutral), smoothing))


def lr_factor(schedule: str, epoch: int, epochs: int) -> float:
    """Factor on the learning rates in an epoch, counted from 1: 0.95 per epoch, or one epoch of warm-up at a tenth and
    half a cosine."""
    if schedule == "exponential" or epochs == 1:
        return 0.95 ** (epoch - 1)
    return 0.1 if epoch == 1 else 0.5 * (1 + math.cos(math.pi * (epoch - 2) / (epochs - 1)))


def average_of(model: torch.nn.Module, decay: float | None) -> AveragedModel | None:
    """Moving average of a model's weights and buffers; the decay rises to its value, so that early epochs count."""

    def update(averages, values, n):
        get_ema_multi_avg_fn(min(decay, (1 + int(n)) / (10 + int(n))))(averages, values, n)

    return None if decay is None else AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def epoch_seed(seed: int, fold: int, epoch: int) -> int:
    """Seed of one epoch: a resumed run draws what an uninterrupted one would have drawn."""
    return int(np.random.SeedSequence([seed, fold, epoch]).generate_state(1)[0])
