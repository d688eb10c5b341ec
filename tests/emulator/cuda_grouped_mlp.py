"""csrc/grouped_mlp on the emulator: `dexkernels.ops.grouped_mlp.cuda` launches what nvcc compiled, on CPU tensors.

`emulated` puts the emulator in the place of the native library. It packs the kernels' parameters as the launchers in
csrc/ do, and knows of every address which tensor begins there.
"""

import contextlib
import re
import struct
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from cuda_library import CSRC
from ptx_emulator.launch import POISONS, GlobalMemory, Launch, Program

SOURCES = {
    "forward": ("fc1", "to_slots", "combine"),
    "hidden_grad": ("to_hidden_grad", "image_sum", "gate_grad", "bias1_grad", "bias2_grad"),
    "weight_grad": ("weight_grad", "sum_chunks"),
}
"""File of csrc/grouped_mlp -> its kernels."""

TILE, SHARED, THREADS = 128, 65536, 256
FORMATS = {True: "Bfloat16", False: "Float16"}


class Ran(NamedTuple):
    """One launch."""

    kernel: str
    program: Program
    blocks: int
    counters: object
    arguments: str


class Kernels:
    """The kernels of a target. A file is compiled when one of its kernels is first launched."""

    def __init__(self, compiler: str, target: str, folder: Path, csrc: Path = CSRC):
        self.compiler, self.target, self.folder, self.csrc = compiler, target, folder, csrc
        self.texts: dict[str, str] = {}
        self.programs: dict[str, Program] = {}

    def _compiled(self, kernel: str) -> str:
        source = next(source for source, kernels in SOURCES.items() if kernel.removesuffix("_kernel") in kernels)
        if source not in self.texts:
            file = self.folder / f"{source}-{self.target}.ptx"
            options = ["-O3", "-std=c++17", f"-arch={self.target}", f"-I{self.csrc}"]
            command = [self.compiler, "-ptx", *options, self.csrc / f"grouped_mlp/{source}.cu", "-o", file]
            subprocess.run(command, check=True, capture_output=True)
            # nvcc names what is local to a file by the file's place too, and so the instructions that name parameters.
            self.texts[source] = re.sub(r"\d+_GLOBAL__N__\w+?_cu_[0-9a-f]{8}", "", file.read_text())
        return self.texts[source]

    def program(self, kernel: str, form: str, shared: int) -> Program:
        """form: the mangled arguments of its template."""
        text = self._compiled(kernel)
        (entry,) = re.findall(rf"\.entry (\w+\d{kernel}INS_\d+{form}E\w+)\(", text)
        if entry not in self.programs:
            self.programs[entry] = Program(text, entry, shared)
        return self.programs[entry]


