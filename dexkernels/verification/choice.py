"""The default backends of this process on a GPU, from the record of that GPU."""

import warnings

import torch

from .identity import identity
from .record import Choices, Record, load

_tables: dict[int, Choices] = {}
"""Index of a GPU -> its choices, after the first call of ``default`` or ``use``."""
_warned = False


def default(op: str, device: torch.device, dtype: torch.dtype | None) -> str:
    """The backend of ``op`` for ``dtype`` on ``device``: plain torch on a CPU and wherever no kernel is proven.

    The first call on a GPU reads its record. Without a record there is one warning per process.
    """
    if device.type != "cuda" or dtype is None or not torch.cuda.is_available():
        return "reference"
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _tables:
        _tables[index] = _recorded(torch.device("cuda", index))
    return _tables[index].get((op, name_of(dtype)), "reference")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def use(choices: Choices, device: torch.device) -> None:
    """Use ``choices`` on ``device`` from now on, in this process."""
    _tables[torch.cuda.current_device() if device.index is None else device.index] = choices


def forget() -> None:
    """Read records again, and allow another warning."""
    global _warned
    _tables.clear()
    _warned = False


def record_of(device: torch.device) -> Record | None:
    """The record of ``device``, or None if there is none that can be used."""
    return load(identity(device))[0]


def _recorded(device: torch.device) -> Choices:
    global _warned
    machine = identity(device)
    record, reason = load(machine)
    if record is not None:
        return record.choices()
    if not _warned:
        _warned = True
        warnings.warn(
            f"plain torch is used, since the kernels of dexkernels were not verified on this {machine}"
            f"{f': {reason}' if reason else ''}. Run `dex verify` or dexkernels.verify() once; it takes at most three "
            "minutes. backend='reference' selects plain torch without this warning",
            stacklevel=4,
        )
    return {}


def in_use(device: torch.device) -> Choices:
    """The choices on ``device`` if they were already read or set, else none."""
    return _tables.get(torch.cuda.current_device() if device.index is None else device.index, {})
