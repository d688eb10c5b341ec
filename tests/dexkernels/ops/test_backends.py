"""Which backend is chosen, by committed measurements of an architecture; and what the report says of them."""

import importlib.util
import sys

import pytest
import torch

from dexkernels import ops
from dexkernels.ops import backends

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def h100(monkeypatch, request):
    """A machine that would be an sm_90 with Triton, whose results are as given."""
    if request.config.getoption("--backend"):
        pytest.skip("--backend replaces the choice")
    monkeypatch.setattr(backends, "DEFAULTS", {("sm_90", "route"): "triton", ("sm_80", "align_loss"): "triton"})
    monkeypatch.setattr(
        backends, "MEASURED", {("sm_90", "route", "triton"): "fast", ("sm_80", "align_loss", "triton"): "so"}
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_why_no_triton", lambda: None)
    return monkeypatch


def test_a_measured_backend_serves_its_architecture(h100):
    assert backends.architecture(CUDA) == "sm_90" and backends.architecture(CPU) == "cpu"
    assert backends.choose("route", None, CUDA) == "triton"
    assert backends.choose("route", None, CPU) == "reference"
    assert backends.choose("align_loss", None, CUDA) == "reference"
    assert backends.choose("route", "reference", CUDA) == "reference"
    h100.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert backends.choose("route", None, CUDA) == "reference"
    assert backends.choose("align_loss", None, CUDA) == "triton"


def test_a_default_that_cannot_run_gives_way(h100):
    h100.setattr(backends, "_why_no_triton", lambda: "triton is not installed")
    assert backends.choose("route", None, CUDA) == "reference"
    with pytest.raises(ValueError, match="triton is not installed"):
        backends.choose("route", "triton", CUDA)


def test_report_says_what_was_measured_where(h100):
    rows = {(r.op, r.backend): r for r in backends.report()}
    assert rows["route", "triton"].default and rows["route", "triton"].reason == "sm_90: fast"
    assert not rows["route", "reference"].default
    assert rows["align_loss", "triton"].reason == "measured on sm_80 alone: only when asked for"
    assert rows["group_ema_", "triton"].reason == "never measured on a GPU: only when asked for"


def test_a_feature_that_a_backend_lacks_gives_way(h100):
    h100.setattr(backends, "DEFAULTS", {("sm_90", op): "triton" for op in ("route", "grouped_mlp", "align_loss")})
    for op, feature in (("route", "token_mask"), ("align_loss", "token_mask"), ("grouped_mlp", "sizes past 32 bits")):
        assert backends.choose(op, None, CUDA) == "triton" and backends.covering(op, "triton") == "triton"
        assert (
            backends.choose(op, None, CUDA, feature) == "reference" and backends.covering(op, "triton", feature) is None
        )
        with pytest.raises(ValueError, match=f"backend: 'triton' cannot run {op}: no {feature}: its kernel"):
            backends.choose(op, "triton", CUDA, feature)
        rows = {r.backend: r.limits for r in backends.report() if r.op == op}
        assert rows["triton"].startswith(f"no {feature}: its kernel") and not rows["reference"]
    assert backends.choose("grouped_mlp", None, CUDA, "token_mask") == "triton"


def test_report_says_where_kernels_have_been_executed(monkeypatch):
    monkeypatch.setattr(backends, "EXECUTED", {("route", "triton"): "3 kernels, somewhere"})
    rows = {(r.op, r.backend): r.executed for r in backends.report()}
    assert rows["route", "triton"] == "3 kernels, somewhere" and rows["align_loss", "triton"] == ""
    assert rows["route", "reference"] == ""


@pytest.mark.skipif("config.getoption('--backend')", reason="--backend replaces the choice")
def test_a_cpu_always_takes_plain_torch():
    assert {backends.choose(op, None, CPU) for op in backends.TABLES} == {"reference"}


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
