"""An index read by pattern equals the same index read line by line, and only sound lines match the pattern."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from dex.data import shard_index
from dex.data.shard_format import parse_lines, read_manifest
from dex.data.shard_writer import json_line

NUMBERS = {"CT": 0, "MR": 1, "PET": 2}
LINE = {
    "group": "g 1",
    "id": "source/a[b]~!",
    "key": "00000000",
    "kind": "jpg",
    "modality": "MR",
    "offset": 0,
    "sha256": "0f" * 32,
    "size": 7,
    "split": "val",
}


def index(folder: Path, *lines: bytes) -> dict:
    """Write an index; its entry in a manifest."""
    table = b"".join(lines)
    (folder / "index.jsonl").write_bytes(table)
    return {
        "file": "shard.tar",
        "bytes": 1000,
        "samples": len(lines),
        "index": "index.jsonl",
        "index_bytes": len(table),
        "index_sha256": hashlib.sha256(table).hexdigest(),
    }


def test_both_ways_agree_on_what_the_writer_writes(root, monkeypatch):
    entries = read_manifest(root)[0]["shards"]
    by_pattern = [shard_index.read_rows(root, entry, NUMBERS) for entry in entries]
    tables = [(root / entry["index"]).read_bytes() for entry in entries]
    assert all(shard_index._LINES.fullmatch(table) for table in tables)
    monkeypatch.setattr(shard_index, "_by_pattern", lambda *_: None)
    by_line = [shard_index.read_rows(root, entry, NUMBERS) for entry in entries]
    for one, other in zip(by_pattern, by_line, strict=True):
        assert one.ids == other.ids and one.rows.dtype == other.rows.dtype and np.array_equal(one.rows, other.rows)


def test_every_field_of_a_matched_line(tmp_path):
    first = LINE | {"id": "", "offset": 993, "kind": "npy", "split": "train", "modality": "PET"}
    entry = index(tmp_path, json_line(first), json_line(LINE))
    rows, ids = shard_index.read_rows(tmp_path, entry, NUMBERS)
    assert ids == b"source/a[b]~!" and rows["id_end"].tolist() == [0, 13] and rows["shard"].tolist() == [0, 0]
    assert rows["offset"].tolist() == [993, 0] and rows["size"].tolist() == [7, 7]
    assert rows["modality"].tolist() == [2, 1] and rows["val"].tolist() == [False, True]
    assert [shard_index.KINDS[kind] for kind in rows["kind"]] == ["npy", "jpg"]
    assert rows["sha256"][1].tobytes() == bytes([15] * 32)


@pytest.mark.parametrize(
    "line",
    [
        json_line(LINE | {"id": "émile"}),
        json_line(LINE | {"id": 'quote"backslash\\newline\n'}),
        json_line(LINE | {"group": "x" * 9000}),
        json_line(LINE | {"note": "another key"}),
        json.dumps(LINE).encode() + b"\n",
        json_line(LINE).removesuffix(b"\n"),
    ],
    ids=["unicode", "escapes", "long", "another key", "spaces", "no last newline"],
)
def test_other_sound_lines_are_read_as_well(tmp_path, line):
    entry = index(tmp_path, json_line(LINE | {"id": "plain"}), line)
    rows, ids = shard_index.read_rows(tmp_path, entry, NUMBERS)
    assert ids.decode() == "plain" + json.loads(line)["id"]
    assert rows["size"].tolist() == [7, 7] and rows["id_end"].tolist() == [5, len(ids)]


@pytest.mark.parametrize(
    "change",
    [
        {"key": "a..b"},
        {"key": "../a"},
        {"kind": "pkl"},
        {"split": "test"},
        {"sha256": "0F" * 32},
        {"offset": 994},
        {"offset": -1},
        {"size": 0},
        {"size": 10**9},
        {"size": 129 * 2**20},
        {"id": 3},
        {"id": "\ud800"},
        {"modality": "US"},
        {"group": "x" * 2**16},
    ],
)
def test_faults_are_found_either_way(tmp_path, change, monkeypatch):
    entry = index(tmp_path, json_line(LINE), json_line(LINE | change))
    if "size" in change:
        entry["bytes"] = 2**28
    with pytest.raises(ValueError, match=r"^index\.jsonl: ") as by_pattern:
        shard_index.read_rows(tmp_path, entry, NUMBERS)
    monkeypatch.setattr(shard_index, "_by_pattern", lambda *_: None)
    with pytest.raises(ValueError) as by_line:
        shard_index.read_rows(tmp_path, entry, NUMBERS)
    assert str(by_pattern.value) == str(by_line.value)
    if "modality" not in change:  # Its names are the manifest's
        with pytest.raises(ValueError):
            list(parse_lines((tmp_path / "index.jsonl").read_bytes(), entry))


def test_an_empty_index(tmp_path):
    rows, ids = shard_index.read_rows(tmp_path, index(tmp_path), NUMBERS)
    assert len(rows) == 0 and ids == b""


def test_text_between_lines_is_refused(tmp_path):
    entry = index(tmp_path, json_line(LINE), b"x" + json_line(LINE))
    with pytest.raises(ValueError, match="index.jsonl: "):
        shard_index.read_rows(tmp_path, entry, NUMBERS)
