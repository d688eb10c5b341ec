"""The shipped kernels on the emulator: launches of Triton run compiled PTX instead of a GPU.

Everything that the emulator's tests need of the kernel library is imported here.
"""

import contextlib
import hashlib
import importlib.util
import pathlib
import sys
import time
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from dexkernels import reference
from dexkernels.ops.adamw_ema import records as adamw_records
from dexkernels.ops.adamw_ema import triton as adamw_ema
from dexkernels.ops.align_loss import triton as align_loss
from dexkernels.ops.group_ema import triton as group_ema
from dexkernels.ops.grouped_mlp import records as mlp_records
from dexkernels.ops.grouped_mlp import triton as grouped_mlp
from dexkernels.ops.grouped_mlp.triton import aligned, configurations, plan
from dexkernels.ops.route import records as route_records
from dexkernels.ops.route import triton as route
from dexkernels.ops.triton_common import Tile
from dexkernels.records import MLPWeights
from dexkernels.routing import Routing
from dexkernels.testing import relative_error

from .launch import POISONS, GlobalMemory, Launch, Program, PTXError, TensorMap

MODULES = (plan,)
"""Modules that ask for the architecture of a device."""

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
TYPES |= {torch.float64: "fp64", torch.bool: "i1"}
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}

FUNCTIONS = (JITFunction, InterpretedFunction)
"""What `triton.jit` makes: compiled, or interpreted where the process asks for that."""

CALLERS = ("dexkernels", "probes")
"""Modules, and those of packages, whose kernels call device functions of the library."""

COMPILED, PROGRAMS = {}, {}


class Ran(NamedTuple):
    """One launch: of which kernel, in what time, and what was counted; None where it was only compiled."""

    kernel: str
    program: Program
    blocks: int
    seconds: float
    counters: object
    arguments: str
    """Grid, numbers, and how tensors lie; not what they hold."""


