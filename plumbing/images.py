"""Image files: which file a name means, decoding, and cutting squares out of originals."""

import unicodedata
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from util import CPUS, InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".dcm")
DICOM = ".dcm"
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")  # what Pillow may take a file for; for some others it starts programs
MAX_PIXELS = 250_000_000  # Pillow refuses twice as many: a mammogram has 30 million, a scanned film 200
DEPTH_SUFFIXES = (".npy", ".png", ".tif", ".tiff")
MEAN_COLOR = np.array([124, 116, 104], np.float32)  # of ImageNet
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
Frame = str | int  # what networks see of an image, see frame_of


def configure_pillow() -> None:
    """Let Pillow read large originals and keep the memory of decoded ones; for the main function of a script."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    # else the 16 MB blocks of every large image go back to the system, which zeroes them for the next
    Image.core.set_blocks_max(8 * CPUS)


# ---------------------------------------------------------------- names
def name_key(name: str) -> str:
    """What two spellings of an image's name share: NFC, without an image suffix."""
    name = unicodedata.normalize("NFC", str(name))
    stem, _, suffix = name.rpartition(".")
    return stem if stem and f".{suffix.lower()}" in SUFFIXES else name


class ImageIndex:
    """Images below folders, found by name or by path relative to the folder, with or without suffix. Folders are listed
    once a name is no path of a file: they may hold millions of other images."""

    def __init__(self, *folders: Path):
        self.folders = folders

    @cached_property
    def _found(self) -> dict[str, list[Path]]:
        """All images by each of their names."""
        found: dict[str, list[Path]] = {}
        for folder in self.folders:
            for path in sorted(folder.rglob("*")):
                hidden = any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
                if path.suffix.lower() in SUFFIXES and not hidden:
                    for key in {name_key(path.relative_to(folder).as_posix()), name_key(path.name)}:
                        if path not in found.setdefault(key, []):  # folders may overlap
                            found[key].append(path)
        return found

    def find(self, name: str) -> Path | None:
        """File of that name, None if there is none; raises InputError if there are several."""
        if "/" in name and Path(name).suffix.lower() in SUFFIXES:
            direct = [folder / name for folder in self.folders if (folder / name).is_file()]
            if len(direct) == 1:
                return direct[0]
        found = self._found.get(name_key(name), [])
        exact = [path for path in found if unicodedata.normalize("NFC", path.as_posix()).endswith(f"/{name}")]
        found = exact if len(exact) == 1 else found
        if len(found) > 1:
            raise InputError(f"{found[0]} and {found[1]} are both named {name}; name the folder as well, or remove one")
        return found[0] if found else None

    def find_all(self, names: list[str], skip: bool = False) -> list[Path | None]:
        """Files of those names; one that is missing is an InputError, or if `skip` is said and None."""
        found, where = [self.find(name) for name in names], ", ".join(map(str, self.folders))
        missing = [name for name, path in zip(names, found, strict=True) if path is None]
        if missing and not skip:
            count = f"{len(missing)} of {len(names)} are missing"
            raise InputError(f"{where} has no image {missing[0]!r} ({count}); check --image_dir")
        for name in missing:
            tqdm.write(f"skipped {name}: no such image in {where}")
        return found

    def paths(self) -> list[Path]:
        """All images."""
        return sorted({path for found in self._found.values() for path in found})


