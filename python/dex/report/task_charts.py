"""Charts of a task's evaluation, in the style of ``dex.report.charts``: every case in a strip per class, and a
reliability diagram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dex.report.charts import cut, esc, number, sample, scale
from dex.tasks.metrics.calibration import Reliability

_NAME = 20
_ROW = 20


class Strip(NamedTuple):
    """The values of one class, one per case."""

    label: str
    values: Sequence[float]
    mean: float | None
    low: float | None
    high: float | None
    """``low`` and ``high`` are the ends of the mean's interval."""


def strips(
    title: str,
    rows: Sequence[Strip],
    *,
    unit: str = "",
    span: tuple[float, float] | None = None,
    mean: str = "mean and 95 % interval",
) -> str:
    """A figure with a row per class: a dot per case, and the mean with its interval; drawn narrow and broad.

    span: ends of the axis; default: those of the values. mean: legend of the mean and its interval. Returns "" if there
    is no value.
    """
    rows = [row for row in rows if len(row.values) or row.mean is not None]
    if not rows:
        return ""
    drawn = [v for row in rows for v in (*row.values, row.mean, row.low, row.high) if v is not None]
    ends = (min(drawn), max(drawn)) if span is None else span
    small = f" <small>{esc(unit)}</small>" if unit else ""
    dots = f"<span>{sample(0)}cases</span>" if any(len(row.values) for row in rows) else ""
    means = f"<span>{sample(1)}{mean}</span>" if any(row.mean is not None for row in rows) else ""
    key = f'<span class="key">{dots}{means}</span>'
    head = f"<figcaption><b>{esc(title)}</b>{small}{key}</figcaption>"
    narrow, broad = (_strips(title, rows, ends, width) for width in (360, 760))
    return (
        f'<figure class="chart wide">{head}<div class="narrow">{narrow}</div><div class="broad">{broad}</div></figure>'
    )


def _strips(title: str, rows: Sequence[Strip], ends: tuple[float, float], width: int) -> str:
    left = 10 + 6.4 * min(max(len(row.label) for row in rows), _NAME)
    right, bottom = width - 12, 4 + _ROW * len(rows)
    (low, high), ticks = scale(*ends, False, False)

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    parts = []
    room = max(len(text) for _, text in ticks) * 6.2 + 8
    every = max(1, math.ceil(room * len(ticks) / (right - left)))
    for i, (value, text) in enumerate(ticks):
        parts.append(f'<path class="grid" d="M{x(value):.1f} 2V{bottom}"/>')
        if i % every == 0:
            parts.append(f'<text x="{x(value):.1f}" y="{bottom + 14}" text-anchor="middle">{text}</text>')
    for i, row in enumerate(rows):
        y = 4 + _ROW * (i + 0.5)
        parts.append(f'<text x="{left - 6:.0f}" y="{y + 4:.1f}" text-anchor="end">{esc(cut(row.label, _NAME))}</text>')
        # Dots take turns on three lines, so that fewer of them overlap.
        dots = "".join(f"M{x(v):.1f} {y + 5 - 5 * (k % 3):.1f}h0" for k, v in enumerate(sorted(row.values)))
        data = " ".join(f"{v:.6g}" for v in row.values)
        tooltip = row.label
        if len(row.values):
            tooltip += f": {len(row.values)} cases from {number(min(row.values))} to {number(max(row.values))}"
            dots = f'<path class="line faint dots s0" data-v="{data}" d="{dots}"/>'
        if row.mean is not None:
            tooltip += f"; {number(row.mean)}"
            if row.low is not None and row.high is not None:
                tooltip += f" [{number(row.low)}, {number(row.high)}]"
                dots += f'<path class="line s1" d="M{x(row.low):.1f} {y:.1f}H{x(row.high):.1f}"/>'
            dots += f'<path class="line dots s1" data-v="{row.mean:.6g}" d="M{x(row.mean):.1f} {y:.1f}h0"/>'
        parts.append(f"<g><title>{esc(tooltip)}</title>{dots}</g>")
    return (
        f'<svg viewBox="0 0 {width} {bottom + 20}" role="img" aria-label="{esc(title)}: every case by class">'
        f"{''.join(parts)}</svg>"
    )


def reliability_diagram(reliability: Reliability) -> str:
    """A figure of accuracy by confidence, with the diagonal on which both agree; below, the cases of each bin."""
    width, height, left, right, top, bottom, base = 360, 330, 46, 350, 10, 240, 304
    most = max(b.cases for b in reliability.bins)

    def x(value: float) -> float:
        return left + (right - left) * value

    def y(value: float) -> float:
        return bottom - (bottom - top) * value

    parts = []
    for i in range(0, 11, 2):
        parts.append(
            f'<path class="grid" d="M{left} {y(i / 10):.1f}H{right}"/>'
            f'<text x="{left - 5}" y="{y(i / 10) + 4:.1f}" text-anchor="end">{i / 10:g}</text>'
            f'<text x="{x(i / 10):.1f}" y="{height - 6}" text-anchor="middle">{i / 10:g}</text>'
        )
    parts.append(f'<path class="axis dashed" d="M{x(0)} {y(0)}L{x(1)} {y(1)}"/>')
    for b in reliability.bins:
        if not b.cases:
            continue
        thick = x(b.high) - x(b.low) - 2
        tooltip = (
            f"confidence {b.low:.2f} to {b.high:.2f}: {b.cases} cases, mean confidence {b.confidence:.3f}, "
            f"accuracy {b.accuracy:.3f}"
        )
        tall = max((base - bottom - 16) * b.cases / most, 1)
        parts.append(
            f'<g class="bar" data-v="{b.confidence:.6g} {b.accuracy:.6g} {b.cases}"><title>{esc(tooltip)}</title>'
            f'<path class="line s1" d="M{x(b.confidence):.1f} {y(b.confidence):.1f}V{y(b.accuracy):.1f}"/>'
            f'<path class="line dots s0" d="M{x(b.confidence):.1f} {y(b.accuracy):.1f}h0"/>'
            f'<rect class="f7" x="{x(b.low) + 1:.1f}" y="{base - tall:.1f}" width="{thick:.1f}" '
            f'height="{tall:.1f}"/></g>'
        )
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}M{left} {base}H{right}"/>')
    parts.append(f'<text x="{left - 5}" y="{base - 24}" text-anchor="end">{most:,}</text>')
    key = (
        f'<span class="key"><span>{sample(0)}accuracy</span><span>{sample(1)}gap to the confidence</span>'
        f"<span>{sample(7)}cases</span></span>"
    )
    return (
        '<figure class="chart bars"><figcaption><b>Reliability</b> <small>by probability of the predicted class</small>'
        f'{key}</figcaption><svg viewBox="0 0 {width} {height}" role="img" aria-label="Reliability: accuracy by '
        f'confidence, expected calibration error {reliability.ece:.3f}">{"".join(parts)}</svg></figure>'
    )
