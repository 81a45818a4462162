"""Every script on every kind of bad input: one line that names what is wrong and says what to do, status 2, no
traceback, and nothing lost or half written."""

import json
import pickle
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

from plumbing import arrays
from util import run_script

COMMANDS = {
    "preprocess": "--train_csv source/train.csv --output_dir out --size 32 --n_folds 2",
    "train": f"--model resnet --data_dir data --runs_dir out {' '.join(SMALL_MODEL)}",
    "crop": "--source attention --run runs/chipnet --data_dir data --output_dir out --device cpu --views 1",
    "ensemble": "mean --runs_dir runs --data_dir data --name blend --runs resnet chipnet",
    "predict": "source/images/0024.jpg --run runs/cropnet --output out --device cpu --tta 1 --no-pictures",
    "report": "runs/resnet --data_dir data --device cpu",
    "features": "--run runs/resnet --data_dir data --output_dir out --device cpu",
}
# what may be left
BEGUN = {"preprocess": ["*.part"], "crop": ["*.part", "fold?_network.pt"], "predict": ["*.part"],
         "features": ["*.part"], "report": ["report.html"]}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch, source, data_dir, runs_dir) -> Path:
    """The working directory: a user's folder with copies of source, data and runs."""
    ignored = shutil.ignore_patterns("*.png", "ensemble", "fold0_metrics.json")  # fold 0 of a run is to be resumed
    for name, folder in {"source": source, "data": data_dir, "runs": runs_dir}.items():
        shutil.copytree(folder, tmp_path / name, ignore=ignored)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, capsys, script: str, more: str = "") -> tuple[int, list[str]]:
    """Run a script in this process as its command line does: (exit status, lines on stderr)."""
    module = __import__(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *COMMANDS[script].split(), *more.split()])
    capsys.readouterr()
    status = 0
    try:
        run_script(module.main, module.get_args_parser())
    except SystemExit as stop:
        status = stop.code
    bars = re.compile(r"\r[^\n]*?(?=\r|\n|$|\w+\.py: error)|\x1b\[A")  # of progress
    lines = bars.sub("", capsys.readouterr().err).splitlines()
    return status, [line for line in lines if line.strip() and not re.match(r"\S.*(it|image)/s|usage:| {4}", line)]


# ---------------------------------------------------------------- ways to spoil a file
def spoil(path: str, content) -> None:
    """Put something else in the place of a file: None: nothing; int: so many of its bytes; a function: what it makes of
    the table or json in it; another path; text, bytes, an array, or what torch.save takes."""
    file = Path(path)
    if content is None:
        file.rename("removed")
    elif isinstance(content, (int, Path)):
        file.write_bytes(Path(content).read_bytes() if isinstance(content, Path) else file.read_bytes()[:content])
    elif isinstance(content, (str, bytes)):
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    elif callable(content) and file.suffix == ".csv":
        content(pd.read_csv(file, dtype=str, keep_default_na=False)).to_csv(file, index=False)
    elif callable(content):
        file.write_text(json.dumps(content(json.loads(file.read_text()))))
    elif file.suffix == ".npy":
        np.save(file, content, allow_pickle=True)
    elif file.suffix == ".pt":
        torch.save(content, file)
    else:
        Image.fromarray(content).save(file, format="GIF" if content.ndim < 3 else "PNG")


class Hostile:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return open, ("was run", "w")


def cell(column: str, value, row: int = 3):
    """Another value in a row of a table."""
    return lambda table: table.assign(**{column: table[column].where(table.index != row, value)})


def change(lost: str | None = None, **values):
    """A json with other values, or without one."""
    return lambda content: {key: value for key, value in (content | values).items() if key != lost}


def boxes(*corners, name: str = "0003") -> str:
    """A csv of boxes as a detector writes it."""
    return "image_name,x0,y0,x1,y1\n0000,10,10,40,40\n" + ",".join(map(str, (name, *corners))) + "\n"


