"""Checks of JSON values from files against type hints."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from .errors import UserError


def check_types(path: Path, title: str, values: Any, hints: Mapping[str, Any], remedy: str) -> None:
    """Raise UserError unless `values` is a dict with all keys of `hints` and values of these types.

    title: name of the object in the message. hints: int, float, str, bool, None, Path, Literal, their unions, tuples.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path}: {title} is {shown(values)}, not an object; {remedy}")
    for name, hint in hints.items():
        if name not in values:
            raise UserError(f"{path}: {title} has no {name}; {remedy}")
        if not matches(values[name], hint):
            raise UserError(
                f"{path}: {name} of {title} is {shown(values[name])}, not {type_description(hint)}; {remedy}"
            )


def matches(value: Any, hint: Any) -> bool:
    """Whether a JSON value has a type: one of those of `check_types`, or dict[str, ...].

    JSON stores a tuple as a list. A float may be an integer in JSON, and must be finite.
    """
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(matches(value, choice) for choice in arguments)
    if kind is Literal:
        return isinstance(value, str) and value in arguments
    if kind is tuple and isinstance(value, list):
        expected = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(value) == len(expected) and all(map(matches, value, expected))
    if kind is dict:
        return isinstance(value, dict) and all(matches(item, arguments[1]) for item in value.values())
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is (str if hint is Path else hint)


def type_description(hint: Any) -> str:
    """The description of a type in an error message, such as "an integer or null"."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(type_description, arguments))
    if kind is Literal:
        return " or ".join(map(repr, arguments))
    if kind is tuple:
        elements = f"each {type_description(arguments[0])}"
        return f"a list, {elements}" if arguments[-1] is ... else f"a list of {len(arguments)}, {elements}"
    names = {int: "an integer", float: "a finite number", str: "a string", Path: "a path", bool: "true or false"}
    return "null" if hint is NoneType else names[hint]


def shown(value: Any) -> str:
    """A JSON value as text of at most 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
