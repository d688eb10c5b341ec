"""Loading against bare decoding of the same files, memory over an epoch, and ordering and opening 5 million samples.

Bare decoding: Pillow decodes the same bytes from memory to an array [256, 256, 3], in as many processes as the loader
has workers. Pillow's ``load()`` alone, which leaves the pixels inside Pillow, is faster and is shown too. The loader
also reads the bytes from the shards, checks their sha256, cuts out the square, converts it to uint8 [3, 256, 256] and
passes batches to the training process.
"""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dex.data import Loader, ShardWriter, augment, open_dataset, sample_keys
from dex.data.order import epoch_order

WORKERS = 2
BATCH = 64
READ_AHEAD = 2 * WORKERS


@pytest.fixture(params=["jpg", "png"])
def files(request, tiny):
    """The embedded images, encoded as JPEG (as stored) or PNG."""
    dataset = open_dataset(None)
    encoded = [dataset.image_bytes(index) for index in range(0, len(dataset), 6 if tiny else 1)]
    if request.param == "png":
        for number, data in enumerate(encoded):
            stream = io.BytesIO()
            Image.open(io.BytesIO(data)).save(stream, "PNG")
            encoded[number] = stream.getvalue()
    return request.param, encoded


@pytest.fixture
def shards(files, tiny, tmp_path):
    """A shard set of the files, each a few times, in three shards."""
    kind, encoded = files
    copies = 2 if tiny else 8
    with ShardWriter(
        tmp_path / "set",
        name="benchmark",
        modalities=("CT", "MR"),
        samples_per_shard=1 + copies * len(encoded) // 3,
    ) as writer:
        for number, data in enumerate(encoded * copies):
            modality = "CT" if number % 3 else "MR"
            writer.add(f"{number}", data, kind=kind, modality=modality, split="train", group="", checked=True)
    return open_dataset(tmp_path / "set")


