"""One training: its steps, its extras, its gates, what a network sees, and how it runs."""

import multiprocessing.process
import os
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL_MODEL, call, read
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dataset
import fsg
import losses
import models
import train
from plumbing import gates
from plumbing.arrays import Rows
from plumbing.data import MetaEncoder, read_data
from plumbing.files import read_json
from scores import auc
from tasks import Binary
from util import InputError

BINARY = Binary(("1",), "auc")
NO_NORM = ["--backbone", "vit_tiny", "--meta_cols"]  # the metadata branch has batch norms, this backbone none
TWO_EPOCHS = ["--fold", 0, "--epochs", 2, "--patience", 2]


def fit(data_dir, runs, *more, model="resnet"):
    """Train a small network."""
    return call("train", "--model", model, "--data_dir", data_dir, "--runs_dir", runs, *SMALL_MODEL, *more)


def settings(data_dir, *more, model="resnet"):
    words = ["--model", model, "--data_dir", data_dir, *SMALL_MODEL, *more]
    return train.fill_defaults(train.get_args_parser().parse_args([str(word) for word in words]), BINARY)


def state_of(run, part="model"):
    """Weights and buffers with which a training ended."""
    return torch.load(run / "fold0_last.pt", weights_only=True)["state"][part]


# ---------------------------------------------------------------- steps and extras
def first_gradients(data_dir, runs, *more, model="resnet"):
    """Gradients of the first step: of the weights, of the gates."""
    found = []

    def record(optimizer, args, kwargs):
        found.append(torch.cat([p.grad.flatten().clone() for group in optimizer.param_groups for p in group["params"]]))

    with register_optimizer_step_pre_hook(record):
        fit(data_dir, runs, "--fold", 0, "--limit", 4, *more, model=model)
    return found[:2]


def test_a_batch_in_parts_has_the_gradient_of_the_whole(data_dir, tmp_path):
    more = [*NO_NORM, "--gate_l1", 0.5, "--batch_size", 7, "--accumulate"]
    steps = [first_gradients(data_dir, tmp_path / str(n), *more, n, model="fsg_vit") for n in (1, 3, 9)]
    for whole, *parts in zip(*steps, strict=True):
        assert whole.norm() > 0
        assert all(torch.allclose(whole, part, atol=1e-5) for part in parts)


def test_clipping_holds_the_norm_of_weights_and_of_gates(data_dir, tmp_path):
    for more in ([], ["--clip_grad", 0.001]):
        norms = [part.norm().item() for part in first_gradients(data_dir, tmp_path / str(len(more)), "--fsg", *more)]
        assert norms == pytest.approx([0.001, 0.001], rel=1e-3) if more else min(norms) > 0.002


def test_extras_change_what_is_trained_on_and_not_what_is_scored(data_dir, tmp_path):
    def losses_with(*more):
        still = ["--fold", 0, *NO_NORM, "--lr", 0, "--head_lr", 0]
        run = fit(data_dir, tmp_path / "_".join(map(str, more)), *still, *more)
        return pd.read_csv(run / "log.csv").loc[0, ["train_loss", "valid_loss"]].tolist()

    plain = losses_with()
    assert losses_with("--accumulate", 3) == pytest.approx(plain, rel=1e-5)
    for extra, value in (("pos_weight", 3), ("label_smoothing", 0.4), ("mixup", 1), ("sampler", "shuffle"),
                         ("amp", "bf16")):  # fmt: skip
        trained, scored = losses_with(f"--{extra}", value)
        assert trained != plain[0], extra
        assert scored == pytest.approx(plain[1], rel=0.02), extra
    assert losses_with("--loss", "bce")[1] > 2 * plain[1]


