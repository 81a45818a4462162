"""Image files of every format that is read, and where they are found."""

import numpy as np
import pytest
from PIL import Image

from plumbing.images import read_image, read_square
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
