#!/usr/bin/env python3
"""Real labelled images from public packages: DEX, a monolithic control and a random start, three seeds each.

usage: python scripts/real_tasks.py OUT [--task NAME ...] [--processes N]
       python scripts/real_tasks.py OUT --data
       python scripts/real_tasks.py --page [--check]

OUT: a folder; a second start goes on where the first one stopped, whatever stopped it. Writes benchmarks/results/tasks/
results.json and sheet.csv after every task that is complete, and docs/real-tasks.md. --data: the labelled images alone,
in OUT/data. --page: the page alone, from the results; --check: change nothing, exit 1 when it would.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from generated import atomic  # noqa: E402

RESULTS = ROOT / "benchmarks/results/tasks"
CACHE = Path("~/.cache/dex").expanduser()

# The plan. It was committed before any of these runs was made; docs/real-tasks.md prints it.
PRETRAINING = {"dex": "demo", "monolithic": "demo-monolithic"}
ARMS = ("dex", "monolithic", "random")
"""The last one is the architecture of the first, drawn anew."""
PAIRS = (("dex", "monolithic"), ("dex", "random"), ("monolithic", "random"))
"""The first pair is the outcome; the others say whether pretraining on so few images helps at all."""
SEEDS = (0, 1, 2)
"""Of fine-tuning. Each arm was pretrained once."""
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
"""Of all arms and tasks; everything else as `dex finetune` has it."""
EPOCHS = {"ct-organs": 18, "nuclei": 6, "mr-slab": 12, "plane": 6, "modality": 6, "ct-aorta": 9}
"""Of all arms. A trial of six epochs of ct-organs, looked at by its validation slices, was still learning."""
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

    began = time.monotonic()
    folds = real_tasks_data.build(out / "data", CACHE)
    real_tasks_data.without_sources(out / "pretraining")
    pretrain(out, processes)
    say(f"data and pretraining are there after {time.monotonic() - began:.0f} s")
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for task in [name for name in ORDER if name in tasks]:
            of_task = [fold.name for fold in folds if fold.task == task]
            jobs = [Job(fold, "", None) for fold in of_task]
            jobs += [Job(fold, arm, seed) for seed in SEEDS for fold in of_task for arm in ARMS]
            futures = [pool.submit(carry_out, out, job) for job in jobs]
            for future in as_completed(futures):
                future.result()
            say(f"{task} is complete after {time.monotonic() - began:.0f} s")
            summarise(out, [fold for fold in folds if fold.task in complete(out, folds)], time.monotonic() - began)


def pretrain(out: Path, processes: int) -> None:
    """Both arms at once, or one after the other."""
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
    """In a process of the pool; what it prints goes to a log."""
    import torch

    torch.set_num_threads(1)
    with open(out / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        with contextlib.redirect_stderr(log):
            leak_check(out, job.fold) if job.seed is None else fine_tune(out, job)


def leak_check(out: Path, fold: str) -> None:
    """Against the set that both arms were pretrained on; the test images alone are asked about."""
    from dex.tasks import leakage

    path = out / f"leaks/{fold}.json"
    if path.is_file():
        return
    path.parent.mkdir(exist_ok=True)
    found = leakage.check(opened(out, fold), out / "pretraining", sides=("test",))
    atomic.write(path, json.dumps({**found._asdict(), "sentence": found.sentence}, indent=1) + "\n")


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
    of_task = dataclasses.replace(settings(), epochs=EPOCHS[task_of(out, job.fold)])
    made, leak = compare.settings_of(side, of_task, job.seed), leak_of(out, job.fold)
    compare.outcome(side, task, made, out / "tasks", leak=leak, discard=True)
    used = {"processor_seconds": time.process_time() - before, "max_rss_kb": resource.getrusage(0).ru_maxrss}
    atomic.write(cost, json.dumps(used) + "\n")


def task_of(out: Path, fold: str) -> str:
    listed = json.loads((out / "data/folds.json").read_text(encoding="utf-8"))
    return next(entry["task"] for entry in listed if entry["name"] == fold)


@functools.cache
def prepared(out: Path, fold: str):
    """Read and checked once in each process."""
    from dex.tasks import compare

    return compare.prepared(opened(out, fold))


def leak_of(out: Path, fold: str) -> str:
    path = out / f"leaks/{fold}.json"
    while not path.is_file():  # the other process makes it
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
    """The tasks all of whose runs are there."""
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
    """One per seed: the test cases of all folds together."""
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
    """results.json and sheet.csv, of the tasks that are complete."""
    import real_tasks_data
    import torch

    from dex.tasks import compare, compute
    from dex.train.runlog import describe_machine

    sides = {arm: side_of(out, arm) for arm in ARMS}
    tasks = []
    for name in [task for task in ORDER if any(fold.task == task for fold in folds)]:
        of_task = [fold for fold in folds if fold.task == name]
        tasks.append(summary(out, name, of_task, compare))
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
        one = compare.compared(name, by_arm[a], by_arm[b])
        pairs.append(
            {
                "first": a,
                "second": b,
                "estimate": one.difference.estimate._asdict(),
                "by_seed": [seed.value for seed in one.difference.by_seed],
                "verdict": one.difference.verdict,
                "no_verdict": one.reasons,
                "sentence": one.difference.sentence(a, b),
            }
        )
    values = {
        arm: {
            "by_seed": [one.estimate(first.metric).value for one in by_arm[arm]],
            "by_class": [
                [estimate.value for estimate in one.by_class("dice" if one.kind == "segmentation" else first.metric)]
                for one in by_arm[arm]
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
