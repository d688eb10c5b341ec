#!/usr/bin/env python3
"""What needs a GPU, in one command and without a network: in 15 minutes what matters most, or everything (--full).

usage: python scripts/gpu.py [OUT] [--minutes M] [--full] [--stages A,B] [--jobs N] [--commit HASH] [--cpu]
In this order: build the native library; dex verify, which compares every operator with float64; check and compile what
will be timed, the aligned path too; time layer step, grouped MLP, GEMA and the others on ViT-B; compute-sanitizer on
one case for each path; the training step, eager and as a CUDA graph; six chosen tiles; compiled peers. --full adds the
recorded cases, all tests and all benchmarks.
OUT (default: the variable OUT, else build/gpu) gets log.txt, summary.json, verified.json and a results file, written
after every part. A second run into the same OUT with other --stages adds to them.
A part that fails, or runs out of its time, is named and the rest goes on; the exit status is 1 then. What is timed runs
alone, everything else several at a time. Every stage leaves the later ones their share of the time.
--cpu: what needs no GPU, in small, to see that this script works.
It runs in the repository with the Python that runs it, and installs nothing. benchmarks/README.md says more.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "python")]

import record  # noqa: E402

from dex.common import atomic, exits  # noqa: E402

STAGES = {"build": 3, "correct": 4, "compile": 2, "speed": 3, "sanitize": 2, "step": 2, "tiles": 1, "peers": 1}
"""Stage -> its share of the time, by value: what is left for it and the later ones is divided so. Nothing is compiled
while something is timed: `compile` runs before what is timed, several at a time."""

FULL = STAGES | {"recorded": 2, "test": 8, "bench": 10}

ALONE = ("build", "correct", "speed", "step", "tiles", "peers", "bench")
"""Stages whose parts run one at a time: one is built once, and what is timed must have the machine to itself."""

PYTEST = (
    *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfEs", "--tb=short"),
    "--continue-on-collection-errors",
)
MODULES = ("torch", "numpy", "triton", "pytest", "hypothesis", "safetensors", "setuptools", "pybind11")
BENCHMARKS = {
    "benchmarks/test_gpu_operators.py": (
        *("route", "group_ema", "align_loss", "grouped_mlp", "grouped_mlp_aligned"),
        "director_in_the_same_launches",
    ),
    "benchmarks/test_gpu_step.py": ("layer_step", "stack_of_layers", "training_step"),
}
CHOSEN = ("grouped_mlp_aligned", "grouped_mlp", "layer_step", "group_ema", "route", "align_loss")
"""Benchmarks of the stage `speed`, by value."""

PLAIN = ("--baseline", "expert loop by autograd", "--baseline", "grouped_mm + torch")
COMPILED = ("--baseline", "expert loop, compiled", "--baseline", "grouped_mm + torch, compiled")
LOG = "log.txt"
SANITIZER = "compute-sanitizer"
TAIL = 15
"""Lines of a failed part's output that are printed beside its log."""

GRACE = 15
"""Seconds in which a part whose time is over may still say what it has found."""

ENDING = threading.Event()
"""Set when this program is being ended: parts that run are stopped as if their time were over."""

WRITING = threading.Lock()
"""Held while a part's output goes to its stage's file, or is printed."""


class Part(NamedTuple):
    """One program of a stage. ``absent``: why it cannot run here."""

    stage: str
    name: str
    command: tuple = ()
    minutes: float = 3
    environment: dict = {}
    absent: str | None = None


class Outcome(NamedTuple):
    stage: str
    name: str
    state: str
    """ok, failed, timeout or skipped"""
    seconds: float
    detail: str
    """The last line of its output, or why it was skipped."""


def parts(stage: str, arguments: argparse.Namespace) -> list[Part]:
    return list(globals()[f"{stage}_parts"](arguments))


def build_parts(arguments) -> Iterator[Part]:
    """In place: nothing is installed. Without a GPU beside the tree, so that a library in use is left alone."""
    work = Path(tempfile.gettempdir()) / f"dexkernels-build-{os.getuid()}"
    setup = (sys.executable, "setup.py", "build_ext", "--build-temp", work)
    where = ("--build-lib", work / "lib") if arguments.cpu else ("--inplace",)
    nvcc = os.environ.get("CUDACXX") or _tool("nvcc")
    absent = None if nvcc else "no nvcc on PATH or in $CUDA_HOME/bin"
    yield Part("build", "native library", (*setup, *where), 5, {"DEX_CUDA": "1", "CUDACXX": nvcc or ""}, absent)


