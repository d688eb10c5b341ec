"""`opcheck` of the operators behind `route`."""

import pytest
import torch
from operator_cases import OPS, E, K, leaves, noise


@pytest.mark.parametrize("noisy", [False, True])
def test_opcheck_route(noisy):
    x, w, *_ = leaves()
    r = x[:, 0].detach().clone().requires_grad_()
    args = (r, w, noise() if noisy else None, torch.ones(E) if noisy else None, K, 0.5, "reference")
    torch.library.opcheck(OPS.route, args)
    p, gates, indices, balance, *_ = OPS.route(*args)
    backward = (torch.ones_like(gates), balance, p, gates, indices, r, w, 0.5, "reference")
    torch.library.opcheck(OPS.route_backward, tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in backward))
