"""The section on whether experts specialise: measurements taken during training, each beside its references."""

from collections.abc import Sequence

from dex.report.charts import Line, curves, layer_colour
from dex.report.parts import Drawer, grid
from dex.report.runs import RunRecord

Points = list[tuple[int, float | None]]

_KINDS = ("other modality", "same modality", "random")
_READ = (
    "Swap gap: the rise of the held-out masked loss when an image gets the experts of another image in all layers; "
    "bands are 95 % intervals over sources. A band that includes 0 shows no specialisation. A gap with another "
    "modality's experts above the gap with the same modality's means that experts follow modality. Dashed lines are "
    "references: step 0 is the untrained model (for layers: their mean), which already routes by modality to some "
    "degree; chance is the 95th percentile with permuted modalities; pixels is the same probe on 16 × 16 grey pixels. "
    "Entropy near 1: the router is undecided. Few sets of experts: most images take the same ones. dex analyse "
    "measures more, on more images."
)


def specialisation(runs: list[RunRecord]) -> str:
    """HTML of the section; "" if no run measured it."""
    draw = Drawer(runs)
    charts = [*_swap_gap(draw), *_probe(draw), *_ranks(draw)]
    by_layer = [
        _layers(draw, "Information", "information", "of expert sets, corrected", "information_null"),
        _layers(draw, "Information, whole images", "information_whole", "corrected"),
        _layers(draw, "Sets of experts", "expert_sets", "in use, masked"),
        _layers(draw, "Entropy of all probabilities", "probability_entropy", "divided by log E"),
        _layers(draw, "Same first expert, masked and whole", "first_agreement", "share of images"),
    ]
    rows = [charts, *by_layer] if draw.several else [[*charts, *(chart for row in by_layer for chart in row)]]
    drawn = "".join(map(grid, rows))
    return f'<p class="read">{_READ}</p>{drawn}' if drawn else ""


def _swap_gap(draw: Drawer) -> list[str]:
    def line(run: RunRecord, kind: str, label: str, colour: int) -> Line:
        interval = _interval(run, "swap_gap", kind)
        return Line(label, run.points("swap_gap", kind), colour, dots=True, interval=interval)

    if draw.several:
        lines = [line(run, _main_kind(run), run.name, i) for i, run in enumerate(draw.runs)]
    else:
        run = draw.runs[0]
        lines = [
            line(run, kind, "random experts" if kind == "random" else f"of {kind}", (1, 0, 2)[i])
            for i, kind in enumerate(_KINDS)
        ]
    if not any(v is not None for ln in lines for _, v in ln.points):
        return []
    zero = Line("0", [(0, 0.0), (draw.end, 0.0)], 7, faint=True, dashed=True)
    unit = "rise of the loss with other experts"
    return [curves("Swap gap", [*lines, zero], draw.marks(unused=True), end=draw.end, key=True, unit=unit)]


def _interval(run: RunRecord, key: str, *inner: str) -> list[tuple[int, float, float]]:
    """``(step, low, high)`` where ``key`` and both ends of its interval were measured."""
    low, high = (dict(run.points(f"{key}_{end}", *inner)) for end in ("low", "high"))
    ends = [(step, low.get(step), high.get(step)) for step, v in run.points(key, *inner) if v is not None]
    return [(step, a, b) for step, a, b in ends if a is not None and b is not None]


def _main_kind(run: RunRecord) -> str:
    """The first kind of swap that the run measured: with another modality, if it has several."""
    return next((kind for kind in _KINDS if run.points("swap_gap", kind)), _KINDS[0])


def _probe(draw: Drawer) -> list[str]:
    lines = []
    for i, run in enumerate(draw.runs):
        name = f"{run.name}, " if draw.several else ""
        points = run.points("probe_linear")
        lines.append(Line(f"{name}probe", points, i, dots=True, interval=_interval(run, "probe_linear")))
        if not draw.several:
            lines += _reference(points, "step 0", draw.end, 5)
        lines += _reference(run.points("probe_pixels"), f"{name}pixels", draw.end, 7)
    unit = "of the modality, on unseen sources"
    chart = curves(
        "Linear probe", lines, draw.marks(), end=draw.end, key=True, percent=True, unit=unit, span=(0.0, 1.0)
    )
    return [chart] if chart and any(v is not None for ln in lines for _, v in ln.points) else []


def _ranks(draw: Drawer) -> list[str]:
    charts = []
    for kind in ("CLS token", "mean of patches"):
        lines = []
        for i, run in enumerate(draw.runs):
            points = run.points("rankme", kind)
            lines.append(Line(run.name if draw.several else kind, points, i, dots=True))
            name = f"{run.name}, step 0" if draw.several else "step 0"
            lines += _reference(points, name, draw.end, i if draw.several else 5)
        charts.append(curves(f"RankMe, {kind}", lines, draw.marks(), end=draw.end, key=True, unit="directions in use"))
    return charts


def _layers(draw: Drawer, title: str, key: str, unit: str, chance: str | None = None) -> list[str]:
    """One chart per run with one line per layer, and references: the means over layers of step 0 and of chance."""
    values = [v for run in draw.runs for n in range(run.layers(key)) for _, v in run.points(key, n) if v is not None]
    charts = []
    for run in draw.runs:
        depth = run.layers(key)
        by_layer = [run.points(key, n) for n in range(depth)]
        lines = [
            Line(f"layer {n}", points, layer_colour(n, depth), bare=True, dots=True)
            for n, points in enumerate(by_layer)
        ]
        lines += _reference(_mean(by_layer), "step 0", draw.end, 5)
        if chance is not None:
            null = _mean([run.points(chance, n) for n in range(run.layers(chance))])
            values += [v for _, v in null if v is not None]
            lines.append(Line("chance", null, 7, dashed=True))
        name = f"{title}: {run.name}" if draw.several else title
        marks = draw.marks(unused=True, run=run)
        span = (min(values), max(values)) if values else None
        charts.append(curves(name, lines, marks, end=draw.end, key="layer", span=span, unit=unit))
    return charts


def _mean(by_layer: Sequence[Points]) -> Points:
    """The mean over layers, at steps where all layers have a number."""
    steps: dict[int, list[float]] = {}
    for points in by_layer:
        for step, value in points:
            if value is not None:
                steps.setdefault(step, []).append(value)
    return [(step, sum(v) / len(v)) for step, v in steps.items() if len(v) == len(by_layer)]


def _reference(points: Points, label: str, end: int, colour: int) -> list[Line]:
    """A dashed line at the value of step 0, up to ``end``; none if the points do not begin at step 0."""
    first = next(((step, value) for step, value in points if value is not None), None)
    if first is None or first[0] != 0:
        return []
    return [Line(label, [(0, first[1]), (end, first[1])], colour, faint=True, dashed=True)]
