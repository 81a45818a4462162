"""One training: its steps, its extras, its gates, what it looks at, and what it says to bad input."""

import copy
import functools
import multiprocessing.process
import os
import sys
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL_MODEL, call, shell
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dataset
import fsg
import models
import plumbing.runs
import train
from plumbing import gates
from plumbing.arrays import array_path, open_array
from plumbing.data import MetaEncoder, read_data
from plumbing.files import read_json, write_json
from util import InputError, Stopped

GATE_FILES = {"gates.csv", "prune.csv"} | {f"fold0_{name}" for name in ("gates.npy", "gates.png", "gates.csv",
                                                                        "prune.csv")}  # fmt: skip
NO_NORM = ["--backbone", "vit_tiny", "--meta_cols"]  # the metadata branch has batch norms, this backbone none


@functools.cache
def hair_bank(size):
    rng = np.random.default_rng(0)
    return [dataset.DrawHair(size)._draw(rng) for _ in range(64)]


def fit(data_dir, runs, *more, model="resnet"):
    """Train a small network. Figures stay empty and hair is drawn once, which are most of the time otherwise."""
    with (
        mock.patch.object(plumbing.runs, "plot_curves", lambda path, log: path.touch()),
        mock.patch.object(plumbing.runs, "plot_roc", lambda path, oof: path.touch()),
        mock.patch.object(dataset.DrawHair, "bank", property(lambda hair: hair_bank(hair.size))),
    ):
        return call("train", "--model", model, "--data_dir", data_dir, "--runs_dir", runs, *SMALL_MODEL, *more)


def settings(data_dir, *more, model="resnet"):
    words = ["--model", model, "--data_dir", data_dir, *SMALL_MODEL, *more]
    return train.fill_defaults(train.get_args_parser().parse_args([str(word) for word in words]))


def state_of(run, name="fold0_last.pt"):
    """Weights and buffers of a training that ended."""
    return torch.load(run / name, weights_only=True)["state"]["model"]


# ---------------------------------------------------------------- steps
def first_gradients(data_dir, runs, *more, model="resnet"):
    """Gradients of the first step by optimizer: of the weights, of the gates."""
    found = []

    def record(optimizer, args, kwargs):
        found.append([p.grad.flatten().clone() for group in optimizer.param_groups for p in group["params"]])

    hook = register_optimizer_step_pre_hook(record)
    try:
        fit(data_dir, runs, "--fold", 0, "--limit", 4, *more, model=model)
    finally:
        hook.remove()
    return [torch.cat(gradients) for gradients in found]


def test_a_batch_in_parts_has_the_gradient_of_the_whole(data_dir, tmp_path):
    gated = [*NO_NORM, "--gate_l1", 0.5, "--batch_size", 7]
    steps = [first_gradients(data_dir, tmp_path / str(n), *gated, "--accumulate", n, model="fsg_vit")
             for n in (1, 3, 9)]  # fmt: skip
    for whole, *parts in zip(*steps, strict=True):
        assert whole.norm() > 0
        assert all(torch.allclose(whole, part, atol=1e-5) for part in parts)


def test_clipping_holds_the_norm_of_weights_and_of_gates(data_dir, tmp_path):
    free, clipped = (first_gradients(data_dir, tmp_path / str(len(more)), "--fsg", "--gate_l1", 1, *more)
                     for more in ([], ["--clip_grad", 0.001]))  # fmt: skip
    for one, other in zip(free[:2], clipped[:2], strict=True):
        assert one.norm() > 0.002
        assert other.norm().item() == pytest.approx(0.001, rel=1e-3)


