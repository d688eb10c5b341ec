import os
import sys

import pytest

sys.path.append(os.path.dirname(__file__))  # for run_folders


@pytest.fixture
def few(tmp_path):
    """A run of four rows."""
    from run_folders import held_out, row, write

    return write(tmp_path / "few", [held_out(0), row(4), row(8), held_out(8)])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained") / "tiny run"


@pytest.fixture
def real(trained, tiny, change):
    """A pretraining of 12 steps with evaluations, as it is; tests do not change it."""
    from dex.train.run import pretrain

    if not trained.exists():
        assert pretrain(change(tiny, run__evaluate_every=6), trained, command=["dex", "pretrain"]) == 0
    return trained


@pytest.fixture(scope="session")
def _analysed():
    return {}


@pytest.fixture
def analysis(_analysed, real):
    """Of the run `real`, over its checkpoints, beside itself one step earlier; tests do not change it."""
    import torch

    from dex.inference import analyse_job

    if not _analysed:
        options = analyse_job.Options(probed=60, checkpoints="all")
        other = real / "checkpoints" / "step-00000010"
        prepared = analyse_job.prepare(real, options, compare=other)
        _analysed["found"] = analyse_job.analyse(prepared, torch.device("cpu"))
    return _analysed["found"]
