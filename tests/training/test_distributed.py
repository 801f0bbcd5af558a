"""Runs of several processes (torchrun, gloo): equality with one process, interruption, lost ranks, bad settings."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from refusals import refused
from runs import assert_same_run, records

from semimoe_fast import checkpoint, train
from semimoe_fast.errors import UserError
from semimoe_fast.model import SemiMoE
from semimoe_fast.training import command_line, distributed, report, run_folder
from semimoe_fast.training.config import TrainConfig
from semimoe_fast.training.distributed import World
from semimoe_fast.training.sources import load_data
from semimoe_fast.training.trainer import Trainer

EPOCHS = 4  # of two steps; long enough to interrupt


@pytest.fixture(scope="module")
def options(tiny: list[str]) -> list[str]:
    """Three validation images, which two processes cannot share equally."""
    return [*tiny, "--synthetic", "2", "4", "3"]


@pytest.fixture(scope="module")
def pair(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("runs") / "pair"
    assert_finishes(folder, *options, "--epochs", str(EPOCHS), "--out", str(folder))
    return folder


def launch(*options: str, processes: int = 2) -> subprocess.Popen:
    pytest.importorskip("tyro", reason="commands read their options with tyro")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, "-m", "semimoe_fast.train", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
    )


def assert_finishes(folder: Path, *options: str, processes: int = 2) -> None:
    """Launch a run and check that it succeeds and that only one process prints."""
    process = launch(*options, processes=processes)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count(f"are in {folder}") == 1
    assert output.count("\n") == printed_lines(folder) + ("--resume" in options)  # which says how much was trained


def printed_lines(folder: Path) -> int:
    return report.summary(records(folder), folder).count("\n") + 2  # 1 for the settings, 1 for the last line


def launch_and_wait(folder: Path, options: list[str], processes: int = 2) -> tuple[subprocess.Popen, list[int]]:
    """Launch a run, wait for its first checkpoint; return torchrun and the ids of its processes in rank order."""
    process = launch(*options, "--epochs", str(EPOCHS), "--out", str(folder), processes=processes)
    deadline = time.monotonic() + 60
    while not (folder / run_folder.LAST).exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, sorted((int(child) for child in children), key=rank_of)


def rank_of(process: int) -> str:
    variables = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return next(variable for variable in variables if variable.startswith("RANK="))


def assert_close(folder: Path, expected: dict[str, torch.Tensor], state: float, moments: float) -> None:
    """Compare model, s and moments of the last checkpoint; tolerances are relative to the maximum of each tensor."""
    _, tensors = checkpoint.read(folder / run_folder.LAST)
    for prefix, tolerance in (("model.", state), ("adaptive.", state), ("optim.", moments)):
        compared = [key for key in expected if key.startswith(prefix)]
        assert compared
        for key in compared:
            error = (tensors[key] - expected[key]).abs().max()
            assert error <= tolerance * expected[key].abs().max().clamp(min=1e-2), key


@pytest.mark.slow
def test_two_processes_with_sync_bn_equal_one(options: list[str], tmp_path: Path) -> None:
    """Parameters, BN statistics, optimizers and metrics, without dropout, which differs by rank."""
    options = [*options, "--dropout", "0", "--lr", "0.01", "--sync-bn"]
    one, two = tmp_path / "one", tmp_path / "two"
    train.main([*options, "--out", str(one)])
    assert_finishes(two, *options, "--recompute", "--out", str(two))
    # other order of fp32 sums, over 23 layers of two channels whose BN sees as few as 8 pixels: measured 2e-4, and 1e-2
    # in the moments; without --sync-bn the errors are 0.3 and 9
    assert_close(two, checkpoint.read(one / run_folder.LAST)[1], 2e-3, 0.1)
    for ours, theirs in zip(records(two), records(one), strict=True):
        assert flat(ours) == pytest.approx(flat(theirs), rel=1e-3, abs=2e-3)  # a pixel on the threshold may flip
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


def flat(value) -> list[float]:
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value) if not key.startswith("swept_")]  # the maximum of a step function
    return [x for part in value for x in flat(part)] if isinstance(value, list) else [value]


@dataclass(frozen=True)
class Apart(World):
    """A rank with its own rows and gradients, which does not communicate."""

    def parallel(self, module):
        return module

    def gather(self, tensor):
        return [tensor]


def test_gradients_are_averaged_over_the_ranks(options: list[str], tmp_path: Path) -> None:
    """Expected: two trainers in this process, one per rank, whose gradients the test averages."""
    options = [*options, "--dropout", "0"]
    parsed = command_line.parse(options)
    torch.set_num_threads(parsed.threads)
    data, _ = load_data(parsed)
    trainers = [Trainer(parsed, data, torch.device("cpu"), Apart(rank, 2)) for rank in range(2)]
    for trainer in trainers:
        for optimizer in (trainer.optimizer, trainer.adam):
            optimizer.step = lambda: None  # the step of the class is called below, after averaging
    for _ in range(parsed.epochs):
        for batches in zip(*(trainer.begin_epoch() for trainer in trainers), strict=True):
            for trainer, batch in zip(trainers, batches, strict=True):
                trainer.train_step(batch)
            for mine, other in zip(*(list(trainer._optimized()) for trainer in trainers), strict=True):
                mean = (mine[1].grad + other[1].grad) / 2
                mine[1].grad, other[1].grad = mean, mean.clone()
            for trainer in trainers:
                type(trainer.optimizer).step(trainer.optimizer)
                type(trainer.adam).step(trainer.adam)
        for trainer in trainers:
            trainer.next_epoch()
    for mine, other in zip(*(trainer.model.buffers() for trainer in trainers), strict=True):
        assert not mine.is_floating_point() or not torch.equal(mine, other)  # the ranks trained different rows
        mine.copy_((mine + other) / 2)  # a run averages them at the end of each epoch
    assert_finishes(tmp_path / "run", *options, "--recompute", "--out", str(tmp_path / "run"))
    expected = trainers[0].state() | {f"model.{k}": v for k, v in trainers[0].model.state_dict().items()}
    assert_close(tmp_path / "run", expected, 1e-5, 1e-5)  # only the order of the averages differs


@pytest.mark.slow
def test_ranks_draw_different_dropout(pair: Path) -> None:
    _, tensors = checkpoint.read(pair / run_folder.LAST)
    assert not torch.equal(tensors["random.cpu"], tensors["rank1.random.cpu"])
    assert [record["epoch"] for record in records(pair)] == list(range(EPOCHS))


@pytest.mark.slow
def test_signal_to_one_rank_stops_all_ranks_and_the_run_resumes_bitwise(options: list[str], tmp_path: Path) -> None:
    """Three ranks, because the sum of two gradients does not depend on DDP's buckets."""
    options = [*options, *"--synthetic 3 6 2 --labeled-batch 3 --unlabeled-batch 3".split()]
    folder, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    process, ranks = launch_and_wait(folder, options, processes=3)
    os.kill(ranks[1], signal.SIGTERM)  # not the main process
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    remedy = f"torchrun --nproc-per-node 3 -m semimoe_fast.train --resume {folder}"
    assert output.splitlines()[1:] == [f"interrupted by SIGTERM; continue with: {remedy}"]
    assert_finishes(folder, "--resume", str(folder), processes=3)
    assert_finishes(uninterrupted, *options, "--epochs", str(EPOCHS), "--out", str(uninterrupted), processes=3)
    assert_same_run(folder, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_lost_rank_ends_the_run_which_resumes(options: list[str], pair: Path, tmp_path: Path, capsys, lost) -> None:
    folder = tmp_path / "run"
    process, ranks = launch_and_wait(folder, options)
    os.kill(ranks[lost], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: another process of this run was lost (")
    assert lines[0].endswith(f"continue with: torchrun --nproc-per-node 2 -m semimoe_fast.train --resume {folder}")
    if lost == 0:
        assert_finishes(folder, "--resume", str(folder))
        assert_same_run(folder, pair)
    else:  # one process resumes
        train.main(["--resume", str(folder)])
        assert "saved by 2 processes, resumed by 1: dropout draws other random numbers" in capsys.readouterr().out
        assert [record["epoch"] for record in records(folder)] == list(range(EPOCHS))
        assert "rank1.random.cpu" not in checkpoint.read(folder / run_folder.LAST)[1]


@pytest.mark.slow
def test_user_error_is_printed_once(options: list[str], tmp_path: Path) -> None:
    process = launch(*options, "--labeled-batch", "3", "--out", str(tmp_path / "run"))
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert output == ""
    lines = [line for line in errors.splitlines() if "error: " in line]
    assert lines == ["error: --labeled-batch is 3, which 2 processes cannot share: give a multiple of 2"]
    assert not (tmp_path / "run").exists()


SLOW_MAIN = """
import time
from datetime import timedelta
from semimoe_fast.training import distributed
distributed.TIMEOUT = timedelta(seconds=4)
with distributed.join() as world:
    started = time.monotonic()
    world.main_first(lambda: time.sleep(8) if world.is_main else print(time.monotonic() - started > 7))
"""


@pytest.mark.slow
def test_ranks_wait_for_rank_0_beyond_the_timeout(tmp_path: Path) -> None:
    """Decoding may take longer than TIMEOUT."""
    (tmp_path / "slow_main.py").write_text(SLOW_MAIN)
    command = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    process = subprocess.run(
        [sys.executable, *command, str(tmp_path / "slow_main.py")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "True\n"


@pytest.mark.slow
def test_main_process_caches_the_images(glands_folder: Path, tmp_path: Path) -> None:
    """The run is the same with a cache and, after one warning, without one."""
    options = "--image-size 32 --width 2 --epochs 1 --warmup-epochs 0 --device cpu --data".split()
    runs = [tmp_path / name / "run" for name in ("kept", "not")]
    for run in runs:
        run.parent.mkdir()
    (tmp_path / "not" / "cache").touch()
    for run, warnings in zip(runs, (0, 1), strict=True):
        process = launch(*options, str(glands_folder), "--out", str(run))
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert errors.count("decoded images are not kept") == warnings
    assert len(list((tmp_path / "kept" / "cache").iterdir())) == 3
    assert_same_run(*runs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unlabeled_batch": 3}, "--unlabeled-batch is 3, which 2 processes cannot share: give a multiple of 2"),
        (
            {"image_size": 16},
            "--image-size is 16 and a batch 2 for 2 processes: batch normalization then sees a single pixel",
        ),
    ],
)
def test_batches_that_two_processes_cannot_share(tiny_config: TrainConfig, changes: dict, message: str) -> None:
    changed = dataclasses.replace(tiny_config, **changes)
    changed.check()
    assert message in refused(changed.check, processes=2)


def test_devices_with_several_processes() -> None:
    assert World(1, 2, 1).device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device is 'cuda:0', but every process needs its own device"):
        World(1, 2, 1).device("cuda:0")
    with pytest.raises(UserError, match=r"give at most --nproc-per-node \d+, or --device cpu"):
        World(99, 100, 99).device("cuda")


ENVIRONMENT = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "WORLD_SIZE is 2 but RANK is not set"),
        ({"WORLD_SIZE": None}, "RANK is 1 but WORLD_SIZE is not set"),
        ({"MASTER_ADDR": None}, "WORLD_SIZE is 2 but MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "WORLD_SIZE is 2 and RANK is 1 but MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "the environment variable WORLD_SIZE is 'two', not a number from 1"),
        ({"WORLD_SIZE": "0"}, "the environment variable WORLD_SIZE is '0', not a number from 1"),
        ({"RANK": "2"}, "the environment variable RANK is '2', not a number from 0 to 1"),
        ({"RANK": ""}, "the environment variable RANK is '', not a number from 0 to 1"),
        ({"MASTER_PORT": "99999"}, "the environment variable MASTER_PORT is '99999', not a number from 1 to 65535"),
        ({"LOCAL_RANK": "x"}, "the environment variable LOCAL_RANK is 'x', not a number from 0 to 1"),
    ],
)
def test_incomplete_environment_raises_user_error(
    tiny_config: TrainConfig, monkeypatch, changes: dict, message: str
) -> None:
    for name, value in (ENVIRONMENT | changes).items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    assert (
        refused(train.main, tiny_config)
        == f"{message}; start several processes with torchrun, or unset WORLD_SIZE and RANK to train in one"
    )


def test_processes_that_cannot_connect_raise_user_error(tiny_config: TrainConfig, monkeypatch) -> None:
    for name, value in (ENVIRONMENT | {"MASTER_ADDR": "nowhere.invalid"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))
    with pytest.raises(UserError, match="the processes of this run cannot connect"):
        train.main(tiny_config)


def test_layers_of_sync_bn_on_a_gpu_count_for_themselves() -> None:
    model = World(rank=0, size=2).synchronize_batch_norm(SemiMoE(width=2).train(), torch.device("cuda"))
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.SyncBatchNorm)]
    assert len(norms) == 3 * (2 * 9 + 4)
    model._count_batches(2)
    assert all(norm.num_batches_tracked == 0 for norm in norms)
