"""Runs of several processes (gloo): equality with one process, interruption, lost ranks, bad settings."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from forks import Child, Ended
from refusals import refused
from runs import records, require_same, start, start_ranks

from semimoe_fast import checkpoint, train
from semimoe_fast.errors import UserError
from semimoe_fast.model import SemiMoE
from semimoe_fast.training import distributed, report, run_folder
from semimoe_fast.training.config import TrainConfig, read_config
from semimoe_fast.training.distributed import World
from semimoe_fast.training.sources import load_data
from semimoe_fast.training.trainer import Trainer

EPOCHS = 4  # of two steps; long enough to interrupt


@pytest.fixture(scope="module")
def configuration(tiny_config: TrainConfig) -> TrainConfig:
    """Three validation images, which two processes cannot share equally."""
    return dataclasses.replace(tiny_config, synthetic=(2, 4, 3))


@pytest.fixture(scope="module")
def pair(configuration: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("runs") / "pair"
    assert_finishes(dataclasses.replace(configuration, epochs=EPOCHS), folder)
    return folder


def assert_finishes(config: TrainConfig, folder: Path, processes: int = 2) -> None:
    """Start or resume a run and check that it succeeds and that only the main process prints."""
    resumed = folder.exists()
    ended = [child.wait() for child in start(config, folder, processes)]
    assert [child.status for child in ended] == [0] * processes, ended
    lines = report.summary(records(folder), folder).count("\n") + 2  # 1 for the settings, 1 for the last line
    assert [len(printed(child)) for child in ended] == [lines + resumed] + [0] * (processes - 1), ended
    assert ended[0].output.count(f"are in {folder}") == 1


def printed(child: Ended) -> list[str]:
    """The lines of a child, without the progress bar and, from PyTorch 2.10, those of Gloo."""
    lines = re.split(r"[\r\n]+", child.output)
    return [line for line in lines if line and not line.startswith(("train: ", "[Gloo] "))]


def start_and_wait(config: TrainConfig, folder: Path, processes: int = 2) -> list[Child]:
    """Start a run and wait for its first checkpoint."""
    children = start(dataclasses.replace(config, epochs=EPOCHS), folder, processes)
    deadline = time.monotonic() + 60
    while not (folder / run_folder.LAST).exists():
        assert time.monotonic() < deadline, [child.wait(1) for child in children]
        time.sleep(0.02)
    return children


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
def test_two_processes_with_sync_bn_equal_one(configuration: TrainConfig, tmp_path: Path) -> None:
    """Parameters, BN statistics, optimizers and metrics, without dropout, which differs by rank."""
    config = dataclasses.replace(configuration, dropout=0.0, lr=0.01, sync_bn=True)
    one, two = tmp_path / "one", tmp_path / "two"
    train.main(dataclasses.replace(config, out=one))
    assert_finishes(dataclasses.replace(config, recompute=True), two)
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


def test_gradients_are_averaged_over_the_ranks(configuration: TrainConfig, tmp_path: Path) -> None:
    """Expected: two trainers in this process, one per rank, whose gradients the test averages."""
    config = dataclasses.replace(configuration, dropout=0.0)
    torch.set_num_threads(config.threads)
    data, _ = load_data(config)
    trainers = [Trainer(config, data, torch.device("cpu"), Apart(rank, 2)) for rank in range(2)]
    for trainer in trainers:
        for optimizer in (trainer.optimizer, trainer.adam):
            optimizer.step = lambda: None  # the step of the class is called below, after averaging
    for _ in range(config.epochs):
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
    assert_finishes(dataclasses.replace(config, recompute=True), tmp_path / "run")
    expected = trainers[0].state() | {f"model.{k}": v for k, v in trainers[0].model.state_dict().items()}
    assert_close(tmp_path / "run", expected, 1e-5, 1e-5)  # only the order of the averages differs


@pytest.mark.slow
def test_ranks_draw_different_dropout(pair: Path) -> None:
    _, tensors = checkpoint.read(pair / run_folder.LAST)
    assert not torch.equal(tensors["random.cpu"], tensors["rank1.random.cpu"])
    assert [record["epoch"] for record in records(pair)] == list(range(EPOCHS))


@pytest.mark.slow
def test_signal_to_one_rank_stops_all_ranks_and_the_run_resumes_bitwise(
    configuration: TrainConfig, tmp_path: Path
) -> None:
    """Three ranks, because the sum of two gradients does not depend on DDP's buckets."""
    config = dataclasses.replace(configuration, synthetic=(3, 6, 2), labeled_batch=3, unlabeled_batch=3, epochs=EPOCHS)
    folder, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    children = start_and_wait(config, folder, processes=3)
    os.kill(children[1].process, signal.SIGTERM)  # not the main process
    ended = [child.wait() for child in children]
    assert [child.status for child in ended] == [128 + signal.SIGTERM] * 3
    remedy = f"torchrun --nproc-per-node 3 -m semimoe_fast.train --resume {folder}"
    settings, *lines = printed(ended[0])
    assert lines == [f"interrupted by SIGTERM; continue with: {remedy}"], settings
    assert [printed(child) for child in ended[1:]] == [[], []]
    assert_finishes(config, folder, processes=3)
    assert_finishes(config, uninterrupted, processes=3)
    require_same(folder, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_lost_rank_ends_the_run_which_resumes(
    configuration: TrainConfig, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: int
) -> None:
    folder = tmp_path / "run"
    children = start_and_wait(configuration, folder)
    children[lost].kill()
    assert children[lost].wait().status == -signal.SIGKILL
    os.kill(children[1 - lost].process, signal.SIGTERM)  # as torchrun does
    survivor = children[1 - lost].wait()
    assert survivor.status == 1, survivor
    (line,) = (line for line in printed(survivor) if line.startswith("error: "))
    assert line.startswith("error: another process of this run was lost (")
    assert line.endswith(f"continue with: torchrun --nproc-per-node 2 -m semimoe_fast.train --resume {folder}")
    if lost == 0:
        assert_finishes(configuration, folder)
        require_same(folder, pair)
    else:  # one process resumes
        train.main(dataclasses.replace(read_config(folder), resume=folder))
        assert "saved by 2 processes, resumed by 1: dropout draws other random numbers" in capsys.readouterr().out
        assert [record["epoch"] for record in records(folder)] == list(range(EPOCHS))
        assert "rank1.random.cpu" not in checkpoint.read(folder / run_folder.LAST)[1]


@pytest.mark.slow
def test_user_error_is_printed_once(tiny: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*tiny, "--labeled-batch", "3", "--out", str(tmp_path / "run")]
    ended = subprocess.run([*command, "-m", "semimoe_fast.train", *options], capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert ended.stdout == ""
    lines = [line for line in ended.stderr.splitlines() if "error: " in line]
    assert lines == ["error: --labeled-batch is 3, which 2 processes cannot share: give a multiple of 2"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_wait_for_rank_0_beyond_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding may take longer than TIMEOUT."""
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=2))

    def decode_slowly() -> None:
        with distributed.join() as world:
            started = time.monotonic()
            world.main_first(lambda: time.sleep(5) if world.is_main else print(time.monotonic() - started > 3))

    ended = [child.wait() for child in start_ranks(decode_slowly, 2)]
    assert [child.status for child in ended] == [0, 0], ended
    assert [printed(child) for child in ended] == [[], ["True"]]


@pytest.mark.slow
def test_main_process_caches_the_images(tiny_config: TrainConfig, glands_folder: Path, tmp_path: Path) -> None:
    """The run is the same with a cache and, after one warning, without one."""
    config = dataclasses.replace(tiny_config, data=glands_folder, epochs=1, warmup_epochs=0)
    runs = [tmp_path / name / "run" for name in ("kept", "not")]
    for run in runs:
        run.parent.mkdir()
    (tmp_path / "not" / "cache").touch()
    for run, warnings in zip(runs, (0, 1), strict=True):
        ended = [child.wait() for child in start(config, run, 2)]
        assert [child.status for child in ended] == [0, 0], ended
        assert "".join(child.output for child in ended).count("decoded images are not kept") == warnings
    assert len(list((tmp_path / "kept" / "cache").iterdir())) == 3
    require_same(*runs)


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
