"""Runs changed kernels in Triton's interpreter and on the emulator, and keeps which of the two saw each change.

    python tests/emulator/mutations.py          # what is missing in mutations.json, or was made of other sources
    python tests/emulator/mutations.py --page   # docs/emulator-mutations.md from it

The changes are drawn from a seed by `mutants.py`. It can be stopped and started again. Each runs in a process of its
own, which ends with the first case that is wrong: a result that is too far from float64, a rule of the emulator that is
broken, or no end in time. Triton's interpreter takes float16 in place of bfloat16, which its products get wrong.
"""

import argparse
import collections
import functools
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import equivalent  # noqa: E402
import mutants  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from far_cases import far_cases  # noqa: E402
from shipped_cases import (  # noqa: E402
    adamw_ema_case,
    align_loss_case,
    errors_of,
    group_ema_case,
    mlp_case,
    mlp_parts_case,
    route_case,
    slots_case,
    small_tiles,
)

HERE = Path(__file__).resolve().parent
RESULTS, ROOT = HERE / "mutations.json", HERE.parents[1]
PAGE, KERNEL_TESTS = ROOT / "docs/emulator-mutations.md", ROOT / "tests/kernels"
SEED, COUNT = 13, 250
SECONDS = 60
"""Of the processor, that a case may take."""

INTERPRETER, EMULATOR = "interpreter", "emulator"
TOOLS = (INTERPRETER, EMULATOR)

SURVIVED = "survived"
SAME_PTX = "survived: the same PTX"
STILLBORN = "does not compile"


class Case(NamedTuple):
    arch: int
    make: Callable  # of shipped and a dtype
    dtype: torch.dtype
    tools: tuple[str, ...] = TOOLS


BF16, FP32 = torch.bfloat16, torch.float32
SMALL = (2, 5, 40, 72, 3, 2)


def cases() -> dict[str, Case]:
    """Small ones that together reach every kernel in every form, and then those that few changes need."""

    def gather(sizes, **options):
        return lambda shipped, dtype: mlp_case(shipped, sizes, dtype, "gather", small_tiles(shipped), **options)

    def aligned(sizes, **options):
        return lambda shipped, dtype: mlp_case(shipped, sizes, dtype, "aligned", **options)

    def alone(path, sizes, tiles=small_tiles):
        return lambda shipped, dtype: mlp_parts_case(shipped, sizes, dtype, path, tiles(shipped))

    return {
        "gather": Case(80, gather(SMALL), BF16),
        "gather, fp32": Case(80, gather(SMALL), FP32),
        "gather, a director": Case(80, gather(SMALL, with_director=True), BF16),
        "gather, tanh GELU": Case(80, gather(SMALL, activation="gelu_tanh"), BF16),
        "gather, one expert of many slots": Case(80, gather((9, 5, 40, 72, 8, 1), skewed=True), BF16),
        "gather, one gradient at a time": Case(80, alone("gather", SMALL), BF16),
        "aligned": Case(90, aligned((2, 65, 128, 256, 3, 2)), BF16),
        "aligned, a director": Case(90, aligned((2, 65, 128, 256, 3, 2), with_director=True), BF16),
        "aligned, pairs": Case(90, aligned((8, 65, 64, 72, 2, 2)), BF16),
        "aligned, an even number of blocks": Case(90, aligned((2, 130, 64, 96, 3, 2)), BF16),
        "aligned, by slot": Case(90, aligned((3, 66, 64, 96, 20, 2)), BF16),
        "aligned, one expert of many slots": Case(90, aligned((5, 65, 64, 96, 20, 1), skewed=True), BF16),
        "aligned, one gradient at a time": Case(90, alone("aligned", (2, 65, 64, 96, 3, 2)), BF16),
        **_other_cases(),
        "slots": Case(90, lambda shipped, dtype: slots_case(shipped), BF16),
        "gather, many rows": Case(80, gather((2, 70, 40, 72, 3, 2)), BF16),
        "gather, parts of unequal length": Case(80, gather((12, 5, 40, 72, 8, 1), skewed=True), BF16),
        "gather, fp32, one gradient at a time": Case(80, alone("gather", SMALL, lambda shipped: None), FP32),
        "aligned, pairs of three blocks": Case(90, aligned((4, 228, 64, 72, 2, 2)), BF16),
        "aligned, three blocks": Case(90, aligned((2, 193, 64, 72, 3, 2)), BF16),
        "aligned, two blocks by slot": Case(90, aligned((3, 130, 64, 72, 20, 2)), BF16),
        "aligned, parts of unequal length": Case(90, aligned((8, 65, 64, 72, 4, 1), skewed=True), BF16),
        "aligned, three choices": Case(90, aligned((2, 65, 64, 72, 4, 3)), BF16),
        "aligned, pairs, three choices": Case(90, aligned((8, 65, 64, 72, 3, 3)), BF16),
        "aligned, two blocks of columns": Case(90, aligned((1, 65, 264, 264, 1, 1)), BF16),
        # Numbers that float16 does not have.
        "aligned, large": Case(90, aligned((2, 65, 64, 72, 3, 2), scale_of_biases=2.0**17), BF16, (EMULATOR,)),
        "aligned, large, by slot": Case(
            90, aligned((3, 66, 64, 72, 20, 2), scale_of_biases=2.0**17), BF16, (EMULATOR,)
        ),
        **{name: Case(arch, _far(name), BF16, (EMULATOR,)) for name, (arch, _) in far_cases(None).items()},
    }


