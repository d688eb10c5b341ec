"""`dex data` as a user calls it; `dex data check` is tested on a prepared set in test_prepare.py too."""

import os

import pytest

pytestmark = pytest.mark.usefixtures("inline_workers")


def test_check_names_a_missing_shard(run, tmp_path, pictures):
    pictures(tmp_path / "scans", 4)
    assert run("prepare", "scans", "--modality", "X-ray", "--size", 64, "--out", "set")[0] == 0
    assert run("data", "check", "set") == (0, "4 images in 1 shards: every hash fits\n", "")
    (tmp_path / "set" / "shard-00000.tar").unlink()
    code, out, err = run("data", "check", "set")
    assert (code, err) == (1, "") and "shard-00000.tar" in out and "every hash fits" not in out


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
    code, out, err = run("data", "leak", "set-a", "set-b")
    assert code == 1 and err == "" and "3 of 6 images occur in" in out and "3 exact" in out
    code, out, err = run("data", "leak", "set-a", "set-c")
    assert (code, err) == (0, "") and "no overlap found" in out
    (tmp_path / "set-c" / "manifest.json").write_text("{}")
    code, _, err = run("data", "leak", "set-a", "set-c")
    assert code == 1 and err.startswith("dex data leak: manifest.json: ") and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data"], "the following arguments are required: COMMAND"),
        (["data", "purge"], "invalid choice: 'purge'"),
        (["data", "check", "scans"], "DIR: expected a shard set; scans holds no manifest.json"),
        (["data", "leak", "scans", "nowhere"], "B: expected a shard set or a folder of images; nowhere is no folder"),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_nothing(arguments, message, run, tmp_path, pictures):
    pictures(tmp_path / "scans", 1)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
