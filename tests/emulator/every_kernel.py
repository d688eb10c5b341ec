"""Runs every shipped kernel and configuration on the emulator, once an architecture, and keeps what came of it.

    python tests/emulator/every_kernel.py    # what is missing in results.json, or its operator has other sources
    make pages                               # docs/kernels.md and what `dex doctor` says, from results.json

The installed Triton compiles the Triton kernels: all cases with the version that the tests use, the smallest of every
family with another one. nvcc, where it is installed, compiles those of the CUDA library.
Results are written case by case, so the run can be stopped and started again. A case keeps its errors beside plain
torch's, in how many orders of the warps the bits are the same, and of each kernel the hash of its PTX and the counts.
Of other sources a case is compiled first: launches of the same instructions with the same arguments are not run again.
"""

import argparse
import datetime
import functools
import hashlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import cuda_adamw  # noqa: E402
import cuda_grouped_mlp  # noqa: E402
import cuda_library  # noqa: E402
import cuda_mlp_cases  # noqa: E402
import cuda_sm90  # noqa: E402
import torch  # noqa: E402
from ptx_emulator.counters import Counters, parts  # noqa: E402
from ptx_emulator.program import Program  # noqa: E402
from ptx_emulator.ptx import PTXError  # noqa: E402
from shipped_cases import (  # noqa: E402
    Case,
    adamw_ema_case,
    adamw_named,
    adamw_updates,
    adamw_want,
    align_loss_case,
    errors_of,
    group_ema_case,
    mlp_case,
    mlp_parts_case,
    route_case,
    small_tiles,
)

from dex.common import atomic  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
TRITON = "3.6.0"
"""The version with which every case is run."""

ORDERS, MANY_ORDERS = 3, 20
"""Of the warps; many for the smallest cases of each family."""

SMALL, BLOCKS = (2, 5, 40, 72, 3, 2), (2, 65, 128, 256, 3, 2)
FORMS = {
    "pairs": (8, 65, 64, 72, 2, 2),
    "an even number of blocks": (2, 130, 64, 96, 3, 2),
    "no token left over": (3, 64, 64, 96, 3, 2),
    "results by slot": (3, 66, 64, 96, 20, 2),
    "results by slot, K = 1": (3, 65, 64, 96, 20, 1),
}
"""Of the aligned path, beside `BLOCKS`."""

ONE_AT_A_TIME = (2, 65, 64, 96, 3, 2)
CHUNKS = {"gather": (12, 5, 40, 72, 8, 1), "aligned": (8, 65, 64, 72, 4, 1)}
"""One expert has most of the slots: its weight gradients are cut into parts of unequal length."""

