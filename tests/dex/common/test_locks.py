"""One holder at a time, in this process and others; what a file system without locks and links say."""

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time

import pytest

from dex.common.locks import NoLocks, acquire, exclusive


@pytest.fixture(params=["a folder é", "name .lock"])
def path(request, tmp_path):
    path = tmp_path / request.param
    if "folder" in request.param:
        path.mkdir()
    return path


def test_a_second_lock_is_refused_also_in_this_process(path):
    with exclusive(path):
        with pytest.raises(BlockingIOError), exclusive(path, wait=0):
            pass
        began = time.monotonic()
        with pytest.raises(BlockingIOError), exclusive(path, wait=0.1):
            pass
        assert 0.1 <= time.monotonic() - began < 10
    with exclusive(path, wait=0):
        pass


@pytest.mark.parametrize("wait", [60, float("inf")])
def test_a_waiting_thread_comes_after_the_holder(path, wait):
    order = []

    def follow():
        with exclusive(path, wait=wait):
            order.append("second")

    with exclusive(path):
        thread = threading.Thread(target=follow)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


def test_an_error_in_the_block_is_the_callers_and_releases_the_lock(path):
    with pytest.raises(BlockingIOError, match="mine"), exclusive(path):
        raise BlockingIOError("mine")
    with exclusive(path, wait=0):
        pass


def hold(path, held):
    with exclusive(path):
        held.set()
        time.sleep(60)


def test_a_killed_holder_releases_the_lock(path):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(path, held))
    process.start()
    assert held.wait(60)
    with pytest.raises(BlockingIOError), exclusive(path, wait=0):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    with exclusive(path, wait=0):
        pass


def test_a_file_system_without_locks(path, monkeypatch):
    def without(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.raises(NoLocks, match="No locks available") as caught, exclusive(path):
        pass
    assert caught.value.errno == errno.ENOLCK


def test_a_link_to_a_file_is_not_followed(tmp_path):
    (tmp_path / "target").write_text("text")
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(OSError) as caught, exclusive(tmp_path / "link"):
        pass
    assert caught.value.errno == errno.ELOOP and (tmp_path / "target").read_text() == "text"


def test_a_new_file_has_its_mode_and_an_old_one_its_contents(tmp_path):
    with exclusive(tmp_path / "new", mode=0o600):
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    (tmp_path / "new").write_text("text")
    with open(tmp_path / "new", "r+b") as file:
        acquire(file.fileno())
        with pytest.raises(BlockingIOError), exclusive(tmp_path / "new", wait=0):
            pass
    assert (tmp_path / "new").read_text() == "text"