def test_extras_change_what_is_trained_on_and_not_what_is_scored(data_dir, tmp_path):
    still = ["--fold", 0, *NO_NORM, "--lr", 0, "--head_lr", 0]

    def losses_with(*more):
        log = pd.read_csv(fit(data_dir, tmp_path / "_".join(map(str, more)), *still, *more) / "log.csv")
        return log["train_loss"][0], log["valid_loss"][0]

    plain = losses_with()
    assert losses_with("--accumulate", 3) == pytest.approx(plain, rel=1e-5)
    for more in (["--pos_weight", 3], ["--label_smoothing", 0.4], ["--mixup", 1], ["--sampler", "shuffle"],
                 ["--amp", "bf16"]):  # fmt: skip
        trained, scored = losses_with(*more)
        assert trained != plain[0], more
        assert scored == pytest.approx(plain[1], rel=0.02), more
    assert losses_with("--loss", "bce")[1] > 2 * plain[1]


def test_the_average_is_scored_and_kept(data_dir, tmp_path, monkeypatch):
    steps, update = [], train.average_of

    def record(model, decay):
        average = update(model, decay)
        inner = average.update_parameters

        def keep(model):
            inner(model)
            steps.append({key: value.clone().float() for key, value in model.state_dict().items()})

        average.update_parameters = keep
        return average

    monkeypatch.setattr(train, "average_of", record)
    run = fit(data_dir, tmp_path, "--fold", 0, "--ema", "0.15", "--batch_size", 4)
    average = steps[0]
    for n, state in enumerate(steps[1:], 1):
        share = min(0.15, (1 + n) / (10 + n))
        average = {key: share * value + (1 - share) * state[key] for key, value in average.items()}
    best, last = models.load_checkpoint(run / "fold0_best.pt")[0].state_dict(), state_of(run)
    floats = [key for key, value in best.items() if value.is_floating_point()]
    assert len(steps) == 3
    assert all(torch.allclose(best[key], average[key], atol=1e-6) for key in floats)
    assert all(torch.equal(last[key], steps[-1][key]) for key in floats)


@pytest.mark.parametrize("backbone", ["vit_tiny", "timm:test_vit"])
def test_layer_decay(data_dir, backbone):
    args = settings(data_dir, "--backbone", backbone, "--layer_decay", 0.5, "--lr", 1, model="fsg_vit")
    model = models.build_model(train.make_spec(args, 64, meta_dim=2))
    routing = train.make_routing(args, model, model, None)
    rates = {id(p): group["lr"] for group in routing.optimizer.param_groups for p in group["params"]}
    names = {name: rates[id(p)] for name, p in model.backbone.named_parameters() if id(p) in rates}
    n = len(set(names.values())) - 2
    assert n > 1
    for name, rate in names.items():
        index = [int(part) for part in name.replace("layer_", "layer.").split(".") if part.isdigit()]
        if "ln." in name[:11] or name.startswith("norm."):
            assert rate == 1, name
        elif "encoder_layer" in name or name.startswith("blocks"):
            assert rate == 0.5 ** (n - index[0]), name
        else:
            assert rate == 0.5 ** (n + 1), name
    assert len(rates) + len(fsg.gate_parameters(model)) == len(list(model.parameters()))
    flat = models.build_model(train.make_spec(settings(data_dir), 64))
    with pytest.raises(InputError, match="layer_decay"):
        train.make_routing(settings(data_dir, "--layer_decay", 0.5), flat, flat, None)


def test_every_step_draws_from_a_seed_of_its_own(data_dir, tmp_path, monkeypatch):
    mix, seeds = train.mix_and_smooth, []

    def record(*args):
        seeds.append(torch.initial_seed())
        return mix(*args)

    monkeypatch.setattr(train, "mix_and_smooth", record)
    fit(data_dir, tmp_path, "--epochs", 2, "--batch_size", 5)
    assert len(seeds) == len(set(seeds)) >= 2 * 2 * 2


