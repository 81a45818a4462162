"""Losses, schedules, run directories, resuming."""

import copy
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SMALL_MODEL, call, shell
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

import dataset
import fsg
import models
import train
import util
from util import InputError

RUN_FILES = {"config.json", "log.csv", "oof.csv", "test_predictions.csv", "submission.csv",
             "metrics.json", "curves.png", "roc.png"}  # fmt: skip


GATE_FILES = {"gates.csv", "prune.csv", "fold0_gates.npy", "fold0_gates.png"}


def fit(data_dir, runs, *more, model="resnet"):
    return call("train", "--model", model, "--data_dir", data_dir, "--runs_dir", runs,
                *SMALL_MODEL, *more)  # fmt: skip


def test_focal_loss():
    logit, target = torch.tensor([[0.3], [-2.0], [1.5]]), torch.tensor([1.0, 0.0, 0.0])
    bce = F.binary_cross_entropy_with_logits(logit.squeeze(1), target)
    assert torch.isclose(train.LOSSES["bce"](logit, target), bce)
    p = torch.tensor([0.3, 2.0, -1.5]).sigmoid()  # probability of the true class
    assert torch.isclose(train.focal_loss(logit, target), (-((1 - p) ** 2) * p.log()).mean())
    soft = torch.tensor([0.7, 0.2, 0.5])
    expected = F.binary_cross_entropy_with_logits(
        logit.squeeze(1), soft, pos_weight=torch.tensor(3.0)
    )
    assert torch.isclose(train.LOSSES["bce"](logit, soft, pos_weight=3.0), expected)
    both = [train.focal_loss(logit, torch.full((3,), label)) for label in (1.0, 0.0)]
    mixed = train.focal_loss(logit, torch.full((3,), 0.3))
    assert torch.isclose(mixed, 0.3 * both[0] + 0.7 * both[1])


def test_schedules():
    assert [train.lr_factor("exponential", e, 5) for e in (1, 3)] == [1, pytest.approx(0.9025)]
    cosine = [train.lr_factor("cosine", e, 5) for e in range(1, 6)]
    assert cosine[:2] == [0.1, 1.0]
    assert cosine[1:] == sorted(cosine[1:], reverse=True)
    assert 0 < cosine[-1] < 0.2


def test_a_run_leaves_what_the_contract_says(runs_dir, data_dir):
    for name in ("resnet", "chipnet", "cropnet"):
        run = runs_dir / name
        folds = {f"fold{k}_{kind}.pt" for k in (0, 1) for kind in ("best", "last")}
        assert {path.name for path in run.iterdir()} == RUN_FILES | folds
        data, oof = util.read_data(data_dir), pd.read_csv(run / "oof.csv", dtype=str)
        assert list(oof) == ["image_name", "fold", "target", "prob"]
        assert oof["image_name"].tolist() == data.train["image_name"].tolist()
        assert oof["fold"].tolist() == data.train["fold"].astype(str).tolist()
        test = pd.read_csv(run / "test_predictions.csv", dtype={"image_name": str})
        assert test["fold"].tolist() == [0] * 4 + [1] * 4
        submission = pd.read_csv(run / "submission.csv", dtype={"image_name": str})
        assert submission["image_name"].tolist() == data.submission_ids
        mean = test.groupby("image_name")["prob"].mean()
        assert np.allclose(submission["target"], mean[submission["image_name"]])
        metrics = util.read_json(run / "metrics.json")
        assert metrics["pooled"]["rows"] == 24
        assert list(pd.read_csv(run / "log.csv")) == list(train.LOG_COLUMNS)


def test_a_dry_run_predicts_some(data_dir, tmp_path):
    run = fit(data_dir, tmp_path, "--fold", 0, "--limit", 3)
    assert len(pd.read_csv(run / "oof.csv")) == 6
    submission = pd.read_csv(run / "submission.csv", dtype={"image_name": str})
    ids = util.read_data(data_dir).submission_ids
    assert submission["image_name"].tolist() == [name for name in ids if name < "0027"]


def test_predictions_are_those_of_the_best_checkpoint(runs_dir, data_dir):
    from dataset import ImageDataset, MetaEncoder, Stored, make_loader

    model, content = models.load_checkpoint(runs_dir / "resnet" / "fold1_best.pt")
    data = util.read_data(data_dir)
    meta = MetaEncoder(content["encoder"]).encode(data.test)
    stored = Stored(util.array_path(data_dir, "test", 64), 4)
    images = ImageDataset([stored], range(4), meta)
    prob = models.predict(model, make_loader(images, 0, batch_size=4), torch.device("cpu"), tta=2)
    test = pd.read_csv(runs_dir / "resnet" / "test_predictions.csv")
    assert np.allclose(test["prob"][test["fold"] == 1], prob, atol=1e-6)


