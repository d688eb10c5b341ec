#!/usr/bin/env python3
"""Chooses the tiles and the path of Triton's `grouped_mlp` by measuring them, offline; writes its _tuned.py.

usage: python scripts/tune.py --list [--shipped] [--kernel NAME ...] [--dtype bfloat16] [--arch 90]    without a GPU
       python scripts/tune.py [--kernel NAME ...] [--dtype bfloat16] [--write]    on the GPU that is to be served
       python scripts/tune.py --chosen    on a Hopper GPU: six promising tiles against the shipped ones, in a minute
--list: every candidate with facts from the compiler: registers, spills, shared memory, tensor-core instructions.
The search starts from a shipped tile and changes one number at a time; a faster tile becomes the next start. A tile is
timed only if the compiler spills little, it fits into shared memory, its error is at most twice plain torch's (against
float64), and a second call gives the same bits. The time is that of a whole forward and backward, by CUDA events, with
candidates in turns and rotating inputs. A kept tile must be 2 % faster. --write puts it into the table; otherwise it is
printed. Networks only read the table: no first step stalls, and a call has the same bits in every run.
"""

import argparse
import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("tests/kernels", "scripts", "python"))]
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402

try:
    import triton  # noqa: F401
except ImportError:
    sys.exit("tune: needs triton, which is not installed")

import aot  # noqa: E402
from generated import literal  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks.record import BOUND  # noqa: E402
from benchmarks.shapes import SETS, SHAPES, draw, routing_of, weights_of  # noqa: E402
from benchmarks.timing import Timer  # noqa: E402
from dex.common import atomic  # noqa: E402
from dexkernels.ops.grouped_mlp import cpu  # noqa: E402
from dexkernels.ops.grouped_mlp import triton as grouped_mlp  # noqa: E402
from dexkernels.ops.grouped_mlp.records import Needs, Saved, Slots  # noqa: E402
from dexkernels.ops.grouped_mlp.triton import _tuned, configurations  # noqa: E402
from dexkernels.ops.grouped_mlp.triton import plan as planning  # noqa: E402
from dexkernels.ops.triton_common import Tile, architecture, precision  # noqa: E402
from dexkernels.records import MLPWeights  # noqa: E402
from dexkernels.testing import relative_error  # noqa: E402

Key = tuple[str, str, int]
LADDERS = {
    "rows": (32, 64, 128, 256),
    "cols": (32, 64, 128, 256),
    "depth": (16, 32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5, 6, 7),
}
FIXED = {name: ("rows",) for name, *_ in configurations.ALIGNED if name != "weight_grad_blocks"}
"""Numbers that cannot be chosen: the number of blocks in the height of a tile of the aligned path."""

MEASURED_ON = {"many": ("ViT-B", "ViT-B, N 257"), "few": ("ViT-B, E 64", "ViT-B, B 8")}
"""Class of shapes -> shapes that represent it; a tile is measured on the first that uses it."""

PROBES = [SHAPES[name] for names in MEASURED_ON.values() for name in names]

SHARED = {80: 99 * 1024, 90: 232_448}
"""Architecture -> bytes of shared memory per block; 80 has the limit of 8.6 and 8.9."""

CHOSEN = {
    ("fc1_blocks", "half", 90): Tile(128, 128, 64, 8, 4),
    ("hidden_grad_blocks", "half", 90): Tile(128, 128, 64, 8, 4),
    ("to_images_pairs", "half", 90): Tile(128, 128, 64, 8, 4),
    ("weight_grad_blocks", "half", 90): Tile(128, 128, 32, 8, 5),
    ("to_slots", "half", 90): Tile(128, 256, 64, 8, 3),
    ("weight_grad", "half", 90): Tile(128, 256, 64, 8, 4),
}
"""Tiles of other widths than the shipped ones, for --chosen; their compile-time facts are within the rules."""

GAIN = 1.02
"""Speedup that a candidate needs; smaller ones are within the timing noise."""

HEAD = '''\
"""What scripts/tune.py measured to be faster than the tables of the launchers. Made by it; not edited."""

# fmt: off
'''


class Facts(NamedTuple):
    """Compile-time facts of one candidate: the worst values of its kernels."""

    registers: int
    stack: int
    local_in_loops: int
    shared: int
    instructions: str

    def refused(self, arch: int) -> str | None:
        if self.shared > SHARED[arch]:
            return f"{self.shared} bytes of shared memory"
        return "spills in a loop" if self.local_in_loops else "spills" if self.stack > 64 else None


