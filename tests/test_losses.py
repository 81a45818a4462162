"""What training minimises and how fast: losses, mixup, schedules, moving averages."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_train import fit
from torch.nn import functional as F

import losses
from dataset import Batch
from losses import LOSSES, lr_factor


def test_focal_loss_is_the_formula_on_hard_and_soft_targets():
    logit, target = torch.tensor([[0.3], [-2.0], [1.5]]), torch.tensor([1.0, 0.0, 0.0])
    p = torch.tensor([0.3, 2.0, -1.5]).sigmoid()  # probability of the true class
    assert torch.allclose(losses.focal_loss(logit, target), -((1 - p) ** 2) * p.log())
    assert torch.allclose(losses.focal_loss(logit, target, gamma=0.5), -((1 - p) ** 0.5) * p.log())
    positive, negative = (losses.focal_loss(logit, torch.full((3,), label)) for label in (1.0, 0.0))
    mixed = losses.focal_loss(logit, torch.full((3,), 0.3), pos_weight=5.0)
    assert torch.allclose(mixed, 5 * 0.3 * positive + 0.7 * negative)


def test_bce_is_torchs_on_soft_targets_with_a_weight_of_positives():
    logit, soft = torch.tensor([[0.3], [-2.0], [1.5]]), torch.tensor([0.7, 0.2, 1.0])
    expected = F.binary_cross_entropy_with_logits(
        logit.squeeze(1), soft, pos_weight=torch.tensor(3.0), reduction="none"
    )
    assert torch.allclose(LOSSES["bce"](logit, soft, pos_weight=3.0), expected)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_certain_mistakes_have_a_finite_loss_and_gradient(name):
    logit = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    loss = LOSSES[name](logit, torch.tensor([0.0, 1.0]))
    loss.sum().backward()
    assert torch.allclose(loss, torch.tensor(200.0))
    assert torch.allclose(logit.grad, torch.tensor([[1.0], [-1.0]]))
    assert np.isfinite(losses.loss_of_prob(name, np.array([0.0, 1.0]), np.array([1, 0])))


def test_the_loss_of_probabilities_is_that_of_their_logits():
    logit, target = torch.tensor([0.3, -2.0, 1.5], dtype=torch.float64), np.array([1, 0, 0])
    expected = losses.focal_loss(logit[:, None], torch.from_numpy(target).double()).mean().item()
    assert losses.loss_of_prob("focal", logit.sigmoid().numpy(), target) == pytest.approx(expected)


def test_a_new_loss_is_one_function_and_one_row(data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "mine", lambda logit, target, pos_weight=1.0: (logit.squeeze(1) - 4 * target) ** 2)
    run = fit(data_dir, tmp_path, "--loss", "mine", "--fold", 0, "--tta", 1)
    oof = pd.read_csv(run / "oof.csv")
    logit = np.log(oof["prob"] / (1 - oof["prob"]))
    assert pd.read_csv(run / "log.csv")["valid_loss"][0] == pytest.approx(((logit - 4 * oof["target"]) ** 2).mean())


def test_guide_loss_is_the_divergence_of_each_map():
    guide = torch.tensor([[[0.5, 0.5], [0.0, 0.0]], [[0.25, 0.25], [0.25, 0.25]]])
    assert torch.allclose(losses.guide_loss(guide, guide), torch.zeros(2))
    uniform = torch.full((2, 2, 2), 0.25)
    assert torch.allclose(losses.guide_loss(uniform, guide), torch.tensor([2.0, 1.0]).log())


def test_mixup_and_smoothing_mix_what_belongs_together():
    row = torch.arange(4.0)
    image = (10 * row).to(torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    batch = Batch(image, row[:, None], torch.tensor([0.0, 1, 0, 1]), torch.ones(4), row.view(4, 1, 1).expand(4, 2, 2))
    torch.manual_seed(0)
    shares = []
    for _ in range(200):
        mixed = losses.mix_and_smooth(batch, 0.4, 0.0)
        assert torch.allclose(mixed.image[:, 0, 0, 0] * 255, 10 * mixed.meta[:, 0])
        assert torch.allclose(mixed.guide[:, 1, 1], mixed.meta[:, 0])
        assert mixed.meta.sum().item() == pytest.approx(6)  # a permutation
        assert mixed.target.sum().item() == pytest.approx(2)
        shares.append(mixed.meta[0].item())
    assert min(shares) < 0.1
    assert max(shares) > 2
    smooth = losses.mix_and_smooth(batch, 0.0, 0.2)
    assert torch.allclose(smooth.target, torch.tensor([0.1, 0.9, 0.1, 0.9]))
    assert smooth.image is batch.image


def test_schedules():
    assert [lr_factor("exponential", epoch, 5) for epoch in (1, 3)] == [1, pytest.approx(0.9025)]
    cosine = [lr_factor("cosine", epoch, 5) for epoch in range(1, 6)]
    assert cosine[:2] == [0.1, 1.0]
    assert cosine[1:] == sorted(cosine[1:], reverse=True)
    assert 0 < cosine[-1] < 0.2
    assert lr_factor("cosine", 1, 1) == 1  # nothing would follow the warm-up


def test_a_young_average_follows_the_weights_and_an_old_one_is_slow():
    model, decay = torch.nn.BatchNorm1d(1), 0.999
    average, expected = losses.average_of(model, decay), None
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(step)
            model.running_mean.fill_(-step)
            model.num_batches_tracked.fill_(step)
        average.update_parameters(model)
        share = min(decay, (1 + step) / (10 + step))
        expected = step if expected is None else share * expected + (1 - share) * step
        if step == 14:
            assert expected > 7  # a decay of .999 from the start on would be at 0.1
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-4)
    assert average.module.running_mean.item() == pytest.approx(-expected, rel=1e-4)
    assert losses.average_of(model, None) is None


def test_every_seed_fold_and_epoch_draws_anew():
    seeds = {losses.epoch_seed(seed, fold, epoch) for seed in range(3) for fold in range(3) for epoch in range(5)}
    assert len(seeds) == 45
