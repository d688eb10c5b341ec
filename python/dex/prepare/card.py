"""The data card of a prepared set: one self-contained HTML page, and the same facts as JSON."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from dex.data import images

from . import page, thumbnails
from .filters import DROPPED, MEANING, WITHDRAWN
from .label_maps import LABEL_MAP, PROBABILITY_MAP
from .page import count as _count
from .page import number as _n
from .page import percent as _percent
from .routing import REASONS, meaning
from .splits import PATIENT, hints, sides, unnamed_kinds
from .thumbnails import Thumbnail

LEFT_OUT = "left_out.json"
"""File of the set, beside the card: the thumbnails of public sources; absent if there are none."""
_BINS = 64  # Bars of a histogram
_PLOT = (256, 72)  # Its width and height in SVG units


class Example(NamedTuple):
    """One image to show. image: its file's bytes, of kind "jpg", "png" or "npy"."""

    modality: str
    source: str
    id: str
    image: bytes
    kind: str


def build(
    facts: dict[str, Any], examples: Iterable[Example] = (), left_out: Sequence[Thumbnail] = ()
) -> tuple[bytes, bytes]:
    """The card as (HTML, JSON), both a function of the arguments alone. left_out: thumbnails of public sources.
    ``facts``:

        name, image_size, bits, encoding, images, train, val
        modalities  [{name, train, val, sources, empty, histogram: 256 counts of pixel values of the kept images}]
        sources     [{name, modality, anatomy, normalisation, licence, citation, package, public, simulated, units,
                      refused: {reason: units or parts of them}, seen, dropped: {reason: slices}, kept, train, val,
                      patients, text_suspected, burned_in_declared, nan_as_background: volumes, if there are any,
                      modality_assumed: units whose modality only the description names, if there are any}]
        duplicates  [{source, of, exact, near}]: images of ``source`` dropped for an image of the source ``of``
        left_out    [{source, units, refused}]: units and refusals of unknown modality, of sources whose files each
                    have their own modality; may be absent
        withdrawn   [{date, images}]: images removed after the set was written; may be absent
        split       [{source, by, images: {train, val}, groups: {kind: {train, val}}, ...}]: as ``splits.Split.rows``,
                    one per source; may be absent
        rules       {name: text, number, list or dict}: the rules that were applied

    The JSON holds the facts unchanged and, under "examples", modality, source and id of each. Raises ValueError if a
    count is negative or the numbers disagree: seen = kept + dropped, kept = train + val and duplicates listed =
    duplicates dropped for every source; the images of its sources for every modality and for the whole.
    """
    examples = list(examples)
    _check(facts, examples)
    document = {**facts, "examples": [{"modality": e.modality, "source": e.source, "id": e.id} for e in examples]}
    data = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    return _page(facts, examples, left_out).encode(), data


