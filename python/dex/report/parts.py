"""Building blocks of sections: charts of several runs on one axis, tables, run names, and events in words."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dex.report.charts import Line, Mark, curves, esc, layer_colour, sample
from dex.report.runs import RunRecord, plain

_SAMPLES_SHOWN = 12


class Drawer:
    """Draws a quantity of all runs over a common axis of steps, with marks for the runs' events."""

    def __init__(self, runs: list[RunRecord]):
        self.runs: list[RunRecord] = runs
        self.several: bool = len(runs) > 1
        self.end: int = max(run.step for run in runs)

    def marks(self, unused: bool = False, run: RunRecord | None = None) -> list[Mark]:
        """The events of one run or of all; "unused experts" only if ``unused``, since there may be many."""
        return [
            Mark(e["step"], kind_of(e), f"{f'{r.name}, ' if self.several else ''}step {e['step']}: {tell(e)}"[:400])
            for r in ([run] if run else self.runs)
            for e in r.events
            if unused or e["event"] != "unused experts"
        ]

    def overlay(
        self,
        title: str,
        points: Callable[[RunRecord], Sequence[tuple[int, float | None]]],
        *,
        unused: bool = False,
        dots: bool = False,
        **how: Any,
    ) -> str:
        """A chart with one line per run."""
        names = [run.name if self.several else title for run in self.runs]
        lines = [Line(names[i], points(run), i, dots=dots) for i, run in enumerate(self.runs)]
        return curves(title, lines, self.marks(unused), end=self.end, key=self.several, **how)

    def layers(self, title: str, key: str, **how: Any) -> list[str]:
        """One chart per run with one line per layer, all on the same scale."""
        charts = []
        all_points = [run.points(key, n) for run in self.runs for n in range(run.layers(key))]
        values = [v for points in all_points for _, v in points if v is not None]
        for run in self.runs:
            depth = run.layers(key)
            lines = [Line(f"layer {n}", run.points(key, n), layer_colour(n, depth), bare=True) for n in range(depth)]
            name = f"{title}: {run.name}" if self.several else title
            marks = self.marks(unused=True, run=run)
            span = (min(values), max(values)) if values else None
            charts.append(curves(name, lines, marks, end=self.end, key="layer", span=span, **how))
        return charts


def of_experts(key: str) -> Callable[[RunRecord], list[tuple[int, float | None]]]:
    """The points of ``key``; empty for a run without experts, whose rows hold zeros."""
    return lambda run: run.points(key) if run.has_experts else []


def kind_of(event: Mapping[str, Any]) -> str:
    """The event's key in ``dex.report.charts.MARKS``."""
    return "loss spike" if "spike" in event["event"] else event["event"]


def tell(event: Mapping[str, Any]) -> str:
    return ": ".join(p for p in (event["event"], details(event)) if p)


def details(event: Mapping[str, Any]) -> str:
    parts = []
    for key, value in event.items():
        if key in ("step", "event") or value in ([], None, ""):
            continue
        name = {"dead": "no image goes to expert", "nearly_dead": "almost no image goes to expert"}.get(key)
        name = name or key.replace("_", " ")
        if isinstance(value, list):
            listed = ", ".join(map(plain, value[:_SAMPLES_SHOWN]))
            more = len(value) - _SAMPLES_SHOWN
            parts.append(f"{name} {listed}" + (f" and {more} more" if more > 0 else ""))
        else:
            parts.append(f"{name} {plain(value)}")
    return "; ".join(parts)


def grid(charts: Iterable[str]) -> str:
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def table(head: str, rows: Sequence[str], kind: str = "") -> str:
    return (
        f'<div class="scroll"><table class="{kind}"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def run_heads(runs: list[RunRecord]) -> str:
    return f"<tr><th></th>{''.join(f'<th>{chip(i, run)}</th>' for i, run in enumerate(runs))}</tr>"


def chip(i: int, run: RunRecord) -> str:
    return f'<span class="chip">{sample(i)}{esc(run.name)}</span>'
