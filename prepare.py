"""Turn a published data set as it was downloaded into a table that preprocess.py takes.

Reads   RAW_DIR, its archives extracted (never written; photographs are not opened)
Writes  --output_dir/: train.csv, left_out.csv (what is not in it, and why), images (a link to RAW_DIR), prepare.json;
        of data sets that have them boxes.csv (for crop.py --source boxes), test.csv, sample_submission.csv

    python prepare.py real_colon RAW_DIR --output_dir real_colon
    python prepare.py sun RAW_DIR --output_dir sun --frames_per_lesion 40

Cholec80 has films: their annotated frames are decoded into images/. A new data set is a class and a row of DATASETS. A
stopped call goes on after the last video, case or sequence that it finished.

References:
    The READMEs of REAL-colon, SUN, Cholec80, EndoVis 2018 and the ISIC challenges.
"""

import argparse
import json
import math
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
from tqdm import tqdm

import util
from plumbing.data import CORNERS, META_COLUMNS
from plumbing.files import atomic, finish_output, open_output, provenance, sha256, write_table
from plumbing.images import DICOM, SUFFIXES, name_key, read_image
from util import ID, TARGET, InputError

VIDEO = (ID, "patient_id", "video", "lesion_id", "frame", "size_mm")
NUMBER = re.compile(r"([0-9]+)\.[^.]+$")
HIDDEN = (".", "__MACOSX")  # what macOS leaves in archives
RGB = (65536, 256, 1)
# our columns in the words of the skin sets
NAMES = {ID: ID, "image": ID, "image_id": ID, "isic_id": ID, "patient_id": "patient_id", "patient": "patient_id",
         "lesion_id": "lesion_id", "sex": "sex", "age_approx": "age_approx", "age": "age_approx",
         **dict.fromkeys((META_COLUMNS[2], "anatom_site_general", "localization"), META_COLUMNS[2]),
         "diagnosis": "diagnosis", "iddx_full": "diagnosis", TARGET: TARGET, "dx": TARGET}  # fmt: skip


# ---------------------------------------------------------------- folders, tables, boxes
def walk(raw: Path, stop: str = "", depth: int = 6, below: str = "") -> Iterator[tuple[str, str, bool]]:
    """(path below RAW_DIR, name, whether it is a folder) of everything; a folder whose name fits `stop` is entered only
    if it holds one of its own name, as extracted archives do."""
    with os.scandir(raw / below) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(HIDDEN))
    for name, is_folder in found:
        path, stopped = below + name, re.fullmatch(stop, name)
        while is_folder and stopped and (raw / path / name).is_dir():
            path = f"{path}/{name}"
        yield path, name, is_folder
        if is_folder and not stopped and depth > 1:
            yield from walk(raw, stop, depth - 1, f"{path}/")


def natural(text) -> list:
    """Sorting key with numbers as numbers."""
    return [(0, int(word), "") if word.isdecimal() else (1, 0, word) for word in re.split("([0-9]+)", f"{text}")]


def read_cells(path: Path, columns=(), only=None) -> pd.DataFrame:
    """All cells of a table as text, or those in columns whose name fits `only`; raises InputError if it is no table, or
    lacks one of `columns`."""
    sep = "\t" if path.suffix == ".tab" else ","
    try:
        table = pd.read_csv(path, sep=sep, usecols=only, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        if not isinstance(table.index, pd.RangeIndex):  # pandas took the first column for an index
            raise ValueError("rows are longer than the header")
    except ValueError as error:  # not UTF-8, not a table, or empty: pandas says which
        raise InputError(f"{path} is no readable table ({error}); save it as CSV UTF-8") from None
    for column in (column for column in columns if column not in table):
        raise InputError(f"{path} has no column {column!r}; add it, or download the file again")
    return table.apply(lambda cells: cells.str.strip())


def read_sizes(path: Path, id_col: str, size_col: str) -> dict[str, float]:
    """Size in mm by id, NaN if it is missing or there are two. SUN's "15mm-" is 15 mm or more and counts as 15."""
    sizes: dict[str, float] = {}
    table = read_cells(path, (id_col, size_col))
    for name, words in zip(table[id_col], table[size_col], strict=True):
        match = re.fullmatch(r"([0-9]*\.?[0-9]+) *(mm)? *-?", words)
        size = float(match[1]) if match and float(match[1]) > 0 else math.nan
        sizes[name] = size if sizes.get(name, size) == size else math.nan
    return sizes


def fit_box(corners: list, width: float, height: float) -> tuple[list[float], str]:
    """(x0, y0, x1, y1 inside the image, what is wrong with them); a pixel outside is allowed."""
    try:
        x0, y0, x1, y1 = map(float, corners)
    except (TypeError, ValueError):
        x0 = y0 = x1 = y1 = math.nan
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        return [], "box is not four numbers"
    if min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1:
        return [], "box lies outside the image"
    box = [max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)]
    return (box, "") if box[2] > box[0] and box[3] > box[1] else ([], "box is empty")


