"""Plain folders: what is taken, what its fingerprint covers, and links that are not followed."""

import errno
import hashlib
import os
import re
import shutil
import time
import tracemalloc

import pytest
import torch
from picture_files import COLOUR, GREY, jpeg, npy, png, put

from dex.data import FolderDataset, SampleError, folder, open_dataset


def test_modalities_ids_and_order(tmp_path, caplog):
    put(
        tmp_path,
        b__deep__2_dot_png=png(GREY),
        b__10_dot_PNG=png(GREY),
        a__z_dot_npy=npy(GREY),
        top_dot_jpeg=jpeg(GREY),
        a__notes_dot_txt=b"x",
        README=b"x",
    )
    (tmp_path / "a" / "Ä.png").write_bytes(png(COLOUR))
    dataset = open_dataset(tmp_path)
    assert [dataset[index].id for index in range(5)] == ["a/z.npy", "a/Ä.png", "b/10.PNG", "b/deep/2.png", "top.jpeg"]
    assert dataset.modalities == ("a", "b", "unknown")
    assert dataset.modality_counts() == {"a": 2, "b": 2, "unknown": 1}
    assert dataset.modality_index().tolist() == [0, 0, 1, 1, 2]
    assert dict(dataset.ignored) == {".txt": 1, "without suffix": 1}
    assert "ignored 1 .txt, 1 without suffix" in caplog.text
    assert dataset[0].image.shape == (3, 256, 256) and dataset[0].image.dtype == torch.uint8


def files(folder, **contents):
    """`put` of files that need not be images."""
    return put(folder, **(contents or {"b__Z_dot_png": b"one", "b__a_dot_png": b"two", "a__é_dot_npy": b"three"}))


def test_fingerprint_covers_paths_and_bytes(tmp_path):
    """In the order of the paths' bytes, whatever the locale; a run's fingerprint outlives the version that wrote it."""
    digest = hashlib.sha256(b"dex folder 2\n")
    for path, content in ("a/é.npy", b"three"), ("b/Z.png", b"one"), ("b/a.png", b"two"):
        digest.update(b"%d %s " % (len(path.encode()), path.encode()) + hashlib.sha256(content).digest() + b"\n")
    dataset = open_dataset(files(tmp_path / "one"))
    assert dataset.fingerprint == digest.hexdigest()
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert open_dataset(tmp_path / "copy").fingerprint == dataset.fingerprint
    put(tmp_path / "copy", a__new_dot_png=b"")
    assert open_dataset(tmp_path / "copy").fingerprint != dataset.fingerprint
    (tmp_path / "one" / "b" / "Z.png").rename(tmp_path / "one" / "b" / "Y.png")
    assert open_dataset(tmp_path / "one").fingerprint != dataset.fingerprint


def test_pixels_replaced_in_place_change_the_fingerprint(tmp_path):
    root = put(tmp_path, m__1_dot_npy=npy(GREY), m__2_dot_npy=npy(GREY))
    path, before = root / "m" / "1.npy", open_dataset(root)
    fingerprints = before.fingerprint, before.split("train").fingerprint
    status = path.stat()
    for pixels, same in ((255 - GREY, False), (GREY, True)):
        with open(path, "r+b") as file:
            file.write(npy(pixels))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        now, after = path.stat(), open_dataset(root)
        assert (now.st_size, now.st_mtime_ns, now.st_ino) == (status.st_size, status.st_mtime_ns, status.st_ino)
        assert after.earlier_fingerprint == before.earlier_fingerprint
        assert (after.fingerprint == fingerprints[0]) == (after.split("train").fingerprint == fingerprints[1]) == same


def test_the_fingerprint_of_earlier_versions(tmp_path):
    """Of paths and sizes alone. Runs that were started with it name it in their state."""
    dataset = open_dataset(files(tmp_path))
    assert dataset.earlier_fingerprint == "e176b5dc0ea1682613f3ceeecd72cf410f70bfca2d930dc528057763ca4c6fa3"
    assert (
        dataset.split("train").earlier_fingerprint == "5cad67534b8fd08cb9b638b334994fbea04c5833be9e0f11d12687269c61a328"
    )


def test_only_who_asks_for_the_fingerprint_pays(tmp_path, monkeypatch):
    put(tmp_path, **{f"m__{number}_dot_npy": npy(GREY) for number in range(20)})
    opened, real = [], FolderDataset._open
    monkeypatch.setattr(FolderDataset, "_open", lambda self, path: opened.append(path) or real(self, path))
    dataset = open_dataset(tmp_path)
    train = dataset.split("train")
    assert len(train) and dataset.modality_counts() == {"m": 20} and train.earlier_fingerprint and opened == []
    assert dataset.fingerprint and train.fingerprint and dataset.fingerprint
    assert sorted(opened) == sorted(f"m/{number}.npy".encode() for number in range(20))  # each once


def test_the_fingerprint_takes_little_memory(tmp_path):
    put(tmp_path, **{f"m__{number}_dot_npy": bytes(8 * 2**20) for number in range(12)})
    dataset = open_dataset(tmp_path)
    tracemalloc.start()
    assert len(dataset.fingerprint) == 64
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20  # a buffer for each thread, and never a whole file


def test_a_file_that_cannot_be_read_does_not_stop_the_fingerprint(tmp_path, caplog):
    dataset = open_dataset(files(tmp_path))
    (tmp_path / "b" / "Z.png").unlink()
    (tmp_path / "b" / "Z.png").symlink_to(tmp_path / "b" / "a.png")
    assert dataset.fingerprint != open_dataset(files(tmp_path / "sound")).fingerprint
    assert "1 files cannot be read; the fingerprint covers only their names" in caplog.text