ROUTES = [(5, 40, 3, 2), (130, 24, 20, 3), (40, 72, 40, 2), (40, 72, 128, 2), (200, 16, 4, 2)]
ONE_LAUNCH = 150
"""Rows up to which one launch routes: the last of ROUTES takes two, as larger inputs do with what ships."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EMA_SHAPES = [(5, 3), (4100,), (1,), (64, 8)]


class Planned(NamedTuple):
    """make: of the module `ptx_emulator.shipped`. smallest: of its family."""

    arch: int
    make: Callable[[object], Case]
    smallest: bool

    @property
    def orders(self) -> int:
        return MANY_ORDERS if self.smallest else ORDERS


class Launched(NamedTuple):
    """One launch of a kernel."""

    kernel: str
    program: Program
    blocks: int
    counters: Counters | None
    """None where it was only compiled."""
    arguments: str


Compute = Callable[[int | None, bool], tuple[dict[str, torch.Tensor], list[Launched]]]
"""seed, whether to count -> results, and the launches that made them."""


# --- the cases --------------------------------------------------------------------------------------------------------


def triton_cases() -> dict[str, Planned]:
    """Name -> case: target, dtype, operator, and what is special."""
    made = {}
    for arch in (80, 90):
        for name, dtype in DTYPES.items():
            for what, make in (*_mlp_cases(arch, dtype), *_other_cases(dtype)):
                smallest = name == "bf16" and what in SMALLEST
                made[f"sm_{arch} {name} {what}"] = Planned(arch, make, smallest)
        for what, make in _ema_cases():
            made[f"sm_{arch} fp32 {what}"] = Planned(arch, make, True)
    return made


Made = Iterator[tuple[str, Callable[[object], Case]]]


def _mlp_cases(arch: int, dtype: torch.dtype) -> Made:
    def case(path, sizes, tiles=lambda s: None, **options):
        return lambda s: mlp_case(s, sizes, dtype, path, tiles(s), **options)

    def alone(path, sizes, tiles=lambda s: None):
        return lambda s: mlp_parts_case(s, sizes, dtype, path, tiles(s))

    yield "grouped_mlp gather", case("gather", BLOCKS)
    yield "grouped_mlp gather, small blocks", case("gather", SMALL, small_tiles)
    yield "grouped_mlp gather, with a director", case("gather", SMALL, with_director=True)
    yield "grouped_mlp gather, one gradient at a time", alone("gather", SMALL)
    yield "grouped_mlp gather, tanh GELU", case("gather", SMALL, small_tiles, activation="gelu_tanh")
    yield "grouped_mlp gather, chunks", case("gather", CHUNKS["gather"], small_tiles, skewed=True)
    if arch == 90 and dtype != torch.float32:
        yield "grouped_mlp aligned", case("aligned", BLOCKS)
        yield "grouped_mlp aligned, with a director", case("aligned", BLOCKS, with_director=True)
        yield "grouped_mlp aligned, one gradient at a time", alone("aligned", ONE_AT_A_TIME)
        yield "grouped_mlp aligned, tanh GELU", case("aligned", FORMS["no token left over"], activation="gelu_tanh")
        yield "grouped_mlp aligned, chunks", case("aligned", CHUNKS["aligned"], skewed=True)
        for form, sizes in FORMS.items():
            yield f"grouped_mlp aligned, {form}", case("aligned", sizes)


def _other_cases(dtype: torch.dtype) -> Made:
    for sizes in ROUTES:
        name = f"route R {sizes[0]}, E {sizes[2]}, K {sizes[3]}"
        yield name, lambda s, sizes=sizes: route_case(s, *sizes, dtype, ONE_LAUNCH)
    yield "route without noise, K = 1", lambda s: route_case(s, 5, 40, 3, 1, dtype, with_noise=False)
    for kind in ("kd", "cosine", "mse"):
        yield f"align_loss {kind}", lambda s, kind=kind: align_loss_case(s, 70, 136, kind, dtype)


def _ema_cases() -> Made:
    yield "group_ema", lambda s: group_ema_case(s, 0.9)
    yield "group_ema, momentum on the device", lambda s: group_ema_case(s, torch.tensor(0.75))
    yield "group_ema, never skipped", lambda s: group_ema_case(s, 0.9, with_skip=False)
    float16, double = torch.float16, torch.tensor(0.75, dtype=torch.float64)
    yield "adamw_ema", lambda s: adamw_ema_case(s, double)
    yield "adamw_ema, copies in float16, clipped", lambda s: adamw_ema_case(s, torch.tensor(0.75), float16, 0.5)
    yield "adamw_ema, no copies, never skipped", lambda s: adamw_ema_case(s, double, None, with_skip=False)


SMALLEST = {
    "grouped_mlp gather, small blocks",
    "grouped_mlp gather, with a director",
    "grouped_mlp gather, tanh GELU",
    "grouped_mlp aligned, tanh GELU",
    "grouped_mlp aligned, with a director",
    *(f"grouped_mlp aligned, {form}" for form in FORMS),
    "route R 5, E 3, K 2",
    "route R 200, E 4, K 2",
    "align_loss kd",
    "align_loss cosine",
    "align_loss mse",
}
"""Of each family, in bf16. Every kernel is in one of them."""


class Native(NamedTuple):
    """A case of the CUDA library. options: of what `CUDA` says runs its operator."""

    arch: int
    operator: str
    options: dict
    orders: int = MANY_ORDERS


def cuda_cases() -> dict[str, Native]:
    """Name -> case."""
    forms = {
        "group_ema": {},
        "group_ema, the large table": {"capacity": cuda_library.LARGE},
        "group_ema, addresses that are not aligned": {"offset": 1},
        "group_ema, captured: scalars on the device": {"momentum": torch.tensor(0.75), "skip": torch.tensor(False)},
        "group_ema, captured: momentum in float64": {"momentum": torch.tensor(0.75, dtype=torch.float64)},
    }
    half = {"momentum": torch.tensor(0.5, dtype=torch.float64)}
    forms |= {
        "adamw_ema": {},
        "adamw_ema, the large table": {"capacity": cuda_adamw.LARGE},
        "adamw_ema, addresses that are not aligned, no copies": {"offset": 1, "copies": None},
        "adamw_ema, captured: clip and skip on the device": half | {"clip": 0.5, "skip": torch.tensor(False)},
    }
    cases = {}
    for arch in cuda_library.TARGETS:
        for form, options in forms.items():
            cases[f"sm_{arch} fp32 {form}"] = Native(arch, form.split(",")[0], options)
        for dtype in ("bf16", "fp16"):
            for name, form in cuda_mlp_cases.FORMS.items():
                orders = MANY_ORDERS if form.many_orders else ORDERS
                what = f"grouped_mlp, {name}" if name else "grouped_mlp"
                options = {"form": form, "dtype": DTYPES[dtype], "orders": orders}
                cases[f"sm_{arch} {dtype} {what}"] = Native(arch, "grouped_mlp", options, orders)
    for dtype in ("bf16", "fp16"):
        for name, form in cuda_sm90.FORMS.items():
            orders = MANY_ORDERS if form.many_orders else ORDERS
            what = f"grouped_mlp_sm90, {name}" if name else "grouped_mlp_sm90"
            options = {"form": form, "dtype": DTYPES[dtype], "orders": orders}
            cases[f"sm_90 {dtype} {what}"] = Native(90, "grouped_mlp_sm90", options, orders)
    return cases


# --- running them -----------------------------------------------------------------------------------------------------


def run(compute: Compute, case: Case, orders: int) -> dict:
    """One case: its errors, the kernels that ran, and in how many orders of the warps it has the same bits."""
    start = time.perf_counter()
    results, launches = compute(None, True)
    same = 0
    for seed in range(orders):
        again, _ = compute(seed, False)
        same += all(torch.equal(again[name], value) for name, value in results.items())
    return {
        "errors": {name: list(e) for name, e in errors_of(case, results).items()},
        "orders_with_the_same_bits": f"{same} of {orders}",
        "kernels": _kernels(launches),
        "launches": launches_of(launches),
        "seconds": round(time.perf_counter() - start, 1),
        "date": datetime.date.today().isoformat(),
    }


def launches_of(launches: Iterable[Launched]) -> str:
    """A hash of what is run: instructions and arguments."""
    digest = hashlib.sha256()
    for one in launches:
        digest.update(f"{one.kernel} {one.program.digest} {one.arguments}\n".encode())
    return digest.hexdigest()[:16]


def compiled_triton(shipped, planned: Planned) -> str:
    """`launches_of` a case that is not run."""
    case = planned.make(shipped)
    with shipped.emulated(planned.arch, compile_only=True) as emulator:
        case.compute(emulator)
    shipped.PROGRAMS.clear()
    return launches_of(_launched(ran) for ran in emulator.ran)


def run_triton(shipped, planned: Planned, orders: int) -> dict:
    case = planned.make(shipped)

    def compute(seed, count):
        with shipped.emulated(planned.arch, seed=seed, count=count) as emulator:
            results = case.compute(emulator)
        return results, [_launched(ran) for ran in emulator.ran]

    try:
        return run(compute, case, orders)
    finally:
        shipped.PROGRAMS.clear()  # large, and of little use to the next case


def _launched(ran) -> Launched:
    return Launched(ran.kernel, ran.program, ran.blocks, ran.counters, ran.arguments)


def run_cuda(ptx: str, momentum=0.9, skip=None, capacity=cuda_library.SMALL, offset=0) -> dict:
    """One case of the CUDA library, in 20 orders: the promised bits, and the shadows' copies of them.

    offset: elements by which directors lie behind an address that is a multiple of 16.
    """
    before = cuda_library.make(EMA_SHAPES)
    before.weights[1][1], before.experts[1][1] = 0, float("nan")  # not read
    exact = cuda_library.want(before, float(momentum))

    def compute(seed, count):
        directors = [torch.empty(d.numel() + offset)[offset:].view(d.shape).copy_(d) for d in before.directors]
        shadows = [torch.full(d.shape, -1.0, dtype=torch.bfloat16) for d in directors]
        groups = before._replace(directors=directors, shadows=shadows)
        captured = cuda_library.Captured(ptx, groups, momentum, skip=skip, capacity=capacity)
        counters = captured.run(seed, count)
        for got, promised, shadow in zip(directors, exact, shadows, strict=True):
            assert torch.equal(got, promised) and torch.equal(shadow, got.bfloat16())
        launched = Launched("group_ema_kernel", captured.program, captured.grid[0], counters, str(captured.grid))
        return _named(directors), [launched]

    def want(precision):
        results = []
        for d, stack, w in zip(before.directors, before.experts, before.weights, strict=True):
            d, stack, w = (t.to(precision) for t in (d, stack.nan_to_num(), w))
            results.append(float(momentum) * d + (1 - float(momentum)) * torch.tensordot(w, stack, 1))
        return _named(results)

    return run(compute, Case(torch.float32, None, want), MANY_ORDERS)


def run_cuda_adamw(
    ptx: str, momentum=None, clip=None, skip=None, capacity=cuda_adamw.SMALL, offset=0, copies=torch.bfloat16
) -> dict:
    """The like of `adamw_ema_`."""
    from dexkernels.ops.adamw_ema.records import Rule, rates

    records = type("Records", (), {"adamw_records": importlib.import_module("dexkernels.ops.adamw_ema.records")})
    momentum = torch.tensor(0.75, dtype=torch.float64) if momentum is None else momentum
    before = adamw_updates(records, copies, offset)
    (first, second, eps), lr, decay = cuda_adamw.RULE, 1e-2, 0.1
    of_each = rates([u._replace(step=u.step + 1) for u in before], Rule(lr, (first, second), eps, decay))
    scale = None if clip is None else torch.tensor(clip)
    exact = [cuda_adamw.promised(u, r, float(momentum), clip or 1.0) for u, r in zip(before, of_each, strict=True)]

    def compute(seed, count):
        updates = adamw_updates(records, copies, offset)
        captured = cuda_adamw.Captured(ptx, updates, of_each, momentum, clip=scale, skip=skip, capacity=capacity)
        counters = captured.run(seed, count)
        for got, right in zip(updates, exact, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got.moved, right.moved, strict=True))
        return adamw_named(updates), [Launched("adamw_ema_kernel", captured.program, captured.grid[0], counters, "")]

    def want(precision):
        specification = type("Specification", (), {"reference": importlib.import_module("dexkernels.reference")})
        return adamw_want(specification, before, momentum, clip or 1.0, precision)

    return run(compute, Case(torch.float32, None, want), MANY_ORDERS)


def run_cuda_mlp(kernels: cuda_grouped_mlp.Kernels, form: cuda_mlp_cases.Form, dtype: torch.dtype, orders: int) -> dict:
    """The like of `grouped_mlp`."""
    case = cuda_mlp_cases.case(form, dtype)

    def compute(seed, count):
        with cuda_grouped_mlp.emulated(kernels, seed, count) as library:
            return case.compute(library), [Launched(*ran) for ran in library.ran]

    return run(compute, case, orders)


def compiled_cuda_mlp(kernels: cuda_grouped_mlp.Kernels, form: cuda_mlp_cases.Form, dtype: torch.dtype) -> str:
    """`launches_of` a case that is not run."""
    with cuda_grouped_mlp.emulated(kernels, compile_only=True) as library:
        cuda_mlp_cases.case(form, dtype).compute(library)
    return launches_of(Launched(*ran) for ran in library.ran)


def run_cuda_sm90(kernels: cuda_sm90.Sm90Kernels, form: cuda_mlp_cases.Form, dtype: torch.dtype, orders: int) -> dict:
    """Forward 1 and dgrad 2 for sm_90a; the kernels around them have cases of their own."""
    case = cuda_sm90.case(form, dtype)

    def compute(seed, count):
        with cuda_grouped_mlp.emulated(kernels, seed, count, kind=cuda_sm90.Sm90Library) as library:
            return case.compute(library), _of_sm90(library)

    return run(compute, case, orders)


def compiled_cuda_sm90(kernels: cuda_sm90.Sm90Kernels, form: cuda_mlp_cases.Form, dtype: torch.dtype) -> str:
    """`launches_of` a case that is not run."""
    with cuda_grouped_mlp.emulated(kernels, compile_only=True, kind=cuda_sm90.Sm90Library) as library:
        cuda_sm90.case(form, dtype).compute(library)
        return launches_of(_of_sm90(library))


def _of_sm90(library: cuda_sm90.Sm90Library) -> list[Launched]:
    return [Launched(*ran) for ran in library.ran if ran.kernel in cuda_sm90.KERNELS]


def _named(tensors: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"director {i}": t for i, t in enumerate(tensors)}


def _kernels(launches: Iterable[Launched]) -> dict:
    """Of every kernel the hashes of the PTX that ran, and what was counted of its longest launch."""
    found = {}
    for launched in launches:
        one = _counted(launched)
        before = found.get(launched.kernel, one)
        longest = max(before, one, key=lambda counted: sum(counted["instructions"]))
        found[launched.kernel] = longest | {"ptx": sorted({*before["ptx"], *one["ptx"]})}
    return found


def _counted(launched: Launched) -> dict:
    program, counters = launched.program, launched.counters
    rounds, least = (parts(program, of) for of in (counters.rounds, counters.least_rounds))
    return {
        "ptx": [program.digest],
        "blocks": launched.blocks,
        "sectors": [counters.sectors, counters.least_sectors],
        "rounds_in_main_loop": [rounds.main_loop, least.main_loop],
        "rounds_outside": [rounds.rest, least.rest],
        "tensor_operations": counters.products,
        "instructions": list(parts(program, counters.executed)),
    }


# --- what is kept -----------------------------------------------------------------------------------------------------


def sources(compiler: str, name: str) -> str:
    """A hash of what the kernels of a case are made of which ``"triton 3.6.0"`` or ``"nvcc 13.0"`` compiles."""
    ops, csrc, operator = ROOT / "dexkernels/ops", ROOT / "csrc", name.replace(",", "").split()[2]
    files = {ops / "triton_common.py", *ops.glob(f"{operator}/triton.py"), *ops.glob(f"{operator}/triton/*.py")}
    if compiler.startswith("nvcc"):
        files = {file for part in ("common", operator) for file in (csrc / part).iterdir() if file.suffix != ".cpp"}
        if operator == "grouped_mlp_sm90":
            files |= set((csrc / "grouped_mlp").glob("*.h"))
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def load() -> dict:
    """Compiler -> ``{"cases": {name: what `run` found, with the hash of its `sources`}}``."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def expected(compiler: str) -> dict[str, int]:
    """The cases of a compiler, and in how many orders of the warps each is run."""
    if compiler.startswith("nvcc"):
        return {name: case.orders for name, case in cuda_cases().items()}
    planned = triton_cases()
    if compiler == f"triton {TRITON}":
        return {name: one.orders for name, one in planned.items()}
    return {name: ORDERS for name, one in planned.items() if one.smallest}