def keys(dtype: torch.dtype, arch: int, wanted: list[str] | None = None) -> list[Key]:
    return [
        key for key in configurations.TILES if key[1:] == (precision(dtype), arch) and (not wanted or key[0] in wanted)
    ]


def neighbours(key: Key, tile: Tile) -> Iterator[Tile]:
    """``tile`` with one number a step up or down its ladder, or with halves toggled if its epilogue is heavy."""
    for field, ladder in LADDERS.items():
        at = ladder.index(getattr(tile, field))
        for i in (at - 1, at + 1):
            if field not in FIXED.get(key[0], ()) and 0 <= i < len(ladder):
                yield tile._replace(**{field: ladder[i]})
    if key[0] in ("to_hidden_grad", "fc1_blocks", "hidden_grad_blocks"):
        yield tile._replace(halves=not tile.halves)


def launches(tiles: dict[Key, Tile], path: str, dtype: torch.dtype, arch: int, shape: dict) -> list[tuple]:
    """The launches of a forward and backward, on meta tensors."""
    B, N, D, H, E, K = (shape[k] for k in "BNDHEK")
    m = {"device": "meta"}
    x, gates = torch.empty(B, N, D, dtype=dtype, **m), torch.empty(B, K, **m)
    slots = Slots(gates, torch.empty(B * K, dtype=torch.int64, **m), torch.empty(E + 1, dtype=torch.int64, **m))
    weights = MLPWeights(*(torch.empty(E, *size, dtype=dtype, **m) for size in ((H, D), (H,), (D, H), (D,))))
    aot.LAUNCHED.clear()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", aot.record))
        stack.enter_context(mock.patch.object(planning, "architecture", lambda device: arch))
        out, z, _ = grouped_mlp.forward(x, slots, weights, True, path=path, tiles=tiles)
        saved = Saved(x, *slots, weights.fc1_weight, weights.fc2_weight, weights.fc2_bias, z)
        grouped_mlp.backward(out, saved, Needs(), dtype, path=path, tiles=tiles)
    return list(aot.LAUNCHED)


def compiled_as(launch: tuple) -> tuple:
    kernel, args, kwargs = launch
    values = aot.arguments(kernel, args, kwargs)
    constants = tuple(values[p.name] for p in kernel.params if p.is_constexpr)
    return kernel.__name__, constants, kwargs.get("num_warps"), kwargs.get("num_stages")


def path_of(key: Key) -> str:
    return "aligned" if key[0] in {name for name, *_ in configurations.ALIGNED} else "gather"


def taking(key: Key, tile: Tile, dtype: torch.dtype, arch: int, shape: dict) -> list[tuple]:
    """The launches that use this tile: those that change with another tile."""
    before, after = (
        launches(configurations.TILES | {key: t}, path_of(key), dtype, arch, shape)
        for t in (tile, tile._replace(stages=tile.stages + 1))
    )
    return list(
        {compiled_as(a): a for a, b in zip(before, after, strict=True) if compiled_as(a) != compiled_as(b)}.values()
    )


def facts(key: Key, tile: Tile, dtype: torch.dtype, arch: int) -> Facts:
    """Compile the kernels that use this tile for ``arch``."""
    affected = next(filter(None, (taking(key, tile, dtype, arch, shape) for shape in PROBES)))
    rows = [aot.compile_one(*launch, arch) for launch in affected]
    used = sorted({shape for row in rows for shape in row["wgmma"]} | {"mma" for row in rows if row["mma"]})
    worst = [max(row[name] for row in rows) for name in ("registers", "stack", "local_in_loops", "shared")]
    return Facts(*worst, " ".join(used) or "fma")


def listed(key: Key, dtype: torch.dtype, arch: int, only_shipped: bool) -> Iterator[str]:
    shipped = configurations.TILES[key]
    for tile in (shipped, *(() if only_shipped else neighbours(key, shipped))):
        name = f"{key[0]:20} {'shipped' if tile == shipped else '':8} " + " ".join(
            f"{k} {v!s:<5}" for k, v in tile._asdict().items()
        )
        try:
            f = facts(key, tile, dtype, arch)
        except Exception as error:
            yield f"{name} does not compile: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        verdict = f.refused(arch) or "a candidate"
        usage = f"{f.registers:3} registers, {f.stack:5} B stack, {f.local_in_loops:3} spills in loops, {f.shared:6} B"
        yield f"{name} {usage} shared, {f.instructions}: {verdict}"


