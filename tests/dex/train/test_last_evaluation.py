"""Held-out images are looked at where a run ends or is stopped: the newest figures are of the newest weights."""

import signal

import pytest

from dex.cli import main
from dex.train import trainer as engine
from dex.train.run import pretrain
from dex.train.runlog import read_rows


def evaluated(out):
    return [row["step"] for row in read_rows(out / "metrics.jsonl") if "val_loss" in row]


@pytest.fixture
def signalled(monkeypatch):
    real = engine.Trainer.train_step

    def install(number):
        def train_step(self):
            if self.step == 6:
                signal.raise_signal(number)
            return real(self)

        monkeypatch.setattr(engine.Trainer, "train_step", train_step)

    return install


@pytest.mark.parametrize(
    ("number", "steps"), [(signal.SIGINT, [0, 7]), (signal.SIGUSR1, [0, 7]), (signal.SIGTERM, [0])], ids=str
)
def test_a_stop_is_evaluated_unless_the_run_is_about_to_be_killed(number, steps, tiny, change, signalled, tmp_path):
    signalled(number)
    assert pretrain(change(tiny, run__evaluate_every=100), tmp_path / "out") == 75
    assert evaluated(tmp_path / "out") == steps


def test_a_planned_stop_is_evaluated_and_the_report_says_of_what(tiny, change, tmp_path):
    out = tmp_path / "out"
    assert pretrain(change(tiny, run__evaluate_every=100, run__stop_at=7), out) == 0
    assert evaluated(out) == [0, 7]
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "at step 7." in page and "step 7, 6 images" in page and "steps 1 to 4, 32 images" in page
    assert pretrain(change(tiny, run__evaluate_every=100), out, resume="auto") == 0
    assert evaluated(out) == [0, 7, 12]


def test_nothing_is_evaluated_where_nothing_is_asked_for(tiny, change, tmp_path):
    assert pretrain(change(tiny, run__stop_at=2), tmp_path / "out") == 0
    assert evaluated(tmp_path / "out") == []
