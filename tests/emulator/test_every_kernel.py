"""What `every_kernel.py` kept: complete, of today's sources, and within its bounds."""

import every_kernel
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results():
    kept = every_kernel.load()
    if not kept["cases"]:
        pytest.skip("tests/emulator/results.json is not here: python tests/emulator/every_kernel.py makes it")
    return kept


def test_every_case_ran_on_the_kernels_of_today(shipped, results):
    again = "run python tests/emulator/every_kernel.py again, and --page"
    assert results["sources"] == every_kernel.sources(), again
    assert set(results["cases"]) == set(every_kernel.cases(shipped)), again


def test_errors_are_within_their_bounds(results):
    for name, case in results["cases"].items():
        for result, (error, _, bound) in case["errors"].items():
            assert error <= bound, f"{name}: {result}"


def test_no_order_of_the_warps_changes_a_bit(results):
    every = f"{every_kernel.ORDERS} of {every_kernel.ORDERS}"
    assert {case["orders_with_the_same_bits"] for case in results["cases"].values()} == {every}


def test_main_loops_have_no_bank_conflicts(results):
    for name, case in results["cases"].items():
        for kernel, counted in case["kernels"].items():
            rounds, least = counted["rounds_in_main_loop"]
            assert rounds == least, f"{name}: {kernel}"


def test_the_aligned_path_asks_for_few_sectors(results):
    """Where rows are whole sectors: of a width of 72 every box begins within one."""
    cases = {name: case for name, case in results["cases"].items() if name.endswith(" aligned")}
    assert cases
    for name, case in cases.items():
        for kernel, counted in case["kernels"].items():
            sectors, least = counted["sectors"]
            assert sectors <= 1.1 * least, f"{name}: {kernel}"


def test_the_page_is_that_of_the_results(results):
    assert every_kernel.PAGE.read_text() == every_kernel.page(results)
