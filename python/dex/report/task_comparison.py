"""The part of a page that compares two models on the same cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dex.report.analysis_parts import reading, rows_table
from dex.report.charts import esc
from dex.report.document import Section
from dex.report.task_words import signed, verdict
from dex.tasks.metrics.difference import Difference, paired_difference
from dex.tasks.metrics.evaluation import METRICS, Evaluation

_READ = (
    "The first model minus the second on the same cases. The bootstrap draws patients with all their cases, for both "
    "models at once, so a patient who is hard for both does not widen the interval. Intervals show how the result "
    "varies with patients; the values by seed show how it varies with training. Surface distances are compared where "
    "both models found the class. With several metrics and classes, some intervals exclude 0 by chance: draw "
    "conclusions from the primary metric over all classes."
)


class Other(NamedTuple):
    """The second model of a comparison."""

    name: str
    evaluations: Sequence[Evaluation]
    """One, or one per seed, on the same cases."""


def section(first: str, second: str, differences: Sequence[Difference], classes: Sequence[str]) -> Section:
    """The verdict of the first difference, and a row per difference; ``classes``: names of the task's classes."""
    sentence = f'<p class="verdict">{esc(differences[0].sentence(first, second))}</p>'
    rows = [
        [
            f"{METRICS[d.metric].title}{'' if d.of is None else f', {classes[d.of]}'}",
            signed(d.estimate),
            _better(d),
            f"{d.estimate.patients:,}",
            " ".join(f"{s.value:+.3f}" for s in d.by_seed if s.value is not None) or "–",
        ]
        for d in differences
    ]
    table = rows_table(["", f"{first} minus {second}", "better", "patients", "by seed"], rows)
    named = f'<p class="soft">First: {esc(first)}. Second: {esc(second)}.</p>'
    return Section("comparison", "Against another model", sentence + named + reading(_READ) + table)


def compared(first: str, evaluations: Sequence[Evaluation], other: Other) -> Section:
    """The section with the differences in all metrics, the primary one first, and in the primary one by class."""
    task = evaluations[0]
    differences = [paired_difference(evaluations, other.evaluations, name) for name in task.summary()]
    if METRICS[task.metric].of_classes and len(task.classes) > 1:
        for of in range(len(task.classes)):
            difference = paired_difference(evaluations, other.evaluations, task.metric, of=of)
            if difference.estimate.value is not None:
                differences.append(difference)
    return section(first, other.name, differences, task.classes)


def _better(difference: Difference) -> str:
    if difference.verdict not in ("higher", "lower"):
        return verdict(difference)
    first = (difference.verdict == "higher") == METRICS[difference.metric].higher_is_better
    return "the first" if first else "the second"
