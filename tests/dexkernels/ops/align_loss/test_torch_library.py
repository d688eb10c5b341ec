"""`opcheck` of the operators behind `align_loss`."""

import pytest
import torch
from operator_cases import OPS, B, D, N


@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
def test_opcheck_align_loss(kind):
    y, d = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True), torch.randn(B, N, D, dtype=torch.float64)
    torch.library.opcheck(OPS.align_loss, (y, d, kind, "reference"))
    torch.library.opcheck(
        OPS.align_loss_backward, (torch.ones(()).double(), y.detach(), d, y.new_empty(0, B * N), kind, "reference")
    )
