"""Estimates, formatted for a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dex.report.charts import esc
from dex.report.parts import table
from dex.tasks.metrics.difference import Difference
from dex.tasks.metrics.estimate import FEW_PATIENTS, Estimate
from dex.tasks.metrics.evaluation import METRICS, Evaluation

_DIGITS = 3


def plain(estimate: Estimate) -> str:
    """``0.812 [0.790, 0.834]``, ``0.812`` if there is no interval, or a dash if there is no value."""
    if estimate.value is None:
        return "–"
    return f"{estimate.value:.{_DIGITS}f}{interval(estimate)}"


def signed(estimate: Estimate) -> str:
    """``plain`` for a difference: ``+0.021 [-0.004, +0.046]``."""
    if estimate.value is None:
        return "–"
    ends = "" if estimate.low is None else f" [{estimate.low:+.{_DIGITS}f}, {estimate.high:+.{_DIGITS}f}]"
    return f"{estimate.value:+.{_DIGITS}f}{ends}"


def verdict(difference: Difference) -> str:
    """``higher``, ``lower``, ``no clear difference`` or ``not measured``."""
    return "no clear difference" if difference.verdict == "not told apart" else difference.verdict


def interval(estimate: Estimate) -> str:
    """`` [0.790, 0.834]``, or "" if there is no interval."""
    return "" if estimate.low is None else f" [{estimate.low:.{_DIGITS}f}, {estimate.high:.{_DIGITS}f}]"


def title_of(evaluation: Evaluation, metric: str) -> str:
    """The title of a metric, with the unit of HD95 and the tolerance of NSD: ``NSD at 2 mm``."""
    title = METRICS[metric].title
    if metric == "hd95":
        return f"{title} ({evaluation.unit})"
    if metric == "nsd":
        return f"{title} at {evaluation.tolerance:g} {evaluation.unit}"
    return title


def few(patients: int) -> bool:
    """Whether an interval over this number of patients has less coverage than it claims."""
    return patients < FEW_PATIENTS


def words_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text that wraps."""
    head = f"<tr>{''.join(f'<th>{esc(h)}</th>' for h in header)}</tr>"
    return table(head, [f"<tr>{''.join(f'<td>{esc(v)}</td>' for v in row)}</tr>" for row in rows])
