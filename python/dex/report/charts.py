"""Curves and heatmaps of a report, as HTML figures with inline SVG.

A drawing is 360 units wide, the width of a phone and of a third of a desktop page, so its text has the same size on
both. Every line carries its values as ``data-p="step,value step,value"``, to six digits.
"""

import base64
import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

COLOURS = 8
"""Line colours in the style sheet; further lines are dashed."""
_DOTS_UP_TO = 40
_LAYERS = ((16, 140, 150), (140, 100, 200), (222, 112, 40))
"""Colours of the first, middle and last layer, visible on white and on dark backgrounds."""


class Line(NamedTuple):
    """One curve: ``(step, value)`` in the order of steps; None leaves a gap."""

    label: str
    points: Sequence[tuple[float, float | None]]
    colour: int | str = 0
    """Number of a colour in the style sheet, or an SVG colour."""
    faint: bool = False
    dots: bool = False
    bare: bool = False
    """Draw no band from minimum to maximum where points are too dense to draw individually."""
    dashed: bool = False
    """Mark the line as a reference."""
    interval: Sequence[tuple[float, float, float]] = ()
    """``(step, low, high)``, drawn as a band."""


class Mark(NamedTuple):
    """An event at a step, drawn across a chart."""

    step: float
    kind: str
    text: str


MARKS = {
    "resumed": ("resume", "resumed", "M-3-4 4 0-3 4Z"),
    "preempted": ("preempt", "preempted", "M-3-3H3V3H-3Z"),
    "non-finite step": ("bad", "non-finite step", "M-3-3 3 3M3-3-3 3"),
    "loss spike": ("spike", "loss spike", "M0-4 4 3H-4Z"),
    "unused experts": ("unused", "unused experts", "M0-4 4 0 0 4-4 0Z"),
    "few expert sets": ("unused", "few sets of experts", "M-4-2H4M-4 2H0"),
    "no swap gap": ("unused", "no swap gap", "M-4-3H4M0-3V4"),
    "": ("other", "other event", "M-3 0H3M0-3V3"),
}
"""Kind of event -> class in the style sheet, words, glyph; "" stands for every other kind."""


def esc(value: object) -> str:
    """Escape text for HTML, attribute values included."""
    return html.escape(str(value), quote=True)


