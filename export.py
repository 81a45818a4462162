"""Write a run as ONNX files and a script that predicts with them, for places without this project and without torch.

Reads   RUN (train.py), and images to check on: some of its tables, or --images (never written)
Writes  --output_dir/: model.onnx, model.json, run.py, for a run that looks somewhere finder.onnx and boxes.py, and with
        --int8 model_int8.onnx

    python export.py runs/cropnet
    python export.py runs/resnet --fold 0 --tta 1 --int8
    python export.py example_data/runs/chipnet --images example_data/images

Gates and batch norms are folded; normalisation, the mean over folds and views, and calibration are in model.onnx. Then
run.py is started on copies of the images: unless it predicts what predict.py does to 1e-4, nothing is written.
"""

import argparse
import inspect
import io
import logging
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import localize
import models
import util
from inference import Images, Single, list_images, read_chunks
from maps import Explainer
from plumbing import images as pixels
from plumbing.data import CORNERS, Data, read_data
from plumbing.files import copy, finish_output, open_output, provenance, sha256, write_json
from plumbing.runs import Run, read_run, score_line
from tasks import score_folds
from util import FOLD, ID, PROB, InputError

MARKER = "model.json"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # in probability, or standard deviations of a quantity
CHECKED = 16  # images of the run's tables
RANGES = 64  # images from which the ranges of 8-bit numbers are taken


# ---------------------------------------------------------------- networks as graphs
class OnnxOperators(TorchFunctionMode):
    """A Saliency in operators that ONNX has: the cells of its border by number instead of a mask, the median by
    sorting, three linear equations by cofactors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.linalg.solve:
            rows = args[0].unbind(dim=1)
            cofactors = torch.stack([torch.linalg.cross(rows[i - 2], rows[i - 1]) for i in range(3)], dim=2)
            return cofactors @ args[1] / (rows[0] * cofactors[:, :, 0]).sum(dim=1)[:, None, None]
        if function is torch.Tensor.median:
            dim, keep = kwargs["dim"], kwargs.get("keepdim", False)
            found = args[0].sort(dim).values.narrow(dim, (args[0].shape[dim] - 1) // 2, 1)
            return SimpleNamespace(values=found if keep else found.squeeze(dim))
        if function is torch.Tensor.__getitem__ and isinstance(args[1], tuple) and torch.is_tensor(args[1][-1]):
            edge, side = localize.BORDER, args[0].shape[-1]
            border = np.pad(np.zeros((side - 2 * edge, side - 2 * edge), bool), edge, constant_values=True)
            return args[0].flatten(-2)[..., torch.from_numpy(np.flatnonzero(border))]
        return function(*args, **kwargs)


class AllViews:
    """A source of maps that sees all views of an image in one pass, for a smaller graph."""

    def __init__(self, source):
        self.source = source

    def attention(self, image: torch.Tensor, views: int) -> torch.Tensor:
        """image (1, 3, S, S) -> attention (1, h, w)."""
        maps = self.source.attention(torch.cat([models.dihedral(image, view) for view in range(views)])).split(1)
        return torch.stack([models.dihedral(each, view, inverse=True) for view, each in enumerate(maps)]).mean(dim=0)


class MeanMap(nn.Module):
    """What a run finds its boxes in."""

    def __init__(self, finder: localize.Finder):
        super().__init__()
        self.views, self.networks, self.sources = finder.views, nn.ModuleList(), []
        for source in finder.sources.values():
            parts = parts_of(source)
            self.networks.extend(getattr(part, "network", part) for part in parts)
            parts = [AllViews(part) for part in parts]
            self.sources.append(localize.Product(*parts) if len(parts) > 1 else parts[0])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """A square uint8 (1, S, S, 3) -> its map (1, h, w), the mean over folds and views."""
        with OnnxOperators():
            maps = [source.attention(image.permute(0, 3, 1, 2), self.views) for source in self.sources]
            return torch.stack(maps).mean(dim=0)


def parts_of(source) -> tuple:
    """The sources of maps whose product a source is, or that source."""
    return getattr(source, "sources", (source,))


class Ensemble(nn.Module):
    """The networks of a run as one, with the calibration {"scale", "bias"} of their mean, if there is one."""

    def __init__(self, single: Single, fit: dict | None):
        super().__init__()
        self.networks, self.tasks = nn.ModuleList(single.networks.values()), list(single.tasks.values())
        self.widths, self.tta, self.fit = [each.dim for each in single.encoders.values()], single.tta, fit
        self.outputs = ["probability" if self.tasks[0].probabilistic else "value", *["calibrated"] * bool(fit)]

    def forward(self, image: torch.Tensor, meta: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Pictures uint8 (N, S, S, 3 * pictures) and the metadata of all networks (N, M) -> predictions (N, K), means
        over networks and views, calibrated ones if there is a calibration, and those of each network (N, F, K)."""
        image, each, task = image.permute(0, 3, 1, 2), [], self.tasks[0]
        meta = torch.zeros(image.shape[0], 0) if meta is None else meta
        views = torch.cat([models.dihedral(image, view) for view in range(self.tta)])
        for network, own, part in zip(self.networks, self.tasks, meta.split(self.widths, dim=1), strict=True):
            prob = own.prob(network(views, part.repeat(self.tta, 1)))
            each.append(prob.unflatten(0, (self.tta, -1)).mean(dim=0))
        mean, each = torch.stack(each).mean(dim=0), torch.stack(each, dim=1)
        if not self.fit:
            return mean, each
        safe = mean.clamp(1e-7, 1 - 1e-7)
        logit = safe.log() if task.sums_to_1 else safe.log() - (1 - safe).log()
        return mean, task.prob(self.fit["scale"] * logit + torch.tensor(self.fit["bias"])), each


