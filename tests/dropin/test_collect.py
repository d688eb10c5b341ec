"""`collect_aux` sees what ``return_aux=True`` would have returned, once per run, whoever calls the layers."""

import contextlib
import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import dexkernels
from dexkernels import DEXLayer
from dexkernels.optim import DEXAdamW
from dexkernels.testing import randomize_, relative_error

from .hosts import D, H, tokens

E, K, L = 4, 2, 3


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(D), layer

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    """L blocks; under activation checkpointing when ``reentrant`` is not None."""

    def __init__(self, seed=0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(randomize_(DEXLayer(D, H, E, K), seed + i)) for i in range(L))
        self.reentrant = None

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x

    def by_hand(self, x, noise_std=0.0):
        """The same with ``return_aux=True``: output, align and balance loss by the formulas of the design, masses."""
        auxes = []
        for block in self.blocks:
            y, aux = block.mlp(block.norm(x), noise_std=noise_std, return_aux=True)
            x = x + y
            auxes.append(aux)
        align = (auxes[0].align_loss / 3 + auxes[1].align_loss / 2 + auxes[2].align_loss) / 3
        balance = (auxes[0].balance_loss + auxes[1].balance_loss + auxes[2].balance_loss) / 3
        return x, align, balance, [aux.gate_mass for aux in auxes]


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want, bound=1e-6):
    assert got.keys() == want.keys()
    worst = max((relative_error(got[n], want[n]), n) for n in want)
    assert worst[0] < bound, worst


