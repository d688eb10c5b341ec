#!/usr/bin/env python3
"""Writes docs/reliability.md from benchmarks/results/reliability/two-ranks.json, which `make reliability` measures.

usage: python scripts/reliability_page.py [--check]
--check: change nothing; exit 1 when the page is not what the results say. Needs no other package.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from generated import commit_of, settle  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks/results/reliability/two-ranks.json", ROOT / "docs/reliability.md"

TEXT = """\
# Reliability

What a pretraining run on several ranks promises when processes die, disks fill up and numbers overflow, and how often
the promise was kept when it was tried. Each row was tried on two processes of one machine that talk through gloo, with
a small model, by `make reliability`; `make test-all` tries a sample of each. Made by `scripts/reliability_page.py` of
[{name}](../{path}); not edited.

{measured}

| promise | wanted | kept | figures | measured |
| --- | --- | --- | --- | --- |
{rows}

A random number is a function of the seed and of an image's place in the run, so there is no state of a generator to
save or to lose. Kills are SIGKILL: what the kernel had not written to the disk when the power goes is not among them,
though every file and folder of a checkpoint is flushed before it gets its name. File operations are counted and broken
where Python calls them. {surroundings}Not tried: GPUs and NCCL, more than two ranks, several machines, network file
systems.
"""

SURROUNDINGS = """\
Disks that fail, fill up or stand still, limits and outputs are real ones. Two faults are stood in for: a file
server that does not answer, by a FIFO, and a clock that jumps, by a library that is loaded before all others. """
_SURROUNDINGS_ROW = 27


def page(results: dict) -> str:
    machine = results["machine"]
    size = "in full" if results["full"] else "sampled"
    measured = (
        f"Measured {size} on {machine['cpus']} CPUs with Python {machine['python']} and torch {machine['torch']}, in "
        f"{results['seconds'] / 60:.0f} minutes together. Each row says when, of which commit and on which processor."
    )
    rows = [
        f"| {row['promise']} | {row['wanted']:,} | {row['done']:,} | {figures(row['details'])} | {of(row)} |"
        for row in results["rows"]
    ]
    has_surroundings = any(row["row"] == _SURROUNDINGS_ROW for row in results["rows"])
    surroundings = SURROUNDINGS if has_surroundings else ""
    return TEXT.format(
        surroundings=surroundings,
        name=RESULTS.name,
        path=RESULTS.relative_to(ROOT),
        measured=measured,
        rows="\n".join(rows),
    )


def of(row: dict) -> str:
    return f"{row['date']}, {commit_of(row)}, {row['cpu']}"


def figures(details: dict) -> str:
    return "; ".join(f"{name.replace('_', ' ')}: {_plain(value)}" for name, value in details.items())


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_plain(v)} times {k}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:.2g}" if isinstance(value, float) and abs(value) < 0.01 else f"{value}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = page(json.loads(RESULTS.read_text(encoding="utf-8")))
    return settle(PAGE, text, check=check, source=RESULTS.name, command="scripts/reliability_page.py")


if __name__ == "__main__":
    sys.exit(main())
