"""What each step uses, as pure functions of the step; steps count from 0.

Every schedule has its first value at step 0 and its last value at the last step, exactly.
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
    """Half a cosine from ``first`` at step 0 to ``last`` at step ``steps - 1``; ``first`` when there is one step."""
    if step <= 0 or steps <= 1:
        return first
    if step >= steps - 1:
        return last
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * step / (steps - 1)))


def learning_rate(peak: float, step: int, steps: int, warmup_steps: int) -> float:
    """Linear to ``peak``, reached at step ``warmup_steps - 1``, then half a cosine to 0 at the last step.

    The first step is never 0, so that no step is idle; without a warm-up step 0 has ``peak``.
    """
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    top = max(warmup_steps - 1, 0)
    return cosine(peak, 0.0, step - top, steps - top)


def total_steps(config: Config, batches_per_epoch: int) -> int:
    """Length of the run: ``schedule.steps``, else ``schedule.epochs`` passes over the data."""
    schedule = config.schedule
    return schedule.steps if schedule.steps is not None else max(1, round(schedule.epochs * batches_per_epoch))


def schedule_at(config: Config, step: int, steps: int) -> Schedule:
    """The values of step ``step`` of ``steps``."""
    s = config.schedule
    return Schedule(
        lr=learning_rate(config.peak_lr, step, steps, round(s.warmup * steps)),
        noise_std=cosine(*s.noise_std, step, steps),
        momentum=cosine(*s.momentum, step, steps),
        align_weight=cosine(*pair(s.align_weight), step, steps),
        balance_weight=cosine(*s.balance_weight, step, steps),
    )
