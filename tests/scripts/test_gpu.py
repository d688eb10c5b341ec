"""scripts/gpu.py without a GPU: it runs what it can, and survives parts that fail, hang or cannot run."""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/gpu.py"


def python(code, **options):
    return gpu.Part("test", "a part", (sys.executable, "-c", code), **options)


def run(part, out, seconds=60.0):
    return gpu.run(part, out, time.monotonic() + seconds)


def test_a_part_that_ends_well(tmp_path):
    outcome = run(python("import dexkernels, dex, os; print(os.environ['A'])", environment={"A": "b c"}), tmp_path)
    assert (outcome.state, outcome.detail) == ("ok", "b c")
    assert (tmp_path / gpu.LOG).read_text().startswith("\n# test: a part\n$ ")


def test_a_part_that_fails_says_how(tmp_path, capsys):
    outcome = run(python("print('first'); print('why'); raise SystemExit(3)"), tmp_path)
    assert (outcome.state, outcome.detail) == ("failed", "why (exit status 3)")
    assert "first\nwhy" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_that_hangs_is_stopped_with_what_it_started(tmp_path):
    beat = tmp_path / "beat"
    child = f"import pathlib, time\nwhile True: pathlib.Path({str(beat)!r}).touch(); time.sleep(0.05)"
    code = f"import subprocess, sys; print('started', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    outcome = run(python(code, minutes=0.05), tmp_path)
    assert outcome.state == "timeout" and "\nstarted\n" in (tmp_path / gpu.LOG).read_text()
    last = beat.stat().st_mtime_ns
    time.sleep(0.5)
    assert beat.stat().st_mtime_ns == last


def test_a_part_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    code = "import signal, time; signal.signal(2, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    began = time.monotonic()
    outcome = run(python(code, minutes=0.05), tmp_path)
    assert (outcome.state, outcome.detail) == ("timeout", "deaf") and time.monotonic() - began < 30


@pytest.mark.slow
def test_tests_that_run_out_of_time_still_say_which_failed(tmp_path):
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_bad(): assert 1 == 2\ndef test_slow(): time.sleep(120)\n")
    outcome = run(gpu.Part("test", "slow", (*gpu.PYTEST, "-c", "/dev/null", file), minutes=0.15), tmp_path)
    log = (tmp_path / gpu.LOG).read_text()
    assert outcome.state == "timeout" and "FAILED" in log and "test_bad" in log and "1 failed" in outcome.detail


def arguments(out, stages, jobs=1, **options):
    options = {"cpu": False, "commit": "0123abc", "minutes": 14} | options
    return argparse.Namespace(out=out, stages=stages, jobs=jobs, **options)


def test_parts_of_a_stage_run_together_and_their_output_stays_apart(tmp_path, monkeypatch):
    meet = (
        "import pathlib, sys, time\nhere, there = map(pathlib.Path, sys.argv[1:])\nprint('begin', here.name)\n"
        "here.touch()\nwhile not there.exists(): time.sleep(0.02)\nprint('end', here.name)"
    )
    a, b = tmp_path / "a", tmp_path / "b"
    both = [gpu.Part("test", p.name, (sys.executable, "-c", meet, p, q), minutes=0.5) for p, q in ((a, b), (b, a))]
    monkeypatch.setattr(gpu, "parts", lambda stage, arguments: both)
    outcomes = list(gpu.run_stage("test", arguments(tmp_path, ["test"], jobs=2), time.monotonic() + 60))
    assert {(o.name, o.state, o.detail) for o in outcomes} == {("a", "ok", "end a"), ("b", "ok", "end b")}
    log = (tmp_path / gpu.LOG).read_text()
    assert "begin a\nend a\n" in log and "begin b\nend b\n" in log


def test_what_is_timed_runs_alone(tmp_path, monkeypatch):
    """Were they to overlap, the second would find the first's file."""
    code = (
        "import pathlib, sys, time; p = pathlib.Path(sys.argv[1]); p.touch(exist_ok=False); time.sleep(1); p.unlink()"
    )
    two = [gpu.Part("bench", name, (sys.executable, "-c", code, tmp_path / "here")) for name in ("a", "b")]
    monkeypatch.setattr(gpu, "parts", lambda stage, arguments: two)
    outcomes = list(gpu.run_stage("bench", arguments(tmp_path, ["bench"], jobs=4), time.monotonic() + 60))
    assert [o.state for o in outcomes] == ["ok", "ok"]


