"""``verify`` proves the kernels on this GPU, times them and writes a record."""

import contextlib
import datetime
import itertools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from ..ops import backends
from . import choice, record
from .cases import DTYPES, SMALL, sizes_checked
from .choice import name_of
from .identity import Identity, identity
from .record import Check, Record, Sizes, Timing
from .worker import Died, Worker

SECONDS = 165.0
"""Time limit of a verification: under three minutes with its start. Later checks count as not tried."""

STEP_SECONDS = 75.0
"""Time limit of one step, with compiling, so that a kernel that hangs leaves time for the others."""

CHECKING = 0.7
"""Share of the time for checks. The rest is for timing, since a backend without a time is not used."""

ROUNDS = 20
"""Number of times each candidate is timed."""

JOBS = max(1, min(6, (os.cpu_count() or 2) // 2))
"""Number of processes that check at the same time."""

Say = Callable[[str], object]


def verify(
    sizes: Sizes | None = None,
    *,
    device: torch.device | str | None = None,
    seconds: float = SECONDS,
    say: Say = print,
    keep: bool = True,
    stop: threading.Event | None = None,
) -> Record:
    """Compare every kernel with float64 on this GPU, time it, and use the fastest correct one from then on.

    Every operator is checked forward and backward in each dtype on small and odd shapes: its error may be at most twice
    plain torch's, and a second run must give the same bits. Then it is timed at ``sizes``, against plain torch and a
    limit (the bare matrix products, or a copy of the same number of bytes). Kernels run in separate processes. The
    record is valid for this GPU, driver, torch, Triton and kernel sources; later processes take their backends from it
    (``Record.choices``).

    Args:
        sizes: sizes of the timed layer; None: ViT-B, 224 images of 65 tokens, 8 experts of which 2 are chosen.
        device: a CUDA device; None: the current one. With TRITON_INTERPRET=1 it can be the CPU, to try this without a
            GPU.
        seconds: time limit; the remaining checks and timings are not tried.
        say: called with a line of text for each step.
        keep: write the record into the cache; this process uses it in either case.
        stop: an event that ends the verification early; nothing is written then.

    Returns:
        The record; ``Record.wrong`` lists faults.

    Raises:
        ValueError: names the argument.
    """
    sizes = sizes_checked((sizes or Sizes())._asdict())
    where = check_device(device)
    if not seconds > 0:
        raise ValueError(f"seconds: expected a number above 0, got {seconds!r}")
    machine = identity(where)
    with record.alone(machine) if keep else contextlib.nullcontext():
        bounds = _Bounds(where, time.monotonic() + seconds, seconds, stop or threading.Event())
        earlier = record.load(machine)[0]
        result = _verified(machine, sizes, bounds, say).with_times_of(earlier)
        if keep and not bounds.stop.is_set():
            try:
                say(f"record: {record.write(result)}")
            except OSError as error:
                say(
                    f"the record was not kept; only this process uses it: {error}. Set {record.FOLDER} to a writable "
                    "folder"
                )
    if where.type == "cuda":
        choice.use(result.choices(sizes), where)
    return result


def check_device(device: torch.device | str | None) -> torch.device:
    """The device to verify. Raises ValueError if it is not a CUDA device here."""
    try:
        where = torch.device("cuda" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected a CUDA device, got {device!r}") from error
    if where.type == "cpu" and backends.why_not("route", "triton") is None and not torch.cuda.is_available():
        return where
    if where.type != "cuda":
        raise ValueError(f"device: expected a CUDA device, got {where}; a CPU always uses plain torch")
    if not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device, got none (torch finds no GPU); a CPU always uses plain torch")
    if where.index is not None and where.index >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of the {torch.cuda.device_count()} CUDA devices here, got {where}")
    return torch.device("cuda", torch.cuda.current_device() if where.index is None else where.index)


class _Bounds(NamedTuple):
    """Where a verification runs, and when it ends."""

    device: torch.device
    deadline: float
    seconds: float
    stop: threading.Event

    def ask(self, worker: Worker, **step: Any) -> dict[str, Any]:
        left = self.deadline - time.monotonic()
        if left <= 0 or self.stop.is_set():
            return {"failed": "there was no time left", "late": True}
        try:
            return worker.ask(step | {"device": str(self.device)}, min(left, STEP_SECONDS))
        except Died as error:
            return {"failed": str(error), "late": self.stop.is_set() or time.monotonic() >= self.deadline}


def _verified(machine: Identity, sizes: Sizes, bounds: _Bounds, say: Say) -> Record:
    began = time.monotonic()
    say(f"verifying the kernels on {machine}; at most {bounds.seconds:.0f} s")
    checks = _checks(bounds._replace(deadline=began + CHECKING * bounds.seconds), say)
    times, wrong = _times(checks, sizes, bounds, say)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Record(machine, today, round(time.monotonic() - began, 1), (sizes,), (*checks, *wrong), times)


class _Part(NamedTuple):
    """One step of checking: a backend of an operator in one dtype, on some of the shapes."""

    op: str
    backend: str
    dtype: str
    shapes: tuple[Sizes, ...]


def _parts() -> tuple[list[Check], list[_Part]]:
    """The backends that cannot run here, and the parts to check: training's dtype and long compilations first."""
    absent, parts = [], []
    for op, backend, dtype in itertools.product(sorted(DTYPES, key=_longest), backends.BACKENDS, _ORDER):
        if backend not in backends.TABLES[op] or dtype not in DTYPES[op]:
            continue
        if reason := backends.why_not(op, backend):
            absent.append(Check(op, backend, name_of(dtype), "absent", None, None, reason))
            continue
        # Triton mostly compiles, for each shape anew, so the shapes are separate parts that can run in parallel.
        groups = [(shape,) for shape in SMALL] if backend == "triton" else [SMALL]
        parts += [_Part(op, backend, name_of(dtype), shapes) for shapes in groups]
    return absent, sorted(parts, key=lambda part: _ORDER.index(getattr(torch, part.dtype)))


_ORDER = (torch.bfloat16, torch.float32, torch.float16)


def _longest(op: str) -> int:
    return ("grouped_mlp", "route", "align_loss", "adamw_ema_", "group_ema_").index(op)


def _checks(bounds: _Bounds, say: Say) -> list[Check]:
    """Check all operators, backends and dtypes in several processes, since most of the time is compiling."""
    checks, parts = _parts()
    checks_of: dict[tuple[str, ...], list[Check]] = {}
    number_of_parts = Counter(part[:3] for part in parts)
    remaining, lock = deque(parts), threading.Lock()

    def work() -> None:
        with Worker(bounds.stop) as worker:
            while True:
                with lock:
                    if not remaining:
                        return
                    part = remaining.popleft()
                check = _checked(worker, part, bounds)
                with lock:
                    done = checks_of.setdefault(part[:3], [])
                    done.append(check)
                    if len(done) == number_of_parts[part[:3]]:
                        say(_line(_merged(done)))

    for check in checks:
        say(_line(check))
    with ThreadPoolExecutor(min(JOBS, len(parts))) as pool:
        for future in [pool.submit(work) for _ in range(min(JOBS, len(parts)))]:
            future.result()
    return checks + [_merged(done) for done in checks_of.values()]


def _checked(worker: Worker, part: _Part, bounds: _Bounds) -> Check:
    shapes = [list(sizes) for sizes in part.shapes]
    result = bounds.ask(worker, kind="check", op=part.op, backend=part.backend, dtype=part.dtype, shapes=shapes)
    if "failed" in result:
        return Check(*part[:3], "no time" if result.get("late") else "failed", None, None, result["failed"])
    return Check(*part[:3], *(result[name] for name in ("state", "error", "plain_error", "detail")))


def _merged(checks: list[Check]) -> Check:
    """The check of a fault if there is any, else one that is not right, else the one with the largest error."""
    return max(checks, key=lambda c: (c.state in ("wrong", "failed"), c.state != "right", c.error or 0.0))


def _times(checks: list[Check], sizes: Sizes, bounds: _Bounds, say: Say) -> tuple[tuple[Timing, ...], list[Check]]:
    """Time everything that is right, one at a time. Also returns the checks that fail at these sizes."""
    times, wrong = [], []
    with Worker(bounds.stop) as worker:
        for dtype, op in itertools.product(map(name_of, _ORDER), sorted(DTYPES, key=_longest)):
            right = [c.backend for c in checks if (c.op, c.dtype, c.state) == (op, dtype, "right")]
            candidates = [backend for backend in right if backend != "reference"]
            if "reference" not in right or not candidates:
                continue
            step = {"op": op, "backends": candidates, "dtype": dtype, "sizes": list(sizes), "rounds": ROUNDS}
            result = bounds.ask(worker, kind="time", **step)
            if "failed" in result:
                say(f"  {op} {dtype}: not timed at {sizes}: {result['failed']}")
                if not result.get("late"):
                    reason = f"{result['failed']} at {sizes}"
                    wrong += [Check(op, backend, dtype, "failed", None, None, reason) for backend in candidates]
                continue
            for backend, problem in result["wrong"].items():
                wrong.append(Check(op, backend, dtype, "wrong", None, None, problem))
                say(_line(wrong[-1]))
            if result["images"] < sizes.images:
                say(f"  {op} {dtype}: timed with {result['images']} images, since memory is limited")
            plain = result["ms"].pop("reference")
            for backend, ms in result["ms"].items():
                times.append(Timing(op, backend, dtype, sizes, ms, plain, result["limit_ms"], result["limit"]))
                say(_time_line(times[-1]))
    return tuple(times), wrong


def _line(check: Check) -> str:
    error = "" if check.error is None else f", error {check.error:.1e} (plain torch {check.plain_error or 0:.1e})"
    detail = f": {check.detail}" if check.detail else ""
    return f"  {check.op} {check.backend} {check.dtype}: {check.state}{error}{detail}"


def _time_line(timing: Timing) -> str:
    return (
        f"  {timing.op} {timing.backend} {timing.dtype}: {timing.ms:.3f} ms, plain torch {timing.plain_ms:.3f} ms "
        f"({timing.ratio:.2f} times as fast), {timing.limit} {timing.limit_ms:.3f} ms"
    )


def summary(record: Record, sizes: Sizes | None = None) -> Iterator[str]:
    """Lines about a record: the choices, and what to do if a result is wrong."""
    choices = record.choices(sizes)
    for (op, dtype), backend in sorted(choices.items()):
        yield f"{op} in {dtype}: {backend}"
    yield "everything else: plain torch" if choices else "plain torch everywhere: no kernel was right and faster"
    if wrong := record.wrong():
        names = ", ".join(dict.fromkeys(f"{c.op} {c.backend} {c.dtype}" for c in wrong))
        yield (
            f"WRONG OR FAILED: {names}. Plain torch is used instead. Please report it: run `dex verify --share FILE` "
            "and open an issue with FILE (it contains no paths or names), the text above, and the output of `dex "
            "doctor`"
        )