def _check(facts: dict, examples: list[Example]) -> None:
    def equal(label: str, expected: int, got: int) -> None:
        if expected != got:
            raise ValueError(f"facts: {label}: expected {expected}, got {got}")

    names = [source["name"] for source in facts["sources"]]
    if len(set(names)) != len(names):
        raise ValueError("facts: sources: expected different names")
    for source in facts["sources"]:
        dropped = sum(source["dropped"].values())
        equal(f"source {source['name']!r}: slices seen, kept and dropped", source["kept"] + dropped, source["seen"])
        equal(f"source {source['name']!r}: images kept", source["train"] + source["val"], source["kept"])
        for key, count in (*_counts(source), *source["dropped"].items(), *source["refused"].items()):
            if count < 0:
                raise ValueError(f"facts: source {source['name']!r}: {key}: expected at least 0, got {count}")
        for kind in ("exact", "near"):
            listed = sum(row[kind] for row in facts["duplicates"] if row["source"] == source["name"])
            label = f"source {source['name']!r}: {kind} duplicates listed"
            equal(label, source["dropped"].get(f"{kind} duplicate", 0), listed)
    for split in ("train", "val"):
        equal(f"{split} images of all sources", sum(source[split] for source in facts["sources"]), facts[split])
        for row in facts["modalities"]:
            here = sum(source[split] for source in facts["sources"] if source["modality"] == row["name"])
            equal(f"{split} images of modality {row['name']!r}", here, row[split])
    equal("images", facts["train"] + facts["val"], facts["images"])
    for row in facts["modalities"]:
        equal(f"modality {row['name']!r}: counts in its histogram", 256, len(row["histogram"]))
        sources = sum(source["modality"] == row["name"] for source in facts["sources"])
        equal(f"modality {row['name']!r}: sources", sources, row["sources"])
        if row["empty"] != (row["train"] + row["val"] == 0):
            raise ValueError(f"facts: modality {row['name']!r}: 'empty' contradicts its counts")
    known = [row["name"] for row in facts["modalities"]]
    for label, value, of in (
        *(("modality of a source", source["modality"], known) for source in facts["sources"]),
        *(("source of a duplicate", row[key], names) for row in facts["duplicates"] for key in ("source", "of")),
        *(("source of an example", example.source, names) for example in examples),
    ):
        if value not in of:
            raise ValueError(f"facts: {label}: expected one of {of}, got {value!r}")


def _counts(source: dict) -> list[tuple[str, int]]:
    keys = ("units", "seen", "kept", "train", "val", "patients", "text_suspected", "burned_in_declared")
    return [(key, source[key]) for key in keys]


def _page(facts: dict, examples: list[Example], left_out: Sequence[Thumbnail]) -> str:
    sections = (
        ("modalities", "Modalities", _modalities(facts)),
        ("sources", "Sources", _sources(facts)),
        *((("split", "Train and held out", _held_out(facts)),) if facts.get("split") else ()),
        *((("left-out", "Left out", html),) if (html := _left_out(facts, left_out)) else ()),
        *((("withdrawn", "Withdrawn", withdrawn),) if (withdrawn := _withdrawn(facts)) else ()),
        ("examples", "Examples", _examples(facts, examples)),
        ("duplicates", "Duplicates", _duplicates(facts)),
        ("text", "Burned-in text", _text(facts)),
        ("licences", "Licences and citations", _licences(facts)),
        ("rules", "Rules applied", _rules(facts["rules"])),
    )
    return page.document(
        f"{facts['name']}: data card", _header(facts), [page.Section(*section) for section in sections]
    )


def _header(facts: dict) -> str:
    sources = facts["sources"]
    filled = [row for row in facts["modalities"] if row["train"] + row["val"]]
    seen, dropped = sum(s["seen"] for s in sources), sum(sum(s["dropped"].values()) for s in sources)
    read = [*sources, *facts.get("left_out", ())]
    units, refused = sum(s["units"] for s in read), sum(sum(s["refused"].values()) for s in read)
    suspected = sum(s["text_suspected"] for s in sources)
    private, simulated = sum(not s["public"] for s in sources), sum(s["simulated"] for s in sources)
    kinds = [f"{_n(count)} {kind}" for count, kind in ((private, "private"), (simulated, "simulated")) if count]
    listed = [
        (
            "Images",
            _n(facts["images"]),
            f"{_n(facts['train'])} train, {_n(facts['val'])} val",
        ),
        ("Modalities", f"{len(filled)}", f"of {len(facts['modalities'])}"),
        ("Sources", _n(len(sources)), ", ".join(kinds) or "all public"),
        ("Patients", _n(sum(s["patients"] for s in sources)), "counted source by source"),
        ("Slices seen", _n(seen), f"{_percent(facts['images'], seen)} kept"),
        ("Slices dropped", _n(dropped), f"{_percent(dropped, seen)} of those seen"),
        ("Refused", _n(refused), f"units or parts; {_n(units)} units in all"),
        ("Text suspected", _n(suspected), f"{_percent(suspected, facts['images'])} of the images"),
    ]
    notice = ""
    if simulated:
        images_ = sum(s["kept"] for s in sources if s["simulated"])
        notice = (
            f'<p class="notice">{_SIMULATED} {_n(images_)} of the images, from {_count(simulated, "source")}, are '
            "simulated: computed, not acquired from a patient. They carry this mark wherever they appear.</p>"
        )
    total = sum((Counter(s["dropped"]) for s in sources), Counter())
    parts = [("train", facts["train"]), ("val", facts["val"]), *_in_order(total)]
    return (
        f'<header><p class="kicker">Data card</p><h1>{escape(facts["name"])}</h1>'
        f"<p>{_count(facts['images'], 'image')} of {facts['image_size']} × {facts['image_size']} pixels, "
        f"{facts['bits']}-bit {escape(str(facts['encoding']).upper())}.</p>{notice}"
        + page.tiles(listed)
        + f'<h2 class="small">{_count(seen, "slice")}, kept and dropped</h2>{_bar(parts, seen, "all sources")}'
        + f'<ul class="legend">{"".join(_key(label, count, seen) for label, count in parts if count)}</ul></header>'
    )


