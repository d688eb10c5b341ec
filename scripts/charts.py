"""Two charts of a results file as self-contained SVG text: a roofline, and cost against E and B."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

COLOURS = {"reference": "#777777", "triton": "#0b7a75", "triton, aligned": "#7a3f9d", "cuda": "#b3541e"}
COLOURS |= {"dense products": "#2b4c9b"}
"""Backend or limit -> colour."""

CASES = ("grouped_mlp forward", "grouped_mlp forward + backward", "layer step")
MARKERS = ("M0-5 5 4H-5Z", "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0-4 0Z", "M-4-4H4V4H-4Z")
"""A sign for each of CASES."""
ALIGNED = "aligned path of "
LIMIT = "dense products"
FIXED = {"N": 65, "D": 768, "K": 2}
SHARED = {"E": ("experts", {"B": 224}), "B": ("images", {"E": 8})}
"""Varied size -> what it counts, and the sizes held fixed beside FIXED."""

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 400, 64, 44, 34


class Axis(NamedTuple):
    """Values to pixels, linear or logarithmic; ``ticks`` within it."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def log_axis(values: Iterable[float], start: float, end: float) -> Axis:
    values = list(values)
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    last = max(last, first + 1)
    ticks = tuple(m * 10.0**e for e in range(first, last) for m in (1, 2, 5)) + (10.0**last,)
    return Axis(10.0**first, 10.0**last, start, end, True, ticks)


def linear_axis(highest: float, start: float, end: float) -> Axis:
    """From 0 to a round number above ``highest``."""
    step = 10 ** math.floor(math.log10(highest)) / 2
    while highest / step > 6:
        step *= 2
    count = math.ceil(highest / step * 1.02)
    return Axis(0, count * step, start, end, False, tuple(i * step for i in range(count + 1)))


def short(value: float) -> str:
    return f"{value:.4g}"


def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "#333", size: int = 12) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {where} fill="{colour}" font-size="{size}">{escape(words)}</text>'


