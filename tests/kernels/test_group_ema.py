"""GEMA against its formula in float64, in the interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

from dexkernels.ops.group_ema import triton as group_ema  # noqa: E402

SHAPES = [(5, 3), (301,), (16, 16), (1,), (64,), (7, 2, 9), (4, 20)]


@pytest.fixture(autouse=True)
def small_blocks(poison, monkeypatch):
    # Several blocks a tensor and rounds of the search at sizes that the interpreter can do.
    monkeypatch.setattr(group_ema, "BLOCK", 64)
    monkeypatch.setattr(group_ema, "SEARCH", 2)

    def tensor(rows, dtype):
        """The table with rows of zeros behind it: whoever reads past its end finds what looks like a tensor."""
        buffer = torch.zeros(len(rows) + 4, len(rows[0]), dtype=dtype)
        return buffer[: len(rows)].copy_(torch.tensor(rows, dtype=dtype))

    monkeypatch.setattr(group_ema.torch, "tensor", tensor)


def make(shapes=SHAPES, experts=(4,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    directors, stacks, weights = [], [], []
    for i, shape in enumerate(shapes):
        count = experts[i % len(experts)]
        directors.append(torch.randn(shape, generator=generator))
        stacks.append(torch.randn((count, *shape), generator=generator))
        w = torch.rand(count, generator=generator) + 0.1
        weights.append(w / w.sum())
    return directors, stacks, weights


def formula(director, stack, weights, m):
    total = m * director.double()
    for e, a in enumerate(weights.tolist()):
        if a != 0:
            total = total + (1 - m) * a * stack[e].double()
    return total


def plain(director, stack, weights, m):
    return m * director + (1 - m) * torch.einsum("e,e...->...", weights, stack)


def check(directors, stacks, weights, momentum, m=None, **kwargs):
    m = momentum if m is None else m
    before = [d.clone() for d in directors]
    addresses, versions = [d.data_ptr() for d in directors], [d._version for d in directors]
    group_ema.group_ema_(directors, stacks, weights, momentum, **kwargs)
    assert addresses == [d.data_ptr() for d in directors]
    assert all(d._version > v for d, v in zip(directors, versions, strict=True) if d.numel())
    for d, old, stack, w in zip(directors, before, stacks, weights, strict=True):
        want = formula(old, stack, w, m)
        # An element is right to the last places, also where much cancels.
        scale = m * old.double().abs() + (1 - m) * torch.einsum("e,e...->...", w.double(), stack.double().abs())
        assert ((d - want).abs() <= 4e-7 * scale).all()
        near = (plain(old, stack, w, m) - want).norm()
        assert (d - want).norm() <= 2 * near + 1e-7 * scale.norm()


@pytest.mark.parametrize("m", [0.0, 0.5, 0.99, 0.999, 1.0])
def test_all_tensors_in_one_call(m):
    check(*make(), m)


def test_another_number_of_experts_in_every_layer():
    check(*make(experts=(1, 3, 8, 20)), 0.9)


def test_tensors_of_a_layer_share_their_weights():
    directors, stacks, weights = make()
    check(directors, stacks, [weights[i // 4] for i in range(7)], 0.9)


def test_one_launch(monkeypatch):
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(grid)

    monkeypatch.setattr(group_ema, "group_ema_kernel", Kernel())
    group_ema.group_ema_(*make(), 0.9)
    assert launches == [(sum(-(-torch.Size(s).numel() // 64) for s in SHAPES),)]


def test_weight_zero_contributes_nothing():
    directors, stacks, weights = make()
    for stack, w, bad in zip(stacks, weights, [float("nan"), float("inf")] * 4, strict=False):
        w[1] = 0
        stack[1] = bad
    stacks_clean = [s.clone() for s in stacks]
    for s in stacks_clean:
        s[1] = 0
    before = [d.clone() for d in directors]
    group_ema.group_ema_(directors, stacks, weights, 0.9)
    group_ema.group_ema_(before, stacks_clean, weights, 0.9)
    for d, want in zip(directors, before, strict=True):
        assert torch.equal(d, want)


@pytest.mark.parametrize("skip", [True, False])
def test_skip_is_read_where_it_lies(skip):
    directors, stacks, weights = make()
    before = [d.clone() for d in directors]
    if skip:
        group_ema.group_ema_(directors, stacks, weights, 0.9, skip=torch.tensor(True))
        assert all(torch.equal(d, b) for d, b in zip(directors, before, strict=True))
    else:
        check(directors, stacks, weights, 0.9, skip=torch.tensor(False))


@pytest.mark.parametrize("experts", [4, 3])
def test_no_weight_at_all_keeps_the_bits(experts):
    directors, stacks, weights = make(experts=(experts,))
    directors[0][0, 0] = -0.0
    weights[0].zero_(), weights[3].zero_()
    before = [d.clone() for d in directors]
    group_ema.group_ema_(directors, stacks, weights, 0.9)
    for i, (d, b) in enumerate(zip(directors, before, strict=True)):
        assert torch.equal(d.view(torch.int32), b.view(torch.int32)) == (i in (0, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_momentum_on_the_device(dtype):
    check(*make(), torch.tensor(0.75, dtype=dtype), m=0.75)


def test_strides(layouts):
    """What is updated through a copy has a new address at every call, and no table of it is kept."""
    for layout in ("rows", "all"):
        directors, stacks, weights = make()
        before = group_ema._table.cache_info()
        check([layouts[layout](d) for d in directors], [layouts[layout](s) for s in stacks], weights, 0.9)
        assert group_ema._table.cache_info() == before


def test_experts_apart_but_whole():
    directors, stacks, weights = make()
    apart = [torch.full((8, *d.shape), float("nan")) for d in directors]
    for a, s in zip(apart, stacks, strict=True):
        a[::2] = s
    check(directors, [a[::2] for a in apart], weights, 0.9)


def test_addresses_that_are_not_aligned():
    directors, stacks, weights = make([(64,), (128,)])
    odd = [torch.full((d.numel() + 2,), float("nan"))[1:-1].copy_(d) for d in directors]
    check(odd, stacks, weights, 0.9)
    odd = [torch.full((s.numel() + 2,), float("nan"))[1:-1].view(s.shape).copy_(s) for s in stacks]
    check(directors, odd, weights, 0.9)


def test_values_are_read_at_every_call():
    directors, stacks, weights = make()
    check(directors, stacks, weights, 0.9)
    stacks[2].mul_(3)
    weights[1] = weights[1].flip(0)
    check(directors, stacks, weights, 0.8)


def test_experts_far_apart():
    # Experts 2^31 elements apart; the pages between are never touched.
    directors, stacks, weights = make([(70,)], experts=(2,))
    storage = torch.UntypedStorage(4 * (2**31 + 128))
    far = torch.tensor([]).set_(storage, 0, (2, 70), (2**31, 1)).copy_(stacks[0])
    check(directors, [far], weights, 0.9)


def test_nothing_to_do():
    group_ema.group_ema_([], [], [], 0.9)
    empty = torch.zeros(0, 3)
    directors, stacks, weights = make()
    check([empty, *directors], [empty.expand(4, 0, 3), *stacks], [weights[0], *weights], 0.9)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"^directors\[1\]: .*float64"):
        group_ema.group_ema_([torch.zeros(1), torch.zeros(1).double()], [None] * 2, [None] * 2, 0.9)
