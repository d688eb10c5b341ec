"""Which backend is chosen, by what was verified on this GPU; and what the report says of them."""

import importlib.util
import sys

import pytest
import torch

from dexkernels import ops
from dexkernels.ops import backends
from dexkernels.verification import choice

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture
def h100(monkeypatch, request):
    """A machine that would be an sm_90 with Triton, where some kernels are proven."""
    if request.config.getoption("--backend"):
        pytest.skip("--backend replaces the choice")
    proven = {("route", "bfloat16"): "triton", ("group_ema_", "float32"): "cuda"}
    monkeypatch.setattr(choice, "_tables", {0: proven})
    monkeypatch.setattr(choice, "record_of", lambda device: None)
    monkeypatch.setattr(
        backends, "MEASURED", {("sm_90", "route", "triton"): "fast", ("sm_80", "align_loss", "triton"): "so"}
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends, "_why_no_triton", lambda: None)
    monkeypatch.setattr(backends.native, "why_not", lambda: None)
    return monkeypatch


def test_what_is_proven_serves_its_dtype_on_its_gpu(h100):
    assert backends.architecture(CUDA) == "sm_90" and backends.architecture(CPU) == "cpu"
    assert backends.choose("route", None, CUDA, dtype=BF16) == "triton"
    assert backends.choose("route", None, torch.device("cuda"), dtype=BF16) == "triton"
    assert backends.choose("route", None, CPU, dtype=BF16) == "reference"
    for dtype in (FP32, FP64, None):
        assert backends.choose("route", None, CUDA, dtype=dtype) == "reference"
    assert backends.choose("align_loss", None, CUDA, dtype=BF16) == "reference"


def test_a_backend_that_is_asked_for_overrules_the_record(h100):
    assert backends.choose("route", "reference", CUDA, dtype=BF16) == "reference"
    assert backends.choose("align_loss", "triton", CUDA, dtype=BF16) == "triton"


def test_a_default_that_cannot_run_gives_way(h100):
    h100.setattr(backends, "_why_no_triton", lambda: "triton is not installed")
    assert backends.choose("route", None, CUDA, dtype=BF16) == "reference"
    with pytest.raises(ValueError, match="triton is not installed"):
        backends.choose("route", "triton", CUDA)


def test_report_says_what_was_measured_where(h100):
    rows = {(r.op, r.backend): r for r in backends.report()}
    when = "; used when asked for, or where dex verify has proven it"
    assert rows["route", "triton"].default and rows["route", "triton"].reason == f"sm_90: fast{when}"
    assert not rows["route", "reference"].default and rows["group_ema_", "cuda"].default
    assert rows["align_loss", "triton"].reason == f"measured on sm_80 alone{when}"
    assert rows["group_ema_", "triton"].reason == f"never measured on a GPU{when}"


def test_a_feature_that_a_backend_lacks_gives_way(h100):
    ops_of = ("route", "grouped_mlp", "align_loss")
    h100.setattr(choice, "_tables", {0: {(op, "bfloat16"): "triton" for op in ops_of}})
    for op, feature in (("route", "token_mask"), ("align_loss", "token_mask"), ("grouped_mlp", "sizes past 32 bits")):
        assert backends.choose(op, None, CUDA, dtype=BF16) == "triton" and backends.covering(op, "triton") == "triton"
        assert backends.choose(op, None, CUDA, feature, BF16) == "reference"
        assert backends.covering(op, "triton", feature) is None
        with pytest.raises(ValueError, match=f"backend: 'triton' cannot run {op}: no {feature}: its kernel"):
            backends.choose(op, "triton", CUDA, feature)
        rows = {r.backend: r.limits for r in backends.report() if r.op == op}
        assert rows["triton"].startswith(f"no {feature}: its kernel") and not rows["reference"]
    assert backends.choose("grouped_mlp", None, CUDA, "token_mask", BF16) == "triton"


def test_report_says_where_kernels_have_been_executed(monkeypatch):
    monkeypatch.setattr(backends, "EXECUTED", {("route", "triton"): "3 kernels, somewhere"})
    rows = {(r.op, r.backend): r.executed for r in backends.report()}
    assert rows["route", "triton"] == "3 kernels, somewhere" and rows["align_loss", "triton"] == ""
    assert rows["route", "reference"] == ""


@pytest.mark.skipif("config.getoption('--backend')", reason="--backend replaces the choice")
def test_a_cpu_always_takes_plain_torch():
    chosen = {backends.choose(op, None, CPU, dtype=dtype) for op in backends.TABLES for dtype in (BF16, FP32, None)}
    assert chosen == {"reference"}


@pytest.fixture
def new_operator(tmp_path, monkeypatch):
    """A folder beside those of the operators, which the package does not know of."""
    folder = tmp_path / "negate"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from dexkernels.ops import backends\n"
        "BACKENDS = {'reference': 'cpu', 'cuda': 'cuda'}\n"
        "backends.register('negate', __name__, BACKENDS)\n"
    )
    (folder / "cpu.py").write_text("def forward(x):\n    return -x\n")
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    monkeypatch.setattr(backends, "TABLES", dict(backends.TABLES))
    yield
    for name in [name for name in sys.modules if name.startswith("dexkernels.ops.negate")]:
        del sys.modules[name]
    delattr(ops, "negate")


def test_a_new_operator_is_found_by_its_folder(new_operator):
    assert "negate" not in backends.TABLES
    ops.discover()
    assert backends.load("negate", "reference").forward(3) == -3
    rows = {row.backend: row for row in backends.report() if row.op == "negate"}
    assert rows["reference"].available and rows["reference"].default
    assert rows["triton"].reason == "this version ships no Triton kernel for negate"
    assert backends.covering("negate", "triton") is None
    assert backends.choose("negate", None, CPU) == "reference"
    with pytest.raises(ValueError, match="backend: 'triton' cannot run negate: this version ships no Triton kernel"):
        backends.choose("negate", "triton", CPU)


def test_the_modules_of_every_table_are_there():
    for op, table in backends.TABLES.items():
        assert "reference" in table, op
        for backend, module in table.items():
            assert importlib.util.find_spec(module) is not None, (op, backend)
