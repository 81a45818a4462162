"""Megapixel MNIST: five digits and fifty distractors on a black square of 1,500 px, and what a scout makes of it.

    python benchmarks/megapixel_mnist.py draw DATA/mnist megapixel
    python benchmarks/megapixel_mnist.py judge runs/scout --pictures megapixel
    python benchmarks/megapixel_mnist.py speed DATA/mnist

draw: of the five digits three are of one class, two of others. Four questions: which is the majority, which the
largest, which the one at the top, and which digits are there. They are answered in one go, as 38 labels: one for every
class of each question (of the largest: 2 to 9). Writes OUTPUT/images, train.csv and test.csv (image_name, majority_0,
..., multi_9) and digits.csv (the boxes of the digits, to judge with, never to learn).

judge: accuracy on the test images: of the first three questions the class with the highest probability; of the last
all ten answers must be right.

speed: seconds of a training step per picture of 1,500 and 6,000 px on one core, and the share of the pixels that is
forwarded: iterative patch selection, written plainly (every patch of 50 px through the first stages of a ResNet-18, the
best 100 again with gradients), and a scout, from pixels in memory to gradients.

References:
    Katharopoulos, Fleuret, Processing Megapixel Images with Deep Attention-Sampling Models, ICML 2019: the task.
    Bergner, Lippert, Mahendran, Iterative Patch Selection for High-Resolution Image Recognition, ICLR 2023: four
    questions, and fewer pictures of 3,000 px with 800 distractors.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from timing import fastest
from torch import nn
from torchvision import models as tv
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
import util
from plumbing.cells import Bag
from plumbing.data import CORNERS, read_table
from plumbing.files import write_table
from plumbing.runs import read_run
from util import ID

PATCH = 28  # side of digits and distractors, in pixels
PATTERNS = 50  # of distractors
DIGITS, SAME = 5, 3  # on a picture, and of them of one class
QUESTIONS = ("majority", "max", "top", "multi")


def draw_patterns(rng: np.random.RandomState) -> np.ndarray:
    """Distractors: two lines from a corner, uint8 (PATTERNS, 28, 28)."""
    steps, lines = np.arange(PATCH), np.zeros((PATTERNS, PATCH, PATCH))
    for line, slope in zip(lines, np.tan(rng.rand(PATTERNS) * np.pi / 2.5), strict=True):
        heights = np.rint(slope * steps).astype(int)
        line[steps[heights < PATCH], heights[heights < PATCH]] = 1
    both = []
    for first, second in zip(lines, lines[rng.permutation(PATTERNS)], strict=True):
        for axis in (0, 1):
            second = np.flip(second, axis) if rng.rand() < 0.33 else second
        both.append(np.maximum(first, second) * rng.uniform(0.8, 1))
    return (255 * np.array(both)).astype(np.uint8)


def draw_picture(digits: list[np.ndarray], patterns: np.ndarray, side: int, noise: int, rng) -> tuple:
    """A picture uint8 (side, side) and the corners (row, column) of its digits (DIGITS, 2), which do not overlap."""
    canvas, corners = np.zeros((side, side), np.uint8), []
    for row, column in rng.randint(PATCH, side - PATCH, (noise, 2)):
        canvas[row : row + PATCH, column : column + PATCH] = patterns[rng.randint(PATTERNS)]
    while len(corners) < len(digits):
        corner = rng.randint(0, side - PATCH, 2)
        if all(np.abs(corner - other).max() >= PATCH for other in corners):
            corners.append(corner)
    for digit, (row, column) in zip(digits, corners, strict=True):
        canvas[row : row + PATCH, column : column + PATCH] = digit
    return canvas, np.array(corners)


def draw(args: argparse.Namespace) -> None:
    """Write pictures and tables."""
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    boxes = []
    for split, count, seed in (("train", args.train, args.seed + 1), ("test", args.test, args.seed)):
        with np.load(args.mnist / f"{split}.npz", allow_pickle=False) as file:
            digits, kinds = file["x"], file["y"]
        rng, rows = np.random.RandomState(seed), []
        patterns = draw_patterns(rng)
        for i in tqdm(range(count), desc=split, unit="picture"):
            majority = rng.randint(10)
            others = rng.choice(np.setdiff1d(np.arange(10), majority), DIGITS - SAME)
            shown = np.array([majority] * SAME + list(others))
            chosen = [digits[rng.choice(np.flatnonzero(kinds == kind))] for kind in shown]
            canvas, corners = draw_picture(chosen, patterns, args.side, args.noise, rng)
            name = f"{split}_{i:04d}"
            cv2.imwrite(str(args.output / "images" / f"{name}.png"), canvas, [cv2.IMWRITE_PNG_COMPRESSION, 1])
            answers = [[majority], [shown.max()], [shown[corners[:, 0].argmin()]], shown]
            rows.append([name, *np.concatenate([np.isin(np.arange(10), answer) for answer in answers]).astype(int)])
            boxes += [[name, kind, x, y, x + PATCH, y + PATCH] for kind, (y, x) in zip(shown, corners, strict=True)]
        names = [f"{question}_{kind}" for question in QUESTIONS for kind in range(10)]
        table = pd.DataFrame(rows, columns=[ID, *names])
        write_table(args.output / f"{split}.csv", table.drop(columns=["max_0", "max_1"]))  # of three classes
    write_table(args.output / "digits.csv", pd.DataFrame(boxes, columns=[ID, "digit", *CORNERS]))


def judge(args: argparse.Namespace) -> None:
    """Print the accuracy of a run on the test images."""
    run = read_run(args.run)
    found = run.table("test_predictions.csv").groupby(ID, sort=False)[run.task.columns].mean()
    names = np.array(run.task.names)
    truth = read_table(args.pictures / "test.csv", names).set_index(ID).loc[found.index, names].to_numpy()
    for question in QUESTIONS:
        chosen = np.char.startswith(names, question)
        prob, answer = found.to_numpy()[:, chosen], truth[:, chosen]
        right = prob.argmax(axis=1) == answer.argmax(axis=1)
        if question == "multi":
            right = ((prob > 0.5) == answer).all(axis=1)
        print(f"{question} {right.mean():.4f}", end="  ")
    print(f"of {len(found)} pictures")


def select_patches(picture: torch.Tensor, network: nn.Module, score: nn.Module, side: int = 50, best: int = 100) -> int:
    """A training step of iterative patch selection on a picture uint8 (3, S, S); returns the pixels forwarded."""
    patches = picture.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).transpose(0, 1)  # (P, 3, 50, 50)

    def embed(part: torch.Tensor) -> torch.Tensor:
        return network(part.float() / 255).mean(dim=(2, 3))

    with torch.no_grad():
        found = torch.cat([score(embed(part)) for part in patches.split(best)])
    chosen = embed(patches[found[:, 0].topk(best).indices])
    (score(chosen).softmax(dim=0) * chosen).sum().backward()
    return patches[:, 0].numel()


def scout_step(picture: np.ndarray, scout: models.Scout) -> int:
    """A training step of a scout on a picture uint8 (S, S, 3); returns the pixels forwarded."""
    tiles, middles = scout.take_apart(picture)
    bag = Bag(torch.from_numpy(tiles), torch.from_numpy(middles / len(picture)).float()[None])
    scout(bag, torch.zeros(1, 0)).sum().backward()
    return tiles[:, 0].size


def speed(args: argparse.Namespace) -> None:
    """Print the table of seconds per picture, of both ways in turn."""
    torch.set_num_threads(1)
    resnet = tv.resnet18(weights=None)
    stages = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool, resnet.layer1, resnet.layer2)
    print("| picture | patch selection | scout | ratio | pixels forwarded |\n|---|---|---|---|---|")
    for side in args.sides:
        noise = round(PATTERNS * (side / 1500) ** 2)
        spec = models.Spec("scout", "conv_tiny", 32, 128, scout_size=side, tile=32, finetune="all")
        scout, score = models.build_model(spec), nn.Linear(128, 1)
        rng = np.random.RandomState(0)
        with np.load(args.mnist / "train.npz", allow_pickle=False) as file:
            canvas, _ = draw_picture(list(file["x"][:DIGITS]), draw_patterns(rng), side, noise, rng)
        picture = np.repeat(canvas[..., None], 3, axis=2)
        ways = (lambda: select_patches(torch.from_numpy(picture).permute(2, 0, 1), stages, score),  # noqa: B023
                lambda: scout_step(picture, scout))  # noqa: B023  # fmt: skip
        theirs, ours = fastest(ways, args.repeats)
        share = ways[1]() / side**2
        print(f"| {side} px, {noise} distractors | {theirs:.2f} s | {ours:.3f} s | {theirs / ours:.0f} | {share:.3f} |")


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("draw", allow_abbrev=False).add_argument
    add("mnist", type=Path, help="folder with train.npz and test.npz: x uint8 (N, 28, 28), y")
    add("output", type=Path, help="where to write")
    add("--side", type=util.COUNT, default=1500, help="of a picture, in pixels")
    add("--noise", type=util.COUNT, default=50, help="distractors on a picture")
    add("--train", type=util.COUNT, default=5000, help="pictures")
    add("--test", type=util.COUNT, default=1000, help="pictures")
    add("--seed", type=int, default=0, help="of the test pictures; that of the training pictures is one higher")
    add = commands.add_parser("judge", allow_abbrev=False).add_argument
    add("run", type=Path, help="from train.py")
    add("--pictures", type=Path, required=True, help="folder that draw wrote")
    add = commands.add_parser("speed", allow_abbrev=False).add_argument
    add("mnist", type=Path, help="as above")
    add("--sides", type=util.COUNT, nargs="+", default=[1500, 6000], help="of the pictures")
    add("--repeats", type=util.COUNT, default=5, help="of each step; the fastest counts")
    return parser


def main(args: argparse.Namespace) -> None:
    """Draw, judge or measure."""
    {"draw": draw, "judge": judge, "speed": speed}[args.command](args)


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