# ---------------------------------------------------------------- the kinds
TRAIN, IMAGE, FACTS, ARRAY = "source/train.csv", "source/images/0003.jpg", "data/preprocess.json", "data/train_64.npy"
RESNET, CHIPNET, CROPS = "runs/resnet", "runs/chipnet", "data/crops/chipnet"
BEST, LAST, FINDER = "runs/cropnet/fold0_best.pt", "runs/resnet/fold0_last.pt", "runs/cropnet/finder"
CROPNET, RESUME = f"--model cropnet --crop_dir {CROPS}", "--runs_dir runs --resume"
WEIGHTS, BOXED = "--weights mine.pt", "--source boxes --boxes mine.csv"
SALIENCY, PICKLE = "--source saliency --backbone regnet_tiny", pickle.dumps(Hostile())
PIXELS, GIF, TENSOR = np.zeros((24, 64, 64, 3), np.uint8), np.zeros((9, 9), np.uint8), torch.zeros(1)
# by kind: script, file, what becomes of it, further words, what the line says besides the file's name
FILES = {
    "missing": [
        ("preprocess", TRAIN, None), ("preprocess", IMAGE, None, "", "'0003'"), ("train", FACTS, None),
        ("preprocess", "source/images", None), ("train", ARRAY, None), ("train", "data/test.csv", None),
        ("train", f"{CROPS}/train_64.npy", None, CROPNET), ("crop", CHIPNET, None), ("predict", BEST, None),
        ("crop", f"{CHIPNET}/fold1_best.pt", None), ("ensemble", f"{RESNET}/oof.csv", None), ("predict", FINDER, None),
        ("ensemble", f"{RESNET}/metrics.json", None, "", "resnet is not finished"),
        ("predict", "source/images/0024.jpg", None, "", "--on_error skip"), ("report", f"{RESNET}/config.json", None),
    ],
    "cut off": [
        ("preprocess", TRAIN, 300, "", "target of 0008 is 'nan'"), ("preprocess", IMAGE, 900), ("train", FACTS, 100),
        ("train", ARRAY, 5000), ("train", LAST, 5000, RESUME), ("crop", f"{CHIPNET}/fold1_best.pt", 5000),
        ("predict", BEST, 5000),
    ],
    "foreign": [
        ("preprocess", TRAIN, ""), ("preprocess", TRAIN, "image_name,target,patient_id\n", "", "rows"),
        ("preprocess", TRAIN, Path(IMAGE), "", "UTF-8"), ("preprocess", TRAIN, "Mü".encode("cp1252"), "", "UTF-8"),
        ("preprocess", TRAIN, "image_name,target\n0001,1,2\n"), ("preprocess", IMAGE, "a picture"),
        ("preprocess", IMAGE, GIF, "", "convert"), ("train", LAST, {"a": TENSOR}, RESUME),
        ("train", "mine.pt", {"a": 1}, WEIGHTS), ("crop", f"{CHIPNET}/fold1_best.pt", [1]),
    ],
    "run by pickle": [
        ("train", "mine.pt", {"format": 3, "spec": Hostile()}, WEIGHTS), ("train", "mine.pt", PICKLE, WEIGHTS),
        ("train", ARRAY, np.array([Hostile()])), ("train", ARRAY, PICKLE), ("train", LAST, {"a": Hostile()}, RESUME),
        ("crop", f"{CHIPNET}/fold1_best.pt", {"spec": Hostile()}), ("crop", "mine.pt", PICKLE, f"{SALIENCY} {WEIGHTS}"),
    ],
    "outside of its folder": [
        ("preprocess", TRAIN, cell("image_name", name), "", re.escape(name))
        for name in ("../../secret", "../images/0003", str(Path(__file__).parent / "0003.jpg"))
    ],
    "another version": [
        ("train", FACTS, change(format=1), "", "format 3"), ("train", FACTS, change("sha256"), "", "'sha256'"),
        ("train", f"{RESNET}/config.json", "{}", RESUME), ("train", f"{CROPS}/crop.json", change("format"), CROPNET),
        ("train", "mine.pt", {"format": 1, "spec": {}}, WEIGHTS, "format 1"),
        ("ensemble", f"{RESNET}/metrics.json", change("sha256"), "", "'sha256'"),
        ("predict", "runs/cropnet/config.json", change("crop"), "", "'crop'"),
        ("report", f"{RESNET}/config.json", change("format")),
    ],
    "one class or patient": [
        ("preprocess", TRAIN, lambda t: t.assign(target=1), "", "target is the same"),
        ("preprocess", TRAIN, lambda t: t.assign(patient_id=1), "", "only . groups.*--n_folds"),
    ],
    "no number": [
        ("preprocess", TRAIN, cell("target", ""), "", "of 0003 is 'nan'"),
        ("preprocess", TRAIN, cell("target", "\x1b[31m"), "", r"of 0003 is '.*\[31m"),
        ("train", f"{CROPS}/train_boxes.csv", cell("x0", ""), CROPNET, "x0 of 0003 is 'nan'"),
        *(("crop", "mine.csv", boxes(10, 10, x1, 40), BOXED, f"x1 of 0003 is '{x1 or 'nan'}'") for x1 in ("inf", "")),
    ],
    "ambiguous": [
        *(("preprocess", TRAIN, cell("image_name", name), "", "line [56]:.*; ") for name in ("0004", "0004.jpg", "")),
        ("preprocess", "source/images/0003.png", GIF),
        ("preprocess", TRAIN, lambda t: t.drop(columns="patient_id"), "", "'patient_id'.*--group_col none"),
        ("preprocess", TRAIN, lambda t: t.assign(fold=1), "", "'fold'"),
        ("crop", "mine.csv", boxes(1, 1, 9, 9, name="0000"), BOXED, "'0000'"),
        ("predict", "mine.csv", "image_name\n0024\n0024.jpg\n", "--csv mine.csv", "'0024.jpg'"),
    ],
    "of other data": [
        ("preprocess", "source/sample_submission.csv", cell("image_name", "x", 0), "", "'0027'"),
        ("train", ARRAY, PIXELS.astype(np.float32), "", "float32"), ("train", ARRAY, PIXELS[1:], "", r"\(23, 64"),
        ("train", ARRAY, PIXELS[:, :32, :32], "", r"\(24, 32"), ("train", ARRAY, np.asfortranarray(PIXELS)),
        ("train", f"{CROPS}/crop.json", change(folds_sha256="0"), CROPNET, "chipnet.*folds"),
        ("train", f"{CROPS}/train_boxes.csv", lambda t: t[::-1], CROPNET), ("train", "mine.pt", {"a": TENSOR}, WEIGHTS),
        ("crop", IMAGE, PIXELS[0, :50, :60], "--image_dir source/images", "60 x 50"),
        ("crop", "mine.csv", "image_name,x0,y0,x1,y1\na,1,1,9,9\n", BOXED),
        *(("crop", "mine.csv", boxes(*corners), BOXED, "box of 0003")
          for corners in ((40, 10, 10, 40), (40, 10, 90, 900), (-3, 0, 20, 20))),
        ("ensemble", f"{RESNET}/config.json", change(inputs={"folds": "0"}), "", "resnet.*--data_dir"),
        ("crop", f"{CHIPNET}/config.json", change(crop={}), "", "chipnet.*whole images"),  # it looks at crops
        ("predict", "mine.csv", "image_name\na\n", "--csv mine.csv", "0024"),
    ],
    "changed since": [
        ("train", "data/train.csv", cell("sex", "other")), ("train", "data/test.csv", lambda t: t[::-1]),
        ("ensemble", f"{RESNET}/oof.csv", cell("prob", "0.7")), ("report", f"{RESNET}/oof.csv", cell("prob", "0.7")),
        ("predict", BEST, Path(f"{RESNET}/fold0_best.pt")), ("predict", f"{FINDER}/fold0_network.pt", Path(BEST)),
        ("crop", f"{CHIPNET}/fold0_best.pt", Path(f"{CHIPNET}/fold1_best.pt")),
    ],
    "output is a file": [(script, "out", "mine") for script in ("preprocess", "train", "crop", "predict")],
}  # fmt: skip
# by script: words of which the line names the last
WORDS = {
    "preprocess": ["--n_folds 1", "--output_dir data", "--output_dir source", "--output_dir source/images", "--size 0"],
    "train": ["--lr inf", "--dropout 1.5", "--fold 9", "--backbone resnet51", "--device tpu", "--meta_cols weight",
              WEIGHTS, "--model cropnet --crop_dir mine", "--runs_dir . --name data", "--runs_dir runs --name resnet",
              "--data_dir mine", f"--guide {CROPS} --model resnet"],
    "crop": ["--num_devs nan", "--run runs/resnet", "--run runs/cropnet", "--run runs/mean", BOXED, "--source boxes",
             "--source rollout --class x", "--layer x", "--source attention*saliency --output_dir data/crops"],
    "ensemble": ["--weights resnet=nan", "--runs mean mean", "--name mean", "--overwrite --name cropnet"],
    "predict": ["--output source/images", "--csv mine.csv", "--run runs/none", "--maps --class blue",
                "--maps --run runs/mean"],
    "report": ["--data_dir mine"],
    "features": ["--run runs/mean", "--layer trunk", "--way rollout", "--layer size", "--way attention",
                 "--run runs/chipnet --layer x", "--t_class 1", "mine.csv"],
}  # fmt: skip


