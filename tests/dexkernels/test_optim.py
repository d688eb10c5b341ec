"""`DEXAdamW`: torch's AdamW and `update_directors`, within rounding; copies are read only while they are true."""

import copy
import gc
import threading

import pytest
import torch
from layer_cases import layer_of
from torch import nn

from dexkernels import DEXLayer, hold_weights, optim, shadows
from dexkernels.layer import update_directors
from dexkernels.optim import DEXAdamW
from dexkernels.testing import randomize_, relative_error

D, H, E, K, B, N = 8, 12, 4, 2, 6, 5
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


class Net(nn.Module):
    def __init__(self, seed=0, **options):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.layers = nn.ModuleList(DEXLayer(D, H, E, K, **options) for _ in range(2))
        for i, layer in enumerate(self.layers):
            randomize_(layer, 10 * seed + i)

    def forward(self, x):
        auxes = []
        for layer in self.layers:
            y, aux = layer(self.norm(x), return_aux=True)
            x = x + y
            auxes.append(aux)
        return x, auxes


def images(seed=0):
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed))


def backward(net, seed=0, autocast=False):
    """The gate masses of one forward and backward."""
    net.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, auxes = net(images(seed))
    (y.float().square().mean() + sum(a.align_loss + 0.1 * a.balance_loss for a in auxes)).backward()
    return [a.gate_mass for a in auxes]


def plain_step(net, optimizer, seed, momentum=0.9, clip=0.5):
    masses = backward(net, seed)
    update_directors(net.layers, masses, momentum)
    for p in net.parameters():
        if p.grad is not None:
            p.grad.mul_(clip)
    optimizer.step()


def of(module):
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def assert_near(got, expected, bound=1e-5):
    for name, t in expected.items():
        assert relative_error(got[name], t) < bound, name


@pytest.mark.parametrize("groups", [False, True], ids=["one group", "groups"])
def test_equal_to_torchs_adamw_and_update_directors(groups):
    nets = [Net(), Net()]

    def params(net):
        named = dict(net.named_parameters())
        some = [p for n, p in named.items() if p.requires_grad and "experts.fc1" in n]
        rest = [p for n, p in named.items() if p.requires_grad and "experts.fc1" not in n]
        return [{"params": some, "lr": 3e-3, "weight_decay": 0.0}, {"params": rest}] if groups else some + rest

    torchs, ours = torch.optim.AdamW(params(nets[0]), **OPTIONS), DEXAdamW(nets[1], params(nets[1]), **OPTIONS)
    for i in range(5):
        plain_step(nets[0], torchs, i)
        masses = backward(nets[1], i)
        ours.step(gate_mass=masses, momentum=0.9, clip_scale=0.5)
    assert_near(of(nets[1]), of(nets[0]))
    assert all((nets[0].layers[0].director.fc1.weight != Net().layers[0].director.fc1.weight).flatten())


def test_state_dicts_are_torchs_both_ways():
    nets = [Net(), Net()]
    optimizers = [
        torch.optim.AdamW([p for p in nets[0].parameters() if p.requires_grad], **OPTIONS),
        DEXAdamW(nets[1], **OPTIONS),
    ]
    plain_step(nets[0], optimizers[0], 0)
    optimizers[1].step(gate_mass=backward(nets[1], 0), momentum=0.9, clip_scale=0.5)
    states = [copy.deepcopy(o.state_dict()) for o in optimizers]
    assert states[0].keys() == states[1].keys()
    assert [s.keys() for s in states[0]["state"].values()] == [s.keys() for s in states[1]["state"].values()]
    assert states[0]["param_groups"][0].keys() == states[1]["param_groups"][0].keys()
    optimizers[0].load_state_dict(states[1])
    optimizers[1].load_state_dict(states[0])
    nets[1].load_state_dict(nets[0].state_dict())
    for i in (1, 2):
        plain_step(nets[0], optimizers[0], i)
        optimizers[1].step(gate_mass=backward(nets[1], i), momentum=0.9, clip_scale=0.5)
    assert_near(of(nets[1]), of(nets[0]))


