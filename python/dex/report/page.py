"""`report`: one HTML page about one or several run folders, to be read anywhere without anything else.

It reads what `dex.train.runlog` writes and nothing more: a run folder copied from another machine or written by another
version will do. Equal folders give equal bytes.
"""

import base64
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dex.common.units import duration
from dex.report.charts import (
    SCRIPT,
    STYLE,
    Line,
    Mark,
    curves,
    esc,
    glyph,
    heatmap,
    is_dense,
    layer_colour,
    mark_key,
    number,
    sample,
)
from dex.report.runs import Run, labels, plain, read_run, real, whole, within

_EVENTS_SHOWN, _SAMPLES_SHOWN = 200, 12
_MEASURE = ("model.norm_pix_loss", "model.mask_ratio", "model.img_size", "model.patch_size", "run.evaluate_images")
"""Fields that decide what a held-out loss is a loss of."""
_MACHINE_LATER = ("started", "step", "resumed_from", "command", "steps", "data")


def report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page about ``runs`` (run folders, compared if several) to ``out``, whole or not at all; returns it.

    Raises: ValueError naming the run whose folder, files or contents are missing or no run's; naming out.
    """
    if not runs:
        raise ValueError("runs: expected at least one run folder, got none")
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"out: expected a file to write, got the folder {out}")
    folders = [Path(run) for run in runs]
    read = [read_run(folder, name) for folder, name in zip(folders, labels(folders), strict=True)]
    page = _page(read).encode("utf-8", "replace")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.tmp")
    work.write_bytes(page)
    os.replace(work, out)
    return out


def _page(runs: list[Run]) -> str:
    several = len(runs) > 1
    sections = [
        ("losses", "Losses", _losses(runs)),
        ("modalities", "Modalities", _modalities(runs)),
        ("experts", "Experts", _experts(runs)),
        ("reconstructions", "Reconstructions", _reconstructions(runs)),
        ("speed", "Speed and memory", _speed(runs)),
        ("schedules", "Schedules", _schedules(runs)),
        ("events", "Events", _events(runs)),
        ("configuration", "Configuration", _configuration(runs)),
        ("machine", "Machine and starts", _machine(runs)),
    ]
    sections = [s for s in sections if s[2]]
    title = f"{len(runs)} runs compared" if several else runs[0].name
    links = "".join(f'<a href="#{i}">{esc(name)}</a>' for i, name, _ in sections)
    body = "".join(f'<section id="{i}"><h2>{esc(name)}</h2>{html}</section>' for i, name, html in sections)
    notes = [f"{run.name}: {note}" if several else note for run in runs for note in run.notes] + _unlike(runs)
    warned = "".join(f'<p class="notice">{esc(note)}.</p>' for note in notes)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    # Nothing is loaded, whatever a run's names hold.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{esc(title)}: DEX pretraining report</title>'
        f'<style>{STYLE}</style></head>\n<body><header><p class="over">DEX pretraining report</p>'
        f"<h1>{esc(title)}</h1>{_headline(runs)}{warned}<nav>{links}</nav></header>\n<main>{body}</main>\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _headline(runs: list[Run]) -> str:
    if len(runs) == 1:
        run = runs[0]
        tiles = "".join(
            f'<div class="tile"><b>{esc(value)}</b><span>{esc(label)}</span>'
            f"{f'<small>{esc(more)}</small>' if more else ''}</div>"
            for label, (value, more, _) in _facts(run).items()
        )
        return f'<p class="lead">{esc(_what(run))}</p><div class="tiles">{tiles}</div>'
    facts, comparable, rows = [_facts(run) for run in runs], not _unlike(runs), []
    for label in {label: None for fact in facts for label in fact}:
        scores = [fact[label][2] for fact in facts if label in fact and fact[label][2] is not None]
        cells = []
        for fact in facts:
            value, more, score = fact.get(label, ("–", "", None))
            best = comparable and score is not None and len(scores) > 1 and score == min(scores) < max(scores)
            cells.append(
                f"<td>{'<b>' if best else ''}{esc(value)}{'</b>' if best else ''}"
                f"{f' <small>{esc(more)}</small>' if more else ''}</td>"
            )
        rows.append(f"<tr><th>{esc(label)}</th>{''.join(cells)}</tr>")
    what = "".join(f"<li>{_chip(i, run)}: {esc(_what(run))}</li>" for i, run in enumerate(runs))
    return f'<ul class="lead">{what}</ul>{_table(_run_heads(runs), rows)}'


def _what(run: Run) -> str:
    """One sentence: what was trained on what."""
    get = run.config.get
    known = {k: plain(get(f"model.{k}")) for k in ("embed_dim", "depth", "num_heads", "num_experts", "top_k")}
    shape = f"width {known['embed_dim']}, {known['depth']} layers, {known['num_heads']} heads"
    if run.has_experts:
        kind = "a DEX vision transformer"
        shape += f"; {known['num_experts']} experts a layer, {known['top_k']} an image"
    else:
        kind = "a vision transformer of dense MLPs, the monolithic control"
    image = f"{plain(get('model.img_size'))} px images in patches of {plain(get('model.patch_size'))}"
    hidden = real(get("model.mask_ratio"))
    text = f"Masked autoencoder around {kind} ({shape}), {image}"
    text += f", {hidden:.0%} hidden. " if hidden is not None else ". "
    data = run.starts[-1].get("data")
    if isinstance(data, dict):
        counts = [c for c in map(whole, data["images"].values()) if c] if isinstance(data.get("images"), dict) else []
        text += f"Data: {data.get('name')}, {sum(counts):,} images of {len(counts)} modalities. "
    first = next((v for _, v in run.points("val_loss") if v is not None), None)
    final = run.last("val_loss")
    if first is not None and final is not None and len(run.points("val_loss")) > 1:
        text += f"The held-out masked loss went from {number(first)} to {number(final)}."
    return text


def _facts(run: Run) -> dict[str, tuple[str, str, float | None]]:
    """Label -> value, what to add in small print, and a score of which the least is best."""
    facts: dict[str, tuple[str, str, float | None]] = {}
    planned = f" of {run.planned:,}" if run.planned is not None else ""
    facts["steps"] = (f"{run.step:,}{planned}", run.state(), None)
    epoch = run.last("epoch")
    if run.batch:
        facts["images seen"] = (
            f"{run.step * run.batch:,}",
            f"batches of {run.batch:,}" + (f", {number(epoch, 3)} epochs" if epoch is not None else ""),
            None,
        )
    pace = run.pace()
    if pace:
        seconds = sum(s for _, s, _ in pace)
        starts = f", {len(run.starts)} starts" if len(run.starts) > 1 else ""
        facts["training time"] = (duration(seconds), f"without evaluation and saving{starts}", None)
        waits = [s * w for _, s, w in pace if w is not None]
        wait = f"{sum(waits) / seconds:.1%} of the time waiting for data" if waits else ""
        counted = sum(s * v for (_, s, _), v in zip(pace, _speeds(run, pace), strict=True))
        facts["images/s"] = (number(counted / seconds), wait, None)
    for key, label in (("loss", "training loss"), ("val_loss", "held-out loss")):
        if (value := run.last(key)) is not None:
            more = f"mean since step {_before_last(run):,}" if key == "loss" else ""
            low = min(((v, s) for s, v in run.points(key) if v is not None), default=None)
            if key == "val_loss" and low is not None and low[0] < value:
                more = f"lowest {number(low[0])} at step {low[1]:,}"
            facts[label] = (number(value), more, value if key == "val_loss" else None)
    if run.has_experts:
        for key, label in (("align_loss", "align loss"), ("balance_loss", "balance loss")):
            if (value := run.last(key)) is not None:
                facts[label] = (number(value), "not weighted", None)
    if (value := run.last("probe_knn")) is not None:
        facts["kNN probe"] = (f"{value:.1%}", "accuracy of the modality", -value)
    if (value := run.last("mfu")) is not None:
        facts["MFU"] = (f"{value:.1%}", "of the device's peak", None)
    if memory := [v for _, v in run.points("memory_mb") if v is not None]:
        facts["memory"] = (f"{max(memory):,.0f} MB", "at most", None)
    if agree := [row["ranks_agree"] for row in run.rows if isinstance(row.get("ranks_agree"), bool)]:
        facts["ranks agree"] = (f"{sum(agree)} of {len(agree)}", "evaluations, to the bit", None)
    skipped = sum(int(v) for _, v in run.points("skipped") if v is not None)
    if skipped:
        facts["steps skipped"] = (f"{skipped:,}", "not finite; they changed nothing", None)
    return facts


def _speeds(run: Run, pace: Sequence[tuple[int, float, float | None]]) -> list[float]:
    speeds = dict(run.points("images_per_s"))
    return [speeds[step] or 0.0 for step, _, _ in pace]


def _before_last(run: Run) -> int:
    """Step of the row before the one with the last training loss: where its mean begins."""
    points = run.points("loss")
    last = max(i for i, (_, v) in enumerate(points) if v is not None)
    return points[last - 1][0] if last else 0


def _unlike(runs: list[Run]) -> list[str]:
    """Why losses of these runs must not be compared, if so."""
    if len(runs) < 2:
        return []
    fields = [f for f in _MEASURE if len({plain(r.config.get(f)) for r in runs}) > 1]
    prints = {plain(within(r.starts[-1].get("data"), "fingerprint")) for r in runs}
    fields += ["the data set"] if len(prints) > 1 else []
    return [f"The losses of these runs do not measure the same: different {', '.join(fields)}"] if fields else []


def _of_experts(key: str) -> Callable[[Run], list[tuple[int, float | None]]]:
    """Points of ``key``; none of a run without experts, which writes zeros there."""
    return lambda run: run.points(key) if run.has_experts else []


class _Drawer:
    """Draws one kind of value of all runs with one axis of steps and the runs' marks."""

    def __init__(self, runs: list[Run]):
        self.runs, self.several = runs, len(runs) > 1
        self.end = max(run.step for run in runs)

    def marks(self, unused: bool = False, run: Run | None = None) -> list[Mark]:
        """Of one run or of all; "unused experts" only where asked for, since there may be many."""
        return [
            Mark(e["step"], _kind(e), f"{f'{r.name}, ' if self.several else ''}step {e['step']}: {_tell(e)}"[:400])
            for r in ([run] if run else self.runs)
            for e in r.events
            if unused or e["event"] != "unused experts"
        ]

    def overlay(
        self,
        title: str,
        points: Callable[[Run], Sequence[tuple[int, float | None]]],
        *,
        unused: bool = False,
        dots: bool = False,
        **how: Any,
    ) -> str:
        """One line a run."""
        names = [run.name if self.several else title for run in self.runs]
        lines = [Line(names[i], points(run), i, dots=dots) for i, run in enumerate(self.runs)]
        return curves(title, lines, self.marks(unused), end=self.end, key=self.several, **how)

    def layers(self, title: str, key: str, **how: Any) -> list[str]:
        """One line a layer, one chart a run, all on one scale."""
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