def check_refusal(place, monkeypatch, capsys, script: str, more: str, says: str) -> None:
    """The script names what is wrong and what to do, and leaves everything as it was."""
    before = hashes(place)
    status, lines = run(monkeypatch, capsys, script, more)
    assert (status, len(lines)) == (2, 1), lines
    assert lines[0].startswith(f"{script}.py: error: ")
    assert re.search(says, lines[0]), lines
    assert re.search("; |is not in", lines[0]), lines  # what to do, or what is possible
    assert len(lines[0]) < 1000
    after = hashes(place)
    assert {name: after.get(name) for name in before} == before
    new = [Path(name) for name in after.keys() - before.keys()]
    assert [path.name for path in new if not any(path.match(begun) for begun in BEGUN.get(script, []))] == []


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{kind} {i}: {' '.join(case[:2])}")
                                  for kind, cases in FILES.items() for i, case in enumerate(cases)])  # fmt: skip
def test_a_bad_file_is_one_line_and_costs_nothing(place, monkeypatch, capsys, case):
    script, path, content, more, says = (*case, "", "")[:5]
    spoil(path, content)
    check_refusal(place, monkeypatch, capsys, script, more, says or re.escape(Path(path).name))


@pytest.mark.parametrize(("script", "more"), [(script, more) for script in WORDS for more in WORDS[script]])
def test_bad_words_are_one_line_and_cost_nothing(place, monkeypatch, capsys, script, more):
    check_refusal(place, monkeypatch, capsys, script, more, re.escape(more.split()[-1]))


