"""The blocks of docs/you-have-a-checkpoint.md, in order, each in a fresh interpreter or shell."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "you-have-a-checkpoint.md"
RUN = ROOT / "tests" / "dex" / "train" / "earlier_run" / "embedded"


class Block(NamedTuple):
    language: str
    needs: tuple[str, ...]
    """``run``, and modules of extras."""
    text: str


def blocks():
    found = re.findall(r"^```(python|sh) needs=(\S+)\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
    return [Block(language, tuple(needs.split(",")), text) for language, needs, text in found]


@pytest.fixture
def workplace(tmp_path, images):
    """A folder with what the page says lies there."""
    nibabel = pytest.importorskip("nibabel")
    numpy = pytest.importorskip("numpy")
    import pydicom.data

    shutil.copytree(RUN, tmp_path / "runs" / "demo")
    for name, folder in (("a", "ct"), ("b", "us")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(6):
            shutil.copy(images / folder / f"{i:03d}.png", tmp_path / "pictures" / name / f"{i}.png")
    shutil.copy(pydicom.data.get_testdata_file("CT_small.dcm", download=False), tmp_path / "scan.dcm")
    values = numpy.random.default_rng(0).integers(0, 1000, (40, 40, 3), dtype=numpy.int16)
    nibabel.save(nibabel.Nifti1Image(values, numpy.eye(4)), tmp_path / "scan.nii.gz")
    return tmp_path


@pytest.mark.slow
def test_every_block_runs_in_a_fresh_interpreter(workplace):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    missing = set()
    for block in blocks():
        absent = {name for name in block.needs if name not in ("run", "embed") and not importlib.util.find_spec(name)}
        if absent:
            missing |= absent
            continue
        # `dex` is the one of this interpreter.
        shell = f'set -e\ndex() {{ "{sys.executable}" -m dex "$@"; }}\n{block.text}'
        command = [sys.executable, "-c", block.text] if block.language == "python" else ["bash", "-c", shell]
        done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{block.text}\n{done.stderr}"
    if missing:
        pytest.skip(
            f"without {', '.join(sorted(missing))}, of the extras 'adapt' and 'export', some blocks did not run"
        )


def test_no_block_is_forgotten():
    """What is not run is marked ``py``: an example that needs a download."""
    marked = re.findall(r"^```(\w.*)$", PAGE.read_text(), flags=re.M)
    assert len(blocks()) >= 10 and sum("needs=" not in mark for mark in marked) == marked.count("py") == 1