def _modalities(facts: dict) -> str:
    cards, empty = [], []
    for row in facts["modalities"]:
        count = row["train"] + row["val"]
        if not count:
            reason = f"all slices of {_count(row['sources'], 'source')} were dropped" if row["sources"] else "no source"
            empty.append(f"<li><b>{escape(row['name'])}</b>: {reason}</li>")
            continue
        simulated = {s["simulated"] for s in facts["sources"] if s["modality"] == row["name"] and s["kept"]}
        mark = "" if True not in simulated else _SIMULATED if len(simulated) == 1 else _PARTLY
        cards.append(
            f'<article class="panel"><h3>{escape(row["name"])} {mark}</h3>'
            f'<p class="big">{_n(count)}<span>{_percent(count, facts["images"])} of all</span></p>'
            f"{_histogram(row)}"
            f"<p>{', '.join([*_splits(row), _count(row['sources'], 'source')])}</p></article>"
        )
    note = (
        "<p>Pixel values of the kept images, from black to white. Heights are on a square-root scale, so that the "
        "background does not dwarf the rest.</p>"
    )
    without = f'<div class="empty"><h3>Without images</h3><ul>{"".join(empty)}</ul></div>' if empty else ""
    return f'{note}<div class="panels">{"".join(cards)}</div>{without}'


def _histogram(row: dict) -> str:
    values = row["histogram"]
    total = sum(values)
    if not total:
        return '<p class="quiet">No pixel was counted.</p>'
    width, height = _PLOT
    step = 256 // _BINS
    bins = [sum(values[i : i + step]) for i in range(0, 256, step)]
    top = max(bins)
    path = "".join(f"V{height - (height - 4) * (count / top) ** 0.5:.1f}h{width // _BINS}" for count in bins)
    black, mean = sum(values[:step]), sum(i * count for i, count in enumerate(values)) / total / 255
    text = f"black {_percent(black, total)}, mean {mean:.2f}"
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" preserveAspectRatio="none" '
        f'aria-label="Histogram of pixel values, {escape(row["name"])}: {text}">'
        f'<path d="M0 {height}{path}V{height}Z"/></svg><figcaption><span>0</span><span>{text}</span><span>1</span>'
        "</figcaption></figure>"
    )