def test_guided_attention_comes_to_resemble_the_maps(data_dir, tmp_path):
    guide = tmp_path / "guide"
    guide.mkdir()
    maps = np.full((24, 8, 8), 1e-6, np.float32)
    maps[:, 3:5, 3:5] = 0.25  # the centre: no symmetry or small shift moves it away
    np.save(guide / "train_attention.npy", maps)
    facts = {"source": "boxes", "sha256": {}, "wide_size": 90}
    folds = util.folds_sha256(util.read_data(data_dir).train)
    util.write_json(guide / "crop.json", facts | {"folds_sha256": folds})
    words = ["--epochs", 12, "--patience", 12, "--fold", 0, "--guide", guide]
    runs = {w: fit(data_dir, tmp_path / w, *words, "--guide_weight", w, model="chipnet")
            for w in ("0", "3")}  # fmt: skip
    image = util.open_array(data_dir / "train_64.npy", 24)
    uniform = torch.full((24, 2, 2), 0.25)
    loss = {}
    for weight, run in runs.items():
        network = models.load_checkpoint(run / "fold0_last.pt")[0]
        attention = network.attention(torch.from_numpy(np.array(image)).permute(0, 3, 1, 2))
        loss[weight] = train.guide_loss(attention, uniform).item()
    assert loss["3"] < 0.5 * loss["0"]
    with pytest.raises(InputError, match="--guide is for chipnet"):
        fit(data_dir, tmp_path, "--guide", guide)
    np.save(guide / "train_attention.npy", maps[:5])
    with pytest.raises(InputError, match=r"float32 \(24, h, w\) is expected"):
        fit(data_dir, tmp_path / "other", "--guide", guide, model="chipnet")
    util.write_json(guide / "crop.json", facts | {"folds_sha256": "other"})
    with pytest.raises(InputError, match="cropped for other folds"):
        fit(data_dir, tmp_path / "other", "--guide", guide, model="chipnet")


def test_guides_turn_with_their_images(data_dir):
    """A map drawn from the image itself must stay where the image shows it."""
    from dataset import Guide, ImageDataset, Stored, train_transform

    size, disc = 64, np.zeros((64, 64), np.uint8)
    disc[40:56, 8:24] = 1
    path = data_dir / "guide_test.npy"
    np.save(path, np.where(disc[None, ..., None], 250, 5).astype(np.uint8).repeat(3, axis=3))
    np.save(data_dir / "guide_maps.npy", disc[None].astype(np.float32))
    guide = Guide(data_dir / "guide_maps.npy", 1, 4)
    images = ImageDataset([Stored(path, 1)], [0], np.zeros((1, 0)), None,
                          train_transform(size, 16), guide)  # fmt: skip
    images.transform.set_random_seed(0)
    compared = 0
    for _ in range(30):
        image, _, _, attention = images[0]
        seen = (image.float().mean(dim=0) > 128).float()
        cells = torch.nn.functional.avg_pool2d(seen[None], 16)[0]
        if cells.sum() > 0.4:  # of little that is left in the frame, a few pixels make shares
            assert torch.allclose(attention, cells / cells.sum(), atol=0.08)
            compared += 1
    assert compared > 10
    path.unlink()
    (data_dir / "guide_maps.npy").unlink()


def test_weights_of_a_run_start_each_fold_from_its_own_network(data_dir, runs_dir, tmp_path):
    args = ["--weights", runs_dir / "resnet", "--lr", 0, "--head_lr", 0, "--crop_dir",
            data_dir / "crops" / "chipnet"]  # fmt: skip
    run = fit(data_dir, tmp_path, *args, model="fusion")
    for k in (0, 1):
        old, new = (
            models.load_checkpoint(r / f"fold{k}_best.pt")[0] for r in (runs_dir / "resnet", run)
        )
        for (key, a), b in zip(old.backbone.named_parameters(), new.backbone.parameters(),
                               strict=True):  # fmt: skip
            assert torch.equal(a, b), key
    other = shutil.copytree(runs_dir / "resnet", tmp_path / "other")
    config = util.read_json(other / "config.json")
    config["data"]["folds_sha256"] = "other"
    util.write_json(other / "config.json", config)
    with pytest.raises(InputError, match="trained on other folds"):
        fit(data_dir, tmp_path / "no", "--weights", other)


def test_encoder_never_sees_the_held_out_fold(source, tmp_path):
    table = pd.read_csv(source / "train.csv", dtype={"image_name": str})
    data_dir = call("preprocess", "--train_csv", source / "train.csv", "--output_dir",
                    tmp_path / "data", "--size", 64, "--n_folds", 2)  # fmt: skip
    fold = util.read_data(data_dir).train["fold"]
    table["sex"] = np.where(fold == 0, "only in fold 0", "elsewhere")
    table.to_csv(tmp_path / "train.csv", index=False)
    data_dir = call("preprocess", "--train_csv", tmp_path / "train.csv", "--image_dir",
                    source / "images", "--output_dir", tmp_path / "data", "--size", 64,
                    "--n_folds", 2, "--overwrite")  # fmt: skip
    run = fit(data_dir, tmp_path / "runs", "--fold", 0)
    encoder = models.load_checkpoint(run / "fold0_best.pt")[1]["encoder"]
    assert encoder["sex"]["values"] == ["elsewhere"]


def test_folds_gather_in_one_run_whatever_the_order(data_dir, tmp_path, runs_dir):
    fit(data_dir, tmp_path, "--fold", 1)
    run = fit(data_dir, tmp_path, "--fold", 0)
    for name in ("oof.csv", "test_predictions.csv", "submission.csv"):
        assert (run / name).read_bytes() == (runs_dir / "resnet" / name).read_bytes()
    with pytest.raises(InputError, match="fold 0 of .* is finished"):
        fit(data_dir, tmp_path, "--fold", 0)
    with pytest.raises(InputError, match=r"seed = 0, not 1"):
        fit(data_dir, tmp_path, "--fold", 0, "--seed", 1)
    assert (run / "oof.csv").read_bytes() == (runs_dir / "resnet" / "oof.csv").read_bytes()
    fit(data_dir, tmp_path, "--fold", 0, "--seed", 1, "--overwrite")
    assert pd.read_csv(run / "oof.csv")["fold"].unique().tolist() == [0]


