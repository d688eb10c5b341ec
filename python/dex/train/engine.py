"""What pretraining and fine-tuning share of a step: verdicts under way, non-finite steps, time and memory of ranks."""

import contextlib
import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dex.common.ranks import Ranks, gather, same_bits
from dex.train.loss_scale import MOST_HALVINGS, LossScale
from dex.train.loss_spikes import LossSpikes
from dex.train.stopwatch import Stopwatch
from dex.train.verdict import NonFinite, Sent, Verdict, send
from dex.train.window import Window


class Engine:
    """A model in training, without its step: `dex.train.trainer.Trainer` and `dex.tasks.trainer.TaskTrainer` add it.

    A step ends with `_send`; its verdict is read later, without a wait.
    """

    model: torch.nn.Module
    window: Window

    def __init__(self, ranks: Ranks, device: torch.device, precision: str):
        self.ranks: Ranks = ranks
        self.device: torch.device = device
        self.step: int = 0
        """Steps done."""
        self.loss_scale: LossScale | None = LossScale(device) if precision == "fp16" else None
        self.nonfinite_in_a_row: int = 0
        self.data_wait: float = 0.0
        """Seconds spent waiting for the loader since it was last set to 0."""
        self._local = Stopwatch(device)
        """Runs while the device needs no other rank: augmentation and, but for fsdp and replays, forward."""
        self.stop_requested: bool = False
        """Set before a step: this rank was asked to stop."""
        self.stopping: bool = False
        """Some rank was asked to stop, and all know of it."""
        self.at: Callable[[str], None] = lambda phase: None
        """Called with what a step does next: "loader", then "step"."""
        self.loss_spikes: LossSpikes = LossSpikes()
        self._pending: deque[Sent] = deque()

    @contextlib.contextmanager
    def _waiting_for_data(self) -> Iterator[None]:
        began = time.perf_counter()
        self.at("loader")
        yield
        self.data_wait += time.perf_counter() - began
        self.at("step")

    def _send(self, verdict: Verdict, image_loss: Tensor, ids: Sequence[str]) -> None:
        """The step is done; its verdict, on its way to the host, is read later."""
        self._pending.append(send(verdict, image_loss, self.step, ids))
        self.step += 1

    def _go_on_from(self, state: Mapping[str, Any]) -> None:
        """What `restore` of every trainer takes from a checkpoint's state, beside tensors and data."""
        self.step = state["step"]
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
        self.loss_spikes.restore(state)
        self.window.restore(state)
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.restore(state["loss_scale"])

    def flush(self) -> list[NonFinite]:
        """Wait for the verdicts still under way and return the non-finite steps among them."""
        return self._read_verdicts(keep=0)

    def pace(self, steps: int) -> dict[str, Any]:
        """What the ranks say of their time and memory in the ``steps`` since they were last asked, all of them.

        data_wait_s, memory_mb (the most so far) and memory_now_mb: the largest. Of several ranks, slowest_rank: the one
        that took longest in a step for what needs no other rank (loader, augmentation, and but for fsdp forward),
        slowest_rank_s, and median_rank_s.
        """
        reports = [_Pace(*report) for report in gather(self.ranks, self._pace())]
        self.data_wait = 0.0
        pace = {
            "data_wait_s": max(report.data_wait for report in reports),
            "memory_mb": max(report.most_mb for report in reports),
            "memory_now_mb": max(report.now_mb for report in reports),
        }
        if self.ranks.world_size > 1:
            alone = [(report.data_wait + report.local) / steps for report in reports]
            slowest = max(alone)
            pace |= {"slowest_rank": alone.index(slowest), "slowest_rank_s": slowest}
            pace |= {"median_rank_s": statistics.median_low(alone)}
        return pace

    def ranks_agree(self) -> bool | None:
        """Whether everything that each rank holds whole is the same to the bit on all; None with one rank.

        ddp: weights, directors and usage; fsdp, which cuts weights and directors: usage. All ranks ask.
        """
        if self.ranks.world_size == 1:
            return None
        held = [*self.model.parameters(), *self.model.buffers()]
        return same_bits(t for t in held if not isinstance(t, DTensor) and t.dtype == torch.float32)

    def _raise_unreadable(self) -> NoReturn:
        """Some rank cannot read its images; ``step`` is back at the step that wanted them."""
        raise NotImplementedError

    def _to_device(self, tensor: Tensor) -> Tensor:
        """By way of pinned memory: a copy from other memory may wait for all that was launched before it."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _pace(self) -> "_Pace":
        most, now = self._memory_mb()
        return _Pace(self.data_wait, self._local.seconds(), most, now)

    def _memory_mb(self) -> tuple[float, float]:
        """The most this rank has held so far, and what it holds: on the device, or the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6, torch.cuda.memory_allocated(self.device) / 1e6
        unit = 1 if sys.platform == "darwin" else 1024
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
        statm = Path("/proc/self/statm")
        return most, int(statm.read_text().split()[1]) * resource.getpagesize() / 1e6 if statm.exists() else most

    def _read_verdicts(self, keep: int) -> list[NonFinite]:
        bad = []
        while len(self._pending) > keep:
            sent = self._pending.popleft()
            verdict = sent.read()
            self.stopping = self.stopping or verdict.stop
            if verdict.unreadable:
                self.step = sent.step
                self._pending.clear()
                self._raise_unreadable()
            if self.loss_scale is not None:
                overflows = not verdict.good and math.isfinite(verdict.loss)
                self.loss_scale.overflows = self.loss_scale.overflows + 1 if overflows else 0
                if 0 < self.loss_scale.overflows <= MOST_HALVINGS:
                    continue  # part of float16: the loss is fine, and the next step has half the scale
            if verdict.good:
                self.nonfinite_in_a_row = 0
                self.loss_spikes.watch(sent.step, sent.ids, verdict)
                continue
            self.nonfinite_in_a_row += 1
            finite = torch.isfinite(verdict.image_loss).tolist()
            guilty = [i for i, is_finite in zip(sent.ids, finite, strict=True) if not is_finite]
            # Every rank reads the same verdict at the same step, so all of them gather here.
            of_ranks = gather(self.ranks, {"guilty": guilty, "all": list(sent.ids)})
            samples = [i for ids in of_ranks for i in ids["guilty"]] or [i for ids in of_ranks for i in ids["all"]]
            bad.append(NonFinite(sent.step, verdict.loss, verdict.grad_norm, samples))
        return bad


class _Pace(NamedTuple):
    """A rank's seconds, for the loader and for what needs no other rank, and its memory in MB."""

    data_wait: float
    local: float
    most_mb: float
    now_mb: float