@pytest.mark.parametrize("model", ["resnet", "chipnet"])
def test_a_batch_or_a_part_of_one_image_trains(source, tmp_path, model):
    data_dir = call("preprocess", "--train_csv", source / "train.csv", "--output_dir", tmp_path / "data",
                    "--size", 32, "--n_folds", 2)  # fmt: skip
    more = ["--fold", 0, "--sampler", "shuffle"]  # 12 images to train on, maps of one pixel
    run = fit(data_dir, tmp_path / "last", *more, "--batch_size", 11, model=model)
    assert np.isfinite(pd.read_csv(run / "log.csv")["train_loss"][0])
    run = fit(data_dir, tmp_path / "parts", *more, "--batch_size", 4, "--accumulate", 4, model=model)
    assert np.isfinite(pd.read_csv(run / "log.csv")["train_loss"][0])


def test_the_number_of_workers_changes_nothing_and_they_start_once(data_dir, tmp_path, monkeypatch):
    start, started = multiprocessing.process.BaseProcess.start, []

    def count(process):
        started.append(process.name)
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", count)
    one, two = (fit(data_dir, tmp_path / n, "--fold", 0, "--epochs", 3, "--workers", n) for n in ("0", "2"))
    for name in ("oof.csv", "test_predictions.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    first, second = state_of(one), state_of(two)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert len(started) == 2 * 4  # of 3 epochs: training, scoring; of the end: held-out and test images


def test_early_stopping_keeps_the_best_epoch(data_dir, tmp_path, monkeypatch):
    aucs = iter([0.6, 0.8, 0.7, 0.8])  # an equal AUC is no improvement
    monkeypatch.setattr(train, "weighted_auc", lambda *_: next(aucs))
    run = fit(data_dir, tmp_path, "--fold", 0, "--epochs", 9, "--patience", 2)
    assert models.load_checkpoint(run / "fold0_best.pt")[1]["epoch"] == 2
    assert pd.read_csv(run / "log.csv")["valid_auc"].tolist() == [0.6, 0.8, 0.7, 0.8]
    facts = read_json(run / "fold0_metrics.json")
    assert (facts["best_epoch"], facts["epochs"], facts["best_valid_auc"], facts["last_valid_auc"]) == (2, 4, 0.8, 0.8)


def test_the_learning_rate_follows_its_schedule(data_dir, tmp_path):
    run = fit(data_dir, tmp_path, "--fold", 0, "--limit", 2, "--epochs", 3, "--schedule", "cosine", "--lr", 0.01)
    assert pd.read_csv(run / "log.csv")["lr"].tolist() == pytest.approx([0.001, 0.01, 0.005])


def test_diverging_training_stops_and_keeps_the_batch(data_dir, tmp_path):
    with pytest.raises(InputError, match=r"loss is (nan|inf).*nonfinite_batch\.pt"):
        fit(data_dir, tmp_path, "--fold", 0, "--lr", "1e30", "--head_lr", "1e30", "--epochs", 5, "--accumulate", 2)
    first, second = torch.load(tmp_path / "resnet" / "nonfinite_batch.pt", weights_only=True)
    image, meta, target, *_ = first
    assert (image.dtype, image.shape[1:]) == (torch.uint8, (3, 64, 64))
    assert len(image) == len(meta) == len(target) == len(second[0]) > 1


class Overflowing(models.MetaResNet):
    def forward(self, image, meta):
        return super().forward(image, meta) * (1 if self.training else float("nan"))


def test_predictions_that_are_no_numbers_never_become_the_best_epoch(data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "overflowing", models.Recipe(Overflowing))
    with pytest.raises(InputError, match="not a number"):
        fit(data_dir, tmp_path, "--fold", 0, model="overflowing")
    assert [path.name for path in (tmp_path / "overflowing").iterdir()] == ["config.json"]


# ---------------------------------------------------------------- what a network sees
class Brightness(models.Network):
    """A network from outside: one number of an image decides."""

    uses_meta = False

    def __init__(self, spec, weights="none"):
        super().__init__(spec, weights)
        self.head = torch.nn.Sequential(torch.nn.Linear(self.features + 1, 1))

    def forward(self, image, meta):
        features = self.backbone(self.normalise(image))
        return self.head(torch.cat([features, image.float().mean(dim=(1, 2, 3))[:, None] / 255], dim=1))


def test_a_new_network_is_one_class_and_one_row(data_dir, source, tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "mine", models.Recipe(Brightness, lr=2e-3))
    run = fit(data_dir, tmp_path, "--fsg", "--ema", 0.9, model="mine")
    output = call("predict", "--run", run, "--device", "cpu", "--no-pictures", source / "images" / "0024.jpg",
                  "--output", tmp_path / "out")  # fmt: skip
    submission = pd.read_csv(run / "submission.csv", dtype={"image_name": str}).set_index("image_name")["target"]
    assert pd.read_csv(output / "predictions.csv")["prob"][0] == pytest.approx(submission["0024"], abs=1e-4)
    call("audit", run, "--device", "cpu")
    call("crop", "--source", "gradcam", "--run", run, "--data_dir", data_dir, "--output_dir", tmp_path / "crops",
         "--device", "cpu")  # fmt: skip
    assert (tmp_path / "crops" / "mine_gradcam" / "crop.json").exists()


def test_encoder_is_fitted_to_training_rows_alone(data_dir):
    args, data = settings(data_dir), read_data(data_dir)
    held_out = data.train["fold"] == 0
    data.train["sex"] = np.where(held_out, "only in fold 0", "elsewhere")
    data.train["age_approx"] = np.where(held_out, 1000, 40 + np.arange(len(held_out)))
    encoder = dataset.make_images(data, 0, args, models.MODELS["resnet"])[1]
    assert encoder.columns["sex"] == {"values": ["elsewhere"]}
    assert encoder.columns["age_approx"]["mean"] == pytest.approx(40 + np.flatnonzero(~held_out).mean())


def test_metadata_that_training_never_had_weighs_nothing(data_dir, tmp_path):
    model, content = models.load_checkpoint(fit(data_dir, tmp_path, "--fold", 0) / "fold0_best.pt")
    data = read_data(data_dir)
    meta = MetaEncoder(content["encoder"]).encode(data.train[data.train["fold"] != 0])
    never = (meta == 0).all(axis=0)
    weight = model.meta_branch[0].weight.detach()
    assert never.any()
    assert (weight[:, never] == 0).all()
    assert (weight[:, ~never] != 0).any(dim=0).all()


def test_only_training_crops_are_jittered(data_dir, runs_dir):
    crops, data = ["--crop_dir", data_dir / "crops" / "chipnet"], read_data(data_dir)
    for model, more, kinds in (
        ("cropnet", [], [dataset.Jittered]),
        ("cropnet", ["--no-jitter"], [dataset.Stored]),
        ("fusion", [], [dataset.Stored, dataset.Jittered]),
        ("resnet", [], [dataset.Jittered]),  # a network for whole images that is given crops
    ):
        images, _ = dataset.make_images(data, 0, settings(data_dir, *crops, *more, model=model), models.MODELS[model])
        assert [type(source) for source in images["train"].sources] == kinds
        for part in ("valid", "test"):
            assert [type(source) for source in images[part].sources] == [dataset.Stored] * len(kinds)
    row = data.train.index[data.train["fold"] == 0][0]
    crop = open_array(array_path(crops[1], "train", 64), 24)[row]
    assert (images["valid"][0].image.numpy().transpose(1, 2, 0) == crop).all()


def test_guides_turn_with_their_images(tmp_path):
    """A map drawn from the image itself must stay where the image shows it."""
    disc = np.zeros((64, 64), np.uint8)
    disc[40:56, 8:24] = 1
    np.save(tmp_path / "image.npy", np.where(disc[None, ..., None], 250, 5).astype(np.uint8).repeat(3, axis=3))
    np.save(tmp_path / "maps.npy", disc[None].astype(np.float32))
    stored, guide = dataset.Stored(tmp_path / "image.npy", 1), dataset.Guide(tmp_path / "maps.npy", 1, 4)
    images = dataset.ImageDataset([stored], [0], np.zeros((1, 0)), None, dataset.train_transform(64, 16), guide)
    compared = 0
    for position in range(30):
        batch = images[0, 1.0, (0, position)]
        seen = (batch.image.float().mean(dim=0) > 128).float()
        cells = torch.nn.functional.avg_pool2d(seen[None], 16)[0]
        if cells.sum() > 0.4:  # of little that is left in the frame, a few pixels make shares
            assert torch.allclose(batch.guide, cells / cells.sum(), atol=0.08)
            compared += 1
    assert compared > 10


def test_guided_attention_comes_to_resemble_the_maps(data_dir, tmp_path):
    guide = tmp_path / "guide"
    guide.mkdir()
    maps = np.full((24, 8, 8), 1e-6, np.float32)
    maps[:, 3:5, 3:5] = 0.25  # the centre: no symmetry or small shift moves it away
    np.save(guide / "train_attention.npy", maps)
    facts = {"trained": False, "folds": [0, 1], "folds_sha256": read_data(data_dir).folds_sha256}
    write_json(guide / "crop.json", facts | {"sha256": {"train_attention.npy": "x"}})
    words = ["--epochs", 8, "--patience", 8, "--fold", 0, "--guide", guide, "--lr", 3e-3, "--head_lr", 3e-3]
    image, loss = torch.from_numpy(np.array(open_array(data_dir / "train_64.npy", 24))).permute(0, 3, 1, 2), {}
    for weight in (0, 3):
        run = fit(data_dir, tmp_path / str(weight), *words, "--guide_weight", weight, model="chipnet")
        network = models.load_checkpoint(run / "fold0_best.pt")[0]
        network.load_state_dict(state_of(run))
        loss[weight] = train.guide_loss(network.attention(image), torch.full((24, 2, 2), 0.25)).mean().item()
    assert loss[3] < 0.5 * loss[0]
    with pytest.raises(InputError, match="--guide"):
        fit(data_dir, tmp_path, "--guide", guide)


def test_a_dry_run_trains_on_and_predicts_some(data_dir, tmp_path):
    run = fit(data_dir, tmp_path, "--fold", 0, "--limit", 3)
    assert pd.read_csv(run / "oof.csv")["target"].value_counts().to_dict() == {0: 3, 1: 3}
    assert read_json(run / "fold0_metrics.json")["train_rows"] == 6
    submission = pd.read_csv(run / "submission.csv", dtype={"image_name": str})
    assert submission["image_name"].tolist() == ["0026", "0025", "0024"]


def test_predictions_are_those_of_the_best_checkpoint(runs_dir, data_dir):
    run = runs_dir / "resnet"
    model, content = models.load_checkpoint(run / "fold1_best.pt")
    meta = MetaEncoder(content["encoder"]).encode(read_data(data_dir).test)
    images = dataset.ImageDataset([dataset.Stored(data_dir / "test_64.npy", 4)], range(4), meta)
    prob = models.predict(model, dataset.eval_loader(images, range(4), 4, 0), torch.device("cpu"), tta=2)
    test = pd.read_csv(run / "test_predictions.csv")
    assert np.allclose(test["prob"][test["fold"] == 1], prob, atol=1e-6)


def test_weights_of_a_run_start_each_fold_from_its_own_network(data_dir, runs_dir, tmp_path):
    crops = ["--crop_dir", data_dir / "crops" / "chipnet"]
    run = fit(data_dir, tmp_path, "--weights", runs_dir / "resnet", "--lr", 0, "--head_lr", 0, *crops, model="fusion")
    for k in (0, 1):
        old, new = (models.load_checkpoint(r / f"fold{k}_best.pt")[0] for r in (runs_dir / "resnet", run))
        for (key, a), b in zip(old.backbone.named_parameters(), new.backbone.parameters(), strict=True):
            assert torch.equal(a, b), key


# ---------------------------------------------------------------- gates
@pytest.mark.parametrize("routing", fsg.MODES[:-1])
def test_each_routing_steps_gates_and_weights_by_rates_of_their_own(data_dir, tmp_path, routing):
    words = ["--backbone", "vit_tiny", "--routing", routing, "--fold", 0, "--limit", 4]
    gates_alone = fit(data_dir, tmp_path / "gates", *words, "--lr", 0, "--head_lr", 0, model="fsg_vit")
    weights_alone = fit(data_dir, tmp_path / "weights", *words, "--gate_lr", 0, model="fsg_vit")
    spec = models.Spec(**models.read_torch_file(gates_alone / "fold0_best.pt")["spec"])
    torch.manual_seed(train.epoch_seed(0, 0, 0))
    start = models.build_model(spec)
    logits = {id(gate) for gate in fsg.gate_parameters(start)}
    left, right = state_of(gates_alone), state_of(weights_alone)
    for name, value in start.named_parameters():
        by_gates, by_weights = (left, right) if id(value) in logits else (right, left)
        assert torch.equal(by_weights[name], value) or name.startswith("meta_branch.0"), name
        assert not torch.equal(by_gates[name], value), name


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("resnet", ["--routing", "upstream"]),
        ("chipnet", ["--gate_init", "hard", "--gate_l1", "1", "--gate_lr", "1"]),
        ("cropnet", ["--gate_init", "paper", "--routing", "sequential"]),
        ("fusion", ["--routing", "off"]),
    ],
)
def test_gates_on_any_model(data_dir, runs_dir, source, tmp_path, model, more):
    crops = [] if model in ("resnet", "chipnet") else ["--crop_dir", data_dir / "crops" / "chipnet"]
    run = fit(data_dir, tmp_path, "--fold", 0, "--epochs", 2, "--patience", 2, "--fsg", *crops, *more, model=model)
    assert GATE_FILES <= {path.name for path in run.iterdir()}
    network = models.load_checkpoint(run / "fold0_best.pt")[0]
    network.load_state_dict(state_of(run))
    values = torch.cat(list(fsg.gate_values(network, relative=True).values()))
    history = np.load(run / "fold0_gates.npy", allow_pickle=False)
    assert history.shape == (2, len(values))
    assert np.allclose(history[-1], values.numpy())
    assert not np.array_equal(history[0], history[1])  # they learn
    log = pd.read_csv(run / "gates.csv")
    assert log.groupby("epoch").size().tolist() == [1 + len(fsg.gate_values(network))] * 2
    total = log[(log["branch"] == "all") & (log["epoch"] == 2)].iloc[0]
    assert total["mean"] == pytest.approx(values.mean().item(), abs=1e-6)
    prune = pd.read_csv(run / "prune.csv")
    assert set(prune["ranking"]) == {"gate", "contribution", "chance"}
    assert prune["share"].max() == 0.9
    assert prune.loc[prune["share"] == 0, "auc"].nunique() == 1
    if model == "resnet":
        call("predict", "--run", run, "--output", tmp_path / "out", "--device", "cpu", "--no-pictures",
             source / "images" / "0000.jpg")  # fmt: skip
        assert (tmp_path / "out" / "predictions.csv").exists()