RESUMED = {
    "resnet": ["--mixup", "0.4", "--label_smoothing", "0.1", "--accumulate", "2", "--workers", "1"],
    "chipnet": ["--ema", "0.7", "--pos_weight", "2", "--loss", "bce", "--amp", "fp16"],
    "cropnet": ["--loader", "device", "--sampler", "shuffle"],
    "fusion": ["--clip_grad", "0.1", "--fsg", "--gate_init", "hard"],
    "fsg_vit": ["--backbone", "vit_tiny", "--routing", "held_out", "--layer_decay", "0.8"],
}


@pytest.mark.parametrize("model", RESUMED)
def test_resumed_run_equals_an_uninterrupted_one(data_dir, runs_dir, tmp_path, monkeypatch, model):
    more = ["--fold", "0", "--epochs", "3", "--patience", "3", "--dropout", "0.5", "--batch_size",
            "5", "--max_hours", "9", *RESUMED[model]]  # fmt: skip
    if model in ("cropnet", "fusion"):
        more += ["--crop_dir", data_dir / "crops" / "chipnet"]
    straight = fit(data_dir, tmp_path / "a", *more, model=model)

    def due(self):  # after so many steps or batches of a prediction
        self.looks = getattr(self, "looks", 0) + 1
        return self.looks > 4

    monkeypatch.setattr(train.Watch, "due", property(due))
    stops = []
    while not (tmp_path / "b" / model / "metrics.json").exists():
        try:
            fit(data_dir, tmp_path / "b", *more, *["--resume"] * bool(stops), model=model)
        except util.Stopped as stopped:
            stops.append(str(stopped))
        if len(stops) == 1:
            with pytest.raises(InputError, match="interrupted; pass --resume"):
                fit(data_dir, tmp_path / "b", *more, model=model)
    resumed = tmp_path / "b" / model
    assert len(stops) >= 3
    assert any("steps" in stop for stop in stops)
    gates = sorted(GATE_FILES) * (model in ("fusion", "fsg_vit"))
    for name in ("oof.csv", "test_predictions.csv", "submission.csv", *gates):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name
    logs = [pd.read_csv(run / "log.csv").drop(columns=["seconds", "images_per_second"])
            for run in (straight, resumed)]  # fmt: skip
    pd.testing.assert_frame_equal(*logs, check_exact=True)
    assert len(logs[0]) == 3
    for kind in ("best", "last"):
        path = f"fold0_{kind}.pt"
        one, two = (models.read_torch_file(run / path) for run in (straight, resumed))
        assert one.keys() == two.keys()
        for part in ("state_dict", "optimizers", "average", "scaler"):
            flat = [tree_flatten(content.get(part))[0] for content in (one, two)]
            for a, b in zip(*flat, strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_every_step_draws_from_a_seed_of_its_own(data_dir, tmp_path, monkeypatch):
    loss_on, seeds = train.Trainer.loss_on, []

    def record(self, batch, share):
        seeds.append(torch.initial_seed())
        return loss_on(self, batch, share)

    monkeypatch.setattr(train.Trainer, "loss_on", record)
    fit(data_dir, tmp_path, "--epochs", 2, "--batch_size", 5)
    assert len(seeds) == len(set(seeds)) >= 2 * 2 * 3


def test_the_number_of_workers_changes_nothing(data_dir, tmp_path):
    one, two = (fit(data_dir, tmp_path / n, "--fold", 0, "--workers", n) for n in ("0", "2"))
    for name in ("oof.csv", "test_predictions.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    weights = [models.read_torch_file(run / "fold0_best.pt")["state_dict"] for run in (one, two)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("key", ["optimizers", "progress", "state_dict"])
def test_a_checkpoint_that_cannot_be_resumed_is_named(data_dir, tmp_path, key):
    with pytest.raises(util.Stopped):
        fit(data_dir, tmp_path, "--fold", 0, "--max_hours", 0)
    path = tmp_path / "resnet" / "fold0_last.pt"
    content = torch.load(path, weights_only=True)
    del content[key]
    torch.save(content, path)
    with pytest.raises((InputError, models.ModelError), match="fold0_last.pt .*again|anew"):
        fit(data_dir, tmp_path, "--fold", 0, "--resume")


def test_what_a_loader_process_finds_is_one_line(data_dir, tmp_path):
    images = dataset.ImageDataset([dataset.Stored(tmp_path / "gone.npy", 4)], range(4),
                                  np.zeros((4, 1)))  # fmt: skip
    with pytest.raises(InputError) as error:
        list(dataset.make_loader(images, 1, batch_size=2))
    assert str(error.value).startswith(str(tmp_path / "gone.npy"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_and_saves(data_dir, tmp_path, monkeypatch, number, status):
    before, count_loss = signal.getsignal(number), train.Trainer.count_loss

    def send(self, step, description):
        count_loss(self, step, description)
        if self.progress["images"] == 8:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train.Trainer, "count_loss", send)
    with pytest.raises(util.Stopped, match="with --resume goes on") as stopped:
        fit(data_dir, tmp_path, "--fold", 0, "--epochs", 2)
    assert stopped.value.status == status
    assert number.name in str(stopped.value)
    assert signal.getsignal(number) is before
    saved = models.read_torch_file(tmp_path / "resnet" / "fold0_last.pt")
    assert saved["progress"]["step"] == 2
    assert not list((tmp_path / "resnet").glob("*.tmp"))


def test_a_process_may_stop_for_another():
    stopped = train.Watch().stop("fold 0")
    assert str(stopped).startswith("another process was told to stop: stopped in fold 0; the same")
    assert stopped.status == 3


def test_a_second_signal_acts_at_once():
    with train.Watch() as watch:
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.due
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_ends_loader_processes_too_loses_the_epoch_alone(
    data_dir, tmp_path, monkeypatch
):
    predict = train.Trainer.predict

    def ended(self, images, tta=1):
        if self.progress["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
        return predict(self, images, tta)

    monkeypatch.setattr(train.Trainer, "predict", ended)
    with pytest.raises(util.Stopped, match="SIGTERM: stopped in fold 0 epoch 2; it will begin an"):
        fit(data_dir, tmp_path, "--fold", 0, "--epochs", 3)
    saved = models.read_torch_file(tmp_path / "resnet" / "fold0_last.pt")
    assert (saved["progress"]["epoch"], saved["progress"]["step"]) == (1, 0)


def test_time_is_up(data_dir, tmp_path):
    words = ["--model", "resnet", "--data_dir", data_dir, "--runs_dir", tmp_path, *SMALL_MODEL]
    result = shell("train", *words, "--max_hours", 0, cwd=tmp_path)
    assert result.returncode == 3
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: --max_hours 0 are over: stopped in fold 0 epoch 1 after 1 st")
    assert "\r" not in result.stderr  # no bars where there is no terminal


def test_early_stopping_keeps_the_best_epoch(data_dir, tmp_path, monkeypatch):
    aucs = iter([0.6, 0.8, 0.7, 0.8])  # an equal AUC is no improvement
    monkeypatch.setattr(train.util, "weighted_auc", lambda *_: next(aucs, 0.5))
    run = fit(data_dir, tmp_path, "--fold", 0, "--epochs", 9, "--patience", 2)
    assert models.load_checkpoint(run / "fold0_best.pt")[1]["epoch"] == 2
    assert len(pd.read_csv(run / "log.csv")) == 4


def test_every_routing_and_switch_trains(data_dir, tmp_path):
    for routing in ("off", "single", "upstream"):
        fit(data_dir, tmp_path, "--backbone", "vit_tiny", "--routing", routing, "--name", routing,
            "--fold", 0, "--limit", 6, model="fsg_vit")  # fmt: skip
    fit(data_dir, tmp_path, "--name", "x", "--fold", 0, "--limit", 6, "--sampler", "shuffle",
        "--loss", "bce", "--schedule", "cosine", "--amp", "bf16", "--workers", "1")  # fmt: skip


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("resnet", ["--routing", "held_out"]),
        ("chipnet", ["--gate_init", "hard", "--gate_l1", "1", "--gate_lr", "1"]),
        ("cropnet", ["--gate_init", "paper", "--routing", "sequential"]),
        ("fusion", ["--routing", "off"]),
    ],
)
def test_gates_on_any_model(data_dir, runs_dir, source, tmp_path, model, more):
    crops = [] if model in ("resnet", "chipnet") else ["--crop_dir", data_dir / "crops" / "chipnet"]
    run = fit(data_dir, tmp_path, "--fold", 0, "--epochs", 2, "--fsg", *crops, *more, model=model)
    assert GATE_FILES <= {path.name for path in run.iterdir()}
    network, content = models.load_checkpoint(run / "fold0_last.pt")
    gates = torch.cat(list(fsg.gate_values(network, relative=True).values()))
    history = np.load(run / "fold0_gates.npy", allow_pickle=False)
    assert history.shape == (2, len(gates))
    assert np.allclose(history[-1], gates.numpy())
    assert not np.array_equal(history[0], history[1])  # they learn
    log = pd.read_csv(run / "gates.csv")
    assert log.groupby("epoch").size().tolist() == [1 + len(fsg.gate_values(network))] * 2
    total = log[(log["branch"] == "all") & (log["epoch"] == 2)].iloc[0]
    assert total["mean"] == pytest.approx(gates.mean().item(), abs=1e-6)
    prune = pd.read_csv(run / "prune.csv")
    assert set(prune["ranking"]) == {"gate", "contribution", "chance"}
    assert prune["share"].max() == 0.9
    assert prune.loc[prune["share"] == 0, "auc"].nunique() == 1
    if model == "resnet":
        call("predict", "--run", run, "--output", tmp_path / "out", "--device", "cpu",
             source / "images" / "0000.jpg")  # fmt: skip
        assert (tmp_path / "out" / "predictions.csv").exists()


def test_gate_log_gathers_folds_and_replaces_what_is_trained_again(tmp_path):
    model = fsg.add_gates(models.regnet_tiny(1))
    for fold, epoch, logit in ((1, 1, 0), (0, 1, 0), (0, 2, 1), (0, 3, 9), (0, 2, 2)):
        for gate in fsg.gate_parameters(model):
            torch.nn.init.constant_(gate, logit)
        train.write_gates(tmp_path, fold, epoch, model)
    log = pd.read_csv(tmp_path / "gates.csv")
    log = log[log["branch"] == "all"]
    assert log[["fold", "epoch"]].to_numpy().tolist() == [[0, 1], [0, 2], [1, 1]]
    expected = [1, 2 / (1 + np.exp(-2)), 1]
    assert log["mean"].tolist() == pytest.approx(expected)
    history = np.load(tmp_path / "fold0_gates.npy", allow_pickle=False)
    assert np.allclose(history, np.array(expected[:2])[:, None])


def test_prune_curves_of_all_folds_are_in_one_table(data_dir, tmp_path):
    run = fit(data_dir, tmp_path, "--fsg", "--limit", 4)
    prune = pd.read_csv(run / "prune.csv")
    assert prune.groupby("fold").size().tolist() == [15, 15]
    assert {"fold0_gates.png", "fold1_gates.png"} < {path.name for path in run.iterdir()}


def test_prune_curve_leaves_the_network_and_finds_the_gates_that_matter():
    torch.manual_seed(0)
    model = fsg.add_gates(models.regnet_tiny(1)).eval()
    first, *rest = fsg.gate_parameters(model)
    with torch.no_grad():
        first.fill_(4)
        for gate in rest:
            gate.fill_(-4)
    x, before = torch.rand(40, 3, 32, 32), copy.deepcopy(model.state_dict())

    def predict(model):
        with torch.inference_mode():
            return model(x).squeeze(1).double().numpy()

    target = (predict(model) > np.median(predict(model))).astype(int)
    curve = {point[:2]: point[2] for point in train.prune_curve(predict, model, target)}
    assert curve["gate", 0.0] == 1
    assert curve["gate", 0.9] > 0.95  # 16 of 240 gates carry it
    assert curve["chance", 0.9] < curve["gate", 0.9]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_held_out_gates_have_whole_groups_of_their_own(data_dir):
    words = ["--model", "resnet", "--fsg", "--routing", "held_out", "--data_dir", data_dir]
    args = train.get_args_parser().parse_args([str(w) for w in [*words, *SMALL_MODEL]])
    settings, data = train.fill_defaults(args), util.read_data(data_dir)
    images, _ = train.make_datasets(0, settings, data, None)
    group = util.groups_of(data.train, data.facts["group_col"])
    parts = [set(group[images[part].rows]) for part in ("train", "gates", "valid")]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts))  # no group on two sides
    rows = np.concatenate([images[part].rows for part in ("train", "gates", "valid")])
    assert sorted(rows) == list(range(len(data.train)))
    assert images["gates"].transform is not images["train"].transform
    assert set(images["gates"].target) == {0, 1}


