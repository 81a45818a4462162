"""Networks, checkpoints and prediction.

Every network is called as model(image, meta) -> logit (N, K), with image (N, 3, S, S) either uint8 or float in 0..1,
and meta (N, M) as MetaEncoder makes it. A network normalises its input itself, knows its parameter groups, and is
rebuilt from the spec in its checkpoint. A new network is a class and a row of MODELS.

References:
    C. Careaga, attention_guided_cropping (2020): MetaResNet and ChipNet, their learning rates.
    Guan et al., Diagnose like a Radiologist (AG-CNN), 2018: the fusion of whole image and crop.
    Ilse, Tomczak, Welling, Attention-based Deep Multiple Instance Learning, ICML 2018: the scout's pooling.
    Bergner, Lippert, Mahendran, Iterative Patch Selection, ICLR 2023: training through the best tiles alone.
    Roffo et al., Feature Selection Gates with Gradient Routing, MICCAI 2024: streams, gates on stages.
    Li, Li, Eliceiri, Dual-stream Multiple Instance Learning (DSMIL), CVPR 2021: cells that answer alone.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import fsg
from plumbing.backbones import (
    drop_head,
    find_stages,
    load_backbone,
    make_backbone,
    read_torch_file,
    run_backbone,
    say,
)
from plumbing.cells import Bag, place_tiles
from plumbing.files import FORMAT, atomic
from plumbing.images import inside
from plumbing.speedups import fold_batchnorms, skip_padding
from tasks import Task
from util import InputError

NOTHING = -1e4  # score of a cell that is none; finite, so that a picture of none has a softmax
FINENESS = 16  # parts of a cell in which places are counted where attention depends on them: few steps make it steep
# names of stages: ResNet; ConvNeXt, Swin, RegNet, EfficientNet, ViT of timm; ViT, RegNet, ConvNeXt of torchvision
STAGES = (r"layer\d", r"stages\.\d+", r"layers\.\d+", r"s\d", r"blocks\.\d+", r"encoder\.layers\.\w+_\d+",
          r"trunk_output\.block\d+", r"features\.\d+")  # fmt: skip
CHIP = 32  # pixels; the total stride of the usual backbones, so that a chip becomes one embedding
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Spec:
    """All that build_model needs to rebuild a network."""

    model: str  # a name of MODELS
    backbone: str
    image_size: int  # pixels
    meta_dim: int = 0  # metadata columns
    hidden: int = 256  # width of the metadata branch, or of the attention
    dropout: float = 0.0
    outputs: int = 1  # K
    gates: str | None = None  # "identity", "paper" or "hard": Feature-Selection Gates in the backbone
    sites: str = "branches"  # what gates act on: residual "branches", or outputs of "stages"
    streams: tuple[str, ...] = ()  # pictures that a network with streams sees
    share_backbone: bool = False  # whether one backbone reads them all
    boxes: int = 1  # crops of an image
    scout_size: int = 1280  # of a scout: long side of what it sees, in pixels
    strides: tuple[int, ...] = (16, 32)  # of the feature maps that it reads
    tile: int = 0  # side in pixels of the tiles that it reads instead, if not 0
    finetune: str | None = None  # "all" of its backbone, or the "last" stage
    top_m: int = 0  # tiles that it pools, if not 0
    heads: int = 1  # of its attention
    place: bool = False  # whether its attention depends on where a cell lies
    witness: bool = False  # whether single cells answer too, and draw its attention


class GatedAttention(nn.Module):
    """What each of some heads thinks of a thing. Ilse et al. 2018, equation 9."""

    def __init__(self, features: int, hidden: int, heads: int = 1):
        super().__init__()
        self.look, self.gate = nn.Linear(features, hidden), nn.Linear(features, hidden)
        self.scorer = nn.Linear(hidden, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, B, D) -> scores (N, B, H), of which a softmax makes attention."""
        return self.scorer(self.look(x).tanh() * self.gate(x).sigmoid())


