"""`adamw_ema_` in Triton against the specification in float64, in the interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

from dexkernels import reference  # noqa: E402
from dexkernels.ops.adamw_ema import adamw_ema_, triton  # noqa: E402
from dexkernels.ops.adamw_ema.records import Rule, Scalars, Update  # noqa: E402
from dexkernels.testing import relative_error  # noqa: E402

RULE = Rule(lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if torch.get_default_device().type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def make(shape, experts=None, copy=None, seed=0, weights=None, step=3.0) -> Update:
    generator = torch.Generator().manual_seed(seed)
    full = shape if experts is None else (experts, *shape)
    p, g, m, v = (torch.randn(full, generator=generator) for _ in range(4))
    if experts is None:
        return Update(p, g, m, v.square(), torch.tensor(step))
    weights = torch.rand(experts, generator=generator) if weights is None else torch.tensor(weights)
    copies = None if copy is None else torch.full((experts + 1, *shape), -1.0, dtype=copy)
    return Update(p, g, m, v.square(), torch.tensor(step), torch.randn(shape, generator=generator), weights, copies)


def clone(u: Update) -> Update:
    return Update(*(None if t is None else t.clone() for t in u))


def want(u: Update, momentum, clip, dtype) -> dict[str, torch.Tensor]:
    p, g, m, v, d = (None if t is None else t.to(dtype, copy=True) for t in (*u[:4], u.director))
    rule = {"lr": RULE.lr, "beta1": RULE.betas[0], "beta2": RULE.betas[1], "eps": RULE.eps}
    state = {"exp_avg": m, "exp_avg_sq": v, "step": u.step.clone()}
    weights = None if d is None else u.group_weights.to(dtype)
    reference.adamw_ema_(p, g, state, rule | {"weight_decay": RULE.weight_decay}, d, weights, momentum, clip)
    return {"parameter": p, "exp_avg": m, "exp_avg_sq": v} | ({} if d is None else {"director": d})


def check(got: Update, before: Update, momentum, clip) -> None:
    exact, near = (want(before, momentum, clip, dtype) for dtype in (torch.float64, torch.float32))
    for name, right in exact.items():
        bound = 2 * relative_error(near[name], right) + 4e-7
        assert relative_error(getattr(got, name), right) <= bound, name
    assert float(got.step) == float(before.step) + 1 and torch.equal(got.gradient, before.gradient)
    if got.copy is not None:
        assert torch.equal(got.copy[:-1], got.parameter.to(got.copy.dtype))
        assert torch.equal(got.copy[-1], got.director.to(got.copy.dtype))


@pytest.mark.parametrize("copy", [None, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [0.75, torch.tensor(0.999), torch.tensor(0.999, dtype=torch.float64)], ids=str)
def test_tensors_of_many_sizes(momentum, copy):
    updates = [make((5, 3), 4, copy), make((1100,), 1, copy, 1), make((1,), 3, copy, 2), make((7,), seed=3)]
    updates += [make((), seed=4), make((0,), 3, copy), make((2, 3, 4), seed=5, step=0.0)]
    before = [clone(u) for u in updates]
    adamw_ema_(updates, RULE, momentum=momentum, clip_scale=0.5, backend="triton")
    for got, old in zip(updates, before, strict=True):
        check(got, old, float(momentum), 0.5)


def test_more_updates_than_one_search_reads():
    updates = [make((3,), 2, seed=i) if i % 2 else make((4,), seed=i) for i in range(triton.SEARCH + 5)]
    before = [clone(u) for u in updates]
    adamw_ema_(updates, RULE, momentum=0.5, backend="triton")
    for got, old in zip(updates, before, strict=True):
        check(got, old, 0.5, 1.0)


@pytest.mark.parametrize("weights", [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], ids=["all to one", "no images"])
def test_experts_without_images(weights):
    update = make((5, 3), 3, torch.float16, weights=weights)
    update.parameter[0] = float("nan")
    before = clone(update)
    adamw_ema_([update], RULE, momentum=0.5, backend="triton")
    if any(weights):
        torch.testing.assert_close(update.director, 0.5 * before.director + 0.5 * before.parameter[1])
    else:
        assert torch.equal(update.director, before.director)
    assert torch.equal(update.copy[-1], update.director.half()) and update.parameter[1:].isfinite().all()


@pytest.mark.parametrize("skip", [True, False])
def test_skip_is_read_where_it_lies(skip):
    updates = [make((5, 3), 3, torch.float16), make((4,))]
    before = [clone(u) for u in updates]
    adamw_ema_(updates, RULE, momentum=0.5, skip=torch.tensor(skip), backend="triton")
    for got, old in zip(updates, before, strict=True):
        assert float(got.step) == 3 + (not skip)
        if not skip:
            check(got, old, 0.5, 1.0)
        else:
            assert all(torch.equal(a, b) for a, b in zip(got.moved, old.moved, strict=True))


def test_bits_do_not_depend_on_the_company():
    alone = make((1030,), 3, torch.float16)
    among = clone(alone)
    adamw_ema_([alone], RULE, momentum=0.5, backend="triton")
    adamw_ema_([make((9,), seed=4), make((1025,), 2, seed=5), among], RULE, momentum=0.5, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(alone.moved, among.moved, strict=True))


REFUSED = {
    "parameter: the kernel takes float32": lambda u: Update(*(t.double() if t.dim() else t for t in u[:5])),
    "exp_avg: the kernel takes contiguous": lambda u: u._replace(exp_avg=u.exp_avg.t().contiguous().t()),
}


@pytest.mark.parametrize("message", ["parameter: the kernel takes float32", "exp_avg: the kernel takes contiguous"])
def test_what_the_kernel_cannot_take_is_refused_or_left_to_plain_torch(message, monkeypatch):
    update = REFUSED[message](make((4, 3)))
    with pytest.raises(ValueError, match=rf"updates\[0\]\.{message}"):
        adamw_ema_([update], RULE, backend="triton")
    assert float(update.step) == 3
    from dexkernels.ops import backends

    monkeypatch.setattr(backends, "choose", lambda op, backend, device, dtype: "triton")
    other = make((4, 3), seed=1)
    before = [clone(update), clone(other)]
    adamw_ema_([update, other], RULE)
    for got, old in zip((update, other), before, strict=True):
        check(got, old, 1.0, 1.0)


def test_a_table_is_made_once():
    updates = [make((5, 3), 3)]
    triton._table.cache_clear()
    for _ in range(3):
        adamw_ema_(updates, RULE, momentum=0.5, backend="triton")
    assert triton._table.cache_info()[:2] == (2, 1)


def test_the_host_reads_no_value():
    """On meta tensors, which have none."""

    def meta(t):
        return None if t is None else torch.empty_like(t, device="meta")

    updates = [Update(*(meta(t) for t in make((5, 3), 3, torch.float16))), Update(*(meta(t) for t in make((4,))))]
    scalar = torch.empty((), device="meta")
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **kwargs: launched.append(kwargs)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(triton, "adamw_ema_kernel", Kernel())
        m.setattr(triton, "_table", lambda rows, device: triton.Table(scalar, 1, 3, scalar))
        skip = torch.empty((), dtype=torch.bool, device="meta")
        triton.adamw_ema_(updates, RULE._replace(lr=scalar), Scalars(scalar, scalar, skip))
    assert len(launched) == 2
