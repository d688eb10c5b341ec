"""Shard sets are read by the index alone; damage costs the samples that it touches."""

import errno
import hashlib
import os
import pickle

import numpy as np
import pytest
from small_set import IMAGES, forge, forge_index, png

from dex.data import CorruptDataError, Loader, SampleError, ShardWriter, open_dataset, verify


def test_round_trip(root):
    dataset = open_dataset(root)
    assert verify(root) == []
    assert (dataset.name, dataset.modalities, dataset.empty_modalities) == ("small", ("CT", "MR"), ("PET",))
    assert dataset.modality_counts() == {"CT": 4, "MR": 3} and dataset.image_size == 16
    for number, image in enumerate(IMAGES):
        sample = dataset[number]
        assert (sample.id, sample.modality) == (f"s{number}", number % 2)
        assert (sample.image.permute(1, 2, 0).numpy() == image).all()
    assert [dataset.split("val").sample_id(i) for i in range(2)] == ["s5", "s6"]
    assert sorted(path.name for path in root.iterdir() if "." in path.name) == [
        "CARD.md",
        "manifest.json",
        *(f"shard-0000{n}.{end}" for n in range(3) for end in ("index.jsonl", "tar")),
    ]
    assert pickle.loads(pickle.dumps(dataset))[3].id == "s3"  # workers may be spawned


def test_twelve_bits_in_sixteen_are_warned_of(tmp_path, caplog):
    with ShardWriter(tmp_path, name="dim", modalities=("CT",), image_size=16) as writer:
        for number in range(2):
            data = png(np.full((16, 16), 4095 - number, np.uint16))
            writer.add(f"s{number}", data, kind="png", modality="CT", split="train", group="g")
    dataset = open_dataset(tmp_path)
    assert dataset[0].image.max() == dataset[1].image.max() == 16
    (record,) = caplog.records
    assert "dim: the 16-bit image 's0' has no value above 4095" in record.getMessage()


@pytest.mark.parametrize("keep", [0, 1, 511, 1024, -1024, -1])
def test_truncated_shard(root, keep):
    path = root / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:keep])
    assert any("shard-00001.tar" in problem for problem in verify(root))
    with pytest.raises(ValueError, match="shard-00001.tar: expected a regular file of"):
        open_dataset(root)


def test_an_exhausted_process_is_not_taken_for_damage(root, monkeypatch):
    dataset = open_dataset(root)

    def fail(*_, **options):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/private/path")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match="Too many open files") as caught:
        dataset[0]
    assert not isinstance(caught.value, SampleError) and "private" not in str(caught.value)


def test_damage_after_opening_costs_one_sample(root):
    dataset = open_dataset(root)
    path = root / "shard-00000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(SampleError, match="'s0': shard-00000.tar: sha256 .* differs"):
        dataset[0]
    assert dataset[1].id == "s1"
    path.write_bytes(data[:600])
    with pytest.raises(SampleError, match="'s2': shard-00000.tar: .* are not within"):
        dataset[2]
    path.unlink()
    with pytest.raises(SampleError, match="'s1': shard-00000.tar: No such file"):
        dataset[1]
    for entry in dataset.manifest["shards"][1:]:
        (root / entry["file"]).unlink()
    with pytest.raises(CorruptDataError, match="shard-00002.tar: No such file"):
        next(Loader(dataset, 7, seed=0))


def test_index_that_points_at_other_bytes(root):
    forge_index(root, lambda lines: lines[1].update(offset=lines[0]["offset"] + 1))
    with pytest.raises(SampleError, match="sha256"):
        open_dataset(root)[1]
    assert any("is not where the index says" in problem for problem in verify(root))


def test_no_pickle_in_a_shard(root, tmp_path):
    canary = tmp_path / "executed"

    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    # a sample whose bytes are a pickle, with every hash fitted to it
    payload = pickle.dumps(Canary())
    path = root / "shard-00000.tar"
    data = bytearray(path.read_bytes())
    data[512 : 512 + len(payload)] = payload
    path.write_bytes(data)
    for kind in ("png", "jpg", "npy"):
        forge_index(
            root,
            lambda lines, kind=kind: lines[0].update(
                kind=kind, size=len(payload), sha256=hashlib.sha256(payload).hexdigest()
            ),
        )
        forge(root, lambda m: m["shards"][0].update(sha256=hashlib.sha256(data).hexdigest()))
        with pytest.raises(SampleError, match="'s0'"):
            open_dataset(root)[0]
        verify(root)
    assert not canary.exists()


def test_image_of_another_size(root):
    big = png(np.zeros((32, 32, 3), np.uint8))
    path = root / "shard-00000.tar"
    data = path.read_bytes() + big
    path.write_bytes(data)
    forge(root, lambda m: m["shards"][0].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    forge_index(
        root,
        lambda lines: lines[0].update(
            offset=len(data) - len(big), size=len(big), sha256=hashlib.sha256(big).hexdigest()
        ),
    )
    with pytest.raises(SampleError, match="size: expected 16 x 16, got 32 x 32"):
        open_dataset(root)[0]
