"""Checks results against exact ones, times the correct candidates, and makes rows of a results file (record.ROW)."""

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dexkernels.verification.cases import bound_of, errors_of

from . import record
from .samples import Samples
from .timing import Timer

IN_CACHE = 100e6
"""Bytes below which rotated inputs may fit into the cache, so that the copy bandwidth is no limit."""

Candidate = Callable[[int], list[Tensor]]
"""``f(i)`` returns tensors; i selects its inputs."""


class Case(NamedTuple):
    """A computation. flush: the inputs must come from memory, not from the cache."""

    name: str
    shape: dict
    dtype: torch.dtype
    flops: float = 0.0
    num_bytes: float = 0.0
    flush: bool = False

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {self.precision}"

    def limit_ms(self, ceilings: dict[str, float]) -> float | None:
        """The shortest time by the limits of this machine; None if no limit applies."""
        if self.dtype != torch.bfloat16 and self.flops:
            return None  # The ceiling of products was measured in bf16 and does not apply to other dtypes.
        products = self.flops / ceilings["bf16_tflops"] / 1e9
        limit = max(products, self.num_bytes / ceilings["copy_gbps"] / 1e6)
        return None if limit > products and self.num_bytes < IN_CACHE and not self.flush else limit


class Checked(NamedTuple):
    """The candidates of one case after the check. red: backend -> reason why it is not timed."""

    right: dict[str, Candidate]
    errors: dict[str, float]
    red: dict[str, object]


class Measure:
    """``measure(case, candidates, exact, others, ...)`` checks every result, then times and records the correct ones.

    add_row: takes a row and returns its faults. backend: the only one to measure beside "reference", or None for all.
    notes: collects the reasons for omitted baselines.
    """

    def __init__(
        self,
        timer: Timer,
        ceilings: dict[str, float],
        add_row: Callable[[dict], list[str]],
        samples: Samples,
        backend: str | None,
        notes: list[str],
    ):
        self.timer, self.ceilings, self.add_row, self.samples = timer, ceilings, add_row, samples
        self.backend, self.notes = backend, notes

    def __call__(
        self,
        case: Case,
        candidates: dict[str, Candidate],
        exact: list[Tensor],
        others: dict[str, Callable[[int], object]],
        *,
        check: dict[str, Candidate] | None = None,
        theirs: dict[str, Callable[[], Candidate]] | None = None,
    ) -> None:
        """Check and time the candidates of a case.

        Args:
            candidates: backend -> function.
            exact: the exact result of ``f(0)``.
            others: baselines without a result.
            check: backend -> function to check instead of its candidate.
            theirs: peer -> factory of a function like the candidates; one that fails or is wrong is named, not timed.
        """
        if self.backend:
            candidates = {name: f for name, f in candidates.items() if name in (self.backend, "reference")}
        checked = self._check(case, candidates, check or candidates, exact)
        peers, notes = self._peers(case, theirs or {}, exact)
        self.notes.extend(notes)
        baselines = others | peers
        taken = self.timer.take(checked.right | baselines, case.flush)
        self.samples.add({name: [s / 1e3 for s in times] for name, times in taken.items()}, str(case))
        ms = {name: statistics.median(times) for name, times in taken.items()}
        red = dict(checked.red)
        for backend, f in checked.right.items():
            result = {"max_rel_err": checked.errors[backend], "peak_mb": self.timer.peak_mb(f)}
            for row in self._rows(case, backend, baselines, ms):
                against = f"{backend} against {row['baseline']}"
                self.samples.say(**{against: row["ratio"], f"{backend}, share of the limit": row["share_of_limit"]})
                if faults := self.add_row(row | result):
                    red[against] = faults
        assert not red, f"{case}: expected correct results, got {red}"
        assert not (self.timer.tiny and notes), notes

    def _check(
        self, case: Case, candidates: dict[str, Candidate], check: dict[str, Candidate], exact: list[Tensor]
    ) -> Checked:
        plain = errors_of(check["reference"](0), exact)
        checked = Checked({}, {}, {})
        for backend, f in candidates.items():
            try:
                errors = errors_of(check[backend](0), exact)
            except Exception as error:  # A kernel that does not compile or launch must not affect other rows.
                checked.red[backend] = f"{type(error).__name__}: {error}"[:300]
                continue
            checked.errors[backend] = max(errors)
            bounds = [bound_of(t, case.dtype, error) for t, error in zip(exact, plain, strict=True)]
            if not all(error <= bound for error, bound in zip(errors, bounds, strict=True)):
                checked.red[backend] = f"errors {errors}, expected at most {bounds}"
            else:
                checked.right[backend] = f
        return checked

    def _peers(
        self, case: Case, theirs: dict[str, Callable[[], Candidate]], exact: list[Tensor]
    ) -> tuple[dict[str, Candidate], list[str]]:
        """The peers that run and are correct, and notes on the others."""
        right, notes = {}, []
        for peer, make in theirs.items():
            try:
                f = make()
                errors = errors_of(f(0), exact)
            except Exception as error:
                notes.append(f"{case}: {peer} did not run: {type(error).__name__}: {error}"[:300])
                continue
            # Peers may round intermediate results, within the error bound of this dtype.
            if max(errors) > record.BOUND[case.precision]:
                notes.append(f"{case}: {peer} is wrong: {errors}")
            else:
                right[peer] = f
        return right, notes

    def _rows(self, case: Case, backend: str, baselines: dict, ms: dict[str, float]) -> Iterator[dict]:
        """A row for each baseline, without error and memory."""
        limit = case.limit_ms(self.ceilings)
        for baseline in ("reference", *baselines):
            if baseline in ms:
                yield {
                    "case": case.name,
                    "shape": case.shape,
                    "backend": backend,
                    "dtype": case.precision,
                    "baseline": baseline,
                    "ms": ms[backend],
                    "baseline_ms": ms[baseline],
                    "ratio": ms[baseline] / ms[backend],
                    "tflops": case.flops / ms[backend] / 1e9 if case.flops else None,
                    "gbps": case.num_bytes / ms[backend] / 1e6 if case.num_bytes else None,
                    "share_of_limit": None if limit is None else limit / ms[backend],
                }
