import subprocess
import sys

import pytest
import torch

from dex import cli
from dex.cli import doctor
from dex.train import forecast


@pytest.fixture(autouse=True)
def no_steps(monkeypatch):
    """Training steps are tried in tests/dex/train/test_forecast.py."""
    monkeypatch.setattr(forecast, "forecast", lambda plan: forecast.Forecast(90 * 60, "3 tried here"))


def test_all_is_well_with_good_data(images, tmp_path, capsys):
    assert cli.main(["doctor", "--data", str(images), "--out", str(tmp_path / "deep" / "runs")]) == 0
    verdict, time, empty, *lines = capsys.readouterr().out.splitlines()
    run = f"dex pretrain --preset demo --data {images}"
    assert verdict.startswith("pretraining can run, on the CPU in ") and verdict.endswith(
        f"with plain torch; next: {run}"
    )
    assert time == f"time of {run}: about 1h30m for 1,000 steps, an estimate from 3 tried here" and empty == ""
    for section in ("versions", "devices", "backends", "codecs", "formats", "disk", "data", "command"):
        assert any(line.startswith(section) for line in lines), section
    out = "\n".join(lines)
    assert " failed " not in out and "120 images" in out and "images/s" in out and "MB/s" in out
    assert list(tmp_path.iterdir()) == []


def test_broken_data_fails_by_name(tmp_path, capsys):
    assert cli.main(["doctor", "--data", str(tmp_path / "absent"), "--out", str(tmp_path)]) == 1
    verdict, _, *lines = capsys.readouterr().out.splitlines()
    assert verdict.startswith("pretraining cannot run: 1 of ") and "FileNotFoundError" in verdict
    assert any(line.startswith("data      failed") and "FileNotFoundError" in line for line in lines)


def test_the_run_may_be_another(run, images, tmp_path):
    (tmp_path / "my run.yaml").write_text("schedule: {steps: 7}\ndata: {batch_size: 8}\n")
    out = run("doctor", "--config", "my run.yaml", "--data", images)[1]
    assert f"time of dex pretrain --config 'my run.yaml' --data {images}: about 1h30m for 7 steps" in out
    out = run("doctor", "--preset", "paper", "--data", images)[1]
    assert out.startswith(
        f"pretraining can run, but not dex pretrain --preset paper --data {images}: data.batch_size: "
    )
    assert run("doctor", "--preset", "x")[::2] == (
        2,
        "dex doctor: preset: expected one of published-code, paper, demo, demo-monolithic, got 'x'\n",
    )
    (tmp_path / "wrong.yaml").write_text("schedule: {steps: 0}\n")
    assert "schedule.steps: expected at least 1, got 0" in run("doctor", "--config", "wrong.yaml")[2]


def test_a_step_that_fails_has_no_time(run, images, monkeypatch):
    def fail(plan):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(forecast, "forecast", fail)
    code, out, _ = run("doctor", "--data", images)
    assert code == 0 and "not known: a step failed: RuntimeError: out of memory" in out


def test_missing_packages_are_named(monkeypatch):
    real = doctor.importlib.metadata.version

    def version(name):
        if name in ("rich", "nibabel"):
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    found = {c.name: c for c in doctor.versions()}
    assert found["rich"].status == "failed" and "pip install -e '.[train]'" in found["rich"].detail
    assert found["nibabel"].status == "note" and found["torch"].status == "ok"


def test_every_format_says_its_suffixes_and_what_brings_its_library(monkeypatch):
    installed = {check.name: check for check in doctor.formats()}
    assert list(installed) == [format.title for format in doctor.table.FORMATS]
    for format in doctor.table.FORMATS:
        assert all(suffix in installed[format.title].detail for suffix in format.suffixes)
    assert "an image of a plain folder" in installed["picture"].detail
    assert ".npy also in a plain folder" in installed["NumPy"].detail

    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "nibabel" else find(name))
    lacking = {check.name: check for check in doctor.formats()}
    assert [name for name in lacking if lacking[name].status == "note"] == ["DICOM", "NIfTI"]
    assert "nibabel is not installed; pip install -e '.[data]' in the clone" in lacking["NIfTI"].detail
    assert lacking["MGH"].status == "ok"


def test_a_graph_of_the_step_says_why_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = [c for c in doctor.devices() if c.name == "CUDA graph"]
    assert found.status == "note"
    assert found.detail == "parallel.cuda_graph, not yet run on a GPU: expected a CUDA device, got cpu"


