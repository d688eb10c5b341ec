"""An inventory as text, as an HTML page in the style of the data card, and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

from dex.common import formats
from dex.common.units import duration, format_bytes

from . import page
from .inventory import Inventory
from .survey import Alike, Kind, Leaf

SIZES = 4
"""Number of sizes that are listed for each modality and plane; the others are given as a range."""
NOT_SAID = "unknown"
EXACT = (
    "Exact, from the listing and headers: files, modalities, sizes, planes, spacing, patients, what is left out by "
    "headers, skipped files."
)


class _Row(NamedTuple):
    """Images of one kind and plane. sizes: H x W -> slices."""

    kind: Kind
    plane: str
    total: Alike
    sizes: Counter[tuple[int, int]]


def to_text(inventories: Sequence[Inventory]) -> str:
    return "\n\n".join("\n".join(_lines(inventory)) for inventory in inventories)


def build(inventories: Sequence[Inventory]) -> tuple[bytes, bytes]:
    """(HTML, JSON)."""
    data = json.dumps([to_dict(inventory) for inventory in inventories], indent=1, ensure_ascii=False) + "\n"
    return _page(inventories).encode(), data.encode()


def to_dict(inventory: Inventory) -> dict[str, Any]:
    """The inventory as plain values: "exact" from the listing and headers, "estimate" from the sample."""
    survey, estimate = inventory.survey, inventory.estimate
    return {
        "source": inventory.source,
        "exact": {
            "files": inventory.files,
            "bytes": inventory.bytes,
            "patients": survey.patients,
            "groups_without_patient": len(survey.groups) - survey.patients,
            "slices": estimate.slices,
            "too_small": estimate.small,
            "images": [_leaf(leaf, alike) for leaf, alike in sorted(survey.leaves.items())],
            "left_out": [
                {"reason": reason, "detail": detail, "modality": modality, "count": count}
                for (modality, reason, detail), count in sorted(survey.refused.items())
            ],
            "passed_over": inventory.passed_over,
            "undetermined": list(inventory.undetermined.suffixes) if inventory.undetermined else [],
            "without_length": survey.lengthless,
        },
        "estimate": {
            "kept": estimate.kept,
            "label_maps": estimate.label_maps,
            "bytes": estimate.bytes,
            "processor_seconds": round(estimate.seconds, 1),
            "seconds": round(estimate.seconds / inventory.workers, 1),
            "workers": inventory.workers,
            "not_measured_slices": estimate.unmeasured,
            "rates": [
                {
                    "format": kind.format,
                    "modality": kind.modality,
                    "named_like_label_maps": kind.named,
                    "sampled_slices": part.expected,
                    "kept": part.kept,
                    "dropped": dict(sorted(part.dropped.items())),
                    "refused": dict(sorted(part.refused.items())),
                    "slices_per_second": round(part.expected / part.seconds, 1) if part.seconds else None,
                    "bytes_per_image": round(part.bytes / part.kept) if part.kept else None,
                }
                for kind, part in sorted(inventory.sample.items())
            ],
        },
    }


def _leaf(leaf: Leaf, alike: Alike) -> dict[str, Any]:
    return {
        "format": leaf.kind.format,
        "modality": leaf.kind.modality,
        "named_like_label_maps": leaf.kind.named,
        "plane": leaf.plane,
        "height": leaf.height,
        "width": leaf.width,
        "stacks": alike.stacks,
        "slices": alike.slices,
        "too_small": alike.small,
        "spacing_mm": alike.spacing,
        "between_slices_mm": alike.apart,
    }


def _rows(inventory: Inventory) -> list[_Row]:
    rows = []
    leaves = sorted(inventory.survey.leaves.items())
    for (kind, plane), group in groupby(leaves, key=lambda item: (item[0].kind, item[0].plane)):
        total, sizes = Alike(), Counter()
        for leaf, alike in group:
            total.add(alike)
            sizes[leaf.height, leaf.width] += alike.slices
        rows.append(_Row(kind, plane, total, sizes))
    return rows


def _lines(inventory: Inventory) -> Iterable[str]:
    yield (
        f"{inventory.source}: {page.count(inventory.files, 'file')}, {format_bytes(inventory.bytes)}, "
        f"{_patients(inventory)}, {page.count(inventory.estimate.slices, 'slice')}"
    )
    before = ""
    for row in _rows(inventory):
        if row.kind.format != before:
            before = row.kind.format
            yield f"  {_title(before)}"
        yield f"    {_modality(row.kind):<22} {_stacks(row)}, {page.count(row.total.slices, 'slice')}{_plane(row)}"
        yield f"      {_sizes(row)}{_spacing(row.total)}"
    for title, listed in (("left out, by headers", _left_out(inventory)), ("passed over", _passed_over(inventory))):
        if listed:
            yield f"  {title}"
            yield from (f"    {count:>7,} {reason}" for reason, count in listed)
    yield from (f"  {line}" for line in _estimated(inventory))


def _patients(inventory: Inventory) -> str:
    survey = inventory.survey
    others = len(survey.groups) - survey.patients
    text = page.count(survey.patients, "patient")
    return text + (
        f" and {page.number(others) + (' folders or files' if others > 1 else ' folder or file')} that name no patient"
        if others
        else ""
    )


def _estimated(inventory: Inventory) -> list[str]:
    """The estimate as sentences, for the text and the page."""
    estimate = inventory.estimate
    lines = []
    if estimate.small:
        lines.append(f"{page.count(estimate.small, 'slice')} will be dropped: too small.")
    if estimate.sampled:
        measured = estimate.slices - estimate.small - estimate.unmeasured
        lines.append(
            f"Estimate, from {page.count(estimate.sampled, 'slice')} read as in a real run: about "
            f"{page.number(estimate.kept)} of {page.number(measured)} slices kept "
            f"({page.percent(estimate.kept, measured)}), {format_bytes(estimate.bytes)}, "
            f"{_time(estimate.seconds / inventory.workers)} with {page.count(inventory.workers, 'worker')}."
        )
        rates = [
            f"{_title(kind.format)} {_modality(kind)} {part.expected / part.seconds:,.0f}"
            for kind, part in sorted(inventory.sample.items())
            if part.seconds
        ]
        lines.append(f"Rates measured on these, in slices per second and process: {', '.join(rates)}.")
    if estimate.label_maps:
        lines.append(
            f"Label maps, recognised by their values: about {page.number(estimate.label_maps)} will be left out."
        )
    if estimate.unmeasured:
        lines.append(f"Not measured: {page.count(estimate.unmeasured, 'slice')} of kinds without a sample.")
    if inventory.survey.lengthless:
        lines.append(f"{page.count(inventory.survey.lengthless, 'film')} without a number of frames: not counted.")
    lines.append(f"{EXACT} Near-duplicates are only found in the whole set.")
    return lines


def _left_out(inventory: Inventory) -> list[tuple[str, int]]:
    counts: Counter[str] = Counter()
    for (_, reason, detail), number in inventory.survey.refused.items():
        counts[f"{reason}: {detail}" if detail else reason] += number
    return counts.most_common()


def _passed_over(inventory: Inventory) -> list[tuple[str, int]]:
    return sorted(inventory.passed_over.items(), key=lambda item: -item[1])


def _title(format: str) -> str:
    return next((known.title for known in formats.FORMATS if known.name == format), format)


def _modality(kind: Kind) -> str:
    return (kind.modality or NOT_SAID) + (", named like label maps" if kind.named else "")


def _stacks(row: _Row) -> str:
    if row.kind.format == "dicom":
        return f"{page.number(row.total.stacks)} series"
    return page.count(row.total.stacks, "stack")


def _plane(row: _Row) -> str:
    return f", {'as stored' if row.plane == 'stored' else row.plane}" if row.plane else ""


def _sizes(row: _Row) -> str:
    listed = [f"{height} x {width}" for (height, width), _ in row.sizes.most_common(SIZES)]
    rest = len(row.sizes) - len(listed)
    if rest:
        low, high = (tuple(choose(size[i] for size in row.sizes) for i in (0, 1)) for choose in (min, max))
        listed.append(f"{rest:,} other sizes, {low[0]} x {low[1]} to {high[0]} x {high[1]}")
    return f"{', '.join(listed)} pixels"


def _spacing(total: Alike) -> str:
    text = f"; {_range(total.spacing)} mm per pixel" if total.spacing else ""
    return text + (f", {_range(total.apart)} mm between slices" if total.apart else "")


def _time(seconds: float, about: str = "") -> str:
    return "less than 1s" if seconds < 1 else about + duration(seconds)


def _range(ends: tuple[float, float]) -> str:
    low, high = (f"{end:.3g}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _page(inventories: Sequence[Inventory]) -> str:
    files, size = sum(inventory.files for inventory in inventories), sum(inventory.bytes for inventory in inventories)
    patients = sum(inventory.survey.patients for inventory in inventories)
    left_out = sum(inventory.survey.refused.total() for inventory in inventories)
    passed = sum(sum(inventory.passed_over.values()) for inventory in inventories)
    estimates = [inventory.estimate for inventory in inventories]
    slices, kept, set_size = (
        sum(getattr(estimate, name) for estimate in estimates) for name in ("slices", "kept", "bytes")
    )
    seconds = sum(estimate.seconds for estimate in estimates) / inventories[0].workers
    head = page.tiles(
        [
            page.Tile("Files", page.number(files), format_bytes(size)),
            page.Tile("Slices", page.number(slices), "by their headers"),
            page.Tile("Patients", page.number(patients), "counted by hashes"),
            page.Tile("Left out", page.number(left_out), "by headers"),
            page.Tile("Passed over", page.number(passed), "not image files"),
            page.Tile("Kept", f"≈ {page.number(kept)}", "estimate"),
            page.Tile("Size of the set", f"≈ {format_bytes(set_size)}", "estimate"),
            page.Tile("Time", _time(seconds, "≈ "), "estimate"),
        ]
    )
    names = escape(", ".join(inventory.source for inventory in inventories))
    notice = ""
    if any(inventory.undetermined for inventory in inventories):
        notice = (
            '<p class="notice">The modality of some files is unknown: <code>dex prepare</code> will not start '
            "until its command names it.</p>"
        )
    header = f'<header><p class="kicker">Inventory</p><h1>{names}</h1>{notice}{head}</header>'
    sections = []
    for number, inventory in enumerate(inventories):
        key, name = f"-{number}" if number else "", f": {escape(inventory.source)}" if len(inventories) > 1 else ""
        refused = _counts(_left_out(inventory), "By headers", "Files or parts")
        skipped = _counts(_passed_over(inventory), "Reason", "Files")
        sections += [
            page.Section(f"images{key}", f"Images{name}", _tree(inventory)),
            page.Section(f"left-out{key}", f"Left out{name}", refused),
            page.Section(f"passed-over{key}", f"Passed over{name}", skipped),
            page.Section(f"estimate{key}", f"Estimate{name}", _sentences(_estimated(inventory))),
        ]
    return page.document("Inventory", header, sections)


def _tree(inventory: Inventory) -> str:
    bodies = []
    for format, group in groupby(_rows(inventory), key=lambda row: row.kind.format):
        cells = "".join(
            f'<tr><th scope="row"><span class="name">{escape(_modality(row.kind))}</span></th>'
            f'<td data-label="Slices" class="number">{page.number(row.total.slices)}<small>{_stacks(row)}</small></td>'
            f'<td data-label="Plane"><span>{escape(_plane(row).removeprefix(", ")) or "picture"}</span></td>'
            f'<td data-label="Size"><span>{_sizes(row)}</span>'
            f"<small>{_spacing(row.total).removeprefix('; ')}</small></td></tr>"
            for row in group
        )
        head = f'<tr class="group"><th colspan="4" scope="rowgroup">{escape(_title(format))}</th></tr>'
        bodies.append(f"<tbody>{head}{cells}</tbody>")
    return (
        '<table class="cards"><thead><tr><th scope="col">Modality</th><th scope="col" class="number">Slices</th>'
        f'<th scope="col">Plane</th><th scope="col">Size</th></tr></thead>{"".join(bodies)}</table>'
    )


def _counts(listed: Sequence[tuple[str, int]], title: str, of: str) -> str:
    if not listed:
        return "<p>None.</p>"
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td data-label="{of}" class="number">{page.number(count)}</td></tr>'
        for name, count in listed
    )
    return (
        f'<table class="cards"><thead><tr><th scope="col">{title}</th><th scope="col" class="number">{of}</th></tr>'
        f"</thead><tbody>{rows}</tbody></table>"
    )


def _sentences(lines: Sequence[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)