def _far(name: str) -> Callable:
    return lambda shipped, dtype: far_cases(shipped)[name][1]()


def _other_cases() -> dict[str, Case]:
    def route(*sizes, **options):
        return lambda shipped, dtype: route_case(shipped, *sizes, dtype, **options)

    def align_loss(kind, R, D, scale=3):
        return lambda shipped, dtype: align_loss_case(shipped, R, D, kind, dtype, scale)

    def group_ema(momentum, **options):
        return lambda shipped, dtype: group_ema_case(shipped, momentum, **options)

    def adamw_ema(momentum, **options):
        return lambda shipped, dtype: adamw_ema_case(shipped, momentum, **options)

    return {
        "route": Case(80, route(5, 40, 3, 2), BF16),
        "route without noise": Case(80, route(5, 40, 3, 1, with_noise=False), BF16),
        "route, many rows": Case(80, route(70, 24, 20, 3), FP32),
        "route in two launches": Case(80, route(200, 16, 4, 2, one_launch=100), FP32),
        **{f"align_loss {kind}": Case(80, align_loss(kind, 7, 40), BF16) for kind in ("kd", "cosine", "mse")},
        **{f"align_loss {kind}, wide": Case(80, align_loss(kind, 9, 1100), FP32) for kind in ("kd", "cosine", "mse")},
        "align_loss kd, large": Case(80, align_loss("kd", 7, 40, 60), torch.float16),
        "align_loss mse, many rows": Case(80, align_loss("mse", 4104, 2), FP32),
        "group_ema": Case(80, group_ema(0.9), FP32),
        "group_ema, directors that are not aligned": Case(80, group_ema(0.9, offset=1), FP32),
        "group_ema, momentum on the device": Case(80, group_ema(torch.tensor(0.75), with_skip=False), FP32),
        "route, one column more than two blocks": Case(80, route(5, 129, 3, 2), BF16),
        "adamw_ema": Case(80, adamw_ema(torch.tensor(0.9), copies=torch.float16, clip=0.5), FP32),
        "adamw_ema, not aligned, without copies": Case(80, adamw_ema(torch.tensor(0.9), copies=None, offset=1), FP32),
        "adamw_ema without skip": Case(80, adamw_ema(torch.tensor(0.75), copies=torch.float16, with_skip=False), FP32),
    }


# --- one tool ---------------------------------------------------------------------------------------------------------