@pytest.mark.parametrize("bad", ["skip", "mass"])
def test_a_bad_step_changes_nothing(bad):
    net = Net()
    optimizer = DEXAdamW(net, **OPTIONS, copies=torch.bfloat16)
    optimizer.step(gate_mass=backward(net, 0), momentum=0.9)
    masses = backward(net, 1)
    before, moments = of(net), copy.deepcopy(optimizer.state_dict()["state"])
    if bad == "mass":
        masses[1][0] = float("nan")
    optimizer.step(gate_mass=masses, momentum=0.5, skip=torch.tensor(bad == "skip"))
    after, later = of(net), optimizer.state_dict()["state"]
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert all(torch.equal(later[i][name], t) for i, s in moments.items() for name, t in s.items())
    assert torch.equal(output(net), output(fresh(net)))  # the copies are still those of the weights


def test_without_masses_it_is_torchs_adamw():
    nets = [Net(), Net()]
    params = [p for p in nets[0].parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(params, **OPTIONS, fused=True), DEXAdamW(nets[1], **OPTIONS)]
    for net, optimizer in zip(nets, optimizers, strict=True):
        backward(net)
        optimizer.step()
    assert_near(of(nets[1]), of(nets[0]), 1e-6)
    assert torch.equal(nets[1].layers[0].director.fc1.weight, Net().layers[0].director.fc1.weight)


def test_a_director_that_is_fine_tuned_and_experts_that_are_frozen():
    net = Net()
    net.layers[0].path = "director"
    net.layers[1].experts.requires_grad_(False)
    optimizer = DEXAdamW(net, **OPTIONS, copies=torch.bfloat16)
    net.zero_grad()
    y0 = net.layers[0](images())
    y1, aux = net.layers[1](images(), return_aux=True)
    (y0.square().mean() + y1.square().mean() + aux.balance_loss).backward()
    before = of(net)
    optimizer.step(gate_mass=[aux.gate_mass], momentum=0.5)
    moved = {n for n, t in of(net).items() if not torch.equal(t, before[n])}
    assert "layers.0.director.fc1.weight" in moved and "layers.1.director.fc1.weight" in moved
    assert not any(".experts." in n for n in moved)


def test_a_gradient_scaler_skips_the_whole_step_and_none_else():
    """`torch.amp.GradScaler` calls no step whose gradients overflow."""
    nets = [Net(), Net()]
    optimizers = [DEXAdamW(net, **OPTIONS, copies=torch.float16) for net in nets]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for i in range(4):
        masses = [backward(net, i) for net in nets]
        scaler.scale(torch.zeros(()))  # makes the scale
        overflows = i == 2
        for p in nets[0].parameters():
            if p.grad is not None:
                p.grad.mul_(float("inf") if overflows else scaler.get_scale())
        before = of(nets[0])
        scaler.step(optimizers[0], gate_mass=masses[0], momentum=0.9)
        scaler.update()
        if overflows:
            assert all(torch.equal(t, before[name]) for name, t in of(nets[0]).items())
        else:
            optimizers[1].step(gate_mass=masses[1], momentum=0.9)
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(t, of(nets[1])[name]) for name, t in of(nets[0]).items())
    assert {float(s["step"]) for s in optimizers[0].state.values()} == {3.0}


