"""Which backend this process uses on a GPU when none is asked for: what the record of that GPU proves."""

import warnings

import torch

from .identity import identity
from .record import Choices, Record, load

_tables: dict[int, Choices] = {}
"""Index of a GPU -> its choices, once asked for or set by `use`."""
_warned = False


def default(op: str, device: torch.device, dtype: torch.dtype | None) -> str:
    """The backend of ``op`` for tensors of ``dtype`` on ``device``; plain torch on a CPU, and where nothing is proven.

    The first call on a GPU reads its record. Where there is none, one warning in the life of the process says so.
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
    """From now on ``choices`` decide on ``device`` in this process."""
    _tables[torch.cuda.current_device() if device.index is None else device.index] = choices


def forget() -> None:
    """Read records anew, and warn anew."""
    global _warned
    _tables.clear()
    _warned = False


def found(device: torch.device) -> Record | None:
    """The record of ``device``, if there is one that can be used."""
    return load(identity(device))[0]


def _recorded(device: torch.device) -> Choices:
    global _warned
    who = identity(device)
    record, reason = load(who)
    if record is not None:
        return record.choices()
    if not _warned:
        _warned = True
        warnings.warn(
            f"plain torch computes, since the kernels of dexkernels were not verified on this {who}"
            f"{f': {reason}' if reason else ''}. Run `dex verify`, or dexkernels.verify(), once, for at most three "
            "minutes. backend='reference' asks for plain torch without this warning",
            stacklevel=4,
        )
    return {}


def in_use(device: torch.device) -> Choices:
    """What `default` gives on ``device``, without asking for its record: empty before the first question."""
    return _tables.get(torch.cuda.current_device() if device.index is None else device.index, {})
