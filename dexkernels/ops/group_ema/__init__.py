"""`group_ema_`: GEMA, the in-place update by which directors follow their experts."""

import torch
from torch import Tensor

from ...checks import check_momentum, check_skip, check_tensor, describe
from ...choices import BackendName
from .. import backends

BACKENDS = {"reference": "cpu", "triton": "triton", "cuda": "cuda"}
"""Backend -> the module of this folder that has its ``group_ema_``."""

STRIDED = "strided tensors"
LIMITS = {"cuda": {STRIDED: "its kernel takes directors, and experts one by one, that are contiguous"}}
"""Backend -> feature -> why the backend lacks it; plain torch is used, unless the backend is requested by name."""

backends.register("group_ema_", __name__, BACKENDS, LIMITS)


def group_ema_(
    directors: list[Tensor],
    experts: list[Tensor],
    group_weights: list[Tensor],
    momentum: float | Tensor,
    *,
    skip: Tensor | None = None,
    backend: BackendName | None = None,
) -> None:
    """GEMA: ``director <- m * director + (1 - m) * sum_e a_e * experts[e]``, in place, for any number of tensors.

    Args:
        directors: tensors of any shape, float32 or float64: in half precision a director would not move at m = 0.999.
        experts: one ``[E, *director.shape]`` per director.
        group_weights: one ``[E]`` per director, normalised gate mass. Weight 0 contributes nothing, whatever the expert
            holds; if all are 0, the director does not change.
        momentum: m, a float in [0, 1] or a 0-dim tensor.
        skip: 0-dim bool tensor; if true, nothing changes.

    Raises: ValueError naming the argument, before anything is changed.
    """
    for name, tensors in (("directors", directors), ("experts", experts), ("group_weights", group_weights)):
        if not isinstance(tensors, (list, tuple)):
            raise ValueError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
    if not len(directors) == len(experts) == len(group_weights):
        raise ValueError(
            f"experts, group_weights: expected one per director ({len(directors)}), "
            f"got {len(experts)} and {len(group_weights)}"
        )
    check_momentum(momentum)
    check_skip(skip)
    for i, (d, e, a) in enumerate(zip(directors, experts, group_weights, strict=True)):
        if not isinstance(d, Tensor) or d.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"directors[{i}]: expected float32 or float64 (half precision cannot follow), got {describe(d)}"
            )
        check_tensor(f"experts[{i}]", e, (None, *d.shape), like=d)
        check_tensor(f"group_weights[{i}]", a, (e.shape[0],), like=d, same_dtype=False)
    if not directors:
        return
    device = directors[0].device
    if not isinstance(momentum, Tensor):
        # A fill kernel, unlike a copy from the host, causes no wait. In float64, 1 - m is exact.
        momentum = torch.full((), momentum, dtype=torch.float64, device=device)
    if backend is None:
        dtypes, strided = {d.dtype for d in directors}, not all(map(_is_plain, directors, experts))
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        backend = backends.choose("group_ema_", None, device, STRIDED if strided else None, dtype)
    else:  # The backend itself raises for tensors that it cannot take.
        backend = backends.choose("group_ema_", backend, device)
    if torch.compiler.is_compiling():
        torch.ops.dexkernels.group_ema_(directors, experts, group_weights, momentum, skip, backend)
    else:
        # There is no gradient to record; the dispatcher would only add overhead to each step.
        with torch.no_grad():
            backends.load("group_ema_", backend).group_ema_(directors, experts, group_weights, momentum, skip)


def _is_plain(director: Tensor, experts: Tensor) -> bool:
    return director.is_contiguous() and (experts.is_contiguous() or experts[:1].is_contiguous())


@torch.library.custom_op("dexkernels::group_ema_", mutates_args=("directors",))
def _group_ema_(
    directors: list[Tensor],
    experts: list[Tensor],
    group_weights: list[Tensor],
    momentum: Tensor,
    skip: Tensor | None,
    backend: str,
) -> None:
    backends.load("group_ema_", backend).group_ema_(directors, experts, group_weights, momentum, skip)


@_group_ema_.register_fake
def _(directors, experts, group_weights, momentum, skip, backend):
    return None
