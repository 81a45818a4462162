"""What an image costs with the files of export.py and with torch, side by side: one thread, one image at a time.

    python benchmarks/export_cost.py runs/cropnet exports/cropnet example_data/images

"networks" is what model.onnx does, "all" also reads the image and finds its box, as run.py and predict.py do once they
have started. Both take turns, in --repeats rounds over some images; printed are the fastest times.
"""

import argparse
import sys
from pathlib import Path

import onnxruntime
import pandas as pd
import torch
from timing import fastest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
import util
from inference import Single, list_images, read_chunks
from plumbing.images import configure_pillow
from plumbing.run_onnx import Model
from plumbing.runs import read_run
from util import ID


def main(args: argparse.Namespace) -> None:
    """Print milliseconds of both, and of the networks in 8 bits if there are some."""
    configure_pillow()
    torch.set_num_threads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sys.path.insert(0, str(args.export))  # for its boxes.py
    model, single = Model(args.export), Single(read_run(args.run), torch.device("cpu"), args.tta)
    for key, name in (("model", "model.onnx"), ("finder", "finder.onnx"), ("int8", "model_int8.onnx")):
        if (args.export / name).exists():
            model.sessions[key] = onnxruntime.InferenceSession(args.export / name, options)
    paths = dict(list(list_images(args.images).items())[: args.limit])
    table = pd.DataFrame({ID: list(paths)})
    images = next(read_chunks(paths, table, single, "fail"))
    batches = {k: [(picture[None], meta[None]) for part in loader for picture, meta in zip(*part, strict=True)]
               for k, loader in single.batches(images).items()}  # fmt: skip
    pictures = [picture.permute(0, 2, 3, 1).numpy() for picture, _ in next(iter(batches.values()))]
    meta = [torch.cat([batch[row][1] for batch in batches.values()], dim=1).numpy() for row in range(len(pictures))]
    feeds = [{"image": one} | ({"meta": two} if two.size else {}) for one, two in zip(pictures, meta, strict=True)]

    def torch_all() -> None:
        for name, path in paths.items():
            for one in read_chunks({name: path}, table[table[ID] == name], single, "fail"):
                single.predict(one, {})
                single.look(one)

    ways = {
        "torch, networks": lambda: [models.predict(network, single.tasks[k], batches[k], single.device, single.tta)
                                    for k, network in single.networks.items()],
        "onnx, networks": lambda: [model.sessions["model"].run(None, one) for one in feeds],
        "torch, all": torch_all,
        "onnx, all": lambda: [model.predict(path, {}) for path in paths.values()],
    }  # fmt: skip
    if "int8" in model.sessions:
        ways["int8, networks"] = lambda: [model.sessions["int8"].run(None, one) for one in feeds]
    for way in ways.values():
        way()
    seconds = dict(zip(ways, fastest(list(ways.values()), args.repeats), strict=True))
    for name, each in seconds.items():
        against = seconds[f"torch, {name.rpartition(' ')[2]}"]
        print(f"{name:<16} {1000 * each / len(paths):8.1f} ms an image, {each / against:.2f} of torch's time")


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, help="of train.py")
    add("export", type=Path, help="what export.py made of it, with as many views")
    add("images", nargs="+", type=Path, help="image files or folders")
    add("--tta", type=int, help="views [as trained]")
    add("--limit", type=util.COUNT, default=4, help="images, the first ones")
    add("--repeats", type=util.COUNT, default=5, help="rounds")
    return parser
# fmt: on


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
