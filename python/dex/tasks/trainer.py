"""The fine-tuning step and all state that the next step depends on; it does not use the run folder.

Shape letters: B images of this rank.
"""

import contextlib
import gc
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from dex.analysis.evaluation import autocast
from dex.common.random import sample_keys, step_seed
from dex.common.ranks import Ranks, exchange, full, spread
from dex.config import Config, OptimConfig, ParallelConfig
from dex.tasks.augmentation import augment
from dex.tasks.losses import balanced, classification_loss, segmentation_loss
from dex.tasks.model import TaskModel, TaskOutput
from dex.tasks.recipe import Settings, to_dict
from dex.tasks.task import Task
from dex.tasks.task_dataset import TaskDataset
from dex.train import checkpoint
from dex.train.engine import Engine
from dex.train.optimizer import adamw, fused_adamw, move, set_learning_rate
from dex.train.schedules import learning_rate
from dex.train.verdict import Agreement, Losses, NonFinite
from dex.train.window import Window
from dexkernels import hold_weights


class TaskPlan(NamedTuple):
    """Everything about a fine-tuning, resolved once."""

    settings: Settings
    task: Task
    config: Config
    """The pretrained run's, with the image size of this model."""
    pretrained: dict[str, Any]
    """The pretrained run: name of its folder, step, hash of its checkpoint's manifest."""
    ranks: Ranks
    device: torch.device
    precision: str
    train: TaskDataset
    val: TaskDataset
    fingerprint: str
    """Hash of all training and validation data."""
    steps_per_epoch: int
    saved: checkpoint.Checkpoint | None = None
    """The checkpoint to resume from; None at step 0."""
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch


class _Computed(NamedTuple):
    """The results of a batch or micro-batch that the verdict needs."""

    gate_mass: list[Tensor]
    expert_indices: list[Tensor]
    image_loss: Tensor
    losses: tuple[Tensor, ...]
    """Means of loss, total, align loss and balance loss."""


