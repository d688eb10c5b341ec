"""`dex prepare` as a user calls it."""

import fcntl
import hashlib
import os
import random
import re
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dex.common import exits
from dex.data import ShardDataset
from dex.prepare import run as prepare
from dex.prepare import workers

SALT = bytes(range(32))
pytestmark = pytest.mark.usefixtures("inline_workers")


def digest(out):
    return hashlib.sha256((Path(out) / "manifest.json").read_bytes()).hexdigest()


def with_salt(out):
    """Two runs can only be compared under one salt."""
    private = prepare.private_folder(Path(out))
    private.mkdir(mode=0o700)
    (private / "salt").write_bytes(SALT)
    return out


def test_from_a_folder_to_shards_that_check_and_train(run, tmp_path, pictures):
    pictures(tmp_path / "scans", 12)
    (tmp_path / "scans" / "p0" / "broken.png").write_bytes(b"\x89PNG")
    arguments = ("prepare", "scans", "--modality", "X-ray", "--out", "my set", "--size", 64)
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "folder: 13 files in 13 units" in out
    row = next(line for line in out.splitlines() if line.startswith("folder  X-ray"))
    assert re.split(r"\s{2,}", row) == [
        "folder",
        "X-ray",
        "13",
        "12",
        "12",
        row.split()[5],
        row.split()[6],
        "-",
        "unreadable 1",
    ]
    assert "shards: 'my set'" in out and "next:   dex pretrain --preset demo --data 'my set'" in out
    assert not set(out) & set("│━█\x1b")
    assert "'my set.private/left_out.html' shows some of them" in out
    (tmp_path / "my set.private" / "left_out.html").unlink()  # as a withdrawal does
    code, out, _ = run(*arguments)  # done already
    assert code == 0 and "dex data refused" in out and "left_out.html" not in out
    code, out, err = run("data", "check", "my set")
    assert (code, out, err) == (0, "12 images in 1 shard: every hash matches\n", "")
    code, out, _ = run(
        *("pretrain", "--preset", "demo", "--data", "my set", "--data.batch-size", 4, "--dry-run"),
        *("--model.img-size", 64),
    )
    assert code == 0 and "X-ray" in out
    shard = tmp_path / "my set" / "shard-00000.tar"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    code, out, err = run("data", "check", "my set")
    assert code == 1 and "shard-00000.tar: sha256 differs from the manifest" in out and err == ""


def test_options_reach_the_set(run, tmp_path, pictures):
    pictures(tmp_path / "a", 3)
    pictures(tmp_path / "b", 3, first=10)
    assert run("prepare", "a", "b", "--modality", "X-ray", "--out", "set", "--size", 48, "--encoding", "png")[0] == 0
    dataset = ShardDataset(tmp_path / "set")
    assert dataset.image_size == 48 and len(dataset) == 6
    assert {dataset.sample_id(i).split("/")[0] for i in range(6)} == {"folder", "folder-2"}
    assert run("prepare", "a", "--modality", "X-ray", "--files", "p0/*.png", "--out", "one", "--bits", 16)[0] == 0
    assert len(ShardDataset(tmp_path / "one")) == 1


def test_parts(run, tmp_path, monkeypatch, pictures):
    monkeypatch.setattr("dex.prepare.discover.CHUNK_UNITS", 3)
    pictures(tmp_path / "scans", 12)
    command = ("prepare", "scans", "--modality", "X-ray", "--size", 64)
    assert run(*command, "--out", with_salt("whole"))[0] == 0
    with_salt("parts")
    for part in (2, 0):
        code, out, _ = run(*command, "--out", "parts", "--shard", f"{part}/3")
        assert code == 0 and "are left to other parts" in out and "next:" not in out and not Path("parts").exists()
    code, out, _ = run(*command, "--out", "parts", "--shard", "1/3")
    assert code == 0 and "next:" in out and digest("parts") == digest("whole")