def climb(
    start: Tile,
    near: Callable[[Tile], Iterator[Tile]],
    right: Callable[[Tile], bool],
    times: Callable[[list[Tile]], list[float]],
) -> Tile:
    """A tile that no correct neighbour beats by `GAIN`. ``times`` measures tiles in turns, so a pair is comparable."""
    best, tried = start, {start}
    while True:
        for tile in near(best):
            if tile in tried:
                continue
            tried.add(tile)
            if not right(tile):
                continue
            best_ms, tile_ms = times([best, tile])
            if best_ms > GAIN * tile_ms:
                best = tile
                break
        else:
            return best


class Bench:
    """Forward and backward of `grouped_mlp` for one shape, on this machine's GPU."""

    def __init__(self, timer: Timer, dtype: torch.dtype, shape: dict):
        self.timer, self.dtype, self.shape = timer, dtype, shape
        B, N, D, H, E, K = (shape[k] for k in "BNDHEK")
        self.weights = weights_of(timer, shape, dtype)
        self.routing = routing_of(timer, shape, 5)
        self.xs = [draw(timer, B, N, D, dtype=dtype, seed=10 + i) for i in range(SETS)]
        self.grad = draw(timer, B, N, D, dtype=dtype, seed=20)
        self.exact = self._run(cpu, 0, torch.float64)
        self.plain = [relative_error(a, b) for a, b in zip(self._run(cpu, 0), self.exact, strict=True)]

    def _run(self, launcher: ModuleType, i: int, real: torch.dtype | None = None, **options) -> list[torch.Tensor]:
        dtype, r = real or self.dtype, self.routing
        weights = MLPWeights(*(w.to(dtype) for w in self.weights))
        x, slots = self.xs[i % SETS].to(dtype), Slots(r.gates.to(real or r.gates.dtype), r.slot_order, r.group_offsets)
        out, z, _ = launcher.forward(x, slots, weights, True, **options)
        saved = Saved(x, *slots, weights.fc1_weight, weights.fc2_weight, weights.fc2_bias, z)
        return [out, *launcher.backward(self.grad.to(dtype), saved, Needs(), dtype, **options)]

    def run(self, tiles: dict[Key, Tile], path: str, i: int = 0) -> list[torch.Tensor]:
        return self._run(grouped_mlp, i, tiles=tiles, path=path)

    def right(self, tiles: dict[Key, Tile], path: str) -> bool:
        """Whether the error is at most twice plain torch's, and two calls give the same bits."""
        try:
            first, second = self.run(tiles, path), self.run(tiles, path)
        except Exception as error:  # It does not compile, or exceeds this GPU's resources.
            print(f"    {type(error).__name__}: {str(error)[:100]}")
            return False
        name = str(self.dtype).removeprefix("torch.")
        errors = [relative_error(result, exact) for result, exact in zip(first, self.exact, strict=True)]
        near = all(e <= min(2 * p + 1e-3, BOUND[name]) for e, p in zip(errors, self.plain, strict=True))
        return near and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def times(self, runs: list[tuple[dict[Key, Tile], str]]) -> list[float]:
        ms = self.timer.medians(
            {str(n): lambda i, tiles=tiles, path=path: self.run(tiles, path, i) for n, (tiles, path) in enumerate(runs)}
        )
        return list(ms.values())


def tune(bench: Bench, wanted: list[Key], arch: int) -> tuple[dict[Key, Tile], str | None]:
    """The best tile of each key of ``wanted`` that this shape uses, and the faster path if both are correct."""
    tiles, right, tuned = dict(configurations.TILES), [], {}
    for path in ("gather", "aligned"):
        has_tiles = ("fc1_blocks", precision(bench.dtype), arch) in tiles
        if path == "aligned" and not (has_tiles and planning.has_tma(bench.grad.device)):
            continue
        if not bench.right(tiles, path):
            print(f"  {path}: wrong with the shipped tiles")
            continue
        right.append(path)
        for key in wanted:
            if path_of(key) != path or not taking(key, tiles[key], bench.dtype, arch, bench.shape):
                continue

            def allowed(tile: Tile, key=key, path=path) -> bool:
                try:
                    reason = facts(key, tile, bench.dtype, arch).refused(arch)
                except Exception as error:
                    reason = type(error).__name__
                return reason is None and bench.right(tiles | {key: tile}, path)

            best = climb(
                tiles[key],
                lambda tile, key=key: neighbours(key, tile),
                allowed,
                lambda some, key=key, path=path: bench.times([(tiles | {key: tile}, path) for tile in some]),
            )
            print(f"  {key[0]}: {tuple(best)}" + ("" if best == tiles[key] else f", was {tuple(tiles[key])}"))
            tiles[key] = tuned[key] = best
    if len(right) < 2:
        return tuned, None
    ms = dict(zip(right, bench.times([(tiles, path) for path in right]), strict=True))
    print(f"  path: {ms}")
    return tuned, min(ms, key=ms.get)