@pytest.mark.parametrize("script", ["preprocess", "crop"])
def test_full_disk_is_one_line(place, monkeypatch, capsys, script):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays.os, "posix_fallocate", full, raising=False)
    check_refusal(place, monkeypatch, capsys, script, "", r"train_\d+\.npy.*; make room")


def test_a_call_out_of_time_is_one_line(place, monkeypatch, capsys):
    status, (line,) = run(monkeypatch, capsys, "train", "--max_hours 0")
    assert (status, "--resume" in line) == (3, True)


# ---------------------------------------------------------------- what looks odd and is valid
@pytest.mark.parametrize(
    ("script", "path", "content", "more"),
    [
        ("preprocess", TRAIN, lambda t: t.rename(columns={"image_name": "\ufeffimage_name"}), "--limit 22"),
        ("preprocess", IMAGE, PIXELS[0, :1, :1], "--output_dir my,(2)"), ("crop", "mine.csv", boxes(*4 * [""]), BOXED),
        ("preprocess", IMAGE, PIXELS[0, :1], "--output_dir data --overwrite"),
        ("ensemble", "runs/mean/a.png", "x", "--runs mean cropnet"), ("report", "runs/resnet/a.png", "x", ""),
        ("predict", "mine.csv", "image_name,sex\n0024,male\nx,\n", "--csv mine.csv"),
    ],
)  # fmt: skip
def test_odd_input_that_is_valid(place, monkeypatch, capsys, script, path, content, more):
    spoil(path, content)
    assert run(monkeypatch, capsys, script, more) == (0, [])
