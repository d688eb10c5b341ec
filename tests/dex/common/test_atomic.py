"""Whatever stops a writer, the file is the old one or the new one."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dex.common import atomic


def test_text_and_bytes(tmp_path):
    atomic.write(tmp_path / "a", "größer\n")
    assert (tmp_path / "a").read_bytes() == "größer\n".encode()
    atomic.write(str(tmp_path / "a"), b"\xff\x00")
    assert (tmp_path / "a").read_bytes() == b"\xff\x00"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("locked", [False, True])
def test_an_error_in_the_block_leaves_the_old_file_alone(locked, tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError, match="stopped"), atomic.writing(tmp_path / "a", locked=locked) as file:
        file.write(b"half of the n")
        raise RuntimeError("stopped")
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_alone(operation, tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, operation, full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write(tmp_path / "a", "new", sync=True)
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_synced_means_the_file_then_its_name(tmp_path, monkeypatch):
    done, real = [], {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(descriptor):
        done.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real["fsync"](descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: [done.append(("replace", b)), real["replace"](a, b)])
    atomic.write(tmp_path / "a", "x", sync=True, locked=True)
    assert done == [("fsync", atomic.work_name(tmp_path / "a")), ("replace", tmp_path / "a"), ("fsync", tmp_path)]
    done.clear()
    atomic.write(tmp_path / "a", "x")
    assert done == [("replace", tmp_path / "a")]


def test_permissions_are_less_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        atomic.write(tmp_path / "a", "x")
        atomic.write(tmp_path / "secret", "x", mode=0o600)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "secret")] == [0o640, 0o600]


def test_a_link_in_the_place_of_the_work_file_is_not_followed(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    atomic.work_name(tmp_path / "a").symlink_to(tmp_path / "theirs")
    atomic.write(tmp_path / "a", "mine", locked=True)
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "a").read_text() == "mine" and not (tmp_path / "a").is_symlink()


def test_what_a_killed_writer_left_is_replaced_under_a_lock(tmp_path):
    program = """
import os, signal, sys
from pathlib import Path
from dex.common import atomic
with atomic.writing(Path(sys.argv[1]), locked=True) as file:
    file.write(b"half of the n")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "a").write_text("old")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"
    assert atomic.work_name(tmp_path / "a").read_bytes() == b"half of the n"
    atomic.write(tmp_path / "a", "new", locked=True)
    assert (tmp_path / "a").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_writers_without_a_lock_do_not_meet(tmp_path):
    with atomic.writing(tmp_path / "a") as one, atomic.writing(tmp_path / "a") as other:
        one.write(b"one")
        other.write(b"the other")
    assert (tmp_path / "a").read_bytes() == b"one"  # the last one to finish
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "folder"
    with pytest.raises(OSError, match="disk"):
        with atomic.writing_folder(target) as work:
            (work / "a").write_text("half")
            raise OSError("disk")
    assert list(target.parent.iterdir()) == []
    target.mkdir()  # an empty one may be there
    with atomic.writing_folder(target) as work:
        (work / "sub").mkdir()
        (work / "sub" / "a").write_text("whole")
        assert list(target.iterdir()) == []
    assert (target / "sub" / "a").read_text() == "whole" and [p.name for p in target.parent.iterdir()] == ["folder"]
    with pytest.raises(OSError), atomic.writing_folder(target) as work:
        (work / "b").write_text("another")
    assert [p.name for p in target.iterdir()] == ["sub"] and [p.name for p in target.parent.iterdir()] == ["folder"]
