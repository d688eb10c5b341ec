"""The sections of a page about runs. Each function returns HTML, or "" if no run logged what the section shows."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from dex.report.charts import Line, curves, esc, glyph, heatmap, image_uri, is_dense, mark_key, number, sample
from dex.report.parts import Drawer, chip, details, grid, kind_of, of_experts, run_heads, table
from dex.report.runs import RunRecord, plain, real, whole, within

_EVENTS_SHOWN = 200
_SHOWN_ELSEWHERE = ("started", "step", "resumed_from", "command", "steps", "data")
"""Keys of a start that are not rows of the machine's table."""


def losses(runs: list[RunRecord]) -> str:
    draw = Drawer(runs)
    lines = []
    for i, run in enumerate(runs):
        name = f"{run.name}, " if draw.several else ""
        held_out = run.points("val_loss")
        lines.append(Line(f"{name}training", run.points("loss"), i, faint=draw.several and bool(held_out)))
        lines.append(Line(f"{name}held out", held_out, i if draw.several else 1, dots=True))
    main = curves("Masked loss", lines, draw.marks(unused=True), log=True, end=draw.end, key=True, wide=True)
    key = mark_key(kind_of(e) for run in runs for e in run.events)
    more = [
        draw.overlay("Align loss", of_experts("align_loss"), log=True),
        draw.overlay("Balance loss", of_experts("balance_loss"), unused=True, log=True),
        draw.overlay("Gradient norm", lambda run: run.points("grad_norm"), log=True, unit="before clipping"),
    ]
    caption = (
        "A held-out loss that rises while the training loss falls means overfitting. Training values are means over "
        "the steps since the previous row; held-out values always use the same images and masks. Align and balance "
        "loss are unweighted."
    )
    if any(is_dense(len(run.points("loss"))) for run in runs):
        caption += " Where rows are too dense to draw, the line is their mean and the band their range."
    return main + key + grid(more) + f'<p class="soft">{caption}</p>'


def modalities(runs: list[RunRecord]) -> str:
    draw = Drawer(runs)
    names = list({n: None for run in runs for key in ("val_modality_loss", "modality_loss") for n in run.names(key)})
    if not names:
        return ""
    held_out = any(run.names("val_modality_loss") for run in runs)
    charts, rows = [], []
    shown = "val_modality_loss" if held_out else "modality_loss"
    keys = (shown,) if draw.several else (shown, "modality_loss")
    values = [v for run in runs for k in keys for n in names for _, v in run.points(k, n) if v is not None]
    span = (min(values), max(values)) if values else None
    for name in names:
        lines = []
        for i, run in enumerate(runs):
            if not draw.several:
                lines.append(Line("training", run.points("modality_loss", name), 0, faint=held_out))
            if draw.several or held_out:
                label = run.name if draw.several else "held out"
                lines.append(Line(label, run.points(shown, name), i if draw.several else 1, dots=held_out))
        charts.append(curves(name, lines, draw.marks(), log=True, end=draw.end, span=span))
        counts = [whole(within(within(run.starts[-1].get("data"), "images"), name)) for run in runs]
        images = " / ".join({"–" if c is None else f"{c:,}": None for c in counts})
        cells = [f"<td>{images}</td>"]
        for run in runs:
            points = [v for _, v in run.points(shown, name) if v is not None]
            cells.append(f"<td>{number(points[0])}</td><td>{number(points[-1])}</td>" if points else "<td>–</td>" * 2)
        rows.append(f"<tr><th>{esc(name)}</th>{''.join(cells)}</tr>")
    split = "held-out" if held_out else "training"
    heads = "".join(f'<th colspan="2">{chip(i, run)}</th>' for i, run in enumerate(runs)) if draw.several else ""
    head = f'<tr><th colspan="2"></th>{heads}</tr>' if heads else ""
    below = "<th>first</th><th>last</th>" * len(runs)
    head += f"<tr><th>{split} loss</th><th>images</th>{below}</tr>"
    legend = (
        "".join(f"<span>{chip(i, run)}</span>" for i, run in enumerate(runs))
        if draw.several
        else f"<span>{sample(0, held_out)}training</span>" + (f"<span>{sample(1)}held out</span>" if held_out else "")
    )
    caption = (
        f"Masked loss by modality{', held out' if draw.several and held_out else ''}; all charts have the same scale. "
        "Look for modalities whose loss stops falling early."
    )
    return f'<p class="soft">{caption}</p><p class="key">{legend}</p>{grid(charts)}{table(head, rows, "numbers")}'


