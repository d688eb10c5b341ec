"""Row 27: what goes wrong around a run: its file systems, descriptors, shared memory, clock, output, and odd inputs.

The faults are real: file systems that are made for it (which takes the rights of root), limits, signals, closed
descriptors. Two are stood in for: a reader that is not answered waits for a FIFO in place of its file, and a clock
that jumps is a library that is loaded before all others.
"""

import contextlib
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dex import config
from dex.train import checkpoint
from dex.train.runlog import read_rows

pytestmark = pytest.mark.slow

ODD = "Ärzte 医 '\"$HOME`;&|*%s {x}\\n"
"""A folder's name with spaces, other alphabets, and what shells, formats and patterns would read otherwise."""


def wait_for(condition, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def file_system(folder: Path, kind: str, size: int):
    """A file system of ``size`` MB at ``folder``: "tmpfs", or "ext4" in a file beside it."""
    folder.mkdir(exist_ok=True)
    if kind == "ext4":
        image = folder.with_suffix(".ext4")
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(size << 20)
            subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
        command = ["mount", "-o", "loop", str(image), str(folder)]
    else:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def alone(tmp_path):
    """Starts ``dex pretrain`` as one process of its own; what still runs in the end is killed."""
    started = []

    def start(configuration: config.Config, out: Path, *before: str, **options) -> subprocess.Popen:
        path = tmp_path / f"{len(started)}.yaml"
        path.write_text(config.to_yaml(configuration))
        command = [sys.executable, "-m", "dex", "pretrain", "--config", str(path), "--out", str(out)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment} | options
        started.append(subprocess.Popen([*before, *command, "--resume", "auto"], **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def expected(fleet, tiny, change, state_of, tmp_path_factory):
    """A run of 40 steps, and the state in which any other of its kind ends on as many ranks."""
    c = change(tiny, schedule__steps=40, run__checkpoint_every=5, run__evaluate_every=10)
    states = {}
    for count in (1, 2):
        out = tmp_path_factory.mktemp("expected") / "out"
        fleet.run(c, out, count)
        states[count] = state_of(out / "checkpoints" / "step-00000040")
    return c, states


def last_good(out: Path) -> int:
    saved, passed_over = checkpoint.newest_good(out / "checkpoints")
    assert saved is not None and not passed_over
    return saved.state["step"]


def test_a_folder_that_cannot_be_written(fleet, tiny, change, tmp_path, record):
    """From the start on, and, as when a disk fails, in the middle of a run."""
    good, wanted, disk = 0, 0, tmp_path / "disk"
    with file_system(disk, "ext4", 24):
        c = change(tiny, schedule__steps=100_000, run__checkpoint_every=5, run__evaluate_every=10)
        ranks = fleet.start(c, disk / "out")
        wait_for(lambda: len(read_rows(disk / "out" / "metrics.jsonl")) > 12)
        subprocess.run(["mount", "-o", "remount,abort", str(disk)], check=False)  # what ext4 does about a failing disk
        codes = fleet.end(ranks, 240)
        lines = [line for r in ranks for line in r.said().splitlines() if "Read-only" in line or "Input/output" in line]
        sound, wanted = codes == [1, 1] and bool(lines), wanted + 1
        good += sound
        if not sound:
            print(codes, *(r.said()[-3000:] for r in ranks))
        last = last_good(disk / "out")
    subprocess.run(["e2fsck", "-fy", str(disk.with_suffix(".ext4"))], stdout=subprocess.DEVNULL, check=False)
    with file_system(disk, "ext4", 24):
        last = last_good(disk / "out")
        fleet.run(change(c, run__stop_at=last + 5), disk / "out")
        good, wanted = good + (last_good(disk / "out") == last + 5), wanted + 1
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for out in (disk / "new", disk / "out"):
            ranks = fleet.start(c, out)
            codes = fleet.end(ranks, 240)
            said = ranks[0].said()
            sound = codes[0] == 2 and "expected a writable folder" in said and "Traceback" not in said
            if not sound:
                print(out, codes, *(r.said()[-3000:] for r in ranks))
            good, wanted = good + sound, wanted + 1
    promise = "a folder that cannot be written: refused at a start; in a run all end with 1, and it goes on when mended"
    record(27, promise, good, wanted)


def test_a_full_disk_under_everything_that_a_run_writes(fleet, tiny, change, tmp_path, record):
    """Rows, pictures and tensorboard too, not only checkpoints."""
    disk, good, wanted = tmp_path / "disk", 0, 0
    for every in (5, 100_000):
        with file_system(disk, "tmpfs", 12):
            c = change(tiny, schedule__steps=100_000, run__checkpoint_every=5, run__evaluate_every=5)
            ranks = fleet.start(c, disk / "out")
            wait_for(lambda: checkpoint.list_checkpoints(disk / "out" / "checkpoints"))
            with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            codes = fleet.end(ranks, 240)
            said = "".join(r.said() for r in ranks)
            sound = codes == [1, 1] and "No space left on device" in said
            last = last_good(disk / "out")
            (disk / "filler").unlink()
            fleet.run(change(c, run__stop_at=last + 5), disk / "out")
            sound = sound and last_good(disk / "out") == last + 5
            if not sound:
                print(every, codes, said[-4000:])
            good, wanted = good + sound, wanted + 1
    record(27, "a disk that fills up: all end with 1 and say so; with room again the next start goes on", good, wanted)


def test_too_many_open_files(fleet, expected, state_of, tmp_path, record):
    c, states = expected
    good, wanted = 0, 0
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        longer = config.from_dict({"data": {"num_workers": workers}}, c)
        ranks = fleet.start(longer, out)
        wait_for(lambda out=out: checkpoint.list_checkpoints(out / "checkpoints"))
        used = max(int(n) for n in os.listdir(f"/proc/{ranks[1].pid}/fd"))
        resource.prlimit(ranks[1].pid, resource.RLIMIT_NOFILE, (used // 2, used // 2))
        codes = fleet.end(ranks, 240)
        said = "".join(r.said() for r in ranks)
        unreadable = [e for e in read_rows(out / "events.jsonl") if e["event"] == "unreadable sample"]
        # Workers open their files themselves, and have limits of their own.
        sound = (codes == [1, 1] and "Too many open files" in said) or (workers > 0 and codes == [0, 0])
        sound = sound and not unreadable and "replaced" not in said
        fleet.run(longer, out)
        same = state_of(out / "checkpoints" / "step-00000040") == states[2]
        if not (sound and same):
            print(workers, codes, unreadable[:3], same, said[-4000:])
        good, wanted = good + (sound and same), wanted + 1
    promise = "too many open files: no image is taken for unreadable, the run says so, a resume ends in the same bits"
    record(27, promise, good, wanted)


def test_full_shared_memory(alone, expected, state_of, tmp_path, record):
    """A private /dev/shm of 1 MB that is full before the start, or fills up in the middle."""
    c, states = expected
    good, wanted = 0, 0
    for when in ("before", "middle"):
        out = tmp_path / when
        fill = "dd if=/dev/zero of=/dev/shm/filler bs=4k 2>/dev/null; " if when == "before" else ""
        shell = f'mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 99; {fill}exec "$0" "$@"'
        run = alone(config.from_dict({"data": {"num_workers": 2}}, c), out, "unshare", "-m", "sh", "-c", shell)
        if when == "middle":
            wait_for(
                lambda out=out, run=run: checkpoint.list_checkpoints(out / "checkpoints") or run.poll() is not None
            )
            with contextlib.suppress(OSError), open(f"/proc/{run.pid}/root/dev/shm/filler", "wb", 0) as file:
                while True:
                    file.write(bytes(4096))
        said = "".join(run.communicate(timeout=300))
        if run.returncode in (1, 99) and "must be superuser" in said:
            pytest.skip("no right to mount a file system")
        named = run.returncode in (1, 2) and "shared memory" in said and "Traceback" not in said
        same = run.returncode == 0 and state_of(out / "checkpoints" / "step-00000040") == states[1]
        if not (named or same):
            print(when, run.returncode, said[-4000:])
        good, wanted = good + (named or same), wanted + 1
    record(27, "/dev/shm that is full: the run does without it to the same bits, or names it", good, wanted)


def test_clock_jumps(clocked_fleet, expected, state_of, tmp_path, record, full):
    """A day back, a day and ten years ahead, at any moment: the steady clock decides who is late."""
    c, states = expected
    good, jumps = 0, [-86_400, 86_400, 3650 * 86_400, -3600] * (2 if full else 1)
    for number, jump in enumerate(jumps):
        fleet, offset = clocked_fleet
        offset.write_bytes(struct.pack("q", 0))
        workers = {"data": {"num_workers": 2 if number % 2 else 0}}
        ranks = fleet.start(config.from_dict(workers, c), tmp_path / f"{number}")
        wait_for(lambda n=number: len(read_rows(tmp_path / f"{n}" / "metrics.jsonl")) > 3)
        with offset.open("r+b") as file:
            file.write(struct.pack("q", jump))
        codes = fleet.end(ranks, 240)
        folder = tmp_path / f"{number}" / "checkpoints" / "step-00000040"
        same = codes == [0, 0] and state_of(folder) == states[2]
        if not same:
            print(jump, codes, *(r.said()[-3000:] for r in ranks))
        good += same
    record(27, "the clock jumps in the middle of a run, back or ahead: nobody is late, the same bits", good, len(jumps))


def test_output_that_is_rotated_or_closed(fleet, alone, expected, state_of, tmp_path, record):
    """Its file renamed, removed or cut; its reader gone; none from the start; a full disk under it."""
    c, states = expected
    shells = {"closed": "<&- >&- 2>&-", "full disk": ">/dev/full", "reader gone": ""}
    good, wanted = 0, 0
    for what in ("renamed", "removed", "cut", *shells):
        out = tmp_path / what
        if what in shells:
            run = alone(c, out, "sh", "-c", f'exec "$0" "$@" {shells[what]}')
        else:
            run = fleet.start(c, out, 1)[0]
        wait_for(lambda out=out: read_rows(out / "metrics.jsonl"))
        if what == "renamed":
            run.stdout.rename(run.stdout.with_suffix(".1"))
        elif what == "removed":
            run.stdout.unlink()
        elif what == "cut":
            os.truncate(run.stdout, 0)
        elif what == "reader gone":
            run.stdout.close()
        code = run.wait(240)
        same = code == 0 and state_of(out / "checkpoints" / "step-00000040") == states[1]
        if what in ("full disk", "reader gone"):
            lost = [row for row in read_rows(out / "events.jsonl") if row["event"] == "output lost"]
            same = same and len(lost) == 1
        if not same:
            print(what, code, run.stderr)
        good, wanted = good + same, wanted + 1
    promise = "output renamed, removed, cut, closed, on a full disk or without a reader: a run goes on to the same bits"
    record(27, promise, good, wanted)


def test_odd_sets_and_odd_names(fleet, expected, images, state_of, tmp_path, record):
    """One modality; one image; 4 workers; every path with spaces, quotes and other alphabets."""
    c, states = expected
    good, wanted = 0, 0

    def count(sound: bool, what: str, *of) -> None:
        nonlocal good, wanted
        good, wanted = good + sound, wanted + 1
        if not sound:
            print(what, *of)

    one = tmp_path / "one modality"
    shutil.copytree(images / "mr", one / "mr")
    changed = config.from_dict({"data": {"path": str(one)}}, c)
    ranks = fleet.end(fleet.start(changed, tmp_path / "modality"), 60)
    rows = read_rows(tmp_path / "modality" / "metrics.jsonl")
    count(ranks == [0, 0] and any("val_loss" in row for row in rows), "one modality", ranks)

    single = tmp_path / "one image"
    (single / "mr").mkdir(parents=True)
    shutil.copy(images / "mr" / "000.png", single / "mr")
    changed = config.from_dict({"data": {"path": str(single), "batch_size": 1}}, c)
    ranks = fleet.start(changed, tmp_path / "image", 1)
    count(fleet.end(ranks, 240) == [0] and last_good(tmp_path / "image") == 40, "one image", ranks[0].said())

    changed = config.from_dict({"data": {"num_workers": 4}}, c)
    ranks = fleet.start(changed, tmp_path / "workers")
    codes = fleet.end(ranks, 240)
    same = codes == [0, 0] and state_of(tmp_path / "workers" / "checkpoints" / "step-00000040") == states[2]
    count(same, "4 workers", codes, ranks[0].said())

    odd = tmp_path / ODD
    shutil.copytree(images, odd / ODD)
    changed = config.from_dict({"data": {"path": str(odd / ODD)}}, c)
    ranks = fleet.start(config.from_dict({"run": {"stop_at": 20}}, changed), odd / "out" / ODD)
    codes = fleet.end(ranks, 240) + fleet.end(fleet.start(changed, odd / "out" / ODD), 60)
    folder = odd / "out" / ODD / "checkpoints" / "step-00000040"
    same = codes == [0] * 4 and state_of(folder)[0] == states[2][0]
    count(same, "odd names", codes, ranks[0].said())
    record(
        27, "one modality, one image, 4 workers, odd names in every path: a run and its resume end well", good, wanted
    )


def test_a_file_server_that_stalls(fleet, expected, change, state_of, tmp_path, record):
    """Under the images and under the run folder, for less and for more than ranks wait."""
    c, states = expected
    good, wanted = 0, 0
    for workers in (0, 2):
        stall, out = tmp_path / f"stall{workers}", tmp_path / f"short{workers}"
        ranks = fleet.start(config.from_dict({"data": {"num_workers": workers}}, c), out, stall=str(stall))
        wait_for(lambda out=out: len(read_rows(out / "metrics.jsonl")) > 3)
        os.mkfifo(stall)
        time.sleep(4)
        stuck = len(read_rows(out / "metrics.jsonl"))
        answer(stall)
        codes = fleet.end(ranks, 240)
        same = codes == [0, 0] and stuck < 40 and state_of(out / "checkpoints" / "step-00000040") == states[2]
        if not same:
            print(workers, stuck, codes, *(r.said()[-3000:] for r in ranks))
        good, wanted = good + same, wanted + 1
    record(27, "a file server that does not answer for seconds, under the images: the same bits", good, wanted)

    out, stall = tmp_path / "long", tmp_path / "stall"
    ranks = fleet.start(change(c, parallel__timeout=8.0), out, stall=str(stall), rank=0)
    wait_for(lambda: checkpoint.list_checkpoints(out / "checkpoints"))
    os.mkfifo(stall)
    began = time.monotonic()
    codes = fleet.end(ranks, 240)
    seconds, said = time.monotonic() - began, [r.said() for r in ranks]
    # Rank 0 may end first and say so; rank 1 then names it as the one that took the store of the ranks with it.
    named = "furthest behind: rank 0" in said[0] + said[1] and f": rank 0 (process {ranks[0].pid} on " in said[1]
    sound = codes == [1, 1] and seconds < 18 and named
    answer(stall)
    fleet.run(c, out)
    same = state_of(out / "checkpoints" / "step-00000040") == states[2]
    if not (sound and same):
        print(codes, seconds, same, *(r.said()[-3000:] for r in ranks))
    promise = "a file server that never answers one rank: all end within the timeout + 10 s naming it, a resume goes on"
    record(27, promise, int(sound and same), 1, seconds=round(seconds, 1))

    disk = tmp_path / "disk"
    good, wanted = 0, 0
    for seconds, timeout, want in ((4, 60.0, [0, 0]), (12, 6.0, [1, 1])):
        with file_system(disk, "ext4", 24):
            out = disk / f"out{wanted}"
            ranks = fleet.start(change(c, parallel__timeout=timeout), out)
            wait_for(lambda out=out: checkpoint.list_checkpoints(out / "checkpoints"))
            subprocess.run(["fsfreeze", "-f", str(disk)], check=True)
            time.sleep(seconds)
            subprocess.run(["fsfreeze", "-u", str(disk)], check=True)
            codes = fleet.end(ranks, 240)
            fleet.run(c, out)
            same = state_of(out / "checkpoints" / "step-00000040") == states[2]
            if codes != want or not same:
                print(seconds, codes, same, *(r.said()[-3000:] for r in ranks))
            good, wanted = good + (codes == want and same), wanted + 1
    promise = "a run folder whose disk stands still: the run waits; for longer than the timeout, all end; the same bits"
    record(27, promise, good, wanted)


def answer(stall: Path) -> None:
    """Let everybody go on who waits for ``stall``."""
    with contextlib.suppress(OSError):
        descriptor = os.open(stall, os.O_WRONLY | os.O_NONBLOCK)  # fails when nobody waits
        stall.unlink()
        os.close(descriptor)
    stall.unlink(missing_ok=True)