def test_gates_of_held_out_step_on_batches_of_their_own(data_dir, tmp_path, monkeypatch):
    loss_on, shown = train.Trainer.loss_on, []

    def record(self, batch, share):
        shown.append(batch[1])  # metadata names the row here
        return loss_on(self, batch, share)

    encode = train.MetaEncoder.encode
    monkeypatch.setattr(train.Trainer, "loss_on", record)
    monkeypatch.setattr(train.MetaEncoder, "encode", lambda self, table: np.repeat(
        np.arange(len(table), dtype=np.float32)[:, None], encode(self, table).shape[1], axis=1))
    fit(data_dir, tmp_path, "--fold", 0, "--fsg", "--routing", "held_out")
    weights, gates = ({int(row[0]) for batch in shown[i::2] for row in batch} for i in (0, 1))
    assert weights
    assert gates
    assert not weights & gates


def test_the_gates_batches_go_on_where_they_were():
    batches = train.repeated(lambda start: [0, 1, 2][start:], start=4)
    assert [next(batches) for _ in range(7)] == [1, 2, 0, 1, 2, 0, 1]


def test_too_few_images_for_held_out_gates_are_named():
    rows, target = np.arange(8), np.array([0, 0, 0, 0, 0, 0, 0, 1])
    for chosen in (rows, rows[:3]):
        with pytest.raises(InputError, match="too few groups of a class"):
            train.gate_rows(chosen, np.arange(8), target, 0)
    apart = train.gate_rows(rows, np.arange(8), np.arange(8) % 2, 0)
    assert 2 <= apart.sum() <= 3  # four groups of a class: a quarter of them