def correct_parts(arguments) -> Iterator[Part]:
    """Every operator against float64, and its times on ViT-B. The record is not the user's: the tree may change."""
    absent = "there is no GPU to verify" if arguments.cpu else None
    share = arguments.minutes * FULL["correct"] / sum(FULL[stage] for stage in arguments.stages)
    minutes = min(max(share - 2 * GRACE / 60, 0.5), 2.75)
    command = (sys.executable, "-m", "dex", "verify", "--share", arguments.out / "verified.json")
    record_folder = {"DEXKERNELS_CACHE": tempfile.mkdtemp(prefix="dexkernels-record-")}
    yield Part("correct", "dex verify", (*command, "--minutes", f"{minutes:.2f}"), 3.5, record_folder, absent)


def compile_parts(arguments) -> Iterator[Part]:
    """What `speed`, `step` and `peers` will time is checked and called once: Triton and Inductor keep what they
    compile."""
    for name in (*CHOSEN, "training_step"):
        yield Part("compile", name, _benchmark(name, arguments, once=True), 4)
    yield Part("compile", "compiled peers", _benchmark("grouped_mlp", arguments, COMPILED, once=True), 4)


def speed_parts(arguments) -> Iterator[Part]:
    for name in CHOSEN:
        yield Part("speed", name, _benchmark(name, arguments), 2)


def step_parts(arguments) -> Iterator[Part]:
    """Eager and as a CUDA graph; what the graph needs is refused by name where it is not there."""
    yield Part("step", "training step, eager and as a graph", _benchmark("training_step", arguments), 3)


def tiles_parts(arguments) -> Iterator[Part]:
    absent = "there is no GPU to time tiles on" if arguments.cpu else None
    yield Part("tiles", "six chosen tiles", (sys.executable, "scripts/tune.py", "--chosen"), 3, absent=absent)


def peers_parts(arguments) -> Iterator[Part]:
    yield Part("peers", "compiled peers", _benchmark("grouped_mlp", arguments, COMPILED), 3)


def _benchmark(name: str, arguments, baselines: tuple = PLAIN, once: bool = False) -> tuple:
    """One benchmark on ViT-B, in a Python of its own: after a fault in a kernel a process can use its GPU no more."""
    file = next(file for file, names in BENCHMARKS.items() if name in names)
    command = (*PYTEST, f"{file}::test_{name}", "--shape", "ViT-B", "--threads", "1", *baselines)
    if arguments.cpu:
        return (*command, "--tiny")
    results = ("--once",) if once else ("--results", arguments.out, "--commit", arguments.commit)
    return (*command, "--device", "cuda", *results)


def test_parts(arguments) -> Iterator[Part]:
    device = ("--device", "cpu" if arguments.cpu else "cuda")
    few = ("-k", "values or slots") if arguments.cpu else ()
    for backend in ("reference", "triton", "cuda"):
        # One Python each: the kernels are compiled or interpreted for a whole process.
        for name, files in _files("tests/dexkernels", arguments, apart=backend == "triton"):
            command = (*PYTEST, *files, *device, "--backend", backend, *few)
            yield Part("test", f"layer and operators, {backend}{name}", command, 4, *_needs(arguments, backend))
    environment, absent = _needs(arguments, "triton")
    for tiles in ("shipped", "small"):
        only = ("-k", "test_tiles" if tiles == "small" else "ties") if arguments.cpu else ()
        for name, files in _files("tests/kernels", arguments, apart=True):
            # What is compiled for no GPU in particular is seen once.
            if "test_compiled" not in name or tiles == "shipped":
                command = (*PYTEST, *files, *device, "--tiles", tiles, *only)
                yield Part("test", f"Triton kernels, {tiles} tiles{name}", command, 5, environment, absent)
    # Without a GPU the same is shown with fake tensors.
    yield Part("test", "training step, waits and graph", (*PYTEST, "tests/step"), 6)
    only = ("-k", "dex_cuda") if arguments.cpu else ()
    others = ("tests/native",) if arguments.cpu else ("tests/native", "tests/dex/data/test_augmentation.py")
    yield Part("test", "native library and augmentation", (*PYTEST, *others, *only), 3)


def _files(folder: str, arguments, apart: bool) -> list[tuple[str, list[str]]]:
    """What a part runs, and what its name says of that: the folder, or ``apart`` each of its files."""
    if arguments.cpu or not apart:
        return [("", [folder])]
    paths = [path.relative_to(ROOT / folder) for path in sorted((ROOT / folder).rglob("test_*.py"))]
    return [(f", {path.with_suffix('')}", [f"{folder}/{path}"]) for path in paths]


