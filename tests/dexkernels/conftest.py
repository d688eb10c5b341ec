"""One thread for the tests of the kernel library: with tiny tensors, threads only wait for each other.

With ``--backend NAME`` operators that were not asked for another backend take NAME where it has a kernel; a test whose
tensors NAME refuses (float64, mostly) is skipped, saying so. ``--device``: see the conftest of the repository.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dexkernels.ops import backends

sys.path.insert(0, str(Path(__file__).parent))  # layer_cases and operator_cases, which several folders import


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def chosen_backend(request, monkeypatch):
    wanted = request.config.getoption("--backend")
    if wanted is None:
        return
    choose, load = backends.choose, backends.load

    def choose_wanted(op, backend, device, feature=None, dtype=None):
        backend = backends.covering(op, wanted, feature) if backend is None else backend
        return choose(op, backend, device, feature, dtype)

    def load_skipping(op, backend):
        module = load(op, backend)
        if backend != wanted or backend == "reference":
            return module
        names = [name for name in ("forward", "backward", "group_ema_") if hasattr(module, name)]
        return SimpleNamespace(**{name: skipping(getattr(module, name)) for name in names})

    monkeypatch.setattr(backends, "choose", choose_wanted)
    monkeypatch.setattr(backends, "load", load_skipping)


def skipping(launch):
    """``launch``, but what the kernels do not take skips the test."""

    def run(*args, **kwargs):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors):
            pytest.skip("Triton's interpreter multiplies bf16 wrongly")
        try:
            return launch(*args, **kwargs)
        except ValueError as error:
            if "the Triton kernel" in str(error) or "the cuda backend " in str(error):
                pytest.skip(str(error))
            raise

    return run
