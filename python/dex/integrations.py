"""A callback for the Hugging Face Trainer. Needs transformers."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dex.train.schedules import cosine
from dexkernels import AuxCollector, collect_aux


class DEXCallback(TrainerCallback):
    """Trains the DEX layers of a model under ``transformers.Trainer``: noise, auxiliary losses, directors.

        dexkernels.upcycle_(model, num_experts=8, top_k=2)
        Trainer(model, args, train_dataset=data, callbacks=[DEXCallback()]).train()

    Every training forward adds ``align * align_loss + balance * balance_loss`` to the loss that the model returns,
    scaled as the Trainer scales the loss of a micro-batch. The directors are updated once per step, between backward
    and the optimizer, with the gate masses of all micro-batches and ranks.

    Args:
        align, balance: weights of the two losses.
        momentum, noise_std: (first, last) value of half a cosine over the steps of the run.

    The model must return its loss: label smoothing and ``compute_loss_func``, which compute it outside, are refused,
    and so are ``torch_compile`` and ``use_reentrant=True``. Under DDP set ``ddp_broadcast_buffers=False``.
    Raises: ValueError naming the argument.
    """

    def __init__(
        self,
        align: float = 0.01,
        balance: float = 0.01,
        momentum: tuple[float, float] = (0.99, 0.999),
        noise_std: tuple[float, float] = (1.0, 0.0),
    ):
        for name, (first, last), top in (("momentum", momentum, 1.0), ("noise_std", noise_std, float("inf"))):
            if not (0 <= first <= top and 0 <= last <= top):
                raise ValueError(f"{name}: expected (first, last) in [0, {top}], got {(first, last)}")
        self.align: float = align
        self.balance: float = balance
        self.momentum: tuple[float, float] = momentum
        self.noise_std: tuple[float, float] = noise_std
        self._aux: AuxCollector | None = None
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        if args.torch_compile:
            raise ValueError("args.torch_compile: expected False with DEXCallback, got True")
        self._noise = torch.zeros((), device=next(model.parameters()).device)
        self._aux = collect_aux(model, self._noise)
        self._args = args
        self._remove_hooks()  # Left by an interrupted training
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward),
            # Also called after an error, so that the collector is always closed
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._noise.fill_(cosine(*self.noise_std, state.global_step, state.max_steps))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._aux.update_directors(cosine(*self.momentum, state.global_step, state.max_steps))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._remove_hooks()
        self._aux = None

    def _before_forward(self, model, inputs):
        if model.training:
            self._aux.__enter__()

    def _after_forward(self, model, inputs, kwargs, outputs):
        if not model.training:
            return outputs
        if outputs is None:  # The forward raised an error
            self._aux.__exit__(RuntimeError, None, None)
            return None
        self._aux.__exit__(None, None, None)
        if not isinstance(outputs, dict) or outputs.get("loss") is None:
            raise ValueError(
                "model: expected outputs with a loss in training (no label smoothing, no compute_loss_func), got none"
            )
        outputs["loss"] = outputs["loss"] + self._scale(kwargs) * self._aux.losses(self.align, self.balance)
        return outputs

    def _scale(self, kwargs) -> float:
        """Factor of the auxiliary losses: 1 if the model returns the mean loss of its batch. A model that receives the
        step's number of items, over all micro-batches and ranks, returns a share of the step's loss instead."""
        if kwargs.get("num_items_in_batch") is None:
            return 1.0
        ranks = self._args.world_size if self._args.average_tokens_across_devices else 1
        return 1.0 / (self._args.gradient_accumulation_steps * ranks)

    def _remove_hooks(self):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
