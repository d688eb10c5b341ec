"""The result of a verification, and its file: one JSON per ``Identity`` in the user's cache folder."""

import contextlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from .identity import Identity

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = "dexkernels verification"
VERSION = 1
FOLDER = "DEXKERNELS_CACHE"
"""Environment variable with the folder of the records."""

FASTER = 1.02
"""A backend must be this many times as fast as plain torch; smaller differences are noise of the clock."""

KEPT_SHAPES = 8
"""Number of shapes whose times a record keeps, the newest ones."""

State = Literal["right", "wrong", "failed", "absent", "no time"]
"""``failed``: it raised, or its process ended. ``absent``: it cannot run here. ``no time``: it was not tried."""


class Sizes(NamedTuple):
    """Sizes of a layer and its batch."""

    images: int = 224
    """B"""
    tokens: int = 65
    """N, with the CLS token; 1 if tokens are routed individually, each as an image."""
    dim: int = 768
    """D"""
    hidden_dim: int = 3072
    """H"""
    num_experts: int = 8
    """E"""
    top_k: int = 2
    """K"""

    def __str__(self) -> str:
        return ", ".join(f"{letter} {size}" for letter, size in zip("BNDHEK", self, strict=True))


class Check(NamedTuple):
    """Whether a backend's results of an operator, forward and backward, agree with float64."""

    op: str
    backend: str
    dtype: str
    state: State
    error: float | None
    """The largest relative error of all results; None if one was not finite, or there was none."""
    plain_error: float | None
    """Plain torch's error of the same result in the same dtype."""
    detail: str
    """What was wrong, or why it was not tried; else empty."""


class Timing(NamedTuple):
    """Milliseconds of an operator, forward and backward: medians of candidates that took turns."""

    op: str
    backend: str
    dtype: str
    sizes: Sizes
    ms: float
    plain_ms: float
    limit_ms: float
    limit: str
    """What the limit is: the bare matrix products, or a copy of the same number of bytes."""

    @property
    def ratio(self) -> float:
        """How many times as fast as plain torch."""
        return self.plain_ms / self.ms


Choices = dict[tuple[str, str], str]
"""(operator, dtype) -> backend; plain torch computes everything else."""


class Record(NamedTuple):
    identity: Identity
    date: str
    seconds: float
    sizes: tuple[Sizes, ...]
    """The timed sizes, the newest last."""
    checks: tuple[Check, ...]
    times: tuple[Timing, ...]

    def choices(self, sizes: Sizes | None = None) -> Choices:
        """For every operator and dtype the fastest proven backend.

        It was right in every check and is at least ``FASTER`` times as fast as plain torch at ``sizes`` (None: the
        newest).
        """
        sizes = sizes or self.sizes[-1]
        states: dict[tuple[str, str, str], set[State]] = {}
        for check in self.checks:
            states.setdefault(check[:3], set()).add(check.state)
        best: dict[tuple[str, str], Timing] = {}
        for timing in self.times:
            right = states.get(timing[:3]) == {"right"}
            if timing.sizes != sizes or timing.backend == "reference" or not right or timing.ratio < FASTER:
                continue
            key = timing.op, timing.dtype
            best[key] = min(best.get(key, timing), timing, key=lambda t: t.ms)
        return {key: timing.backend for key, timing in best.items()}

    def states(self, op: str, backend: str) -> str:
        """``bfloat16 right, 1.80 times as fast as plain torch; float16 wrong`` at the newest sizes."""
        ratios = {t[:3]: t.ratio for t in self.times if t.sizes == self.sizes[-1]}
        texts = []
        for check in (c for c in self.checks if (c.op, c.backend) == (op, backend)):
            ratio = ratios.get(check[:3]) if check.state == "right" else None
            speed = f", {ratio:.2f} times as fast as plain torch" if ratio else ""
            texts.append(f"{check.dtype} {check.state}{speed}")
        return "; ".join(texts)

    def wrong(self) -> list[Check]:
        """Faults: wrong results, and kernels that fail although they can run here."""
        return [check for check in self.checks if check.state in ("wrong", "failed")]

    def with_times_of(self, earlier: "Record | None") -> "Record":
        """This record, with the times that an earlier record of the same identity has of other sizes."""
        if earlier is None or earlier.identity != self.identity:
            return self
        kept = [sizes for sizes in earlier.sizes if sizes not in self.sizes][1 - KEPT_SHAPES :]
        times = [t for t in earlier.times if t.sizes in kept]
        return self._replace(sizes=(*kept, *self.sizes), times=(*times, *self.times))


def common(tables: Iterable[Choices]) -> Choices:
    """The choices that all tables share. With different kernels, the directors of different ranks would diverge."""
    first, *others = tables
    return {key: backend for key, backend in first.items() if all(t.get(key) == backend for t in others)}


# --- as text ----------------------------------------------------------------------------------------------------------


