"""Row 19: pickles where data is expected, given to every entry point that opens it. None is executed."""

import hashlib
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import seeds
import torch
from test_fuzz import dex_prepare

from dex import cli
from dex.data import Loader, SampleError, ShardWriter, open_dataset, shard_format, verify
from dex.model import MaskedAutoencoder
from dex.model.weights import load_pretrained, read_state_dict
from dex.prepare import readers
from dex.prepare import run as prepare
from dex.prepare.leak import leak
from dex.train import checkpoint

SUFFIXES = (".npy", ".npz", ".png", ".jpg", ".tif", ".bmp", ".dcm", ".nii", ".nii.gz", ".mha", ".nrrd", ".mp4", ".avi")


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path):
    """Held to: not executed by the test, and executed by whoever unpickles it."""
    one = Canary(tmp_path / "executed")
    yield one
    assert not one.path.exists()
    pickle.loads(pickle.dumps(one))
    assert one.path.exists()


def object_array(one) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([[one, one], [one, one]], dtype=object), allow_pickle=True)
    return stream.getvalue()


def object_archive(one) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.npy", object_array(one))
        archive.writestr("b.pkl", pickle.dumps(one))
    return stream.getvalue()


def torch_file(one, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"model": {"weight": torch.zeros(2)}, "more": one}, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def payloads(one) -> dict[str, bytes]:
    return {
        "pickle": pickle.dumps(one),
        "text": pickle.dumps(one, 0),
        "npy": object_array(one),
        "npz": object_archive(one),
        "pt": torch_file(one, True),
        "old pt": torch_file(one, False),
    }


def test_the_payloads_work(tmp_path):
    """Each is executed by the call that trusts it."""
    opened = {
        "pickle": pickle.loads,
        "text": pickle.loads,
        "npy": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
        "npz": lambda data: np.load(io.BytesIO(data), allow_pickle=True)["a"],
        "pt": lambda data: torch.load(io.BytesIO(data), weights_only=False),
        "old pt": lambda data: torch.load(io.BytesIO(data), weights_only=False),
    }
    for name, call in opened.items():
        one = Canary(tmp_path / name)
        try:
            call(payloads(one)[name])
        except FileExistsError:  # executed more than once
            pass
        assert one.path.exists(), name


