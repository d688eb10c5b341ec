"""An installation, editable ones included, is understood by a type checker that has no settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

USE = """
from typing import assert_type

import torch
from torch import Tensor

import dex
import dexkernels

layer = dexkernels.DEXLayer(64, 256, align="cosine")
x = torch.zeros(2, 5, 64)
assert_type(layer(x), Tensor)
y, aux = layer(x, noise_std=0.1, return_aux=True)
assert_type(y, Tensor)
assert_type(aux, dexkernels.Aux)
assert_type(aux.gates, Tensor)
assert_type(layer.num_experts, int)
with dexkernels.collect_aux(layer) as collected:
    layer(x)
assert_type(collected.losses(align=0.01, balance=0.01), Tensor)
assert_type(dexkernels.upcycle_(torch.nn.Sequential(), routing="token"), dict[str, dexkernels.DEXLayer])
"""

WRONG = """
import dexkernels

dexkernels.DEXLayer(64, 256, align="cosinus")
dexkernels.DEXLayer(64, 256)(None)
dexkernels.upcycle_(None, rooting="token")
"""


def diagnostics(tmp_path: Path, text: str) -> list[str]:
    """What basedpyright, in its standard mode, has to say of a file outside of the repository."""
    (tmp_path / "use.py").write_text(text)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "use.py"]
    run = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
    )
    return [d["message"] for d in json.loads(run.stdout)["generalDiagnostics"]]


def test_the_public_names_have_the_types_that_a_user_expects(tmp_path):
    assert diagnostics(tmp_path, USE) == []


def test_a_wrong_name_is_seen_before_anything_runs(tmp_path):
    said = diagnostics(tmp_path, WRONG)
    assert len(said) >= 3
    assert any("cosinus" in line for line in said) and any("rooting" in line for line in said)
