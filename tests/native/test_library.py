"""The built library and its build: what ptxas made of the kernels, that it needs no torch, and what setup.py decides.

Where there is an nvcc the library must have been built: its absence fails. Without nvcc these tests are skipped.
Whole installs, wheel and sdist are checked by scripts/check_build.sh.
"""

import importlib.machinery
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

import dexkernels

ROOT = Path(__file__).resolve().parents[2]
STRICT_NVCC = ROOT / "csrc/strict_nvcc.py"
PACKAGE = Path(dexkernels.__file__).parent
DUMP = "cuobjdump"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(os.environ.get("CUDACXX") or "nvcc") or (home and shutil.which(f"{home}/bin/nvcc"))


def built() -> list[Path]:
    return [PACKAGE / f"_C{s}" for s in importlib.machinery.EXTENSION_SUFFIXES if (PACKAGE / f"_C{s}").exists()]


@pytest.fixture(scope="module")
def library() -> Path:
    if found := built():
        return found[0]
    if find_nvcc() is None:
        pytest.skip("no nvcc on this machine: the native library is not built")
    if os.environ.get("DEX_CUDA") == "0":
        pytest.skip("DEX_CUDA=0: the native library is not built")
    pytest.fail("there is an nvcc, but dexkernels._C is not built: run 'pip install -e .' again")


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = find_nvcc()
    if found is None:
        pytest.skip("no nvcc on this machine")
    return found


# ---- machine code


