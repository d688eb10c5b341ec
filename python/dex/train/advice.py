"""Warnings about what is bad for specialisation, and only about that; each names the setting to change.

Shape letters: E experts of a layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dex.analysis.conclusion import told
from dex.analysis.instruments import Instruments
from dex.analysis.sample import FEW_SOURCES
from dex.config import Config
from dex.train.schedules import Schedule

NOISE_GONE = 0.1
"""Exploration noise of this standard deviation or less no longer decides which experts an image takes."""
_LIVELY = 0.1
"""The balance weight that kept experts in use in small runs; the published 0.01 is for long ones."""


class Warned(NamedTuple):
    """One thing that is bad."""

    kind: str
    """The word of its event."""
    text: str


def unused(config: Config, layer: int, experts: Sequence[int], balance_weight: float) -> str:
    """Of experts that get no image after the warm-up."""
    listed = ", ".join(map(str, experts))
    noise = "" if max(config.schedule.noise_std) > 0 else ", or schedule.noise_std above 0"
    return f"layer {layer}: no image goes to expert {listed}: {_more_balance(balance_weight)}{noise}"


class Adviser:
    """Looks at the instruments of one evaluation after the other; says what is bad when it begins to be.

    groups: how many sources (patients, images) the intervals are over.
    """

    def __init__(self, config: Config, experts: Sequence[int], warmup_steps: int):
        self._config, self._experts, self._warmup = config, list(experts), warmup_steps
        self._said: set[str] = set()

    def look(self, found: Instruments, groups: int, step: int, now: Schedule) -> list[Warned]:
        """now: the schedule of the step before. Nothing before the end of the warm-up."""
        if step < self._warmup or not self._experts:
            return []
        bad = {}
        few = [
            f"layer {layer} {routes.sets_masked} of at least {e / 2:g}"
            for layer, (routes, e) in enumerate(zip(found.layers, self._experts, strict=True))
            if routes.sets_masked < e / 2
        ]
        if few:
            listed = "; ".join(few)
            text = f"held-out images go to few sets of experts: {listed}: {_more_balance(now.balance_weight)}"
            bad["few expert sets"] = text
        gap = next((gap for gap in found.gaps if gap.kind in ("other modality", "random")), None)
        gap = next((gap for gap in found.gaps if gap.kind == "other modality"), gap)
        if gap is not None and now.noise_std <= NOISE_GONE and groups >= FEW_SOURCES and gap.gap.low <= 0:
            whose = "another modality's" if gap.kind == "other modality" else "random"
            change = _more_balance(now.balance_weight)
            if self._config.model.route_from == "cls":
                change += ", or model.route_from mean"
            bad["no swap gap"] = (
                f"with {whose} experts the held-out loss changes by {told(gap.gap, signed=True)} of {gap.own:.3f}: the "
                f"experts are not shown to differ: {change}"
            )
        fresh = [Warned(kind, text) for kind, text in bad.items() if kind not in self._said]
        self._said = set(bad)
        return fresh


def _more_balance(weight: float) -> str:
    """What keeps experts in use."""
    return (
        f"raise schedule.balance_weight (now {weight:g}{f'; {_LIVELY:g} for short runs' if weight < _LIVELY else ''})"
    )
