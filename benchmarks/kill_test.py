"""Kill every script at random moments and fill its disk; what is left in the end must be the same.

    python benchmarks/kill_test.py
    python benchmarks/kill_test.py --kills 10 --only preprocess crop

Makes its own inputs, and each script's uninterrupted result. Kills: SIGKILL to all processes of a call, half of them at
a moment drawn uniformly from the uninterrupted time, imports included, half just before a change to the directory (a
file opened for writing, renamed, removed), drawn from all its changes; the same command (train.py with --resume) goes
on, now and then killed again, until it finishes. Full disk: a limit on the size of files, and a small tmpfs if the
system lets us mount one; the call must end with status 2 and one line, leave no torn file, and finish when called again
with room. In both cases the whole directory is compared with the uninterrupted one, byte for byte but for times,
command lines, and hashes of files that hold some. Exit status 1 if anything differs.
"""

import argparse
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import util
from util import InputError

ROOT = Path(__file__).resolve().parents[1]
SEVERAL = 0.4  # chance that a resumed call is killed as well
BOX = ("xmin", "ymin", "xmax", "ymax")
ROOM = (0.0, 0.3, 0.9)  # of what a script needs
# what differs from call to call; "metrics": of a blend, hashes of its members' metrics.json, which hold seconds
DIFFERS = {"argv", "commit", "resume", "overwrite", "seconds", "images_per_second", "metrics"}
# records of progress after every 4 images, so that there is something to go on with
SHELL = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
import plumbing.arrays
plumbing.arrays.CHUNK, changes, home = 4, 0, os.getcwd()
def count(event, args):
    global changes
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir"):
        if isinstance(args[0], int) or os.path.abspath(os.fsdecode(args[0])).startswith(home):
            changes += 1
            if changes == {fatal}:
                os.killpg(0, signal.SIGKILL)
sys.addaudithook(count)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
if {fatal} < 0:
    print(changes, file=sys.stderr)
