"""The pretraining step, with everything that a run's next step depends on; no file is touched here.

Shape letters: B images, K chosen, E experts, M modalities, R held-out images shown, S image side.
"""

import contextlib
import gc
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dex.analysis import usage as analysis
from dex.analysis.evaluation import Evaluation, Evaluator, autocast
from dex.common import random as numbers
from dex.common.random import step_seed
from dex.common.ranks import ALONE, Ranks, full, gather, same_bits, spread
from dex.config import Config, check, per_layer, resolve_micro_batch, to_dict
from dex.data import Batch, CorruptDataError, Loader, augment
from dex.data.dataset import Dataset
from dex.model import MAEOutput
from dex.model.build import build_model
from dex.train import checkpoint, cuda_graph
from dex.train.schedules import Schedule, schedule_at, total_steps
from dex.train.stopwatch import Stopwatch
from dexkernels import hold_weights

_INIT = -1
"""The 'step' whose seed draws the initial weights."""
_SPIKE_WINDOW, _SPIKE_DEVIATIONS = 100, 12.0
"""A spike lies so many median absolute deviations above the median of so many steps, and at least 5 % above it."""
_SCHEDULE = {"momentum": torch.float64}
"""What is not float32: of a float32 momentum, 1 - m would have four digits."""
_LOSSES = ("loss", "total", "align_loss", "balance_loss", "grad_norm")
_MASK_STREAM, _ROUTER_STREAM = 1, 16
"""What an image's random numbers are for; layer l's router has stream 16 + l."""
_SLOTS_TO_JUDGE = 100
"""Slots per expert of an even load that are awaited before an expert is called dead."""


class NonFinite(NamedTuple):
    """A step that changed nothing because its loss, gate mass or gradient was not finite."""

    step: int
    """Steps done when it began."""
    loss: float
    grad_norm: float
    samples: list[str]
    """Ids of the images with a non-finite loss; the whole batch when only the gradient was non-finite."""


class Spike(NamedTuple):
    """A good step whose loss was far above those before it."""

    step: int
    """Steps done when it began."""
    loss: float
    usual: float
    """Median loss of the steps before."""
    samples: list[tuple[str, float]]
    """Ids and losses of this rank's images with the highest losses, highest first."""


class _Verdict(NamedTuple):
    """What the host will read of one step: ``values`` is [good, stop, unreadable, loss, grad_norm, image losses]."""

    step: int
    ids: Sequence[str]
    values: Tensor
    ready: Any


def resolve_device(config: Config, ranks: Ranks = ALONE) -> torch.device:
    """ValueError when CUDA is asked for and absent, or has fewer devices than there are ranks on this machine."""
    wanted = config.run.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: expected a device that is there; got 'cuda', and torch finds no CUDA device")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK: expected one rank per CUDA device, of which there are {torch.cuda.device_count()}; "
            f"got {ranks.local_rank}"
        )
    return torch.device("cuda", ranks.local_rank) if ranks.world_size > 1 else torch.device("cuda")


def check_cuda_graph(config: Config, device: torch.device, world_size: int) -> None:
    """ValueError when ``parallel.cuda_graph`` is asked for and a step cannot be captured here."""
    m = config.model
    if config.parallel.cuda_graph and (
        reason := cuda_graph.why_not(device, world_size, m.backend, any(per_layer(m.num_experts, m.depth)))
    ):
        raise ValueError(f"parallel.cuda_graph: {reason}")


def resolve_precision(config: Config, device: torch.device) -> str:
    """``auto`` becomes bf16 where the device multiplies bf16 in hardware: elsewhere it is slower than fp32."""
    if config.run.precision != "auto":
        return config.run.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"


