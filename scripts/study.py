#!/usr/bin/env python3
"""The study of docs/study-plan.md: many small runs with a row each, and a page and figures made from the rows.

usage: python scripts/study.py [DATA] [--search] [--workers N] [--shuffle SEED] [--only TEXT]
       python scripts/study.py --page [--check]

DATA: a shard set of 64 pixels, as made by `dex prepare packages --size 64` (default: data/study), or "embedded" for the
images of the package. Rows are written to benchmarks/results/study/runs.jsonl as runs end. After a stop or kill, the
same command does the missing runs. A row from other sources or data is computed again. --search: the search and its
confirmation. --page: only the page, from the rows; --check: change nothing, exit 1 if the page is outdated.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import study_arms  # noqa: E402
from study_arms import Spec  # noqa: E402

from dex.common import atomic, locks  # noqa: E402

RESULTS = ROOT / "benchmarks/results/study/runs.jsonl"
DATA = ROOT / "data/study"
DEPENDS = ("python/dex/analysis", "python/dex/data", "python/dex/model", "python/dex/train", "dexkernels")
"""Folders whose Python sources determine a run's results, beside the study's own."""
OWN = ("study_arms.py", "study_run.py")


def sources_hash() -> str:
    """SHA-256 of the sources that a row depends on, by name and content."""
    paths = [ROOT / "scripts" / name for name in OWN] + [ROOT / "python/dex/config.py"]
    for folder in DEPENDS:
        paths += (ROOT / folder).rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(paths):
        if not any(part in ("triton", "cuda") or part.startswith("triton") for part in path.parts):  # Runs use the CPU.
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def fingerprint(data: str) -> str:
    """The fingerprint of the data set."""
    from dex.data import open_dataset

    return open_dataset(None if data == "embedded" else data).take_fingerprint()


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The rows by key; of equal keys the last row. A last line cut short by a kill is ignored."""
    from dex.train.runlog import read_rows

    return {row["key"]: row for row in read_rows(path)}


class Results:
    """The rows of one file, locked against other writers."""

    def __init__(self, path: Path, origin: dict[str, Any]):
        """Lock and read the rows.

        Args:
            origin: sources and data of this start; rows of another origin are computed again.

        Raises:
            ValueError: another process has the file.
        """
        self.path, self.origin = path, origin
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = contextlib.ExitStack()
        try:
            self._lock.enter_context(locks.exclusive(path.with_name(f".{path.name}.lock"), wait=0))
        except (BlockingIOError, locks.NoLocks):
            raise ValueError(f"results: expected no other process to use {path}; another study is running") from None
        self.rows = read(path)

    def close(self) -> None:
        self._lock.close()

    def is_there(self, spec: Spec) -> bool:
        row = self.rows.get(spec.key)
        return row is not None and all(row.get(name) == value for name, value in self.origin.items())

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and write the file atomically."""
        self.rows[row["key"]] = row | self.origin
        lines = [json.dumps(self.rows[key], sort_keys=True) + "\n" for key in sorted(self.rows)]
        atomic.write(self.path, "".join(lines))


def carry_out(specs: Sequence[Spec], results: Results, data: str, workers: int, say: Callable[[str], None]) -> None:
    """Do the missing runs of ``specs``, ``workers`` at a time, each in a process with one thread.

    Raises:
        RuntimeError: a run failed; the message names it. The results of finished runs are kept.
    """
    missing = [spec for spec in specs if not results.is_there(spec)]
    say(f"{len(specs) - len(missing)} of {len(specs)} runs are done; {len(missing)} to go")
    running: dict[subprocess.Popen, Spec] = {}
    began, done = time.monotonic(), 0
    try:
        while missing or running:
            while missing and len(running) < workers:
                spec = missing.pop(0)
                running[_start(spec, data)] = spec
            for process, spec in _ended(running):
                out, err = process.communicate()
                del running[process]
                if process.returncode:
                    raise RuntimeError(f"{spec.key}: exit code {process.returncode}: {err.decode()[-2000:]}")
                results.add(json.loads(out.decode().splitlines()[-1]))
                done += 1
                left = (time.monotonic() - began) / done * (len(missing) + len(running)) / 60
                say(f"{spec.key}: {results.rows[spec.key]['cpu_s']:.0f} s of processor; {left:.0f} min left")
    finally:
        for process in running:
            process.kill()
            process.communicate()


def _start(spec: Spec, data: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts/study_run.py"), data, json.dumps(dataclasses.asdict(spec))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def _ended(running: dict[subprocess.Popen, Spec]) -> Iterator[tuple[subprocess.Popen, Spec]]:
    """Wait until some processes have ended, and return them. A row is small enough that no pipe fills up."""
    while True:
        ended = [(process, spec) for process, spec in running.items() if process.poll() is not None]
        if ended:
            return iter(ended)
        time.sleep(0.1)


def everything(results: Results, data: str, arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Run the study, or the search and the confirmation of its choice."""
    from study_choice import choose, combine

    tiny = arguments.tiny

    def run(specs: list[Spec]) -> None:
        specs = [spec for spec in specs if arguments.only in spec.key]
        if arguments.shuffle is not None:
            random.Random(arguments.shuffle).shuffle(specs)
        carry_out(specs, results, data, arguments.workers, say)

    if not arguments.search:
        return run(study_arms.study(*([(4, 6)] if tiny else []), tiny=tiny))
    short, both = (4, (4, 6)) if tiny else (400, (400, 1100))
    run(study_arms.search(short, tiny))
    if arguments.only:
        return None
    candidate = combine(results.rows, short, tiny)
    if candidate is not None:
        run([Spec(candidate, seed, short, half=0, tiny=tiny) for seed in study_arms.SEARCHED])
    chosen = choose(results.rows, candidate, short, tiny)
    say(f"chosen: {chosen.name}")
    return run(study_arms.confirmation(chosen, both, tiny))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="?", default=str(DATA), help="shard set, or embedded")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--search", action="store_true", help="do the search and its confirmation")
    parser.add_argument("--workers", type=int, default=2, help="simultaneous runs, with one thread each (2)")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="do the runs in a random order")
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs whose name contains TEXT")
    parser.add_argument("--tiny", action="store_true", help="runs of seconds, for tests")
    parser.add_argument("--page", action="store_true", help="only the page, from the rows")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is outdated")
    options = parser.parse_args(arguments)
    if options.page or options.check:
        from study_page import write

        return write(read(options.results), options.check)
    if options.workers < 1:
        parser.error(f"--workers: expected at least 1, got {options.workers}")
    try:
        origin = {"sources_sha256": sources_hash(), "data": fingerprint(options.data)}
        results = Results(options.results, origin)
    except (ValueError, FileNotFoundError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    try:
        everything(results, options.data, options, lambda text: print(text, flush=True))
    except RuntimeError as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    finally:
        results.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