def _losses(runs: list[Run]) -> str:
    draw = _Drawer(runs)
    lines = []
    for i, run in enumerate(runs):
        name = f"{run.name}, " if draw.several else ""
        held_out = run.points("val_loss")
        lines.append(Line(f"{name}training", run.points("loss"), i, faint=draw.several and bool(held_out)))
        lines.append(Line(f"{name}held out", held_out, i if draw.several else 1, dots=True))
    hero = curves("Masked loss", lines, draw.marks(unused=True), log=True, end=draw.end, key=True, wide=True)
    key = mark_key(_kind(e) for run in runs for e in run.events)
    more = [
        draw.overlay("Align loss", _of_experts("align_loss"), log=True),
        draw.overlay("Balance loss", _of_experts("balance_loss"), unused=True, log=True),
        draw.overlay("Gradient norm", lambda run: run.points("grad_norm"), log=True, unit="before clipping"),
    ]
    said = (
        "Training values are means over the steps since the row before. Held-out values are of the same images and the "
        "same masks every time. Align and balance loss are shown before their weights."
    )
    if any(is_dense(len(run.points("loss"))) for run in runs):
        said += " Where rows lie too close together, a line is their mean and the band around it their range."
    return hero + key + _grid(more) + f'<p class="soft">{said}</p>'


