"""Shard sets: written atomically and identically, read by the index alone, every damaged byte found."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from dex.data import CorruptDataError, Loader, SampleError, ShardWriter, open_dataset, verify
from dex.data import shards as module

MODALITIES = ("CT", "MR", "PET")
rng = np.random.default_rng(0)
IMAGES = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(7)]


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def fill(writer):
    for number, image in enumerate(IMAGES):
        writer.add(
            f"s{number}",
            png(image),
            kind="png",
            modality=MODALITIES[number % 2],
            split="val" if number > 4 else "train",
            group=f"g{number // 2}",
            meta={"note": "é"},
        )
    writer.add_document("CARD.md", b"# card\n")
    writer.add_document("licences/x.txt", b"MIT\n")


def write(folder):
    with ShardWriter(folder, name="small", modalities=MODALITIES, image_size=16, samples_per_shard=3) as writer:
        fill(writer)
    return folder


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "set")


def forge(root, change):
    """Change the manifest as somebody would who also fits its own hash."""
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (root / "manifest.json").write_bytes(module._manifest_bytes(manifest))


def forge_index(root, change):
    path = root / "shard-00000.index.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def fit(manifest):
        manifest["shards"][0].update(
            index_bytes=path.stat().st_size, index_sha256=hashlib.sha256(path.read_bytes()).hexdigest()
        )

    forge(root, fit)


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


def test_other_readers_take_the_tar(root):
    with tarfile.open(root / "shard-00000.tar", "r:") as tar:
        names = tar.getnames()
        assert names == [f"0000000{n}.{end}" for n in range(3) for end in ("png", "json")]
        for member in tar:
            assert member.isreg() and (member.mtime, member.uid, member.gid, member.uname, member.mode) == (
                0,
                0,
                0,
                "",
                0o644,
            )
        assert tar.extractfile("00000001.png").read() == png(IMAGES[1])
        assert json.load(tar.extractfile("00000001.json")) == {
            "id": "s1",
            "modality": "MR",
            "split": "train",
            "group": "g0",
            "note": "é",
        }


def test_same_bytes_every_time(root, tmp_path):
    other = write(tmp_path / "other")
    files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    assert len(files) == 9
    for file in files:
        assert (root / file).read_bytes() == (other / file).read_bytes()


def test_every_one_byte_edit_is_found(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    draw = random.Random(1)
    for trial in range(200):
        path = files[trial % len(files)]
        data = path.read_bytes()
        at = draw.randrange(len(data))
        edited = bytearray(data)
        edited[at] ^= draw.randrange(1, 256)
        path.write_bytes(edited)
        problems = verify(root)
        assert problems and path.name in " ".join(problems), (path.name, at)
        path.write_bytes(data)
    assert verify(root) == []


def test_edits_of_the_embedded_set_are_found(tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(open_dataset(None).root, root)
    assert verify(root) == []
    files = sorted(path for path in root.rglob("*") if path.is_file())
    draw = random.Random(2)
    weights = [path.stat().st_size for path in files]
    for path in draw.choices(files, weights, k=45) + [root / "manifest.json"] * 5:
        at, flip = draw.randrange(path.stat().st_size), draw.randrange(1, 256)
        _flip(path, at, flip)
        assert path.name in " ".join(verify(root)), (path.name, at)
        _flip(path, at, flip)
    assert verify(root) == []


def _flip(path, at, bits):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bits]))


@pytest.mark.parametrize("keep", [0, 1, 511, 1024, -1024, -1])
def test_truncated_shard(root, keep):
    path = root / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:keep])
    assert any("shard-00001.tar" in problem for problem in verify(root))
    with pytest.raises(ValueError, match="shard-00001.tar: expected a regular file of"):
        open_dataset(root)


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
    with pytest.raises(SampleError, match="'s2': shard-00000.tar: .* do not lie within"):
        dataset[2]
    path.unlink()
    with pytest.raises(SampleError, match="'s1': shard-00000.tar: No such file"):
        dataset[1]
    for entry in dataset.manifest["shards"][1:]:
        (root / entry["file"]).unlink()
    with pytest.raises(CorruptDataError, match="shard-00002.tar: No such file"):
        next(Loader(dataset, 7, seed=0))


@pytest.mark.parametrize(
    "name",
    ["../set2/shard-00000.tar", "/etc/passwd", "..", "a/../../b", "a/b.tar", "", "manifest.json", ".hidden", "x\n"],
)
@pytest.mark.parametrize("field", ["file", "index"])
def test_names_outside_the_folder(root, name, field):
    forge(root, lambda manifest: manifest["shards"][0].update({field: name}))
    with pytest.raises(ValueError, match="manifest.json: file name: expected a plain name"):
        open_dataset(root)
    assert "file name" in verify(root)[0]


def test_document_names_outside_the_folder(root):
    forge(root, lambda manifest: manifest["documents"][0].update(file="../CARD.md"))
    with pytest.raises(ValueError, match="file name"):
        open_dataset(root)


def test_links_are_not_followed(root, tmp_path):
    elsewhere = tmp_path / "elsewhere.tar"
    shutil.move(root / "shard-00000.tar", elsewhere)
    (root / "shard-00000.tar").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="shard-00000.tar: expected a regular file"):
        open_dataset(root)
    assert verify(root)


@pytest.mark.parametrize(
    "update, reason",
    [
        ({"offset": 10**9}, "do not lie within"),
        ({"offset": -512}, "offset: expected int"),
        ({"size": 10**9}, "do not lie within"),
        ({"size": 0}, "do not lie within"),
        ({"offset": 1.5}, "offset: expected int"),
        ({"offset": True}, "offset: expected int"),
        ({"split": "test"}, "unknown kind, split"),
        ({"kind": "pkl"}, "unknown kind, split"),
        ({"modality": "PET"}, "is not in the manifest"),
        ({"id": None}, "id: expected str"),
        ({"sha256": "zz"}, "malformed sha256"),
    ],
)
def test_hostile_index(root, update, reason):
    forge_index(root, lambda lines: lines[1].update(update))
    with pytest.raises(ValueError, match=f"shard-00000.index.jsonl: .*{reason}"):
        open_dataset(root)
    assert verify(root)


def test_index_that_points_at_other_bytes(root):
    forge_index(root, lambda lines: lines[1].update(offset=lines[0]["offset"] + 1))
    with pytest.raises(SampleError, match="sha256"):
        open_dataset(root)[1]
    assert any("is not where the index says" in problem for problem in verify(root))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: m.update(version=99), "expected dex-shards version 1, got 'dex-shards' version 99"),
        (lambda m: m.update(shards={}), "shards: expected list"),
        (lambda m: m.update(samples=8), "'samples' is not the sum"),
        (lambda m: m["modalities"][0].update(train=9), "9 train samples of 'CT' declared"),
        (lambda m: m["modalities"][2].update(empty=False), "'empty' contradicts"),
        (lambda m: m["shards"].append("x"), "expected an object"),
        (lambda m: m.pop("name"), "name: expected str"),
    ],
)
def test_manifest_that_does_not_fit(root, change, reason):
    forge(root, change)
    with pytest.raises(ValueError, match=f"manifest.json: .*{reason}"):
        open_dataset(root)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"format": "dex-shards", "version": 1}', "\0"])
def test_no_manifest_at_all(root, text):
    (root / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="^manifest.json: "):
        open_dataset(root)
    assert verify(root)[0].startswith("manifest.json: ")


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


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"sample_id": "s0"}, "sample_id"),
        ({"sample_id": ""}, "sample_id"),
        ({"modality": "OCT"}, "modality"),
        ({"split": "test"}, "split"),
        ({"kind": "pkl"}, "kind"),
        ({"data": png(np.zeros((20, 16, 3), np.uint8))}, "data"),
        ({"data": b"x"}, "not a readable png"),
    ],
)
def test_writer_refuses_and_leaves_nothing(tmp_path, arguments, name):
    good = {"data": png(IMAGES[0]), "kind": "png", "modality": "CT", "split": "train", "group": "g"}
    with pytest.raises(ValueError, match=f"^{name}"):
        with ShardWriter(tmp_path, name="x", modalities=MODALITIES, image_size=16, samples_per_shard=1) as writer:
            writer.add("s0", **good)
            writer.add("s1", **good)
            writer.add_document("CARD.md", b"x")
            writer.add(**{"sample_id": "s2", **good, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_writer_arguments(root, tmp_path):
    with pytest.raises(ValueError, match="^root: expected a folder without manifest.json"):
        ShardWriter(root, name="x", modalities=MODALITIES)
    with pytest.raises(ValueError, match="^modalities: "):
        ShardWriter(tmp_path / "a", name="x", modalities=("CT", "CT"))
    with (
        pytest.raises(ValueError, match="at least one sample"),
        ShardWriter(tmp_path / "b", name="x", modalities=("CT",)),
    ):
        pass
    with ShardWriter(tmp_path / "c", name="x", modalities=MODALITIES, image_size=16) as writer:
        with pytest.raises(ValueError, match="^file: expected a plain name"):
            writer.add_document("../x", b"")
        fill(writer)
    assert verify(root) == []


def test_a_writer_stopped_at_any_write_leaves_no_set(tmp_path, monkeypatch):
    # disk full, or a kill, at every rename and every fsync: there is no manifest, and the next writer succeeds
    for function in ("fsync", "replace"):
        for fails_at in range(1, 30):
            calls = 0
            real = getattr(os, function)

            def failing(*arguments, real=real, fails_at=fails_at):
                nonlocal calls
                calls += 1
                if calls == fails_at:
                    raise OSError(28, "No space left on device")
                return real(*arguments)

            folder = tmp_path / f"{function}{fails_at}"
            monkeypatch.setattr(module.os, function, failing)
            try:
                write(folder)
            except OSError:
                monkeypatch.undo()
                assert not (folder / "manifest.json").exists()
                assert not [path for path in folder.rglob("*") if path.is_file()]
            else:
                monkeypatch.undo()
                assert calls < fails_at
                break
            write(folder)
            assert verify(folder) == []
        assert fails_at > 8


def test_leftovers_of_a_killed_writer_go(tmp_path):
    (tmp_path / "shard-00000.tar.partial").write_bytes(b"half")
    write(tmp_path)
    assert not list(tmp_path.glob("*.partial")) and verify(tmp_path) == []


def test_verify_needs_a_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: expected a folder with manifest.json"):
        verify(tmp_path)