def test_the_average_is_scored_and_kept(data_dir, tmp_path):
    run = fit(data_dir, tmp_path, "--fold", 0, "--ema", 0.9, "--batch_size", 4, "--tta", 1)
    best = torch.load(run / "fold0_best.pt", weights_only=True)["state_dict"]
    last, average, oof = state_of(run), state_of(run, "average"), pd.read_csv(run / "oof.csv")
    assert all(torch.equal(value, average[f"module.{key}"]) for key, value in best.items())
    assert not torch.equal(best["head.1.weight"], last["head.1.weight"])
    loss = losses.loss_of_prob(BINARY, "focal", *(oof[[name]].to_numpy(copy=True) for name in ("prob", "target")))
    assert pd.read_csv(run / "log.csv")["valid_loss"][0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("backbone", ["vit_tiny", "timm:test_vit"])
def test_layer_decay_falls_from_the_last_block_to_the_first(data_dir, backbone):
    args = settings(data_dir, "--backbone", backbone, "--layer_decay", 0.5, "--lr", 1, model="fsg_vit")
    model = models.build_model(train.make_spec(args, read_data(data_dir), meta_dim=2))
    groups = train.make_routing(args, model, model, None).optimizer.param_groups
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    rates = [rate_of[id(p)] for p in fsg.weight_parameters(model.backbone)]
    n_blocks = len(model.backbone.blocks if backbone.startswith("timm") else model.backbone.encoder.layers)
    assert rates == sorted(rates)
    assert sorted(set(rates)) == [0.5**above for above in range(n_blocks + 1, -1, -1)]
    assert len(rate_of) == len(fsg.weight_parameters(model))
    flat = models.build_model(train.make_spec(settings(data_dir), read_data(data_dir)))
    with pytest.raises(InputError, match="layer_decay"):
        train.make_routing(settings(data_dir, "--layer_decay", 0.5), flat, flat, None)


def test_every_step_draws_from_a_seed_of_its_own(data_dir, tmp_path, monkeypatch):
    mix, seeds = train.mix_and_smooth, []
    monkeypatch.setattr(train, "mix_and_smooth", lambda *args: seeds.append(torch.initial_seed()) or mix(*args))
    fit(data_dir, tmp_path, "--epochs", 2, "--batch_size", 5)
    assert len(seeds) == len(set(seeds)) >= 2 * 2 * 2


def test_a_batch_or_a_part_of_one_image_trains(source, tmp_path):
    data_dir = call("preprocess", "--train_csv", source / "train.csv", "--output_dir", tmp_path / "data",
                    "--size", 32, "--n_folds", 2)  # fmt: skip
    for model, size, parts in (("resnet", 11, 1), ("chipnet", 4, 4)):  # of 12 images, whose last maps are of one pixel
        more = ["--fold", 0, "--sampler", "shuffle", "--batch_size", size, "--accumulate", parts]
        run = fit(data_dir, tmp_path / model, *more, model=model)
        assert np.isfinite(pd.read_csv(run / "log.csv")["train_loss"][0])


def test_the_number_of_workers_changes_nothing_and_they_start_once(data_dir, tmp_path, monkeypatch):
    start, started = multiprocessing.process.BaseProcess.start, []
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: started.append(self) or start(self))
    one, two = (fit(data_dir, tmp_path / n, "--fold", 0, "--epochs", 3, "--workers", n) for n in ("0", "2"))
    assert (one / "oof.csv").read_bytes() == (two / "oof.csv").read_bytes()
    first, second = state_of(one), state_of(two)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert len(started) == 2 * 4  # for all epochs: training and scoring; at the end: held-out and test images


def test_features_of_a_scout_are_read_without_loader_processes_unless_asked_for():
    def workers(*words):
        return train.fill_defaults(train.get_args_parser().parse_args(["--model", "scout", *words]), BINARY).workers

    assert (workers(), workers("--workers", "1")) == (0, 1)
    assert workers("--tile", "32", "--finetune", "all") > 0


def test_early_stopping_keeps_the_best_epoch(data_dir, tmp_path, monkeypatch):
    aucs = iter([0.6, 0.8, 0.7, 0.8])  # an equal AUC is no improvement
    monkeypatch.setattr(train, "main_score", lambda *_: next(aucs))
    run = fit(data_dir, tmp_path, "--fold", 0, "--epochs", 9, "--patience", 2, "--schedule", "cosine", "--lr", 0.01)
    assert models.load_checkpoint(run / "fold0_best.pt")[1]["epoch"] == 2
    log, facts = pd.read_csv(run / "log.csv"), read_json(run / "fold0_metrics.json")
    assert log["valid_auc"].tolist() == [0.6, 0.8, 0.7, 0.8]
    assert log["lr"].tolist() == pytest.approx([0.01 * losses.lr_factor("cosine", n, 9) for n in log["epoch"]])
    assert (facts["best_epoch"], facts["epochs"], facts["best_score"], facts["last_score"]) == (2, 4, 0.8, 0.8)


