"""Fill nested dataclasses from mappings such as YAML, with an error for every mistake."""

import ast
import dataclasses
import difflib
import inspect
import itertools
import types
import typing
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import yaml


class OnceLoader(yaml.SafeLoader):
    """YAML that refuses two traps: duplicate keys, of which plain YAML takes the last, and numbers with another value
    than it seems, such as 010 (8) or 1:30 (90)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                raise yaml.YAMLError(f"{key.value} occurs twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_plain_number(self, node: yaml.ScalarNode) -> int | float:
        """Parse a number. YAMLError: it is in base 8 or 60."""
        is_whole = node.tag.endswith(":int")
        number = self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)
        digits = node.value.lstrip("+-")
        if ":" in digits or (is_whole and len(digits) > 1 and digits[0] == "0" and digits[1] not in "xXbB"):
            raise yaml.YAMLError(
                f"{node.value} in line {node.start_mark.line + 1} is {number} in YAML; write {number}, or quote text"
            )
        return number


for _tag in ("int", "float"):
    OnceLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", OnceLoader.construct_plain_number)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of all fields by dotted name."""
    fields: dict[str, Any] = {}
    for key, value in values.items():
        fields |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return fields


def merge(base: Any, values: Any, source: str, prefix: str = "") -> Any:
    """The dataclass ``base`` with the fields in ``values`` replaced.

    ``prefix`` is put before field names in errors. ValueError, naming the field and ``source``: an unknown key or a
    value of the wrong type.
    """
    if not isinstance(values, dict):
        name = prefix.rstrip(".") or "config"
        raise ValueError(f"{name}: expected fields and their values, got {_shown(values)} in {source}")
    kinds = typing.get_type_hints(type(base))
    changes = {}
    for key, value in values.items():
        if key not in kinds:
            close = difflib.get_close_matches(str(key).lower().replace("-", "_"), kinds, 1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            raise ValueError(f"{prefix}{key}: expected one of {', '.join(kinds)}, got an unknown key in {source}{hint}")
        field = getattr(base, key)
        if dataclasses.is_dataclass(field):
            changes[key] = merge(field, value, source, f"{prefix}{key}.")
        else:
            changes[key] = _convert(value, kinds[key], f"{prefix}{key}", source)
    return replace(base, **changes)


def _convert(value: Any, kind: Any, name: str, source: str) -> Any:
    converted = _match(value, kind)
    if converted is _NO_MATCH:
        raise ValueError(f"{name}: expected {words(kind)}, got {_shown(value)} in {source}")
    return converted


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)


_NO_MATCH = object()


def _match(value: Any, kind: Any) -> Any:
    """``value`` converted to the annotation ``kind``, or ``_NO_MATCH``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return next((match for k in arguments if (match := _match(value, k)) is not _NO_MATCH), _NO_MATCH)
    if origin is Literal:
        return value if value in arguments else _NO_MATCH
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return _NO_MATCH
        kinds = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        if not value or len(kinds) != len(value):
            return _NO_MATCH
        matches = tuple(_match(v, k) for v, k in zip(value, kinds, strict=True))
        return _NO_MATCH if _NO_MATCH in matches else matches
    if kind is types.NoneType:
        return value if value is None else _NO_MATCH
    if kind is float:
        # YAML 1.1 reads 1e-4 as text.
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                return _NO_MATCH
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _NO_MATCH
    return value if type(value) is kind else _NO_MATCH


def from_texts(texts: Sequence[str], kind: Any, name: str) -> Any:
    """The value of field ``name`` with annotation ``kind`` from the words of a command line; none and null are None.

    ValueError: ``kind`` allows no such value.
    """
    value = _read(texts, kind)
    if value is _NO_MATCH:
        got = repr(" ".join(texts)) if any(texts) else "nothing"
        raise ValueError(f"{name}: expected {words(kind)}, got {got}")
    return value


def _read(texts: Sequence[str], kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # Any text is a str, so null first
        ordered = sorted(arguments, key=lambda k: k is not types.NoneType)
        return next((value for k in ordered if (value := _read(texts, k)) is not _NO_MATCH), _NO_MATCH)
    if origin is tuple:
        kinds = (arguments[0],) * len(texts) if arguments[-1] is Ellipsis else arguments
        if not texts or len(kinds) != len(texts):
            return _NO_MATCH
        values = tuple(_read([text], k) for text, k in zip(texts, kinds, strict=True))
        return _NO_MATCH if _NO_MATCH in values else values
    if len(texts) != 1:
        return _NO_MATCH
    (text,) = texts
    if origin is Literal:
        return next((value for value in arguments if str(value) == text), _NO_MATCH)
    if kind is types.NoneType:
        return None if text.lower() in ("none", "null") else _NO_MATCH
    try:
        return kind(text) if kind in (int, float, str) else _NO_MATCH
    except ValueError:
        return _NO_MATCH


def docstrings(kind: type) -> dict[str, str]:
    """The docstring below each field of the dataclass ``kind``, on one line."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef))
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


def words(kind: Any) -> str:
    """The values that an annotation allows, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(words(k) for k in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list of {words(arguments[0])}" if arguments[-1] is Ellipsis else f"{len(arguments)} numbers"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    return names[kind]
