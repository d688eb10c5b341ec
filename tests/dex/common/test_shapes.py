import pytest

from dex.common.shapes import check_size, height_width, plain_size


def test_a_size_is_a_side_or_height_and_width():
    assert height_width(64) == (64, 64) and height_width([64, 32]) == (64, 32)
    assert plain_size(64) == plain_size((64, 64)) == 64 and plain_size([64, 32]) == (64, 32)


@pytest.mark.parametrize("size", [0, -16, True, 64.0, "64", None, (64,), (64, 64, 64), (64, 0), (64, True), {64, 32}])
def test_what_is_no_size_is_named(size):
    with pytest.raises(ValueError, match=r"^img_size: expected a positive whole number, or two, height and width, got"):
        check_size("img_size", size)
