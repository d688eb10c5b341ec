"""Row 20: damaged files of every format, read in bulk by the real workers of `dex prepare`."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import damage
import pytest
import seeds

from dex.data import verify
from dex.prepare import readers
from dex.prepare import run as prepare
from dex.prepare.chunks import UNREADABLE
from dex.prepare.discover import Chunk, read_units

SECONDS = 5.0
SYNTAXES = {
    "1.2.840.10008.1.2": "plain",
    "1.2.840.10008.1.2.1": "plain",
    "1.2.840.10008.1.2.2": "plain",
    "1.2.840.10008.1.2.1.99": "deflated",
    "1.2.840.10008.1.2.5": "RLE",
    "1.2.840.10008.1.2.4.80": "JPEG-LS",
    "1.2.840.10008.1.2.4.81": "JPEG-LS",
    "1.2.840.10008.1.2.4.90": "JPEG 2000",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
}


def sound_files() -> dict[str, tuple[str, list[bytes]]]:
    """Format -> suffix and sound files; DICOM by transfer syntax."""
    pydicom = pytest.importorskip("pydicom")
    found: dict[str, tuple[str, list[bytes]]] = {}
    for suffix, files in seeds.seeds().items():
        for data in files:
            name = suffix[1:]
            if suffix == ".dcm":
                head = pydicom.dcmread(pydicom.filebase.DicomBytesIO(data), stop_before_pixels=True)
                name = f"DICOM {SYNTAXES.get(str(head.file_meta.TransferSyntaxUID), 'JPEG')}"
            found.setdefault(name, (suffix, []))[1].append(data)
    return found


class Damaged(NamedTuple):
    format: str
    suffix: str
    kind: str  # of damage
    data: bytes


def damaged(count: int, seed: int = 20) -> list[Damaged]:
    """`count` files: no two alike, none a sound one, every format in turn."""
    formats = sound_files()
    sound = {data for _, files in formats.values() for data in files}
    draw, seen, out = random.Random(seed), set(sound), []
    everything = sorted(sound)
    while len(out) < count:
        name = list(formats)[len(out) % len(formats)]
        suffix, files = formats[name]
        change = damage.KINDS[(len(out) // len(formats) + len(out) % len(formats)) % len(damage.KINDS)]  # every pair
        data, other = draw.choice(files), draw.choice(everything)

        def apply(data, change=change, other=other):
            return change(data, other, draw) if data else data

        changed = damage.inside(suffix, data, apply) if draw.random() < 0.5 else apply(data)
        if changed in seen and draw.random() < 0.99:  # few ways to be empty
            changed = damage.append(changed, other, draw)
        if changed not in seen:
            seen.add(changed)
            out.append(Damaged(name, suffix, change.__name__, changed))
    return out


def restructured(count: int, seed: int = 21) -> list[Damaged]:
    """The same with damage that knows the format: every pair of format and kind in turn."""
    formats = {name: one for name, one in sound_files().items() if one[0] in damage.STRUCTURED}
    pairs = [(name, change) for name, (suffix, _) in formats.items() for change in damage.STRUCTURED[suffix]]
    draw, seen, out = random.Random(seed), {data for _, files in formats.values() for data in files}, []
    everything, place, tries = sorted(seen), 0, 0
    while len(out) < count:
        name, change = pairs[place % len(pairs)]
        suffix, files = formats[name]
        other = draw.choice(everything)

        def apply(data, change=change, other=other):
            return change(data, other, draw)

        data = draw.choice(files)
        changed = apply(data) if change in damage.WHOLE else damage.inside(suffix, data, apply)
        tries += 1
        if changed not in seen:
            seen.add(changed)
            out.append(Damaged(name, suffix, change.__name__, changed))
        elif tries <= 50:
            continue
        place, tries = place + 1, 0  # a format may have no such part
    return out


def dex_prepare(
    root: Path, out: Path, *options: str, measured: Path | None = None, timeout: float = 900.0, trust: bool = True
):
    """`dex prepare` in a process of its own; `measured` gets what each unit costs its worker. trust: no header leaves a
    file out before it is decoded."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *(p for p in sys.path if p)])}
    start = [here / "measured.py"] if measured else ["-m", "dex"]
    if measured:
        environment["DEX_MEASURED"] = str(measured)
    arguments = ["prepare", root, "--modality", "X-ray", "--out", out, "--size", "64", "--workers", "2", *options]
    arguments += ["--trust"] if trust else []
    return subprocess.run(
        [sys.executable, *map(str, start), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout,
        check=False,
    )


def keys_of_units(private: Path) -> dict[tuple[str, int], str]:
    """(chunk, number) -> key, as the workers were told."""
    plan, found = json.loads((private / "plan.json").read_text()), {}
    for number, source in enumerate(plan["sources"]):
        for chunk, place in enumerate(source["chunks"]):
            for unit, one in enumerate(read_units(private / "units" / f"{number:03d}.jsonl", Chunk(*place))):
                found[f"{number:03d}-{chunk:06d}", unit] = one.key
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory, full):
    """Damaged files, each in a folder of its own (a folder's DICOM files are read together), and two sound ones."""
    root = tmp_path_factory.mktemp("fuzz") / "jane-doe"
    files = damaged(2000 if full else 150) + restructured(1500 if full else 100)
    for number, file in enumerate(files):
        path = root / f"{number:05d}" / f"jane-doe{file.suffix}"
        path.parent.mkdir(parents=True)
        path.write_bytes(file.data)
        if file.suffix in seeds.BESIDE:
            name, beside = seeds.BESIDE[file.suffix]
            (path.parent / name).write_bytes(beside)
    for number in range(2):
        path = root / "sound" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(seeds.pillow(seeds.picture(900 + number), "PNG"))
    return root, files


