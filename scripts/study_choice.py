"""What rows of the study say: effects with their intervals, and the choice of the search; see docs/study-plan.md.

Shape letters: S seeds, G sources, R resamples.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from study_arms import CANDIDATES, REFERENCE, SEARCHED, Arm, combined

RESAMPLES = 4000
Rows = Mapping[str, Mapping[str, Any]]


class Effect(NamedTuple):
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float
    seeds: int
    sources: int

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def rows_of(
    rows: Rows, arm: str, steps: int, half: int | None = None, tiny: bool = False
) -> dict[int, Mapping[str, Any]]:
    """By seed, the finite ones."""
    found = (
        row
        for row in rows.values()
        if (row["arm"], row["steps"], row["half"], row["tiny"]) == (arm, steps, half, tiny) and row["finite"]
    )
    return {row["seed"]: row for row in sorted(found, key=lambda row: row["seed"])}


def effect(one: Mapping[int, Mapping], name: str, other: Mapping[int, Mapping] | None = None) -> Effect | None:
    """Of the column ``name`` (``"loss"``, a kind of `dex.analysis.swap.KINDS`, ``"beyond"``), mean over images; less
    that of ``other``, paired by seed and image. None: no seed, or no image, has both.

    The bootstrap draws seeds and sources, each with replacement; a pair weighs as often as both were drawn.
    """
    seeds = [seed for seed in one if other is None or seed in other]
    sources = sorted({source for seed in seeds for source, row in one[seed]["sources"].items() if name in row})
    if not seeds or not sources:
        return None
    total, count = np.zeros((len(seeds), len(sources))), np.zeros((len(seeds), len(sources)))
    for s, seed in enumerate(seeds):
        for g, source in enumerate(sources):
            row = one[seed]["sources"].get(source, {})
            n = row.get(f"{name} of", 0)
            if not n:
                continue
            against = 0.0
            if other is not None:
                theirs = other[seed]["sources"].get(source, {})
                if theirs.get(f"{name} of", 0) != n:  # an image of one diverged
                    continue
                against = theirs[name]
            total[s, g], count[s, g] = row[name] - against, n
    if not count.any():
        return None
    rng = np.random.default_rng(0)
    over = [rng.multinomial(n, [1 / n] * n, RESAMPLES) for n in (len(seeds), len(sources))]
    sums, counts = (np.einsum("rs,sg,rg->r", over[0], of, over[1]) for of in (total, count))
    drawn = sums[counts > 0] / counts[counts > 0]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Effect(float(total.sum() / count.sum()), float(low), float(high), len(seeds), len(sources))


def gained_information(one: Mapping[int, Mapping]) -> Effect | None:
    """Mean over layers, less that at step 0; the interval is over seeds."""
    rows = [row for row in one.values() if row["information"]]
    if not rows:
        return None
    values = np.array([np.mean(row["information"]) - np.mean(row["information at step 0"]) for row in rows])
    drawn = values[np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Effect(float(values.mean()), float(low), float(high), len(values), 0)


def loss_of(rows: Rows, arm: Arm, steps: int, tiny: bool) -> float:
    """Mean held-out loss on the first half of the sources; infinite unless all seeds of the search are finite."""
    found = rows_of(rows, arm.name, steps, 0, tiny)
    value = effect(found, "loss")
    return float("inf") if value is None or set(found) != set(SEARCHED) else value.value


def combine(rows: Rows, steps: int, tiny: bool = False) -> Arm | None:
    """All changes that lowered the mean loss, the best of each kind, as one candidate; None of fewer than two."""
    reference = loss_of(rows, REFERENCE, steps, tiny)
    better = []
    for arms in CANDIDATES.values():
        best = min(arms, key=lambda arm: loss_of(rows, arm, steps, tiny))
        if loss_of(rows, best, steps, tiny) < reference:
            better.append(best)
    return combined(better) if len(better) > 1 else None


def choose(rows: Rows, candidate: Arm | None, steps: int, tiny: bool = False) -> Arm:
    """The rule of the plan: of those whose swap gap lies above 0 the one of lowest loss; of none, the largest gap."""
    arms = [*(arm for kind in CANDIDATES.values() for arm in kind), *([candidate] if candidate else [])]
    finished = [arm for arm in arms if loss_of(rows, arm, steps, tiny) < float("inf")]
    if not finished:
        raise RuntimeError("the search: expected rows of candidates, got none that is finite for all seeds")
    gaps = {arm.name: effect(rows_of(rows, arm.name, steps, 0, tiny), "other modality") for arm in finished}
    above = [arm for arm in finished if (gap := gaps[arm.name]) is not None and gap.low > 0]
    if above:
        return min(above, key=lambda arm: loss_of(rows, arm, steps, tiny))
    return max(finished, key=lambda arm: -float("inf") if gaps[arm.name] is None else gaps[arm.name].value)
