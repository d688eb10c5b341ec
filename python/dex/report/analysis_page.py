"""The page of ``dex analyse`` and the files beside it: figures, the numbers behind them, and all numbers as JSON.

OUT/index.html       self-contained
OUT/findings.json    every number of the page
OUT/NAME.svg, .png   each figure, for a paper
OUT/NAME.csv         the numbers behind it
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from dex.analysis.conclusion import Conclusion, conclude, format_interval
from dex.analysis.examine import Findings
from dex.analysis.record import FORMAT, VERSION, plain, to_plain
from dex.common import atomic
from dex.inference.analyse_job import Analysis
from dex.report import analysis_experts as experts
from dex.report import analysis_features as features
from dex.report import document
from dex.report.analysis_parts import Block, gap_in_all_layers, models, names, rows_table
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
    """Write the page and its files to the folder ``out``, each whole or not at all, the page last; return its path.

    Files of an earlier analysis that this one does not write are removed.
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
    """Every number of the analysis, as values that JSON can hold."""
    material = analysis.material
    verdict = concluded(analysis, analysis.findings)
    return {
        "format": FORMAT,
        "version": VERSION,
        "run": analysis.name,
        "step": analysis.findings.step,
        "data": analysis.data,
        "modalities": list(material.modalities),
        "held_out": {
            "images": len(material.held_out.ids),
            "groups": _groups(analysis),
            "groups_are": material.groups.kind,
        },
        "verdict": verdict._asdict(),
        "notes": list(analysis.notes),
        "found": plain(analysis.findings),
        "step_0": analysis.start and plain(analysis.start),
        "other": analysis.other
        and {"name": analysis.other.name, "comparable": analysis.other.comparable, **plain(analysis.other.findings)},
        "pixels": to_plain(analysis.pixels),
        "curve": [plain(f) for f in analysis.curve],
    }


def concluded(analysis: Analysis, model: Findings) -> Conclusion:
    """The conclusion of the swap test about one of the models."""
    if model.gaps is None and model.layers != []:
        return Conclusion("not measured", "Specialisation of the experts was not measured; --only swap measures it.")
    return conclude(model.gaps, model.modality_gap, _groups(analysis), analysis.material.groups.kind)


def loss_table(analysis: Analysis) -> str:
    """The held-out loss by modality, as text for the terminal."""
    shown, modalities = models(analysis), names(analysis)
    width = max(len("all"), *map(len, modalities))
    lines = [f"{'':{width}}  " + "  ".join(f"{m.name:>22}" for m in shown)]
    for name in modalities:
        lines.append(f"{name:{width}}  " + "  ".join(f"{m.findings.modality_loss[name]:>22.4f}" for m in shown))
    lines.append(f"{'all':{width}}  " + "  ".join(f"{format_interval(m.findings.loss):>22}" for m in shown))
    return "\n".join(lines)


def about(analysis: Analysis) -> str:
    """The images that were measured, and what intervals are over, in a sentence."""
    material = analysis.material
    return (
        f"{len(material.held_out.ids):,} held-out images of the data set {analysis.data}; 95 % intervals over their "
        f"{_groups(analysis):,} {material.groups.kind}."
    )


def _groups(analysis: Analysis) -> int:
    return len(analysis.material.groups.of.unique())


def _earlier_files(out: Path) -> set[str]:
    """The files beside the page of an earlier analysis, as its findings list them."""
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
    verdict = f'<p class="verdict">{esc(concluded(analysis, analysis.findings).text)}</p>'
    lines = [about(analysis)]
    for name, model in models(analysis)[1:]:
        if model.gaps is not None:
            lines.append(f"{name}: {concluded(analysis, model).text}")
    more = "".join(f'<p class="lead">{esc(line)}</p>' for line in lines)
    return verdict + more + _summary(analysis)


def _summary(analysis: Analysis) -> str:
    """The main numbers of every model, side by side."""
    shown = models(analysis)
    measures = {
        "held-out masked loss": lambda f: format_interval(f.loss),
        "swap gap, another modality's experts": lambda f: _gap(f, "other modality"),
        "swap gap, random experts": lambda f: _gap(f, "random"),
        "corrected information, masked (chance below)": _information,
        "linear probe": lambda f: None if f.probe is None else format_interval(f.probe),
        "RankMe, mean of patches": lambda f: None if f.patches is None else number(f.patches.rankme, 3),
    }
    rows = []
    for name, measure in measures.items():
        values = [measure(m.findings) for m in shown]
        if any(v is not None for v in values):
            rows.append([name, *(v or "–" for v in values)])
    if analysis.pixels is not None:
        place = next(i for i, row in enumerate(rows) if row[0] == "linear probe")
        rows[place][0] = f"linear probe (pixels {format_interval(analysis.pixels)})"
    return rows_table(["", *(m.name for m in shown)], rows)


def _gap(model: Findings, kind: str) -> str | None:
    gap = gap_in_all_layers(model, kind)
    return gap and format_interval(gap.gap, signed=True)


def _information(model: Findings) -> str | None:
    if not model.layers:
        return None
    value = sum(layer.masked.value for layer in model.layers) / len(model.layers)
    chance = sum(layer.masked.null_high for layer in model.layers) / len(model.layers)
    return f"{value:.3f} ({chance:.3f})"
