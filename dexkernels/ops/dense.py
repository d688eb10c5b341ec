"""The MLP with one set of weights in plain torch on any device: one expert, the director, the dense MLP of a ViT."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choices import ActivationName

ACTIVATIONS: dict[ActivationName, str] = {"gelu": "none", "gelu_tanh": "tanh"}
"""Activation of an MLP -> the ``approximate`` argument of torch's GELU: erf, or the tanh approximation."""

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, ``[..., K]``, ``[M, K]``, ``[M]``.

    Without gradient, float32 on a CPU uses oneDNN if torch has it: torch's own float32 products call MKL, which does
    not use the full vector width of some CPUs. oneDNN computes in full float32.
    """
    on_cpu = x.device.type == "cpu" and weight.dtype == x.dtype == torch.float32 and x.numel() > 0
    plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
    if on_cpu and plain and HAS_ONEDNN and torch.backends.mkldnn.enabled:
        # oneDNN takes a matrix or its transpose, and assumes a contiguous bias.
        x, weight = (
            t if t.is_contiguous() or (t.dim() == 2 and t.t().is_contiguous()) else t.contiguous() for t in (x, weight)
        )
        bias = bias if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