def cut(text: str, most: int) -> str:
    """``text``, shortened to at most ``most`` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def image_uri(data: bytes, kind: str) -> str:
    """The file of an image as a data URI; kind: ``jpeg`` or ``png``."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def number(value: float | None, digits: int = 4) -> str:
    """``digits`` significant digits; integers without decimals: ``0.8213``, ``2.150``, ``1,250``, ``1.500e-05``."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}"


def layer_colour(layer: int, layers: int) -> str:
    """The colour of a layer, interpolated from the first layer's colour to the last one's."""
    place = 2 * layer / max(layers - 1, 1)
    a, b = (_LAYERS[0], _LAYERS[1]) if place <= 1 else (_LAYERS[1], _LAYERS[2])
    t = place if place <= 1 else place - 1
    return "#" + "".join(f"{round(x + (y - x) * t):02x}" for x, y in zip(a, b, strict=True))


def glyph(kind: str) -> str:
    """The symbol of a kind of event."""
    name, _, shape = MARKS.get(kind, MARKS[""])
    return f'<svg class="glyph" viewBox="-6 -6 12 12" aria-hidden="true"><path class="m-{name}" d="{shape}"/></svg>'


def sample(colour: int | str, faint: bool = False, dashed: bool = False) -> str:
    """A short piece of a line, for a legend."""
    kind, ink = _ink(colour)
    kind += " dashed" if dashed and " dashed" not in kind else ""
    path = f'<path class="line{kind}{" faint" if faint else ""}"{ink} d="M1 4H15"/>'
    return f'<svg class="sample" viewBox="0 0 16 8" aria-hidden="true">{path}</svg>'


def mark_key(kinds: Iterable[str]) -> str:
    """A legend of the symbols of ``kinds``."""
    wanted = {kind if kind in MARKS else "" for kind in kinds}
    parts = [f"<span>{glyph(k)}{esc(words)}</span>" for k, (_, words, _) in MARKS.items() if k in wanted]
    return f'<p class="key">{"".join(parts)}</p>' if parts else ""


def curves(
    title: str,
    lines: Sequence[Line],
    marks: Sequence[Mark] = (),
    *,
    unit: str = "",
    log: bool = False,
    percent: bool = False,
    end: float | None = None,
    span: tuple[float, float] | None = None,
    key: bool | str = False,
    wide: bool = False,
) -> str:
    """A figure with one chart over the steps; "" if no line holds a number.

    log: use a logarithmic scale if the values are positive and span a factor of 8 or more. percent: values are shares.
    end: last step of the axis; default: that of the lines. span: smallest and largest value of the axis, for charts
    that are compared. key: show a legend below the title; a word that all labels begin with is then shown once.
    wide: fill the width of a desktop page; a narrow drawing replaces it where there is less room.
    """
    lines = [line for line in lines if any(v is not None for _, v in line.points)]
    if not lines:
        return ""
    values = [v for line in lines for _, v in line.points if v is not None]
    values += [v for line in lines for _, *ends in line.interval for v in ends]
    low, high = (min(values), max(values)) if span is None else span
    log = log and low > 0 and high / low >= 8
    end = end or max(line.points[-1][0] for line in lines) or 1
    notes = [note for note in (unit, "log scale" if log else "") if note]
    small = f" <small>{esc(', '.join(notes))}</small>" if notes else ""
    head = f"<figcaption><b>{esc(title)}</b>{small}{_key(lines, key)}</figcaption>"
    name = f"{title}: " + "; ".join(f"{line.label} ends at {number(_last(line))}" for line in lines[:8])
    drawings = [_drawing(lines, marks, (low, high), log, percent, end, 360, 190, name)]
    if wide:
        broad = _drawing(lines, marks, (low, high), log, percent, end, 1120, 300, name)
        drawings = [f'<div class="narrow">{drawings[0]}</div>', f'<div class="broad">{broad}</div>']
    return f'<figure class="chart{" wide" if wide else ""}">{head}{"".join(drawings)}</figure>'


def heatmap(title: str, names: Sequence[str], shares: Sequence[Sequence[float]], top: float) -> str:
    """Modalities by experts: ``shares [M][E]``, each row summing to 1; ``top`` is the share drawn in full colour."""
    experts = len(shares[0])
    left = 8 + 6.3 * min(max(map(len, names)), 22)
    cell, height = (356 - left) / experts, 17
    parts = []
    for m, (name, row) in enumerate(zip(names, shares, strict=True)):
        y = 2 + m * height
        parts.append(f'<text x="{left - 6:.0f}" y="{y + 12}" text-anchor="end">{esc(cut(name, 22))}</text>')
        for e, share in enumerate(row):
            parts.append(
                f'<rect class="cell" x="{left + e * cell:.2f}" y="{y}" width="{max(cell - 1, cell * 0.9):.2f}" '
                f'height="{height - 1}" fill-opacity="{min(share / top, 1):.3f}">'
                f"<title>{esc(title)}: {esc(name)} gives expert {e} {share:.1%}</title></rect>"
            )
    bottom = 2 + len(names) * height
    every = max(1, math.ceil(experts * 14 / (356 - left)))
    for e in range(0, experts, every):
        parts.append(f'<text x="{left + (e + 0.5) * cell:.2f}" y="{bottom + 12}" text-anchor="middle">{e}</text>')
    return (
        f'<figure class="chart heat"><figcaption><b>{esc(title)}</b></figcaption>'
        f'<svg viewBox="0 0 360 {bottom + 17}" role="img" aria-label="{esc(title)}: share of each modality by expert">'
        f"{''.join(parts)}</svg></figure>"
    )


def _drawing(
    lines: Sequence[Line],
    marks: Sequence[Mark],
    span: tuple[float, float],
    log: bool,
    percent: bool,
    end: float,
    width: int,
    height: int,
    name: str,
) -> str:
    left, right, top, bottom = 46, width - 10, 14, height - 22
    columns = _points_drawn(width)
    (low, high), ticks = scale(*span, log, percent)
    a, b = (math.log(low), math.log(high)) if log else (low, high)

    def x(step: float) -> float:
        return left + (right - left) * step / end

    def y(value: float) -> float:
        place = ((math.log(value) if log else value) - a) / (b - a)
        return bottom - (bottom - top) * min(max(place, -0.02), 1.02)

    def band(ends: Sequence[tuple[float, float, float]]) -> str:
        upper = [f"{x(step):.1f} {y(high):.1f}" for step, _, high in ends]
        lower = [f"{x(step):.1f} {y(low):.1f}" for step, low, _ in reversed(ends)]
        return "M" + "L".join(upper + lower) + "Z"

    parts = []
    for value, text in ticks:
        parts.append(
            f'<path class="grid" d="M{left} {y(value):.1f}H{right}"/>'
            f'<text x="{left - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for value in _nice(0, end, 5 if width < 500 else 10, whole=True):
        anchor = "end" if x(value) > right - 12 else "middle"
        parts.append(f'<text x="{x(value):.1f}" y="{height - 7}" text-anchor="{anchor}">{_short(value)}</text>')
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    drawn: dict[int, list[str]] = {}
    for mark in marks:
        kind, _, shape = MARKS.get(mark.kind, MARKS[""])
        place = round(x(min(mark.step, end)))
        kinds = drawn.setdefault(place, [])
        if kind in kinds:
            continue
        shift = 8 * len(kinds)
        kinds.append(kind)
        parts.append(
            f'<g class="mark" transform="translate({place} 0)"><title>{esc(mark.text)}</title>'
            f'<path class="rod m-{kind}" d="M0 {top}V{bottom}"/>'
            f'<path class="m-{kind}" transform="translate({shift} 7)" d="{shape}"/></g>'
        )
    for line in lines:
        stretches = _columns(line.points, end, columns)
        strokes, dots, bands = [], [], []
        for stretch in stretches:
            places = [f"{x(c.step):.1f} {y(c.mean):.1f}" for c in stretch]
            if len(places) > 1:
                strokes.append("M" + "L".join(places))
            if len(places) == 1 or (line.dots and len(line.points) <= _DOTS_UP_TO):
                dots += [f"M{p}h0" for p in places]
            if not line.bare and any(c.low < c.high for c in stretch):
                bands.append(band([(c.step, c.low, c.high) for c in stretch]))
        if line.interval:
            bands.append(band(line.interval))
        kind, ink = _ink(line.colour)
        kind += " dashed" if line.dashed and " dashed" not in kind else ""
        data = " ".join(f"{_exact(c.step)},{c.mean:.6g}" for stretch in stretches for c in stretch)
        style = f'class="line{kind}{" faint" if line.faint else ""}"{ink}'
        if bands:
            parts.append(f'<path class="band{kind.replace(" s", " f")}" d="{"".join(bands)}"/>')
        parts.append(f'<path {style} data-l="{esc(line.label)}" data-p="{data}" d="{"".join(strokes)}"/>')
        if dots:
            parts.append(f'<path {style.replace("line", "line dots", 1)} d="{"".join(dots)}"/>')
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{esc(name)}" data-x="{left} {right} {end:g}">'
        f"{''.join(parts)}</svg>"
    )


def _points_drawn(width: int) -> int:
    """Columns of a chart; up to twice as many points are drawn individually."""
    return (width - 56) // 2


def is_dense(points: int) -> bool:
    """Whether a narrow chart has too little room for all points, and shows their means and ranges instead."""
    return points > 2 * _points_drawn(360)


def _exact(step: float) -> str:
    return f"{step:.0f}" if step == int(step) else f"{step:.1f}"


def _ink(colour: int | str) -> tuple[str, str]:
    """Class and style attribute of a line's colour."""
    if isinstance(colour, str):
        return "", f' style="stroke:{esc(colour)}"'
    return f" s{colour % COLOURS}{' dashed' if colour >= COLOURS else ''}", ""


