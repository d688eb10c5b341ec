"""What pretraining and fine-tuning share between their steps."""

import pytest
import torch

from dex.common import exits
from dex.common.ranks import ALONE
from dex.train.engine import Engine
from dex.train.loop import SLOW_RANK, RunLoop
from dex.train.runlog import Progress, RunLog, read_rows
from dex.train.verdict import NonFinite
from dex.train.watch import Watch


class Loop(RunLoop):
    command = "dex try"
    saved_at = None

    def _greet(self):
        pass

    def _save(self, wait=False):
        self.saved_at = self.trainer.step

    def _steps(self):
        return self.take()


@pytest.fixture
def loop(tmp_path, tiny):
    trainer = Engine(ALONE, torch.device("cpu"), "fp32")
    trainer.close = lambda: None
    log = RunLog(tmp_path / "run")
    log.open(tiny, {"step": 0})
    return Loop(trainer, log, Watch(ALONE, 60.0), Progress(10, 0), keep=1)


def test_a_failure_before_the_first_step_leaves_no_folder(loop):
    def fail():
        raise OSError("no")

    loop.take = fail
    with pytest.raises(OSError, match="no"):
        loop.run()
    assert not loop.log.folder.exists()


def test_a_failure_later_leaves_what_there_is_and_others_may_write(loop):
    def fail():
        loop.trainer.step = 1
        raise OSError("no")

    loop.take = fail
    with pytest.raises(OSError, match="no"):
        loop.run()
    assert (loop.log.folder / "config.yaml").is_file()
    RunLog(loop.log.folder).hold()


def test_non_finite_steps_end_it_saved_with_the_count_at_0(loop, capsys):
    bad = [NonFinite(step, float("nan"), 1.0, ["a", "b"]) for step in range(3)]

    def end():
        loop.trainer.step, loop.trainer.nonfinite_in_a_row = 3, 3
        loop._report(bad)
        return loop._stop_nonfinite(bad)

    loop.take = end
    assert loop.run() == exits.NONFINITE
    assert loop.saved_at == 3 and loop.trainer.nonfinite_in_a_row == 0
    events = read_rows(loop.log.folder / "events.jsonl")
    assert [event["event"] for event in events] == ["non-finite step"] * 3 + ["stopped"]
    out = capsys.readouterr()
    assert out.err.startswith("dex try: stopped at step 3: 3 non-finite steps") and "a, b" in out.err


def test_a_slow_rank_is_named_in_the_second_row(loop, capsys):
    loop.watch.who = lambda rank: f"rank {rank}"
    row = {"step": 5, "slowest_rank": 1, "slowest_rank_s": 1.0 + 2 * SLOW_RANK, "median_rank_s": 1.0}

    def rows():
        loop._name_slow_rank(row, 1.0)
        assert "slow" not in capsys.readouterr().out
        loop._name_slow_rank(row, 1.0)
        return exits.DONE

    loop.take = rows
    assert loop.run() == exits.DONE
    assert "rank 1 is slow" in capsys.readouterr().out


def test_lost_output_is_an_event_once(loop):
    def rows():
        loop.progress = Progress(10, 0, summary=lambda row: "loss 1")
        loop.progress.lost = "Broken pipe"
        for step in (1, 2):
            loop._show({"step": step, "loss": 1.0})
        return exits.DONE

    loop.take = rows
    assert loop.run() == exits.DONE
    events = read_rows(loop.log.folder / "events.jsonl")
    assert [(event["step"], event["reason"]) for event in events] == [(1, "Broken pipe")]
    assert len(read_rows(loop.log.folder / "metrics.jsonl")) == 2