def write_onnx(path: Path, network: nn.Module, inputs: dict[str, torch.Tensor], outputs: list[str]) -> None:
    """Write a network as an ONNX file that takes as many images as it is given, or one if the example inputs are one.
    Raises InputError if it has parts that ONNX cannot express."""
    several = len(next(iter(inputs.values()))) > 1
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs) if several else None
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network.eval(), tuple(inputs.values()), path, dynamo=True, external_data=False, verbose=False,
                input_names=list(inputs), output_names=outputs, dynamic_shapes=shapes,
            )  # fmt: skip
    except Exception as error:  # torch and its exporter raise many types; 2 GB is the most that a file may have
        raise InputError(f"{path.name} cannot be written ({error}); pass --fold, or take another backbone") from None


# ---------------------------------------------------------------- all files
def open_single(run: Run, args: argparse.Namespace) -> Single:
    """The networks of a run, or of one fold. Raises InputError if they look at what the files cannot give them."""
    if run.is_blend:
        members = ", ".join(member["run"] for member in run.config["members"])
        raise InputError(f"{run.path} is a blend; export its members one by one: {members}")
    if args.fold not in (None, *run.folds):
        raise InputError(f"--fold {args.fold}: {run.path} has folds {', '.join(map(str, run.folds))}; pass one of them")
    if "depth" in run.config["args"].get("streams", ()):
        raise InputError(f"{run.path} looks at depth maps, which run.py does not read; export another run")
    single = Single(run, torch.device("cpu"), args.tta)
    finder, sources = single.finder, single.finder.sources if single.finder else {}
    if single.scout or (finder and (finder.scout or finder.n_boxes > 1)):
        raise InputError(f"{run.path} looks at cells of the originals, or at several boxes; export another run")
    if any(isinstance(part, Explainer) for source in sources.values() for part in parts_of(source)):
        raise InputError(f"{run.path} finds boxes by maps of a class, which the files cannot make; export a run that "
                         "crops by attention, saliency or both")  # fmt: skip
    if single.crop and single.crop["amp"] != "off":
        raise InputError(f"{run.path} finds boxes in {single.crop['amp']}, which the files cannot; crop without --amp")
    for each in (single.networks, single.encoders, single.tasks, sources):
        for k in each.keys() - {args.fold} if args.fold in each else ():
            del each[k]
    return single


def write_boxes(path: Path) -> None:
    """Write the code that finds a box in a map, as it is here, word for word."""
    text = inspect.getsource(localize)
    sections = dict(part.split("\n", 1) for part in text.split(f"# {64 * '-'} ")[1:])
    parts = [pixels.frame_of, pixels.inside, pixels.inside_view, pixels.box_raster, pixels.hide_outside, localize.Box,
             localize.upsample, localize.entropy]  # fmt: skip
    path.write_text('"""How a box is found in a map: code of attention-guided cropping, word for word."""\n\n'
                    "from collections.abc import Callable\nfrom dataclasses import dataclass, replace\n\n"
                    "import cv2\nimport numpy as np\n\nFrame = str | int\n"
                    f"MEAN_COLOR = np.array({pixels.MEAN_COLOR.tolist()}, np.float32)\n"
                    + re.search(r"# map -> box.*?\n\n", text, re.S)[0] + "\n\n".join(map(inspect.getsource, parts))
                    + "\n\n" + sections["map -> box"], encoding="utf-8")  # fmt: skip


