"""Dataclasses from YAML and back: every value checked against the annotation of its field."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

MAX_YAML_BYTES = 2**20


def read(path: Path) -> Any:
    """The plain values of a YAML file. Raises ValueError if it cannot be read, is too large or is not YAML."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise ValueError(f"expected a source description; {error.strerror}") from None
    if len(data) > MAX_YAML_BYTES:
        raise ValueError(f"expected at most {MAX_YAML_BYTES} bytes")
    return load(data)


class _Loader(yaml.SafeLoader):
    """A safe loader that also rejects repeated keys."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, str):
                raise ValueError(f"expected keys that are words, got {key!r}")
            if key in seen:
                raise ValueError(f"{key}: expected once, got several times")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load(data: bytes) -> Any:
    """The plain values of YAML text in UTF-8. Raises ValueError for anything else, and for repeated keys."""
    try:
        return yaml.load(data.decode("utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"expected YAML; {' '.join(str(error).split())}") from None


@functools.cache
def annotations(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass, by field."""
    return get_type_hints(kind)


def build(kind: type, values: Any, prefix: str) -> Any:
    """A dataclass from plain values, checked against its annotations. A ValueError names the field."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix or 'description'}: expected keys and values, got {type(values).__name__}")
    dot = f"{prefix}." if prefix else ""
    expected = annotations(kind)
    for name in values:
        if name not in expected:
            raise ValueError(f"{dot}{name}: expected one of {', '.join(expected)}")
    for entry in dataclasses.fields(kind):
        if entry.name not in values and entry.default is dataclasses.MISSING:
            raise ValueError(f"{dot}{entry.name}: missing")
    return kind(**{name: _convert(expected[name], value, dot + name) for name, value in values.items()})


def _convert(kind: Any, value: Any, name: str) -> Any:
    if get_origin(kind) is UnionType:
        (kind,) = (other for other in get_args(kind) if other is not NoneType)
        return None if value is None else _convert(kind, value, name)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"{name}: expected a list, got {value!r}")
        if kinds[-1] is not Ellipsis:
            if len(value) != len(kinds):
                raise ValueError(f"{name}: expected {len(kinds)} values, got {len(value)}")
            return tuple(_convert(k, v, name) for k, v in zip(kinds, value, strict=True))
        return tuple(_convert(kinds[0], v, name) for v in value)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value, name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}: expected {kind.__name__}, got {value!r}")
    return value


def plain(value: Any) -> Any:
    """A field's value as plain values; fields of a dataclass with their default value are omitted."""
    if dataclasses.is_dataclass(value):
        return {
            e.name: plain(getattr(value, e.name))
            for e in dataclasses.fields(value)
            if e.default is dataclasses.MISSING or getattr(value, e.name) != e.default
        }
    return [plain(v) for v in value] if isinstance(value, tuple) else value
