"""`DEXLayer`: routing modes, edge cases, strides, paths, autocast, purity, checkpointing, state dicts."""

import copy
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dexkernels import Aux, DEXLayer, align_loss
from dexkernels.testing import ExpertLoop, randomize_, relative_error

D, H = 9, 7


def layer_of(E=6, K=2, dtype=torch.float64, seed=0, dim=D, **options):
    return randomize_(DEXLayer(dim, H, E, K, **options).to(dtype), seed)


def images(B=5, N=4, dtype=torch.float64, seed=0):
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bits(t):
    return t.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]).clone()


def snapshot(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def changed(module, before):
    now = module.state_dict()
    assert now.keys() == before.keys()
    return [k for k in now if not torch.equal(bits(now[k]), bits(before[k]))]


def objective(y, aux):
    """Uses every element of the output and both losses."""
    return (
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + 3 * aux.align_loss + aux.balance_loss
    )


def step(layer, x, **options):
    """Everything that one forward and backward gives, by name."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y, aux = layer(x, return_aux=True, **options)
    objective(y, aux).backward()
    grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad} | {k: v.detach() for k, v in aux._asdict().items()} | grads


def expert(layer, e, x):
    m = layer.experts
    z = x @ m.fc1_weight[e].T + m.fc1_bias[e]
    return (z * 0.5 * (1 + torch.erf(z / 2**0.5))) @ m.fc2_weight[e].T + m.fc2_bias[e]


def director(layer, x):
    d = layer.director
    z = x @ d.fc1.weight.T + d.fc1.bias
    return (z * 0.5 * (1 + torch.erf(z / 2**0.5))) @ d.fc2.weight.T + d.fc2.bias


def token_oracle(layer, x):
    """A DEX layer with one decision per token, one token at a time."""
    rows, ps, mass = [], [], [0.0] * layer.num_experts
    for token in x.reshape(-1, layer.dim):
        p = torch.softmax(layer.router_weight @ token / layer.temperature, 0)
        chosen = sorted(range(layer.num_experts), key=lambda e, p=p: -p[e].item())[: layer.top_k]
        total = sum(p[e] for e in chosen)
        rows.append(sum(p[e] / total * expert(layer, e, token) for e in chosen))
        ps.append(p)
        for e in chosen:
            mass[e] += (p[e] / total).item()
    y, mean = torch.stack(rows).view_as(x), torch.stack(ps).mean(0)
    align = align_loss(y, director(layer, x).detach(), layer.align)
    return y, align, layer.num_experts * (mean * mean.detach()).sum(), torch.tensor(mass, dtype=x.dtype)


@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
def test_token_wise_against_an_oracle(kind):
    layer, x = layer_of(routing="token", align=kind), images()
    got = step(layer, x)
    x = x.requires_grad_()
    layer.zero_grad()
    y, align, balance, mass = token_oracle(layer, x)
    objective(y, Aux(align, balance, mass, None, None)).backward()
    want = {"y": y, "x": x.grad, "align_loss": align, "balance_loss": balance, "gate_mass": mass}
    want |= {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    assert got["gates"].shape == got["expert_indices"].shape == (5, 4, 2)
    for name, t in want.items():
        torch.testing.assert_close(got[name], t.detach(), rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_from_the_mean_token_is_routing_on_a_mean_cls():
    layer, x = layer_of(route_from="mean"), images()
    y, aux = layer(x, return_aux=True)
    twin = layer_of()
    with_mean = torch.cat([x.mean(1, keepdim=True), x], 1)
    z, aux_twin = twin(with_mean, return_aux=True)
    torch.testing.assert_close(y, z[:, 1:], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(aux.gates, aux_twin.gates, rtol=1e-12, atol=1e-13)
    assert torch.equal(aux.expert_indices, aux_twin.expert_indices)
    assert not torch.equal(aux.expert_indices, layer_of()(x, return_aux=True)[1].expert_indices)


@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
def test_align_loss_is_that_of_output_and_director(kind):
    layer, x = layer_of(align=kind), images()
    y, aux = layer(x, return_aux=True)
    torch.testing.assert_close(aux.align_loss, align_loss(y, director(layer, x), kind), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
def test_gradcheck_of_output_and_align_loss(kind):
    """The director's first bias alone decides its output here: in x it is a constant, as its gradient says it is."""
    layer = randomize_(DEXLayer(4, 3, 3, 2, align=kind).double())
    with torch.no_grad():
        layer.director.fc1.weight.zero_()
    x = images(B=2, N=2)[..., :4].clone().requires_grad_()
    names = [n for n, p in layer.named_parameters() if p.requires_grad]

    def run(x, *params):
        named = dict(zip(names, params, strict=True))
        y, aux = torch.func.functional_call(layer, named, (x,), {"return_aux": True})
        return y, aux.align_loss

    params = [layer.get_parameter(n).detach().clone().requires_grad_() for n in names]
    assert len(params) == 5
    assert torch.autograd.gradcheck(run, (x, *params))


def test_balance_loss_gradient_is_that_of_one_factor():
    layer, x = layer_of(), images().requires_grad_()
    got = torch.autograd.grad(layer(x, return_aux=True)[1].balance_loss, (x, layer.router_weight))
    mean = torch.softmax(x[:, 0] @ layer.router_weight.T / 0.5, 1).mean(0)
    want = torch.autograd.grad(0.5 * 6 * mean.square().sum(), (x, layer.router_weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("routing", ["image", "token"])
def test_aux_shapes_and_what_carries_gradient(routing):
    layer, x = layer_of(routing=routing), images()
    y, aux = layer(x, return_aux=True)
    assert isinstance(y, torch.Tensor) and isinstance(aux, Aux)
    assert y.shape == x.shape and aux.align_loss.shape == aux.balance_loss.shape == ()
    assert aux.gates.shape == aux.expert_indices.shape == ((5, 2) if routing == "image" else (5, 4, 2))
    assert aux.gate_mass.shape == (6,) and not aux.gate_mass.requires_grad
    assert aux.gate_mass.sum().item() == pytest.approx(5 if routing == "image" else 20)
    assert aux.expert_indices.dtype == torch.int32
    objective(y, aux).backward()
    assert all(p.grad is None for p in layer.director.parameters())
    plain = layer(x)
    assert isinstance(plain, torch.Tensor) and torch.equal(plain, y)


def test_a_bare_layer_starts_as_copies_of_its_director():
    layer, x = DEXLayer(D, H, 4, 3).double(), images()
    for d, e in layer.director_pairs():
        assert e.shape == (4, *d.shape) and all(torch.equal(e[i], d) for i in range(4))
    torch.testing.assert_close(layer(x), director(layer, x), rtol=1e-12, atol=1e-14)
    assert not any(p.requires_grad for p in layer.director.parameters())
    assert (layer.num_experts, layer.top_k) == (4, 3) and (DEXLayer(3, 3).num_experts, DEXLayer(3, 3).top_k) == (8, 2)


def loop_of(layer):
    loop = ExpertLoop(layer.dim, layer.hidden_dim, layer.num_experts, layer.top_k, layer.temperature).double()
    loop.load_state_dict(layer.reference_state_dict())
    return loop


@pytest.mark.parametrize(
    "B, N, E, K", [(1, 1, 1, 1), (1, 4, 6, 6), (5, 1, 6, 2), (5, 4, 6, 6), (6, 3, 6, 1), (2, 65, 3, 3)]
)
def test_edge_sizes(B, N, E, K):
    layer, x = layer_of(E, K), images(B, N)
    got = step(layer, x)
    loop, x = loop_of(layer), x.requires_grad_()
    y, align, balance, mass = loop(x)
    objective(y, Aux(align, balance, mass, None, None)).backward()
    for a, b in [(got["y"], y), (got["align_loss"], align), (got["balance_loss"], balance), (got["gate_mass"], mass)]:
        torch.testing.assert_close(a, b.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(got["x"], x.grad, rtol=1e-10, atol=1e-12)
    if K == E:
        torch.testing.assert_close(got["gates"].sum(-1), torch.ones(B, dtype=x.dtype))
        assert all(sorted(row) == list(range(E)) for row in got["expert_indices"].tolist())


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_temperature(temperature):
    layer, x = layer_of(temperature=temperature), images()
    (y, aux), (want, align, balance, mass) = layer(x, return_aux=True), loop_of(layer)(x)
    for a, b in [(y, want), (aux.align_loss, align), (aux.balance_loss, balance), (aux.gate_mass, mass)]:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("target", range(6))
def test_all_images_to_one_expert(target):
    layer, x = layer_of(K=1), images()
    with torch.no_grad():
        layer.router_weight.zero_()
        layer.router_weight[target] = 1
        x[:, 0] = x[:, 0].abs() + 0.5
    got = step(layer, x)
    assert got["expert_indices"].flatten().tolist() == [target] * 5
    assert got["gate_mass"].tolist() == [5.0 if e == target else 0.0 for e in range(6)]
    torch.testing.assert_close(got["y"], expert(layer, target, x), rtol=1e-12, atol=1e-13)
    for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
        used = [g.count_nonzero() > 0 for g in got[f"experts.{name}"]]
        assert used == [e == target for e in range(6)]


def test_experts_without_images_may_hold_nan():
    layer, x = layer_of(), images(B=2)
    clean = step(layer, x)
    unused = sorted(set(range(6)) - set(clean["expert_indices"].flatten().tolist()))
    assert len(unused) >= 2
    with torch.no_grad():
        for p in layer.experts.parameters():
            p[unused] = float("nan")
    poisoned = step(layer, x)
    for name, t in clean.items():
        assert t.isfinite().all() and torch.equal(t, poisoned[name]), name
    for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
        assert clean[f"experts.{name}"][unused].count_nonzero() == 0


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
def test_empty_batch(routing, kind):
    layer = layer_of(routing=routing, align=kind)
    got = step(layer, images(B=0))
    assert got["y"].shape == got["x"].shape == (0, 4, D)
    assert got["align_loss"] == 0 and got["balance_loss"] == 0 and got["gate_mass"].tolist() == [0.0] * 6
    for n, p in layer.named_parameters():
        if p.requires_grad:
            assert torch.equal(got[n], torch.zeros_like(p)), n
    before = snapshot(layer.director)
    layer.update_director(got["gate_mass"], 0.5)
    assert changed(layer.director, before) == []


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("form", ["transposed", "sliced", "expanded", "wide"])
def test_strides_do_not_show(routing, form):
    layer, base = layer_of(routing=routing, dtype=torch.float32), images(B=6, N=6, dtype=torch.float32)
    x = {
        "transposed": base.transpose(0, 1),
        "sliced": base[::2, 1::2],
        "expanded": base[:1].expand(5, 6, D),
        "wide": torch.cat([base, base], 2)[..., :D],
    }[form]
    assert not x.is_contiguous()
    got, want = step(layer, x), step(layer, x.contiguous())
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("frozen", [*itertools.product([False, True], repeat=3)])
def test_frozen_parts_have_no_gradient_and_change_no_other(frozen):
    layer, x = layer_of(), images()
    full = step(layer, x)
    freeze_x, freeze_experts, freeze_router = frozen
    layer.experts.requires_grad_(not freeze_experts)
    layer.router_weight.requires_grad_(not freeze_router)
    x = x.detach().requires_grad_(not freeze_x)
    layer.zero_grad()
    y, aux = layer(x, return_aux=True)
    torch.testing.assert_close(y, full["y"], rtol=0, atol=0)
    if all(frozen):
        assert not y.requires_grad
        return
    objective(y, aux).backward()
    for n, p in layer.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, full[n]), n
        else:
            assert p.grad is None, n
    assert x.grad is None if freeze_x else torch.equal(x.grad, full["x"])


@pytest.mark.parametrize("only", ["fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"])
def test_one_trainable_tensor_of_the_experts(only):
    layer, x = layer_of(), images()
    full = step(layer, x)
    layer.requires_grad_(False)
    trainable = getattr(layer.experts, only).requires_grad_()
    layer.zero_grad()
    objective(*layer(x, return_aux=True)).backward()
    assert torch.equal(trainable.grad, full[f"experts.{only}"])
    assert [n for n, p in layer.named_parameters() if p.grad is not None] == [f"experts.{only}"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("routing", ["image", "token"])
def test_without_gradient(mode, routing):
    layer, x = layer_of(routing=routing, dtype=torch.float32), images(dtype=torch.float32)
    want, wanted = layer(x, return_aux=True)
    with mode():
        got, aux = layer(x, return_aux=True)
    assert not got.requires_grad and torch.equal(got, want)
    for a, b in zip(aux, wanted, strict=True):
        assert not a.requires_grad and torch.equal(a, b)


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_repeats_are_bit_equal(routing, dtype):
    layer, x = layer_of(routing=routing, dtype=dtype), images(B=16, N=17, dtype=dtype)
    first = step(layer, x)
    for _ in range(49):
        again = step(layer, x)
        assert all(torch.equal(bits(again[k]), bits(first[k])) for k in first if k != "expert_indices")
        assert torch.equal(again["expert_indices"], first["expert_indices"])


def test_noise_is_for_training_only():
    layer, x = layer_of(), images()
    noise = torch.randn(5, 1, 6, generator=torch.Generator().manual_seed(1))
    layer.eval()
    clean = layer(x, return_aux=True)[1].gates
    assert torch.equal(layer(x, noise_std=1.0, router_noise=noise, return_aux=True)[1].gates, clean)
    layer.train()
    noisy = layer(x, noise_std=1.0, router_noise=noise, return_aux=True)[1].gates
    assert not torch.equal(noisy, clean)
    assert torch.equal(layer(x, noise_std=torch.tensor(1.0), router_noise=noise, return_aux=True)[1].gates, noisy)
    layer.usage_ema[0] = 0.9
    assert not torch.equal(layer(x, noise_std=1.0, router_noise=noise, return_aux=True)[1].gates, noisy)


def test_director_and_losses_are_computed_only_on_demand(monkeypatch):
    layer, x = layer_of(), images()

    def refuse(_):
        raise AssertionError("the director ran")

    monkeypatch.setattr(layer.director, "forward", refuse)
    assert layer(x).shape == x.shape
    with pytest.raises(AssertionError, match="the director ran"):
        layer(x, return_aux=True)


# path="director"


def test_path_of_the_director():
    layer, x = layer_of(path="director"), images()
    torch.testing.assert_close(layer(x), director(layer, x), rtol=1e-12, atol=1e-14)
    layer(x).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        n for n, _ in layer.named_parameters(prefix="") if n.startswith("director.")
    }
    assert {n.split(".")[0] for n, p in layer.named_parameters() if p.grad is not None} == {"director"}
    with pytest.raises(ValueError, match="return_aux"):
        layer(x, return_aux=True)
    with pytest.raises(ValueError, match="update_director"):
        layer.update_director(torch.ones(6), 0.9)


def test_path_may_be_changed():
    layer, x = layer_of(), images()
    by_experts = layer(x)
    layer.path = "director"
    torch.testing.assert_close(layer(x), director(layer, x), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="path"):
        layer.path = "both"
    assert layer.path == "director"
    layer.path = "experts"
    assert torch.equal(layer(x), by_experts)
    trainable = {n.split(".")[0] for n, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"experts", "router_weight"}


# Half precision


def test_autocast():
    layer, x = layer_of(dtype=torch.float32), images(dtype=torch.float32).requires_grad_()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y, aux = layer(x, return_aux=True)
    assert y.dtype == torch.bfloat16
    assert aux.align_loss.dtype == aux.balance_loss.dtype == aux.gates.dtype == aux.gate_mass.dtype == torch.float32
    (y.float().square().sum() + aux.align_loss + aux.balance_loss).backward()
    want, wanted = layer(x, return_aux=True)
    for name in ("gates", "balance_loss", "gate_mass", "expert_indices"):
        assert torch.equal(getattr(aux, name), getattr(wanted, name)), name
    assert 0 < relative_error(y, want) < 2e-2
    assert aux.align_loss.item() == pytest.approx(wanted.align_loss.item(), rel=1e-2)
    for n, p in [("x", x), *layer.named_parameters()]:
        if p.requires_grad:
            assert p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.count_nonzero(), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_around_backward_and_update_changes_nothing(dtype):
    """Dtypes are decided in forward; an update that autocast made on a half-precision copy would be lost."""
    results = []
    for enabled in (False, True):
        layer, x = layer_of(dtype=dtype), images(dtype=dtype).requires_grad_()
        y, aux = layer(x, return_aux=True)
        loss = objective(y, aux)
        before = snapshot(layer.director)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=enabled):
            loss.backward()
            layer.update_director(aux.gate_mass, 0.5)
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        assert len(changed(layer.director, before)) == 4 and all(g.dtype == dtype for g in grads)
        results.append([x.grad, *grads, *layer.state_dict().values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layer(dtype):
    layer, x = layer_of(dtype=dtype), images(dtype=dtype)
    got = step(layer, x)
    assert got["y"].dtype == got["x"].dtype == got["experts.fc1_weight"].dtype == dtype
    assert got["align_loss"].dtype == got["gates"].dtype == got["gate_mass"].dtype == torch.float32


# Forward is pure; the order of a step


BAD = float("nan")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", [0.0, BAD, float("inf")])
@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("recompute", [False, True])
def test_forward_and_backward_change_no_state(training, bad, routing, recompute):
    layer, x = layer_of(routing=routing).train(training), images().requires_grad_()
    layer.usage_ema.fill_(0.2)
    before = snapshot(layer)
    with torch.no_grad():
        x[1, 0, 0] += bad
    for _ in range(3):
        y, aux = run(layer, x, recompute, noise_std=0.5)
        (y.sum() + aux.align_loss + aux.balance_loss).backward()
    assert y.isfinite().all() == (bad == 0)
    assert changed(layer, before) == []
    assert aux.gate_mass.isfinite().all() == (bad == 0)
    if bad != 0:
        layer.update_director(aux.gate_mass, 0.5)
        assert changed(layer, before) == []


def run(layer, x, recompute, **options):
    if not recompute:
        return layer(x, return_aux=True, **options)
    return checkpoint(lambda x: layer(x, return_aux=True, **options), x, use_reentrant=False)


def test_other_images_do_not_see_a_nan_image():
    layer, x = layer_of(), images()
    x[1] = BAD
    y = layer(x)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[[0, 2, 3, 4]], layer(x[[0, 2, 3, 4]]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("used", ["all", "align", "balance", "output"])
@pytest.mark.parametrize("noise_std", [0.0, 1.0])
def test_early_update_is_an_error(recompute, used, noise_std):
    """Never a wrong gradient: backward raises, or what it gives is what it would have given."""
    layer, x = layer_of(), images().requires_grad_()
    layer.usage_ema.copy_(torch.linspace(0, 0.5, 6))
    noise = torch.randn(5, 1, 6, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    def gradients(early):
        layer.zero_grad()
        y, aux = run(layer, x, recompute, noise_std=noise_std, router_noise=noise)
        loss = {
            "all": objective(y, aux),
            "align": aux.align_loss,
            "balance": aux.balance_loss,
            "output": y.square().sum(),
        }
        if early:
            layer.update_director(aux.gate_mass, 0.1)
        loss[used].backward()
        return [layer.router_weight.grad.clone()]

    want = gradients(early=False)
    if used in ("all", "align"):
        with pytest.raises(RuntimeError, match="update_director after backward"):
            gradients(early=True)
    else:
        try:
            got = gradients(early=True)
        except RuntimeError:
            return
        assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_the_right_order_works_step_after_step(recompute):
    layer, twin, x = layer_of(), layer_of(), images()
    for _ in range(3):
        y, aux = run(layer, x.requires_grad_(), recompute)
        objective(y, aux).backward()
        layer.update_director(aux.gate_mass, 0.5)
        z, twin_aux = twin(x, return_aux=True)
        objective(z, twin_aux).backward()
        twin.update_director(twin_aux.gate_mass, 0.5)
    assert changed(layer, snapshot(twin)) == []
    assert "director.fc1.weight" in changed(layer, snapshot(layer_of()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise_std", [0.0, 1.0])
def test_checkpointing_gives_the_same_bits(dtype, noise_std):
    results = []
    for recompute in (False, True):
        layer, x = layer_of(dtype=dtype), images(dtype=dtype).requires_grad_()
        torch.manual_seed(7)
        y, aux = run(layer, x, recompute, noise_std=noise_std)
        objective(y, aux).backward()
        results.append([y, *aux, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_several_forwards_before_one_backward():
    layer, x = layer_of(), images()
    (y1, a1), (y2, a2) = layer(x[:2], return_aux=True), layer(x[2:], return_aux=True)
    (objective(y1, a1) + objective(y2, a2)).backward()
    layer.update_director(a1.gate_mass + a2.gate_mass, 0.5)
    twin = layer_of()
    twin.update_director(twin(x, return_aux=True)[1].gate_mass, 0.5)
    torch.testing.assert_close(layer.director.fc1.weight, twin.director.fc1.weight, rtol=1e-13, atol=1e-14)


# State dicts


def test_published_names():
    layer = layer_of(E=2)
    state = layer.reference_state_dict()
    parts = [
        f"{part}.{fc}.{name}"
        for part in ("experts.0", "experts.1", "director")
        for fc in ("fc1", "fc2")
        for name in ("weight", "bias")
    ]
    assert set(state) == {*parts, "router.linear.weight", "expert_activation_count"}
    assert torch.equal(state["experts.1.fc2.weight"], layer.experts.fc2_weight[1])
    state["experts.1.fc2.weight"].zero_(), state["director.fc1.bias"].zero_()
    assert layer.experts.fc2_weight[1].count_nonzero() and layer.director.fc1.bias.count_nonzero()


def test_reference_round_trip():
    layer, other = layer_of(seed=1), layer_of(seed=2)
    layer.usage_ema.copy_(torch.arange(6))
    assert len(changed(other, snapshot(layer))) == 10
    other.load_reference_state_dict(layer.reference_state_dict())
    assert changed(other, snapshot(layer)) == []


def test_state_dict_round_trip_and_deepcopy():
    layer, other = layer_of(seed=1, path="director"), layer_of(seed=2, path="director")
    other.load_state_dict(layer.state_dict())
    assert changed(other, snapshot(layer)) == []
    twin, x = copy.deepcopy(layer), images()
    assert twin.path == "director" and torch.equal(twin(x), layer(x))
    assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
        n: p.requires_grad for n, p in layer.named_parameters()
    }
    with torch.no_grad():
        twin.director.fc1.weight.zero_()
    assert layer.director.fc1.weight.count_nonzero()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda s: s.pop("experts.3.fc1.bias"), "missing experts.3.fc1.bias"),
        (lambda s: s.update({"gate.weight": torch.ones(1)}), "unknown gate.weight"),
        (lambda s: s.update({"experts.6.fc1.bias": torch.ones(H)}), "unknown experts.6.fc1.bias"),
        (
            lambda s: s.update({"director.fc1.weight": torch.ones(D, H)}),
            r"director.fc1.weight: expected shape \[7, 9\]",
        ),
        (lambda s: s.update({"director.fc1.bias": torch.ones(1)}), "director.fc1.bias: expected shape"),
        (lambda s: s.update({"expert_activation_count": [0.0] * 6}), "expert_activation_count: expected a tensor"),
        (lambda s: s.clear(), "missing router.linear.weight"),
    ],
)
def test_a_wrong_state_is_named_and_changes_nothing(damage, named):
    layer, state = layer_of(seed=1), layer_of(seed=2).reference_state_dict()
    before = snapshot(layer)
    damage(state)
    with pytest.raises(ValueError, match=named):
        layer.load_reference_state_dict(state)
    assert changed(layer, before) == []


def test_all_wrong_keys_are_named_at_once():
    state = layer_of().reference_state_dict()
    del state["experts.0.fc1.bias"]
    state["extra"] = torch.ones(1)
    state["router.linear.weight"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"(?s)missing experts.0.fc1.bias.*unknown extra.*router.linear.weight"):
        layer_of().load_reference_state_dict(state)
