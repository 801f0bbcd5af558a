"""An evaluation as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape

import numpy as np
from PIL import Image

from ..data import resampling
from ..data.readers import open_image
from ..errors import one_line
from ..inference.overlay import outline
from .files import Evaluation
from .tables import Table, notes, tables

MOST_PICTURES = 20
PICTURE_SIDE = 720  # pixels of the longer side of a picture
TRUTH, PREDICTION = (255, 255, 0), (0, 255, 255)  # yellow and cyan: distinct on stained tissue and to the color-blind
TRUTH_WIDTH, PREDICTION_WIDTH = 4, 2  # pixels; where both outlines meet, the truth shows on either side

STYLE = f"""
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff }}
body {{ max-width: 75rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1.5rem 0; font-variant-numeric: tabular-nums }}
caption {{ text-align: left; font-weight: 600; padding-bottom: .3rem }}
th, td {{ text-align: right; padding: .15rem .7rem; border-bottom: 1px solid #ddd }}
th:first-child {{ text-align: left; font-weight: 400; overflow-wrap: anywhere }}
thead th, thead th:first-child {{ font-weight: 600; border-bottom: 2px solid #888 }}
.scroll {{ overflow-x: auto }}
figure {{ margin: 1.5rem 0 }}
img {{ max-width: 100%; height: auto }}
.truth, .prediction {{ padding: 0 .4rem; color: #000 }}
.truth {{ background: rgb{TRUTH} }}
.prediction {{ background: rgb{PREDICTION} }}
"""


def page(evaluation: Evaluation, title: str, curves: bytes | None = None) -> str:
    """An HTML page: tables, the curves of the run, and the images with the lowest Dice with both outlines.

    title: what was evaluated; curves: a PNG file. Raises UserError for images that cannot be read any more.
    """
    of_images, *of_set = tables(evaluation)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{_text(title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{_text(title)}</h1>",
        *map(_table, of_set),
        *(f"<p>{_text(note)}</p>" for note in notes(evaluation)),
        *_pictures(evaluation),
    ]
    if curves is not None:
        parts += ["<h2>Training</h2>", f"<p>{_picture(curves, 'png', 'losses and scores over the epochs')}</p>"]
    parts += ["<h2>All images</h2>", _table(of_images), "</body>", "</html>"]
    return "\n".join(parts) + "\n"


def _pictures(evaluation: Evaluation) -> Iterator[str]:
    """The images with the lowest Dice of the first variant, the worst first."""
    dice = evaluation.variants[0].scores.dice
    worst = dice.argsort(stable=True)[:MOST_PICTURES].tolist()
    yield "<h2>Worst images</h2>"
    yield (
        f"<p>The {len(worst)} of {len(dice)} images with the lowest pixel Dice, the worst first. Outlines: "
        '<span class="truth">truth</span> <span class="prediction">prediction</span></p>'
    )
    for i in worst:
        name = evaluation.names[i]
        with open_image(evaluation.pairs[i].image) as reader:
            image = reader.read(0, 0, *reader.size)
        image = with_outlines(image, evaluation.truths[i], evaluation.predictions[i])
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=85)
        picture = _picture(file.getvalue(), "jpeg", f"{name} with the outlines of truth and prediction")
        yield f"<figure>{picture}<figcaption>{_text(name)}: pixel Dice {dice[i]:.4f}</figcaption></figure>"


def with_outlines(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The image (H, W, 3), resized to PICTURE_SIDE, with the outlines of both maps (H, W)."""
    height, width = image.shape[:2]
    scale = PICTURE_SIDE / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    image = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    for labels, color, thickness in ((truth, TRUTH, TRUTH_WIDTH), (prediction, PREDICTION, PREDICTION_WIDTH)):
        image = outline(image, resampling.nearest(labels, size), color, thickness)
    return image


def _table(table: Table) -> str:
    header = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.header)
    lines = [
        f'<tr><th scope="row">{_text(name)}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in table.rows
    ]
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table>\n<caption>{_text(table.title)}</caption>\n<thead><tr>{header}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _picture(content: bytes, kind: str, description: str) -> str:
    return f'<img src="data:image/{kind};base64,{base64.b64encode(content).decode()}" alt="{_text(description)}">'


def _text(text: str) -> str:
    return escape(one_line(text))