def recorded_parts(arguments) -> Iterator[Part]:
    cases = ROOT / "tests/recorded"
    if arguments.cpu:
        cases = Path(tempfile.mkdtemp(prefix="dexkernels-cases-"))
        shutil.copy(ROOT / "tests/recorded/layer_basic.safetensors", cases)
    program = (sys.executable, ROOT / "tests/recorded/conformance.py", cases, "--device", _device(arguments))
    for backend, dtype in (
        ("reference", "float64"),
        ("reference", "float32"),
        ("triton", "float32"),
        ("cuda", "float32"),
    ):
        command = (*program, "--dtype", dtype, "--backend", backend)
        yield Part("recorded", f"{backend}, {dtype}", command, 2, *_needs(arguments, backend))


def sanitize_parts(arguments) -> Iterator[Part]:
    """One case for each path, forward and backward, on small shapes."""
    sanitizer = _tool(SANITIZER)
    absent = None if sanitizer else f"no {SANITIZER} on PATH or in $CUDA_HOME/bin"
    if arguments.cpu:
        absent = absent or "there is no GPU to watch"
    # Each tensor in an allocation of its own: a cache hides what is read past its end.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    paths = {"gather path": "grouped_mlp", "aligned path": "grouped_mlp_aligned", "GEMA": "group_ema", "route": "route"}
    for tool in ("memcheck", "racecheck"):
        watch = (sanitizer, "--tool", tool, "--error-exitcode", "86", "--target-processes", "all")
        for path, name in paths.items():
            case = (
                f"benchmarks/test_gpu_operators.py::test_{name}",
                "--shape",
                "ViT-B",
                "--device",
                "cuda",
                "--tiny",
                *PLAIN,
            )
            yield Part("sanitize", f"{tool}, {path}", (*watch, *PYTEST, *case), 3, alone, absent)


def bench_parts(arguments) -> Iterator[Part]:
    if arguments.cpu:
        yield Part("bench", "tiny", (*PYTEST, *BENCHMARKS, "--threads", "1", "--tiny"), 2)
        return
    results = ("--device", "cuda", "--threads", "1", "--results", arguments.out, "--commit", arguments.commit)
    # One Python each, which adds its rows to the file: after a fault in a kernel a process can use its GPU no more.
    for file, names in BENCHMARKS.items():
        for name in names:
            yield Part("bench", name, (*PYTEST, f"{file}::test_{name}", *results), 8)


def _tool(name: str) -> str | None:
    """A program of the CUDA toolkit, whose folder is not always on PATH."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=os.path.join(home, "bin"))


def _device(arguments) -> str:
    return "cpu" if arguments.cpu else "cuda"


def _needs(arguments, backend: str) -> tuple[dict, str | None]:
    """The environment of a backend, and why it cannot run."""
    if not arguments.cpu or backend == "reference":
        return {}, None
    if backend == "cuda":
        return {}, "the cuda backend needs a GPU"
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('triton') is None)"
    there = subprocess.run([sys.executable, "-c", check]).returncode == 0
    return {"TRITON_INTERPRET": "1"}, None if there else "triton is not installed"


def run(part: Part, out: Path, deadline: float) -> Outcome:
    """Run to its end or its limit, and then with all it has started; its output goes to the stage's file at the end."""
    if part.absent:
        return Outcome(part.stage, part.name, "skipped", 0, part.absent)
    left = deadline - time.monotonic() - GRACE
    if left < 5:
        return Outcome(part.stage, part.name, "skipped", 0, "no time is left (--minutes)")
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        # cmake and ninja lie beside the Python that runs this, which need not be on PATH.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        # Of the plugins that happen to be installed none is needed, and any could take an option of ours.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        # Without it some versions of torch refuse matrix products while a test asks for deterministic algorithms.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        command = [str(word) for word in part.command]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | part.environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=exits.heed_interrupts,
        )
        code = _wait(process, min(60 * part.minutes, left))
        if code is None:
            _stop(process)
        file.seek(0)
        output = file.read()
    with WRITING, (out / LOG).open("a") as log:
        log.write(f"\n# {part.stage}: {part.name}\n$ {' '.join(command)}\n{output}")
    lines = [line for line in output.splitlines() if line.strip()]
    state = "timeout" if code is None else "ok" if code == 0 else "failed"
    detail = lines[-1].strip()[:200] if lines else "no output"
    if state == "failed":
        detail += f" (exit status {code})"
        with WRITING:
            print(*(line[:300] for line in lines[-TAIL:]), sep="\n")
    return Outcome(part.stage, part.name, state, round(time.monotonic() - began, 1), detail)


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Its exit status; None when its time is over, or when this program is being ended."""
    end = time.monotonic() + seconds
    while not ENDING.is_set() and (left := end - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(left, 0.5))
    return None


def _stop(process: subprocess.Popen) -> None:
    """End a part and all it has started; pytest, when interrupted, still says which tests have failed."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    # What it has started may have outlived it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_stage(stage: str, arguments, deadline: float) -> Iterator[Outcome]:
    """Outcomes as they come. A stage that runs out of its time leaves the later ones theirs."""
    later = sum(FULL[s] for s in arguments.stages[arguments.stages.index(stage) :])
    now = time.monotonic()
    deadline = now + (deadline - now) * FULL[stage] / later
    jobs = 1 if stage in ALONE else arguments.jobs
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, part, arguments.out, deadline) for part in parts(stage, arguments)]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BaseException:
            # Ended from outside: no part goes on alone, and what it has said so far is kept.
            ENDING.set()
            pool.shutdown(cancel_futures=True)
            raise


