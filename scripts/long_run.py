#!/usr/bin/env python3
"""A long run on two ranks: `dex pretrain` on the shard set of `dex prepare packages`, watched from outside.

usage: python scripts/long_run.py DATA OUT [--steps N] [--ranks N]
       python scripts/long_run.py --page [--check]

DATA: the shard set. OUT: a new run folder, in which report.html is made too. Writes benchmarks/results/long-run/
two-ranks.json, docs/images/long-run.png and docs/long-run.md. --page: that last one alone, from the results; --check:
change nothing, exit 1 when it would.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from generated import atomic, commit_of, settle  # noqa: E402

RESULTS = ROOT / "benchmarks/results/long-run/two-ranks.json"
PAGE = ROOT / "docs/long-run.md"
PICTURES = ROOT / "docs/images"
EVERY = 5
"""Seconds between two looks at the memory of the ranks."""

TEXT = """\
# A long run

{steps:,} steps of {batch} images on {ranks} ranks that talk through gloo, {strategy}, on the {images:,} images that
`dex prepare packages` makes of public packages: a small model ({width} wide, {depth} layers of {experts} experts, of
which an image takes {top_k}), made to find leaks and drift, not to learn much. Made by `make long-run`, from
[its results](../benchmarks/results/long-run/two-ranks.json); not edited.

{machine}

| | |
| --- | --- |
{rows}

![Losses of the run](images/long-run.png)

| step | held-out loss | modality by kNN | images/s since the last row | MB in memory, by rank |
| --- | --- | --- | --- | --- |
{points}

The modality is told by the most similar of {known} training images, by the cosine of CLS tokens. The share told rightly
falls while the loss does, and the tokens of all images come to point nearly the same way.
That was not followed up here.