"""


@dataclass
class Stage:
    """A command, with the directory before and after it."""

    name: str
    words: list[str]
    adds: bool = False  # to files of an earlier stage
    before: Path | None = None
    after: Path | None = None
    seconds: float = 0.0
    changes: int = 0  # to the directory
    found: dict = field(default_factory=lambda: {"kills": 0, "calls": 0, "faults": 0, "wrong": []})

    @property
    def resume(self) -> list[str]:
        """What to add to go on."""
        return ["--resume"] if self.words[0] == "train.py" else []


def list_stages() -> list[Stage]:
    """All scripts on small data, in the order of the README's tour."""
    small = ["--weights", "none", "--backbone", "regnet_tiny", "--device", "cpu"]
    fit = [*small, "--hidden", "8", "--lr", "1e-3", "--head_lr", "1e-3", "--epochs", "3", "--batch_size", "8",
           "--workers", "0", "--tta", "2"]  # fmt: skip
    crop = ["crop.py", *small, "--views", "1", "--workers", "1"]
    prepare = ["preprocess.py", "--train_csv", "input/train.csv", "--size", "64", "--n_folds", "2", "--workers", "1"]
    kinds = []
    for kind, columns in {"classes": ["spot"], "labels": ["left", "high"], "quantity": ["width_mm"]}.items():
        cut = ["--cut", "1", "2", "--case_col", "patient_id"] if kind == "quantity" else []
        kinds.append(Stage(f"{kind}: preprocess", [*prepare, "--output_dir", kind, "--target_col", *columns, *cut]))
        words = ["train.py", "--model", "resnet", *fit, "--data_dir", kind, "--runs_dir", f"runs_{kind}"]
        kinds.append(Stage(f"{kind}: train", words))
    scout = ["train.py", "--model", "scout", *fit[:-2], "--scout_size", "96", "--runs_dir", "scouts"]
    return [
        Stage("preprocess", prepare),
        *kinds,
        Stage("scout: train", scout),
        Stage("scout: crop", [*crop, "--run", "scouts/scout", "--box_size", "40", "--n_boxes", "2"]),
        Stage("scout: train cropnet", ["train.py", "--model", "cropnet", *fit, "--runs_dir", "scouts", "--crop_dir",
                                       "data/crops/scout_attention"]),
        Stage("scout: train tiles", [*scout, "--name", "tiles", "--tile", "32", "--finetune", "all", "--top_m", "4"]),
        Stage("prepare", ["prepare.py", "real_colon", "input/raw", "--output_dir", "raw", "--frames_per_lesion", "3"]),
        Stage("streams: crop", [*crop, "--source", "saliency", "--margin", ".5", "--depth_dir", "input/depth",
                                "--output_dir", "streams"]),
        Stage("streams: train", ["train.py", "--model", "streams", "--streams", "rgb", "location", "depth", *fit,
                                 "--gates", "stages", "--crop_dir", "streams/saliency", "--runs_dir", "runs_streams"]),
        Stage("probe", ["train.py", "--model", "probe", *fit, "--runs_dir", "probes"]),
        Stage("crop saliency", [*crop, "--source", "saliency"]),
        Stage("train resnet", ["train.py", "--model", "resnet", *fit, "--fold", "0"]),
        Stage("train resnet, fold 1", ["train.py", "--model", "resnet", *fit, "--fold", "1"], True),
        Stage("train chipnet", ["train.py", "--model", "chipnet", *fit]),
        Stage("crop", crop),
        Stage("crop attention", [*crop, "--source", "attention"]),
        Stage("train cropnet", ["train.py", "--model", "cropnet", *fit]),
        Stage("train fsg_vit", ["train.py", "--model", "fsg_vit", *fit, "--backbone", "vit_tiny"]),
        Stage("ensemble", ["ensemble.py", "weights"]),
        Stage("predict", ["predict.py", "--run", "runs/ensemble", "--limit", "6", "--device", "cpu", "input/images"]),
        Stage("features", ["features.py", "--run", "runs/chipnet", "--device", "cpu", "--t_class", "0"]),
        Stage("stack", ["ensemble.py", "stack", "--name", "stack", "--runs", "chipnet", "cropnet", "--features",
                        "features"]),
        Stage("maps", ["predict.py", "--run", "runs/chipnet", "--limit", "6", "--device", "cpu", "--output", "maps",
                       "--maps", "input/images"]),
        Stage("report", ["report.py", "runs/stack", "--device", "cpu"]),
    ]  # fmt: skip


def draw_inputs(folder: Path) -> None:
    """24 training images of 12 patients and 8 test images, noise and a disc, coloured by class; labels of all kinds;
    depth maps; and films as REAL-colon has them."""
    (folder / "images").mkdir(parents=True)
    (folder / "depth").mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(32):
        picture, target = rng.normal(180, 8, (96, 80 + i, 3)), i % 4 // 2
        y, x = np.mgrid[:96, : 80 + i]
        disc = (y - rng.integers(30, 66)) ** 2 + (x - rng.integers(30, 60)) ** 2 < 150
        picture[disc] = (120, 60, 60) if target else (60, 90, 120)
        image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
        image.save(folder / "images" / f"{i:04d}.jpg")
        np.save(folder / "depth" / f"{i:04d}.npy", picture.mean(axis=2))
        rows.append({"image_name": f"{i:04d}", "patient_id": f"p{i // 2}", "sex": ("male", "female")[i % 3 == 0],
                     "target": target, "spot": ("red", "blue", "dull")[target + (i % 8 > 5)],
                     "left": int(i % 3 == 0), "high": int(i % 5 < 2), "width_mm": 0.5 + i / 10})  # fmt: skip
    table = pd.DataFrame(rows)
    table[:24].to_csv(folder / "train.csv", index=False)
    labels = ["target", "spot", "left", "high", "width_mm"]
    table[24:].drop(columns=labels).to_csv(folder / "test.csv", index=False)
    videos = [f"001-00{v}" for v in range(1, 4)]
    for video in videos:
        for kind in ("frames", "annotations"):
            (folder / "raw" / f"{video}_{kind}").mkdir(parents=True)
        for i in range(8):
            shutil.copy(folder / "images" / f"{i:04d}.jpg", folder / "raw" / f"{video}_frames" / f"{video}_{i}.jpg")
            box = "".join(f"<{side}>{value}</{side}>" for side, value in zip(BOX, (5, 6, 40, 50 + i), strict=True))
            note = f"<annotation><object><unique_id>{video}_1</unique_id><bndbox>{box}</bndbox></object></annotation>"
            (folder / "raw" / f"{video}_annotations" / f"{video}_{i}.xml").write_text(note)
    sizes = pd.DataFrame({"unique_object_id": [f"{video}_1" for video in videos], "size [mm]": [3, 7, 12]})
    sizes.to_csv(folder / "raw" / "lesion_info.csv", index=False)


