"""What the swap test allows to say of a model's experts, in a sentence; never more than its interval does."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from dex.analysis.intervals import Interval
from dex.analysis.sample import FEW_SOURCES
from dex.analysis.swap import Gap

MARGIN = 0.05
"""Experts are called interchangeable when a rise of the loss by more than this share of it is ruled out."""
KINDS = ("specialised", "routing matters", "interchangeable", "undecided", "worse than others'", "no experts")


class Conclusion(NamedTuple):
    kind: str
    """Of `KINDS`."""
    text: str


def conclude(
    gaps: Sequence[Gap] | None, modality_gap: Gap | None, groups: int, kind_of_groups: str = "sources"
) -> Conclusion:
    """From the gaps in all layers at once: that of another modality's experts, or of random ones where the images are
    of one modality.

    gaps, modality_gap: of `dex.analysis.swap`; gaps None for a model without experts. groups: how many the intervals
    are over; with fewer than `FEW_SOURCES` they say nothing, and nothing is concluded.

    ``specialised`` takes a gap whose interval lies above 0 and, paired, above that of another image of the same
    modality; without the latter routing matters, but is not shown to follow modality.
    """
    if gaps is None:
        return Conclusion("no experts", "This model routes nothing: it has no experts that could specialise.")
    at_once = {gap.kind: gap for gap in gaps if gap.layer is None}
    gap = at_once.get("other modality") or at_once["random"]
    by_modality = gap.kind == "other modality"
    whose = "another modality's experts" if by_modality else "random experts"
    cost = f"with {whose} in all layers, the masked loss changes by {told(gap.gap, signed=True)} of {gap.own:.3f}"
    if groups < FEW_SOURCES:
        what = f"an interval over fewer than {FEW_SOURCES} {kind_of_groups} says nothing, and there are {groups}"
        return Conclusion("undecided", f"Nothing can be said: {cost}, but {what}.")
    share = math.ceil(1000 * gap.gap.high / gap.own - 1e-9) / 1000  # a bound is rounded up
    if gap.gap.high < 0 and gap.gap.value < -MARGIN * gap.own:
        return Conclusion("worse than others'", f"The router's own choice is worse than others': {cost}.")
    if gap.gap.low <= 0 and share < MARGIN:
        ruled_out = f"a rise of more than {share:.1%} of the loss is ruled out" if share >= 0 else "it does not rise"
        return Conclusion("interchangeable", f"The experts are interchangeable: {cost}; {ruled_out}.")
    if gap.gap.low <= 0:
        open_ = f"the interval holds 0 and a rise of {share:.0%} of the loss"
        return Conclusion("undecided", f"No specialisation is shown, and none is ruled out: {cost}; {open_}.")
    if not by_modality:
        more = "the images are of one modality, so that this says nothing of modalities"
        return Conclusion("routing matters", f"Which experts an image takes matters: {cost}; {more}.")
    if modality_gap is None:
        apart = "no image has another one of its modality to be compared with"
        return Conclusion("routing matters", f"Which experts an image takes matters: {cost}; but {apart}.")
    beyond = told(modality_gap.gap, signed=True)
    beyond = f"beyond what experts of another image of its own modality cost it is {beyond}"
    if modality_gap.gap.low <= 0:
        return Conclusion("routing matters", f"Which experts an image takes matters: {cost}; but {beyond}.")
    return Conclusion("specialised", f"The experts are specialised by modality: {cost}; {beyond}.")


def told(interval: Interval, *, signed: bool = False, digits: int = 3) -> str:
    """``0.436 [0.402, 0.471]``; with as many digits more as an interval near 0 needs."""
    size = max(map(abs, interval))
    while digits < 6 and 0 < size < 5 * 10.0**-digits:
        digits += 1
    value = f"{interval.value:{'+' if signed else ''}.{digits}f}"
    return f"{value} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
