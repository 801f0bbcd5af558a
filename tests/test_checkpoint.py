"""Checkpoints: what is saved comes back, nothing is executed, a crash leaves the old file or the new one."""

from __future__ import annotations

import json
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from semimoe_fast import checkpoint
from semimoe_fast.checkpoint import Preprocessing, export_published, import_published, load, save
from semimoe_fast.errors import UserError
from semimoe_fast.model import SemiMoE


def same_state(a: SemiMoE, b: SemiMoE) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("tasks", [("mask", "sdf", "boundary"), ("mask", "mask", "sdf")])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_round_trip(tmp_path: Path, tasks: tuple[str, ...], layout: torch.memory_format) -> None:
    model = SemiMoE(1, 3, 2, tasks).to(memory_format=layout)
    extra = {"optim.x": torch.arange(5), "random": torch.get_rng_state()}
    save(tmp_path / "c.safetensors", model, {"epoch": 7, "note": "é"}, extra)
    loaded, metadata, state = load(tmp_path / "c.safetensors")
    assert same_state(model, loaded)
    assert not loaded.training
    assert (metadata["epoch"], metadata["note"]) == (7, "é")
    assert all(torch.equal(state[key], extra[key]) for key in extra)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_preprocessing_is_kept(tmp_path: Path) -> None:
    preprocessing = Preprocessing(96, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1.5)
    save(tmp_path / "with", SemiMoE(width=2), {"preprocessing": preprocessing._asdict()})
    save(tmp_path / "without", SemiMoE(width=2))
    assert Preprocessing.of(tmp_path / "with", load(tmp_path / "with").metadata) == preprocessing
    with pytest.raises(UserError, match="without: holds no image size"):
        Preprocessing.of(tmp_path / "without", load(tmp_path / "without").metadata)


def write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def damaged(path: Path, keep: float) -> None:
    save(path, SemiMoE(width=2))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def rewritten(path: Path, changes: dict) -> None:
    """A whole checkpoint, but for its metadata."""
    save(path, SemiMoE(width=2))
    metadata, tensors = checkpoint.read(path)
    save_file(tensors, path, {checkpoint.METADATA_KEY: json.dumps(metadata | changes)})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such checkpoint"),
        (lambda path: path.mkdir(), "no such checkpoint"),
        (lambda path: write_bytes(path, b""), "not a readable checkpoint"),
        (lambda path: write_bytes(path, b"\x80\x04 pickle?"), "not a readable checkpoint"),
        (lambda path: damaged(path, 0.5), "not a readable checkpoint"),
        (lambda path: damaged(path, 0.001), "not a readable checkpoint"),
        (lambda path: save_file({"x": torch.zeros(1)}, path), "not a checkpoint of semimoe_fast"),
        (lambda path: rewritten(path, {"format": 99}), "has checkpoint format 99, this version reads format 1"),
        (lambda path: rewritten(path, {"model": {"width": 4}}), "do not fit its own configuration"),
    ],
    ids="missing folder empty pickle half header foreign format mismatch".split(),
)
def test_bad_checkpoints_are_refused_by_name(tmp_path: Path, write, message: str) -> None:
    path = tmp_path / "c.safetensors"
    write(path)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_the_model_are_kept(tmp_path: Path) -> None:
    for arguments in ({"metadata": {"format": 2}}, {"metadata": {"model": {}}}, {"state": {"model.x": torch.ones(1)}}):
        with pytest.raises(ValueError, match="is a name that checkpoints keep"):
            save(tmp_path / "c", SemiMoE(width=2), **arguments)
    assert not list(tmp_path.iterdir())


def test_loading_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    model = SemiMoE(width=2)
    save(tmp_path / "c", model)
    parts = export_published(model)
    before = torch.get_rng_state()
    load(tmp_path / "c")
    import_published(parts)
    assert torch.equal(torch.get_rng_state(), before)


def test_imported_weights_are_a_copy() -> None:
    parts = export_published(SemiMoE(width=2))
    model = import_published(parts)
    for parameter in model.parameters():
        parameter.data.fill_(7)
    assert not any((value == 7).any() for state in parts.values() for value in state.values())


def write_and_die(path: Path, moment: str) -> None:
    """Replace a file, and be killed inside of writing, before the file is replaced, or after."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write(part: Path) -> None:
        part.write_bytes(b"new" * 1000)
        if moment == "inside":
            die()

    replace = Path.replace

    def die_about(part: Path, target: Path) -> None:
        if moment == "before":
            die()
        replace(part, target)
        die()

    Path.replace = die_about
    checkpoint.write_atomically(path, write)


@pytest.mark.parametrize(("moment", "left"), [("inside", b"old"), ("before", b"old"), ("after", b"new" * 1000)])
def test_kill_while_saving_leaves_the_old_file_or_the_new_one(tmp_path: Path, moment: str, left: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        try:
            write_and_die(path, moment)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_bytes() == left
    checkpoint.write_atomically(path, lambda part: part.write_bytes(b"again"))  # whatever it left is in nobody's way
    assert path.read_bytes() == b"again"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        part.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(tmp_path / "file", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_round_trip(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    model = SemiMoE(num_classes=3, width=4)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    parts = export_published(model)
    parts = {part: {prefix + key: value for key, value in state.items()} for part, state in parts.items()}
    assert same_state(import_published(parts), model)
    torch.save(parts, tmp_path / "published.pth")
    assert same_state(import_published(tmp_path / "published.pth"), model)


def test_export_has_the_published_keys_and_shapes() -> None:
    golden = json.loads((Path(__file__).parent / "golden" / "official_checkpoint_keys.json").read_text())
    exported = export_published(SemiMoE())
    assert {part: {key: list(value.shape) for key, value in exported[part].items()} for part in exported} == golden


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path(self.target),))


def test_published_file_with_code_is_refused_unexecuted(tmp_path: Path) -> None:
    payload = Payload()
    payload.target = str(tmp_path / "executed")
    path = tmp_path / "evil.pth"
    torch.save({"segment_model": payload}, path)
    with pytest.raises(UserError, match=r"evil\.pth: not a torch file of plain tensors"):
        import_published(path)
    path.write_bytes(pickle.dumps(payload))
    with pytest.raises(UserError, match=r"evil\.pth: not a torch file of plain tensors"):
        import_published(path)
    assert not (tmp_path / "executed").exists()


def test_incomplete_published_checkpoints_are_refused(tmp_path: Path) -> None:
    parts = export_published(SemiMoE(width=2))
    with pytest.raises(UserError, match="has no gating_model"):
        import_published({part: parts[part] for part in ("segment_model", "sdf_model", "boundary_model")})
    head = "Conv_1x1.weight"
    with pytest.raises(UserError, match="num_classes is 1"):
        import_published({**parts, "segment_model": {**parts["segment_model"], head: parts["segment_model"][head][:1]}})
    del parts["sdf_model"]["Conv3.conv.0.weight"]
    with pytest.raises(UserError, match="not a published Semi-MoE checkpoint"):
        import_published(parts)
    with pytest.raises(UserError, match=r"nothing\.pth: no such file"):
        import_published(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="the published layout has experts for mask, sdf, boundary"):
        export_published(SemiMoE(width=2, expert_tasks=("mask", "sdf")))


def test_files_have_the_permissions_of_the_user_s_others(tmp_path: Path) -> None:
    """A colleague may read them, as the umask says."""
    (tmp_path / "other").touch()
    save(tmp_path / "c.safetensors", SemiMoE(width=1))
    assert (tmp_path / "c.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