def test_a_fault_while_headers_are_read_is_one_line(run, tmp_path, monkeypatch):
    def scan(*arguments, **options):
        raise workers.WorkerFault("three workers in a row ended")

    monkeypatch.setattr("dex.prepare.discover.LARGE", 3)
    monkeypatch.setattr("dex.prepare.scan.scan", scan)
    (tmp_path / "scans").mkdir()
    for number in range(4):
        (tmp_path / "scans" / f"{number}.dcm").write_bytes(b"any")
    code, _, err = run("prepare", "scans", "--modality", "CT", "--out", "set")
    assert (code, err) == (1, "dex prepare: a fault in dex: three workers in a row ended\n") and not Path(
        "set"
    ).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare"], "SOURCE, out: expected values, got nothing"),
        (["prepare", "scans"], "out: expected a value, got nothing"),
        (["prepare", "scans", "--modality", "xrays-ct", "--out", "o"], "modality: expected one of CT, MR"),
        (["prepare", "scans", "--modality", "CTX", "--normalisation", "ct", "--out", "o"], "did you mean 'CT'?"),
        (["prepare", "scans", "--modality", "CT", "--normalisation", "hu", "--out", "o"], "normalisation: expected"),
        (["prepare", "scans", "--pattern", "ct/**", "--out", "o"], "pattern: expected MODALITY=GLOB"),
        (["prepare", "scans", "--pattern", "film=ct/**", "--out", "o"], "routes.modality: expected one of CT"),
        (
            ["prepare", "scans", "--modality", "CT", "--pattern", "CT=ct/**", "--out", "o"],
            "pattern: expected --modality auto",
        ),
        (["prepare", "scans", "--trust", "--out", "o"], "trusted: expected a modality other than 'auto'"),
        (
            ["prepare", "nowhere", "--out", "o"],
            "SOURCE: expected a folder, a table, a YAML file, a shipped source or 'packages'",
        ),
        (["prepare", "EchoNet-Dynamic", "--out", "o"], "--root FOLDER --files 'PATTERN'"),
        (["prepare", "scans", "--modality", "CT", "--out", ""], "out: expected a folder, got ''"),
        (["prepare", "scans", "--modality", "CT", "--out", "full"], "out: expected a new or empty folder"),
        (["prepare", "scans", "--modality", "CT", "--out", "file"], "out: expected a folder, got the file file"),
        (["prepare", "empty", "--modality", "CT", "--out", "o"], "folder: expected files that match its patterns"),
        (["prepare", "scans", "--modality", "CT", "--out", "o", "--size", "7"], "size: expected 32 to 4096"),
        (["prepare", "scans", "--modality", "CT", "--out", "o", "--size", "big"], "expected a whole number, got 'big'"),
        (["prepare", "scans", "--modality", "CT", "--out", "o", "--bits", "12"], "bits: expected one of 8, 16, got 12"),
        (["prepare", "scans", "--modality", "CT", "--out", "o", "--bits", "16", "--encoding", "jpg"], "JPEG holds 8"),
        (["prepare", "scans", "--modality", "CT", "--out", "o", "--shard", "3/3"], "shard: expected i/n with 0 <= i"),
        (["prepare", "scans", "--modality", "CT", "--out", "o", "--shard", "x"], "shard: expected I/N, such as 0/4"),
        (["prepare", "scans", "--modality", "CT", "--out", "o", "--workers", "0"], "workers: expected at least 1"),
        (["prepare", "scans", "--modality", "CT", "--out", "o", "--frame-stride", "-1"], "frame_stride"),
        (["prepare", "scans", "scans", "--root", "x", "--out", "o"], "root, files: expected a single SOURCE with them"),
        (["prepare", "bad.yaml", "--out", "o"], "bad.yaml: "),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_nothing(arguments, message, run, tmp_path, pictures):
    pictures(tmp_path / "scans", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "bad.yaml").write_text("name: x\nmodality: CT\nnormalisation: ct\ncolour: red\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and message in err
    assert len(err.splitlines()) == 1 and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_earlier_run_of_something_else_is_usage_and_a_bad_run_is_a_failure(run, tmp_path, pictures):
    pictures(tmp_path / "scans", 4)
    command = ("prepare", "scans", "--modality", "X-ray", "--out", "set")
    assert run(*command, "--size", 64, "--shard", "0/2")[0] == 0
    code, _, err = run(*command, "--size", 32)
    assert code == 2 and "started with size 64, now it is 32" in err and len(err.splitlines()) == 1
    code, _, err = run(*command, "--size", 64, "--memory", 1024)
    assert code == 2 and "started with memory_mb 512, now it is 1024" in err and len(err.splitlines()) == 1
    for i in range(4):
        (tmp_path / "scans" / "p0" / f"x{i}.png").write_bytes(b"x")
    code, _, err = run(*command, "--size", 64)
    assert code == 2 and "folder: the files have changed since the first start" in err
    code, _, err = run("prepare", "scans", "--modality", "X-ray", "--out", "bad", "--max-unreadable", 3)
    assert code == 1 and err.startswith("dex prepare: 4 of 8 files or series cannot be read, more than 3: folder/")
    assert len(err.splitlines()) == 1


def test_a_part_that_another_process_does_is_refused(run, tmp_path, pictures):
    pictures(tmp_path / "scans", 2)
    (tmp_path / "set.private").mkdir()
    with open(tmp_path / "set.private" / "part-0-of-1.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, err = run("prepare", "scans", "--modality", "X-ray", "--out", "set")
        assert code == 1 and "part 0/1 of " in err and "is being prepared by another process" in err
        assert len(err.splitlines()) == 1
    assert run("prepare", "scans", "--modality", "X-ray", "--out", "set")[0] == 0


def _workers(process):
    """Ids of the processes that work for it."""
    shown = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
    ).stdout
    return [int(line.split()[0]) for line in shown.splitlines() if "spawn_main" in line]


@pytest.mark.parametrize("number", list(exits.STOP_SIGNALS))
def test_a_signal_stops_it_and_the_same_command_goes_on(number, tmp_path, dex_process, pictures):
    pictures(tmp_path / "scans", 130, side=256)
    out = tmp_path / "set"
    command = ("prepare", tmp_path / "scans", "--modality", "X-ray", "--out", out, "--workers", 1)
    process = dex_process(*command, start_new_session=True)
    chunks = tmp_path / "set.private" / "chunks"
    deadline = time.monotonic() + 120
    while not list(chunks.glob("*.partial")):  # at work
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as a terminal or a scheduler does: to all of them
    began = time.monotonic()
    said, complaint = process.communicate(timeout=30)
    assert process.returncode == 75 and time.monotonic() - began < 10
    assert complaint.splitlines() == [
        f"dex prepare: stopped by {number.name}",
        f"finished work stays in {out}, and the same command resumes",
    ]
    assert not out.exists()
    if number == signal.SIGINT:
        process = dex_process(*command)
        said, complaint = process.communicate(timeout=120)
        assert (process.returncode, complaint) == (0, "") and "next:" in said
        assert len(ShardDataset(out)) == 130


@pytest.mark.slow
def test_workers_without_descriptors_end_the_run_and_blame_no_file(tmp_path, dex_process, pictures):
    """Nor are images lost: the same command goes on, and ends in the same bytes."""
    pictures(tmp_path / "scans", 640, side=256)

    def begin(out):
        return dex_process("prepare", tmp_path / "scans", "--modality", "X-ray", "--out", out, "--workers", 2)

    whole = begin(with_salt(tmp_path / "whole"))
    assert whole.communicate(timeout=120)[1] == "" and whole.returncode == 0
    out = with_salt(tmp_path / "out")
    private = tmp_path / "out.private"
    process, deadline = begin(out), time.monotonic() + 120
    while not list((private / "chunks").glob("*.bin")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    for pid in _workers(process):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3))
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "Too many open files" in said and not out.exists()
    process = begin(out)
    assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
    assert digest(out) == digest(tmp_path / "whole") and "refused" not in (private / "log.jsonl").read_text()


