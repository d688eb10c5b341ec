#!/usr/bin/env python3
"""Real labelled images from public packages: DEX, a monolithic control and a random start, three seeds each.

usage: python scripts/real_tasks.py OUT [--task NAME ...] [--processes N]
       python scripts/real_tasks.py OUT --data
       python scripts/real_tasks.py --page [--check]

OUT: a folder; after any stop, a second start resumes. Writes benchmarks/results/tasks/results.json and sheet.csv after
every complete task, and docs/real-tasks.md. --data: only the labelled images, in OUT/data. --page: only the page, from
the results. --check: change nothing; exit 1 if the page is outdated.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from generated import ROOT, atomic

RESULTS = ROOT / "benchmarks/results/tasks"
CACHE = Path("~/.cache/dex").expanduser()

# The plan, committed before the first run; docs/real-tasks.md prints it.
PRETRAINING = {"dex": "demo", "monolithic": "demo-monolithic"}
ARMS = ("dex", "monolithic", "random")
"""The last one is the architecture of the first, initialised randomly."""
PAIRS = (("dex", "monolithic"), ("dex", "random"), ("monolithic", "random"))
"""The first pair is the main comparison; the others show whether pretraining on these few images helps at all."""
SEEDS = (0, 1, 2)
"""Seeds of fine-tuning. Each arm was pretrained once."""
SETTINGS = {
    "img_size": 96,
    "feature_size": 8,
    "batch_size": 8,
    "warmup_epochs": 1.0,
    "lr": 1e-3,
    "precision": "fp32",
    "device": "cpu",
    "checkpoint_every": 100,
    "keep_checkpoints": 1,
}
"""Settings of all arms and tasks; all others are the defaults of `dex finetune`."""
EPOCHS = {"ct-organs": 18, "nuclei": 6, "mr-slab": 12, "plane": 6, "modality": 6, "ct-aorta": 9}
"""For all arms. In a trial, ct-organs was still learning after six epochs, by the loss of its validation slices."""
ORDER = ("ct-organs", "nuclei", "mr-slab", "plane", "modality", "ct-aorta")


class Job(NamedTuple):
    """One fine-tuning, or with ``seed`` None the leak check of a fold."""

    fold: str
    arm: str
    seed: int | None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--task", nargs="+", choices=ORDER, default=ORDER)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--data", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.page or options.check:
        from real_tasks_page import page

        return page(check=options.check)
    if options.out is None:
        parser.error("OUT: expected a folder")
    if options.data:
        import real_tasks_data

        real_tasks_data.build(options.out / "data", CACHE)
        return 0
    run(options.out, options.task, options.processes)
    from real_tasks_page import page

    return page(check=False)


def run(out: Path, tasks: Sequence[str], processes: int) -> None:
    """Data, pretraining, fine-tuning; results after each task."""
    os.environ["OMP_NUM_THREADS"] = "1"  # one for each process, before torch is imported in it
    import real_tasks_data

    from dex.prepare import workers

    began = time.monotonic()
    folds = real_tasks_data.build(out / "data", CACHE)
    real_tasks_data.without_sources(out / "pretraining")
    pretrain(out, processes)
    say(f"data and pretraining are ready after {time.monotonic() - began:.0f} s")
    with ProcessPoolExecutor(processes, get_context("spawn"), workers.die_with, (os.getpid(),)) as pool:
        for task in [name for name in ORDER if name in tasks]:
            names = [fold.name for fold in folds if fold.task == task]
            jobs = [Job(fold, "", None) for fold in names]
            jobs += [Job(fold, arm, seed) for seed in SEEDS for fold in names for arm in ARMS]
            futures = [pool.submit(carry_out, out, job) for job in jobs]
            for future in as_completed(futures):
                future.result()
            say(f"{task} is complete after {time.monotonic() - began:.0f} s")
            summarise(out, [fold for fold in folds if fold.task in complete(out, folds)], time.monotonic() - began)


def pretrain(out: Path, processes: int) -> None:
    """Pretrain both arms, at the same time if ``processes`` allows."""
    running: list[tuple[str, subprocess.Popen]] = []
    for name, preset in PRETRAINING.items():
        words = [sys.executable, "-m", "dex", "pretrain", "--preset", preset, "--data", str(out / "pretraining")]
        words += ["--out", str(out / name), "--resume", "auto"]
        if is_pretrained(out / name):
            continue
        with open(out / f"{name}.log", "ab") as log:
            running.append((name, subprocess.Popen(words, stdout=log, stderr=log)))
        if len(running) == processes:
            wait(running, out)
    wait(running, out)


def wait(running: list[tuple[str, subprocess.Popen]], out: Path) -> None:
    for name, process in running:
        if process.wait():
            raise SystemExit(f"pretraining of {name} ended with exit code {process.returncode}; see {out / name}.log")
    running.clear()


def is_pretrained(run: Path) -> bool:
    from dex.config import Config, read_yaml

    if not (run / "config.yaml").is_file():
        return False
    steps = read_yaml(run / "config.yaml", Config()).schedule.steps
    return (run / f"checkpoints/step-{steps:08d}").is_dir()


def carry_out(out: Path, job: Job) -> None:
    """Run one job in a process of the pool; its output goes to a log."""
    import torch

    torch.set_num_threads(1)
    with open(out / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        with contextlib.redirect_stderr(log):
            leak_check(out, job.fold) if job.seed is None else fine_tune(out, job)


def leak_check(out: Path, fold: str) -> None:
    """Compare the test images with the set that both arms were pretrained on."""
    from dex.tasks import leakage

    path = out / f"leaks/{fold}.json"
    if path.is_file():
        return
    path.parent.mkdir(exist_ok=True)
    leak = leakage.check(opened(out, fold), out / "pretraining", sides=("test",))
    atomic.write(path, json.dumps({**leak._asdict(), "sentence": leak.sentence}, indent=1) + "\n")


def opened(out: Path, fold: str):
    from dex.tasks.cases import open_task

    return open_task(out / f"data/{fold}.yaml", out / f"data/{fold}")


def fine_tune(out: Path, job: Job) -> None:
    from dex.tasks import compare

    folder = out / "tasks" / job.fold / f"{job.arm}-seed-{job.seed}"
    cost = folder / "cost.json"
    if cost.is_file():
        return
    before = time.process_time()
    side, task = side_of(out, job.arm), prepared(out, job.fold)
    with_epochs = dataclasses.replace(settings(), epochs=EPOCHS[task_of(out, job.fold)])
    job_settings, leak = compare.settings_of(side, with_epochs, job.seed), leak_of(out, job.fold)
    compare.outcome(side, task, job_settings, out / "tasks", leak=leak, discard=True)
    used = {"processor_seconds": time.process_time() - before, "max_rss_kb": resource.getrusage(0).ru_maxrss}
    atomic.write(cost, json.dumps(used) + "\n")


def task_of(out: Path, fold: str) -> str:
    entries = json.loads((out / "data/folds.json").read_text(encoding="utf-8"))
    return next(entry["task"] for entry in entries if entry["name"] == fold)


@functools.cache
def prepared(out: Path, fold: str):
    """The task, read and checked once per process."""
    from dex.tasks import compare

    return compare.prepared(opened(out, fold))


def leak_of(out: Path, fold: str) -> str:
    path = out / f"leaks/{fold}.json"
    while not path.is_file():  # Another process writes it.
        time.sleep(1)
    return json.loads(path.read_text(encoding="utf-8"))["sentence"]


@functools.cache
def side_of(out: Path, arm: str):
    from dex.tasks import compare

    is_random = arm not in PRETRAINING
    return compare.side(arm, out / (ARMS[0] if is_random else arm), "random" if is_random else "pretrained")


def settings():
    from dex.tasks.recipe import Settings

    return dataclasses.replace(Settings(), **SETTINGS)


def complete(out: Path, folds) -> set[str]:
    """The tasks whose runs are all done."""
    return {
        task
        for task in {fold.task for fold in folds}
        if all(
            (out / "tasks" / fold.name / f"{arm}-seed-{seed}" / "cost.json").is_file()
            for fold in folds
            if fold.task == task
            for arm in ARMS
            for seed in SEEDS
        )
    }


def evaluations(out: Path, folds: Sequence[str], arm: str) -> list:
    """One evaluation per seed, of the test cases of all folds together."""
    from dex.tasks.evaluate import FILE
    from dex.tasks.metrics import evaluation_file

    merged = []
    for seed in SEEDS:
        parts = [evaluation_file.read(out / "tasks" / fold / f"{arm}-seed-{seed}" / FILE) for fold in folds]
        cases = sorted((case for part in parts for case in part.cases), key=lambda case: (case.patient, case.id))
        confusion = tuple(
            tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*(p.confusion for p in parts), strict=True)
        )
        about = {"seed": seed, "run": arm}
        merged.append(parts[0]._replace(task="all folds", cases=tuple(cases), confusion=confusion, about=about))
    return merged


def summarise(out: Path, folds, wall: float) -> None:
    """Write results.json and sheet.csv of the complete tasks."""
    import real_tasks_data
    import torch

    from dex.tasks import compare, compute
    from dex.train.runlog import describe_machine

    sides = {arm: side_of(out, arm) for arm in ARMS}
    tasks = []
    for name in [task for task in ORDER if any(fold.task == task for fold in folds)]:
        tasks.append(summary(out, name, [fold for fold in folds if fold.task == name], compare))
    costs = [json.loads(path.read_text())["processor_seconds"] for path in out.glob("tasks/*/*/cost.json")]
    results = {
        "machine": describe_machine(torch.device("cpu")),
        "settings": SETTINGS,
        "epochs": EPOCHS,
        "seeds": SEEDS,
        "arms": ARMS,
        "pretraining": {
            "presets": PRETRAINING,
            "left_out": real_tasks_data.LEFT_OUT,
            "compute": {arm: side.compute._asdict() for arm, side in sides.items()},
            "sentences": compute.sentences(sides["dex"].compute, sides["monolithic"].compute),
        },
        "runs": len(costs),
        "processor_seconds": sum(costs),
        "wall_seconds_of_the_last_start": wall,
        "tasks": tasks,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    atomic.write(RESULTS / "results.json", json.dumps(results, indent=1) + "\n")
    shutil.copyfile(out / "tasks" / compare.SHEET, RESULTS / compare.SHEET)


def summary(out: Path, name: str, folds, compare) -> dict:
    by_arm = {arm: evaluations(out, [fold.name for fold in folds], arm) for arm in ARMS}
    first = by_arm["dex"][0]
    task = opened(out, folds[0].name).task
    pairs = []
    for a, b in PAIRS:
        comparison = compare.compared(name, by_arm[a], by_arm[b])
        difference = comparison.difference
        pairs.append(
            {
                "first": a,
                "second": b,
                "estimate": difference.estimate._asdict(),
                "by_seed": [seed.value for seed in difference.by_seed],
                "verdict": difference.verdict,
                "no_verdict": comparison.reasons,
                "sentence": difference.sentence(a, b),
            }
        )
    values = {
        arm: {
            "by_seed": [run.estimate(first.metric).value for run in by_arm[arm]],
            "by_class": [
                [estimate.value for estimate in run.by_class("dice" if run.kind == "segmentation" else first.metric)]
                for run in by_arm[arm]
            ],
        }
        for arm in ARMS
    }
    leaks = {f.name: json.loads((out / f"leaks/{f.name}.json").read_text(encoding="utf-8"))["sentence"] for f in folds}
    return {
        "task": name,
        "kind": first.kind,
        "metric": first.metric,
        "classes": first.classes,
        "patients": len(first.patients),
        "cases": len(first.cases),
        "folds": [fold._asdict() for fold in folds],
        "note": task.note,
        "licence": task.licence,
        "values": values,
        "pairs": pairs,
        "leaks": leaks,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
