"""Networks, checkpoints and prediction.

Every network is called as model(image, meta) -> logit (N, K), with image (N, 3, S, S) either uint8 or float in 0..1,
and meta (N, M) as MetaEncoder makes it. A network normalises its input itself, knows its parameter groups, and is
rebuilt from the spec in its checkpoint. A new network is a class and a row of MODELS.

References:
    C. Careaga, attention_guided_cropping (2020): MetaResNet and ChipNet, their learning rates.
    Guan et al., Diagnose like a Radiologist (AG-CNN), 2018: the fusion of whole image and crop.
    Ilse, Tomczak, Welling, Attention-based Deep Multiple Instance Learning, ICML 2018: the scout's pooling.
"""

import hashlib
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import fsg
from plumbing.backbones import find_stages, load_backbone, make_backbone, read_torch_file, run_backbone
from plumbing.files import FORMAT, atomic
from plumbing.speedups import fold_batchnorms, skip_padding
from tasks import Task
from util import InputError

NOTHING = -1e4  # score of a cell that is none; finite, so that a picture of none has a softmax
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
    scout_size: int = 1280  # of a scout: long side of what it sees, in pixels
    strides: tuple[int, ...] = (16, 32)  # of the feature maps that it reads


# ---------------------------------------------------------------- networks
class Network(nn.Module):
    """What all networks share: a backbone (N, 3, s, s) -> (N, C) and its normalisation."""

    uses_meta = True
    shift = 0  # pixels by which training moves its images
    foldable = True  # whether batch norms may be multiplied into convolutions for prediction

    def __init__(self, spec: Spec, weights: str, input_size: int | None = None):
        super().__init__()
        self.backbone, head = make_backbone(spec.backbone, weights, spec.image_size)
        if weights not in ("imagenet", "none"):
            load_backbone(self.backbone, head, backbone_state(Path(weights)), Path(weights))
        self.backbone.set_submodule(head, nn.Identity())
        config = getattr(self.backbone, "pretrained_cfg", {})  # timm says what it was trained on
        mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
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
        raise InputError("--layer_decay is for ViTs of torchvision and timm; leave it out")
    return [layers[place] for place in sorted(layers)]


