"""Nested dataclasses of plain values: filled from mappings with every mistake named, and what their types expect."""

import dataclasses
import difflib
import types
import typing
from dataclasses import replace
from typing import Any, Literal

import yaml


class OnceLoader(yaml.SafeLoader):
    """YAML without two traps: a key that comes twice in one mapping, of which plain YAML takes the last one, and a
    number that is not what it looks like, 010 (8) or 1:30 (90), are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                raise yaml.YAMLError(f"{key.value} comes twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_plain_number(self, node: yaml.ScalarNode) -> int | float:
        """A number. YAMLError for one in base 8 or 60."""
        is_whole = node.tag.endswith(":int")
        number = self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)
        digits = node.value.lstrip("+-")
        if ":" in digits or (is_whole and len(digits) > 1 and digits[0] == "0" and digits[1] not in "xXbB"):
            raise yaml.YAMLError(
                f"{node.value} in line {node.start_mark.line + 1} is {number} in YAML; write {number}, or quote a text"
            )
        return number


for _tag in ("int", "float"):
    OnceLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", OnceLoader.construct_plain_number)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name of every field -> value."""
    fields: dict[str, Any] = {}
    for key, value in values.items():
        fields |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return fields


def merge(base: Any, values: Any, source: str, prefix: str = "") -> Any:
    """The dataclass ``base`` with the fields that ``values`` names replaced.

    ``prefix`` comes before a field's name in errors. ValueError, naming the field and ``source``: an unknown key or a
    value of the wrong type.
    """
    if not isinstance(values, dict):
        name = prefix.rstrip(".") or "config"
        raise ValueError(f"{name}: expected fields and their values; got {_shown(values)} in {source}")
    kinds = typing.get_type_hints(type(base))
    changes = {}
    for key, value in values.items():
        if key not in kinds:
            close = difflib.get_close_matches(str(key).lower().replace("-", "_"), kinds, 1)
            meant = f"; perhaps {prefix}{close[0]}" if close else ""
            raise ValueError(
                f"{prefix}{key}: expected one of {', '.join(kinds)}; got an unknown key in {source}{meant}"
            )
        old = getattr(base, key)
        if dataclasses.is_dataclass(old):
            changes[key] = merge(old, value, source, f"{prefix}{key}.")
        else:
            changes[key] = _convert(value, kinds[key], f"{prefix}{key}", source)
    return replace(base, **changes)


def _convert(value: Any, kind: Any, name: str, source: str) -> Any:
    found = _match(value, kind)
    if found is _NO:
        raise ValueError(f"{name}: expected {words(kind)}; got {_shown(value)} in {source}")
    return found


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)


_NO = object()


def _match(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, or `_NO`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return next((found for k in arguments if (found := _match(value, k)) is not _NO), _NO)
    if origin is Literal:
        return value if value in arguments else _NO
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return _NO
        kinds = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        if not value or len(kinds) != len(value):
            return _NO
        found = tuple(_match(v, k) for v, k in zip(value, kinds, strict=True))
        return _NO if _NO in found else found
    if kind is types.NoneType:
        return value if value is None else _NO
    if kind is float:
        # YAML 1.1 reads 1e-4 as text.
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                return _NO
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _NO
    return value if type(value) is kind else _NO


def words(kind: Any) -> str:
    """What is expected of a value of this annotation."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(words(k) for k in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list of {words(arguments[0])}" if arguments[-1] is Ellipsis else f"{len(arguments)} numbers"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    return names[kind]
