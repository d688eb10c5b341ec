"""Which implementation runs an operator: a literal table, what is available, and why the rest is not."""

import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import native, reference
from ._defaults import DEFAULTS, MEASURED

OPS = ("route", "grouped_mlp", "align_loss", "group_ema_")
BACKENDS = ("reference", "triton", "cuda")


class Launcher(NamedTuple):
    """The two halves of a differentiable operator; their arguments and results are those of `dexkernels.reference`.

    What a forward saves, such as z of `grouped_mlp`, is for the backward beside it: only its shape is agreed upon.
    """

    forward: Callable
    backward: Callable


def _triton(module: str, name: str) -> Callable:
    """A launcher of `dexkernels.kernels` that imports Triton when it is first called: CPU users need none."""

    def launch(*args, **kwargs):
        return getattr(importlib.import_module(f"dexkernels.kernels.{module}"), name)(*args, **kwargs)

    return launch


LAUNCHERS = {
    ("route", "reference"): Launcher(reference.route_forward, reference.route_backward),
    ("grouped_mlp", "reference"): Launcher(reference.grouped_mlp_forward, reference.grouped_mlp_backward),
    ("align_loss", "reference"): Launcher(reference.align_loss_forward, reference.align_loss_backward),
    ("group_ema_", "reference"): reference.group_ema_,
    ("route", "triton"): Launcher(_triton("route", "route_forward"), _triton("route", "route_backward")),
    ("grouped_mlp", "triton"): Launcher(
        _triton("grouped_mlp", "grouped_mlp_forward"), _triton("grouped_mlp", "grouped_mlp_backward")
    ),
    ("align_loss", "triton"): Launcher(
        _triton("align_loss", "align_loss_forward"), _triton("align_loss", "align_loss_backward")
    ),
    ("group_ema_", "triton"): _triton("group_ema", "group_ema_"),
    ("group_ema_", "cuda"): native.group_ema_,
}
"""(op, backend) -> what runs it."""

ALIGN_SAVED = {"reference": {"kd": 0, "cosine": 0, "mse": 0}, "triton": {"kd": 3, "cosine": 3, "mse": 0}}
"""backend -> kind -> numbers that `align_loss` saves per row for its backward."""


class BackendStatus(NamedTuple):
    """One row of `report`."""

    op: str
    backend: str
    available: bool
    default: bool
    """Whether it is what this machine uses when no backend is asked for."""
    reason: str
    """Why it is not available, or what it is."""


def architecture(device: torch.device) -> str:
    """The row of the generated tables that serves ``device``: ``"sm_90"``, or the device's type, such as ``"cpu"``."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def why_not(op: str, backend: str) -> str | None:
    """Why ``backend`` cannot run ``op`` here; None when it can."""
    if (op, backend) not in LAUNCHERS:
        return f"this version ships no {'Triton' if backend == 'triton' else 'CUDA C++'} kernel for {op}"
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
    """Raise `ValueError` when ``backend`` is unknown, ships no kernel, or cannot run one of its kernels here."""
    if backend is None:
        return
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    for op in [op for op in OPS if (op, backend) in LAUNCHERS] or OPS:
        if reason := why_not(op, backend):
            raise ValueError(f"backend: {backend!r} cannot run: {reason}")


def covering(op: str, backend: str | None) -> str | None:
    """What a layer of ``backend`` asks for in ``op``: the backend where it ships that kernel, else the default.

    The CUDA library has no kernel for some operators by design; `report` shows which.
    """
    return backend if backend is not None and (op, backend) in LAUNCHERS else None


@torch.compiler.assume_constant_result
def choose(op: str, backend: str | None, device: torch.device) -> str:
    """The backend of ``op`` for tensors on ``device``: the one asked for, or what committed measurements chose.

    What they chose and cannot run here (no Triton, say) gives way to plain torch, which `report` tells.
    """
    if backend is None:
        default = DEFAULTS.get((architecture(device), op), "reference") if device.type == "cuda" else "reference"
        return default if default == "reference" or why_not(op, default) is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if reason := why_not(op, backend):
        raise ValueError(f"backend: {backend!r} cannot run {op}: {reason}")
    return backend


def report() -> list[BackendStatus]:
    """Every operator and backend: whether it can run on this machine, whether it is the default, and why not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for op in OPS:
        default = choose(op, None, device)
        for backend in BACKENDS:
            reason = why_not(op, backend)
            text = reason or _proven(op, backend, device)
            rows.append(BackendStatus(op, backend, reason is None, default == backend, text))
    return rows


def _proven(op: str, backend: str, device: torch.device) -> str:
    if backend == "reference":
        return "plain torch, any device"
    where = architecture(device)
    if (where, op, backend) in MEASURED:
        return f"{where}: {MEASURED[where, op, backend]}"
    elsewhere = sorted({a for a, o, b in MEASURED if (o, b) == (op, backend)})
    known = f"measured on {', '.join(elsewhere)} alone" if elsewhere else "never measured on a GPU"
    return f"{known}: only when asked for"
