import sys

import pytest
import torch

from dex import cli
from dex.cli import doctor


def test_all_is_well_with_good_data(images, tmp_path, capsys):
    assert cli.main(["doctor", "--data", str(images), "--out", str(tmp_path / "deep" / "runs")]) == 0
    out = capsys.readouterr().out
    for section in ("versions", "devices", "backends", "kernels", "codecs", "formats", "disk", "data", "command"):
        assert any(line.startswith(section) for line in out.splitlines()), section
    assert " failed " not in out and out.splitlines()[-1] == "pretraining can run"
    assert "120 images" in out and "images/s" in out and "MB/s" in out
    assert list(tmp_path.iterdir()) == []


def test_broken_data_fails_by_name(tmp_path, capsys):
    assert cli.main(["doctor", "--data", str(tmp_path / "absent"), "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "data      failed" in out and "FileNotFoundError" in out
    assert out.splitlines()[-1].startswith("pretraining cannot run: 1 of ")


def test_missing_packages_are_named(monkeypatch):
    real = doctor.importlib.metadata.version

    def version(name):
        if name in ("tyro", "nibabel"):
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    found = {c.name: c for c in doctor.versions()}
    assert found["tyro"].status == "failed" and "pip install -e '.[train]'" in found["tyro"].detail
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


def test_backends_say_why_not():
    from dexkernels.ops import backends

    rows = backends.report()
    found = list(doctor.backends())
    assert len(found) == len(rows) > 0
    assert {c.status for c, r in zip(found, rows, strict=True) if not r.available} <= {"note"}
    assert all(r.reason in c.detail for c, r in zip(found, rows, strict=True))


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