def _modalities(runs: list[Run]) -> str:
    draw = _Drawer(runs)
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
    word = "held-out" if held_out else "training"
    heads = "".join(f'<th colspan="2">{_chip(i, run)}</th>' for i, run in enumerate(runs)) if draw.several else ""
    head = f'<tr><th colspan="2"></th>{heads}</tr>' if heads else ""
    below = "<th>first</th><th>last</th>" * len(runs)
    head += f"<tr><th>{word} loss</th><th>images</th>{below}</tr>"
    legend = (
        "".join(f"<span>{_chip(i, run)}</span>" for i, run in enumerate(runs))
        if draw.several
        else f"<span>{sample(0, held_out)}training</span>" + (f"<span>{sample(1)}held out</span>" if held_out else "")
    )
    said = f"Masked loss by modality{', held out' if draw.several and held_out else ''}; all charts have one scale."
    return f'<p class="soft">{said}</p><p class="key">{legend}</p>{_grid(charts)}{_table(head, rows, "numbers")}'


def _experts(runs: list[Run]) -> str:
    draw = _Drawer(runs)
    by_layer = [
        draw.layers("Usage entropy", "usage_entropy", unit="1 = even load"),
        draw.layers("Least used expert's share", "usage_min_share", percent=True, unit="of the slots"),
        draw.layers("Gate entropy", "val_gate_entropy", unit="1 = equal gates, held-out images"),
        draw.layers("Director to experts", "director_distance", unit="relative distance"),
    ]
    probe = draw.overlay(
        "kNN probe", lambda run: run.points("probe_knn"), percent=True, dots=True, unit="accuracy of the modality"
    )
    if max(sum(map(bool, charts)) for charts in by_layer) > 1:  # runs side by side, one row a quantity
        drawn = "".join(map(_grid, [*by_layer, [probe]]))
    else:
        drawn = _grid([*(chart for charts in by_layer for chart in charts), probe])
    maps = "".join(
        _expert_maps(i, run, draw.several) or _picture(i, run, "experts", draw.several) for i, run in enumerate(runs)
    )
    said = "Which expert takes which modality: share of each modality's gate mass, held-out images."
    return drawn + (f'<h3>Experts by modality</h3><p class="soft">{said}</p>{maps}' if maps else "")


