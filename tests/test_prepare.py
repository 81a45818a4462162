"""Published data sets, as small trees of the same layout, become tables that preprocess.py takes."""

import csv
import json
import shlex
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import SMALL_MODEL, call, hashes, read

import prepare
from plumbing.data import CORNERS, META_COLUMNS, read_data
from plumbing.files import read_json
from util import ID, InputError

SIZE = (40, 32)  # width, height of all images
TOOLS = ["Grasper", "Bipolar", "Hook", "Scissors", "Clipper", "Irrigator", "SpecimenBag"]
COLOURS = {"background-tissue": (0, 0, 0), "instrument-shaft": (0, 255, 0), "thread": (187, 155, 25),
           "clamps": (0, 255, 125)}  # fmt: skip


# ---------------------------------------------------------------- small trees
def draw(path: Path, value: int = 0) -> None:
    """An image of one brightness."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*SIZE[::-1], 3), value % 256, np.uint8))


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def xml(path: Path, *objects, size=SIZE) -> None:
    """A VOC file of (lesion, x0, y0, x1, y1)."""
    inner = "".join(
        f"<object><unique_id>{name}</unique_id><bndbox><xmin>{x0}</xmin><xmax>{x1}</xmax>"
        f"<ymin>{y0}</ymin><ymax>{y1}</ymax></bndbox></object>" for name, x0, y0, x1, y1 in objects)  # fmt: skip
    text(path, f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{inner}</annotation>")


def table(path: Path, *rows: dict, sep=",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False, sep=sep)


def real_colon(raw: Path, videos: int = 4, frames: int = 6) -> Path:
    """Videos of one lesion, which every second frame shows; frame 10 follows frame 9."""
    rows = []
    for v in range(1, videos + 1):
        video = f"001-{v:03d}"
        rows.append({"unique_object_id": f"{video}_1", "unique_video_name": video, "size [mm]": 4 * v - 1})
        for i in range(7, 7 + frames):
            draw(raw / f"{video}_frames" / f"{video}_{i}.jpg", 20 * i + v)
            shown = [(f"{video}_1", 5, 4, 15 + v, 20)] if i % 2 else []
            xml(raw / f"{video}_annotations" / f"{video}_{i}.xml", *shown)
    table(raw / "lesion_info.csv", *rows)
    return raw


def sun(raw: Path) -> Path:
    """Cases 1 and 2 come from one examination, case 3 from another; case 1 has two clips that begin at 1."""
    exams = {1: "20181001100941_0U62372100109341", 2: "20181001100941_0U62372100109341", 3: "20190110094509_0U6"}
    table(raw / "metadata" / "sun_dataset_labels.csv", {"ID": 1, "Size": "6mm"}, {"ID": 2, "Size": "15mm-"},
          {"ID": 3, "Size": "3mm"})  # fmt: skip
    for case, exam in exams.items():
        lines = []
        for clip in ("a2", "a10") if case == 1 else ("a1",):
            for i in range(1, 4):
                name = f"case_M_{exam}_1_005_001-1_{clip}_ayy_image{i:04d}.jpg"
                draw(raw / f"part{1 + case // 3}" / f"case{case}" / name, i)
                lines.append(f"{name} {i},2,20,30,{int(i == 3)}")
        text(raw / "part1" / "annotation_txt" / f"case{case}.txt", "\n".join(lines) + "\n")
    draw(raw / "sundatabase_negative_part1" / "case1" / "other.jpg")
    return raw


def ham10000(raw: Path, name: str = "HAM10000_metadata.csv") -> Path:
    rows = [{"lesion_id": f"HAM_{i // 2}", "image_id": f"ISIC_{i:07d}", "dx": ("nv", "mel")[i // 2 % 2],
             "dx_type": "histo", "age": 45.0, "sex": "male", "localization": "back"} for i in range(12)]  # fmt: skip
    for i in range(12):
        draw(raw / f"HAM10000_images_part_{1 + i % 2}" / f"ISIC_{i:07d}.jpg", i)
    table(raw / name, *rows, sep="\t" if name.endswith(".tab") else ",")
    return raw


def isic2020(raw: Path) -> Path:
    rows = [{ID: f"ISIC_{i}", "patient_id": f"IP_{i // 2}", "sex": "female", "age_approx": 40,
             "anatom_site_general_challenge": "torso", "diagnosis": "nevus", "benign_malignant": "benign",
             "target": int(i % 4 == 0)} for i in range(12)]  # fmt: skip
    table(raw / "train.csv", *rows)
    table(raw / "test.csv", *({ID: f"ISIC_T{i}", "patient_id": f"IQ_{i}", "sex": "male"} for i in range(3)))
    table(raw / "sample_submission.csv", *({ID: f"ISIC_T{i}", "target": 0} for i in (2, 0, 1)))
    table(raw / "ISIC_2020_Training_Duplicates.csv", {"image_name_1": "ISIC_1", "image_name_2": "ISIC_5"})
    for split, names in (("train", [f"ISIC_{i}" for i in range(12)]), ("test", [f"ISIC_T{i}" for i in range(3)])):
        for i, name in enumerate(names):
            draw(raw / "jpeg" / split / f"{name}.jpg", i)
            text(raw / split / f"{name}.dcm", "a larger file than the JPEG " * 99)
    return raw


def isic2024(raw: Path) -> Path:
    rows = [{"isic_id": f"ISIC_{i}", "target": i % 2, "patient_id": f"IP_{i // 2}", "age_approx": 50, "sex": "male",
             "anatom_site_general": "head/neck", "tbp_lv_A": 0.5, "iddx_full": "Benign", "lesion_id": ""}
            for i in range(8)]  # fmt: skip
    table(raw / "train-metadata.csv", *rows)
    table(raw / "test-metadata.csv", *({"isic_id": f"ISIC_T{i}", "patient_id": "IP_9"} for i in range(3)))
    text(raw / "test-image.hdf5", "")
    for i in range(8):
        draw(raw / "train-image" / "image" / f"ISIC_{i}.jpg", i)
    return raw


def cholec80(raw: Path, videos: int = 2, seconds: int = 4) -> Path:
    """Films whose frame k has brightness 2 k. The first instrument is in even seconds of all videos, the second in one
    video, the rest in none but the third."""
    (raw / "videos").mkdir(parents=True)
    for v in range(1, videos + 1):
        lines = ["\t".join(["Frame", *TOOLS])]
        for s in range(seconds):
            cells = 25 * s, int(s % 2 == 0), int(v == 1), int(s > 0), *[0] * (len(TOOLS) - 3)
            lines.append("\t".join(map(str, cells)))
        text(raw / "tool_annotations" / f"video{v:02d}-tool.txt", "\n".join(lines) + "\n")
        film = cv2.VideoWriter(str(raw / "videos" / f"video{v:02d}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (64, 48))
        for k in range(25 * seconds):
            film.write(np.full((48, 64, 3), 2 * k, np.uint8))
        film.release()
    return raw


def endovis18(raw: Path, sequences: int = 4, frames: int = 4) -> Path:
    """Shaft in the first half of the frames, thread in one sequence, no clamps; a repaired one has a shaft."""
    for s in range(1, sequences + 1):
        home = raw / f"miccai_challenge_release_{1 + s // 3}" / f"seq_{s}"
        for i in range(frames):
            draw(home / "left_frames" / f"frame{i:03d}.png", 9 * i + s)
            draw(home / "right_frames" / f"frame{i:03d}.png")
            pixels = np.zeros((*SIZE[::-1], 3), np.uint8)
            pixels[0, 0] = COLOURS["instrument-shaft"] if i < frames // 2 else (0, 0, 0)
            pixels[1, 1] = COLOURS["thread"] if s == 1 else (0, 0, 0)
            (home / "labels").mkdir(exist_ok=True)
            cv2.imwrite(str(home / "labels" / f"frame{i:03d}.png"), pixels[..., ::-1])
    listed = [{"name": name, "color": colour, "classid": i} for i, (name, colour) in enumerate(COLOURS.items())]
    text(raw / "miccai_challenge_release_1" / "labels.json", json.dumps(listed))
    draw(raw / "test_data" / "seq_1" / "left_frames" / "frame000.png")
    return raw


# ---------------------------------------------------------------- helpers
TREES = {"real_colon": real_colon, "sun": sun, "ham10000": ham10000, "isic2020": isic2020, "isic2024": isic2024,
         "cholec80": cholec80, "endovis18": endovis18}  # fmt: skip


def run(name: str, raw: Path, output: Path, *more) -> Path:
    return call("prepare", name, raw, "--output_dir", output, *more)


def left(folder: Path) -> dict[str, list[str]]:
    """What was left out, by reason."""
    found = {}
    for row in csv.DictReader((folder / "left_out.csv").open()):
        found.setdefault(row["why"], []).append(row[ID])
    return found


def next_command(capsys) -> list[str]:
    line = capsys.readouterr().out.strip().splitlines()[-1]
    return shlex.split(line.removeprefix("next: python preprocess.py "))


def contents(folder: Path) -> dict[str, bytes]:
    """Files of an output but for prepare.json, which names the command."""
    return {path.name: path.read_bytes() for path in folder.glob("*.csv")}


# ---------------------------------------------------------------- every data set, end to end
@pytest.mark.parametrize("name", TREES)
def test_a_table_that_preprocess_takes_and_a_raw_folder_that_stays_as_it_was(name, tmp_path, capsys):
    raw = TREES[name](tmp_path / "raw")
    before = hashes(raw)
    folder = run(name, raw, tmp_path / "out")
    assert hashes(raw) == before
    assert sorted(path.name for path in folder.glob("*.part")) == []
    words = next_command(capsys)
    words = [word for word in words if word not in ("--n_folds", "6")]
    data = read_data(call("preprocess", *words, "--output_dir", tmp_path / "data", "--size", 32, "--n_folds", 2))
    table = read(folder / "train.csv")
    assert table.columns[0] == ID
    assert len(data.train) == len(table)
    assert (data.train.groupby(data.facts["group_col"], dropna=True)["fold"].nunique() == 1).all()
    assert all((folder / "images" / image).is_file() for image in table[ID])
    assert (data.test is not None) == (name == "isic2020")
    assert read_json(folder / "prepare.json")["counts"]["rows of train.csv"] == len(table)
    with pytest.raises(InputError, match="already finished; pass --overwrite"):
        run(name, raw, folder)
    run(name, raw, folder, "--overwrite")
    assert hashes(raw) == before


def test_real_colon(tmp_path):
    folder = run("real_colon", real_colon(tmp_path / "raw", videos=2), tmp_path / "out")
    table, boxes = read(folder / "train.csv"), read(folder / "boxes.csv")
    assert list(table) == [ID, "patient_id", "video", "lesion_id", "frame", "size_mm"]
    assert table[ID].tolist() == [f"001-{v:03d}_frames/001-{v:03d}_{i}.jpg" for v in (1, 2) for i in (7, 9, 11)]
    assert table.loc[5, ["patient_id", "video", "lesion_id", "frame", "size_mm"]].tolist() == [
        "001-002", "001-002", "001-002_1", 11, 7]  # fmt: skip
    assert boxes[ID].tolist() == table[ID].tolist()
    assert boxes.loc[5, CORNERS].tolist() == [5, 4, 17, 20]
    assert (folder / "images").is_symlink()
    assert left(folder) == {}
    assert read_json(folder / "prepare.json")["counts"]["frames without a lesion"] == 6


def test_archives_may_be_extracted_into_folders_of_their_own(tmp_path):
    raw = real_colon(tmp_path / "raw", videos=2)
    flat = contents(run("real_colon", raw, tmp_path / "flat"))
    for folder in [path for path in raw.iterdir() if path.is_dir()]:
        (raw / "x").mkdir()
        folder.rename(raw / "x" / folder.name)
        (raw / "x").rename(folder)
    (raw / "001-001_annotations" / "001-001_annotations" / "._001-001_7.xml").write_text("of macOS")
    (raw / "deep").mkdir()
    (raw / "lesion_info.csv").rename(raw / "deep" / "lesion_info.csv")
    deep = contents(run("real_colon", raw, tmp_path / "deep"))
    assert deep["train.csv"] == flat["train.csv"].replace(b"_frames/", b"_frames/X/").replace(
        b"001-001_frames/X", b"001-001_frames/001-001_frames").replace(
        b"001-002_frames/X", b"001-002_frames/001-002_frames")  # fmt: skip


def test_sun(tmp_path):
    folder = run("sun", sun(tmp_path / "raw"), tmp_path / "out")
    table = read(folder / "train.csv")
    assert table["lesion_id"].tolist() == ["case1"] * 4 + ["case2"] * 2 + ["case3"] * 2
    assert table["size_mm"].tolist() == [6] * 4 + [15] * 2 + [3] * 2
    assert table["patient_id"].nunique() == 2  # cases 1 and 2 were seen in one examination
    assert table["frame"].tolist() == [1, 2] * 4
    assert [video[-3:] for video in table["video"][:4]] == ["_a2", "_a2", "a10", "a10"]  # a2 comes before a10
    assert read(folder / "boxes.csv").loc[1, CORNERS].tolist() == [2, 2, 20, 30]
    assert left(folder) == {}


def test_ham10000_without_suffix_or_with_tabs(tmp_path):
    tables = [contents(run("ham10000", ham10000(tmp_path / name, name), tmp_path / f"out{name}"))
              for name in ("HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab")]  # fmt: skip
    assert tables[0] == tables[1] == tables[2]
    table = read(tmp_path / "outHAM10000_metadata" / "train.csv")
    assert table.loc[3].tolist() == ["HAM10000_images_part_2/ISIC_0000003.jpg", "HAM_1", "male", 45, "back", "mel"]


def test_isic_duplicates_and_the_names_of_a_submission(tmp_path):
    folder = run("isic2020", isic2020(tmp_path / "raw"), tmp_path / "out")
    assert left(folder) == {"a duplicate of another image": ["ISIC_5"]}
    table = read(folder / "train.csv")
    assert table[ID][0] == "jpeg/train/ISIC_0.jpg"  # not the DICOM file
    assert list(table)[1:] == ["patient_id", "sex", "age_approx", META_COLUMNS[2], "diagnosis", "target"]
    assert read(folder / "test.csv")[ID].tolist() == ["ISIC_T0", "ISIC_T1", "ISIC_T2"]
    assert read(folder / "sample_submission.csv")[ID].tolist() == ["ISIC_T2", "ISIC_T0", "ISIC_T1"]


def test_test_images_in_an_hdf5_file_are_said_and_left_out(tmp_path, capsys):
    folder = run("isic2024", isic2024(tmp_path / "raw"), tmp_path / "out")
    assert "3 test images are no files, so there is no test.csv" in capsys.readouterr().out
    assert not (folder / "test.csv").exists()
    assert read(folder / "train.csv")["anatom_site_general_challenge"].eq("head/neck").all()


def test_cholec80_decodes_the_annotated_frames_of_films(tmp_path, capsys):
    folder = run("cholec80", cholec80(tmp_path / "raw"), tmp_path / "out")
    table = read(folder / "train.csv")
    assert list(table) == [ID, "patient_id", "video", "frame", *TOOLS]
    assert table[ID].tolist() == [f"video{v:02d}/{k:06d}.jpg" for v in (1, 2) for k in (0, 25, 50, 75)]
    for image, frame in zip(table[ID], table["frame"], strict=True):
        assert cv2.imread(str(folder / "images" / image)).mean() == pytest.approx(2 * frame, abs=4)
    assert table["Grasper"].tolist() == [1, 0, 1, 0] * 2
    words = next_command(capsys)
    assert words[3:5] == ["Grasper", "Hook"]  # Bipolar is in one video only, others are in none
    assert words[5:] == ["--task", "multilabel", "--group_col", "video"]


def test_a_table_of_instruments_needs_its_header(tmp_path):
    raw = cholec80(tmp_path / "raw")
    path = raw / "tool_annotations" / "video02-tool.txt"
    path.write_text(path.read_text().partition("\n")[2])
    with pytest.raises(InputError, match=r"video02-tool\.txt has no header"):
        run("cholec80", raw, tmp_path / "out")


def test_endovis18_by_colour(tmp_path, capsys):
    raw = endovis18(tmp_path / "raw")
    fixed = np.zeros((*SIZE[::-1], 3), np.uint8)
    fixed[5, 5] = COLOURS["instrument-shaft"]
    (raw / "repairs").mkdir()
    cv2.imwrite(str(raw / "repairs" / "seq_1_frame003.png"), fixed[..., ::-1])
    table = read(run("endovis18", raw, tmp_path / "out") / "train.csv")
    assert table[ID][0] == "miccai_challenge_release_1/seq_1/left_frames/frame000.png"
    assert list(table) == [ID, "patient_id", "video", "frame", *COLOURS]
    assert table["instrument-shaft"].tolist() == [1, 1, 0, 1] + [1, 1, 0, 0] * 3  # the repaired file counts
    assert table["thread"].tolist() == [1] * 3 + [0] * 13
    out = capsys.readouterr().out
    assert "--target_col instrument-shaft --task multilabel --group_col video" in out
    assert "in one video only: background-tissue, thread, clamps" in out


# ---------------------------------------------------------------- faults
VIDEO = "001-001"
FRAMES, NOTES = f"{VIDEO}_frames/{VIDEO}_", f"{VIDEO}_annotations/{VIDEO}_"


def box(*corners, lesion=f"{VIDEO}_1", **size):
    return lambda raw: xml(raw / f"{NOTES}7.xml", (lesion, *corners), **size)


FAULTS = {
    "frame without annotation": ("real_colon", f"{FRAMES}7.jpg", lambda raw: (raw / f"{NOTES}7.xml").unlink()),
    "annotation without frame": ("real_colon", f"{NOTES}7.xml", lambda raw: (raw / f"{FRAMES}7.jpg").unlink()),
    "another file has its number": ("real_colon", f"{FRAMES}7.jpg", lambda raw: draw(raw / f"{FRAMES}07.jpg")),
    "no number at the end of its name": ("real_colon", f"{VIDEO}_frames/a.jpg", lambda raw: draw(
        raw / f"{VIDEO}_frames/a.jpg")),
    "broken XML": ("real_colon", f"{NOTES}7.xml", lambda raw: text(raw / f"{NOTES}7.xml", "<annotation><object>")),
    "unknown lesion id": ("real_colon", f"{NOTES}7.xml", box(1, 1, 9, 9, lesion="nobody")),
    "box is not four numbers": ("real_colon", f"{NOTES}7.xml", box(1, 1, "nan", 9)),
    "box is empty": ("real_colon", f"{NOTES}7.xml", box(9, 1, 9, 9)),
    "box lies outside the image": ("real_colon", f"{NOTES}7.xml", box(1, 1, SIZE[0] + 2, 9)),
    "size missing": ("real_colon", f"{NOTES}7.xml", lambda raw: table(
        raw / "lesion_info.csv", {"unique_object_id": f"{VIDEO}_1", "size [mm]": "large"},
        {"unique_object_id": "001-002_1", "size [mm]": 4})),
    "broken line": ("sun", "part1/annotation_txt/case3.txt line 1", lambda raw: text(
        raw / "part1/annotation_txt/case3.txt", "image1.jpg 1,2,3\n")),
    "annotation without image": ("ham10000", "ISIC_0000003", lambda raw: (
        raw / "HAM10000_images_part_2/ISIC_0000003.jpg").unlink()),
    "target missing": ("isic2020", "ISIC_3", lambda raw: (raw / "train.csv").write_text(
        (raw / "train.csv").read_text().replace("ISIC_3,IP_1,female,40,torso,nevus,benign,0", "ISIC_3,IP_1,,,,,,"))),
    "another row has its name": ("isic2020", "ISIC_3", lambda raw: (raw / "train.csv").write_text(
        (raw / "train.csv").read_text().replace("ISIC_7,", "ISIC_3,"))),
    "video without annotation": ("cholec80", "videos/video02.mp4", lambda raw: (
        raw / "tool_annotations/video02-tool.txt").unlink()),
    "annotation without frame ": ("endovis18", "miccai_challenge_release_1/seq_1/labels/frame000.png", lambda raw: (
        raw / "miccai_challenge_release_1/seq_1/left_frames").rename(raw / "away")),
    "broken image of labels": ("endovis18", "miccai_challenge_release_1/seq_1/labels/frame002.png", lambda raw: text(
        raw / "miccai_challenge_release_1/seq_1/labels/frame002.png", "")),
}  # fmt: skip


@pytest.mark.parametrize("why", FAULTS)
def test_a_fault_is_counted_and_listed_or_stops_the_work(why, tmp_path, capsys):
    name, who, spoil = FAULTS[why]
    why = why.strip()
    raw = TREES[name](tmp_path / "raw")
    sound = len(read(run(name, raw, tmp_path / "sound") / "train.csv"))
    assert left(tmp_path / "sound").keys() <= {"a duplicate of another image"}
    spoil(raw)
    folder = run(name, raw, tmp_path / "skip")
    found = left(folder)
    assert who in found[why]
    assert len(read(folder / "train.csv")) <= sound
    counts = read_json(folder / "prepare.json")["counts"]
    assert all(counts[reason] == len(names) for reason, names in found.items())
    assert f"{counts[why]} {why}" in capsys.readouterr().out
    with pytest.raises(InputError) as error:
        run(name, raw, tmp_path / "fail", "--on_error", "fail")
    assert str(raw) in str(error.value)
    assert str(error.value).endswith("; repair it, or pass --on_error skip")
    assert "\n" not in str(error.value)


def test_boxes_are_cut_to_the_image_and_the_largest_makes_the_row(tmp_path):
    raw = real_colon(tmp_path / "raw", videos=2)
    lesions = pd.read_csv(raw / "lesion_info.csv")
    table(raw / "lesion_info.csv", *lesions.to_dict("records"), {"unique_object_id": "001-001_2", "size [mm]": 20})
    shown = (f"{VIDEO}_1", 3, 3, 9, 9), (f"{VIDEO}_2", -1, 0, SIZE[0] + 1, 9), ("nobody", 0, 0, 40, 32)
    xml(raw / f"{NOTES}7.xml", *shown)
    folder = run("real_colon", raw, tmp_path / "out")
    assert read(folder / "train.csv").loc[0, ["lesion_id", "size_mm"]].tolist() == [f"{VIDEO}_2", 20]
    assert read(folder / "boxes.csv").loc[0, CORNERS].tolist() == [0, 0, SIZE[0], 9]
    assert left(folder) == {
        "unknown lesion id": [f"{NOTES}7.xml"], "a smaller box of the same frame": [f"{FRAMES}7.jpg"]}  # fmt: skip


def test_a_lesion_in_two_videos_and_in_no_order_is_no_trouble(tmp_path):
    raw = real_colon(tmp_path / "raw", videos=2)
    xml(raw / "001-002_annotations/001-002_7.xml", (f"{VIDEO}_1", 1, 1, 9, 9))
    lesions = pd.read_csv(raw / "lesion_info.csv")
    table(raw / "lesion_info.csv", *lesions.to_dict("records"), *lesions.to_dict("records"))
    for more in ([], ["--frames_per_lesion", 2]):
        found = read(run("real_colon", raw, tmp_path / f"out{len(more)}", *more) / "train.csv")
        assert found.loc[found["lesion_id"] == f"{VIDEO}_1", "video"].nunique() == 2


@pytest.mark.parametrize("name", TREES)
def test_what_is_not_there_is_said_in_one_line(name, tmp_path):
    (tmp_path / "raw" / "empty").mkdir(parents=True)
    with pytest.raises(InputError, match=f"raw is not laid out as {name}: it needs "):
        run(name, tmp_path / "raw", tmp_path / "out")
    with pytest.raises(InputError, match="nowhere is no folder; "):
        run(name, tmp_path / "nowhere", tmp_path / "out")
    for output in (tmp_path / "raw", tmp_path / "raw" / "out", tmp_path):
        with pytest.raises(InputError, match="one inside the other; pass another"):
            run(name, tmp_path / "raw", output)
    assert not (tmp_path / "out").exists()


def test_tables_that_are_none_are_named(tmp_path):
    raw = real_colon(tmp_path / "raw", videos=2)
    for content, what in (("unique_object_id,mm\n1,2\n", "has no column 'size \\[mm\\]'"), ("a\n1\n", "no column"),
                          ("unique_object_id,size [mm]\n1,2,3\n", "longer than the header")):  # fmt: skip
        text(raw / "lesion_info.csv", content)
        with pytest.raises(InputError, match=rf"lesion_info\.csv .*{what}.*; "):
            run("real_colon", raw, tmp_path / "out")
    (raw / "lesion_info.csv").write_bytes(b"\xff\xfe,\n")
    with pytest.raises(InputError, match=r"lesion_info\.csv is no readable table"):
        run("real_colon", raw, tmp_path / "out")
    text(raw / "lesion_info.csv", "unique_object_id,size [mm]\n1,2\n")
    with pytest.raises(InputError, match=r"no row is left .*'unknown lesion id': 6"):
        run("real_colon", raw, tmp_path / "out")
    draw(raw / "again" / f"{VIDEO}_frames" / "1.jpg")
    with pytest.raises(InputError, match="are both frames of 001-001; move one away"):
        run("real_colon", raw, tmp_path / "out")


# ---------------------------------------------------------------- drawing frames
def test_frames_of_a_lesion_are_drawn_evenly_over_its_time(tmp_path):
    raw = real_colon(tmp_path / "raw", videos=2, frames=80)
    every = read(run("real_colon", raw, tmp_path / "all") / "train.csv")
    drawn = [read(run("real_colon", raw, tmp_path / f"seed{i}", "--frames_per_lesion", 8, "--seed", seed) / "train.csv")
             for i, seed in enumerate((0, 0, 1))]  # fmt: skip
    assert drawn[0].equals(drawn[1])
    assert not drawn[0].equals(drawn[2])
    for table in drawn:
        assert table.groupby("lesion_id").size().tolist() == [8, 8]
        assert not table[ID].duplicated().any()
        for lesion, rows in table.groupby("lesion_id"):
            numbers = every.loc[every["lesion_id"] == lesion, "frame"].tolist()
            assert [numbers.index(frame) // 5 for frame in rows["frame"]] == list(range(8))  # 40 frames: one in each 5
    first, second = (rows["frame"].tolist() for _, rows in drawn[0].groupby("lesion_id"))
    assert first != second  # each lesion is drawn for itself
    boxes = read(tmp_path / "seed0" / "boxes.csv")
    assert boxes[ID].tolist() == drawn[0][ID].tolist()
    assert read(run("real_colon", raw, tmp_path / "many", "--frames_per_lesion", 99) / "train.csv").equals(every)
    assert read_json(tmp_path / "seed0" / "prepare.json")["counts"]["frames not drawn"] == 64
    with pytest.raises(InputError, match="--frames_per_lesion is for real_colon and sun; "):
        run("ham10000", ham10000(tmp_path / "ham"), tmp_path / "none", "--frames_per_lesion", 8)


# ---------------------------------------------------------------- stopping and starting
@pytest.mark.parametrize("name", ["real_colon", "sun", "cholec80", "endovis18"])
def test_a_stopped_call_goes_on_after_the_last_unit(name, tmp_path, monkeypatch):
    raw = TREES[name](tmp_path / "raw")
    whole = contents(run(name, raw, tmp_path / "whole"))
    kind, seen = prepare.DATASETS[name], []
    honest = kind.row

    def row(self, unit, *more):
        seen.append(unit)
        if len({*seen}) == 2:
            raise KeyboardInterrupt
        return honest(self, unit, *more)

    monkeypatch.setattr(kind, "row", row)
    with pytest.raises(KeyboardInterrupt):
        run(name, raw, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.csv"))
    monkeypatch.setattr(kind, "row", lambda self, unit, *more: seen.append(unit) or honest(self, unit, *more))
    with pytest.raises(InputError, match="was begun with on_error = skip, not fail; pass --overwrite"):
        run(name, raw, tmp_path / "out", "--on_error", "fail")
    first, seen[:] = seen[0], []
    assert contents(run(name, raw, tmp_path / "out")) == whole
    assert first not in seen
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".csv", ".json", ""}


def test_films_are_never_written_through_an_older_link(tmp_path):
    frames, films = endovis18(tmp_path / "frames"), cholec80(tmp_path / "films")
    folder, before = run("endovis18", frames, tmp_path / "out"), hashes(frames)
    run("cholec80", films, folder, "--overwrite")
    assert hashes(frames) == before
    assert not (folder / "images").is_symlink()
    with pytest.raises(InputError, match="images is no link; remove it"):
        run("endovis18", frames, folder, "--overwrite")
    assert (folder / "train.csv").exists()  # refused before anything was removed


def test_without_links_the_next_command_names_the_folder(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError("not allowed")

    raw = ham10000(tmp_path / "my raw")
    monkeypatch.setattr(Path, "symlink_to", refuse)
    run("ham10000", raw, tmp_path / "out")
    words = next_command(capsys)
    assert words[words.index("--image_dir") + 1] == str(raw)
    call("preprocess", *words, "--output_dir", tmp_path / "data", "--size", 32, "--n_folds", 2)


def test_surgical_frames_go_from_the_raw_folder_to_localized_features(tmp_path, capsys):
    """The baseline of Pang et al.: several labels, folds by video, the best epoch by mAP, features of the classes."""
    raw = cholec80(tmp_path / "raw", videos=4)
    folder = run("cholec80", raw, tmp_path / "out")
    words = next_command(capsys)
    small = ["--size", 64, "--n_folds", 2, "--frame", "whole", "--output_dir", tmp_path / "data"]
    data = call("preprocess", *words, *small)
    task = read_data(data).task
    assert (task.kind, task.metric) == ("multilabel", "ap")
    assert len(task.names) > 1
    where = ["--data_dir", data, "--runs_dir", tmp_path / "runs", "--loss", "bce", "--augment", "upright"]
    trained = call("train", "--model", "resnet", *where, *SMALL_MODEL, "--backbone", "resnet18")
    vectors = call("features", "--run", trained, "--route", "heat", "--pool", "original", "--t_class", 0,
                   "--output_dir", tmp_path / "features", "--device", "cpu")  # fmt: skip
    table, found = read(vectors / "train.csv"), np.load(vectors / "train.npy")
    assert found.shape == (len(table), 512)
    assert set(table["class"]) == set(task.names)
    assert set(table["image_name"]) == set(read(folder / "train.csv")["image_name"])
