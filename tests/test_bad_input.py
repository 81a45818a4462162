"""Every script on bad input: one line that names what is wrong and says what to do, status 2, no
traceback, and nothing written or lost."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL_MODEL, hashes
from PIL import Image

import models
import util

COMMANDS = {
    "preprocess": "--train_csv {source}/train.csv --output_dir {out} --size 32 --n_folds 2",
    "train": f"--model resnet --data_dir {{data}} --runs_dir {{out}} {' '.join(SMALL_MODEL)}",
    "crop": "--source attention --run {runs}/chipnet --data_dir {data} --output_dir {out} "
            "--device cpu --views 1",
    "ensemble": "mean --runs_dir {runs} --name b",
    "predict": "{source}/images/0024.jpg --run {runs}/resnet --output {out} --device cpu --tta 1 "
               "--no-pictures",
}  # fmt: skip
# what to do: after a semicolon, or the values that are possible
ADVICE = re.compile(r"; |is not in|the runs are|has folds|the train table has")


class Place:
    """A user's folder with copies of the shared data, made as they are asked for."""

    def __init__(self, folder: Path, source: Path, data: Path, runs: Path):
        self.folder, self.left = folder, {"source": source, "data": data, "runs": runs}
        self.origins = dict(self.left)

    def __getattr__(self, name: str) -> Path:
        """source, data, runs: a copy; any other name: a path that is not there yet."""
        path = self.folder / name
        if name in self.left:
            left_out = shutil.ignore_patterns("*_last.pt", "*.png", "ensemble", "mean")
            shutil.copytree(self.left.pop(name), path, ignore=left_out)
        if name == "runs":
            for config in self.data.parent.glob("runs/*/config.json"):  # of the copied data
                text = config.read_text()
                for part, origin in self.origins.items():
                    text = text.replace(str(origin), str(self.folder / part))
                config.write_text(text)
        return path

    def words(self, text: str) -> list[str]:
        """Command line words with {source} and the like filled in, and what they read copied."""
        return [re.sub(r"{([\w.]+)}", lambda m: str(getattr(self, m[1])), w) for w in text.split()]


@pytest.fixture(scope="module", autouse=True)
def shared_files_stay(source, data_dir, runs_dir):
    """The cases work on copies of what other tests need too."""
    folders = source, data_dir, runs_dir
    before = [hashes(folder) for folder in folders]
    yield
    assert [hashes(folder) for folder in folders] == before


@pytest.fixture
def place(tmp_path, source, data_dir, runs_dir) -> Place:
    return Place(tmp_path, source, data_dir, runs_dir)


def run(monkeypatch, capsys, script: str, words: list[str]) -> tuple[int, list[str]]:
    """Run a script in this process as its command line does: (exit status, lines on stderr)."""
    module = __import__(script)
    expected = [models.ModelError] if script in ("train", "crop", "predict") else []
    if script in ("crop", "predict"):
        expected.append(module.localize.SourceError)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    capsys.readouterr()
    status = 0
    try:
        util.run_script(module.main, module.get_args_parser(), *expected)
    except SystemExit as stop:
        status = stop.code
    bars = re.compile(r"\r[^\n]*?(?=\r|\n|$|\w+\.py: error)|\x1b\[A")
    lines = [line for line in bars.sub("", capsys.readouterr().err).splitlines() if line.strip()]
    return status, [line for line in lines if not re.match(r"\S.*it/s|.*image/s|usage:| {4}", line)]


# ---------------------------------------------------------------- ways to spoil
def cut(path: str, size: int = 100):
    """Keep the first bytes of a file."""
    return lambda at: resolve(at, path).write_bytes(resolve(at, path).read_bytes()[:size])


def put(path: str, content):
    """Write a file: text, bytes, pixels or an array by suffix, or what torch.save takes."""

    def spoil(at):
        file = resolve(at, path)
        if isinstance(content, (str, bytes)):
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        elif file.suffix == ".npy":
            np.save(file, content, allow_pickle=True)
        elif file.suffix == ".pt":
            torch.save(content, file)
        else:
            Image.fromarray(content).save(file, format="PNG")

    return spoil