@pytest.mark.parametrize("noise_std", [0.0, 0.7, torch.tensor(0.7)], ids=["0", "float", "tensor"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_losses_masses_and_gradients_are_those_by_hand(checkpointed, noise_std):
    model, x = Stack(), tokens(1)
    twin = copy.deepcopy(model)
    model.reentrant = False if checkpointed else None
    torch.manual_seed(3)
    want, align, balance, masses = twin.by_hand(x, noise_std)
    (want.square().mean() + 0.3 * align + 0.2 * balance).backward()
    torch.manual_seed(3)
    with dexkernels.collect_aux(model, noise_std) as aux:
        y = model(x)
    assert torch.equal(y, want)
    assert relative_error(aux.align_loss, align) < 1e-6 and relative_error(aux.balance_loss, balance) < 1e-6
    (y.square().mean() + aux.losses(align=0.3, balance=0.2)).backward()
    # Also after backward, which ran every layer a second time when checkpointed.
    assert [len(calls) for calls in aux.calls.values()] == [1] * L
    assert all(torch.equal(g, w) for g, w in zip(aux.gate_mass, masses, strict=True))
    assert_same(gradients(model), gradients(twin))

    dexkernels.layer.update_directors([b.mlp for b in twin.blocks], masses, 0.9)
    aux.update_directors(0.9)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_inside_the_block_counts_once(reentrant):
    model = Stack()
    model.reentrant = reentrant
    with dexkernels.collect_aux(model) as aux, set_checkpoint_early_stop(False):  # recomputation runs to the end
        model(tokens(1).requires_grad_()).sum().backward()
    assert [len(calls) for calls in aux.calls.values()] == [1] * L


def test_noise_reaches_the_routers_only_in_training():
    model, x = Stack(), tokens(1)
    plain = model(x)
    with dexkernels.collect_aux(model, 50.0):
        noisy = model(x)
    model.eval()
    with dexkernels.collect_aux(model, 50.0):
        still = model(x)
    assert not torch.equal(noisy, plain) and torch.equal(still, plain)


def test_outside_a_block_nothing_is_computed_or_kept(monkeypatch):
    model, x = Stack(), tokens(1)
    with dexkernels.collect_aux(model) as aux:
        model(x)
    calls = []
    monkeypatch.setattr(dexkernels.layer, "align_loss", lambda *a, **k: calls.append(a))
    model(x).sum().backward()
    assert not calls and [len(c) for c in aux.calls.values()] == [1] * L


def test_uncollected_steps_may_be_checkpointed_after_an_update():
    model, x = Stack(), tokens(1)
    model.reentrant = False
    with dexkernels.collect_aux(model, noise_std=5.0) as aux:
        y = model(x)
    (y.sum() + aux.losses()).backward()
    aux.update_directors(0.9)
    model.zero_grad()
    model(x).sum().backward()
    got = gradients(model)
    model.zero_grad()
    model.reentrant = None
    model(x).sum().backward()
    assert_same(got, gradients(model))


def test_recomputation_that_could_be_of_two_forwards_is_refused():
    model, x = Stack(), tokens(1)
    model.reentrant = False
    with dexkernels.collect_aux(model, noise_std=5.0) as aux:
        y = model(x)
    model.eval()
    model(x)  # an evaluation in between is no such forward
    model.train()
    (y.sum() + aux.losses()).backward()
    other = model(x)
    with pytest.raises(ValueError, match="expected every checkpointed forward of a step inside the block"):
        other.sum().backward()


def test_gradient_accumulation_adds_masses_and_keeps_the_losses_of_the_latest_block():
    model, twin = Stack(), Stack()
    aux = dexkernels.collect_aux(model)
    total = [torch.zeros(E) for _ in range(L)]
    for seed in (1, 2, 3):
        with aux:
            y = model(tokens(seed))
        want, align, balance, masses = twin.by_hand(tokens(seed))
        total = [t + m for t, m in zip(total, masses, strict=True)]
        assert relative_error(aux.losses(1.0, 1.0), align + balance) < 1e-6
        (y.square().mean() + aux.losses(1.0, 1.0)).backward()
        (want.square().mean() + align + balance).backward()
    assert_same(gradients(model), gradients(twin))
    for got, want in zip(aux.gate_mass, total, strict=True):
        assert relative_error(got, want) < 1e-6 and want.sum() == pytest.approx(12)
    aux.update_directors(0.9)
    dexkernels.layer.update_directors([b.mlp for b in twin.blocks], total, 0.9)
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert all(m.count_nonzero() == 0 for m in aux.gate_mass)
    with pytest.raises(ValueError, match="expected a forward inside collect_aux since the last update"):
        aux.update_directors(0.9)


def test_an_optimizer_that_updates_the_directors_takes_the_masses():
    """Over micro-batches and steps, as `update_directors` and torch's AdamW."""
    model, twin = Stack(), Stack()
    rule = {"lr": 1e-2, "eps": 1e-6}
    fused = DEXAdamW(model, **rule)
    apart = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], **rule)
    collectors = [dexkernels.collect_aux(m) for m in (model, twin)]
    for step in range(2):
        for m, aux in zip((model, twin), collectors, strict=True):
            m.zero_grad()
            for seed in (2 * step, 2 * step + 1):
                with aux:
                    y = m(tokens(seed))
                (y.square().mean() + aux.losses()).backward()
        fused.step(gate_mass=collectors[0].take_gate_mass(), momentum=0.5)
        collectors[1].update_directors(0.5)
        apart.step()
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()), 1e-5)
    assert all(m.count_nonzero() == 0 for m in collectors[0].gate_mass)
    assert all(block.mlp.recording is None for block in model.blocks)
    with pytest.raises(ValueError, match="take_gate_mass: expected a forward inside collect_aux since the last"):
        collectors[0].take_gate_mass()
    with collectors[0], pytest.raises(ValueError, match="take_gate_mass: expected a call after collect_aux's block"):
        model(tokens(1))
        collectors[0].take_gate_mass()


def test_several_forwards_in_a_block_mean_losses_and_add_masses():
    model = Stack()
    with dexkernels.collect_aux(model) as aux:
        model(tokens(1)), model(tokens(2))
    first, second = model.by_hand(tokens(1)), model.by_hand(tokens(2))
    assert relative_error(aux.align_loss, (first[1] + second[1]) / 2) < 1e-6
    assert relative_error(aux.balance_loss, (first[2] + second[2]) / 2) < 1e-6
    assert all(torch.equal(m, a + b) for m, a, b in zip(aux.gate_mass, first[3], second[3], strict=True))


