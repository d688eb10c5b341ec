from dataclasses import dataclass, field
from typing import Literal

import pytest

from dex.common import fields


@dataclass(frozen=True)
class Inner:
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Outer:
    rate: float = 0.5
    inner: Inner = field(default_factory=Inner)


def test_what_is_named_is_replaced_and_the_rest_stays():
    merged = fields.merge(Outer(), {"inner": {"sizes": [1, 2]}, "rate": "1e-3"}, "a test")
    assert merged == Outer(1e-3, Inner("a", (1, 2)))
    assert fields.flat({"rate": 1, "inner": {"kind": "a"}}) == {"rate": 1, "inner.kind": "a"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"kind": "c"}}, "inner.kind: expected one of a, b, got 'c' in a test"),
        ({"inner": {"sizes": [1, "2"]}}, "inner.sizes: expected a list of a whole number or null"),
        ({"inner": None}, "inner: expected fields and their values, got nothing in a test"),
        ({"rates": 1}, "rates: expected one of rate, inner, got an unknown key in a test"),
        ({"rate": True}, "rate: expected a number, got True"),
    ],
)
def test_a_mistake_is_named(values, message):
    with pytest.raises(ValueError) as error:
        fields.merge(Outer(), values, "a test")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("texts", "kind", "value"),
    [
        (["3"], int, 3),
        (["3"], float, 3.0),
        (["1e-3"], float | None, 1e-3),
        (["none"], float | None, None),
        (["Null"], str | None, None),
        (["3"], str | None, "3"),
        (["3"], Literal[1, 3], 3),
        (["b"], Literal["a", "b"], "b"),
        (["7"], int | tuple[int, ...], 7),
        (["7", "8"], int | tuple[int, ...], (7, 8)),
        (["0.9", "1"], tuple[float, float], (0.9, 1.0)),
        (["null"], tuple[int, ...] | None, None),
    ],
)
def test_words_of_the_command_line_become_values(texts, kind, value):
    read = fields.from_texts(texts, kind, "field")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("texts", "kind", "message"),
    [
        (["4.5"], int, "field: expected a whole number, got '4.5'"),
        (["2"], Literal[1, 3], "field: expected one of 1, 3, got '2'"),
        (["1", "2", "3"], tuple[float, float], "field: expected 2 numbers, got '1 2 3'"),
        (["1"], tuple[float, float], "field: expected 2 numbers, got '1'"),
        (["1", "b"], int | tuple[int, ...], "field: expected a whole number or a list of a whole number, got '1 b'"),
        ([], int | tuple[int, ...], "field: expected a whole number or a list of a whole number, got nothing"),
        ([""], int | None, "field: expected a whole number or null, got nothing"),
        (["a", "b"], str, "field: expected text, got 'a b'"),
        (["true"], bool, "field: expected true or false, got 'true'"),
    ],
)
def test_wrong_words_are_named(texts, kind, message):
    with pytest.raises(ValueError) as error:
        fields.from_texts(texts, kind, "field")
    assert str(error.value) == message


@dataclass
class Described:
    """A record."""

    first: int = 1
    """Of two
    lines."""
    second: int = 2
    third: int = 3
    """The last."""


def test_docstrings_of_fields():
    assert fields.docstrings(Described) == {"first": "Of two lines.", "third": "The last."}
