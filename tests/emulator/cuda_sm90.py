"""csrc/grouped_mlp_sm90 on the emulator: the calls of `cuda_grouped_mlp`, forward 1 and dgrad 2 by TMA and wgmma."""

import re
import struct
import subprocess
from pathlib import Path

import cuda_mlp_cases
import torch
from cuda_grouped_mlp import FORMATS, Kernels, Library, Ran, ceil_div
from cuda_library import CSRC
from cuda_mlp_cases import Form
from ptx_emulator.copies import TensorMap
from ptx_emulator.launch import GlobalMemory, Launch, Program
from shipped_cases import Case, Results

KERNELS = {"fc1_sm90_kernel": "fc1", "hidden_grad_sm90_kernel": "hidden_grad"}
"""Kernel -> file of csrc/grouped_mlp_sm90."""

TILE, DEPTH, STAGES, BOXES, THREADS = 128, 64, 6, (1, 2, 4, 8, 16, 32), 384
SHARED = STAGES * 2 * TILE * DEPTH * 2 + 2 * 8 * TILE * 4 + (2 * STAGES + 2) * 8
BLOCKS = 3
"""Multiprocessors of the emulated device: few, so that a block has several tiles."""


class Sm90Kernels(Kernels):
    """Those of sm_90a, and the two that take turns."""

    def __init__(self, compiler: str, folder: Path, csrc: Path = CSRC):
        super().__init__(compiler, "sm_90a", folder, csrc)

    def turns(self, kernel: str, bfloat16: bool) -> Program:
        source = KERNELS[kernel]
        if kernel not in self.texts:
            file = self.folder / f"{source}-sm90.ptx"
            options = ["-O3", "-std=c++17", f"-arch={self.target}", f"-I{self.csrc}"]
            command = [self.compiler, "-ptx", *options, self.csrc / f"grouped_mlp_sm90/{source}.cu", "-o", file]
            subprocess.run(command, check=True, capture_output=True)
            self.texts[kernel] = re.sub(r"\d+_GLOBAL__N__\w+?_cu_[0-9a-f]{8}", "", file.read_text())
        text = self.texts[kernel]
        (entry,) = re.findall(rf"\.entry (\w+{kernel}INS_\d+{FORMATS[bfloat16]}E\w+)\(", text)
        if entry not in self.programs:
            self.programs[entry] = Program(text, entry, SHARED)
        return self.programs[entry]


class Sm90Library(Library):
    """Launches forward 1 and dgrad 2 as csrc/grouped_mlp_sm90 does, everything else as before."""

    hidden: torch.Tensor
    """What the latest forward 1 wrote into a."""

    def grouped_mlp_fc1(self, *, x, weight, bias, z, a, slots, dim, hidden, bfloat16, stream):
        record = struct.pack("<9q", *x, *weight, bias, z, a) + self._slots(slots) + struct.pack("<2i", dim, hidden)
        matrices = slots[2] + (slots[4] > 0)
        weights = tensor_map(weight, (matrices, hidden, dim), TILE)
        self.hidden = self.tensors[a]
        self._take_turns("fc1_sm90_kernel", bfloat16, x, weights, record, (weight[0], bias, z, a), slots, dim, hidden)

    def grouped_mlp_to_hidden_grad(self, *, grad_out, weight, gates, z, to, slots, dim, hidden, bfloat16, stream):
        record = struct.pack("<12q", *grad_out, *weight, gates, z, *to) + self._slots(slots)
        record += struct.pack("<2i", dim, hidden)
        weights = tensor_map(weight, (slots[2], dim, hidden), DEPTH)
        addresses = weight[0], gates, z, *to
        self._take_turns("hidden_grad_sm90_kernel", bfloat16, grad_out, weights, record, addresses, slots, dim, hidden)

    def _take_turns(self, kernel, bfloat16, images, weights, record, addresses, slots, dim, hidden):
        _, _, _, num_slots, _, tokens, top_k = slots
        maps = [tensor_map(images, (num_slots // top_k, tokens, dim), rows) for rows in BOXES]
        memory, forms = GlobalMemory(), []
        for address in dict.fromkeys(address for address in (images[0], *addresses, *slots[:2]) if address):
            t = self.tensors[address]
            forms.append((str(t.dtype), list(t.shape), list(t.stride())))
            last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            memory.add(address, (last + 1) * t.element_size(), t.element_size(), f"{kernel}: {list(t.shape)}")
        program, counters = self.kernels.turns(kernel, bfloat16), None
        blocks = min(self._row_tiles(slots) * ceil_div(hidden, TILE), BLOCKS)
        if not self.compile_only:
            arguments = [(*maps, weights, record)]
            counters = Launch(program, memory, (blocks,), THREADS, arguments, self.seed, self.count).run()
        self.ran.append(Ran(kernel, program, blocks, counters, f"{blocks} {forms}"))


def tensor_map(at: tuple[int, int, int], shape: tuple[int, int, int], rows: int) -> TensorMap:
    """Boxes of ``rows`` rows. at: address, and the strides of matrices and rows, of which a single one may have any."""
    address, matrix, row = at
    row = shape[2] if shape[1] == 1 else row
    matrix = shape[1] * row if shape[0] == 1 else matrix
    return TensorMap(address, shape, (matrix, row, 1), (1, rows, DEPTH), 2, 128)


# --- cases ------------------------------------------------------------------------------------------------------------

FORMS = cuda_mlp_cases.FORMS | {
    "N 1, with a director": Form((20, 1, 24, 136, 3, 2), director=True, skewed=True),
    "N 31, more steps than stages": Form((5, 31, 456, 72, 3, 2)),
    "one image": Form((1, 33, 72, 264, 2, 1), many_orders=True),
}
"""What is special -> form; each runs in bf16 and in fp16."""


def case(form: Form, dtype: torch.dtype) -> Case:
    """As `cuda_mlp_cases.case`, and what forward 1 writes: a, with the director's rows behind."""
    whole, inputs = cuda_mlp_cases.case(form, dtype), cuda_mlp_cases.inputs_of(form, dtype)
    slots = cuda_mlp_cases._slots(cuda_mlp_cases.SPECIFICATION, inputs)
    stacked = inputs.weights[:2]
    if form.director:
        stacked = cuda_mlp_cases.with_director(stacked, cuda_mlp_cases.director_of(form, dtype)[:2])

    def compute(library: Sm90Library) -> Results:
        return whole.compute(library) | {"a": library.hidden}

    def want(precision: torch.dtype) -> Results:
        images, expert = slots.slot_order // slots.top_k, inputs.indices.flatten()[slots.slot_order]
        if form.director:
            images = torch.cat((images, torch.arange(len(inputs.x))))
            expert = torch.cat((expert, torch.full((len(inputs.x),), slots.num_experts)))
        x, weight, bias = (t.to(precision) for t in (inputs.x, *stacked))
        rows = [torch.nn.functional.linear(x[i], weight[e], bias[e]) for i, e in zip(images, expert, strict=True)]
        return whole.want(precision) | {"a": torch.nn.functional.gelu(torch.stack(rows))}

    return Case(dtype, compute, want)
