import pytest

from dex.train.run import pretrain


@pytest.fixture(scope="package")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def trained(store, tiny):
    """Folder of a run of 12 steps with checkpoints at 5, 10 and 12; tests do not change it."""
    folder = store / "run"
    if not folder.exists():
        assert pretrain(tiny, folder) == 0
    return folder


@pytest.fixture
def control(store, tiny, change):
    """Folder of a run of one step of the monolithic control; tests do not change it."""
    folder = store / "control"
    if not folder.exists():
        assert pretrain(change(tiny, model__num_experts=0, schedule__steps=1), folder) == 0
    return folder