def divider(n: int) -> tuple[int, int, int]:
    bits = (n - 1).bit_length()
    return -(-(2 ** (31 + bits)) // n), 31 + bits, n


def pieces(rows: int, size: int, experts: int) -> int:
    return rows // size + experts


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Library:
    """Stands for `dexkernels._C`: the same calls, on the emulator. tensors: address -> what begins there."""

    def __init__(self, kernels: Kernels, tensors: dict[int, torch.Tensor], seed=None, count=False, compile_only=False):
        self.kernels, self.tensors, self.seed, self.count = kernels, tensors, seed, count
        self.compile_only = compile_only
        self.ran: list[Ran] = []

    def grouped_mlp_fc1(self, *, x, weight, bias, z, a, slots, dim, hidden, bfloat16, stream):
        record = struct.pack("<9q", *x, *weight, bias, z, a) + self._slots(slots) + struct.pack("<2i", dim, hidden)
        blocks = self._row_tiles(slots) * ceil_div(hidden, TILE)
        self._run("fc1_kernel", bfloat16, record, (x[0], weight[0], bias, z, a, *slots[:2]), blocks)

    def grouped_mlp_to_slots(
        self, *, rows, weight, transposed, bias, out, director_out, slots, sizes, bfloat16, stream
    ):
        record = struct.pack("<7q", rows, *weight, bias, out, director_out) + self._slots(slots)
        record += struct.pack("<2i", *sizes)
        addresses = rows, weight[0], bias, out, director_out, *slots[:2]
        blocks = self._row_tiles(slots) * ceil_div(sizes[1], TILE)
        self._run("to_slots_kernel", bfloat16, record, addresses, blocks, f"ELb{int(transposed)}")

    def grouped_mlp_combine(self, *, by_slot, gates, out, images, size, top_k, bfloat16, stream):
        record = struct.pack("<5qi4x", by_slot, gates, out, images, size, top_k)
        blocks = images * ceil_div(size, 128 * 8)
        self._run("combine_kernel", bfloat16, record, (by_slot, gates, out), blocks, threads=128)

    def grouped_mlp_to_hidden_grad(self, *, grad_out, weight, gates, z, to, slots, dim, hidden, bfloat16, stream):
        record = struct.pack("<12q", *grad_out, *weight, gates, z, *to) + self._slots(slots)
        record += struct.pack("<2i", dim, hidden)
        addresses = grad_out[0], weight[0], gates, z, *to, *slots[:2]
        blocks = self._row_tiles(slots) * ceil_div(hidden, TILE)
        self._run("to_hidden_grad_kernel", bfloat16, record, addresses, blocks)

    def grouped_mlp_image_sum(self, *, grad_out, sums, images, tokens, dim, bfloat16, stream):
        record = struct.pack("<5q2i", *grad_out, sums, images, tokens, dim)
        self._run("image_sum_kernel", bfloat16, record, (grad_out[0], sums), images * ceil_div(dim, 64), shared=0)

    def grouped_mlp_gate_grad(self, *, gate_parts, sums, bias, dgates, slots, num_parts, dim, bfloat16, stream):
        record = struct.pack("<4q", gate_parts, sums, bias, dgates) + self._slots(slots)
        record += struct.pack("<2i", num_parts, dim)
        addresses = gate_parts, sums, bias, dgates, *slots[:2]
        self._run("gate_grad_kernel", bfloat16, record, addresses, ceil_div(slots[3], 4), threads=128)

    def grouped_mlp_bias1_grad(self, **arguments):
        self._bias_grad("bias1_grad_kernel", **arguments)

    def grouped_mlp_bias2_grad(self, **arguments):
        self._bias_grad("bias2_grad_kernel", **arguments)

    def _bias_grad(self, kernel, *, parts, gates, out, slots, width, float_out, bfloat16, stream):
        record = struct.pack("<3q", parts, gates, out) + self._slots(slots) + struct.pack("<2i", width, float_out)
        blocks = slots[2] * ceil_div(width, 64)
        self._run(kernel, bfloat16, record, (parts, gates, out, *slots[:2]), blocks, shared=0)

    def grouped_mlp_weight_grad(
        self, *, gathered, gather_left, rows, out, parts, slots, sizes, float_out, bfloat16, stream
    ):
        most, height, width = sizes
        record = struct.pack("<6q", *gathered, rows, out, parts) + self._slots(slots)
        record += struct.pack("<4i", *sizes, float_out)
        addresses = gathered[0], rows, out, parts, *slots[:2]
        tiles = ceil_div(height, TILE) * ceil_div(width, TILE)
        blocks = pieces(slots[3], most, slots[2]) * tiles
        self._run("weight_grad_kernel", bfloat16, record, addresses, blocks, f"ELb{int(gather_left)}")
        if parts:
            blocks = slots[2] * ceil_div(height * width, 256 * 4)
            self._run("sum_chunks_kernel", bfloat16, record, addresses, blocks, shared=0)

    @staticmethod
    def _slots(slots) -> bytes:
        order, offsets, experts, count, images, tokens, top_k = slots
        dividers = (*divider(tokens), *divider(top_k))
        return struct.pack("<2q3iI2iI2i4x", order, offsets, experts, count, images, *dividers)

    @staticmethod
    def _row_tiles(slots) -> int:
        _, _, experts, count, images, tokens, _ = slots
        return ceil_div(images * tokens, TILE) + pieces(count * tokens, TILE, experts)

    def _run(self, kernel, bfloat16, record, addresses, blocks, form="", threads=THREADS, shared=SHARED):
        memory, forms = GlobalMemory(), []
        for address in dict.fromkeys(a for a in addresses if a):
            t = self.tensors[address]
            forms.append((str(t.dtype), list(t.shape), list(t.stride())))
            last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            if t.numel():
                memory.add(address, (last + 1) * t.element_size(), t.element_size(), f"{kernel}: {list(t.shape)}")
        program = self.kernels.program(kernel, FORMATS[bfloat16] + form, shared if threads == THREADS else 0)
        if blocks:
            counters = None
            if not self.compile_only:
                counters = Launch(program, memory, (blocks,), threads, [record], self.seed, self.count).run()
            self.ran.append(Ran(kernel, program, blocks, counters, f"{blocks} {forms}"))


@contextlib.contextmanager
def emulated(
    kernels: Kernels,
    seed: int | None = None,
    count: bool = False,
    compile_only: bool = False,
    kind: type[Library] = Library,
) -> Iterator[Library]:
    """Within it, `dexkernels.ops.grouped_mlp.cuda` runs on CPU tensors; new tensors hold poison.

    compile_only: nothing is run, and what launches would write stays as it was. kind: of the library.
    """
    from dexkernels import native

    tensors: dict[int, torch.Tensor] = {}
    library = kind(kernels, tensors, seed, count, compile_only)
    address_of = torch.Tensor.data_ptr

    def data_ptr(t):
        tensors[address_of(t)] = t
        return address_of(t)

    replacements = (
        (native, "library", library),
        (torch.Tensor, "data_ptr", data_ptr),
        (torch.cuda, "device", lambda device: contextlib.nullcontext()),
        (torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0)),
    )
    before = [getattr(owner, name) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    try:
        with Poisoned(POISONS[0 if seed is None else seed % len(POISONS)]):
            yield library
    finally:
        for (owner, name, _), value in zip(replacements, before, strict=True):
            setattr(owner, name, value)


class Poisoned(torch.overrides.TorchFunctionMode):
    """Tensors that are allocated without values hold poison, NaN as 16 bits and as 32."""

    def __init__(self, poison: int):
        super().__init__()
        self.poison = poison

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function in (torch.empty, torch.empty_like, torch.Tensor.new_empty) and made.numel():
            made.view(-1).view(torch.int16).fill_(self.poison - 2**16 if self.poison >= 2**15 else self.poison)
        return made