Memory is the resident set of each rank, looked at every {every} seconds; a row gives the median since the row before.
Images/s leave out evaluation and checkpoints, and are of a machine that had other work too.
"""


def resident(root: int) -> dict[int, int]:
    """Rank -> bytes in memory, of the ranks that process `root` (torchrun) started."""
    found = {}
    for child in Path(f"/proc/{root}/task/{root}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((int(v[5:]) for v in environment if v.startswith(b"RANK=")), None)
        if rank is not None:
            pages = int(Path(f"/proc/{child}/statm").read_text().split()[1])
            found[rank] = pages * os.sysconf("SC_PAGE_SIZE")
    return found


def watch(process: subprocess.Popen, metrics: Path) -> list[dict]:
    """Step (of the newest row) and memory of every rank, until `process` ends."""
    seen = []
    while process.poll() is None:
        time.sleep(EVERY)
        try:
            memory = resident(process.pid)
            step = json.loads(metrics.read_text().splitlines()[-1])["step"]
        except (OSError, ValueError, IndexError):
            continue
        if memory:
            seen.append({"step": step, "memory_mb": [round(memory[r] / 1e6, 1) for r in sorted(memory)]})
    return seen


def results(out: Path, seen: list[dict], seconds: float) -> dict:
    from dex.train.runlog import read_rows

    rows, events = read_rows(out / "metrics.jsonl"), read_rows(out / "events.jsonl")
    start = json.loads((out / "run.json").read_text())["starts"][0]
    config = (out / "config.yaml").read_text()
    found = {"start": start, "config": config, "seconds": seconds, "rows": rows, "events": events, "memory": seen}
    return found | {"cls_cosine": cls_cosine(out)}


def cls_cosine(out: Path) -> list[float]:
    """Mean cosine between the CLS tokens of two held-out images, before the first step and after the last."""
    import torch

    from dex.config import Config, read_yaml
    from dex.data import center, open_dataset
    from dex.train import checkpoint
    from dex.train.plan import resolve
    from dex.train.trainer import Trainer

    config = read_yaml(out / "config.yaml", Config())
    data = open_dataset(config.data.path)
    trainer, held_out = Trainer(resolve(config, data)), data.split("val")
    images = torch.stack([held_out[i].image for i in range(len(held_out))])
    trainer.model.eval()
    found = []
    for saved in (None, checkpoint.newest_good(out / "checkpoints")[0]):
        if saved:
            trainer.restore(saved)
        with torch.no_grad():
            parts = [
                trainer.model(center(part, config.model.img_size), mask_ratio=0.0).cls for part in images.split(32)
            ]
        tokens = torch.nn.functional.normalize(torch.cat(parts).double(), dim=-1)
        count = len(tokens)
        found.append(float((tokens @ tokens.T).sum() - count) / (count * (count - 1)))
    trainer.close()
    return found


def unused_at_the_end(found: dict) -> list[list[int]]:
    """(layer, expert) that got nothing of any modality at the last evaluation, by its own counts."""
    mass = [row["val_expert_mass"] for row in found["rows"] if "val_expert_mass" in row][-1]
    layers = range(len(next(iter(mass.values()))))
    totals = [[sum(values) for values in zip(*(m[layer] for m in mass.values()), strict=True)] for layer in layers]
    return [[layer, e] for layer, total in enumerate(totals) for e, value in enumerate(total) if value == 0]


def growth(found: dict) -> list[float]:
    """Per rank: median memory of the last quarter of the run over that of the second quarter."""
    last = found["rows"][-1]["step"]

    def median(rank: int, low: float, high: float) -> float:
        return statistics.median(
            look["memory_mb"][rank] for look in found["memory"] if low * last <= look["step"] <= high * last
        )

    return [median(r, 0.75, 1) / median(r, 0.25, 0.5) for r in range(len(found["memory"][-1]["memory_mb"]))]


def page(found: dict) -> str:
    import yaml

    start, config, rows = found["start"], yaml.safe_load(found["config"]), found["rows"]
    model, steps = config["model"], rows[-1]["step"]
    trained = [row for row in rows if row.get("loss") is not None]
    evaluated = [row for row in rows if "val_loss" in row]
    agree = [row["ranks_agree"] for row in rows if "ranks_agree" in row]
    named = {
        (e["layer"], i) for e in found["events"] if e["event"] == "unused experts" for i in e["dead"] + e["nearly_dead"]
    }
    unused = unused_at_the_end(found)
    unnoticed = [pair for pair in unused if tuple(pair) not in named]
    tenth = len(trained) // 10
    spikes = sum(e["event"] == "loss spike" for e in found["events"])
    facts = {
        "ranks hold the same bits (weights, directors, usage)": f"{sum(agree)} of {len(agree)} times asked",
        "memory, last quarter of the run over its second": ", ".join(f"{g:.3f}" for g in growth(found)) + " (by rank)",
        "loss, mean of the first and of the last tenth of the rows": " to ".join(
            f"{statistics.mean(row['loss'] for row in part):.4f}" for part in (trained[:tenth], trained[-tenth:])
        ),
        "held-out loss, first and last": f"{evaluated[0]['val_loss']:.4f} to {evaluated[-1]['val_loss']:.4f}",
        "mean cosine between the CLS tokens of two held-out images, first and last": " to ".join(
            f"{value:.3f}" for value in found["cls_cosine"]
        ),
        "steps that were not finite": str(sum(row["skipped"] for row in trained)),
        "loss spikes": str(spikes),
        "experts that no held-out image chose at the end": f"{len(unused)}; without a warning: {len(unnoticed)}",
        "warnings of unused experts": str(sum(e["event"] == "unused experts" for e in found["events"])),
        "images/s, median of the rows": f"{statistics.median(row['images_per_s'] for row in trained):.1f}",
        "hours": f"{found['seconds'] / 3600:.2f}",
    }
    points, before = [], -1
    for row in evaluated:
        speed = [t["images_per_s"] for t in trained if before < t["step"] <= row["step"]]
        looks = [look["memory_mb"] for look in found["memory"] if before < look["step"] <= row["step"]]
        memory = ", ".join(f"{statistics.median(rank):.0f}" for rank in zip(*looks, strict=True))
        probe = "" if row["probe_knn"] is None else f"{row['probe_knn']:.1%}"
        pace = f"{statistics.median(speed):.1f}" if speed else ""
        points.append(f"| {row['step']:,} | {row['val_loss']:.4f} | {probe} | {pace} | {memory} |")
        before = row["step"]
    machine = (
        f"Measured on {start['started'][:10]}: {start['cpu']}, {start['cpus']} CPUs, torch {start['torch']}, "
        f"{commit_of(start)}."
    )
    return TEXT.format(
        steps=steps,
        batch=config["data"]["batch_size"],
        ranks=start["ranks"],
        strategy=config["parallel"]["strategy"],
        images=sum(start["data"]["images"].values()),
        width=model["embed_dim"],
        depth=model["depth"],
        experts=model["num_experts"],
        top_k=model["top_k"],
        machine=machine,
        known=4 * config["run"]["evaluate_images"],
        rows="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        points="\n".join(points),
        every=EVERY,
    )


def run(data: Path, out: Path, steps: int, ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [*"-m dex pretrain --preset demo".split(), "--data", str(data), "--out", str(out), "--steps", str(steps)]
    began = time.monotonic()
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            seen = watch(process, out / "metrics.jsonl")
        finally:
            process.terminate()
    if process.returncode:
        raise SystemExit(f"dex pretrain ended with {process.returncode}")
    found = results(out, seen, time.monotonic() - began)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(RESULTS, json.dumps(found) + "\n")
    report = [sys.executable, "-m", "dex", "report", str(out)]
    subprocess.run(report, check=True)
    shutil.copy(out / "pictures/losses.png", PICTURES / "long-run.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--page", action="store_true", help="the page alone, from the results")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is not that")
    arguments = parser.parse_args()
    if not arguments.page:
        if arguments.out is None:
            parser.error("DATA OUT: expected both, or --page")
        run(arguments.data, arguments.out, arguments.steps, arguments.ranks)
    text = page(json.loads(RESULTS.read_text()))
    source = str(RESULTS.relative_to(ROOT))
    return settle(PAGE, text, check=arguments.check, source=source, command="scripts/long_run.py --page")


if __name__ == "__main__":
    sys.exit(main())