def test_diverging_training_stops_and_keeps_the_batch(data_dir, tmp_path):
    with pytest.raises(InputError, match=r"loss is (nan|inf).*nonfinite_batch\.pt"):
        fit(data_dir, tmp_path, "--fold", 0, "--lr", "1e30", "--head_lr", "1e30", "--epochs", 5, "--accumulate", 2)
    first, second = torch.load(tmp_path / "resnet" / "nonfinite_batch.pt", weights_only=True)
    image, meta, target, *_ = first
    assert (image.dtype, image.shape[1:]) == (torch.uint8, (3, 64, 64))
    assert len(image) == len(meta) == len(target) == len(second[0]) > 1


# ---------------------------------------------------------------- what a network sees
class Mine(models.Network):
    uses_meta = False

    def __init__(self, spec, weights="none"):
        super().__init__(spec, weights)
        self.head = torch.nn.Sequential(torch.nn.Linear(self.features, 1))

    def forward(self, image, meta):
        return self.head(self.backbone(self.normalise(image)).tanh())


def test_a_new_network_is_one_class_and_one_row(data_dir, source, tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "mine", models.Recipe(Mine))
    run, cpu = fit(data_dir, tmp_path, "--fsg", "--ema", 0.9, "--fold", 0, model="mine"), ["--device", "cpu"]
    words = [source / "images" / "0024.jpg", "--no-pictures", "--output", tmp_path / "out"]
    predicted = pd.read_csv(call("predict", "--run", run, *words, *cpu) / "predictions.csv")
    submission = read(run / "submission.csv").set_index("image_name")["target"]
    assert predicted["prob"][0] == pytest.approx(submission["0024"], abs=1e-4)
    call("report", run, *cpu)
    words = ["--data_dir", data_dir, "--output_dir", tmp_path, "--views", 1]
    call("crop", "--source", "gradcam", "--run", run, *words, *cpu)


def test_metadata_is_that_of_training_rows_alone(data_dir, tmp_path):
    data = read_data(data_dir)
    held_out = data.train["fold"] == 0
    data.train["sex"] = np.where(held_out, "only in fold 0", "elsewhere")
    data.train["age_approx"] = np.where(held_out, 1000, 40 + np.arange(len(held_out)))
    encoder = dataset.make_images(data, 0, settings(data_dir), models.MODELS["resnet"])[1]
    assert encoder.columns["sex"] == {"values": ["elsewhere"]}
    assert encoder.columns["age_approx"]["mean"] == pytest.approx(40 + np.flatnonzero(~held_out).mean())
    model, content = models.load_checkpoint(fit(data_dir, tmp_path, "--fold", 0) / "fold0_best.pt")
    never = (MetaEncoder(content["encoder"]).encode(read_data(data_dir).train[~held_out]) == 0).all(axis=0)
    assert never.any()
    assert ((model.meta_branch[0].weight != 0).any(dim=0).numpy() == ~never).all()  # what it never had weighs nothing


def test_only_training_crops_are_jittered(data_dir, runs_dir):
    stored, jittered = Rows, dataset.Jittered
    for model, more, kinds in (("cropnet", [], [jittered]), ("cropnet", ["--no-jitter"], [stored]),
                               ("fusion", [], [stored, jittered]), ("resnet", [], [jittered])):  # fmt: skip
        args = settings(data_dir, "--crop_dir", data_dir / "crops" / "chipnet", *more, model=model)
        images, *_ = dataset.make_images(read_data(data_dir), 0, args, models.MODELS[model])
        assert [type(source) for source in images["train"].sources] == kinds
        for part in ("valid", "test"):
            assert [type(source) for source in images[part].sources] == [stored] * len(kinds)


def test_weights_of_a_run_start_each_fold_from_its_own_network(data_dir, runs_dir, tmp_path):
    more = ["--weights", runs_dir / "resnet", "--lr", 0, "--head_lr", 0, "--crop_dir", data_dir / "crops" / "chipnet"]
    run = fit(data_dir, tmp_path, *more, model="fusion")
    for k in (0, 1):
        old, new = (models.load_checkpoint(r / f"fold{k}_best.pt")[0] for r in (runs_dir / "resnet", run))
        for a, b in zip(old.backbone.parameters(), new.backbone.parameters(), strict=True):
            assert torch.equal(a, b)


