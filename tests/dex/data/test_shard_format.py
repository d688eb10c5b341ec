"""Manifests and indices that somebody else wrote: refused by name unless they are sound."""

import shutil

import pytest
from small_set import forge, forge_index

from dex.data import open_dataset, verify


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
        ({"offset": 10**9}, "are not within"),
        ({"offset": -512}, "offset: expected int"),
        ({"size": 10**9}, "are not within"),
        ({"size": 0}, "are not within"),
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


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: m.update(version=99), "expected dex-shards version 1, got 'dex-shards' version 99"),
        (lambda m: m.update(shards={}), "shards: expected list"),
        (lambda m: m.update(samples=8), "'samples' is not the sum"),
        (lambda m: m["modalities"][0].update(train=9), "expected 9 train samples of 'CT', got 3 in the indices"),
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
