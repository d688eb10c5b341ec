"""Adds to pyproject.toml the native library, dexkernels._C, built by CMake and ninja where there is an nvcc.

DEX_CUDA=1: fail when it cannot be built; 0: never build it; unset: build it when an nvcc is found.
nvcc is looked for in $CUDACXX, $CUDA_HOME/bin and on PATH. docs/building.md says more.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
MIN_NVCC = (12, 1)
"""The first that passes kernel parameters of more than 4 KB."""


def find_nvcc() -> tuple[str | None, str]:
    """``(path, version)``, or ``(None, why there is none)``."""
    if sys.platform != "linux":
        return None, f"it is for Linux, and this is {sys.platform}"
    named = os.environ.get("CUDACXX")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(named) if named else home and shutil.which("nvcc", path=os.path.join(home, "bin"))
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        return None, "no nvcc in $CUDACXX, $CUDA_HOME/bin or on PATH"
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f"{nvcc} does not run: {error}"
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        return None, f"{nvcc} --version names no release"
    version = int(found[1]), int(found[2])
    if version < MIN_NVCC:
        return None, f"{nvcc} is {found[1]}.{found[2]}, older than {MIN_NVCC[0]}.{MIN_NVCC[1]}"
    return nvcc, f"{found[1]}.{found[2]}"


def decide() -> tuple[str | None, str]:
    """``(nvcc to build with or None, one line for the user)``."""
    wanted = os.environ.get("DEX_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"DEX_CUDA: expected 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None, "dexkernels: the native library is not built (DEX_CUDA=0)"
    nvcc, detail = find_nvcc()
    if nvcc is None and wanted == "1":
        sys.exit(f"dexkernels: DEX_CUDA=1, but the native library cannot be built: {detail}")
    if nvcc is None:
        return None, f"dexkernels: the native library is not built: {detail}; everything else works without it"
    return nvcc, f"dexkernels: building the native library with {nvcc} ({detail})"


class BuildPy(build_py):
    """Every kind of build runs it once, so here the decision is told."""

    def run(self):
        print(TOLD, file=sys.stderr)
        super().run()


class BuildNative(build_ext):
    def build_extension(self, ext):
        try:
            import pybind11
        except ImportError:
            sys.exit("dexkernels: the native library does not build: no pybind11; DEX_CUDA=0 installs without it")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "native"
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CUDA_COMPILER": NVCC,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "DEX_VERSION": self.distribution.get_version(),
        }
        configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *(f"-D{k}={v}" for k, v in settings.items())]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", build], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"dexkernels: the native library does not build: {error}; DEX_CUDA=0 installs without it")
        (built,) = build.glob("_C*")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)


class PathFile:
    """A ``.pth`` file with the folders of both packages. setuptools' own choice for two folders is an import hook.

    Type checkers and editors do not run it: to them the packages could not be resolved.
    """

    def __init__(self, name: str):
        self.name = name

    def __call__(self, wheel, files, mapping) -> None:
        wheel.writestr(f"__editable__.{self.name}.pth", f"{ROOT}\n{ROOT / 'python'}\n")

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass


class EditableWheel(editable_wheel):
    def _select_strategy(self, name, tag, build_lib):
        """Where a setuptools does not ask, its import hook serves: all but type checkers work."""
        return PathFile(name) if self.mode in (None, "lenient") else super()._select_strategy(name, tag, build_lib)


NVCC, TOLD = decide()
setup(
    ext_modules=[Extension("dexkernels._C", sources=[])] if NVCC else [],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPy, "editable_wheel": EditableWheel},
)
