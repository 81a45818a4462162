"""The benchmark of techniques: each does what its paper says, and the table tells a gain from noise."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

pytest.importorskip("timm")
sys.path.insert(0, str(ROOT / "benchmarks"))
import papers
import techniques


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (96, 3, 32, 32), np.uint8))
    target = np.arange(96) % 2
    return techniques.Problem("drawn", image, image.flip(2), target, np.arange(96) // 2, np.arange(96) % 3,
                              {"cnn": 1, "vit": 1}, 8, 2, "regnet_tiny")  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(papers.TRAININGS) - {"cross fusion"}))
def test_every_technique_trains_and_predicts(problem, name):
    for kind in papers.TRAININGS[name].kinds:
        rows, test = problem.split(0)
        way = papers.TRAININGS[name](problem, kind, rows, 0)
        prob = problem.predict(problem.run(way), test, way.pictures)
        assert prob.shape == (32, 2)
        assert np.allclose(prob.sum(axis=1), 1, atol=1e-5)


def test_evit_keeps_what_the_class_token_looks_at(monkeypatch):
    plain, thin = (papers.vit_mini(32, 2, make).eval() for make in (papers.VisionTransformer, papers.Reorganised))
    thin.load_state_dict(plain.state_dict())
    image, lengths = torch.rand(2, 3, 32, 32), []
    thin.blocks[-1].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    assert not torch.allclose(plain(image), thin(image), atol=1e-5)
    assert lengths == [1 + round(0.7 * (round(0.7 * 64) + 1)) + 1]
    monkeypatch.setattr(thin, "keep_after", ())
    assert torch.equal(plain(image), thin(image))


def test_patch_mixing_labels_are_shares_of_pixels(problem):
    way = papers.PatchMixing(problem, "cnn", np.arange(96), 0)
    image = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 32, 32)
    mixed = [way.change(image, torch.eye(8)) for _ in range(20)]
    assert any(not torch.equal(new, image) for new, _ in mixed)
    for new, target in mixed:
        shares = torch.stack([(new[:, 0] == i).float().mean(dim=(1, 2)) for i in range(8)], dim=1)
        assert torch.allclose(shares, target, atol=1e-6)


def test_sam_without_a_radius_is_the_plain_step(problem, monkeypatch):
    monkeypatch.setattr(papers, "RHO", {"cnn": 0.0})
    states = []
    for kind in (papers.Plain, papers.Sam):
        torch.manual_seed(0)
        network = (way := kind(problem, "cnn", np.arange(32), 0)).build().train()
        optimizer, rows = torch.optim.SGD(network.parameters(), 0.1), np.arange(32)
        way.step(network, optimizer, problem.whole[:32], problem.one_hot(rows))
        states.append(network.state_dict())
    for key, value in states[0].items():
        if "num_batches" not in key:
            assert torch.allclose(value, states[1][key], atol=1e-6), key


def test_shifted_views_undo_their_shifts():
    def cells(x):
        return torch.nn.functional.avg_pool2d(x.mean(dim=1, keepdim=True), 4)[:, 0]

    image = torch.rand(2, 3, 32, 32)
    found, true = papers.shifted_views(cells, image, 8), cells(image)
    assert torch.corrcoef(torch.stack([found.flatten(), true.flatten()]))[0, 1] > 0.6
    stuck = torch.zeros(2, 8, 8)
    stuck[:, 1, 6] = 10.0  # an artefact that stays where it is
    assert papers.shifted_views(lambda x: stuck, image, 8).max() < 4


def test_a_planted_gain_is_found_and_noise_is_not(problem):
    rng, pairs, same = np.random.default_rng(1), [], []
    for seed in range(3):
        _, test = problem.split(seed)
        prob = rng.uniform(size=(len(test), 2))
        good = np.eye(2)[problem.target[test]] + 0.1 * prob
        pairs.append((test, prob, good))
        same.append((test, prob, prob + rng.normal(0, 0.01, prob.shape)))
    planted, noise = (techniques.compare(problem, "x", "y", "AUC", each) for each in (pairs, same))
    assert planted["with"] == 1.0
    assert planted["p"] < 0.001 < noise["p"]


def test_the_table_keeps_rows_whose_trainings_are_elsewhere(problem, tmp_path, monkeypatch, capsys):
    row = {"technique": "x", "where": "drawn", "score": "AUC", "without": 0.5, "with": 0.9, "gain": 0.4, "low": 0.3,
           "high": 0.5, "p": 0.001}  # fmt: skip
    monkeypatch.setattr(techniques, "FOUND", tmp_path / "found.csv")
    old = "x,drawn,AUC,.5,.6,.1,-.1,.3,.3", "y,skin,AUC,.5,.4,-.1,-.2,0,.02"
    (tmp_path / "found.csv").write_text("\n".join([",".join(row), *old]))
    monkeypatch.setattr(techniques, "SETS", {"drawn": lambda args: problem})
    monkeypatch.setattr(techniques, "rows_of", lambda *_: [row])
    techniques.show_table(techniques.get_args_parser().parse_args(["table", "--sets", "drawn"]))
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| x | drawn | AUC | 0.500 | 0.900 | +0.400 [+0.300, +0.500] | 0.0010 | 0.002 | better |",
        "| y | skin | AUC | 0.500 | 0.400 | -0.100 [-0.200, +0.000] | 0.0200 | 0.020 | worse |",
    ]
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 3
