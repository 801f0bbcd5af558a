"""Coverage-guided fuzzing of all that reads files of strangers, with atheris; fuzz_targets.py has the targets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_kinds import MASK, pillow_files, tifffile_files

from semimoe_fast import checkpoint
from semimoe_fast.model import SemiMoE

pytest.importorskip("atheris", reason="fuzzing needs atheris: pip install atheris")

TARGETS = Path(__file__).with_name("fuzz_targets.py")
READERS = {
    "checkpoints": "checkpoint reader",
    "config": "config reader",
    "metrics": "metrics reader",
    "image": "image reader",
    "mask": "mask reader",
    "region": "reader of regions",
    "polygons": "GeoJSON writer",
}


@pytest.fixture(scope="module")
def corpora(uninterrupted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of valid inputs for each target."""
    root = tmp_path_factory.mktemp("corpora")
    for target in READERS:
        (root / target).mkdir()
    metadata, _ = checkpoint.read(uninterrupted.folder / "best.safetensors")
    del metadata["format"], metadata["model"]
    checkpoint.save(root / "checkpoints" / "0", SemiMoE(width=1), metadata)
    (root / "config" / "0").write_bytes((uninterrupted.folder / "config.json").read_bytes())
    (root / "metrics" / "0").write_bytes((uninterrupted.folder / "metrics.jsonl").read_bytes())
    files = root / "files"
    files.mkdir()
    for number, file in enumerate([*pillow_files(files), *tifffile_files(files)]):
        for target in ("image", "mask", "region"):
            (root / target / str(number)).write_bytes(file.path.read_bytes())
    (root / "polygons" / "0").write_bytes(bytes([20, 24, 0]) + np.roll(MASK, 3)[:20, :24].astype(np.uint8).tobytes())
    return root


@pytest.mark.parametrize("target", READERS)
def test_fuzz(table, attempt, corpora: Path, everything: bool, tmp_path: Path, target: str) -> None:
    seconds = 60 if everything else 8
    crashes = Path("build", "abuse").absolute()
    crashes.mkdir(parents=True, exist_ok=True)
    title = f"fuzz: {READERS[target]}"

    def case() -> None:
        command = [sys.executable, TARGETS, target, tmp_path]
        limits = [f"-max_total_time={seconds}", "-rss_limit_mb=4096", "-timeout=30", f"-artifact_prefix={crashes}/"]
        done = subprocess.run([*command, corpora / target, *limits], capture_output=True, text=True, errors="replace")
        counts = json.loads((tmp_path / "counts.json").read_text())
        for outcome, count in counts.items():
            table(title)[outcome] += count
            table(title)["tried"] += count
        if done.returncode != 0:
            raise AssertionError(f"{(done.stdout + done.stderr)[-1000:]}\nrepeat: {target} {tmp_path} CRASH")

    attempt(title, target, case)
