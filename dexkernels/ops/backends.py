"""Chooses the backend of an operator: the tables of all operators, what is available here, and why the rest is not."""

import importlib
import importlib.util
import os
from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

import torch

from .. import native
from .._executed import EXECUTED
from .._measured import MEASURED
from ..choices import BACKENDS
from ..verification import choice
from ..verification.record import Record

TABLES: dict[str, dict[str, str]] = {}
"""Operator -> backend -> the module that runs it; filled by `register`."""

LIMITS: dict[str, Mapping[str, Mapping[str, str]]] = {}
"""Operator -> backend -> feature of the operator -> why the backend cannot compute it; filled by `register`."""


def register(
    op: str, package: str, table: Mapping[str, str], limits: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """Add the backends of an operator; its folder calls this once, when it is imported.

    Args:
        op: the operator's name in `choose` and `report`.
        package: its folder's ``__name__``.
        table: backend -> the module of that folder that runs it.
        limits: backend -> feature, the argument of `choose` -> why the backend cannot compute it.
    """
    LIMITS[op] = limits or {}
    TABLES[op] = {backend: f"{package}.{module}" for backend, module in table.items()}


def load(op: str, backend: str) -> ModuleType:
    """The module that runs ``op``, imported on first use, since CPU users need no Triton."""
    return importlib.import_module(TABLES[op][backend])


class BackendStatus(NamedTuple):
    """One row of `report`."""

    op: str
    backend: str
    available: bool
    default: bool
    """Whether this machine uses it in training, in bf16 on a GPU, if no backend is requested."""
    reason: str
    """Why it is not available, or what it is."""
    executed: str
    """Its kernels and where they have been executed; empty without kernels."""
    limits: str
    """Features that it lacks, and why; plain torch is used for these. Empty if there are none."""


def architecture(device: torch.device) -> str:
    """The row of the generated tables that serves ``device``: ``"sm_90"``, or the device's type, such as ``"cpu"``."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def why_not(op: str, backend: str, feature: str | None = None) -> str | None:
    """Why ``backend`` cannot run ``op`` here, with ``feature`` if one is given; None if it can."""
    if backend not in TABLES[op]:
        return f"this version ships no {'Triton' if backend == 'triton' else 'CUDA C++'} kernel for {op}"
    if reason := LIMITS[op].get(backend, {}).get(feature):
        return f"no {feature}: {reason}"
    if backend == "cuda":
        return native.why_not()
    return _why_no_triton() if backend == "triton" else None


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "torch finds no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    return None


def check_backend(backend: str | None) -> None:
    """Raise `ValueError` if ``backend`` is unknown, has no kernel, or cannot run one of its kernels here."""
    if backend is None:
        return
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    for op in [op for op in TABLES if backend in TABLES[op]] or TABLES:
        if reason := why_not(op, backend):
            raise ValueError(f"backend: {backend!r} cannot run: {reason}")


def covering(op: str, backend: str | None, feature: str | None = None) -> str | None:
    """The backend that a layer with ``backend`` requests for ``op``: its own if that has a kernel with the feature,
    else None for the default.

    The CUDA library has no kernel for some operators by design, and some kernels lack a feature; `report` lists them.
    """
    return backend if backend in TABLES[op] and feature not in LIMITS[op].get(backend, ()) else None


def choose(
    op: str,
    backend: str | None,
    device: torch.device,
    feature: str | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """The backend of ``op`` for tensors of ``dtype`` on ``device``: the requested one, or the fastest that
    `dexkernels.verify` has proven on this GPU.

    Plain torch is used if nothing was verified, or the default cannot run here (such as without Triton) or lacks the
    ``feature``. A requested backend that cannot run raises ValueError.
    """
    if backend is None:
        default = choice.default(op, device, dtype)
        return default if default == "reference" or why_not(op, default, feature) is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if reason := why_not(op, backend, feature):
        raise ValueError(f"backend: {backend!r} cannot run {op}: {reason}")
    return backend


# Like torch.compiler.assume_constant_result, which would import torch._dynamo, and Triton with it.
choose._dynamo_marked_constant = True


def report() -> list[BackendStatus]:
    """Every operator and backend: whether it can run on this machine, whether it is the default, and why not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = choice.record_of(device) if device.type == "cuda" else None
    rows = []
    for op in TABLES:
        default = choose(op, None, device, dtype=training_dtype(op))
        for backend in BACKENDS:
            reason = why_not(op, backend)
            text = reason or _proven(op, backend, device, record)
            executed = EXECUTED.get((op, backend), "")
            limits = "; ".join(f"no {feature}: {why}" for feature, why in LIMITS[op].get(backend, {}).items())
            rows.append(BackendStatus(op, backend, reason is None, default == backend, text, executed, limits))
    return rows


def training_dtype(op: str) -> torch.dtype:
    """The dtype of ``op`` in training on a GPU: float32 for directors and moments, else bf16 by autocast."""
    return torch.float32 if op in ("group_ema_", "adamw_ema_") else torch.bfloat16


def _proven(op: str, backend: str, device: torch.device, record: Record | None) -> str:
    if backend == "reference":
        return "plain torch, any device"
    if record is not None and (states := record.states(op, backend)):
        return f"verified on this GPU, {record.date}: {states}"
    where = architecture(device)
    if (where, op, backend) in MEASURED:
        known = f"{where}: {MEASURED[where, op, backend]}"
    else:
        elsewhere = sorted({a for a, o, b in MEASURED if (o, b) == (op, backend)})
        known = f"measured on {', '.join(elsewhere)} alone" if elsewhere else "never measured on a GPU"
    return f"{known}; used when asked for, or where dex verify has proven it"