def _sources(facts: dict) -> str:
    order = [row["name"] for row in facts["modalities"]]
    rows = sorted(facts["sources"], key=lambda source: order.index(source["modality"]))
    bodies = []
    for modality, group in groupby(rows, lambda source: source["modality"]):
        cells = []
        for source in group:
            parts = [("train", source["train"]), ("val", source["val"]), *_in_order(source["dropped"])]
            dropped, refused = _list(_in_order(source["dropped"])), _list(sorted(source["refused"].items()))
            about = [source["anatomy"], f"rule {source['normalisation']}", source["package"]]
            if source.get("modality_assumed"):
                about.append(f"modality of {_count(source['modality_assumed'], 'file')} from the command only")
            if source.get("nan_as_background"):
                about.append(f"NaN as background in {_count(source['nan_as_background'], 'volume')}")
            cells.append(
                f'<tr><th scope="row">{_name(source)}<small>{escape(" · ".join(filter(None, about)))}</small></th>'
                f'<td data-label="Kept" class="number">{_n(source["kept"])}'
                f"{''.join(f'<small>{split}</small>' for split in _splits(source))}</td>"
                f'<td data-label="Slices seen" class="wide">{_bar(parts, source["seen"], source["name"])}'
                f"<small>{_n(source['seen'])} seen"
                + (f"; dropped: {dropped}" if dropped else "; none dropped" if source["seen"] else "")
                + f'</small></td><td data-label="Units" class="number">{_n(source["units"])}'
                + (f"<small>refused: {refused}</small>" if refused else "")
                + f'</td><td data-label="Patients" class="number">{_n(source["patients"])}</td></tr>'
            )
        head = f'<tr class="group"><th colspan="5" scope="rowgroup">{escape(modality)}</th></tr>'
        bodies.append(f"<tbody>{head}{''.join(cells)}</tbody>")
    return (
        "<p>A unit is decoded as a whole: a file, or the DICOM files of a folder. Refused units, or parts of them (a "
        "file, a series, a page, volumes after the first), give no slice. The bars show the kept and dropped shares of "
        "the slices seen, in the colours above.</p>"
        '<table class="cards"><thead><tr><th scope="col">Source</th><th scope="col" class="number">Kept</th>'
        '<th scope="col">Kept and dropped</th><th scope="col" class="number">Units</th>'
        f'<th scope="col" class="number">Patients</th></tr></thead>{"".join(bodies)}</table>'
    )


def _left_out(facts: dict, shown: Sequence[Thumbnail]) -> str:
    """Files that are not images or of another modality, and dropped slices, by reason; "" if there are none."""
    refused = sum((Counter(s["refused"]) for s in (*facts["sources"], *facts.get("left_out", ()))), Counter())
    dropped = sum((Counter(s["dropped"]) for s in facts["sources"]), Counter())
    rows = [
        (label, total[reason], reason)
        for label, total, reasons in (("Files", refused, _MEANING), ("Slices", dropped, DROPPED))
        for reason in reasons
        if total[reason]
    ]
    if not rows:
        return ""
    public = any(source["public"] for source in facts["sources"])
    private = not all(source["public"] for source in facts["sources"])
    where = "Thumbnails of private sources may show names, so they are only in left_out.html of the private folder."
    listed = "".join(
        f'<tr><th scope="row">{escape(reason)}</th><td data-label="{label}" class="number">{_n(count)}</td>'
        f'<td data-label="Meaning"><span>{escape((_MEANING | _DROPPED)[reason])}</span></td></tr>'
        for label, count, reason in rows
    )
    html = (
        "<p>Files, or parts of them, that gave no slice because of their headers or values, and slices that were "
        f"dropped. {where if private else ''}</p>"
        '<table class="cards"><thead><tr><th scope="col">Reason</th><th scope="col" class="number">Files or slices</th>'
        f'<th scope="col">Meaning</th></tr></thead><tbody>{listed}</tbody></table>'
    )
    for reason, group in groupby(thumbnails.choose(shown), key=lambda thumbnail: thumbnail.reason):
        html += f"<h3>{escape(reason)}</h3>{thumbnails.figures(list(group))}"
    if public and shown:
        html += f"<p>At most {thumbnails.SHOWN} per reason, from public sources.</p>"
    return html


