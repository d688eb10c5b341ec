"""Every operator is compared with float64, and what is wrong is seen: values, gradients, bits, whole numbers."""

import pytest
import torch

from dexkernels.ops import backends
from dexkernels.verification.cases import BOUND, DTYPES, SMALL, bytes_needed, cases, compare, sizes_checked
from dexkernels.verification.record import Sizes

CPU = torch.device("cpu")
TINY = Sizes(3, 5, 9, 14, 4, 2)
ALL = [(op, dtype) for op, dtypes in DTYPES.items() for dtype in dtypes]


@pytest.fixture(autouse=True)
def no_other_backend(request):
    if request.config.getoption("--backend") or request.config.getoption("--device") != "cpu":
        pytest.skip("on a CPU, with the backends that it asks for")


def test_every_operator_has_cases():
    assert set(DTYPES) == set(backends.TABLES)


@pytest.mark.parametrize("op, dtype", ALL, ids=str)
@pytest.mark.parametrize("sizes", [TINY, SMALL[2]], ids=str)
def test_plain_torch_is_right_in_every_dtype(op, dtype, sizes):
    for case in cases(op, sizes, dtype, CPU):
        found = compare(case, "reference", dtype)
        assert found.problem == "" and 0 < found.error < BOUND[dtype]
        case.timed("reference"), case.limit()


def test_the_layer_under_autocast_is_a_case_of_its_experts():
    assert len(cases("grouped_mlp", TINY, torch.bfloat16, CPU)) == 1 + len(
        cases("grouped_mlp", TINY, torch.float32, CPU)
    )
    activations = cases("grouped_mlp", SMALL[2], torch.float32, CPU)
    assert len(activations) == 2  # of one choice also the GELU by tanh


@pytest.mark.parametrize("op, dtype", ALL, ids=str)
def test_a_result_that_is_a_little_wrong_is_seen(op, dtype):
    """Each result in turn is off by three times what is allowed: its problem names it."""
    case = cases(op, TINY, dtype, CPU)[0]
    exact = case.exact()
    for i, want in enumerate(exact):
        if not want.numel() or not want.is_floating_point() or want.norm() == 0:
            continue

        def run(backend, i=i):
            results = [t.clone() for t in case.run("reference")]
            if backend == "wrong":
                results[i] = results[i].double() * (1 + 3 * BOUND[dtype])
            return results

        assert compare(case._replace(run=run), "wrong", dtype).problem.startswith(f"result {i} ")


def test_a_whole_number_that_is_off_by_one_is_seen():
    case = cases("route", TINY, torch.float32, CPU)[0]
    place = next(i for i, t in enumerate(case.exact()) if not t.is_floating_point())

    def run(backend):
        results = [t.clone() for t in case.run("reference")]
        if backend == "wrong":
            results[place].view(-1)[0] += 1
        return results

    assert "expected at most 0" in compare(case._replace(run=run), "wrong", torch.float32).problem


def test_what_is_not_finite_is_wrong_and_has_no_error():
    case = cases("align_loss", TINY, torch.float32, CPU)[0]

    def run(backend):
        results = [t.clone() for t in case.run("reference")]
        if backend == "wrong":
            results[1].view(-1)[0] = torch.nan
        return results

    found = compare(case._replace(run=run), "wrong", torch.float32)
    assert found.error is None and "error inf" in found.problem


def test_other_bits_in_a_second_run_are_wrong():
    case, calls = cases("align_loss", TINY, torch.float32, CPU)[0], []

    def run(backend):
        results = [t.clone() for t in case.run("reference")]
        if backend == "restless":
            calls.append(1)
            results[1] *= 1 + 1e-7 * len(calls)
        return results

    assert "different bits when repeated" in compare(case._replace(run=run), "restless", torch.float32).problem


def test_timing_leaves_the_tensors_it_needs():
    for op in ("group_ema_", "adamw_ema_"):
        case = cases(op, TINY, torch.float32, CPU)[0]
        for _ in range(3):
            case.timed("reference")
        assert all(t.isfinite().all() for t in case.run("reference") if t.is_floating_point())


def test_large_sizes_are_judged_by_plain_torch_in_float64():
    sizes = Sizes(18, 65, 8, 16, 3, 2)
    (case,) = cases("grouped_mlp", sizes, torch.float32, CPU)
    assert compare(case, "reference", torch.float32).problem == ""


@pytest.mark.parametrize(
    "given, message",
    [
        ({"images": 0}, "images: expected a whole number of at least 1, got 0"),
        ({"dim": 1.5}, "dim: expected a whole number"),
        ({"tokens": True}, "tokens: expected a whole number"),
        ({"num_experts": 2, "top_k": 3}, "top_k: expected at most num_experts = 2, got 3"),
    ],
)
def test_sizes_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        sizes_checked(Sizes()._asdict() | given)
    assert sizes_checked({"images": 3}) == Sizes(images=3)


def test_memory_grows_with_the_batch():
    assert 4e9 < bytes_needed(Sizes()) < 16e9 and bytes_needed(TINY) < 1e6
