"""One thread for the tests of the kernel library: with tiny tensors, threads only wait for each other.

With ``--backend NAME`` operators that were not asked for another backend take NAME where it has a kernel; a test whose
tensors NAME refuses (float64, mostly) is skipped, saying so. ``--device``: see the conftest of the repository.
"""

import pytest
import torch

from dexkernels import backends


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
    choose = backends.choose

    def choose_wanted(op, backend, device):
        return choose(op, backends.covering(op, wanted) if backend is None else backend, device)

    monkeypatch.setattr(backends, "choose", choose_wanted)
    for (op, backend), launcher in list(backends.LAUNCHERS.items()):
        if backend == wanted != "reference":
            wrapped = skipping(launcher) if op == "group_ema_" else backends.Launcher(*map(skipping, launcher))
            monkeypatch.setitem(backends.LAUNCHERS, (op, backend), wrapped)


def skipping(launch):
    """``launch``, but what the kernels do not take skips the test."""

    def run(*args, **kwargs):
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        if any(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors):
            pytest.skip("Triton's interpreter multiplies bf16 wrongly")
        try:
            return launch(*args, **kwargs)
        except ValueError as error:
            if "the Triton kernel" in str(error) or "the cuda backend " in str(error):
                pytest.skip(str(error))
            raise

    return run
