"""Techniques of papers, each a class that changes one thing of a plain training; techniques.py measures them.

References, by the class that tries the idea:
    Evit: Liang et al., Not All Patches are What You Need (EViT), ICLR 2022.
    CrossFusion: Chen, Fan, Panda, CrossViT, ICCV 2021.
    Sam: Foret et al., Sharpness-Aware Minimization, ICLR 2021; Chen, Hsieh, Gong, When Vision Transformers Outperform
        ResNets, ICLR 2022.
    PatchMixing: Rangel et al., Hardwiring ViT Patch Selectivity into CNNs using Patch Mixing, 2023.
    Distillation: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015; of held-out predictions.
    Registers: Darcet et al., Vision Transformers Need Registers, ICLR 2024.
    MaskedPretraining: He et al., Masked Autoencoders, CVPR 2022; Xiao et al., Delving into Masked Autoencoders for
        Multi-Label Thorax Disease Classification, WACV 2023.
    Recipe: Huang et al., Deep Networks with Stochastic Depth, ECCV 2016; Cubuk et al., RandAugment, 2020.
    Tame: Ntrougkas, Gkalelis, Mezaris, T-TAME, 2024.
    PromptCam: Chowdhury et al., Prompt-CAM, CVPR 2025.
    shifted_views: Yang et al., Denoising Vision Transformers, ECCV 2024, its test-time part.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import GroupKFold
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
from plumbing.backbones import SMALL_BACKBONES, find_stages, run_backbone

KEEP = 0.7  # share of the tokens that EViT keeps
REGISTERS = 4
RHO = {"cnn": 0.05, "vit": 0.1}  # radius of SAM
MASKED, DECODER = 0.75, 64  # share of the patches that MAE hides, width of its decoder
PRETRAINING = 2  # epochs of MAE per epoch of training
PATCHES, PASTED = 7, (0.1, 0.3)  # cells of a side in patch mixing, range of the share that is pasted
FIT = {"lr": 3e-3, "epochs": 3}  # of what is fitted to a frozen network
SHIFTS = 8  # shifted views of a map


# ---------------------------------------------------------------- vision transformers for small pictures
def vit_mini(image_size: int, num_classes: int = 1000, make: type = VisionTransformer, **more) -> VisionTransformer:
    """A ViT of 8 x 8 patches of an image: 4 blocks of width 96."""
    return make(img_size=image_size, patch_size=image_size // 8, embed_dim=96, depth=4, num_heads=3,
                num_classes=num_classes, **more)  # fmt: skip


class Reorganised(VisionTransformer):
    """A ViT that after some attentions keeps the patches which the class token attends to, and fuses the others."""

    keep_after = (1, 2)  # blocks

    def thin(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """A block in whose middle patches are dropped: tokens (N, T, D) -> (N, 2 + kept, D)."""
        normed = block.norm1(x)
        attn, (n, t, d) = block.attn, normed.shape
        q, k, _ = attn.qkv(normed).reshape(n, t, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        looks = (q[:, :, :1] @ k.transpose(-1, -2) * attn.head_dim**-0.5).softmax(dim=-1).mean(dim=1)[:, 0, 1:]
        x = x + block.drop_path1(block.ls1(attn(normed)))
        patches, kept = x[:, 1:], round(KEEP * (t - 1))
        order = looks.argsort(dim=1, descending=True)
        best, rest = (patches.gather(1, part[..., None].expand(-1, -1, d)) for part in order.tensor_split([kept], 1))
        weight = looks.gather(1, order[:, kept:])
        fused = (rest * (weight / weight.sum(dim=1, keepdim=True)).unsqueeze(2)).sum(dim=1, keepdim=True)
        x = torch.cat([x[:, :1], best, fused], dim=1)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def forward_features(self, x: torch.Tensor, **unused) -> torch.Tensor:
        """Image (N, 3, S, S) -> tokens (N, T, D)."""
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        for i, block in enumerate(self.blocks):
            x = self.thin(block, x) if i in self.keep_after else block(x)
        return self.norm(x)


SMALL_BACKBONES |= {"vit_mini": vit_mini, "vit_evit": partial(vit_mini, make=Reorganised),
                    "vit_registers": partial(vit_mini, reg_tokens=REGISTERS),
                    "vit_droppath": partial(vit_mini, drop_path_rate=0.1)}  # fmt: skip


# ---------------------------------------------------------------- trainings
def soft_loss(logit: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with targets that are shares of classes (N, K)."""
    return -(target * logit.log_softmax(dim=1)).sum(dim=1).mean()


