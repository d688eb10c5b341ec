"""Where each kernel has been executed, from tests/emulator/results.json and benchmarks/results/.

scripts/pages.py writes the results to dexkernels/_executed.py, the tables of docs/kernels.md and one of the README.
"""

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import record
from generated import literal, strings

ROOT = Path(__file__).resolve().parents[1]
EMULATED = ROOT / "tests/emulator/results.json"
COMMAND = "python tests/emulator/every_kernel.py"
DTYPES = ("bf16", "fp16", "fp32")

Results = dict[str, dict[str, Any]]
"""Compiler -> ``{"cases": {name: case}}``, as written by tests/emulator/every_kernel.py."""


class Kernel(NamedTuple):
    """One kernel of the sources."""

    operator: str
    """Folder of the operator; `operators` maps it to the registered name."""
    backend: str
    name: str


class Executed(NamedTuple):
    """Where a kernel has been executed; empty fields mean never."""

    targets: tuple[str, ...]
    dtypes: tuple[str, ...]
    compilers: tuple[str, ...]
    date: str
    """Date of its latest run on the emulator."""
    gpu: tuple[str, ...]
    """Files of benchmarks/results/ with rows of its operator and backend."""

    @property
    def somewhere(self) -> bool:
        return bool(self.date or self.gpu)


# --- what ships -------------------------------------------------------------------------------------------------------


def kernels(root: Path = ROOT) -> list[Kernel]:
    """Every kernel of the sources: Triton functions that no other one calls, and CUDA ``__global__`` functions."""
    entries = set()
    for folder in (path for path in (root / "dexkernels/ops").iterdir() if path.is_dir()):
        files = [*folder.glob("triton.py"), *folder.glob("triton/*.py")]
        functions = {f.name: f for file in files for f in _compiled(file)}
        called = {n.func.id for f in functions.values() for n in ast.walk(f) if _calls_a_name(n)}
        entries |= {Kernel(folder.name, "triton", name) for name in functions.keys() - called}
    for file in (root / "csrc").glob("*/*.cu"):
        for name in re.findall(r"__global__[^;{]*?(\w+)\s*\((?!\()[^;{]*\{", re.sub(BOUNDS, "", file.read_text())):
            entries.add(Kernel(_operator(file.parent.name), "cuda", name))
    return sorted(entries)


def _operator(folder: str) -> str:
    """The operator of a folder of csrc/: kernels for one architecture may have a folder of their own."""
    return re.sub(r"_sm\d+$", "", folder)


BOUNDS = r"__launch_bounds__\([^()]*\)"


def _compiled(file: Path) -> list[ast.FunctionDef]:
    """The functions that ``triton.jit`` decorates."""
    functions = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef))
    return [f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]


def _calls_a_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def operators(root: Path = ROOT) -> dict[str, str]:
    """Folder -> registered name of the operator."""
    texts = {path.parent.name: path.read_text() for path in (root / "dexkernels/ops").glob("*/__init__.py")}
    names = {folder: re.search(r'backends\.register\("(\w+)"', text) for folder, text in texts.items()}
    return {folder: name[1] for folder, name in names.items() if name}


# --- what has been executed -------------------------------------------------------------------------------------------


def load() -> Results:
    return json.loads(EMULATED.read_text())


def _cases(results: Results) -> Iterable[tuple[str, str, str, str, str, dict]]:
    """Yields (compiler, target, dtype, operator, backend, case)."""
    for compiler, kept in results.items():
        backend = "cuda" if compiler.startswith("nvcc") else "triton"
        for name, case in kept["cases"].items():
            target, dtype, operator, *_ = name.replace(",", "").split()
            yield compiler, target, dtype, _operator(operator), backend, case


def executed(emulated: Results, measured: list[dict]) -> dict[Kernel, Executed]:
    """Where every kernel of the sources has been executed.

    Args:
        emulated: results of the emulator.
        measured: contents of the files of benchmarks/results/.
    """
    return {kernel: _executed(kernel, emulated, measured) for kernel in kernels()}