# ---------------------------------------------------------------- gates
@pytest.mark.parametrize("routing", fsg.MODES[:-1])
def test_each_routing_steps_gates_and_weights_by_rates_of_their_own(data_dir, tmp_path, routing):
    words = ["--backbone", "vit_tiny", "--routing", routing, "--fold", 0, "--limit", 4]
    gates_alone = fit(data_dir, tmp_path / "gates", *words, "--lr", 0, "--head_lr", 0, model="fsg_vit")
    weights_alone = fit(data_dir, tmp_path / "weights", *words, "--gate_lr", 0, model="fsg_vit")
    torch.manual_seed(losses.epoch_seed(0, 0, 0))
    start = models.build_model(models.Spec(**models.read_torch_file(gates_alone / "fold0_best.pt")["spec"]))
    ids, states = {id(gate) for gate in fsg.gate_parameters(start)}, [state_of(weights_alone), state_of(gates_alone)]
    for name, value in start.named_parameters():
        left, moved = states if id(value) in ids else reversed(states)
        assert torch.equal(left[name], value) or name == "meta_branch.0.weight", name  # of which some columns become 0
        assert not torch.equal(moved[name], value), name


GATED = {"resnet": "--routing upstream", "chipnet": "--gate_init hard --gate_l1 1 --gate_lr 1",
         "cropnet": "--gate_init paper --routing sequential", "fusion": "--routing off"}  # fmt: skip


@pytest.mark.parametrize("model", GATED)
def test_gates_on_any_model(data_dir, runs_dir, tmp_path, model):
    more = [*TWO_EPOCHS, "--limit", 4, "--fsg", *GATED[model].split()]
    run = fit(data_dir, tmp_path, *more, model=model)
    network = models.load_checkpoint(run / "fold0_best.pt")[0]
    network.load_state_dict(state_of(run))
    values, history = gates.flat_gates(network), np.load(run / "fold0_gates.npy", allow_pickle=False)
    assert history.shape == (2, len(values))
    assert np.allclose(history[-1], values.numpy())
    assert not np.array_equal(history[0], history[1])  # they learn
    fit(data_dir, tmp_path, *more, "--fold", 1, model=model)
    log, prune = pd.read_csv(run / "gates.csv"), pd.read_csv(run / "prune.csv")
    assert log.groupby(["fold", "epoch"]).size().tolist() == [1 + len(fsg.gate_values(network))] * 4
    assert log[log["branch"] == "all"]["mean"][:2].tolist() == pytest.approx(history.mean(axis=1).tolist(), abs=1e-6)
    assert prune.groupby(["fold", "ranking"]).size().tolist() == [5] * 6
    assert prune[prune["share"] == 0].groupby("fold")["score"].nunique().tolist() == [1, 1]


def test_prune_curve_leaves_the_network_and_finds_the_gates_that_matter():
    torch.manual_seed(0)
    model = fsg.add_gates(models.make_backbone("regnet_tiny", "none", 32)[0]).eval()
    for i, gate in enumerate(fsg.gate_parameters(model)):
        torch.nn.init.constant_(gate, -4 if i else 4)
    x, before = torch.rand(40, 3, 32, 32), {key: value.clone() for key, value in model.state_dict().items()}

    def predict(model):
        return model(x)[:, 0].detach().double().numpy()

    target = (predict(model) > np.median(predict(model))).astype(int)
    curve = {point[:2]: point[2] for point in gates.prune_curve(predict, model, partial(auc, target))}
    assert curve["gate", 0.0] == 1
    assert curve["gate", 0.9] > 0.95  # 16 of 240 gates carry it
    assert curve["chance", 0.9] < curve["gate", 0.9]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---------------------------------------------------------------- how it runs
def test_deterministic(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which it sets otherwise, for good
    predict, asked, look = train.predict, [], torch.are_deterministic_algorithms_enabled
    monkeypatch.setattr(train, "predict", lambda *args: asked.append(look()) or predict(*args))
    try:
        fit(data_dir, tmp_path, "--fold", 0, "--limit", 4, "--deterministic")
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [True] * 3


def test_compiled_training_is_the_same_training(data_dir, tmp_path, monkeypatch):
    words, compiled = [*TWO_EPOCHS, "--limit", 4, *NO_NORM], torch.compile
    backend = os.environ.get("COMPILE", "aot_eager")  # COMPILE=inductor compiles the kernels too, for minutes
    plain = fit(data_dir, tmp_path / "plain", *words)
    monkeypatch.setattr(torch, "compile", lambda network, mode: compiled(network, mode=mode, backend=backend))
    counters.clear()
    run = fit(data_dir, tmp_path, *words, "--compile")
    assert counters["stats"]["unique_graphs"] > 0
    assert np.allclose(*(pd.read_csv(folder / "oof.csv")["prob"] for folder in (plain, run)), atol=1e-4)
