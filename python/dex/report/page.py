"""``report``: one self-contained HTML page about one or several run folders.

It reads only the files that ``dex.train.runlog`` writes, so it also accepts a run folder copied from another machine or
written by another version. Equal folders give equal bytes.
"""

from collections.abc import Sequence
from pathlib import Path

from dex.report import document, sections
from dex.report.charts import esc
from dex.report.document import Section
from dex.report.facts import Fact, facts, sentence, unlike
from dex.report.parts import chip, run_heads, table
from dex.report.runs import RunRecord, labels, read_run
from dex.report.specialisation import specialisation


def report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page about the run folders ``runs`` to ``out``, whole or not at all, and return ``out``.

    Several runs are compared. Raises: ValueError naming ``out``, or the run whose files are missing or damaged.
    """
    if not runs:
        raise ValueError("runs: expected at least one run folder, got none")
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"out: expected a file, got the folder {out}")
    folders = [Path(run) for run in runs]
    records = [read_run(folder, name) for folder, name in zip(folders, labels(folders), strict=True)]
    document.write(_page(records), out)
    return out


def _page(runs: list[RunRecord]) -> str:
    several = len(runs) > 1
    parts = [
        Section("losses", "Losses", sections.losses(runs)),
        Section("modalities", "Modalities", sections.modalities(runs)),
        Section("specialisation", "Do the experts specialise?", specialisation(runs)),
        Section("experts", "Experts", sections.experts(runs)),
        Section("reconstructions", "Reconstructions", sections.reconstructions(runs)),
        Section("speed", "Speed and memory", sections.speed(runs)),
        Section("schedules", "Schedules", sections.schedules(runs)),
        Section("events", "Events", sections.events(runs)),
        Section("configuration", "Configuration", sections.configuration(runs)),
        Section("machine", "Machine and starts", sections.machine(runs)),
    ]
    title = f"{len(runs)} runs compared" if several else runs[0].name
    notes = [f"{run.name}: {note}" if several else note for run in runs for note in run.notes] + unlike(runs)
    return document.document("DEX pretraining report", title, _headline(runs), notes, parts)


def _headline(runs: list[RunRecord]) -> str:
    if len(runs) == 1:
        run = runs[0]
        tiles = "".join(
            f'<div class="tile"><b>{esc(fact.value)}</b><span>{esc(label)}</span>'
            f"{f'<small>{esc(fact.more)}</small>' if fact.more else ''}</div>"
            for label, fact in facts(run).items()
        )
        return f'<p class="lead">{esc(sentence(run))}</p><div class="tiles">{tiles}</div>'
    by_run, comparable, rows = [facts(run) for run in runs], not unlike(runs), []
    for label in {label: None for of_run in by_run for label in of_run}:
        row = [of_run.get(label, Fact("–")) for of_run in by_run]
        scores = [fact.score for fact in row if fact.score is not None]
        cells = []
        for fact in row:
            best = comparable and len(scores) > 1 and fact.score == min(scores) < max(scores)
            cells.append(
                f"<td>{'<b>' if best else ''}{esc(fact.value)}{'</b>' if best else ''}"
                f"{f' <small>{esc(fact.more)}</small>' if fact.more else ''}</td>"
            )
        rows.append(f"<tr><th>{esc(label)}</th>{''.join(cells)}</tr>")
    leads = "".join(f"<li>{chip(i, run)}: {esc(sentence(run))}</li>" for i, run in enumerate(runs))
    return f'<ul class="lead">{leads}</ul>{table(run_heads(runs), rows)}'
