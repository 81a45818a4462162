"""A page for people who do not write code: what a run or a blend says of a picture, and where it looked.

    python app.py --run example_data/runs/chipnet
    python app.py --run runs/ensemble --port 8000

Pictures go the way they go in predict.py; metadata that is not filled in counts as missing. Only this machine can open
the page unless --host says otherwise. A picture is removed once it is answered. Needs gradio, which takes an older
Pillow, whose pixels differ by a level here and there: pip install gradio in an environment of its own.
"""

import argparse
import base64
import os
from contextlib import suppress
from html import escape
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

import util
from calibration import calibrated
from inference import Images, draw_look, open_predictor
from plumbing.distributed import pick_device
from plumbing.images import SUFFIXES, configure_pillow, name_key, read_square
from plumbing.runs import Run, read_run
from util import ID, InputError

SIDE = 640  # longest side, in pixels, of the picture that is shown
CSS = """.answer .prose {display: flex; flex-wrap: wrap; align-items: center} .answer p {flex-basis: 100%}
.answer img {flex: 1 1 40em; min-width: 0}"""


def answer(run: Run, predictor, path: Path, meta: dict[str, str]) -> str:
    """HTML of what a run says of an image file and its metadata by column. Raises InputError."""
    square, size = read_square(path, predictor.size, predictor.exact, predictor.frame)
    table = pd.read_csv(StringIO(pd.DataFrame([{ID: 0} | meta]).to_csv(index=False)))  # cells as predict.py has them
    table[ID] = name_key(path.name)
    images, found = Images(table, [path], square[None], [size]), {}
    predictor.predict(images, found)
    shown = {predictor.name: found.pop(predictor.name)} | found  # a blend before its members
    if fit := run.metrics["calibration"]:
        shown["calibrated"] = calibrated(run.task, shown[predictor.name], fit)
    cells = pd.DataFrame({name: values[0] for name, values in shown.items()}, run.task.names)
    cells = cells.rename_axis(columns="probability" if run.task.probabilistic else "prediction")
    draw_look(path, size, predictor.look(images), 0, SIDE).savefig(png := BytesIO(), format="png", dpi=160)
    seen = table[ID].isin(run.table("oof.csv")[ID].map(name_key)).any()
    note = "<p>A training image has this name: the networks may have learned from it.</p>" if seen else ""
    png = base64.b64encode(png.getvalue()).decode()
    head = f'<p>{escape(path.name)}</p><img src="data:image/png;base64,{png}" alt="picture, box, map, crop">'
    return head + cells.to_html(float_format="%.3f") + note


def make_page(gradio, run: Run, predictor, max_mb: int):
    """The page (gradio.Blocks): a field per column of metadata, one for a picture, and the answer."""
    columns = sorted(predictor.meta_columns())

    async def stay(path: str) -> str:
        """Where a picture lies that was sent; gradio would fetch one whose address was sent instead."""
        return path

    def reply(upload: dict, *values: str) -> tuple[None, str]:
        """Empty the field for the next picture, and answer this one; gradio lets one in at a time."""
        sent = Path(upload["path"])  # in gradio's folder, as it has checked, or an address
        if not sent.is_file():
            return None, f"<p>{escape(sent.name)} was sent twice and is removed after one answer; send it again</p>"
        try:
            return None, answer(run, predictor, sent, dict(zip(columns, values, strict=True)))
        except InputError as error:
            return None, f"<p>{escape(str(error).replace(str(sent), sent.name))}</p>"
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
        picture.async_move_resource_to_block_cache = stay
        picture.upload(reply, [picture, *fields], [picture, result], preprocess=False, api_name="predict")
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


def get_args_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = util.new_parser(__doc__, "device")
    add = parser.add_argument
    add("--run", type=Path, required=True, help="finished run or blend")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in")
    add("--port", type=util.number(int, 1, 65535), default=7860, help="port to listen at")
    add("--max_mb", type=util.COUNT, default=32, help="largest file, in MB")
    return parser


if __name__ == "__main__":
    util.run_script(main, get_args_parser())
