import pytest

from dex.cli import _features
from dex.cli._console import Parser


def parsed(*arguments):
    parser = Parser()
    _features.add_options(parser)
    return parser.parse_args(arguments)


def test_reading_is_what_was_given():
    assert _features.reading(parsed()) == {"planes": ["auto"]}
    options = ("--modality", "CT", "--slope", "2", "--intercept", "-3", "--frame-stride", "5", "--planes", "axial")
    want = {"modality": "CT", "slope": 2.0, "intercept": -3.0, "frame_stride": 5, "planes": ["axial"]}
    assert _features.reading(parsed(*options)) == want


def test_a_process_for_each_core_of_a_rank_reads(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    assert _features.workers(parsed()) == 8 and _features.workers(parsed("--workers", "0")) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert _features.workers(parsed()) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert _features.workers(parsed()) == 1


def test_a_size_is_a_side_or_height_and_width():
    parser = Parser()
    _features.add_weights(parser)
    for text, size in (("64", 64), ("64x64", 64), ("64X32", (64, 32))):
        assert parser.parse_args(["--img-size", text]).img_size == size
    for text in ("", "64x", "x", "a", "6.5", "1x2x3"):
        with pytest.raises(ValueError, match="expected pixels, such as 224 or 224x320"):
            parser.parse_args(["--img-size", text])
