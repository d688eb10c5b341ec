"""Pretraining with Director-Experts networks: model, data, training and the `dex` command, on top of `dexkernels`.

`load` gives the model of a run back.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dex.inference.load import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dex.inference.load import load  # imports torch, which `dex --help` can do without

    return load