def write_files(folder: Path, run: Run, single: Single) -> dict:
    """Write the networks and what they need beside them; returns the facts in model.json."""
    ensemble, how = Ensemble(single, run.metrics["calibration"]), None
    names = ("crop",) if single.crop and single.inputs == ("whole",) else single.inputs
    pictures = torch.zeros(2, single.size, single.size, 3 * len(names), dtype=torch.uint8)
    meta = {"meta": torch.zeros(2, sum(ensemble.widths))} if sum(ensemble.widths) else {}
    write_onnx(folder / "model.onnx", ensemble, {"image": pictures} | meta, [*ensemble.outputs, "by_fold"])
    columns = run.task.columns + [name.replace(PROB, "calibrated", 1) for name in run.task.columns if ensemble.fit]
    if single.finder is not None:
        network, square = MeanMap(single.finder), pictures[:1, ..., :3]
        network(square)  # finds the layers that a saliency reads
        write_onnx(folder / "finder.onnx", network, {"image": square}, ["map"])
        write_boxes(folder / "boxes.py")
        columns += [*CORNERS, "confidence", "fallback"]
        how = {key: getattr(single.finder, key)
               for key in ("rule", "num_devs", "centre", "frame", "box_size", "margin")}  # fmt: skip
    copy(Path(pixels.__file__).with_name("run_onnx.py"), folder / "run.py")
    encoders = [list(encoder.columns.items()) for encoder in single.encoders.values()]
    facts = {"notice": "Not for clinical use", "run": run.name, "metrics": sha256(run.path / "metrics.json"),
             "task": run.config["task"], "folds": list(single.networks), "tta": single.tta, "encoders": encoders,
             "size": single.size, "exact": single.exact, "frame": single.frame, "pictures": names, "finder": how,
             "outputs": ensemble.outputs, "columns": columns}  # fmt: skip
    write_json(folder / MARKER, facts)
    return facts


# ---------------------------------------------------------------- checks
def check(folder: Path, run: Run, single: Single, paths: dict[str, Path], table: pd.DataFrame) -> float:
    """Greatest difference between what run.py and predict.py say of some images, in probability or in standard
    deviations of a quantity. Raises InputError if it is too great."""
    expected, copies = [], folder / "check"
    if dicom := [path for path in paths.values() if path.suffix.lower() == pixels.DICOM]:
        raise InputError(f"{dicom[0]}: run.py reads no DICOM; convert some images and pass them as --images")
    for images in read_chunks(paths, table, single, "fail"):
        single.predict(images, found := {})
        expected.append(found[single.name])
    copies.mkdir()
    for row, path in enumerate(paths.values()):
        shutil.copyfile(path, copies / f"{row:06d}{path.suffix}")
    table.assign(**{ID: [f"{row:06d}" for row in range(len(table))]}).to_csv(copies / "meta.csv", index=False)
    words = [sys.executable, folder / "run.py", copies, "--csv", copies / "meta.csv"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"run.py fails: {done.stderr.strip().splitlines()[-1]}; pass other --images")
    found = pd.read_csv(io.StringIO(done.stdout))[run.task.columns].to_numpy()
    away = np.abs(found - np.concatenate(expected)).max(axis=1) / next(iter(single.tasks.values())).std
    if not away.max() <= TOLERANCE:
        raise InputError(f"of {list(paths)[away.argmax()]} run.py says something else than predict.py, by "
                         f"{away.max():.1e}; pass other --images, or do not use this export")  # fmt: skip
    return float(away.max())


# ---------------------------------------------------------------- 8 bits
def feeds(single: Single, images: Images, folds: list[int] | None = None) -> Iterator[dict[str, np.ndarray]]:
    """What model.onnx takes of each image, whose box comes from some folds or from all; other folds' metadata is 0."""
    batches = single.batches(images, folds)
    pictures = torch.cat([picture for picture, _ in next(iter(batches.values()))]).permute(0, 2, 3, 1)
    parts = [torch.cat([part for _, part in batches[k]]) if k in batches else torch.zeros(len(pictures), encoder.dim)
             for k, encoder in single.encoders.items()]  # fmt: skip
    for picture, meta in zip(pictures.numpy(), torch.cat(parts, dim=1).numpy(), strict=True):
        yield {"image": picture[None]} | ({"meta": meta[None]} if meta.size else {})


