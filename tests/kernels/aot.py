"""Compiles, for a GPU that is not there, exactly what the launchers launch; a program, printing JSON, a line a kernel.

The launchers run on meta tensors with a recorder in the place of the launch, so they can't read a value, and what is
compiled has their arguments, specialised as at run time. Must run without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from dexkernels.ops.adamw_ema import triton as adamw_ema
from dexkernels.ops.adamw_ema.records import Rule, Scalars, Update
from dexkernels.ops.align_loss import triton as align_loss
from dexkernels.ops.group_ema import triton as group_ema
from dexkernels.ops.grouped_mlp import triton as grouped_mlp
from dexkernels.ops.grouped_mlp.records import Needs, Saved, Slots
from dexkernels.ops.grouped_mlp.triton import plan
from dexkernels.ops.route import triton as route
from dexkernels.ops.route.records import Saved as SavedByRoute
from dexkernels.records import MLPWeights

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
LAUNCHED = []
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
TYPES |= {torch.float64: "fp64"}


def record(self, *args, grid, warmup, **kwargs):
    LAUNCHED.append((self, args, kwargs))


def arguments(kernel, args, kwargs):
    """Name -> value."""
    return dict(zip(kernel.arg_names, args, strict=False)) | kwargs


def source(kernel, args, kwargs):
    """The kernel with its arguments specialised as the just-in-time compiler does: 1 and None are constants."""
    values = arguments(kernel, args, kwargs)
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + ("i1" if value.dtype == torch.bool else TYPES[value.dtype])
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif type(value) is int:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes)


def local_memory_in_loops(sass: str) -> int:
    """Loads and stores of local memory inside the innermost loops that hold a matrix product."""
    code = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    loops = []
    for address, text in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch.group(1), 16) < address:
            loops.append((int(branch.group(1), 16), address))
    bad = 0
    for start, end in loops:
        if any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops):
            continue
        body = [text for address, text in code if start <= address <= end]
        if any(re.search(r"GMMA|HMMA|FFMA", text) for text in body):
            bad += sum(bool(re.search(r"\b(STL|LDL)\b", text)) for text in body)
    return bad


def compile_one(kernel, args, kwargs, arch):
    options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages")}
    compiled = triton.compile(source(kernel, args, kwargs), target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", f.name], capture_output=True, text=True).stdout
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", f.name], capture_output=True, text=True).stdout
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "local": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "local_in_loops": local_memory_in_loops(sass),
        "shared": compiled.metadata.shared,
        "wgmma": sorted(set(re.findall(r"wgmma\.mma_async\S*?\.(m64n\d+k\d+)", ptx))),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "cp_async_16": len(re.findall(r"cp\.async\.cg\S* \[[^\]]*\], \[[^\]]*\], 0x10", ptx)),
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "cp_async": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "wide_load": bool(re.search(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", ptx)),
        "sass_found": "EXIT" in sass,
    }


def launch_mlp(dtype, B, N, D, H, E, K, path=None, activation="gelu"):
    """The grouped MLP in training and, in bf16, in evaluation too; returns its output.

    In bf16 training is that under autocast: with a director behind the experts and float32 weight gradients.
    """
    m = {"device": "meta"}
    x, gates = torch.empty(B, N, D, dtype=dtype, **m), torch.empty(B, K, **m)
    order, offsets = torch.empty(B * K, dtype=torch.int64, **m), torch.empty(E + 1, dtype=torch.int64, **m)
    autocast = dtype == torch.bfloat16
    shapes = (H, D), (H,), (D, H), (D,)
    weights = MLPWeights(*(torch.empty(E + autocast, *shape, dtype=dtype, **m) for shape in shapes))
    alone, slots = MLPWeights(*(w[:E] for w in weights)), Slots(gates, order, offsets)
    if autocast:
        grouped_mlp.forward(x, slots, alone, False, path=path)
    out, z, _ = grouped_mlp.forward(x, slots, weights, True, activation, path=path)
    saved = Saved(x, *slots, alone.fc1_weight, alone.fc2_weight, alone.fc2_bias, z)
    grouped_mlp.backward(out, saved, Needs(), torch.float32 if autocast else dtype, activation, path=path)
    return out


def launch_everything(dtype, arch):
    """Every kernel and every flag that changes its code, at the size of ViT-B (B = 224, N = 65, E = 8, K = 2)."""
    B, N, D, H, E, K = 224, 65, 768, 3072, 8, 2
    m = {"device": "meta"}
    out = launch_mlp(dtype, B, N, D, H, E, K)
    launch_mlp(dtype, B, N, D, H, E, K, activation="gelu_tanh")
    if arch == 90 and dtype != torch.float32:
        gathered = len(LAUNCHED)
        launch_mlp(dtype, B, N, D, H, E, K, "aligned")
        launch_mlp(dtype, B, N, D, H, E, K, "aligned", "gelu_tanh")
        launch_mlp(dtype, 24, N, D, H, E, K, "aligned")  # too few images for pairs
        launch_mlp(dtype, 56, N, D, H, 32, K, "aligned")  # results by slot
        if dtype == torch.bfloat16:
            launch_mlp(dtype, 56, 257, D, H, E, K, "aligned")  # an even number of blocks
            launch_mlp(dtype, 56, N, D, H, 32, 1, "aligned")  # results by slot are those of the images
        # For the rest of the tokens come the kernels above again, which one token an image makes no larger.
        known = {kernel for kernel, *_ in LAUNCHED[:gathered]}
        LAUNCHED[gathered:] = [launched for launched in LAUNCHED[gathered:] if launched[0] not in known]
    if dtype == torch.float16:
        return  # the other kernels have no products in half precision
    for kind in align_loss.KINDS:
        loss, saved = align_loss.forward(out, out, kind)
        align_loss.backward(loss, out, out, saved, kind)
    r, b2 = torch.empty(B, N, D, dtype=dtype, **m)[:, 0], torch.empty(E, D, dtype=dtype, **m)
    for experts in route.BLOCKS:
        wr, noise = torch.empty(experts, D, **m), torch.empty(B, experts, **m)
        p, g, indices, balance, *_ = route.forward(r, wr, K, 0.5, noise)
        route.backward(g, balance, SavedByRoute(p, g, indices, r, wr), 0.5)
    if dtype == torch.float32:
        skip = torch.empty((), dtype=torch.bool, **m)
        for momentum in (0.999, torch.empty((), **m)):
            group_ema.group_ema_([b2[0]] * 4, [b2] * 4, [torch.empty(E, **m)] * 4, momentum, skip)
        launch_adamw(b2, skip)


def launch_adamw(stack, skip):
    """With copies, clipped and perhaps skipped, and without any of them."""
    m = {"device": "meta"}
    copy = torch.empty(stack.shape[0] + 1, *stack.shape[1:], dtype=torch.bfloat16, **m)
    update = Update(*[stack] * 4, torch.empty((), **m), stack[0], torch.empty(stack.shape[0], **m), copy)
    momentum, scalar = torch.empty((), dtype=torch.float64, **m), torch.empty((), **m)
    adamw_ema.adamw_ema_([update], Rule(scalar), Scalars(momentum, scalar, skip))
    adamw_ema.adamw_ema_([update._replace(copy=None)], Rule(scalar), Scalars(momentum, None, None))


def main(arch: int) -> None:
    JITFunction.run = record
    plan.architecture = lambda device: arch
    seen = set()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        LAUNCHED.clear()
        launch_everything(dtype, arch)
        for kernel, args, kwargs in LAUNCHED:
            what = source(kernel, args, kwargs).hash()
            if what in seen:
                continue
            seen.add(what)
            values = arguments(kernel, args, kwargs)
            flags = [values[p.name] for p in kernel.params if p.is_constexpr]
            row = {"kernel": kernel.__name__, "dtype": TYPES[dtype], "arch": arch, "flags": flags}
            print(
                json.dumps(row | compile_one(kernel, args, kwargs, arch), default=str), flush=True
            )  # dtypes are flags


if __name__ == "__main__":
    main(int(sys.argv[1]))
