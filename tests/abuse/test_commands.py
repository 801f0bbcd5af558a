"""Hostile options, checkpoints, configurations, records and special files, by command: each is one line, or works."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import in_fork
from safetensors import safe_open
from safetensors.torch import save_file

from semimoe_fast import evaluate, predict, train
from semimoe_fast.checkpoint import METADATA_KEY
from semimoe_fast.training.config import CONFIG_FILE
from semimoe_fast.training.lock import LOCK_FILE
from semimoe_fast.training.run_folder import BEST, LAST, METRICS_FILE

NUMBERS = ("0", "-1", "1e38", "1e308", "nan", "inf", "1000000000", "18446744073709551616", "0.5", "1e-320")
OPTIONS = {
    train: "--image-size --width --epochs --labeled-batch --unlabeled-batch --steps-per-epoch --accumulate --lr "
    "--momentum --weight-decay --ring-radius --seed --threads --dropout --ema --decay --initial-log-var --log-var-lr",
    predict: "--scale --mpp --tile-size --seed-level --least-area --threshold",
}
YEARS_OF_TRAINING = "--epochs", "1000000000"  # starts, as it should
VALUES = (None, "32", -5, 0, 10**6, 10**30, 0.5, 1e39, True, [], [0.5, 0.5], {}, "\ud800", [[]] * 50)


@pytest.fixture
def command(attempt, tmp_path: Path) -> Callable[..., None]:
    """Function (class, name, module, *arguments): count how a command ends that has 6 GB of memory and a minute."""

    def case(module: Any, arguments: tuple[object, ...]) -> str:
        def call() -> None:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 6 * 2**30,) * 2)
            module.main([str(argument) for argument in arguments])

        ended = in_fork(call, seconds=60)
        for_some_images = ended.status == 1 and ended.output.splitlines()[-1].startswith("error: ")
        refused_by_tyro = ended.status == 2 and "Error parsing" in ended.output
        if "Traceback" not in ended.output and (for_some_images or refused_by_tyro):
            return "one line"
        if ended.outcome == "failed":
            raise AssertionError(f"status {ended.status}: {ended.output[-1500:]}")
        return ended.outcome

    return lambda title, name, module, *arguments: attempt(title, name, case, module, arguments)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in nested JSON objects."""
    found = [path] if path else []
    return found + [p for key in value for p in places(value[key], (*path, key))] if isinstance(value, dict) else found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    return new if not path else value | {path[0]: replaced(value[path[0]], path[1:], new)}


def test_options(command, uninterrupted, everything: bool, tmp_path: Path) -> None:
    data, run = uninterrupted.config.data, uninterrupted.folder
    start = {
        train: ["--data", data, "--image-size", 32, "--width", 2, "--epochs", 1, "--steps-per-epoch", 1],
        predict: ["--checkpoint", run / BEST, "--input", data / "val" / "image"],
    }
    for module, options in OPTIONS.items():
        for number, option in enumerate(options.split()):
            for value in NUMBERS if everything else NUMBERS[number % 5 :: 5]:
                if (option, value) == YEARS_OF_TRAINING:
                    continue
                out = tmp_path / f"{option}{value}"
                command("options", f"{option} {value}", module, *start[module], "--out", out, option, value)