def _expert_maps(i: int, run: Run, named: bool) -> str:
    """From the newest row with ``val_expert_mass``: modality -> per layer the gate mass that each expert takes."""
    row = next((r for r in reversed(run.rows) if isinstance(r.get("val_expert_mass"), dict)), None)
    if row is None:
        return ""
    mass = row["val_expert_mass"]
    layers = max((len(v) for v in mass.values() if isinstance(v, list)), default=0)
    panels: list[tuple[str, dict[str, list[float]]]] = []
    for layer in range(layers):
        found = {}
        for name, by_layer in mass.items():
            values = within(by_layer, layer)
            numbers = [real(v) or 0.0 for v in values] if isinstance(values, list) else []
            if sum(numbers) > 0:
                found[name] = [v / sum(numbers) for v in numbers]
        if found and len(set(map(len, found.values()))) == 1:
            panels.append((f"layer {layer}", found))
    if not panels:
        return ""
    top = max(share for _, found in panels for shares in found.values() for share in shares)
    scale = f"step {row['step']:,}; the full colour is a share of {top:.0%}"
    head = f"<h4>{_chip(i, run)} <small>{scale}</small></h4>" if named else f'<p class="soft">{scale}</p>'
    return head + _grid(heatmap(title, list(found), list(found.values()), top) for title, found in panels)