# ---------------------------------------------------------------- calls
def command(words: list[str], fatal: int = 0) -> list[str]:
    """How a script is called here: killed before that change, counted from 1; -1 counts them."""
    code = SHELL.format(root=str(ROOT), fatal=fatal)
    return [sys.executable, "-c", code, str(ROOT / words[0]), *words[1:]]


def call(words: list[str], home: Path, moment: float | None = None, limit: int | None = None):
    """Run a command in a directory, with files of at most `limit` bytes: (exit status, stderr). The status is None if
    it was killed, at the moment (seconds) or by itself."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = subprocess.Popen(
        words, cwd=home, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=restrict,
    )  # fmt: skip
    try:
        stderr = process.communicate(timeout=moment)[1]
        return None if process.returncode == -signal.SIGKILL else process.returncode, stderr
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, ""


def run(words: list[str], home: Path, fatal: int = 0, **options) -> tuple[int | None, str]:
    """call() of a script."""
    return call(command(words, fatal), home, **options)


# ---------------------------------------------------------------- comparison
def files_of(home: Path) -> dict[str, Path]:
    """All files of a directory but the inputs, by relative name."""
    files = {str(path.relative_to(home)): path for path in home.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if not name.startswith("input/")}


def plain(value):
    """A value without what differs from call to call; tensors as bytes."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key not in DIFFERS}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if hasattr(value, "numpy"):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    return value


def content(path: Path):
    """What is in a file that must be the same; raises an error where it is torn."""
    if path.suffix == ".json":
        return plain(json.loads(path.read_text()))
    if path.suffix == ".csv":
        return plain(pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("list"))
    if path.suffix == ".pt":
        import torch

        return plain(torch.load(path, weights_only=True))
    if path.suffix == ".npy":
        np.load(path, allow_pickle=False)
    if path.suffix == ".png":
        Image.open(io.BytesIO(path.read_bytes())).load()
    return path.read_bytes()


def compare(home: Path, expected: Path) -> list[str]:
    """Where a directory differs from the expected one."""
    mine, theirs = files_of(home), files_of(expected)
    wrong = [f"{name} is left over" for name in sorted(mine.keys() - theirs.keys())]
    wrong += [f"{name} is missing" for name in sorted(theirs.keys() - mine.keys())]
    for name in sorted(mine.keys() & theirs.keys()):
        if mine[name].read_bytes() == theirs[name].read_bytes():
            continue
        try:
            if content(mine[name]) != content(theirs[name]):
                wrong.append(f"{name} differs")
        except Exception:  # readers raise many types
            wrong.append(f"{name} is torn")
    return wrong


