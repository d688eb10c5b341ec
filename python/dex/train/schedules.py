"""Schedules as pure functions of the step, which counts from 0.

Every schedule has exactly its first value at step 0 and its last value at the last step. In an extended run, all but
the learning rate keep their original span and then their last value.
"""

import math
from typing import NamedTuple

from dex.config import Config, pair


class Schedule(NamedTuple):
    """Values of one step."""

    lr: float
    noise_std: float
    momentum: float
    align_weight: float
    balance_weight: float


def cosine(first: float, last: float, step: int, steps: int) -> float:
    """Half a cosine from ``first`` at step 0 to ``last`` at step ``steps - 1``; ``first`` if there is only one step."""
    if step <= 0 or steps <= 1:
        return first
    if step >= steps - 1:
        return last
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * step / (steps - 1)))


def learning_rate(peak: float, step: int, steps: int, warmup_steps: int, stable_steps: int | None = None) -> float:
    """Linear to ``peak``, reached at step ``warmup_steps - 1``, then half a cosine to 0 at the last step.

    stable_steps: hold ``peak`` instead until this many steps are done, then fall in a straight line to 0 at the last
    step. The first step is never 0; without a warm-up it has ``peak``.
    """
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    if stable_steps is None:
        top = max(warmup_steps - 1, 0)
        return cosine(peak, 0.0, step - top, steps - top)
    if step < stable_steps or steps <= 1:
        return peak
    return peak * (max(steps - 1 - step, 0) / (steps - stable_steps))


def stable_steps(config: Config, steps: int) -> int | None:
    """Number of steps of a run of ``steps`` that do not depend on its length; None for a cosine, where all do."""
    s = config.schedule
    if s.lr_shape == "cosine":
        return None
    return steps - max(1, round(s.decay * steps)) if s.lr_shape == "wsd" else steps


def total_steps(config: Config, batches_per_epoch: int) -> int:
    """Length of the run: ``schedule.steps``, else ``schedule.epochs`` passes over the data."""
    schedule = config.schedule
    return schedule.steps if schedule.steps is not None else max(1, round(schedule.epochs * batches_per_epoch))


def warmup_steps(config: Config, steps: int) -> int:
    """Steps over which the learning rate rises, in a run of ``steps``."""
    return round(config.schedule.warmup * (config.schedule.span or steps))


def schedule_at(config: Config, step: int, steps: int) -> Schedule:
    """The values of step ``step`` of ``steps``."""
    s = config.schedule
    span = s.span or steps
    return Schedule(
        lr=learning_rate(config.peak_lr, step, steps, warmup_steps(config, steps), stable_steps(config, steps)),
        noise_std=cosine(*s.noise_std, step, span),
        momentum=cosine(*s.momentum, step, span),
        align_weight=cosine(*pair(s.align_weight), step, span),
        balance_weight=cosine(*s.balance_weight, step, span),
    )
