"""A page for people who do not write code: what a run or a blend says of a picture, and where it looked.

    python app.py --run example_data/runs/chipnet
    python app.py --run runs/ensemble --port 8000

Pictures go the way they go in predict.py; metadata that is not filled in counts as missing. Needs gradio (pip install
gradio). Only this machine can open the page unless --host says otherwise. A picture is removed once it is answered.
"""

import argparse
import base64
import os
import shutil
import threading
from contextlib import suppress
from html import escape
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from PIL import Image

import util
from calibration import calibrated
from inference import Images, Look, open_predictor
from localize import upsample
from plumbing.distributed import pick_device
from plumbing.figures import draw_picture, draw_row, new_figure
from plumbing.images import SUFFIXES, configure_pillow, name_key, read_image, read_square
from plumbing.runs import Run, read_run
from util import ID, InputError

SIDE = 640  # longest side, in pixels, of the picture that is shown
CSS = """.answer .prose {display: flex; flex-wrap: wrap; align-items: center} .answer p {flex-basis: 100%}
.answer img {flex: 1 1 40em; min-width: 0}"""
ONE = threading.Lock()  # pictures wait for each other: a large one takes a lot of memory


def draw(path: Path, size: tuple[int, int], look: Look | None) -> bytes:
    """PNG of a picture of `size` (width, height); if the run looks somewhere, with its box, map and crop."""
    image, figure = read_image(path, SIDE)[0], new_figure(figsize=(9, 3.2))
    image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
    if look is None:
        draw_picture(figure.subplots(), np.asarray(image), size)
    else:
        axes, crops = figure.subplots(1, 3), np.concatenate(look.crops[0, : len(look.boxes[0])], axis=1)
        draw_row(axes, np.asarray(image), size, look.boxes[0], upsample(look.maps[0]), crops, look.frame)
        for axis, title in zip(axes, ("box", look.boxes[0][0].reason or "map", "crop"), strict=True):
            axis.set_title(title, fontsize=9)
    figure.savefig(png := BytesIO(), format="png", dpi=160)
    return png.getvalue()


def answer(run: Run, predictor, path: Path, meta: dict) -> str:
    """HTML of what a run says of an image file and its metadata by column (None: missing). Raises InputError."""
    square, size = read_square(path, predictor.size, predictor.exact, predictor.frame)
    table = pd.DataFrame({ID: [name_key(path.name)]} | {column: [value] for column, value in meta.items()})
    images, found = Images(table, [path], square[None], [size]), {}
    predictor.predict(images, found)
    shown = {predictor.name: found.pop(predictor.name)} | found  # a blend before its members
    if fit := run.metrics["calibration"]:
        shown["calibrated"] = calibrated(run.task, shown[predictor.name], fit)
    cells = pd.DataFrame({name: values[0] for name, values in shown.items()}, run.task.names)
    cells = cells.rename_axis(columns="probability" if run.task.probabilistic else "prediction")
    png = base64.b64encode(draw(path, size, predictor.look(images))).decode()
    seen = table[ID].isin(run.table("oof.csv")[ID].map(name_key)).any()
    note = "<p>A training image has this name: the networks may have learned from it.</p>" if seen else ""
    head = f'<p>{escape(path.name)}</p><img src="data:image/png;base64,{png}" alt="picture, box, map, crop">'
    return head + cells.to_html(float_format="%.3f") + note


def make_page(gradio, run: Run, predictor, max_mb: int):
    """The page (gradio.Blocks): a field per column of metadata, one for a picture, and the answer."""
    columns = sorted(predictor.meta_columns())

    def reply(upload: dict, *values: str) -> tuple[None, str]:
        """Empty the field for the next picture, and answer this one."""
        sent = Path(upload["path"])  # in gradio's folder, as it has checked
        meta = {column: value or None for column, value in zip(columns, values, strict=True)}
        try:
            with TemporaryDirectory() as own:
                path = Path(shutil.copy(sent, own))  # who sends the same picture meanwhile sends the same file
                with ONE:
                    return None, answer(run, predictor, path, meta)
        except FileNotFoundError:
            return None, f"<p>{escape(sent.name)} was sent twice and is removed after one answer; send it again</p>"
        except InputError as error:
            return None, f"<p>{escape(str(error).replace(str(path), path.name))}</p>"
        finally:
            sent.unlink(missing_ok=True)
            with suppress(OSError):
                sent.parent.rmdir()

    with gradio.Blocks(title=run.name, fill_width=True, delete_cache=(600, 600)) as page:  # seconds
        kinds = f"{', '.join(SUFFIXES)}; at most {max_mb} MB"
        gradio.Markdown(f"# {run.name}\n**Not for clinical use.** Send a picture ({kinds}). Nothing of it is kept.")
        hint = "as in the training table; fill in before the picture, or it counts as missing"
        with gradio.Row():
            fields = [gradio.Textbox(label=column, info=hint) for column in columns]
        picture, result = gradio.File(label="picture", height=140), gradio.HTML(elem_classes="answer")
        inputs, how = [picture, *fields], {"preprocess": False, "concurrency_limit": None, "api_name": "predict"}
        picture.upload(reply, inputs, [picture, result], **how)
    return page


def main(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C; whatever gradio keeps is then gone. Raises InputError."""
    with TemporaryDirectory() as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
        try:
            import gradio
        except ImportError:
            raise InputError("app.py needs gradio, which is not installed; pip install 'gradio>=6'") from None
        configure_pillow()
        run = read_run(args.run)
        page = make_page(gradio, run, open_predictor(run, pick_device(args.device), None, "off"), args.max_mb)
        print(f"http://{args.host}:{args.port} shows {args.run}; Ctrl-C ends it", flush=True)
        try:
            page.launch(server_name=args.host, server_port=args.port, max_file_size=f"{args.max_mb}mb", css=CSS,
                        share=False, ssr_mode=False, mcp_server=False, enable_monitoring=False, footer_links=[],
                        inline=False, quiet=True)  # fmt: skip
        except OSError as error:
            raise InputError(f"--host {args.host} --port {args.port}: {error}; pass others") from None


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__, "device")
    add = parser.add_argument
    add("--run", type=Path, required=True, help="finished run or blend")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in")
    add("--port", type=util.number(int, 1, 65535), default=7860, help="port to listen at")
    add("--max_mb", type=util.COUNT, default=32, help="largest file, in MB")
    return parser
# fmt: on


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