def torn(home: Path, before: Path) -> list[str]:
    """Files that are neither whole nor marked as unfinished, and those left over."""
    wrong = []
    for name, path in files_of(home).items():
        same = (before / name).exists() and (before / name).read_bytes() == path.read_bytes()
        if path.suffix == ".tmp":
            wrong.append(f"{name} is left over")
        elif path.suffix != ".part" and not same:
            try:
                content(path)
            except Exception as error:  # readers raise many types
                wrong.append(f"{name} is torn: {error}")
    return wrong


def complaint(status: int, stderr: str) -> list[str]:
    """What is wrong with the way a call on a full disk ended."""
    lines = [line for line in stderr.splitlines() if ": error: " in line or "Traceback" in line]
    if status == 2 and len(lines) == 1 and ".py: error: " in lines[0]:
        return []
    last = stderr.strip().splitlines()[-1:]
    return [f"exit status {status}, {' '.join(last)[-200:]!r}"]


# ---------------------------------------------------------------- trials
def fresh(home: Path, source: Path) -> Path:
    """A new copy of a directory."""
    shutil.rmtree(home, ignore_errors=True)
    return Path(shutil.copytree(source, home, symlinks=True))


def run_whole(stages: list[Stage], folder: Path) -> None:
    """Run all stages uninterrupted, and keep the directory before and after each."""
    home = folder / "home"
    draw_inputs(folder / "input")
    home.mkdir()
    (home / "input").symlink_to(folder / "input")
    for number, stage in enumerate(tqdm(stages, desc="uninterrupted", unit="stage")):
        stage.before = stages[number - 1].after if number else fresh(folder / "start", home)
        begin = time.monotonic()
        status, stderr = run(stage.words, home, fatal=-1)
        stage.seconds = time.monotonic() - begin
        if status != 0:
            raise InputError(f"{stage.name}: exit status {status}: {stderr[-500:]}")
        stage.changes = int(stderr.split()[-1])
        stage.after = fresh(folder / f"after{number}", home)
        extra = [name for name in files_of(home) if name.endswith((".tmp", ".part"))]
        stage.found["wrong"] += [f"uninterrupted: {name} is left over" for name in extra]


def kill_trial(stage: Stage, home: Path, rng: np.random.Generator) -> int:
    """Kill a stage once or more, let it finish, and compare; returns the number of kills. home: always the same, for
    some files hold absolute paths."""
    fresh(home, stage.before)
    words, kills, moments = stage.words, 0, []
    while True:
        when = {}
        if kills == 0 or rng.random() < SEVERAL:
            when = {"moment": float(rng.uniform(0, stage.seconds))}
            if rng.random() < 0.5:
                when = {"fatal": int(rng.integers(1, stage.changes + 1))}
        status, stderr = run(words, home, **when)
        if status is not None:
            break
        kills += 1
        moments.append(str(when))
        words = stage.words + stage.resume
    stage.found["kills"] += kills
    stage.found["calls"] += kills  # every kill is followed by a call
    wrong = compare(home, stage.after)
    if status != 0 and not (kills and status == 2 and "already" in stderr):  # killed after its last change
        wrong += complaint(status, stderr) or [stderr.strip().splitlines()[-1]]
    stage.found["wrong"] += [f"killed at {', '.join(moments)}: {line}" for line in wrong]
    return kills


def fill_disk(stage: Stage, home: Path, share: float) -> bool:
    """Overwrite what a stage made, with a limit on the size of files; whether it was felt."""
    fresh(home, stage.before if stage.adds else stage.after)
    over = [] if stage.adds else ["--overwrite"]
    new = [path for name, path in files_of(stage.after).items()
           if stage.adds or not (stage.before / name).exists()]  # fmt: skip
    limit = int(share * max(path.stat().st_size for path in new)) + 100
    status, stderr = run(stage.words + over, home, limit=limit)
    return settle(stage, home, status, stderr, f"files of at most {limit} bytes")


