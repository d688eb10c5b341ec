"""What a record is valid for: GPU, driver, torch, CUDA, Triton and the sources of the kernels."""

import ctypes
import functools
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import NamedTuple

import torch

from .._version import __version__

PACKAGE = Path(__file__).resolve().parents[1]
INTERPRETER = "Triton's interpreter"
"""Replaces the name of a GPU in tests."""


class Identity(NamedTuple):
    """Machines with the same identity run the same kernels in the same way."""

    gpu: str
    architecture: str
    """``sm_90``"""
    driver: str
    torch: str
    cuda: str
    triton: str
    dexkernels: str
    sources: str
    """Hash of the kernels' sources and of the native library."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.gpu} (driver {self.driver}, torch {self.torch}, triton {self.triton})"


def identity(device: torch.device) -> Identity:
    """The identity of ``device``: a CUDA device or, for Triton's interpreter, the CPU."""
    name, architecture, driver = INTERPRETER, device.type, "none"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, architecture, driver = torch.cuda.get_device_name(device), f"sm_{major}{minor}", _driver()
    return Identity(
        gpu=name,
        architecture=architecture,
        driver=driver,
        torch=torch.__version__,
        cuda=str(torch.version.cuda),
        triton=_triton(),
        dexkernels=__version__,
        sources=sources(),
    )


@functools.cache
def sources(package: Path = PACKAGE) -> str:
    """Hash of everything that determines what a kernel computes: operators, tile tables, the native library."""
    digest = hashlib.sha256()
    for file in sorted([*(package / "ops").rglob("*.py"), *package.glob("_C.*")]):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _triton() -> str:
    """Triton's version, without importing it, which takes a second."""
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "absent"


@functools.cache
def _driver() -> str:
    """The driver's version from NVML, which comes with it; without NVML the driver's CUDA version."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            return text.value.decode()
    except (OSError, AttributeError):
        pass
    return f"for CUDA {torch._C._cuda_getDriverVersion()}"
