"""Row 21: what a file may cost. Files of every format ask the real workers of `dex prepare` for more."""

import json
import sys
import time
from collections import Counter

import costly
import costly_dicom
import pytest
import seeds
from test_fuzz import dex_prepare, keys_of_units

from dex.data import verify
from dex.prepare import readers
from dex.prepare import run as prepare

LIMITS = readers.Limits()
SOUND = 3
AT_LENGTH = ("dcm: a folder of many",)
"""What is no file: its time is that of its files, each of which is a sign of life."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, full):
    """Each file in a folder of its own, sound ones between them, and a folder of very many small files. Key -> what it
    is called here and how it may end."""
    root, expected = tmp_path_factory.mktemp("bombs") / "jane-doe", {}
    for number, ((suffix, name), (data, outcomes)) in enumerate(costly.files(full).items()):
        path = root / f"{number:03d}" / f"x{suffix}"
        path.parent.mkdir(parents=True)
        head, *data = (data,) if isinstance(data, bytes) else data
        path.write_bytes(head)
        if data:
            (path.parent / costly.BESIDE[suffix]).write_bytes(*data)
        expected[f"{number:03d}" + ("" if suffix == ".dcm" else f"/x{suffix}")] = (f"{suffix[1:]}: {name}", outcomes)
    if "dcm" in {name.split(":")[0] for name, _ in expected.values()}:
        (root / "many").mkdir()
        for number in range(20_000 if full else 500):
            sound = seeds.picture(number % 5, 8)
            more = costly_dicom.element(8, 0x18, "UI", f"1.2.{number}".encode())
            more += costly_dicom.element(0x20, 0x0D, "UI", b"1.3") + costly_dicom.element(0x20, 0x0E, "UI", b"1.4")
            data = costly_dicom.dicom(costly_dicom.EXPLICIT, (8, 8), costly_dicom.native(sound.tobytes()), more=more)
            (root / "many" / f"{number:05d}.dcm").write_bytes(data)
        # above discover.LARGE their one series is the unit, called by its first file
        expected["many/00000.dcm" if full else "many"] = ("dcm: a folder of many", ("images",))
    for number in range(SOUND):
        path = root / f"{40 * number:03d}" / "sound.png"
        path.write_bytes(seeds.pillow(seeds.picture(900 + number), "PNG"))
        expected[f"{40 * number:03d}/sound.png"] = ("sound", ("images",))
    return root, expected


@pytest.mark.slow
def test_what_a_file_may_cost(folder, tmp_path, figures):
    """Every file is read or refused by a reason that fits it, within memory and time, and the others are read. A worker
    that had to be killed would be found as `crash` or `timeout`."""
    root, expected = folder
    out, measured = tmp_path / "out", tmp_path / "measured.jsonl"
    began = time.monotonic()
    done = dex_prepare(root, out, "--max-unreadable", str(len(expected)), measured=measured)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == "" and verify(out) == []

    private = prepare.private_folder(out)
    keys = keys_of_units(private)
    rows = [json.loads(line) for line in measured.read_text().splitlines()]
    cost = {keys[row["chunk"], row["unit"]]: row for row in rows}
    names = {}
    for path in (private / "ids").iterdir():
        for row in map(json.loads, path.read_text().splitlines()):
            names.setdefault(row["id"] if "refused" in row else None, row["path"])
    refused: dict[str, tuple[str, str]] = {}
    for row in map(json.loads, (private / "log.jsonl").read_text().splitlines()):
        if row["event"] == "refused":
            refused.setdefault(names[row["id"]], (row["reason"], row["detail"]))
    wrong, outcomes, table = [], Counter(), []
    assert set(expected) == set(keys.values())
    for key, (name, right) in expected.items():
        looked_at = cost.get(key, {}).get("looked_at", 0)
        outcome, detail = refused.get(key, ("images", "") if looked_at else ("nothing", ""))
        outcomes[outcome] += 1
        row = cost.get(key, {"worked": float("inf"), "bytes": 0})
        table.append((row["worked"], row["bytes"], name, outcome, detail))
        if outcome not in right:
            wrong.append((name, outcome, detail))
    for row in sorted(table, reverse=True):
        print(f"{row[0]:6.2f} s {row[1] / 1e6:5.0f} MB  {row[2]}: {row[3]} {row[4]}")
    slowest = max(row for row in table if row[2] not in AT_LENGTH)
    largest = max(table, key=lambda row: row[1])
    figures["row 21"] = {
        "files": len(expected),
        "formats": len({name.split(":")[0] for name, _ in expected.values()}) - 1,
        "outcomes": dict(sorted(outcomes.items())),
        "slowest file": f"{slowest[0]:.2f} s on the processor, {slowest[2]}",
        "largest file in memory": f"{largest[1] / 1e6:.0f} MB, {largest[2]}",
        "workers killed": outcomes["crash"] + outcomes["timeout"],
        "whole run, s": round(seconds, 1),
    }
    assert not wrong
    assert not outcomes["crash"] and not outcomes["timeout"] and not outcomes["nothing"]
    slow = [row for row in table if row[0] >= LIMITS.seconds and row[2] not in AT_LENGTH]
    assert not slow
    assert largest[1] < LIMITS.memory
    assert "jane-doe" not in (private / "log.jsonl").read_text() + done.stdout
