"""Which implementation runs an operator: a literal table, what is available, and why the rest is not."""

from typing import NamedTuple

import torch

from . import reference

OPS = ("route", "grouped_mlp", "align_loss", "group_ema_")
BACKENDS = ("reference", "triton", "cuda")

LAUNCHERS = {
    ("route", "reference"): reference.route,
    ("grouped_mlp", "reference"): (reference.grouped_mlp_forward, reference.grouped_mlp_backward),
    ("align_loss", "reference"): reference.align_loss,
    ("group_ema_", "reference"): reference.group_ema_,
}
"""(op, backend) -> launcher; `grouped_mlp` has one for forward and one for backward."""

DEFAULTS = {
    ("route", "cpu"): "reference",
    ("grouped_mlp", "cpu"): "reference",
    ("align_loss", "cpu"): "reference",
    ("group_ema_", "cpu"): "reference",
    ("route", "cuda"): "reference",
    ("grouped_mlp", "cuda"): "reference",
    ("align_loss", "cuda"): "reference",
    ("group_ema_", "cuda"): "reference",
}
"""(op, device type) -> backend. A kernel enters here only with committed results of its architecture."""


class BackendStatus(NamedTuple):
    """One row of `report`."""

    op: str
    backend: str
    available: bool
    default: bool
    """Whether it is what this machine uses when no backend is asked for."""
    reason: str
    """Why it is not available, or what it is."""


def why_not(op: str, backend: str) -> str | None:
    """Why ``backend`` cannot run ``op`` here; None when it can."""
    if (op, backend) in LAUNCHERS:
        return None
    return f"this version ships no {'Triton' if backend == 'triton' else 'CUDA C++'} kernel for {op}"


def check_backend(backend: str | None) -> None:
    """Raise `ValueError` when ``backend`` is unknown or cannot run every operator on this machine."""
    if backend is None:
        return
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    for op in OPS:
        if reason := why_not(op, backend):
            raise ValueError(f"backend: {backend!r} cannot run: {reason}")


def launcher(op: str, backend: str | None, device: torch.device):
    """The implementation of ``op`` for tensors on ``device``; ``backend=None`` takes the default of the table."""
    if backend is None:
        backend = DEFAULTS.get((op, device.type), "reference")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if reason := why_not(op, backend):
        raise ValueError(f"backend: {backend!r} cannot run {op}: {reason}")
    return LAUNCHERS[op, backend]


def report() -> list[BackendStatus]:
    """Every operator and backend: whether it can run on this machine, whether it is the default, and why not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for op in OPS:
        for backend in BACKENDS:
            reason = why_not(op, backend)
            default = DEFAULTS[op, device] == backend
            rows.append(BackendStatus(op, backend, reason is None, default, reason or "plain torch, any device"))
    return rows