class Keeper:
    """Runs what is missing of one compiler's cases and writes each result as soon as it is there."""

    def __init__(self, compiler: str):
        self.compiler, self.failed = compiler, 0

    def run(self, only: str, run_case: Callable[[str], dict], compile_case: Callable[[str], str] | None = None) -> None:
        """compile_case: `launches_of` a case that is only compiled; where they are those of before it is not run."""
        for name, orders in expected(self.compiler).items():
            kept = self._kept().get(name, {})
            complete = kept.get("orders_with_the_same_bits") == f"{orders} of {orders}"
            if only not in name or complete and kept.get("sources") == sources(self.compiler, name):
                continue
            if complete and compile_case is not None and compile_case(name) == kept["launches"]:
                print(f"{self.compiler}, {name}: the same launches", flush=True)
                self._keep(name, kept)
                continue
            try:
                case = run_case(name)
            except (PTXError, AssertionError) as error:
                print(f"{self.compiler}, {name}: {error}", flush=True)
                self.failed += 1
                continue
            print(f"{self.compiler}, {name}: {case['seconds']} s", flush=True)
            self._keep(name, case)

    def _kept(self) -> dict:
        return load().get(self.compiler, {}).get("cases", {})

    def _keep(self, name: str, case: dict) -> None:
        cases = self._kept() | {name: case | {"sources": sources(self.compiler, name)}}
        kept = {"cases": {name: cases[name] for name in expected(self.compiler) if name in cases}}
        atomic.write(RESULTS, _text(load() | {self.compiler: kept}))