def test_checkpoints(command, uninterrupted, everything: bool, tmp_path: Path) -> None:
    """Each value of the metadata, replaced; weights of other types, without a part, and files of other bytes."""
    with safe_open(uninterrupted.folder / BEST, "pt") as file:
        text, tensors = file.metadata()[METADATA_KEY], {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    metadata = json.loads(text)
    path, images = tmp_path / "c.safetensors", uninterrupted.config.data / "val" / "image"

    def try_file(name: str) -> None:
        out = tmp_path / f"out {name[:40]}".replace("/", "")
        command("checkpoints", name, predict, "--checkpoint", path, "--input", images, "--out", out, "--overwrite")

    read = [place for place in places(metadata) if place[0] in ("format", "model", "preprocessing")]
    for number, place in enumerate(read):
        for value in VALUES if everything else VALUES[number % 5 :: 5]:
            save_file(tensors, path, {METADATA_KEY: json.dumps(replaced(metadata, place, value))})
            try_file(f"{'.'.join(place)} = {value!r}")
    for name, header in {
        "not JSON": "{",
        "deep": "[" * 10**5,
        "list": "[1]",
        "null": "null",
        "number": "1e999",
    }.items():
        save_file(tensors, path, {METADATA_KEY: header})
        try_file(name)
    for dtype in (torch.float16, torch.float64, torch.int32, torch.complex64, torch.bool):
        save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, path, {METADATA_KEY: text})
        try_file(f"weights {dtype}")
    for number in range(0, len(tensors), 1 if everything else 20):
        key = list(tensors)[number]
        save_file({k: v for k, v in tensors.items() if k != key}, path, {METADATA_KEY: text})
        try_file(f"without {key}")
    content = (uninterrupted.folder / BEST).read_bytes()
    for name, changed in {
        "empty": b"",
        "half": content[: len(content) // 2],
        "header alone": content[:100],
        "long header": struct.pack("<Q", 2**63) + content[8:],
        "pickle": b"\x80\x04" + content,
    }.items():
        path.write_bytes(changed)
        try_file(name)


def test_run_folders(command, uninterrupted, everything: bool, tmp_path: Path) -> None:
    """Each value of config.json, replaced; damaged records; files of a run that are named pipes or folders."""
    run = tmp_path / "run"

    def try_run(title: str, name: str, change: Callable[[], object]) -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(uninterrupted.folder, run)
        change()
        command(title, name, train, "--resume", run)

    config = json.loads((uninterrupted.folder / CONFIG_FILE).read_text())
    for number, place in enumerate(places(config)):
        for value in VALUES if everything else VALUES[number % 7 :: 7]:
            text = json.dumps(replaced(config, place, value))
            try_run("configurations", f"{place[0]} = {value!r}", lambda t=text: (run / CONFIG_FILE).write_text(t))
    record = json.loads((uninterrupted.folder / METRICS_FILE).read_text().splitlines()[-1])
    for number, place in enumerate(places(record)):
        for value in VALUES if everything else VALUES[number % 14 :: 14]:
            text = json.dumps(replaced(record, place, value)) + "\n"
            try_run("records", f"{'.'.join(place)} = {value!r}", lambda t=text: (run / METRICS_FILE).write_text(t))
    try_run("records", "binary", lambda: (run / METRICS_FILE).write_bytes(os.urandom(10_000)))

    def special(name: str, make: Callable[[Path], object]) -> None:
        (run / name).unlink(missing_ok=True)
        make(run / name)

    kinds = {"named pipe": os.mkfifo, "folder": Path.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}
    kinds["loop"] = lambda path: path.symlink_to(path)
    for name in (CONFIG_FILE, METRICS_FILE, LAST, BEST, LOCK_FILE):
        for kind, make in kinds.items():
            try_run("special files", f"{name}: {kind}", lambda n=name, m=make: special(n, m))


@pytest.mark.parametrize("module", [train, predict, evaluate], ids=lambda module: module.__name__)
def test_special_files_among_the_images(command, uninterrupted, tmp_path: Path, module: Any) -> None:
    kinds = {"named pipe": os.mkfifo, "folder": Path.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}
    kinds |= {"broken link": lambda path: path.symlink_to("nowhere"), "empty": Path.touch}
    for kind, make in kinds.items():
        for folder in ("image", "mask"):
            data = shutil.copytree(uninterrupted.config.data, tmp_path / f"{kind} {folder}")
            path = data / "val" / folder / "0000.png"
            path.unlink()
            make(path)
            arguments = {
                train: ["--data", data, "--image-size", 32, "--width", 2, "--epochs", 1, "--out", tmp_path / path.stem],
                predict: ["--checkpoint", uninterrupted.folder / BEST, "--input", data / "val" / folder],
                evaluate: ["--checkpoint", uninterrupted.folder / BEST, "--data", data, "--device", "cpu"],
            }[module]
            arguments += ["--out", tmp_path / f"out {kind} {folder}"] if module is predict else []
            command("special files", f"{module.__name__} {kind} {folder}", module, *arguments)
