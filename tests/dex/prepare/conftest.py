import os
import sys

import pytest

sys.path.append(os.path.dirname(__file__))  # for the modules beside this one

from small_runs import picture, save, save_volume, source  # noqa: E402

from dex.prepare import discover  # noqa: E402


@pytest.fixture
def here(inline_workers, monkeypatch):
    """Work in this process, four units to a chunk."""
    monkeypatch.setattr(discover, "CHUNK_UNITS", 4)


@pytest.fixture
def two(tmp_path):
    """14 pictures of 7 patients, and two CT volumes of one each."""
    for i in range(14):
        save(tmp_path / "pictures", f"p{i // 2}/{i:02d}.png", picture(i))
    for v in range(2):
        save_volume(tmp_path / "volumes" / f"v{v}" / "ct.nii.gz", 100 + 10 * v)
    return [source(tmp_path / "pictures"), source(tmp_path / "volumes", "volumes", "CT")]
