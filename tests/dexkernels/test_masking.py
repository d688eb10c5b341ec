"""With a mask an image has the outputs, losses and gradients that it has without padding, whatever padding holds."""

import contextlib
import copy

import pytest
import torch
from layer_cases import D, layer_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from dexkernels import align_loss, collect_aux, mask_tokens, reference
from dexkernels.testing import relative_error

B, N, E, K = 5, 7, 6, 2
REAL = [7, 3, 1, 5, 0]
"""Real tokens of each image; the last one is nothing but padding."""


def padded(fill=0.0, dtype=torch.float64):
    x = torch.randn(B, N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    mask = torch.arange(N) < torch.tensor(REAL)[:, None]
    return torch.where(mask[..., None], x, fill), mask


def upstream(n):
    return torch.linspace(-1, 1, n * D, dtype=torch.float64).view(1, n, D)


def apart(layer, x, balanced=True):
    """Every image by itself, without its padding: outputs, losses, mass, and gradients of x and the parameters."""
    images = [x[b : b + 1, :n].detach().requires_grad_() for b, n in enumerate(REAL) if n]
    results = [layer(image, return_aux=True) for image in images]
    align = sum(image.shape[1] * aux.align_loss for image, (_, aux) in zip(images, results, strict=True)) / sum(REAL)
    rows = torch.cat([i[:, :1] if layer.route_from == "cls" else i.mean(1, keepdim=True) for i in images])
    if layer.routing == "token":
        rows = torch.cat(images, 1)
    balance = layer(rows, return_aux=True)[1].balance_loss
    loss = sum((y * upstream(y.shape[1])).sum() for y, _ in results) + 3 * align + balance
    inputs = [*images, *(p for p in layer.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(loss, inputs)
    mass = sum(aux.gate_mass for _, aux in results)
    return [y for y, _ in results], align, balance, mass, grads[: len(images)], grads[len(images) :]


@pytest.mark.parametrize("fill", [0.0, 1e30, float("nan")])
@pytest.mark.parametrize("align", ["kd", "cosine", "mse"])
@pytest.mark.parametrize("source", ["cls", "mean", "token"])
def test_same_as_without_padding(source, align, fill):
    options = {"routing": "token"} if source == "token" else {"route_from": source}
    layer = layer_of(align=align, **options)
    x, mask = padded(fill)
    ys, align_want, balance, mass, of_images, of_parameters = apart(layer, x)
    x.requires_grad_()
    y, aux = layer(x, token_mask=mask, return_aux=True)
    loss = sum((y[b : b + 1, :n] * upstream(n)).sum() for b, n in enumerate(REAL) if n)
    loss = loss + 3 * aux.align_loss + aux.balance_loss + y.sum() - y[mask].sum()
    dx, *dparameters = torch.autograd.grad(loss, [x, *(p for p in layer.parameters() if p.requires_grad)])
    assert not y[~mask].any() and not dx[~mask].any()
    for b, want in enumerate(ys):
        assert relative_error(y[b : b + 1, : REAL[b]], want) < 1e-14
        assert relative_error(dx[b : b + 1, : REAL[b]], of_images[b]) < 1e-12
    torch.testing.assert_close((aux.align_loss, aux.balance_loss, aux.gate_mass), (align_want, balance, mass))
    for got, want in zip(dparameters, of_parameters, strict=True):
        torch.testing.assert_close(got, want)


def test_a_mask_without_padding_changes_nothing():
    layer = layer_of(route_from="mean")
    x = padded()[0]
    (y, aux), (want, aux_want) = (
        layer(x, token_mask=mask, return_aux=True) for mask in (torch.ones(B, N, dtype=torch.bool), None)
    )
    torch.testing.assert_close((y, *aux), (want, *aux_want))


def test_nothing_but_padding():
    layer = layer_of(route_from="mean")
    x = padded(float("nan"))[0].requires_grad_()
    y, aux = layer(x, token_mask=torch.zeros(B, N, dtype=torch.bool), return_aux=True)
    assert not y.any() and aux.align_loss == 0 and aux.balance_loss == 0 and not aux.gate_mass.any()
    (y.sum() + aux.align_loss + aux.balance_loss).backward()
    assert not x.grad.any() and all(not p.grad.any() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("path", ["experts", "director"])
def test_in_evaluation_and_on_the_director_path(path):
    layer = layer_of(route_from="mean", path=path).eval()
    x, mask = padded(float("nan"))
    y = layer(x, token_mask=mask)
    assert not y[~mask].any()
    for b, n in enumerate(REAL):
        assert n == 0 or relative_error(y[b : b + 1, :n], layer(x[b : b + 1, :n])) < 1e-14


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("source", ["cls", "mean", "token"])
def test_routing_is_that_of_the_specification(source, noisy):
    options = {"routing": "token"} if source == "token" else {"route_from": source}
    layer, (x, mask) = layer_of(**options), padded()
    leaves = [x.requires_grad_(), layer.router_weight]
    noise = {}
    if noisy:
        drawn = torch.randn(B, N if source == "token" else 1, E, generator=torch.Generator().manual_seed(2))
        noise = {"noise_std": 0.5, "router_noise": drawn.double()}
    aux = layer(x, token_mask=mask, return_aux=True, **noise)[1]
    noise |= {"usage_ema": layer.usage_ema}
    want = reference.route(*leaves, K, token_mask=mask, **options, **noise)
    for name in ("gates", "expert_indices", "balance_loss", "gate_mass"):
        torch.testing.assert_close(getattr(aux, name), getattr(want, name))
    grads, wanted = (
        torch.autograd.grad(r.balance_loss + (r.gates * r.expert_indices).sum(), leaves) for r in (aux, want)
    )
    torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["kd", "cosine", "mse"])
def test_align_loss_is_that_of_the_specification(kind, dtype):
    y, mask = padded(float("nan"), dtype)
    d = padded(3.0, dtype)[0].flip(-1)
    y.requires_grad_()
    answers = []
    for function in (align_loss, reference.align_loss):
        loss = function(y, d, kind, token_mask=mask)
        (grad,) = torch.autograd.grad(loss, y)
        answers.append((loss, grad[mask]))
        assert not grad[~mask].nan_to_num().any()
    torch.testing.assert_close(*answers)


class Host(nn.Module):
    """Two blocks that pass no mask on."""

    def __init__(self, **options):
        super().__init__()
        self.layers = nn.ModuleList(layer_of(route_from="mean", seed=s) for s in (0, 1))
        self.checkpointed = False

    def forward(self, x):
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


def collected(model, x, mask, inside=True):
    """Loss, masses and gradients of a step; backward inside the block or after it."""
    model.zero_grad()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mask_tokens(model, mask))
        with collect_aux(model) as aux:
            y = model(x)
        loss = y[mask].square().mean() + aux.losses(1.0, 1.0)
        if not inside:
            stack.close()
        loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    return [y, loss, *aux.gate_mass, *grads]


def test_a_host_that_passes_no_mask_on():
    model, (x, mask) = Host(), padded()
    got = collected(model, x, mask)
    h, losses = x, []
    for layer in model.layers:
        y, aux = layer(h, token_mask=mask, return_aux=True)
        h, losses = h + y, [*losses, aux]
    torch.testing.assert_close(got[0], h)
    align = (losses[0].align_loss / 2 + losses[1].align_loss) / 2
    balance = (losses[0].balance_loss + losses[1].balance_loss) / 2
    torch.testing.assert_close(got[1], h[mask].square().mean() + align + balance)
    torch.testing.assert_close(got[2:4], [aux.gate_mass for aux in losses])
    assert all(layer.token_mask is None for layer in model.layers)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(x)[mask], h[mask])  # padding is no part of the mean by the mask alone


def test_checkpointed_forwards_are_recomputed_in_the_block():
    model, (x, mask) = Host(), padded()
    want = collected(model, x, mask)
    model.checkpointed = True
    torch.testing.assert_close(collected(model, x, mask), want)
    with pytest.raises(Exception, match="[Rr]ecomput"):
        collected(model, x, mask, inside=False)


def test_compiled_with_masks_that_change():
    model, (x, mask) = Host(), padded()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    for m in (mask, mask.flip(0), mask):
        torch.testing.assert_close(collected(compiled, x, m)[:4], collected(model, x, m)[:4])


def test_blocks_nest_and_end_with_an_error():
    model, (_, mask) = Host(), padded()
    with mask_tokens(model, mask):
        with contextlib.suppress(RuntimeError), mask_tokens(model.layers[0], ~mask):
            assert torch.equal(model.layers[0].token_mask, ~mask) and model.layers[1].token_mask is mask
            raise RuntimeError
        assert model.layers[0].token_mask is mask
    assert model.layers[0].token_mask is None


def test_what_is_no_mask_is_refused():
    layer, (x, mask) = layer_of(route_from="mean"), padded()
    for wrong in (mask.float(), mask[:, 1:], mask[0], [[True]]):
        with pytest.raises(ValueError, match=r"token_mask: expected torch.bool \[5, 7\], true for real tokens, got"):
            layer(x, token_mask=wrong)
    with pytest.raises(ValueError, match="token_mask: expected torch.bool, true for real tokens, got torch.int64"):
        mask_tokens(layer, mask.long()).__enter__()
    with pytest.raises(ValueError, match="model: expected at least one DEXLayer"):
        mask_tokens(nn.Linear(2, 2), mask).__enter__()
    with pytest.raises(ValueError, match="model: expected a torch.nn.Module, got list"):
        mask_tokens([], mask).__enter__()
    with pytest.raises(ValueError, match="token_mask: expected a real token 0, .* whose token 0 is padding"):
        layer_of()(x, token_mask=mask.flip(1))
    with pytest.raises(ValueError, match="backend: 'triton' cannot run align_loss: no token_mask: its kernel"):
        align_loss(x, x, token_mask=mask, backend="triton")