def no_meta(image: torch.Tensor) -> torch.Tensor:
    """The metadata of images without any: (N, 0)."""
    return torch.zeros(len(image), 0)


class Plain:
    """A plain training. problem: a techniques.Problem; kind: "cnn" or "vit"; train: rows to learn from."""

    kinds, against, pictures, length = ("cnn", "vit"), None, ("whole",), 1  # length: times the epochs
    backbone: dict[str, str] = {"vit": "vit_mini"}  # of a kind, unless it is the problem's

    def __init__(self, problem, kind: str, train: np.ndarray, seed: int):
        self.problem, self.kind, self.train, self.seed = problem, kind, train, seed
        self.rng = np.random.default_rng(seed)

    def build(self) -> nn.Module:
        """A network image (N, 3 * pictures, S, S), meta -> logit (N, K)."""
        name, weights = self.backbone.get(self.kind, self.problem.backbone), "none"
        if self.kind == "cnn":
            weights = self.problem.weights
        model = "fusion" if len(self.pictures) > 1 else "resnet"
        return models.build_model(models.Spec(model, name, self.problem.size, outputs=self.problem.classes), weights)

    def before(self, network: nn.Module) -> None:
        """What is done before the training."""

    def change(self, image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Another batch uint8 (N, 3, S, S), (N, K), after the augmentation."""
        return image, target

    def targets(self, rows: np.ndarray) -> torch.Tensor:
        """What is learned of some rows: (N, K), shares of classes."""
        return self.problem.one_hot(rows)

    def step(self, network: nn.Module, optimizer: torch.optim.Optimizer, image, target) -> None:
        """One step of the optimizer."""
        soft_loss(network(image, no_meta(image)), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Longer(Plain):
    """As many steps as a pretraining and the training after it."""

    kinds, length = ("vit",), 1 + PRETRAINING


class Crop(Plain):
    """The same on the crop, whose box is the saliency's."""

    kinds, pictures = ("cnn",), ("crop",)


class Fusion(Plain):
    """Whole image and crop in one network: features side by side."""

    kinds, pictures = ("cnn",), ("whole", "crop")


class CrossHead(nn.Module):
    """Two pictures of an image through one backbone; the pooled features of each look at the other's map."""

    def __init__(self, network: models.Network, size: int, classes: int, width: int = 128):
        super().__init__()
        self.network = network
        self.layer = find_stages(network, torch.zeros(1, 3, size, size), (16,))[16]
        _, found = run_backbone(network, [self.layer], lambda: network.backbone(torch.zeros(1, 3, size, size)))
        self.query = nn.Linear(network.features, width)
        self.key = nn.Linear(found[self.layer].shape[1], width)
        self.look = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * (network.features + width), classes)

    def forward(self, image: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        """image (N, 6, S, S) -> logit (N, K)."""
        n, _, height, width = image.shape
        pictures = self.network.normalise(image.reshape(-1, 3, height, width))
        pooled, maps = run_backbone(self.network, [self.layer], lambda: self.network.backbone(pictures))
        pooled = pooled.view(n, 2, -1)
        tokens = self.key(maps[self.layer].flatten(2).transpose(1, 2)).unflatten(0, (n, 2))
        seen = []
        for one, other in ((0, 1), (1, 0)):
            asked = self.query(pooled[:, one : one + 1])
            seen.append((asked + self.look(asked, tokens[:, other], tokens[:, other], need_weights=False)[0])[:, 0])
        return self.head(torch.cat([pooled.flatten(1), self.norm(torch.cat(seen, dim=1))], dim=1))

    def param_groups(self, lr: float, head_lr: float) -> list[dict]:
        """The backbone at one rate, the rest at another."""
        rest = [p for name, p in self.named_parameters() if not name.startswith("network.")]
        return [{"params": self.network.backbone.parameters(), "lr": lr}, {"params": rest, "lr": head_lr}]


class CrossFusion(Fusion):
    """Whole image and crop fused by cross-attention instead of side by side."""

    against = "fusion"

    def build(self) -> nn.Module:
        """Image (N, 6, S, S), meta -> logit (N, K)."""
        problem = self.problem
        network = models.build_model(models.Spec("resnet", problem.backbone, problem.size), problem.weights)
        return CrossHead(network.eval(), problem.size, problem.classes)


class Evit(Plain):
    """Tokens that the class token ignores are fused into one."""

    kinds, against, backbone = ("vit",), "plain", {"vit": "vit_evit"}


class Registers(Plain):
    """Four tokens that stand for no patch."""

    kinds, against, backbone = ("vit",), "plain", {"vit": "vit_registers"}


class Sam(Plain):
    """A step along the gradient at the worst point near by: two passes."""

    against = "plain"

    def step(self, network: nn.Module, optimizer: torch.optim.Optimizer, image, target) -> None:
        """One step; batch norms see the batch once."""
        soft_loss(network(image, no_meta(image)), target).backward()
        with torch.no_grad():
            moved = [p for p in network.parameters() if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in moved]).norm().clamp(min=1e-12)
            climbs = [RHO[self.kind] / norm * p.grad for p in moved]
            torch._foreach_add_(moved, climbs)
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [m.momentum for m in norms]
        for module in norms:
            module.momentum = 0.0
        optimizer.zero_grad(set_to_none=True)
        soft_loss(network(image, no_meta(image)), target).backward()
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
        with torch.no_grad():
            torch._foreach_sub_(moved, climbs)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class PatchMixing(Plain):
    """Cells of another image pasted in, labels mixed by area, in every other batch."""

    against = "plain"

    def change(self, image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch with pasted cells."""
        if self.rng.random() < 0.5:
            return image, target
        size, other = image.shape[-1], torch.from_numpy(self.rng.permutation(len(image)))
        cell = torch.arange(size) * PATCHES // size
        cells = np.zeros(PATCHES**2, bool)
        cells[self.rng.permutation(PATCHES**2)[: round(self.rng.uniform(*PASTED) * PATCHES**2)]] = True
        mask = torch.from_numpy(cells).view(PATCHES, PATCHES)[cell[:, None], cell]
        share = mask.float().mean()
        return torch.where(mask, image[other], image), (1 - share) * target + share * target[other]


class Recipe(Plain):
    """DropPath .1 and RandAugment (2 operations of strength 9)."""

    against, backbone = "plain", {"vit": "vit_droppath"}
    randaugment = v2.RandAugment(2, 9)

    def build(self) -> nn.Module:
        """The network with stochastic depth."""
        network = super().build()
        if self.kind == "cnn":  # timm's rate grows with depth
            blocks = [m for m in network.backbone.modules() if hasattr(m, "drop_path") and getattr(m, "has_skip", True)]
            from timm.layers import DropPath

            for i, block in enumerate(blocks):
                block.drop_path = DropPath(0.1 * i / len(blocks))
        return network

    def change(self, image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch each of whose images is changed on its own."""
        return torch.stack([self.randaugment(one) for one in image]), target


class MaskedPretraining(Plain):
    """A masked autoencoder of the training images first."""

    kinds, against = ("vit",), "longer"

    def before(self, network: nn.Module) -> None:
        """Pretrain the backbone on the pixels of the rows to learn from."""
        vit, problem = network.backbone, self.problem
        patch, width = vit.patch_embed.patch_size[0], vit.embed_dim
        tokens = vit.patch_embed.num_patches
        decoder = nn.ModuleDict({
            "narrow": nn.Linear(width, DECODER),
            "block": nn.TransformerEncoderLayer(DECODER, 2, 2 * DECODER, 0, "gelu", batch_first=True, norm_first=True),
            "pixels": nn.Linear(DECODER, 3 * patch**2),
        })  # fmt: skip
        hidden, place = nn.Parameter(torch.zeros(DECODER)), nn.Parameter(0.02 * torch.randn(tokens, DECODER))
        parameters = [*vit.parameters(), *decoder.parameters(), hidden, place]

        def loss(rows: np.ndarray) -> torch.Tensor:
            image = problem.augment(problem.pictures(rows, self.pictures), self.rng)
            image = network.normalise(image)
            order = torch.rand(len(image), tokens).argsort(dim=1)
            seen, unseen = order.split([round((1 - MASKED) * tokens), tokens - round((1 - MASKED) * tokens)], dim=1)
            x = vit.patch_embed(image) + vit.pos_embed[:, 1:]
            x = x.gather(1, seen[..., None].expand(-1, -1, width))
            x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
            x = decoder["narrow"](vit.norm(vit.blocks(x)))[:, 1:]
            full = hidden.expand(len(x), tokens, -1).scatter(1, seen[..., None].expand(-1, -1, DECODER), x) + place
            made = decoder["pixels"](decoder["block"](full))
            true = F.unfold(image, patch, stride=patch).transpose(1, 2)
            true = (true - true.mean(dim=2, keepdim=True)) / (true.var(dim=2, keepdim=True) + 1e-6).sqrt()
            error = (made - true).square().mean(dim=2)
            return error.gather(1, unseen).mean()

        network.train()
        problem.fit(parameters, loss, self.train, problem.epochs[self.kind] * PRETRAINING, 1e-3, self.rng)


class Distillation(Plain):
    """Half the target is what a blend of networks predicts that did not see the image: of the image and, where there
    is one, its crop."""

    kinds, against = ("cnn",), "plain"

    def before(self, network: nn.Module) -> None:
        """Train the teachers: two parts, each predicted by networks of the other."""
        self.soft = torch.zeros(len(self.problem.target), self.problem.classes)
        teachers = (Plain, Crop) if self.problem.crop is not None else (Plain, Plain)
        for rest, held_out in GroupKFold(2).split(self.train, groups=self.problem.group[self.train]):
            for i, teacher in enumerate(teachers):
                way = teacher(self.problem, self.kind, self.train[rest], 100 + self.seed + 10 * i)
                taught = self.problem.run(way)
                prob = self.problem.predict(taught, self.train[held_out], way.pictures)
                self.soft[self.train[held_out]] += torch.from_numpy(prob).float() / len(teachers)

    def targets(self, rows: np.ndarray) -> torch.Tensor:
        """The mean of labels and teachers."""
        return (self.problem.one_hot(rows) + self.soft[rows]) / 2


TRAININGS = {"plain": Plain, "longer": Longer, "crop": Crop, "fusion": Fusion, "cross fusion": CrossFusion,
             "evit": Evit, "sam": Sam, "patch mixing": PatchMixing, "droppath, randaugment": Recipe,
             "mae": MaskedPretraining, "registers": Registers, "distillation": Distillation}  # fmt: skip


# ---------------------------------------------------------------- maps of trained networks
class Tame(nn.Module):
    """Maps of all classes from the feature maps of a frozen CNN."""

    def __init__(self, network: models.Network, classes: int, size: int):
        super().__init__()
        stages = find_stages(network, torch.zeros(1, 3, size, size), (8, 16, 32))
        self.layers, self.frozen = [stages[stride] for stride in (8, 16, 32)], [network]
        _, found = run_backbone(network, self.layers, lambda: network.backbone(torch.zeros(1, 3, size, size)))
        self.mixers = nn.ModuleList(nn.Conv2d(found[layer].shape[1], 64, 1) for layer in self.layers)
        self.out = nn.Conv2d(64 * len(self.layers), classes, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image (N, 3, S, S) -> logit (N, K), maps (N, K, S / 8, S / 8) in 0..1."""
        network = self.frozen[0]
        with torch.no_grad():
            logit, found = run_backbone(network, self.layers, lambda: network(image, no_meta(image)))
        grid = found[self.layers[0]].shape[-2:]
        parts = [F.interpolate(mixer(found[layer]), grid, mode="bilinear") for layer, mixer in
                 zip(self.layers, self.mixers, strict=True)]  # fmt: skip
        return logit, self.out(torch.cat(parts, dim=1).relu()).sigmoid()

    def loss(self, image: torch.Tensor) -> torch.Tensor:
        """The masked image keeps its class, with little and smooth area."""
        logit, maps = self(image)
        taken = logit.argmax(dim=1)
        own = maps[torch.arange(len(maps)), taken].unsqueeze(1)
        mask = F.interpolate(own, image.shape[-2:], mode="bilinear")
        mean = 255 * self.frozen[0].mean
        masked = (mean + mask * (image.float() - mean)) / 255
        rough = own.diff(dim=2).square().mean() + own.diff(dim=3).square().mean()
        return F.cross_entropy(self.frozen[0](masked, no_meta(masked)), taken) + own.square().mean() + 0.01 * rough

    @torch.no_grad()
    def attention(self, image: torch.Tensor) -> torch.Tensor:
        """The map of the predicted class (N, h, w)."""
        logit, maps = self(image)
        return maps[torch.arange(len(maps)), logit.argmax(dim=1)]


class PromptCam(nn.Module):
    """A prompt per class enters the last block of a frozen ViT; its attention is the map, what it becomes the score."""

    def __init__(self, network: models.Network, classes: int):
        super().__init__()
        self.frozen = [network]
        self.prompt = nn.Parameter(0.02 * torch.randn(classes, network.backbone.embed_dim))
        self.score = nn.Linear(network.backbone.embed_dim, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image (N, 3, S, S) -> logit (N, K), attention of the prompts (N, K, h, w)."""
        vit = self.frozen[0].backbone
        with torch.no_grad():
            x = vit.norm_pre(vit._pos_embed(vit.patch_embed(self.frozen[0].normalise(image))))
            for block in vit.blocks[:-1]:
                x = block(x)
        last, k, grid = vit.blocks[-1], len(self.prompt), vit.patch_embed.grid_size
        x = torch.cat([self.prompt.expand(len(x), -1, -1), x], dim=1)
        normed = last.norm1(x)
        n, t, _ = normed.shape
        q, key, _ = last.attn.qkv(normed).reshape(n, t, 3, last.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        looks = (q[:, :, :k] @ key.transpose(-1, -2) * last.attn.head_dim**-0.5).softmax(dim=-1).mean(dim=1)
        return self.score(vit.norm(last(x))[:, :k]).squeeze(2), looks[:, :, -grid[0] * grid[1] :].unflatten(2, grid)

    def loss(self, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy."""
        return soft_loss(self(image)[0], target)

    @torch.no_grad()
    def attention(self, image: torch.Tensor) -> torch.Tensor:
        """The attention of the predicted class's prompt (N, h, w)."""
        logit, maps = self(image)
        return maps[torch.arange(len(maps)), logit.argmax(dim=1)]


def shifted_views(attend, image: torch.Tensor, cells: int) -> torch.Tensor:
    """attend(image) -> (N, h, w), averaged over images moved by up to a cell and mirrored, moved back: what sticks to a
    position fades."""
    patch, total, counted = image.shape[-1] // cells, 0, 0
    rng = np.random.default_rng(0)
    for view in range(SHIFTS):
        dy, dx = rng.integers(-patch, patch + 1, 2).tolist()
        moved = F.pad(image.float(), (patch,) * 4, mode="reflect")[..., patch + dy :, patch + dx :]
        moved = models.dihedral(moved[..., : image.shape[-2], : image.shape[-1]].to(image.dtype), view % 4)
        fine = F.interpolate(models.dihedral(attend(moved), view % 4, inverse=True)[:, None], scale_factor=float(patch))
        back = F.pad(fine, (patch,) * 4)[..., patch - dy :, patch - dx :][..., : image.shape[-2], : image.shape[-1]]
        seen = F.pad(torch.ones_like(fine), (patch,) * 4)[..., patch - dy :, patch - dx :]
        total, counted = total + back, counted + seen[..., : image.shape[-2], : image.shape[-1]]
    return F.avg_pool2d(total / counted.clamp(min=1), patch)[:, 0]
