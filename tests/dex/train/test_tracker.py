import getpass
import importlib.machinery
import importlib.util
import socket
import sys
import types

import pytest

from dex import config
from dex.train import tracker
from dex.train.run import pretrain
from dex.train.runlog import read_rows


class Run:
    """Stands for a run of wandb: keeps what it is told."""

    def __init__(self, options):
        self.options, self.rows, self.finished = options, [], False

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


@pytest.fixture
def service(monkeypatch):
    """A stand-in for the package; the runs that were begun."""
    runs = []

    def init(**options):
        runs.append(Run(options))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.init, module.Settings = init, lambda **fields: fields
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_numbers_have_names_of_their_own():
    row = {"step": 3, "loss": 1.5, "none": None, "by": {"a": 1.0, "table": [[1]]}, "layers": [0.1, 0.2]}
    assert tracker.scalars(row) == {"loss": 1.5, "by/a": 1.0, "layers/layer 0": 0.1, "layers/layer 1": 0.2}


def test_every_start_goes_on_with_the_numbers_of_one_run(service, tiny, change, tmp_path):
    c = change(tiny, run__wandb="lab", run__evaluate_every=8)
    assert pretrain(change(c, run__stop_at=6), tmp_path / "out") == 0
    assert pretrain(c, tmp_path / "out", resume="auto") == 0
    first, second = service
    assert first.options["id"] == second.options["id"] and first.options["project"] == "lab"
    assert first.finished and second.finished
    logged = [row for run in service for row in run.rows]
    rows = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in logged] == [row["step"] for row in rows]
    assert [row["loss"] for row in logged if "loss" in row] == [row["loss"] for row in rows if "loss" in row]
    assert any("val_modality_loss/ct" in row for row in logged)
    sent = str(service[0].options)
    assert tiny.data.path not in sent and "optim.base_lr" in sent


@pytest.mark.parametrize("method", ["init", "log", "finish"])
def test_what_fails_there_never_ends_the_run(method, service, tiny, change, monkeypatch, tmp_path, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("no\nservice")

    if method == "init":
        monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    else:
        monkeypatch.setattr(Run, method, fail)
    assert pretrain(change(tiny, run__wandb="lab"), tmp_path / "out") == 0
    said = "run.wandb: tracking ends, the run continues: no service"
    assert capsys.readouterr().err.count(said) == 1
    assert [row["step"] for row in read_rows(tmp_path / "out" / "metrics.jsonl")] == [4, 8, 12]


def test_without_the_package_the_start_is_refused(tiny, change, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ValueError, match="run.wandb: expected null, since the package wandb is not installed .pip install wandb."
    ):
        pretrain(change(tiny, run__wandb="lab"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_offline_it_writes_no_machine_no_user_and_no_path(dex_process, tiny, change, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "c.yaml").write_text(config.to_yaml(change(tiny, run__wandb="lab")))
    process = dex_process("pretrain", "--config", tmp_path / "c.yaml", "--out", tmp_path / "out")
    said = process.communicate(timeout=120)
    assert process.returncode == 0 and "tracking ends" not in said[1], said
    (records,) = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    data = records.read_bytes()
    assert b"grad_norm" in data
    for private in (socket.gethostname(), tiny.data.path, getpass.getuser() + "@"):
        assert private.encode() not in data
