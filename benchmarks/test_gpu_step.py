"""The layer step, a stack of 12 layers and the whole training step, against their baselines and the limits.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen.
On a GPU: `--device cuda`; `--tiny` executes everything, on a CPU too.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dexkernels import DEXLayer
from dexkernels.testing import ExpertLoop, randomize_

from .measuring import Case
from .shapes import FLOAT32, SETS, able, cls_rows, draw

LAYERS = 12


@pytest.mark.parametrize("masters", ["float32", "autocast"])
def test_layer_step(timer, shape_name, shape, measure, masters):
    """Forward, losses, backward and GEMA of one layer with float32 masters, in float32 or bf16 by autocast."""
    if masters == "float32" and shape_name not in FLOAT32:
        pytest.skip("measured on other shapes")
    B, N, D, H, E, K = (shape[k] for k in "BNDHEK")
    base = randomize_(DEXLayer(D, H, E, K)).to(timer.device)
    xs = [draw(timer, B, N, D, seed=i) for i in range(SETS)]
    for i, x in enumerate(xs):
        x[:, 0] = cls_rows(timer, shape, base.router_weight.detach(), i)
    grad_out = draw(timer, B, N, D, seed=9)
    dtype = torch.bfloat16 if masters == "autocast" else torch.float32
    # With momentum 1 the director stays the same for every step and the check; the work is the same.
    momentum = torch.ones((), device=timer.device)

    def step(layer, i: int, real: torch.dtype = torch.float32) -> list[Tensor]:
        layer.zero_grad()
        x = xs[i % SETS].to(real).detach().requires_grad_()
        with torch.autocast(timer.device.type, torch.bfloat16, enabled=masters == "autocast" and real != torch.float64):
            y, aux = layer(x, return_aux=True)
        ((y.to(real) * grad_out.to(real)).sum() + aux.align_loss + aux.balance_loss).backward()
        layer.update_director(aux.gate_mass, momentum)
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        return [y.detach(), aux.align_loss.detach(), x.grad, *grads]

    def with_backend(backend: str) -> DEXLayer:
        layer = copy.deepcopy(base)
        layer.backend = backend
        return layer

    loop = ExpertLoop(D, H, E, K).to(timer.device)
    loop.load_state_dict(base.reference_state_dict())

    def loop_step(i: int) -> None:
        loop.zero_grad()
        x = xs[i % SETS].detach().requires_grad_()
        with torch.autocast(timer.device.type, torch.bfloat16, enabled=masters == "autocast"):
            y, align, balance, mass = loop(x)
        ((y * grad_out).sum() + align + balance).backward()
        loop.update_director(mass, 0.999)

    rows = draw(timer, B * K * N, D, dtype=dtype, seed=30)
    hidden = draw(timer, B * K * N, H, dtype=dtype, seed=31)
    w1, w2 = base.experts.fc1_weight[0].detach().to(dtype), base.experts.fc2_weight[0].detach().to(dtype)

    def dense(i: int) -> None:
        torch.mm(rows, w1.t()), torch.mm(hidden, w2.t())
        torch.mm(rows, w2), torch.mm(rows.t(), hidden), torch.mm(hidden, w1), torch.mm(hidden.t(), rows)
        F.linear(rows[: B * N], w1), F.linear(hidden[: B * N], w2)

    exact_layer = copy.deepcopy(base).double()
    layers = {b: with_backend(b) for b in able("grouped_mlp", timer, dtype)}
    measure(
        Case(
            "layer step",
            shape,
            dtype,
            flops=(12 * K + 4) * B * N * D * H,
            num_bytes=4 * (E * 2 * D * H * 4 + 5 * B * N * D),
        ),
        {b: functools.partial(step, layer) for b, layer in layers.items()},
        step(exact_layer, 0, torch.float64),
        {"expert loop": loop_step, "dense products": dense},
    )


class Stack(nn.Module):
    """The MLP parts of a transformer: norm, layer and residual, repeated; losses are summed."""

    def __init__(self, layers: list[nn.Module], dim: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        losses, masses = 0, []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            if isinstance(layer, DEXLayer):
                y, aux = layer(norm(x), return_aux=True)
                align, balance, mass = aux.align_loss, aux.balance_loss, aux.gate_mass
            else:
                y, align, balance, mass = layer(norm(x))
            x, losses = x + y, losses + align + balance
            masses.append(mass)
        return x, losses, masses


@pytest.mark.parametrize("shape_name", ["ViT-B", "ViT-B, N 257"], indirect=True)
def test_stack_of_layers(timer, shape, measure):
    """12 layers forward and backward in bf16 by autocast: time, and memory, which grows with depth."""
    B, N, D, H, E, K = (shape[k] for k in "BNDHEK")
    dtype = torch.bfloat16
    stack = Stack([randomize_(DEXLayer(D, H, E, K), seed=i) for i in range(LAYERS)], D).to(timer.device)
    xs = [draw(timer, B, N, D, seed=i) for i in range(SETS)]
    grad_out = draw(timer, B, N, D, seed=9)

    def step(net: nn.Module, i: int, backend: str | None, real: torch.dtype = torch.float32) -> list[Tensor]:
        for layer in net.layers if backend else ():
            layer.backend = backend
        net.zero_grad(set_to_none=True)
        with torch.autocast(timer.device.type, dtype, enabled=real != torch.float64):
            y, losses, _ = net(xs[i % SETS].to(real))
        ((y.to(real) * grad_out.to(real)).sum() + losses).backward()
        return [losses.detach()]

    loops = [ExpertLoop(D, H, E, K) for _ in range(LAYERS)]
    for loop, layer in zip(loops, stack.layers, strict=True):
        loop.load_state_dict(layer.reference_state_dict())
    loop_stack = Stack(loops, D).to(timer.device)
    exact = step(copy.deepcopy(stack).double(), 0, "reference", torch.float64)
    measure(
        Case(f"{LAYERS} layers forward + backward", shape, dtype, flops=LAYERS * (12 * K + 4) * B * N * D * H),
        {b: functools.partial(step, stack, backend=b) for b in able("grouped_mlp", timer, dtype)},
        exact,
        {},
        theirs={"expert loop": lambda: functools.partial(step, loop_stack, backend=None)},
    )
    # A row holds only the memory of its backend, so the loops have their own row.
    measure(
        Case(f"{LAYERS} expert loops forward + backward", shape, dtype, flops=LAYERS * (12 * K + 4) * B * N * D * H),
        {"reference": functools.partial(step, loop_stack, backend=None)},
        exact,
        {},
    )


STEPS = {
    "ViT-B": ({"embed_dim": 768, "depth": 12, "num_heads": 12}, 224),
    "ViT-L": ({"embed_dim": 1024, "depth": 24, "num_heads": 16}, 64),
}
TINY_MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_experts": 4}
TINY_MODEL |= {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}


@pytest.mark.parametrize("size", STEPS)
def test_training_step(timer, tiny, measure, size):
    """Forward, backward, GEMA, clip and AdamW of the masked autoencoder in bf16 by autocast, without data loading.

    The dense control does the same products with one MLP of K times the hidden size, without a director.
    """
    pytest.importorskip("yaml", reason="a model is configured in YAML")
    from dex.config import Config, from_dict
    from dex.model.build import build_model
    from dex.sizing.estimate import training_flops

    widths, images_a_step = STEPS[size]
    few, images_a_step = (2, 4) if tiny else (4, images_a_step)
    dtype = torch.bfloat16
    config = from_dict({"model": TINY_MODEL if tiny else widths}, Config())
    dense_config = from_dict({"model": (TINY_MODEL if tiny else widths) | {"num_experts": 0}}, Config())
    m = config.model
    torch.manual_seed(0)
    patches = (m.img_size // m.patch_size) ** 2
    images = [draw(timer, images_a_step, 3, m.img_size, m.img_size, seed=i) for i in range(SETS)]
    mask_noise = draw(timer, images_a_step, patches, seed=20)
    router_noise = [draw(timer, images_a_step, 1, m.num_experts, seed=30 + i) for i in range(m.depth)]
    noise_std = torch.full((), 0.1, device=timer.device)
    # With momentum 1, rate 0 and no decay the weights stay the same for every step and the check; the work is the same.
    momentum, rate = torch.ones((), device=timer.device), torch.zeros((), device=timer.device)

    def forward(model: nn.Module, image: Tensor, count: int, real: torch.dtype = torch.float32):
        enabled = real != torch.float64
        noise = [n[:count] for n in router_noise] if model.encoder.dex_layers else None
        with torch.autocast(timer.device.type, dtype, enabled=enabled):
            return model(image[:count].to(real), m.mask_ratio, noise_std, mask_noise[:count], noise)

    def with_optimizer(model: nn.Module):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True, capturable=timer.on_gpu)
        if timer.on_gpu:
            optimizer.param_groups[0]["lr"] = rate
        return parameters, optimizer

    def step(model: nn.Module, optimizer: tuple, image: Tensor, backend: str | None = None) -> None:
        for layer in model.encoder.dex_layers:
            layer.backend = backend
        parameters, adamw = optimizer
        adamw.zero_grad(set_to_none=True)
        out = forward(model, image, images_a_step)
        (out.loss + 0.01 * out.align_loss + 0.01 * out.balance_loss).backward()
        model.update_directors(out.gate_mass, momentum)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()

    def losses(model: nn.Module, i: int, backend: str, real: torch.dtype = torch.float32) -> list[Tensor]:
        for layer in model.encoder.dex_layers:
            layer.backend = backend
        with torch.no_grad():
            out = forward(model, images[i % SETS], few, real)
        return [out.loss, out.align_loss]

    model, dense = (build_model(c).to(timer.device).train() for c in (config, dense_config))
    exact = losses(copy.deepcopy(model).double(), 0, "reference", torch.float64)
    dex_optimizer, dense_optimizer = with_optimizer(model), with_optimizer(dense)
    able_here = able("grouped_mlp", timer, dtype)
    others = {"dense control": lambda i: step(dense, dense_optimizer, images[i % SETS])}
    if timer.on_gpu and "triton" in able_here:
        from dex.train.cuda_graph import StepGraph

        # A separate model, since a captured graph is bound to its weights.
        captured = copy.deepcopy(model)
        optimizer, graph = with_optimizer(captured), StepGraph(timer.device, list(captured.parameters()))

        def compute(image: Tensor) -> None:
            step(captured, optimizer, image, "triton")

        others["the step as a CUDA graph"] = lambda i: graph(compute, images[i % SETS])
    measure(
        Case(
            f"training step of {size}",
            {"B": images_a_step, "N": 1 + int(patches * (1 - m.mask_ratio)), "E": m.num_experts, "K": m.top_k},
            dtype,
            flops=images_a_step * sum(training_flops(config).values()),
        ),
        {b: lambda i, b=b: step(model, dex_optimizer, images[i % SETS], b) for b in able_here},
        exact,
        others,
        check={b: functools.partial(losses, model, backend=b) for b in able_here},
    )
