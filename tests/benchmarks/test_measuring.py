"""No speed of a wrong result: what is red, what is left out, and what a row says."""

import pytest
import torch

from benchmarks import record
from benchmarks.measuring import Case, Measure
from benchmarks.samples import Samples
from benchmarks.timing import Timer

EXACT = [torch.tensor([1.0, 2.0], dtype=torch.float64)]
CEILINGS = {"bf16_tflops": 100.0, "copy_gbps": 1000.0}
CASE = Case("route forward", {"B": 8}, torch.float32, num_bytes=1e3)


def right(i):
    return [torch.tensor([1.0, 2.0])]


def wrong(i):
    return [torch.tensor([1.0, 2.1])]


def broken(i):
    raise RuntimeError("no kernel")


@pytest.fixture
def rows():
    return []


@pytest.fixture
def notes():
    return []


@pytest.fixture
def measure(rows, notes):
    def add(row):
        rows.append(row)
        return record.row_problems(row)

    timer = Timer(torch.device("cpu"), tiny=True)
    timer.tiny = False
    return Measure(timer, CEILINGS, add, Samples(None), None, notes)


def test_right_results_are_timed_against_every_baseline(measure, rows):
    measure(CASE, {"reference": right, "triton": right}, EXACT, {"copy": right})
    assert [(row["backend"], row["baseline"]) for row in rows] == [
        ("reference", "reference"),
        ("reference", "copy"),
        ("triton", "reference"),
        ("triton", "copy"),
    ]
    assert all(row["ratio"] == row["baseline_ms"] / row["ms"] and row["max_rel_err"] == 0 for row in rows)


@pytest.mark.parametrize(("candidate", "reason"), [(wrong, "errors"), (broken, "RuntimeError: no kernel")])
def test_a_wrong_candidate_is_red_and_leaves_the_others_their_rows(measure, rows, candidate, reason):
    with pytest.raises(AssertionError, match=f"expected correct results, got .*triton.*{reason}"):
        measure(CASE, {"reference": right, "triton": candidate}, EXACT, {})
    assert [row["backend"] for row in rows] == ["reference"]


def test_a_peer_that_fails_or_is_wrong_is_named(measure, rows, notes):
    theirs = {"good": lambda: right, "bad": lambda: wrong, "absent": lambda: broken}
    measure(CASE, {"reference": right}, EXACT, {}, theirs=theirs)
    assert [row["baseline"] for row in rows] == ["reference", "good"]
    assert ["bad is wrong" in notes[0], "absent did not run" in notes[1], len(notes)] == [True, True, 2]


def test_one_backend_is_measured_beside_the_reference(measure, rows):
    measure.backend = "cuda"
    measure(CASE, {"reference": right, "triton": wrong, "cuda": right}, EXACT, {})
    assert {row["backend"] for row in rows} == {"reference", "cuda"}


def test_another_function_is_checked_in_the_place_of_a_candidate(measure, rows):
    measure(CASE, {"reference": wrong}, EXACT, {}, check={"reference": right})
    assert len(rows) == 1


def test_the_limit_of_a_case():
    products = Case("grouped_mlp forward", {}, torch.bfloat16, flops=1e12, num_bytes=1e9)
    assert products.limit_ms(CEILINGS) == pytest.approx(10.0)
    memory = products._replace(flops=1e10)
    assert memory.limit_ms(CEILINGS) == pytest.approx(1.0)
    cached = memory._replace(num_bytes=99e6, flops=0.0)
    assert cached.limit_ms(CEILINGS) is None
    assert cached._replace(flush=True).limit_ms(CEILINGS) == pytest.approx(0.099)
    assert products._replace(dtype=torch.float32).limit_ms(CEILINGS) is None