def move(path: str, to: str | None = None):
    """Rename a file or folder, or remove it."""

    def spoil(at):
        file = resolve(at, path)
        file.rename(file.with_name("removed") if to is None else resolve(at, to))

    return spoil


def copy(path: str, to: str):
    """Copy a file over another."""
    return lambda at: shutil.copy(resolve(at, path), resolve(at, to))


def swap(path: str, old: str, new: str):
    """Replace text in a file, wherever it stands."""

    def spoil(at):
        text = resolve(at, path).read_text()
        assert old in text
        resolve(at, path).write_text(text.replace(old, new))

    return spoil


def table(path: str, change):
    """Change a csv as a table of text."""

    def spoil(at):
        found = pd.read_csv(resolve(at, path), dtype=str, keep_default_na=False)
        change(found).to_csv(resolve(at, path), index=False)

    return spoil


def cell(path: str, column: str, value: str, row: int = 3):
    """Change one value of a csv."""
    return table(path, lambda t: t.assign(**{column: t[column].where(t.index != row, value)}))


def facts(path: str, change):
    """Change a json or the content of a checkpoint: what `change` does to it, in place."""

    def spoil(at):
        file = resolve(at, path)
        if file.suffix == ".pt":
            content = torch.load(file, weights_only=True)
            change(content)
            torch.save(content, file)
        else:
            content = json.loads(file.read_text())
            change(content)
            file.write_text(json.dumps(content))

    return spoil


def drop(path: str, key: str, *parents: str):
    """Take a key out of a json or a checkpoint: an older version did not write it."""

    def change(content):
        for parent in parents:
            content = content[parent]
        del content[key]

    return facts(path, change)


def both(*spoils):
    """Several spoils, one after the other."""
    return lambda at: [spoil(at) for spoil in spoils]


def resolve(at: Place, path: str) -> Path:
    top, _, rest = path.partition("/")
    return getattr(at, top) / rest


def boxes(*corners, name="0003"):
    """A csv of boxes as a detector writes it."""
    text = "image_name,x0,y0,x1,y1\n0000,10,10,40,40\n"
    return put("mine.csv", text + ",".join(map(str, (name, *corners))) + "\n")


def png_of(*shape, dtype=np.uint8):
    return np.full(shape, 90, dtype)


def nothing(at):
    pass


