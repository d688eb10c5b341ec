import numpy as np
import pytest
from PIL import Image

from dex import cli


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """`dex ARGUMENTS` in an empty folder and in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def pictures():
    """Writes ``count`` pictures of few patients below ``root``, each another one."""

    def write(root, count, side=64, first=0, patients=4):
        y, x = np.mgrid[0:side, 0:side] / side
        for i in range(first, first + count):
            rng = np.random.default_rng(i)
            image = 20 + 30 * x
            for _ in range(6):
                cy, cx, r = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.3)
                image = image + rng.uniform(20, 60) * ((x - cx) ** 2 + (y - cy) ** 2 < r * r)
            path = root / f"p{i % patients}" / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
        return root

    return write