class TaskTrainer(Engine):
    """Model, optimizer and counters of one fine-tuning, at step 0 until ``restore``.

    A step is the same as in pretraining: forward, backward, verdict, GEMA if enabled, clipping, AdamW; after a bad
    verdict the same launches change nothing. Images, augmentation and dropout are functions of seed and step, so a run
    resumes bit-for-bit, and the images of a step do not depend on the number of ranks.
    """

    def __init__(self, plan: TaskPlan, model: TaskModel):
        super().__init__(plan.ranks, plan.device, plan.precision)
        settings = plan.settings
        self.plan: TaskPlan = plan
        self.settings: Settings = settings
        self.steps: int = plan.steps
        self.model: TaskModel = model.to(plan.device)
        self.net: torch.nn.Module = self.model
        if plan.ranks.world_size > 1:
            self.net = spread(self.model, self.model.encoder.blocks, settings.strategy, plan.device)
        self.named_parameters: list[tuple[str, nn.Parameter]] = [
            (n, p) for n, p in self.model.named_parameters() if p.requires_grad
        ]
        self.parameters: list[nn.Parameter] = [p for _, p in self.named_parameters]
        self._lr = torch.zeros((), device=plan.device)
        self._momentum = torch.tensor(settings.momentum, dtype=torch.float64, device=plan.device)
        self.optimizer: torch.optim.AdamW = self._new_optimizer()
        experts = [layer.num_experts for layer in model.encoder.dex_layers] if settings.wants_aux else []
        self._agreement = Agreement(plan.ranks, experts, 1)
        self.window: Window = Window((plan.task.name,), experts, plan.device)
        weights = balanced(plan.train.counts) if settings.class_weights == "balanced" else None
        self._weights = None if weights is None else weights.to(plan.device)

    def _new_optimizer(self) -> torch.optim.AdamW:
        config = _as_config(self.plan)
        if not self.settings.fused:
            return adamw(config, self.named_parameters, self._lr)
        copies = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.plan.precision)
        return fused_adamw(config, self.model, self.named_parameters, self._lr, copies)

    @property
    def epoch(self) -> float:
        return self.step / self.plan.steps_per_epoch

    def learning_rate_at(self, step: int) -> float:
        s = self.settings
        return learning_rate(s.lr, step, self.steps, round(s.warmup_epochs * self.plan.steps_per_epoch))

    def train_step(self) -> list[NonFinite]:
        """Run one step; return the non-finite steps among those whose verdict has arrived."""
        settings, plan = self.settings, self.plan
        with self._waiting_for_data():
            ranks = self.ranks
            batch = plan.train.batch(self.step, settings.batch_size, settings.seed, ranks.rank, ranks.world_size)
        rate = self.learning_rate_at(self.step)
        self._lr.fill_(rate)
        set_learning_rate(self.optimizer, self._lr, rate)
        with self._local:
            keys = sample_keys(settings.seed, self._to_device(batch.places))
            targets = self._to_device(batch.targets)
            masks = targets if plan.task.kind == "segmentation" else None
            images, moved = augment(self._to_device(batch.images), masks, keys, settings, self.model.encoder.in_chans)
        torch.manual_seed(step_seed(settings.seed, self.step) ^ self.ranks.rank)  # For dropout
        verdict, image_loss = self._compute(images, targets if moved is None else moved)
        self._send(verdict, image_loss, batch.ids)
        return self._read_verdicts(keep=1 if self.device.type == "cuda" else 0)

    def _compute(self, images: Tensor, targets: Tensor) -> tuple[Any, Tensor]:
        settings = self.settings
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        size = settings.micro_batch or len(images)
        parts = [slice(i, i + size) for i in range(0, len(images), size)]
        # FSDP frees weights and their copies between forward and backward.
        hold = len(parts) > 1 and settings.strategy == "ddp"
        with hold_weights(self.model) if hold else contextlib.nullcontext():
            outs = []
            for part in parts:
                with exchange(self.net, self.ranks, settings.strategy, last=part is parts[-1]):
                    outs.append(self._backward(images[part], targets[part], 1 / len(parts)))
        out = _merge(outs)

        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.loss_scale is not None:
            self.loss_scale.unscale_(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        losses = Losses(*out.losses, full(norm))
        stop = torch.tensor(self.stop_requested, device=self.device)
        kinds = torch.zeros(len(images), dtype=torch.int64, device=self.device)
        verdict = self._agreement.reach(losses, out, kinds, stop, torch.zeros_like(stop))
        skip = ~verdict.good
        masses = verdict.gate_mass if settings.gema else []
        move(self.optimizer, self.model, masses, self._momentum, norm, settings.clip_norm, skip)
        if self.loss_scale is not None:
            self.loss_scale.update(verdict.good, skip)
        self.window.count(verdict)
        return verdict, out.image_loss

    def _backward(self, images: Tensor, targets: Tensor, share: float) -> "_Computed":
        """Forward and backward of a micro-batch, whose loss is weighted by ``share``."""
        settings = self.settings
        forward = contextlib.nullcontext() if settings.strategy == "fsdp" else self._local
        with forward, autocast(self.device, self.plan.precision):
            out = self.net(images, return_aux=settings.wants_aux)
        logits, aux = out if isinstance(out, TaskOutput) else (out, [])
        image_loss = self.image_loss(logits, targets)
        loss, zero = image_loss.mean(), image_loss.new_zeros(())
        depth = len(self.model.encoder.blocks)
        align = sum((a.align_loss / (depth - i) for i, a in enumerate(aux)), start=zero) / depth
        balance = sum((a.balance_loss for a in aux), start=zero) / depth
        total = loss + settings.align_weight * align + settings.balance_weight * balance
        (total * share if self.loss_scale is None else total * (share * self.loss_scale.value)).backward()
        losses = tuple(value.detach() for value in (loss, total, align, balance))
        masses, indices = [a.gate_mass for a in aux], [a.expert_indices for a in aux]
        return _Computed(masses, indices, image_loss.detach(), losses)

    def image_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The task's loss ``[B]``, without pretraining's losses."""
        loss = segmentation_loss if self.plan.task.kind == "segmentation" else classification_loss
        return loss(logits, targets, self._weights)

    def row(self) -> dict[str, Any]:
        """The row of means over the steps since the last row; waits for the device."""
        means = self.window.read()
        losses = {name: value for name, value in means.losses.items() if self.settings.wants_aux or name in _ROW}
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale.value.item()}
        lr = self.learning_rate_at(max(self.step - 1, 0))
        return {"step": self.step, "epoch": self.epoch, **losses, "lr": lr, "skipped": means.skipped, **scale}

    def state(self) -> dict[str, Any]:
        """Everything except weights and moments that the next step depends on, as JSON values. Call ``flush`` first."""
        return {
            "step": self.step,
            "steps": self.steps,
            "task": self.plan.task.name,
            "settings": to_dict(self.settings),
            "precision": self.plan.precision,
            "data_fingerprint": self.plan.fingerprint,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            **self.loss_spikes.state(),
            **self.window.state(),
            **({} if self.loss_scale is None else {"loss_scale": self.loss_scale.state()}),
        }

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        checkpoint.restore(saved, self.model, self.optimizer, self.named_parameters)
        self._go_on_from(saved.state)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors for ``checkpoint.Saver``, without a copy."""
        return checkpoint.collect(self.model, self.optimizer, self.named_parameters)

    def close(self) -> None:
        """Release DDP, before the process group is destroyed."""
        self.net = self.model
        gc.collect()

    def _raise_unreadable(self) -> NoReturn:
        raise AssertionError("cases are read before the first step")

    @contextlib.contextmanager
    def evaluating(self):
        """A context in which the model is in evaluation mode, without gradients."""
        self.model.eval()
        with torch.no_grad():
            yield self.model
        self.model.train()


_ROW = ("loss", "grad_norm")


def _merge(parts: list[_Computed]) -> _Computed:
    """The results of a batch from those of its micro-batches, which have equal sizes."""
    if len(parts) == 1:
        return parts[0]
    return _Computed(
        [torch.stack(masses).sum(0) for masses in zip(*(p.gate_mass for p in parts), strict=True)],
        [torch.cat(indices) for indices in zip(*(p.expert_indices for p in parts), strict=True)],
        torch.cat([p.image_loss for p in parts]),
        tuple(torch.stack(values).mean() for values in zip(*(p.losses for p in parts), strict=True)),
    )


def _as_config(plan: TaskPlan) -> Config:
    """The run's configuration with the settings' optimizer; with batch size 512, ``Config.peak_lr`` equals lr."""
    s = plan.settings
    optim = OptimConfig(base_lr=s.lr, weight_decay=s.weight_decay, clip_norm=s.clip_norm)
    parallel = ParallelConfig(strategy=s.strategy)
    return replace(plan.config, optim=optim, parallel=parallel, data=replace(plan.config.data, batch_size=512))