def fill_tmpfs(stage: Stage, home: Path, share: float) -> bool:
    """Run a stage on a tmpfs with a share of the room it needs; whether that was too little."""
    fresh(home, stage.before)
    old = {name: path.stat().st_size for name, path in files_of(stage.before).items()}
    need = sum(path.stat().st_size - old.get(name, 0) for name, path in files_of(stage.after).items())
    room = int(share * need) // 1024 + 4
    script = (
        "cd .. && mount -t tmpfs -o size=1g none home && cp -a $0/. home && cd home && "
        "used=$(df -k --output=used . | tail -1) && mount -o remount,size=$((used + $1))k $PWD && shift && "
        '"$@"; status=$?; cd .. && cp -a home saved; exit $status'
    )
    words = ["unshare", "-rm", "sh", "-c", script, str(stage.before), str(room), *command(stage.words)]
    status, stderr = call(words, home)
    fresh(home, home.with_name("saved"))
    shutil.rmtree(home.with_name("saved"))
    return settle(stage, home, status, stderr, f"{room} kB on tmpfs")


def settle(stage: Stage, home: Path, status: int, stderr: str, what: str) -> bool:
    """Judge a call that a fault hit, and the call after it; whether it was felt."""
    if status == 0:
        return False
    wrong = complaint(status, stderr) + torn(home, stage.after)
    status, stderr = run(stage.words + stage.resume, home)
    if status != 0:
        wrong += [f"then exit status {status}: {stderr.strip().splitlines()[-1][-200:]}"]
    wrong += compare(home, stage.after)
    stage.found["faults"] += 1
    stage.found["wrong"] += [f"{what}: {line}" for line in wrong]
    return True


def can_mount() -> bool:
    """Whether a tmpfs may be mounted in a namespace of our own."""
    try:
        words = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
        return subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def report(stages: list[Stage]) -> None:
    """Print the table, and every difference."""
    print("| script | seconds | changes | kills | resumed calls | full disks | differences |")
    print("|---|---|---|---|---|---|---|")
    for stage in stages:
        found = stage.found
        cells = (stage.name, f"{stage.seconds:.1f}", stage.changes, found["kills"],
                 found["calls"], found["faults"], len(found["wrong"]))  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")
    for stage in stages:
        for line in stage.found["wrong"]:
            print(f"{stage.name}: {line}")


def main(args: argparse.Namespace) -> None:
    """Kill, fill, compare and print."""
    rng, stages = np.random.default_rng(args.seed), list_stages()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        last = max((i for i, s in enumerate(stages) if chosen(s, args.only)), default=-1)
        stages = stages[: last + 1]
        run_whole(stages, folder)
        tried = [stage for stage in stages if chosen(stage, args.only)]
        with tqdm(total=args.kills, desc="kills", unit="kill") as bar:
            while bar.n < args.kills:
                stage = min(tried, key=lambda s: s.found["kills"])
                bar.update(kill_trial(stage, folder / "home", rng))
        if args.full_disk:
            fills = [fill_disk] + [fill_tmpfs] * can_mount()
            if len(fills) == 1:
                print("no tmpfs may be mounted here: full disks are limits on files alone")
            for stage in tqdm(tried, desc="full disk", unit="stage"):
                for fill in fills:
                    for share in ROOM:
                        fill(stage, folder / "home", share)
        report(stages)
    if any(stage.found["wrong"] for stage in stages):
        raise SystemExit(1)


def chosen(stage: Stage, only: list[str] | None) -> bool:
    """Whether a stage is to be tried."""
    return only is None or any(stage.name.startswith(word) for word in only)


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    parser.add_argument("--kills", type=util.number(int, 0), default=100, help="in all")
    parser.add_argument("--seed", type=util.number(int, 0), default=0, help="of the moments")
    parser.add_argument("--only", nargs="+", help="stages whose names begin so [all]")
    parser.add_argument("--full_disk", action=argparse.BooleanOptionalAction, default=True,
                        help="fill the disk too")  # fmt: skip
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
