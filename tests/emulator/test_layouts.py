"""The emulator's fragments, swizzles and descriptors against CuTe's: a program of the host prints CuTe's as tables.

It needs the headers of CUTLASS (``pip install --no-deps nvidia-cutlass``), and those of CUDA, which come with nvcc.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from ptx_emulator import layouts
from ptx_emulator.copies import TensorCopy, TensorMap, swizzle

LANES = 32


@pytest.fixture(scope="module")
def cute(tmp_path_factory) -> dict[str, np.ndarray]:
    """Name -> table, as layouts.cpp prints them."""
    library = importlib.util.find_spec("cutlass_library")
    if library is None:
        pytest.skip("the headers of CuTe are in nvidia-cutlass, which is not installed")
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    if nvcc is None:
        pytest.skip("CuTe needs the headers of CUDA, which come with nvcc")
    program = tmp_path_factory.mktemp("cute") / "layouts"
    include = Path(library.origin).parent / "source/include"
    source = Path(__file__).with_name("layouts.cpp")
    command = [nvcc, "-x", "c++", "-std=c++17", "-w", f"-I{include}", source, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    tables = (line.split() for line in lines if not line.startswith("ERROR"))
    return {name: np.array(values, np.int64) for name, *values in tables}


def numbered(registers: int, n: int, halves: int) -> np.ndarray:
    """Registers whose every element is a number of its own: ``thread * values + value`` as CuTe counts."""
    register, warp, lane, half = np.meshgrid(*(np.arange(k) for k in (registers, n, LANES, halves)), indexing="ij")
    return (warp * LANES + lane) * registers * halves + register * halves + half


def elements(fragment: np.ndarray, rows: int) -> np.ndarray:
    """Of every (thread, value) the index ``row + rows * column`` of its element, from a matrix of those numbers."""
    flat = fragment.reshape(-1, fragment.shape[-1])
    row, column = np.meshgrid(np.arange(flat.shape[0]), np.arange(flat.shape[1]), indexing="ij")
    at = np.empty(flat.size, np.int64)
    at[flat.reshape(-1)] = (row + rows * column).reshape(-1)
    return at


def test_fragments_of_mma(cute):
    assert (elements(layouts.left_fragment(numbered(4, 1, 2)), 16) == cute["mma_a"]).all()
    right = layouts.right_fragment(numbered(2, 1, 2))[0].T  # CuTe's B is [N, K]
    assert (elements(right, 8) == cute["mma_b"]).all()
    assert (elements(layouts.sum_fragment(numbered(4, 1, 1)[..., 0]), 16) == cute["mma_c"]).all()


@pytest.mark.parametrize("columns", [8, 128, 256])
def test_sums_of_wgmma(cute, columns):
    sums = layouts.sum_fragment(numbered(columns // 2, 4, 1)[..., 0])
    assert (elements(sums, 64) == cute[f"wgmma_c_{columns}"]).all()
    registers = layouts.sum_registers(sums).reshape(columns // 2, 4, LANES)
    assert (registers == numbered(columns // 2, 4, 1)[..., 0]).all()


def test_left_operand_of_wgmma_in_registers(cute):
    assert (elements(layouts.left_fragment(numbered(4, 4, 2)), 64) == cute["wgmma_a"]).all()


@pytest.mark.parametrize(
    "name", ["k_128", "k_64", "k_32", "k_0", "mn_128", "mn_128_one", "mn_64", "mn_32"]
)  # fmt: skip
def test_operands_of_wgmma_in_shared_memory(cute, name):
    rows, depth, leading, stride, kind, *offsets = cute[name].tolist()
    offsets = np.array(offsets).reshape(rows, depth)
    base, transposed = 0x4000, name.startswith("mn")
    for k in range(0, depth, 16):
        # A program goes on along K by adding to the start; within a pattern that is before the permutation.
        start = base + {"k": {64: 2 * k, 32: 2 * k}.get(depth), "m": k // 8 * stride * 16}[name[0]]
        if name == "k_0":
            start = base + k // 8 * leading * 16
        elif name[0] == "k":
            width = int(name[2:])
            start = base + 2 * k % width + 2 * k // width * (rows // 8) * 8 * width
        descriptor = start >> 4 | leading << 16 | stride << 32 | kind << 62
        got = layouts.operand_offsets(descriptor, np.arange(rows), 16, transposed)
        assert (got - base == offsets[:, k : k + 16]).all()


@pytest.mark.parametrize("width", [128, 64, 32])
def test_a_tensor_copy_writes_the_layout_that_wgmma_reads(cute, width):
    rows, depth, *_ = cute[f"k_{width}"][:5].tolist()
    columns = width // 2
    offsets = cute[f"k_{width}"][5:].reshape(rows, depth)[:, :columns]
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    assert (swizzle(row * width + column * 2, width) == offsets).all()


@pytest.mark.parametrize(
    "name, count, transposed", [("ldmatrix_1", 1, False), ("ldmatrix_4", 4, False), ("ldmatrix_4_trans", 4, True)]
)
def test_ldmatrix(cute, run_ptx, name, count, transposed):
    """Lane and register of every bit: the matrix in shared memory holds the number of each element."""
    from ptx_programs import kernel

    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    stores = "\n".join(f"  st.global.b32 [%d3+{128 * i}], %r{10 + i};" for i in range(count))
    text = kernel(
        f"""
  ld.param.u64 %d1, [out];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, memory;
  shl.b32 %r3, %r1, 4;
  add.s32 %r4, %r2, %r3;
  shl.b32 %r5, %r1, 3;
  mad.lo.s32 %r6, %r5, 65537, 65536;
  add.s32 %r7, %r6, 131074;
  add.s32 %r8, %r7, 131074;
  add.s32 %r9, %r8, 131074;
  st.shared.v4.b32 [%r4], {{%r6, %r7, %r8, %r9}};
  bar.sync 0;
  ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {{{registers}}}, [%r4];
  mul.wide.u32 %d2, %r1, 4;
  add.s64 %d3, %d1, %d2;
{stores}
  ret;
""",
        ".u64 out",
    )
    out = np.zeros((count, LANES, 2), np.uint16)
    run_ptx(text, out, shared=512)
    # CuTe counts bits: thread, then value; 16 of them are an element.
    want = cute[name].reshape(LANES, count, 2, 16)[..., 0] // 16
    assert (out.transpose(1, 0, 2) == want).all()


def test_a_tensor_copy_out_of_bounds_reads_zeros():
    tensor = TensorMap(0, (5, 8), (8, 1), (4, 8), 2, 0)
    data = np.arange(40, dtype=np.uint16).reshape(5, 8)

    class Memory:
        def load(self, addresses, width, count, who):
            return data.reshape(-1)[(addresses // 2).astype(np.int64)]

    class Counters:
        def count_tensor(self, addresses, size):
            pass

    class Wave:
        memory, counters = Memory(), Counters()

    class Who:
        def pick(self, chosen):
            return self

    for first in (-2, 0, 3, 5, -4):
        copy = TensorCopy(0, tensor, (first, 0), 0, None, Who(), None)
        want = np.array([data[r] if 0 <= r < 5 else np.zeros(8) for r in range(first, first + 4)])
        assert (copy._read(Wave()) == want).all()
