"""The page: it says what predict.py says, keeps nothing, listens on this machine alone, and works in a browser."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_MODEL, call, read
from PIL import Image

import app
from inference import open_predictor
from plumbing.data import MetaEncoder
from plumbing.runs import read_run
from util import InputError

RUN, PICTURES = ROOT / "example_data" / "runs" / "chipnet", ROOT / "example_data" / "images"
CPU = torch.device("cpu")


def opened(path):
    run = read_run(path)
    return run, open_predictor(run, CPU, None, "off")


def numbers(html):
    """The cells of an answer's table."""
    return [float(text) for text in re.findall(r"<td>(.*?)</td>", html)]


# ---------------------------------------------------------------- the answer
@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A JPEG that EXIF turns, a TIFF with 16 bits per colour and the name of a training image, and a DICOM file."""
    folder = tmp_path_factory.mktemp("pictures")
    image = Image.open(PICTURES / "EX_0161.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(folder / "turned.jpg", exif=turned)
    deep = np.asarray(image.resize((320, 240))).astype(np.uint16) * 257
    cv2.imwrite(str(folder / "EX_0000.tif"), deep[..., ::-1])
    if find_spec("pydicom"):
        import pydicom

        facts = pydicom.Dataset()
        facts.file_meta = pydicom.dataset.FileMetaDataset()
        facts.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        facts.file_meta.MediaStorageSOPClassUID = facts.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
        facts.file_meta.MediaStorageSOPInstanceUID = facts.SOPInstanceUID = pydicom.uid.generate_uid()
        facts.Rows, facts.Columns, facts.SamplesPerPixel, facts.PixelRepresentation = 240, 320, 1, 0
        facts.BitsAllocated, facts.BitsStored, facts.HighBit = 16, 16, 15
        facts.PhotometricInterpretation, facts.PixelData = "MONOCHROME2", deep[..., 1].tobytes()
        facts.save_as(folder / "grey.dcm", enforce_file_format=True)
    return folder


def test_a_run_says_of_any_file_what_predict_says(pictures, tmp_path):
    words = ["--run", RUN, "--output", tmp_path / "out", "--device", "cpu", "--no-pictures", pictures]
    table = read(call("predict", *words) / "predictions.csv").set_index("image_name")
    run, predictor = opened(RUN)
    assert len(table) >= 2
    for path in pictures.iterdir():
        html = app.answer(run, predictor, path, {})
        expected = table.loc[path.stem, ["prob", "calibrated"]].to_numpy(float)
        assert np.allclose(numbers(html), expected, atol=6e-4), path
        assert path.name in html
        assert ("A training image has this name" in html) == (path.stem == "EX_0000")


@pytest.fixture(scope="module")
def blend(data_dir, tmp_path_factory):
    """A blend of two runs that look nowhere and know metadata."""
    where = ["--data_dir", data_dir, "--runs_dir", tmp_path_factory.mktemp("app")]
    run = call("train", "--model", "resnet", "--fold", 0, *where, *SMALL_MODEL)
    shutil.copytree(run, run.with_name("<again>"))
    return call("ensemble", "mean", *where, "--name", "both", "--runs", "resnet", "<again>")


def test_fields_are_metadata_and_a_picture_is_removed_once_it_is_answered(blend, source, tmp_path):
    gradio = mock.MagicMock()
    run, predictor = opened(blend)
    app.make_page(gradio, run, predictor, 5)
    assert "Not for clinical use" in gradio.Markdown.call_args[0][0]
    assert [made[1]["label"] for made in gradio.Textbox.call_args_list] == sorted(predictor.meta_columns())
    reply, encoded, real = gradio.File.return_value.upload.call_args[0][0], [], MetaEncoder.encode
    meta, odd = tmp_path / "meta.csv", tmp_path / "odd.csv"
    meta.write_text("image_name,sex,age_approx\n0024,male,40\n")
    odd.write_text("image_name,sex,age_approx\n0024,TRUE,n/a\n")
    words = ["--run", blend, "--device", "cpu", "--no-pictures", source / "images" / "0024.jpg"]

    def encode(*args):
        encoded[-1].append(real(*args))
        return encoded[-1][-1]

    cases = (["--csv", meta], ("40", "", "male")), ([], ("", "", "")), (["--csv", odd], ("n/a", None, "TRUE"))
    for i, (csv, values) in enumerate(cases):
        (tmp_path / "hash").mkdir()
        sent = Path(shutil.copy(source / "images" / "0024.jpg", tmp_path / "hash"))
        with mock.patch.object(MetaEncoder, "encode", encode):
            encoded.append([])
            empty, html = reply({"path": str(sent)}, *values)
            encoded.append([])
            table = read(call("predict", *words, *csv, "--output", tmp_path / f"out{i}") / "predictions.csv")
        assert empty is None
        assert numbers(html) == pytest.approx(table.loc[0, ["prob", "resnet", "<again>"]].tolist(), abs=6e-4)
        assert re.findall("<th>(.*?)</th>", html)[:4] == ["probability", "both", "resnet", "&lt;again&gt;"]
        here, there = (np.concatenate(each, axis=1) for each in encoded[-2:])
        assert np.array_equal(here, there)
        assert not sent.parent.exists()
    assert not np.array_equal(encoded[0][0], encoded[2][0])
    sent = tmp_path / "text<b>.jpg"
    sent.write_text("no image")
    html = reply({"path": str(sent)}, "", "", "")[1]
    assert html.startswith("<p>text&lt;b&gt;.jpg is no readable JPEG")
    assert tempfile.gettempdir() not in html
    assert not sent.exists()
    assert "send it again" in reply({"path": str(sent)}, "", "", "")[1]  # two people sent the same picture


def test_without_gradio_or_a_free_port_there_is_one_line(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match="pip install 'gradio"):
        call("app", "--run", RUN)
    gradio = mock.MagicMock()
    page = gradio.Blocks.return_value.__enter__.return_value
    page.launch.side_effect = OSError("Cannot find empty port")
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    with pytest.raises(InputError, match="--port 9: Cannot find empty port; pass others"):
        call("app", "--run", RUN, "--port", 9, "--device", "cpu")
    assert page.launch.call_args[1]["server_name"] == "127.0.0.1"
    assert not Path(os.environ["GRADIO_TEMP_DIR"]).exists()


# ---------------------------------------------------------------- the server
@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Address of the page and the folder of its temporary files, of which a polite kill leaves none."""
    if not find_spec("gradio"):
        pytest.skip("gradio is not installed")
    folder = tmp_path_factory.mktemp("temporary")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", "--run", RUN, "--device", "cpu", "--port", str(port), "--max_mb", "1"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(folder)}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    for _ in range(1200):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0 or process.poll() is not None:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/", folder
    process.terminate()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert [path for path in folder.iterdir() if not path.name.startswith("torchinductor")] == []


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def fetch(url, body=None, kind=""):
    with urlopen(Request(url, body, {"Content-Type": kind})) as reply:
        return reply.read()