def _executed(kernel: Kernel, emulated: Results, measured: list[dict]) -> Executed:
    targets, dtypes, compilers, date = set(), set(), set(), ""
    for compiler, target, dtype, operator, backend, case in _cases(emulated):
        if (operator, backend) == kernel[:2] and kernel.name in case["kernels"]:
            targets.add(target)
            dtypes.add(dtype)
            compilers.add(compiler)
            date = max(date, case["date"])
    name = operators()[kernel.operator]
    gpu = {
        record.name_of(result)
        for result in measured
        if any(row["backend"] == kernel.backend and name in row["case"].split() for row in result["rows"])
    }
    return Executed(*(tuple(sorted(s)) for s in (targets, dtypes, compilers)), date, tuple(sorted(gpu)))


MODULE = '''\
"""Where the kernels of every operator have been executed. Generated by scripts/pages.py; do not edit."""

# fmt: off
EXECUTED: dict[tuple[str, str], str] = {executed}
"""(operator, backend) -> its kernels: on the emulator (docs/emulator.md), on a GPU, or never."""
'''


def module(emulated: Results, measured: list[dict]) -> str:
    """The text of dexkernels/_executed.py."""
    everywhere, names = executed(emulated, measured), operators()
    lines = []
    for operator, backend in sorted({kernel[:2] for kernel in everywhere}):
        by_name = {kernel.name: e for kernel, e in everywhere.items() if kernel[:2] == (operator, backend)}
        lines.append(f'    ("{names[operator]}", "{backend}"): (\n{strings(_sentence(by_name))}    ),\n')
    return MODULE.format(executed=literal(lines))


def _sentence(by_name: dict[str, Executed]) -> str:
    """The sentence that `dex doctor` prints about an operator's kernels in one backend."""
    count = f"{len(by_name)} kernel{'s' if len(by_name) > 1 else ''}"
    emulated = [e for e in by_name.values() if e.date]
    parts = []
    if emulated:
        which = "" if len(emulated) == len(by_name) else f"{len(emulated)} of them "
        targets, dtypes = (_union(emulated, field) for field in ("targets", "dtypes"))
        parts.append(f"{which}executed on the emulator for {targets} in {dtypes}, {max(e.date for e in emulated)}")
    files = _union(by_name.values(), "gpu")
    parts.append(f"on a GPU: {files}" if files else "on a GPU: not yet")
    if never := [name for name, e in by_name.items() if not e.somewhere]:
        parts.append(f"never: {', '.join(never)}")
    return f"{count}, {'; '.join(parts)}"


def _union(entries: Iterable[Executed], field: str) -> str:
    return ", ".join(sorted({value for e in entries for value in getattr(e, field)}))


def summary_table(emulated: Results, measured: list[dict]) -> str:
    """The README's table of all kernels."""
    everywhere = executed(emulated, measured)
    on_emulator = [e for e in everywhere.values() if e.date]
    count = f"all {len(everywhere)}" if len(on_emulator) == len(everywhere) else f"{len(on_emulator)}"
    how = "none"
    if on_emulator:
        targets, dtypes = (_union(on_emulator, field) for field in ("targets", "dtypes"))
        how = f"{count}, for {targets} in {dtypes}: `{COMMAND}`, {max(e.date for e in on_emulator)}"
    files = sorted({file for e in everywhere.values() for file in e.gpu})
    gpu = ", ".join(f"[{file}](benchmarks/results/{file})" for file in files) or "none yet"
    never = ", ".join(f"`{kernel.name}`" for kernel, e in everywhere.items() if not e.somewhere) or "none"
    counts = {backend: sum(kernel.backend == backend for kernel in everywhere) for backend in ("triton", "cuda")}
    return f"""\
Of {counts["triton"]} Triton kernels and {counts["cuda"]} CUDA C++ kernels ([list](docs/kernels.md)):

| executed | |
| --- | --- |
| as compiled, by an [emulator](docs/emulator.md) of PTX | {how} |
| on a GPU | {gpu} |
| never | {never} |"""


