"""Offsets that need more than 32 bits, see `far_cases`; one computed in 32 bits is seen."""

import sys

import pytest
from far_cases import far_cases
from shipped_cases import check

IMAGE = "an image far apart"
OFFSET = "out += (image.to(tl.int64) * tokens + n) * width"


@pytest.mark.parametrize(
    "name",
    [
        IMAGE,
        "probabilities far apart",
        "packed rows far apart",
        "parts of a gradient far apart",
        *(
            pytest.param(f"{what} far apart", marks=pytest.mark.slow)
            for what in (
                "hidden biases",
                "biases of gates",
                "biases by slot",
                "biases of packed rows",
                "biases of gathered rows",
                "rows",
                "columns",
                "parts of a sum",
            )
        ),
    ],
)
def test_offsets_of_more_than_32_bits(shipped, name):
    arch, make = far_cases(shipped)[name]
    check(shipped, make(), shipped.emulated(arch))


def test_an_offset_of_32_bits_is_seen(shipped, tmp_path):
    module = sys.modules[shipped.grouped_mlp.__name__ + ".to_images_kernels"]
    arch, make = far_cases(shipped)[IMAGE]
    with shipped.sabotaged(module, OFFSET, OFFSET.replace(".to(tl.int64)", ".to(tl.int32)"), tmp_path):
        with pytest.raises((shipped.PTXError, AssertionError), match="outside of every allocation|columns: inf >"):
            check(shipped, make(), shipped.emulated(arch))