def test_diverging_training_stops_and_keeps_the_batch(data_dir, tmp_path):
    with pytest.raises(InputError, match=r"the loss is (nan|inf) .*nonfinite_batch\.pt"):
        fit(data_dir, tmp_path, "--fold", 0, "--lr", "1e30", "--head_lr", "1e30", "--epochs", 5)
    path = tmp_path / "resnet" / "nonfinite_batch.pt"
    image, meta, target = torch.load(path, weights_only=True)
    assert (image.dtype, image.shape[1:]) == (torch.uint8, (3, 64, 64))
    assert len(image) == len(meta) == len(target)


# ---------------------------------------------------------------- extras
def make_trainer(data_dir, *more, model="resnet"):
    words = ["--model", model, "--data_dir", data_dir, *SMALL_MODEL, *more]
    args = train.get_args_parser().parse_args([str(word) for word in words])
    settings = train.fill_defaults(args)
    torch.manual_seed(0)
    spec = train.make_spec(settings, 64, meta_dim=2)
    cpu = torch.device("cpu")
    return train.Trainer(settings, spec, "none", cpu, train.Team(), train.Watch())


def make_batch(n=6):
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (n, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return [image, torch.rand(n, 2, generator=generator), (torch.arange(n) % 2).float()]


def gradients(trainer, batch):
    trainer.loss_on(batch, 1.0)().backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_a_batch_in_parts_has_the_gradient_of_the_whole(data_dir):
    vit = ["--backbone", "vit_tiny", "--gate_l1", "0.5"]  # no batch norm
    whole, parts = (
        gradients(make_trainer(data_dir, *vit, "--accumulate", n, model="fsg_vit"), make_batch(7))
        for n in (1, 3)
    )
    assert torch.allclose(whole, parts, atol=1e-6)
    assert whole.norm() > 0
    trainer = make_trainer(data_dir, *vit, "--accumulate", 9, model="fsg_vit")
    assert torch.allclose(whole, gradients(trainer, make_batch(7)), atol=1e-6)


def test_mixup_and_smoothing_mix_what_belongs_together(data_dir):
    image = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2) * 10
    rows, target = torch.arange(4.0).view(4, 1), torch.tensor([0.0, 1, 0, 1])
    torch.manual_seed(0)
    mixed = train.mix_up([image, rows, target], 0.4)
    assert torch.allclose(mixed[0] * 255, 10 * mixed[1].view(4, 1, 1, 1).expand(4, 3, 2, 2))
    assert mixed[1].sum() == pytest.approx(6)  # a permutation
    shares = []
    for _ in range(200):
        _, row, label = train.mix_up([image, rows, target], 0.4)
        shares.append(row[0].item())
        assert ((label >= 0) & (label <= 1)).all()
    assert min(shares) < 0.1
    assert max(shares) > 2
    seen, trainer = [], make_trainer(data_dir, "--label_smoothing", 0.2)
    trainer.compute_loss = lambda image, meta, target: seen.append(target) or torch.zeros(())
    trainer.loss_on(make_batch(), 1.0)()
    assert torch.allclose(seen[0], torch.tensor([0.1, 0.9] * 3))


