"""Row 22: shard sets that name, hold or become files elsewhere. Nothing outside their folder is read, made or changed.

Every set is opened by a process of its own, whose every opening of a file is watched; what lies outside would do.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest
import seeds

from dex.data import ShardWriter, shard_format, verify

SAMPLES = 24  # a batch of the demo, and some held out
ENTER = """
import json, os, sys
outside, *roots = sys.argv[1:]
touched, ours = [], []  # ours: not empty while this program itself makes a link

def watch(event, arguments):
    if ours:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path, _, flags = arguments
        path = os.fsdecode(path)
        last = os.path.basename(path) if isinstance(flags, int) and flags & os.O_NOFOLLOW else ""
        real = os.path.join(os.path.realpath(os.path.dirname(path)), last) if last else os.path.realpath(path)
        if real.startswith(outside + os.sep):
            touched.append([event, path])
    elif event.startswith(("os.", "shutil.")) and any(
        isinstance(one, (str, bytes)) and os.path.realpath(os.fsdecode(one)).startswith(outside + os.sep)
        for one in arguments
    ):
        touched.append([event, str(arguments)])

from dex import cli
from dex.data import Loader, SampleError, open_dataset, verify
from dex.prepare.leak import leak
sys.addaudithook(watch)

def swap(root):
    moves = os.path.join(root, "swap.json")
    if not os.path.exists(moves):
        return
    for name, target in json.load(open(moves)).items():
        ours.append(name)
        os.replace(os.path.join(root, name), os.path.join(root, name + ".old"))
        os.symlink(target, os.path.join(root, name))
        ours.clear()

def unswap(root):
    moves = os.path.join(root, "swap.json")
    for name in json.load(open(moves)) if os.path.exists(moves) else ():
        ours.append(name)
        os.replace(os.path.join(root, name + ".old"), os.path.join(root, name))
        ours.clear()

def samples(root):
    dataset = open_dataset(root)
    swap(root)
    try:
        return [dataset[i] for i in range(len(dataset))]
    finally:
        unswap(root)

def batch(root):
    dataset = open_dataset(root)
    swap(root)
    try:
        return next(Loader(dataset.split("train"), 2, seed=0, num_workers=0))
    finally:
        unswap(root)

def code(*words):
    status = cli.main([*words, root])
    if status:
        raise ValueError(f"exit code {status}")

found = []
for root in roots:
    row = {}
    for name, call in (
        ("open", lambda: open_dataset(root)), ("samples", lambda: samples(root)), ("batch", lambda: batch(root)),
        ("verify", lambda: verify(root)), ("check", lambda: code("data", "check")),
        ("leak", lambda: leak(root, root)),
        ("pretrain", lambda: code("pretrain", "--preset", "demo", "--model.img-size", "64", "--dry-run", "--data")),
    ):
        try:
            given = call()
            row[name] = given if name == "verify" else ""
        except (ValueError, OSError, RuntimeError, SystemExit) as error:
            row[name] = f"{type(error).__name__}: {error}"
    found.append(row)
