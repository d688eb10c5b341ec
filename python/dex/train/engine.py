"""The parts of a step that pretraining and fine-tuning share: pending verdicts, non-finite steps, time and memory."""

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
    """A model in training, without the step itself, which ``dex.train.trainer.Trainer`` and
    ``dex.tasks.trainer.TaskTrainer`` add.

    A step ends with ``_send``; its verdict is read later, so that no step waits for its own.
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
        """Seconds spent waiting for the loader since ``pace`` was last called."""
        self._local = Stopwatch(device)
        """Runs while the device needs no other rank: augmentation and, except with fsdp and CUDA graphs, forward."""
        self.stop_requested: bool = False
        """Set before a step if this rank was asked to stop."""
        self.stopping: bool = False
        """Some rank was asked to stop, and all ranks know."""
        self.at: Callable[[str], None] = lambda phase: None
        """Called with the next phase of a step: "loader", then "step"."""
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
        """End a step: start copying its verdict to the host, to be read later."""
        self._pending.append(send(verdict, image_loss, self.step, ids))
        self.step += 1

    def _go_on_from(self, state: Mapping[str, Any]) -> None:
        """Restore the counters that every trainer keeps in the state of a checkpoint."""
        self.step = state["step"]
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
        self.loss_spikes.restore(state)
        self.window.restore(state)
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.restore(state["loss_scale"])

    def flush(self) -> list[NonFinite]:
        """Wait for the pending verdicts and return the non-finite steps among them."""
        return self._read_verdicts(keep=0)

    def pace(self, steps: int) -> dict[str, Any]:
        """Time and memory of the ranks in the ``steps`` since the last call, for a row of metrics. All ranks call it.

        data_wait_s, memory_mb (peak) and memory_now_mb are the largest of all ranks. With several ranks, slowest_rank
        spent most time per step on work that needs no other rank (loader, augmentation, and except with fsdp forward):
        slowest_rank_s, where the median is median_rank_s.
        """
        reports = [_Pace(*report) for report in gather(self.ranks, self._pace())]
        self.data_wait = 0.0
        pace = {
            "data_wait_s": max(report.data_wait for report in reports),
            "memory_mb": max(report.most_mb for report in reports),
            "memory_now_mb": max(report.now_mb for report in reports),
        }
        if self.ranks.world_size > 1:
            local = [(report.data_wait + report.local) / steps for report in reports]
            slowest = max(local)
            pace |= {"slowest_rank": local.index(slowest), "slowest_rank_s": slowest}
            pace |= {"median_rank_s": statistics.median_low(local)}
        return pace

    def ranks_agree(self) -> bool | None:
        """Whether all replicated tensors are bit-identical on all ranks; None with one rank. All ranks call it.

        With ddp these are weights, directors and usage; with fsdp, which shards weights and directors, only usage.
        """
        if self.ranks.world_size == 1:
            return None
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return same_bits(t for t in tensors if not isinstance(t, DTensor) and t.dtype == torch.float32)

    def _raise_unreadable(self) -> NoReturn:
        """Raise the error of ranks that cannot read their images; ``step`` is the step that needed them."""
        raise NotImplementedError

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Copy through pinned memory: a copy from pageable memory may wait for all earlier launches."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _pace(self) -> "_Pace":
        most, now = self._memory_mb()
        return _Pace(self.data_wait, self._local.seconds(), most, now)

    def _memory_mb(self) -> tuple[float, float]:
        """Peak and current memory of this rank, in MB: of the device, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6, torch.cuda.memory_allocated(self.device) / 1e6
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
        statm = Path("/proc/self/statm")
        return peak, int(statm.read_text().split()[1]) * resource.getpagesize() / 1e6 if statm.exists() else peak

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
                    continue  # Normal in float16: the loss is finite, and the next step has half the scale
            if verdict.good:
                self.nonfinite_in_a_row = 0
                self.loss_spikes.watch(sent.step, sent.ids, verdict)
                continue
            self.nonfinite_in_a_row += 1
            finite = torch.isfinite(verdict.image_loss).tolist()
            nonfinite = [i for i, is_finite in zip(sent.ids, finite, strict=True) if not is_finite]
            # Every rank reads the same verdict at the same step, so all of them gather here.
            reports = gather(self.ranks, {"nonfinite": nonfinite, "all": list(sent.ids)})
            samples = [i for ids in reports for i in ids["nonfinite"]] or [i for ids in reports for i in ids["all"]]
            bad.append(NonFinite(sent.step, verdict.loss, verdict.grad_norm, samples))
        return bad


class _Pace(NamedTuple):
    """Time and memory of a rank."""

    data_wait: float
    """Seconds waiting for the loader."""
    local: float
    """Seconds of work that needs no other rank."""
    most_mb: float
    now_mb: float
