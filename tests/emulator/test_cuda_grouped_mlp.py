"""csrc/grouped_mlp, as nvcc compiles it for sm_80 and sm_90a, on the emulator: against the specification in float64.

`every_kernel.py` keeps results of all forms in both dtypes and many orders of the warps; here some of them run anew.
"""

import re
import shutil
from pathlib import Path

import cuda_library
import cuda_mlp_cases
import pytest
import torch
from cuda_grouped_mlp import Kernels, emulated
from cuda_mlp_cases import FORMS, Form
from cuda_mlp_sabotages import GROUPED_MLP
from ptx_emulator.counters import parts
from ptx_emulator.ptx import PTXError
from shipped_cases import errors_of, mlp_inputs

from dexkernels import DEXLayer, native
from dexkernels.ops.grouped_mlp import cuda, records
from dexkernels.records import MLPWeights
from dexkernels.testing import randomize_, relative_error

TARGETS = [80, pytest.param(90, marks=pytest.mark.slow)]


def compile_for(target: int, folder: Path, csrc: Path = cuda_library.CSRC) -> Kernels:
    if cuda_library.nvcc() is None:
        pytest.skip("there is no nvcc")
    return Kernels(cuda_library.nvcc(), cuda_library.TARGETS[target], folder, csrc)


@pytest.fixture(scope="module", params=TARGETS)
def kernels(request, tmp_path_factory) -> Kernels:
    return compile_for(request.param, tmp_path_factory.mktemp("ptx"))


def check(kernels: Kernels, form: Form, dtype: torch.dtype = torch.bfloat16, seed: int = 1):
    """Returns the launches."""
    case = cuda_mlp_cases.case(form, dtype)
    with emulated(kernels, seed, count=True) as library:
        results = case.compute(library)
    for name, (error, _, bound) in errors_of(case, results).items():
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"
    return library.ran


def test_a_forward_and_what_it_launches(kernels):
    inputs = mlp_inputs(2, 5, 40, 72, 3, 2, torch.float16)
    slots = cuda_mlp_cases._slots(cuda_mlp_cases.SPECIFICATION, inputs)
    with emulated(kernels, seed=2, count=True) as library:
        out, z, director_out = cuda.forward(inputs.x, slots, MLPWeights(*inputs.weights), save=False)
    exact = cuda_mlp_cases._want_mlp(cuda_mlp_cases.SPECIFICATION, inputs, torch.float64, None)["out"]
    assert (out - exact).norm() < 1e-3 * exact.norm() and z.numel() == director_out.numel() == 0
    assert [ran.kernel for ran in library.ran] == ["fc1_kernel", "to_slots_kernel", "combine_kernel"]
    for ran in library.ran[:2]:
        rounds, least = (parts(ran.program, of) for of in (ran.counters.rounds, ran.counters.least_rounds))
        assert rounds == least and rounds.main_loop > 0, "no bank conflict, in the main loop or the epilogue"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["N 5", "N 130, K = E", "chunks, with a director", "all to one of 40 experts"])
def test_outputs_and_gradients(kernels, name, dtype):
    check(kernels, FORMS[name], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["image", "token"])
def test_a_layer_and_its_gradients(kernels, routing, monkeypatch):
    """Through the operator, under autocast: shadows with the director behind them, float32 gradients of the weights."""
    monkeypatch.setattr(native, "why_not", lambda: None)
    layers = [randomize_(DEXLayer(16, 24, 4, 2, routing=routing)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].backend = "cuda"
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        with emulated(kernels) as library, torch.autocast("cpu", torch.bfloat16):
            y, aux = layer(leaf, return_aux=True)
            loss = y.float().square().sum() + aux.align_loss
            results.append([y, *torch.autograd.grad(loss, [leaf, layer.router_weight, *layer.experts.weights])])
    assert {ran.kernel for ran in library.ran} >= {"fc1_kernel", "to_hidden_grad_kernel", "weight_grad_kernel"}
    for got, right in zip(*results, strict=True):
        assert got.dtype == right.dtype and relative_error(got, right) < 2e-2


@pytest.mark.parametrize("B, N", [(0, 5), (3, 0)], ids=["no images", "no tokens"])
def test_without_rows_nothing_is_launched(tmp_path, B, N):
    x = torch.empty(B, N, 16, dtype=torch.bfloat16)
    slots = records.Slots(torch.ones(B, 1), torch.arange(B), torch.tensor([0, B, B]))
    weights = MLPWeights(*(torch.ones(2, *shape).bfloat16() for shape in ((8, 16), (8,), (16, 8), (16,))))
    with emulated(Kernels("none", "sm_80", tmp_path)) as library:
        out, z, _ = cuda.forward(x, slots, weights, True)
        saved = records.Saved(x, *slots, weights.fc1_weight, weights.fc2_weight, weights.fc2_bias, z)
        grads = cuda.backward(torch.empty_like(x), saved, records.Needs(), torch.float32)
    assert not library.ran and out.shape == grads.x.shape == x.shape and z.shape == (B, N, 8)
    assert grads.fc1_weight.shape == (2, 8, 16) and not any(t.any() for t in grads[1:])


@pytest.mark.parametrize(
    "sizes, dtype, options, message",
    [
        (
            (2, 3, 12, 8, 2, 1),
            torch.bfloat16,
            {},
            "fc1_weight: the cuda backend takes D and H in multiples of 8, got D",
        ),
        ((2, 3, 8, 20, 2, 1), torch.float16, {}, "D = 8, H = 20"),
        ((2, 3, 8, 8, 2, 1), torch.float32, {}, "x: the cuda backend takes bfloat16 or float16, got torch.float32"),
        ((2, 3, 8, 8, 2, 1), torch.float16, {"activation": "gelu_tanh"}, "activation: .* 'gelu', got 'gelu_tanh'"),
    ],
)
def test_what_it_cannot_compute_is_named(tmp_path, sizes, dtype, options, message):
    inputs = mlp_inputs(*sizes, dtype)
    slots = cuda_mlp_cases._slots(cuda_mlp_cases.SPECIFICATION, inputs)
    with emulated(Kernels("none", "sm_80", tmp_path)), pytest.raises(ValueError, match=message):
        cuda.forward(inputs.x, slots, MLPWeights(*inputs.weights), True, **options)


# --- faults -----------------------------------------------------------------------------------------------------------

SEEN_BY = (
    Form((8, 5, 16, 24, 8, 2), director=True, skewed=True),
    FORMS["all to one of 40 experts"],
    FORMS["N 64, K = 1"],
    FORMS[""],
)
"""The first one cuts the rows of two experts into chunks of unequal length, the last one has more steps than shared
memory holds."""


@pytest.mark.slow
@pytest.mark.parametrize("change", [pytest.param(c, id=c.name) for c in GROUPED_MLP])
def test_spoilt_sources_are_seen(change, tmp_path):
    csrc = shutil.copytree(cuda_library.CSRC, tmp_path / "csrc")
    file = csrc / change.file
    text, count = re.subn(change.before, change.after, file.read_text())
    assert count and text != file.read_text()
    file.write_text(text)
    kernels = compile_for(80, tmp_path, csrc)
    with pytest.raises((PTXError, AssertionError), match=change.caught):
        for form in SEEN_BY:
            check(kernels, form)