# ---------------------------------------------------------------- pixels
def read_image(path: Path, min_side: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Read a JPEG, PNG, WebP, TIFF (its first page) or DICOM file upright and as 8-bit RGB; returns it with the
    original's (width, height). With `min_side` a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its
    short side keeps that many pixels. EXIF orientation is applied; grey, palette, CMYK and 1-bit files are converted;
    alpha is dropped; 16 bits are scaled to 8. Raises InputError naming a file that is missing, broken or of another
    kind."""
    if path.suffix.lower() == DICOM:
        image = read_dicom(path)
        return image, image.size
    try:
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if image.format == "TIFF" and image.n_frames > 1:
                tqdm.write(f"{path} has {image.n_frames} pages; the first one is read")
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            image.load()
            orientation = image.getexif().get(0x0112, 1)
            upright = image if orientation == 1 else ImageOps.exif_transpose(image)
            if upright.mode == "F":
                raise ValueError("its pixels are floating point numbers of unknown range")
    except Exception as error:  # Pillow's plugins raise many types on broken files
        deep = read_deep_tiff(path)
        if deep is None:
            raise InputError(f"{path} is no readable JPEG, PNG, WebP or TIFF ({error}); repair or convert it") from None
        return deep, deep.size
    if upright.mode.startswith("I"):
        grey = np.asarray(upright).astype(np.float64) / 257
        upright = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    rgb = upright if upright.mode == "RGB" else upright.convert("RGB")
    return rgb, (height, width) if orientation in TURNED else (width, height)


def read_deep_tiff(path: Path) -> Image.Image | None:
    """A TIFF with 16 bits per colour, which Pillow does not read; None for any other file."""
    import cv2

    if path.suffix.lower() not in (".tif", ".tiff") or not path.is_file():
        return None
    try:
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # an empty file
        return None
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3:
        return None
    return Image.fromarray(np.rint(pixels[:, :, 2::-1] / 257).astype(np.uint8))


def read_dicom(path: Path) -> Image.Image:
    """The first frame of a DICOM file as RGB: rescaled, seen through its window if it has one, MONOCHROME1 inverted,
    its range stretched to 8 bits. Raises InputError if it cannot be read, or pydicom is not installed."""
    try:
        import pydicom
        from pydicom import pixels

        facts = pydicom.dcmread(path)
        frame = pixels.pixel_array(facts, index=0)
        if facts.PhotometricInterpretation == "PALETTE COLOR":
            frame = pixels.apply_color_lut(frame, facts)
        if frame.ndim == 3:
            frame = np.rint(frame / (np.iinfo(frame.dtype).max / 255))
        else:
            frame = pixels.apply_voi_lut(pixels.apply_modality_lut(frame, facts), facts).astype(float)
            frame = (frame - frame.min()) / max(np.ptp(frame), 1e-9)
            frame = np.rint(255 * (1 - frame if facts.PhotometricInterpretation == "MONOCHROME1" else frame))
        return Image.fromarray(frame.astype(np.uint8)).convert("RGB")
    except Exception as error:  # a package or a decoder that is missing, a broken file
        raise InputError(f"{path} is not a readable DICOM file ({error}); pip install pydicom, or convert it") from None


def cut(image: Image.Image, box: tuple, size: int, original_size: tuple[int, int]) -> np.ndarray:
    """Cut a box (x0, y0, x1, y1 in pixels of the original) from its decoded image: uint8 (size, size, 3). The image may
    be decoded at 1/2, 1/4 or 1/8, rounded up to whole pixels, which is why the factor is not the quotient of the sizes.
    Antialiased bilinear (the filter the original used for its arrays). Where the box leaves the image, the image is
    mirrored."""
    factor = 1 / round(max(original_size) / max(image.size))
    x0, y0, x1, y1 = factor * np.array(box)
    left, top, right, bottom = np.clip((x0, y0, x1, y1), 0, [*image.size, *image.size])
    edges = [size * (right - x0) / (x1 - x0), size * (bottom - y0) / (y1 - y0)]
    before = [round(size * (left - x0) / (x1 - x0)), round(size * (top - y0) / (y1 - y0))]
    inner = [max(1, round(edge) - start) for edge, start in zip(edges, before, strict=True)]
    pixels = np.asarray(image.resize(inner, Image.Resampling.BILINEAR, box=(left, top, right, bottom)))
    if inner == [size, size]:
        return pixels
    import cv2  # 20 MB that a preprocessing of squares does without

    after = [size - start - length for start, length in zip(before, inner, strict=True)]
    return cv2.copyMakeBorder(pixels, before[1], after[1], before[0], after[0], cv2.BORDER_REFLECT_101)


def frame_of(width: int, height: int, frame: Frame = "square") -> tuple[float, float, float, float]:
    """What the networks see of an image, as (x0, y0, x1, y1): its largest centred square, or if frame is "whole" the
    smallest centred square that holds it, which leaves the image on two sides. A number is "whole" with a side of at
    least so many pixels."""
    side = min(width, height) if frame == "square" else max(width, height, 0 if frame == "whole" else frame)
    x0, y0 = (width - side) / 2, (height - side) / 2
    return x0, y0, x0 + side, y0 + side


def inside(image_size: tuple[int, int], frame: Frame, cells: int) -> tuple[slice, slice]:
    """Rows and columns of a raster (cells, cells) of what the networks see that lie in the image; all but padding."""
    return inside_view(image_size, frame_of(*image_size, frame), cells)


def inside_view(image_size: tuple[int, int], view: tuple, cells: int) -> tuple[slice, slice]:
    """The same of a raster of any square `view` (x0, y0, x1, y1) of the original; one row and column at least."""
    left, top, right, _ = view
    ends = [(-top, image_size[1] - top), (-left, image_size[0] - left)]
    ends = [np.clip(np.rint(np.array(pair) * cells / (right - left)), 0, cells).astype(int) for pair in ends]
    return tuple(slice(min(start, end - 1), end) for start, end in ends)


def read_square(path: Path, size: int, exact=False, frame: Frame = "square") -> tuple[np.ndarray, tuple[int, int]]:
    """What the networks see of a file (frame_of) as uint8 (size, size, 3), and the original's (width, height). Unless
    `exact`, a JPEG is decoded at a scale that keeps twice the pixels needed."""
    image, original_size = read_image(path, None if exact else 2 * size)
    return cut(image, frame_of(*original_size, frame), size, original_size), original_size


def read_square_or_skip(path: Path, size: int, exact: bool, frame: str, on_error: str) -> tuple | None:
    """What read_square returns; a bad image is an InputError, or if on_error is "skip" said and None."""
    try:
        return read_square(path, size, exact, frame)
    except InputError as error:
        if on_error == "fail":
            raise InputError(f"{error}, or pass --on_error skip") from None
        tqdm.write(f"skipped {error}")
        return None


def read_crops(path: Path, boxes: list[tuple], sizes: list[int], original_size: tuple[int, int]) -> list[np.ndarray]:
    """Boxes (x0, y0, x1, y1) of a file, each resized to a square: uint8 (size, size, 3) per box. The file is decoded
    once, a JPEG at a scale that keeps twice the pixels needed. Raises InputError if it is not of the (width, height)
    for which the boxes were found."""
    needed = max(size / min(x1 - x0, y1 - y0) for (x0, y0, x1, y1), size in zip(boxes, sizes, strict=True))
    image, found_size = read_image(path, int(2 * needed * min(original_size)))
    if found_size != tuple(original_size):
        found, known = ("{} x {}".format(*size) for size in (found_size, original_size))
        raise InputError(f"{path} is {found} px but was {known} when its box was found; preprocess and crop again")
    return [cut(image, box, size, original_size) for box, size in zip(boxes, sizes, strict=True)]


# ---------------------------------------------------------------- depth maps, and all but a box hidden
@cache
def list_depth(folder: Path) -> dict[str, Path]:
    """Depth maps below a folder by their path in it, without suffix."""
    return {name_key(path.relative_to(folder).with_suffix(".png").as_posix()): path
            for path in sorted(folder.rglob("*")) if path.suffix.lower() in DEPTH_SUFFIXES}  # fmt: skip


def find_depth(folder: Path, name: str) -> Path:
    """Depth map of an image by its name, or its path below the folder; raises InputError if there is none."""
    known, key = list_depth(folder), name_key(name)
    path = known.get(key) or known.get(key.rpartition("/")[2])
    if path is None:
        raise InputError(f"{folder} has no depth map of {name} ({', '.join(DEPTH_SUFFIXES)}); add it")
    return path


def read_depth(folder: Path, name: str) -> np.ndarray:
    """Depth map of an image: float32 (h, w), in any unit. Raises InputError if there is none, or it is no .npy array or
    grey picture of 8 or 16 bits."""
    import cv2

    path = find_depth(folder, name)
    try:
        npy = path.suffix.lower() == ".npy"
        depth = np.load(path, allow_pickle=False) if npy else cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        depth = np.asarray(depth, dtype=np.float32)
        if depth.ndim != 2 or not np.isfinite(depth).all():
            raise ValueError(f"shape {depth.shape}, or values that are no numbers")
    except (ValueError, TypeError, EOFError) as error:
        raise InputError(f"{path} is no depth map (height, width): {error}; make it again") from None
    return depth


def cut_depth(depth: np.ndarray, box: tuple, size: int, original_size: tuple[int, int]) -> np.ndarray:
    """A box (x0, y0, x1, y1 in pixels of the original) of a depth map of any resolution, its range stretched to 0..255,
    as a grey picture: uint8 (size, size, 3). Where the box leaves the map, the map is mirrored."""
    import cv2

    x0, y0, x1, y1 = np.array(box) * np.tile(np.array(depth.shape[::-1]) / original_size, 2)
    step = (x1 - x0) / size, (y1 - y0) / size
    if max(step) > 1:  # as area averaging does
        depth = cv2.GaussianBlur(depth, (0, 0), sigmaX=max(step[0] / 2, 1e-3), sigmaY=max(step[1] / 2, 1e-3))
    place = np.array([[step[0], 0, x0 + step[0] / 2 - 0.5], [0, step[1], y0 + step[1] / 2 - 0.5]])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    part = cv2.warpAffine(depth, place, (size, size), flags=how, borderMode=cv2.BORDER_REFLECT_101)
    span = max(float(np.ptp(part)), 1e-12)
    return np.repeat(np.rint(255 * (part - part.min()) / span).astype(np.uint8)[..., None], 3, axis=2)


def box_raster(box: tuple, view: tuple, size: int) -> np.ndarray:
    """Share of every pixel of a picture (size, size) of the square `view` that lies in a box: float32. Both in pixels
    of the original (x0, y0, x1, y1)."""
    unit, edges = (view[2] - view[0]) / size, np.arange(size + 1)
    lines = [np.clip(edges, (box[i] - view[i]) / unit, (box[i + 2] - view[i]) / unit) for i in (0, 1)]
    across, down = (np.diff(line) for line in lines)
    return np.outer(down, across).astype(np.float32)


def hide_outside(image: np.ndarray, raster: np.ndarray) -> np.ndarray:
    """A picture uint8 (S, S, 3) with the mean colour where its raster (S, S) is 0."""
    share = raster[..., None]
    return np.rint(share * image + (1 - share) * MEAN_COLOR).astype(np.uint8)
