"""MNIST and CIFAR from the files their authors publish; nothing in a file is run, and none fills the memory.

References:
    LeCun, Cortes, Burges. The MNIST database of handwritten digits: the idx format.
    Krizhevsky. Learning Multiple Layers of Features from Tiny Images, 2009: CIFAR-10, CIFAR-100, their two formats.
"""

import gzip
import io
import math
import pickletools
import tarfile
import zlib
from pathlib import Path

import numpy as np

from util import InputError

MAX_BYTES = 2**28  # of a file, unpacked; the official archives have 0.19 GB
MAX_STEPS = 2**20  # of a pickle; the longest official one has 0.2 million
PIXELS = 3 * 32 * 32  # of an image of CIFAR: red, green, blue, each row by row
NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
LAYOUTS = [("fine_labels", ["train"], ["test"]), ("labels", BATCHES, ["test_batch"])]  # files to train and to test on


def read_file(path: Path) -> bytes:
    """Content of a file, unpacked if it is gzipped; raises InputError if it is broken or too large."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data = (gzip.open(file) if packed else file).read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); check its name, or copy it again") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} holds more than {MAX_BYTES:,} bytes; pass the official file")
    return data


# ---------------------------------------------------------------- MNIST
def read_idx(folder: Path, name: str, dims: int) -> np.ndarray:
    """An original file of MNIST, such as train-images-idx3-ubyte or train-images.idx3-ubyte.gz, as uint8."""
    spellings = [f"{name}{dash}idx{dims}-ubyte{suffix}" for dash in "-." for suffix in ("", ".gz")]
    paths = [folder / inside / spelling for inside in ("", "raw", "MNIST/raw") for spelling in spellings]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise InputError(f"{folder} has no {spellings[0]}; pass the folder of MNIST's four files, gzipped or not")
    data, start = read_file(path), 4 + 4 * dims
    magic, *shape = np.frombuffer(data[:start].ljust(start, b"\0"), ">u4").tolist()
    if magic != 2048 + dims or len(data) != start + math.prod(shape) or shape[1:] not in ([], [28, 28]):
        raise InputError(f"{path} is cut off or no file of MNIST; copy it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_mnist(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(images uint8 (N, 1, 28, 28), labels (N,)) to train on and to test on."""
    return [(read_idx(folder, f"{part}-images", 3)[:, None], read_idx(folder, f"{part}-labels", 1))
            for part in ("train", "t10k")]  # fmt: skip


# ---------------------------------------------------------------- CIFAR
def parse_pickle(data: bytes):
    """What a pickle of protocol 2 holds. This reader calls nothing that a pickle names, so there is nothing to allow or
    to forbid: an object stays the list [name, arguments, state]. Strings of Python 2 are read as latin-1."""
    stack, marks, memo = [], [], {}

    def pop_to_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for step, (opcode, value, _) in enumerate(pickletools.genops(data)):
        if step > MAX_STEPS:
            raise ValueError(f"it has more than {MAX_STEPS:,} steps")
        match opcode.name:
            case "PROTO" | "STOP":
                pass
            case "GLOBAL" | "BININT" | "BININT1" | "BININT2" | "SHORT_BINSTRING" | "BINSTRING" | "BINUNICODE" | "NONE":
                stack.append(value)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode.name]())
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "BUILD":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = pop_to_mark()
                stack[-1].extend(items)
            case "SETITEM":
                key, item = stack.pop(-2), stack.pop()
                stack[-1][key] = item
            case "SETITEMS":
                items = pop_to_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "REDUCE":
                arguments = stack.pop()  # Python 3 writes bytes as encode(text, "latin1")
                stack[-1] = arguments[0] if stack[-1] == "_codecs encode" else [stack[-1], arguments]
            case name:
                raise ValueError(f"it has a {name}")
    return stack.pop()


def read_pickled(data: bytes, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(pixels (N, 3072), labels (N,)) of a file of the python version."""
    content = parse_pickle(data)
    match content["data"]:
        case ["numpy.core.multiarray _reconstruct" | "numpy._core.multiarray _reconstruct", _,
              (_, (count, 3072), ["numpy dtype", ("u1", *_), *_], False, str(raw))]:  # fmt: skip
            x = np.frombuffer(raw.encode("latin-1"), np.uint8).reshape(count, PIXELS)
        case _:
            raise ValueError(f"its data are no array of uint8 (N, {PIXELS})")
    if not all(type(label) is int for label in content[key]):  # nested lists may be endless
        raise ValueError(f"its {key} are no whole numbers")
    return x, np.array(content[key])


def read_binary(data: bytes, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The same of a file of the binary version: rows of a label, of CIFAR-100 the coarse and the fine one, and
    pixels."""
    labels = 2 if key == "fine_labels" else 1
    rows = np.frombuffer(data, np.uint8).reshape(-1, labels + PIXELS)
    return rows[:, labels:], rows[:, labels - 1]


def find_files(path: Path, names: set[str]) -> dict[str, bytes]:
    """The files of those names in a folder or a tar archive, of which nothing is unpacked to disk."""
    if path.is_dir():
        return {name: read_file(path / name) for name in names if (path / name).is_file()}
    archive = io.BytesIO(read_file(path))
    try:
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            # a sparse member is as long as it claims to be
            members = {Path(member.name).name: member for member in tar if member.isfile() and not member.issparse()}
            return {name: tar.extractfile(members[name]).read() for name in names & members.keys()}
    except Exception as error:  # a broken header raises many types
        raise InputError(f"{path} is no tar archive or is cut off ({error}); copy it again") from None


def read_npz(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same as read_cifar from an npz of NPZ_KEYS with images uint8 (N, S, S, 3)."""
    with np.load(path, allow_pickle=False) as file:
        x, y, x_test, y_test = (file[key] for key in NPZ_KEYS)
    for image in (x, x_test):
        if image.dtype != np.uint8 or image.shape[1:] != (*x.shape[1:3], 3):
            raise ValueError(f"images are {image.dtype} {image.shape}, not uint8 (N, S, S, 3)")
    return [(x.transpose(0, 3, 1, 2), y), (x_test.transpose(0, 3, 1, 2), y_test)]


def read_cifar(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(images uint8 (N, 3, S, S), labels (N,)) to train on and to test on, of CIFAR-100 or CIFAR-10: the python or the
    binary version, as archive or folder, or an npz."""
    if path.suffix == ".npz":
        return read_npz(path)
    names = {name for _, train, test in LAYOUTS for name in train + test}
    files = find_files(path, names | {f"{name}.bin" for name in names})
    for suffix, read in (("", read_pickled), (".bin", read_binary)):
        for key, *parts in LAYOUTS:
            if not {name + suffix for part in parts for name in part} <= files.keys():
                continue
            pairs = []
            for part in parts:
                try:
                    x, y = zip(*(read(files[name + suffix], key) for name in part), strict=True)
                except Exception as error:  # as many types as there are ways to break a pickle
                    names = f"{part[0]}{suffix}" + (" or the files beside it" if len(part) > 1 else "")
                    raise InputError(f"{path}: {names} cannot be read ({error}); pass the official file") from None
                pairs.append((np.concatenate(x).reshape(-1, 3, 32, 32), np.concatenate(y)))
            return pairs
    raise InputError(f"{path} is no complete CIFAR; pass cifar-100-python.tar.gz, cifar-10-binary.tar.gz or its folder")