def _withdrawn(facts: dict) -> str:
    """Images removed after the set was written; "" if there are none."""
    rows = "".join(
        f'<tr><th scope="row">{escape(row["date"])}</th><td data-label="Images" class="number">{_n(row["images"])}</td>'
        "</tr>"
        for row in facts.get("withdrawn", ())
    )
    if not rows:
        return ""
    return (
        "<p>Images removed from the set after it was written. Weights trained on the set before then have seen them."
        '</p><table class="cards"><thead><tr><th scope="col">Date</th><th scope="col" class="number">Images'
        f"</th></tr></thead><tbody>{rows}</tbody></table>"
    )


_MEANING = {reason: meaning(reason) for reason in REASONS} | {
    LABEL_MAP: "a segmentation, a mask or an atlas: few values that fill regions",
    PROBABILITY_MAP: "probabilities of a tissue, by name and values",
    "burned-in": "the header declares burned-in annotation",
    "unsupported": "a file type or codec that cannot be read",
    "inconsistent": "values that the rule cannot handle, copies, or volumes and frames after the first",
    "constant": "no two values differ",
    "not finite": "infinite values, or nearly all NaN",
    "too large": "more than the limits allow",
    "unreadable": "damaged or truncated",
    "timeout": "its reader took too long, twice",
    "crash": "its reader crashed on it, twice",
}
_DROPPED = {
    **MEANING,
    "exact duplicate": "the same pixels as a kept image",
    "near duplicate": "nearly the same pixels as a kept image",
    WITHDRAWN: "removed after the set was written, or left out since",
}


def _examples(facts: dict, examples: list[Example]) -> str:
    if not examples:
        return "<p>None were chosen.</p>"
    sources = {source["name"]: source for source in facts["sources"]}
    order = {row["name"]: place for place, row in enumerate(facts["modalities"])}
    html = []
    ordered = sorted(examples, key=lambda example: order.get(example.modality, len(order)))
    for modality, group in groupby(ordered, lambda example: example.modality):
        figures = []
        for example in group:
            mark = _SIMULATED if sources[example.source]["simulated"] else ""
            label = f"{example.modality}, source {example.source}"
            figures.append(
                f'<figure><img src="{_data_url(example)}" alt="{escape(label)}" title="{escape(example.id)}" '
                f'width="{thumbnails.SIDE}" height="{thumbnails.SIDE}">'
                f"<figcaption>{mark}<b>{escape(example.source)}</b> <span>{escape(_short(example))}</span>"
                "</figcaption></figure>"
            )
        html.append(f'<h3>{escape(modality)}</h3><div class="grid">{"".join(figures)}</div>')
    return "".join(html)


def _duplicates(facts: dict) -> str:
    pairs: Counter = Counter()
    for row in facts["duplicates"]:
        for kind in ("exact", "near"):
            pairs[row["source"], row["of"], kind] += row[kind]
    total: Counter = Counter()
    for (source, of, _), count in pairs.items():
        total[source, of] += count
    total = +total
    if not total:
        return "<p>No image repeats another one.</p>"
    sources = {source["name"]: source for source in facts["sources"]}
    rows = [name for name in sources if any(source == name for source, _ in total)]
    across = [name for name in sources if any(of == name != source for source, of in total)]
    own = any(source == of for source, of in total)
    top = max(total.values())

    def cell(name: str, of: str) -> str:
        if not total[name, of]:
            return "<td></td>"
        exact, near = pairs[name, of, "exact"], pairs[name, of, "near"]
        title = escape(f"{name} repeats {of}: {_n(exact)} exact, {_n(near)} near")
        small = f"<small>{_n(exact)} exact</small>" if exact else ""
        share = (total[name, of] / top) ** 0.5
        return f'<td class="hit" style="--share:{share:.3f}" title="{title}">{_n(total[name, of])}{small}</td>'

    heads = '<th scope="col">its own</th>' if own else ""
    heads += "".join(f'<th scope="col" title="{escape(name)}">{place}</th>' for place, name in enumerate(across, 1))
    body = "".join(
        f'<tr><th scope="row">{_name(sources[name])}</th>{cell(name, name) if own else ""}'
        f"{''.join(cell(name, of) if of != name else '<td></td>' for of in across)}</tr>"
        for name in rows
    )
    key = "".join(f"<li><b>{place}</b> {_name(sources[name])}</li>" for place, name in enumerate(across, 1))
    exact = sum(count for (source, of, kind), count in pairs.items() if kind == "exact")
    inside = sum(count for (source, of), count in total.items() if source == of)
    count = total.total()
    return (
        f"<p>{_count(count, 'slice')} dropped: {_n(exact)} with the same pixels, {_n(count - exact)} similar; "
        f"{_n(inside)} repeat an image of their own source, {_n(count - inside)} one of another source. Rows: the "
        "source of the dropped slices. Columns: the source of the kept images.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Duplicates by source"><table class="matrix">'
        f'<thead><tr><th scope="col">dropped from</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
        + (f'<ol class="numbered">{key}</ol>' if key else "")
    )


