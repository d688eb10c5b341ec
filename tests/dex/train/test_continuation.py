import json

import pytest

from dex import config
from dex.cli import main
from dex.train.continuation import Override, continue_run
from dex.train.run import pretrain
from dex.train.runlog import read_rows


def metrics(folder):
    times = ("images_per_s", "data_wait_s", "memory_mb", "memory_now_mb", "evaluation_s")
    return [{k: v for k, v in row.items() if k not in times} for row in read_rows(folder / "metrics.jsonl")]


def continued(earlier, wanted, done, override=None):
    """As when the run of ``earlier`` has taken ``done`` steps."""
    state = {"steps": earlier.schedule.steps, "precision": "fp32", "step": done}
    return continue_run(earlier, state, wanted, {"steps": wanted.schedule.steps, "precision": "fp32"}, override)


@pytest.mark.parametrize(
    ("shape", "done", "refused"),
    [
        ("constant", 12, None),
        ("wsd", 9, None),
        (
            "wsd",
            10,
            "has been falling since step 9: resume from a checkpoint up to that step, --resume RUN/checkpoints",
        ),
        ("cosine", 3, "schedule.steps: expected 12, got 20: a run with a cosine learning rate cannot be extended"),
    ],
)
def test_a_run_is_extended_where_no_step_was_made_for_its_length(shape, done, refused, tiny, change):
    earlier = change(tiny, schedule__lr_shape=shape, schedule__decay=0.25)
    found = continued(earlier, change(earlier, schedule__steps=20), done)
    assert len(found.refused) == (refused is not None) and (refused is None or refused in found.refused[0])
    if refused is None:
        assert found.config.schedule.span == 12 and found.changes[0][:3] == ("schedule.steps", 12, 20)
        # The next start comes by the command line of the first or of the second one.
        again = continued(found.config, change(earlier, schedule__steps=20), done + 1)
        assert (again.config, again.changes, again.refused) == (found.config, [], [])
        longer = continued(found.config, change(earlier, schedule__steps=30), done)
        assert (longer.config.schedule.span, longer.refused) == (12, [])


def test_another_field_is_refused_beside_the_length(tiny, change):
    earlier = change(tiny, schedule__lr_shape="constant")
    found = continued(earlier, change(earlier, schedule__steps=20, run__seed=3), 5)
    assert found.refused == ["run.seed: expected 0, got 3"]
    assert continued(earlier, change(earlier, schedule__steps=8), 5).refused == ["schedule.steps: expected 12, got 8"]


def test_what_is_overridden_goes_on_and_nothing_else(tiny, change):
    wanted = change(tiny, optim__base_lr=0.1, run__seed=3)
    found = continued(tiny, wanted, 5, Override(("optim.base_lr",), "too fast"))
    assert found.changes == [("optim.base_lr", 0.2, 0.1, "too fast")]
    assert found.refused == ["run.seed: expected 0, got 3"]
    stretched = continued(tiny, change(tiny, schedule__steps=20), 12, Override(("schedule.steps",), "more data"))
    assert (stretched.refused, stretched.config.schedule.span) == ([], None)
    assert stretched.changes == [("schedule.steps", 12, 20, "more data")]


@pytest.mark.parametrize(
    ("override", "resume", "message"),
    [
        (Override(("optim.eps",), "why"), None, "override: expected a resumed run"),
        (Override(("optim.eps",), " "), "auto", "reason: expected why --override changes the run"),
        (Override(("optim.lr",), "why"), "auto", "override: expected fields of the configuration.*, got 'optim.lr'"),
        (Override(("data.batch_size",), "why"), "auto", "override: data.batch_size counts the images"),
    ],
)
def test_an_override_that_cannot_be_is_named(override, resume, message):
    with pytest.raises(ValueError, match=message):
        override.check(resume)


@pytest.fixture
def constant(tiny, change):
    return change(tiny, schedule__lr_shape="constant", schedule__steps=6, run__log_every=3)


def test_a_finished_run_is_extended_to_what_a_longer_one_had_been(constant, change, tmp_path):
    """The longer one with the schedules' span of the shorter; the command line asks for steps alone."""
    assert pretrain(change(constant, schedule__steps=12, schedule__span=6), tmp_path / "long") == 0
    assert pretrain(constant, tmp_path / "short") == 0
    assert main(["pretrain", "--resume", "auto", "--out", str(tmp_path / "short"), "--steps", "12"]) == 0
    unlike = ("epoch",)
    assert [{k: v for k, v in row.items() if k not in unlike} for row in metrics(tmp_path / "short")] == [
        {k: v for k, v in row.items() if k not in unlike} for row in metrics(tmp_path / "long")
    ]
    start = json.loads((tmp_path / "short" / "run.json").read_text())["starts"][-1]
    change_of_it = {"field": "schedule.steps", "was": 6, "now": 12, "reason": None, "step": 6}
    assert start["changes"] == [change_of_it] and start["steps"] == 12
    assert config.read_yaml(tmp_path / "short" / "config.yaml", config.Config()).schedule.span == 6
    assert "extended" in [event["event"] for event in read_rows(tmp_path / "short" / "events.jsonl")]


def test_an_override_is_recorded_with_its_reason_and_shown(constant, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "c.yaml").write_text(config.to_yaml(constant))
    assert main(["pretrain", "--config", str(tmp_path / "c.yaml"), "--out", str(out), "--run.stop-at", "3"]) == 0
    again = ["pretrain", "--resume", "auto", "--out", str(out), "--optim.base-lr", "0.1"]
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(again) == 2
    assert "optim.base_lr: expected 0.2, got 0.1; --override FIELD --reason TEXT" in capsys.readouterr().err
    assert main([*again, "--override", "optim.base_lr"]) == 2 and "reason: expected" in capsys.readouterr().err
    assert main([*again, "--reason", "x"]) == 2 and "override: expected the fields" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert main([*again, "--override", "optim.base-lr", "--reason", "it swings"]) == 0
    start = json.loads((out / "run.json").read_text())["starts"][-1]
    record = {"field": "optim.base_lr", "was": 0.2, "now": 0.1, "reason": "it swings", "step": 3}
    assert start["changes"] == [record]
    assert [row["lr"] for row in metrics(out)] == pytest.approx([0.2 * 8 / 512, 0.1 * 8 / 512])
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "overridden" in page and "it swings" in page
