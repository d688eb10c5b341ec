"""Real processes that really crash, hang, starve and are killed."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from dex.prepare import workers
from dex.prepare.workers import WorkerFault, where

WORK = """
    import errno, os, pathlib, signal, sys, time
    import numpy as np

    def work(task, report):
        folder, units = task.job
        done = list(task.state or [])
        for number, what in list(enumerate(units))[len(done):]:
            if number in task.refused:
                done.append(task.refused[number])
                report.save(done)
                continue
            report.begin(number, 1.0, 4.0)
            with open(pathlib.Path(folder) / "attempts", "a") as file:
                file.write(f"{number}\\n")
            if what == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            elif what == "hang":
                time.sleep(60)
            elif what == "slow":
                for _ in range(16):
                    time.sleep(0.1)
                    report.beat()
            elif what == "count":
                for pieces in (7, None, 1200):  # a reader's beats say nothing of how many
                    time.sleep(0.3)
                    report.beat(pieces)
            elif what == "endless":
                while True:
                    time.sleep(0.1)
                    report.beat()
            elif what == "crash once" and not (pathlib.Path(folder) / "crashed").exists():
                (pathlib.Path(folder) / "crashed").touch()
                os._exit(1)
            elif what == "eat":
                if report.begun > 1:
                    np.ones(400 * 2**20, np.uint8)
                else:
                    try:
                        np.ones(400 * 2**20, np.uint8)
                    except MemoryError:
                        what = "too large"
            elif what == "talk":
                print("Jane Doe")
                print("Jane Doe", file=sys.stderr, flush=True)
                os.system("echo Jane Doe; echo Jane Doe >&2")
            elif what == "full":
                raise OSError(errno.ENOSPC, "Jane Doe", "Jane Doe")
            elif what == "fault":
                raise KeyError("Jane Doe")
            elif what == "pid":
                (pathlib.Path(folder) / "pid").write_text(str(os.getpid()))
                while True:
                    time.sleep(0.05)
                    report.beat()
            done.append(what)
            report.save(done)
        return done
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A function that another process can import: each unit of a job says what becomes of it."""
    (tmp_path / "misbehave.py").write_text(textwrap.dedent(WORK))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "misbehave", raising=False)
    import misbehave

    return misbehave.work


def attempts(folder):
    return [int(line) for line in (folder / "attempts").read_text().split()]


def run(work, jobs, processes=1):
    return {job[0]: result for job, result in workers.run(work, jobs, processes=processes, memory_mb=200)}


def test_a_bad_unit_costs_only_itself(work, tmp_path):
    """Every other unit is done exactly once; the bad ones are tried twice and are called by their fault."""
    units = ["fine", "crash", "crash once", "eat", "fine"]
    assert run(work, [(tmp_path, units)]) == {tmp_path: ["fine", "crash", "crash once", "too large", "fine"]}
    assert attempts(tmp_path) == [0, 1, 1, 2, 2, 3, 3, 4]


@pytest.mark.slow
def test_beats_without_end_are_a_hang_too(work, tmp_path):
    began = time.monotonic()
    assert run(work, [(tmp_path, ["talk", "endless", "talk"])]) == {tmp_path: ["talk", "timeout", "talk"]}
    assert 2 * 4.0 < time.monotonic() - began < 2 * 4.0 + 15  # tried twice


def test_silence_is_a_hang_and_beats_are_not(work, tmp_path):
    assert run(work, [(tmp_path, ["slow", "hang", "talk"])]) == {tmp_path: ["slow", "timeout", "talk"]}
    assert attempts(tmp_path) == [0, 1, 1, 2]


def test_what_a_beat_says_of_the_unit_reaches_the_parent(work, tmp_path):
    said = []
    job = (tmp_path, ["count", "slow"])
    options = {"processes": 1, "memory_mb": 200, "on_beat": lambda job, done: said.append((job, done))}
    assert list(workers.run(work, [job], **options)) == [(job, ["count", "slow"])]
    assert said[:3] == [(job, 7), (job, 7), (job, 1200)]
    assert len(said) > 3 and all(done == 0 for _, done in said[3:])  # a new unit begins at none


def test_several_processes_do_every_job_once_and_say_nothing(work, tmp_path, capfd):
    jobs = []
    for name in "abcd":
        (tmp_path / name).mkdir()
        jobs.append((tmp_path / name, ["talk", "fine"]))
    assert run(work, jobs, processes=2) == {job[0]: ["talk", "fine"] for job in jobs}
    assert all(attempts(tmp_path / name) == [0, 1] for name in "abcd")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


@pytest.mark.slow
def test_a_job_waits_while_the_caller_holds_it_back(work, tmp_path):
    first, second = ((tmp_path / name, ["fine"]) for name in "ab")
    for folder, _ in (first, second):
        folder.mkdir()
    done, held_back = [], 0

    def jobs():
        nonlocal held_back
        yield first
        while not done:
            held_back += 1
            yield None
        yield second

    for job, _ in workers.run(work, jobs(), processes=2, memory_mb=200):
        done.append(job)
        assert (second[0] / "attempts").exists() == (job == second)
    assert done == [first, second] and held_back


def test_a_full_disk_and_a_fault_of_ours_reach_the_parent_without_values(work, tmp_path):
    with pytest.raises(OSError) as full:
        run(work, [(tmp_path, ["full"])])
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(WorkerFault) as fault:
        run(work, [(tmp_path, ["fault"])])
    assert "KeyError at misbehave.py:" in str(fault.value)
    assert "Jane" not in f"{full.value} {full.value.filename} {fault.value}"


def test_a_worker_that_cannot_start_is_not_started_for_ever(work, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif 'spawn_main' in ' '.join(__import__('sys').orig_argv):\n    os._exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(WorkerFault, match="three workers in a row"):
        run(work, [(tmp_path, ["fine"])])


def _gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_workers_die_with_their_parent(work, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "if __name__ == '__main__':\n"
        "    import misbehave\n"
        "    from dex.prepare import workers\n"
        f"    list(workers.run(misbehave.work, [({str(tmp_path)!r}, ['pid'])], processes=1, memory_mb=200))\n"
    )
    (tmp_path / "parent.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        worker = int((tmp_path / "pid").read_text())
        assert not _gone(worker)
        os.kill(worker, signal.SIGTERM)  # a scheduler's, to all processes: the parent decides
        os.kill(worker, signal.SIGINT)
        time.sleep(0.2)
        assert not _gone(worker)
        parent.kill()
        parent.wait(10)
        deadline = time.monotonic() + 5
        while not _gone(worker):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        parent.kill()
        parent.wait()


def test_where_tells_lines_and_no_values():
    secret = "Jane Doe"
    try:
        int(secret)
    except ValueError as error:
        text = where(error)
    assert text.startswith("ValueError at test_workers.py:") and "Jane" not in text
