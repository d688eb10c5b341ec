"""`grouped_mlp` by the CUDA library: what it leaves to another backend, and which tensors it copies first.

tests/emulator runs its kernels, tests/native its launch arithmetic.
"""

import importlib
import types

import pytest
import torch
from operator_cases import K, leaves

from dexkernels import DEXLayer, grouped_mlp, native, route
from dexkernels.ops import backends
from dexkernels.ops.grouped_mlp import cuda

operator = importlib.import_module("dexkernels.ops.grouped_mlp")


@pytest.mark.parametrize(
    "D, H, dtype, activation, need",
    [
        (768, 3072, torch.bfloat16, "gelu", None),
        (8, 16, torch.float16, "gelu", None),
        (12, 16, torch.float16, "gelu", operator.UNEVEN),
        (16, 15, torch.bfloat16, "gelu", operator.UNEVEN),
        (0, 16, torch.bfloat16, "gelu", operator.UNEVEN),
        (16, 16, torch.float32, "gelu", operator.WIDE),
        (12, 16, torch.float64, "gelu_tanh", operator.WIDE),
        (16, 16, torch.bfloat16, "gelu_tanh", operator.TANH),
        (2**25, 8, torch.float32, "gelu_tanh", operator.LARGE),
    ],
)
def test_what_a_call_needs(D, H, dtype, activation, need):
    weight = torch.empty(2, H, D, device="meta")
    assert operator.need_of(5, 100, weight, dtype, activation) == need
    assert need is None or need in operator.LIMITS["cuda"]


@pytest.fixture
def loaded(monkeypatch) -> list[tuple[str, str]]:
    """The (operator, backend) that calls load, on a machine that has the library; plain torch computes."""
    monkeypatch.setattr(native, "why_not", lambda: None)
    calls, load = [], backends.load
    monkeypatch.setattr(backends, "load", lambda op, backend: calls.append((op, backend)) or load(op, "reference"))
    return calls


@pytest.mark.skipif("config.getoption('--backend')", reason="--backend replaces the choice")
def test_a_layer_takes_it_where_it_can(loaded):
    for width, autocast, taken in ((16, True, True), (16, False, False), (12, True, False)):
        loaded.clear()
        layer = DEXLayer(width, 32, 4, 2, backend="cuda")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer(torch.randn(3, 5, width))
        assert (("grouped_mlp", "cuda") in loaded) == taken, (width, autocast)


def test_the_operator_names_what_it_cannot_compute(loaded):
    x, router, *weights = leaves()
    r = route(x.detach(), router.detach(), K)
    with pytest.raises(ValueError, match="'cuda' cannot run grouped_mlp: no elements of more than 16 bits: its prod"):
        grouped_mlp(x, r, *weights, backend="cuda")
    half = [t.detach().bfloat16() for t in (x, *weights)]
    with pytest.raises(ValueError, match="no (widths that are not multiples of 8|tanh GELU)"):
        grouped_mlp(half[0], r, *half[1:], activation="gelu_tanh", backend="cuda")


def test_the_report_names_the_limits(monkeypatch):
    rows = {(r.op, r.backend): r for r in backends.report()}
    limits = rows["grouped_mlp", "cuda"].limits
    assert all(f"no {feature}: " in limits for feature in operator.LIMITS["cuda"])


# --- how tensors are handed over --------------------------------------------------------------------------------------


def half(*shape) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def test_aligned_rows_are_taken_as_they_are():
    wide = half(3, 7, 40)
    for t in (wide, wide[:, 1:, 8:24], wide[1:2], wide[:, :1], half(4, 16)[None].expand(3, 4, 16)):
        assert cuda.ready(t) is t


@pytest.mark.parametrize(
    "t",
    [
        half(3 * 5 * 16 + 1)[1:].view(3, 5, 16),
        half(3, 5, 17)[..., :16],
        half(3, 16, 5).mT,
        half(3, 5, 32)[..., ::2],
    ],
    ids=["address", "rows", "transposed", "every second"],
)
def test_others_are_copied(t):
    copy = cuda.ready(t)
    assert copy is not t and torch.equal(copy, t) and copy.is_contiguous() and copy.data_ptr() % 16 == 0


@pytest.mark.parametrize("slots", [1, 7, 448, 29120])
@pytest.mark.parametrize("experts", [1, 8, 128])
def test_pieces_of_weight_gradients(slots, experts):
    """Uniform routing is not cut, and a piece is never longer than one and a half times the average or a third."""
    for tiles in (1, 6, 144, 576):
        most = cuda.most_slots(slots, experts, tiles)
        assert most >= 1 and most >= slots // experts
        assert most <= max(1.5 * slots / experts, slots * tiles / (cuda.WAVES * cuda.PROGRAMS), 1)


def test_launches_that_fail_are_named(monkeypatch):
    """What the library raises reaches the caller."""

    def fails(**_):
        raise RuntimeError("grouped_mlp, fc1: no NVIDIA driver on this machine")

    monkeypatch.setattr(native, "library", types.SimpleNamespace(grouped_mlp_fc1=fails))
    monkeypatch.setattr(cuda, "_on_device", lambda x: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    slots = cuda.Slots(torch.ones(2, 1), torch.arange(2), torch.tensor([0, 2]))
    weights = cuda.MLPWeights(half(1, 8, 16), half(1, 8), half(1, 16, 8), half(1, 16))
    with pytest.raises(RuntimeError, match="grouped_mlp, fc1: no NVIDIA driver"):
        cuda.forward(half(2, 3, 16), slots, weights, True)
