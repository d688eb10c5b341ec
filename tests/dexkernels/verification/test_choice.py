"""What a process uses on a GPU: its record, or plain torch and one warning that says what to run."""

import warnings

import pytest
import torch

from dexkernels.ops import backends
from dexkernels.verification import choice
from dexkernels.verification.record import path_of, write

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def no_other_backend(request):
    if request.config.getoption("--backend"):
        pytest.skip("--backend replaces the choice")


def test_the_record_of_this_gpu_chooses(right, h200):
    write(right)
    assert choice.default("route", h200, BF16) == "triton" and choice.default("group_ema_", h200, FP32) == "cuda"
    assert choice.default("route", h200, FP32) == choice.default("grouped_mlp", h200, BF16) == "reference"
    assert choice.default("route", torch.device("cuda"), BF16) == "triton"


def test_without_a_record_plain_torch_computes_and_one_warning_says_what_to_run(h200):
    with pytest.warns(UserWarning, match="not verified on this NVIDIA H200 .driver 570.1.*Run `dex verify`") as warned:
        assert {choice.default(op, h200, BF16) for op in backends.TABLES for _ in range(3)} == {"reference"}
        assert choice.default("route", torch.device("cuda", 1), BF16) == "reference"
    assert len(warned) == 1


def test_a_corrupt_record_is_named_in_the_warning(h200, somewhere, cache):
    cache.mkdir()
    path_of(somewhere).write_text("{")
    with pytest.warns(UserWarning, match="the record cannot be used: .*nvidia-h200"):
        assert choice.default("route", h200, BF16) == "reference"


def test_a_foreign_record_is_named_in_the_warning(right, h200, somewhere, cache):
    write(right._replace(identity=somewhere._replace(driver="1"))).rename(path_of(somewhere))
    with pytest.warns(UserWarning, match="is of another machine"):
        assert choice.default("route", h200, BF16) == "reference"


def test_a_cpu_is_never_warned_and_never_looks(monkeypatch):
    monkeypatch.setattr(choice, "identity", lambda device: pytest.fail("asked for a record"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.default("route", torch.device("cpu"), FP32) == "reference"
        # Fake tensors may be on a device that is not there.
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert choice.default("route", torch.device("cuda", 0), BF16) == "reference"


def test_a_backend_that_is_asked_for_needs_no_record(h200, monkeypatch):
    monkeypatch.setattr(choice, "identity", lambda device: pytest.fail("asked for a record"))
    assert backends.choose("route", "reference", h200, dtype=BF16) == "reference"


def test_what_is_set_for_a_process_overrules_the_file(right, h200):
    write(right)
    choice.use({("route", "bfloat16"): "reference"}, torch.device("cuda"))
    assert choice.default("route", h200, BF16) == "reference"
    choice.forget()
    assert choice.default("route", h200, BF16) == "triton"


def test_found(right, h200):
    assert choice.record_of(h200) is None
    write(right)
    assert choice.record_of(h200) == right