def try_chosen(bench: Bench) -> None:
    """Print, as it comes, whether each tile of `CHOSEN` is right and how long a forward and backward takes with it."""
    for key, tile in CHOSEN.items():
        path, shipped = path_of(key), configurations.TILES
        if not bench.right(shipped | {key: tile}, path):
            print(f"{key[0]} {tuple(tile)}: wrong, or it does not run", flush=True)
            continue
        before, after = bench.times([(shipped, path), (shipped | {key: tile}, path)])
        print(f"{key[0]} {tuple(tile)}: {after:.3f} ms, shipped {tuple(shipped[key])} {before:.3f} ms, "
              f"{before / after:.3f} times as fast, {path} path", flush=True)  # fmt: skip


def table(tiles: dict, paths: dict, measured: str) -> str:
    """The text of _tuned.py."""
    lines = [f"    {key!r}: {tuple(tile)!r},\n" for key, tile in sorted(tiles.items())]
    routes = [f"    {key!r}: {path!r},\n" for key, path in sorted(paths.items())]
    note = f"# {measured}\n" if measured else ""
    return (
        f"{HEAD}{note}TILES: dict[tuple[str, str, int, str], tuple] = {literal(lines)}\n"
        '"""(kernel, precision, architecture, class of shapes) -> tile."""\n\n'
        f"PATHS: dict[tuple[int, str, str], str] = {literal(routes)}\n"
        '"""(architecture, precision, class of shapes) -> path of `grouped_mlp`."""\n'
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the compiler's facts of every candidate; no GPU")
    parser.add_argument("--shipped", action="store_true", help="with --list: only the shipped tiles")
    parser.add_argument("--kernel", action="append", help="kernel of the table (default: all)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--arch", type=int, choices=(80, 90), default=90, help="architecture for --list (default 90)")
    parser.add_argument("--chosen", action="store_true", help="six tiles against the shipped ones on ViT-B in bf16")
    parser.add_argument("--write", action="store_true", help="write dexkernels/ops/grouped_mlp/triton/_tuned.py")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if not arguments.list and not torch.cuda.is_available():
        print("tune: expected a GPU that torch can use, got none; --list needs none", file=sys.stderr)
        return 2
    arch = arguments.arch if arguments.list else architecture(torch.device("cuda"))
    chosen = keys(dtype, arch, arguments.kernel)
    if missing := set(arguments.kernel or ()) - {name for name, *_ in chosen}:
        parser.error(
            f"--kernel: expected some of {', '.join(k for k, *_ in keys(dtype, arch))}, got {', '.join(missing)}"
        )
    if arguments.list:
        for key in chosen:
            for line in listed(key, dtype, arch, arguments.shipped):
                print(line, flush=True)
        return 0
    if arguments.chosen:
        if architecture(torch.device("cuda")) != 90:
            print("tune: --chosen is for compute capability 9 to 11", file=sys.stderr)
            return 2
        try_chosen(Bench(Timer(torch.device("cuda"), tiny=False), torch.bfloat16, SHAPES["ViT-B"]))
        return 0
    tiles, paths = dict(_tuned.TILES), dict(_tuned.PATHS)
    timer = Timer(torch.device("cuda"), tiny=False)
    for kind in configurations.CLASSES:
        tuned, faster = {}, []
        for name in MEASURED_ON[kind]:
            print(f"{kind}: {name}")
            bench = Bench(timer, dtype, SHAPES[name])
            new, path = tune(bench, [key for key in chosen if key not in tuned], arch)
            tuned |= new
            faster.append(path)
        for key in chosen:
            tiles.pop((*key, kind), None)
        tiles |= {(*key, kind): tile for key, tile in tuned.items() if tile != configurations.TILES[key]}
        if not arguments.kernel:  # A class uses a path only if it is faster on all of its shapes.
            paths.pop((arch, precision(dtype), kind), None)
            paths |= {(arch, precision(dtype), kind): faster[0]} if len({*faster}) == 1 and faster[0] else {}
    today = datetime.datetime.now(datetime.UTC).date()
    text = table(tiles, paths, f"{torch.cuda.get_device_name()}, {today}, torch {torch.__version__}")
    if arguments.write:
        atomic.write(_tuned.__file__, text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
