"""Runs that share decoded images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from caches import assert_same, fail_if_decoding

from semimoe_fast import checkpoint, train
from semimoe_fast.data.cache import Cache
from semimoe_fast.data.folders import load_part
from semimoe_fast.training import command_line, run_folder, sources
from semimoe_fast.training.lock import FolderLock

OPTIONS = "--image-size 32 --width 2 --epochs 1 --warmup-epochs 0 --device cpu".split()


def test_cache_is_beside_the_run(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("tyro")
    monkeypatch.chdir(tmp_path)
    assert run_folder.cache_folder(command_line.SYNTHETIC) == Path("runs/cache")
    for out, expected in (("there/run", tmp_path / "there"), (".", tmp_path.parent)):
        given = command_line.parse(["--out", out])
        assert run_folder.cache_folder(given) == expected / "cache"
    (tmp_path / "runs").mkdir()
    with FolderLock() as lock:
        resumed = run_folder.new_folder(command_line.SYNTHETIC, lock)
    assert run_folder.cache_folder(command_line.parse(["--resume", str(resumed)])) == tmp_path / "runs" / "cache"


def test_second_run_and_resumed_run_decode_nothing(glands_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Their checkpoints equal those of a run without a cache."""
    pytest.importorskip("tyro")
    runs = [tmp_path / "runs" / name for name in ("plain", "first", "second")]
    with monkeypatch.context() as patch:
        patch.setattr(Cache, "load_part", lambda self, *part, **kind: load_part(*part, **kind))
        train.main(["--data", str(glands_folder), *OPTIONS, "--out", str(runs[0])])
    assert not (tmp_path / "runs" / "cache").exists()
    train.main(["--data", str(glands_folder), *OPTIONS, "--out", str(runs[1])])
    assert len(list((tmp_path / "runs" / "cache").iterdir())) == 3
    fail_if_decoding(monkeypatch)
    train.main(["--data", str(glands_folder), *OPTIONS, "--out", str(runs[2])])
    train.main(["--resume", str(runs[0])])
    (expected_metadata, expected), *others = (checkpoint.read(run / run_folder.LAST) for run in runs)
    for metadata, tensors in others:
        assert metadata == expected_metadata
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_synthetic_run_writes_no_cache(finished: Path) -> None:
    assert not (finished.parent / "cache").exists()


def test_load_data_gives_the_same_with_and_without_a_cache(glands_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    cached = Cache(tmp_path / "cache")
    given = command_line.parse(["--data", str(glands_folder), *OPTIONS])
    (plain, plain_val), (mapped, mapped_val) = sources.load_data(given), sources.load_data(given, cached)
    assert plain.preprocessing == mapped.preprocessing
    for ours, theirs in ((mapped.labeled, plain.labeled), (mapped.unlabeled, plain.unlabeled)):
        assert_same(ours, theirs)
    assert_same(mapped_val, plain_val)
