#!/usr/bin/env python3
"""Whether the demo's experts specialise: runs of the preset and of variants, each analysed, as a table of the docs.

usage: python scripts/demo_specialisation.py RUN [RUN ...]
       python scripts/demo_specialisation.py --page [--check]

RUN: a run of `dex pretrain --preset demo`, analysed by `dex analyse`. Writes
benchmarks/results/demo/specialisation.json and the table in docs/specialisation.md. --page: only the table, from the
results; --check: change nothing, exit 1 if the page is outdated.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/demo/specialisation.json"
PAGE = ROOT / "docs/specialisation.md"
BEGIN, END = "<!-- demo -->\n", "<!-- end of demo -->"


def measured(run: Path) -> dict[str, Any]:
    """What the table needs of ``run`` and of its analysis. ValueError: it is not of the preset, or not analysed."""
    start = json.loads((run / "run.json").read_text())["starts"][0]
    path = run / "analysis/findings.json"
    if start["command"][:4] != ["dex", "pretrain", "--preset", "demo"]:
        raise ValueError(f"RUN: expected a run of dex pretrain --preset demo, got {' '.join(start['command'])}")
    if not path.is_file():
        raise ValueError(f"RUN: expected an analysed run, got none in {run}; run dex analyse {run}")
    findings = json.loads(path.read_text())
    found = findings["found"]
    gap = next(g for g in found["gaps"] if g["kind"] == "other modality" and g["layer"] is None)
    command = start["command"]
    names = {"commit": start["commit"], "dirty": start["dirty"], "cpu": start["cpu"], "precision": start["precision"]}
    return {
        "changes": " ".join(command[4 : command.index("--out")]) if "--out" in command else " ".join(command[4:]),
        "step": findings["step"],
        "loss": found["loss"]["value"],
        "gap": gap["gap"],
        "beyond": found["modality_gap"]["gap"],
        "verdict": findings["verdict"]["kind"],
        "held_out": findings["held_out"],
        "start": names,
    }


def table(runs: list[dict[str, Any]]) -> str:
    """The runs as a table, and where they come from."""
    lines = [
        f"| {run['changes'] or 'none, seed 0'} | {run['loss']:.3f} | {_interval(run['gap'])} | "
        f"{_interval(run['beyond'])} | {run['verdict']} |\n"
        for run in runs
    ]
    held_out, start = runs[0]["held_out"], runs[0]["start"]
    return (
        "| changes to the preset | loss | swap gap, another modality | less that of the same modality | verdict |\n"
        f"| --- | --- | --- | --- | --- |\n{''.join(lines)}\n"
        f"{runs[0]['step']:,} steps each, {held_out['images']} held-out images of {held_out['groups']} sources; "
        f"{start['precision']}, {start['cpu']}, {start['commit'][:10]}.\n"
    )


def _interval(value: dict[str, float]) -> str:
    return f"{value['value']:+.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def with_table(text: str, runs: list[dict[str, Any]]) -> str:
    """The page with the table between its markers."""
    before, begin, rest = text.partition(BEGIN)
    if not begin or END not in rest:
        raise ValueError(f"{PAGE.name}: expected the lines {BEGIN.strip()} and {END}, got none")
    return before + begin + table(runs) + END + rest.partition(END)[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--page", action="store_true", help="only the table, from the results")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is outdated")
    arguments = parser.parse_args()
    if bool(arguments.runs) == arguments.page:
        parser.error("RUN: expected runs, or --page")
    from generated import atomic, settle

    if arguments.runs:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(RESULTS, json.dumps([measured(run) for run in arguments.runs], indent=1) + "\n")
    text = with_table(PAGE.read_text(encoding="utf-8"), json.loads(RESULTS.read_text()))
    source = str(RESULTS.relative_to(ROOT))
    return settle(PAGE, text, check=arguments.check, source=source, command="scripts/demo_specialisation.py --page")


if __name__ == "__main__":
    sys.exit(main())
