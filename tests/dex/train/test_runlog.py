import os
import pty
import select
import subprocess
import sys

from dex import config
from dex.train.runlog import Progress, RunLog, read_rows

ROW = {
    "step": 4,
    "loss": 0.5,
    "align_loss": 2.0,
    "balance_loss": 1.0,
    "grad_norm": 0.1,
    "lr": 1e-3,
    "momentum": 0.99,
    "noise_std": 0.7,
    "images_per_s": 12.0,
    "skipped": 0,
}


def test_plain_lines_hold_every_value(capsys):
    progress = Progress(10, 0)
    with progress.shown():
        progress.step(4)
        progress.row(ROW)
        progress.row(ROW | {"loss": None, "skipped": 2})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "step 4/10  loss 0.5000  align 2.0000  balance 1.0000  grad 0.100  lr 1.00e-03  momentum 0.9900  noise 0.700  "
        "12.0 images/s  left "
    )
    assert "loss -" in second and "skipped 2" in second


def test_a_terminal_gets_a_bar():
    """In a pseudo-terminal: a bar that moves, the values, and lines that stay."""
    program = f"""
from dex.train.runlog import Progress
progress = Progress(10, 0)
with progress.shown():
    progress.say('a line [that] stays')
    for step in range(1, 11):
        progress.step(step)
    progress.row({ROW!r})
"""
    main, side = pty.openpty()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "TERM": "xterm",
        "COLUMNS": "150",
    }
    process = subprocess.Popen([sys.executable, "-c", program], stdout=side, stderr=side, env=environment)
    os.close(side)
    seen = b""
    while select.select([main], [], [], 60)[0]:
        try:
            part = os.read(main, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(main)
    assert process.wait() == 0, seen
    text = seen.decode()
    assert "a line [that] stays" in text and "10/10" in text and "━" in text and "loss 0.5000" in text


def test_rows_are_cut_at_the_step_and_never_hold_nan(tmp_path):
    log = RunLog(tmp_path / "run")
    log.open(config.Config(), {"step": 0})
    for step in (1, 2, 3):
        log.row({"step": step, "loss": float("nan"), "by": {"ct": float("inf"), "mr": 1.0}, "layers": [0.5, 1.0]})
        log.event(step, "something", value=float("-inf"))
    log.close()
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    again = RunLog(tmp_path / "run")
    again.open(config.Config(), {"step": 2})
    again.row({"step": 3, "loss": 1.0})
    again.close()
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in rows] == [(1, None), (2, None), (3, 1.0)]
    assert rows[0]["by"] == {"ct": None, "mr": 1.0}
    assert [e["step"] for e in read_rows(tmp_path / "run" / "events.jsonl")] == [1, 2]


def test_tensorboard_holds_the_numbers_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from dex.analysis import plots

    log = RunLog(tmp_path / "run")
    log.open(config.Config(), {"step": 0})
    row = ROW | {"modality_loss": {"ct": 0.25}, "usage_entropy": [0.5, 0.75]}
    log.row(row)
    log.picture("losses.png", "losses", plots.loss_curves([row], "x"), 4)
    log.close()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    got = {tag: board.Scalars(tag)[0] for tag in board.Tags()["scalars"]}
    assert got["loss"].value == 0.5 and got["loss"].step == 4
    assert got["modality_loss/ct"].value == 0.25 and got["usage_entropy/layer 1"].value == 0.75
    assert board.Tags()["images"] == ["losses"]


def test_another_rank_writes_nothing(tmp_path):
    log = RunLog(tmp_path / "run", active=False)
    log.hold()
    log.open(config.Config(), {"step": 0})
    log.row({"step": 1, "loss": 1.0})
    log.event(1, "something")
    log.picture("losses.png", "losses", None, 1)
    log.discard()
    assert list(tmp_path.iterdir()) == []


def test_discard_takes_back_a_run_and_the_folders_that_were_made_for_it(tmp_path):
    log = RunLog(tmp_path / "a" / "run")
    log.hold()
    assert [p.name for p in log.folder.iterdir()] == [".lock"] and log.is_empty() and not log.holds_run()
    log.open(config.Config(), {"step": 0})
    assert log.holds_run() and not log.is_empty()
    log.checkpoints.mkdir()
    log.discard()
    assert list(tmp_path.iterdir()) == []


def test_discard_leaves_a_run_that_was_there(tmp_path):
    first = RunLog(tmp_path)
    first.open(config.Config(), {"step": 0})
    first.row({"step": 1, "loss": 1.0})
    first.close()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    second = RunLog(tmp_path)
    second.hold()
    second.discard()
    third = RunLog(tmp_path)  # and so does one that holds nothing
    third.discard()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    assert second.last_start() == {"step": 0} and second.config() == config.Config()
