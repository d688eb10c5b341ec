#!/usr/bin/env python3
"""A rehearsal of the published pretraining's data: 44 sources, 4.97 million images as an index, 200 epochs.

usage: python scripts/rehearsal.py FOLDER    write the set to FOLDER (1.5 GB), measure, write the page; a second start
                                             goes on where the first stopped
       python scripts/rehearsal.py --page [--check]

Measures the product's own index reader, order, loader, resume and start of a run on this machine's CPU, each part in a
process of its own, and adds what `dex.sizing` predicts for GPUs. Writes benchmarks/results/rehearsal/cpu.json and
docs/rehearsal.md. --page: only the page, from the results; --check: change nothing, exit 1 if the page is outdated.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("scripts", "python")]

import rehearsal_page  # noqa: E402
import rehearsal_set  # noqa: E402
from generated import atomic, settle  # noqa: E402
from rehearsal_run import EPOCHS, PRESETS, RANKS, predicted, training  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks/results/rehearsal/cpu.json", ROOT / "docs/rehearsal.md"
SEED = 0
WORKERS = (0, 2, 8)
RANDOM_STEPS = 8
"""Steps of each preset's run, besides its first and last and an epoch's last, at which the data are resumed."""
PUBLISHED_BATCH = 896
"""Images of a step in the preset published-code."""
BATCHES = 3
"""Batches read at each of them."""


class Stopwatch:
    """Seconds of wall clock and of this process's CPU since it was made."""

    def __init__(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "seconds": round(time.perf_counter() - self._wall, 3),
            "cpu_seconds": round(time.process_time() - self._cpu, 3),
        }


def memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes of a process: resident, its share of shared pages, pages only it has, and the largest resident so far."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    status = Path(f"/proc/{pid}/status").read_text()

    def of(text: str, *names: str) -> int:
        return 1024 * sum(int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[1]) for name in names)

    return {
        "resident": of(rollup, "Rss"),
        "proportional": of(rollup, "Pss"),
        "own": of(rollup, "Private_Clean", "Private_Dirty"),
        "peak": of(status, "VmHWM"),
    }


def unread(dataset):
    """The same samples without their images: reading one gives its number in place of its modality."""
    from dex.data.dataset import View

    class Unread(View):
        def read(self, index, out):
            return index, ""

    view = Unread(dataset, range(len(dataset)), "unread")
    view.image_size = 1
    return view


def opening(root: Path) -> dict:
    """Time and memory of opening the set."""
    from dex.data import open_dataset

    before, watch = memory(), Stopwatch()
    dataset = open_dataset(root)
    opened = watch.read()
    after, watch = memory(), Stopwatch()
    train = dataset.split("train")
    return {
        **opened,
        "images": len(train),
        "before": before,
        "after": after,
        "split": watch.read(),
        "with_split": memory(),
    }


def ordering(root: Path) -> dict:
    """Time and memory of an epoch's order, and which images and modalities it holds."""
    import tracemalloc

    import numpy as np

    from dex.data import open_dataset
    from dex.data.order import epoch_order

    train = open_dataset(root).split("train")
    modality = train.modality_index()
    rows = []
    for temperature in (1.0, 0.5):
        for epoch in (0, EPOCHS // 2, EPOCHS - 1):
            watch = Stopwatch()
            order = epoch_order(SEED, epoch, modality, temperature)
            row = {"temperature": temperature, "epoch": epoch, **watch.read()}
            times = np.bincount(order, minlength=len(train))
            row |= {
                "fewest": int(times.min()),
                "most": int(times.max()),
                "modalities": np.bincount(modality[order], minlength=len(train.modalities)).tolist(),
            }
            rows.append(row)
    tracemalloc.start()
    order = epoch_order(SEED, 0, modality, 1.0)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "rows": rows,
        "kept": kept,
        "peak": peak,
        "names": list(train.modalities),
        "counts": list(train.modality_counts().values()),
        "sources": source_counts(train, order),
    }


def source_counts(train, order) -> dict[str, int]:
    """Images of each source in an epoch, from the ids that the index gives."""
    counts: dict[str, int] = {}
    for index in order.tolist():
        name = train.sample_id(index).partition("/")[0]
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def remembered(epoch_order, most: int = 2):
    """`epoch_order` that keeps its last results. One process plays all ranks, each of which would compute its own."""
    orders: dict[tuple, object] = {}

    def order(seed, epoch, modality, temperature):
        key = (seed, epoch, temperature)
        if key not in orders:
            while len(orders) >= most:
                orders.pop(next(iter(orders)))
            orders[key] = epoch_order(seed, epoch, modality, temperature)
        return orders[key]

    return order


def resuming(root: Path) -> dict:
    """Compare the images of a loader that runs on with those of loaders that start there, on each number of ranks."""
    import random
    from unittest import mock

    from dex.config import preset
    from dex.data import loader, open_dataset

    data = unread(open_dataset(root).split("train"))
    drawn, presets = random.Random(SEED), {}
    with mock.patch.object(loader, "epoch_order", remembered(loader.epoch_order)):
        for name in PRESETS:
            batch = preset(name).data.batch_size
            epoch = len(data) // batch
            total = EPOCHS * epoch
            steps = {0, epoch - 1, epoch, total - BATCHES, *(drawn.randrange(total) for _ in range(RANDOM_STEPS))}
            compared = [compare(data, batch, step) for step in sorted(steps)]
            presets[name] = {
                "batch": batch,
                "steps_per_epoch": epoch,
                "steps": total,
                "resumed_at": sorted(steps),
                "images": sum(len(of_step["images"]) for of_step in compared),
                "differing": sum(of_step["differing"] for of_step in compared),
            }
        watch = Stopwatch()
        once = coverage(data, presets["paper"]["batch"], RANKS[1])
    return {"presets": presets, "ranks": list(RANKS), "epoch": once | watch.read()}


