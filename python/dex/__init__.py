"""Pretraining with Director-Experts networks: model, data, training and the ``dex`` command, on top of ``dexkernels``.

``load`` loads the model of a run.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dex.inference.load import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dex.inference.load import load  # Imports torch, so not at the top: `dex --help` must be fast

    return load
