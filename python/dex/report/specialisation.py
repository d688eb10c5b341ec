"""Whether the experts of runs specialise: what evaluations measured while they trained, each beside its references."""

from collections.abc import Sequence

from dex.report.charts import Line, curves, layer_colour
from dex.report.parts import Drawer, grid
from dex.report.runs import RunRecord

Points = list[tuple[int, float | None]]

_KINDS = ("other modality", "same modality", "random")
_READ = (
    "Swap gap: how much the held-out masked loss rises when an image is given the experts of another one, in all "
    "layers; bands are 95 % intervals over sources. A band that holds 0 shows no specialisation. Above another "
    "image of the same modality, it is about modality. Dashed lines are references: step 0 is the untrained model "
    "(by layer: the mean of its layers), which already routes by modality to a degree; chance is the 95th "
    "percentile of permuted modalities; pixels are the same probe of 16 × 16 grey pixels. Entropy near 1: the "
    "router does not decide; few sets of experts: most images take the same. dex analyse measures more, of more "
    "images."
)


def specialisation(runs: list[RunRecord]) -> str:
    """Nothing where no run measured it."""
    draw = Drawer(runs)
    charts = [*_swap_gap(draw), *_probe(draw), *_ranks(draw)]
    by_layer = [
        _layers(draw, "Information", "information", "of expert sets, corrected", "information_null"),
        _layers(draw, "Information, whole images", "information_whole", "corrected"),
        _layers(draw, "Sets of experts", "expert_sets", "in use, masked"),
        _layers(draw, "Entropy of all probabilities", "probability_entropy", "over log E"),
        _layers(draw, "First expert masked as whole", "first_agreement", "share of images"),
    ]
    rows = [charts, *by_layer] if draw.several else [[*charts, *(chart for row in by_layer for chart in row)]]
    drawn = "".join(map(grid, rows))
    return f'<p class="read">{_READ}</p>{drawn}' if drawn else ""


def _swap_gap(draw: Drawer) -> list[str]:
    def line(run: RunRecord, kind: str, label: str, colour: int) -> Line:
        points = run.points("swap_gap", kind)
        low, high = (dict(run.points(f"swap_gap_{end}", kind)) for end in ("low", "high"))
        interval = [
            (step, low[step], high[step])
            for step, value in points
            if value is not None and low.get(step) is not None and high.get(step) is not None
        ]
        return Line(label, points, colour, dots=True, interval=interval)

    if draw.several:
        lines = [line(run, _main_kind(run), run.name, i) for i, run in enumerate(draw.runs)]
    else:
        whose = {"random": "random experts"}
        run = draw.runs[0]
        lines = [line(run, kind, whose.get(kind, f"of {kind}"), (1, 0, 2)[i]) for i, kind in enumerate(_KINDS)]
    if not any(v is not None for ln in lines for _, v in ln.points):
        return []
    zero = Line("0", [(0, 0.0), (draw.end, 0.0)], 7, faint=True, dashed=True)
    unit = "rise of the loss with others' experts"
    return [curves("Swap gap", [*lines, zero], draw.marks(unused=True), end=draw.end, key=True, unit=unit)]


def _main_kind(run: RunRecord) -> str:
    """Of another modality where there is one."""
    return next((kind for kind in _KINDS if run.points("swap_gap", kind)), _KINDS[0])


def _probe(draw: Drawer) -> list[str]:
    lines = []
    for i, run in enumerate(draw.runs):
        name = f"{run.name}, " if draw.several else ""
        points = run.points("probe_linear")
        low, high = (dict(run.points(f"probe_linear_{end}")) for end in ("low", "high"))
        ends = [(s, low.get(s), high.get(s)) for s, v in points if v is not None]
        interval = [(s, a, b) for s, a, b in ends if a is not None and b is not None]
        lines.append(Line(f"{name}probe", points, i, dots=True, interval=interval))
        if not draw.several:
            lines += _reference(points, "step 0", draw.end, 5)
        lines += _reference(run.points("probe_pixels"), f"{name}pixels", draw.end, 7)
    unit = "of the modality, sources left out"
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
        charts.append(
            curves(
                f"RankMe, {kind}",
                lines,
                draw.marks(),
                end=draw.end,
                key=True,
                unit="directions in use",
            )
        )
    return charts


def _layers(draw: Drawer, title: str, key: str, unit: str, chance: str | None = None) -> list[str]:
    """One chart a run, one line a layer, with the means over layers of step 0 and of chance."""
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
    """Over layers, where all have a number."""
    steps: dict[int, list[float]] = {}
    for points in by_layer:
        for step, value in points:
            if value is not None:
                steps.setdefault(step, []).append(value)
    return [(step, sum(v) / len(v)) for step, v in steps.items() if len(v) == len(by_layer)]


def _reference(points: Points, label: str, end: int, colour: int) -> list[Line]:
    """The first value, if it is that of step 0, as a dashed line to the end."""
    first = next(((step, value) for step, value in points if value is not None), None)
    if first is None or first[0] != 0:
        return []
    return [Line(label, [(0, first[1]), (end, first[1])], colour, faint=True, dashed=True)]