# ---------------------------------------------------------------- networks
class Network(nn.Module):
    """What all networks share: a backbone (N, 3, s, s) -> (N, C) and its normalisation."""

    uses_meta = True
    shift = 0  # pixels by which training moves its images
    foldable = True  # whether batch norms may be multiplied into convolutions for prediction

    def __init__(self, spec: Spec, weights: str, input_size: int | None = None):
        super().__init__()
        self.backbone, head = make_backbone(spec.backbone, weights, spec.image_size)
        config = getattr(self.backbone, "pretrained_cfg", {})  # timm says what it was trained on
        mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
        if weights not in ("imagenet", "none"):
            done = load_backbone(self.backbone, head, backbone_state(Path(weights)), Path(weights))
            say(f"weights from a file: {done}; pictures are normalised as for {spec.backbone}, mean {mean}, deviation "
                f"{std}; their licence is that of their source")  # fmt: skip
        drop_head(self.backbone, head)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.features = self._count_features(spec.backbone, input_size or spec.image_size)

    @torch.no_grad()
    def _count_features(self, name: str, size: int) -> int:
        self.backbone.eval()
        try:
            _, features = self.backbone(torch.zeros(1, 3, size, size)).shape
        except Exception as error:  # whatever a network says to a size it cannot take, or an output that is not (N, C)
            raise InputError(f"backbone {name} makes no features of {size} px images ({error}); take another") from None
        self.backbone.train()
        return features

    def normalise(self, image: torch.Tensor) -> torch.Tensor:
        """Bring uint8, or float in 0..1, to the distribution the backbone was trained on."""
        if image.dtype == torch.uint8:  # one new tensor, not three: on a CPU this is page faults
            return image.float().sub_(255 * self.mean).div_(255 * self.std)
        return (image - self.mean) / self.std

    def param_groups(self, lr: float, head_lr: float, layer_decay: float | None = None) -> list[dict]:
        """Parameter groups: the backbone at `lr`, everything else but gates at `head_lr`. layer_decay: factor on `lr`
        from each layer of a ViT to the one before; the last group of the backbone comes first. Raises InputError if the
        backbone is no ViT."""
        body = fsg.weight_parameters(self.backbone)
        ids = {id(p) for p in body}
        groups = [{"params": body, "lr": lr}]
        if layer_decay is not None:
            layers = reversed(layers_of(self.backbone, ids))
            groups = [{"params": layer, "lr": lr * layer_decay**above} for above, layer in enumerate(layers)]
        rest = [p for p in fsg.weight_parameters(self) if id(p) not in ids]
        return [*groups, {"params": rest, "lr": head_lr}]

    def ignore_meta(self, columns: np.ndarray) -> None:
        """Start the weights of some metadata columns (M,) bool at 0; networks without metadata have none."""


def layers_of(backbone: nn.Module, ids: set[int]) -> list[list[nn.Parameter]]:
    """Parameters of a ViT (those in `ids`) by layer: embeddings, blocks, what follows them."""
    layers: dict[float, list] = {}
    place = 0.0
    for name, parameter in backbone.named_parameters():
        block = re.match(r"(?:encoder\.layers\.encoder_layer_|blocks\.)(\d+)\.", name)
        if block:
            place = int(block[1]) + 1
        elif place > 0:
            place = math.inf
        if id(parameter) in ids:
            layers.setdefault(place, []).append(parameter)
    if place == 0:
        raise InputError("--layer_decay is for a single ViT of torchvision or timm; leave it out")
    return [layers[place] for place in sorted(layers)]


