"""Runs changed kernels in Triton's interpreter and on the emulator, and keeps which of the two saw each change.

    python tests/emulator/mutations.py          # what is missing in mutations.json, or was made of other sources
    python tests/emulator/mutations.py --page   # docs/emulator-mutations.md from it

The changes are drawn from a seed by `mutants.py`. It can be stopped and started again. Each runs in a process of its
own, which ends with the first case that is wrong: a result that is too far from float64, a rule of the emulator that is
broken, or no end in time. Triton's interpreter takes float16 in place of bfloat16, which its products get wrong.
"""

import argparse
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import mutants  # noqa: E402
import torch  # noqa: E402
from shipped_cases import (  # noqa: E402
    align_loss_case,
    errors_of,
    group_ema_case,
    mlp_case,
    mlp_parts_case,
    route_case,
    small_tiles,
)

RESULTS = Path(__file__).parent / "mutations.json"
SEED, COUNT = 13, 260
TIMEOUT = 90
INTERPRETER, EMULATOR = "interpreter", "emulator"
TOOLS = (INTERPRETER, EMULATOR)

SURVIVED = "survived"
SAME_PTX = "survived: the same PTX"
STILLBORN = "does not compile"


class Case(NamedTuple):
    arch: int
    make: Callable  # of shipped and a dtype
    dtype: torch.dtype


def cases() -> dict[str, Case]:
    """Small ones that together reach every kernel in every form."""
    bf16, fp32 = torch.bfloat16, torch.float32
    small, blocks = (2, 5, 40, 72, 3, 2), (2, 65, 128, 256, 3, 2)

    def gather(sizes, **options):
        return lambda shipped, dtype: mlp_case(shipped, sizes, dtype, "gather", small_tiles(shipped), **options)

    def aligned(sizes, **options):
        return lambda shipped, dtype: mlp_case(shipped, sizes, dtype, "aligned", **options)

    def alone(path, sizes):
        return lambda shipped, dtype: mlp_parts_case(shipped, sizes, dtype, path, small_tiles(shipped))

    def route(*sizes, **options):
        return lambda shipped, dtype: route_case(shipped, *sizes, dtype, **options)

    def align_loss(kind, R, D):
        return lambda shipped, dtype: align_loss_case(shipped, R, D, kind, dtype)

    def group_ema(momentum, **options):
        return lambda shipped, dtype: group_ema_case(shipped, momentum, **options)

    return {
        "gather": Case(80, gather(small), bf16),
        "gather, fp32": Case(80, gather(small), fp32),
        "gather, a director": Case(80, gather(small, with_director=True), bf16),
        "gather, one expert of many slots": Case(80, gather((9, 5, 40, 72, 8, 1), skewed=True), bf16),
        "gather, one gradient at a time": Case(80, alone("gather", small), bf16),
        "aligned": Case(90, aligned(blocks), bf16),
        "aligned, a director": Case(90, aligned(blocks, with_director=True), bf16),
        "aligned, pairs": Case(90, aligned((8, 65, 64, 72, 2, 2)), bf16),
        "aligned, an even number of blocks": Case(90, aligned((2, 130, 64, 96, 3, 2)), bf16),
        "aligned, by slot": Case(90, aligned((3, 66, 64, 96, 20, 2)), bf16),
        "aligned, one expert of many slots": Case(90, aligned((5, 65, 64, 96, 20, 1), skewed=True), bf16),
        "aligned, one gradient at a time": Case(90, alone("aligned", (2, 65, 64, 96, 3, 2)), bf16),
        "route": Case(80, route(5, 40, 3, 2), bf16),
        "route without noise": Case(80, route(5, 40, 3, 1, with_noise=False), bf16),
        "route, many rows": Case(80, route(70, 24, 20, 3), fp32),
        "route in two launches": Case(80, route(200, 16, 4, 2, one_launch=100), fp32),
        **{f"align_loss {kind}": Case(80, align_loss(kind, 7, 40), bf16) for kind in ("kd", "cosine", "mse")},
        **{f"align_loss {kind}, wide": Case(80, align_loss(kind, 9, 1100), fp32) for kind in ("kd", "cosine", "mse")},
        "group_ema": Case(80, group_ema(0.9), fp32),
        "group_ema, momentum on the device": Case(80, group_ema(torch.tensor(0.75), with_skip=False), fp32),
    }


# --- one tool ---------------------------------------------------------------------------------------------------------


class Checker:
    """Runs the cases with Triton as it is in this process: interpreted, or compiled and emulated."""

    def __init__(self, tool: str):
        from ptx_emulator import shipped

        self.tool, self.shipped = tool, shipped
        self.functions = self._functions()
        self.cases, self.reached, self.ptx = {}, {}, {}
        for name, (arch, make, dtype) in cases().items():
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
        for file in mutants.modules().values():
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
        with self.running(arch, launched) as emulator:
            results = case.compute(emulator)
        self.reached[name] = set().union(*(self.functions.get(kernel, set()) for kernel in launched))
        self.ptx[name] = sorted(ran.program.digest for ran in emulator.ran) if self.tool == EMULATOR else None
        for result, (error, _, bound) in errors_of(case, results).items():
            if not error <= bound:
                return f"{result} is off by {error:.1e}, {bound:.1e} is granted"
        return None

    def running(self, arch: int, launched: set):
        if self.tool == EMULATOR:
            return _Emulated(self.shipped, arch, launched)
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
                    try:
                        wrong = self.check(case)
                    except Exception as error:
                        return self._named(case, error)
                    if wrong:
                        return f"{case}: {wrong}"
        if self.tool == EMULATOR and all(self.ptx[case] == before[case] for case in relevant):
            return SAME_PTX
        return SURVIVED if relevant else "survived: no case reaches it"

    def _named(self, case: str, error: Exception) -> str:
        kind = type(error).__name__
        if "CompilationError" in kind or "Unsupported" in kind:
            return STILLBORN
        text = " ".join(str(error).split("\n")[0].split())
        if isinstance(error, self.shipped.PTXError):
            return f"{case}: {text.split(' [')[0][:110]}"
        return f"{case}: {kind}: {text[:90]}"


class _Emulated:
    """Names the kernels that are launched."""

    def __init__(self, shipped, arch, launched):
        self.context, self.launched = shipped.emulated(arch), launched

    def __enter__(self):
        self.emulator = self.context.__enter__()
        return self.emulator

    def __exit__(self, *error):
        self.launched |= {ran.kernel for ran in self.emulator.ran}
        return self.context.__exit__(*error)


class _Interpreted:
    """The like for the interpreter."""

    extra = ()

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
        if not receive.poll(TIMEOUT):
            return f"no end in {TIMEOUT} s"
        return receive.recv()
    except EOFError:
        child.join()
        name = signal.Signals(-child.exitcode).name if child.exitcode < 0 else f"exit {child.exitcode}"
        return f"crash: {name}"
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
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in results["changes"].items()]
    text = json.dumps(head, indent=1)[:-2] + ',\n "changes": {\n' + ",\n".join(lines) + "\n}}\n"
    before = RESULTS.with_suffix(".part")
    before.write_text(text)
    before.replace(RESULTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tool", choices=TOOLS, help="that alone, in this process")
    options = parser.parse_args()
    if options.tool:
        run(options.tool)
        return 0
    for tool in TOOLS:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(tool == INTERPRETER))}
        code = subprocess.run([sys.executable, __file__, "--tool", tool], env=environment).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
