"""Tables, CSV, JSON and the HTML page of an evaluation."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semimoe_fast.data.folders import Pair
from semimoe_fast.evaluation import metrics, page, score_images, summarize
from semimoe_fast.evaluation.files import Evaluation, Variant
from semimoe_fast.evaluation.tables import _short, as_csv, as_json, as_text, notes, tables

LONG = f"case_{'x' * 40}_tile_7"
HOSTILE = '<script>alert("1")<b>&, =a'
HARD = Path("a\nb\u2028c\udcff.png")
VOID = {"meta", "img"}


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    """Three images, the second of which has an empty prediction; scored at 0.5 and at 0.6."""
    truth = np.zeros((24, 40), ">u2")  # big-endian, as Pillow gives some TIFF files
    truth[4:12, 4:12], truth[4:12, 12:30] = 1, 300
    half = [truth > 0, np.zeros((24, 40), bool), np.roll(truth > 0, 5, 0)]
    swept = [np.roll(mask, 1, 1) for mask in half]
    pairs = []
    for name in ("first", LONG, HOSTILE):
        path = tmp_path / f"{name}.png"
        Image.fromarray(np.full((24, 40, 3), 200, np.uint8)).save(path)
        pairs.append(Pair(path, path))
    variants = []
    for threshold, masks in ((0.5, half), (0.6, swept)):
        scores = score_images(masks, [truth] * 3)
        variants.append(Variant("gated", threshold, threshold != 0.5, scores, summarize(scores, 100)))
    counts = {
        name: torch.stack(
            [metrics.count(torch.from_numpy(mask)[None].float(), torch.ones(1, 24, 40))[0] for mask in half]
        )
        for name in ("gated", "mask expert", "boundary expert")
    }
    return Evaluation(pairs, half, [truth] * 3, variants, counts)


def test_tables_fit_a_terminal_and_show_undefined_scores(evaluation: Evaluation) -> None:
    of_images, of_set, of_experts = map(as_text, tables(evaluation))
    for text in (of_images, of_set, of_experts):
        assert max(map(len, text.splitlines())) <= 120
        assert len({len(line) for line in text.splitlines()[1:]}) == 1
    assert re.search(r"^first +1\.0000 +1\.0000 +0\.6667 +0\.\d+ +\d+\.\d\d +0\.00 +0\.00$", of_images, re.MULTILINE)
    assert re.search(r"^\.\.\.x+_tile_7 +(0\.0000 +){4}- +- +-$", of_images, re.MULTILINE)
    assert "swept at 0.60" in of_set
    assert re.search(r"^mean hd95 +\d\.\d\d +0\.00 to \d\.\d\d", of_set, re.MULTILINE)
    assert re.search(r"^predicted objects +2 +- +2 +-$", of_set, re.MULTILINE)  # each mask joins both objects
    assert re.search(r"^true objects +6 +- +6 +-$", of_set, re.MULTILINE)
    assert re.search(r"^boundary expert +0\.\d{4}", of_experts, re.MULTILINE)
    assert "distances of gated at 0.50: 1 of 3 images are left out of the means" in "\n".join(notes(evaluation))


def test_notes_say_what_intervals_hold(evaluation: Evaluation) -> None:
    text = "\n".join(notes(evaluation))
    assert "fewer than 20 images: the intervals are too narrow" in text
    assert "their intervals hold the threshold fixed" in text
    many = dataclasses.replace(evaluation, pairs=evaluation.pairs * 7)
    assert "fewer than" not in "\n".join(notes(many))


def test_names_are_printable_and_the_same_in_all_outputs(evaluation: Evaluation) -> None:
    """File names may have line breaks and bytes that are not UTF-8."""
    found = dataclasses.replace(evaluation, pairs=[pair._replace(image=HARD) for pair in evaluation.pairs])
    shown = r"a\nb\u2028c\udcff"
    assert found.names == [shown] * 3
    assert f"\n{shown} " in as_text(tables(found)[0])
    as_csv(found).encode()
    assert next(csv.DictReader(io.StringIO(as_csv(found))))["image"] == shown
    assert as_json(found)["images"][0]["image"] == shown


def test_page_can_be_encoded(evaluation: Evaluation) -> None:
    path = evaluation.pairs[0].image
    odd = path.rename(path.with_name(HARD.name))
    found = dataclasses.replace(evaluation, pairs=[evaluation.pairs[0]._replace(image=odd), *evaluation.pairs[1:]])
    reader = Reader(page.page(found, str(odd)).encode().decode())
    shown = r"a\nb\u2028c\udcff"
    assert any(text.startswith(f"{shown}: pixel Dice") for text in reader.texts)
    assert any(text.endswith(f"{shown}.png") for text in reader.texts)


def test_csv_has_a_row_for_each_image_and_predictor(evaluation: Evaluation) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(evaluation))))
    assert [(row["image"], row["predictor"], row["threshold"], row["swept"]) for row in rows[:4]] == [
        ("first", "gated", "0.5", "0"),
        ("first", "gated", "0.6", "1"),
        ("first", "mask expert", "0.5", "0"),
        ("first", "boundary expert", "0.5", "0"),
    ]
    assert [row["image"] for row in rows[::4]] == ["first", LONG, HOSTILE]
    assert float(rows[8]["hd95"]) == evaluation.variants[0].scores.hd95[2].item()
    assert rows[0]["object_false_negatives"] == "1"  # the mask joins both objects, which counts as finding one
    assert rows[4]["hd95"] == rows[4]["object_hausdorff"] == ""
    assert rows[2]["object_f1"] == ""
    assert float(rows[2]["dice"]) == metrics.score(evaluation.counts["mask expert"][0]).dice


def test_json_has_no_nan(evaluation: Evaluation) -> None:
    values = json.loads(json.dumps(as_json(evaluation), allow_nan=False))
    assert values["images"][4]["hd95"] is None
    assert values["variants"][1]["threshold"] == 0.6
    estimate = evaluation.variants[1].summary.means["hd95"]
    assert values["variants"][1]["means"]["hd95"] == estimate._asdict()
    assert estimate.images == 2
    assert values["variants"][0]["image_count"] == 3
    assert values["predictors"]["gated"] == metrics.score(evaluation.counts["gated"].sum(0))._asdict()


class Reader(HTMLParser):
    """Collects texts and pictures, and fails at elements that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.pictures: list[dict[str, str]] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes) -> None:
        assert tag not in ("script", "link", "iframe")
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag == "img":
            self.pictures.append(dict(attributes))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def pictures(reader: Reader) -> list[Image.Image]:
    found = []
    for picture in reader.pictures:
        kind, content = re.fullmatch(r"data:image/(\w+);base64,(.*)", picture["src"]).groups()
        found.append(Image.open(io.BytesIO(base64.b64decode(content, validate=True))))
        assert found[-1].format == kind.upper()
    return found