def test_positives_weigh_in_the_loss(data_dir):
    batch, losses = make_batch(), []
    for weight in (1, 3):
        trainer = make_trainer(data_dir, "--pos_weight", weight, "--loss", "bce")
        losses.append([trainer.loss_on([*batch[:2], label], 1.0)().item()
                       for label in (torch.ones(6), torch.zeros(6))])  # fmt: skip
    assert losses[1][0] == pytest.approx(3 * losses[0][0], rel=1e-5)
    assert losses[1][1] == pytest.approx(losses[0][1], rel=1e-5)


def test_clipping_holds_the_norm(data_dir):
    norms = []
    for words in ([], ["--clip_grad", "0.01"]):
        trainer = make_trainer(data_dir, *words)
        trainer.routing.step(trainer.loss_on(make_batch(), 1.0))
        norms.append(torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm())
    assert norms[0] > 0.02
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_the_average_is_scored_and_kept(data_dir, tmp_path, monkeypatch):
    steps, update = [], train.AveragedModel.update_parameters

    def record(self, model):
        update(self, model)
        steps.append({key: value.clone().float() for key, value in model.state_dict().items()})

    monkeypatch.setattr(train.AveragedModel, "update_parameters", record)
    run = fit(data_dir, tmp_path, "--fold", 0, "--ema", "0.5")
    average = steps[0]
    for state in steps[1:]:
        average = {key: 0.5 * value + 0.5 * state[key] for key, value in average.items()}
    best = models.load_checkpoint(run / "fold0_best.pt")[0].state_dict()
    last = models.load_checkpoint(run / "fold0_last.pt")[0].state_dict()
    floats = [key for key, value in best.items() if value.is_floating_point()]
    assert all(torch.allclose(best[key], average[key], atol=1e-6) for key in floats)
    assert all(torch.equal(last[key], steps[-1][key]) for key in floats)


@pytest.mark.parametrize(("backbone", "blocks"), [("vit_tiny", 4), ("timm:test_vit", None)])
def test_layer_decay(data_dir, backbone, blocks):
    more = ["--backbone", backbone, "--layer_decay", 0.5, "--lr", 1]
    trainer = make_trainer(data_dir, *more, model="fsg_vit")
    groups, backbone = trainer.optimizer.param_groups, trainer.model.backbone
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    names = {name: rates[id(p)] for name, p in backbone.named_parameters() if id(p) in rates}
    n = len({rate for rate in names.values()}) - 2
    assert blocks in (None, n)
    assert trainer.set_lr(1) == 1
    for name, rate in names.items():
        parts = name.replace("layer_", "layer.").split(".")
        index = [int(part) for part in parts if part.isdigit()]
        if "ln." in name[:11] or name.startswith("norm."):
            assert rate == 1, name
        elif "encoder_layer" in name or name.startswith("blocks"):
            assert rate == 0.5 ** (n - index[0]), name
        else:
            assert rate == 0.5 ** (n + 1), name
    everything = [p for p in trainer.model.parameters()]
    assert len(rates) + len(fsg.gate_parameters(trainer.model)) == len(everything)
    with pytest.raises(models.ModelError, match="--layer_decay is for ViTs"):
        make_trainer(data_dir, "--layer_decay", 0.5)