@pytest.mark.slow
def test_a_stage_that_hangs_leaves_the_later_ones_their_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    monkeypatch.setattr(gpu, "FULL", {"test": 1, "bench": 1})
    hangs, measures = python("import time; time.sleep(60)"), python("print('measured')")
    monkeypatch.setattr(gpu, "parts", lambda stage, arguments: [hangs if stage == "test" else measures])
    given, deadline = arguments(tmp_path, ["test", "bench"]), time.monotonic() + 11
    (first,), (second,) = ([*gpu.run_stage(stage, given, deadline)] for stage in given.stages)
    assert (first.state, second.state, second.detail) == ("timeout", "ok", "measured") and first.seconds < 8


@pytest.mark.slow
def test_ended_from_outside_it_takes_its_parts_along_and_keeps_their_output(tmp_path):
    beat = tmp_path / "beat"
    forever = f"while True: pathlib.Path({str(beat)!r}).touch(); time.sleep(0.05)"
    hangs = f"import pathlib, time\nprint('so far', flush=True)\n{forever}"
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('gpu', {str(SCRIPT)!r})\n"
        "gpu = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(gpu)\n"
        f"part = gpu.Part('test', 'hangs', (sys.executable, '-c', {hangs!r}))\n"
        "gpu.parts = lambda stage, arguments: [part]\n"
        f"sys.argv = ['gpu', {str(tmp_path)!r}, '--cpu', '--stages', 'test']\nsys.exit(gpu.main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    for _ in range(600):
        if beat.exists():
            break
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143
    assert "so far" in (tmp_path / gpu.LOG).read_text()
    last = beat.stat().st_mtime_ns
    time.sleep(0.5)
    assert beat.stat().st_mtime_ns == last


def test_on_a_gpu_every_file_of_tests_and_every_benchmark_is_run(tmp_path):
    given = arguments(tmp_path, list(gpu.FULL))
    run = {stage: [part for part in gpu.parts(stage, given)] for stage in gpu.FULL}
    assert all(part.absent is None for part in run["test"] + run["recorded"] + run["bench"])
    for folder, option, values in (
        ("tests/kernels", "--tiles", {"small", "shipped"}),
        ("tests/dexkernels", "--backend", {"triton"}),
    ):
        for path in (ROOT / folder).rglob("test_*.py"):
            name = path.relative_to(ROOT).as_posix()
            found = {p.command[p.command.index(option) + 1] for p in run["test"] if name in p.command}
            assert found == ({"shipped"} if path.stem == "test_compiled" else values), name
    whole = {p.command[p.command.index("--backend") + 1] for p in run["test"] if "tests/dexkernels" in p.command}
    assert whole == {"reference", "cuda"}
    words = [str(word).partition("::")[0] for stage in run for part in run[stage] for word in part.command]
    assert not [word for word in words if word.startswith(("tests/", "benchmarks/")) and not (ROOT / word).exists()]
    benchmarks = {
        f"{file}::{name}"
        for file in gpu.BENCHMARKS
        for name in re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.M)
    }
    assert set(gpu.BENCHMARKS) == {f"benchmarks/{p.name}" for p in (ROOT / "benchmarks").glob("test_gpu_*.py")}
    assert sorted(word for part in run["bench"] for word in part.command if "::" in str(word)) == sorted(benchmarks)


