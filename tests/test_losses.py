"""What training minimises and how fast: losses, mixup, schedules, moving averages."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_train import fit
from torch.nn import functional as F

import losses
from dataset import Batch
from losses import OF_CLASSES, OF_LABELS, lr_factor
from tasks import Binary, MultiLabel

BINARY = Binary(("1",), "auc")
LOGIT = torch.tensor([[0.3], [-2.0], [1.5]])


def test_losses_are_the_formulas_on_hard_and_soft_targets():
    p = torch.tensor([[0.3], [2.0], [-1.5]]).sigmoid()  # probability of the true class
    for gamma in (0.5, 2.0):
        loss = losses.focal_loss(LOGIT, torch.tensor([[1.0], [0.0], [0.0]]), gamma=gamma)
        assert torch.allclose(loss, -((1 - p) ** gamma) * p.log())
    positive, negative = (losses.focal_loss(LOGIT, torch.full((3, 1), label)) for label in (1.0, 0.0))
    mixed = losses.focal_loss(LOGIT, torch.full((3, 1), 0.3), 5.0)
    assert torch.allclose(mixed, 5 * 0.3 * positive + 0.7 * negative)
    soft, three = torch.tensor([[0.7], [0.2], [1.0]]), torch.tensor(3.0)
    expected = F.binary_cross_entropy_with_logits(LOGIT, soft, pos_weight=three, reduction="none")
    assert torch.allclose(OF_LABELS["bce"](LOGIT, soft, three), expected)
    logit, share = torch.randn(5, 4), torch.rand(5, 4).softmax(dim=1)
    expected = F.cross_entropy(logit, share, reduction="none")
    assert torch.allclose(OF_CLASSES["ce"](logit, share)[:, 0], expected, atol=1e-6)
    hard, p = F.one_hot(torch.arange(4)).float(), logit[:4].softmax(dim=1).diagonal()
    assert torch.allclose(OF_CLASSES["focal"](logit[:4], hard)[:, 0], -((1 - p) ** 2) * p.log(), atol=1e-6)
    guide, uniform = torch.tensor([[[0.5, 0.5], [0, 0]], [[0.25, 0.25], [0.25, 0.25]]]), torch.full((2, 2, 2), 0.25)
    assert torch.allclose(losses.guide_loss(guide, guide), torch.zeros(2))
    assert torch.allclose(losses.guide_loss(uniform, guide), torch.tensor([2.0, 1.0]).log())


@pytest.mark.parametrize("name", OF_LABELS)
def test_certain_mistakes_have_a_finite_loss_and_gradient(name):
    logit = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    loss = OF_LABELS[name](logit, torch.tensor([[0.0], [1.0]]))
    loss.sum().backward()
    assert torch.allclose(loss, torch.tensor(200.0))
    assert torch.allclose(logit.grad, torch.tensor([[1.0], [-1.0]]))
    assert np.isfinite(losses.loss_of_prob(BINARY, name, np.array([[0.0], [1.0]]), np.array([[1], [0]])))


def test_a_new_loss_is_one_function_and_one_row(data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(OF_LABELS, "mine", lambda logit, goal, weight: (logit - 4 * goal) ** 2)
    run = fit(data_dir, tmp_path, "--loss", "mine", "--fold", 0, "--tta", 1)
    oof, log = pd.read_csv(run / "oof.csv"), pd.read_csv(run / "log.csv")
    expected = (np.log(oof["prob"] / (1 - oof["prob"])) - 4 * oof["target"]) ** 2
    assert log["valid_loss"][0] == pytest.approx(expected.mean())
    assert log["train_loss"][0] > 2


def test_mixup_and_smoothing_mix_what_belongs_together():
    row, shares = torch.arange(4.0), []
    image = (10 * row).to(torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    goal, guide = torch.tensor([[0.0], [1], [0], [1]]), row.view(4, 1, 1).expand(4, 2, 2)
    batch = Batch(image, row[:, None], goal, torch.ones(4), guide)
    torch.manual_seed(0)
    for _ in range(200):
        mixed = losses.mix_and_smooth(batch, 0.4, 0.0, 0.5)
        assert torch.allclose(mixed.image[:, 0, 0, 0] * 255, 10 * mixed.meta[:, 0])
        assert torch.allclose(mixed.guide[:, 1, 1], mixed.meta[:, 0])
        assert (mixed.meta.sum().item(), mixed.goal.sum().item()) == pytest.approx((6, 2))  # a permutation
        shares.append(mixed.meta[0].item())
    assert min(shares) < 0.1
    assert max(shares) > 2
    smooth = losses.mix_and_smooth(batch, 0.0, 0.2, 0.5)
    assert torch.allclose(smooth.goal, torch.tensor([[0.1], [0.9], [0.1], [0.9]]))


def test_schedules_and_seeds():
    assert len({losses.epoch_seed(*place) for place in np.ndindex(3, 3, 5)}) == 45  # by seed, fold and epoch
    assert [lr_factor("exponential", epoch, 5) for epoch in (1, 3)] == [1, pytest.approx(0.9025)]
    cosine = [lr_factor("cosine", epoch, 5) for epoch in range(1, 6)]
    assert cosine[:2] == [0.1, 1.0]
    assert 1 > cosine[2] > cosine[3] > cosine[4] > 0
    assert lr_factor("cosine", 1, 1) == 1  # nothing would follow the warm-up


def test_a_young_average_follows_the_weights_and_an_old_one_is_slow():
    model = torch.nn.BatchNorm1d(1)
    average, expected = losses.average_of(model, 0.999), 0.0
    for step in range(200):
        torch.nn.init.constant_(model.weight, step)
        model.running_mean.fill_(-step)
        average.update_parameters(model)
        share = min(0.999, (1 + step) / (10 + step))
        expected = share * expected + (1 - share) * step
        assert step != 14 or expected > 7  # .999 from the start on would be at 0.1
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-4)
    assert average.module.running_mean.item() == pytest.approx(-expected, rel=1e-4)


def test_several_logits_are_learned_alike():
    task, goal = BINARY, torch.tensor([[1.0], [0.0], [float("nan")]])
    first, second = torch.randn(3, 1), torch.randn(3, 1).bfloat16()
    each = [losses.loss_of(task, "bce", logit.float(), goal) for logit in (first, second)]
    assert torch.allclose(losses.loss_of(task, "bce", [first, second], goal), sum(each) / 2)


def test_bce_of_several_labels_is_torchs_multi_label_soft_margin_loss():
    task = MultiLabel(("a", "b", "c"), "ap")
    logit, goal = torch.randn(4, 3), torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    expected = F.multilabel_soft_margin_loss(logit, goal, reduction="none")
    torch.testing.assert_close(losses.loss_of(task, "bce", logit, goal), expected)
