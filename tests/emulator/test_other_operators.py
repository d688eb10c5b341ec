"""`route`, `align_loss` and `group_ema_` of Triton, compiled for sm_80 and sm_90a, against the specification."""

import pytest
import torch

ARCHITECTURES = (80, 90)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("arch", [80, slow(90)])
@pytest.mark.parametrize(
    "R, D, E, K, dtype",
    [
        (5, 40, 3, 2, torch.bfloat16),
        (70, 24, 8, 2, torch.float32),
        slow(130, 72, 20, 3, torch.float16),
        slow(40, 72, 33, 2, torch.bfloat16),
        slow(40, 72, 128, 2, torch.float32),
        slow(1, 8, 1, 1, torch.float32),
    ],
)
def test_route(shipped, arch, R, D, E, K, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(R, 1, D, generator=generator).to(dtype)
    weight, noise = (torch.randn(E, n, generator=generator) for n in (D, R))
    weight, noise = weight * 4 * D**-0.5, noise.mT.contiguous()
    grad_gates, grad_balance = torch.randn(R, K, generator=generator), torch.randn((), generator=generator)
    with shipped.emulated(arch):
        routed = shipped.route.forward(x[:, 0], weight, K, 0.5, noise)
        saved = shipped.route_records.Saved(routed.p, routed.gates, routed.expert_indices, x[:, 0], weight)
        grads = shipped.route.backward(grad_gates, grad_balance, saved, 0.5)
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    options = {"router_noise": noise[:, None].double() - 1, "usage_ema": torch.zeros(E), "noise_std": 1.0}
    want = shipped.reference.route(*leaves, K, **options)
    dx, dweight = torch.autograd.grad(
        (want.gates, want.balance_loss), leaves, (grad_gates.double(), grad_balance.double())
    )
    assert torch.equal(routed.expert_indices, want.expert_indices)
    for name in ("slot_order", "group_sizes", "group_offsets"):
        assert torch.equal(getattr(routed, name), getattr(want, name)), name
    half = 4e-3 if dtype == torch.bfloat16 else 6e-4 if dtype == torch.float16 else 2e-6
    for got, exact, bound in (
        (routed.gates, want.gates, 2e-6),
        (routed.balance_loss, want.balance_loss, 2e-6),
        (routed.gate_mass, want.gate_mass, 2e-6),
        (grads.r, dx[:, 0], half),
        (grads.router_weight, dweight, 2e-6),
    ):
        assert shipped.relative_error(got, exact) <= bound


@pytest.mark.parametrize("arch", [80, slow(90)])
@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
@pytest.mark.parametrize(
    "R, D, dtype",
    [
        (7, 40, torch.bfloat16),
        slow(9, 1100, torch.float32),
        slow(5, 33, torch.float16),
    ],
)
def test_align_loss(shipped, arch, kind, R, D, dtype):
    generator = torch.Generator().manual_seed(0)
    y, d = (3 * torch.randn(R, D, generator=generator).to(dtype) for _ in range(2))
    with shipped.emulated(arch):
        loss, saved = shipped.align_loss.forward(y, d, kind)
        grad = shipped.align_loss.backward(torch.tensor(1.5), y, d, saved, kind)

    def spec(precision):
        leaf = y.to(precision).requires_grad_()
        value = shipped.reference.align_loss(leaf, d.to(precision), kind)
        return value.detach(), torch.autograd.grad(1.5 * value, leaf)[0]

    exact, plain = spec(torch.float64), spec(dtype)
    for got, want, near in zip((loss, grad), exact, plain, strict=True):
        assert shipped.relative_error(got, want) <= 2 * shipped.relative_error(near, want) + 4e-7


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("momentum", [0.9, torch.tensor(0.75)], ids=["number", "tensor"])
def test_group_ema(shipped, arch, momentum):
    generator = torch.Generator().manual_seed(0)
    shapes, experts = [(5, 3), (4100,), (1,), (4, 20)], (4, 1, 3, 8)
    directors = [torch.randn(shape, generator=generator) for shape in shapes]
    stacks = [torch.randn((E, *s), generator=generator) for E, s in zip(experts, shapes, strict=True)]
    weights = [torch.rand(E, generator=generator) for E in experts]
    weights[0][1], stacks[0][1] = 0, float("nan")
    weights[2].zero_()
    want = [d.double() for d in directors]
    before = directors[2].clone()
    with shipped.emulated(arch, extra=(*directors, *stacks)):
        shipped.group_ema.group_ema_(directors, stacks, weights, momentum, torch.tensor(False))
    shipped.reference.group_ema_(want, [s.double() for s in stacks], [w.double() for w in weights], momentum)
    for got, exact in zip(directors, want, strict=True):
        assert shipped.relative_error(got, exact) <= 2e-7
    assert torch.equal(directors[2], before)


def test_group_ema_that_is_skipped(shipped):
    directors, stacks, weights = [torch.randn(70)], [torch.randn(2, 70)], [torch.rand(2)]
    before = directors[0].clone()
    with shipped.emulated(80, extra=(*directors, *stacks)) as emulator:
        shipped.group_ema.group_ema_(directors, stacks, weights, 0.5, torch.tensor(True))
    assert torch.equal(directors[0], before) and len(emulator.ran) == 1


@pytest.mark.slow
def test_every_barrier_of_route_is_needed_or_changes_nothing(shipped):
    """Of 31 barriers three are redundant in what Triton 3.6 compiles: the others' absence is a race that is named."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(70, 24, generator=generator), torch.randn(8, 24, generator=generator)

    def forward(change):
        with shipped.emulated(80, change=change):
            return shipped.route.forward(x, weight, 2, 0.5, None)

    texts = []
    want = forward(lambda name, ptx: texts.append(ptx) or ptx)
    lines = texts[0].split("\n")
    barriers = [i for i, line in enumerate(lines) if line.strip().startswith("bar.sync")]
    redundant = 0
    for i in barriers:
        try:
            got = forward(lambda name, ptx, i=i: "\n".join(lines[:i] + lines[i + 1 :]))
        except shipped.PTXError as error:
            assert "race on" in str(error)
        else:
            redundant += 1
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert redundant <= 3 < len(barriers)