def _text(facts: dict) -> str:
    rows = [s for s in facts["sources"] if s["text_suspected"] or s["burned_in_declared"]]
    note = (
        "<p>Suspected: the margins of the kept image look like text. Such images are counted, not dropped; an image "
        "without suspicion may still contain text. Declared: units whose header declares text burned into the "
        "pixels.</p>"
    )
    if not rows:
        return f"{note}<p>No text is suspected or declared.</p>"

    def share(source: dict) -> str:
        if not source["text_suspected"]:
            return ""
        return f"<small>{_percent(source['text_suspected'], source['kept'])} of {_n(source['kept'])}</small>"

    body = "".join(
        f'<tr><th scope="row">{_name(s)}</th><td data-label="Suspected" class="number">{_n(s["text_suspected"])}'
        f"{share(s)}</td>"
        f'<td data-label="Declared" class="number">{_n(s["burned_in_declared"])}</td></tr>'
        for s in rows
    )
    others = len(facts["sources"]) - len(rows)
    rest = f"<p>Nothing suspected or declared in the other {_count(others, 'source')}.</p>" if others else ""
    return (
        f'{note}<table class="cards"><thead><tr><th scope="col">Source</th><th scope="col" class="number">Suspected'
        f'</th><th scope="col" class="number">Declared</th></tr></thead><tbody>{body}</tbody></table>{rest}'
    )


def _licences(facts: dict) -> str:
    alike: dict[tuple, list[dict]] = {}
    for source in facts["sources"]:
        alike.setdefault((source["package"], source["licence"], source["citation"]), []).append(source)
    body = "".join(
        f'<tr><th scope="row">{"<br>".join(map(_name, group))}<small>{escape(package)}</small></th>'
        f'<td data-label="Licence"><span>{escape(licence) or _UNSTATED}</span></td>'
        f'<td data-label="Citation"><span>{escape(citation) or _UNSTATED}</span></td></tr>'
        for (package, licence, citation), group in alike.items()
    )
    return (
        '<table class="cards"><thead><tr><th scope="col">Source</th><th scope="col">Licence</th>'
        f'<th scope="col">Citation</th></tr></thead><tbody>{body}</tbody></table>'
    )


def _held_out(facts: dict) -> str:
    counted = zip(("train", "held out"), sides(facts), strict=True)
    rows = "".join(
        f"<dt>{side}</dt><dd>{images}{groups and f' of {groups}'}</dd>" for side, (images, groups) in counted
    )
    notes = "".join(f"<li>{escape(hint)}</li>" for hint in hints(facts))
    how = "".join(
        f'<tr><th scope="row"><span class="name">{escape(row["source"])}</span></th>'
        f'<td data-label="Split by"><span>{_split_by(row)}</span></td>'
        f'<td data-label="Train" class="number">{_n(row["images"]["train"])}</td>'
        f'<td data-label="Held out" class="number">{_n(row["images"]["val"])}</td></tr>'
        for row in facts["split"]
    )
    return (
        "<p>Each of these is on one side only.</p>"
        f'<dl class="rules">{rows}</dl>{f"<ul>{notes}</ul>" if notes else ""}'
        '<table class="cards"><thead><tr><th scope="col">Source</th><th scope="col">Split by</th>'
        '<th scope="col" class="number">Train</th><th scope="col" class="number">Held out</th></tr></thead>'
        f"<tbody>{how}</tbody></table>"
    )


