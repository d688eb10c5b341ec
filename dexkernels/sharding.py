"""FSDP2 for models with DEX layers: `shard` cuts them so that the directors' update needs nothing from other ranks."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .layer import DEXLayer


def shard(
    model: nn.Module,
    mesh: "dist.DeviceMesh | None" = None,
    *,
    blocks: Iterable[nn.Module] | None = None,
    **options: Any,
) -> nn.Module:
    """``torch.distributed.fsdp.fully_shard`` of each block, then of ``model``, in place.

    Stacked experts are cut along dimension 1, their hidden or output features, and directors along dimension 0: each
    rank holds the same features of a director and of all its experts, and `update_directors` sends only gate masses.
    With torch's default, which cuts experts along dimension 0, every update sends all experts once. Call it after
    `upcycle_` and before building the optimizer; `update_directors` refuses an optimizer that was built earlier.

    Args:
        mesh: one dimension for FSDP; two, (replicate, shard), for HSDP. None: one dimension over all ranks.
        blocks: modules that are gathered as a unit. None: for each `DEXLayer` the innermost element of a
            `torch.nn.ModuleList` or `Sequential` that contains it, or the layer.
        options: options of ``fully_shard``, such as ``mp_policy``, ``offload_policy`` and ``reshard_after_forward``.

    Returns: ``model``.
    Raises: ValueError if torch.distributed is not initialised, ``model`` contains no DEX layer, is in DDP or already
    cut, or the ranks cannot cut a stacked tensor evenly.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    layers = {name: module for name, module in model.named_modules() if isinstance(module, DEXLayer)}
    if blocks is None and not layers:
        raise ValueError("model: expected at least one DEXLayer in it, got none; call upcycle_ first")
    _check_whole(model, layers)
    if not dist.is_initialized():
        raise ValueError("mesh: expected initialised ranks (torch.distributed.init_process_group), got none")
    if mesh is None:
        mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    if mesh.ndim not in (1, 2):
        raise ValueError(f"mesh: expected one dimension, or (replicate, shard), got {mesh.ndim}")
    if mesh.ndim == 2 and not mesh.mesh_dim_names:
        raise ValueError("mesh: expected names of its two dimensions, mesh_dim_names=('replicate', 'shard'), got none")
    stacked = {id(p) for layer in layers.values() for p in layer.experts.parameters()}
    for name, layer in layers.items():
        for part, p in layer.experts.named_parameters():
            check_cut(f"{name}.experts.{part}".lstrip("."), p.shape, mesh.size(mesh.ndim - 1))

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(1 if id(parameter) in stacked else 0)

    if blocks is None:
        blocks = dict.fromkeys(_block(model, name) for name in layers)
    whole = {name: list(layer.parameters()) for name, layer in layers.items()}
    for block in blocks:
        if block is not model:
            fully_shard(block, mesh=mesh, shard_placement_fn=place, **options)
    fully_shard(model, mesh=mesh, shard_placement_fn=place, **options)
    for name, layer in layers.items():
        layer.replaced.add(whole[name], "shard")
    return model


def _check_whole(model: nn.Module, layers: dict[str, DEXLayer]) -> None:
    """Raise ValueError for a model in DDP or already cut."""
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(f"{name or 'model'}: expected a model outside DDP, which shard replaces, got one inside")
    for name, layer in layers.items():
        if any(isinstance(p, DTensor) for p in layer.parameters()):
            raise ValueError(
                f"{name or 'model'}: expected a DEX layer that is not cut yet, got a cut one: call shard only once"
            )


def check_cut(name: str, shape: "torch.Size | tuple[int, ...]", ranks: int) -> None:
    """Raise ValueError if ``ranks`` cannot cut the stacked tensor ``name`` evenly along dimension 1."""
    if shape[1] % ranks:
        raise ValueError(
            f"{name}: expected dimension 1 of {list(shape)} to be a multiple of the {ranks} ranks that share it"
        )


def _block(model: nn.Module, name: str) -> nn.Module:
    """The unit that is gathered for the layer at ``name``: the innermost element of a list that contains it."""
    parts = name.split(".") if name else []
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), (nn.ModuleList, nn.Sequential)):
            return model.get_submodule(".".join(parts[:end]))
    return model.get_submodule(name)
