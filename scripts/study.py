#!/usr/bin/env python3
"""The study of docs/study-plan.md: many small runs, a row each, and the page and figures that are made of the rows.

usage: python scripts/study.py [DATA] [--search] [--workers N] [--shuffle SEED] [--only TEXT]
       python scripts/study.py --page [--check]

DATA: a shard set of 64 pixels, as `dex prepare packages --size 64` makes it; data/study without it; "embedded" for the
images of the package. Rows go to benchmarks/results/study/runs.jsonl as runs end. Stopped or killed, the same command
goes on with what is missing; a row whose sources or data are no longer those of here is made anew. --search: the search
and its confirmation. --page: the page alone, from the rows; --check: change nothing, exit 1 when it would.
"""

import argparse
import dataclasses
import fcntl
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
from generated import atomic  # noqa: E402
from study_arms import Spec  # noqa: E402

RESULTS = ROOT / "benchmarks/results/study/runs.jsonl"
DATA = ROOT / "data/study"
DEPENDS = ("python/dex/analysis", "python/dex/data", "python/dex/model", "python/dex/train", "dexkernels")
"""Whose Python sources decide a run's numbers, beside the study's own."""
OWN = ("study_arms.py", "study_run.py")


def sources_hash() -> str:
    """SHA-256 of the sources that a row depends on, by name and content."""
    paths = [ROOT / "scripts" / name for name in OWN] + [ROOT / "python/dex/config.py"]
    for folder in DEPENDS:
        paths += (ROOT / folder).rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(paths):
        if not any(part in ("triton", "cuda") or part.startswith("triton") for part in path.parts):  # of GPUs alone
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def fingerprint(data: str) -> str:
    """Of the data set."""
    from dex.data import open_dataset

    return open_dataset(None if data == "embedded" else data).take_fingerprint()


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The rows by their keys; the last of equals. A last line that a kill cut short is left out."""
    rows: dict[str, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows[row["key"]] = row
    return rows


class Results:
    """The rows of one file, which nobody else writes meanwhile."""

    def __init__(self, path: Path, origin: dict[str, Any]):
        """origin: of what is run now; rows of another one are made anew. ValueError: another process has the file."""
        self.path, self.origin = path, origin
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = (path.parent / f".{path.name}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(f"results: expected that nobody else writes {path}; another study does") from None
        self.rows = read(path)

    def close(self) -> None:
        self._lock.close()

    def is_there(self, spec: Spec) -> bool:
        row = self.rows.get(spec.key)
        return row is not None and all(row.get(name) == value for name, value in self.origin.items())

    def add(self, row: dict[str, Any]) -> None:
        """Whole or not at all, whenever the process is killed."""
        self.rows[row["key"]] = row | self.origin
        lines = [json.dumps(self.rows[key], sort_keys=True) + "\n" for key in sorted(self.rows)]
        atomic.write(self.path, "".join(lines))


def carry_out(specs: Sequence[Spec], results: Results, data: str, workers: int, say: Callable[[str], None]) -> None:
    """Run what is missing of ``specs``, ``workers`` at a time, each a process of one thread. RuntimeError names a run
    that failed; what the others have finished is kept."""
    missing = [spec for spec in specs if not results.is_there(spec)]
    say(f"{len(specs) - len(missing)} of {len(specs)} runs are there; {len(missing)} to go")
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
    """Those that have ended, once there are some. A row is small enough that no pipe fills up."""
    while True:
        ended = [(process, spec) for process, spec in running.items() if process.poll() is not None]
        if ended:
            return iter(ended)
        time.sleep(0.1)


def everything(results: Results, data: str, arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    """The study, or the search, whose choice decides what is confirmed."""
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
    parser.add_argument("--search", action="store_true", help="the search and its confirmation")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each (2)")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="in another order")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name holds this")
    parser.add_argument("--tiny", action="store_true", help="runs of seconds, for tests")
    parser.add_argument("--page", action="store_true", help="the page alone, from the rows")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is not that")
    options = parser.parse_args(arguments)
    if options.page or options.check:
        from study_page import write

        return write(read(options.results), options.check)
    if options.workers < 1:
        parser.error(f"--workers: expected at least 1; got {options.workers}")
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
