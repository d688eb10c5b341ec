"""`verify`: proves the kernels on this GPU, times them, and keeps what it learns."""

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
"""A verification's time, after which what is left counts as not tried; with its start it stays under three minutes."""

STEP_SECONDS = 75.0
"""Of one step, compiling included: a kernel that hangs must leave the others theirs."""

CHECKING = 0.7
"""Share of the time that checks may take: what is right must also be timed, or it is not used."""

ROUNDS = 20
"""How often each candidate is timed."""

JOBS = max(1, min(6, (os.cpu_count() or 2) // 2))
"""Processes that check at a time."""

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
    """Compare every kernel with float64 on this GPU, time it, and from then on use the fastest that is right.

    Every operator, forward and backward, in each dtype, on small and odd shapes: at most twice plain torch's error, and
    the same bits when repeated. Then at ``sizes``, against plain torch and a limit (the bare matrix products, or a copy
    of as many bytes). Kernels run in a process of their own. The record holds for this GPU, driver, torch, Triton and
    kernel sources; every later process takes its backends from it, `Record.choices`.

    Args:
        sizes: of the layer that is timed; None: ViT-B with 224 images of 65 tokens, 8 experts of which 2 are chosen.
        device: a CUDA device, the current one when None. The CPU with TRITON_INTERPRET=1, to try this without a GPU.
        seconds: after which what is left is not tried.
        say: called with a line of text for each step.
        keep: whether to write the record into the cache; this process uses it in any case.
        stop: once it is set, what is left is not tried, and nothing is kept.

    Returns: the record; `Record.wrong` has what must not be. Raises: ValueError naming the argument.
    """
    sizes = sizes_checked((sizes or Sizes())._asdict())
    where = check_device(device)
    if not seconds > 0:
        raise ValueError(f"seconds: expected a number above 0, got {seconds!r}")
    who = identity(where)
    with record.alone(who) if keep else contextlib.nullcontext():
        bounds = _Bounds(where, time.monotonic() + seconds, seconds, stop or threading.Event())
        found = _found(who, sizes, bounds, say)
        earlier, _ = record.load(who)
        found = found.with_times_of(earlier)
        if keep and not bounds.stop.is_set():
            try:
                say(f"record: {record.write(found)}")
            except OSError as error:
                say(
                    f"the record was not kept, so it holds for this process alone: {error}. Set {record.FOLDER} to a "
                    "folder that can be written"
                )
    if where.type == "cuda":
        choice.use(found.choices(sizes), where)
    return found


def check_device(device: torch.device | str | None) -> torch.device:
    """Raises ValueError where nothing can be verified."""
    try:
        where = torch.device("cuda" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected a CUDA device, got {device!r}") from error
    if where.type == "cpu" and backends.why_not("route", "triton") is None and not torch.cuda.is_available():
        return where
    if where.type != "cuda":
        raise ValueError(f"device: expected a CUDA device, got {where}: on a CPU plain torch always computes")
    if not torch.cuda.is_available():
        raise ValueError(
            "device: expected a CUDA device; torch finds none. A CPU needs no record: plain torch computes"
        )
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


def _found(who: Identity, sizes: Sizes, bounds: _Bounds, say: Say) -> Record:
    began = time.monotonic()
    say(f"verifying the kernels on {who}; at most {bounds.seconds:.0f} s")
    checks = _checks(bounds._replace(deadline=began + CHECKING * bounds.seconds), say)
    times, wrong = _times(checks, sizes, bounds, say)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Record(who, today, round(time.monotonic() - began, 1), (sizes,), (*checks, *wrong), times)


class _Part(NamedTuple):
    """What one step checks: a backend of an operator in one dtype, on some of the shapes."""

    op: str
    backend: str
    dtype: str
    shapes: tuple[Sizes, ...]


def _parts() -> tuple[list[Check], list[_Part]]:
    """What cannot run here, and what is to be checked: first what training computes in, and what compiles longest."""
    absent, parts = [], []
    for op, backend, dtype in itertools.product(sorted(DTYPES, key=_longest), backends.BACKENDS, _ORDER):
        if backend not in backends.TABLES[op] or dtype not in DTYPES[op]:
            continue
        if reason := backends.why_not(op, backend):
            absent.append(Check(op, backend, name_of(dtype), "absent", None, None, reason))
            continue
        # Of Triton most of the time goes into compiling, by shapes: each compiles in a process of its own.
        groups = [(shape,) for shape in SMALL] if backend == "triton" else [SMALL]
        parts += [_Part(op, backend, name_of(dtype), shapes) for shapes in groups]
    return absent, sorted(parts, key=lambda part: _ORDER.index(getattr(torch, part.dtype)))


_ORDER = (torch.bfloat16, torch.float32, torch.float16)


def _longest(op: str) -> int:
    return ("grouped_mlp", "route", "align_loss", "adamw_ema_", "group_ema_").index(op)


def _checks(bounds: _Bounds, say: Say) -> list[Check]:
    """Of all operators, backends and dtypes; several processes at a time, since most of the time is compiling."""
    checks, parts = _parts()
    of_key: dict[tuple[str, ...], list[Check]] = {}
    wanted = Counter(part[:3] for part in parts)
    left, lock = deque(parts), threading.Lock()

    def work() -> None:
        with Worker(bounds.stop) as worker:
            while True:
                with lock:
                    if not left:
                        return
                    part = left.popleft()
                found = _checked(worker, part, bounds)
                with lock:
                    done = of_key.setdefault(part[:3], [])
                    done.append(found)
                    if len(done) == wanted[part[:3]]:
                        say(_line(_merged(done)))

    for check in checks:
        say(_line(check))
    with ThreadPoolExecutor(min(JOBS, len(parts))) as pool:
        for future in [pool.submit(work) for _ in range(min(JOBS, len(parts)))]:
            future.result()
    return checks + [_merged(done) for done in of_key.values()]


def _checked(worker: Worker, part: _Part, bounds: _Bounds) -> Check:
    shapes = [list(sizes) for sizes in part.shapes]
    result = bounds.ask(worker, kind="check", op=part.op, backend=part.backend, dtype=part.dtype, shapes=shapes)
    if "failed" in result:
        return Check(*part[:3], "no time" if result.get("late") else "failed", None, None, result["failed"])
    return Check(*part[:3], *(result[name] for name in ("state", "error", "plain_error", "detail")))


def _merged(checks: list[Check]) -> Check:
    """The one that is not right, if there is any; else the one of the largest error."""
    return max(checks, key=lambda c: (c.state in ("wrong", "failed"), c.state != "right", c.error or 0.0))


def _times(checks: list[Check], sizes: Sizes, bounds: _Bounds, say: Say) -> tuple[tuple[Timing, ...], list[Check]]:
    """Of everything that is right, one at a time; and what is wrong at these sizes after all."""
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
                say(f"  {op} {dtype}: timed with {result['images']} images, for the memory")
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


def summary(found: Record, sizes: Sizes | None = None) -> Iterator[str]:
    """What follows from a record, and what to do where a result is wrong."""
    choices = found.choices(sizes)
    for (op, dtype), backend in sorted(choices.items()):
        yield f"{op} in {dtype}: {backend}"
    yield "everything else: plain torch" if choices else "plain torch everywhere: no kernel was right and faster"
    if wrong := found.wrong():
        names = ", ".join(dict.fromkeys(f"{c.op} {c.backend} {c.dtype}" for c in wrong))
        yield (
            f"WRONG OR FAILED: {names}. Plain torch computes these instead. Please report it: run `dex verify --share "
            "FILE` and open an issue with FILE, which holds no paths and no names, the text above, and the output of "
            "`dex doctor`"
        )
