"""NaN, inf, denormal, huge, empty and enormous tensors in every operation: the backends agree, and none crashes."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import in_fork
from operations import Arguments, call, draw, flat, tree_map
from torch import Tensor

from semimoe_fast import backend, ops
from semimoe_fast import functional as F
from semimoe_fast.errors import explain

VALUES = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf, "denormal": 1e-41, "huge": 3e38, "minus huge": -3e38}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def changed(arguments: Arguments, name: str, value: float, everywhere: bool) -> Arguments:
    """The arguments with a value at the middle of each floating-point tensor of an argument, or everywhere."""

    def change(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            tensor = tensor.clone()
            tensor.view(-1)[slice(None) if everywhere else tensor.numel() // 2] = value
        return tensor

    return arguments | {name: tree_map(change, arguments[name])}


def results(operation: str, arguments: Arguments, name: str | None) -> list[Tensor] | str:
    """The results of a backend, None for the default one, or the type of its error."""
    try:
        with backend(name) if name else nullcontext():
            return call(operation, arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error).__name__


def disagreement(found: list[Tensor] | str, expected: list[Tensor] | str, value: float) -> str | None:
    """How the results of a fast backend fail to agree with the reference, given the value in the arguments.

    NaN has to be at the same places. Inf becomes NaN or inf at other places if products are summed in another order,
    but no finite number may hide it. Huge numbers overflow in one order and not in another.
    """
    if isinstance(found, str) or isinstance(expected, str):
        return None if found is expected or found == expected else f"{str(found)[:200]}, not {str(expected)[:200]}"
    for x, right in zip(found, expected, strict=True):
        if x.shape != right.shape:
            return f"shape {tuple(x.shape)}, not {tuple(right.shape)}"
        places = x.isnan() != right.isnan()
        if math.isinf(value):
            places = x.isfinite() & ~right.isfinite()
        if places.any() and (math.isinf(value) or not abs(value) > 1e30):
            return f"{places.sum()} of {x.numel()} places disagree, the first is {places.nonzero()[0].tolist()}"
    return None


def outcome(operation: str, arguments: Arguments, device: str, value: float = 0.0) -> str:
    """ "worked", "one line" if all backends refuse, or the difference."""
    arguments = {key: tree_map(lambda tensor: tensor.to(device), argument) for key, argument in arguments.items()}
    expected = results(operation, arguments, "reference")
    chosen, _ = ops.choose(operation, device)
    for name in ("portable", *([None] if chosen == "fused" else [])):
        if difference := disagreement(results(operation, arguments, name), expected, value):
            return f"{name or 'fused'}: {difference}"
    return "one line" if isinstance(expected, str) else "worked"


def replay(found: str) -> str:
    if found not in ("worked", "one line"):
        raise AssertionError(found)
    return found


def try_all(attempt, title: str, operation: str, cases: dict[str, Callable[[], str]]) -> None:
    """The cases of an operation in one child, which may crash."""
    ended = in_fork(lambda: print("\n" + json.dumps({name: case() for name, case in cases.items()})))
    if ended.status != 0:
        attempt(title, operation, replay, f"status {ended.status}: {ended.output}")
        return
    for name, found in json.loads(ended.output.splitlines()[-1]).items():
        attempt(title, f"{operation}: {name}", replay, found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation", ops.OPERATIONS)
def test_special_values(attempt, operation: str, device: str) -> None:
    arguments = draw()[operation]
    cases = {
        f"{value} {'everywhere' if everywhere else 'once'} in {name}": lambda a=(name, number, everywhere): outcome(
            operation, changed(arguments, *a), device, a[1]
        )
        for name in arguments
        for value, number in VALUES.items()
        for everywhere in (False, True)
        if any(tensor.is_floating_point() for tensor in flat(arguments[name]))
    }
    if cases:
        try_all(attempt, "NaN, inf, denormal and huge numbers", operation, cases)


OTHERS = {
    "None": None,
    "list": [1, 2],
    "text": "x",
    "number": 3,
    "object": object(),
    "NumPy array": np.full((2, 2), 0.5),
    "masked array": np.ma.masked_array(np.ones((2, 2)), np.eye(2)),
    "integers": torch.zeros(1, 2, 4, 4, dtype=torch.int64),
    "complex numbers": torch.zeros(1, 2, 4, 4, dtype=torch.complex64),
    "sparse tensor": torch.zeros(2, 2).to_sparse(),
}


@pytest.mark.parametrize("operation", ops.OPERATIONS)
def test_arguments_of_other_types(attempt, operation: str) -> None:
    """Anything in place of each argument: TypeError or ValueError of one line."""
    arguments = draw()[operation]

    def case(name: str, other: object) -> str:
        try:
            getattr(F, operation)(**arguments | {name: other})
        except (TypeError, ValueError) as error:
            return "one line" if "\n" not in str(error) else f"several lines: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    cases = {
        f"{kind} as {name}": lambda n=name, o=other: case(n, o) for name in arguments for kind, other in OTHERS.items()
    }
    try_all(attempt, "arguments of other types", operation, cases)


SHAPES = {
    "no images": {"batch": 0},
    "no rows": {"height": 0},
    "no columns": {"width": 0},
    "no channels": {"channels": 0},
    "one pixel": {"height": 1, "width": 1},
    "one row": {"height": 1, "width": 4099},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation", ops.OPERATIONS)
def test_empty_and_odd_shapes(attempt, operation: str, device: str) -> None:
    cases = {
        name: lambda shape=shape: outcome(operation, draw(**shape)[operation], device) for name, shape in SHAPES.items()
    }
    try_all(attempt, "empty tensors and odd shapes", operation, cases)


@pytest.mark.parametrize("operation", ops.OPERATIONS)
def test_enormous_tensors(attempt, operation: str) -> None:
    """Views of one number as 2^20 x 2^16 pixels, with 4 GB of memory: any result, or an error of one line."""

    def enormous(tensor: Tensor) -> Tensor:
        return tensor[..., :1, :1].expand(*tensor.shape[:-2], 2**20, 2**16) if tensor.shape[-2:] == (6, 5) else tensor

    def case() -> str:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30,) * 2)
        arguments = {name: tree_map(enormous, value) for name, value in draw()[operation].items()}
        try:
            getattr(F, operation)(**arguments)
        except (TypeError, ValueError) as error:
            return "one line" if "\n" not in str(error) else f"several lines: {error}"
        except Exception as error:
            return "one line" if explain(error) else f"{type(error).__name__}: {error}"
        return "worked"

    try_all(attempt, "enormous tensors", operation, {"2^36 pixels": case})
