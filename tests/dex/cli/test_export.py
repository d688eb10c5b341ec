"""`dex export` as a user starts it; what is written is in tests/dex/inference/test_export.py."""

import re
from pathlib import Path

import pytest

import dex
from dex.cli import export
from dex.inference.export import FORMATS


@pytest.fixture
def model():
    return Path(__file__).parents[1] / "train" / "earlier_run" / "embedded"


def test_the_formats_are_those_there_are():
    assert export._FORMATS == FORMATS


def test_safetensors(model, run, tmp_path):
    code, out, err = run("export", model, "--format", "safetensors", "--out", "model", "--path", "director")
    assert (code, err) == (0, "") and re.fullmatch(r"model: safetensors, \d+ kB, director\n", out)
    assert dex.load(tmp_path / "model").path == "director"
    code, _, err = run("export", model, "--format", "hf", "--out", "model")
    assert (code, err) == (2, "dex export: out: expected a new or empty folder, got model\n")


def test_timm_is_the_director_by_itself(model, run, tmp_path):
    code, out, _ = run("export", model, "--format", "timm", "--out", "dense", "--img-size", "64")
    assert code == 0 and out.endswith("director\n") and (tmp_path / "dense" / "model.safetensors").is_file()
    code, _, err = run("export", model, "--format", "timm", "--path", "experts", "--out", "other")
    assert code == 2 and "path: expected director for format timm" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--format", "pt", "--out", "x"),
            "format: expected one of safetensors, hf, timm, onnx, torch-export, got 'pt'",
        ),
        (("--format", "hf", "--out", " "), "out: expected a folder, got ' '"),
        (("--format", "hf", "--out", "x", "--img-size", "33"), "img_size: expected a multiple of the patch size, 8"),
    ],
)
def test_wrong_input_is_one_line(options, message, model, run, tmp_path):
    code, _, err = run("export", model, *options)
    assert code == 2 and err.startswith(f"dex export: {message}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_onnx_needs_its_extra(model, run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    code, _, err = run("export", model, "--format", "onnx", "--out", "x")
    assert code == 2 and "pip install -e '.[train,data,export]'" in err