def experts(runs: list[RunRecord]) -> str:
    draw = Drawer(runs)
    by_layer = [
        draw.layers("Usage entropy", "usage_entropy", unit="1 = even load"),
        draw.layers("Least used expert's share", "usage_min_share", percent=True, unit="of the slots"),
        draw.layers("Gate entropy", "val_gate_entropy", unit="1 = equal gates, held-out images"),
        draw.layers("Director to experts", "director_distance", unit="relative distance of weights"),
    ]
    probe = draw.overlay(
        "kNN probe", lambda run: run.points("probe_knn"), percent=True, dots=True, unit="accuracy of the modality"
    )
    if max(sum(map(bool, charts)) for charts in by_layer) > 1:  # Runs side by side, one row per quantity
        drawn = "".join(map(grid, [*by_layer, [probe]]))
    else:
        drawn = grid([*(chart for charts in by_layer for chart in charts), probe])
    maps = "".join(
        _expert_maps(i, run, draw.several) or _picture(i, run, "experts", draw.several) for i, run in enumerate(runs)
    )
    caption = (
        "How the gate mass of each modality is divided among the experts, on held-out images. Rows that look alike are "
        "modalities that the router does not separate."
    )
    return drawn + (f'<h3>Experts by modality</h3><p class="soft">{caption}</p>{maps}' if maps else "")


def _expert_maps(i: int, run: RunRecord, named: bool) -> str:
    """Heatmaps from the newest row with ``val_expert_mass``: modality -> for each layer, the experts' gate mass."""
    row = next((r for r in reversed(run.rows) if isinstance(r.get("val_expert_mass"), dict)), None)
    if row is None:
        return ""
    mass = row["val_expert_mass"]
    layers = max((len(v) for v in mass.values() if isinstance(v, list)), default=0)
    panels: list[tuple[str, dict[str, list[float]]]] = []
    for layer in range(layers):
        by_name = {}
        for name, by_layer in mass.items():
            values = within(by_layer, layer)
            numbers = [real(v) or 0.0 for v in values] if isinstance(values, list) else []
            if sum(numbers) > 0:
                by_name[name] = [v / sum(numbers) for v in numbers]
        if by_name and len(set(map(len, by_name.values()))) == 1:
            panels.append((f"layer {layer}", by_name))
    if not panels:
        return ""
    top = max(share for _, by_name in panels for shares in by_name.values() for share in shares)
    scale = f"step {row['step']:,}; full colour is a share of {top:.0%}"
    head = f"<h4>{chip(i, run)} <small>{scale}</small></h4>" if named else f'<p class="soft">{scale}</p>'
    return head + grid(heatmap(title, list(by_name), list(by_name.values()), top) for title, by_name in panels)


def speed(runs: list[RunRecord]) -> str:
    draw = Drawer(runs)
    charts = [
        draw.overlay("Images per second", lambda run: run.points("images_per_s")),
        draw.overlay("Waiting for data", _waiting, percent=True, unit="of the time"),
        draw.overlay("MFU", lambda run: run.points("mfu"), percent=True, unit="of the device's peak"),
        draw.overlay("Memory", lambda run: run.points("memory_mb"), unit="MB, peak so far"),
        draw.overlay("Memory in use", lambda run: run.points("memory_now_mb"), unit="MB"),
        draw.overlay("Slowest rank", _slowest, unit="times the median rank, communication excluded"),
    ]
    return grid(charts)


def _slowest(run: RunRecord) -> list[tuple[int, float | None]]:
    pairs = zip(run.points("slowest_rank_s"), run.points("median_rank_s"), strict=False)
    return [(step, slowest / median if slowest and median else None) for (step, slowest), (_, median) in pairs]


def _waiting(run: RunRecord) -> list[tuple[int, float | None]]:
    return [(stretch.step, stretch.waiting) for stretch in run.stretches()]


def schedules(runs: list[RunRecord]) -> str:
    draw = Drawer(runs)
    charts = [
        draw.overlay("Learning rate", lambda run: run.points("lr")),
        draw.overlay("Exploration noise", of_experts("noise_std"), unit="standard deviation"),
        draw.overlay("Momentum of the directors", of_experts("momentum")),
        draw.overlay("Weight of the balance loss", of_experts("balance_weight")),
    ]
    return grid(charts)


def reconstructions(runs: list[RunRecord]) -> str:
    shown = "".join(_picture(i, run, "reconstructions", len(runs) > 1) for i, run in enumerate(runs))
    return f'<div class="pictures">{shown}</div>' if shown else ""


def _picture(i: int, run: RunRecord, kind: str, named: bool) -> str:
    for path, step in _newest_pictures(run, kind):
        try:
            with Image.open(path) as image:
                drawn = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            run.notes.append(f"The picture {path.name} cannot be read")
            continue
        data = io.BytesIO()
        # As PNG, photographs would make the page several megabytes large.
        drawn.save(data, "JPEG", quality=90, subsampling=0, optimize=True)
        name = f"{chip(i, run)}: " if named else ""
        return (
            f'<figure class="picture"><figcaption>{name}{kind}, step {step:,}</figcaption><div class="scroll">'
            f'<img width="{drawn.width}" height="{drawn.height}" alt="{kind} of {esc(run.name)} at step {step}" '
            f'src="{image_uri(data.getvalue(), "jpeg")}"></div></figure>'
        )
    return ""


