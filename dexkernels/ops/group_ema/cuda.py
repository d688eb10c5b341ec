"""`group_ema_` by the native library: one launch without new tensors.

The library takes addresses and sizes; the tensors are checked here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import native

DEVICE_TYPE = "cuda"


class _Group(NamedTuple):
    """One director, its experts and their weights."""

    director: Tensor
    experts: Tensor
    weights: Tensor
    shadow: Tensor | None

    def row(self) -> tuple[int, ...]:
        """The arguments of ``group_ema_tensor`` in ``csrc/group_ema/group_ema.h``."""
        addresses = (t.data_ptr() for t in (self.director, self.experts, self.weights))
        shadow = 0 if self.shadow is None else self.shadow.data_ptr()
        return *addresses, shadow, self.director.numel(), self.experts.stride(0), self.experts.shape[0]


def group_ema_(
    directors: list[Tensor],
    experts: list[Tensor],
    group_weights: list[Tensor],
    momentum: float | Tensor,
    skip: Tensor | None = None,
    shadows: list[Tensor | None] | None = None,
) -> None:
    """`dexkernels.group_ema_` in one launch per device (up to 500 tensors), without waiting for it.

    Directors must be float32 and contiguous, and so must each ``experts[i][e]``; others are refused by name. Any E,
    any size and any alignment of 4 bytes is supported; addresses and expert strides that are multiples of 16 bytes
    are faster, with the same bits. Weights that are not float32 are converted first. Scalars on the device are read
    there; a float momentum is frozen into a CUDA graph.

    Args:
        shadows: per director a contiguous bfloat16 tensor of its shape, or None. Receives a copy of the new director
            in the same pass. If the director does not change (all weights 0, or skip), the shadow does not either.

    Raises: ValueError, before anything is changed; RuntimeError if the launch fails.
    """
    assert native.library is not None, native.why_not()
    shadows = [None] * len(directors) if shadows is None else shadows
    _check_layout(directors, experts, shadows)
    # Scalars on the host can be read without waiting for a GPU.
    if on_host(skip):
        if skip:
            return
        skip = None
    if on_host(momentum):
        momentum = float(momentum)
    groups = [_Group(*group) for group in zip(directors, experts, group_weights, shadows, strict=True)]
    for device in dict.fromkeys(d.device for d in directors):
        with torch.cuda.device(device):
            _launch(
                [group for group in groups if group.director.device == device],
                momentum.to(device) if isinstance(momentum, Tensor) else momentum,
                None if skip is None else skip.to(device),
                torch.cuda.current_stream(device).cuda_stream,
            )
    # The library bumps no version, so do it here: a backward that saved a director must see that it changed.
    torch.autograd.graph.increment_version([t for t in (*directors, *shadows) if t is not None])


def on_host(scalar: float | Tensor | None) -> bool:
    return isinstance(scalar, Tensor) and scalar.device.type == "cpu"


def _launch(groups: list[_Group], momentum: float | Tensor, skip: Tensor | None, stream: int) -> None:
    """Launch for one device. Converted copies may be freed after the launch: memory is reused in stream order."""
    groups = [group._replace(weights=group.weights.to(torch.float32).contiguous()) for group in groups]
    value, address, is_double = momentum, 0, False
    if isinstance(momentum, Tensor):
        if momentum.dtype not in (torch.float32, torch.float64):
            momentum = momentum.to(torch.float64)
        value, address, is_double = 0.0, momentum.data_ptr(), momentum.dtype == torch.float64
    native.library.group_ema_(
        rows=[group.row() for group in groups],
        momentum=value,
        momentum_at=address,
        momentum_is_double=is_double,
        skip_at=0 if skip is None else skip.data_ptr(),
        stream=stream,
    )


def _check_layout(directors: list[Tensor], experts: list[Tensor], shadows: list[Tensor | None]) -> None:
    """Check the requirements of this backend; the operator has checked its own before."""
    index_of = {}
    for i, (d, e, shadow) in enumerate(zip(directors, experts, shadows, strict=True)):
        if d.device.type != DEVICE_TYPE:
            raise ValueError(f"directors[{i}]: the cuda backend expects a tensor on a GPU, got {d.device}")
        if d.dtype != torch.float32:
            raise ValueError(f"directors[{i}]: the cuda backend updates torch.float32, got {d.dtype}")
        if not d.is_contiguous():
            raise ValueError(f"directors[{i}]: the cuda backend expects a contiguous tensor, got strides {d.stride()}")
        if not (e.is_contiguous() or e[0].is_contiguous()):
            raise ValueError(f"experts[{i}]: the cuda backend expects contiguous experts, got strides {e.stride()}")
        if shadow is not None:
            like = (torch.bfloat16, d.shape, d.device)
            if (shadow.dtype, shadow.shape, shadow.device) != like or not shadow.is_contiguous():
                raise ValueError(
                    f"shadows[{i}]: expected contiguous torch.bfloat16 {list(d.shape)} on {d.device}, "
                    f"got {shadow.dtype} {list(shadow.shape)} on {shadow.device} with strides {shadow.stride()}"
                )
        if d.numel() and index_of.setdefault(d.data_ptr(), i) != i:
            raise ValueError(
                f"directors[{i}]: expected distinct tensors in one launch, got directors[{index_of[d.data_ptr()]}]"
            )
