"""Pieces of a page that needs nothing but itself: tables, pictures inside, a few lines of style and script."""

import base64
import io
from html import escape

import cv2
import numpy as np

STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
h2{margin-top:2em;border-bottom:1px solid #ccc}table{border-collapse:collapse;margin:.7em 0}
th,td{padding:.2em .7em;text-align:right;border-bottom:1px solid #e4e4e4}th{background:#f3f3f3;cursor:pointer}
th:first-child,td:first-child{text-align:left}figure{display:inline-block;margin:.3em .6em .6em 0;vertical-align:top}
figcaption{font-size:12px;max-width:26em;overflow-wrap:anywhere}.bad{color:#b00020;font-weight:600}
.good{color:#1b6e20;font-weight:600}dl{display:grid;grid-template-columns:10em 1fr}
dd{margin:0;overflow-wrap:anywhere}"""
SORT = """document.querySelectorAll('th').forEach(h=>h.onclick=()=>{const t=h.closest('table'),i=h.cellIndex,
d=h.dataset.d=h.dataset.d=='1'?'-1':'1',v=r=>r.cells[i].dataset.v??r.cells[i].textContent,
rows=[...t.tBodies[0].rows].sort((a,b)=>{const x=v(a),y=v(b),n=x-y;return d*(isNaN(n)?x.localeCompare(y):n)});
t.tBodies[0].append(...rows)})"""


def number(value, digits: int = 3) -> str:
    """A number or words for a cell; None is a dash."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float | np.floating) else str(value)


def table(head: list[str], rows: list[list], mark: dict[int, str] | None = None) -> str:
    """A table; mark: class ("good" or "bad") of rows by their number."""
    cells = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    body = []
    for i, row in enumerate(rows):
        style = f" class={mark[i]}" if mark and i in mark else ""
        body.append(f"<tr{style}>" + "".join(f"<td>{escape(number(value))}</td>" for value in row) + "</tr>")
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def facts(values: dict[str, str]) -> str:
    """Names and words."""
    return "<dl>" + "".join(f"<dt>{escape(key)}<dd>{escape(value)}" for key, value in values.items()) + "</dl>"


def picture(content: bytes, kind: str, size: tuple[int, int], alt: str, caption: str = "") -> str:
    """A picture of size (width, height) inside the page, with its text alternative."""
    data = base64.b64encode(content).decode()
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (f'<figure><img src="data:image/{kind};base64,{data}" width={size[0]} height={size[1]} '
            f'alt="{escape(alt, quote=True)}">{words}</figure>')  # fmt: skip


def photograph(pixels: np.ndarray, alt: str, caption: str = "") -> str:
    """Pixels uint8 (H, W, 3) as JPEG."""
    _, content = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return picture(content.tobytes(), "jpeg", pixels.shape[1::-1], alt, caption)


def drawing(figure, alt: str) -> str:
    """A matplotlib figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=80)
    width, height = (round(80 * side) for side in figure.get_size_inches())
    return picture(content.getvalue(), "png", (width, height), alt)


def page(title: str, sections: dict[str, str]) -> str:
    """A page of titled sections, those without content left out."""
    kept = {name: content for name, content in sections.items() if content}
    links = " · ".join(f'<a href="#s{i}">{escape(name)}</a>' for i, name in enumerate(kept))
    parts = (f"<section id=s{i}><h2>{escape(name)}</h2>{part}</section>" for i, (name, part) in enumerate(kept.items()))
    body = "".join(parts)
    return (f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1><nav>{links}</nav>"
            f"{body}<script>{SORT}</script></body></html>")  # fmt: skip
