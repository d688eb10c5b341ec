"""Which library multiplies float32 matrices on this CPU: torch's own choice (MKL), or oneDNN.

MKL uses 512-bit vectors on Intel's processors only. oneDNN uses them on every processor that has them, and there it is
twice as fast as MKL. With 256-bit vectors oneDNN was slower on a real processor (Zen 3), most of all where the rows of
the second matrix are a multiple of 4096 bytes apart.

The choice is a function of the processor, never of a measurement: the libraries round differently, and a run that
resumes, or another rank, must compute the same bits.
"""

import functools
import platform
from pathlib import Path

import torch

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}


@functools.cache
def vendor() -> str:
    """``"intel"``, ``"amd"``, or the processor's vendor in the system's words; empty if unknown."""
    info = Path("/proc/cpuinfo")
    words = platform.processor()
    if info.exists():
        lines = (line.partition(":") for line in info.read_text(errors="replace").splitlines())
        words = next((value.strip() for name, _, value in lines if name.strip() == "vendor_id"), "")
    return next((name for word, name in _VENDORS.items() if word in words), words)


def library(vendor: str, capability: str) -> str:
    """``"onednn"`` or ``"torch"``: what multiplies float32 matrices of every size and transposition.

    capability: the result of `torch.backends.cpu.get_cpu_capability`, such as ``"AVX512"``.
    """
    return "onednn" if capability.startswith("AVX512") and vendor != "intel" else "torch"


@functools.cache
def uses_onednn() -> bool:
    """Whether the products of this process use oneDNN. ``torch.backends.mkldnn.enabled`` can turn it off later."""
    return HAS_ONEDNN and library(vendor(), torch.backends.cpu.get_cpu_capability()) == "onednn"
