"""Who holds a folder. A lock is a process's, so whoever competes with a test is another process."""

import errno
import fcntl
import os
import subprocess
import sys
import time

import pytest

from dex.train import lock
from dex.train.lock import LOCK, FolderLock

OTHER = """
import sys
from pathlib import Path
from dex.train.lock import FolderLock
held = FolderLock(Path(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    order = line.strip()
    if order == "take":
        held.take(wait=20.0)
    else:
        held.release(undo=order == "undo")
    print("done", flush=True)
"""


class Other:
    """A process that takes and releases the folder as it is ordered to."""

    def __init__(self, folder):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self.process.stdout.readline() == "ready\n"

    def begin(self, order):
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()

    def end(self):
        assert self.process.stdout.readline() == "done\n"

    def do(self, order):
        self.begin(order)
        self.end()

    def kill(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def other():
    started = []

    def start(folder):
        started.append(Other(folder))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_a_folder_is_made_and_taken_back(tmp_path):
    held = FolderLock(tmp_path / "a" / "b")
    held.take()
    assert held.held and (tmp_path / "a" / "b" / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    held.release(undo=True)
    assert not held.held and list(tmp_path.iterdir()) == []
    held.take()
    held.release()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == [LOCK]


def test_what_was_there_stays(tmp_path):
    (tmp_path / LOCK).write_text("process 1 on a machine\n")
    held = FolderLock(tmp_path)
    held.take()
    held.release(undo=True)
    assert (tmp_path / LOCK).exists()
    inner = FolderLock(tmp_path / "new" / "run")
    inner.take()
    (tmp_path / "new" / "thesis.txt").write_text("mine")
    inner.release(undo=True)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["thesis.txt"]


def test_a_folder_that_is_held_is_refused_and_left_alone(other, tmp_path):
    first = other(tmp_path / "run")
    first.do("take")
    (tmp_path / "run" / "config.yaml").write_text("theirs")
    late = FolderLock(tmp_path / "run")
    with pytest.raises(ValueError, match=f"out: expected a folder that no other run uses; process {first.process.pid}"):
        late.take()
    late.release(undo=True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [LOCK, "config.yaml"]
    with pytest.raises(ValueError, match="no other run uses"):  # and it is still held
        FolderLock(tmp_path / "run").take()
    first.kill()
    late.take()  # a lock does not outlive its process
    late.release()


def test_whoever_ends_is_waited_for(other, tmp_path):
    first, said = other(tmp_path), []
    held = FolderLock(tmp_path, said.append)
    held.take()
    first.begin("take")
    time.sleep(0.5)
    held.release()
    first.end()
    with pytest.raises(ValueError, match="no other run uses"):
        held.take(wait=0.5)
    assert said == [f"process {first.process.pid} on {os.uname().nodename} writes to {tmp_path}; waiting for it to end"]


def test_a_lock_on_a_file_that_was_removed_is_none(other, tmp_path, monkeypatch):
    """Between opening the file and locking it, its holder takes its folder back and a third process makes it anew."""
    folder = tmp_path / "run"
    first, third = other(folder), other(folder)
    first.do("take")
    held, real = FolderLock(folder), fcntl.lockf

    def late(*arguments):
        monkeypatch.setattr(fcntl, "lockf", real)
        first.do("undo")
        assert not folder.exists()
        third.do("take")
        real(*arguments)

    monkeypatch.setattr(fcntl, "lockf", late)
    with pytest.raises(ValueError, match=f"process {third.process.pid} on "):
        held.take()
    assert not held.held
    held.release(undo=True)
    third.do("undo")
    held.take()
    assert held.held and [p.name for p in folder.iterdir()] == [LOCK]
    held.release(undo=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_vanishes_is_made_again(tmp_path, monkeypatch):
    folder, real, vanished = tmp_path / "a" / "run", FolderLock._open, []

    def late(self):
        if not vanished:
            vanished.append(folder.rmdir())
        return real(self)

    monkeypatch.setattr(FolderLock, "_open", late)
    held = FolderLock(folder)
    held.take()
    assert vanished and held.held
    held.release(undo=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_keeps_nobody_out(number, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "lockf", none)
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    second.take()
    assert first.held and second.held and not first.real and not second.real
    assert first.made_file and not second.made_file
    first.release(), second.release()


def test_a_second_lock_in_this_process_is_refused_and_leaves_the_first(other, tmp_path):
    """Closing any descriptor of a file drops all locks that the process has on it."""
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    assert first.real
    with pytest.raises(ValueError, match=f"no other run uses; this process, process {os.getpid()} on "):
        second.take(wait=20.0)
    second.release(undo=True)
    third = other(tmp_path)
    third.begin("take")
    time.sleep(0.5)
    assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    first.release()
    third.end()
    third.do("release")
    second.take()
    second.release()


@pytest.mark.parametrize("target", ["absent", "thesis.txt", "folder"])
def test_a_lock_file_that_is_a_link_is_refused(target, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK).symlink_to(tmp_path / target)
    held = FolderLock(run)
    with pytest.raises(ValueError, match=f"out: expected a file to lock; {run / LOCK} is a link"):
        held.take(wait=20.0)
    held.release(undo=True)
    assert (run / LOCK).is_symlink() and (tmp_path / "thesis.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "run", "thesis.txt"]


def test_a_lock_file_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(ValueError, match=f"out: expected a file to lock; {tmp_path / LOCK} is a folder"):
        FolderLock(tmp_path).take()


def test_a_lock_file_that_never_stays_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_RACE", 0.3)
    monkeypatch.setattr(FolderLock, "_in_place", lambda *_: False)
    with pytest.raises(
        ValueError, match=f"out: expected a folder that stays; other processes keep removing {tmp_path / LOCK}"
    ):
        FolderLock(tmp_path).take()


def test_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "absent" / "deep")
    with pytest.raises(FileExistsError):
        FolderLock(tmp_path / "run").take()