def test_tables_of_gates_gather_all_folds(data_dir, tmp_path):
    run = fit(data_dir, tmp_path, "--fsg", "--limit", 4)
    assert pd.read_csv(run / "prune.csv").groupby("fold").size().tolist() == [15, 15]
    assert set(pd.read_csv(run / "gates.csv")["fold"]) == {0, 1}
    assert {"fold0_gates.png", "fold1_gates.png"} < {path.name for path in run.iterdir()}


def test_prune_curve_leaves_the_network_and_finds_the_gates_that_matter():
    torch.manual_seed(0)
    model = fsg.add_gates(models.make_backbone("regnet_tiny", "none", 32)[0]).eval()
    first, *rest = fsg.gate_parameters(model)
    with torch.no_grad():
        first.fill_(4)
        for gate in rest:
            gate.fill_(-4)
    x, before = torch.rand(40, 3, 32, 32), copy.deepcopy(model.state_dict())

    def predict(model):
        with torch.inference_mode():
            return model(x)[:, 0].double().numpy()

    target = (predict(model) > np.median(predict(model))).astype(int)
    curve = {point[:2]: point[2] for point in gates.prune_curve(predict, model, target)}
    assert curve["gate", 0.0] == 1
    assert curve["gate", 0.9] > 0.95  # 16 of 240 gates carry it
    assert curve["chance", 0.9] < curve["gate", 0.9]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---------------------------------------------------------------- how it runs
