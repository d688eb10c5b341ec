import errno
import fcntl
import io
import os
import pty
import select
import subprocess
import sys

import pytest

from dex import config
from dex.train.runlog import FOLDERS, Progress, ReplacedRun, RunLog, data_of, read_rows

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


def test_what_an_earlier_version_left_unfinished_is_no_run_and_goes(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.tmp").write_text("cut sh")
    log = RunLog(tmp_path)
    assert log.is_empty() and not log.holds_run()
    (tmp_path / "pictures").mkdir()
    for name in ("losses.png.12-ab.partial", "losses.png.partial", ".losses.png.tmp", "losses.png"):
        (tmp_path / "pictures" / name).touch()
    log.open(config.Config(), {"step": 0})
    log.close()
    assert [p.name for p in log.pictures.iterdir()] == ["losses.png"]
    assert not (tmp_path / ".config.yaml.tmp").exists()


# Without locks.


@pytest.fixture
def no_locks(monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "lockf", none)


def test_without_locks_a_failed_start_leaves_the_run_that_another_began(no_locks, tmp_path, capsys):
    first, second = RunLog(tmp_path / "run"), RunLog(tmp_path / "run")
    second.hold()
    first.hold()
    assert capsys.readouterr().err == 2 * (
        f"dex pretrain: {tmp_path / 'run'} is on a file system without locks: a second process could write there too\n"
    )
    first.open(config.Config(), {"step": 0})
    first.row({"step": 1, "loss": 1.0})
    second.discard()
    assert (tmp_path / "run" / ".lock").exists()
    second = RunLog(tmp_path / "run")
    second.open(config.Config(), {"step": 0})  # as one does that looked when the folder was empty
    first.discard()  # the folder is no longer its own
    assert second.last_start() == {"step": 0} and (tmp_path / "run" / "metrics.jsonl").exists()
    second.discard()  # and this one did not find it empty
    assert second.last_start() == {"step": 0}


def test_without_locks_a_failed_start_takes_back_its_own_run(no_locks, tmp_path):
    log = RunLog(tmp_path / "run")
    log.open(config.Config(), {"step": 0})
    log.discard()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_a_run_that_is_set_aside_is_left_alone(no_locks, earlier_run):
    new = RunLog(earlier_run)
    new.open(config.Config(), {"step": 0, "new": True}, overwrite=True)
    late = RunLog(earlier_run)
    with pytest.raises(ValueError, match="out: expected no run set aside by --overwrite, got one in .*/.replaced-run"):
        late.hold()
    late.discard()
    assert new.last_start() == {"step": 0, "new": True}
    new.discard()
    assert new.last_start() == {"step": 0, "old": True}


# A run that another replaces.


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture
def earlier_run(tmp_path):
    """A run folder with something of everything, and a file of somebody else's."""
    folder = tmp_path / "earlier"
    log = RunLog(folder)
    log.open(config.Config(), {"step": 0, "old": True})
    log.row({"step": 1, "loss": 1.0})
    log.event(1, "something")
    log.close()
    (log.checkpoints / "step-00000001").mkdir(parents=True)
    (log.checkpoints / "step-00000001" / "state.json").write_text("old")
    for name in ("pictures/losses.png", "report.html", "notes.txt"):
        (folder / name).write_text("old")
    return folder


def replace(folder):
    new = RunLog(folder)
    new.open(config.Config(), {"step": 0, "new": True}, overwrite=True)
    new.row({"step": 0, "loss": 2.0})
    new.checkpoints.mkdir()
    (new.pictures / "new.png").touch()
    return new


def test_a_run_is_replaced_after_the_first_step(earlier_run):
    new = replace(earlier_run)
    new.settle()
    new.close()
    assert new.last_start() == {"step": 0, "new": True} and (earlier_run / "notes.txt").read_text() == "old"
    names = {".lock", "config.yaml", "run.json", "metrics.jsonl", "events.jsonl", "notes.txt", *FOLDERS}
    assert {p.name for p in earlier_run.iterdir()} == names
    assert list(new.checkpoints.iterdir()) == [] and [p.name for p in new.pictures.iterdir()] == ["new.png"]


def test_discard_puts_back_the_run_that_was_replaced(earlier_run):
    before = tree(earlier_run)
    replace(earlier_run).discard()
    assert tree(earlier_run) == before
    assert {p.name for p in earlier_run.iterdir() if p.name.startswith(".")} == {".lock"}


def test_a_killed_start_leaves_a_whole_run_at_whatever_moment(earlier_run, monkeypatch, capsys):
    """Every call that changes the folder is the last one once, while replacing a run and while putting it back."""
    before, real = tree(earlier_run), {name: getattr(os, name) for name in ("rename", "unlink", "mkdir", "rmdir")}
    calls, last = 0, 0

    def counted(name):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if last and calls > last:
                raise KeyboardInterrupt
            return real[name](*arguments, **options)

        return call

    def stopped(action, at):
        nonlocal calls, last
        calls, last = 0, at
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, counted(name))
            try:
                action()
            except KeyboardInterrupt:
                return True
        return False

    def begin():
        log = RunLog(earlier_run)
        try:
            log.open(config.Config(), {"step": 0, "new": True}, overwrite=True)
        finally:
            log.close()

    def look():
        log = RunLog(earlier_run)
        try:
            log.hold()
        finally:
            log.close()

    at = 1
    while stopped(begin, at):
        assert RunLog(earlier_run).holds_run() and RunLog(earlier_run).last_start() == {"step": 0, "old": True}
        assert (RunLog(earlier_run).checkpoints / "step-00000001").exists()
        look()
        assert tree(earlier_run) == before, at
        at += 1
    assert at > 8
    back = 1
    while stopped(look, back):
        assert RunLog(earlier_run).last_start() == {"step": 0, "old": True}
        look()
        assert tree(earlier_run) == before, back
        begin()
        back += 1
    assert back > 8 and tree(earlier_run) == before
    assert f"dex pretrain: put back the run that an unfinished --overwrite had set aside in {earlier_run}\n" in (
        capsys.readouterr().err
    )


