"""The operators, a folder each. To add an operator, add a folder; nothing else is edited.

``<op>/__init__.py`` holds the public function and its checks, the `torch.library` operators of the namespace
``dexkernels`` with their fake kernels and autograd, and the operator's table of backends. Beside it are the backends:
``cpu.py`` is plain torch, for every CPU and, as "reference", for a GPU without kernels; ``triton.py`` or ``triton/``
holds Triton's kernels and launchers; ``cuda.py`` calls the native library. A backend's module is imported on first
use. Backwards are operators too, so `torch.compile` does not trace into them.
"""

import importlib
import pkgutil


def discover() -> None:
    """Import the folder of every operator, which registers its table in `dexkernels.ops.backends`."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        if module.ispkg:
            importlib.import_module(module.name)


discover()
