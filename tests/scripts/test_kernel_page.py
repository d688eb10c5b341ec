"""Where every kernel has been executed: found in the sources, looked up in the results, told in words."""

import re

import kernel_page
import pytest
import record

COUNTED = {
    "sectors": [11, 10],
    "rounds_in_main_loop": [0, 0],
    "rounds_outside": [3, 2],
    "tensor_operations": 0,
    "instructions": [0, 5],
}


@pytest.fixture
def tree(tmp_path):
    """An operator of two kernels and a helper in Triton, and one kernel in CUDA."""
    folder = tmp_path / "dexkernels/ops/adding"
    (folder / "triton").mkdir(parents=True)
    (folder / "__init__.py").write_text('backends.register("adding_", __name__, BACKENDS)\n')
    (folder / "triton/one.py").write_text(
        "@triton.jit\ndef helper(x):\n    return x\n\n"
        "@triton.jit\ndef sum_kernel(x):\n    tl.store(x, helper(x))\n\n"
        "def launch():\n    sum_kernel[(1,)]()\n"
    )
    (folder / "triton/two.py").write_text("@triton.jit(noinline=True)\ndef mean_kernel(x):\n    helper(x)\n")
    (tmp_path / "dexkernels/ops/plain").mkdir()
    (tmp_path / "dexkernels/ops/plain/__init__.py").write_text("")
    source = tmp_path / "csrc/adding/adding.cu"
    source.parent.mkdir(parents=True)
    source.write_text(
        "template <int N>\n__global__ void __launch_bounds__(256, BLOCKS)\n"
        "    add_kernel(const __grid_constant__ Table<N> table) {\n}\nvoid launch() { add_kernel<1>; }\n"
    )
    return tmp_path


def test_kernels_are_found_in_the_sources(tree):
    assert kernel_page.kernels(tree) == [
        ("adding", "cuda", "add_kernel"),
        ("adding", "triton", "mean_kernel"),
        ("adding", "triton", "sum_kernel"),
    ]
    assert kernel_page.operators(tree) == {"adding": "adding_"}


def test_kernels_for_one_architecture_are_those_of_their_operator(tree):
    folder = tree / "csrc/adding_sm90"
    folder.mkdir()
    (folder / "fast.cu").write_text("__global__ void fast_add_kernel(const int n) {\n}\n")
    assert kernel_page.kernels(tree)[:2] == [("adding", "cuda", "add_kernel"), ("adding", "cuda", "fast_add_kernel")]
    results = {"nvcc 13.0": {"cases": {"sm_90 bf16 adding_sm90, N 5": {"kernels": {}}}}}
    assert [case[3] for case in kernel_page._cases(results)] == ["adding"]


@pytest.fixture
def told(tree, monkeypatch):
    """The three texts, of results of that tree."""
    found, names = kernel_page.kernels(tree), kernel_page.operators(tree)
    monkeypatch.setattr(kernel_page, "kernels", lambda: found)
    monkeypatch.setattr(kernel_page, "operators", lambda: names)

    def texts(emulated, measured=()):
        made = {}
        exec(kernel_page.module(emulated, list(measured)), made)
        tables = [table(emulated, list(measured)) for table in kernel_page.REGIONS.values()]
        return made["EXECUTED"], tables[0], "\n".join(tables[1:])

    return texts


def test_a_kernel_that_never_ran_is_named(told):
    case = {"date": "2026-03-01", "kernels": {"sum_kernel": COUNTED}}
    emulated = {"triton 1.0": {"cases": {"sm_80 bf16 adding": case, "sm_90 fp16 adding, large": case}}}
    package, summary, page = told(emulated)
    assert package == {
        ("adding_", "cuda"): "1 kernel, on a GPU: not yet; never: add_kernel",
        ("adding_", "triton"): (
            "2 kernels, 1 of them executed on the emulator for sm_80, sm_90 in bf16, fp16, 2026-03-01; "
            "on a GPU: not yet; never: mean_kernel"
        ),
    }
    assert "| 1, for sm_80, sm_90 in bf16, fp16: `python tests/emulator/every_kernel.py`, 2026-03-01 |" in summary
    assert "| never | `add_kernel`, `mean_kernel` |" in summary and "| on a GPU | none yet |" in summary
    assert "| adding | cuda | `add_kernel` |  |  |  | never | not yet |" in page
    assert "| `sum_kernel` | sm_80, sm_90 | bf16, fp16 | triton 1.0 | 2026-03-01 | not yet |" in page
    assert "| adding | triton | `sum_kernel` | sm_80 | bf16 | 1.10 |  | 1.50 |  |  |" in page


def test_files_of_a_gpu_are_named(told):
    row = {"case": "adding_ forward", "backend": "triton"}
    result = {"device": "NVIDIA H100", "date": "2026-04-02", "rows": [row, row | {"backend": "reference"}]}
    package, summary, page = told({"nvcc 1": {"cases": {}}}, [result])
    name = record.name_of(result)
    assert package["adding_", "triton"] == f"2 kernels, on a GPU: {name}"
    assert package["adding_", "cuda"].endswith("never: add_kernel")
    assert f"[{name}](benchmarks/results/{name})" in summary and page.count(f"(../benchmarks/results/{name})") == 2


def test_counts_are_of_the_largest_launch_and_the_compiler_with_the_most_cases(told):
    def case(instructions):
        return {"date": "2026-03-01", "kernels": {"sum_kernel": COUNTED | {"instructions": instructions}}}

    cases = {"sm_80 bf16 adding": case([1, 1]), "sm_80 fp16 adding": case([5, 15]), "sm_80 fp32 adding": case([10, 1])}
    emulated = {"triton 1.0": {"cases": cases}, "triton 2.0": {"cases": {"sm_80 fp16 adding": case([100, 100])}}}
    rows = re.findall(r"\| `sum_kernel` \| sm_80 \| (\w+) \|.* (\d+%) \|", told(emulated)[2])
    assert rows == [("fp16", "75%"), ("fp32", "9%")]


def test_no_kernel_of_this_library_was_never_executed():
    everywhere = kernel_page.executed(kernel_page.load(), record.newest())
    assert {kernel.backend for kernel in everywhere} == {"triton", "cuda"}
    assert [kernel for kernel, e in everywhere.items() if not e.somewhere] == []


def test_results_hold_no_kernel_that_is_gone():
    ran = {
        (operator, backend, kernel)
        for _, _, _, operator, backend, case in kernel_page._cases(kernel_page.load())
        for kernel in case["kernels"]
    }
    assert ran == {tuple(kernel) for kernel in kernel_page.kernels()}