# ---------------------------------------------------------------- the table
TRAIN, IMAGE, RESNET = "source/train.csv", "source/images/0003.jpg", "runs/resnet"
BOXES = "--source boxes --boxes {mine.csv}"
CROPNET = "--model cropnet --crop_dir {data}/crops/chipnet"
BAD = [
    # tables
    ("preprocess", "no table", move(TRAIN), "", r"train\.csv is missing"),
    ("preprocess", "empty table", put(TRAIN, ""), "", r"train\.csv is not a readable csv"),
    ("preprocess", "header alone", put(TRAIN, "image_name,target\n"), "", "no rows"),
    ("preprocess", "table is an image", copy(IMAGE, TRAIN), "", r"train\.csv is not UTF-8"),
    ("preprocess", "table is a folder", both(move(TRAIN),
     lambda at: (at.source / "train.csv").mkdir()),
     "", r"train\.csv cannot be read \(Is a directory\)"),
    ("preprocess", "zip as csv", put(TRAIN, b"PK\x03\x04" + bytes(range(256))), "", "not UTF-8"),
    ("preprocess", "cp1252", lambda at: (at.source / "train.csv").write_text(
     (at.source / "train.csv").read_text().replace("male", "m\xe4nnlich"), "cp1252"), "",
     "not UTF-8"),
    ("preprocess", "UTF-16", lambda at: (at.source / "train.csv").write_text("image_name",
     "utf-16"),
     "", "not UTF-8"),
    ("preprocess", "semicolons", swap(TRAIN, ",", ";"), "", "no column 'image_name'.*commas"),
    ("preprocess", "open quote", swap(TRAIN, "0003,", '"0003,'), "", "not a readable csv"),
    ("preprocess", "row too long", swap(TRAIN, "0003,", "0003,x,"), "", "line 5"),
    ("preprocess", "all rows too long", lambda at: (at.source / "train.csv").write_text(
     re.sub(r"(?<=\d)\n", ",1,2\n", (at.source / "train.csv").read_text())), "",
     "rows longer than its header"),
    ("preprocess", "truncated row", cut(TRAIN, 300), "", "target of 0008 is 'nan'"),
    ("preprocess", "column renamed", swap(TRAIN, "target", "label"), "", "no column 'target'"),
    ("preprocess", "column twice", swap(TRAIN, "sex", "target"), "", "two columns 'target'"),
    ("preprocess", "both names", swap(TRAIN, "sex", "file"), "--image_col file",
     "has both 'file' and 'image_name'|more than once|empty"),
    ("preprocess", "one column for two", nothing, "--image_col target", "both target"),
    ("preprocess", "row twice", table(TRAIN, lambda t: pd.concat([t, t[:1]])), "",
     "'0000' more than"),
    ("preprocess", "image under two names", cell(TRAIN, "image_name", "0004.jpg"), "",
     "'0004.jpg' and '0004' are one image"),
    ("preprocess", "name empty", cell(TRAIN, "image_name", ""), "", "line 5: image_name is empty"),
    ("preprocess", "target is text", cell(TRAIN, "target", "benign"), "", "of 0003 is 'benign'"),
    ("preprocess", "target is empty", cell(TRAIN, "target", ""), "", "of 0003 is 'nan'"),
    ("preprocess", "target is infinite", cell(TRAIN, "target", "inf"), "", "of 0003 is 'inf'"),
    ("preprocess", "target is a half", cell(TRAIN, "target", "0.5"), "", "of 0003 is '0.5'"),
    ("preprocess", "one class", table(TRAIN, lambda t: t.assign(target=1)), "",
     "every target is 1"),
    ("preprocess", "one patient", table(TRAIN, lambda t: t.assign(patient_id="p")), "",
     "only 1 groups.*--n_folds"),
    ("preprocess", "no patients", table(TRAIN, lambda t: t.assign(patient_id="")), "",
     "'patient_id' of .* is empty"),
    ("preprocess", "one fold", nothing, "--n_folds 1", "1 is not in 2 to"),
    ("preprocess", "seed too large", nothing, "--seed 4294967296", "4294967296 is not in 0"),
    ("preprocess", "sample of other images", cell("source/sample_submission.csv", "image_name", "x",
     0),
     "", r"only one has '0027'.*; repair"),
    ("preprocess", "test table broken", put("source/test.csv", "image\na\n"), "",
     r"test\.csv has no column"),
    ("preprocess", "line break in a name", cell(TRAIN, "image_name", "a\nb"), "", "no image named"),
    ("preprocess", "control characters", cell(TRAIN, "target", "\x1b[31m"), "", r"of 0003 is '"),
    # images
    ("preprocess", "no folder", move("source/images"), "", "images is not a folder"),
    ("preprocess", "image missing", move(IMAGE), "", "no image named '0003'"),
    ("preprocess", "image empty", put(IMAGE, b""), "", r"0003\.jpg is no JPEG"),
    ("preprocess", "image truncated", cut(IMAGE, 900), "", r"0003\.jpg is not a readable"),
    ("preprocess", "image is text", put(IMAGE, "a picture"), "", r"0003\.jpg is no JPEG"),
    ("preprocess", "image is a gif", lambda at: Image.fromarray(png_of(9, 9)).save(
        at.source / "images" / "0003.jpg", format="GIF"), "",
     r"0003\.jpg is no JPEG or PNG; convert"),
    ("preprocess", "image is a folder", both(move(IMAGE),
     lambda at: (at.source / "images/0003.jpg").mkdir()),
     "", r"0003\.jpg cannot be read"),
    ("preprocess", "two images of a name", copy(IMAGE, "source/images/0003.png"), "",
     "share a name"),
    # outputs
    ("preprocess", "output is a file", put("out", "mine"), "", "out cannot be written to"),
    ("preprocess", "output below a file", put("file", "mine"), "--output_dir {file}/out",
     "out cannot be written to"),
    ("preprocess", "output is the input", nothing, "--output_dir {source}",
     r"would overwrite.*\.csv"),
    ("preprocess", "output among the images", nothing, "--output_dir {source}/images",
     "would overwrite.*images"),
    ("preprocess", "output too large", nothing, "--size 1000000", "make room"),
    ("preprocess", "finished", both(lambda at: at.data,
     lambda at: shutil.rmtree(at.data / "crops")),
     "--output_dir {data}", "already finished"),
    ("preprocess", "shards and overwrite", nothing, "--overwrite --shard 0/2", "other shards"),
    # what preprocess.py wrote
    ("train", "no data", move("data"), "", r"preprocess\.json is missing"),
    ("train", "data is a file", put("file", "x"), "--data_dir {file}",
     r"preprocess\.json cannot be read"),
    ("train", "json cut", cut("data/preprocess.json"), "", r"preprocess\.json is not valid JSON"),
    ("train", "json is a list", put("data/preprocess.json", "[1]"), "", "not a list"),
    ("train", "json too deep", put("data/preprocess.json", "[" * 100000), "", "not valid JSON"),
    ("train", "json of an older version", drop("data/preprocess.json", "sha256"), "",
     "no 'sha256'"),
    ("train", "size is text", facts("data/preprocess.json", lambda c: c.update(size="64")), "",
     "size cannot be '64'"),
    ("train", "table changed", cell("data/train.csv", "sex", "other"), "",
     "changed after preprocessing"),
    ("train", "rows reordered", table("data/train.csv", lambda t: t[::-1]), "", "changed after"),
    ("train", "table gone", move("data/test.csv"), "", r"test\.csv is missing"),
    ("train", "array gone", move("data/train_64.npy"), "", r"train_64\.npy is missing; run"),
    ("train", "array cut", cut("data/train_64.npy", 5000), "",
     r"train_64\.npy is not a readable array"),
    ("train", "array of objects", put("data/train_64.npy", np.array([{}])), "",
     "not a readable array"),
    ("train", "array of floats", put("data/train_64.npy", np.zeros((24, 64, 64, 3))), "",
     "holds float64"),
    ("train", "array of other rows", put("data/train_64.npy", np.zeros((23, 64, 64, 3), np.uint8)),
     "",
     "has 23 images but its table has 24"),
    ("train", "array of another size", put("data/train_64.npy", np.zeros((24, 32, 32, 3),
     np.uint8)), "",
     r"holds uint8 \(24, 32, 32, 3\)"),
    ("train", "array turned", put("data/train_64.npy", np.zeros((24, 64, 64, 3), np.uint8,
     order="F")),
     "", "C order"),
    ("train", "fold 9", nothing, "--fold 9", "--fold 9: this data has folds 0 to 1"),
    ("train", "fold is text", nothing, "--fold x", "--fold x"),
    ("train", "no such column", nothing, "--meta_cols weight", "--meta_cols weight"),
    ("train", "rate is infinite", nothing, "--lr inf", "inf is not in 0"),
    ("train", "no such backbone", nothing, "--backbone resnet51", "'resnet51' is not supported"),
    ("train", "weights missing", nothing, "--weights {mine.pt}", r"mine\.pt is missing"),
    ("train", "weights are text", put("mine.pt", "hello"), "--weights {mine.pt}", "plain weights"),
    ("train", "weights of no tensors", put("mine.pt", {"a": 1}), "--weights {mine.pt}",
     "no tensors"),
    ("train", "weights of another network", put("mine.pt", {"a": torch.zeros(1)}),
     "--weights {mine.pt}", "does not fit the backbone"),
    ("train", "weights of other folds", facts(f"{RESNET}/config.json",
     lambda c: c["data"].update(folds_sha256="0")), "--weights {runs}/resnet", "other folds"),
    ("train", "device", nothing, "--device tpu", "--device tpu cannot be used"),
    ("train", "runs_dir is a file", put("out", "mine"), "",
     r"out.*; make room, change permissions"),
    ("train", "name is taken", lambda at: shutil.copytree(at.data / "crops", at.out / "resnet"), "",
     "holds files but no run"),
    ("train", "run is finished", nothing, "--runs_dir {runs}", "fold 0 of .* is finished"),
    ("train", "run of another version", put(f"{RESNET}/config.json", "{}"), "--runs_dir {runs}",
     "no 'args': another version"),
    ("train", "resume from a cut file", both(move(f"{RESNET}/metrics.json"),
     copy(f"{RESNET}/fold0_best.pt", f"{RESNET}/fold0_last.pt"), cut(f"{RESNET}/fold0_last.pt")),
     "--runs_dir {runs} --resume", r"fold0_last\.pt is not a file of plain weights"),
    ("train", "log is broken", both(move(f"{RESNET}/metrics.json"), put(f"{RESNET}/log.csv",
     "fold\n")),
     "--runs_dir {runs} --resume", r"log\.csv has no column 'epoch'"),
    # crops
    ("train", "no crops", nothing, "--model cropnet --crop_dir {out}", r"crop\.json is missing"),
    ("train", "crops of another table", facts("data/crops/chipnet/crop.json",
     lambda c: c.update(folds_sha256="0")), CROPNET, "cropped for other folds"),
    ("train", "crops without hash", drop("data/crops/chipnet/crop.json", "test_64.npy", "sha256"),
     CROPNET,
     r"test_64\.npy is not among"),
    ("train", "boxes reordered", table("data/crops/chipnet/train_boxes.csv", lambda t: t[::-1]),
     CROPNET,
     "boxes of other images"),
    ("train", "box is NaN", cell("data/crops/chipnet/train_boxes.csv", "x0", ""), CROPNET,
     "x0 of 0003 is 'nan'"),
    ("train", "box outside its crop", cell("data/crops/chipnet/train_boxes.csv", "place_x", "0.9"),
     CROPNET,
     "box of 0003 is not inside"),
    ("train", "guide of other rows", put("data/crops/chipnet/train_attention.npy",
     np.zeros((3, 2, 2), np.float32)), "--model chipnet --guide {data}/crops/chipnet",
     r"holds float32 \(3"),
    # crop.py
    ("crop", "no run", move("runs/chipnet"), "", r"config\.json is missing"),
    ("crop", "no attention", nothing, "--run {runs}/resnet", "no ChipNet run"),
    ("crop", "checkpoint missing", move("runs/chipnet/fold1_best.pt"), "",
     r"fold1_best\.pt is missing"),
    ("crop", "checkpoint renamed", copy("runs/chipnet/fold1_best.pt", "runs/chipnet/fold0_best.pt"),
     "",
     r"fold0_best\.pt is of another run or fold"),
    ("crop", "run of other folds", facts("runs/chipnet/config.json",
     lambda c: c["data"].update(folds_sha256="0")), "", "trained on other folds"),
    ("crop", "image of another size", put(IMAGE, png_of(50, 60, 3)), "--image_dir {source}/images",
     r"0003\.jpg is 60 x 50 px but was"),
    ("crop", "image gone", move(IMAGE), "--image_dir {source}/images", "no image named '0003'"),
    ("crop", "threshold is NaN", nothing, "--num_devs nan", "nan is not in -100"),
    ("crop", "output is the data", nothing, "--output_dir {folder} --run {data}",
     "data is --data_dir itself"),
    ("crop", "boxes and no source", nothing, "--source saliency --boxes {mine.csv}", "go together"),
    ("crop", "boxes missing", nothing, BOXES, r"mine\.csv is missing"),
    ("crop", "box outside", boxes(10, 10, 90, 900), BOXES, "box of 0003, .* does not lie in"),
    ("crop", "box turned round", boxes(40, 10, 10, 40), BOXES, "x0 < x1"),
    ("crop", "box is empty", boxes(10, 10, 10, 10), BOXES, "x0 < x1"),
    ("crop", "box is half given", boxes(10, 10, "", ""), BOXES, "x1 of 0003 is 'nan'"),
    ("crop", "box is text", boxes(10, 10, "wide", 40), BOXES, "x1 of 0003 is 'wide'"),
    ("crop", "box is infinite", boxes(10, 10, "inf", 40), BOXES, "x1 of 0003 is 'inf'"),
    ("crop", "box twice", boxes(10, 10, 40, 40, name="0000"), BOXES, "'0000' more than once"),
    ("crop", "boxes of other images", put("mine.csv", "image_name,x0,y0,x1,y1\na,1,1,9,9\n"), BOXES,
     "none of the training images"),
    ("crop", "boxes lack a column", put("mine.csv", "image_name,x0,y0,x1\n0000,1,1,9\n"), BOXES,
     "no column 'y1'"),
    # ensemble.py
    ("ensemble", "no runs", lambda at: at.out.mkdir(), "--runs_dir {out}", "no finished run"),
    ("ensemble", "run unfinished", move(f"{RESNET}/metrics.json"), "--runs resnet chipnet",
     "metrics.json is missing"),
    ("ensemble", "metrics cut", cut(f"{RESNET}/metrics.json"), "", r"metrics\.json is not valid"),
    ("ensemble", "metrics of an older version", drop(f"{RESNET}/metrics.json", "ranked"), "",
     "no 'ranked'"),
    ("ensemble", "config of an older version", drop(f"{RESNET}/config.json", "folds_sha256",
     "data"), "",
     "no 'data.folds_sha256': another version"),
    ("ensemble", "runs of other data", facts(f"{RESNET}/config.json",
     lambda c: c["data"].update(folds_sha256="0")), "", "other data or folds"),
    ("ensemble", "rows missing", table(f"{RESNET}/oof.csv", lambda t: t[:-1]), "", "do not match"),
    ("ensemble", "prob is text", cell(f"{RESNET}/oof.csv", "prob", "high"), "",
     "prob of 0003 is 'high'"),
    ("ensemble", "prob is infinite", cell(f"{RESNET}/oof.csv", "prob", "inf"), "",
     "prob of 0003 is 'inf'"),
    ("ensemble", "prob above 1", cell(f"{RESNET}/oof.csv", "prob", "7"), "", "number from 0 to 1"),
    ("ensemble", "fold is text", cell(f"{RESNET}/oof.csv", "fold", "one"), "",
     "fold of 0003 is 'one'"),
    ("ensemble", "fold is a half", cell(f"{RESNET}/oof.csv", "fold", "0.5"), "",
     "fold of 0003 is 0.5"),
    ("ensemble", "image of other data", both(*(swap(f"runs/{r}/oof.csv", "0003", "9999")
     for r in ("resnet", "chipnet", "cropnet"))), "", "predict '9999', which"),
    ("ensemble", "test predictions gone", move(f"{RESNET}/test_predictions.csv"), "",
     r"test_predictions\.csv is missing"),
    ("ensemble", "name of a trained run", nothing, "--name resnet --overwrite", "is a trained run"),
    ("ensemble", "blend is finished", lambda at: shutil.copytree(at.origins["runs"] / "mean",
     at.runs / "mean"),
     "--name mean", "already finished"),
    ("ensemble", "weights of no run", nothing, "--weights other=1", "the runs are"),
    ("ensemble", "runs_dir is a file", put("out", "x"), "--runs_dir {out}", "no finished run"),
    # predict.py
    ("predict", "no run", move(RESNET), "", r"config\.json is missing"),
    ("predict", "config of an older version", drop(f"{RESNET}/config.json", "crop"), "",
     "no 'crop': another"),
    ("predict", "no folds", facts(f"{RESNET}/metrics.json", lambda c: c.update(folds=[])), "",
     "no folds"),
    ("predict", "checkpoint of another format", facts(f"{RESNET}/fold0_best.pt",
     lambda c: c.update(format=0)),
     "", "has checkpoint format 0 and this version reads 1; train again"),
    ("predict", "checkpoint of another network", copy("runs/chipnet/fold0_best.pt",
     f"{RESNET}/fold0_best.pt"),
     "", r"fold0_best\.pt is of another run or fold"),
    ("predict", "checkpoint of no network", facts(f"{RESNET}/fold0_best.pt",
     lambda c: c["spec"].update(model="x")),
     "", "does not fit its own spec"),
    ("predict", "checkpoint is foreign", put(f"{RESNET}/fold0_best.pt", {"a": torch.zeros(1)}), "",
     r"fold0_best\.pt is no checkpoint"),
    ("predict", "checkpoint is a list", put(f"{RESNET}/fold0_best.pt", [1]), "", "holds a list"),
    ("predict", "checkpoint cut", cut(f"{RESNET}/fold0_best.pt", 5000), "", "is cut off"),
    ("predict", "checkpoint of NaN", facts(f"{RESNET}/fold0_best.pt",
     lambda c: c["state_dict"]["head.1.weight"].fill_(float("nan"))), "", "NaN or infinite"),
    ("predict", "image missing", move("source/images/0024.jpg"), "", r"0024\.jpg is missing"),
    ("predict", "image is text", put("source/images/0024.jpg", "a picture"), "",
     r"0024\.jpg is no JPEG or PNG.*--on_error skip"),
    ("predict", "folder without images", both(move("source/images/0024.jpg"),
     lambda at: (at.source / "images/0024.jpg").mkdir()), "", "holds no jpg"),
    ("predict", "table of other images", put("mine.csv", "image_name,sex\na,male\n"),
     "--csv {mine.csv}",
     "names none of the images"),
    ("predict", "table without names", put("mine.csv", "file\n0024\n"), "--csv {mine.csv}",
     "no column 'image_name'"),
    ("predict", "table names a row twice", put("mine.csv", "image_name\n0024\n0024\n"),
     "--csv {mine.csv}",
     "'0024' more than once"),
    ("predict", "output is a file", put("out", "mine"), "", "out cannot be written to"),
    ("predict", "output among the images", nothing, "--output {source}/images", "holds the images"),
    ("predict", "output is finished", lambda at: (at.out.mkdir(), put("out/predictions.csv",
     "x")(at)), "",
     "already finished"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "spoil", "more", "words"),
    [pytest.param(s, spoil, more, words, id=f"{s}: {name}") for s, name, spoil, more, words in BAD],
)
def test_bad_input_is_one_line_and_costs_nothing(
    place, monkeypatch, capsys, script, spoil, more, words
):
    line = place.words(f"{COMMANDS[script]} {more}")
    spoil(place)
    before = hashes(place.folder)
    status, lines = run(monkeypatch, capsys, script, line)
    assert status == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{script}.py: error: ")
    assert re.search(words, lines[0]), lines
    assert ADVICE.search(lines[0]), lines
    assert len(lines[0]) < 700
    after = hashes(place.folder)
    if "--resume" in line:  # the run says by what command it was gone on with
        before = {name: value for name, value in before.items() if "config.json" not in name}
    assert {name: after.get(name) for name in before} == before
    new = {Path(name) for name in after.keys() - before.keys()}
    records = {"preprocess": ".part", "crop": ".part", "train": ".json"}
    assert {path.suffix for path in new} <= {records.get(script)}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("script", COMMANDS)