def test_tensorboard(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        fit(data_dir, tmp_path, "--tensorboard")
    assert not list(tmp_path.iterdir())
    scalars = []

    class Writer:
        def __init__(self, path, purge_step):
            scalars.append((path.relative_to(tmp_path).as_posix(), purge_step))

        def add_scalar(self, name, value, epoch):
            scalars.append((name, value, epoch))

        def flush(self):
            pass

    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = fit(data_dir, tmp_path, "--fold", 1, "--epochs", 2, "--tensorboard")
    assert scalars[0] == ("resnet/tensorboard/fold1", 1)
    log = pd.read_csv(run / "log.csv")
    written = {(name, epoch): value for name, value, epoch in scalars[1:]}
    for name in train.LOG_COLUMNS[2:]:
        assert [written[name, epoch] for epoch in (1, 2)] == pytest.approx(log[name].tolist())


def test_compiled_training_is_the_same_training(data_dir, tmp_path, monkeypatch):
    plain, modes = fit(data_dir, tmp_path / "plain", "--fold", 0), []

    def compiled(network, mode):
        modes.append(mode)
        return torch._dynamo.optimize("eager")(network)

    monkeypatch.setattr(torch, "compile", compiled)
    run = fit(data_dir, tmp_path, "--fold", 0, "--compile", "reduce-overhead")
    assert modes == ["reduce-overhead"]
    assert (run / "oof.csv").read_bytes() == (plain / "oof.csv").read_bytes()


def test_deterministic(data_dir, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fit(data_dir, tmp_path, "--fold", 0, "--deterministic")
    assert asked == [True]
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"


@pytest.mark.parametrize("model", ["chipnet", "fusion"])
def test_training_on_images_that_lie_on_the_device(data_dir, runs_dir, tmp_path, model):
    crops = data_dir / "crops" / "chipnet"
    more = ["--guide", crops] if model == "chipnet" else ["--crop_dir", crops]
    where = ["--fold", 0, "--loader", "device", "--workers", 2]
    run = fit(data_dir, tmp_path, *where, *more, model=model)
    again = fit(data_dir, tmp_path / "again", *where, *more, model=model)
    assert (run / "oof.csv").read_bytes() == (again / "oof.csv").read_bytes()
    assert 0 < pd.read_csv(run / "log.csv")["train_loss"][0] < 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fold", "7"], "folds 0 to 1"),
        (["--fold", "x"], "folds 0 to 1"),
        (["--meta_cols", "colour"], "--meta_cols colour"),
        (["--data_dir", "nowhere"], "nowhere"),
        (["--crop_dir", "nowhere"], r"crop\.json is missing"),
        (["--gate_lr", "1"], "--gate_lr is for gates; resnet has some with --fsg"),
        (["--routing", "off"], "--routing is for gates"),
    ],
)
def test_bad_input(data_dir, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        fit(data_dir, tmp_path, *words)
    assert not list(tmp_path.iterdir())


def test_crops_of_other_folds_are_refused(data_dir, runs_dir, source, tmp_path):
    other = call("preprocess", "--train_csv", source / "train.csv", "--output_dir",
                 tmp_path / "other", "--size", 64, "--n_folds", 2, "--seed", 5)  # fmt: skip
    with pytest.raises(InputError, match="cropped for other folds"):
        fit(other, tmp_path, "--crop_dir", data_dir / "crops" / "chipnet", model="cropnet")
    with pytest.raises(InputError, match="trained on other folds"):
        call(
            "crop",
            "--source",
            "attention",
            "--run",
            runs_dir / "chipnet",
            "--data_dir",
            other,
            "--device",
            "cpu",
        )


def test_crops_by_networks_that_saw_the_held_out_images_are_refused(data_dir, runs_dir, tmp_path):
    crops = shutil.copytree(data_dir / "crops" / "chipnet", tmp_path / "crops")
    boxes = pd.read_csv(crops / "train_boxes.csv", dtype={"image_name": str})
    fold = util.read_data(data_dir).train["fold"]
    util.write_table(crops / "train_boxes.csv", boxes.assign(oof=(fold == 0).astype(int)))
    words = ["--crop_dir", crops, "--limit", 4]
    with pytest.raises(InputError, match="images of fold 1 were cropped by networks that saw them"):
        fit(data_dir, tmp_path / "runs", *words, model="cropnet")
    assert not (tmp_path / "runs").exists()
    fit(data_dir, tmp_path / "runs", *words, "--fold", 0, model="cropnet")


def test_weights_of_a_single_fold_are_refused(data_dir, runs_dir, tmp_path):
    weights = ["--weights", runs_dir / "resnet" / "fold0_best.pt"]
    with pytest.raises(InputError, match="is the network of one fold; pass .*resnet"):
        call("train", "--model", "resnet", "--data_dir", data_dir, "--runs_dir", tmp_path,
             *SMALL_MODEL, *weights)  # fmt: skip


def test_encoder_is_fitted_to_training_rows_alone(data_dir, monkeypatch):
    fit_encoder, shown = train.MetaEncoder.fit, []

    def record(table, names):
        shown.append(set(table["image_name"]))
        return fit_encoder(table, names)

    monkeypatch.setattr(train.MetaEncoder, "fit", record)
    data = util.read_data(data_dir)
    for more in ([], ["--fsg", "--routing", "held_out"]):
        words = ["--model", "resnet", "--data_dir", data_dir, *SMALL_MODEL, *more]
        args = train.get_args_parser().parse_args([str(word) for word in words])
        train.make_datasets(1, train.fill_defaults(args), data, None)
    assert shown == [set(data.train["image_name"][data.train["fold"] == 0])] * 2


def test_a_killed_call_may_have_written_some_of_a_fold(data_dir, runs_dir, tmp_path):
    run, data = shutil.copytree(runs_dir / "resnet", tmp_path / "run"), util.read_data(data_dir)
    metrics = util.read_metrics(run)
    tables = [pd.read_csv(run / name, dtype={"image_name": str})
              for name in ("oof.csv", "test_predictions.csv")]  # fmt: skip
    util.write_json(run / "metrics.json", metrics | {"folds": metrics["folds"][:1]})
    second = [table[table["fold"] == 1] for table in tables]
    found = train.record_fold(run, data, metrics["folds"][1], *second)
    assert [fold["rows"] for fold in found["folds"]] == [12, 12]
    for name in ("oof.csv", "test_predictions.csv", "submission.csv", "metrics.json"):
        assert (run / name).read_bytes() == (runs_dir / "resnet" / name).read_bytes(), name
    (tmp_path / "new" / "resnet").mkdir(parents=True)
    (tmp_path / "new" / "resnet" / "config.json.tmp").touch()  # killed while writing its first file
    fit(data_dir, tmp_path / "new", "--fold", 0, "--resume", "--limit", 2)  # fewer than test images
    assert len(pd.read_csv(tmp_path / "new" / "resnet" / "submission.csv")) == 2


def test_array_and_table_that_do_not_match_are_refused(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns("crops"))
    np.save(copy / "train_64.npy", np.zeros((5, 64, 64, 3), np.uint8))
    with pytest.raises(InputError, match="5 images but its table has 24 rows"):
        fit(copy, tmp_path / "runs")


def test_errors_are_one_line_with_status_2(data_dir, tmp_path):
    words = ["--model", "resnet", "--data_dir", data_dir, "--runs_dir", tmp_path, *SMALL_MODEL]
    result = shell("train", *words, "--fold", "9", cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("train.py: error: ")


def test_only_training_crops_are_jittered(data_dir, runs_dir):
    import dataset

    words = ["--data_dir", data_dir, "--crop_dir", data_dir / "crops" / "chipnet", *SMALL_MODEL]
    for model, jitter, kinds in (
        ("cropnet", [], [dataset.Jittered]),
        ("cropnet", ["--no-jitter"], [dataset.Stored]),
        ("fusion", [], [dataset.Stored, dataset.Jittered]),
    ):
        parser = train.get_args_parser()
        args = parser.parse_args([str(w) for w in ["--model", model, *words, *jitter]])
        settings, data = train.fill_defaults(args), util.read_data(data_dir)
        _, crop = train.find_arrays(settings, data)
        images, _ = train.make_datasets(0, settings, data, crop)
        assert [type(source) for source in images["train"].sources] == kinds
        for part in ("valid", "test"):
            assert {type(source) for source in images[part].sources} == {dataset.Stored}


# ---------------------------------------------------------------- several processes
def torchrun(data_dir, runs, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", "train.py", "--data_dir", data_dir, "--runs_dir", runs,
               *SMALL_MODEL, *words]  # fmt: skip
    run = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    return run


def test_two_processes_train_a_fold_as_one_would(data_dir, tmp_path):
    words = ["--fold", 0, "--epochs", 3, "--batch_size", 7, "--patience", 3]
    vit = ["--model", "fsg_vit", "--backbone", "vit_tiny", *words]  # no batch norm
    one = call("train", "--data_dir", data_dir, "--runs_dir", tmp_path / "one", *SMALL_MODEL, *vit)
    run = torchrun(data_dir, tmp_path / "two", *vit)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("oof ") == 1
    two = tmp_path / "two" / "fsg_vit"
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    logs = [pd.read_csv(folder / "log.csv") for folder in (one, two)]
    for column in ("fold", "epoch", "train_loss", "valid_loss", "valid_auc", "lr"):
        assert np.allclose(logs[0][column], logs[1][column], rtol=1e-3), column
    for name in ("oof.csv", "test_predictions.csv"):
        tables = [pd.read_csv(folder / name, dtype={"image_name": str}) for folder in (one, two)]
        assert tables[0]["image_name"].tolist() == tables[1]["image_name"].tolist()
        assert np.allclose(tables[0]["prob"], tables[1]["prob"], atol=1e-3)


def test_two_processes_take_a_fold_each(data_dir, runs_dir, tmp_path):
    run = torchrun(data_dir, tmp_path, "--model", "resnet")
    assert run.returncode == 0, run.stderr
    for name in ("oof.csv", "test_predictions.csv", "submission.csv"):
        one, two = ((runs / "resnet" / name).read_bytes() for runs in (runs_dir, tmp_path))
        assert one == two, name
    assert pd.read_csv(tmp_path / "resnet" / "log.csv")["fold"].tolist() == [0, 1]


def test_shares_make_up_the_batches(data_dir):
    rows = np.arange(15)
    stored = dataset.Stored(util.array_path(data_dir, "train", 64), 24)
    images = dataset.ImageDataset([stored], rows, rows[:, None], rows % 2,
                                  dataset.train_transform(64))  # fmt: skip

    def batches(share):
        loader = dataset.train_loader(images, 7, "shuffle", 0, seed=1, share=share)
        return [dict(zip(meta[:, 0].tolist(), image, strict=True)) for image, meta, _ in loader]

    whole, parts = batches((0, 1)), [batches((i, 2)) for i in range(2)]
    assert [len(batch) for batch in whole] == [7, 7, 1]  # the single one has no share to give
    assert [[len(batch) for batch in part] for part in parts] == [[4, 4], [3, 3]]
    for batch, *shares in zip(whole, *parts, strict=False):
        joint = shares[0] | shares[1]
        assert joint.keys() == batch.keys()
        assert all(torch.equal(joint[row], batch[row]) for row in batch)
