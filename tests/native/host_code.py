"""Compiles csrc's host code for a test file, and runs that file as a script under the sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
COMPILE = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiled(source: str, folder: Path, *flags: str) -> Path:
    """The shared library of ``source``, a file of this folder; skips the test without a C++ compiler."""
    library = (folder / source).with_suffix(".so")
    command = [
        _compiler(),
        *COMPILE,
        *(flags or ["-O2"]),
        f"-I{HERE.parents[1] / 'csrc'}",
        HERE / source,
        "-o",
        library,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def check_memory(source: str, script: str, folder: Path, says: str, *flags: str) -> None:
    """``script LIBRARY`` must print ``says`` under the sanitizers, and these must stop ``script LIBRARY overrun``."""
    command = [_compiler(), "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("this compiler has no AddressSanitizer runtime")
    library = compiled(source, folder, *SANITIZE, *flags)
    # Python itself is not instrumented and frees little at its end.
    environment = os.environ | {"LD_PRELOAD": os.path.realpath(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, script, str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == says, done.stdout + done.stderr
    overrun = subprocess.run([*command, "overrun"], env=environment, capture_output=True, text=True)
    assert overrun.returncode != 0 and "heap-buffer-overflow" in overrun.stderr, overrun.stderr


def _compiler() -> str:
    path = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if path is None:
        pytest.skip("no C++ compiler on this machine ($CXX, c++, g++)")
    return path
