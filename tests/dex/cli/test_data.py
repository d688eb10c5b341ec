"""`dex data` as a user calls it; `dex data check` is tested on a prepared set in test_prepare.py too."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("inline_workers")


def test_check_names_a_missing_shard(run, tmp_path, pictures):
    pictures(tmp_path / "scans", 4)
    assert run("prepare", "scans", "--modality", "X-ray", "--size", 64, "--out", "set")[0] == 0
    assert run("data", "check", "set") == (0, "4 images in 1 shard: every hash matches\n", "")
    (tmp_path / "set" / "shard-00000.tar").unlink()
    code, out, err = run("data", "check", "set")
    assert (code, err) == (1, "") and "shard-00000.tar" in out and "every hash matches" not in out


def test_leak(run, tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    pictures(tmp_path / "a", 8)
    pictures(tmp_path / "b", 6, first=5)
    pictures(tmp_path / "c", 3, first=20)
    for name in "abc":
        code, *_ = run(
            "prepare", name, "--modality", "X-ray", "--size", 64, "--encoding", "png", "--out", f"set-{name}"
        )
        assert code == 0
    code, out, err = run("data", "leak", "set-a", "set-b", "--out", "pairs.csv")
    assert code == 1 and err == "" and "3 of 6 images occur in" in out and "3 exact" in out
    header, *rows = (tmp_path / "pairs.csv").read_text().splitlines()
    assert header == "kind,b,a,how" and len(rows) == 3 and all(row.startswith("exact,") for row in rows)
    code, out, err = run("data", "leak", "set-a", "set-c")
    assert (code, err) == (0, "") and "no overlap found" in out
    (tmp_path / "set-c" / "manifest.json").write_text("{}")
    code, _, err = run("data", "leak", "set-a", "set-c")
    assert code == 1 and err.startswith("dex data leak: manifest.json: ") and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data"], "COMMAND: expected a value, got nothing"),
        (["data", "purge"], "COMMAND: expected one of check, inventory, where, refused, withdraw, leak, got 'purge'"),
        (["data", "check", "scans"], "DIR: expected a shard set; scans has no manifest.json"),
        (["data", "where", "scans", "x"], "DIR: expected a shard set; scans has no manifest.json"),
        (["data", "where", "scans"], "ID: expected a value, got nothing"),
        (["data", "refused", "nowhere"], "DIR: expected a shard set; nowhere has no manifest.json"),
        (["data", "withdraw", "scans", "x"], "DIR: expected a shard set; scans has no manifest.json"),
        (
            ["data", "leak", "scans", "scans", "--out", "pairs.txt"],
            "out: expected NAME.csv or NAME.json in an existing folder",
        ),
        (
            ["data", "leak", "scans", "nowhere"],
            "B: expected a shard set or a folder of images; nowhere is not a folder",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_nothing(arguments, message, run, tmp_path, pictures):
    pictures(tmp_path / "scans", 1)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def prepared(run, tmp_path, pictures):
    """A set of 8 pictures of 4 patients; a broken one, notes and a link are not in it."""
    pictures(tmp_path / "scans", 8)
    (tmp_path / "scans" / "p0" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "scans" / "p1" / "notes.docx").write_text("x")
    (tmp_path / "scans" / "p1" / "=1+1\n.weird").write_text("x")
    (tmp_path / "scans" / "link.png").symlink_to("p0/0000.png")
    command = ("prepare", "scans", "--modality", "X-ray", "--size", 64, "--encoding", "png", "--out", "set")
    assert run(*command)[0] == 0
    return command


def index(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.index.jsonl")) for line in open(path)]


def test_where(prepared, run, tmp_path):
    row = index(tmp_path / "set")[0]
    code, out, err = run("data", "where", "set", row["id"])
    assert code == 0 and err.startswith("private: ") and len(err.splitlines()) == 1
    assert f"{tmp_path}/scans/p0/0000.png" in out and "shard-00000.tar 00000000.png" in out and row["group"] in out
    code, out, _ = run("data", "where", "set", "p1", "scans/p2/0002.png")
    assert code == 0 and "p1: 2 images in the set, found by the folder in folder" in out
    assert "scans/p2/0002.png: 1 image in the set, found by a path" in out
    code, out, _ = run("data", "where", "set", "scans/p0/bad.png")
    assert code == 0 and "refused as unreadable" in out and f"{tmp_path}/scans/p0/bad.png" in out
    code, out, err = run("data", "where", "set", "p1", "nobody")
    assert (code, out) == (2, "") and "got nobody, searched among ids" in err and len(err.splitlines()) == 1
    code, out, err = run("data", "where", "set", row["id"].split("/")[1][:8])
    assert code == 2 and f"Did you mean {row['id']}?" in err


def test_refused(prepared, run, tmp_path):
    code, out, err = run("data", "refused", "set")
    assert code == 0 and err.startswith("private: ")
    *listed, counts = out.splitlines()
    assert counts == "of no known format 2, symbolic links 1, unreadable 1" and len(listed) == 4
    assert any(line.startswith(f"unreadable  {tmp_path}/scans/p0/bad.png  (") for line in listed)
    assert f"symbolic links  {tmp_path}/scans/link.png" in listed
    code, out, _ = run("data", "refused", "set", "--reason", "of no known format", "--csv")
    table = list(csv.reader(io.StringIO(out)))
    assert code == 0 and table[0] == ["source", "path", "reason", "detail"] and len(table) == 3
    assert {row[1] for row in table[1:]} == {
        f"{tmp_path}/scans/p1/notes.docx",
        f"{tmp_path}/scans/p1/=1+1\\n.weird",
    }
    code, out, err = run("data", "refused", "set", "--reason", "typo")
    assert (code, out) == (2, "") and "unreadable (1), got 'typo'" in err


def test_withdraw(prepared, run, tmp_path):
    before = run("data", "withdraw", "set", "nobody")
    assert before[:2] == (2, "") and "got nobody" in before[2]
    code, out, err = run("data", "withdraw", "set", "p1")
    assert (code, err) == (0, "") and "withdrawn: 2 images of 1 patient\n" in out and "fingerprint before: " in out
    assert run("data", "check", "set")[:2] == (0, "6 images in 1 shard: every hash matches\n")
    code, out, _ = run("data", "where", "set", "p1")
    assert code == 0 and "0 images in the set" in out and "withdrawn on " in out
    code, out, _ = run("data", "withdraw", "set", "p1")
    assert code == 0 and "no such image is in the set: withdrawn on " in out
    code, out, err = run("data", "withdraw", "set")
    assert code == 2 and "there is no interrupted withdrawal" in err
    code, out, _ = run(*prepared)  # the set is there, without the patient
    assert code == 0 and "withdrawn" in out
    shutil.rmtree(tmp_path / "set")
    code, out, _ = run(*prepared)
    assert code == 0 and "withdrawn 2" in out and len(index(tmp_path / "set")) == 6


def test_withdrawn_by_a_link_and_from_within(prepared, run, tmp_path, monkeypatch):
    (tmp_path / "alias").symlink_to("set")
    assert run("data", "withdraw", "alias", "p0")[0] == 0
    assert (tmp_path / "alias").is_symlink() and len(index(tmp_path / "set")) == 6
    monkeypatch.chdir(tmp_path / "set")
    assert run("data", "withdraw", ".", "p2")[0] == 0 and len(index(tmp_path / "set")) == 4


def test_a_set_without_its_private_folder(prepared, run, tmp_path):
    row = index(tmp_path / "set")[0]
    shutil.rmtree(tmp_path / "set.private")
    for command in (["where", "set", row["id"]], ["refused", "set"]):
        code, out, err = run("data", *command)
        assert (code, out) == (2, "") and "DIR: expected its private folder" in err
    code, out, err = run("data", "withdraw", "set", "p1")
    assert code == 2 and "only the private folder knows" in err
    code, out, _ = run("data", "withdraw", "set", row["group"])
    assert code == 0 and "copies of the images were not searched for" in out
    assert index(tmp_path / "set") and all(left["group"] != row["group"] for left in index(tmp_path / "set"))


def test_a_set_that_cannot_be_written(prepared, run, tmp_path, monkeypatch):
    import errno

    from dex.data import shard_rewrite

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*")}
    monkeypatch.setattr(shard_rewrite, "_write", fail)
    code, out, err = run("data", "withdraw", "set", "p1")
    assert (code, out) == (1, "") and "No space left on device; a withdrawal needs space for" in err
    assert len(err.splitlines()) == 1
    assert {path: path.read_bytes() for path in (tmp_path / "set").rglob("*")} == before
    assert run("data", "check", "set")[0] == 0


@pytest.mark.slow
def test_killed_from_outside(prepared, run, tmp_path):
    """SIGKILL at some moments of the command itself; the same command finishes."""
    (tmp_path / "all").mkdir()
    for number, wait in enumerate((0.6, 1.0, 1.4)):
        folder = tmp_path / "all" / f"set{number}"
        shutil.copytree(tmp_path / "set", folder)
        shutil.copytree(tmp_path / "set.private", f"{folder}.private")
        command = [sys.executable, "-m", "dex.cli", "data", "withdraw", str(folder), "p1"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert len(index(folder)) in (6, 8)
        assert run("data", "withdraw", folder, "p1")[0] == 0 and len(index(folder)) == 6
        assert run("data", "check", folder)[0] == 0
