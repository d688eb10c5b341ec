"""The MLP with one set of weights in plain torch on any device: one expert, the director, the dense MLP of a ViT."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..choices import ActivationName
from . import products

ACTIVATIONS: dict[ActivationName, str] = {"gelu": "none", "gelu_tanh": "tanh"}
"""Activation of an MLP -> the ``approximate`` argument of torch's GELU: erf, or the tanh approximation."""


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    activation: ActivationName = "gelu",
) -> Tensor:
    """``fc2(gelu(fc1(x)))``, by default with the exact (erf) GELU: one expert, the director, or the MLP of a ViT."""
    z = linear(x.contiguous(), fc1_weight, fc1_bias)
    return linear(F.gelu(z, approximate=ACTIVATIONS[activation]), fc2_weight, fc2_bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` that computes by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, ``[..., K]``, ``[M, K]``, ``[M]``, with a gradient.

    float32 on a CPU is computed by oneDNN where `products` prefers it; it computes in full float32.
    """
    if not _by_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Product.apply(x, weight, bias)
    return _onednn(x, weight, bias)


def linear_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """``out[:] = x @ weight.T``, ``[N, M]``, ``[N, K]``, ``[M, K]``, without a gradient.

    torch's products write into ``out`` itself, which saves a matrix and a copy; oneDNN's cannot.
    """
    if out.dtype == x.dtype and not _by_onednn(x, weight, None):
        torch.mm(x, weight.t(), out=out)
    else:
        out.copy_(linear(x, weight))


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or not products.uses_onednn() or not torch.backends.mkldnn.enabled:
        return False
    if not x.dtype == weight.dtype == torch.float32 or x.device.type != "cpu" or not x.numel() or x.dim() < 2:
        return False
    if torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    # Subclasses, such as DTensor, and tensors of torch.func have operators of their own, as has forward-mode autograd.
    plain = all(t is None or type(t) is Tensor or issubclass(type(t), nn.Parameter) for t in (x, weight, bias))
    return plain and torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # oneDNN takes a matrix or its transpose, and assumes a contiguous bias.
    x, weight = (
        t if t.is_contiguous() or (t.dim() == 2 and t.t().is_contiguous()) else t.contiguous() for t in (x, weight)
    )
    bias = bias if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """`linear` by oneDNN. Its backward is made of `linear`, so that it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            linear(grad, weight.t()) if for_x else None,
            linear(rows.t(), x.reshape(-1, x.shape[-1]).t()) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )
