"""The recorded training steps of the published system through `DEXAdamW`, and through torch's AdamW and GEMA apart.

``replay`` takes the eight steps of ``mae_tiny_8_steps.safetensors`` and compares losses, gradient norms and every final
weight with the recorded ones, relative to the bounds of ``conformance.py``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import conformance
import torch
from torch import Tensor, nn

from dexkernels.optim import DEXAdamW

CASE = Path(__file__).parent / "mae_tiny_8_steps.safetensors"
BOUNDS = {torch.float64: (1e-10, 1e-7), torch.float32: (2e-3, 2e-3)}
"""dtype -> bounds of what was recorded in float64, and of final weights, which were recorded in float32."""
LOSS_SCALE = 1024.0
"""A power of two, by which nothing is rounded."""

Step = Callable[[nn.Module, torch.optim.AdamW, list[Tensor], float, Tensor], None]
"""One step of an optimizer: model, optimizer, gate masses, momentum of GEMA, factor of the gradients."""


class Replayed(NamedTuple):
    """What a replay found."""

    shares: dict[str, float]
    """Name of a tensor -> its relative error over its bound; inf for a wrong shape or a value that is not finite."""
    weights: dict[str, Tensor]
    """The final weights."""
    optimizer: torch.optim.AdamW

    def worst(self) -> float:
        return max(self.shares.values())


def fused(optimizer: type[DEXAdamW] = DEXAdamW, **options) -> tuple[Callable[..., torch.optim.AdamW], Step]:
    """`DEXAdamW` with ``options``: what builds it, and its step.

    No recorded gradient is long enough to be clipped, so the step gets gradients that are `LOSS_SCALE` times too long.
    """

    def step(model, optimizer, gate_mass, momentum, clip_scale):
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(LOSS_SCALE)
        optimizer.step(gate_mass=gate_mass, momentum=momentum, clip_scale=clip_scale / LOSS_SCALE)

    return lambda model, **rule: optimizer(model, **rule, **options), step


def apart(**options) -> tuple[Callable[..., torch.optim.AdamW], Step]:
    """`torch.optim.AdamW` with ``options`` after `update_directors` and clipping."""

    def build(model, **rule):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **rule, **options)

    def step(model, optimizer, gate_mass, momentum, clip_scale):
        model.update_directors(gate_mass, momentum)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(clip_scale)
        optimizer.step()

    return build, step


def replay(
    build: Callable[..., torch.optim.AdamW], step: Step, dtype: torch.dtype, between: Callable[..., None] | None = None
) -> Replayed:
    """The recorded steps in ``dtype``. between: called with model and optimizer after each step."""
    meta, t = conformance.load(CASE)
    rule, (exact, stored) = meta["optimizer"], BOUNDS[dtype]
    model = _with_weights(meta, t, "param.", dtype).train()
    hyper = {"betas": tuple(rule["betas"]), "eps": rule["eps"], "weight_decay": rule["weight_decay"]}
    optimizer, shares = build(model, lr=1.0, **hyper), {}
    for s in meta["schedule"]:
        name = f"step{s['step']}"
        noise = [t[f"{name}.router_noise.{layer}"].to(dtype) for layer in range(meta["config"]["depth"])]
        out = model(
            (t[f"{name}.images_u8"].float() / 255).to(dtype),
            mask_ratio=meta["mask_ratio"],
            noise_std=s["noise_std"],
            mask_noise=t[f"{name}.mask_noise"].to(dtype),
            router_noise=noise,
        )
        optimizer.zero_grad()
        (out.loss + meta["align_coeff"] * out.align_loss + meta["balance_coeff"] * out.balance_loss).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        values = {"loss_mae": out.loss, "loss_align": out.align_loss, "loss_balance": out.balance_loss}
        for key, value in (values | {"grad_norm": norm}).items():
            recorded = torch.tensor(s[key], dtype=torch.float64)
            shares[f"{name}.{key}"] = conformance.rel(value.reshape(()), recorded) / exact
        for group in optimizer.param_groups:
            group["lr"] = s["lr"]
        scale = (rule["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0)
        step(model, optimizer, out.gate_mass, s["decay"], scale)
        if between is not None:
            between(model, optimizer)
    final, weights = _with_weights(meta, t, "final.", dtype).state_dict(), model.state_dict()
    for name, recorded in final.items():
        if recorded.is_floating_point():
            shares[f"final.{name}"] = conformance.rel(weights[name], recorded) / stored
    return Replayed(shares, weights, optimizer)


def _with_weights(meta: dict, t: dict[str, Tensor], prefix: str, dtype: torch.dtype) -> nn.Module:
    model = conformance.build(meta, backend="reference").to(dtype)
    model.load_reference_state_dict({k: v.to(dtype) for k, v in conformance.sub(t, prefix).items()})
    return model
