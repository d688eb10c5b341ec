"""The measurements of each rank of a job of scripts/scaling.py, and the start of these ranks.

usage: python scripts/scaling_ranks.py JOB    one rank, by `launch`

Functions import torch, since scripts/scaling_page.py works without it.
"""

import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CALIBRATION = {"experts": 12, "batches": [12, 36]}
"""The network of the unit costs; no test point has the same number of experts or batch size."""

Meet = Callable[[], None]
"""A barrier: returns when all ranks have called it."""


def configuration(point: dict):
    """The demo preset's network and data with the changes of ``point``."""
    from dataclasses import replace

    from dex.config import preset

    base = preset("demo")
    return replace(
        base,
        model=replace(base.model, num_experts=point["experts"], **point.get("model", {})),
        data=replace(base.data, batch_size=point["batch"], path=point.get("data")),
        parallel=replace(base.parallel, strategy=point.get("strategy", "ddp"), micro_batch=point.get("micro_batch")),
        run=replace(base.run, device="cpu", precision=point.get("precision", "fp32"), evaluate_every=0),
    )


def rank(job_path: Path, measure: Callable) -> None:
    """Run one rank of a job: ``measure(ranks, job)``. The first rank writes the measurements of all to ``out``."""
    import torch

    from dex.common.ranks import announced, gather, start, stop

    torch.set_num_threads(1)
    job = json.loads(job_path.read_text())
    ranks = start(announced(), torch.device("cpu"), 120)
    by_rank = gather(ranks, measure(ranks, job))
    if ranks.first:
        Path(job["out"]).write_text(json.dumps(by_rank))
    stop(ranks)


def measured(ranks, job: dict) -> list | dict:
    """Seconds of ``steps`` of each of the ``points``, or the unit costs, by ``rounds`` and ``sizes``."""
    if "points" in job:
        return [measure_steps(ranks, point, job["steps"]) for point in job["points"]]
    return measure_costs(ranks, job["rounds"], job["sizes"])


def make_trainer(point: dict, ranks):
    from dex.data import open_dataset
    from dex.train.plan import resolve
    from dex.train.trainer import Trainer

    config = configuration(point)
    return Trainer(resolve(config, open_dataset(config.data.path), ranks))


def step_seconds(trainer, meet: Meet) -> float:
    """Seconds of one step without the wait for the loader; all ranks begin together."""
    meet()
    trainer.data_wait = 0.0
    began = time.perf_counter()
    if trainer.train_step():
        raise RuntimeError("train_step: expected a finite step")
    return time.perf_counter() - began - trainer.data_wait


def barrier(ranks) -> Meet:
    from torch import distributed

    return lambda: distributed.barrier(group=ranks.control) if ranks.world_size > 1 else None


def measure_costs(ranks, rounds: int, sizes: list[int]) -> dict:
    """Seconds of the parts of the unit costs, on this rank while the others do the same."""
    from dex.common.ranks import ALONE

    meet = barrier(ranks)
    seconds = {"steps": {}}
    small, large = CALIBRATION["batches"]
    for batch in (small, large):
        # Each process trains alone; only the machine is shared.
        trainer = make_trainer({"experts": CALIBRATION["experts"], "batch": batch}, ALONE)
        for _ in range(2):
            trainer.train_step()
        seconds["steps"][batch] = [step_seconds(trainer, meet) for _ in range(rounds)]
        if batch == large:
            seconds |= _update_seconds(trainer, meet, rounds)
            if ranks.world_size == 1:
                seconds["checkpoint"] = [_checkpoint_seconds(trainer, number) for number in range(3)]
        trainer.close()
        del trainer
        gc.collect()
    return seconds | {"collectives": _collective_seconds(ranks.world_size, meet, rounds, sizes)}


def _update_seconds(trainer, meet: Meet, rounds: int) -> dict[str, list[float]]:
    """Seconds of everything after backward, and of the directors' update alone."""
    import torch

    mass = [torch.ones(e) for e in trainer.experts]
    seconds = {"update": [], "gema": []}
    for _ in range(rounds):
        meet()
        began = time.perf_counter()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.parameters])
        trainer.model.update_directors(mass, 0.999, process_group=False)
        torch.nn.utils.clip_grads_with_norm_(trainer.parameters, 1.0, norm)
        trainer.optimizer.step()
        seconds["update"].append(time.perf_counter() - began)
        began = time.perf_counter()
        trainer.model.update_directors(mass, 0.999, process_group=False)
        seconds["gema"].append(time.perf_counter() - began)
    return seconds


def _checkpoint_seconds(trainer, number: int) -> float:
    from dex.train import checkpoint

    with tempfile.TemporaryDirectory() as folder:
        saver = checkpoint.Saver(Path(folder), 1)
        began = time.perf_counter()
        saver.save(number, trainer.tensors(), trainer.state() | {"step": number})
        saver.wait()
        return time.perf_counter() - began


def _collective_seconds(ranks: int, meet: Meet, rounds: int, sizes: list[int]) -> dict[str, dict[int, list[float]]]:
    """Kind -> bytes -> seconds of each call; empty with one rank."""
    import torch
    import torch.distributed as dist

    seconds: dict[str, dict[int, list[float]]] = {}
    for size in sizes if ranks > 1 else ():
        count = size // 4 // ranks * ranks
        whole, part = torch.ones(count), torch.ones(count // ranks)
        calls = {
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
            "all_gather": lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part),
            "reduce_scatter": lambda whole=whole, part=part: dist.reduce_scatter_tensor(part, whole),
        }
        for kind, call in calls.items():
            call()
            times = []
            for _ in range(4 * rounds if size < 2**20 else rounds):
                meet()
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
            seconds.setdefault(kind, {})[4 * count] = times
    return seconds


def measure_steps(ranks, point: dict, steps: int) -> list[float]:
    """Seconds of steps of one configuration on this rank."""
    trainer, meet = make_trainer(point, ranks), barrier(ranks)
    for _ in range(2):
        step_seconds(trainer, meet)
    seconds = [step_seconds(trainer, meet) for _ in range(steps)]
    trainer.close()
    return seconds


def launch(count: int, job: dict, timeout: float = 900, program: str = __file__) -> list:
    """Run a job on ``count`` ranks of a program, which calls `rank`, and return each rank's measurements.

    Raises:
        RuntimeError: a rank failed; the message has the end of its output.
    """
    with socket.socket() as s, tempfile.TemporaryDirectory() as folder:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        path, out = Path(folder) / "job.json", Path(folder) / "out.json"
        path.write_text(json.dumps(job | {"out": str(out)}))
        processes = []
        for number in range(count):
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "RANK": str(number),
                "LOCAL_RANK": str(number),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            command = [sys.executable, program, str(path)]
            processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        try:
            outcomes = [(p.communicate(timeout=timeout)[1], p.returncode) for p in processes]
        finally:
            for p in processes:
                if p.poll() is None:
                    p.kill()
        for errors, code in outcomes:
            if code:
                raise RuntimeError(f"a rank exited with {code}: {errors[-2000:]}")
        return json.loads(out.read_text())


if __name__ == "__main__":
    rank(Path(sys.argv[1]), measured)