def write_int8(folder: Path, run: Run, single: Single, data: Data) -> dict[str, float]:
    """Write model_int8.onnx, the ranges of its activations from some training images. Returns and says the mean main
    score of the held-out images, each by the network that did not see it, of both files."""
    from onnxruntime import InferenceSession, quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    files = dict(zip(data.train[ID], data.find_originals("train"), strict=True))

    def read(table: pd.DataFrame, folds: list[int] | None = None) -> Iterator[dict]:
        for images in read_chunks({name: files[name] for name in table[ID]}, table, single, "fail"):
            yield from feeds(single, images, folds)

    class Sample(quantization.CalibrationDataReader):
        images = read(data.train[:RANGES])

        def get_next(self) -> dict | None:
            return next(self.images, None)

    plain, names = folder / "check" / "plain.onnx", ("model.onnx", "model_int8.onnx")
    kinds = {"per_channel": True, "activation_type": quantization.QuantType.QUInt8}
    logging.disable(logging.WARNING)  # it warns of vectors that have no channels
    quant_pre_process(folder / names[0], plain)
    quantization.quantize_static(plain, folder / names[1], Sample(), **kinds)
    logging.disable(logging.NOTSET)
    sessions, scores = [InferenceSession(folder / name) for name in names], {}
    tables = [data.train[data.train[FOLD] == k] for k in single.networks]
    found = [
        [session.run(["by_fold"], one)[0][0, place] for session in sessions]
        for place, (k, table) in enumerate(zip(single.networks, tables, strict=True))
        for one in read(table, [k])
    ]
    for name, prob in zip(names, np.array(found, float).swapaxes(0, 1), strict=True):
        oof = pd.concat(tables).assign(**dict(zip(run.task.columns, prob.T, strict=True)))
        metrics = score_folds(run.task, oof, data.group, list(single.networks))
        print(score_line(name, metrics))
        scores[name] = metrics[f"mean_{metrics['metric']}"]
    return scores


# ---------------------------------------------------------------- command
def main(args: argparse.Namespace) -> Path:
    """Export the run; returns the directory of the files."""
    pixels.configure_pillow()
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise InputError(f"{missing[0]} is not installed; pip install {' '.join(PACKAGES)}")
    run = read_run(args.run)
    output = args.output_dir or Path("exports") / run.name
    if (output / MARKER).exists() and not args.overwrite:
        raise InputError(f"{output} is already finished; pass --overwrite to replace it")
    single, data = open_single(run, args), None
    if args.images:
        paths = list_images(args.images)
        table = pd.DataFrame({ID: list(paths)})
    if args.int8 or not args.images:
        data = read_data(args.data_dir or Path(run.config["args"]["data_dir"]))
        if run.config["inputs"]["folds"] != data.folds_sha256:
            raise InputError(f"{run.path} has other folds than {data.directory}; pass its --data_dir")
    if not args.images:
        split, table = list(data.tables().items())[-1]
        table = table[:CHECKED]
        paths = dict(zip(table[ID], data.find_originals(split, limit=CHECKED), strict=True))
    with TemporaryDirectory() as name:
        folder = Path(name)
        facts = write_files(folder, run, single)
        facts["difference"] = check(folder, run, single, paths, table)
        print(f"{len(paths)} images: run.py differs from predict.py by {facts['difference']:.1e} at most")
        if args.int8:
            facts["int8"] = write_int8(folder, run, single, data)
        written = sorted(path.name for path in folder.iterdir() if path.suffix in (".onnx", ".py"))
        open_output(output, MARKER, args.overwrite, {})
        for each in written:
            copy(folder / each, output / each)
    facts |= provenance() | {"sha256": {each: sha256(output / each) for each in written}}
    facts["versions"] |= {name: version(name) for name in PACKAGES}
    finish_output(output, MARKER, facts)
    sizes = ", ".join(f"{each} {(output / each).stat().st_size / 1e6:.1f} MB" for each in written if "onnx" in each)
    print(f"wrote {output}: {sizes}")
    return output


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__, "overwrite")
    add = parser.add_argument
    add("run", type=Path, help="finished run of train.py")
    add("--output_dir", type=Path, help="where to write [exports/RUN]")
    add("--fold", type=int, help="the networks of this fold alone [the mean of all]")
    add("--tta", type=int, choices=(1, 2, 4, 8), help="views [as trained]")
    add("--int8", action="store_true", help="also write the networks in 8 bits, and say what that costs in score")
    add("--images", nargs="+", type=Path, help="what to check on, without metadata [images of the run's tables]")
    add("--data_dir", type=Path, help="from preprocess.py [as the run says]")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
