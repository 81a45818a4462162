"""What training minimises and how fast: losses, mixup, learning rate schedules, moving averages of weights.

A new loss is a function (logit (N, 1), target (N,), pos_weight) -> (N,) and a row of LOSSES.

References:
    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017. Zhang et al., mixup, ICLR 2018.
"""

import math
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import sigmoid_focal_loss


def focal_loss(logit: torch.Tensor, target: torch.Tensor, gamma: float = 2.0, pos_weight: float = 1.0) -> torch.Tensor:
    """Focal loss (N,) of logit (N, 1) and target (N,) in 0..1; gamma 0 is cross-entropy. A target between 0 and 1 is
    that share of a positive's loss and the rest of a negative's. pos_weight: of the positives. Lin et al. 2017,
    equation 4."""
    logit, loss = logit.squeeze(1), partial(sigmoid_focal_loss, alpha=-1, gamma=gamma)
    positive, negative = loss(logit, torch.ones_like(target)), loss(logit, torch.zeros_like(target))
    return pos_weight * target * positive + (1 - target) * negative


LOSSES = {"focal": focal_loss, "bce": partial(focal_loss, gamma=0.0)}


def loss_of_prob(name: str, prob: np.ndarray, target: np.ndarray) -> float:
    """Mean loss of probabilities (N,) for targets (N,)."""
    logit = torch.from_numpy(prob).clamp(1e-7, 1 - 1e-7).logit().unsqueeze(1)
    return LOSSES[name](logit, torch.from_numpy(target).double()).mean().item()


def guide_loss(attention: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence (N,) of attention (N, h, w) from maps (N, h, w); both sum to 1."""
    return F.kl_div(attention.clamp_min(1e-12).log(), guide, reduction="none").sum((1, 2))


def mix_and_smooth(batch, mixup: float, smoothing: float):
    """A dataset.Batch whose rows are mixed in pairs by a share from Beta(mixup, mixup), targets drawn towards 1/2."""
    if mixup:
        share = torch.distributions.Beta(mixup, mixup).sample().item()
        other = torch.randperm(len(batch.image)).to(batch.image.device)

        def mix(part: torch.Tensor) -> torch.Tensor:
            return share * part + (1 - share) * part[other] if part.numel() else part

        image = batch.image.float() / 255
        batch = batch._replace(image=mix(image), meta=mix(batch.meta), target=mix(batch.target), guide=mix(batch.guide))
    return batch._replace(target=batch.target.lerp(torch.full_like(batch.target, 0.5), smoothing))


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
