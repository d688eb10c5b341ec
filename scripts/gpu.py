#!/usr/bin/env python3
"""Everything that needs a GPU, in one command: build, tests, recorded cases, sanitizer, benchmark. Without a network.

usage: python scripts/gpu.py [OUT] [--stages build,test,...] [--minutes M] [--commit HASH] [--cpu]
OUT: folder for a log per stage, summary.json and the results file (default: the variable OUT, else build/gpu).
A part that fails, or runs out of its time, is named and the rest goes on; the exit status is 1 then.
--cpu: what needs no GPU, in small, to see that this script works.
It runs in the repository with the Python that runs it, and installs nothing. benchmarks/README.md says more.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("build", "test", "recorded", "sanitize", "bench")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs")
SANITIZER = "compute-sanitizer"
TAIL = 15
"""Lines of a failed part's output that are printed beside its log."""


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


def parts(arguments: argparse.Namespace) -> Iterator[Part]:
    for stage in STAGES:
        if stage in arguments.stages:
            yield from globals()[f"{stage}_parts"](arguments)


def build_parts(arguments) -> Iterator[Part]:
    """In place: nothing is installed. Without a GPU beside the tree, so that a library in use is left alone."""
    work = Path(tempfile.gettempdir()) / f"dexkernels-build-{os.getuid()}"
    setup = (sys.executable, "setup.py", "build_ext", "--build-temp", work)
    where = ("--build-lib", work / "lib") if arguments.cpu else ("--inplace",)
    absent = None if shutil.which("nvcc") or os.environ.get("CUDACXX") else "no nvcc on PATH"
    yield Part("build", "native library", (*setup, *where), 5, {"DEX_CUDA": "1"}, absent)


def test_parts(arguments) -> Iterator[Part]:
    device = ("--device", "cpu" if arguments.cpu else "cuda")
    few = ("-k", "values or slots") if arguments.cpu else ()
    for backend in ("reference", "triton", "cuda"):
        # One Python each: the kernels are compiled or interpreted for a whole process.
        command = (*PYTEST, "tests/dexkernels", *device, "--backend", backend, *few)
        yield Part("test", f"layer and operators, {backend}", command, 4, *_needs(arguments, backend))
    environment, absent = _needs(arguments, "triton")
    for tiles in ("small", "shipped"):
        only = ("-k", "test_tiles" if tiles == "small" else "ties") if arguments.cpu else ()
        # The aligned path has a part of its own; what is compiled for no GPU in particular is seen once.
        elsewhere = ["tests/kernels/test_aligned.py"] + ["tests/kernels/test_compiled.py"] * (tiles == "small")
        ignored = (f"--ignore={path}" for path in elsewhere)
        command = (*PYTEST, "tests/kernels", *ignored, *device, "--tiles", tiles, *only)
        yield Part("test", f"Triton kernels, {tiles} tiles", command, 5, environment, absent)
        only = ("-k", "inverted or taken") if arguments.cpu else ()
        command = (*PYTEST, "tests/kernels/test_aligned.py", *device, "--tiles", tiles, *only)
        yield Part("test", f"Triton aligned path, {tiles} tiles", command, 3, environment, absent)
    only = ("-k", "why_not") if arguments.cpu else ()
    others = ("tests/native",) if arguments.cpu else ("tests/native", "tests/data/test_data_augmentation.py")
    yield Part("test", "native library and augmentation", (*PYTEST, *others, *only), 3)


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
    """Every operator forward and backward, on the small shapes of the benchmark."""
    absent = None if shutil.which(SANITIZER) else f"no {SANITIZER} on PATH"
    if arguments.cpu:
        absent = absent or "there is no GPU to watch"
    for tool in ("memcheck", "racecheck"):
        watch = (SANITIZER, "--tool", tool, "--error-exitcode", "86", "--target-processes", "all")
        # torch.mm and its like are not ours; dense products are among the baselines, but are right anyway.
        run = (*PYTEST, "benchmarks/test_gpu_operators.py", "--device", "cuda", "--tiny")
        # Each tensor in an allocation of its own: a cache hides what is read past its end.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield Part("sanitize", tool, (*watch, *run), 5, alone, absent)