def test_operators_say_why_not():
    from dexkernels.ops import backends

    rows = backends.report()
    found = list(doctor.operators())
    assert len(found) == len(rows) > 0
    assert {c.status for c, r in zip(found, rows, strict=True) if not r.available} <= {"note"}
    assert all(r.reason in c.detail for c, r in zip(found, rows, strict=True))


def test_one_line_a_backend(monkeypatch):
    from dexkernels.ops import backends

    def row(op, backend, available, default, reason):
        return backends.BackendStatus(op, backend, available, default, reason, "", "")

    rows = [
        row("route", "reference", True, True, "plain torch, any device"),
        row("route", "triton", False, False, "triton is not installed"),
        row("route", "cuda", False, False, "this version ships no CUDA C++ kernel for route"),
        row("group_ema_", "reference", True, False, "plain torch, any device"),
        row("group_ema_", "triton", False, False, "triton is not installed"),
        row("group_ema_", "cuda", True, True, "verified on this GPU"),
    ]
    monkeypatch.setattr(backends, "report", lambda: rows)
    assert [(c.name, c.status, c.detail) for c in doctor.backends()] == [
        ("reference", "ok", "runs all 2 operators; default of route"),
        ("triton", "note", "triton is not installed (all 2 operators)"),
        (
            "cuda",
            "ok",
            "runs group_ema_; default of group_ema_; this version ships no CUDA C++ kernel (route); "
            "verified on this GPU (group_ema_)",
        ),
    ]


def test_all_lists_operators_and_kernels(run, images):
    short, whole = run("doctor", "--data", images)[1], run("doctor", "--data", images, "--all")[1]
    for section in ("operators", "kernels"):
        assert f"\n{section} " in whole and f"\n{section} " not in short
    assert "\nbackends " not in whole


def test_kernels_say_where_they_have_been_executed():
    found = {c.name: c.detail for c in doctor.kernels()}
    assert list(found) == [
        "adamw_ema_ triton",
        "adamw_ema_ cuda",
        "align_loss triton",
        "group_ema_ triton",
        "group_ema_ cuda",
        "grouped_mlp triton",
        "grouped_mlp cuda",
        "route triton",
    ]
    for detail in found.values():
        assert "executed on the emulator for sm_80, sm_90" in detail and "on a GPU: " in detail
        assert "never" not in detail


@pytest.mark.parametrize("name", ["JPEG", "PNG"])
def test_a_codec_that_loses_the_picture_fails(name, monkeypatch):
    from PIL import Image

    assert next(c for c in doctor.codecs() if c.name == name).status == "ok"
    real = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda self, *a, **k: real(self.point(lambda v: 255 - v), *a, **k))
    assert next(c for c in doctor.codecs() if c.name == name).status == "failed"


def test_a_disk_that_cannot_be_written_fails(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert [c.status for c in doctor.disk(tmp_path)] == ["ok", "failed"]


def test_another_program_called_dex_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (absent,) = doctor.command()
    assert absent.status == "note" and "not on PATH" in absent.detail
    script = tmp_path / "dex"
    script.write_text("#!/bin/sh\necho a decompiler\n")
    script.chmod(0o755)
    (other,) = doctor.command()
    assert other.status == "note" and "is another program" in other.detail and "-m dex" in other.detail
    script.write_text("#!/usr/bin/python3\nfrom dex.cli import main\n")
    (foreign,) = doctor.command()
    assert foreign.status == "note" and "a Python other than" in foreign.detail
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (ours,) = doctor.command()
    assert ours.status == "ok" and ours.detail == str(script)


def test_without_yaml_the_missing_package_is_named(tmp_path):
    """`pip install dexkernels` alone brings torch and numpy."""
    program = (
        "import importlib.metadata as metadata, sys\n"
        "sys.modules['yaml'] = None\n"
        "real = metadata.version\n"
        "def version(name):\n"
        "    if name == 'PyYAML':\n        raise metadata.PackageNotFoundError(name)\n    return real(name)\n"
        "metadata.version = version\n"
        "from dex.cli import main\n"
        f"sys.exit(main(['doctor', '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    verdict = done.stdout.splitlines()[0]
    assert (done.returncode, done.stderr) == (1, "") and verdict.startswith("pretraining cannot run: ")
    assert "first PyYAML: not installed; pip install -e '.[train]' in the clone" in verdict