# ---------------------------------------------------------------- data sets
class Dataset:
    """A published data set. find() notes its units of work (a video, a case) as {unit: {kind: path below RAW_DIR}};
    notes() gives {key: (where, annotation)} of one, frames() {key: image}, and row() the row of a pair, if any. A unit
    goes into a part file: the rows of its tables, and counts."""

    columns: tuple[str, ...] = VIDEO  # of train.csv, all others are labels
    flags = "--target_col size_mm --cut 5 10 --n_folds 6"  # of preprocess.py
    layout = ""
    tables: tuple[str, ...] = ()  # files that all units depend on
    own_images = False  # whether images/ is written, not a link

    def __init__(self, args: argparse.Namespace):
        self.args, self.raw, self.units, self.sizes = args, args.raw_dir, {}, {}
        self.find()
        if not self.units:
            raise InputError(f"{self.raw} is not laid out as {args.dataset}: it needs {self.layout}")

    def put(self, unit: str, kind: str, path: str) -> None:
        """Note a path of a unit; raises InputError if there are two."""
        if (other := self.units.setdefault(unit, {}).setdefault(kind, path)) != path:
            raise InputError(f"{self.raw / other} and {self.raw / path} are both {kind} of {unit}; move one away")

    def fill(self, path: Path, unit: str) -> None:
        """Write the part of a unit."""
        self.part, self.counts = {"left_out": []}, Counter()
        self.read(unit)
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(self.part | {"counts": self.counts}), encoding="utf-8")

    def leave_out(self, name: str, why: str, details: str = "") -> None:
        self.counts[why] += 1
        self.part["left_out"].append({ID: name, "why": why, "details": details})

    def fault(self, name: str, why: str, details: str = "") -> None:
        """Leave out what contradicts itself; raises InputError if that is to stop the work."""
        if self.args.on_error == "fail":
            details = details and f" ({details})"
            raise InputError(f"{self.raw / name}: {why}{details}; repair it, or pass --on_error skip")
        self.leave_out(name, why, details)

    def files(self, unit: str, kind: str, suffixes=SUFFIXES, by_name: bool = False) -> dict:
        """Files of a unit's folder by the number at the end of their name, with or without leading zeros, or by name;
        none if there is no such folder."""
        folder, found = self.units[unit].get(kind), {}
        names = sorted(os.listdir(self.raw / folder)) if folder else ()
        for name in (name for name in names if name.lower().endswith(suffixes) and not name.startswith(HIDDEN)):
            match, path = NUMBER.search(name), f"{folder}/{name}"
            if match is None and not by_name:
                self.fault(path, "no number at the end of its name")
            elif (other := found.setdefault(name if by_name else int(match[1]), path)) != path:
                self.fault(path, "another file has its number", other)
        return found

    def read(self, unit: str) -> None:
        """Write the rows of a unit."""
        notes, rows = self.notes(unit), []
        frames = self.frames(unit, notes)
        for key in sorted({*frames, *notes}, key=natural):
            if key not in notes:
                self.fault(frames[key], "frame without annotation")
            elif key not in frames:
                self.fault(notes[key][0], "annotation without frame")
            elif row := self.row(unit, key, frames[key], *notes[key]):
                rows.append(row)
        self.part["train"] = rows if self.args.frames_per_lesion is None else self.draw(rows)

    def notes(self, unit: str) -> dict:
        return {number: (path, None) for number, path in self.files(unit, "notes", (".xml", ".png")).items()}

    def frames(self, unit: str, notes: dict) -> dict:
        return self.files(unit, "frames")

    def draw(self, rows: list[dict]) -> list[dict]:
        """Some rows of every lesion: one drawn of each of equally long stretches, or all if they are fewer."""
        places, count, kept = defaultdict(list), self.args.frames_per_lesion, []
        for place, row in enumerate(rows):
            places[row["lesion_id"]].append(place)
        for lesion, found in places.items():
            rng, n = np.random.default_rng([self.args.seed, *lesion.encode()]), len(found)
            stretches = [(i * n // count, (i + 1) * n // count) for i in range(count)]
            kept += found if n <= count else [found[rng.integers(*stretch)] for stretch in stretches]
        self.counts["frames not drawn"] += len(rows) - len(kept)
        return [rows[place] for place in sorted(kept)]

    def lesion(self, ids: tuple, image: str, where: str, objects: list, width=math.inf, height=math.inf) -> dict | None:
        """The row of the largest of a frame's lesions (id, corners); ids: patient, video and number of the frame."""
        shown = []
        for lesion, corners in objects:
            box, why = fit_box(corners, width, height)
            why = why or "unknown lesion id" * (lesion not in self.sizes)
            if why := why or "size missing" * math.isnan(self.sizes[lesion]):
                self.fault(where, why, f"{lesion} of {image}")
            else:
                shown.append((lesion, box))
        self.counts["frames without a lesion"] += not objects
        shown.sort(key=lambda each: (each[1][0] - each[1][2]) * (each[1][3] - each[1][1]))
        for lesion, box in shown[1:]:
            self.leave_out(image, "a smaller box of the same frame", f"{lesion} {box}")
        for lesion, box in shown[:1]:
            cells = image, *ids[:2], lesion, ids[2], self.sizes[lesion], *box
            return dict(zip((*self.columns, *CORNERS), cells, strict=True))


class RealColon(Dataset):
    layout = "lesion_info.csv, and folders 001-001_frames with images and 001-001_annotations with an XML for each"

    def find(self) -> None:
        for path, name, is_folder in walk(self.raw, r".+_(frames|annotations?)", depth=3):
            if match := is_folder and re.fullmatch(r"(.+)_(frames|annotation)s?", name):
                self.put(match[1], match[2] if match[2] == "frames" else "notes", path)
            elif name == "lesion_info.csv":
                self.tables = (path,)
                self.sizes = read_sizes(self.raw / path, "unique_object_id", "size [mm]")
        self.units = self.units if self.tables else {}

    def row(self, video: str, number: int, image: str, where: str, _) -> dict | None:
        try:
            root = ElementTree.fromstring((self.raw / where).read_bytes())
        except (ElementTree.ParseError, LookupError, ValueError):  # the last two: of unknown encodings
            return self.fault(where, "broken XML")
        sides = [root.findtext(f"size/{side}") or "" for side in ("width", "height")]
        objects = [((each.findtext("unique_id") or "").strip(),
                    [each.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")])
                   for each in root.iter("object")]  # fmt: skip
        size = (float(side) if side.isdecimal() else math.inf for side in sides)
        return self.lesion((video, video, number), image, where, objects, *size)


class Sun(Dataset):
    layout = "a csv with the columns ID and Size (as on its web page), annotation_txt/case1.txt, and images in case1"

    def find(self) -> None:
        for path, name, is_folder in walk(self.raw, r"case[0-9]+|.*negative.*"):
            pattern = r"(|.*/)case([0-9]+)" if is_folder else r"(|.*/)annotation_txt/case([0-9]+)\.txt"
            if match := re.fullmatch(pattern, path):
                self.put(f"case{int(match[2])}", "frames" if is_folder else "notes", path)
            elif name.lower().endswith(".csv") and {"ID", "Size"} <= {*read_cells(self.raw / path)}:
                self.tables, sizes = (path,), read_sizes(self.raw / path, "ID", "Size")
                self.sizes = {f"case{re.sub('[^0-9]', '', case).lstrip('0')}": size for case, size in sizes.items()}
        self.units = self.units if self.tables else {}

    def notes(self, case: str) -> dict:
        path, found = self.units[case].get("notes"), {}
        text = (self.raw / path).read_text(encoding="utf-8-sig", errors="replace") if path else ""
        for i, line in enumerate(text.splitlines()):
            name, _, rest = line.strip().partition(" ")
            *corners, kind = rest.replace(" ", "").split(",")
            where = f"{path} line {i + 1}"
            if name and (kind not in ("0", "1") or not NUMBER.search(name)):
                self.fault(where, "broken line")
            elif name:
                boxes = found.setdefault(name, (where, []))[1]
                boxes += [(case, corners)] if kind == "0" else []  # 1: no polyp
        return found

    def frames(self, case: str, notes: dict) -> dict:
        return self.files(case, "frames", by_name=True)

    def row(self, case: str, name: str, image: str, where: str, boxes: list) -> dict | None:
        # Names that share time and device come from one examination: of 90 cases looked at 38 share theirs.
        patient = re.match(r"case_[A-Z]_([0-9]{14}_[0-9A-Z]+)_", name)
        video = re.sub(r"_?(ayy_)?image_?$", "", NUMBER.sub("", name)) or case
        return self.lesion((patient[1] if patient else case, video, int(NUMBER.search(name)[1])), image, where, boxes)


class Skin(Dataset):
    """ISIC 2020, and what differs in other sets: a table of images, which lie in any folders."""

    columns = tuple(dict.fromkeys(NAMES.values()))
    flags = f"--target_col {TARGET}"
    layout = "train.csv or ISIC_2020_Training_GroundTruth.csv, and images in any folders"
    train = ["train.csv", "ISIC_2020_Training_GroundTruth_v2.csv", "ISIC_2020_Training_GroundTruth.csv"]
    test = ["test.csv", "ISIC_2020_Test_Metadata.csv"]

    def find(self) -> None:
        self.others, self.images = {}, defaultdict(list)
        for path, name, is_folder in walk(self.raw):
            if not is_folder and name.lower().endswith(SUFFIXES):
                self.images[name_key(name)].append(path)
            elif not is_folder:
                self.others.setdefault(name, path)
        first = [[self.others[name] for name in names if name in self.others][:1] for names in (self.train, self.test)]
        self.tables, self.units = (*first[0], *first[1]), {"table": {}} if first[0] else {}
        self.tests = self.table(first[1][0], ID) if first[1] else pd.DataFrame({ID: []})
        if found := [os.path.dirname(self.image(name)) for name in self.tests[ID] if self.image(name)]:
            self.flags += f" --test_image_dir {shlex.quote(str(self.raw / os.path.commonpath(found)))}"  # no copies

    def image(self, name: str) -> str:
        """File of an image; of several no DICOM, and the largest, since others are thumbnails or copies."""
        found = self.images.get(name_key(name), [""])
        size = {path: os.path.getsize(self.raw / path) for path in found if len(found) > 1}
        return min(found, key=lambda path: (path.lower().endswith(DICOM), -size.get(path, 0), path))

    def table(self, path: str, *needed: str) -> pd.DataFrame:
        """A table in our columns."""
        found = read_cells(self.raw / path, only=NAMES.__contains__)
        table = pd.DataFrame({ours: found[theirs] for theirs, ours in NAMES.items() if theirs in found})
        for column in (column for column in needed if column not in table):
            words = " or ".join(theirs for theirs, ours in NAMES.items() if ours == column)
            raise InputError(f"{self.raw / path} has no column {words}; add it, or download the file again")
        return table

    def read(self, unit: str) -> None:
        twins = {}
        if path := self.others.get("ISIC_2020_Training_Duplicates.csv"):
            table = read_cells(self.raw / path, ("image_name_1", "image_name_2"))
            twins = dict(zip(table["image_name_2"], table["image_name_1"], strict=True))
        table = self.table(self.tables[0], ID, TARGET)
        names, images = table[ID], table[ID].map(self.image)
        reasons = {"a duplicate of another image": names.isin(twins), "annotation without image": images == "",
                   "target missing": table[TARGET] == "", "another row has its name": names.duplicated()}  # fmt: skip
        why = np.select([*reasons.values()], [*reasons], "")
        for name, reason in zip(names[why != ""], why[why != ""], strict=True):
            if name in twins:
                self.leave_out(name, reason, twins[name])
            else:
                self.fault(name, reason)
        self.part["train"] = table.assign(**{ID: images})[why == ""].to_dict("list")
        shown = self.tests[ID].map(self.image) != ""
        if not shown.any():  # as published, those of ISIC 2024 are in an HDF5 file
            self.counts["test images are no files, so there is no test.csv"] = len(shown)
            return
        for name in self.tests[ID][~shown]:
            self.fault(name, "annotation without image")
        self.part["test"] = self.tests[shown].to_dict("list")  # under the names that a submission has
        if path := self.others.get("sample_submission.csv"):
            sample = read_cells(self.raw / path)
            self.part["sample_submission"] = sample[sample.iloc[:, 0].map(self.image) != ""].to_dict("list")


class Ham10000(Skin):
    flags = f"--target_col {TARGET} --group_col lesion_id"
    layout = "HAM10000_metadata.csv, and images in any folders"
    train, test = ["HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab"], []


class Isic2024(Skin):
    layout = "train-metadata.csv, and images in any folders"
    train, test = ["train-metadata.csv"], ["test-metadata.csv"]


class Cholec80(Dataset):
    columns = (ID, "patient_id", "video", "frame")
    flags = "--task multilabel --group_col video"
    layout = "tool_annotations/video01-tool.txt and videos/video01.mp4"
    own_images = True

    def find(self) -> None:
        for path, name, is_folder in walk(self.raw):
            if match := not is_folder and re.fullmatch(r"(video[0-9]+)(-tool\.txt|\.mp4)", name):
                self.put(match[1], "film" if match[2] == ".mp4" else "notes", path)

    def notes(self, video: str) -> dict:
        """A table has a header, then lines of a frame and a 0 or 1 for each label."""
        found, path = {}, self.units[video].get("notes")
        if path is None:
            self.fault(self.units[video]["film"], "video without annotation")
            return found
        head, *lines = (self.raw / path).read_text(encoding="utf-8-sig", errors="replace").splitlines() or [""]
        labels = head.split()[1:]
        if not labels or any(label.isdecimal() for label in labels):
            raise InputError(f"{self.raw / path} has no header: the word Frame, then a word per label; add this line")
        for i, cells in enumerate(map(str.split, lines)):
            sound = len(cells) == len(labels) + 1 and cells[0].isdecimal() and {*cells[1:]} <= {"0", "1"}
            if cells and (not sound or int(cells[0]) in found):
                self.fault(path, "broken line", f"line {i + 2}")
            elif cells:
                found[int(cells[0])] = f"{path} line {i + 2}", dict(zip(labels, map(int, cells[1:]), strict=True))
        return found

    def frames(self, video: str, notes: dict) -> dict:
        """Write the annotated frames of the film as JPEGs."""
        import cv2

        found, images = {}, self.args.output_dir / "images"
        if not notes or "film" not in self.units[video]:
            return found
        (images / video).mkdir(parents=True, exist_ok=True)
        film = cv2.VideoCapture(str(self.raw / self.units[video]["film"]))
        for number in range(max(notes) + 1):
            if not film.grab():
                break
            if number in notes and (shot := film.retrieve())[0]:
                found[number] = f"{video}/{number:06d}.jpg"
                with atomic(images / found[number]) as temporary:
                    temporary.write_bytes(cv2.imencode(".jpg", shot[1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1])
        film.release()
        return found

    def row(self, video: str, number: int, image: str, where: str, labels: dict) -> dict | None:
        return {ID: image, "patient_id": video, "video": video, "frame": number} | labels


class EndoVis18(Dataset):
    """The test release is not read: its sequences have the same names."""

    columns, flags = Cholec80.columns, Cholec80.flags
    layout = "labels.json, and images in seq_1/left_frames and seq_1/labels"

    def find(self) -> None:
        self.repairs, self.colours = {}, {}
        for path, name, is_folder in walk(self.raw, r"left_frames|right_frames|labels|test_data|Test_data_.*"):
            parent, match = f"/{path}".split("/")[-2], re.fullmatch(r"(seq_[0-9]+)_frame([0-9]+)\.png", name)
            if is_folder and name in ("left_frames", "labels") and parent.startswith("seq_"):
                self.put(parent, "notes" if name == "labels" else "frames", path)
            elif match:
                self.repairs[match[1], int(match[2])] = path  # of sequences 1 and 4, published apart
            elif name == "labels.json":
                self.tables, self.colours = (path,), self.read_colours(self.raw / path)
        self.units = self.units if self.colours else {}

    def read_colours(self, path: Path) -> dict[str, int]:
        """Colour of every label, as one number."""
        try:
            return {each["name"]: int(np.dot(each["color"][:3], RGB)) for each in json.loads(path.read_bytes())}
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path} is no list of names and colours ({error}); download it again") from None

    def row(self, video: str, number: int, image: str, where: str, _) -> dict | None:
        where = self.repairs.get((video, number), where)
        try:
            pixels = np.asarray(read_image(self.raw / where)[0]) @ RGB
        except InputError as error:
            return self.fault(where, "broken image of labels", str(error))
        labels = {name: int((pixels == colour).any()) for name, colour in self.colours.items()}
        return {ID: image, "patient_id": video, "video": video, "frame": number} | labels


DATASETS = {"real_colon": RealColon, "sun": Sun, "ham10000": Ham10000, "isic2020": Skin, "isic2024": Isic2024,
            "cholec80": Cholec80, "endovis18": EndoVis18}  # fmt: skip


# ---------------------------------------------------------------- command
def join(folder: Path, parts: list[Path], fixed: tuple) -> tuple[list[Path], Counter, dict[str, bool]]:
    """Write the tables of all parts: (files, counts, labels). Labels are the columns of train.csv that are not `fixed`;
    True if folds can be made of one: it varies, and is in two videos."""
    counts, left, tables = Counter(), [], defaultdict(list)
    for path in parts:
        part = json.loads(path.read_text(encoding="utf-8"))
        counts.update(part.pop("counts"))
        left += part.pop("left_out")
        for name, rows in part.items():
            if len(table := pd.DataFrame(rows)):
                tables[name].append(table)
    if "train" not in tables:
        raise InputError(f"no row is left for {folder / 'train.csv'} ({dict(+counts)}); check RAW_DIR")
    tables = {name: pd.concat(found) for name, found in tables.items()}
    tables["left_out"] = pd.DataFrame(left, columns=[ID, "why", "details"])
    train = tables["train"]
    if CORNERS[0] in train:
        tables |= {"train": train.drop(columns=CORNERS), "boxes": train[[ID, *CORNERS]]}
    for name, table in tables.items():
        write_table(folder / f"{name}.csv", table)
    labels = {name: train.groupby("video")[name].any().sum() > 1 and not train[name].all()
              for name in tables["train"] if name not in fixed}  # fmt: skip
    return [folder / f"{name}.csv" for name in tables], Counter({"rows of train.csv": len(train)}) + counts, labels


def main(args: argparse.Namespace) -> Path:
    """Write the tables; returns their directory."""
    raw, folder = args.raw_dir, args.output_dir
    if not raw.is_dir():
        raise InputError(f"{raw} is no folder; pass the folder of the data set as it was extracted")
    if folder.resolve().is_relative_to(raw.resolve()) or raw.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"--output_dir {folder} and {raw} are one inside the other; pass another --output_dir")
    dataset = DATASETS[args.dataset](args)
    if args.frames_per_lesion and dataset.columns != VIDEO:
        raise InputError("--frames_per_lesion is for real_colon and sun; leave it out")
    settings = {key: getattr(args, key) for key in ("dataset", "frames_per_lesion", "seed", "on_error")}
    settings |= {"raw_dir": str(raw.resolve()), "tables": {path: sha256(raw / path) for path in dataset.tables},
                 "units": len(dataset.units)}  # fmt: skip
    images, parts = folder / "images", []
    if images.exists() and not images.is_symlink() and not dataset.own_images:
        raise InputError(f"{images} is no link; remove it, or pass another --output_dir")
    open_output(folder, "prepare.json", args.overwrite, settings)
    if images.is_symlink():
        images.unlink()
    if not dataset.own_images:
        with suppress(OSError):  # Windows lets some users only make links
            images.symlink_to(raw.resolve(), target_is_directory=True)
    for unit in tqdm(sorted(dataset.units, key=natural), desc=args.dataset, unit="part"):
        parts.append(folder / f"{args.dataset} {unit}.part")
        if not parts[-1].exists():
            dataset.fill(parts[-1], unit)
    files, counts, labels = join(folder, parts, dataset.columns)
    facts = {"counts": counts, "sha256": {path.name: sha256(path) for path in files}}
    finish_output(folder, "prepare.json", settings | facts | provenance())
    for what, count in counts.items():
        print(f"{count:>9,} {what}")
    if odd := [name for name, good in labels.items() if not good]:
        print(f"not in --target_col, since in all frames, in none or in one video only: {', '.join(odd)}")
    words = ["--target_col", *([name for name, good in labels.items() if good] or labels)] if labels else []
    words += [] if images.exists() else ["--image_dir", str(raw)]
    words = shlex.join([str(folder / "train.csv"), *words])
    print(f"next: python preprocess.py --train_csv {words} {dataset.flags}")
    return folder


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__, "overwrite")
    add = parser.add_argument
    add("dataset", choices=tuple(DATASETS), help="which one it is")
    add("raw_dir", type=Path, metavar="RAW_DIR", help="its folder")
    add("--output_dir", type=Path, required=True, help="where to write")
    add("--frames_per_lesion", type=util.COUNT, help="frames of every lesion, drawn evenly over its time [all]")
    add("--seed", type=util.number(int, 0, 2**32 - 1), default=0, help="of the frames drawn")
    add("--on_error", choices=("skip", "fail"), default="skip", help="what to do with files that contradict each other")
    return parser
# fmt: on


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
