"""The pretraining step and all state that the next step depends on; this module touches no file.

Shape letters: B images, K chosen, E experts, M modalities, R held-out images shown, S image side.
"""

import contextlib
import gc
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from dex.analysis.evaluation import Evaluation, Evaluator, autocast
from dex.common import random as numbers
from dex.common.ranks import exchange, full, gather, spread
from dex.config import Config, images_per_rank, per_layer, to_dict
from dex.data import Batch, CorruptDataError, Loader, augment
from dex.data.augmentation import with_channels
from dex.model import MAEOutput, MaskedAutoencoder
from dex.model.balance import batch_balance, mean_probabilities
from dex.model.weights import LoadReport
from dex.train import checkpoint, cuda_graph
from dex.train.average import WeightAverage
from dex.train.engine import Engine
from dex.train.initial import first_model, load_initial
from dex.train.optimizer import adamw, fused_adamw, move, set_learning_rate
from dex.train.plan import Plan
from dex.train.schedules import Schedule, schedule_at
from dex.train.verdict import Agreement, Losses, NonFinite, Verdict
from dex.train.window import Window
from dexkernels import hold_weights

_SCHEDULE = {"momentum": torch.float64}
"""Fields that are not float32: with a float32 momentum, 1 - m would have only four digits."""
_MASK_STREAM, _ROUTER_STREAM = 1, 16
"""Streams of an image's random numbers; the router of layer l has stream 16 + l."""


class _Flags(NamedTuple):
    """State of this rank, each a 0-dim bool on the device."""

    stop: Tensor
    """It was asked to stop."""
    unreadable: Tensor
    """It cannot read its images."""


