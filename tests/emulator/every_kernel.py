"""Runs every shipped Triton kernel and configuration on the emulator, once an architecture, and keeps what came of it.

    python tests/emulator/every_kernel.py          # what is missing in results.json, or was made of other sources
    python tests/emulator/every_kernel.py --page   # the table of docs/kernels.md from results.json

It can be stopped and started again: results are written case by case. Of each case: the errors beside plain torch's,
whether three orders of the warps give the same bits, and of each kernel the hash of its PTX and what was counted.
"""

import argparse
import datetime
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from ptx_emulator.counters import parts  # noqa: E402
from shipped_cases import align_loss_case, errors_of, group_ema_case, mlp_case, route_case, small_tiles  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS, PAGE = HERE / "results.json", ROOT / "docs/kernels.md"
ORDERS = 3

SMALL, BLOCKS = (2, 5, 40, 72, 3, 2), (2, 65, 128, 256, 3, 2)
ALIGNED = {
    "": BLOCKS,
    ", pairs": (8, 65, 64, 72, 2, 2),
    ", an even number of blocks": (2, 130, 64, 96, 3, 2),
    ", no token left over": (3, 64, 64, 96, 3, 2),
    ", results by slot": (3, 66, 64, 96, 20, 2),
    ", results by slot, K = 1": (3, 65, 64, 96, 20, 1),
}
ROUTES = [(5, 40, 3, 2), (130, 24, 20, 3), (40, 72, 40, 2), (40, 72, 128, 2), (200, 16, 4, 2)]
ONE_LAUNCH = 150
"""Rows up to which one launch routes: the last of ROUTES takes two, as larger inputs do with what ships."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def cases(shipped) -> dict[str, tuple[int, Callable]]:
    """Name -> architecture, and what makes the `Case`."""
    found = {}
    for arch in (80, 90):
        for name, dtype in DTYPES.items():
            of = f"sm_{arch} {name}"
            found |= {f"{of} grouped_mlp gather": (arch, lambda d=dtype: mlp_case(shipped, BLOCKS, d, "gather"))}
            found |= {f"{of} grouped_mlp gather, small blocks": (arch, lambda d=dtype: _small(shipped, d))}
            if arch == 90 and name != "fp32":
                for form, sizes in ALIGNED.items():
                    made = (arch, lambda d=dtype, s=sizes: mlp_case(shipped, s, d, "aligned"))
                    found[f"{of} grouped_mlp aligned{form}"] = made
            for sizes in ROUTES:
                key = f"{of} route R {sizes[0]}, E {sizes[2]}, K {sizes[3]}"
                found[key] = (arch, lambda d=dtype, s=sizes: route_case(shipped, *s, d, ONE_LAUNCH))
            for kind in ("kd", "cosine", "mse"):
                found[f"{of} align_loss {kind}"] = (
                    arch,
                    lambda d=dtype, k=kind: align_loss_case(shipped, 70, 136, k, d),
                )
        found |= {f"sm_{arch} fp32 group_ema": (arch, lambda: group_ema_case(shipped, 0.9))}
        on_device = (arch, lambda: group_ema_case(shipped, torch.tensor(0.75)))
        found[f"sm_{arch} fp32 group_ema, momentum on the device"] = on_device
        for path, sizes in (("gather", SMALL), ("aligned", BLOCKS))[: 2 if arch == 90 else 1]:
            made = (arch, lambda p=path, s=sizes: mlp_case(shipped, s, torch.bfloat16, p, with_director=True))
            found[f"sm_{arch} bf16 grouped_mlp {path}, with a director"] = made
    return found


def _small(shipped, dtype):
    return mlp_case(shipped, SMALL, dtype, "gather", small_tiles(shipped))


def sources() -> str:
    """A hash of everything that the kernels are made of."""
    ops = ROOT / "dexkernels/ops"
    files = sorted({ops / "triton_common.py", *ops.glob("*/triton.py"), *ops.glob("*/triton/*.py")})
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def run(shipped, arch: int, make: Callable) -> dict:
    """One case: its errors, the kernels that ran, and whether other orders of the warps give the same bits."""
    case, start = make(), time.perf_counter()
    with shipped.emulated(arch, count=True) as emulator:
        results = case.compute(emulator)
    same = 0
    for seed in range(ORDERS):
        with shipped.emulated(arch, seed=seed) as other:
            again = case.compute(other)
        same += all(torch.equal(again[name], value) for name, value in results.items())
    return {
        "errors": {name: list(e) for name, e in errors_of(shipped, case, results).items()},
        "orders_with_the_same_bits": f"{same} of {ORDERS}",
        "kernels": _kernels(emulator.ran),
        "seconds": round(time.perf_counter() - start, 1),
        "date": datetime.date.today().isoformat(),
    }


def _kernels(launches) -> dict:
    """Of every kernel the hashes of the PTX that ran, and what was counted of its longest launch."""
    found = {}
    for ran in launches:
        one = _counted(ran)
        before = found.get(ran.kernel, one)
        longest = max(before, one, key=lambda counted: sum(counted["instructions"]))
        found[ran.kernel] = longest | {"ptx": sorted({*before["ptx"], *one["ptx"]})}
    return found


def _counted(ran) -> dict:
    counters = ran.counters
    rounds, least = (parts(ran.program, of) for of in (counters.rounds, counters.least_rounds))
    return {
        "ptx": [ran.program.digest],
        "blocks": ran.blocks,
        "sectors": [counters.sectors, counters.least_sectors],
        "rounds_in_main_loop": [rounds.main_loop, least.main_loop],
        "rounds_outside": [rounds.rest, least.rest],
        "tensor_operations": counters.products,
        "instructions": list(parts(ran.program, counters.executed)),
    }


def load() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}


def page(results: dict) -> str:
    """docs/kernels.md: of each kernel the largest case, counted."""
    rows = {}
    for name, case in results["cases"].items():
        arch, dtype, operator, *_ = name.replace(",", "").split()
        for kernel, counted in case["kernels"].items():
            key = (operator, kernel, arch)
            if key not in rows or counted["instructions"] > rows[key][1]["instructions"]:
                rows[key] = (dtype, counted)
    lines = [HEAD.format(triton=results["triton"], count=len(results["cases"]))]
    for (operator, kernel, arch), (dtype, counted) in sorted(rows.items()):
        main_loop, rest = counted["instructions"]
        share = f"{rest / (main_loop + rest):.0%}" if main_loop else ""
        conflicts = [_over(counted[key]) for key in ("rounds_in_main_loop", "rounds_outside")]
        products = f"{counted['tensor_operations'] / 1e6:.1f}" if counted["tensor_operations"] else ""
        cells = (operator, f"`{kernel}`", arch, dtype, _over(counted["sectors"]), *conflicts, products, share)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _over(pair):
    got, least = pair
    return f"{got / least:.2f}" if least else ""


HEAD = """# Kernels: what they do, counted