def test_a_closure_and_a_schedule():
    net = Net()
    optimizer = DEXAdamW(net, **OPTIONS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    losses = []

    def closure():
        optimizer.zero_grad()
        y, _ = net(images())
        loss = y.square().mean()
        loss.backward()
        losses.append(loss.detach())
        return loss

    for _ in range(3):
        assert torch.equal(optimizer.step(closure), losses[-1])
        schedule.step()
    assert losses[0] > losses[1] > losses[2] and optimizer.param_groups[0]["lr"] == OPTIONS["lr"] / 8


# --- copies -----------------------------------------------------------------------------------------------------------


def output(net):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, auxes = net(images(9))
    return torch.stack([y.float().sum(), *(a.align_loss for a in auxes)]).double()


def fresh(net):
    """The same weights in a net that knows no copies."""
    other = Net()
    other.load_state_dict(net.state_dict())
    return other


@pytest.fixture
def stepped():
    net = Net()
    optimizer = DEXAdamW(net, **OPTIONS, copies=torch.bfloat16)
    for i in range(2):
        optimizer.step(gate_mass=backward(net, i, autocast=True), momentum=0.5)
    net.zero_grad(set_to_none=True)
    return net, optimizer


def taken(net):
    """Per layer, whether a forward computes with the copies of the optimizer."""
    found = []
    for layer in net.layers:
        written = layer.shadows._written
        weights = layer.shadows.of(layer.experts.weights, layer.director.weights, torch.bfloat16)
        found.append(written is not None and weights.fc1_weight.data_ptr() == written.copies.fc1_weight.data_ptr())
    return found


def test_the_next_forward_takes_the_copies(stepped):
    net, optimizer = stepped
    assert taken(net) == [True, True]
    assert torch.equal(output(net), output(fresh(net)))
    layer = net.layers[0]
    experts = layer.shadows.of(layer.experts.weights, None, torch.bfloat16)
    assert experts.fc1_weight.shape[0] == E and torch.equal(experts.fc2_weight, layer.experts.fc2_weight.bfloat16())
    with hold_weights(net):
        assert taken(net) == [True, True]
    before = layer.shadows._written.copies.fc1_weight.data_ptr()
    optimizer.step(gate_mass=backward(net, 5, autocast=True), momentum=0.5)
    assert layer.shadows._written.copies.fc1_weight.data_ptr() == before and taken(net) == [True, True]
    assert torch.equal(output(net), output(fresh(net)))


def other_optimizer(net, fused):
    p = [p for p in net.parameters() if p.requires_grad]
    for t in p:
        t.grad = torch.ones_like(t)
    torch.optim.AdamW(p, lr=0.1, fused=fused).step()


def write_to_alias(net):
    """A tensor from before the copies, whose version is its own."""
    net.alias.mul_(2)


def other_thread(net):
    thread = threading.Thread(target=lambda: net.layers[0].experts.fc1_weight.data.mul_(2))
    thread.start()
    thread.join()


def with_no_version(net):
    with torch.no_grad():
        net.layers[0].experts.fc2_bias.detach().mul_(2)


CHANGES = {
    "a state dict": lambda net: net.load_state_dict(Net(7).state_dict()),
    "a state dict, assigned": lambda net: net.load_state_dict(Net(7).state_dict(), assign=True),
    "torch's AdamW": lambda net: other_optimizer(net, False),
    "torch's fused AdamW": lambda net: other_optimizer(net, True),
    "data of experts": lambda net: net.layers[0].experts.fc1_weight.data.mul_(2),
    "data of a director": lambda net: net.layers[0].director.fc2.bias.data.add_(1),
    "data, set": lambda net: setattr(net.layers[0].experts.fc1_weight, "data", torch.ones(E, H, D)),
    "data, in another thread": other_thread,
    "a write in place": with_no_version,
    "update_directors": lambda net: update_directors(net.layers, [torch.ones(E)] * 2, 0.1),
    "the way back to the director": lambda net: net.layers[0].copy_director_to_experts_(),
    "to another dtype and back": lambda net: (net.bfloat16(), net.float()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_copy_is_never_read(stepped, change):
    net, _ = stepped
    before = output(net)
    CHANGES[change](net)
    after = output(net)
    assert not torch.equal(after, before)
    assert torch.equal(after, output(fresh(net)))


def no_marks(patch):
    patch.setattr(shadows.Watched, "touched", property(lambda t: False, lambda t, value: None), raising=False)


def no_versions(patch):
    same = shadows._is_same

    def same_but_for_versions(states, tensors):
        return same([(*state[:2], t._version) for state, t in zip(states, tensors, strict=True)], tensors)

    patch.setattr(shadows, "_is_same", same_but_for_versions)


GUARDS = {
    "accesses to data": (no_marks, ("data of experts", "data of a director", "data, in another thread")),
    "optimizers that bump no version": (no_marks, ("torch's fused AdamW",)),
    "versions": (no_versions, ("a state dict", "a write in place", "update_directors", "the way back to the director")),
}
"""What a forward looks at before it takes copies, how that is left out, and the changes that only it reports."""


@pytest.mark.parametrize("guard", GUARDS)
def test_without_a_guard_stale_copies_are_read(stepped, guard):
    """So `test_a_stale_copy_is_never_read` would see it missing."""
    net, optimizer = stepped
    leave_out, changes = GUARDS[guard]
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch)
        for change in changes:
            optimizer.step(gate_mass=backward(net, 5, autocast=True), momentum=0.5)
            net.zero_grad(set_to_none=True)
            CHANGES[change](net)
            assert not torch.equal(output(net), output(fresh(net))), change


def test_memory_that_another_tensor_shares_is_not_trusted(stepped):
    net, optimizer = stepped
    net.alias = torch._C.TensorBase.data.__get__(net.layers[0].experts.fc1_weight)
    assert taken(net) == [False, True]
    optimizer.step(gate_mass=backward(net, 5, autocast=True), momentum=0.5)
    assert taken(net) == [False, True]
    write_to_alias(net)
    assert torch.equal(output(net), output(fresh(net)))
    del net.alias
    gc.collect()
    optimizer.step(gate_mass=backward(net, 6, autocast=True), momentum=0.5)
    assert taken(net) == [True, True] and torch.equal(output(net), output(fresh(net)))


def test_another_stream_or_dtype_makes_its_own(stepped, monkeypatch):
    net, _ = stepped
    layer = net.layers[0]
    half = layer.shadows.of(layer.experts.weights, None, torch.float16)
    assert half.fc1_weight.dtype == torch.float16
    monkeypatch.setattr("dexkernels.shadows.stream_of", lambda device: 7)
    assert taken(net) == [False, False]


def torchs_step(net, optimizer):
    other_optimizer(net, fused=True)


def fused_step(net, optimizer):
    optimizer.step(gate_mass=backward(net, 3, autocast=True), momentum=0.5)


CAPTURED = {
    "DEXAdamW": fused_step,
    "torch's fused AdamW": torchs_step,
    "update_directors": lambda net, optimizer: update_directors(net.layers, [torch.ones(E)] * 2, 0.1),
}


def replay(net):
    """Writes to an expert and a director as the replay of a CUDA graph does: nothing reports it."""
    for t in (net.layers[0].experts.fc1_weight, net.layers[0].director.fc1.weight):
        torch._C.TensorBase.data.__get__(t).mul_(2)


@pytest.mark.parametrize("what", CAPTURED)
@pytest.mark.parametrize("kept_before", [True, False], ids=["copies before", "no copies before"])
def test_copies_are_not_kept_of_weights_that_a_cuda_graph_writes(stepped, what, kept_before):
    """Not even those of a later step outside of the graph, because its replays report nothing."""
    net, optimizer = stepped
    if not kept_before:
        net = fresh(net)
        optimizer = DEXAdamW(net, **OPTIONS, copies=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        for module in (shadows, optim):
            patch.setattr(module, "capturing", lambda device: True)
        CAPTURED[what](net, optimizer)
    fused_step(net, optimizer)
    replay(net)
    assert torch.equal(output(net), output(fresh(net)))


def test_copies_are_not_kept_of_tensors_that_layers_share():
    """Written twice in a step, the last time after their copy."""
    for tie in ("director", "experts"):
        net = Net()
        setattr(net.layers[1], tie, getattr(net.layers[0], tie))
        twin = copy.deepcopy(net)
        optimizer = DEXAdamW(net, **OPTIONS, copies=torch.bfloat16)
        torchs = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], **OPTIONS)
        for i in range(2):
            plain_step(twin, torchs, i, clip=1.0)
            optimizer.step(gate_mass=backward(net, i), momentum=0.9)
        assert_near(of(net), of(twin))
        other = copy.deepcopy(net)
        assert torch.equal(output(net), output(other)), tie


def test_copies_of_a_net_that_is_copied_pickled_or_compiled(stepped, tmp_path):
    net, _ = stepped
    twin = copy.deepcopy(net)
    assert taken(twin) == [False, False] and torch.equal(output(twin), output(net))
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert {type(p) for p in loaded.parameters()} == {nn.Parameter} and torch.equal(output(loaded), output(net))
    torch.save(net.state_dict(), tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt")


def test_a_backward_after_the_step_raises(stepped):
    """Its copies hold the next weights."""
    net, optimizer = stepped
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = net(images())
    optimizer.step(gate_mass=backward(net, 5, autocast=True), momentum=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.float().sum().backward()


def test_what_is_refused():
    net = Net()
    with pytest.raises(ValueError, match="model: expected a torch.nn.Module"):
        DEXAdamW([torch.ones(3)])
    with pytest.raises(ValueError, match="copies: expected torch.bfloat16"):
        DEXAdamW(net, copies=torch.float32)
    with pytest.raises(ValueError, match="backend: expected one of"):
        DEXAdamW(net, backend="mps")
    optimizer = DEXAdamW(net, **OPTIONS)
    masses = backward(net)
    before = of(net)
    for options, message in (
        ({"gate_mass": masses}, "momentum: expected it together"),
        ({"momentum": 0.5}, "momentum: expected it together"),
        ({"gate_mass": masses, "momentum": 2.0}, "momentum: expected a number"),
        ({"gate_mass": masses[:1], "momentum": 0.5}, "gate_mass: expected one tensor per layer"),
        ({"gate_mass": [masses[0], torch.ones(3)], "momentum": 0.5}, r"gate_mass\[1\]: expected \[4\]"),
        ({"skip": True}, "skip: expected a 0-dim bool"),
        ({"clip_scale": -1.0}, "clip_scale: expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.step(**options)
    assert all(torch.equal(t, before[n]) for n, t in of(net).items())
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad, maximize: expected False"):
        optimizer.step()
    assert all(torch.equal(t, before[n]) for n, t in of(net).items())


def sparse(net, group):
    net.rows = nn.Embedding(9, 3, sparse=True)
    net.rows(torch.tensor([1, 2])).sum().backward()
    group["params"] = [net.rows.weight]


def half(net, group):
    net.narrow = nn.Linear(3, 3, bias=False).bfloat16()
    net.narrow(torch.ones(3).bfloat16()).sum().backward()
    group["params"] = [net.narrow.weight]


BAD_GROUPS = {
    "rows.weight: expected a dense gradient, got torch.sparse_coo": sparse,
    "narrow.weight: expected a float32 or float64 parameter, got torch.bfloat16; keep weights in float32": half,
    "rule.lr: expected a number >= 0": lambda net, group: group.update(lr=-1.0),
    r"rule.betas\[0\]: expected a number": lambda net, group: group.update(betas=(2.0, 0.9)),
}


@pytest.mark.parametrize("message", BAD_GROUPS)
def test_a_step_that_the_last_group_cannot_take_changes_nothing_of_the_others(message):
    net = Net()
    net.layers[1].experts.requires_grad_(False)  # a director that moves apart from its experts
    *some, last = [p for p in net.parameters() if p.requires_grad]
    masses = backward(net)
    optimizer = DEXAdamW(net, [{"params": some}, {"params": [last]}], **OPTIONS, copies=torch.bfloat16)
    optimizer.step(gate_mass=masses, momentum=0.5)
    group = optimizer.param_groups[1]
    BAD_GROUPS[message](net, group)
    before, steps = of(net), [s["step"].clone() for s in optimizer.state.values()]
    with pytest.raises(ValueError, match=message):
        optimizer.step(gate_mass=masses, momentum=0.5)
    assert all(torch.equal(t, before[n]) for n, t in of(net).items())
    assert [s["step"] for s in optimizer.state.values()][: len(steps)] == steps
    assert torch.equal(output(net), output(copy.deepcopy(net)))


def test_one_layer_alone():
    layer = layer_of()
    optimizer = DEXAdamW(layer, **OPTIONS)
    y, aux = layer(torch.randn(3, 2, layer.dim, dtype=layer.usage_ema.dtype), return_aux=True)
    y.sum().backward()
    before = layer.director.fc1.weight.clone()
    optimizer.step(gate_mass=[aux.gate_mass], momentum=torch.tensor(0.5, dtype=torch.float64))
    assert not torch.equal(layer.director.fc1.weight, before)
