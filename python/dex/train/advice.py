"""Warnings about what prevents specialisation; each names the setting to change.

Shape letters: E experts of a layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dex.analysis.conclusion import format_interval
from dex.analysis.instruments import Instruments
from dex.analysis.sample import FEW_SOURCES
from dex.config import Config
from dex.train.schedules import Schedule

NOISE_GONE = 0.1
"""Exploration noise of this standard deviation or less no longer decides which experts are chosen."""
_SHORT_RUN_BALANCE = 0.1
"""The balance weight that kept experts in use in small runs; the published 0.01 is for long runs."""


class Warned(NamedTuple):
    """A warning."""

    kind: str
    """Name of its event."""
    text: str


def unused(config: Config, layer: int, experts: Sequence[int], balance_weight: float) -> str:
    """Warning about experts that get no image after the warm-up."""
    listed = ", ".join(map(str, experts))
    noise = "" if max(config.schedule.noise_std) > 0 else ", or schedule.noise_std above 0"
    return f"layer {layer}: no image goes to expert {listed}: {_more_balance(balance_weight)}{noise}"


class Adviser:
    """Examines the instruments of each evaluation and warns once when a problem begins."""

    def __init__(self, config: Config, experts: Sequence[int], warmup_steps: int):
        """experts: number of experts of each layer."""
        self._config, self._experts, self._warmup = config, list(experts), warmup_steps
        self._active: set[str] = set()
        """Kinds of the problems in the last evaluation."""

    def look(self, instruments: Instruments, groups: int, step: int, schedule: Schedule) -> list[Warned]:
        """New warnings; none before the end of the warm-up.

        groups: number of sources (patients, images) that the intervals are over. schedule: of the step before.
        """
        if step < self._warmup or not self._experts:
            return []
        problems = {}
        few = [
            f"layer {layer} {routes.sets_masked} of at least {e / 2:g}"
            for layer, (routes, e) in enumerate(zip(instruments.layers, self._experts, strict=True))
            if routes.sets_masked < e / 2
        ]
        if few:
            listed, change = "; ".join(few), _more_balance(schedule.balance_weight)
            problems["few expert sets"] = f"held-out images go to few sets of experts: {listed}: {change}"
        gaps = {gap.kind: gap for gap in reversed(instruments.gaps)}
        gap = gaps.get("other modality") or gaps.get("random")
        if gap is not None and schedule.noise_std <= NOISE_GONE and groups >= FEW_SOURCES and gap.gap.low <= 0:
            whose = "another modality's" if gap.kind == "other modality" else "random"
            change = _more_balance(schedule.balance_weight)
            if self._config.model.route_from == "cls":
                change += ", or set model.route_from to mean"
            difference = format_interval(gap.gap, signed=True)
            problems["no swap gap"] = (
                f"with {whose} experts the held-out loss changes by {difference} of {gap.own:.3f}: the experts are not "
                f"shown to differ: {change}"
            )
        new = [Warned(kind, text) for kind, text in problems.items() if kind not in self._active]
        self._active = set(problems)
        return new


def _more_balance(weight: float) -> str:
    hint = f"; {_SHORT_RUN_BALANCE:g} for short runs" if weight < _SHORT_RUN_BALANCE else ""
    return f"raise schedule.balance_weight (now {weight:g}{hint})"
