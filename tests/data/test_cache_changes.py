"""Files that change while they are read, and stored sizes that cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from semimoe_fast.data import cache
from semimoe_fast.data.cache import Cache
from semimoe_fast.errors import UserError


@pytest.fixture
def root(tmp_path):
    for kind, shape in (("image", (20, 30, 3)), ("mask", (20, 30))):
        (tmp_path / "train" / kind).mkdir(parents=True)
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / "train" / kind / "1.png", compress_level=0)
    return tmp_path


def test_a_change_that_keeps_the_size_is_seen(root, monkeypatch):
    image = root / "train" / "image" / "1.png"
    store = cache.Entry.write

    def write_and_change(*arguments):
        store(*arguments)
        size = image.stat().st_size
        Image.fromarray(np.full((20, 30, 3), 9, np.uint8)).save(image, compress_level=0)
        assert image.stat().st_size == size

    monkeypatch.setattr(cache.Entry, "write", write_and_change)
    with pytest.raises(UserError, match="files changed while they were read"):
        Cache(root / "cache").load_part(root, "train", 16, True)


def test_negative_sides(root, capsys):
    cached = Cache(root / "cache")
    expected = cached.load_whole(root, "train", True)
    (path,) = (root / "cache").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start : start + 16] = np.array([-20, -30]).tobytes()
    path.write_bytes(content)
    again = cached.load_whole(root, "train", True)
    assert again.sizes.tolist() == expected.sizes.tolist() == [[20, 30]]
    assert "damaged; its images are decoded again" in capsys.readouterr().err