class MetaResNet(Network):
    """Image features and metadata features, concatenated, one linear head. Any backbone serves; without metadata
    (meta_dim 0) the second branch is absent. With several pictures of a case (whole image and crop) one backbone reads
    each, and the head reads all. Of several crops (spec.boxes) gated attention makes one; black ones do not exist."""

    def __init__(self, spec: Spec, weights: str = "none"):
        super().__init__(spec, weights)
        self.meta_dim, self.boxes = spec.meta_dim, spec.boxes
        # pictures before the crops, or before the only picture
        self.wholes = len(recipe_of(spec.model, spec.streams).inputs) - 1
        self.meta_branch, hidden = None, spec.hidden
        if spec.meta_dim:
            self.meta_branch = nn.Sequential(
                nn.Linear(spec.meta_dim, hidden), nn.ReLU(inplace=True), nn.BatchNorm1d(hidden),
                nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.BatchNorm1d(hidden),
            )  # fmt: skip
        self.scorer = GatedAttention(self.features, hidden) if spec.boxes > 1 else None
        width = self.features * (self.wholes + 1) + (hidden if spec.meta_dim else 0)
        self.head = nn.Sequential(nn.Dropout(spec.dropout), nn.Linear(width, spec.outputs))

    @torch.no_grad()
    def ignore_meta(self, columns: np.ndarray) -> None:
        """Start the weights of some metadata columns (M,) bool at 0."""
        if self.meta_branch is not None:
            self.meta_branch[0].weight[:, torch.from_numpy(columns)] = 0

    def read(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image (N, 3 * pictures, S, S) -> features of the pictures (N, C * pictures), of several crops their mean by
        their weights (N, boxes), which sum to 1."""
        n, _, height, width = image.shape
        image = image.reshape(-1, 3, height, width)
        if self.scorer is None:
            return self.backbone(self.normalise(image)).reshape(n, -1), image.new_ones(n, 1)
        there = (image != 0).flatten(1).any(dim=1)
        there[self.wholes :: self.wholes + self.boxes] = True  # there always is a best one
        found = self.backbone(self.normalise(image[there]))
        features = found.new_zeros(len(image), found.shape[1])
        features[there] = found
        features, there = features.view(n, -1, self.features), there.view(n, -1)[:, self.wholes :]
        crops = features[:, self.wholes :]
        score = self.scorer(crops).squeeze(2).float().masked_fill(~there, NOTHING)
        weight = score.softmax(dim=1)
        pooled = (crops * weight.unsqueeze(2).to(crops.dtype)).sum(dim=1)
        return torch.cat([features[:, : self.wholes].flatten(1), pooled], dim=1), weight

    def forward(self, image: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        """image (N, 3 * pictures, S, S), meta (N, M) -> logit (N, K)."""
        features, _ = self.read(image)
        if self.meta_branch is not None:
            features = torch.cat([features, self.meta_branch(meta)], dim=1)
        return self.head(features)


class Columns(nn.Module):
    """Backbones side by side, each for one of several pictures."""

    def __init__(self, backbones: list[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(backbones)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image (N, 3 * parts, S, S) -> features (N, C * parts)."""
        pictures = image.chunk(len(self.parts), dim=1)
        return torch.cat([part(picture) for part, picture in zip(self.parts, pictures, strict=True)], dim=1)


class Streams(MetaResNet):
    """Several pictures of a thing (spec.streams: its crop, its place in the image, its depth), a backbone for each or
    one for all, late fusion by concatenation, a hidden layer. Roffo et al. 2024."""

    head_sites = ("head.0", "head.2")  # the fused and the hidden vector, for gates on outputs

    def __init__(self, spec: Spec, weights: str = "none"):
        super().__init__(spec, weights)
        if not spec.share_backbone:
            others = [Network(spec, weights).backbone for _ in spec.streams[1:]]
            self.backbone = Columns([self.backbone, *others])
        width = self.features * len(spec.streams) + (spec.hidden if spec.meta_dim else 0)
        self.head = nn.Sequential(
            nn.Identity(), nn.Linear(width, spec.hidden), nn.ReLU(), nn.Dropout(spec.dropout),
            nn.Linear(spec.hidden, spec.outputs),
        )  # fmt: skip

    def read(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image (N, 3 * streams, S, S) -> features of all streams (N, C * streams)."""
        if not isinstance(self.backbone, Columns):
            return super().read(image)
        n, _, height, width = image.shape
        pictures = self.normalise(image.reshape(-1, 3, height, width))
        return self.backbone(pictures.view(n, -1, height, width)), image.new_ones(n, 1)


def spatial_softmax(score: torch.Tensor) -> torch.Tensor:
    """Softmax over the cells of maps (N, h, w)."""
    return score.flatten(1).softmax(dim=1).view_as(score)


class ChipNet(Network):
    """Attention over chips that cannot see each other: says where the evidence lies. Chips of 32 px go through the
    backbone one by one; two 3x3 convolutions over their grid of embeddings and a softmax weigh them; the weighted sum
    is classified. Metadata is not used."""

    uses_meta = False
    chip, shift = CHIP, CHIP // 2  # training moves images by as much as crop.py shifts the chips
    shifts = 1  # 2: attention of chips that overlap by half, on a grid twice as fine

    def __init__(self, spec: Spec, weights: str = "none"):
        if spec.image_size % CHIP:
            raise InputError(f"ChipNet needs images of a multiple of {CHIP} px, not {spec.image_size}; set --size")
        super().__init__(spec, weights, input_size=CHIP)
        skip_padding(self.backbone)  # a chip ends as a map of one pixel
        self.scorer = nn.Sequential(
            nn.Dropout2d(spec.dropout),
            nn.Conv2d(self.features, spec.hidden, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(spec.hidden),
            nn.Conv2d(spec.hidden, 1, 3, padding=1),
        )
        self.head = nn.Sequential(
            nn.Dropout(spec.dropout), nn.ReLU(), nn.BatchNorm1d(self.features), nn.Linear(self.features, spec.outputs)
        )

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """image (N, 3, S, S) -> one embedding per chip (N, C, h, w) with h = w = S / 32."""
        n, grid = image.shape[0], image.shape[-1] // CHIP  # len() would fix n in a traced graph
        # cut while the pixels are bytes, and into the channels-last layout that convolutions like
        chips = image.unflatten(3, (grid, CHIP)).unflatten(2, (grid, CHIP))
        chips = chips.permute(0, 2, 4, 3, 5, 1).reshape(-1, CHIP, CHIP, 3).permute(0, 3, 1, 2)
        embedding = self.backbone(self.normalise(chips))  # (N * h * w, C)
        return embedding.view(n, grid, grid, -1).permute(0, 3, 1, 2)

    def weigh(self, embedding: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, C, h, w) -> attention (N, h, w), positive, sums to 1."""
        return spatial_softmax(self.scorer(embedding).squeeze(1))

    def fine_attention(self, image: torch.Tensor) -> torch.Tensor:
        """image (N, 3, S, S) -> attention (N, 2h, 2w) of chips that overlap by half. The chips of four grids, shifted
        by half a chip, lie centred on 8 + 16 i pixels; their scores are interleaved before one softmax."""
        half = CHIP // 2
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        padded = F.pad(image, (half // 2,) * 4, mode="reflect")
        rows = []
        for y in (0, half):
            row = []
            for x in (0, half):
                shifted = padded[..., y : y + image.shape[-2], x : x + image.shape[-1]]
                row.append(self.scorer(self.embed(shifted)).squeeze(1))
            rows.append(torch.stack(row, dim=-1).flatten(2))  # (N, h, 2w)
        return spatial_softmax(torch.stack(rows, dim=2).flatten(1, 2))

    def take_in(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of chips (N, B, C) and the attention of one head (N, 1, B)."""
        embedding = self.embed(image)
        return embedding.flatten(2).transpose(1, 2), self.weigh(embedding).flatten(1).unsqueeze(1)

    def answer(self, pooled: torch.Tensor) -> torch.Tensor:
        """What the head has pooled (N, 1, C) -> logit (N, K)."""
        return self.head(pooled.squeeze(1))

    def on_map(self, value: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Values of chips (N, B) on their grid (N, h, w)."""
        return value.unflatten(1, (image.shape[-1] // CHIP, -1))

    def attention(self, image: torch.Tensor, views: int = 1) -> torch.Tensor:
        """Attention averaged over the first `views` symmetries of the square, positive, sums to 1: (N, h, w), or
        (N, 2h, 2w) with self.shifts 2."""
        attend = self.fine_attention if self.shifts == 2 else lambda turned: self.weigh(self.embed(turned))
        return mean_over_views(attend, image, views)

    def forward(self, image: torch.Tensor, meta: torch.Tensor, with_attention: bool = False):
        """image (N, 3, S, S) -> logit (N, K), and on demand the attention (N, h, w) behind it."""
        embedding = self.embed(image)
        attention = self.weigh(embedding)
        logit = self.head((embedding * attention.unsqueeze(1)).sum(dim=(2, 3)))
        return (logit, attention) if with_attention else logit


class Scout(Network):
    """Attention over a picture at nearly its own resolution, by gated attention pooling of its cells. A cell is a place
    in the feature maps of a frozen backbone that has run over the whole picture (the maps brought to the coarsest of
    their strides and joined), or with spec.tile a tile of the picture that the backbone sees alone; areas of one colour
    have none. Cells of a frozen backbone are made once (plumbing/cells.py), and with --weights none it is the same in
    every fold. A backbone that is trained (spec.finetune) sees the spec.top_m best tiles only."""

    uses_meta = False
    foldable = False  # feature maps are read by the names of modules
    PIECE = 400_000  # pixels that the backbone sees at a time without gradients, in tiles

    def __init__(self, spec: Spec, weights: str = "none"):
        self.scout_size, self.tile, self.finetune, self.top_m = spec.scout_size, spec.tile, spec.finetune, spec.top_m
        self.cell = spec.tile or max(spec.strides)
        self.unit = 1 if spec.tile else self.cell  # pixels; the picture is read in whole ones
        self.piece = max(1, self.PIECE // self.cell**2)  # tiles
        self.grid = round(self.scout_size / self.cell)  # cells along a side of the square that holds a picture
        if self.scout_size % self.unit or self.grid == 0:
            raise InputError(f"--scout_size {spec.scout_size} is no multiple of {self.cell}; pass one")
        if spec.finetune and not spec.tile:
            raise InputError("--finetune trains a backbone on tiles; pass --tile, their side in pixels")
        with torch.random.fork_rng(devices=[], enabled=not spec.finetune):
            if not spec.finetune:
                torch.manual_seed(0)
            super().__init__(replace(spec, image_size=spec.tile or spec.image_size), weights)
        self.backbone.requires_grad_(spec.finetune == "all").eval()
        self.stages, self.channels, probe = {}, self.features, torch.zeros(1, 3, 8 * CHIP, 8 * CHIP)
        if spec.finetune == "last":
            before = find_stages(self, probe, (16, 32))[16]
            names = [name for name, _ in self.backbone.named_parameters()]
            last = max(i for i, name in enumerate(names) if name.startswith(f"{before}."))
            for parameter in list(self.backbone.parameters())[last + 1 :]:
                parameter.requires_grad_()
        if not spec.tile:
            found = find_stages(self, probe, spec.strides)
            self.stages = {stride: found[stride] for stride in sorted(spec.strides)}
            with torch.no_grad():
                self.channels = self.read_maps(torch.zeros(1, 3, self.cell, self.cell)).shape[-1]
        self.kept, self.shape = (np.uint8, (3, spec.tile, spec.tile)) if spec.finetune else (np.float16, self.channels)
        self.trunk = nn.Sequential(
            # channels of feature maps differ a hundredfold: unless they are standardised, nothing is learned
            nn.Identity() if spec.finetune else nn.BatchNorm1d(self.channels, affine=False),
            nn.Linear(self.channels, spec.hidden), nn.LayerNorm(spec.hidden), nn.GELU(), nn.Dropout(spec.dropout),
        )  # fmt: skip
        self.scorer = GatedAttention(spec.hidden, spec.hidden, spec.heads)
        self.slope = nn.Linear(2, spec.heads, bias=False) if spec.place else None
        if spec.place:
            nn.init.zeros_(self.slope.weight)  # at first all places are alike
        self.head = nn.Sequential(nn.Dropout(spec.dropout), nn.Linear(spec.hidden * spec.heads, spec.outputs))
        self.witness = nn.Linear(spec.hidden, spec.outputs) if spec.witness else None
        self.trust = nn.Parameter(torch.ones(())) if spec.witness else None

    def train(self, mode: bool = True) -> "Scout":
        """Train the head; a backbone that is not trained as a whole keeps the statistics of its batch norms."""
        super().train(mode)
        self.backbone.train(mode and self.finetune == "all")
        return self

    def param_groups(self, lr: float, head_lr: float, layer_decay: float | None = None) -> list[dict]:
        """Parameters of the backbone that are trained at `lr`, if any, and those of the head at `head_lr`."""
        groups = {True: [], False: []}
        for name, parameter in self.named_parameters():
            groups[name.startswith("backbone.")] += [parameter] * parameter.requires_grad
        both = [{"params": groups[True], "lr": lr}, {"params": groups[False], "lr": head_lr}]
        return [group for group in both if group["params"]]

    # ---- from pictures to cells
    def fingerprint(self) -> str:
        """Hash of all that cells depend on but the picture."""
        digest = hashlib.sha256(repr((self.scout_size, self.tile, self.stages)).encode())
        for name, value in {} if self.finetune else self.backbone.state_dict().items():
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def bytes_of(self, size: tuple[int, int]) -> int:
        """Bytes that the cells of a picture of size (width, height) take, if none of them is of one colour."""
        spans = inside(size, self.scout_size, self.scout_size // self.unit)
        cells = math.prod(-(-(span.stop - span.start) * self.unit // self.cell) for span in spans)
        return cells * math.prod(np.atleast_1d(self.shape)) * np.dtype(self.kept).itemsize

    @torch.inference_mode()
    def take_apart(self, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Picture uint8 (H, W, 3) -> values of its cells (B, *shape), their middles (row, column) in pixels (B, 2)."""
        device = self.mean.device
        if not self.tile:
            maps = self.read_maps(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].to(device))[0]
            middles = (np.indices(maps.shape[:2]).reshape(2, -1).T + 0.5) * self.cell
            return as_half(maps.flatten(0, 1)), middles
        missing = np.maximum(self.tile - np.array(picture.shape[:2]), 0)
        picture = np.pad(picture, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
        corners = place_tiles(picture, self.tile)
        tiles = np.stack([picture[y : y + self.tile, x : x + self.tile] for y, x in corners]).transpose(0, 3, 1, 2)
        if not self.finetune:
            pieces = torch.from_numpy(tiles).split(self.piece)
            tiles = as_half(torch.cat([self.backbone(self.normalise(piece.to(device))) for piece in pieces]))
        return tiles, corners + self.tile / 2

    def read_maps(self, image: torch.Tensor) -> torch.Tensor:
        """Pictures uint8 (N, 3, h * cell, w * cell) -> features of cells (N, h, w, C): of a finer map the mean and
        the maximum in every cell."""
        names = list(self.stages.values())
        _, outputs = run_backbone(self, names, lambda: self.backbone(self.normalise(image)))
        parts = []
        for stride, name in self.stages.items():
            fine = self.cell // stride
            pools = (F.avg_pool2d, F.max_pool2d) if fine > 1 else (lambda x, _: x,)
            parts += [pool(outputs[name], fine) for pool in pools]
        return torch.cat(parts, dim=1).permute(0, 2, 3, 1)

    # ---- from cells to answers
    def embed(self, bag: Bag) -> torch.Tensor:
        """Embeddings of cells (N, B, D), 0 where there is none."""
        known, values = bag.known, bag.values
        if self.finetune:
            pieces = [values] if torch.is_grad_enabled() else values.split(self.piece)
            values = torch.cat([self.backbone(self.normalise(piece)) for piece in pieces])
        found = self.trunk(values if torch.is_autocast_enabled(values.device.type) else values.float())
        embedding = found.new_zeros(*known.shape, found.shape[-1])
        embedding[known] = found
        return embedding

    def score(self, embedding: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, B, D) and places (N, B, 2) -> what every head thinks of a cell (N, H, B)."""
        score = self.scorer(embedding).float()
        if self.slope is not None:
            score = score + self.slope(place.nan_to_num() * (self.grid * FINENESS)).float()
        if self.witness is not None:
            score = score + self.trust * self.say(embedding).detach().amax(dim=2, keepdim=True)
        return score.masked_fill(place[..., :1].isnan(), NOTHING).transpose(1, 2)

    def say(self, embedding: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, B, D) -> what every cell says alone of the outputs (N, B, K). In float32, since the most of
        hundreds of bfloat16 values is several of them."""
        with torch.autocast(embedding.device.type, enabled=False):
            return self.witness(embedding.float())

    def find_best(self, score: torch.Tensor) -> torch.Tensor:
        """Scores (N, H, B) -> the spec.top_m cells with most attention of all heads (N, M)."""
        return score.softmax(dim=2).mean(dim=1).topk(self.top_m).indices

    def weigh(self, embedding: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, B, D) and places (N, B, 2) -> attention of every head (N, H, B), sums to 1; none where there
        is no cell, and where spec.top_m others are better."""
        score = self.score(embedding, place)
        if self.top_m and self.top_m < score.shape[2]:
            others = torch.ones_like(place[..., 0], dtype=torch.bool).scatter(1, self.find_best(score), False)
            score = score.masked_fill(others.unsqueeze(1), NOTHING)
        return score.softmax(dim=2)

    def take_in(self, bag: Bag) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of cells (N, B, D) and the attention of every head (N, H, B)."""
        embedding = self.embed(bag)
        return embedding, self.weigh(embedding, bag.place)

    def answer(self, pooled: torch.Tensor) -> torch.Tensor:
        """What every head has pooled (N, H, D) -> logit (N, K)."""
        return self.head(pooled.flatten(1))

    def forward(self, bag: Bag, meta: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Cells of N pictures -> logit (N, K). With spec.witness there is in training a second one, to be learned too:
        what the cell that speaks most for an output says alone. Thus attention finds one cell in hundreds, of which the
        mean tells nothing. Li, Li, Eliceiri 2021, two streams."""
        embedding, attention = self.take_in(bag)
        logit = self.answer(attention.to(embedding.dtype) @ embedding)
        if self.witness is None or not self.training:
            return logit
        return [logit, self.say(embedding).masked_fill(~bag.known.unsqueeze(2), NOTHING).amax(dim=1)]

    def on_map(self, value: torch.Tensor, bag: Bag) -> torch.Tensor:
        """Values of cells (N, B) added up where the cells lie: (N, grid, grid)."""
        row, column = (bag.place.nan_to_num() * self.grid).long().clamp(0, self.grid - 1).unbind(dim=2)
        square = value.new_zeros(len(value), self.grid * self.grid)
        return square.scatter_add(1, row * self.grid + column, value).view(-1, self.grid, self.grid)

    def attention(self, bag: Bag, views: int = 1) -> torch.Tensor:
        """Mean attention of all heads (N, grid, grid), sums to 1. Views are all alike: cells are pooled wherever they
        lie."""
        return self.on_map(self.take_in(bag)[1].mean(dim=1), bag)


def as_half(values: torch.Tensor) -> np.ndarray:
    """Features as float16, cut off at its range."""
    limit = np.finfo(np.float16).max
    return values.float().clamp(-limit, limit).half().cpu().numpy()


@dataclass(frozen=True)
class Recipe:
    """How a name of --model is built and, unless flags say otherwise, trained."""

    network: type[Network]
    backbone: str = "resnet50"
    lr: float = 1e-5  # of the backbone
    head_lr: float = 5e-5  # of everything else
    hidden: int = 256  # width of the metadata branch or of the attention
    dropout: float = 0.7
    batch_size: int = 64
    patience: int = 3
    gated: bool = False
    inputs: tuple[str, ...] = ("whole",)  # what it sees: the whole image, the crop of crop.py, cells of the original

    @property
    def scouts(self) -> bool:
        """Whether it looks at cells of the originals instead of small images."""
        return self.inputs == ("cells",)


# a stream's name and its picture in dataset.py
STREAMS = {"whole": "whole", "rgb": "crop", "location": "location", "depth": "depth"}
MODELS = {
    "resnet": Recipe(MetaResNet),
    "chipnet": Recipe(ChipNet, lr=5e-5, head_lr=1e-4, hidden=512),
    "cropnet": Recipe(MetaResNet, inputs=("crop",)),
    "fusion": Recipe(MetaResNet, inputs=("whole", "crop")),
    "streams": Recipe(Streams),  # its pictures are named by --streams
    "probe": Recipe(MetaResNet, dropout=0.0),
    "scout": Recipe(
        Scout, head_lr=1e-3, hidden=128, dropout=0.2, batch_size=4, patience=8, inputs=("cells",)
    ),  # for its first epochs it finds nothing
    "fsg_vit": Recipe(MetaResNet, backbone="vit_b_16", gated=True),
}


def recipe_of(model: str, streams: Sequence[str] = ()) -> Recipe:
    """The recipe of a name of --model, with the pictures of its streams."""
    return replace(MODELS[model], inputs=tuple(STREAMS[name] for name in streams)) if streams else MODELS[model]


def stages_of(backbone: nn.Module) -> list[str]:
    """Names of the modules that end the stages of a network, or the blocks of a ViT. Raises ValueError if they are
    called otherwise than in the known families."""
    names = [name for name, module in backbone.named_modules() if not isinstance(module, nn.Identity)]
    for pattern in STAGES:
        if len(found := [name for name in names if re.fullmatch(pattern, name)]) > 1:
            return found
    raise ValueError(f"the stages of {type(backbone).__name__} are not known; pass --gates branches")


def gate_stages(model: Network, spec: Spec, init: str, hard: bool) -> None:
    """Gates on the outputs of all stages, and of streams on the fused and the hidden vector."""
    columns = model.backbone.parts if isinstance(model.backbone, Columns) else [model.backbone]
    prefix = "backbone.parts.{}." if isinstance(model.backbone, Columns) else "backbone."
    sites = [prefix.format(i) + name for i, column in enumerate(columns) for name in stages_of(column)]
    pictures, training = getattr(model, "wholes", 0) + spec.boxes, model.training
    image = torch.zeros(1, 3 * pictures, spec.image_size, spec.image_size)
    model.eval()
    run = partial(model, image, torch.zeros(1, spec.meta_dim))
    fsg.gate_outputs(model, [*sites, *getattr(model, "head_sites", ())], run, init, hard)
    model.train(training)


def build_model(spec: Spec, weights: str = "none") -> Network:
    """Build a network from its spec; weights: "imagenet", "none", or a file of backbone weights. Raises InputError if
    the parts do not fit together."""
    model = MODELS[spec.model].network(spec, weights)
    if spec.gates is not None:
        hard = spec.gates == "hard"
        init = "identity" if hard else spec.gates
        try:
            if spec.sites == "stages":
                gate_stages(model, spec, init, hard)
            else:
                fsg.add_gates(model.backbone, init=init, hard=hard)
        except ValueError as error:
            raise InputError(f"--fsg: {error}") from None
    return model.to(memory_format=torch.channels_last)  # faster convolutions, the same function


# ---------------------------------------------------------------- checkpoints
def save_checkpoint(path: Path, model: Network, spec: Spec, **extra) -> None:
    """Save a network with its spec and further plain values; `path` is replaced when complete."""
    save_plain(path, spec=asdict(spec), state_dict=model.state_dict(), **extra)


def save_plain(path: Path, **content) -> None:
    """Save plain values and tensors by name; `path` is replaced when complete."""
    try:
        with atomic(path) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)  # given a path, its name would be part of the bytes
    except RuntimeError as error:  # torch's word for a full disk too
        if isinstance(error.__context__, KeyboardInterrupt):  # and for Ctrl-C while it writes
            raise error.__context__ from None
        raise InputError(f"{path} cannot be written; is the disk full? ({error})") from None


def load_checkpoint(path: Path, device: torch.device | str = "cpu", fold: bool = False) -> tuple[Network, dict]:
    """Rebuild a network from its checkpoint: (model in eval mode, everything saved with it). fold: for prediction only;
    multiplies gates and batch norms into the layers before them. Raises InputError if the file is no checkpoint of this
    project."""
    content = read_torch_file(path)
    try:
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')}, not {FORMAT}")
        model = build_model(Spec(**content["spec"]))
        model.load_state_dict(content["state_dict"])
    except Exception as error:  # whatever a foreign spec or state leads to
        raise InputError(f"{path} is no checkpoint of this version ({str(error)[:200]!r}); train it again") from None
    model.eval()
    if fold and model.foldable:
        model.backbone = fold_batchnorms(fsg.fold_gates(model.backbone))
    return model.to(device), content


def backbone_state(path: Path) -> dict:
    """The state_dict of a file's backbone: a plain one as it is, of a checkpoint with its gates folded in."""
    content = read_torch_file(path)
    if "spec" not in content:
        return content
    backbone = fsg.fold_gates(load_checkpoint(path)[0].backbone)
    if isinstance(backbone, Columns) or fsg.gated_modules(backbone):
        raise InputError(f"{path} has a backbone for each stream, or gates that fold into no layer; pass another")
    return backbone.state_dict()


# ---------------------------------------------------------------- prediction
def dihedral(x: torch.Tensor, view: int, inverse: bool = False) -> torch.Tensor:
    """One of the 8 symmetries of the square on (..., S, S): two flips and a transposition. View 0 is the identity; 0..1
    add the horizontal, 0..3 the vertical flip, 0..7 all of them."""
    flips = [dim for dim, bit in ((-1, 1), (-2, 2)) if view & bit]
    if view & 4 and inverse:
        x = x.transpose(-1, -2)
    x = x.flip(flips) if flips else x
    if view & 4 and not inverse:
        x = x.transpose(-1, -2)
    return x


def mean_over_views(attend, image: torch.Tensor | Bag, views: int) -> torch.Tensor:
    """attend(image) -> (N, h, w), averaged over the first `views` symmetries of the square; cells have one."""
    views = 1 if isinstance(image, Bag) else views
    maps = [dihedral(attend(dihedral(image, view)), view, inverse=True) for view in range(views)]
    return torch.stack(maps).mean(dim=0)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision: amp is "off", "bf16" or "fp16"."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


@torch.inference_mode()
def box_weights(model: MetaResNet, loader, device: torch.device, amp: str = "off") -> np.ndarray:
    """How much a network for several crops looks at each: (N, boxes), rows sum to 1, 0 where there is none."""
    model.eval()
    weights = []
    for image, *_ in loader:
        with autocast(device, amp):
            weights.append(model.read(image.to(device))[1].float().cpu().numpy())
    return np.concatenate(weights)


@torch.inference_mode()
def predict(model: Network, task: Task, loader, device: torch.device, tta: int = 1, amp: str = "off") -> np.ndarray:
    """Predictions for every image of a loader, averaged over `tta` symmetries: float64 (N, K). Raises InputError if one
    is not finite."""
    model.eval()
    probs = [np.empty((0, len(task.columns)))]
    for image, meta, *_ in loader:
        image, meta = image.to(device), meta.to(device)
        with autocast(device, amp):
            views = [model(dihedral(image, view), meta) for view in range(tta)]
        logit = torch.stack(views).float().cpu().double()  # MPS knows no double
        probs.append(task.prob(logit).mean(dim=0).numpy())
    prob = np.concatenate(probs)
    if not np.isfinite(prob).all():
        raise InputError("a prediction is not a number: the network overflows; pass --amp off or a lower --lr")
    return prob
