"""A cache of its own for every test, and a record of a GPU that no machine has."""

import pytest
import torch

from dexkernels.verification import choice
from dexkernels.verification.identity import Identity
from dexkernels.verification.record import FOLDER, Check, Record, Sizes, Timing

SIZES = Sizes(8, 5, 16, 32, 4, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache of kernels, é"
    monkeypatch.setenv(FOLDER, str(folder))
    choice.forget()
    yield folder
    choice.forget()


@pytest.fixture
def somewhere() -> Identity:
    return Identity("NVIDIA H200", "sm_90", "570.1", "2.11.0", "12.8", "3.6.0", "0.1.0", "0123456789abcdef")


@pytest.fixture
def right(somewhere) -> Record:
    """Triton's route is right and faster in bf16, its align_loss right and slower, grouped_mlp wrong; GEMA has two."""

    def check(op, backend, dtype="bfloat16", state="right", error=1e-3):
        return Check(op, backend, dtype, state, error, 1e-3, "" if state == "right" else "ValueError: /home/me/x")

    def timing(op, backend, ms, dtype="bfloat16", sizes=SIZES):
        return Timing(op, backend, dtype, sizes, ms, 1.0, 0.1, "copy")

    checks = (
        check("route", "triton"),
        check("align_loss", "triton"),
        check("grouped_mlp", "triton", state="wrong", error=None),
        check("group_ema_", "triton", "float32"),
        check("group_ema_", "cuda", "float32"),
    )
    times = (
        timing("route", "triton", 0.5),
        timing("align_loss", "triton", 1.5),
        timing("grouped_mlp", "triton", 0.1),
        timing("group_ema_", "triton", 0.7, "float32"),
        timing("group_ema_", "cuda", 0.6, "float32"),
    )
    return Record(somewhere, "2026-11-30", 100.0, (SIZES,), checks, times)


@pytest.fixture
def h200(monkeypatch, somewhere):
    """A machine whose GPU is the record's, as far as is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(choice, "identity", lambda device: somewhere)
    return torch.device("cuda", 0)