def _text(results: dict) -> str:
    """JSON in which a case is a line."""
    compilers = []
    for compiler, kept in sorted(results.items()):
        cases = ",\n".join(f"   {json.dumps(name)}: {json.dumps(case)}" for name, case in kept["cases"].items())
        head = f" {json.dumps(compiler)}: {{\n"
        compilers.append(f'{head}  "cases": {{\n{cases}\n  }}\n }}')
    return "{\n" + ",\n".join(compilers) + "\n}\n"


COMPILED = {"grouped_mlp": compiled_cuda_mlp, "grouped_mlp_sm90": compiled_cuda_sm90}
"""Operator -> the hash of a case that is only compiled; the others take seconds to run."""

CUDA = {
    "group_ema": run_cuda,
    "adamw_ema": run_cuda_adamw,
    "grouped_mlp": run_cuda_mlp,
    "grouped_mlp_sm90": run_cuda_sm90,
}
"""Operator of the CUDA library -> what runs a case of it, given what `compile_cuda` made."""


@functools.cache
def compile_cuda(compiler: str, operator: str, arch: int, folder: Path) -> str | cuda_grouped_mlp.Kernels:
    target = cuda_library.TARGETS[arch]
    if operator == "grouped_mlp":
        return cuda_grouped_mlp.Kernels(compiler, target, folder)
    if operator == "grouped_mlp_sm90":
        return cuda_sm90.Sm90Kernels(compiler, folder)
    return cuda_library.compiled(compiler, target, folder, operator=operator)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    only, failed = parser.parse_args().only, 0
    if importlib.util.find_spec("triton") is not None:
        import triton
        from ptx_emulator import shipped

        keeper, planned = Keeper(f"triton {triton.__version__}"), triton_cases()
        orders = expected(keeper.compiler)
        keeper.run(
            only,
            lambda name: run_triton(shipped, planned[name], orders[name]),
            lambda name: compiled_triton(shipped, planned[name]),
        )
        failed += keeper.failed
    if compiler := cuda_library.nvcc():
        keeper, forms = Keeper(f"nvcc {cuda_library.version(compiler)}"), cuda_cases()
        with tempfile.TemporaryDirectory() as folder:

            def run_case(name):
                case = forms[name]
                compiled = compile_cuda(compiler, case.operator, case.arch, Path(folder))
                return CUDA[case.operator](compiled, **case.options)

            def compile_case(name):
                case = forms[name]
                if case.operator not in COMPILED:
                    return ""
                compiled = compile_cuda(compiler, case.operator, case.arch, Path(folder))
                return COMPILED[case.operator](compiled, case.options["form"], case.options["dtype"])

            keeper.run(only, run_case, compile_case)
        failed += keeper.failed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
