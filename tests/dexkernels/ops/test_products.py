"""The choice of the library of products."""

import pathlib
import platform

import pytest
import torch

from dexkernels.ops import products


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("amd", "AVX512", "onednn"),
        ("amd", "AVX2", "torch"),
        ("intel", "AVX512", "torch"),
        ("intel", "AVX2", "torch"),
        ("HygonGenuine", "AVX512", "onednn"),
        ("", "DEFAULT", "torch"),
        ("ARM", "SVE256", "torch"),
    ],
)
def test_library(vendor, capability, expected):
    assert products.library(vendor, capability) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n", "amd"),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", "intel"),
        ("processor\t: 0\nBogoMIPS\t: 243.75\n", ""),
        ("", ""),
    ],
)
def test_vendor_by_linux(tmp_path, monkeypatch, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(products, "Path", lambda _: tmp_path / "cpuinfo")
    assert products.vendor.__wrapped__() == expected


def test_vendor_elsewhere(monkeypatch):
    monkeypatch.setattr(products, "Path", lambda _: pathlib.Path("/nonexistent/cpuinfo"))
    monkeypatch.setattr(platform, "processor", lambda: "AMD64 Family 25 Model 1 Stepping 1, AuthenticAMD")
    assert products.vendor.__wrapped__() == "amd"


@pytest.mark.parametrize(("has", "capability", "expected"), [(1, "AVX512", 1), (0, "AVX512", 0), (1, "AVX2", 0)])
def test_uses_onednn(monkeypatch, has, capability, expected):
    monkeypatch.setattr(products, "HAS_ONEDNN", bool(has))
    monkeypatch.setattr(products, "vendor", lambda: "amd")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.uses_onednn.__wrapped__() == bool(expected)
