"""`align_loss`: the distance of the experts' output from the director's."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import FLOATS, check_choice, check_mask, check_tensor, check_transforms, describe
from ...choices import KINDS, AlignKind, BackendName
from .. import backends
from ..common import accumulation_dtype, gradients, without_autocast

BACKENDS = {"reference": "cpu", "triton": "triton"}
"""Backend -> the module of this folder that has its ``forward`` and ``backward``."""

SAVED = {"reference": {"kd": 0, "cosine": 0, "mse": 0}, "triton": {"kd": 3, "cosine": 3, "mse": 0}}
"""Backend -> kind -> numbers that its forward saves per row for its backward."""

LIMITS = {"triton": {"token_mask": "its kernel takes the mean over all rows"}}
"""Backend -> feature -> why the backend lacks it; plain torch is used, unless the backend is requested by name."""

backends.register("align_loss", __name__, BACKENDS, LIMITS)


def align_loss(
    experts_out: Tensor,
    director_out: Tensor,
    kind: AlignKind = "kd",
    *,
    token_mask: Tensor | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """Distance of the experts' output from the director's, a 0-dim mean over all leading dimensions.

    - ``kd``: ``q = softmax(experts_out)``, ``p = softmax(director_out / 0.5)``; ``-sum_D p * log(max(q, 1e-6))``.
    - ``cosine``: ``1 - cos`` along D, the paper's Eq. 7.
    - ``mse``: mean squared difference.

    Args:
        experts_out, director_out: ``[..., D]``, same shape; no gradient flows into director_out.
        token_mask: bool ``[...]``, true for the rows that enter the mean, which is 0 without any. None: all rows.

    Returns: 0-dim, float32 for half-precision inputs. Raises: ValueError naming the argument.
    """
    check_choice("kind", kind, KINDS)
    check_transforms(experts_out, director_out)
    if not isinstance(experts_out, Tensor) or experts_out.dim() < 1 or experts_out.dtype not in FLOATS:
        raise ValueError(f"experts_out: expected a floating-point tensor [..., D], got {describe(experts_out)}")
    check_tensor("director_out", director_out, tuple(experts_out.shape), like=experts_out, same_dtype=False)
    if token_mask is not None:
        check_mask("token_mask", token_mask, tuple(experts_out.shape[:-1]), experts_out)
    feature = None if token_mask is None else "token_mask"
    backend = backends.choose("align_loss", backend, experts_out.device, feature, experts_out.dtype)
    loss, _ = torch.ops.dexkernels.align_loss(experts_out, director_out.detach(), token_mask, kind, backend)
    return loss


class _Inputs(NamedTuple):
    """The arguments of the operator, in the order of its schema."""

    experts_out: Tensor
    director_out: Tensor
    token_mask: Tensor | None
    kind: str
    backend: str


@torch.library.custom_op("dexkernels::align_loss", mutates_args=())
def _align_loss(
    experts_out: Tensor, director_out: Tensor, token_mask: Tensor | None, kind: str, backend: str
) -> tuple[Tensor, Tensor]:
    with without_autocast(experts_out.device):
        return backends.load("align_loss", backend).forward(experts_out, director_out, kind, *_given(token_mask))


def _given(token_mask: Tensor | None) -> tuple[Tensor, ...]:
    """The optional argument, which only backends with a token mask accept, see `LIMITS`."""
    return () if token_mask is None else (token_mask,)


@_align_loss.register_fake
def _(experts_out, director_out, token_mask, kind, backend):
    dtype = accumulation_dtype(experts_out.dtype)
    rows = experts_out[..., 0].numel() if experts_out.shape[-1] else 0
    return experts_out.new_empty((), dtype=dtype), experts_out.new_empty((SAVED[backend][kind], rows), dtype=dtype)


@torch.library.custom_op("dexkernels::align_loss_backward", mutates_args=())
def _align_loss_backward(
    grad_loss: Tensor,
    experts_out: Tensor,
    director_out: Tensor,
    saved: Tensor,
    token_mask: Tensor | None,
    kind: str,
    backend: str,
) -> Tensor:
    launch = backends.load("align_loss", backend).backward
    with without_autocast(experts_out.device):
        return launch(grad_loss, experts_out, director_out, saved, kind, *_given(token_mask))


@_align_loss_backward.register_fake
def _(grad_loss, experts_out, director_out, saved, token_mask, kind, backend):
    return experts_out.new_empty(experts_out.shape)


def _save(ctx, inputs, output):
    given = _Inputs(*inputs)
    _, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.kind, ctx.backend = given.kind, given.backend
    ctx.save_for_backward(given.experts_out, given.director_out, saved, given.token_mask)


def _backward(ctx, grad_loss, _):
    grad = torch.ops.dexkernels.align_loss_backward(grad_loss, *ctx.saved_tensors, ctx.kind, ctx.backend)
    return gradients(_Inputs, experts_out=grad)


_align_loss.register_autograd(_backward, setup_context=_save)
