"""`group_ema_` by the native library, with torch tensors, against the specification in float64.

Without a GPU the call runs on CPU tensors through csrc's host code, the same text that the kernel is compiled from.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dexkernels import native, reference
from dexkernels.ops.group_ema import cuda
from dexkernels.testing import HostWaits, NoHostWaits

CSRC = Path(__file__).resolve().parents[2] / "csrc"


class HostLibrary:
    """Stands for `dexkernels._C`: the same arguments, run on the host."""

    def __init__(self, path: Path):
        self.lib = ctypes.CDLL(str(path))
        pointer, i64 = ctypes.c_void_p, ctypes.c_int64
        self.lib.host_group_ema.argtypes = [pointer, i64, ctypes.c_double, pointer, ctypes.c_int, pointer, i64, pointer]
        self.calls = 0

    def group_ema_(self, rows, momentum, momentum_at, momentum_is_double, skip_at, stream):
        self.calls += 1
        rows = np.array(rows, np.int64).reshape(-1, 7)
        placed = np.zeros((len(rows), 2), np.int64)
        self.lib.host_group_ema(
            rows.ctypes.data, len(rows), momentum, momentum_at, momentum_is_double, skip_at, 4, placed.ctypes.data
        )


@pytest.fixture(scope="module")
def host_library(tmp_path_factory) -> HostLibrary:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine ($CXX, c++, g++)")
    path = tmp_path_factory.mktemp("host") / "host.so"
    source = Path(__file__).with_name("host.cpp")
    subprocess.run(
        [compiler, "-std=c++17", "-O2", "-w", "-fPIC", "-shared", f"-I{CSRC}", source, "-o", path], check=True
    )
    return HostLibrary(path)


@pytest.fixture(params=["host", "cuda"])
def device(request, monkeypatch) -> str:
    """ "cuda" where there is one; "host": CPU tensors, with the device's side of torch replaced."""
    if request.param == "cuda":
        if reason := native.why_not():
            pytest.skip(reason)
        return "cuda"
    monkeypatch.setattr(native, "library", request.getfixturevalue("host_library"))
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    # A scalar on the device is told apart from one on the host by this alone.
    monkeypatch.setattr(cuda, "on_host", lambda scalar: isinstance(scalar, torch.Tensor) and scalar.dim() == 1)
    return "cpu"


