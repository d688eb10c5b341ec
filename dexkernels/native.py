"""Loads the native library, `dexkernels._C`, or says why it is absent.

The library links nothing of torch: its functions take addresses, sizes and a stream. `csrc/` holds its sources,
`setup.py` builds it, and each operator calls it from its ``cuda.py``.
"""

import importlib
import importlib.machinery
from pathlib import Path
from types import ModuleType

import torch

from ._version import __version__

MIN_CAPABILITY = (8, 0)


def _load() -> tuple[ModuleType | None, str | None]:
    """``(the module, None)`` or ``(None, why there is none)``."""
    files = [f.name for f in Path(__file__).parent.glob("_C.*") if f.suffix in (".so", ".pyd")]
    usable = [f for f in files if f.removeprefix("_C") in importlib.machinery.EXTENSION_SUFFIXES]
    if not files:
        return None, "the native library was not built: the installation found no nvcc, or DEX_CUDA was 0"
    if not usable:
        return None, f"the native library was built for another Python ({', '.join(sorted(files))}); install again"
    try:
        module = importlib.import_module("dexkernels._C")
    except ImportError as error:
        return None, f"the native library does not load: {error}"
    if module.__version__ != __version__:
        return (
            None,
            f"the native library has version {module.__version__}, dexkernels {__version__}; install again",
        )
    return module, None


_loaded = _load()
library: ModuleType | None = _loaded[0]
"""The extension module, or None."""


def why_not() -> str | None:
    """Why the native library cannot run here; None if it can. Queries the GPU only if the library is present."""
    absent = _loaded[1]
    if absent is not None:
        return absent
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"the GPU is sm_{capability[0]}{capability[1]}; the native library needs sm_80 or newer"
    return None
