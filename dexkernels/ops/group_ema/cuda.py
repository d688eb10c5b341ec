"""`group_ema_` by the native library: one launch, and no tensor of its own.

It takes addresses and sizes; what it reads and writes is checked here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import native

DEVICE_TYPE = "cuda"


class _Group(NamedTuple):
    """One director and what it follows."""

    director: Tensor
    experts: Tensor
    weights: Tensor
    shadow: Tensor | None

    def row(self) -> tuple[int, ...]:
        """As the library reads it: see ``group_ema_tensor`` in ``csrc/group_ema/group_ema.h``."""
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
    """`dexkernels.group_ema_` in one launch per device (up to 500 tensors), never waiting for it.

    Directors must be float32 and contiguous, and so must each ``experts[i][e]``; others are refused by name. Any E,
    any size, any alignment of 4 bytes; addresses and expert strides that are multiples of 16 bytes go faster, to the
    same bits. Weights that are not float32 are converted first. Scalars on the device are read there; a float momentum
    is frozen into a CUDA graph.

    Args:
        shadows: of each director a contiguous bfloat16 tensor of its shape, or None. Gets a copy of the new director
            in the same pass. Where the director keeps its bits (all weights 0, or skip) the shadow does too.

    Raises: ValueError, before anything is changed; RuntimeError when the launch fails.
    """
    assert native.library is not None, native.why_not()
    shadows = [None] * len(directors) if shadows is None else shadows
    _check_layout(directors, experts, shadows)
    # Scalars on the host can be read at once: no GPU is waited for.
    if on_host(skip):
        if skip:
            return
        skip = None
    if on_host(momentum):
        momentum = float(momentum)
    groups = [_Group(*of) for of in zip(directors, experts, group_weights, shadows, strict=True)]
    for device in dict.fromkeys(d.device for d in directors):
        with torch.cuda.device(device):
            _launch(
                [group for group in groups if group.director.device == device],
                momentum.to(device) if isinstance(momentum, Tensor) else momentum,
                None if skip is None else skip.to(device),
                torch.cuda.current_stream(device).cuda_stream,
            )
    # The library writes behind torch's back; a director that was saved for backward must still be known as changed.
    torch.autograd.graph.increment_version([t for t in (*directors, *shadows) if t is not None])


def on_host(scalar: float | Tensor | None) -> bool:
    return isinstance(scalar, Tensor) and scalar.device.type == "cpu"


def _launch(groups: list[_Group], momentum: float | Tensor, skip: Tensor | None, stream: int) -> None:
    """One device's part. Converted copies may be freed after the launch: their memory is reused in stream order."""
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
    """What this backend asks for beyond the checks of the operator, which come before."""
    seen = {}
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
        if d.numel() and seen.setdefault(d.data_ptr(), i) != i:
            raise ValueError(
                f"directors[{i}]: the same tensor as directors[{seen[d.data_ptr()]}]; one launch cannot do both"
            )
