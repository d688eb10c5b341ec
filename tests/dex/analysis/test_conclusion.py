import pytest

from dex.analysis.conclusion import KINDS, conclude, format_interval
from dex.analysis.intervals import Interval
from dex.analysis.swap import Gap


def gap(kind, value, low, high, layer=None, own=0.4):
    return Gap(kind, layer, Interval(value, low, high), own)


BEYOND = gap("other less same modality", 0.15, 0.05, 0.25)
OVERLAPPING = [gap("same modality", 0.08, 0.05, 0.12), gap("other modality", 0.2, 0.1, 0.3)]


@pytest.mark.parametrize(
    ("gaps", "beyond", "kind", "words"),
    [
        (
            OVERLAPPING,
            BEYOND,
            "specialised",
            "+0.200 [0.100, 0.300] of 0.400; compared with the experts of another image of its own modality, the "
            "change is +0.150 [0.050, 0.250].",
        ),
        (
            OVERLAPPING,
            gap("other less same modality", 0.05, -0.01, 0.2),
            "routing matters",
            "with another modality's experts in all layers, the masked loss changes by +0.200 [0.100, 0.300] of "
            "0.400; but compared with the experts of another image of its own modality, the change is +0.050 [-0.010, "
            "0.200].",
        ),
        (OVERLAPPING[1:], None, "routing matters", "but no image can be compared with another one of its modality"),
        (
            [gap("other modality", 0.002, -0.004, 0.007), gap("other modality", 0.3, 0.2, 0.4, layer=0)],
            BEYOND,
            "interchangeable",
            "changes by +0.002 [-0.004, 0.007] of 0.400; a rise of more than 1.8% of the loss is ruled out",
        ),
        (
            [gap("other modality", 0.02, -0.01, 0.06)],
            None,
            "undecided",
            "contains both 0 and a rise of 15% of the loss",
        ),
        ([gap("other modality", -0.1, -0.2, -0.05)], None, "worse than others'", "changes by -0.100 [-0.200, -0.050]"),
        ([gap("other modality", -0.003, -0.006, -0.001)], None, "interchangeable", "of 0.400; it does not rise."),
        ([gap("random", 0.1, 0.05, 0.2)], None, "routing matters", "with random experts in all layers"),
        ([gap("random", 0.0, 0.0, 0.0)], None, "interchangeable", "a rise of more than 0.0% of the loss is ruled out"),
    ],
)
def test_a_sentence_says_what_the_intervals_do(gaps, beyond, kind, words):
    found = conclude(gaps, beyond, 12)
    assert found.kind == kind in KINDS and words in found.text and found.text.endswith(".")


def test_without_intervals_or_experts_nothing_is_concluded():
    for few in (1, 4):
        found = conclude([gap("other modality", 0.2, 0.1, 0.3)], BEYOND, few, "patients")
        assert found.kind == "undecided" and found.text.startswith("Nothing can be concluded: ")
        assert found.text.endswith(f"an interval over fewer than 5 patients means nothing, and there are {few}.")
    assert conclude([gap("other modality", 0.2, 0.1, 0.3)], BEYOND, 5, "patients").kind == "specialised"
    assert conclude(None, None, 12).kind == "no experts"


def test_an_interval_near_zero_is_told_with_more_digits():
    assert format_interval(Interval(0.00021, -0.0001, 0.0004), signed=True) == "+0.00021 [-0.00010, 0.00040]"
    assert format_interval(Interval(0.436, 0.4, 0.5)) == "0.436 [0.400, 0.500]"
    assert format_interval(Interval(0.0, 0.0, 0.0)) == "0.000 [0.000, 0.000]"