def about(arguments) -> dict:
    """What the summary says of the machine; a torch that does not import is a finding, not the end."""
    code = (
        "import json, torch; g = torch.cuda.is_available(); print(json.dumps({'torch': torch.__version__, "
        "'device': torch.cuda.get_device_name() if g else 'cpu', 'gpu': g}))"
    )
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return {
            "torch": (done.stderr.strip().splitlines() or ["does not import"])[-1],
            "device": "unknown",
            "gpu": False,
            "missing": missing,
        }
    return json.loads(done.stdout.splitlines()[-1]) | {"missing": missing}


def _end(number: int) -> None:
    sys.exit(128 + number)


def earlier_parts(arguments) -> list[dict]:
    """What the summary in OUT says of stages that are not run again."""
    try:
        parts = json.loads((arguments.out / "summary.json").read_text())["parts"]
        return [part for part in parts if part["stage"] not in arguments.stages]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def run_all(arguments, machine: dict) -> list[Outcome]:
    """Every stage, each outcome printed as it comes."""
    deadline = time.monotonic() + 60 * arguments.minutes
    outcomes, earlier = [], earlier_parts(arguments)
    for stage in arguments.stages:
        for outcome in run_stage(stage, arguments, deadline):
            outcomes.append(outcome)
            with WRITING:
                print("{:9} {:52} {:8}{:7.1f} s  {}".format(*outcome), flush=True)
            # Written after every part: what is known survives whatever ends this program.
            summary = {
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "python": platform.python_version(),
                "commit": arguments.commit,
                **machine,
                "parts": earlier + [outcome._asdict() for outcome in outcomes],
            }
            atomic.write(arguments.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build/gpu"))
    parser.add_argument("--full", action="store_true", help="also the recorded cases, all tests and all benchmarks")
    parser.add_argument("--stages", help=f"of {', '.join(FULL)} (default: up to peers)")
    parser.add_argument("--minutes", type=float, help="bound of the whole (default 14, with --full 60)")
    jobs = max(1, min(8, (os.cpu_count() or 2) // 2))
    parser.add_argument("--jobs", type=int, default=jobs, help=f"parts of a stage at a time (default {jobs})")
    parser.add_argument("--commit", help="hash of what is measured, where the tree is no clone")
    parser.add_argument("--cpu", "--dry", action="store_true", help="what can run without a GPU, in small")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.stages = arguments.stages.split(",") if arguments.stages else list(FULL if arguments.full else STAGES)
    if unknown := set(arguments.stages) - set(FULL):
        parser.error(f"--stages: expected some of {', '.join(FULL)}, got {', '.join(sorted(unknown))}")
    if arguments.minutes is None:
        arguments.minutes = 60 if arguments.full else 14
    if not arguments.minutes > 0:
        parser.error(f"--minutes: expected a number above 0, got {arguments.minutes}")
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {arguments.jobs}")
    arguments.commit = arguments.commit or record.commit()
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = about(arguments)
    if not arguments.cpu and not machine["gpu"]:
        print(f"gpu: no GPU that torch can use ({machine['torch']}); --cpu runs what needs none", file=sys.stderr)
        return 2
    if machine["missing"]:
        print(f"gpu: not installed: {', '.join(machine['missing'])}; what needs them fails", file=sys.stderr)
    if (
        {"speed", "step", "peers", "bench"} & {*arguments.stages}
        and not arguments.cpu
        and arguments.commit == "unknown"
    ):
        print("gpu: this is no clone: without --commit the results go to rejected.json", file=sys.stderr)
    with exits.handled(_end, (signal.SIGTERM,)):
        outcomes = run_all(arguments, machine)
    bad = [f"{o.stage} ({o.name})" for o in outcomes if o.state in ("failed", "timeout")]
    skipped = sum(o.state == "skipped" for o in outcomes)
    print(f"{len(outcomes) - len(bad) - skipped} of {len(outcomes)} parts ok, {skipped} skipped" +
          (f"; not ok: {', '.join(bad)}" if bad else ""))  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