def test_a_removal_that_is_cut_short_leaves_the_new_run(earlier_run, monkeypatch):
    new = replace(earlier_run)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *paths, **options: None)
        new.settle()
    new.close()
    assert (earlier_run / ".removed-run").exists() and new.last_start() == {"step": 0, "new": True}
    again = RunLog(earlier_run)
    again.hold()
    again.close()
    assert not (earlier_run / ".removed-run").exists() and again.last_start() == {"step": 0, "new": True}


def test_a_link_in_a_run_is_not_replaced(earlier_run, tmp_path):
    (earlier_run / "checkpoints").rename(tmp_path / "elsewhere")
    (earlier_run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    before = tree(earlier_run)
    new = RunLog(earlier_run)
    with pytest.raises(ValueError, match=f"overwrite: expected a run of .* {earlier_run / 'checkpoints'} is a link"):
        new.open(config.Config(), {"step": 0}, overwrite=True)
    new.discard()
    assert tree(earlier_run) == before and (earlier_run / "checkpoints").is_symlink()
    assert not ReplacedRun(earlier_run).exists


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_a_run_goes_on_without_whoever_reads_its_lines(number, tmp_path, monkeypatch):
    class Lost(io.TextIOWrapper):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    file = Lost((tmp_path / "output").open("wb"))
    monkeypatch.setattr(sys, "stdout", file)
    progress = Progress(10, 0)
    progress.say("a line")
    assert progress.lost == os.strerror(number)
    assert os.fstat(file.fileno()).st_rdev == os.stat(os.devnull).st_rdev
    monkeypatch.setattr(sys, "stdout", None)
    Progress(10, 0).say("a line")


def test_starts_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "run.json").write_text("")
    with pytest.raises(
        ValueError, match=r"out: expected the starts of a run in .*run\.json, got JSONDecodeError.*Move the file away"
    ):
        RunLog(tmp_path).last_start()


@pytest.mark.parametrize(
    "text, data",
    [
        ('{"starts": [{"data": {"name": "a"}}, {"data": {"name": "b"}}]}', {"name": "b"}),
        ('{"starts": [{"data": ["b"]}]}', {}),
        ('{"starts": []}', {}),
        ("[]", {}),
        ('{"starts": [{"da', {}),
        (None, {}),
    ],
)
def test_the_data_of_the_newest_start_or_nothing(tmp_path, text, data):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert data_of(tmp_path) == data