def decode(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def load(data):
    return Image.open(io.BytesIO(data)).load()


class Bare:
    """WORKERS processes, each with its part of the files in memory; ``seconds()`` times ``work`` on all files."""

    def __init__(self, encoded, times, work):
        context = multiprocessing.get_context("fork")
        self.ends, self.processes = [], []
        for worker in range(WORKERS):
            parent, child = context.Pipe()
            arguments = (encoded[worker::WORKERS], times, work, child)
            self.processes.append(context.Process(target=self._work, args=arguments, daemon=True))
            self.ends.append(parent)
            self.processes[-1].start()

    @staticmethod
    def _work(encoded, times, work, pipe):
        while pipe.recv():
            for data in encoded * times:
                work(data)
            pipe.send(True)

    def seconds(self):
        began = time.perf_counter()
        for end in self.ends:
            end.send(True)
        for end in self.ends:
            end.recv()
        return time.perf_counter() - began

    def close(self):
        for end, process in zip(self.ends, self.processes, strict=True):
            end.send(False)
            process.join()


def loading_seconds(loader, batches, use=lambda batch: None):
    """Seconds for ``batches`` batches while the workers are busy throughout; batches read ahead are taken first."""
    for _ in range(READ_AHEAD):
        next(loader)
    began = time.perf_counter()
    for _ in range(batches):
        use(next(loader))
    seconds = time.perf_counter() - began
    time.sleep(0.05 + 2 * READ_AHEAD * seconds / batches)  # Let them read ahead before others are timed.
    return seconds


@pytest.mark.slow
def test_loading_against_bare_decoding(files, shards, tiny, report):
    kind, encoded = files
    times = 1 if tiny else 3
    batches = len(encoded) * times // BATCH
    bare, alone = Bare(encoded, times, decode), Bare(encoded, times, load)
    seconds = {"bare": [], "alone": [], "loader": [], "augmented": []}

    def augmented(batch):
        augment(batch.images, 256, sample_keys(0, batch.places))

    try:
        with Loader(shards, BATCH, seed=0, num_workers=WORKERS) as loader:
            for number in range(2 if tiny else 12):
                turn = {
                    "bare": bare.seconds() / (len(encoded) * times),
                    "alone": alone.seconds() / (len(encoded) * times),
                    "loader": loading_seconds(loader, batches) / (batches * BATCH),
                }
                if number % 4 == 1:
                    few = max(1, batches // 8)
                    turn["augmented"] = loading_seconds(loader, few, augmented) / (few * BATCH)
                for name, value in turn.items():
                    if number:
                        seconds[name].append(value)
    finally:
        bare.close()
        alone.close()
    rate = {name: 1 / statistics.median(values) for name, values in seconds.items()}
    detail = f"{rate['loader']:.0f} images/s, {WORKERS} processes; bare {rate['bare']:.0f}"
    report(f"loading {kind} at 256 px", "bare decoding", rate["loader"] / rate["bare"], 0.8, detail)
    report(f"loading {kind} at 256 px", "400 images/s", rate["loader"] / 400, 1.0, detail)
    detail = f"{rate['loader']:.0f} images/s; load() alone {rate['alone']:.0f}"
    report(f"loading {kind} at 256 px", "Pillow's load()", rate["loader"] / rate["alone"], 0, detail)
    detail = f"{rate['augmented']:.0f} images/s, {torch.get_num_threads()} threads augmenting beside {WORKERS} workers"
    report(f"loading {kind} and augmenting on the CPU", "loading alone", rate["augmented"] / rate["loader"], 0, detail)


def resident(pids):
    """Resident bytes of these processes, with shared memory counted once."""
    total = 0
    for pid in pids:
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += 1024 * sum(int(row.split()[1]) for row in rows if row.startswith("Pss:"))
    return total


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's count of resident memory")
@pytest.mark.parametrize("files", ["jpg"], indirect=True)
def test_memory_over_an_epoch(shards, tiny, report):
    """Training process and workers together."""
    with Loader(shards, BATCH, seed=0, temperature=0.5, num_workers=WORKERS) as loader:
        for _ in range(READ_AHEAD + 1):
            next(loader)
        pids = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
        samples, end = [], loader.position + 2 * loader.batches_per_epoch
        while loader.position < end:
            next(loader)
            samples.append(resident(pids))
    first, last = (max(part) for part in (samples[: len(samples) // 2], samples[len(samples) // 2 :]))
    detail = f"at most {first / 2**20:.0f} MB in the first epoch, {last / 2**20:.0f} MB in the second"
    report("memory of loader and workers", "its first epoch's", first / last, 0.95, detail)


def test_order_of_five_million(tiny, compare, report):
    count = 50_000 if tiny else 5_000_000
    rng = np.random.default_rng(0)
    modality = rng.choice(10, count, p=[0.4, 0.25, 0.03, 0.1, 0.05, 0.03, 0.02, 0.07, 0.04, 0.01])
    words = rng.integers(0, 2**63, count)
    candidates = {"sort": lambda: np.argsort(words, kind="stable")}
    for temperature in (1.0, 0.5):
        candidates[temperature] = lambda temperature=temperature: epoch_order(0, 3, modality, temperature)
    t = compare(candidates, rounds=3, warmup=1)
    for temperature, at_least in ((1.0, 0.4), (0.5, 0.12)):
        detail = f"{t[temperature]:.2f} s for {count} samples, sort {t['sort']:.2f} s"
        report(
            f"order of an epoch, temperature {temperature}", "one sort", t["sort"] / t[temperature], at_least, detail
        )


def test_opening_an_index(tiny, tmp_path, compare, report):
    """Every line of every index is checked; the images are one byte each."""
    shards, per_shard = (2, 100) if tiny else (10, 10_000)
    with ShardWriter(tmp_path, name="index", modalities=("CT",), image_size=256, samples_per_shard=per_shard) as writer:
        for number in range(shards * per_shard):
            name = hashlib.sha256(b"%d" % number).hexdigest()
            writer.add(name[:32], b"x", kind="jpg", modality="CT", split="train", group=name[32:48], checked=True)
    tables = [path.read_bytes() for path in sorted(tmp_path.glob("*.jsonl"))]

    def parse():
        for line in itertools.chain.from_iterable(table.splitlines() for table in tables):
            json.loads(line)

    t = compare({"open": lambda: open_dataset(tmp_path), "parse": parse}, rounds=5, warmup=1)
    each = t["open"] / (shards * per_shard)
    detail = f"{each * 1e6:.1f} us a sample, {each * 5e6:.0f} s for 5 million; json.loads {t['parse']:.2f} s"
    report("opening a shard set", "json.loads of its index", t["parse"] / t["open"], 0.25, detail)