class Trainer:
    """Model, optimizer, loader and counters of one run; nothing here knows of a folder.

    A step: forward, backward, verdict, GEMA, clip, AdamW. The verdict (loss, gate mass and gradient norm finite) is a
    0-dim tensor on the device, and with a bad one the same launches change nothing, so no step waits for its own
    verdict: the host reads it one step late on a GPU, at once on a CPU. Nothing else waits for the device either
    (tests/step), but for plain-torch experts, which read the sizes of their groups on the host, in every layer.
    """

    def __init__(self, config: Config, dataset: Dataset, *, ranks: Ranks = ALONE, start_batch: int = 0):
        """``dataset``: all of it; training takes its split "train", evaluation "val". ValueError as in `check`."""
        check(config)
        self.config, self.ranks = config, ranks
        self.device = resolve_device(config, ranks)
        self.precision = resolve_precision(config, self.device)
        self.modalities = dataset.modalities
        self.fingerprint = dataset.fingerprint
        train, held_out = dataset.split("train"), dataset.split("val")
        if len(train) == 0:
            raise ValueError(f"data: expected images to train on; the training split of {dataset.name!r} is empty")
        self.micro_batch = resolve_micro_batch(config, ranks.world_size)
        check_cuda_graph(config, self.device, ranks.world_size)
        self.loader = Loader(
            train,
            config.data.batch_size,
            seed=config.run.seed,
            temperature=config.data.temperature,
            num_workers=config.data.num_workers,
            start_batch=start_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        self.steps = total_steps(config, self.loader.batches_per_epoch)
        self.step = 0
        """Steps done."""
        torch.manual_seed(step_seed(config.run.seed, _INIT))
        self.model = build_model(config).to(self.device)
        self.net = self._prepare_model()
        """The model as training calls it: spread over the ranks."""
        self.named_parameters = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in self.named_parameters]
        o = config.optim
        on_gpu = self.device.type == "cuda"
        self._schedule = Schedule(
            *(torch.zeros((), dtype=_SCHEDULE.get(name), device=self.device) for name in Schedule._fields)
        )
        """Of this step, where the device reads it: a CUDA graph would keep the numbers it was captured with."""
        self._flags = torch.zeros(2, dtype=torch.bool, device=self.device)
        """Whether this rank was told to stop; whether it cannot read its images."""
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.peak_lr,
            betas=o.betas,
            weight_decay=o.weight_decay,
            eps=o.eps,
            fused=True,
            capturable=on_gpu,
        )
        if on_gpu:  # the CPU's fused step would read a tensor anew for every parameter
            self.optimizer.param_groups[0]["lr"] = self._schedule.lr
        # Read by the fused step: where found_inf is 1 it leaves weights, moments and step counters alone.
        self.optimizer.grad_scale = None
        depth, experts = config.model.depth, config.model.num_experts
        self.experts = [e for e in per_layer(experts, depth) if e]
        self.nonfinite_in_a_row = 0
        self.data_wait = 0.0
        """Seconds spent waiting for the loader since it was last set to 0."""
        self._local = Stopwatch(self.device)
        """Runs while the device needs no other rank: augmentation and, but for fsdp and replays, forward."""
        self.stop_requested = False
        """Set before a step: this rank was told to stop."""
        self.stopping = False
        """Some rank was told to stop, and all know of it."""
        self.at: Callable[[str], None] = lambda phase: None
        """Called with what a step does next: "loader", then "step"."""
        self.spikes: list[Spike] = []
        """Loss spikes found since the caller last took them away."""
        self._losses: deque[float] = deque(maxlen=_SPIKE_WINDOW)
        self._pending: deque[_Verdict] = deque()
        self._unreadable: CorruptDataError | None = None
        self._evaluator = Evaluator(config, self.model, train, held_out, self.device, self.precision)
        self._window = self._new_window()
        self._slots = torch.zeros(sum(self.experts), dtype=torch.int64, device=self.device)
        self._unused: list[analysis.UnusedExperts] = [analysis.UnusedExperts((), ()) for _ in self.experts]
        self._graph = self._new_graph()

    @property
    def epoch(self) -> float:
        return self.step / self.loader.batches_per_epoch

    def train_step(self) -> list[NonFinite]:
        """One step; returns the non-finite ones among the steps whose verdict has arrived.

        CorruptDataError: too many images cannot be read, on any rank; every rank raises it, naming those ranks and
        their samples, with ``step`` back at the step that wanted them. Nothing changed since.
        """
        config = self.config
        values = schedule_at(config, self.step, self.steps)
        began = time.perf_counter()
        self.at("loader")
        batch, unreadable = self._next_batch()
        self.data_wait += time.perf_counter() - began
        self.at("step")

        with self._local:
            keys = numbers.sample_keys(config.run.seed, self._to_device(batch.places))
            images = augment(self._to_device(batch.images), config.model.img_size, keys)
            modality = self._to_device(batch.modality)
            mask_noise, router_noise = self._noise(keys)
        for tensor, value in zip(self._schedule, values, strict=True):
            tensor.fill_(value)
        for flag, value in zip(self._flags, (self.stop_requested, unreadable is not None), strict=True):
            flag.fill_(value)
        group = self.optimizer.param_groups[0]
        if group["lr"] is not self._schedule.lr:
            group["lr"] = values.lr
        # Here, so that a graph is captured without the gradients of the step before in memory.
        self.optimizer.zero_grad(set_to_none=True)
        inputs = (images, modality, mask_noise, *router_noise)
        told, image_loss = self._graph(self._compute, *inputs) if self._graph else self._compute(*inputs)
        self._pending.append(self._send_verdict(batch.ids, told, image_loss))
        self.step += 1
        return self._read_verdicts(keep=1 if self.device.type == "cuda" else 0)

    def _compute(
        self, images: Tensor, modality: Tensor, mask_noise: Tensor, *router_noise: Tensor
    ) -> tuple["_Told", Tensor]:
        """Forward, backward, verdict, GEMA, clip, AdamW and counts; what is told of the step, and every image's loss.

        Launches alone, the same at every step: what differs is read on the device, from the arguments, `_schedule` and
        `_flags`; what lasts (weights, moments, `_window`, `_slots`) is changed in place. So a CUDA graph of it replays
        rightly with another batch and other values.
        """
        config, values = self.config, self._schedule
        self.model.train()
        forward = contextlib.nullcontext() if config.parallel.strategy == "fsdp" else self._local
        parts = [slice(i, i + self.micro_batch) for i in range(0, len(images), self.micro_batch)]
        outs, totals = [], []
        # Checkpointing and fsdp let go of weights and copies between forward and backward.
        hold = len(parts) > 1 and config.parallel.strategy == "ddp" and not config.parallel.checkpointing
        with hold_weights(self.model) if hold else contextlib.nullcontext():
            for part in parts:
                with self._gradients(last=part is parts[-1]):
                    with forward, autocast(self.device, self.precision):
                        out = self.net(
                            images[part],
                            mask_ratio=config.model.mask_ratio,
                            noise_std=values.noise_std,
                            mask_noise=mask_noise[part],
                            router_noise=[noise[part] for noise in router_noise] or None,
                        )
                    total = out.loss + values.align_weight * out.align_loss + values.balance_weight * out.balance_loss
                    (total / len(parts)).backward()
                outs.append(out), totals.append(total.detach())
        out = _merge(outs)

        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        grad_norm = full(norm)
        losses = torch.stack([out.loss, torch.stack(totals).mean(), out.align_loss, out.balance_loss, grad_norm])
        told = self._agree(losses, out, modality)
        good = told.good
        self.model.update_directors(told.gate_mass, values.momentum, skip=~good, process_group=False)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, config.optim.clip_norm, norm)
        self.optimizer.found_inf = (~good).float()
        self.optimizer.step()
        self._count(told)
        return told, out.image_loss

    def close(self) -> None:
        """End the loader's workers and let go of what spread the model over ranks, before the ranks part."""
        self.loader.close()
        self.net, self._graph = self.model, None
        # DistributedDataParallel is part of reference cycles. What is left of it when Python ends, after its process
        # group, aborts the process now and then.
        gc.collect()

    def flush(self) -> list[NonFinite]:
        """Wait for the verdicts still under way and return the non-finite steps among them."""
        return self._read_verdicts(keep=0)

    def row(self) -> dict[str, Any]:
        """Means over the steps since the last row, this step's schedule, the experts' load; waits for the device."""
        window = {name: tensor.tolist() for name, tensor in self._window.items()}
        for tensor in self._window.values():
            tensor.zero_()
        good = window["good"]
        values = schedule_at(self.config, self.step - 1, self.steps)
        counts = self._slots_by_layer()
        return {
            "step": self.step,
            "epoch": self.epoch,
            **{name: value / good if good else None for name, value in zip(_LOSSES, window["sums"], strict=True)},
            "lr": values.lr,
            "momentum": values.momentum,
            "noise_std": values.noise_std,
            "balance_weight": values.balance_weight,
            "skipped": int(window["steps"] - good),
            "modality_loss": {
                name: loss / images
                for name, loss, images in zip(
                    self.modalities, window["modality_loss"], window["modality_images"], strict=True
                )
                if images
            },
            "usage_entropy": [analysis.usage_entropy(c) for c in counts],
            "usage_min_share": [analysis.min_share(c) for c in counts],
        }

    def pace(self, steps: int) -> dict[str, Any]:
        """What the ranks say of their time and memory in the ``steps`` since they were last asked, all of them.

        data_wait_s, memory_mb (the most so far) and memory_now_mb: the largest. Of several ranks, slowest_rank: the one
        that took longest in a step for what needs no other rank (loader, augmentation, and but for fsdp forward),
        slowest_rank_s, and median_rank_s.
        """
        told = gather(self.ranks, [self.data_wait, self._local.seconds(), *self._memory_mb()])
        self.data_wait = 0.0
        waits, local, most, now = zip(*told, strict=True)
        found = {"data_wait_s": max(waits), "memory_mb": max(most), "memory_now_mb": max(now)}
        if self.ranks.world_size > 1:
            alone = [(wait + busy) / steps for wait, busy in zip(waits, local, strict=True)]
            slowest = max(alone)
            found |= {"slowest_rank": alone.index(slowest), "slowest_rank_s": slowest}
            found |= {"median_rank_s": statistics.median_low(alone)}
        return found

    def newly_unused(self) -> list[tuple[int, analysis.UnusedExperts]]:
        """(layer, its unused experts) where that changed for the worse since the last judgement.

        Judges only once enough slots were given out to tell, and then begins to count anew.
        """
        counts = self._slots_by_layer()
        if not counts or any(c.sum() < _SLOTS_TO_JUDGE * c.numel() for c in counts):
            return []
        self._slots.zero_()
        before, self._unused = self._unused, [analysis.unused_experts(c) for c in counts]
        return [
            (layer, new)
            for layer, (old, new) in enumerate(zip(before, self._unused, strict=True))
            if set(new.dead) - set(old.dead) or set(new.nearly_dead) - set(old.dead) - set(old.nearly_dead)
        ]

    def evaluate(self, pictures: int = 16) -> Evaluation | None:
        """See `dex.analysis.evaluation.Evaluator`; all ranks evaluate the same images."""
        return self._evaluator.evaluate(pictures)

    def ranks_agree(self) -> bool | None:
        """Whether everything that each rank holds whole is the same to the bit on all; None with one rank.

        ddp: weights, directors and usage; fsdp, which cuts weights and directors: usage. All ranks ask.
        """
        if self.ranks.world_size == 1:
            return None
        held = [*self.model.parameters(), *self.model.buffers()]
        return same_bits(t for t in held if not isinstance(t, DTensor) and t.dtype == torch.float32)

    def state(self) -> dict[str, Any]:
        """Everything but weights and moments that the next step depends on, as JSON; wait for verdicts first.

        Random numbers are functions of the seed, the step and an image's place: there is no state of theirs to keep.
        """
        return {
            "step": self.step,
            "steps": self.steps,
            "config": to_dict(self.config),
            "precision": self.precision,
            "data_fingerprint": self.fingerprint,
            "data_position": self.step,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "losses": list(self._losses),
            "window": {name: tensor.tolist() for name, tensor in self._window.items()},
            "slots": self._slots.tolist(),
            "unused": [list(map(list, u)) for u in self._unused],
        }

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from ``saved``, a checkpoint of this run; `dex.train.run` refuses another run's."""
        checkpoint.restore(saved, self.model, self.optimizer, self.named_parameters)
        self._graph = self._new_graph()  # moments lie elsewhere now
        state = saved.state
        self.step = state["step"]
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
        self._losses = deque(state["losses"], _SPIKE_WINDOW)
        for name, tensor in self._window.items():
            tensor.copy_(torch.tensor(state["window"][name], dtype=tensor.dtype))
        self._slots.copy_(torch.tensor(state["slots"], dtype=torch.int64))
        self._unused = [analysis.UnusedExperts(tuple(dead), tuple(nearly)) for dead, nearly in state["unused"]]

    def tensors(self) -> dict[str, Tensor]:
        """What `checkpoint.Saver` writes: weights, buffers and moments, not copied."""
        return checkpoint.collect(self.model, self.optimizer, self.named_parameters)

    def _new_window(self) -> dict[str, Tensor]:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self.device)

        kinds = len(self.modalities)
        return {
            "steps": zeros(),
            "good": zeros(),
            "sums": zeros(len(_LOSSES)),
            "modality_loss": zeros(kinds),
            "modality_images": zeros(kinds),
        }

    def _new_graph(self) -> cuda_graph.StepGraph | None:
        if not self.config.parallel.cuda_graph:
            return None
        return cuda_graph.StepGraph(self.device, [*self.model.parameters(), *self.model.buffers()])

    def _prepare_model(self) -> torch.nn.Module:
        parallel, model = self.config.parallel, self.model
        blocks = [*model.encoder.blocks, *model.decoder_blocks]
        model.encoder.checkpointing = parallel.checkpointing
        if parallel.compile:
            for block in blocks:
                block.compile()
        return spread(model, blocks, parallel.strategy, self.device) if self.ranks.world_size > 1 else model

    def _to_device(self, tensor: Tensor) -> Tensor:
        """By way of pinned memory: a copy from other memory may wait for all that was launched before it."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _next_batch(self) -> tuple[Batch, CorruptDataError | None]:
        """This rank's part of the next batch; alone, CorruptDataError is raised.

        Among several ranks it is handed back with black images, so that this rank takes part in the step, which then
        changes nothing anywhere, nor does any later one, and all learn of it.
        """
        try:
            if self._unreadable is None:
                return next(self.loader), None
        except CorruptDataError as error:
            if self.ranks.world_size == 1:
                raise
            self._unreadable = error
        count, size = self.config.data.batch_size // self.ranks.world_size, self.loader.dataset.image_size
        black = torch.zeros(count, 3, size, size, dtype=torch.uint8)
        nothing = torch.zeros(count, dtype=torch.int64)
        return Batch(black, nothing, ("",) * count, nothing), self._unreadable

    def _noise(self, keys: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Each image's noise for the mask [b, patches] and for every router [b, 1, E_l]."""
        m = self.config.model
        mask = numbers.uniform(keys, (m.img_size // m.patch_size) ** 2, _MASK_STREAM)
        router = [numbers.normal(keys, e, _ROUTER_STREAM + layer)[:, None] for layer, e in enumerate(self.experts)]
        return mask, router

    def _gradients(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are exchanged between ranks with the last micro-batch only."""
        if self.ranks.world_size == 1:
            return contextlib.nullcontext()
        if self.config.parallel.strategy == "fsdp":
            self.net.set_requires_gradient_sync(last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else self.net.no_sync()

    @torch.no_grad()
    def _agree(self, losses: Tensor, out: MAEOutput, modality: Tensor) -> "_Told":
        """One small sum over the ranks: everything that is said of this step, the verdict included."""
        kinds = analysis.one_hot(modality, len(self.modalities))
        slots = torch.zeros(sum(self.experts), dtype=torch.float64, device=self.device)
        first = 0
        for indices, experts in zip(out.expert_indices, self.experts, strict=True):
            taken = indices.flatten().long() + first
            slots.index_add_(0, taken, torch.ones_like(taken, dtype=torch.float64))
            first += experts
        finite = torch.isfinite(torch.cat([losses[1:2], losses[4:5], *out.gate_mass])).all()
        parts = [
            torch.cat([(~finite | self._flags[1])[None], self._flags]),
            losses / self.ranks.world_size,
            kinds.T @ out.image_loss.double(),
            kinds.sum(0),
            slots,
            *out.gate_mass,
        ]
        told = torch.cat([part.double().flatten() for part in parts])
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(told)
        flags, losses, modality_loss, modality_images, slots, *gate_mass = told.split([p.numel() for p in parts])
        return _Told(
            (flags[0] == 0) & torch.isfinite(told[3:]).all(),
            flags[1:],
            losses,
            modality_loss,
            modality_images,
            slots,
            [mass.float() for mass in gate_mass],
        )

    @torch.no_grad()
    def _count(self, told: "_Told") -> None:
        window = self._window
        window["steps"] += told.flags[1] == 0  # a step without its images will be taken again
        window["good"] += told.good
        for name, value in (
            ("sums", told.losses),
            ("modality_loss", told.modality_loss),
            ("modality_images", told.modality_images),
        ):
            window[name] += torch.where(told.good, value, 0.0)
        self._slots += torch.where(told.good, told.slots, 0.0).long()

    def _memory_mb(self) -> tuple[float, float]:
        """The most this rank has held so far, and what it holds: on the device, or the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6, torch.cuda.memory_allocated(self.device) / 1e6
        unit = 1 if sys.platform == "darwin" else 1024
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
        statm = Path("/proc/self/statm")
        return most, int(statm.read_text().split()[1]) * resource.getpagesize() / 1e6 if statm.exists() else most

    def _slots_by_layer(self) -> list[Tensor]:
        return list(self._slots.to("cpu", copy=True).split(self.experts)) if self.experts else []

    def _send_verdict(self, ids: Sequence[str], told: "_Told", image_loss: Tensor) -> _Verdict:
        head = torch.cat([told.good[None], told.flags, told.losses[0:1], told.losses[4:5]])
        values = torch.cat([head.float(), image_loss.float()])
        if self.device.type != "cuda":
            return _Verdict(self.step, ids, values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return _Verdict(self.step, ids, host, ready)

    def _read_verdicts(self, keep: int) -> list[NonFinite]:
        bad = []
        while len(self._pending) > keep:
            step, ids, values, ready = self._pending.popleft()
            if ready is not None:
                ready.synchronize()
            good, stop, unreadable, loss, grad_norm = values[:5].tolist()
            image_loss = values[5:]
            self.stopping = self.stopping or stop > 0
            if unreadable:
                self.step = step
                self._pending.clear()
                words = gather(self.ranks, self._unreadable and str(self._unreadable))
                named = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(words) if text)
                raise CorruptDataError(f"step {step + 1}: {named}", self.loader.corrupt)
            if good:
                self.nonfinite_in_a_row = 0
                self._watch_loss(step, loss, ids, image_loss)
                continue
            self.nonfinite_in_a_row += 1
            guilty = [i for i, finite in zip(ids, torch.isfinite(image_loss).tolist(), strict=True) if not finite]
            told = gather(self.ranks, [guilty, list(ids)])  # every rank reads the same verdict at the same step
            guilty = [i for mine, _ in told for i in mine] or [i for _, all_ids in told for i in all_ids]
            bad.append(NonFinite(step, loss, grad_norm, guilty))
        return bad

    def _watch_loss(self, step: int, loss: float, ids: Sequence[str], image_loss: Tensor) -> None:
        before = torch.tensor(self._losses, dtype=torch.float64)
        self._losses.append(loss)
        if len(before) < _SPIKE_WINDOW // 2:
            return
        usual = before.median()
        limit = usual + max(_SPIKE_DEVIATIONS * float((before - usual).abs().median()), 0.05 * abs(float(usual)))
        if loss > limit:
            worst = image_loss.argsort(descending=True)[:5].tolist()
            self.spikes.append(Spike(step, loss, float(usual), [(ids[i], float(image_loss[i])) for i in worst]))


class _Told(NamedTuple):
    """What all ranks know of a step. ``flags [2]``: ranks that were told to stop, ranks that cannot read their images.

    ``losses [5]`` as in ``_LOSSES``, means over the ranks; the others are sums. ``gate_mass``: one [E_l] per layer.
    """

    good: Tensor
    flags: Tensor
    losses: Tensor
    modality_loss: Tensor
    modality_images: Tensor
    slots: Tensor
    gate_mass: list[Tensor]


def _merge(outs: list[MAEOutput]) -> MAEOutput:
    """One batch's output from those of its micro-batches, of equal size, without what only backward needs."""
    if len(outs) == 1:
        return outs[0]
    return outs[0]._replace(
        loss=torch.stack([o.loss.detach() for o in outs]).mean(),
        align_loss=torch.stack([o.align_loss.detach() for o in outs]).mean(),
        balance_loss=torch.stack([o.balance_loss.detach() for o in outs]).mean(),
        gate_mass=[torch.stack(masses).sum(0) for masses in zip(*(o.gate_mass for o in outs), strict=True)],
        gates=[torch.cat(gates) for gates in zip(*(o.gates for o in outs), strict=True)],
        expert_indices=[torch.cat(indices) for indices in zip(*(o.expert_indices for o in outs), strict=True)],
        image_loss=torch.cat([o.image_loss for o in outs]),
    )
