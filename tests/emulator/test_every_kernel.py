"""What `every_kernel.py` kept: complete, of today's sources, and within its bounds. None of it needs Triton or nvcc."""

import itertools
import json

import every_kernel
import pytest
from every_kernel import MANY_ORDERS, ORDERS, TRITON

AGAIN = "run python tests/emulator/every_kernel.py again, then make pages"
HALF, ALL = {"bf16", "fp16"}, {"bf16", "fp16", "fp32"}


@pytest.fixture(scope="module")
def results():
    return every_kernel.load()


@pytest.fixture(scope="module")
def launches(results):
    """(compiler, case, kernel, what was counted) of everything that ran."""
    return [
        (compiler, name, kernel, counted)
        for compiler, kept in results.items()
        for name, case in kept["cases"].items()
        for kernel, counted in case["kernels"].items()
    ]


def test_every_case_ran_on_the_kernels_of_today(results):
    compilers = {compiler.split()[0] for compiler in results}
    assert compilers == {"triton", "nvcc"} and f"triton {TRITON}" in results, AGAIN
    for compiler, kept in results.items():
        for name, case in kept["cases"].items():
            assert case["sources"] == every_kernel.sources(compiler, name), AGAIN
        assert list(kept["cases"]) == list(every_kernel.expected(compiler)), AGAIN


def test_another_triton_compiles_other_ptx(results):
    """Only then is it worth a run: of the same cases it has other hashes."""
    (other,) = [c for c in results if c.startswith("triton") and c != f"triton {TRITON}"]
    for name, case in results[other]["cases"].items():
        first = results[f"triton {TRITON}"]["cases"][name]
        assert first["kernels"].keys() == case["kernels"].keys(), name
        assert any(first["kernels"][k]["ptx"] != counted["ptx"] for k, counted in case["kernels"].items()), name


def test_chunks_of_a_weight_gradient_are_added(launches):
    """Where no expert has many slots the kernel that adds them finds nothing to do."""
    found = set()
    for _, name, kernel, counted in launches:
        if kernel == "sum_chunks_kernel" and name.endswith(", chunks"):
            D, H = every_kernel.CHUNKS["aligned" if "aligned" in name else "gather"][2:4]
            sectors_of_a_part = D * H * 4 // 32
            assert counted["sectors"][1] > 2 * sectors_of_a_part, name
            found.add(name.removesuffix(", chunks"))
    gather = {f"{t} {d} grouped_mlp gather" for t in ("sm_80", "sm_90") for d in ALL}
    assert found == gather | {f"sm_90 {d} grouped_mlp aligned" for d in HALF}


def test_the_version_with_which_every_case_ran_is_that_of_the_tests():
    makefile = (every_kernel.ROOT / "Makefile").read_text()
    assert f"triton=={TRITON}" in makefile


def test_errors_are_within_their_bounds(results):
    for compiler, kept in results.items():
        for name, case in kept["cases"].items():
            assert case["errors"], f"{compiler}, {name}"
            for result, (error, _, bound) in case["errors"].items():
                assert error <= bound, f"{compiler}, {name}: {result}"


def test_no_order_of_the_warps_changes_a_bit(results):
    for compiler, kept in results.items():
        for name, orders in every_kernel.expected(compiler).items():
            assert orders >= ORDERS
            assert kept["cases"][name]["orders_with_the_same_bits"] == f"{orders} of {orders}", f"{compiler}, {name}"


def test_every_kernel_ran_in_many_orders_and_in_every_dtype(launches, results):
    many = f"{MANY_ORDERS} of {MANY_ORDERS}"
    ran, often = {}, set()
    for compiler, name, kernel, _ in launches:
        target, dtype, operator = name.replace(",", "").split()[:3]
        if compiler == f"triton {TRITON}":
            ran.setdefault((operator, kernel), set()).add((target, dtype))
            if results[compiler]["cases"][name]["orders_with_the_same_bits"] == many:
                often.add((operator, kernel, target))
    for (operator, kernel), pairs in ran.items():
        targets = {target for target, _ in pairs}
        dtypes = HALF if targets == {"sm_90"} else {"fp32"} if operator in ("group_ema", "adamw_ema") else ALL
        assert pairs == set(itertools.product(targets, dtypes)), kernel
        assert {(operator, kernel, target) for target in targets} <= often, kernel


def test_loops_of_tensor_core_products_have_no_bank_conflicts(launches):
    seen = 0
    for compiler, name, kernel, counted in launches:
        if counted["tensor_operations"]:
            rounds, least = counted["rounds_in_main_loop"]
            seen += rounds > 0
            assert rounds == least, f"{compiler}, {name}: {kernel}"
    assert seen > 50


def test_loops_with_bank_conflicts_are_those_of_the_page(launches):
    """Products in float32: docs/kernels.md says why."""
    conflicts = set()
    for _, _, kernel, counted in launches:
        rounds, least = counted["rounds_in_main_loop"]
        if rounds > least:
            conflicts.add(kernel)
    assert conflicts == {"fc1_kernel", "to_slots_kernel", "to_hidden_grad_kernel", "route_kernel"}
    page = (every_kernel.ROOT / "docs/kernels.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| banks in the loops"))
    assert all(f"`{kernel}`" in row for kernel in conflicts)


def test_the_aligned_path_asks_for_few_sectors(launches):
    """Where rows are whole sectors: of a width of 72 every box begins within one."""
    aligned = [launch for launch in launches if launch[1].endswith((" aligned", " aligned, with a director"))]
    assert len({kernel for _, _, kernel, _ in aligned}) > 10
    for compiler, name, kernel, counted in aligned:
        sectors, least = counted["sectors"]
        assert sectors <= 1.1 * least, f"{compiler}, {name}: {kernel}"


def test_results_are_written_a_case_a_line(results):
    text = every_kernel._text(results)
    assert json.loads(text) == results and text == every_kernel.RESULTS.read_text()
    assert len(text.splitlines()) < sum(len(kept["cases"]) for kept in results.values()) + 6 * len(results) + 3
