"""The page of `dex analyse`, and the files beside it: pictures, the numbers behind each, and all of them as JSON.

OUT/index.html       self-contained
OUT/findings.json    every number of the page
OUT/NAME.svg, .png   each picture, for a paper
OUT/NAME.csv         the numbers behind it
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from dex.analysis.conclusion import Conclusion, conclude, told
from dex.analysis.examine import Findings
from dex.analysis.record import FORMAT, VERSION, plain, to_plain
from dex.common import atomic
from dex.inference.analyse_job import Analysis
from dex.report import analysis_experts as experts
from dex.report import analysis_features as features
from dex.report import document
from dex.report.analysis_parts import Block, models, names, rows_table
from dex.report.charts import esc, number

PAGE, FINDINGS = "index.html", "findings.json"
_SECTIONS = (
    experts.swap,
    features.steps,
    experts.heatmaps,
    experts.routing,
    experts.overlap,
    experts.ablation,
    experts.similarity,
    experts.gradients,
    features.probe,
    features.spectra,
    features.maps,
    features.heldout,
)


def write(analysis: Analysis, out: Path) -> Path:
    """Write page and files to the folder ``out``, each whole or not at all, the page last; returns the page's path.

    Files that an earlier analysis left there, and this one has not, are removed.
    """
    blocks = [b for b in (section(analysis) for section in _SECTIONS) if b is not None]
    files = {name: data for b in blocks for name, data in b.files.items()}
    record = findings(analysis) | {"files": sorted(files)}
    page = _page(analysis, blocks)
    out.mkdir(parents=True, exist_ok=True)
    stale = _earlier_files(out) - set(files)
    for name, data in files.items():
        atomic.write(out / name, data)
    atomic.write(out / FINDINGS, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    document.write(page, out / PAGE)
    for name in stale:
        (out / name).unlink(missing_ok=True)
    return out / PAGE


def findings(analysis: Analysis) -> dict[str, Any]:
    """Every number, as JSON holds it."""
    material = analysis.material
    verdict = concluded(analysis, analysis.found)
    return {
        "format": FORMAT,
        "version": VERSION,
        "run": analysis.name,
        "step": analysis.found.step,
        "data": analysis.data,
        "modalities": list(material.modalities),
        "held_out": {
            "images": len(material.held_out.ids),
            "groups": _groups(analysis),
            "groups_are": material.groups.kind,
        },
        "verdict": verdict._asdict(),
        "notes": list(analysis.notes),
        "found": plain(analysis.found),
        "step_0": analysis.start and plain(analysis.start),
        "other": analysis.other
        and {"name": analysis.other.name, "comparable": analysis.other.comparable, **plain(analysis.other.findings)},
        "pixels": to_plain(analysis.pixels),
        "curve": [plain(f) for f in analysis.curve],
    }


def concluded(analysis: Analysis, of: Findings) -> Conclusion:
    """What the swap test says of one of the models; without it, nothing."""
    if of.gaps is None and of.layers != []:
        return Conclusion("not measured", "Whether the experts are specialised was not measured (--only swap does it).")
    return conclude(of.gaps, of.modality_gap, _groups(analysis), analysis.material.groups.kind)


def loss_table(analysis: Analysis) -> str:
    """The held-out loss by modality as lines for the screen."""
    shown, words = models(analysis), names(analysis)
    wide = max(len("all"), *map(len, words))
    lines = [f"{'':{wide}}  " + "  ".join(f"{m.name:>22}" for m in shown)]
    for word in words:
        lines.append(f"{word:{wide}}  " + "  ".join(f"{m.found.modality_loss[word]:>22.4f}" for m in shown))
    lines.append(f"{'all':{wide}}  " + "  ".join(f"{told(m.found.loss):>22}" for m in shown))
    return "\n".join(lines)


def about(analysis: Analysis) -> str:
    """What the numbers are of, in a sentence."""
    material = analysis.material
    return (
        f"{len(material.held_out.ids):,} held-out images of the data set {analysis.data}; intervals are "
        f"95 %, over their {_groups(analysis):,} {material.groups.kind}."
    )


def _groups(analysis: Analysis) -> int:
    return len(analysis.material.groups.of.unique())


def _earlier_files(out: Path) -> set[str]:
    """Files beside the page of an earlier analysis, by its own list."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        record = json.loads((out / FINDINGS).read_text(encoding="utf-8"))
        if record["format"] == FORMAT:
            return {name for name in record["files"] if Path(name).name == name}
    return set()


def _page(analysis: Analysis, blocks: list[Block]) -> str:
    sections = [document.Section(b.anchor, b.title, b.content) for b in blocks]
    return document.document(
        "Did the experts specialise?", analysis.name, _headline(analysis), analysis.notes, sections
    )


def _headline(analysis: Analysis) -> str:
    verdict = f'<p class="verdict">{esc(concluded(analysis, analysis.found).text)}</p>'
    lines = [about(analysis)]
    for name, found in models(analysis)[1:]:
        if found.gaps is not None:
            lines.append(f"{name}: {concluded(analysis, found).text}")
    more = "".join(f'<p class="lead">{esc(line)}</p>' for line in lines)
    return verdict + more + _summary(analysis)


def _summary(analysis: Analysis) -> str:
    """The main numbers of every model, side by side."""
    shown = models(analysis)
    measures = {
        "held-out masked loss": lambda f: told(f.loss),
        "swap gap, another modality's experts": lambda f: _gap(f, "other modality"),
        "swap gap, random experts": lambda f: _gap(f, "random"),
        "corrected information, masked (chance below)": _information,
        "linear probe": lambda f: None if f.probe is None else told(f.probe),
        "RankMe, mean of patches": lambda f: None if f.patches is None else number(f.patches.rankme, 3),
    }
    rows = []
    for name, measure in measures.items():
        values = [measure(m.found) for m in shown]
        if any(v is not None for v in values):
            rows.append([name, *(v or "–" for v in values)])
    if analysis.pixels is not None:
        place = next(i for i, row in enumerate(rows) if row[0] == "linear probe")
        rows[place][0] = f"linear probe (pixels {told(analysis.pixels)})"
    return rows_table(["", *(m.name for m in shown)], rows)


def _gap(found: Findings, kind: str) -> str | None:
    gap = next((g for g in found.gaps or () if g.kind == kind and g.layer is None), None)
    return gap and told(gap.gap, signed=True)


def _information(found: Findings) -> str | None:
    if not found.layers:
        return None
    values = [
        sum(getattr(layer.masked, f) for layer in found.layers) / len(found.layers) for f in ("value", "null_high")
    ]
    return f"{values[0]:.3f} ({values[1]:.3f})"