class Checker:
    """Runs the cases with Triton as it is in this process: interpreted, or compiled and emulated."""

    def __init__(self, tool: str):
        from ptx_emulator import shipped

        self.tool, self.shipped = tool, shipped
        if tool == EMULATOR:
            _without_machine_code()
        self.functions = self._functions()
        self.cases, self.reached, self.ptx, self.recorded = {}, {}, {}, collections.defaultdict(list)
        for name, (arch, make, dtype, tools) in cases().items():
            if tool not in tools:
                continue
            if tool == INTERPRETER and dtype == torch.bfloat16:
                dtype = torch.float16 if "aligned" in name else torch.float32
            case = make(shipped, dtype)
            self.cases[name] = arch, case._replace(want=functools.cache(case.want))
            wrong = self.check(name)
            if wrong:
                raise RuntimeError(f"{name}: the kernels as they are: {wrong}")

    def _functions(self) -> dict[str, set[str]]:
        """Of each function of the device, it and all that it calls, by name."""
        direct = {}
        for file in (*mutants.modules().values(), HERE / "probes.py"):
            for function in mutants.jitted(file.read_text()):
                direct.setdefault(function.name, set()).update({function.name} | mutants.called(function))
        while True:
            more = {name: set().union(*(direct.get(one, ()) for one in of)) for name, of in direct.items()}
            more = {name: of | more[name] for name, of in direct.items()}
            if more == direct:
                return direct
            direct = more

    def check(self, name: str) -> str | None:
        """What is wrong with the results of a case, None if nothing."""
        arch, case = self.cases[name]
        launched = set()
        with self.running(name, arch, launched) as emulator:
            results = case.compute(emulator)
        self.reached[name] = set().union(*(self.functions.get(kernel, set()) for kernel in launched))
        self.ptx[name] = sorted(ran.program.digest for ran in emulator.ran) if self.tool == EMULATOR else None
        for result, (error, _, bound) in errors_of(case, results).items():
            if not error <= bound:
                return f"{result} is off by {error:.1e}, {bound:.1e} is granted"
        return None

    def running(self, name: str, arch: int, launched: set):
        if self.tool == EMULATOR:
            return _Emulated(self.shipped, arch, launched, self.recorded[name])
        return _Interpreted(self.shipped, launched)

    def relevant(self, mutant: mutants.Mutant) -> list[str]:
        """The cases that reach the function."""
        return [name for name, reached in self.reached.items() if mutant.function in reached]

    def verdict(self, mutant: mutants.Mutant) -> str:
        file = mutants.modules()[mutant.module]
        name = "dexkernels.ops." + mutant.module.replace("/", ".")
        text = mutants.apply(file.read_text(), mutant.edit)
        relevant, before = self.relevant(mutant), dict(self.ptx)
        with tempfile.TemporaryDirectory() as folder:
            with self.shipped.with_source(sys.modules[name], text, Path(folder)):
                for case in relevant:
                    used = int(time.process_time())
                    resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, resource.RLIM_INFINITY))
                    try:
                        wrong = self.check(case)
                    except Exception as error:
                        return self._named(case, error)
                    if wrong:
                        return f"{case}: {wrong}"
                if self.tool == INTERPRETER:
                    failed = self._far_apart()
                    if failed:
                        return failed
        if not relevant:
            return "survived: no case reaches it"
        if self.tool == EMULATOR and all(self.ptx[case] == before[case] for case in relevant):
            return SAME_PTX
        return SURVIVED

    def _far_apart(self) -> str | None:
        """The test of tests/kernels that fails of those with offsets of more than 32 bits.

        Those of the director are left out: they patch what a changed module does not use.
        """
        failed = []

        class Failed:
            def pytest_runtest_logreport(self, report):
                if report.failed:
                    failed.append(report.nodeid.rpartition("/")[2])

        used = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, resource.RLIM_INFINITY))
        pytest.main(
            [str(KERNEL_TESTS), "-k", "far_apart and not director", "-xq", "-p", "no:cacheprovider"], [Failed()]
        )
        return failed[0] if failed else None

    def _named(self, case: str, error: Exception) -> str:
        kind = type(error).__name__
        if "CompilationError" in kind or "Unsupported" in kind:
            return STILLBORN
        text = " ".join(str(error).split("\n")[0].split())
        if isinstance(error, self.shipped.PTXError):
            return f"{case}: {text.split(' [')[0][:110]}"
        return f"{case}: {kind}: {text[:90]}"


def _without_machine_code() -> None:
    """Triton stops at PTX, which takes half as long. Its cache is this process's own: none would find code in it."""
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend

    knobs.cache.dir = tempfile.mkdtemp()
    CUDABackend.make_cubin = lambda self, *args: b""


LARGE = 2**24
"""Elements of a tensor that is not recorded: of most of them no page is touched."""


class Recorded(NamedTuple):
    """One launch of the kernels as they are."""

    compiled: object
    ran: object
    results: list[torch.Tensor]
    """What its tensors held afterwards."""


