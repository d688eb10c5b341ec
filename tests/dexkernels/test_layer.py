"""`DEXLayer`: routing modes, edge cases, strides, frozen parts, paths, autocast, copies."""

import copy
import itertools

import pytest
import torch
from layer_cases import D, H, bits, changed, director, expert, images, layer_of, objective, snapshot, step

from dexkernels import Aux, DEXLayer, align_loss
from dexkernels.testing import ExpertLoop, randomize_, relative_error


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
    layer, x = layer_of(routing=routing, dtype=dtype).train(dtype == torch.float32), images(B=16, N=17, dtype=dtype)
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
    layer, x = layer_of(dtype=dtype).eval(), images(dtype=dtype)
    got = step(layer, x)
    assert got["y"].dtype == got["x"].dtype == got["experts.fc1_weight"].dtype == dtype
    assert got["align_loss"].dtype == got["gates"].dtype == got["gate_mass"].dtype == torch.float32


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