def test_deterministic(data_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    predict, asked = train.predict, []

    def record(*args):
        asked.append(torch.are_deterministic_algorithms_enabled())
        return predict(*args)

    monkeypatch.setattr(train, "predict", record)
    try:
        one, two = (fit(data_dir, tmp_path / n, "--fold", 0, "--deterministic", "--dropout", 0.5) for n in "ab")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(asked)
    assert (one / "oof.csv").read_bytes() == (two / "oof.csv").read_bytes()
    first, second = state_of(one), state_of(two)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(
    "COMPILE" not in os.environ, reason="takes minutes: set COMPILE=1"))])  # fmt: skip
def test_compiled_training_is_the_same_training(data_dir, tmp_path, monkeypatch, backend):
    words, compiled = ["--fold", 0, "--limit", 4, *NO_NORM, "--epochs", 2, "--patience", 2], torch.compile
    plain = fit(data_dir, tmp_path / "plain", *words)
    monkeypatch.setattr(torch, "compile", lambda network, mode: compiled(network, mode=mode, backend=backend))
    counters.clear()
    run = fit(data_dir, tmp_path, *words, "--compile")
    assert counters["stats"]["unique_graphs"] > 0
    for name in ("oof.csv", "test_predictions.csv"):
        one, two = (pd.read_csv(folder / name)["prob"] for folder in (plain, run))
        assert np.allclose(one, two, atol=1e-4)