def _speed(runs: list[Run]) -> str:
    draw = _Drawer(runs)
    charts = [
        draw.overlay("Images per second", lambda run: run.points("images_per_s")),
        draw.overlay("Waiting for data", _waiting, percent=True, unit="of the time"),
        draw.overlay("MFU", lambda run: run.points("mfu"), percent=True, unit="of the device's peak"),
        draw.overlay("Memory", lambda run: run.points("memory_mb"), unit="MB, the most so far"),
        draw.overlay("Memory in use", lambda run: run.points("memory_now_mb"), unit="MB"),
        draw.overlay("Slowest rank", _slowest, unit="times the median rank, in what needs no other rank"),
    ]
    return _grid(charts)


def _slowest(run: Run) -> list[tuple[int, float | None]]:
    pairs = zip(run.points("slowest_rank_s"), run.points("median_rank_s"), strict=False)
    return [(step, most / usual if most and usual else None) for (step, most), (_, usual) in pairs]


def _waiting(run: Run) -> list[tuple[int, float | None]]:
    return [(step, share) for step, _, share in run.pace()]


def _schedules(runs: list[Run]) -> str:
    draw = _Drawer(runs)
    charts = [
        draw.overlay("Learning rate", lambda run: run.points("lr")),
        draw.overlay("Exploration noise", _of_experts("noise_std"), unit="standard deviation"),
        draw.overlay("Momentum of the directors", _of_experts("momentum")),
        draw.overlay("Weight of the balance loss", _of_experts("balance_weight")),
    ]
    return _grid(charts)


def _reconstructions(runs: list[Run]) -> str:
    shown = "".join(_picture(i, run, "reconstructions", len(runs) > 1) for i, run in enumerate(runs))
    return f'<div class="pictures">{shown}</div>' if shown else ""


def _picture(i: int, run: Run, kind: str, named: bool) -> str:
    for path, step in _newest_pictures(run, kind):
        try:
            with Image.open(path) as image:
                drawn = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            run.notes.append(f"The picture {path.name} cannot be read")
            continue
        data = io.BytesIO()
        # A PNG of photographs would make a page of several megabytes.
        drawn.save(data, "JPEG", quality=90, subsampling=0, optimize=True)
        name = f"{_chip(i, run)}: " if named else ""
        return (
            f'<figure class="picture"><figcaption>{name}{kind}, step {step:,}</figcaption><div class="scroll">'
            f'<img width="{drawn.width}" height="{drawn.height}" alt="{kind} of {esc(run.name)} at step {step}" '
            f'src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"></div></figure>'
        )
    return ""


def _newest_pictures(run: Run, kind: str) -> list[tuple[Path, int]]:
    """The newest first; those of steps that a resumed run has yet to take again come not at all."""
    found = []
    for path in (run.folder / "pictures").glob(f"{kind}-step-*.png"):
        match = re.fullmatch(rf"{kind}-step-(\d+)\.png", path.name)
        if match and int(match[1]) <= run.step:
            found.append((path, int(match[1])))
    return sorted(found, key=lambda p: p[1], reverse=True)


def _events(runs: list[Run]) -> str:
    counts: dict[str, int] = {}
    rows = []
    for i, run in enumerate(runs):
        for e in run.events:
            counts[e["event"]] = counts.get(e["event"], 0) + 1
        shown = [_event_row(e, _chip(i, run) if len(runs) > 1 else None) for e in run.events]
        if len(shown) > _EVENTS_SHOWN:
            left = len(shown) - _EVENTS_SHOWN
            half = _EVENTS_SHOWN // 2
            columns = 4 if len(runs) > 1 else 3
            shown[half:-half] = [f'<tr><td colspan="{columns}">{left:,} events left out here</td></tr>']
        rows += shown
    if not rows:
        return '<p class="soft">None: no resume, no preemption, no step that was not finite, no unused expert.</p>'
    said = "; ".join(f"{word} ×{n}" if n > 1 else word for word, n in counts.items())
    run_head = "<th>run</th>" if len(runs) > 1 else ""
    head = f"<tr>{run_head}<th>step</th><th>event</th><th>details</th></tr>"
    return f'<p class="soft">{esc(said)}</p>{_table(head, rows, "events")}'


def _event_row(event: Mapping[str, Any], run: str | None) -> str:
    first = f"<td>{run}</td>" if run else ""
    what = f"{glyph(_kind(event))} {esc(event['event'])}"
    return f"<tr>{first}<td>{event['step']:,}</td><td>{what}</td><td>{esc(_details(event))}</td></tr>"


