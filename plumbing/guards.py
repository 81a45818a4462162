"""Who has seen what: whether weights, crops and maps learned from images that are held out now, and whether inputs
are what they were when they were hashed."""

from pathlib import Path

from plumbing.arrays import array_path, open_array
from plumbing.backbones import read_torch_file
from plumbing.data import Data, meta_columns, with_boxes
from plumbing.files import read_json, sha256
from util import InputError


def check_unseen(what, trained_on: dict | None, folds_sha256: str, fold: int) -> None:
    """Raise InputError if what is given comes from networks that learned from images that `fold` holds out. trained_on:
    {"folds_sha256", "fold"} from a checkpoint, with the fold that was held out from it; None for what was made without
    labels of these images. The one rule for starting weights, sources of maps, saliency backbones, crops and guides."""
    if trained_on not in (None, {"folds_sha256": folds_sha256, "fold": fold}):
        raise InputError(
            f"{what} comes from networks that learned from images that fold {fold} holds out here, or from other folds "
            f"of the data; pass what fold {fold}'s own network made, or what was made without these labels"
        )


def check_crops(crop_dir: Path, crop: dict, data: Data, folds: list[int], guide: bool = False) -> None:
    """check_unseen for the crops of a crop.py directory, or if `guide` for its maps of the training images."""
    for k in folds:
        own = k in crop["folds"] and not (guide and crop["trained"])  # the others' maps learned from fold k's labels
        trained_on = {"folds_sha256": crop["folds_sha256"], "fold": k if own else None}
        check_unseen(crop_dir, trained_on, data.folds_sha256, k)


def fold_weights(weights: str, data: Data, k: int) -> str:
    """Weights that fold k starts from: if they are a run, its network of the fold; InputError if they saw fold k."""
    path = Path(weights)
    if weights in ("imagenet", "none"):
        return weights
    path = path / f"fold{k}_best.pt" if path.is_dir() else path
    check_unseen(f"--weights {path}", read_torch_file(path).get("trained_on"), data.folds_sha256, k)
    return str(path)


def check_inputs(args, data: Data, folds: list[int], uses_meta: bool) -> tuple[dict, dict | None]:
    """(hashes of all that a run is trained on, crop.json if crops are used); args: of train.py. Raises InputError if an
    input is missing, of another shape, or from networks that saw what is held out now."""
    for k in folds:
        fold_weights(args.weights, data, k)
    inputs, crop, path = {"folds": data.folds_sha256, "weights": args.weights}, None, Path(args.weights)
    if path.exists():
        inputs["weights"] = sha256(path / "config.json" if path.is_dir() else path)
    table, sizes = data.train, {split: data.size for split in data.tables()}
    folders = {"data": (data.directory, data.facts, sizes)}
    if args.crop_dir is not None:
        crop = read_json(args.crop_dir / "crop.json")
        check_crops(args.crop_dir, crop, data, folds)
        depth = {f"{split}_depth": size for split, size in sizes.items() if "depth" in args.streams}
        if depth and crop.get("depth_dir") is None:
            raise InputError(f"{args.crop_dir} has no depth maps; make it with crop.py --depth_dir")
        folders["crop"] = args.crop_dir, crop, sizes | {"train_wide": crop["wide_size"]} | depth
        table = with_boxes(table, args.crop_dir, "train")[0]
    if args.guide is not None:
        guide = read_json(args.guide / "crop.json")
        check_crops(args.guide, guide, data, folds, guide=True)
        inputs["guide"] = guide["sha256"]["train_attention.npy"]
    for word, (folder, facts, splits) in folders.items():
        for split, size in splits.items():
            path = array_path(folder, split, size)
            open_array(path, len(data.test if split.startswith("test") else data.train), size)
            inputs[f"{word} {split}"] = facts["sha256"][path.name]
    meta_columns(table, args.meta_cols if uses_meta else [])
    return inputs, crop