def frame(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
    """Grid, tick labels and names of two axes."""
    parts = []
    for axis, across in ((x, False), (y, True)):
        for tick in axis.ticks:
            p = axis.at(tick)
            ends = (x.start, p, x.end, p) if across else (p, y.start, p, y.end)
            parts.append('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="#e3e3e3"/>'.format(*ends))
            place = (x.start - 6, p + 4, short(tick), "end") if across else (p, y.start + 16, short(tick))
            parts.append(text(*place, size=11))
    parts.append(text((x.start + x.end) / 2, y.start + 34, x_label))
    parts.append(text(x.start - 50, y.end - 10, y_label, "start"))
    return parts


def line(points: Sequence[tuple[float, float]], colour: str, dashed: bool = False, width: float = 2) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>'


def marker(x: float, y: float, shape: str, colour: str, title: str) -> str:
    return (
        f'<path transform="translate({x:.1f} {y:.1f})" d="{shape}" fill="{colour}" fill-opacity="0.75">'
        f"<title>{escape(title)}</title></path>"
    )


def drawing(parts: Iterable[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'role="img" aria-label="{escape(title)}">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n'
        + "\n".join([text(LEFT, 18, title, "start", size=14), *parts])
        + "\n</svg>\n"
    )


def drawn(result: dict, cases: Sequence[str]) -> list[tuple[str, str, dict]]:
    """``(case, backend, row)`` of the bf16 rows; for the aligned path, of its Triton rows alone."""
    entries = []
    for row in result["rows"]:
        case, who = row["case"].removeprefix(ALIGNED), row["backend"]
        if row["case"].startswith(ALIGNED):
            if who != "triton":
                continue
            who = "triton, aligned"
        if row["dtype"] == "bfloat16" and case in cases:
            entries.append((case, who, row))
    return entries


def described(row: dict) -> str:
    shape = ", ".join(f"{letter} {size}" for letter, size in row["shape"].items())
    return f"{row['case']}, {row['backend']}, {shape}: {row['ms']:.3g} ms"


def roofline(result: dict) -> str | None:
    """TFLOP/s of every bf16 product against its operations per byte, with the limits of the same run."""
    rows = [
        (case, who, row)
        for case, who, row in drawn(result, CASES)
        if row["tflops"] and row["gbps"] and row["baseline"] == "reference"
    ]
    if not rows:
        return None
    points = [(1e3 * row["tflops"] / row["gbps"], row["tflops"]) for *_, row in rows]
    peak, copy = result["ceilings"]["bf16_tflops"], result["ceilings"]["copy_gbps"]
    ridge = 1e3 * peak / copy
    right = WIDTH - 16
    x = log_axis([ridge, *(p[0] for p in points)], LEFT, right)
    y = log_axis([peak, *(p[1] for p in points)], HEIGHT - BOTTOM, TOP + 22)
    parts = frame(x, y, "operations per byte that must move", "TFLOP/s")
    lowest = max(x.low, 1e3 * y.low / copy)
    roof = [(lowest, copy * lowest / 1e3), (ridge, peak), (x.high, peak)] if ridge < x.high else []
    parts.append(line([(x.at(a), y.at(b)) for a, b in roof], "#333"))
    parts.append(text(right - 4, y.at(peak) - 6, f"bf16 product, {peak:.0f} TFLOP/s", "end"))
    for (intensity, speed), (case, who, row) in zip(points, rows, strict=True):
        shape = MARKERS[CASES.index(case)]
        parts.append(marker(x.at(intensity), y.at(speed), shape, COLOURS[who], described(row)))
    base = HEIGHT - BOTTOM - 14
    for i, case in enumerate(reversed(CASES)):
        parts.append(marker(right - 14, base - 16 * i, MARKERS[CASES.index(case)], "#999", case))
        parts.append(text(right - 24, base - 16 * i + 4, case, "end", size=11))
    for i, who in enumerate(dict.fromkeys(who for _, who, _ in rows)):
        parts.append(text(right - 8, base - 16 * (len(CASES) + i) + 4, who, "end", COLOURS[who], size=11))
    return drawing(parts, f"Roofline, {result['device']}: a copy moves {copy:.0f} GB/s")


def growth(result: dict) -> str | None:
    """Milliseconds of forward and backward against the numbers of experts and images, with all else fixed."""
    panels = [panel for panel in (_series(result, letter) for letter in SHARED) if panel[1]]
    if not panels:
        return None
    parts, gap = [], 78
    width = (WIDTH - LEFT - 16 - gap) / 2
    for i, (letter, series) in enumerate(panels):
        start = LEFT + i * (width + gap)
        sizes = sorted({size for points in series.values() for size, _ in points})
        y = linear_axis(max(ms for points in series.values() for _, ms in points), HEIGHT - BOTTOM, TOP + 74)
        if letter == "E":
            x = Axis(sizes[0], sizes[-1], start, start + width, True, tuple(sizes))
        else:
            x = linear_axis(sizes[-1], start, start + width)
        held = ", ".join(f"{k} {v}" for k, v in (FIXED | SHARED[letter][1]).items())
        parts += frame(x, y, f"{letter}, {SHARED[letter][0]} ({held})", "ms")
        for (case, who), points in series.items():
            parts.append(line([(x.at(a), y.at(b)) for a, b in points], COLOURS[who], case != CASES[1]))
            for size, ms in points:
                shape = MARKERS[CASES.index(case)]
                parts.append(marker(x.at(size), y.at(ms), shape, COLOURS[who], f"{case}, {who}: {ms:.3g} ms"))
    names = dict.fromkeys(key for _, series in panels for key in series)
    for i, (case, who) in enumerate(names):
        at = LEFT + 350 * (i % 2), TOP + 6 + 16 * (i // 2)
        parts.append(line([at, (at[0] + 26, at[1])], COLOURS[who], case != CASES[1]))
        parts.append(text(at[0] + 32, at[1] + 4, f"{case}, {who}", "start", size=11))
    return drawing(parts, f"Cost in bf16, {result['device']}")


def _series(result: dict, letter: str) -> tuple[str, dict[tuple[str, str], list[tuple[int, float]]]]:
    """``(case, backend or limit) -> [(size, ms)]``, with at least two sizes."""
    held = FIXED | SHARED[letter][1]
    series: dict[tuple[str, str], dict[int, float]] = {}
    for case, who, row in drawn(result, CASES[1:]):
        shape = row["shape"]
        if letter not in shape or "routing" in shape or any(shape.get(k) != v for k, v in held.items()):
            continue
        series.setdefault((case, who), {})[shape[letter]] = row["ms"]
        if row["baseline"] == LIMIT and case == CASES[1]:
            series.setdefault((case, LIMIT), {})[shape[letter]] = row["baseline_ms"]
    return letter, {key: sorted(points.items()) for key, points in series.items() if len(points) > 1}


CHARTS = {"roofline": roofline, "growth": growth}
"""End of a chart's file name -> its drawing function, which returns None if the results hold nothing to draw."""
