"""A record holds for one GPU with one set of software: whatever could change a kernel changes the identity."""

import shutil

import pytest
import torch

from dexkernels.verification import identity as module
from dexkernels.verification.identity import PACKAGE, identity, sources

CPU = torch.device("cpu")


@pytest.fixture
def package(tmp_path):
    shutil.copytree(PACKAGE / "ops", tmp_path / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_every_field_changes_the_digest(somewhere):
    digests = {somewhere._replace(**{field: "another"}).digest for field in somewhere._fields}
    assert len(digests | {somewhere.digest}) == len(somewhere._fields) + 1


def test_without_a_gpu_it_is_the_interpreters():
    who = identity(CPU)
    assert who == identity(CPU) and who.gpu == module.INTERPRETER and who.torch == torch.__version__
    assert who.sources == sources() and len(who.sources) == 16


def test_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H{200 + device.index}")
    monkeypatch.setattr(module, "_driver", lambda: "570.1")
    who = identity(torch.device("cuda", 1))
    assert who[:3] == ("NVIDIA H201", "sm_90", "570.1") and "NVIDIA H201 (driver 570.1" in str(who)


@pytest.mark.parametrize("change", ["ops/route/triton.py", "ops/grouped_mlp/triton/_tuned.py", "_C.abi3.so"])
def test_sources_cover_kernels_tiles_and_the_native_library(package, change):
    before = sources.__wrapped__(package)
    assert before == sources.__wrapped__(package)
    with (package / change).open("a") as file:
        file.write("\n")
    assert sources.__wrapped__(package) != before


def test_what_is_compiled_by_python_is_no_source(package):
    before = sources.__wrapped__(package)
    (package / "ops/__pycache__").mkdir()
    (package / "ops/__pycache__/x.pyc").write_bytes(b"x")
    assert sources.__wrapped__(package) == before
