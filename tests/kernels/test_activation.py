"""The tanh GELU on both paths of the grouped MLP, against a loop over images in float64, in the interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

from dexkernels import DEXLayer  # noqa: E402
from dexkernels.ops import backends  # noqa: E402
from dexkernels.ops.grouped_mlp import triton as grouped_mlp  # noqa: E402
from dexkernels.ops.grouped_mlp.records import Slots  # noqa: E402
from dexkernels.ops.grouped_mlp.triton.configurations import TILES  # noqa: E402
from dexkernels.records import MLPWeights  # noqa: E402
from dexkernels.testing import randomize_, relative_error  # noqa: E402

from . import aligned_cases  # noqa: E402
from .mlp_cases import check, make, run, tiles  # noqa: E402

TANH = {"activation": "gelu_tanh"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("N, D, H, halves", [(5, 24, 40, False), (17, 19, 35, True), (1, 8, 16, False)])
def test_gather_path(N, D, H, halves, dtype):
    case = make(4, N, D, H, 3, 2, dtype)
    got = check(*case, tiling=tiles(16, 32, 16, halves), **TANH)
    exact = run(*case, tiling=tiles(16, 32, 16, halves))
    floor = 1e-6 if dtype == torch.float32 else 3e-5
    assert all(relative_error(a, b) > floor for a, b in zip(got[:4], exact[:4], strict=True))


@aligned_cases.both_dtypes
@pytest.mark.parametrize("B, N, E, K", [(3, 65, 3, 2), (8, 64, 2, 2), (3, 66, 20, 2)], ids=["sum", "pairs", "by slot"])
def test_aligned_path(B, N, E, K, dtype):
    aligned_cases.check(*make(B, N, 16, 24, E, K, dtype), **TANH)


def test_a_director_and_an_expert_without_images():
    inputs = make(3, 5, 16, 24, 4, 2, torch.float32, torch.tensor([[0, 1], [1, 0], [1, 3]]))
    got = check(*inputs, director=[w[0] for w in make(1, 1, 16, 24, 1, 1, torch.float32, seed=1)[4]], **TANH)
    assert all(torch.equal(grad[2], torch.zeros_like(grad[2])) for grad in got[3:7])


def test_large_values_have_the_slope_of_a_line():
    """Where z^3 is infinite: above, the GELU is z, and its slope 1; below, both are 0."""
    x, grad_out, gates, indices, weights = make(2, 3, 8, 16, 1, 1, torch.float32)
    weights = [w.clone() for w in weights]
    weights[1][:] = torch.tensor([1e20, -1e20]).repeat(8)
    weights[2] *= 1e-20
    got = run(x, grad_out, gates, indices, weights, **TANH)
    exact = run(x, grad_out, gates, indices, weights)
    for a, b in zip(got, exact, strict=True):
        assert a.isfinite().all() and relative_error(a, b) < 1e-6


def test_a_layer_computes_with_the_kernels(monkeypatch):
    if torch.get_default_device().type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    layers = [DEXLayer(8, 12, 4, 2, backend=backend, activation="gelu_tanh") for backend in ("triton", "reference")]
    randomize_(layers[0], 0)
    layers[1].load_state_dict(layers[0].state_dict())
    asked, load = [], backends.load
    monkeypatch.setattr(backends, "load", lambda op, backend: asked.append((op, backend)) or load(op, backend))
    answers = []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        answers.append([y.detach(), leaf.grad, layer.experts.fc1_weight.grad])
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)
    assert ("grouped_mlp", "triton") in asked


@pytest.mark.parametrize(
    "N, D, H, blamed",
    [
        (1, 16, 2**25, "fc1_weight: expected D and H of at most"),
        (1, 2**25, 16, "fc1_weight: expected D and H of at most"),
        (1, 2**16, 2**15, "fc1_weight: .* D\\*H of at most"),
        (2**20, 2**12, 16, "x: expected images of at most"),
        (2**31, 16, 16, "x: expected at most .* rows"),
    ],
)
def test_sizes_past_32_bits_are_refused(N, D, H, blamed):
    def meta(*shape, dtype=torch.float16):
        return torch.empty(shape, dtype=dtype, device="meta")

    slots = Slots(meta(1, 1), *(meta(n, dtype=torch.int64) for n in (1, 2)))
    weights = MLPWeights(meta(1, H, D), meta(1, H), meta(1, D, H), meta(1, D))
    with pytest.raises(ValueError, match=blamed):
        grouped_mlp.forward(meta(1, N, D), slots, weights, True, tiles=TILES)