def dump(library: Path, *options: str) -> str:
    """cuobjdump from PATH, the CUDA toolkit, NVIDIA's package or triton's; it calls the nvdisasm beside it."""
    folders = [os.path.join(os.environ.get("CUDA_HOME", ""), "bin")]
    for package, inside in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        folders += [os.path.join(f, inside) for f in (spec.submodule_search_locations if spec else ())]
    path = os.pathsep.join([os.environ["PATH"], *folders])
    if (tool := shutil.which(DUMP, path=path)) is None:
        pytest.fail("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    environment = os.environ | {"PATH": path}
    done = subprocess.run([tool, *options, library], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def machine_code(library) -> dict[tuple[str, str], list[str]]:
    """(architecture, kernel) -> its instructions, of every kernel in the library."""
    code, architecture, kernel = {}, None, None
    for line in dump(library, "-sass").splitlines():
        if found := re.search(r"code for (\w+)", line):
            architecture = found[1]
        elif found := re.search(r"Function : (\w+)", line):
            kernel = found[1]
            code[architecture, kernel] = []
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            code[architecture, kernel].append(found[1])
    return code


def test_library_holds_both_architectures_and_ptx(library, machine_code):
    assert {a for a, _ in machine_code} == {"sm_80", "sm_90a"}
    assert re.search(r"PTX file.*sm_80\.ptx", dump(library, "--list-ptx"))


def test_group_ema_has_wide_accesses_and_no_spills(machine_code):
    kernels = {k: v for k, v in machine_code.items() if "group_ema_kernel" in k[1]}
    assert len(kernels) == 4, "two table sizes on two architectures"
    for name, code in kernels.items():
        count = {op: code.count(op) for op in ("LDG.E.128", "STG.E.128", "STG.E.64")}
        # Two packs of 16 bytes: of the director, and of each of four experts before the first sum.
        assert count == {"LDG.E.128": 10, "STG.E.128": 2, "STG.E.64": 2}, name
        assert not [op for op in code if op.startswith(("LDL", "STL"))], name
        assert "FFMA" in code and not [op for op in code if op.startswith("ATOM")], name


def test_adamw_ema_has_wide_accesses_and_no_spills(machine_code):
    kernels = {k: v for k, v in machine_code.items() if "adamw_ema_kernel" in k[1]}
    assert len(kernels) == 4, "two table sizes on two architectures"
    for name, code in kernels.items():
        count = {op: code.count(op) for op in ("LDG.E.128", "STG.E.128", "STG.E.64")}
        # Of the director, and of a parameter, its gradient and its moments; copies of four elements are 8 bytes.
        assert count == {"LDG.E.128": 5, "STG.E.128": 4, "STG.E.64": 2}, name
        assert not [op for op in code if op.startswith(("LDL", "STL", "ATOM"))], name


PRODUCTS = {"fc1_kernel": 2, "to_slots_kernel": 4, "to_hidden_grad_kernel": 2, "weight_grad_kernel": 4}
"""Kernels of grouped_mlp with the main loop -> how many forms an architecture has."""


def test_grouped_products_run_on_tensor_cores_without_spills(machine_code):
    forms = {}
    for (architecture, name), code in machine_code.items():
        kernel = next((kernel for kernel in PRODUCTS if kernel in name), None)
        if kernel is None:
            continue
        forms[architecture, kernel] = forms.get((architecture, kernel), 0) + 1
        start = {op: sum(one.startswith(op) for one in code) for op in ("HMMA.16816.F32", "LDSM.16", "LDGSTS")}
        # A step of the one loop; three steps before it, and one within.
        assert start == {"HMMA.16816.F32": 32, "LDSM.16": 12, "LDGSTS": 16}, name
        assert code.count("LDGSTS.E.BYPASS.128") == 16 and "STG.E.128" in code, name
        assert not [op for op in code if op.startswith(("LDL", "STL", "ATOM", "RED."))], name
    assert forms == {(a, k): n for a in ("sm_80", "sm_90a") for k, n in PRODUCTS.items()}


def test_no_kernel_uses_the_stack(library):
    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", dump(library, "-res-usage"))
    assert len(usage) >= 4
    assert all(int(stack) == int(local) == 0 for _, _, stack, local in usage)
    # 256 threads, two blocks on one multiprocessor: 128; 384 that share them out anew, one block: 168. Others use ten
    # fewer, so that another nvcc has room.
    limits = {product: 128 for product in PRODUCTS} | {"_sm90_kernel": 168}
    limit = {name: next((n for part, n in limits.items() if part in name), 118) for name, _, _, _ in usage}
    assert [name for name, registers, _, _ in usage if int(registers) > limit[name]] == []


# ---- what it needs


def alone(library: Path, code: str) -> str:
    """Output of ``code`` in a Python without site-packages, where ``_C`` is the loaded library."""
    load = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('dexkernels._C', {str(library)!r})\n"
        "_C = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(_C)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", load + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_library_loads_without_torch_and_without_a_driver(library):
    mapped = alone(library, "print(open('/proc/self/maps').read())\nassert 'torch' not in sys.modules")
    assert library.name in mapped
    for name in ("libtorch", "libc10", "libcudart", "libcuda.so"):
        assert name not in mapped, name
    assert alone(library, "print(_C.__version__)").strip() == dexkernels.__version__


def test_an_operator_is_named_by_its_folder_alone():
    """CMake and bindings.cpp take every folder of csrc: a new operator edits neither."""
    folders = {path.parent.name for path in (ROOT / "csrc").glob("*/bind.cpp")}
    assert "group_ema" in folders
    for name in ("CMakeLists.txt", "csrc/bindings.cpp"):
        text = (ROOT / name).read_text()
        assert not [folder for folder in folders if folder in text], name


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_call_without_a_gpu_says_so(library):
    call = "try:\n _C.group_ema_([(16, 16, 16, 0, 4, 4, 1)], 0.5, 0, False, 0, 0)\nexcept RuntimeError as e: print(e)"
    assert re.match(r"group_ema_: (no NVIDIA driver on this machine|.*no CUDA-capable device)", alone(library, call))


# ---- the compiler's wrapper


@pytest.mark.parametrize(
    "line, fault",
    [
        ("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized", "C7510"),
        ("    72 bytes stack frame, 92 bytes spill stores, 104 bytes spill loads", "registers are spilled"),
        ("    8 bytes stack frame, 0 bytes spill stores, 12 bytes spill loads", "registers are spilled"),
        ("    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", None),
        ("ptxas info    : Used 101 registers, used 0 barriers", None),
    ],
)
def test_strict_nvcc_on_what_ptxas_says(line, fault):
    command = [sys.executable, STRICT_NVCC, sys.executable, "-c", f"import sys; print({line!r}, file=sys.stderr)"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (fault is not None)
    assert fault in done.stderr and line in done.stderr if fault else done.stderr == done.stdout == ""


def test_strict_nvcc_passes_failures_and_warnings_on():
    command = [sys.executable, STRICT_NVCC, sys.executable, "-c", "print('a.cu(1): warning: b'); raise SystemExit(3)"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "a.cu(1): warning: b\n")


@pytest.mark.parametrize("registers, passes", [(255, True), (24, False)])
def test_strict_nvcc_on_a_real_spill(nvcc, tmp_path, registers, passes):
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void f(float* p) {\n  float a[64];\n#pragma unroll\n  for (int i = 0; i < 64; ++i) a[i] = p[i];\n"
        "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < 64; ++i) p[i] = a[63 - i] * a[i];\n}\n"
    )
    options = ["-arch=sm_80", f"-maxrregcount={registers}", "-Xptxas=-v", "-cubin", "-o", tmp_path / "f.cubin"]
    done = subprocess.run([sys.executable, STRICT_NVCC, nvcc, *options, source], capture_output=True, text=True)
    assert (done.returncode == 0) == passes, done.stderr
    assert passes or "registers are spilled" in done.stderr


# ---- what setup.py decides


@pytest.fixture
def decide(monkeypatch, tmp_path):
    """Runs setup.py up to its call of setup(); ``release``: what a stand-in nvcc says, None: no nvcc anywhere."""

    def run(dex_cuda: str | None, release: str | None = None, where: str = "PATH") -> dict:
        monkeypatch.setattr(setuptools, "setup", lambda **_: None)
        for name in ("CUDACXX", "CUDA_HOME", "DEX_CUDA"):
            monkeypatch.delenv(name, raising=False)
        tools = tmp_path / "bin"
        tools.mkdir()
        if release is not None:
            (tools / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, {release}'\n")
            (tools / "nvcc").chmod(0o755)
        monkeypatch.setenv("PATH", str(tools if where == "PATH" else tmp_path / "none"))
        if where == "CUDA_HOME":
            monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        elif where == "CUDACXX":
            monkeypatch.setenv("CUDACXX", str(tools / "nvcc"))
        if dex_cuda is not None:
            monkeypatch.setenv("DEX_CUDA", dex_cuda)
        return runpy.run_path(str(ROOT / "setup.py"))

    return run


@pytest.mark.parametrize("where", ["PATH", "CUDA_HOME", "CUDACXX"])
@pytest.mark.parametrize("dex_cuda", [None, "", "1"])
def test_builds_where_there_is_an_nvcc(decide, tmp_path, where, dex_cuda):
    decided = decide(dex_cuda, "release 13.0, V13.0.88", where)
    assert decided["NVCC"] == str(tmp_path / "bin/nvcc")
    assert decided["TOLD"] == f"dexkernels: building the native library with {tmp_path}/bin/nvcc (13.0)"


def test_dex_cuda_0_never_builds(decide):
    decided = decide("0", "release 13.0, V13.0.88")
    assert decided["NVCC"] is None
    assert decided["TOLD"] == "dexkernels: the native library is not built (DEX_CUDA=0)"


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_another_system_builds_nothing_though_it_has_an_nvcc(decide, monkeypatch, tmp_path, system):
    monkeypatch.setattr(sys, "platform", system)
    decided = decide(None, "release 13.0, V13.0.88")
    assert decided["NVCC"] is None
    assert f"it is for Linux, and this is {system}; everything else works" in decided["TOLD"]
    shutil.rmtree(tmp_path / "bin")
    with pytest.raises(SystemExit, match="cannot be built: it is for Linux"):
        decide("1", "release 13.0, V13.0.88")


@pytest.mark.parametrize(
    "release, why",
    [
        (None, "no nvcc in $CUDACXX, $CUDA_HOME/bin or on PATH"),
        ("release 11.8, V11.8.89", "bin/nvcc is 11.8, older than 12.1"),
        ("something else", "bin/nvcc --version names no release"),
    ],
)
def test_without_a_usable_nvcc_one_line_says_why(decide, tmp_path, release, why):
    decided = decide(None, release)
    assert decided["NVCC"] is None
    assert decided["TOLD"].endswith(f"{why}; everything else works without it")
    assert decided["TOLD"].startswith("dexkernels: the native library is not built: ")
    assert "\n" not in decided["TOLD"]
    shutil.rmtree(tmp_path / "bin")
    with pytest.raises(SystemExit, match=f"DEX_CUDA=1, but the native library cannot be built: .*{re.escape(why)}"):
        decide("1", release)


def test_dex_cuda_must_be_0_or_1(decide):
    with pytest.raises(SystemExit, match="DEX_CUDA: expected 0, 1 or unset, got 'yes'"):
        decide("yes")
