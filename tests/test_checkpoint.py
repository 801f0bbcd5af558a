"""Checkpoints: round trips, refusal of damaged and hostile files, and the published layout."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refusals import refused
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


def test_preprocessing_is_saved_and_loaded(tmp_path: Path) -> None:
    preprocessing = Preprocessing(96, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1.5)
    save(tmp_path / "with", SemiMoE(width=2), {"preprocessing": preprocessing._asdict()})
    save(tmp_path / "without", SemiMoE(width=2))
    assert Preprocessing.of(tmp_path / "with", load(tmp_path / "with").metadata) == preprocessing
    with pytest.raises(UserError, match="without: holds no image size"):
        Preprocessing.of(tmp_path / "without", load(tmp_path / "without").metadata)


MODEL = {"in_channels": 3, "num_classes": 2, "width": 2, "expert_tasks": ["mask", "sdf", "boundary"]}


def write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def damaged(path: Path, keep: float) -> None:
    save(path, SemiMoE(width=2))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def rewritten(path: Path, changes: dict) -> None:
    """A complete checkpoint with changed metadata."""
    save(path, SemiMoE(width=2))
    metadata, tensors = checkpoint.read(path)
    save_file(tensors, path, {checkpoint.METADATA_KEY: json.dumps(metadata | changes)})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is no file"),
        (lambda path: write_bytes(path, b""), "not a readable checkpoint"),
        (lambda path: write_bytes(path, b"\x80\x04 pickle?"), "not a readable checkpoint"),
        (lambda path: damaged(path, 0.5), "not a readable checkpoint"),
        (lambda path: damaged(path, 0.001), "not a readable checkpoint"),
        (lambda path: save_file({"x": torch.zeros(1)}, path), "not a checkpoint of semimoe_fast"),
        (lambda path: rewritten(path, {"format": 99}), "has checkpoint format 99, this version reads format 1"),
        (lambda path: rewritten(path, {"model": MODEL | {"width": 4}}), "do not fit its own configuration"),
    ],
    ids="missing folder empty pickle half header foreign format mismatch".split(),
)
def test_bad_checkpoints_are_refused_by_name(tmp_path: Path, write, message: str) -> None:
    path = tmp_path / "c.safetensors"
    write(path)
    line = refused(load, path)
    assert line.startswith(str(path))
    assert message in line


WEIGHTS = SemiMoE(**MODEL).state_dict()
STATISTICS = Preprocessing(32, [0.5] * 3, [0.1] * 3)._asdict()  # lists, as in JSON


def hostile(header: object = None, weights: dict[str, torch.Tensor | None] | None = None) -> Callable[[Path], None]:
    """A function that writes a checkpoint with other metadata (JSON value or text) or weights (None: leave it out)."""
    state = {f"model.{k}": v for k, v in (WEIGHTS | (weights or {})).items() if v is not None}
    header = {"format": 1, "model": MODEL} if header is None else header
    text = header if isinstance(header, str) else json.dumps(header)
    return lambda path: save_file(state, path, {checkpoint.METADATA_KEY: text})


def with_model(**changes: object) -> Callable[[Path], None]:
    return hostile({"format": 1, "model": MODEL | changes})


STEM = "experts.0.encoder.0.0.weight"
HOSTILE = {
    "no metadata": (lambda path: save_file(WEIGHTS, path), "not a checkpoint of semimoe_fast"),
    "other program": (
        lambda path: save_file(WEIGHTS, path, {"format": "pt"}),
        "not a checkpoint of semimoe_fast",
    ),
    "not JSON": (hostile("{"), "its metadata is not JSON"),
    "deeply nested JSON": (hostile("[" * 100_000), "its metadata is not JSON"),
    "JSON of another type": (hostile([1]), "its metadata is [1], not an object"),
    "no format": (hostile({"model": MODEL}), "its metadata has no format"),
    "format is a list": (hostile({"format": [1], "model": MODEL}), "format of its metadata is [1], not an integer"),
    "no model": (hostile({"format": 1}), "model is null, not an object"),
    "model is a list": (hostile({"format": 1, "model": [2]}), "model is [2], not an object"),
    "argument missing": (hostile({"format": 1, "model": {"width": 2}}), "model has no in_channels"),
    "argument unknown": (with_model(depth=9), "model has 'depth', which is no argument"),
    "width is text": (with_model(width="2"), 'width of model is "2", not an integer'),
    "width is true": (with_model(width=True), "width of model is true, not an integer"),
    "width is absurd": (with_model(width=10**9), "do not fit its own configuration"),
    "width is beyond 64 bits": (with_model(width=10**30), "do not fit its own configuration"),
    "width is negative": (with_model(width=-2), "do not fit its own configuration"),
    "channels are absurd": (with_model(in_channels=10**9), "do not fit its own configuration"),
    "channels overflow": (with_model(in_channels=2**61), "do not fit its own configuration"),
    "classes are absurd": (with_model(num_classes=10**9), "do not fit its own configuration"),
    "classes are beyond 64 bits, mask is the second expert": (
        with_model(num_classes=10**30, expert_tasks=["sdf", "mask", "boundary"]),
        "do not fit its own configuration",
    ),
    "one class, with its head": (
        hostile({"format": 1, "model": MODEL | {"num_classes": 1}}, {"experts.0.head.weight": torch.ones(1, 2, 1, 1)}),
        "num_classes of model is 1, not 2 or more",
    ),
    "no experts": (with_model(expert_tasks=[]), "expert_tasks of model is empty"),
    "too many experts": (with_model(expert_tasks=["mask"] * 10_000), "do not fit its own configuration"),
    "unknown task": (
        with_model(expert_tasks=["mask", "depth"]),
        'expert_tasks of model is ["mask", "depth"], not a list',
    ),
    "weight missing": (hostile(weights={STEM: None}), "do not fit its own configuration"),
    "weight of another shape": (hostile(weights={"gating.heads.0.bias": torch.ones(3)}), "do not fit its own"),
    "weight of another type": (hostile(weights={STEM: WEIGHTS[STEM].int()}), "is torch.int32, not torch.float32"),
    "weight beyond the range of float32": (hostile(weights={STEM: WEIGHTS[STEM].double() * 1e300}), "not finite"),
    "weight of unknown type": (lambda path: path.write_bytes(tensor_of_type("F6_E2M3")), "not a readable checkpoint"),
}


def tensor_of_type(dtype: str) -> bytes:
    """A safetensors file with a dtype that torch may not have."""
    tensor = {"dtype": dtype, "shape": [4], "data_offsets": [0, 3]}
    text = json.dumps({"__metadata__": {checkpoint.METADATA_KEY: "{}"}, "x": tensor}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(3)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_checkpoints_are_refused_in_a_line(tmp_path: Path, case: str) -> None:
    write, message = HOSTILE[case]
    path = tmp_path / "c.safetensors"
    write(path)
    assert_remedy(refused(load, path), path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([1], "preprocessing is [1], not an object"),
        ({"image_size": "32"}, 'image_size of preprocessing is "32", not an integer'),
        ({"image_size": 10**9}, "image_size of preprocessing is 1000000000, not from 1 to 16384"),
        ({"mean": [0.5]}, "mean of preprocessing is [0.5], not a list of 3, each a finite number"),
        ({"mean": [10**400, 0, 0]}, "not a list of 3, each a finite number"),
        ({"std": [0.1, float("nan"), 0.1]}, "std of preprocessing is [0.1, NaN, 0.1], not a list of 3"),
        ({"std": [0.1, 0, 0.1]}, "std of preprocessing is [0.1, 0, 0.1], not from 0.0001 to 1"),
        ({"std": [0.1, 1e-320, 0.1]}, "not from 0.0001 to 1"),
        ({"mean": [0.5, 1e39, 0.5]}, "mean of preprocessing is [0.5, 1e+39, 0.5], not from 0 to 1"),
        ({"ring_radius": -1}, "ring_radius of preprocessing is -1, not 0 or more"),
        ({"scale": 0}, "scale of preprocessing is 0, not positive"),
        ({"sampling": "tiles"}, "sampling of preprocessing is \"tiles\", not 'resize' or 'crops'"),
        ({"ring_radius": None}, "ring_radius of preprocessing is null, not a finite number"),
    ],
)
def test_hostile_statistics_are_refused_in_a_line(changes: object, message: str) -> None:
    values = STATISTICS | changes if isinstance(changes, dict) else changes
    assert_remedy(
        refused(Preprocessing.of, Path("c.safetensors"), {"preprocessing": values}), Path("c.safetensors"), message
    )


def assert_remedy(line: str, path: Path, message: str) -> None:
    assert line.startswith(f"{path}: ")
    assert message in line
    assert "; " in line
    assert len(line) < 400


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_types_are_cast_and_it_is_said(tmp_path: Path, capsys, dtype: torch.dtype) -> None:
    path, weight = tmp_path / "c.safetensors", WEIGHTS[STEM].to(dtype)
    hostile(weights={STEM: weight})(path)
    loaded = load(path).model.state_dict()[STEM]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, weight.float())
    assert capsys.readouterr().err == f"warning: {path}: its weights are {dtype} and are cast to torch.float32\n"


def test_names_reserved_for_the_model_are_refused(tmp_path: Path) -> None:
    for arguments in ({"metadata": {"format": 2}}, {"metadata": {"model": {}}}, {"state": {"model.x": torch.ones(1)}}):
        with pytest.raises(ValueError, match="is reserved for the model in checkpoints"):
            save(tmp_path / "c", SemiMoE(width=2), **arguments)
    assert not list(tmp_path.iterdir())


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
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


def test_published_file_with_code_is_refused_without_executing_it(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("segment_model", "Conv1.conv.0.weight", 3, "segment_model holds 'Conv1.conv.0.weight' (str -> int)"),
        ("gating_model", 7, torch.ones(1), "gating_model holds 7 (int -> Tensor)"),
        ("segment_model", "Conv1.conv.0.weight", torch.ones(4), "the first and the last weight are (4,)"),
        ("segment_model", "Conv_1x1.weight", torch.ones(()), "the first and the last weight are (2, 3, 3, 3) and ()"),
        ("segment_model", "Conv1.conv.0.weight", torch.ones(0, 3, 3, 3), "the first and the last weight are (0, 3"),
        ("sdf_model", "Conv1.conv.0.bias", torch.ones(5), "size of tensor"),
        ("sdf_model", "Conv1.conv.0.weight", torch.ones(2, 3, 3, 3, dtype=torch.int64), "ExpertUNet"),
        ("gating_model", "odd_head.conv1.weight", torch.ones(1), "odd_head"),
    ],
)
def test_hostile_published_checkpoints_are_refused_in_a_line(part: str, key: object, value: object, message: str):
    parts = export_published(SemiMoE(width=2))
    parts[part][key] = value
    assert_remedy(refused(import_published, parts), Path("the dict of state dicts"), message)


def test_only_the_published_experts_are_exported() -> None:
    with pytest.raises(ValueError, match="the published layout has experts for mask, sdf, boundary"):
        export_published(SemiMoE(width=2, expert_tasks=("mask", "sdf")))


def test_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save(tmp_path / "c.safetensors", SemiMoE(width=1))
    assert (tmp_path / "c.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_checkpoint_that_may_not_be_read_is_not_called_damaged(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match="you may not read it; change its permissions"):
        checkpoint.read(finished / "last.safetensors")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is no file: give the best"):
        checkpoint.read(tmp_path / "pipe")


def test_model_without_channels(tmp_path):
    with pytest.warns(UserWarning, match="zero-element"):
        checkpoint.save(tmp_path / "a", SemiMoE(width=0))
    with pytest.raises(UserError, match="do not fit its own configuration"):
        load(tmp_path / "a")
