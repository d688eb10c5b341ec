"""Folders and tables that are elsewhere are copied once, and prepared as those that are here."""

import fcntl
import os
import stat
import threading
import time
import zipfile
from types import SimpleNamespace

import pytest
from small_runs import digest, picture, save, save_volume, start

from dex.prepare import remote
from dex.prepare.remote import fetch, is_url, place_of
from dex.prepare.sources import is_place, read_source, resolve

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def bucket(tmp_path):
    """The same files in memory:// and on this machine."""
    for i in range(6):
        save(tmp_path / "here", f"p{i // 2}/{i:02d}.png", picture(i))
    save_volume(tmp_path / "here" / "v" / "x.nii.gz", 50)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "here"), "/bucket", recursive=True)
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def test_a_folder_elsewhere_gives_the_same_set(bucket, here, tmp_path):
    asked = {"modality": "CT", "trusted": True, "files": ("**/*.nii.gz",)}
    start(resolve(tmp_path / "here", **asked), tmp_path / "local")
    facts, said = start(resolve(bucket, **asked), tmp_path / "out", cache=tmp_path / "cache")
    assert facts["images"] == 6 and digest(tmp_path / "out") == digest(tmp_path / "local")
    assert any(text.startswith("folder: copying 1 files, ") and text.endswith("from memory://") for text in said)
    # nothing is copied again, and nobody else may look
    _, said = start(resolve(bucket, **asked), tmp_path / "again", cache=tmp_path / "cache")
    assert not any("copying" in text for text in said)
    (folder,) = (tmp_path / "cache" / "remote").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o600}


