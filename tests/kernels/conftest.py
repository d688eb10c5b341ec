"""Kernels run here in Triton's interpreter, on CPU tensors with poisoned allocations; compiled by ``--device cuda``.

The folder stands beside tests/dexkernels, and not in it, because the interpreter needs a process of its own: it is
chosen for all kernels, when triton is first imported.

Where Triton is not installed the tests are skipped, each file saying so.
"""

import functools
import importlib.util
import os
from pathlib import Path

import pytest
import torch

ON_CUDA = torch.get_default_device().type == "cuda"
"""Set by ``--device cuda``, see the conftest of the repository."""

if ON_CUDA and importlib.util.find_spec("triton") is not None:
    from dexkernels.ops import triton_common
    from dexkernels.ops.adamw_ema import triton as adamw_ema
    from dexkernels.ops.align_loss import triton as align_loss
    from dexkernels.ops.group_ema import triton as group_ema
    from dexkernels.ops.grouped_mlp import triton as grouped_mlp
    from dexkernels.ops.grouped_mlp.records import Saved
    from dexkernels.ops.grouped_mlp.triton import aligned, chunks, sums
    from dexkernels.ops.route import triton as route
elif importlib.util.find_spec("triton") is not None:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    # Decorators read the variable when a module is imported, so it need not outlive these imports.
    import triton
    import triton.experimental.gluon  # which the first launch would import
    from triton.runtime.interpreter import InterpretedFunction

    from dexkernels.ops import triton_common
    from dexkernels.ops.adamw_ema import triton as adamw_ema
    from dexkernels.ops.align_loss import triton as align_loss
    from dexkernels.ops.group_ema import triton as group_ema
    from dexkernels.ops.grouped_mlp import triton as grouped_mlp
    from dexkernels.ops.grouped_mlp.records import Saved
    from dexkernels.ops.grouped_mlp.triton import aligned, chunks, sums
    from dexkernels.ops.route import triton as route

    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before
    if not all(isinstance(f, InterpretedFunction) for f in (triton.language.sum, triton_common.find_tile)):
        raise RuntimeError("triton was imported before tests/kernels: run these tests in a process of their own")

MARGIN = 4096
"""Elements of poison after every allocation."""

INTERPRETED = {
    "test_tiles.py": "its probes are interpreted functions",
    "test_recorded.py": "it starts the interpreter; conformance.py --device cuda --backend triton is its like on a GPU",
    **dict.fromkeys(
        ("test_rows_far_apart", "test_experts_far_apart", "test_tokens_of_an_image_far_apart", "test_images_far_apart"),
        "its storage is the host's, of which no page is touched",
    ),
    "test_no_address_is_outside_of_the_arguments": "it watches the interpreter's loads and stores",
}
"""File or test -> why it is left out on a GPU."""

SMALL_ALONE = ("test_one_launch",)

POISON = {torch.int32: -(2**30), torch.int64: -(2**60), torch.bool: True}


def pytest_report_header():
    if importlib.util.find_spec("triton") is not None:
        import triton

        return f"triton: {triton.__version__}"


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        for name in (item.path.name, item.originalname):
            if ON_CUDA and name in INTERPRETED:
                item.add_marker(pytest.mark.skip(reason=INTERPRETED[name]))
        if config.getoption("--tiles") == "shipped" and item.originalname in SMALL_ALONE:
            item.add_marker(pytest.mark.skip(reason="it counts the small blocks"))
        # Each file has its own blocks for the interpreter in a fixture of this name.
        if config.getoption("--tiles") == "shipped" and "small_blocks" in item.fixturenames:
            item.fixturenames.remove("small_blocks")