class Trainer(Engine):
    """Model, optimizer, loader and counters of one run, independent of any folder.

    A step is forward, backward, verdict, GEMA, clipping, AdamW. The verdict (loss, gate mass and gradient norm are
    finite) is a 0-dim tensor on the device, and if it is bad the same launches change nothing. So no step waits for its
    own verdict: the host reads it one step later on a GPU, at once on a CPU. Nothing else waits for the device either
    (tests/step), except plain-torch experts, which read group sizes on the host in every layer.
    """

    def __init__(self, plan: Plan):
        """At step 0; ``restore`` loads the checkpoint of the plan. Only the loader already starts there."""
        config, ranks = plan.config, plan.ranks
        super().__init__(ranks, plan.device, plan.precision)
        self.plan: Plan = plan
        self.config: Config = config
        self.modalities: tuple[str, ...] = plan.dataset.modalities
        self.steps: int = plan.steps
        self.loader: Loader = self._new_loader(plan.saved.state["data_position"] if plan.saved else 0)
        model = first_model(config)
        self.initial: LoadReport | None = load_initial(model, config) if config.model.init and not plan.saved else None
        """How the weights of ``model.init`` were loaded; None without them or when a checkpoint is resumed."""
        self.model: MaskedAutoencoder = model.to(self.device)
        self.net = self._prepare_model()
        """The model as called in training: wrapped in DDP or FSDP."""
        self.named_parameters: list[tuple[str, nn.Parameter]] = [
            (n, p) for n, p in self.model.named_parameters() if p.requires_grad
        ]
        self.parameters: list[nn.Parameter] = [p for _, p in self.named_parameters]
        self._schedule = Schedule(
            *(torch.zeros((), dtype=_SCHEDULE.get(name), device=self.device) for name in Schedule._fields)
        )
        """Values of this step as tensors on the device, since a CUDA graph would keep captured numbers."""
        self._flags = _Flags(*(torch.zeros((), dtype=torch.bool, device=self.device) for _ in _Flags._fields))
        self.optimizer: torch.optim.AdamW = self._new_optimizer()
        self.average: WeightAverage | None = (
            None if config.optim.ema is None else WeightAverage(self.model, config.optim.ema)
        )
        self.experts: list[int] = [e for e in per_layer(config.model.num_experts, config.model.depth) if e]
        self._unreadable: CorruptDataError | None = None
        self._evaluator = Evaluator(
            config,
            self.model,
            plan.train,
            plan.held_out,
            self.device,
            plan.precision,
            ranks,
            dataset=plan.dataset,
            steps=plan.steps,
        )
        self._agreement = Agreement(ranks, self.experts, len(self.modalities))
        self.window: Window = Window(self.modalities, self.experts, self.device)
        self._graph = self._new_graph()

    @property
    def epoch(self) -> float:
        return self.step / self.plan.batches_per_epoch

    def train_step(self) -> list[NonFinite]:
        """Take one step, and return the non-finite ones among the steps whose verdict has arrived.

        CorruptDataError: a rank could not read too many images. Every rank raises it with the names of those ranks and
        samples; ``step`` is the step that needed them, and nothing has changed since.
        """
        config = self.config
        values = schedule_at(config, self.step, self.steps)
        with self._waiting_for_data():
            batch, unreadable = self._next_batch()

        with self._local:
            keys = numbers.sample_keys(config.run.seed, self._to_device(batch.places))
            images = with_channels(self._to_device(batch.images), config.model.in_chans)
            images = augment(images, config.model.img_size, keys)
            modality = self._to_device(batch.modality)
            mask_noise, router_noise = self._noise(keys)
        for tensor, value in zip(self._schedule, values, strict=True):
            tensor.fill_(value)
        self._flags.stop.fill_(self.stop_requested)
        self._flags.unreadable.fill_(unreadable is not None)
        set_learning_rate(self.optimizer, self._schedule.lr, values.lr)
        # Here, so that a graph is captured without the gradients of the previous step in memory.
        self.optimizer.zero_grad(set_to_none=True)
        inputs = (images, modality, mask_noise, *router_noise)
        verdict, image_loss = self._graph(self._compute, *inputs) if self._graph else self._compute(*inputs)
        self._send(verdict, image_loss, batch.ids)
        return self._read_verdicts(keep=1 if self.device.type == "cuda" else 0)

    def _compute(
        self, images: Tensor, modality: Tensor, mask_noise: Tensor, *router_noise: Tensor
    ) -> tuple[Verdict, Tensor]:
        """Forward, backward, verdict, GEMA, clipping, AdamW and counts; returns the verdict and the loss of every
        image.

        It only launches work, the same in every step: the device reads what changes from the arguments, ``_schedule``
        and ``_flags``, and state (weights, moments, ``window``) is updated in place. So a CUDA graph of it can be
        replayed with another batch and other values.
        """
        config, values = self.config, self._schedule
        self.model.train()
        forward = contextlib.nullcontext() if config.parallel.strategy == "fsdp" else self._local
        parts = [slice(i, i + self.plan.micro_batch) for i in range(0, len(images), self.plan.micro_batch)]
        outs, totals = [], []
        # Checkpointing and fsdp release weights and copies between forward and backward.
        hold = len(parts) > 1 and config.parallel.strategy == "ddp" and not config.parallel.checkpointing
        over_batch = config.model.balance_over == "batch" and bool(self.experts)
        means = None
        with hold_weights(self.model) if hold else contextlib.nullcontext():
            if over_batch and len(parts) > 1:
                means = self._probabilities_before(images, parts, mask_noise, router_noise)
            for part in parts:
                with exchange(self.net, self.ranks, config.parallel.strategy, last=part is parts[-1]):
                    with forward, autocast(self.device, self.plan.precision):
                        out = self.net(
                            images[part],
                            mask_ratio=config.model.mask_ratio,
                            noise_std=values.noise_std,
                            mask_noise=mask_noise[part],
                            router_noise=[noise[part] for noise in router_noise] or None,
                        )
                    if over_batch:
                        means = means or self._agreed_means([out.probabilities], len(images))
                        balance = batch_balance(out.probabilities, means, config.model.depth)
                        out = out._replace(balance_loss=balance)
                    total = out.loss + values.align_weight * out.align_loss + values.balance_weight * out.balance_loss
                    share = total / len(parts)
                    (share if self.loss_scale is None else share * self.loss_scale.value).backward()
                outs.append(out), totals.append(total.detach())
        out = _merge(outs)

        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.loss_scale is not None:
            self.loss_scale.unscale_(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        total = torch.stack(totals).mean()
        losses = Losses(out.loss, total, out.align_loss, out.balance_loss, full(norm))
        verdict = self._agreement.reach(losses, out, modality, **self._flags._asdict())
        skip = ~verdict.good
        momentum, clip_norm = values.momentum, config.optim.clip_norm
        move(self.optimizer, self.model, verdict.gate_mass, momentum, norm, clip_norm, skip)
        if self.average is not None:
            self.average.update(verdict.good)
        if self.loss_scale is not None:
            self.loss_scale.update(verdict.good, skip & (verdict.unreadable == 0))
        self.window.count(verdict)
        return verdict, out.image_loss

    @torch.no_grad()
    def _probabilities_before(
        self, images: Tensor, parts: list[slice], mask_noise: Tensor, router_noise: Sequence[Tensor]
    ) -> list[Tensor]:
        """Mean probabilities of the batch, from an additional forward of every part, before the first backward."""
        probabilities = []
        for part in parts:
            with autocast(self.device, self.plan.precision):
                out = self.model(
                    images[part],
                    mask_ratio=self.config.model.mask_ratio,
                    noise_std=self._schedule.noise_std,
                    mask_noise=mask_noise[part],
                    router_noise=[noise[part] for noise in router_noise],
                )
            probabilities.append(out.probabilities)
        return self._agreed_means(probabilities, len(images))

    @torch.no_grad()
    def _agreed_means(self, of_parts: Sequence[Sequence[Tensor]], images: int) -> list[Tensor]:
        """``mean_probabilities`` of the whole batch, the same on all ranks, by one all-reduce."""
        means = mean_probabilities(of_parts, images)
        if self.ranks.world_size == 1:
            return means
        joined = torch.cat(means)
        torch.distributed.all_reduce(joined)
        return list((joined / self.ranks.world_size).split([mean.numel() for mean in means]))

    def close(self) -> None:
        """Stop the loader and release DDP or FSDP before the process group is destroyed."""
        self.loader.close()
        self.net: nn.Module = self.model
        self._graph = None
        # DistributedDataParallel is part of reference cycles. If it outlives its process group until Python ends, it
        # sometimes aborts the process.
        gc.collect()

    def row(self) -> dict[str, Any]:
        """A row of metrics: means since the last row, schedule of this step, load of experts; waits for the device."""
        means = self.window.read()
        values = schedule_at(self.config, self.step - 1, self.steps)
        return {
            "step": self.step,
            "epoch": self.epoch,
            **means.losses,
            "lr": values.lr,
            "momentum": values.momentum,
            "noise_std": values.noise_std,
            "align_weight": values.align_weight,
            "balance_weight": values.balance_weight,
            "skipped": means.skipped,
            "modality_loss": means.modality_loss,
            **self.window.load(),
            **({} if self.loss_scale is None else {"loss_scale": self.loss_scale.value.item()}),
        }

    def evaluate(self, pictures: int = 16) -> Evaluation | None:
        """Evaluate held-out images, see ``dex.analysis.evaluation.Evaluator``; all ranks call it."""
        return self._evaluator.evaluate(pictures)

    def evaluate_average(self) -> Evaluation | None:
        """``evaluate`` with the averaged weights, without pictures and probe; None if no average is kept."""
        if self.average is None:
            return None
        with self.average.in_place():
            return self._evaluator.evaluate(pictures=0, probe=False)

    def state(self) -> dict[str, Any]:
        """All state except tensors that the next step depends on, as JSON values; call ``flush`` first.

        Random numbers are functions of the seed and an image's place, so they have no state.
        """
        return {
            "step": self.step,
            "steps": self.steps,
            "config": to_dict(self.config),
            "precision": self.plan.precision,
            "data_fingerprint": self.plan.fingerprint,
            "data_position": self.step,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            **self.loss_spikes.state(),
            **self.window.state(),
            **({} if self.loss_scale is None else {"loss_scale": self.loss_scale.state()}),
        }

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from ``saved``, a checkpoint of this run, which ``dex.train.plan`` has checked."""
        averages = {} if self.average is None else self.average.tensors()
        complete = checkpoint.restore(saved, self.model, self.optimizer, self.named_parameters, averages)
        if self.average is not None and not complete:  # An override has turned optim.ema on
            self.average.start()
        self._graph = self._new_graph()  # The addresses of the moments have changed
        if self.loader.position != saved.state["data_position"]:
            self.loader.close()
            self.loader = self._new_loader(saved.state["data_position"])
        self._go_on_from(saved.state)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: weights, buffers, moments and averages, not copied."""
        averages = {} if self.average is None else self.average.tensors()
        return checkpoint.collect(self.model, self.optimizer, self.named_parameters) | averages

    def _new_loader(self, start_batch: int) -> Loader:
        config = self.config
        return Loader(
            self.plan.train,
            config.data.batch_size,
            seed=config.run.seed,
            temperature=config.data.temperature,
            num_workers=self.plan.num_workers,
            start_batch=start_batch,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )

    def _new_optimizer(self) -> torch.optim.AdamW:
        if not self.config.optim.fused:
            return adamw(self.config, self.named_parameters, self._schedule.lr)
        copies = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.plan.precision)
        return fused_adamw(self.config, self.model, self.named_parameters, self._schedule.lr, copies)

    def _new_graph(self) -> cuda_graph.StepGraph | None:
        if not self.config.parallel.cuda_graph:
            return None
        return cuda_graph.StepGraph(self.device, [*self.model.parameters(), *self.model.buffers()])

    def _prepare_model(self) -> torch.nn.Module:
        parallel, model = self.config.parallel, self.model
        for block in model.encoder.blocks:
            block.keeps_probabilities = self.config.model.balance_over == "batch"
        blocks = [*model.encoder.blocks, *model.decoder_blocks]
        model.encoder.checkpointing = parallel.checkpointing
        if parallel.compile:
            for block in blocks:
                block.compile()
        return spread(model, blocks, parallel.strategy, self.device) if self.ranks.world_size > 1 else model

    def _next_batch(self) -> tuple[Batch, CorruptDataError | None]:
        """This rank's part of the next batch. A single rank raises CorruptDataError.

        With several ranks the error is returned with black images, so that this rank still takes part in the
        collectives of the step. That step and all later ones change nothing on any rank, and all ranks learn of the
        error.
        """
        try:
            if self._unreadable is None:
                return next(self.loader), None
        except CorruptDataError as error:
            if self.ranks.world_size == 1:
                raise
            self._unreadable = error
        count, size = images_per_rank(self.config, self.ranks.world_size), self.plan.dataset.image_size
        black = torch.zeros(count, self.plan.dataset.channels, size, size, dtype=torch.uint8)
        nothing = torch.zeros(count, dtype=torch.int64)
        return Batch(black, nothing, ("",) * count, nothing), self._unreadable

    def _raise_unreadable(self) -> NoReturn:
        errors = gather(self.ranks, self._unreadable and str(self._unreadable))
        by_rank = "; ".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)
        raise CorruptDataError(f"step {self.step + 1}: {by_rank}", self.loader.corrupt)

    def _noise(self, keys: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Noise of each image for the mask ``[b, patches]`` and for every router ``[b, 1, E_l]``."""
        mask = numbers.uniform(keys, self.model.encoder.patches, _MASK_STREAM)
        router = [numbers.normal(keys, e, _ROUTER_STREAM + layer)[:, None] for layer, e in enumerate(self.experts)]
        return mask, router


def _merge(outs: list[MAEOutput]) -> MAEOutput:
    """Output of a batch from those of its equally large micro-batches, without what only backward needs."""
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