def test_files_of_a_source(canary, tmp_path):
    root = tmp_path / "scans"
    for name, data in payloads(canary).items():
        for suffix in SUFFIXES:
            path = root / f"{name}{suffix}" / f"x{suffix}"
            path.parent.mkdir(parents=True)
            path.write_bytes(data)
            try:
                stacks = list(readers.read([path], readers.format_of(path)))
            except readers.Refused:
                continue
            raise AssertionError(f"{name} as {suffix}: {len(stacks)} stacks")
    (root / "sound.png").write_bytes(seeds.pillow(seeds.picture(1), "PNG"))
    done = dex_prepare(root, tmp_path / "set", "--max-unreadable", "1000")
    assert done.returncode == 0 and verify(tmp_path / "set") == []
    log = (prepare.private_folder(tmp_path / "set") / "log.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["event"] == "refused" for line in log) == len(SUFFIXES) * len(payloads(canary))


def test_files_of_a_folder_of_images(canary, tmp_path):
    root = tmp_path / "folder"
    root.mkdir()
    for name, data in payloads(canary).items():
        for suffix in (".npy", ".png", ".jpg"):
            (root / f"{name}{suffix}").write_bytes(data)
    dataset = open_dataset(root)
    for number in range(len(dataset)):
        with pytest.raises(SampleError):
            dataset[number]
    assert leak(root, root).a.unreadable == len(dataset) == 18


@pytest.fixture
def shard_set(tmp_path):
    """Twelve samples, sound."""
    with ShardWriter(tmp_path / "set", name="s", modalities=("CT",), image_size=64) as writer:
        for i in range(12):
            writer.add(
                f"s{i}",
                seeds.pillow(seeds.picture(i, 64), "PNG"),
                kind="png",
                modality="CT",
                split="val" if i % 4 == 3 else "train",
                group=f"g{i}",
            )
    return tmp_path / "set"


def enter(root):
    """Everything that opens a shard set."""
    for call in (
        lambda: [open_dataset(root)[i] for i in range(12)],
        lambda: next(Loader(open_dataset(root).split("train"), 2, seed=0, num_workers=0)),
        lambda: verify(root),
        lambda: leak(root, root),
        lambda: cli.main(["data", "check", str(root)]),
        lambda: cli.main(["pretrain", "--preset", "demo", "--model.img-size", "64", "--data", str(root), "--dry-run"]),
    ):
        try:
            call()
        except (ValueError, RuntimeError, OSError):  # SampleError is a RuntimeError or ValueError
            pass


@pytest.mark.parametrize("kind", ["png", "jpg", "npy"])
def test_members_of_a_shard(kind, canary, tmp_path, shard_set):
    """All hashes fit: whoever made the set meant it."""
    for number, data in enumerate(payloads(canary).values()):
        root = tmp_path / f"forged{number}"
        with ShardWriter(root, name="s", modalities=("CT",), image_size=64) as writer:
            for i in range(12):
                split = "val" if i % 4 == 3 else "train"
                writer.add(f"s{i}", data, kind=kind, modality="CT", split=split, group=f"g{i}", checked=True)
            writer.add_document("more.pkl", data)
        assert verify(root) == []
        enter(root)
        with pytest.raises(SampleError):
            open_dataset(root)[0]


@pytest.mark.parametrize("file", ["manifest.json", "shard-00000.index.jsonl", "shard-00000.tar"])
def test_tables_of_a_shard_set(file, canary, shard_set):
    for data in payloads(canary).values():
        good = (shard_set / file).read_bytes()
        before = (shard_set / "manifest.json").read_bytes()
        (shard_set / file).write_bytes(data)
        if file != "manifest.json":  # hashes that fit it
            manifest = json.loads(before)
            size, digest = len(data), hashlib.sha256(data).hexdigest()
            names = ("index_bytes", "index_sha256") if "index" in file else ("bytes", "sha256")
            manifest["shards"][0].update(zip(names, (size, digest), strict=True))
            del manifest["sha256"]
            (shard_set / "manifest.json").write_bytes(shard_format.manifest_bytes(manifest))
        assert verify(shard_set) != []
        enter(shard_set)
        (shard_set / file).write_bytes(good)
        (shard_set / "manifest.json").write_bytes(before)
    assert verify(shard_set) == []


def test_weights(canary, tmp_path):
    model = MaskedAutoencoder(
        img_size=64,
        embed_dim=32,
        depth=1,
        num_heads=2,
        num_experts=2,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    for name, data in payloads(canary).items():
        for suffix in (".pt", ".pth", ".bin", ".safetensors"):
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(data)
            for call in (read_state_dict, lambda path: load_pretrained(model, path)):
                with pytest.raises(ValueError):
                    call(path)


@pytest.mark.parametrize("file", [".metadata", "shard", "state.json", "MANIFEST.json", "more.pkl"])
def test_checkpoints(file, canary, tmp_path):
    root = tmp_path / "checkpoints"
    saver = checkpoint.Saver(root, keep=2)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    parameters = list(model.named_parameters())
    saver.save(1, checkpoint.collect(model, optimizer, parameters), {"step": 1})
    saver.wait()
    folder = root / "step-00000001"
    (shard,) = folder.glob("*.safetensors")
    name = shard.name if file == "shard" else file
    for data in payloads(canary).values():
        good = {path.name: path.read_bytes() for path in folder.iterdir()}
        (folder / name).write_bytes(data)
        if name in (shard.name, "state.json"):  # hashes that fit it
            files = {each: checkpoint._digest(folder / each) for each in (shard.name, "state.json")}
            (folder / "MANIFEST.json").write_text(checkpoint._manifest_text(1, files))
        refused = 0
        for call in (
            lambda: checkpoint.verify(folder),
            lambda: checkpoint.load(folder),
            lambda: checkpoint.tensors(folder),
            lambda: checkpoint.newest_good(root),
            lambda: checkpoint.restore(checkpoint.load(folder), model, optimizer, parameters),
        ):
            try:
                call()
            except checkpoint.CheckpointError:
                refused += 1
        assert refused == {".metadata": 0, "more.pkl": 0, "shard": 2, "state.json": 3, "MANIFEST.json": 5}[file]
        for each in folder.iterdir():
            each.unlink()
        for each, data in good.items():
            (folder / each).write_bytes(data)