def _kind(event: Mapping[str, Any]) -> str:
    """The kind by which it is marked."""
    return "loss spike" if "spike" in event["event"] else event["event"]


def _tell(event: Mapping[str, Any]) -> str:
    return ": ".join(p for p in (event["event"], _details(event)) if p)


def _details(event: Mapping[str, Any]) -> str:
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


def _configuration(runs: list[Run]) -> str:
    fields = list({f: None for run in runs for f in run.config})
    missing = object()
    unlike = [f for f in fields if any(run.config.get(f, missing) != runs[0].config.get(f, missing) for run in runs)]
    parts = []
    if len(runs) > 1:
        rows = []
        for f in unlike:
            cells = "".join(f"<td>{esc(plain(r.config[f])) if f in r.config else '–'}</td>" for r in runs)
            rows.append(f"<tr><th>{esc(f)}</th>{cells}</tr>")
        parts.append("<h3>Differences</h3>" + (_table(_run_heads(runs), rows) if rows else "<p>None.</p>"))
        parts.append("<h3>The same in all runs</h3>")
    groups: dict[str, list[str]] = {}
    for f in fields:
        if f not in unlike:
            section, _, name = f.rpartition(".")
            value = esc(plain(runs[0].config[f]))
            groups.setdefault(section, []).append(f"<tr><th>{esc(name)}</th><td>{value}</td></tr>")
    tables = "".join(
        f'<table class="kv"><caption>{esc(section or "run")}</caption>{"".join(rows)}</table>'
        for section, rows in groups.items()
    )
    return "".join(parts) + f'<div class="groups">{tables}</div>'


def _machine(runs: list[Run]) -> str:
    keys = list({k: None for run in runs for start in run.starts for k in start if k not in _MACHINE_LATER})
    rows = []
    for key in keys:
        cells = []
        for run in runs:
            values = list({plain(s[key]): None for s in run.starts if s.get(key) is not None})
            cells.append(f"<td>{esc(' → '.join(values)) if values else '–'}</td>")
        if any(c != "<td>–</td>" for c in cells):
            name = {"dirty": "changed since the commit"}.get(key, key)
            rows.append(f"<tr><th>{esc(name)}</th>{''.join(cells)}</tr>")
    data = []
    for run in runs:
        found = run.starts[-1].get("data")
        data.append(f"<td>{esc(plain(within(found, 'name')))}, {esc(plain(within(found, 'fingerprint')))}</td>")
    rows.append(f"<tr><th>data, fingerprint</th>{''.join(data)}</tr>")
    starts = []
    for i, run in enumerate(runs):
        for start in run.starts:
            first = f"<td>{_chip(i, run)}</td>" if len(runs) > 1 else ""
            command = start.get("command")
            command = " ".join(map(str, command)) if isinstance(command, list) else plain(command)
            starts.append(
                f"<tr>{first}<td>{esc(plain(start.get('started')))}</td><td>{esc(plain(start.get('step')))}</td>"
                f"<td>{esc(start.get('resumed_from') or '–')}</td><td><code>{esc(command) or '–'}</code></td></tr>"
            )
    run_head = "<th>run</th>" if len(runs) > 1 else ""
    head = f"<tr>{run_head}<th>started</th><th>at step</th><th>from</th><th>command</th></tr>"
    table = _table(_run_heads(runs) if len(runs) > 1 else "", rows, "machine")
    return f"{table}<h3>Starts</h3>{_table(head, starts, 'starts')}"


def _grid(charts: Iterable[str]) -> str:
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _table(head: str, rows: Sequence[str], kind: str = "") -> str:
    return (
        f'<div class="scroll"><table class="{kind}"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _run_heads(runs: list[Run]) -> str:
    return f"<tr><th></th>{''.join(f'<th>{_chip(i, run)}</th>' for i, run in enumerate(runs))}</tr>"


def _chip(i: int, run: Run) -> str:
    return f'<span class="chip">{sample(i)}{esc(run.name)}</span>'
