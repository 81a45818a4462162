"""What of the pipeline serves which backbone of the papers: the table of docs/backbones.md, with random weights.

    python benchmarks/backbones.py
    python benchmarks/backbones.py --names tiny_vit_5m_224 swin_tiny_patch4_window7_224.ms_in1k --sizes 224

Columns, at 224 px or at the next size that the network takes; "no" is a refusal with a line that says why:

    M          million parameters without a head
    probe      features that a probe reads
    px         those of --sizes that the network can be made for
    gates      on residual branches / on stages: their number
    maps       cells along a side of the map by each way that serves the network
    chips      as ChipNet's backbone, with chips of 32 px
    saliency   as backbone of crop.py --source saliency: cells along a side
    scout      as backbone of a scout: channels of its cells
    ONNX       largest difference of the logits of the exported network from torch's, over their largest
    licence    of the weights that timm has by this name
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fsg
import util
from localize import Saliency
from maps import Cam, GradCam, Rollout
from models import Network, Spec, build_model
from util import InputError

NAMES = (
    "vit_base_patch16_224.sam_in1k", "crossvit_9_dagger_240.in1k", "convnext_tiny.fb_in22k_ft_in1k",
    "tnt_s_patch16_224.in1k", "swin_tiny_patch4_window7_224.ms_in1k", "swinv2_tiny_window8_256.ms_in1k",
    "vit_small_patch16_dinov3.lvd1689m", "convnext_tiny.dinov3_lvd1689m", "tiny_vit_5m_224.dist_in22k_ft_in1k",
    "vitamin_small_224.datacomp1b_clip", "vit_large_patch16_224.mae", "vit_base_patch32_clip_224.openai",
    "vit_base_patch16_clip_224.openai", "vit_small_patch16_224.dino", "vit_small_patch8_224.dino",
    "mambaout_femto.in1k",
)  # fmt: skip
SIZES = (96, 224, 240, 256, 320, 480)
WAYS = {"cam": Cam, "gradcam": GradCam, "rollout": Rollout}


def answer(call: Callable[[], object]) -> str:
    """What a call returns, in words, or "no" if it is refused."""
    try:
        return str(call())
    except InputError:
        return "no"


def count_gates(spec: Spec) -> int:
    """Gates of a network, by branch or stage."""
    return len(fsg.gated_modules(build_model(spec)))


def map_side(way: type, network: Network, image: torch.Tensor) -> int:
    """Cells along a side of the map that a way makes. Raises ValueError if it says nothing."""
    found = way(network).explain(image)[1]
    if not found.std() > 0:
        raise ValueError(f"the map by {way.__name__} is flat")
    return found.shape[-1]


def export_difference(network: Network, image: torch.Tensor) -> str:
    """Largest difference of the logits of the network in ONNX from torch's, over their largest; "no" if torch cannot
    export it."""
    import onnxruntime

    meta = torch.zeros(1, 0)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        expected = network(image.float() / 255, meta)
        path = Path(folder) / "network.onnx"
        try:
            torch.onnx.export(nn.Sequential(ImageOnly(network)), (image.float() / 255,), path, dynamo=True,
                              verbose=False, input_names=["image"])  # fmt: skip
        except torch.onnx.OnnxExporterError:
            return "no"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"image": (image.float() / 255).numpy()})[0])
    return f"{float((found - expected).abs().max() / expected.abs().max()):.0e}"


class ImageOnly(nn.Module):
    """A network without metadata as a function of the image alone."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image (N, 3, S, S), 0 to 1 -> logit (N, K)."""
        return self.network(image, image.new_zeros(len(image), 0))


def row_of(name: str, sizes: list[int], export: bool) -> list[str]:
    """Cells of the row of a backbone."""
    torch.manual_seed(0)
    spec = Spec("resnet", f"timm:{name}", 0, outputs=2)
    taken = [size for size in sizes if answer(lambda size=size: build_model(replace(spec, image_size=size))) != "no"]
    size = min((size for size in taken if size >= 224), default=taken[-1])
    spec = replace(spec, image_size=size)
    network, image = build_model(spec).eval(), torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    millions = sum(parameter.numel() for parameter in network.backbone.parameters()) / 1e6
    gates = [answer(lambda sites=sites: count_gates(replace(spec, gates="identity", sites=sites)))
             for sites in ("branches", "stages")]  # fmt: skip
    sides = {word: answer(partial(map_side, way, network, image)) for word, way in WAYS.items()}
    maps = ", ".join(f"{word} {side}" for word, side in sides.items() if side != "no")
    chips = answer(lambda: "yes" if build_model(replace(spec, model="chipnet", image_size=224)) else "")
    saliency = answer(lambda: Saliency(network).attention(image).shape[-1])
    scout = answer(lambda: build_model(replace(spec, model="scout")).channels)
    licence = network.backbone.pretrained_cfg.get("license") or "not stated"
    return [name, f"{millions:.1f}", str(network.features), "all" if taken == sizes else " ".join(map(str, taken)),
            " / ".join(gates), maps, chips, saliency, scout, export_difference(network, image) if export else "",
            licence]  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Measure and print."""
    header = ("backbone", "M", "probe", "px", "gates", "maps", "chips", "saliency", "scout", "ONNX", "licence")
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for name in tqdm(args.names, unit="backbone", disable=None):
        print(f"| {' | '.join(row_of(name, sorted(args.sizes), args.export))} |", flush=True)


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this benchmark."""
    parser = util.new_parser(__doc__)
    add = parser.add_argument
    add("--names", nargs="+", default=NAMES, help="names of timm")
    add("--sizes", nargs="+", type=util.COUNT, default=SIZES, help="sides of images to try, in pixels")
    add("--export", action=argparse.BooleanOptionalAction, default=True, help="to ONNX; needs onnx, onnxscript and "
        "onnxruntime")  # fmt: skip
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