def test_tables_elsewhere_and_of_files_elsewhere(bucket, here, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/list.csv", b"path,modality,patient\np0/00.png,X-ray,A\nmemory://bucket/p2,X-ray,B\n")
    facts, _ = start(resolve(f"{bucket}/list.csv"), tmp_path / "one", cache=tmp_path / "cache")
    assert facts["images"] == 3 and facts["name"] == "table"
    (tmp_path / "list.csv").write_text("path,modality,patient\np0/00.png,X-ray,A\np2,X-ray,B\n")
    other, _ = start(resolve(tmp_path / "list.csv", root=bucket), tmp_path / "two", cache=tmp_path / "cache")
    assert other["images"] == 3
    with pytest.raises(ValueError, match="root: expected none beside a table at a URL"):
        resolve(f"{bucket}/list.csv", root=str(tmp_path))
    (tmp_path / "list.csv").write_text("path,modality\nnone.png,X-ray\n")
    with pytest.raises(ValueError, match="list.csv: line 2: path: expected a file or a folder, got nothing there"):
        start(resolve(tmp_path / "list.csv", root=bucket), tmp_path / "three", cache=tmp_path / "cache")


def test_zip_files_and_local_urls(here, tmp_path):
    save(tmp_path / "src", "p1/a.png", picture(1))
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as archive:
        archive.write(tmp_path / "src/p1/a.png", "p1/a.png")
        archive.writestr("../out.png", (tmp_path / "src/p1/a.png").read_bytes())
    for argument in (str(tmp_path / "scans.zip"), f"zip://::file://{tmp_path}/scans.zip"):
        out = tmp_path / f"out-{len(argument)}"
        facts, _ = start(resolve(argument, modality="X-ray"), out, cache=tmp_path / "cache")
        assert facts["images"] == 1
    assert not list((tmp_path / "cache").rglob("out.png")) and not (tmp_path / "out.png").exists()
    for scheme in ("file", "local"):
        (one,) = resolve(f"{scheme}://{tmp_path}/src", modality="X-ray")
        assert one.root == str(tmp_path / "src") and is_place(f"{scheme}://{tmp_path}/src")
    assert is_url("s3://b/x") and is_url("zip://::a.zip") and not is_url("a/b:c") and not is_url("C:/x")
    assert place_of("none.zip") == "none.zip"


def test_a_description_may_lie_beside_what_is_elsewhere(tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\nmodality: CT\nnormalisation: ct\nroot: s3://bucket/x\nfiles: ['**/*']\n")
    assert read_source(tmp_path / "a.yaml").root == "s3://bucket/x"


def test_what_changes_there_changes_here(bucket, tmp_path):
    cache, said, memory = tmp_path / "cache", [], fsspec.filesystem("memory")
    root = fetch(bucket, lambda path: path.endswith(".png"), cache, said.append)
    assert len(list(root.rglob("*.png"))) == 6 and not list(root.rglob("*.gz"))
    (root / "p0/00.png.1-a.partial").write_bytes(b"cut short")
    memory.rm("/bucket/p2/05.png")
    memory.pipe("/bucket/p0/00.png", b"other")
    assert fetch(bucket, lambda path: path.endswith(".png"), cache, said.append) == root
    assert (root / "p0/00.png").read_bytes() == b"other"
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == [f"{i:02d}.png" for i in range(5)]


def test_runs_that_want_other_files_leave_each_others_copies(bucket, tmp_path):
    root = fetch(bucket, lambda path: path.endswith(".png"), tmp_path / "cache", lambda text: None)
    assert fetch(bucket, lambda path: path.endswith(".gz"), tmp_path / "cache", lambda text: None) == root
    assert len(list(root.rglob("*.png"))) == 6 and len(list(root.rglob("*.gz"))) == 1


def test_one_run_at_a_time_copies(bucket, tmp_path):
    """Another one's unfinished file would otherwise be taken for a leftover."""
    cache, said = tmp_path / "cache", []
    root = fetch(bucket, lambda path: path.endswith(".gz"), cache, said.append)
    work = root / "p0" / "00.png.1-a.partial"
    work.parent.mkdir()
    work.write_bytes(b"half")
    other = os.open(root, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    thread = threading.Thread(target=fetch, args=(bucket, lambda path: path.endswith(".png"), cache, said.append))
    thread.start()
    deadline = time.monotonic() + 20
    while not any("waiting" in text for text in said) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert work.exists() and not list(root.rglob("*.png"))
    os.close(other)
    thread.join(20)
    assert not work.exists() and len(list(root.rglob("*.png"))) == 6


def test_files_that_hold_the_data_of_another_come_with_it(bucket, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/m/a.mhd", b"NDims = 3\nElementDataFile = a.raw\n")
    memory.pipe("/bucket/m/a.raw", b"12345678")
    memory.pipe("/bucket/m/b.raw", b"12345678")
    root = fetch(bucket, lambda path: path.endswith(".mhd"), tmp_path / "cache", lambda text: None)
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == ["a.mhd", "a.raw"]


def test_what_cannot_be_opened_is_named_without_its_password(bucket, tmp_path, monkeypatch):
    def get(url):
        return fetch(url, lambda path: True, tmp_path / "cache", lambda text: None)

    with pytest.raises(ValueError, match="^root: expected files below memory://, got none"):
        get("memory://nothing")
    with pytest.raises(ValueError, match="^root: nosuch:// cannot be opened"):
        get("nosuch://user:secret@host/x")
    with pytest.raises(ValueError, match="^root: ftp:// cannot be opened") as error:
        get("ftp://user:sec/ret@host/x")  # "/" in a password ends the host
    assert "sec" not in str(error.value)
    with pytest.raises(ValueError, match="^root: zip:// cannot be opened|^root: expected a folder at zip://"):
        get(f"zip://::{tmp_path}/none.zip")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: SimpleNamespace(free=remote.RESERVE + 10))
    with pytest.raises(ValueError, match="has room for 10 B: give --cache a larger disk"):
        get(bucket)
    monkeypatch.setattr(remote, "_open", lambda url: (_ for _ in ()).throw(RuntimeError("secret")))
    with pytest.raises(OSError, match="memory://: RuntimeError") as error:
        get(bucket)
    assert "secret" not in str(error.value) and os.listdir(tmp_path / "cache" / "remote")
