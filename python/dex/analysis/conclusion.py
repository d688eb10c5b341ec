"""The conclusion that the swap test allows about a model's experts, in one sentence."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from dex.analysis.intervals import Interval
from dex.analysis.sample import FEW_SOURCES
from dex.analysis.swap import Gap

MARGIN = 0.05
"""Experts are interchangeable if a rise of the loss by more than this share of it is ruled out."""
KINDS = ("specialised", "routing matters", "interchangeable", "undecided", "worse than others'", "no experts")


class Conclusion(NamedTuple):
    """What a comparison of swapped experts shows, in words."""

    kind: str
    """One of ``KINDS``."""
    text: str


def conclude(
    gaps: Sequence[Gap] | None, modality_gap: Gap | None, groups: int, kind_of_groups: str = "sources"
) -> Conclusion:
    """Conclude from the gaps in all layers at once: with another modality's experts, or with random ones if the images
    have one modality.

    gaps, modality_gap: from ``dex.analysis.swap``; gaps None for a model without experts. groups: number of groups that
    the intervals are over; with fewer than ``FEW_SOURCES`` the intervals mean nothing, and nothing is concluded.

    ``specialised`` needs a gap whose interval is above 0 and, paired, above the gap with another image of the same
    modality. Without the second condition routing matters, but is not shown to follow modality.
    """
    if gaps is None:
        return Conclusion("no experts", "This model has no experts that could specialise.")
    at_once = {gap.kind: gap for gap in gaps if gap.layer is None}
    gap = at_once.get("other modality") or at_once["random"]
    by_modality = gap.kind == "other modality"
    whose = "another modality's experts" if by_modality else "random experts"
    difference = format_interval(gap.gap, signed=True)
    cost = f"with {whose} in all layers, the masked loss changes by {difference} of {gap.own:.3f}"
    if groups < FEW_SOURCES:
        reason = f"an interval over fewer than {FEW_SOURCES} {kind_of_groups} means nothing, and there are {groups}"
        return Conclusion("undecided", f"Nothing can be concluded: {cost}, but {reason}.")
    share = math.ceil(1000 * gap.gap.high / gap.own - 1e-9) / 1000  # A bound is rounded up
    if gap.gap.high < 0 and gap.gap.value < -MARGIN * gap.own:
        return Conclusion("worse than others'", f"The router's own choice is worse than others': {cost}.")
    if gap.gap.low <= 0 and share < MARGIN:
        bound = f"a rise of more than {share:.1%} of the loss is ruled out" if share >= 0 else "it does not rise"
        return Conclusion("interchangeable", f"The experts are interchangeable: {cost}; {bound}.")
    if gap.gap.low <= 0:
        bound = f"the interval contains both 0 and a rise of {share:.0%} of the loss"
        return Conclusion("undecided", f"Specialisation is neither shown nor ruled out: {cost}; {bound}.")
    if not by_modality:
        note = "the images have one modality, so this shows nothing about modalities"
        return Conclusion("routing matters", f"The choice of experts matters: {cost}; {note}.")
    if modality_gap is None:
        note = "no image can be compared with another one of its modality"
        return Conclusion("routing matters", f"The choice of experts matters: {cost}; but {note}.")
    beyond = format_interval(modality_gap.gap, signed=True)
    beyond = f"compared with the experts of another image of its own modality, the change is {beyond}"
    if modality_gap.gap.low <= 0:
        return Conclusion("routing matters", f"The choice of experts matters: {cost}; but {beyond}.")
    return Conclusion("specialised", f"The experts are specialised by modality: {cost}; {beyond}.")


def format_interval(interval: Interval, *, signed: bool = False) -> str:
    """``0.436 [0.402, 0.471]``, with more digits for an interval near 0."""
    size, digits = max(map(abs, interval)), 3
    while digits < 6 and 0 < size < 5 * 10.0**-digits:
        digits += 1
    value = f"{interval.value:{'+' if signed else ''}.{digits}f}"
    return f"{value} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