def test_read_only_output_is_one_line(place, monkeypatch, capsys, script):
    line = place.words(COMMANDS[script])
    folder = place.runs if script == "ensemble" else place.folder
    folder.chmod(0o500)
    status, lines = run(monkeypatch, capsys, script, line)
    folder.chmod(0o700)
    assert status == 2
    assert len(lines) == 1
    assert ADVICE.search(lines[0]), lines


# ---------------------------------------------------------------- what looks odd and is valid
def link(at):
    (at.source / "images/0003.jpg").rename(at.source / "images/other.png")
    (at.source / "images/0003.jpg").symlink_to("other.png")


GOOD = [
    ("preprocess", "nothing odd", nothing, ""),
    ("preprocess", "BOM", lambda at: (at.source / "train.csv").write_text(
     (at.source / "train.csv").read_text(), "utf-8-sig"), ""),
    ("preprocess", "CRLF", swap(TRAIN, "\n", "\r\n"), ""),
    ("preprocess", "blank lines", swap(TRAIN, "\n", "\n\n"), ""),
    ("preprocess", "spaces behind commas", swap(TRAIN, ",", ", "), ""),
    ("preprocess", "targets are fractions", table(TRAIN,
     lambda t: t.assign(target=t["target"] + ".0")), ""),
    ("preprocess", "targets are words", both(swap(TRAIN, ",1\n", ",True\n"),
     swap(TRAIN, ",0\n", ",False\n")), ""),
    ("preprocess", "one pixel", put(IMAGE, png_of(1, 1, 3)), ""),
    ("preprocess", "one row of pixels", put(IMAGE, png_of(1, 200, 3)), ""),
    ("preprocess", "grey", put(IMAGE, png_of(40, 50)), ""),
    ("preprocess", "16 bit", put(IMAGE, png_of(40, 50, dtype=np.uint16)), ""),
    ("preprocess", "alpha", put(IMAGE, png_of(40, 50, 4)), ""),
    ("preprocess", "1 bit", put(IMAGE, png_of(40, 50, dtype=bool)), ""),
    ("preprocess", "transparent palette", lambda at: Image.fromarray(png_of(40,
     50)).convert("P").save(
     at.source / "images/0003.jpg", "PNG", transparency=bytes(range(256))), ""),
    ("preprocess", "CMYK", lambda at: Image.fromarray(png_of(40, 50, 3)).convert("CMYK").save(
     at.source / "images/0003.jpg"), ""),
    ("preprocess", "orientation that is none", lambda at: Image.fromarray(png_of(40, 50, 3)).save(
     at.source / "images/0003.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x09\0\0"
     + bytes(4)), ""),
    ("preprocess", "link within the folder", link, ""),
    ("preprocess", "broken image left out", put(IMAGE, "text"), "--on_error skip"),
    ("preprocess", "limit with a sample in another order", nothing, "--limit 22"),
    ("crop", "box not given", boxes("", "", "", ""), BOXES),
    ("crop", "box at the edge", boxes(0, 0, 96, 72), BOXES),
    ("ensemble", "rows reordered", table(f"{RESNET}/oof.csv", lambda t: t[::-1]), ""),
    ("ensemble", "blend of a blend", lambda at: shutil.copytree(at.origins["runs"] / "mean",
     at.runs / "mean"),
     "--runs mean resnet"),
    ("predict", "metadata missing", put("mine.csv", "image_name\n0024\n"), "--csv {mine.csv}"),
    ("predict", "more images in the table", put("mine.csv", "image_name,sex\n0024,male\nx,\n"),
     "--csv {mine.csv}"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Palette images")  # as util does outside of tests
@pytest.mark.parametrize(
    ("script", "spoil", "more"),
    [pytest.param(s, spoil, more, id=f"{s}: {name}") for s, name, spoil, more in GOOD],
)
def test_odd_input_that_is_valid(place, monkeypatch, capsys, script, spoil, more):
    line = place.words(f"{COMMANDS[script]} {more}")
    spoil(place)
    assert run(monkeypatch, capsys, script, line) == (0, [])


def test_spaces_in_paths(tmp_path, source, data_dir, runs_dir, monkeypatch, capsys):
    folder = tmp_path / "my data, (2)"
    folder.mkdir()
    place = Place(folder, source, data_dir, runs_dir)
    for script, command in COMMANDS.items():
        more = " --limit 3" if script in ("train", "crop") else ""
        line = place.words(command.replace("{out}", f"{{{script}}}") + more)
        assert run(monkeypatch, capsys, script, line) == (0, []), script
