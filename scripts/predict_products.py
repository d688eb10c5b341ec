#!/usr/bin/env python3
"""Predicts the times of csrc/grouped_mlp's products from their machine code; nothing is measured.

usage: python scripts/predict_products.py

It reads the built library with cuobjdump, counts the instructions of a warp in a step of the main loop and outside it,
and prints a table in Markdown, in ms, for 224 images of 65 tokens, widths of 768 and 3072, 8 experts and 2 choices. A
multiprocessor runs two tiles at a time, so the epilogue of one can hide behind the products of the other: the predicted
time is that of the tensor cores or of instruction issue, whichever is longer, in whole waves of tiles. Memory, latency
and launches are not counted: these are lower bounds.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TILE, DEPTH, WARPS, SCHEDULERS, AT_ONCE = 128, 32, 8, 4, 2
IMAGES, TOKENS, DIM, HIDDEN, EXPERTS, TOP_K = 224, 65, 768, 3072, 8, 2
ROWS = IMAGES * TOP_K * TOKENS


class Gpu(NamedTuple):
    """Published figures; operations: of the tensor cores of one multiprocessor in a clock, 2 for a multiply-add."""

    name: str
    code: str
    multiprocessors: int
    ghz: float
    operations: int


GPUS = (Gpu("A100", "sm_80", 108, 1.41, 2048), Gpu("H100", "sm_90a", 132, 1.83, 4096))


class Product(NamedTuple):
    """tiles: in all; depth: terms of a sum."""

    name: str
    kernel: str
    tiles: int
    depth: int


class Code(NamedTuple):
    """Instructions of a warp."""

    step: int
    rest: int


def products() -> list[Product]:
    """Experts get equally many images; a weight gradient has one piece an expert."""
    row_tiles = EXPERTS * -(-ROWS // EXPERTS // TILE)
    by_hidden, by_dim = (row_tiles * width // TILE for width in (HIDDEN, DIM))
    of_weights = EXPERTS * (HIDDEN // TILE) * (DIM // TILE)
    return [
        Product("forward 1", "fc1_kernelINS_8Bfloat16EE", by_hidden, DIM),
        Product("forward 2", "to_slots_kernelINS_8Bfloat16ELb0EE", by_dim, HIDDEN),
        Product("dgrad 2", "to_hidden_grad_kernelINS_8Bfloat16EE", by_hidden, DIM),
        Product("dgrad 1", "to_slots_kernelINS_8Bfloat16ELb1EE", by_dim, HIDDEN),
        Product("wgrad 2", "weight_grad_kernelINS_8Bfloat16ELb1EE", of_weights, ROWS // EXPERTS),
        Product("wgrad 1", "weight_grad_kernelINS_8Bfloat16ELb0EE", of_weights, ROWS // EXPERTS),
    ]


def machine_code(library: Path) -> dict[tuple[str, str], Code]:
    """(architecture, kernel) -> its instructions; the loop is the innermost one with HMMA."""
    folders = [os.environ["PATH"]]
    for package, inside in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        folders += [os.path.join(f, inside) for f in (spec.submodule_search_locations or () if spec else ())]
    path = os.pathsep.join(folders)
    if (tool := shutil.which("cuobjdump", path=path)) is None:
        sys.exit("cuobjdump: expected it on PATH or from the package nvidia-cuda-cuobjdump, found none")
    text = subprocess.run([tool, "-sass", library], env=os.environ | {"PATH": path}, check=True, capture_output=True)
    found, lines, key = {}, [], ("", "")
    architecture = ""
    for line in [*text.stdout.decode().splitlines(), "Function : end"]:
        if match := re.search(r"code for (\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            if any("HMMA" in one for one in lines):
                found[key] = _count(lines)
            lines, key = [], (architecture, match[1])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*;)", line):
            lines.append(match[2])
    return found


def _count(lines: list[str]) -> Code:
    """Every instruction is 16 bytes long; padding behind the end is not counted."""
    lines = [line for line in lines if not line.startswith("NOP")]
    back = [(int(m[1], 16) // 16, i) for i, line in enumerate(lines) if (m := re.search(r"BRA 0x([0-9a-f]+)", line))]
    loops = [(first, last) for first, last in back if first < last and any("HMMA" in x for x in lines[first:last])]
    first, last = min(loops, key=lambda loop: loop[1] - loop[0])
    return Code(last + 1 - first, len(lines) - (last + 1 - first))


def milliseconds(product: Product, code: Code, gpu: Gpu) -> tuple[float, float, float]:
    """Of the tensor cores, of instruction issue, and of the two side by side in whole waves."""
    steps = -(-product.depth // DEPTH)
    tensor = steps * 2 * TILE * TILE * DEPTH / gpu.operations
    issue = (steps * code.step + code.rest) * WARPS / SCHEDULERS
    waves = -(-product.tiles // (AT_ONCE * gpu.multiprocessors))
    even = product.tiles / gpu.multiprocessors
    clock = gpu.ghz * 1e6
    return even * tensor / clock, even * issue / clock, waves * AT_ONCE * max(tensor, issue) / clock


def main() -> None:
    libraries = list((ROOT / "dexkernels").glob("_C.*.so"))
    if not libraries:
        sys.exit("dexkernels/_C: expected the built native library, found none: pip install -e .")
    code = machine_code(libraries[0])
    heads = [f"{gpu.name}: {what}" for gpu in GPUS for what in ("tensor", "issue", "predicted")]
    print(f"| product | step | outside | tiles | {' | '.join(heads)} |")
    print(f"| {' | '.join(['---'] * (4 + len(heads)))} |")
    total = {gpu: 0.0 for gpu in GPUS}
    for product in products():
        cells, of_code = [], []
        for gpu in GPUS:
            own = next(c for (a, name), c in code.items() if a == gpu.code and product.kernel in name)
            times = milliseconds(product, own, gpu)
            total[gpu] += times[2]
            of_code.append(own)
            cells += [f"{ms:.2f}" for ms in times]
        step, rest = (" / ".join(str(getattr(c, field)) for c in of_code) for field in Code._fields)
        print(f"| {product.name} | {step} | {rest} | {product.tiles} | {' | '.join(cells)} |")
    sums = " | ".join(f" |  | {total[gpu]:.2f}" for gpu in GPUS)
    print(f"| all six |  |  |  | {sums} |")


if __name__ == "__main__":
    main()
