"""How long prepare.py takes for REAL-colon, and how much memory: a synthetic one of any size, drawn and removed.

    python benchmarks/prepare_speed.py --frames 100000
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import util

ROOT = Path(__file__).resolve().parents[1]
VIDEOS = 10
SHOWN = 3  # of ten frames show the lesion
NOTE = """<annotation><folder>{video}</folder><filename>{video}_{frame}.jpg</filename><size><width>1240</width>
<height>1080</height><depth>3</depth></size>{objects}</annotation>"""
BOX = """<object><name>lesion</name><unique_id>{video}_1</unique_id><bndbox><xmin>411</xmin><ymin>320</ymin>
<xmax>655</xmax><ymax>571</ymax></bndbox></object>"""


def draw_films(raw: Path, frames: int) -> None:
    """Frames (empty files, since none is opened) and their annotations."""
    lines = ["unique_object_id,unique_video_name,size [mm]"]
    for v in tqdm(range(1, VIDEOS + 1), desc="drawing", unit="video"):
        video = f"001-{v:03d}"
        lines.append(f"{video}_1,{video},{v}")
        for kind in ("frames", "annotations"):
            (raw / f"{video}_{kind}").mkdir(parents=True)
        for frame in range(frames // VIDEOS):
            (raw / f"{video}_frames" / f"{video}_{frame}.jpg").touch()
            objects = BOX.format(video=video) if frame % 10 < SHOWN else ""
            note = NOTE.format(video=video, frame=frame, objects=objects)
            (raw / f"{video}_annotations" / f"{video}_{frame}.xml").write_text(note)
    (raw / "lesion_info.csv").write_text("\n".join(lines) + "\n")


def main(args: argparse.Namespace) -> None:
    """Draw, prepare, print."""
    with tempfile.TemporaryDirectory() as home:
        raw, output = Path(home) / "raw", Path(home) / "output"
        draw_films(raw, args.frames)
        started = time.monotonic()
        words = [sys.executable, str(ROOT / "prepare.py"), "real_colon", str(raw), "--output_dir", str(output)]
        subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
        seconds = time.monotonic() - started
        peak = getrusage(RUSAGE_CHILDREN).ru_maxrss / 1000
        with open(output / "train.csv", encoding="utf-8") as file:
            rows = sum(1 for _ in file) - 1
    print(f"{args.frames} frames, {rows} rows: {seconds:.1f} s, {peak:.0f} MB")


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    parser.add_argument("--frames", type=util.COUNT, default=100_000, help="of all videos")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