def _replaying(shipped, recorded: list[Recorded]):
    """An emulator that copies the results of launches that nothing has changed, or records them where none are."""

    class Replaying(shipped.Emulator):
        recording, changed = not recorded, False

        def run(self, kernel, args, grid, kwargs):
            compiled, _ = shipped.compile_kernel(kernel, args, kwargs, self.arch)
            values = [*args, *kwargs.values(), *self.extra]
            tensors = [getattr(value, "base", value) for value in values]
            tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
            known = recorded[len(self.ran)] if len(self.ran) < len(recorded) and not self.changed else None
            if known is not None and known.compiled is compiled:
                with torch.no_grad():
                    for t, result in zip(tensors, known.results, strict=True):
                        t.copy_(result)
                self.ran.append(known.ran)
                return
            super().run(kernel, args, grid, kwargs)
            if max((t.numel() for t in tensors), default=0) > LARGE:
                return
            if self.recording:
                recorded.append(Recorded(compiled, self.ran[-1], [t.detach().clone() for t in tensors]))
            elif known is not None:
                after = zip(tensors, known.results, strict=True)
                self.changed = not all(torch.equal(_bits(t), _bits(result)) for t, result in after)

    return Replaying


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().view(-1).view(torch.uint8)


class _Emulated:
    """Names the kernels that are launched."""

    def __init__(self, shipped, arch, launched, recorded):
        with shipped.replaced(shipped, "Emulator", _replaying(shipped, recorded)):
            self.context = shipped.emulated(arch)
            self.emulator = self.context.__enter__()
        self.launched = launched

    def __enter__(self):
        return self.emulator

    def __exit__(self, *error):
        self.launched |= {ran.kernel for ran in self.emulator.ran}
        return self.context.__exit__(*error)


class _Interpreted:
    """The like for the interpreter."""

    extra = ()
    compile_only = False

    def __init__(self, shipped, launched):
        from triton.runtime import interpreter

        self.poisoned = shipped.Poisoned(shipped.POISONS[0])
        self.owner, self.run, self.launched = interpreter.GridExecutor, interpreter.GridExecutor.__call__, launched

    def __enter__(self):
        def run(executor, *args, **kwargs):
            self.launched.add(executor.fn.__name__)
            return self.run(executor, *args, **kwargs)

        self.owner.__call__ = run
        self.poisoned.__enter__()
        return self

    def __exit__(self, *error):
        self.owner.__call__ = self.run
        return self.poisoned.__exit__(*error)


