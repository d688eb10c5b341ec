"""scripts/gpu.py without a GPU: it runs what it can, and survives parts that fail, hang or cannot run."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/gpu.py"

spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def python(code, **options):
    return gpu.Part("test", "a part", (sys.executable, "-c", code), **options)


def run(part, out, seconds=60.0):
    return gpu.run(part, out, time.monotonic() + seconds)


def test_a_part_that_ends_well(tmp_path):
    outcome = run(python("import dexkernels, dex, os; print(os.environ['A'])", environment={"A": "b c"}), tmp_path)
    assert (outcome.state, outcome.detail) == ("ok", "b c")
    assert (tmp_path / "test.log").read_text().startswith("\n# a part\n$ ")


def test_a_part_that_fails_says_how(tmp_path, capsys):
    outcome = run(python("print('first'); print('why'); raise SystemExit(3)"), tmp_path)
    assert (outcome.state, outcome.detail) == ("failed", "why (exit status 3)")
    assert "first\nwhy" in capsys.readouterr().out


def test_a_part_that_hangs_is_stopped_with_what_it_started(tmp_path):
    beat = tmp_path / "beat"
    child = f"import pathlib, time\nwhile True: pathlib.Path({str(beat)!r}).touch(); time.sleep(0.05)"
    code = f"import subprocess, sys; print('started', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    outcome = run(python(code, minutes=0.05), tmp_path)
    assert (outcome.state, outcome.detail) == ("timeout", "started")
    last = beat.stat().st_mtime_ns
    time.sleep(0.5)
    assert beat.stat().st_mtime_ns == last


def test_a_part_that_cannot_run_or_has_no_time(tmp_path):
    assert run(python("", absent="no such tool"), tmp_path)[2:] == ("skipped", 0, "no such tool")
    assert run(python(""), tmp_path, seconds=1)[2:] == ("skipped", 0, "no time is left (--minutes)")


def script(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_stages_run_on_a_cpu_in_small(tmp_path):
    done = script(tmp_path, "--cpu", "--stages", "recorded,sanitize,bench")
    summary = json.loads((tmp_path / "summary.json").read_text())
    states = {(p["stage"], p["name"]): p["state"] for p in summary["parts"]}
    assert done.returncode == 0, done.stdout + done.stderr
    assert states["recorded", "reference, float64"] == states["bench", "tiny"] == "ok"
    assert states["sanitize", "memcheck"] == states["recorded", "cuda, float32"] == "skipped"
    assert not list(tmp_path.glob("*-*-*-*.json")), "what a CPU measures is no result"


def test_wrong_usage(tmp_path):
    assert "got tests" in script(tmp_path, "--stages", "build,tests").stderr
    if not torch.cuda.is_available():
        done = script(tmp_path)
        assert done.returncode == 2 and "no GPU that torch can use" in done.stderr


def test_results_are_of_a_gpu_alone(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "benchmarks/test_gpu_operators.py",
        "--results",
        tmp_path,
        "--tiny",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4 and "--results: expected with --device cuda and without --tiny" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_device_cuda_skips_and_says_why():
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "tests/dexkernels/test_spec.py", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "torch finds no CUDA device" in done.stdout and "9 skipped" in done.stdout


def test_device_option_moves_what_tests_draw():
    """With meta in the place of cuda: the generator stays on the CPU, so a test draws the same numbers everywhere."""
    spec = importlib.util.spec_from_file_location("options", ROOT / "conftest.py")
    options = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(options)
    randn, generator = options._drawn_where_its_generator_is(torch.randn), torch.Generator()
    torch.set_default_device("meta")
    try:
        drawn = randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        assert drawn.device.type == "meta" and drawn.dtype == torch.float64 and drawn.requires_grad and drawn.is_leaf
        assert randn((2,)).device.type == torch.zeros(1).device.type == torch.tensor(1.0).device.type == "meta"
        assert randn(2, device="cpu").device.type == randn(2, generator=generator, device="cpu").device.type == "cpu"
    finally:
        torch.set_default_device(None)
