"""Small layers, their inputs, one step of them, and what they compute by formulas; for the tests of `DEXLayer`."""

import torch
from torch.utils.checkpoint import checkpoint

from dexkernels import DEXLayer
from dexkernels.testing import randomize_

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


def run(layer, x, recompute, **options):
    if not recompute:
        return layer(x, return_aux=True, **options)
    return checkpoint(lambda x: layer(x, return_aux=True, **options), x, use_reentrant=False)
