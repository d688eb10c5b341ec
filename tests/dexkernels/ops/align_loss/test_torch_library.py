"""`opcheck` of the operators behind `align_loss`."""

import pytest
import torch
from operator_cases import OPS, B, D, N


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
def test_opcheck_align_loss(kind, masked):
    mask = torch.arange(B * N).view(B, N) % 3 > 0 if masked else None
    y, d = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True), torch.randn(B, N, D, dtype=torch.float64)
    torch.library.opcheck(OPS.align_loss, (y, d, mask, kind, "reference"))
    backward = (torch.ones(()).double(), y.detach(), d, y.new_empty(0, B * N), mask, kind, "reference")
    torch.library.opcheck(OPS.align_loss_backward, backward)
