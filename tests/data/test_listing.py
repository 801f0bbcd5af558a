"""The image files of a folder, and what is said of its other files."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from refusals import refused

from semimoe_fast.data.listing import list_images, note_of_others
from semimoe_fast.data.readers import SLIDES


def test_a_missing_folder(tmp_path: Path) -> None:
    assert refused(list_images, tmp_path / "nowhere") == f"{tmp_path / 'nowhere'} is not a folder: correct the path"


def test_names_that_differ_in_how_letters_are_composed(tmp_path: Path) -> None:
    for form, ending in (("NFC", ".png"), ("NFD", ".tif")):
        (tmp_path / unicodedata.normalize(form, f"drüse{ending}")).touch()
    assert "have the same stem but for how letters are composed: remove or rename one" in refused(list_images, tmp_path)


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    for name in ("a.png", "Thumbs.db", ".DS_Store"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    assert note_of_others(tmp_path) is None
    for name in ("scan.heic", "report.pdf", "slide.svs"):
        (tmp_path / name).touch()
    said = f"{tmp_path}: left out, as their names do not end as those of images"
    assert note_of_others(tmp_path) == f"{said} (3): report.pdf, scan.heic, slide.svs"
    assert note_of_others(tmp_path, SLIDES) == f"{said} (2): report.pdf, scan.heic"
    (tmp_path / "a.png").unlink()
    assert refused(list_images, tmp_path) == (
        f"{tmp_path} holds no image (it has report.pdf, scan.heic, slide.svs): put PNG, TIFF, BMP or JPEG files there "
        "or correct the path"
    )


def test_parts_of_a_slide_are_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.vms").write_text("ImageFile=a.jpg\nOptimisationFile=a.opt\n")
    for name in ("a.jpg", "a.opt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path, also=SLIDES)] == ["a.vms"]
    assert note_of_others(tmp_path, SLIDES) is None