def compare(data, batch: int, step: int) -> dict:
    """Images of `BATCHES` batches from ``step`` on, by one rank that began before, and how many differ on others."""
    from dex.data import loader

    before = min(step, 2)
    running = loader.Loader(data, batch, seed=SEED, start_batch=step - before)
    for _ in range(before):
        next(running)
    images = [index for _ in range(BATCHES) for index in next(running).modality.tolist()]
    differing = 0
    for count in RANKS:
        loaders = [
            loader.Loader(data, batch, seed=SEED, start_batch=step, rank=rank, world_size=count)
            for rank in range(count)
        ]
        resumed = [index for _ in range(BATCHES) for one in loaders for index in next(one).modality.tolist()]
        differing += sum(a != b for a, b in zip(images, resumed, strict=True))
    return {"images": images, "differing": differing}


def coverage(data, batch: int, count: int) -> dict:
    """How often ``count`` ranks together read each image in an epoch that starts in the middle of a run."""
    import numpy as np

    from dex.data.loader import Loader, batches_per_epoch

    per_epoch = batches_per_epoch(data, batch)
    epoch = EPOCHS // 2
    times = np.zeros(len(data), np.int64)
    for rank in range(count):
        one = Loader(data, batch, seed=SEED, start_batch=epoch * per_epoch, rank=rank, world_size=count)
        for _ in range(per_epoch):
            times[next(one).modality.numpy()] += 1
    return {
        "epoch": epoch,
        "ranks": count,
        "once": int((times == 1).sum()),
        "never": int((times == 0).sum()),
        "left": len(data) - per_epoch * batch,
    }


def loading(root: Path) -> dict:
    """The first batch with reading processes and their memory, and what a batch costs besides its images.

    The batch is what one of 8 ranks reads of a whole one.
    """
    from dex.data import open_dataset
    from dex.data.loader import Loader

    # As in `dex pretrain` on Linux; this process itself was spawned, and would spawn others without this line
    multiprocessing.set_start_method("fork", force=True)
    train, rows = open_dataset(root).split("train"), []
    part = {"seed": SEED, "world_size": 8}
    batch = PUBLISHED_BATCH
    for workers in WORKERS:
        alone = set(multiprocessing.active_children())
        with Loader(train, batch, num_workers=workers, **part) as loader:
            watch = Stopwatch()
            next(loader)
            row = {"workers": workers, "first": watch.read()}
            children = [child.pid for child in multiprocessing.active_children() if child not in alone]
            row |= {"memory": memory(), "of_workers": [memory(pid) for pid in children]}
        rows.append(row)
    with Loader(train, batch, **part) as loader:
        next(loader)
        watch = Stopwatch()
        for _ in range(BATCHES):
            next(loader)
        read = watch.read()["cpu_seconds"] / (BATCHES * batch // 8)
    with Loader(unread(train), batch, **part) as loader:
        next(loader)
        watch = Stopwatch()
        for _ in range(100):
            next(loader)
        besides = watch.read()["cpu_seconds"] / (100 * batch // 8)
    return {"batch": batch // 8, "rows": rows, "image": read, "besides": besides}


PARTS = {
    "predicted": predicted,
    "opening": opening,
    "ordering": ordering,
    "loading": loading,
    "resuming": resuming,
    "training": training,
}


def measure(folder: Path, share: float = 1.0) -> Iterator[dict]:
    """The results, after each part. Parts that an earlier start has finished are kept in ``folder``."""
    import torch

    from dex.train.runlog import describe_machine

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    root, parts = folder / "set", folder / "parts.json"
    results = json.loads(parts.read_text(encoding="utf-8")) if parts.is_file() else {}
    if "set" not in results:
        shutil.rmtree(root, ignore_errors=True)
        watch = Stopwatch()
        results = {
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(torch.device("cpu")),
            "loads": [],
            "set": rehearsal_set.write(root, rehearsal_set.corpus(), share) | watch.read(),
        }
    for name, part in PARTS.items():
        if name not in results:
            watch = time.perf_counter()
            results[name] = in_own_process(part, root)
            results["loads"].append(round(os.getloadavg()[0], 1))
            print(f"{name}: {time.perf_counter() - watch:.0f} s", file=sys.stderr, flush=True)
            atomic.write(parts, json.dumps(results))
        yield results


def in_own_process(part, root: Path) -> dict:
    """``part(root)`` in a new process, so that its memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(part, root).result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.page == (options.folder is not None) or (options.check and not options.page):
        parser.error("expected either FOLDER, or --page with or without --check")
    if options.folder is not None:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        for results in measure(options.folder.absolute()):
            atomic.write(RESULTS, json.dumps(results, indent=1) + "\n")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    command = "scripts/rehearsal.py --page"
    return settle(PAGE, rehearsal_page.page(results), check=options.check, source=RESULTS.name, command=command)


if __name__ == "__main__":
    sys.exit(main())
