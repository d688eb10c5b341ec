import pytest

from dex.common.units import duration, format_bytes


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (185, "3m05s"), (7620, "2h07m"), (356400, "4d03h"), (-1, "0s")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (812, "812 B"), (4000, "4 kB"), (309_600_000, "310 MB"), (1_024_500_000_000, "1,024.5 GB")],
)
def test_bytes(count, text):
    assert format_bytes(count) == text
