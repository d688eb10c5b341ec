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