print("\\n" + json.dumps({"found": found, "touched": touched}))
"""


def make(root):
    with ShardWriter(root, name="s", modalities=("CT",), image_size=64) as writer:
        for i in range(SAMPLES):
            data, split = seeds.pillow(seeds.picture(i, 64), "PNG"), "val" if i % 4 == 3 else "train"
            writer.add(f"s{i}", data, kind="png", modality="CT", split=split, group=f"g{i}")
        writer.add_document("more/card.json", b"{}")
    return root


def manifest_of(root):
    body = json.loads((root / "manifest.json").read_bytes())
    del body["sha256"]
    return body


def write_manifest(root, body):
    (root / "manifest.json").write_bytes(shard_format.manifest_bytes(body))


def hashes(data, prefix=""):
    return {f"{prefix}bytes": len(data), f"{prefix}sha256": hashlib.sha256(data).hexdigest()}


def with_index(root, change):
    """The index changed, and all hashes fitting."""
    path = root / "shard-00000.index.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    change(lines)
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    path.write_bytes(data)
    body = manifest_of(root)
    body["shards"][0].update(hashes(data, "index_"))
    write_manifest(root, body)


def with_member(root, name, kind=tarfile.REGTYPE, target="", first=False):
    """One member more in the tar, and all hashes fitting."""
    path = root / "shard-00000.tar"
    data = path.read_bytes()
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    extra = info.tobuf(tarfile.GNU_FORMAT)
    end = len(data.rstrip(b"\0")) + 511 & -512
    data = extra + data if first else data[:end] + extra + bytes(1024)
    path.write_bytes(data)
    body = manifest_of(root)
    body["shards"][0].update(hashes(data))
    write_manifest(root, body)
    if first:
        with_index(root, lambda lines: [line.update(offset=line["offset"] + len(extra)) for line in lines])


def renamed(part, name):
    def change(root, outside):
        body = manifest_of(root)
        entry = body["documents"][0] if part == "document" else body["shards"][0]
        entry["index" if part == "index" else "file"] = name.format(outside=outside)
        write_manifest(root, body)

    return change


def linked(name, hard=False):
    """A file that is a link to its like outside, whose bytes are the right ones."""

    def change(root, outside):
        (root / name).unlink()
        (os.link if hard else os.symlink)(outside / name, root / name)

    return change


def swapped(root, outside):
    (root / "swap.json").write_text(json.dumps({"shard-00000.tar": str(outside / "shard-00000.tar")}))


def folder_linked(root, outside):
    (root / "more" / "card.json").unlink()
    (root / "more").rmdir()
    os.symlink(outside / "more", root / "more")


def pipe(root, outside):
    (root / "shard-00000.tar").unlink()
    os.mkfifo(root / "shard-00000.tar")


NAMES = (
    "../outside/{0}",
    "{{outside}}/{0}",
    "a/../../outside/{0}",
    "..",
    ".",
    "",
    "a\0b",
    "a\nb",
    "manifest.json",
    "/dev/zero",
)
FILES = {"shard": "shard-00000.tar", "index": "shard-00000.index.jsonl", "document": "more/card.json"}
MEMBERS = ("../outside/new.png", "/tmp/dex-canary.png", "a/../../b.png", "a\nb.png", "00000000.exe")
KINDS = {"symlink": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE}
EVERYWHERE = ("open", "samples", "batch", "check", "leak", "pretrain")
ONLY_CHECKED = ("check",)

CASES = {
    **{
        f"{part} called {name!r}": (renamed(part, name.format(file)), EVERYWHERE)
        for part, file in FILES.items()
        for name in NAMES
    },
    **{f"{part} is a link": (linked(FILES[part]), EVERYWHERE) for part in ("shard", "index")},
    "manifest is a link": (linked("manifest.json"), EVERYWHERE),
    "document is a link": (linked("more/card.json"), ONLY_CHECKED),
    "document's folder is a link": (folder_linked, ONLY_CHECKED),
    "shard is a pipe": (pipe, EVERYWHERE),
    "shard swapped for a link": (swapped, ("samples", "batch")),
    **{f"member {name!r}": (lambda root, _, name=name: with_member(root, name), ONLY_CHECKED) for name in MEMBERS},
    **{
        f"member, {kind}": (
            lambda root, outside, code=code: with_member(root, "00000000.png", code, str(outside / "new.png"), True),
            ONLY_CHECKED,
        )
        for kind, code in KINDS.items()
    },
    **{
        f"key {key!r}": (
            lambda root, _, key=key: with_index(root, lambda lines: lines[0].update(key=key)),
            EVERYWHERE,
        )
        for key in ("../outside/new", "/tmp/dex-canary", "a\0b", "a\nb", "..")
    },
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="makes pipes")
def test_nothing_outside_is_touched(tmp_path, figures):
    outside = make(tmp_path / "outside")
    before = state(outside)
    roots, expected = [make(tmp_path / "sound")], [("sound", ())]
    for number, (name, (change, refusing)) in enumerate(CASES.items()):
        roots.append(shutil.copytree(roots[0], tmp_path / f"set{number:03d}"))
        change(roots[-1], outside)
        expected.append((name, refusing))
    done = subprocess.run(
        [sys.executable, "-c", ENTER, str(outside), *map(str, roots)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["touched"] == []
    assert state(outside) == before
    assert not os.path.lexists("/tmp/dex-canary.png")
    wrong = []
    for (name, refusing), row in zip(expected, answer["found"], strict=True):
        row = {**row, "check": row["check"] or "; ".join(row["verify"])}
        for entry in EVERYWHERE:
            if bool(row[entry]) != (entry in refusing) and not (entry == "leak" and name.startswith("shard swapped")):
                wrong.append((name, entry, row[entry]))
    assert not wrong
    figures["row 22, archives"] = {"hostile sets": len(CASES), "outside touched": len(answer["touched"])}


def test_a_hard_link_is_a_file_of_the_set(tmp_path):
    """It cannot be told from another: its bytes are hashed like any, and nothing is written through it."""
    outside, root = make(tmp_path / "outside"), make(tmp_path / "set")
    before = state(outside)
    linked("shard-00000.tar", hard=True)(root, outside)
    assert verify(root) == []
    assert state(outside) == before


@pytest.mark.slow
def test_the_watch_sees(tmp_path):
    """The process that watches finds a folder that is read through a link."""
    outside = make(tmp_path / "outside")
    os.symlink(outside, tmp_path / "link")
    done = subprocess.run(
        [sys.executable, "-c", ENTER, str(outside), str(tmp_path / "link")], capture_output=True, text=True, check=False
    )
    assert json.loads(done.stdout.splitlines()[-1])["touched"]


def state(folder):
    """What of a folder would change if it were written to."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, hashlib.sha256(content).hexdigest())
    return found
