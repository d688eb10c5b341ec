"""Compiled kernels, executed without a GPU by `ptx_emulator`: see docs/emulator.md.

The shipped kernels need Triton; what is written by hand in PTX does not.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ptx_emulator.launch import GlobalMemory, Launch, Program  # noqa: E402


@pytest.fixture
def run_ptx():
    """Runs the entry of a text; arrays of numpy become pointers to what they hold, and are changed in place."""

    def run(text, *arguments, grid=(1,), threads=32, shared=0, seed=None, count=False):
        memory, values = GlobalMemory(), []
        for i, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray):
                memory.add(argument.ctypes.data, argument.nbytes, argument.itemsize, f"argument {i}")
                argument = argument.ctypes.data
            values.append(argument)
        for tensor in (a for a in arguments if hasattr(a, "owner")):
            memory.add(tensor.address, tensor.owner.nbytes, tensor.itemsize, "tensor")
        return Launch(Program(text, None, shared), memory, grid, threads, values, seed, count).run()

    return run


@pytest.fixture(scope="session")
def shipped():
    """The shipped kernels on the emulator, `ptx_emulator.shipped`."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the shipped kernels need triton, which is not installed")
    if "triton" in sys.modules and _interpreted():
        pytest.skip("triton is here for its interpreter: run tests/emulator in a process of its own")
    from ptx_emulator import shipped

    return shipped


def _interpreted() -> bool:
    from triton import language
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(language.sum, InterpretedFunction)
