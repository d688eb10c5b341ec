"""The process that runs kernels for ``run.verify``: a crash or a hang costs one step, not the user's process.

It reads a line of JSON for each step and answers with another. ``python -m dexkernels.verification.worker`` starts it.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from ..ops import backends
from .cases import bound_of, bytes_needed, cases, compare, errors_of
from .record import Sizes
from .timing import Stopwatch

COMMAND = (sys.executable, "-P", "-m", "dexkernels.verification.worker")
TAIL = 300
"""Number of characters kept of an error, or of the last line of a process that ended."""


class Died(RuntimeError):
    """The process ended, or was killed at its time limit; the next step starts it again."""


class Worker:
    """``ask(step, seconds)`` returns the answer to a step. Use it as a context manager.

    stop: an event that kills the process within half a second.
    """

    def __init__(self, stop: threading.Event | None = None, command: tuple[str, ...] = COMMAND):
        self._command, self._stop = command, stop or threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, step: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Raises ``Died`` if there is no answer within ``seconds``, or the process ends."""
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(step) + "\n")
            self._process.stdin.flush()
            line = self._answer(time.monotonic() + seconds)
        except queue.Empty:
            self.end()
            raise Died(f"TimeoutError: no answer within {seconds:.0f} s") from None
        except OSError:
            line = None
        if line is None:
            code, last = self._process.wait(), self._last_words()
            self.end()
            raise Died(f"ProcessDied: exit status {code}{f', {last}' if last else ''}")
        return json.loads(line)

    def _answer(self, deadline: float) -> str | None:
        while True:
            left = 0.0 if self._stop.is_set() else max(deadline - time.monotonic(), 0.0)
            try:
                return self._lines.get(timeout=min(left, 0.5))
            except queue.Empty:
                if left <= 0.5:
                    raise

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._errors):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self._process = self._errors = None

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # This process handles Ctrl-C
        )
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_pass_on, args=(self._process.stdout, self._lines), daemon=True).start()

    def _last_words(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1][-TAIL:] if lines else ""


def _pass_on(stream: IO[str], lines: "queue.SimpleQueue[str | None]") -> None:
    with contextlib.suppress(ValueError, OSError):  # Closed while being read
        for line in stream:
            lines.put(line)
    lines.put(None)


# --- in the process ---------------------------------------------------------------------------------------------------


def check(op: str, backend: str, dtype: str, shapes: list[Sizes], device: torch.device) -> dict[str, Any]:
    """Check all cases of these shapes that the backend can compute, up to the first wrong one.

    Memory that a kernel does not write holds NaN. A backend that can compute none of the cases counts as absent.
    """
    real, error, plain, lacking = getattr(torch, dtype), None, None, ""
    lacks = backends.LIMITS[op].get(backend, {})
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for sizes in shapes:
            for case in cases(op, sizes, real, device):
                if case.feature in lacks:
                    lacking = f"no {case.feature}: {lacks[case.feature]}"
                    continue
                result = compare(case, backend, real)
                if result.problem:
                    errors = {"error": result.error, "plain_error": result.plain_error}
                    return {"state": "wrong", **errors, "detail": f"{sizes}: {result.problem}"}
                if error is None or result.error > error:
                    error, plain = result.error, result.plain_error
    finally:
        torch.use_deterministic_algorithms(False)
    if error is None and lacking:
        return {"state": "absent", "error": None, "plain_error": None, "detail": lacking}
    return {"state": "right", "error": error, "plain_error": plain, "detail": ""}


def timed(
    op: str, candidates: list[str], dtype: str, sizes: Sizes, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Time the backends that are also right at these sizes, with fewer images if memory is limited.

    Returns ``{"ms": {backend: ...}, "limit_ms": ..., "limit": ..., "wrong": {backend: ...}, "images": ...}``.
    """
    real = getattr(torch, dtype)
    if device.type == "cuda":
        sizes = fitting(sizes, torch.cuda.mem_get_info(device)[0])
    case = cases(op, sizes, real, device)[0]
    exact = case.exact()
    plain, wrong, right = errors_of(case.run("reference"), exact), {}, ["reference"]
    for backend in candidates:
        errors = errors_of(case.run(backend), exact)
        bounds = [bound_of(t, real, error) for t, error in zip(exact, plain, strict=True)]
        if all(error <= bound for error, bound in zip(errors, bounds, strict=True)):
            right.append(backend)
        else:
            wrong[backend] = f"{sizes}: errors {', '.join(f'{e:.2g}' for e in errors)}"
    del exact
    watch = Stopwatch(device, rounds=rounds, warmup=max(rounds // 5, 1), flush_bytes=0)
    calls: dict[str, Callable[[int], object]] = {b: lambda i, b=b: case.timed(b) for b in right}
    ms = watch.medians(calls | {"limit": lambda i: case.limit()})
    limit = ms.pop("limit")
    return {"ms": ms, "limit_ms": limit, "limit": case.limit_name, "wrong": wrong, "images": sizes.images}


def fitting(sizes: Sizes, num_bytes: int) -> Sizes:
    """``sizes`` with as many images as fit into memory with their float64 results, at least one."""
    while sizes.images > 1 and bytes_needed(sizes) > 0.9 * num_bytes:
        sizes = sizes._replace(images=sizes.images // 2)
    return sizes


def answer(step: dict[str, Any]) -> dict[str, Any]:
    device = torch.device(step["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        if step["kind"] == "check":
            shapes = [Sizes(*sizes) for sizes in step["shapes"]]
            return check(step["op"], step["backend"], step["dtype"], shapes, device)
        sizes = Sizes(*step["sizes"])
        return timed(step["op"], step["backends"], step["dtype"], sizes, device, step["rounds"])
    except Exception as error:
        fatal = "CUDA error" in str(error) or isinstance(error, torch.cuda.CudaError)
        text = " ".join(f"{type(error).__name__}: {error}".split())[:TAIL]
        return {"failed": text, "fatal": fatal}


def main() -> None:
    """Answer until the input ends. Output of libraries goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        began = time.monotonic()
        result = answer(json.loads(line))
        print(json.dumps(result | {"seconds": round(time.monotonic() - began, 2)}), file=answers, flush=True)
        if result.get("fatal"):  # This process can no longer use its GPU
            os._exit(1)


if __name__ == "__main__":
    main()
