"""Bars with intervals, matrices, and SVG files of figures, in the style of ``dex.report.charts``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree

from dex.report.charts import cut, esc, number, sample, scale
from dex.report.style import STYLE

NAME = 22
"""Characters shown of a row's name, at most."""
_NUMBERED = 14
"""Columns of a matrix whose cells show their numbers, at most."""


class Bar(NamedTuple):
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


class Bars(NamedTuple):
    """One bar per group; None leaves a gap."""

    label: str
    values: Sequence[Bar | None]
    colour: int
    """Number of a colour in the style sheet."""


def bars(
    title: str,
    groups: Sequence[str],
    series: Sequence[Bars],
    *,
    unit: str = "",
    span: tuple[float, float] | None = None,
    key: bool = True,
    percent: bool = False,
) -> str:
    """A figure of bars from 0 with their intervals, side by side within a group; drawn narrow and broad.

    span: smallest and largest value of the axis, for figures that are compared. Returns "" if there is no bar.
    """
    drawn = [bar for s in series for bar in s.values if bar is not None]
    if not drawn:
        return ""
    ends = [v for bar in drawn for v in (bar.low, bar.high, bar.value)] if span is None else list(span)
    ends = (min(0.0, *ends), max(0.0, *ends))
    small = f" <small>{esc(unit)}</small>" if unit else ""
    spans = "".join(f"<span>{sample(s.colour)}{esc(s.label)}</span>" for s in series)
    head = f"<figcaption><b>{esc(title)}</b>{small}"
    head += f'<span class="key">{spans}</span></figcaption>' if key else "</figcaption>"
    narrow, broad = (_bars(title, groups, series, ends, percent, *size) for size in ((360, 200), (560, 200)))
    return (
        f'<figure class="chart bars">{head}<div class="narrow">{narrow}</div><div class="broad">{broad}</div></figure>'
    )


def _bars(
    title: str,
    groups: Sequence[str],
    series: Sequence[Bars],
    ends: tuple[float, float],
    percent: bool,
    width: int,
    height: int,
) -> str:
    left, right, top, bottom = 46, width - 6, 8, height - 20
    (low, high), ticks = scale(*ends, False, percent)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = []
    for value, text in ticks:
        parts.append(
            f'<path class="grid" d="M{left} {y(value):.1f}H{right}"/>'
            f'<text x="{left - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{text}</text>'
        )
    place = (right - left) / len(groups)
    thick = place * 0.78 / len(series)
    names = [cut(group, max(8, int(place / 6.2) - 1)) for group in groups]
    every = max(1, math.ceil((max(map(len, names)) * 6.2 + 6) / place))
    for g, group in enumerate(groups):
        begin = left + place * (g + 0.11)
        last = len(groups) - 1
        if g == last or (g % every == 0 and last - g >= every):
            middle = begin + place * 0.39
            parts.append(f'<text x="{middle:.1f}" y="{height - 6}" text-anchor="middle">{esc(names[g])}</text>')
        for place_in_group, s in enumerate(series):
            bar = s.values[g]
            if bar is None:
                continue
            x = begin + place_in_group * thick
            tall = abs(y(bar.value) - y(0))
            tooltip = f"{group}, {s.label}: {bar.value:.4g} [{bar.low:.4g}, {bar.high:.4g}]"
            parts.append(
                f'<g class="bar" data-v="{bar.value:.6g} {bar.low:.6g} {bar.high:.6g}"><title>{esc(tooltip)}</title>'
                f'<rect class="f{s.colour}" x="{x:.1f}" y="{min(y(bar.value), y(0)):.1f}" '
                f'width="{max(thick - 1, 1):.1f}" height="{max(tall, 0.5):.1f}"/>'
                f'<path class="whisker" d="M{x + thick / 2 - 0.5:.1f} {y(bar.low):.1f}V{y(bar.high):.1f}'
                f"M{x + thick * 0.25:.1f} {y(bar.low):.1f}h{thick * 0.4:.1f}"
                f'M{x + thick * 0.25:.1f} {y(bar.high):.1f}h{thick * 0.4:.1f}"/></g>'
            )
    parts.append(f'<path class="axis" d="M{left} {y(0):.1f}H{right}"/>')
    name = f"{title}: " + "; ".join(
        f"{s.label}, {groups[-1]} {number(s.values[-1].value)}" for s in series if s.values[-1] is not None
    )
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{esc(name)}">{"".join(parts)}</svg>'


