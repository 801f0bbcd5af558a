"""Slides of several files: a folder lists each slide once."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semimoe_fast.data.listing import list_images
from semimoe_fast.data.readers import SLIDES, open_image
from semimoe_fast.errors import UserError

COLORS = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # class of DICOM objects
EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"


def names(folder: Path) -> list[str]:
    return [path.name for path in list_images(folder, also=SLIDES)]


def element(group: int, tag: int, kind: str, value: str | int | bytes) -> bytes:
    """A data element of DICOM."""
    if isinstance(value, int):
        value = struct.pack("<H" if kind == "US" else "<I", value)
    data = value.encode() if isinstance(value, str) else value
    data += (b"\0" if kind in ("UI", "OB") else b" ") * (len(data) % 2)
    length = struct.pack("<xxI" if kind == "OB" else "<H", len(data))
    return struct.pack("<HH", group, tag) + kind.encode() + length + data


def write_dicom(path: Path, series: str, number: int, pixels: np.ndarray) -> None:
    """A level of a slide as one uncompressed tile."""
    height, width = pixels.shape[:2]
    kind = "ORIGINAL\\PRIMARY\\VOLUME\\NONE" if number == 1 else "DERIVED\\PRIMARY\\VOLUME\\RESAMPLED"
    head = element(2, 1, "OB", b"\0\1") + element(2, 2, "UI", WHOLE_SLIDE)
    head += element(2, 3, "UI", f"{series}.{number}") + element(2, 0x10, "UI", EXPLICIT_LITTLE_ENDIAN)
    body = [(8, 8, "CS", kind), (8, 0x16, "UI", WHOLE_SLIDE), (8, 0x18, "UI", f"{series}.{number}")]
    body += [(0x20, 0xD, "UI", "1.2.9"), (0x20, 0xE, "UI", series)]
    body += [(0x28, 2, "US", 3), (0x28, 4, "CS", "RGB"), (0x28, 6, "US", 0), (0x28, 8, "IS", "1")]
    body += [(0x28, 0x10, "US", height), (0x28, 0x11, "US", width)]
    body += [(0x28, 0x100 + place, "US", value) for place, value in enumerate((8, 8, 7, 0))]
    body += [(0x48, 6, "UL", width), (0x48, 7, "UL", height), (0x7FE0, 0x10, "OB", pixels.tobytes())]
    parts = [bytes(128), b"DICM", element(2, 0, "UL", len(head)), head, *(element(*fields) for fields in body)]
    path.write_bytes(b"".join(parts))


def test_dicom_files_of_a_series_are_one_slide(tmp_path, monkeypatch):
    pytest.importorskip("openslide")
    write_dicom(tmp_path / "a.dcm", "1.2.77", 2, COLORS[::2, ::2])
    write_dicom(tmp_path / "b.dcm", "1.2.77", 1, COLORS)
    write_dicom(tmp_path / "c.dcm", "1.2.78", 1, COLORS)
    for name in ("d.dcm", "e.dcm"):  # each is named when it is opened
        (tmp_path / name).write_bytes(b"no DICOM")
    assert names(tmp_path) == ["a.dcm", "c.dcm", "d.dcm", "e.dcm"]
    with open_image(tmp_path / "a.dcm") as reader:
        assert np.array_equal(reader.read(0, 0, 64, 96), COLORS)
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(UserError, match="slides need OpenSlide"):
        names(tmp_path)


def test_images_that_an_index_names_belong_to_its_slide(tmp_path):
    for name in ("scan.jpg", "scan(1,0).jpg", "scan_macro.jpg", "scan_map2.jpg", "other.jpg"):
        Image.fromarray(COLORS).save(tmp_path / name)
    index = "[Virtual Microscope Specimen]\r\nNoLayers=1\r\nImageFile=scan.jpg\r\nImageFile(1,0)=scan(1,0).jpg\r\n"
    (tmp_path / "scan.vms").write_text(index + "MacroImage=scan_macro.jpg\r\nMapFile=scan_map2.jpg\r\n")
    assert names(tmp_path) == ["other.jpg", "scan.vms"]


def test_the_folder_of_a_slide_is_none(tmp_path):
    (tmp_path / "scan").mkdir()
    for name in ("scan.mrxs", "scan/Slidedat.ini", "scan/Data0000.dat"):
        (tmp_path / name).write_bytes(b"")
    assert names(tmp_path) == ["scan.mrxs"]
