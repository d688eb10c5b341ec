"""Which checkpoints of a run stay: the newest, milestones, the one of the lowest held-out loss."""

import pytest

import dex
from dex.train import checkpoint
from dex.train import trainer as engine
from dex.train.run import pretrain
from dex.train.runlog import read_rows


def steps(out):
    return [step for step, _ in checkpoint.list_checkpoints(out / "checkpoints")]


@pytest.fixture
def frugal(tiny, change):
    return change(tiny, run__checkpoint_every=2, run__keep_checkpoints=1)


@pytest.fixture
def val_losses(monkeypatch):
    """``val_losses({step: loss})``: what evaluations find."""
    real = engine.Trainer.evaluate

    def install(losses):
        def evaluate(self, pictures=16):
            return real(self, pictures)._replace(loss=losses[self.step])

        monkeypatch.setattr(engine.Trainer, "evaluate", evaluate)

    return install


def test_milestones_stay_whatever_is_asked_for_later(frugal, change, tmp_path):
    out = tmp_path / "out"
    assert pretrain(change(frugal, run__milestones=(3, 4), run__stop_at=8), out) == 0
    assert steps(out) == [3, 4, 8]
    assert checkpoint.load(out / "checkpoints" / "step-00000003").state["milestone"] is True
    assert "milestone" not in checkpoint.load(out / "checkpoints" / "step-00000008").state
    assert pretrain(frugal, out, resume="auto") == 0
    assert steps(out) == [3, 4, 12]
    loaded = dex.load(out / "checkpoints" / "step-00000003")
    assert loaded.step == 3


def test_wsd_keeps_the_step_before_its_decay_for_a_longer_run(frugal, change, tmp_path):
    wsd = change(frugal, schedule__lr_shape="wsd", schedule__decay=0.25)
    assert pretrain(wsd, tmp_path / "out") == 0
    assert steps(tmp_path / "out") == [9, 12]
    longer = change(wsd, schedule__steps=16)
    with pytest.raises(ValueError, match="--resume RUN/checkpoints/step-00000009"):
        pretrain(longer, tmp_path / "out", resume="auto")
    assert pretrain(longer, tmp_path / "out", resume=tmp_path / "out" / "checkpoints" / "step-00000009") == 0
    assert [row["step"] for row in read_rows(tmp_path / "out" / "metrics.jsonl")] == [4, 8, 12, 16]
    assert steps(tmp_path / "out") == [9, 12, 16]


def test_the_best_stays_across_a_resume_until_a_better_one_comes(frugal, change, val_losses, tmp_path, capsys):
    out, c = tmp_path / "out", change(frugal, run__keep_best=True, run__evaluate_every=3)
    val_losses({0: 0.1, 3: 0.7, 6: 0.5, 7: 0.8, 9: 0.6, 10: 0.9, 12: 0.4})  # at 7 and 10 it stops
    assert pretrain(change(c, run__stop_at=7), out) == 0
    assert steps(out) == [6, 7]  # step 3 went when 6 was better; step 0 has no checkpoint
    assert pretrain(change(c, run__stop_at=10), out, resume="auto") == 0
    assert steps(out) == [6, 10] and dex.load(out / "checkpoints" / "step-00000006").step == 6
    assert "lowest held-out loss 0.5000 at step 6: checkpoints/step-00000006" in capsys.readouterr().out
    assert pretrain(c, out, resume="auto") == 0
    assert steps(out) == [12]


def test_an_evaluation_that_is_not_finite_is_never_the_best(frugal, change, val_losses, tmp_path):
    c = change(frugal, run__keep_best=True, run__evaluate_every=3)
    val_losses({0: 0.1, 3: float("nan"), 6: 0.5, 9: float("nan"), 12: 0.6})
    assert pretrain(c, tmp_path / "out") == 0
    assert steps(tmp_path / "out") == [6, 12]


def test_what_cannot_be_kept_is_named(frugal, change, tmp_path):
    with pytest.raises(
        ValueError, match="run.keep_best: expected false unless run.evaluate_every is above 0, got True"
    ):
        pretrain(change(frugal, run__keep_best=True), tmp_path / "out")
    with pytest.raises(ValueError, match=r"run.milestones: expected at most the run's 12 steps, got \(3, 13\)"):
        pretrain(change(frugal, run__milestones=(3, 13)), tmp_path / "out")