def failing(monkeypatch, name, times, number=errno.EIO):
    """Let the first ``times`` reads of the file fail, without pauses before the next; returns the list of its reads."""
    opened, real = [], FolderDataset._open

    def fail(self, path):
        if path == name:
            opened.append(path)
            if len(opened) <= times:
                raise OSError(number, os.strerror(number))
        return real(self, path)

    monkeypatch.setattr(FolderDataset, "_open", fail)
    monkeypatch.setattr(folder, "_RETRY_AFTER", (0.0, 0.0))
    return opened


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_a_read_that_fails_once_leaves_the_fingerprint_as_it_is(tmp_path, monkeypatch, number):
    want = open_dataset(files(tmp_path)).fingerprint
    opened = failing(monkeypatch, b"b/Z.png", 2, number)
    assert open_dataset(tmp_path).fingerprint == want and len(opened) == 3


def test_a_file_that_fails_again_and_again_is_named(tmp_path, monkeypatch):
    opened = failing(monkeypatch, b"b/Z.png", 3)
    dataset = open_dataset(files(tmp_path))
    with pytest.raises(ValueError, match=r"b/Z.png: expected a readable file, got Input/output error \(EIO\)"):
        _ = dataset.fingerprint
    assert len(opened) == 3
    (tmp_path / "b" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"b/a.png: expected .*, got No such file or directory \(ENOENT\)"):
        _ = dataset.fingerprint


def test_whoever_waits_for_a_fingerprint_hears_how_far_it_is_and_can_end_it(tmp_path, monkeypatch):
    put(tmp_path, **{f"m__{number:02}_dot_npy": bytes(1000) for number in range(40)})
    monkeypatch.setattr(folder, "CALL_EVERY", 0.02)
    monkeypatch.setattr(folder, "_PART", 4)
    hashed, real = [], FolderDataset._content_hash

    def slow(self, path, progress):
        time.sleep(0.02)
        hashed.append(path)
        return real(self, path, progress)

    monkeypatch.setattr(FolderDataset, "_content_hash", slow)
    calls = []
    assert open_dataset(tmp_path).take_fingerprint(lambda done, total: calls.append((done, total)))
    assert len(calls) >= 2 and [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {total for _, total in calls} == {40_000} and calls[-1][0] <= 40_000
    hashed.clear()

    def interrupt(done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "_THREADS", 1)
    dataset, began = open_dataset(tmp_path), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        dataset.take_fingerprint(interrupt)
    assert time.monotonic() - began < 0.4  # 0.8 s for all of them
    time.sleep(0.1)
    stopped = len(hashed)
    time.sleep(0.1)
    assert len(hashed) == stopped < 40
    assert dataset.take_fingerprint() == open_dataset(tmp_path).fingerprint


def test_split_is_stable_and_about_one_in_twenty(tmp_path):
    for number in range(400):
        put(tmp_path, **{f"m__{number}_dot_npy": b""})
    dataset = open_dataset(tmp_path)
    train, val = dataset.split("train"), dataset.split("val")
    ids = {val.sample_id(index) for index in range(len(val))}
    assert len(train) + len(val) == 400 and 8 <= len(val) <= 35
    put(tmp_path, m__new_dot_npy=b"")
    later = open_dataset(tmp_path).split("val")
    assert ids <= {later.sample_id(index) for index in range(len(later))} <= ids | {"m/new.npy"}


def test_links_and_devices_are_not_followed(tmp_path):
    outside = put(tmp_path / "outside", secret_dot_png=png(GREY))
    root = put(tmp_path / "root", m__in_dot_png=png(GREY))
    (root / "m" / "file.png").symlink_to(outside / "secret.png")
    (root / "folder").symlink_to(outside)
    os.mkfifo(root / "m" / "pipe.png")
    dataset = open_dataset(root)
    assert [dataset.sample_id(index) for index in range(len(dataset))] == ["m/in.png"]
    assert dataset.ignored["symbolic link"] == 2
    # swapped for a link, or removed, after the folder was listed
    (root / "m" / "in.png").unlink()
    with pytest.raises(SampleError, match="No such file"):
        dataset[0]
    (root / "m" / "in.png").symlink_to(outside / "secret.png")
    with pytest.raises(SampleError):
        dataset[0]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_an_exhausted_process_is_not_taken_for_a_damaged_image(number, tmp_path, monkeypatch):
    """Replacing the image would go on to replace every image, and blame the files for it."""
    dataset = open_dataset(put(tmp_path / "root", m__in_dot_png=png(GREY)))

    def fail(*_):
        raise OSError(number, os.strerror(number), "/private/path")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        dataset[0]
    assert not isinstance(caught.value, SampleError) and "private" not in str(caught.value)


def test_scans_are_answered_with_the_command_to_give(tmp_path):
    """What `dex prepare` reads is never passed over in silence, not even beside pictures."""
    root = put(
        tmp_path / "my scans", p__1_dot_dcm=b"", p__2_dot_NII_dot_gz=b"", m__1_dot_png=png(GREY), notes_dot_txt=b""
    )
    (root / "IM0001").write_bytes(bytes(128) + b"DICM")
    out = f"'{tmp_path}/my scans-set'"
    with pytest.raises(ValueError) as caught:
        open_dataset(root)
    assert "got 1 .dcm, 1 .nii.gz, 1 DICOM without a suffix, beside 1 pictures" in str(caught.value)
    assert f"dex prepare '{root}' --out {out}; dex pretrain --data {out}" in str(caught.value)
    for path in ("p/1.dcm", "p/2.NII.gz", "IM0001"):
        (root / path).unlink()
    assert len(open_dataset(root)) == 1