def source(kernel, args, kwargs):
    """The kernel with its arguments specialised as the just-in-time compiler does: 1 and None are constants."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif type(value) is int:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes)


def compile_kernel(kernel, args, kwargs, arch):
    """The compiled kernel and its source; the same arguments are compiled once."""
    made = source(kernel, args, kwargs)
    options = {name: value for name, value in kwargs.items() if name in ("num_warps", "num_stages")}
    key = (made.hash(), arch, tuple(sorted(options.items())))
    if key not in COMPILED:
        COMPILED[key] = triton.compile(made, target=GPUTarget("cuda", arch, 32), options=options)
    return COMPILED[key], made


def program_of(ptx: str, name: str | None = None, dynamic_shared: int = 0) -> Program:
    key = (hashlib.sha256(ptx.encode()).hexdigest()[:16], name, dynamic_shared)
    if key not in PROGRAMS:
        PROGRAMS[key] = Program(ptx, name, dynamic_shared)
    return PROGRAMS[key]


def span(t: torch.Tensor) -> tuple[int, int]:
    """First address of the elements of ``t``, and bytes up to the end of the last."""
    if t.numel() == 0:
        return t.data_ptr(), 0
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), (last + 1) * t.element_size()


def reach(memory: GlobalMemory, tensors, names) -> None:
    for t, name in zip(tensors, names, strict=True):
        start, size = span(t)
        if size:
            memory.add(start, size, t.element_size(), name)


class Poisoned(torch.overrides.TorchFunctionMode):
    """Tensors that are allocated without values hold poison."""

    ALLOCATE = (torch.empty, torch.empty_like, torch.Tensor.new_empty)

    def __init__(self, poison: int):
        super().__init__()
        self.poison = poison

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function in self.ALLOCATE and made.numel() and made.device.type == "cpu":
            start, size = span(made)
            if made.dtype.is_floating_point and size % 2 == 0:
                made.view(-1).view(torch.int16).fill_(self.poison - 2**16 if self.poison >= 2**15 else self.poison)
            elif made.dtype != torch.bool:
                made.fill_(-(2 ** (8 * made.element_size() - 2)))
        return made


class Emulator:
    """Runs launches for an architecture; see `emulated`."""

    def __init__(self, arch, seed=None, count=False, extra=(), change=None, only=None, compile_only=False):
        self.arch, self.seed, self.count, self.extra, self.compile_only = arch, seed, count, extra, compile_only
        self.change, self.only = change, only or {}
        self.ran = []

    def run(self, kernel, args, grid, kwargs):
        compiled, made = compile_kernel(kernel, args, kwargs, self.arch)
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        memory, arguments = GlobalMemory(), []
        metadata = list(getattr(compiled.metadata, "tensordesc_meta", None) or [])
        for parameter in kernel.params:
            value = values[parameter.name]
            if made.signature[parameter.name] == "constexpr":
                continue
            if isinstance(value, TensorDescriptor):
                reach(memory, (value.base,), (parameter.name,))
                arguments += [tensor_map(value, metadata.pop(0)), *map(int, value.shape), *map(int, value.strides)]
            elif isinstance(value, torch.Tensor):
                reach(memory, (value,), (parameter.name,))
                arguments.append(value.data_ptr())
            else:
                arguments.append(value)
        reach(memory, self.extra, [f"tensor {i}" for i in range(len(self.extra))])
        ptx = compiled.asm["ptx"]
        if self.change is not None:
            ptx = self.change(kernel.__name__, ptx)
        program = program_of(ptx, None, compiled.metadata.shared)
        arguments_of = repr((grid, [_form(values[parameter.name]) for parameter in kernel.params]))
        if self.compile_only:
            self.ran.append(Ran(kernel.__name__, program, 0, 0.0, None, arguments_of))
            return
        start = time.perf_counter()
        threads = 32 * compiled.metadata.num_warps
        blocks = self.only.get(kernel.__name__)
        launch = Launch(program, memory, grid, threads, [*arguments, 0, 0], self.seed, self.count, blocks)
        counters = launch.run()
        self.ran.append(
            Ran(kernel.__name__, program, len(launch.blocks), time.perf_counter() - start, counters, arguments_of)
        )


def _form(value):
    """An argument but for what it holds and where: numbers as they are."""
    if isinstance(value, TensorDescriptor):
        return _form(value.base), list(value.shape), list(value.strides), list(value.block_shape)
    if isinstance(value, torch.Tensor):
        return str(value.dtype), list(value.shape), list(value.stride()), value.data_ptr() % 16
    return value


def tensor_map(descriptor: TensorDescriptor, metadata: dict) -> TensorMap:
    t = descriptor.base
    swizzle = SWIZZLES[metadata["swizzle"]]
    shape, strides = tuple(descriptor.shape), tuple(descriptor.strides)
    return TensorMap(t.data_ptr(), shape, strides, tuple(metadata["block_size"]), t.element_size(), swizzle)


@contextlib.contextmanager
def emulated(
    arch: int, seed: int | None = None, count: bool = False, extra=(), change=None, only=None, compile_only=False
):
    """Within it, launches of Triton kernels on CPU tensors run their PTX for ``arch``; gives the `Emulator`.

    extra: tensors that kernels reach through tables of addresses. change: may edit the PTX of a kernel, given its name
    and text. only: kernel -> the numbers of the blocks to run, of those of which not all are. compile_only: nothing is
    run, and what launches would write stays as it was.
    """
    emulator = Emulator(arch, seed, count, extra, change, only, compile_only)

    def run(self, *args, grid, warmup=False, **kwargs):
        emulator.run(self, args, grid(kwargs) if callable(grid) else grid, kwargs)

    poison = POISONS[0 if seed is None else seed % len(POISONS)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(JITFunction, "run", run))
        for module in MODULES:
            if hasattr(module, "architecture"):
                stack.enter_context(replaced(module, "architecture", lambda device: arch))
        stack.enter_context(Poisoned(poison))
        yield emulator


@contextlib.contextmanager
def sabotaged(module, before: str, after: str, folder: pathlib.Path):
    """Within it, the kernels of ``module`` are compiled from its source with ``before`` changed to ``after``.

    before: text that the source holds once. folder: where the changed source may lie.
    """
    text = pathlib.Path(module.__file__).read_text()
    if text.count(before) != 1:
        raise ValueError(f"before: expected {before!r} once in {module.__name__}, got it {text.count(before)} times")
    with with_source(module, text.replace(before, after), folder):
        yield


@contextlib.contextmanager
def with_source(module, text: str, folder: pathlib.Path):
    """Within it, the kernels of ``module`` are those of another source. folder: where that may lie."""
    file = folder / f"{module.__name__.rpartition('.')[2]}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.sabotaged", file)
    changed = importlib.util.module_from_spec(spec)
    changed.__package__ = module.__package__
    spec.loader.exec_module(changed)
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, FUNCTIONS)}
    kernels = {name: value for name, value in kernels.items() if value.fn.__module__ == module.__name__}
    with contextlib.ExitStack() as stack:
        for other in [m for name, m in sys.modules.items() if name.startswith(CALLERS) and m is not changed]:
            for name, value in list(vars(other).items()):
                kernel = next((n for n, one in kernels.items() if one is value), None)
                if kernel is not None:
                    stack.enter_context(replaced(other, name, getattr(changed, kernel)))
        _forget_hashes()
        try:
            yield
        finally:
            stack.close()
            _forget_hashes()


def _forget_hashes():
    """A kernel's hash covers the kernels that it calls, which may be others now."""
    for name, module in list(sys.modules.items()):
        if name.startswith(CALLERS):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.hash = None


@contextlib.contextmanager
def replaced(owner, name, value):
    """Within it, an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


__all__ = [
    "Emulator",
    "MLPWeights",
    "POISONS",
    "PTXError",
    "Poisoned",
    "Routing",
    "Tile",
    "adamw_ema",
    "adamw_records",
    "align_loss",
    "aligned",
    "compile_kernel",
    "configurations",
    "emulated",
    "group_ema",
    "grouped_mlp",
    "mlp_records",
    "plan",
    "reference",
    "relative_error",
    "replaced",
    "route",
    "route_records",
    "sabotaged",
    "with_source",
]
