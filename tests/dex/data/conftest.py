import os
import sys

import pytest

sys.path.append(os.path.dirname(__file__))  # for the modules beside this one

from small_set import write  # noqa: E402


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "set")
