"""A linear model of frozen features: what a backbone tells about a target before anything is trained.

    x = make_features(network, data, images, key, device, amp)           # by split, kept in data/features/
    weight, bias, _ = fit_head(task, x["train"][rows], target[rows], group[rows], loss_of)

The features are standardised, the strength of the penalty is chosen inside the training rows with whole groups, and
both are multiplied into one linear layer: a probe is an ordinary network with that head.
"""

import hashlib
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from models import MetaResNet, autocast
from plumbing.arrays import Filling, PartialArray
from plumbing.data import Data
from plumbing.files import finish_output, open_output, provenance
from tasks import Task
from util import InputError

STRENGTHS = 10.0 ** np.arange(-5, 2)  # C of the logistic regression, 1 / alpha of ridge
PARTS = 3  # of the training rows, for the choice of the strength
STEPS = 300  # of the logistic regression
MARKER = "features.json"
BATCH = 32  # images that the network sees at a time


def make_features(network: MetaResNet, data: Data, images: dict, key: list, device, amp: str) -> dict[str, np.ndarray]:
    """Features of all images of a data directory by split (N, C * pictures), computed unless they are there. images: an
    ImageDataset of each split, not augmented; key: what the pictures depend on. They lie in features/ below the data,
    in a folder for this backbone, its weights and these pictures; a stopped call goes on."""
    network.eval()
    digest = hashlib.sha256(repr((amp, key)).encode())
    for name, value in network.backbone.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    folder = data.directory / "features" / digest.hexdigest()[:12]

    @torch.inference_mode()
    def read(split: str, rows: np.ndarray) -> np.ndarray:
        found = []
        for part in np.array_split(rows, -(-len(rows) // BATCH)):
            image = torch.stack([images[split][row].image for row in part]).to(device)
            with autocast(device, amp):
                found.append(network.read(image)[0].float().cpu().numpy())
        return np.concatenate(found)

    if not (folder / MARKER).exists():
        open_output(folder, MARKER, False, {"pictures": key})
        for split, each in images.items():
            array = PartialArray(folder / f"{split}.npy", (len(each), read(split, np.array([0])).shape[1]), np.float32)
            filling = Filling(folder / f"{split}_done.npy", [array], len(each))

            def write(row: int, values: np.ndarray, array=array) -> int:
                array.write(row, values)
                return 1

            with tqdm(total=len(each), desc=f"features of {split}", unit="image") as bar:
                filling.run(np.arange(len(each)), write, 1, bar, partial(read, split))
            array.finish(np.arange(len(each)))
        finish_output(folder, MARKER, provenance())
    return {split: np.load(folder / f"{split}.npy", allow_pickle=False) for split in images}


# ---------------------------------------------------------------- the head
def fit_linear(task: Task, x: np.ndarray, target: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weight (K, C) and bias (K,) of the logit of standardised features (n, C); target (n, T). Classes that no row has
    get none."""
    from sklearn.linear_model import LogisticRegression, Ridge

    if not task.probabilistic:
        model = Ridge(1 / strength).fit(x, task.goal(target)[:, 0])
        return model.coef_[None], np.array([model.intercept_])
    weight, bias = np.zeros((len(task.names), x.shape[1])), np.full(len(task.names), -50.0)
    for i, label in enumerate(target.T):
        known = ~np.isnan(label)
        found = np.unique(label[known]).astype(int)
        if len(found) == 1:  # nothing tells them apart
            bias[found if task.sums_to_1 else i] = 50.0 * (task.sums_to_1 or 2 * found[0] - 1)
            continue
        with warnings.catch_warnings(action="ignore"):  # of a fit that ended before it converged
            model = LogisticRegression(C=strength, max_iter=STEPS).fit(x[known], label[known].astype(int))
        if not task.sums_to_1:
            weight[i], bias[i] = model.coef_[0], model.intercept_[0]
        elif len(found) == 2:  # scikit-learn gives two classes one logit
            weight[found[1]], bias[found] = model.coef_[0], (0.0, model.intercept_[0])
        else:
            weight[found], bias[found] = model.coef_, model.intercept_
    return weight, bias


def fit_head(
    task: Task, x: np.ndarray, target: np.ndarray, group: np.ndarray, loss_of: Callable
) -> tuple[np.ndarray, np.ndarray, float]:
    """Weight (K, C) and bias (K,) of the logit of features (n, C), and the strength: that with the least loss_of(logit,
    rows) on parts with whole groups that it was not fitted to. Raises InputError if there is one group alone."""
    from sklearn.model_selection import GroupKFold

    mean, std = x.mean(axis=0), x.std(axis=0)
    scale = 1 / np.where(std > 1e-6, std, np.inf)  # what never varies says nothing
    x, parts = (x - mean) * scale, min(PARTS, len(np.unique(group)))
    if parts < 2:
        raise InputError("a fold has training images of one group alone; a probe needs two")
    splits, losses = list(GroupKFold(parts).split(x, groups=group)), []
    for strength in STRENGTHS:
        loss = 0.0
        for rest, held_out in splits:
            weight, bias = fit_linear(task, x[rest], target[rest], strength)
            loss += loss_of(x[held_out] @ weight.T + bias, held_out)
        losses.append(loss)
        if loss > min(losses):  # weaker penalties only take longer
            break
    strength = float(STRENGTHS[np.argmin(losses)])
    weight, bias = fit_linear(task, x, target, strength)
    return weight * scale, bias - weight @ (mean * scale), strength