@pytest.fixture(autouse=True)
def shipped_tiles(request, monkeypatch):
    """``--tiles shipped``: the tables of the launchers, whatever tiles a test asks for."""
    if request.config.getoption("--tiles") != "shipped" or importlib.util.find_spec("triton") is None:
        return
    for name in ("forward", "backward"):
        launch = getattr(grouped_mlp, name)

        def run(*args, launch=launch, tiles=None, **kwargs):
            x = args[1].x if isinstance(args[1], Saved) else args[0]
            if kwargs.get("path") == "aligned" and x.dtype == torch.float32:
                pytest.skip("no tiles of the aligned path in float32 ship")
            return launch(*args, **kwargs)

        monkeypatch.setattr(grouped_mlp, name, functools.wraps(launch)(run))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a launcher allocates holds NaN and lies before a margin of NaN, which must be untouched afterwards."""
    empty = torch.empty
    allocated = []

    def poisoned(shape, dtype, device):
        shape = torch.Size([shape] if isinstance(shape, int) else shape)
        size = shape.numel()
        buffer = empty(size + MARGIN, dtype=dtype, device=device).fill_(POISON.get(dtype, float("nan")))
        if buffer.device.type != "meta":
            allocated.append((buffer[size:], buffer[size:].clone()))
        return buffer[:size].view(shape)

    def new_empty(t, shape, *, dtype=None, device=None):
        return poisoned(shape, dtype or t.dtype, device or t.device)

    def empty_like(t, **kwargs):
        return poisoned(t.shape, t.dtype, t.device)

    def patched_empty(*shape, dtype=None, device=None, **kwargs):
        return poisoned(shape[0] if len(shape) == 1 else shape, dtype or torch.get_default_dtype(), device)

    for module in (adamw_ema, align_loss, aligned, chunks, group_ema, grouped_mlp, route, sums):
        monkeypatch.setattr(module, "torch", _With(torch, empty=patched_empty, empty_like=empty_like))
    with monkeypatch.context() as m:
        m.setattr(torch.Tensor, "new_empty", new_empty)
        yield
    for margin, before in allocated:
        assert torch.equal(margin.nan_to_num(), before.nan_to_num()), "written past the end of an allocation"
        assert torch.equal(margin.isnan(), before.isnan()), "written past the end of an allocation"


@pytest.fixture
def within_arguments(monkeypatch):
    """No launch reads or writes an address outside of the elements of its own arguments, whatever lies there."""
    import numpy
    from triton.runtime import interpreter
    from triton.tools.tensor_descriptor import TensorDescriptor

    spans = []

    def launch(executor, *args, run=interpreter.GridExecutor.__call__, **kwargs):
        tensors = [arg.base if isinstance(arg, TensorDescriptor) else arg for arg in (*args, *kwargs.values())]
        spans[:] = [_span(t) for t in tensors if isinstance(t, torch.Tensor) and t.numel()]
        return run(executor, *args, **kwargs)

    def watch(access):
        def watched(builder, ptrs, *args, **kwargs):
            mask = args[0 if access is load else 1]
            reached = ptrs.data[numpy.asarray(mask.data, dtype=bool)]
            if reached.size:
                low, high = int(reached.min()), int(reached.max())
                assert any(first <= low and high < end for first, end in spans), "an address outside of the arguments"
            return access(builder, ptrs, *args, **kwargs)

        return watched

    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watch(load))
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", watch(store))


def _span(t):
    """First address of the elements of ``t``, and the address after the last."""
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


class _With:
    """A module with some names replaced, for the modules under test alone."""

    def __init__(self, module, **replaced):
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(self._module, name)


@pytest.fixture
def rounded_once(monkeypatch):
    """Dots of the interpreter are summed in float64: a BLAS may sum the rows of one block in different orders."""
    if ON_CUDA:
        return
    import numpy
    from triton.runtime import interpreter

    def matmul(a, b, dtype):
        return numpy.matmul(a.astype(numpy.float64), b.astype(numpy.float64)).astype(dtype)

    monkeypatch.setattr(interpreter, "np", _With(numpy, matmul=matmul))


def embed(t, gap=3):
    """``t`` with every dimension strided, inside a buffer of NaN."""
    buffer = torch.full([2 * n + gap for n in t.shape], float("nan"), dtype=t.dtype)
    inner = buffer[tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)]
    return inner.copy_(t)


def embed_rows(t, gap=5):
    """``t`` with a last dimension of stride 1 and gaps of NaN after every row, inside a buffer of NaN."""
    buffer = torch.full([n + gap for n in t.shape], float("nan"), dtype=t.dtype)
    return buffer[tuple(slice(0, n) for n in t.shape)].copy_(t)


@pytest.fixture
def layouts():
    """Name -> what puts the same values into other strides."""
    return {"contiguous": lambda t: t, "rows": embed_rows, "all": embed}
