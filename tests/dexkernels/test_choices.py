"""The types of choices are what the checks take: no name is in one and not in the other."""

from typing import get_args, get_type_hints

import pytest

from dexkernels import DEXLayer, choices
from dexkernels.layout import LAYOUTS
from dexkernels.ops.dense import ACTIVATIONS

CHOICES = {
    "routing": choices.RoutingName,
    "align": choices.AlignKind,
    "route_from": choices.RouteFrom,
    "path": choices.PathName,
    "activation": choices.ActivationName,
    "layout": choices.LayoutName,
}


def test_tables_have_the_names_of_the_types():
    assert tuple(LAYOUTS) == get_args(choices.LayoutName)
    assert tuple(ACTIVATIONS) == get_args(choices.ActivationName)


@pytest.mark.parametrize("argument", CHOICES)
def test_a_layer_takes_the_names_of_the_type_and_no_other(argument):
    assert get_type_hints(DEXLayer.__init__)[argument] == CHOICES[argument]
    more = {"route_from": "mean"} if argument == "layout" else {}
    for name in get_args(CHOICES[argument]):
        assert getattr(DEXLayer(8, 16, 2, 1, **{argument: name}, **more), argument) == name
    with pytest.raises(ValueError, match=f"^{argument}: expected one of .*, got 'mean token'$"):
        DEXLayer(8, 16, 2, 1, **{argument: "mean token"}, **more)
