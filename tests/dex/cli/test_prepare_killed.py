"""`dex prepare` as processes, killed together in the middle of a chunk."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dex.data import verify
from dex.prepare.run import private_folder

pytestmark = pytest.mark.slow
SECONDS = 240
"""For what takes some two of a free processor."""


def command(out):
    words = ["prepare", "photos", "--out", out, "--modality", "dermoscopy", "--workers", "1"]
    return [sys.executable, "-m", "dex", *words]


def set_of(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def test_a_kill_within_a_chunk_costs_what_was_not_yet_kept(tmp_path, monkeypatch):
    """One chunk of 24 photographs: the same command goes on within it, to the same bytes, and leaves nothing over."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(24):
        small = Image.fromarray(draw.integers(0, 256, (40, 40, 3), np.uint8))
        small.resize((1500, 1400), Image.Resampling.BICUBIC).save(
            tmp_path / f"photos/{number:03d}.png", compress_level=1
        )
    for name in ("whole", "cut"):
        private_folder(tmp_path / name).mkdir(mode=0o700)
        (private_folder(tmp_path / name) / "salt").write_bytes(bytes(range(32)))  # names that can be compared
    subprocess.run(command("whole"), check=True, capture_output=True, timeout=SECONDS)

    chunks, left, began = private_folder(tmp_path / "cut") / "chunks", [], time.monotonic()
    killed = subprocess.Popen(command("cut"), start_new_session=True, stdout=subprocess.DEVNULL)
    while not left and killed.poll() is None and time.monotonic() < began + SECONDS:
        time.sleep(0.02)
        left = list(chunks.glob("*.unfinished"))
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert left and not (tmp_path / "cut").exists()
    kept = json.loads(left[0].read_text())["state"]["next"]
    assert 1 <= kept < 24
    for path in sorted((tmp_path / "photos").iterdir())[:kept]:  # is not read again, so it may hold anything
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    done = subprocess.run(command("cut"), check=True, capture_output=True, text=True, timeout=SECONDS)
    assert set_of(tmp_path / "cut") == set_of(tmp_path / "whole") and verify(tmp_path / "cut") == []
    assert not chunks.exists() and "Traceback" not in done.stderr