@pytest.mark.slow
def test_killed_parents_and_workers_end_in_the_same_bytes(tmp_path, dex_process, pictures):
    """kill -9 at random moments; another number of workers and of parts at each start."""
    pictures(tmp_path / "scans", 1280, side=256)
    rng = random.Random(7)

    def begin(out, shard="0/1", number=1):
        return dex_process(
            *("prepare", tmp_path / "scans", "--modality", "X-ray", "--out", out),
            *("--workers", number, "--shard", shard),
        )

    whole = begin(with_salt(tmp_path / "whole"), number=2)
    assert whole.communicate(timeout=120)[1] == "" and whole.returncode == 0
    out = with_salt(tmp_path / "killed")
    chunks = tmp_path / "killed.private" / "chunks"

    def finished():
        return len(list(chunks.glob("*.bin")))

    def kill(process, pids_of):
        """At a random moment after it has finished one more chunk of the ten; the next takes 0.1 s or more."""
        before, deadline = finished(), time.monotonic() + 120
        while finished() == before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        pids = pids_of(process)
        assert pids and finished() < 10
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    process = begin(out, "1/2")
    kill(process, lambda process: [process.pid])
    process.wait()
    process = begin(out, "1/2", 2)
    kill(process, _workers)
    assert process.communicate(timeout=120)[1] == "" and process.returncode == 0 and not out.exists()
    process = begin(out, "0/2", 2)
    assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
    assert digest(out) == digest(tmp_path / "whole")
    assert "refused" not in (tmp_path / "killed.private" / "log.jsonl").read_text()