def to_json(record: Record) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "identity": record.identity._asdict(),
        "date": record.date,
        "seconds": record.seconds,
        "sizes": [sizes._asdict() for sizes in record.sizes],
        "checks": [check._asdict() for check in record.checks],
        "times": [timing._asdict() | {"sizes": timing.sizes._asdict()} for timing in record.times],
    }


def from_json(value: Any) -> Record:
    """Raises ValueError if ``value`` is not a record of this version."""
    value = _fields("record", value, ("format", "version", "identity", "date", "seconds", "sizes", "checks", "times"))
    if (value["format"], value["version"]) != (FORMAT, VERSION):
        got = f"{value['format']!r}, version {value['version']!r}"
        raise ValueError(f"format: expected {FORMAT!r}, version {VERSION}, got {got:.80}")
    identity = Identity(**_typed("identity", value["identity"], Identity))
    if not all(isinstance(value[name], list) for name in ("sizes", "checks", "times")) or not value["sizes"]:
        raise ValueError("sizes, checks, times: expected lists, with at least one size")
    shapes = [Sizes(**_typed(f"sizes[{i}]", sizes, Sizes)) for i, sizes in enumerate(value["sizes"])]
    checks = [Check(**_typed(f"checks[{i}]", check, Check)) for i, check in enumerate(value["checks"])]
    times = []
    for i, timing in enumerate(value["times"]):
        fields = dict(_fields(f"times[{i}]", timing, Timing._fields))
        sizes = Sizes(**_typed(f"times[{i}].sizes", fields.pop("sizes"), Sizes))
        times.append(Timing(**_typed(f"times[{i}]", fields | {"sizes": None}, Timing) | {"sizes": sizes}))
    _check("date", value["date"], str)
    _check("seconds", value["seconds"], float)
    return Record(identity, value["date"], value["seconds"], tuple(shapes), tuple(checks), tuple(times))


def _fields(name: str, value: Any, fields: Iterable[str]) -> dict[str, Any]:
    fields = tuple(fields)
    if not isinstance(value, dict) or set(value) != set(fields):
        got = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{name}: expected {', '.join(fields)}, got {got:.200}")
    return value


def _typed(name: str, value: Any, kind: type) -> dict[str, Any]:
    value = _fields(name, value, kind._fields)
    for field, annotation in kind.__annotations__.items():
        if annotation is not Sizes:
            _check(f"{name}.{field}", value[field], annotation)
    return value


def _check(name: str, value: Any, annotation: Any) -> None:
    if annotation == State:
        right = value in get_args(State)
    elif annotation is str:
        right = isinstance(value, str)
    elif value is None:
        right = annotation == float | None
    elif annotation is int:
        right = type(value) is int and value > 0
    else:
        right = type(value) in (int, float) and 0 <= value < math.inf
    if not right:
        raise ValueError(f"{name}: unexpected {value!r:.80}")


def shared(record: Record) -> dict[str, Any]:
    """The record without anything that could contain a path or a name; of an error only its kind is kept."""
    kind = re.compile(r"[A-Za-z_]\w*(?=:|$)")
    checks = [
        c if c.state == "right" else c._replace(detail=match[0] if (match := kind.match(c.detail)) else "")
        for c in record.checks
    ]
    return to_json(record._replace(checks=tuple(checks)))


def share(record: Record, path: Path) -> None:
    """Write the ``shared`` part of a record to ``path``."""
    write_json(path, shared(record))


# --- as a file --------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """``$DEXKERNELS_CACHE``, else ``$XDG_CACHE_HOME/dexkernels``, else ``~/.cache/dexkernels``."""
    if path := os.environ.get(FOLDER):
        return Path(path).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "dexkernels"
    try:
        return Path.home() / ".cache/dexkernels"
    except RuntimeError as error:
        raise OSError(f"{FOLDER}: expected a folder, since there is no home folder: {error}") from error


def path_of(identity: Identity) -> Path:
    gpu = re.sub(r"[^a-z0-9]+", "-", identity.gpu.lower()).strip("-")
    return folder() / f"{gpu}-{identity.digest}.json"


def read(path: Path) -> Record:
    """The record at ``path``. Raises FileNotFoundError, or ValueError if the file is not a record."""
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a record, got {type(error).__name__}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load(identity: Identity) -> tuple[Record | None, str]:
    """The record of ``identity``, or None and the reason. A record of another machine does not count."""
    try:
        path = path_of(identity)
        record = read(path)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"the record cannot be used: {error}"
    if record.identity != identity:
        return None, f"the record {path} is of another machine: {record.identity}"
    return record, ""


def write(record: Record) -> Path:
    """Write ``record`` to its file, atomically. Raises OSError if the folder cannot be written."""
    path = path_of(record.identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, to_json(record))
    return path


def write_json(path: Path, value: dict[str, Any]) -> None:
    work = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(work, "x", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(identity: Identity) -> Iterator[None]:
    """Wait until no other process verifies the same identity, since both would time a busy GPU.

    Without a lock (a read-only folder, some network file systems) there is no wait.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path = path_of(identity).with_suffix(".lock")
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a"))
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
