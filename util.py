"""What all scripts share: the words of the tables, the error for bad input, and the command line.

Nothing heavy is imported here (no torch, no scikit-learn), so that `--help` is quick.
"""

import argparse
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

ID, TARGET, FOLD, PROB = "image_name", "target", "fold", "prob"  # columns of every table
EXTERNAL = -1  # fold of images that are trained on in every fold and never held out
BOX_SIDE = "box_side"  # metadata column: side of the box over the short side of its image; 1 is the whole square
PLACE = ("place_x", "place_y", "place_side")  # of a box in its wide crop, in fractions of that crop
INNER = ("inner_x0", "inner_y0", "inner_x1", "inner_y1")  # what a box is around, in pixels of the original
OWN_COLUMNS = (FOLD, "width", "height", BOX_SIDE, *PLACE, *INNER)  # preprocess.py and crop.py add them to a table


class InputError(ValueError):
    """Bad input: its text is one line that names the file or value and says what to do."""

    def __init__(self, text: str):
        # file names and foreign files may hold line breaks and control characters, and very long lines
        line = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
        super().__init__(line if len(line) <= 900 else f"{line[:600]} ... {line[-280:]}")


class Stopped(Exception):
    """Work that stopped early and can be resumed; the script exits with status 3."""


# ---------------------------------------------------------------- command line
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the line breaks of a script's docstring and shows real defaults."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number of a kind (int, float) from low to high."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not in {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


COUNT, POSITIVE, SHARE = number(int, 1), number(float, 0), number(float, 0, 1)
CPUS = os.cpu_count() or 1
COMMON_FLAGS = {
    "data_dir": dict(type=Path, default=Path("data"), help="from preprocess.py"),
    "runs_dir": dict(type=Path, default=Path("runs"), help="where runs are kept"),
    "device": dict(default="auto", help="auto, cpu, cuda, cuda:1, mps"),
    "amp": dict(choices=("off", "bf16", "fp16"), default="off", help="precision of the networks"),
    "workers": dict(type=COUNT, default=CPUS, help="threads"),
    "on_error": dict(choices=("fail", "skip"), default="fail", help="what to do with images that cannot be read"),
    "limit": dict(type=COUNT, help="use the first images only: a dry run"),
    "overwrite": dict(action="store_true", help="replace a finished result"),
}


def new_parser(description: str, *common: str) -> argparse.ArgumentParser:
    """An argument parser that takes no abbreviated flags, with the COMMON_FLAGS named."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    for name in common:
        parser.add_argument(f"--{name}", **COMMON_FLAGS[name])
    return parser


def run_script(main: Callable, parser: argparse.ArgumentParser) -> None:
    """Parse the command line and run `main(args)`; bad input ends in one line and exit status 2. Any other exception is
    a bug and keeps its traceback."""
    args = parser.parse_args()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends like Ctrl-C
    try:
        main(args)
    except Stopped as stopped:
        parser.exit(3, f"{parser.prog}: {stopped}\n")
    except InputError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except OSError as error:
        missing, other = "check its name, or run the stage that writes it", "make room or pass another path"
        advice = missing if isinstance(error, FileNotFoundError) else other
        parser.exit(2, f"{parser.prog}: error: {InputError(error)}; {advice}\n")
    except KeyboardInterrupt:
        how = " with --resume" if hasattr(args, "resume") else ""
        parser.exit(130, f"\n{parser.prog}: interrupted; the same command{how} goes on\n")
