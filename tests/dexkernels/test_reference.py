"""The operators, with their own backwards, against the specification as one reads it, by autograd."""

import pytest
import torch

from dexkernels import align_loss, grouped_mlp, reference, route

B, N, D, H, E, K = 4, 3, 6, 10, 5, 2


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


@pytest.mark.parametrize("options", [{}, {"routing": "token"}, {"route_from": "mean"}])
@pytest.mark.parametrize("noise_std", [0.0, 0.7])
def test_route_and_grouped_mlp(options, noise_std):
    leaves = [draw(B, N, D), draw(E, D), draw(E, H, D), draw(E, H), draw(E, D, H), draw(E, D)]
    noise = {}
    if noise_std:
        rows = N if options.get("routing") == "token" else 1
        noise = {"noise_std": noise_std, "router_noise": draw(B, rows, E).detach(), "usage_ema": torch.rand(E).double()}
    grad_out, grad_gates = torch.randn(B, N, D).double(), None

    def run(route, grouped_mlp):
        nonlocal grad_gates
        x, router, *weights = leaves
        routing = route(x, router, K, **options, **noise)
        out = grouped_mlp(x, routing, *weights)
        grad_gates = torch.linspace(-1, 1, routing.gates.numel(), dtype=torch.float64).view(routing.gates.shape)
        loss = (out * grad_out).sum() + 0.7 * routing.balance_loss + (routing.gates * grad_gates).sum()
        return routing, out, torch.autograd.grad(loss, leaves)

    got, want = run(route, grouped_mlp), run(reference.route, reference.grouped_mlp)
    for name, a, b in zip(got[0]._fields, got[0], want[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=name)
    close(got[1], want[1])
    for a, b in zip(got[2], want[2], strict=True):
        assert b.abs().max() > 0
        close(a, b)


@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
def test_align_loss(kind):
    y, d = draw(B, N, D), draw(B, N, D).detach()
    got, want = align_loss(y, d, kind), reference.align_loss(y, d, kind)
    close(got, want)
    close(*(torch.autograd.grad(loss, y)[0] for loss in (got, want)))


def test_cosine_of_rows_near_zero():
    """About the floor of the norms, 1e-8, where the loss has a corner: its gradient is what autograd makes of it."""
    y, d = torch.randn(6, D).double(), torch.randn(6, D).double()
    y[:3] += d[:3]
    for i, norm in enumerate((1e-9, 0.9e-8, 1.1e-8)):
        y[i] *= norm / y[i].norm()
    y[3], d[4] = 0, 0
    d[5] *= 1e-9 / d[5].norm()
    y.requires_grad_()
    got, want = align_loss(y, d, "cosine"), reference.align_loss(y, d, "cosine")
    close(got, want)
    for a, b in zip(*(torch.autograd.grad(loss, y)[0] for loss in (got, want)), strict=True):
        close(a, b)