def test_page_is_self_contained_and_escapes_names(evaluation: Evaluation) -> None:
    curves = io.BytesIO()
    Image.new("RGB", (9, 9)).save(curves, "PNG")
    text = page.page(evaluation, f"run of {HOSTILE}", curves.getvalue())
    assert text.startswith("<!DOCTYPE html>\n")
    reader = Reader(text)
    assert reader.texts.count(f"run of {HOSTILE}") == 2  # title and heading
    assert all(source.startswith("data:") for source in reader.sources)
    assert "url(" not in text
    assert "//" not in re.sub(r"base64,[^\"]*", "", text)  # no address
    captions = [text for text in reader.texts if "pixel Dice 0." in text or "pixel Dice 1." in text]
    assert [caption.split(": ")[0] for caption in captions] == [LONG, HOSTILE, "first"]  # worst first
    assert [picture.size for picture in pictures(reader)] == [(720, 432)] * 3 + [(9, 9)]
    for table in tables(evaluation):
        assert table.title in reader.texts
        assert {cell for row in table.rows for cell in row} <= set(reader.texts)


def test_page_shows_at_most_so_many_pictures(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_PICTURES", 1)
    reader = Reader(page.page(evaluation, "run"))
    assert [picture["alt"] for picture in reader.pictures] == [f"{LONG} with the outlines of truth and prediction"]
    assert any("The 1 of 3 images" in text for text in reader.texts)


def test_pictures_show_both_outlines(evaluation: Evaluation) -> None:
    drawn = page.with_outlines(np.full((24, 40, 3), 200, np.uint8), evaluation.truths[0], evaluation.predictions[2])
    assert drawn.shape == (432, 720, 3)
    scale = 18
    for row, column, color in (
        (4 * scale, 20 * scale, page.TRUTH),  # top side of the truth
        (8 * scale, 12 * scale, page.TRUTH),  # where its objects touch
        (9 * scale, 20 * scale, page.PREDICTION),  # top side of the prediction, five pixels below
        (2 * scale, 20 * scale, (200, 200, 200)),
    ):
        assert tuple(drawn[row, column]) == color


@pytest.mark.parametrize(("count", "few"), [(19, True), (20, False)])
def test_few_images(tmp_path: Path, count: int, few: bool) -> None:
    maps = [np.eye(5, dtype=np.uint8)] * count
    scores = score_images(maps, maps)
    pairs = [Pair(tmp_path / f"{i}.png", tmp_path / f"{i}.png") for i in range(count)]
    found = Evaluation(pairs, maps, maps, [Variant("predictions", None, False, scores, summarize(scores, 10))])
    assert any(note.startswith("fewer than 20 images") for note in notes(found)) == few


def test_long_names_are_as_long_as_the_column():
    name = "".join(map(chr, range(65, 105)))
    assert _short(name) == "..." + name[-31:]
    assert _short(name[:34]) == name[:34]


def test_outlines_lie_where_the_center_of_a_pixel_of_the_picture_does():
    """Row 1 of a picture at a quarter of the size shows rows 4 to 7, whose center is at row 6."""
    side = 4 * page.PICTURE_SIDE
    labels = (np.indices((side, side))[0] >= 6).astype(np.uint8)
    drawn = page.with_outlines(np.zeros((side, side, 3), np.uint8), labels, labels)
    assert drawn.any((1, 2)).argmax() == 1


def test_the_truth_shows_beside_an_equal_prediction():
    labels = np.zeros((60, 80), np.uint8)
    labels[10:50, 10:70] = 1
    drawn = page.with_outlines(np.zeros((60, 80, 3), np.uint8), labels, labels)
    for color in (page.TRUTH, page.PREDICTION):
        assert (drawn == color).all(-1).any()
