"""Image files of every format that is read, and pictures that are seen whole."""

import numpy as np
import pytest
from conftest import SMALL_CROP, SMALL_MODEL, call, read
from PIL import Image

from localize import find_box, widen
from plumbing.images import cut, frame_of, read_image, read_square
from util import InputError

GREY = np.linspace(0, 65535, 64 * 48).reshape(48, 64)


@pytest.mark.parametrize(("suffix", "options"), [("webp", {"lossless": True}), ("tif", {}), ("TIFF", {}), ("png", {})])
def test_formats_are_read_as_they_were_written(tmp_path, suffix, options):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **options)
    image, size = read_image(tmp_path / f"a.{suffix}")
    assert (np.asarray(image) == pixels).all()
    assert size == (64, 48)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_to_8(tmp_path, suffix):
    import cv2

    grey = GREY.astype(np.uint16)
    cv2.imwrite(str(tmp_path / f"grey.{suffix}"), grey)
    expected = np.rint(grey / 257).astype(np.uint8)
    assert np.abs(np.asarray(read_image(tmp_path / f"grey.{suffix}")[0])[..., 0].astype(int) - expected).max() <= 1
    color = np.stack([grey, grey[::-1], grey // 2], axis=2)  # blue, green, red
    cv2.imwrite(str(tmp_path / f"color.{suffix}"), color)
    found = np.asarray(read_image(tmp_path / f"color.{suffix}")[0]).astype(int)
    assert np.abs(found - color[..., ::-1] / 257).max() <= 1.5


def test_of_several_pages_the_first_is_read_and_said(tmp_path, capsys):
    pages = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    square, _ = read_square(tmp_path / "a.tif", 8)
    assert (square == (255, 0, 0)).all()
    assert "2 pages" in "".join(capsys.readouterr())


def test_floating_point_pixels_are_refused(tmp_path):
    (tmp_path / "empty.tif").touch()
    with pytest.raises(InputError, match=r"empty\.tif"):
        read_image(tmp_path / "empty.tif")
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif.*floating"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("inverted", [False, True])
def test_dicom_is_seen_through_its_window(tmp_path, inverted):
    pydicom = pytest.importorskip("pydicom")
    facts = pydicom.Dataset()
    facts.file_meta = pydicom.dataset.FileMetaDataset()
    facts.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    facts.file_meta.MediaStorageSOPClassUID = facts.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    facts.file_meta.MediaStorageSOPInstanceUID = facts.SOPInstanceUID = pydicom.uid.generate_uid()
    facts.Rows, facts.Columns, facts.SamplesPerPixel, facts.PixelRepresentation = 48, 64, 1, 0
    facts.BitsAllocated = facts.BitsStored = 16
    facts.HighBit, facts.RescaleSlope, facts.RescaleIntercept = 15, 1, -1000
    facts.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    facts.WindowCenter, facts.WindowWidth = 1000, 400  # of 800 to 1200 after the rescaling
    raw = np.linspace(0, 4000, 64 * 48).reshape(48, 64).astype(np.uint16)
    facts.PixelData = raw.tobytes()
    facts.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    image, size = read_image(tmp_path / "a.dcm")
    expected = np.clip((raw - 1000.0 - 800) / 400, 0, 1)
    expected = 255 * (1 - expected if inverted else expected)
    assert size == (64, 48)
    assert np.abs(np.asarray(image)[..., 0] - expected).max() < 2
    (tmp_path / "b.dcm").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"b\.dcm"):
        read_image(tmp_path / "b.dcm")


# ---------------------------------------------------------------- the whole picture
def test_where_a_box_leaves_the_image_it_is_mirrored():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    whole = cut(image, frame_of(64, 32, "whole"), 64, (64, 32))
    assert (whole[16:48] == pixels).all()
    assert (whole[:16] == pixels[16:0:-1]).all()
    assert (whole[48:] == pixels[30:14:-1]).all()
    half = cut(image, frame_of(64, 32, "whole"), 32, (64, 32)).astype(int)
    small = np.asarray(image.resize((32, 16), Image.Resampling.BILINEAR)).astype(int)
    assert (half[8:24] == small).all()
    assert cut(image, (50, -10, 90, 30), 20, (64, 32)).shape == (20, 20, 3)
    line = Image.fromarray(pixels[:1])
    assert cut(line, frame_of(64, 1, "whole"), 16, (64, 1)).shape == (16, 16, 3)  # a picture of one row


def test_the_whole_picture_from_the_table_to_new_images(source, tmp_path, capsys):
    words = ["--train_csv", source / "train.csv", "--size", 64, "--n_folds", 2]
    call("preprocess", *words, "--output_dir", tmp_path / "square")
    assert "leaves out 25% of the median picture" in capsys.readouterr().out
    data = call("preprocess", *words, "--output_dir", tmp_path / "data", "--frame", "whole")
    table = read(data / "train.csv")
    where = ["--data_dir", data, "--runs_dir", tmp_path / "runs"]
    call("train", "--model", "chipnet", *where, *SMALL_MODEL)
    crops = call("crop", "--run", tmp_path / "runs" / "chipnet", "--data_dir", data, *SMALL_CROP, "--views", 1)
    maps, boxes = np.load(crops / "train_attention.npy"), read(crops / "train_boxes.csv")
    wide = np.flatnonzero(table["width"] > table["height"])
    assert (maps[wide][:, :2] == 0).all()  # 16 cells for 96 px: the picture is 12 cells high
    assert (maps[wide][:, 2:-2].sum(axis=(1, 2)) > 0.999).all()
    found = boxes["fallback"].isna().to_numpy()
    assert (boxes[["x0", "y0"]][found] >= 0).all(axis=None)
    call("train", "--model", "cropnet", *where, *SMALL_MODEL)
    out = call("predict", "--run", tmp_path / "runs" / "cropnet", "--output", tmp_path / "out", "--device", "cpu",
               source / "images" / "0024.jpg", "--csv", source / "test.csv")  # fmt: skip
    test = read(tmp_path / "runs" / "cropnet" / "test_predictions.csv").groupby("image_name")["prob"].mean()
    assert read(out / "predictions.csv")["prob"].item() == pytest.approx(test["0024"], abs=1e-4)


def test_boxes_lie_anywhere_in_a_wide_picture_and_never_in_its_padding():
    attention = np.full((28, 28), 1e-4, np.float32)
    attention[13:15, 24:26] = 1  # far right, outside the centre square of a picture of 800 x 400
    attention[2:6, 2:6] = 50  # padding
    box = find_box(attention, (800, 400), frame="whole", centre=0)
    assert box.reason == ""
    assert box.x0 < 24 / 28 * 800 < 26 / 28 * 800 < box.x1
    assert 0 <= box.y0 < 200 < box.y1 <= 400
    wide = np.full((28, 28), 1e-4, np.float32)
    wide[13:15, 6:22] = 1  # longer than the picture is high: the square leaves it on two sides alike
    box = find_box(wide, (800, 400), frame="whole")
    assert box.side > 400
    assert box.y0 + box.y1 == pytest.approx(400)
    flat = find_box(np.ones((28, 28)), (800, 400), frame="whole")
    assert (flat.corners, flat.reason) == ((0, -200, 800, 600), "flat map")
    assert widen(flat, 1.4, (800, 400)).corners == flat.corners
