"""`dexkernels.native`: why the library is absent, or cannot run."""

import importlib.machinery
import types
from pathlib import Path

import pytest
import torch

from dexkernels import native

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """native._load() looks into this empty folder instead of the package's."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    return tmp_path


def test_not_built(package):
    module, why = native._load()
    assert module is None and "not built" in why and "no nvcc" in why


def test_built_for_another_python(package):
    (package / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    module, why = native._load()
    assert module is None and "another Python (_C.cpython-399-x86_64-linux-gnu.so)" in why


def test_does_not_load(package, monkeypatch):
    (package / f"_C{SUFFIX}").touch()

    def fail(name):
        raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.99' not found")

    monkeypatch.setattr(native.importlib, "import_module", fail)
    assert native._load() == (
        None,
        "the native library does not load: libstdc++.so.6: version `GLIBCXX_3.4.99' not found",
    )


def test_of_another_version(package, monkeypatch):
    (package / f"_C{SUFFIX}").touch()
    monkeypatch.setattr(native.importlib, "import_module", lambda name: types.SimpleNamespace(__version__="0.0.9"))
    module, why = native._load()
    assert module is None and "has version 0.0.9" in why and "install again" in why


@pytest.mark.parametrize(
    "cuda, available, capability, why",
    [
        (None, False, None, "torch is built without CUDA"),
        ("13.0", False, None, "torch finds no CUDA device"),
        ("13.0", True, (7, 5), "the GPU is sm_75; the native library needs sm_80 or newer"),
        ("13.0", True, (8, 0), None),
        ("13.0", True, (12, 0), None),
    ],
)
def test_why_not_with_a_library(monkeypatch, cuda, available, capability, why):
    monkeypatch.setattr(native, "_loaded", (native.library, None))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert native.why_not() == why


def test_why_not_without_a_library(monkeypatch):
    monkeypatch.setattr(native, "_loaded", (None, "the native library was not built: ..."))
    assert native.why_not() == "the native library was not built: ..."