def test_tensorboard_shows_the_log(data_dir, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["--fold", 1, "--limit", 4, "--epochs", 2, "--patience", 2, "--tensorboard"]
    with pytest.raises(Stopped):
        fit(data_dir, tmp_path, *words, "--max_hours", 0)
    run = fit(data_dir, tmp_path, *words, "--resume")
    (folder,) = (run / "tensorboard").iterdir()
    board, log = EventAccumulator(str(folder)).Reload(), pd.read_csv(run / "log.csv")
    for name in ("train_loss", "valid_loss", "valid_auc", "lr"):
        written = board.Scalars(name)
        assert [event.step for event in written] == [1, 2]
        assert [event.value for event in written] == pytest.approx(log[name].tolist())


def test_tensorboard_that_is_not_installed_is_named_before_anything_is_written(data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        fit(data_dir, tmp_path, "--tensorboard")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fold", "7"], "--fold 7"),
        (["--fold", "x"], "--fold x"),
        (["--meta_cols", "colour"], "--meta_cols colour"),
        (["--gate_lr", "1"], "--gate_lr"),
        (["--routing", "off"], "--routing"),
        (["--backbone", "resnet5000"], "resnet5000"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_bad_input(data_dir, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        fit(data_dir, tmp_path, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--data_dir", "nowhere"], ["--crop_dir", "nowhere"], ["--weights", "nowhere"]])
def test_missing_input_is_named(data_dir, tmp_path, words):
    with pytest.raises((InputError, FileNotFoundError), match="nowhere"):
        fit(data_dir, tmp_path, *words)
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line_with_status_2(data_dir, tmp_path):
    words = ["--model", "resnet", "--data_dir", data_dir, "--runs_dir", tmp_path, *SMALL_MODEL]
    result = shell("train", *words, "--fold", "9", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("train.py: error: ")
    assert result.stderr.count("\n") == 1