def upload(url, name, content):
    """Send a file; returns where the server put it."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + b"\r\n--x--\r\n"
    return json.loads(fetch(f"{url}gradio_api/upload", body, "multipart/form-data; boundary=x"))[0]


def ask(url, path, **more):
    """What the server says of a picture that lies there: a list that ends in HTML, or an error."""
    question = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}} | more]}
    event = json.loads(fetch(f"{url}gradio_api/call/predict", json.dumps(question).encode(), "application/json"))
    lines = fetch(f"{url}gradio_api/call/predict/{event['event_id']}").decode().splitlines()
    return json.loads(lines[1].removeprefix("data: "))


def test_requests_at_once_are_answered_and_nothing_is_kept(served, tmp_path):
    url, folder = served
    names = ["EX_0161", "EX_0162", "EX_0165"]
    sent = [upload(url, f"{name}.jpg", (PICTURES / f"{name}.jpg").read_bytes()) for name in names]
    assert len(files(folder)) == 3
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(partial(ask, url), sent))
    expected = read(RUN / "submission.csv").set_index("image_name")["target"]
    assert np.allclose([numbers(html)[0] for _, html in found], expected[names], atol=6e-4)
    assert files(folder) == []
    with pytest.raises(HTTPError, match="413"):
        upload(url, "large.jpg", bytes(2**20 + 1))
    private = Path(shutil.copy(PICTURES / "EX_0161.jpg", tmp_path))  # what was not sent is neither read nor removed
    assert "error" in ask(url, str(private))
    assert private.exists()
    assert "send it again" in ask(url, "http://example.com/x.jpg")[1]  # nor is anything fetched
    assert "send it again" in ask(url, "http://example.com/x.jpg", is_stream=True)[1]
    assert files(folder) == []
    with socket.socket() as other:  # another address of this machine
        assert other.connect_ex(("127.0.0.2", int(url.rpartition(":")[2][:-1]))) != 0


# ---------------------------------------------------------------- the page in a browser
@pytest.fixture
def browser(tmp_path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium or chromedriver is not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for word in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-component-update",
                 "disable-background-networking", "disable-sync", "window-size=1200,800",
                 f"user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def test_a_browser_shows_the_answer_and_asks_no_other_server(served, browser, tmp_path):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    url, folder = served

    def wait(selector, text=""):
        def shown(driver):
            return [one for one in driver.find_elements("css selector", selector) if text in one.text]

        return WebDriverWait(browser, 60, ignored_exceptions=[StaleElementReferenceException]).until(shown)[0]

    def send(path):
        wait("input[type=file]").send_keys(str(path))

    browser.get(url)
    send(PICTURES / "EX_0161.jpg")
    picture = wait(".answer img")
    assert browser.execute_script("return arguments[0].naturalWidth > 1000", picture)
    wait("body", "Not for clinical use")
    expected = read(RUN / "submission.csv").set_index("image_name")["target"]["EX_0161"]
    assert float(wait(".answer td").text) == pytest.approx(expected, abs=6e-4)
    assert wait(".answer table").rect["x"] > picture.rect["x"] + picture.rect["width"] - 9  # side by side
    (tmp_path / "text.jpg").write_text("no image")
    send(tmp_path / "text.jpg")
    assert len(wait(".answer", "text.jpg is no readable JPEG").text.splitlines()) == 1
    (tmp_path / "large.jpg").write_bytes(bytes(2**20 + 1))
    send(tmp_path / "large.jpg")
    wait(".toast-body", "maximum allowed size")
    assert files(folder) == []
    kept = "return indexedDB.databases().then(found => [found.length, localStorage.length])"
    assert browser.execute_script(kept) == [0, 0]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert len(asked) > 10
    assert {one for one in asked if not one.startswith((url, "data:", "blob:", "chrome:"))} == set()