def test_shared_and_unused_layers():
    model = Stack()
    shared = model.blocks[0]
    order = nn.Sequential(shared, shared)
    model.register_forward_hook(lambda m, inputs, out: order(inputs[0]))
    model.forward = lambda x: x  # only the shared block runs, twice
    x = tokens(1)
    with dexkernels.collect_aux(model) as aux:
        y = model(x)
    assert [len(calls) for calls in aux.calls.values()] == [2, 0, 0]
    first, second = aux.calls["blocks.0.mlp"]
    want = (first.align_loss + second.align_loss) / 2 / L / L  # layer 0 of L, mean over L
    assert relative_error(aux.align_loss, want) < 1e-6
    before = [copy.deepcopy(b.mlp.director.state_dict()) for b in model.blocks]
    (y.sum() + aux.losses()).backward()
    aux.update_directors(0.5)
    moved = [
        any(not torch.equal(t, was[n]) for n, t in b.mlp.director.state_dict().items())
        for b, was in zip(model.blocks, before, strict=True)
    ]
    assert moved == [True, False, False]


def test_layers_on_the_director_path_are_left_alone():
    model = Stack()
    model.blocks[1].mlp.path = "director"
    with dexkernels.collect_aux(model) as aux:
        y = model(tokens(1))
    assert list(aux.layers) == ["blocks.0.mlp", "blocks.2.mlp"]
    (y.sum() + aux.losses()).backward()
    aux.update_directors(0.9)
    for block in model.blocks:
        block.mlp.path = "director"
    with pytest.raises(ValueError, match="at least one DEXLayer with path='experts'"):
        dexkernels.collect_aux(model)


def test_calls_that_ask_for_aux_themselves_are_theirs():
    model = Stack()
    with dexkernels.collect_aux(model) as aux:
        model.by_hand(tokens(1))
    assert not any(aux.calls.values())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradient(context):
    """Looking is allowed; training with it is an error that says so."""
    model, x = Stack(), tokens(1)
    with context(), dexkernels.collect_aux(model) as aux:
        model(x)
    with pytest.raises(
        ValueError, match="'blocks.0.mlp' to run with gradient, got a forward under no_grad or reentrant"
    ):
        aux.losses()
    with torch.no_grad():
        assert relative_error(aux.losses(1.0, 0.0), model.by_hand(x)[1]) < 1e-6


def test_reentrant_checkpointing_is_refused_before_backward():
    model = Stack()
    model.reentrant = True
    x = tokens(1).requires_grad_()
    with dexkernels.collect_aux(model) as aux:
        y = model(x)
    with pytest.raises(ValueError, match="reentrant activation checkpointing: set use_reentrant=False"):
        aux.losses()
    # Without the losses it trains, and is counted once.
    y.sum().backward()
    assert [len(calls) for calls in aux.calls.values()] == [1] * L
    aux.update_directors(0.9)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_update_before_backward_raises_in_backward(checkpointed):
    model = Stack()
    model.reentrant = False if checkpointed else None
    with dexkernels.collect_aux(model) as aux:
        y = model(tokens(1))
    loss = y.sum() + aux.losses()
    aux.update_directors(0.9)
    with pytest.raises(RuntimeError, match="update_director after backward|different number of tensors"):
        loss.backward()


def test_nested_blocks_are_refused():
    model = Stack()
    with dexkernels.collect_aux(model) as aux:
        with pytest.raises(ValueError, match="one block at a time, got a second one that records 'mlp'"):
            with dexkernels.collect_aux(model.blocks[2]):
                pass
        with pytest.raises(ValueError, match="one block at a time"):
            aux.__enter__()
        model(tokens(1))
    assert [len(calls) for calls in aux.calls.values()] == [1] * L


def test_two_models_can_be_recorded_at_once():
    one, two = Stack(0), Stack(9)
    with dexkernels.collect_aux(one) as a, dexkernels.collect_aux(two) as b:
        two(one(tokens(1)))
    assert all(len(calls) == 1 for calls in (*a.calls.values(), *b.calls.values()))


def test_forwards_of_other_threads_are_refused():
    model, errors = Stack(), []

    def forward():
        try:
            model(tokens(1))
        except ValueError as error:
            errors.append(str(error))

    with dexkernels.collect_aux(model) as aux:
        thread = threading.Thread(target=forward)
        thread.start(), thread.join()
        model(tokens(2))
    assert errors and "another thread" in errors[0]
    assert [len(calls) for calls in aux.calls.values()] == [1] * L