def _newest_pictures(run: RunRecord, kind: str) -> list[tuple[Path, int]]:
    """The pictures, newest first, without those of steps that a resumed run has not reached again."""
    pictures = []
    for path in (run.folder / "pictures").glob(f"{kind}-step-*.png"):
        match = re.fullmatch(rf"{kind}-step-(\d+)\.png", path.name)
        if match and int(match[1]) <= run.step:
            pictures.append((path, int(match[1])))
    return sorted(pictures, key=lambda p: p[1], reverse=True)


def events(runs: list[RunRecord]) -> str:
    counts: dict[str, int] = {}
    rows = []
    for i, run in enumerate(runs):
        for e in run.events:
            counts[e["event"]] = counts.get(e["event"], 0) + 1
        shown = [_event_row(e, chip(i, run) if len(runs) > 1 else None) for e in run.events]
        if len(shown) > _EVENTS_SHOWN:
            omitted = len(shown) - _EVENTS_SHOWN
            half = _EVENTS_SHOWN // 2
            columns = 4 if len(runs) > 1 else 3
            shown[half:-half] = [f'<tr><td colspan="{columns}">{omitted:,} events omitted</td></tr>']
        rows += shown
    if not rows:
        return '<p class="soft">None: no resume, no preemption, no non-finite step, no unused expert.</p>'
    summary = "; ".join(f"{kind} ×{n}" if n > 1 else kind for kind, n in counts.items())
    run_head = "<th>run</th>" if len(runs) > 1 else ""
    head = f"<tr>{run_head}<th>step</th><th>event</th><th>details</th></tr>"
    return f'<p class="soft">{esc(summary)}</p>{table(head, rows, "events")}'


def _event_row(event: Mapping[str, Any], run: str | None) -> str:
    first = f"<td>{run}</td>" if run else ""
    kind = f"{glyph(kind_of(event))} {esc(event['event'])}"
    return f"<tr>{first}<td>{event['step']:,}</td><td>{kind}</td><td>{esc(details(event))}</td></tr>"


def configuration(runs: list[RunRecord]) -> str:
    fields = list({f: None for run in runs for f in run.config})
    missing = object()
    differing = [f for f in fields if any(run.config.get(f, missing) != runs[0].config.get(f, missing) for run in runs)]
    parts = []
    if len(runs) > 1:
        rows = []
        for f in differing:
            cells = "".join(f"<td>{esc(plain(r.config[f])) if f in r.config else '–'}</td>" for r in runs)
            rows.append(f"<tr><th>{esc(f)}</th>{cells}</tr>")
        parts.append("<h3>Differences</h3>" + (table(run_heads(runs), rows) if rows else "<p>None.</p>"))
        parts.append("<h3>The same in all runs</h3>")
    groups: dict[str, list[str]] = {}
    for f in fields:
        if f not in differing:
            section, _, name = f.rpartition(".")
            value = esc(plain(runs[0].config[f]))
            groups.setdefault(section, []).append(f"<tr><th>{esc(name)}</th><td>{value}</td></tr>")
    tables = "".join(
        f'<table class="kv"><caption>{esc(section or "run")}</caption>{"".join(rows)}</table>'
        for section, rows in groups.items()
    )
    return "".join(parts) + f'<div class="groups">{tables}</div>'


def machine(runs: list[RunRecord]) -> str:
    keys = list({k: None for run in runs for start in run.starts for k in start if k not in _SHOWN_ELSEWHERE})
    rows = []
    for key in keys:
        cells = []
        for run in runs:
            values = list({plain(s[key]): None for s in run.starts if s.get(key) is not None})
            cells.append(f"<td>{esc(' → '.join(values)) if values else '–'}</td>")
        if any(c != "<td>–</td>" for c in cells):
            name = {"dirty": "uncommitted changes"}.get(key, key)
            rows.append(f"<tr><th>{esc(name)}</th>{''.join(cells)}</tr>")
    data = []
    for run in runs:
        dataset = run.starts[-1].get("data")
        data.append(f"<td>{esc(plain(within(dataset, 'name')))}, {esc(plain(within(dataset, 'fingerprint')))}</td>")
    rows.append(f"<tr><th>data, fingerprint</th>{''.join(data)}</tr>")
    starts = []
    for i, run in enumerate(runs):
        for start in run.starts:
            first = f"<td>{chip(i, run)}</td>" if len(runs) > 1 else ""
            command = start.get("command")
            command = " ".join(map(str, command)) if isinstance(command, list) else plain(command)
            starts.append(
                f"<tr>{first}<td>{esc(plain(start.get('started')))}</td><td>{esc(plain(start.get('step')))}</td>"
                f"<td>{esc(start.get('resumed_from') or '–')}</td><td><code>{esc(command) or '–'}</code></td></tr>"
            )
    run_head = "<th>run</th>" if len(runs) > 1 else ""
    head = f"<tr>{run_head}<th>started</th><th>at step</th><th>from</th><th>command</th></tr>"
    machines = table(run_heads(runs) if len(runs) > 1 else "", rows, "machine")
    return f"{machines}<h3>Starts</h3>{table(head, starts, 'starts')}"
