"""`dexkernels.group_ema_` and `update_director` against a loop over numbers in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dexkernels import DEXLayer, group_ema_
from dexkernels.layer import update_directors
from dexkernels.ops.group_ema import cpu
from dexkernels.testing import randomize_


def bits(t):
    """The tensor's bits, so that NaN equals itself and -0.0 differs from 0.0."""
    return t.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]).clone()


def same_bits(a, b):
    return torch.equal(bits(a), bits(b))


def snapshot(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def assert_unchanged(module, before):
    now = module.state_dict()
    assert now.keys() == before.keys()
    assert [k for k in now if not same_bits(now[k], before[k])] == []


def by_hand(director, experts, weights, m):
    d = director.double().cpu().numpy()
    e, a = experts.double().cpu().numpy(), weights.double().cpu().numpy()
    mean = np.zeros_like(d)
    for i in range(len(a)):
        if a[i] != 0:
            mean = mean + a[i] * e[i]
    return torch.as_tensor(np.asarray(m * d + (1 - m) * mean))


def problem(shape=(5, 3), E=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    d, e = torch.randn(shape, generator=g, dtype=dtype), torch.randn(E, *shape, generator=g, dtype=dtype)
    a = torch.rand(E, generator=g, dtype=dtype)
    return d, e, a / a.sum()


def on_device(directors, experts, weights, m, *, skip=None):
    """The form that a GPU takes, run on CPU tensors."""
    with torch.no_grad():
        for d, e, a in zip(directors, experts, weights, strict=True):
            cpu.on_device_(d, e, a, m, skip)


FORMS = pytest.mark.parametrize("form", [group_ema_, on_device], ids=["host", "device"])


@FORMS
@pytest.mark.parametrize("m", [0.0, 0.3, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value(form, m, dtype):
    d, e, a = problem(dtype=dtype)
    want = by_hand(d, e, a, m)
    form([d], [e], [a], m)
    torch.testing.assert_close(d.double(), want, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


@FORMS
def test_many_tensors_of_many_shapes(form):
    shapes = [((5, 3), 4), ((7,), 2), ((), 3), ((2, 1, 3), 1), ((0, 4), 2)]
    problems = [problem(shape, E, i) for i, (shape, E) in enumerate(shapes)]
    wants = [by_hand(d, e, a, 0.9) for d, e, a in problems]
    form(*(list(column) for column in zip(*problems, strict=True)), 0.9)
    for (d, _, _), want in zip(problems, wants, strict=True):
        torch.testing.assert_close(d, want, rtol=1e-13, atol=1e-14)


@FORMS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_expert_of_weight_zero_contributes_nothing(form, bad):
    d, e, a = problem()
    a[1] = 0
    a = a / a.sum()
    e[1] = bad
    want = by_hand(d, e, a, 0.9)
    form([d], [e], [a], 0.9)
    assert d.isfinite().all()
    torch.testing.assert_close(d, want, rtol=1e-13, atol=1e-14)


@FORMS
def test_an_expert_in_use_shows_its_nan(form):
    d, e, a = problem()
    e[1, 0, 0] = float("nan")
    form([d], [e], [a], 0.9)
    assert d.isnan().sum() == 1 and d[0, 0].isnan()


@FORMS
@pytest.mark.parametrize("why", ["weights", "skip", "both"])
def test_nothing_changes(form, why):
    d, e, a = problem(dtype=torch.float32)
    d[0, 0], d[1, 1], e[2, 0, 1] = -0.0, float("nan"), float("inf")
    before = d.clone()
    if why != "skip":
        a = torch.zeros_like(a)
    form([d], [e], [a], 0.5, skip=None if why == "weights" else torch.tensor(True))
    assert same_bits(d, before)


@FORMS
def test_false_skip_is_no_skip(form):
    d, e, a = problem()
    want = by_hand(d, e, a, 0.5)
    form([d], [e], [a], 0.5, skip=torch.tensor(False))
    torch.testing.assert_close(d, want, rtol=1e-13, atol=1e-14)


@FORMS
def test_momentum_as_tensor(form):
    one, e, a = problem()
    two = one.clone()
    form([one], [e], [a], 0.875)
    form([two], [e], [a], torch.tensor(0.875))
    assert same_bits(one, two)


@pytest.mark.parametrize("m", [torch.tensor(0.996), torch.tensor(0.996, dtype=torch.float64)])
def test_device_form_equals_host_form(m):
    one, e, a = problem((300, 7), dtype=torch.float32)
    two, a = one.clone(), a.clone()
    a[0] = 0
    group_ema_([one], [e], [a], m)
    on_device([two], [e], [a], m)
    torch.testing.assert_close(one, two, rtol=3e-7, atol=3e-8)
    assert not torch.allclose(one, problem((300, 7), dtype=torch.float32)[0], rtol=1e-4)


@pytest.mark.parametrize("excess", [-1, 0, 1, 5, 64])
def test_chunks_do_not_show(monkeypatch, excess):
    whole, e, a = problem((128 + excess,), dtype=torch.float32)
    chunked = whole.clone()
    group_ema_([whole], [e], [a], 0.9)
    monkeypatch.setattr(cpu, "CHUNK", 64)
    group_ema_([chunked], [e], [a], 0.9)
    torch.testing.assert_close(whole.double(), by_hand(problem((128 + excess,), dtype=torch.float32)[0], e, a, 0.9))
    assert same_bits(whole, chunked)


@FORMS
@pytest.mark.parametrize("which", ["director", "experts", "both"])
def test_strided_tensors(form, which):
    d, e, a = problem((6, 4))
    want = by_hand(d, e, a, 0.8)
    if which != "experts":
        d = d.t().contiguous().t()
    if which != "director":
        e = torch.stack([e, e + 1], -1)[..., 0]
    assert not (d.is_contiguous() and e.is_contiguous())
    form([d], [e], [a], 0.8)
    torch.testing.assert_close(d, want, rtol=1e-13, atol=1e-14)


@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    E=st.integers(1, 5),
    m=st.floats(0, 1),
    zeros=st.integers(0, 31),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_drawn(shape, E, m, zeros, seed):
    d, e, a = problem(tuple(shape), E, seed)
    for i in range(E):
        if zeros >> i & 1:
            a[i] = 0
            e[i] = float("nan")
    want, before = by_hand(d, e, a, m), d.clone()
    group_ema_([d], [e], [a], m)
    if a.count_nonzero():
        torch.testing.assert_close(d, want, rtol=1e-12, atol=1e-13)
    else:
        assert same_bits(d, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_director_is_refused(dtype):
    d, e, a = problem()
    good, before = d.clone(), d.clone()
    with pytest.raises(ValueError, match=r"directors\[1\].*float32 or float64"):
        group_ema_([good, d.to(dtype)], [e, e.to(dtype)], [a, a], 0.9)
    assert same_bits(good, before)
    layer = DEXLayer(4, 6, 3, 2).to(dtype)
    with pytest.raises(ValueError, match="director"):
        layer.update_director(torch.ones(3), 0.9)


# update_director


def layer_of(E=4, dtype=torch.float64, **options):
    return randomize_(DEXLayer(5, 6, E, 2, **options).to(dtype), 3)


MASS = [1.5, 0.0, 3.0, 0.5]


@pytest.mark.parametrize("m", [0.9, 1, 0, torch.tensor(0.9, dtype=torch.float64)])
def test_director_and_usage(m):
    layer = layer_of(usage_momentum=0.8)
    layer.usage_ema.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    mass = torch.tensor(MASS, dtype=torch.float64)
    with torch.no_grad():
        layer.experts.fc1_weight[1] = float("nan")
    share = mass / (5.0 + 1e-6)
    pairs = {
        "fc1.weight": layer.experts.fc1_weight,
        "fc1.bias": layer.experts.fc1_bias,
        "fc2.weight": layer.experts.fc2_weight,
        "fc2.bias": layer.experts.fc2_bias,
    }
    director = dict(layer.director.named_parameters())
    assert director.keys() == pairs.keys()
    want = {n: by_hand(director[n].detach(), e.detach(), share, float(m)) for n, e in pairs.items()}
    experts = {n: e.detach().clone() for n, e in pairs.items()}
    usage = 0.8 * layer.usage_ema + (1 - 0.8) * share
    layer.update_director(mass, m)
    for n, t in layer.director.named_parameters():
        torch.testing.assert_close(t.detach(), want[n], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(layer.usage_ema, usage, rtol=1e-13, atol=1e-14)
    assert all(same_bits(e, experts[n]) for n, e in pairs.items())


def test_usage_starts_at_zero_with_momentum_099():
    layer = DEXLayer(5, 6, 4, 2)
    assert torch.equal(layer.usage_ema, torch.zeros(4))
    layer.update_director(torch.tensor(MASS), 0.9)
    torch.testing.assert_close(layer.usage_ema, 0.01 * torch.tensor(MASS) / 5)


def test_update_is_in_place():
    layer = layer_of()
    tensors = {**dict(layer.director.named_parameters()), "usage_ema": layer.usage_ema}
    where = {n: (id(t), t.data_ptr()) for n, t in tensors.items()}
    alias, before = layer.director.fc1.weight.detach(), layer.director.fc1.weight.detach().clone()
    layer.update_director(torch.tensor(MASS, dtype=torch.float64), 0.9)
    tensors = {**dict(layer.director.named_parameters()), "usage_ema": layer.usage_ema}
    assert where == {n: (id(t), t.data_ptr()) for n, t in tensors.items()}
    assert not torch.equal(alias, before) and torch.equal(alias, layer.director.fc1.weight)


def test_zero_mass_leaves_the_director():
    layer = layer_of(dtype=torch.float32)
    with torch.no_grad():
        layer.director.fc1.bias[0] = -0.0
        layer.experts.fc1_bias.fill_(float("nan"))
    before = snapshot(layer.director)
    layer.update_director(torch.zeros(4), 0.5)
    assert_unchanged(layer.director, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_mass_changes_nothing(bad):
    layer = layer_of()
    layer.usage_ema.fill_(0.25)
    before = snapshot(layer)
    layer.update_director(torch.tensor([1.0, bad, 1.0, 1.0]), 0.5)
    assert_unchanged(layer, before)
    layer.update_director(torch.tensor([1.0, 1.0, 1.0, 1.0]), 0.5)
    assert not torch.equal(layer.director.fc1.weight, before["director.fc1.weight"])


def test_non_finite_mass_of_one_layer_stops_all():
    layers = [layer_of(), layer_of(3)]
    before = [snapshot(layer) for layer in layers]
    update_directors(layers, [torch.ones(4), torch.tensor([1.0, float("nan"), 0.0])], 0.5)
    for layer, b in zip(layers, before, strict=True):
        assert_unchanged(layer, b)


def test_skip():
    layer = layer_of()
    layer.usage_ema.fill_(0.25)
    before = snapshot(layer)
    layer.update_director(torch.tensor(MASS), 0.5, skip=torch.tensor(True))
    assert_unchanged(layer, before)
    twin = layer_of()
    twin.usage_ema.fill_(0.25)
    twin.update_director(torch.tensor(MASS), 0.5)
    layer.update_director(torch.tensor(MASS), 0.5, skip=torch.tensor(False))
    assert_unchanged(layer, snapshot(twin))
    assert not torch.equal(layer.usage_ema, before["usage_ema"])


def test_layers_together_equal_layers_alone():
    masses = [torch.tensor(MASS, dtype=torch.float64), torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)]
    together, alone = ([layer_of(4), layer_of(3)] for _ in range(2))
    update_directors(together, masses, 0.7)
    for layer, mass in zip(alone, masses, strict=True):
        layer.update_director(mass, 0.7)
    for a, b in zip(together, alone, strict=True):
        assert_unchanged(a, snapshot(b))
    update_directors([], [], 0.7)


@pytest.mark.parametrize("masses", [[], [torch.ones(4)], [torch.ones(4), torch.ones(4)], [torch.ones(4), None]])
def test_wrong_masses_change_nothing(masses):
    layers = [layer_of(4), layer_of(3)]
    before = [snapshot(layer) for layer in layers]
    with pytest.raises(ValueError, match="gate_mass"):
        update_directors(layers, masses, 0.7)
    for layer, b in zip(layers, before, strict=True):
        assert_unchanged(layer, b)