def test_the_damage_is_of_many_kinds(folder, full):
    pytest.importorskip("nibabel"), pytest.importorskip("SimpleITK")
    _, files = folder
    kinds, formats = {file.kind for file in files}, {file.format for file in files}
    assert len(kinds) >= 10 and len(formats) >= 4 and len({file.data for file in files}) == len(files)
    assert {"DICOM plain", "DICOM RLE", "DICOM JPEG", "DICOM JPEG 2000", "nii", "nii.gz", "png", "jpg"} <= formats
    assert {"tif", "bmp", "npy", "npz", "nrrd", "mhd", "nhdr", "hdr"} <= formats
    generic = {kind.__name__ for kind in damage.KINDS}
    pairs = {(file.format, file.kind) for file in files}
    plain = [file for file in files if file.kind in generic]
    assert len({pair for pair in pairs if pair[1] in generic}) >= min(len(plain), len(generic) * len(formats)) * 0.9
    assert kinds >= generic | {kind.__name__ for some in damage.STRUCTURED.values() for kind in some}
    assert len(plain) >= (2000 if full else 150) and len(files) - len(plain) >= (1500 if full else 100)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_damaged_file_gives_images_or_is_named(folder, tmp_path, figures):
    root, files = folder
    out, measured = tmp_path / "out", tmp_path / "measured.jsonl"
    began = time.monotonic()
    done = dex_prepare(root, out, "--max-unreadable", str(len(files)), measured=measured)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == "" and verify(out) == []

    private = prepare.private_folder(out)
    keys = keys_of_units(private)
    cost = {keys[row["chunk"], row["unit"]]: row for row in map(json.loads, measured.read_text().splitlines())}
    logged = [json.loads(line) for line in (private / "log.jsonl").read_text().splitlines()]
    reasons: dict[str, list[str]] = {}
    for row in logged:
        if row["event"] == "refused":
            reasons.setdefault(row["id"], []).append(row["reason"])
    names = {}
    for path in (private / "ids").iterdir():
        for row in map(json.loads, path.read_text().splitlines()):
            if "refused" in row:
                names[row["path"]] = row["id"]
    outcomes, slow, silent = Counter(), [], []
    for number, file in enumerate(files):
        key = f"{number:05d}" + ("" if file.suffix == ".dcm" else f"/jane-doe{file.suffix}")
        gave = cost[key]["looked_at"] if key in cost else 0
        refused = reasons.get(names.get(key, ""), [])
        assert set(refused) <= set(readers.REASONS)
        if not gave and not refused:
            silent.append((file.format, file.kind, key))
        if key not in cost or cost[key]["worked"] > SECONDS:
            slow.append((file.format, file.kind, key, cost.get(key)))
        outcomes[refused[0] if refused else "images"] += 1
    assert not silent and not slow
    assert not outcomes["crash"] and not outcomes["timeout"]
    assert sum(outcomes[reason] for reason in UNREADABLE) > 10  # the damage does harm
    assert "jane-doe" not in (private / "log.jsonl").read_text()
    memory = max(row["bytes"] for row in cost.values())
    figures["row 20"] = {
        "files": len(files),
        "kinds of damage": len({file.kind for file in files}),
        "formats": len({file.format for file in files}),
        "outcomes": dict(sorted(outcomes.items())),
        "slowest file, s": round(max(row["seconds"] for row in cost.values()), 2),
        "largest file in memory, MB": round(memory / 1e6),
        "whole run, s": round(seconds, 1),
        "crashes": outcomes["crash"],
        "hangs": outcomes["timeout"],
    }
    assert memory < 512 * 2**20


def test_without_leave_the_run_stops_with_a_list(folder, tmp_path):
    root, files = folder
    out = tmp_path / "out"
    done = dex_prepare(root, out)
    assert done.returncode == 1 and not out.exists()
    assert "files or series cannot be read, more than 10: " in done.stderr and "--max-unreadable N" in done.stderr
    named = [word for word in done.stderr.split() if word.startswith("folder/")]
    assert 10 < len(named) <= 20 and len(set(named)) == len(named)
    assert all(len(name.split("/")[1]) == 32 for name in named)
    assert "jane-doe" not in done.stderr + done.stdout and "Traceback" not in done.stderr
    ids = "".join(path.read_text() for path in (prepare.private_folder(out) / "ids").iterdir())
    assert all(name in ids for name in named)
