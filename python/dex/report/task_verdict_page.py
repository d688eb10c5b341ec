"""The page of ``dex compare``: the verdict, a row per task, the compute of both sides, and a section per task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dex.report import document, task_words
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
    "paired by patient and seed. Intervals are over patients; the values by seed show how much training varies. "
    f"With fewer than {LEAST_PATIENTS} test patients or {LEAST_SEEDS} seeds, a difference is shown without a verdict."
)


def write(out: Path, a: Side, b: Side, tasks: Sequence[Compared]) -> None:
    """Write the page to ``out``, whole or not at all."""
    headline = f'<p class="verdict">{esc(verdict(a, b, tasks))}</p>'
    sections = [
        Section("tasks", "Task by task", reading(_READ) + _tasks(a, b, tasks)),
        Section("compute", "What the two cost", _compute(a, b)),
        *(_section(a, b, task, number) for number, task in enumerate(tasks)),
    ]
    page = document.document("Comparison on tasks", f"{a.name} and {b.name}", headline, [], sections)
    document.write(page, out)


def _tasks(a: Side, b: Side, tasks: Sequence[Compared]) -> str:
    rows = []
    for task in tasks:
        title = METRICS[task.metric].title
        values = ["–" if value is None else f"{value:.3f}" for value in task.values]
        text = f"no verdict: {'; '.join(task.reasons)}" if task.reasons else task_words.verdict(task.difference)
        seeds = " ".join(f"{seed.value:+.3f}" for seed in task.difference.by_seed if seed.value is not None)
        rows.append([task.task, title, *values, signed(task.difference.estimate), seeds or "–", text])
    return rows_table(["task", "metric", a.name, b.name, "difference", "by seed", ""], rows)


def _compute(a: Side, b: Side) -> str:
    names = ("steps", "images", "parameters", "active", "operations", "director")
    titles = ("steps", "images seen", "parameters", "active parameters", "operations", "operations of directors")
    rows = []
    for name, title in zip(names, titles, strict=True):
        values = (getattr(side.compute, name) for side in (a, b))
        rows.append([title, *(f"{v:,}" if v < 1e9 else f"{v:.3g}" for v in values)])
    sentences = "".join(f"<p>{esc(sentence)}</p>" for sentence in compute.sentences(a.compute, b.compute))
    return sentences + rows_table(["", a.name, b.name], rows)


def _section(a: Side, b: Side, task: Compared, number: int) -> Section:
    section = compared(a.name, task.first, Other(b.name, task.second))
    leaks = "".join(
        f'<p class="soft">Test images in the pretraining set of {esc(name)}: {esc(leak)}.</p>'
        for name, leak in task.leaks.items()
    )
    return Section(f"task-{number}", task.task, section.content + leaks)