def matrix(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    top: float,
    unit: str = "",
    digits: int = 2,
    marked: Sequence[tuple[int, int]] = (),
) -> str:
    """A figure of coloured cells ``values [R][C]``: one colour above 0, another below, full at ``top``; None leaves a
    cell empty. Cells show their numbers where there is room. marked: (row, column) of cells with a frame."""
    left = 8 + 6.3 * min(max(map(len, rows)), NAME)
    cell = (356 - left) / len(columns)
    with_numbers = len(columns) <= _NUMBERED and cell >= 15
    height = 19 if with_numbers else 15
    frames, parts = set(marked), []
    for r, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = 2 + r * height
        shown = esc(cut(name, NAME))
        parts.append(f'<text x="{left - 6:.0f}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{shown}</text>')
        for c, value in enumerate(row):
            if value is None:
                continue
            kind = "pos" if value >= 0 else "neg"
            share = min(abs(value) / top, 1) if top > 0 else 0
            frame = " framed" if (r, c) in frames else ""
            tooltip = f"{name}, {columns[c]}: {value:.4g}"
            parts.append(
                f'<rect class="cell {kind}{frame}" x="{left + c * cell:.2f}" y="{y}" width="{max(cell - 1.5, 1):.2f}" '
                f'height="{height - 1.5}" fill-opacity="{0.75 * share:.3f}" data-v="{value:.6g}">'
                f"<title>{esc(tooltip)}</title></rect>"
            )
            if with_numbers:
                text = _short(value, digits, cell)
                parts.append(
                    f'<text class="in" x="{left + (c + 0.5) * cell - 0.75:.2f}" y="{y + height / 2 + 2.5:.1f}" '
                    f'text-anchor="middle">{text}</text>'
                )
    bottom = 2 + len(rows) * height
    every = max(1, math.ceil((max(map(len, columns)) * 6.2 + 3) / cell))
    for c in range(0, len(columns), every):
        middle = left + (c + 0.5) * cell
        parts.append(f'<text x="{middle:.2f}" y="{bottom + 11}" text-anchor="middle">{esc(columns[c])}</text>')
    small = f" <small>{esc(unit)}</small>" if unit else ""
    return (
        f'<figure class="chart heat"><figcaption><b>{esc(title)}</b>{small}</figcaption>'
        f'<svg viewBox="0 0 360 {bottom + 16}" role="img" aria-label="{esc(title)}">{"".join(parts)}</svg></figure>'
    )


def _short(value: float, digits: int, cell: float) -> str:
    """``value`` with as many digits as fit into a cell: ``.12``, ``-.12``, ``1.0``."""
    room = max(0, min(digits, int((cell - 8) / 5.5) - 1))
    text = f"{value:.{room}f}"
    if float(text) == 0:
        return "0"
    return re.sub(r"^(-?)0\.", r"\1.", text)


def along(figure: str, axis: str) -> str:
    """Name the horizontal axis of a figure of ``dex.report.charts.curves`` that is not drawn over steps."""
    return figure.replace("<svg viewBox", f'<svg data-axis="{esc(axis)}" viewBox')


class _Panel(NamedTuple):
    """The parts of a figure."""

    caption: ElementTree.Element
    inner: str
    width: float
    height: float

    @classmethod
    def of(cls, figure: str) -> _Panel:
        tree = ElementTree.fromstring(figure)
        drawings = [svg for svg in tree.iter("svg") if svg.get("role") == "img"]
        drawing = drawings[-1]  # The broad one, if there are two
        width, height = (float(v) for v in drawing.get("viewBox").split()[2:])
        inner = "".join(ElementTree.tostring(part, encoding="unicode") for part in drawing)
        return cls(tree.find("figcaption"), inner, width, height)


def svg_file(figures: Sequence[str], columns: int = 2) -> bytes:
    """Figures of this module or of ``dex.report.charts`` in one SVG file, ``columns`` per row, in the light colours.

    The file is self-contained and has no style variables, which some programs do not support. b"" without a figure.
    """
    panels = [_Panel.of(figure) for figure in figures if figure]
    if not panels:
        return b""
    columns = min(columns, len(panels))
    gap, above, panel_width = 18, 34, max(p.width for p in panels)
    width = columns * panel_width + (columns - 1) * gap
    body, y = [], 6.0
    for begin in range(0, len(panels), columns):
        row = panels[begin : begin + columns]
        for place, panel in enumerate(row):
            body.append(f'<g transform="translate({place * (panel_width + gap):g} {y:g})">{_caption(panel.caption)}')
            body.append(f'<g transform="translate(0 {above})">{panel.inner}</g></g>')
        y += above + max(p.height for p in row) + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{y:g}" viewBox="-6 0 {width + 12:g} {y:g}">'
        f'<style>{_plain_style()}</style><rect x="-6" width="{width + 12:g}" height="{y:g}" fill="#fff"/>'
        f"{''.join(body)}</svg>\n"
    ).encode()


def _caption(caption: ElementTree.Element) -> str:
    title = caption.findtext("b") or ""
    small = caption.findtext("small") or ""
    more = f' <tspan class="small">{esc(small)}</tspan>' if small else ""
    parts = [f'<text class="title" x="0" y="12">{esc(title)}{more}</text>']
    x = 0.0
    for span in caption.iter("span"):
        if span.get("class") == "key":
            continue
        text = "".join(span.itertext()).strip()
        line = span.find("svg")
        if line is not None:
            inner = "".join(ElementTree.tostring(e, encoding="unicode") for e in line)
            parts.append(f'<g transform="translate({x:g} 20)">{inner}</g>')
            x += 19
        parts.append(f'<text x="{x:g}" y="27">{esc(text)}</text>')
        x += 5.8 * len(text) + 12
    return "".join(parts)


def _plain_style() -> str:
    """The style rules of drawings, with the light colours in place of variables."""
    colours = dict(re.findall(r"--([\w-]+):(#\w+)", STYLE.partition("@media")[0]))
    wanted = re.findall(
        r"^\.(?:grid|axis|line|faint|dots|band|f\d|s\d|dashed|cell|pos|neg|framed|whisker|rod|m-)[^\n]*",
        STYLE,
        flags=re.M,
    )
    rules = re.sub(r"var\(--([\w-]+)\)", lambda m: colours[m[1]], "".join(wanted))
    text = f"text{{font-family:Helvetica,Arial,sans-serif;font-size:10.5px;fill:{colours['quiet']}}}"
    ink = colours["ink"]
    return f"{text}.title{{font-size:13px;font-weight:600;fill:{ink}}}.small{{font-size:10.5px;font-weight:400}}" + (
        f".in{{font-size:9px;fill:{ink}}}{rules}"
    )
