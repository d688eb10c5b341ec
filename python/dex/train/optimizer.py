"""AdamW for a configuration: which parameters decay, and the learning rate of each depth."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dex.common.ranks import full
from dex.config import Config
from dexkernels.optim import DEXAdamW

_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")


def is_vector(name: str) -> bool:
    """Whether the parameter is a bias (also of experts), part of a norm, or a token."""
    owner, _, last = name.rpartition(".")
    return last.endswith(("bias", "_token")) or "norm" in owner.rpartition(".")[2]


def depth_of(name: str, depth: int) -> int:
    """0 before the encoder's blocks, 1 + i for block i, ``depth + 1`` for everything after."""
    if match := _BLOCK.match(name):
        return 1 + int(match[1])
    return 0 if name.startswith(("encoder.cls_token", "encoder.patch_embed")) else depth + 1


def parameter_groups(config: Config, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Groups for AdamW with equal weight decay and ``lr_scale``, the factor of the learning rate.

    ``lr_scale`` is ``optim.layer_decay`` to the power of the number of depths above, as in MAE and BEiT (Bao et al.
    2021). By default there is one group.
    """
    optim, depth = config.optim, config.model.depth
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decays = optim.decay_exclude == "none" or not is_vector(name)
        scale = optim.layer_decay ** (depth + 1 - depth_of(name, depth))
        groups.setdefault((optim.weight_decay if decays else 0.0, scale), []).append(parameter)
    return [{"params": p, "weight_decay": decay, "lr_scale": scale} for (decay, scale), p in groups.items()]


def adamw(config: Config, named: Iterable[tuple[str, nn.Parameter]], lr: Tensor) -> torch.optim.AdamW:
    """AdamW of the configuration. lr: 0-dim, on the device; on a GPU the groups with scale 1 read it."""
    optim, on_gpu = config.optim, lr.is_cuda
    optimizer = torch.optim.AdamW(
        parameter_groups(config, named),
        lr=config.peak_lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
        capturable=on_gpu,
    )
    if on_gpu:  # On a CPU the fused step would read a tensor again for every parameter
        for group in optimizer.param_groups:
            group["lr"] = lr if group["lr_scale"] == 1.0 else torch.zeros_like(lr)
    # Read by the fused step: if found_inf is 1, it leaves weights, moments and step counters unchanged.
    optimizer.grad_scale = None
    return optimizer


def fused_adamw(
    config: Config, model: nn.Module, named: Iterable[tuple[str, nn.Parameter]], lr: Tensor, copies: torch.dtype | None
) -> DEXAdamW:
    """``adamw`` that also updates the directors. copies: dtype of the experts' copies that it writes; None writes none.

    No copies are written where nothing would read them: with an average of the weights, which swaps them, and where
    every forward makes its own copies (fsdp, compile, CUDA graphs).
    """
    optim, parallel = config.optim, config.parallel
    if optim.ema is not None or parallel.strategy == "fsdp" or parallel.compile or parallel.cuda_graph:
        copies = None
    groups = parameter_groups(config, named)
    optimizer = DEXAdamW(model, groups, config.peak_lr, optim.betas, optim.eps, optim.weight_decay, copies=copies)
    if lr.is_cuda:
        for group in optimizer.param_groups:
            group["lr"] = lr if group["lr_scale"] == 1.0 else torch.zeros_like(lr)
    return optimizer


def move(
    optimizer: torch.optim.AdamW,
    model: nn.Module,
    gate_mass: list[Tensor],
    momentum: Tensor,
    norm: Tensor,
    clip_norm: float,
    skip: Tensor,
) -> None:
    """GEMA, clipping, AdamW. gate_mass, skip: summed over all ranks; if skip, nothing changes. norm: of the
    gradients."""
    if isinstance(optimizer, DEXAdamW):
        # The same factor as in torch.nn.utils.clip_grads_with_norm_.
        scale = (clip_norm / (full(norm) + 1e-6)).clamp(max=1.0)
        masses = {"gate_mass": gate_mass, "momentum": momentum} if gate_mass else {}
        optimizer.step(**masses, clip_scale=scale, skip=skip, process_group=False)
        return
    if gate_mass:
        model.update_directors(gate_mass, momentum, skip=skip, process_group=False)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    optimizer.found_inf = skip.float()
    optimizer.step()


def set_learning_rate(optimizer: torch.optim.AdamW, lr: Tensor, value: float) -> None:
    """Set every group to ``value`` times its scale. ``lr``, the tensor given to ``adamw``, already holds ``value``."""
    for group in optimizer.param_groups:
        rate = value * group["lr_scale"]
        if not isinstance(group["lr"], Tensor):
            group["lr"] = rate
        elif group["lr"] is not lr:
            group["lr"].fill_(rate)
