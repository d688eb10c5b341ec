"""Effects with intervals from rows of the study, and the choice of the search; see docs/study-plan.md.

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
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def rows_of(
    rows: Rows, arm: str, steps: int, half: int | None = None, tiny: bool = False
) -> dict[int, Mapping[str, Any]]:
    """Seed -> row, of the finite runs."""
    finite = (
        row
        for row in rows.values()
        if (row["arm"], row["steps"], row["half"], row["tiny"]) == (arm, steps, half, tiny) and row["finite"]
    )
    return {row["seed"]: row for row in sorted(finite, key=lambda row: row["seed"])}


def effect(runs: Mapping[int, Mapping], name: str, reference: Mapping[int, Mapping] | None = None) -> Effect | None:
    """The mean over images of a column, minus that of ``reference``, paired by seed and image.

    The bootstrap draws seeds and sources, each with replacement; a pair has the product of their counts as weight.

    Args:
        runs: seed -> row.
        name: the column: ``"loss"``, a kind of `dex.analysis.swap.KINDS`, or ``"beyond"``.
        reference: seed -> row of the runs to compare with.

    Returns: None if no seed or no image is in both.
    """
    seeds = [seed for seed in runs if reference is None or seed in reference]
    sources = sorted({source for seed in seeds for source, row in runs[seed]["sources"].items() if name in row})
    if not seeds or not sources:
        return None
    total, count = np.zeros((len(seeds), len(sources))), np.zeros((len(seeds), len(sources)))
    for s, seed in enumerate(seeds):
        for g, source in enumerate(sources):
            row = runs[seed]["sources"].get(source, {})
            n = row.get(f"{name} of", 0)
            if not n:
                continue
            subtracted = 0.0
            if reference is not None:
                reference_row = reference[seed]["sources"].get(source, {})
                if reference_row.get(f"{name} of", 0) != n:  # An image diverged in one of the two.
                    continue
                subtracted = reference_row[name]
            total[s, g], count[s, g] = row[name] - subtracted, n
    if not count.any():
        return None
    rng = np.random.default_rng(0)
    seed_counts, source_counts = (rng.multinomial(n, [1 / n] * n, RESAMPLES) for n in (len(seeds), len(sources)))
    sums, counts = (np.einsum("rs,sg,rg->r", seed_counts, values, source_counts) for values in (total, count))
    means = sums[counts > 0] / counts[counts > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return Effect(float(total.sum() / count.sum()), float(low), float(high), len(seeds), len(sources))


def gained_information(runs: Mapping[int, Mapping]) -> Effect | None:
    """Information, mean over layers, minus that at step 0; the interval is over seeds."""
    rows = [row for row in runs.values() if row["information"]]
    if not rows:
        return None
    values = np.array([np.mean(row["information"]) - np.mean(row["information at step 0"]) for row in rows])
    means = values[np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Effect(float(values.mean()), float(low), float(high), len(values), 0)


def loss_of(rows: Rows, arm: Arm, steps: int, tiny: bool) -> float:
    """Mean held-out loss on the first half of the sources; infinite unless all seeds of the search are finite."""
    runs = rows_of(rows, arm.name, steps, 0, tiny)
    loss = effect(runs, "loss")
    return float("inf") if loss is None or set(runs) != set(SEARCHED) else loss.value


def combine(rows: Rows, steps: int, tiny: bool = False) -> Arm | None:
    """One candidate with all changes that lowered the mean loss, the best of each kind; None if fewer than two did."""
    reference = loss_of(rows, REFERENCE, steps, tiny)
    better = []
    for arms in CANDIDATES.values():
        best = min(arms, key=lambda arm: loss_of(rows, arm, steps, tiny))
        if loss_of(rows, best, steps, tiny) < reference:
            better.append(best)
    return combined(better) if len(better) > 1 else None


def choose(rows: Rows, candidate: Arm | None, steps: int, tiny: bool = False) -> Arm:
    """The rule of the plan: the lowest loss of the arms whose swap gap lies above 0; without any, the largest gap.

    Raises:
        RuntimeError: no arm is finite for all seeds.
    """
    arms = [*(arm for kind in CANDIDATES.values() for arm in kind), *([candidate] if candidate else [])]
    finished = [arm for arm in arms if loss_of(rows, arm, steps, tiny) < float("inf")]
    if not finished:
        raise RuntimeError("the search: expected candidates whose runs of all seeds are finite, got none")
    gaps = {arm.name: effect(rows_of(rows, arm.name, steps, 0, tiny), "other modality") for arm in finished}
    above = [arm for arm in finished if (gap := gaps[arm.name]) is not None and gap.low > 0]
    if above:
        return min(above, key=lambda arm: loss_of(rows, arm, steps, tiny))
    return max(finished, key=lambda arm: -float("inf") if gaps[arm.name] is None else gaps[arm.name].value)