# --- the tables of docs/kernels.md ------------------------------------------------------------------------------------


def executed_table(emulated: Results, measured: list[dict]) -> str:
    """The number of cases, and where each kernel has been executed."""
    cases = [f"{len(kept['cases'])} compiled by {compiler}" for compiler, kept in emulated.items()]
    rows = [_executed_row(kernel, e) for kernel, e in executed(emulated, measured).items()]
    return "\n".join([f"Cases: {', '.join(cases)}.", "", *EXECUTED_HEAD, *rows])


EXECUTED_HEAD = (
    "| operator | backend | kernel | targets | dtypes | compilers | emulator | on a GPU |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


def _executed_row(kernel: Kernel, e: Executed) -> str:
    gpu = ", ".join(f"[{file}](../benchmarks/results/{file})" for file in e.gpu) or "not yet"
    emulated = [", ".join(field) for field in (e.targets, e.dtypes, e.compilers)]
    cells = [kernel.operator, kernel.backend, f"`{kernel.name}`", *emulated, e.date or "never", gpu]
    return f"| {' | '.join(cells)} |"


def _shown(emulated: Results) -> list[str]:
    """The compilers whose kernels are counted: the one of each kind with the most cases."""
    kinds = {}
    for compiler, kept in emulated.items():
        kinds.setdefault(compiler.split()[0], []).append((len(kept["cases"]), compiler))
    return [max(compilers)[1] for compilers in kinds.values()]


class Counted(NamedTuple):
    """A row of the table."""

    kernel: Kernel
    target: str
    dtype: str
    counts: dict

    @property
    def size(self) -> tuple[int, ...]:
        """Sort key of launches: products, then instructions."""
        main_loop, rest = self.counts["instructions"]
        return self.counts["tensor_operations"], main_loop, rest


def _largest(emulated: Results, shown: list[str]) -> list[Counted]:
    """The largest launch of each kernel and target, in half precision and in float32."""
    largest = {}
    for compiler, target, dtype, operator, backend, case in _cases(emulated):
        for name, counts in case["kernels"].items() if compiler in shown else ():
            row = Counted(Kernel(operator, backend, name), target, dtype, counts)
            key = (*row.kernel, target, dtype == "fp32")
            if key not in largest or row.size > largest[key].size:
                largest[key] = row
    return [largest[key] for key in sorted(largest)]


def _counted_row(row: Counted) -> str:
    main_loop, rest = row.counts["instructions"]
    share = f"{rest / (main_loop + rest):.0%}" if main_loop else ""
    ratios = [_over(row.counts[name]) for name in ("sectors", "rounds_in_main_loop", "rounds_outside")]
    operations = row.counts["tensor_operations"]
    products = f"{operations / 1e6:.1f}" if operations else ""
    kernel = (row.kernel.operator, row.kernel.backend, f"`{row.kernel.name}`")
    return f"| {' | '.join((*kernel, row.target, row.dtype, *ratios, products, share))} |"


def _over(pair: list[int]) -> str:
    count, least = pair
    return f"{count / least:.2f}" if least else ""


def counted_table(emulated: Results, measured: list[dict]) -> str:
    """The counts of every kernel."""
    shown = _shown(emulated)
    source = f"From the PTX of {' and '.join(shown)}."
    return "\n".join([source, "", *COUNTED_HEAD, *(_counted_row(row) for row in _largest(emulated, shown))])


COUNTED_HEAD = (
    "| operator | backend | kernel | target | dtype | sectors | banks, loop | banks, outside | Mops | epilogue |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)

REGIONS = {"executed": summary_table, "kernels": executed_table, "counted": counted_table}
"""Name of a marked region -> the function that makes its text."""