def in_child(checker: Checker, mutant: mutants.Mutant) -> str:
    """The verdict, or how the process ended that should have given it."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def run():
        # What the compiler prints of a change that it refuses is of no interest.
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        send.send(checker.verdict(mutant))

    child = context.Process(target=run)
    child.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        child.join()
        if child.exitcode == -signal.SIGXCPU:
            return f"no end in {SECONDS} s"
        return f"crash: {signal.Signals(-child.exitcode).name}" if child.exitcode < 0 else f"crash: {child.exitcode}"
    finally:
        child.kill()
        child.join()


def run(tool: str) -> None:
    results, drawn = load(), mutants.draw(COUNT, SEED)
    missing = [mutant for mutant in drawn if tool not in results["changes"].get(mutant.key, {})]
    if not missing:
        return
    checker = Checker(tool)
    for mutant in missing:
        verdict = in_child(checker, mutant)
        print(f"{tool}: {mutant.key}: {verdict}", flush=True)
        results["changes"].setdefault(mutant.key, {})[tool] = verdict
        save(results)


# --- results ----------------------------------------------------------------------------------------------------------


def load() -> dict:
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    made_of = {"sources": mutants.sources(), "seed": SEED, "count": COUNT}
    return kept if made_of.items() <= kept.items() else {**made_of, "changes": {}}


def save(results: dict) -> None:
    """One line a change."""
    head = {key: value for key, value in results.items() if key != "changes"}
    order = [mutant.key for mutant in mutants.draw(COUNT, SEED)]
    changes = {key: results["changes"][key] for key in order if key in results["changes"]}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in changes.items()]
    text = json.dumps(head, indent=1)[:-2] + ',\n "changes": {\n' + ",\n".join(lines) + "\n}}\n"
    before = RESULTS.with_suffix(".part")
    before.write_text(text)
    before.replace(RESULTS)


class Counts(NamedTuple):
    """Of some changes: how many there are, do not compile, and were seen by whom."""

    changes: int
    stillborn: int
    both: int
    emulator: int
    interpreter: int
    survived: int


def count(changes) -> Counts:
    stillborn = sum(one[EMULATOR] == STILLBORN for one in changes)
    alive = [
        tuple(not one[tool].startswith(SURVIVED) for tool in TOOLS) for one in changes if one[EMULATOR] != STILLBORN
    ]
    seen = [alive.count(by) for by in ((True, True), (False, True), (True, False), (False, False))]
    return Counts(len(changes), stillborn, *seen)


def survivors(results: dict) -> list[str]:
    """What neither tool saw."""
    return [key for key, one in results["changes"].items() if all(one[tool].startswith(SURVIVED) for tool in TOOLS)]


REASONS = {
    "a result too far from float64": "is off by",
    "a number that is not the specification's": "AssertionError",
    "outside of every allocation, or misaligned": "outside of|misaligned|an address outside",
    "a race on global memory": "race on global memory",
    "a race on shared memory": "race on shared memory",
    "uninitialised, in flight, too early or a missing fence": "uninitialised|in flight|too early|missing",
    "deadlock, or no end": "deadlock|no end|gave up|endless",
    "an instruction that is not known": "cannot be run",
    "the process ended": "crash",
}
"""What is said of a change that was seen -> the verdicts that say it; any other was refused when it ran."""


def reasons(results: dict, tool: str) -> dict[str, int]:
    found = dict.fromkeys((*REASONS, "refused when it ran"), 0)
    for one in results["changes"].values():
        if one[tool].startswith(SURVIVED) or one[EMULATOR] == STILLBORN:
            continue
        name = next((n for n, words in REASONS.items() if re.search(words, one[tool])), "refused when it ran")
        found[name] += 1
    return found


def page(results: dict) -> str:
    """docs/emulator-mutations.md."""
    every = results["changes"]
    total = count(every.values())
    lines = [HEAD.format(total=total, alive=total.changes - total.stillborn, seed=results["seed"])]
    for module in mutants.modules():
        counts = count([one for key, one in every.items() if key.split()[0] == module])
        lines.append(f"| `{module}` | " + " | ".join(map(str, counts)) + " |")
    lines.append("| all | " + " | ".join(map(str, total)) + " |")
    lines.append("\nDetected as:\n\n| | interpreter | emulator |\n| --- | --- | --- |")
    by_tool = {tool: reasons(results, tool) for tool in TOOLS}
    for name in by_tool[EMULATOR]:
        if any(by_tool[tool][name] for tool in TOOLS):
            lines.append(f"| {name} | {by_tool[INTERPRETER][name]} | {by_tool[EMULATOR][name]} |")
    for head, known in ((SURVIVORS, equivalent.PROOFS), (MISSED, equivalent.GAPS)):
        lines.append(head)
        for key in survivors(results):
            if key in known:
                where, change = key.split(": ", 1)
                before, after = (part.replace("|", "\\|") for part in change.split(" -> ", 1))
                lines.append(f"| `{where}` | `{before}` | `{after}` | {known[key]} |")
    return "\n".join(lines) + "\n"


HEAD = """# Mutations of kernel lines, and which are detected

This page shows how many random faults in kernels the interpreter and the emulator detect, and explains every miss.

`python tests/emulator/mutations.py` draws {total.changes} changes of single lines of the Triton kernels from the seed
{seed}: operators, comparisons, constants, masks, indices, casts, arguments, and omitted statements, in all
device functions in turn. {alive} of them compile. Each is run in the interpreter and on the [emulator](emulator.md),
in small cases that reach every kernel, until a fault shows. `tests/emulator/mutations.json` records the faults, and
`--page` writes this page.

| module | changes | do not compile | detected by both | by the emulator alone | by the interpreter alone | by neither |
| --- | --- | --- | --- | --- | --- | --- |"""

SURVIVORS = """
## Undetected and equivalent

None of these changes can affect a result, for the given reason.

| where | line | changed to | proof |
| --- | --- | --- | --- |"""

MISSED = """
## Undetected faults

These are wrong, but no case shows it.

| where | line | changed to | why |
| --- | --- | --- | --- |"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--page", action="store_true", help="write docs/emulator-mutations.md from the results")
    parser.add_argument("--again", action="store_true", help="run what survived once more, of tests that have changed")
    parser.add_argument("--tool", choices=TOOLS, help="that alone, in this process")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(load()))
        return 0
    if options.tool:
        run(options.tool)
        return 0
    if options.again:
        results = load()
        for key in survivors(results):
            del results["changes"][key]
        save(results)
    for tool in TOOLS:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(tool == INTERPRETER))}
        code = subprocess.run([sys.executable, __file__, "--tool", tool], env=environment).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
