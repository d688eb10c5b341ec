"""`torch.compile` by inductor: one graph, no recompile when schedules move, values and gradients those of eager.

Tiny shapes: nearly all the time is inductor's own.
"""

import copy
import functools
import shutil

import pytest
import torch

from dex.model import Block
from dexkernels import DEXLayer
from dexkernels.testing import randomize_, relative_error

D, H, E, K, B, N = 8, 16, 4, 2, 3, 5
SCHEDULE = [(0.6, 0.99, 1e-2), (0.4, 0.995, 2e-2), (0.2, 0.999, 5e-3)]
"""noise_std, momentum and learning rate of each step."""

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="inductor needs a C++ compiler for the CPU, and there is none",
)


@pytest.fixture
def compiled():
    """``compiled(f)``: f by inductor, in one graph, its shapes fixed; a recompile is an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda f, fullgraph=True: torch.compile(f, backend="inductor", fullgraph=fullgraph, dynamic=False)
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def scalars(step: int) -> list[torch.Tensor]:
    return [torch.tensor(v) for v in SCHEDULE[step]]


def draw(step: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def close(got, want):
    """Equal up to the rounding of sums: an entry near zero may be the rest of terms as large as the largest entry.

    Eager float32 itself is up to 5e-6 of the largest entry away from float64 in these gradients.
    """
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5 * float(want.abs().max()))


def layer_objective(layer, x, noise, noise_std):
    y, aux = layer(x, noise_std=noise_std, router_noise=noise, return_aux=True)
    return y.square().sum() + 3 * aux.align_loss + aux.balance_loss, aux


def block_objective(block, x, noise, noise_std):
    y, aux = block(x, noise_std, noise, return_aux=True)
    return y.square().sum() + 3 * aux.align_loss + aux.balance_loss, aux


def block_of():
    torch.manual_seed(0)
    block = Block(D, 2, H, E, K, align="cosine")
    randomize_(block.dex)
    return block


def gradients(module, objective, step, x):
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    noise_std, momentum, _ = scalars(step)
    loss, aux = objective(module, x, draw(step + 10, B, 1, E), noise_std)
    loss.backward()
    return {"loss": loss.detach(), "mass": aux.gate_mass, "x": x.grad} | {
        n: p.grad for n, p in module.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    "make, objective",
    [
        (lambda: randomize_(DEXLayer(D, H, E, K)), layer_objective),
        (block_of, block_objective),
    ],
    ids=["layer", "block"],
)
def test_forward_and_backward(compiled, make, objective):
    module = make()
    fast = compiled(objective)
    for step in range(len(SCHEDULE)):
        x = draw(step, B, N, D)
        want = gradients(module, objective, step, x)
        got = gradients(module, fast, step, x)
        assert got.keys() == want.keys()
        for name in want:
            close(got[name], want[name])
    assert graphs() == 1


@pytest.mark.slow
def test_under_autocast(compiled):
    """The copies of the weights are made in the graph: they follow the weights, and nothing is compiled anew."""
    layer, device = randomize_(DEXLayer(D, H, E, K)), torch.get_default_device().type

    def objective(layer, x, noise, noise_std):
        with torch.autocast(device, torch.bfloat16):
            y, aux = layer(x, noise_std=noise_std, router_noise=noise, return_aux=True)
        return y.float().square().sum() + 3 * aux.align_loss + aux.balance_loss, aux

    fast = compiled(objective)
    for step in range(len(SCHEDULE)):
        x = draw(step, B, N, D)
        want, got = (gradients(layer, f, step, x) for f in (objective, fast))
        for name in want:
            assert got[name].dtype == torch.float32 and relative_error(got[name], want[name]) < 1e-2, name
        layer.update_director(want["mass"], 0.5)
        with torch.no_grad():
            layer.experts.fc1_weight.mul_(1.5)
    assert graphs() == 1


@pytest.mark.slow
def test_training_step_with_moving_schedules(compiled):
    """Forward, backward, GEMA and AdamW; noise, momentum and learning rate are tensors: each is compiled once."""
    model = randomize_(DEXLayer(D, H, E, K))
    twin = copy.deepcopy(model)

    def train(model, wrap):
        lr = torch.tensor(0.0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, foreach=False)
        forward, update = wrap(functools.partial(layer_objective, model)), wrap(model.update_director)
        # torch.optim itself breaks the graph before its step, so this one is not asked to be whole.
        apply = wrap(optimizer.step, fullgraph=False)
        losses = []
        for step in range(len(SCHEDULE)):
            noise_std, momentum, rate = scalars(step)
            lr.copy_(rate)
            loss, aux = forward(draw(step, B, N, D), draw(step + 10, B, 1, E), noise_std)
            loss.backward()
            update(aux.gate_mass, momentum)
            apply()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    close(train(model, compiled), train(twin, lambda f, fullgraph=True: f))
    for (name, p), q in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert graphs() == 3


def test_a_float_schedule_would_be_noticed(compiled):
    """What the test above relies on: a momentum that is a float is a constant of the graph, so moving it recompiles."""
    layer = randomize_(DEXLayer(D, H, E, K))
    update = torch.compile(layer.update_director, backend="eager", fullgraph=True)
    update(torch.ones(E), 0.9)
    with pytest.raises(torch._dynamo.exc.RecompileError):
        update(torch.ones(E), 0.8)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_changing_batch_sizes_compile_twice_at_most(masked):
    """Once for the first size, once for all others."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = randomize_(DEXLayer(D, H, E, K, route_from="mean"), 0)
    function = torch.compile(
        lambda x, mask: layer(x, token_mask=mask, return_aux=True), backend="inductor", fullgraph=True
    )
    for size in (B, 2 * B, B + 1, 5 * B, B):
        x, mask = draw(size, size, N, D), (draw(1, size, N) > -1 if masked else None)
        answers = []
        for f in (function, lambda x, mask: layer(x, token_mask=mask, return_aux=True)):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y, aux = f(leaf, mask)
            (y.square().sum() + aux.align_loss + aux.balance_loss).backward()
            answers.append(
                [y.detach(), aux.gate_mass, leaf.grad, layer.experts.fc1_weight.grad, layer.router_weight.grad]
            )
        for got, want in zip(*answers, strict=True):
            close(got, want)
    assert graphs() == 2
    torch._dynamo.reset()


def test_an_exported_layer_takes_batches_of_any_size():
    """With few tokens: which of two counts is larger depends on the batch there, and must not be kept in the graph."""
    layer = randomize_(DEXLayer(D, H, E, K), 0).eval()
    sizes = {0: torch.export.Dim("batch", max=1024)}
    with torch.no_grad():
        exported = torch.export.export(layer, (draw(0, B, N, D),), dynamic_shapes=(sizes,)).module()
        for size in (2, 40, 1000):
            x = draw(size, size, N, D)
            close(exported(x), layer(x))
