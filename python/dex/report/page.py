"""`report`: one HTML page about one or several run folders, to be read anywhere without anything else.

It reads what `dex.train.runlog` writes and nothing more: a run folder copied from another machine or written by another
version will do. Equal folders give equal bytes.
"""

import base64
import contextlib
import glob
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dex.common import atomic
from dex.report import sections
from dex.report.charts import esc
from dex.report.facts import Fact, facts, sentence, unlike
from dex.report.parts import chip, run_heads, table
from dex.report.runs import RunRecord, labels, read_run
from dex.report.style import SCRIPT, STYLE

UNFINISHED_AFTER = 3600.0
"""Seconds after which a page that is not finished never will be."""


class _Section(NamedTuple):
    anchor: str
    title: str
    content: str
    """HTML; empty where the runs logged nothing of it."""


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
    _remove_unfinished(out)
    atomic.write(out, page)
    return out


def _remove_unfinished(out: Path) -> None:
    """Remove what reports that were killed left beside ``out``; a younger file may still be being written."""
    for left in out.parent.glob(f"{glob.escape(out.name)}.*{atomic.PARTIAL}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > UNFINISHED_AFTER:
                left.unlink()


def _page(runs: list[RunRecord]) -> str:
    several = len(runs) > 1
    drawn = [
        _Section("losses", "Losses", sections.losses(runs)),
        _Section("modalities", "Modalities", sections.modalities(runs)),
        _Section("experts", "Experts", sections.experts(runs)),
        _Section("reconstructions", "Reconstructions", sections.reconstructions(runs)),
        _Section("speed", "Speed and memory", sections.speed(runs)),
        _Section("schedules", "Schedules", sections.schedules(runs)),
        _Section("events", "Events", sections.events(runs)),
        _Section("configuration", "Configuration", sections.configuration(runs)),
        _Section("machine", "Machine and starts", sections.machine(runs)),
    ]
    drawn = [s for s in drawn if s.content]
    title = f"{len(runs)} runs compared" if several else runs[0].name
    links = "".join(f'<a href="#{s.anchor}">{esc(s.title)}</a>' for s in drawn)
    body = "".join(f'<section id="{s.anchor}"><h2>{esc(s.title)}</h2>{s.content}</section>' for s in drawn)
    notes = [f"{run.name}: {note}" if several else note for run in runs for note in run.notes] + unlike(runs)
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
