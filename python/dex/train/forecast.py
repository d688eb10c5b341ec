"""How long a run would take on this machine, before it starts."""

import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from dex.common.units import duration, format_bytes
from dex.sizing.estimate import ASSUMED_MFU, PEAKS, estimate
from dex.train.plan import Plan
from dex.train.trainer import Trainer

MOST_OPERATIONS = 2e11
"""Operations of the largest step that is tried: a few seconds on a slow processor."""
TRIED = 4
"""Steps that are tried; the first of them is not counted."""
IDLE = 0.8
"""A step that alone uses the processor has at least this share of its time as processor time."""


class Forecast(NamedTuple):
    """The expected length of a run."""

    seconds: float | None
    """Of all its steps, without evaluations and checkpoints; None: not known."""
    basis: str
    """What the figure rests on, or why there is none."""

    def sentence(self, steps: int) -> str:
        """The forecast in words, for a run of ``steps`` steps."""
        if self.seconds is None:
            return f"not known: {self.basis}"
        return f"about {duration(self.seconds)} for {steps:,} steps, an estimate from {self.basis}"


def forecast(plan: Plan) -> Forecast:
    """The length of the run of ``plan``. On a CPU some of its steps are tried, if they are small; nothing is written.

    On a GPU it follows from the manufacturer's figure and an assumed share of it. Reseeds torch's global generator.
    """
    estimated = estimate(plan.config, plan.steps)
    work = estimated.flops_per_image * plan.config.data.batch_size
    if plan.device.type == "cuda":
        return _by_figures(plan, work, torch.cuda.get_device_name(plan.device))
    if work > MOST_OPERATIONS:
        return Forecast(
            None,
            f"a step has {work / 1e9:,.0f} GFLOP, too many to try here; {MOST_OPERATIONS / 1e9:,.0f} GFLOP would be "
            "tried. There are no figures for CPUs",
        )
    memory, available = sum(estimated.memory.values()) + estimated.activations * plan.micro_batch, _available()
    if memory > available / 2:
        return Forecast(
            None,
            f"a step needs about {format_bytes(memory)}, and is tried only with twice that; "
            f"{format_bytes(available)} are available. There are no figures for CPUs",
        )
    trainer = Trainer(plan)
    try:
        tried = [_try(trainer) for _ in range(min(TRIED, plan.steps))]
    finally:
        trainer.close()
    counted = tried[1:] or tried
    seconds = statistics.median(step.seconds for step in counted)
    basis = f"{len(counted)} tried here, {seconds:.2g} s each; evaluations and checkpoints come on top"
    if statistics.median(step.computed / step.seconds for step in counted) < IDLE:
        basis += ". Other programs used the processor meanwhile"
    return Forecast(plan.steps * seconds, basis)


def _by_figures(plan: Plan, work: float, name: str) -> Forecast:
    peak = next((flops for word, flops in PEAKS if word in name), None)
    if peak is None:
        return Forecast(None, f"there are no figures for {name}")
    if plan.precision == "fp32":
        return Forecast(None, f"the figures for {name} are for bf16, and the run computes in fp32")
    basis = f"{ASSUMED_MFU:.0%} of the peak of {name}, assumed, not measured"
    return Forecast(plan.steps * work / (peak * ASSUMED_MFU), basis)


def _available() -> float:
    """Bytes of memory that programs may still take; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


class _Step(NamedTuple):
    seconds: float
    computed: float
    """Seconds of processor time."""


def _try(trainer: Trainer) -> _Step:
    began, computed = time.perf_counter(), time.process_time()
    trainer.train_step()
    return _Step(time.perf_counter() - began, time.process_time() - computed)