def groups(device, shapes, num_experts=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    directors = [torch.randn(s, generator=g) for s in shapes]
    experts = [torch.randn(num_experts, *s, generator=g) for s in shapes]
    weights = torch.rand(num_experts, generator=g)
    weights[1] = 0
    for e in experts:
        e[1] = torch.nan
    weights = weights / weights.sum()
    on = [[t.to(device) for t in ts] for ts in (directors, experts)]
    return *on, [weights.to(device, dtype)] * len(shapes)


def expected(directors, experts, weights, m):
    directors = [d.cpu().double() for d in directors]
    reference.group_ema_(directors, [e.cpu().double() for e in experts], [w.cpu().double() for w in weights], m)
    return directors


SHAPES = [(24, 7), (24,), (64, 96), (3, 5, 7), (0,), (4100,), ()]


@pytest.mark.parametrize("m", [0.9, torch.tensor(0.9), torch.tensor(0.9, dtype=torch.float64), torch.tensor(1)])
def test_equals_the_reference(device, m):
    d, e, w = groups(device, SHAPES)
    want = expected(d, e, w, float(m))
    cuda.group_ema_(d, e, w, m.to(device) if isinstance(m, torch.Tensor) else m)
    for got, exact in zip(d, want, strict=True):
        assert_close(got.cpu(), exact.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [59, 61, 499, 501, 1003])
def test_any_number_of_tensors(device, count):
    d, e, w = groups(device, [(3,)] * count, num_experts=2)
    want = expected(d, e, w, 0.5)
    cuda.group_ema_(d, e, w, 0.5)
    assert_close(torch.stack(d).cpu(), torch.stack(want).float())


def test_shadows_are_rounded_directors(device):
    d, e, w = groups(device, SHAPES)
    shadows = [None if i == 2 else torch.full_like(t, 7, dtype=torch.bfloat16) for i, t in enumerate(d)]
    cuda.group_ema_(d, e, w, 0.9, None, shadows)
    for t, shadow in zip(d, shadows, strict=True):
        assert shadow is None or torch.equal(shadow, t.to(torch.bfloat16))


@pytest.mark.parametrize("skip", [torch.tensor(True), torch.tensor([True])[0]])
def test_skip_and_zero_weights_keep_the_bits(device, skip):
    d, e, w = groups(device, SHAPES)
    before = [t.clone() for t in d]
    cuda.group_ema_(d, e, w, 0.9, skip.to(device))
    cuda.group_ema_(d, e, w, 0.9, torch.tensor([True]))
    cuda.group_ema_(d, e, [torch.zeros_like(a) for a in w], 0.9)
    assert all(torch.equal(a, b) for a, b in zip(d, before, strict=True))
    cuda.group_ema_(d, e, w, 0.9, torch.zeros_like(skip, device=device))
    assert not torch.equal(d[0], before[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_dtype(device, dtype):
    d, e, w = groups(device, SHAPES, dtype=dtype)
    want = expected(d, e, w, 0.9)
    cuda.group_ema_(d, e, w, 0.9)
    for got, exact in zip(d, want, strict=True):
        assert_close(got.cpu(), exact.float(), rtol=1e-6, atol=1e-6)


def test_experts_in_a_larger_buffer_and_misaligned_directors(device):
    d, e, w = groups(device, [(40, 3)])
    want = expected(d, e, w, 0.9)
    buffer = torch.full((5, 7, 40, 3), torch.nan, device=device)
    buffer[:, 2] = e[0]
    flat = torch.zeros(121, device=device)
    director = flat[1:].view(40, 3).copy_(d[0])
    cuda.group_ema_([director], [buffer[:, 2]], w, 0.9)
    assert_close(director.cpu(), want[0].float())
    assert flat[0] == 0


def test_a_changed_director_is_known_to_autograd(device):
    d, e, w = groups(device, [(4,)])
    before = d[0]._version
    cuda.group_ema_(d, e, w, 0.9)
    assert d[0]._version > before
    with torch.inference_mode():
        cuda.group_ema_(d, e, w, 0.9)


def test_nothing_to_do(device):
    cuda.group_ema_([], [], [], 0.9)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d, e: ([d.to("meta")], [e.to("meta")]), r"directors\[0\]: .*on a GPU, got meta"),
        (lambda d, e: ([d.double()], [e.double()]), r"directors\[0\]: .*float32, got torch.float64"),
        (lambda d, e: ([d.t()], [e.mT]), r"directors\[0\]: .*contiguous tensor, got strides \(1, 6\)"),
        (lambda d, e: ([d], [e.mT.contiguous().mT]), r"experts\[0\]: .*contiguous experts, got strides"),
        (lambda d, e: ([d, d], [e, e]), r"directors\[1\]: expected distinct tensors in one launch, got directors\[0\]"),
    ],
)
def test_refusals_name_the_argument_and_change_nothing(device, change, message):
    d, e, w = groups(device, [(4, 6)])
    before = d[0].clone()
    directors, experts = change(d[0], e[0])
    with pytest.raises(ValueError, match=message):
        cuda.group_ema_(directors, experts, w * len(directors), 0.9)
    assert torch.equal(d[0], before)


@pytest.mark.parametrize("shadow", [torch.zeros(4, 6), torch.zeros(24).bfloat16(), torch.zeros(6, 4).bfloat16().t()])
def test_a_wrong_shadow_is_refused(device, shadow):
    d, e, w = groups(device, [(4, 6)])
    with pytest.raises(ValueError, match=r"shadows\[0\]: expected contiguous torch.bfloat16 \[4, 6\]"):
        cuda.group_ema_(d, e, w, 0.9, None, [shadow.to(device)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_reads_scalars_at_replay_and_needs_no_host_memory():
    if reason := native.why_not():
        pytest.skip(reason)
    d, e, w = groups("cuda", SHAPES)
    m, skip = torch.tensor(0.9, device="cuda"), torch.tensor(True, device="cuda")
    cuda.group_ema_(d, e, w, m, skip)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.group_ema_(d, e, w, m, skip)
    before = [t.clone() for t in d]
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(d, before, strict=True))
    skip.fill_(False), m.fill_(0.25)
    want = expected(d, e, w, 0.25)
    graph.replay()
    for got, exact in zip(d, want, strict=True):
        assert_close(got.cpu(), exact.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reads", [False, True])
def test_a_call_reads_nothing_on_the_host(monkeypatch, reads):
    """On meta tensors, which hold no values: one at a time, for all have the same address."""
    rows = []
    call = types.SimpleNamespace(group_ema_=lambda **arguments: rows.append(arguments))
    monkeypatch.setattr(native, "library", call)
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "meta")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    if reads:
        monkeypatch.setattr(cuda, "on_host", lambda scalar: scalar is not None and scalar.item() > 2)
    d, e, a = (torch.empty(s, device="meta") for s in ((6, 4), (3, 6, 4), (3,)))
    skip = torch.empty((), dtype=torch.bool, device="meta")
    with NoHostWaits(), pytest.raises(HostWaits) if reads else contextlib.nullcontext():
        for dtype in (torch.float32, torch.float64):
            cuda.group_ema_([d], [e], [a.half()], torch.empty((), dtype=dtype, device="meta"), skip)
    assert len(rows) == (0 if reads else 2)