def _key(lines: Sequence[Line], key: bool | str) -> str:
    if not key:
        return ""
    word = key if isinstance(key, str) else ""
    parts = [f"<span>{esc(word)}</span>"] if word else []
    parts += [
        f"<span>{sample(n.colour, n.faint, n.dashed)}{esc(n.label.removeprefix(word).strip())}</span>" for n in lines
    ]
    return f'<span class="key">{"".join(parts)}</span>'


def _last(line: Line) -> float | None:
    return next((v for _, v in reversed(line.points) if v is not None), None)


def _stretches(points: Iterable[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """The points, split at gaps."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if value is None:
            stretches.append([])
        else:
            stretches[-1].append((step, value))
    return [stretch for stretch in stretches if stretch]


class _Column(NamedTuple):
    """Neighbouring points drawn as one; usually a single point."""

    step: float
    mean: float
    low: float
    high: float


def _columns(points: Sequence[tuple[float, float | None]], end: float, columns: int) -> list[list[_Column]]:
    """Stretches without a gap: one column per point if there are few, else at most ``columns`` over [0, end]."""
    few = len(points) <= 2 * columns
    result = []
    for stretch in _stretches(points):
        groups: dict[int, list[tuple[float, float]]] = {}
        for i, point in enumerate(stretch):
            groups.setdefault(i if few else min(int(point[0] / end * columns), columns - 1), []).append(point)
        result.append([_column(group) for group in groups.values()])
    return result


def _column(group: Sequence[tuple[float, float]]) -> _Column:
    steps, values = [s for s, _ in group], [v for _, v in group]
    return _Column(sum(steps) / len(steps), sum(values) / len(values), min(values), max(values))


def scale(low: float, high: float, log: bool, percent: bool) -> tuple[tuple[float, float], list[tuple[float, str]]]:
    """The ends of an axis, and its ticks with their labels."""
    if log:
        ratio = (high / low) ** 0.04
        low, high = low / ratio, high * ratio
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        leading = (1,) if len(decades) > 4 else (1, 2, 5)
        ticks = [m * 10.0**d for d in decades for m in leading if low <= m * 10.0**d <= high]
        ticks = ticks[:: math.ceil(len(ticks) / 7)]
        return (low, high), [(t, _percent(t) if percent else _tick(t, t)) for t in ticks]
    if low >= 0 and low < 0.6 * high:
        low = 0.0
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = (low if low == 0 else low - room), high + room
    ticks = _nice(low, high, 6)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
    return (low, high), [(t, _percent(t, step) if percent else _tick(t, step)) for t in ticks]


def _nice(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers within [low, high], at most ``most`` + 1 of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999999)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick(value: float, step: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e4:
        return _short(value)
    if abs(value) < 1e-2 and step < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.{max(0, -math.floor(math.log10(abs(step)) + 1e-9))}f}"


def _percent(value: float, step: float = 1.0) -> str:
    return f"{100 * value:.{max(0, -math.floor(math.log10(100 * step) + 1e-9))}f}%" if step < 1 else f"{100 * value:g}%"


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and (abs(value) >= 1e4 or value % 1000 == 0):
            return f"{value / size:.4g}{letter}"
    return f"{value:.6g}"