def test_misuse_says_what_to_do():
    model = Stack()
    with dexkernels.collect_aux(model) as aux:
        pass
    with pytest.raises(ValueError, match="expected a forward of the model in collect_aux's block"):
        aux.losses()
    with pytest.raises(ValueError, match="expected a forward inside collect_aux"):
        aux.update_directors(0.9)
    with aux:
        model(tokens(1))
        with pytest.raises(ValueError, match="read after the collect_aux block, got a read inside it"):
            aux.losses()
        with pytest.raises(ValueError, match="after collect_aux's block and backward, got one inside"):
            aux.update_directors(0.9)
    with pytest.raises(ValueError, match="noise_std: expected a number >= 0"):
        dexkernels.collect_aux(model, -1.0)
    with pytest.raises(ValueError, match="got none .see upcycle_"):
        dexkernels.collect_aux(nn.Linear(2, 2))


def test_a_forward_that_fails_closes_the_block_and_counts_nothing():
    model = Stack()
    aux = dexkernels.collect_aux(model)
    with pytest.raises(ValueError, match="x: expected"), aux:
        model.blocks[0](tokens(1))
        model.blocks[1].mlp(torch.zeros(2, 2))
    assert all(m.count_nonzero() == 0 for m in aux.gate_mass)
    with aux:
        model(tokens(1))
    assert [m.sum().item() for m in aux.gate_mass] == pytest.approx([4.0] * L)


def test_layers_do_not_keep_the_graph():
    model = Stack()
    with dexkernels.collect_aux(model) as aux:
        y = model(tokens(1))
    y.sum().backward()
    seen = weakref.ref(aux.calls["blocks.0.mlp"][0].align_loss)
    del aux, y
    gc.collect()
    assert seen() is None


def test_skip_and_bad_masses_change_nothing():
    model = Stack()
    before = copy.deepcopy(model.state_dict())
    aux = dexkernels.collect_aux(model)
    for x, skip in ((tokens(1), torch.tensor(True)), (tokens(1) * float("nan"), None)):
        with aux:
            model(x)
        aux.update_directors(0.5, skip=skip)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# --- torch.compile ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def graphs():
    """Counts the graphs that dynamo compiles."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def step(model, forward, x, noise, momentum, optimizer):
    with dexkernels.collect_aux(model, noise) as aux:
        y = forward(x)
    loss = y.square().mean() + aux.losses(0.3, 0.2)
    loss.backward()
    aux.update_directors(momentum)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "compiled model"])
def test_compiled_training_is_one_graph_while_schedules_move(wrapped):
    """fullgraph; the same numbers as eager, with noise 0 since a compiled graph may draw other random numbers."""
    model, twin = Stack(), Stack()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=False) for m in (model, twin)]
    noise, momentum = torch.tensor(0.0), torch.tensor(0.0)
    with graphs() as count:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for i in range(5):
            momentum.fill_(0.9 + i / 100)
            for group in (*optimizers[0].param_groups, *optimizers[1].param_groups):
                group["lr"] = 1e-2 / (i + 1)
            got = step(compiled if wrapped else model, compiled, tokens(i), noise, momentum, optimizers[0])
            want = step(twin, twin, tokens(i), noise, momentum, optimizers[1])
            assert relative_error(got, want) < 1e-5
        assert count() == 1
        for i in range(3):  # now with noise that moves: values change, the graph does not
            noise.fill_(1.0 / (i + 1))
            assert step(model, compiled, tokens(i), noise, momentum, optimizers[0]).isfinite()
        assert count() == 1
        compiled.eval()
        with torch.no_grad():
            assert relative_error(compiled(tokens(1)), model(tokens(1))) < 1e-5
        assert count() == 2
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.isfinite().all() and q.isfinite().all(), name


def test_blocks_compiled_one_by_one_share_their_graph():
    model = Stack()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with graphs() as count:
        for i in range(3):
            step(model, model, tokens(i), torch.tensor(0.5), torch.tensor(0.9), optimizer)
        assert count() <= L


def test_checkpointing_inside_a_compiled_model():
    """dynamo refuses side effects inside checkpointed regions unless it is told that they belong to forward only."""
    model, twin = Stack(), Stack()
    model.reentrant = twin.reentrant = False
    with graphs(), torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for m, forward in ((model, compiled), (twin, twin)):
            with dexkernels.collect_aux(m) as aux:
                y = forward(tokens(1))
            (y.square().mean() + aux.losses()).backward()
            assert [len(calls) for calls in aux.calls.values()] == [1] * L
    assert_same(gradients(model), gradients(twin), 1e-5)
