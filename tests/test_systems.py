"""What other systems lack is removed from a process here: the code that they can run must neither import nor call it.

It stands for macOS and Windows only as far as these names; nothing runs there.
"""

import subprocess
import sys

import pytest

MACOS = """
import os
del os.sched_getaffinity, os.sched_setaffinity
"""
WINDOWS = """
import os, signal, sys, torch  # torch asks for the system's name: it needs them here
for name in ("fork", "getuid", "pread", "pwrite", "register_at_fork", "sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)
for name in ("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
sys.modules.update(dict.fromkeys(("fcntl", "resource", "pwd", "grp")))  # importing them fails
"""
LAYER = """
import torch, dexkernels
layer = dexkernels.DEXLayer(dim=8, hidden_dim=16, num_experts=4, top_k=2)
y, aux = layer(torch.randn(3, 5, 8), return_aux=True)
(y.square().mean() + aux.align_loss).backward()
layer.update_director(aux.gate_mass, momentum=0.9)
print("layer", tuple(y.shape))
"""
EVERY_MODULE = """
import importlib, pkgutil, dex, dexkernels
for package in (dexkernels, dex):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if "triton" not in module.name and not module.name.endswith(("__main__", "cuda", "_C")):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:  # of an extra that is not installed
                if error.name.startswith("dex"):
                    raise
print("all imported")
"""


def command(*arguments: str) -> str:
    return f'from dex.cli import main; print("code", main({list(arguments)}))'


def run(*parts: str, folder) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", "\n".join(parts)], cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("system", [MACOS, WINDOWS], ids=["macos", "windows"])
def test_the_layer_and_the_help_run(tmp_path, system):
    process = run(system, LAYER, command("--help"), folder=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "layer (3, 5, 8)" in process.stdout and process.stdout.endswith("code 0\n")


@pytest.mark.slow
def test_without_affinity_every_module_imports_and_a_run_is_planned(tmp_path):
    plan = command("pretrain", "--preset", "demo", "--out", "a b", "--dry-run")
    process = run(MACOS, EVERY_MODULE, plan, folder=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "all imported" in process.stdout and process.stdout.endswith("code 0\n")
    assert not list(tmp_path.iterdir())


def test_the_names_are_really_missing(tmp_path):
    process = run(
        WINDOWS, "import signal, os", "try: import fcntl", 'except ImportError: print("gone")', folder=tmp_path
    )
    assert process.stdout == "gone\n", process.stderr
    assert run(MACOS, "os.sched_getaffinity(0)", folder=tmp_path).returncode == 1