class MetaResNet(Network):
    """Image features and metadata features, concatenated, one linear head. Any backbone serves; without metadata
    (meta_dim 0) the second branch is absent. With several pictures of a case (whole image and crop) one backbone reads
    each, and the head reads all."""

    def __init__(self, spec: Spec, weights: str = "none"):
        super().__init__(spec, weights)
        self.meta_dim, self.pictures = spec.meta_dim, len(MODELS[spec.model].inputs)
        self.meta_branch, hidden = None, spec.hidden
        if spec.meta_dim:
            self.meta_branch = nn.Sequential(
                nn.Linear(spec.meta_dim, hidden), nn.ReLU(inplace=True), nn.BatchNorm1d(hidden),
                nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.BatchNorm1d(hidden),
            )  # fmt: skip
        width = self.features * self.pictures + (hidden if spec.meta_dim else 0)
        self.head = nn.Sequential(nn.Dropout(spec.dropout), nn.Linear(width, spec.outputs))

    @torch.no_grad()
    def ignore_meta(self, columns: np.ndarray) -> None:
        """Start the weights of some metadata columns (M,) bool at 0."""
        if self.meta_branch is not None:
            self.meta_branch[0].weight[:, torch.from_numpy(columns)] = 0

    def forward(self, image: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        """image (N, 3 * pictures, S, S), meta (N, M) -> logit (N, K)."""
        n, _, height, width = image.shape
        image = image.reshape(n * self.pictures, 3, height, width)
        features = self.backbone(self.normalise(image)).view(n, -1)  # (N, C * pictures)
        if self.meta_branch is not None:
            features = torch.cat([features, self.meta_branch(meta)], dim=1)
        return self.head(features)


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
        n, grid = len(image), image.shape[-1] // CHIP
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


class Scout(ChipNet):
    """ChipNet's attention over a picture at nearly its own resolution. A frozen backbone runs over the whole picture
    once (plumbing/cells.py keeps what it finds), its feature maps are brought to the coarsest of their strides and
    joined, and gated attention pools the cells. The backbone of --weights none is the same in every fold."""

    shift = 0
    foldable = False  # feature maps are read by the names of modules

    def __init__(self, spec: Spec, weights: str = "none"):
        self.cell, self.scout_size = max(spec.strides), spec.scout_size
        self.grid = self.scout_size // self.cell  # cells along a side of the square that holds a picture
        if spec.scout_size % self.cell:
            raise InputError(f"--scout_size {spec.scout_size} is no multiple of {self.cell}; pass one")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            Network.__init__(self, spec, weights)
        self.backbone.requires_grad_(False).eval()
        stages = find_stages(self, torch.zeros(1, 3, 8 * CHIP, 8 * CHIP), spec.strides)
        self.stages = {stride: stages[stride] for stride in sorted(spec.strides)}
        with torch.no_grad():
            self.channels = self.cells(torch.zeros(1, 3, self.cell, self.cell)).shape[-1]
        self.trunk = nn.Sequential(
            nn.BatchNorm1d(self.channels, affine=False),  # channels differ a hundredfold; without it nothing is learned
            nn.Linear(self.channels, spec.hidden), nn.LayerNorm(spec.hidden), nn.GELU(), nn.Dropout(spec.dropout),
        )  # fmt: skip
        self.look, self.gate = nn.Linear(spec.hidden, spec.hidden), nn.Linear(spec.hidden, spec.hidden)
        self.scorer = nn.Linear(spec.hidden, 1)
        self.head = nn.Sequential(nn.Dropout(spec.dropout), nn.Linear(spec.hidden, spec.outputs))

    def train(self, mode: bool = True) -> "Scout":
        """Train the head; the backbone stays as it is."""
        super().train(mode)
        self.backbone.eval()
        return self

    def param_groups(self, lr: float, head_lr: float, layer_decay: float | None = None) -> list[dict]:
        """All parameters but the backbone's."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": head_lr}]

    def fingerprint(self) -> str:
        """Hash of all that cells depend on but the picture."""
        digest = hashlib.sha256(repr((self.scout_size, self.stages)).encode())
        for name, value in self.backbone.state_dict().items():
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def cells(self, image: torch.Tensor) -> torch.Tensor:
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

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """Cells (N, C, h, w), NaN where there is none -> embeddings (N, D, h, w), 0 there."""
        cells = image.permute(0, 2, 3, 1)
        known = ~cells[..., 0].isnan()
        found = self.trunk(cells[known].float())
        embedding = found.new_zeros(*known.shape, found.shape[-1])
        embedding[known] = found
        return embedding.permute(0, 3, 1, 2)

    def weigh(self, embedding: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, D, h, w) -> attention (N, h, w), sums to 1; none where all of an embedding is 0. Ilse et al.
        2018, equation 9."""
        x = embedding.permute(0, 2, 3, 1)
        score = self.scorer(self.look(x).tanh() * self.gate(x).sigmoid()).squeeze(-1).float()
        return spatial_softmax(score.masked_fill((x == 0).all(dim=-1), NOTHING))

    def attention(self, image: torch.Tensor, views: int = 1) -> torch.Tensor:
        """Cells (N, C, h, w) -> attention (N, h, w). Views are all alike, since cells are pooled wherever they lie."""
        return self.weigh(self.embed(image))


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


MODELS = {
    "resnet": Recipe(MetaResNet),
    "chipnet": Recipe(ChipNet, lr=5e-5, head_lr=1e-4, hidden=512),
    "cropnet": Recipe(MetaResNet, inputs=("crop",)),
    "fusion": Recipe(MetaResNet, inputs=("whole", "crop")),
    "scout": Recipe(
        Scout, head_lr=1e-3, hidden=128, dropout=0.2, batch_size=16, patience=8, inputs=("cells",)
    ),  # for its first epochs it finds nothing
    "fsg_vit": Recipe(MetaResNet, backbone="vit_b_16", gated=True),
}


def build_model(spec: Spec, weights: str = "none") -> Network:
    """Build a network from its spec; weights: "imagenet", "none", or a file of backbone weights. Raises InputError if
    the parts do not fit together."""
    model = MODELS[spec.model].network(spec, weights)
    if spec.gates is not None:
        hard = spec.gates == "hard"
        try:
            fsg.add_gates(model.backbone, init="identity" if hard else spec.gates, hard=hard)
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
    return fsg.fold_gates(load_checkpoint(path)[0].backbone).state_dict()


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


def mean_over_views(attend, image: torch.Tensor, views: int) -> torch.Tensor:
    """attend(image) -> (N, h, w), averaged over the first `views` symmetries of the square."""
    maps = [dihedral(attend(dihedral(image, view)), view, inverse=True) for view in range(views)]
    return torch.stack(maps).mean(dim=0)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision: amp is "off", "bf16" or "fp16"."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


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