def _split_by(row: Mapping[str, Any]) -> str:
    """What the source was split by; for patients, also what stands for unnamed ones."""
    loose = unnamed_kinds(row)
    if row["by"] != PATIENT or not loose:
        return _SPLIT_BY[row["by"]]
    named = PATIENT in row["groups"] or not row["groups"]  # Unknown after a withdrawal
    return " or ".join([PATIENT, *loose] if named else loose)


def _rules(rules: object) -> str:
    if isinstance(rules, dict):
        rows = "".join(f"<dt>{escape(str(key))}</dt><dd>{_rules(value)}</dd>" for key, value in rules.items())
        return f'<dl class="rules">{rows}</dl>' if rows else "none"
    if isinstance(rules, (list, tuple)):
        return ", ".join(_rules(item) for item in rules) or "none"
    if isinstance(rules, bool) or rules is None:
        return {True: "yes", False: "no", None: "none"}[rules]
    return _n(rules) if isinstance(rules, int) else escape(str(rules))


_SPLIT_BY = {
    "patient": "patient",
    "folder": "folder: all headers name the same patient",
    "study": "study, or file",
    "series": "series, or file",
    "stated": "the table or --split",
    "source": "its description, all on one side",
}
_SIMULATED = '<span class="mark simulated">simulated</span>'
_PARTLY = '<span class="mark simulated">partly simulated</span>'
_PRIVATE = '<span class="mark">private</span>'
_UNSTATED = '<span class="quiet">not stated</span>'


def _name(source: dict) -> str:
    marks = ("" if source["public"] else _PRIVATE) + (_SIMULATED if source["simulated"] else "")
    return f'<span class="name">{escape(source["name"])}</span> {marks}'


def _bar(parts: list[tuple[str, int]], total: int, label: str) -> str:
    if not total:
        return ""
    text = ", ".join(f"{part} {_n(count)}" for part, count in parts if count)
    spans = "".join(f'<i class="{_class(part)}" style="flex-grow:{count}"></i>' for part, count in parts if count)
    return f'<div class="bar" role="img" aria-label="{escape(f"{label}: {text}")}">{spans}</div>'


def _key(label: str, count: int, total: int) -> str:
    share = _percent(count, total)
    return f'<li><i class="{_class(label)}"></i>{escape(label)} <b>{_n(count)}</b> <span>{share}</span></li>'


def _class(part: str) -> str:
    return f"part-{part.replace(' ', '-')}" if part in (*DROPPED, "train", "val") else "part-other"


def _in_order(dropped: dict[str, int]) -> list[tuple[str, int]]:
    known = [(reason, dropped[reason]) for reason in DROPPED if reason in dropped]
    return known + sorted((reason, count) for reason, count in dropped.items() if reason not in DROPPED)


def _splits(row: dict) -> list[str]:
    return [f"{_n(row[split])} {split}" for split in ("train", "val") if row[split]]


def _list(counts: list[tuple[str, int]]) -> str:
    """Reasons with counts above 0; a count stays on the same line as its reason."""
    return ", ".join(f"{escape(reason)}&nbsp;{_n(count)}" for reason, count in counts if count)


def _data_url(example: Example) -> str:
    data = thumbnails.of_slice(np.asarray(images.decode(example.image, example.kind)))
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _short(example: Example) -> str:
    """The last part of the id; the picture's title shows all of it."""
    return example.id.rpartition("/")[2]