Counted, not timed: on the [emulator](emulator.md), from the PTX of Triton {triton}, in {count} cases;
`python tests/emulator/every_kernel.py` runs them and `--page` writes this page from `tests/emulator/results.json`.

- sectors: 32 bytes of global memory that warps ask for, over the fewest that could hold what they asked for.
- banks: rounds in which shared memory serves an access, over the fewest possible, inside of the loops that hold the
  products and outside of them. Above 1 are bank conflicts.
- Mops: operations of the tensor cores, in millions.
- epilogue: instructions outside of those loops, of all that warps execute: prologue, epilogue and whatever else.

Shapes are small ({{2, 65, 128, 256}} of B, N, D, H at most), so that fixed costs weigh more than in training.

| operator | kernel | target | dtype | sectors | banks, loop | banks, outside | Mops | epilogue |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--page", action="store_true", help="write docs/kernels.md from the results")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    options = parser.parse_args()
    results = load()
    if options.page:
        PAGE.write_text(page(results))
        return 0
    import triton
    from ptx_emulator import shipped

    made_of = {"sources": sources(), "triton": triton.__version__}
    if {key: results.get(key) for key in made_of} != made_of:
        results = {**made_of, "cases": {}}
    failed = 0
    for name, (arch, make) in cases(shipped).items():
        if name in results["cases"] or options.only not in name:
            continue
        try:
            results["cases"][name] = run(shipped, arch, make)
        except (shipped.PTXError, AssertionError) as error:
            print(f"{name}: {error}", flush=True)
            failed += 1
            continue
        finally:
            shipped.PROGRAMS.clear()  # large, and of little use to the next case
        print(f"{name}: {results['cases'][name]['seconds']} s", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