def bench_parts(arguments) -> Iterator[Part]:
    command = (*PYTEST, "benchmarks/test_gpu_operators.py", "--threads", "1")
    if arguments.cpu:
        yield Part("bench", "tiny", (*command, "--tiny"), 2)
        return
    commit = ("--commit", arguments.commit) if arguments.commit else ()
    yield Part("bench", "operators and layer", (*command, "--device", "cuda", "--results", arguments.out, *commit), 6)


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
    """Run to its end or its limit, and then with all it has started; its output goes to a file."""
    if part.absent:
        return Outcome(part.stage, part.name, "skipped", 0, part.absent)
    left = deadline - time.monotonic()
    if left < 5:
        return Outcome(part.stage, part.name, "skipped", 0, "no time is left (--minutes)")
    limit = min(60 * part.minutes, left)
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"} | part.environment
    log = out / f"{part.stage}.log"
    began = time.monotonic()
    with log.open("a") as file:
        command = [str(word) for word in part.command]
        file.write(f"\n# {part.name}\n$ {' '.join(command)}\n")
        file.flush()
        start = file.tell()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with log.open(errors="replace") as file:
        file.seek(start)
        lines = [line for line in file.read().splitlines() if line.strip()]
    state = "timeout" if code is None else "ok" if code == 0 else "failed"
    detail = lines[-1].strip()[:200] if lines else "no output"
    if state == "failed":
        detail += f" (exit status {code})"
        print(*(line[:300] for line in lines[-TAIL:]), sep="\n")
    return Outcome(part.stage, part.name, state, round(time.monotonic() - began, 1), detail)


def about(arguments) -> dict:
    """What the summary says of the machine; a torch that does not import is a finding, not the end."""
    code = (
        "import json, torch; g = torch.cuda.is_available(); print(json.dumps({'torch': torch.__version__, "
        "'device': torch.cuda.get_device_name() if g else 'cpu', 'gpu': g}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return {
            "torch": (done.stderr.strip().splitlines() or ["does not import"])[-1],
            "device": "unknown",
            "gpu": False,
        }
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build/gpu"))
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)} (default all)")
    parser.add_argument("--minutes", type=float, default=30, help="bound of the whole (default 30)")
    parser.add_argument("--commit", help="hash of what is measured, where the tree is no clone")
    parser.add_argument("--cpu", "--dry", action="store_true", help="what can run without a GPU, in small")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.stages = arguments.stages.split(",")
    if unknown := set(arguments.stages) - set(STAGES):
        parser.error(f"--stages: expected some of {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = about(arguments)
    if not arguments.cpu and not machine["gpu"]:
        print(f"gpu: no GPU that torch can use ({machine['torch']}); --cpu runs what needs none", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * arguments.minutes
    outcomes = []
    for stage in arguments.stages:
        (arguments.out / f"{stage}.log").unlink(missing_ok=True)
    for part in parts(arguments):
        outcomes.append(run(part, arguments.out, deadline))
        print("{:9} {:34} {:8}{:7.1f} s  {}".format(*outcomes[-1]), flush=True)
        # Written after every part: what is known survives whatever ends this program.
        summary = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "commit": arguments.commit,
            **machine,
            "parts": [outcome._asdict() for outcome in outcomes],
        }
        (arguments.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    bad = [f"{o.stage} ({o.name})" for o in outcomes if o.state in ("failed", "timeout")]
    skipped = sum(o.state == "skipped" for o in outcomes)
    print(f"{len(outcomes) - len(bad) - skipped} of {len(outcomes)} parts ok, {skipped} skipped" +
          (f"; not ok: {', '.join(bad)}" if bad else ""))  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
