"""`adamw_ema_` against the specification, and its contract: what is skipped, refused, and left as it is."""

import pytest
import torch

from dexkernels import reference
from dexkernels.ops.adamw_ema import adamw_ema_, cpu
from dexkernels.ops.adamw_ema.records import Rule, Update, rates
from dexkernels.testing import relative_error

RULE = Rule(lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)


def make(shape, experts=None, dtype=torch.float32, copy=None, seed=0, weights=None) -> Update:
    """experts: of a stack that a director follows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    if experts is None:
        return Update(draw(*shape), draw(*shape), draw(*shape), draw(*shape).square(), torch.tensor(3.0))
    stack = [draw(experts, *shape) for _ in range(4)]
    if weights is None:
        weights = torch.rand(experts, generator=generator)
    made = None if copy is None else torch.full((experts + 1, *shape), -1.0, dtype=copy)
    return Update(*stack[:3], stack[3].square(), torch.tensor(3.0), draw(*shape), torch.as_tensor(weights), made)


def clone(update: Update, dtype=None) -> Update:
    def one(name, t):
        as_it_is = t is None or dtype is None or name in ("step", "copy")
        return t if t is None else t.clone() if as_it_is else t.to(dtype, copy=True)

    return Update(**{name: one(name, t) for name, t in update._asdict().items()})


def want(update: Update, momentum=1.0, clip=1.0, dtype=torch.float64) -> Update:
    exact = clone(update, dtype)
    rule = {"lr": RULE.lr, "beta1": RULE.betas[0], "beta2": RULE.betas[1], "eps": RULE.eps}
    rule["weight_decay"] = RULE.weight_decay
    state = {"exp_avg": exact.exp_avg, "exp_avg_sq": exact.exp_avg_sq, "step": exact.step}
    reference.adamw_ema_(
        exact.parameter, exact.gradient, state, rule, exact.director, exact.group_weights, momentum, clip
    )
    return exact


def check(got: Update, exact: Update, near: Update, gradient: torch.Tensor) -> None:
    floor = 4e-7 if got.parameter.dtype == torch.float32 else 1e-14
    for name in ("parameter", "exp_avg", "exp_avg_sq", "director"):
        if getattr(got, name) is None:
            continue
        value, right, plain = (getattr(u, name) for u in (got, exact, near))
        bound = 2 * relative_error(plain, right) + floor
        assert relative_error(value, right) <= bound, name
    assert torch.equal(got.step, exact.step) and torch.equal(got.gradient, gradient)
    if got.copy is not None:
        assert torch.equal(got.copy[:-1], got.parameter.to(got.copy.dtype))
        assert torch.equal(got.copy[-1], got.director.to(got.copy.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (107,), (0,), (4, 8, 2)], ids=str)
@pytest.mark.parametrize("experts", [None, 1, 3, 8])
def test_values(shape, experts, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK", 100)
    updates = [make(shape, experts, dtype, torch.bfloat16 if experts == 3 else None), make((7,), None, dtype, seed=1)]
    before = [clone(u) for u in updates]
    adamw_ema_(updates, RULE, momentum=0.75, clip_scale=0.5)
    for got, old in zip(updates, before, strict=True):
        near = want(old, 0.75, 0.5, dtype)
        check(got, want(old, 0.75, 0.5), near, old.gradient)


@pytest.mark.parametrize("weights", [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], ids=["all to one", "no images"])
def test_experts_without_images(weights):
    """One that holds NaN has no part in the director; without any images it keeps its bits, and its copy is of them."""
    update = make((5, 3), 3, copy=torch.float16, weights=weights)
    update.parameter[0] = float("nan")
    before = clone(update)
    adamw_ema_([update], RULE, momentum=0.5)
    expected = before.director if not any(weights) else 0.5 * before.director + 0.5 * before.parameter[1]
    torch.testing.assert_close(update.director, expected, rtol=1e-6, atol=1e-6)
    assert any(weights) or torch.equal(update.director, before.director)
    assert torch.equal(update.copy[-1], update.director.half())
    assert update.parameter[0].isnan().all() and update.parameter[1:].isfinite().all()


@pytest.mark.parametrize("skip", [True, False])
def test_skip_leaves_every_bit_and_the_counters(skip):
    update = make((5, 3), 3, copy=torch.bfloat16)
    update.gradient[0, 0, 0] = float("nan")
    before = clone(update)
    adamw_ema_([update], RULE, momentum=0.5, clip_scale=torch.tensor(float("nan")), skip=torch.tensor(skip))
    same = [torch.equal(a, b) for a, b in zip(update.moved, before.moved, strict=True)]
    assert all(same) if skip else not any(same)
    assert float(update.step) == 3 + (not skip)


def test_tensors_that_are_not_contiguous():
    update = make((4, 6), 3, copy=torch.bfloat16)
    before = clone(update)
    strided = update._replace(
        parameter=update.parameter.mT.contiguous().mT, exp_avg=update.exp_avg.mT.contiguous().mT,
        gradient=update.gradient.mT.contiguous().mT, director=update.director.mT.contiguous().mT,
    )  # fmt: skip
    adamw_ema_([strided], RULE, momentum=0.75)
    check(strided, want(before, 0.75), want(before, 0.75, dtype=torch.float32), before.gradient)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor"])
@pytest.mark.parametrize("t", [1, 2, 1000, 200_000])
def test_rates_have_all_their_digits(lr, t):
    update = make((2,))._replace(step=torch.tensor(float(t)))
    (got,) = rates([update], RULE._replace(lr=lr, betas=(0.9, 0.999))).double().tolist()
    exact = (1 - 1e-2 * 0.1, 1e-2 / (1 - 0.9**t), (1 - 0.999**t) ** -0.5)
    assert all(abs(a / b - 1) < 2e-7 for a, b in zip(got, exact, strict=True))


def test_equal_to_torchs_adamw_over_many_steps():
    """Of ten steps, in its bits where the blocks are whole vectors."""
    parameter = torch.nn.Parameter(torch.randn(3, 64, 40, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW([parameter], 1e-2, (0.9, 0.99), 1e-6, 0.1, fused=True)
    zeros = [torch.zeros(3, 64, 40) for _ in range(2)]
    update = Update(
        parameter.detach().clone(), zeros[0], *[torch.zeros(3, 64, 40) for _ in range(2)], torch.tensor(0.0)
    )
    for i in range(10):
        gradient = torch.randn(3, 64, 40, generator=torch.Generator().manual_seed(i))
        parameter.grad = gradient.clone()
        optimizer.step()
        adamw_ema_([update._replace(gradient=gradient)], RULE)
    assert torch.equal(update.parameter, parameter.detach())


BAD = {
    "updates: expected a list of Update": lambda u: [tuple(u)],
    "updates\\[0\\].parameter: expected float32 or float64": lambda u: [u._replace(parameter=u.parameter.half())],
    "updates\\[0\\].gradient: expected shape": lambda u: [u._replace(gradient=u.gradient[:1])],
    "updates\\[0\\].exp_avg: expected torch.float32": lambda u: [u._replace(exp_avg=u.exp_avg.double())],
    "updates\\[0\\].exp_avg_sq: expected device cpu": lambda u: [u._replace(exp_avg_sq=u.exp_avg_sq.to("meta"))],
    "updates\\[0\\].step: expected a 0-dim float32": lambda u: [u._replace(step=torch.tensor(3))],
    "updates\\[0\\]: expected a director with": lambda u: [u._replace(group_weights=None)],
    "updates\\[0\\].director: expected shape": lambda u: [u._replace(director=u.director[:1])],
    "updates\\[0\\].copy: expected shape": lambda u: [u._replace(copy=u.copy[1:])],
    "updates\\[0\\].copy: expected contiguous bfloat16": lambda u: [u._replace(copy=u.copy.float())],
    "updates\\[1\\].parameter: expected device cpu": lambda u: [u, u._replace(parameter=u.parameter.to("meta"))],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_is_refused(message):
    update = make((5, 3), 3, copy=torch.bfloat16)
    before = clone(update)
    with pytest.raises(ValueError, match=message):
        adamw_ema_(BAD[message](update), RULE, momentum=0.5)
    assert all(torch.equal(a, b) for a, b in zip(update.moved, before.moved, strict=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"momentum": 2.0}, "momentum: expected a number in"),
        ({"skip": torch.tensor(1.0)}, "skip: expected a 0-dim bool"),
        ({"clip_scale": -1.0}, "clip_scale: expected a number >= 0"),
        ({"backend": "mps"}, "backend: expected one of"),
        ({"rule": RULE._replace(lr=-1.0)}, "rule.lr: expected a number >= 0"),
        ({"rule": RULE._replace(betas=(0.9, 1.0))}, "rule.betas\\[1\\]: expected a number in"),
        ({"rule": RULE._replace(eps=float("nan"))}, "rule.eps: expected a number >= 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        adamw_ema_([make((3,))], options.pop("rule", RULE), **options)


def test_nothing_to_do():
    adamw_ema_([], RULE, momentum=0.5)
