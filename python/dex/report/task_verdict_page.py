"""The page of `dex compare`: a verdict in a sentence, a row for each task, what both sides cost, each task apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dex.report import document
from dex.report.analysis_parts import reading, rows_table
from dex.report.charts import esc
from dex.report.document import Section
from dex.report.task_comparison import Other, compared
from dex.report.task_words import signed
from dex.tasks import compute
from dex.tasks.compare import LEAST_PATIENTS, LEAST_SEEDS, Compared, Side, verdict
from dex.tasks.metrics.evaluation import METRICS

_READ = (
    "Both sides were fine-tuned with the same settings, splits and seeds, and are compared on the same test cases, "
    "paired by patient and seed. Intervals are over patients; three seeds show how much chance in training adds. "
    f"With fewer than {LEAST_PATIENTS} test patients or {LEAST_SEEDS} seeds a difference is shown without a verdict."
)


def write(out: Path, a: Side, b: Side, tasks: Sequence[Compared]) -> None:
    """Write the page to ``out``, whole or not at all."""
    headline = f'<p class="verdict">{esc(verdict(a, b, tasks))}</p>'
    sections = [
        Section("tasks", "Task by task", reading(_READ) + _tasks(a, b, tasks)),
        Section("compute", "What the two cost", _compute(a, b)),
        *(_section(a, b, one, number) for number, one in enumerate(tasks)),
    ]
    page = document.document("Comparison on tasks", f"{a.name} and {b.name}", headline, [], sections)
    document.write(page, out)


def _tasks(a: Side, b: Side, tasks: Sequence[Compared]) -> str:
    rows = []
    for one in tasks:
        values = ["–" if value is None else f"{value:.3f}" for value in one.values]
        said = f"no verdict: {'; '.join(one.reasons)}" if one.reasons else one.difference.verdict
        seeds = " ".join(f"{seed.value:+.3f}" for seed in one.difference.by_seed if seed.value is not None)
        rows.append([one.task, METRICS[one.metric].title, *values, signed(one.difference.estimate), seeds or "–", said])
    return rows_table(["task", "metric", a.name, b.name, "difference", "by seed", ""], rows)


def _compute(a: Side, b: Side) -> str:
    names = ("steps", "images", "parameters", "active", "operations", "director")
    titles = ("steps", "images seen", "parameters", "active parameters", "operations", "operations of directors")
    rows = []
    for name, title in zip(names, titles, strict=True):
        values = (getattr(one.compute, name) for one in (a, b))
        rows.append([title, *(f"{v:,}" if v < 1e9 else f"{v:.3g}" for v in values)])
    said = "".join(f"<p>{esc(sentence)}</p>" for sentence in compute.sentences(a.compute, b.compute))
    return said + rows_table(["", a.name, b.name], rows)


def _section(a: Side, b: Side, one: Compared, number: int) -> Section:
    section = compared(a.name, one.first, Other(b.name, one.second))
    leaks = "".join(
        f'<p class="soft">Test images in the pretraining set of {esc(name)}: {esc(said)}.</p>'
        for name, said in one.leaks.items()
    )
    return Section(f"task-{number}", one.task, section.content + leaks)
