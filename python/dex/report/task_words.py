"""Estimates in the words of a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dex.report.charts import esc
from dex.report.parts import table
from dex.tasks.metrics.estimate import FEW_PATIENTS, Estimate
from dex.tasks.metrics.evaluation import METRICS, Evaluation

_DIGITS = 3


def plain(estimate: Estimate) -> str:
    """``0.812 [0.790, 0.834]``; the value alone without an interval, a dash without a value."""
    if estimate.value is None:
        return "–"
    return f"{estimate.value:.{_DIGITS}f}{interval(estimate)}"


def signed(estimate: Estimate) -> str:
    """As `plain`, of a difference: ``+0.021 [-0.004, +0.046]``."""
    if estimate.value is None:
        return "–"
    ends = "" if estimate.low is None else f" [{estimate.low:+.{_DIGITS}f}, {estimate.high:+.{_DIGITS}f}]"
    return f"{estimate.value:+.{_DIGITS}f}{ends}"


def interval(estimate: Estimate) -> str:
    """`` [0.790, 0.834]``, or nothing."""
    return "" if estimate.low is None else f" [{estimate.low:.{_DIGITS}f}, {estimate.high:.{_DIGITS}f}]"


def title_of(evaluation: Evaluation, metric: str) -> str:
    """With the unit of HD95 and the tolerance of NSD: ``NSD at 2 mm``."""
    title = METRICS[metric].title
    if metric == "hd95":
        return f"{title} ({evaluation.unit})"
    if metric == "nsd":
        return f"{title} at {evaluation.tolerance:g} {evaluation.unit}"
    return title


def few(patients: int) -> bool:
    """Whether an interval of so many patients covers the truth less often than it says."""
    return patients < FEW_PATIENTS


def words_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells hold words, which wrap; cells are plain text."""
    head = f"<tr>{''.join(f'<th>{esc(h)}</th>' for h in header)}</tr>"
    return table(head, [f"<tr>{''.join(f'<td>{esc(v)}</td>' for v in row)}</tr>" for row in rows])