def test_what_is_chosen_on_a_cpu_exists(tmp_path):
    chosen = [
        p for p in gpu.parts("test", arguments(tmp_path, ["test"], cpu=True)) if "-k" in p.command and not p.absent
    ]
    assert len(chosen) >= 2
    for part in chosen:
        done = subprocess.run([*map(str, part.command), "--collect-only"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{part.name}: {done.stdout}"


def test_a_part_that_cannot_run_or_has_no_time(tmp_path):
    assert run(python("", absent="no such tool"), tmp_path)[2:] == ("skipped", 0, "no such tool")
    assert run(python(""), tmp_path, seconds=gpu.GRACE + 1)[2:] == ("skipped", 0, "no time is left (--minutes)")


def script(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_stages_run_on_a_cpu_in_small(tmp_path):
    done = script(tmp_path, "--cpu", "--stages", "correct,speed,sanitize,step,tiles,recorded")
    summary = json.loads((tmp_path / "summary.json").read_text())
    states = {(p["stage"], p["name"]): p["state"] for p in summary["parts"]}
    assert done.returncode == 0, done.stdout + done.stderr
    assert {states["speed", name] for name in gpu.CHOSEN} == {"ok"}
    assert states["recorded", "reference, float64"] == states["step", "training step, eager and as a graph"] == "ok"
    assert states["correct", "dex verify"] == states["tiles", "six chosen tiles"] == "skipped"
    assert states["sanitize", "memcheck, aligned path"] == states["recorded", "cuda, float32"] == "skipped"
    assert {p.name for p in tmp_path.iterdir()} == {"log.txt", "summary.json"}, "what a CPU measures is no result"


def test_a_rehearsal_every_stage_hangs_and_each_still_begins_in_order_with_its_share(tmp_path, monkeypatch):
    """18 shares of 0.4 s; what is left of a stage's time goes to the later ones."""
    monkeypatch.setattr(gpu, "GRACE", 0.01)
    monkeypatch.setattr(gpu, "run", hangs := Hangs())
    monkeypatch.setattr(gpu, "parts", lambda stage, arguments: [gpu.Part(stage, "hangs")])
    total = sum(gpu.STAGES.values())
    given = arguments(tmp_path, list(gpu.STAGES), minutes=0.4 * total / 60)
    outcomes = gpu.run_all(given, {})
    assert [o.stage for o in outcomes] == ["build", "correct", "compile", "speed", "sanitize", "step", "tiles", "peers"]
    for stage, share in gpu.STAGES.items():
        assert hangs.seconds[stage] == pytest.approx(0.4 * share, abs=0.2), stage
    assert sum(hangs.seconds.values()) <= 0.4 * total + 0.2
    assert [p["stage"] for p in json.loads((tmp_path / "summary.json").read_text())["parts"]] == list(gpu.STAGES)


class Hangs:
    """Takes all the time that a part may have, and remembers how long that was."""

    def __init__(self):
        self.seconds = {}

    def __call__(self, part, out, deadline):
        began = time.monotonic()
        time.sleep(max(deadline - began, 0))
        self.seconds[part.stage] = time.monotonic() - began
        return gpu.Outcome(part.stage, part.name, "timeout", 0, "")


def test_within_15_minutes_no_part_can_take_the_share_of_a_later_stage_and_nothing_compiles_while_it_is_timed(tmp_path):
    given = arguments(tmp_path, list(gpu.STAGES))
    parts = {stage: gpu.parts(stage, given) for stage in gpu.STAGES}
    compiled, timed = (
        {w for stage in stages for p in parts[stage] for w in map(str, p.command) if w.startswith("benchmarks/")}
        for stages in (["compile"], ["speed", "step", "peers"])
    )
    assert compiled == timed and all("--once" in p.command for p in parts["compile"])
    assert {"speed", "step", "tiles", "peers", "correct"} <= set(gpu.ALONE) and "compile" not in gpu.ALONE
    assert list(gpu.STAGES)[-1] == "peers", "compiled peers come last"
    assert all(any("compiled" in str(word) for word in p.command) for p in parts["peers"])
    assert not any("compiled" in str(w) for s in ("speed", "step", "sanitize") for p in parts[s] for w in p.command)
    (verify,) = parts["correct"]
    minutes = float(verify.command[verify.command.index("--minutes") + 1])
    assert 2 <= minutes <= 14 * gpu.STAGES["correct"] / sum(gpu.STAGES.values())
    tools = {(p.name.split(", ")[0], p.name.split(", ")[1]) for p in parts["sanitize"]}
    assert len(tools) == 8 and {tool for tool, _ in tools} == {"memcheck", "racecheck"}


def test_a_second_run_into_the_same_folder_adds_its_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "parts", lambda stage, arguments: [python("print('x')", minutes=1)._replace(stage=stage)])
    for stages in (["build", "tiles"], ["tiles", "peers"]):
        gpu.run_all(arguments(tmp_path, stages), {})
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [p["stage"] for p in parts] == ["build", "tiles", "peers"]
    assert (tmp_path / gpu.LOG).read_text().count("# tiles: a part") == 2


@pytest.mark.slow
def test_the_benchmarks_need_neither_tyro_nor_plugins(tmp_path):
    """A GPU machine without a network has neither."""
    chosen = [p for stage in ("speed", "step") for p in gpu.parts(stage, arguments(tmp_path, ["speed"], cpu=True))]
    words = [w for p in chosen for w in p.command if str(w).startswith("benchmarks/")]
    code = f"""import sys
for name in ("tyro", "pytest_benchmark", "rich", "matplotlib", "tensorboard", "PIL"):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--collect-only", "--shape", "ViT-B", "--tiny", *{words!r}]))"""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "test_layer_step[" in done.stdout and "ViT-L" not in done.stdout


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
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "tests/dexkernels/test_reference.py", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "torch finds no CUDA device" in done.stdout
    assert re.search(r"^\d+ skipped in", done.stdout, re.M)


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
