"""Small files that ask for much, and the largest that are read, in processes whose memory is limited as a worker's is:
what it has once the libraries are loaded, and 512 MiB. Row 21 of the promises: no file costs more, nor over 10 s."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from bombs import MAKERS, MIB, deflated, deflated_dicom, nifti  # noqa: E402

pytest.importorskip("pydicom")
SECONDS = 10.0
METAIO = ("MetaImage: M_ReadElementsData", "   ideal = ", "MetaObject: Initialize: Warning", "Resetting number of dim")
"""SimpleITK's own words on stderr, which a worker does not have."""
READ = """
import json, resource, sys, time
from dex.data import readers
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
memory, *paths = sys.argv[1:]
limits = readers.Limits(memory_mb=int(memory), pixels=int(memory) * 40_000_000 // 512)
for path in paths:
    readers.load(readers.format_of(path))
limit = status("VmSize") + limits.memory
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in paths:
    stack = frame = None
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before, began = status("VmRSS"), time.monotonic()
    count = 0
    try:
        for stack in readers.read([path], readers.format_of(path), limits=limits):
            for frame in stack.frames(("axial",), 20):
                count += 1
        outcome = ""
    except readers.Refused as error:
        outcome = error.reason
    print(json.dumps([outcome, count, status("VmHWM") - before, time.monotonic() - began]))
"""
PREPARE = """
import json, resource, sys
from pathlib import Path
from dex import cli
code = cli.main(sys.argv[1:])
print(json.dumps([code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))
"""
OPTIONAL = {".mha": "SimpleITK", ".nrrd": "SimpleITK", ".avi": "cv2"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def run(paths, memory_mb=512):
    """(reason of refusal or "", frames, bytes, seconds) of each."""
    command = [sys.executable, "-c", READ, str(memory_mb), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith(METAIO)]
    assert done.returncode == 0 and not said, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """A folder of all of them, and name -> the reasons that may be given; "": it may be read."""
    folder, reasons = tmp_path_factory.mktemp("bombs"), {}
    for suffix, make in MAKERS.items():
        for name, data, allowed in make():
            assert len(data) < 20 * MIB
            (folder / f"{name}{suffix}").write_bytes(data)
            reasons[f"{name}{suffix}"] = allowed.split(", ")
    return folder, reasons


@pytest.mark.parametrize("suffix", MAKERS)
def test_bombs_cost_little(suffix, bombs):
    if suffix in OPTIONAL:
        pytest.importorskip(OPTIONAL[suffix])
    folder, reasons = bombs
    paths = sorted(folder / name for name in reasons if name.endswith(suffix))
    found = run(paths)
    assert len(found) == len(paths)
    for path, (outcome, frames, _, _) in zip(paths, found, strict=True):
        allowed = reasons[path.name]
        assert outcome in allowed and bool(frames) == (outcome == ""), (path.name, outcome, frames)
    print(f"{suffix}: at most {max(f[2] for f in found) / MIB:.0f} MiB and {max(f[3] for f in found):.1f} s a file")
    assert max(used for *_, used, _ in found) < 512 * MIB
    assert max(seconds for *_, seconds in found) < SECONDS


def test_bombs_through_the_workers(bombs, tmp_path):
    """One folder of all of them and some sound pictures: the job ends well, its workers stay within their memory."""
    folder, reasons = bombs
    rng = np.random.default_rng(0)
    raw, few = tmp_path / "raw", tmp_path / "few"
    shutil.copytree(folder, raw)
    few.mkdir()
    for suffix in MAKERS:
        (few / f"broken{suffix}").write_bytes(b"x" * 1000)  # loads the same libraries
    for number in range(6):
        values = rng.integers(40, 220, (16, 16), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        for place in (raw, few):
            Image.fromarray(values).save(place / f"sound-{number}.png")

    def prepare(folder):
        out = tmp_path / f"{folder.name}-out"
        options = ["--modality", "X-ray", "--out", str(out), "--workers", "2", "--max-unreadable", "1000"]
        command = [sys.executable, "-c", PREPARE, "prepare", str(folder), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        code, memory = json.loads(done.stdout.splitlines()[-1])
        assert code == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (source,) = json.loads((out / "card.json").read_text())["sources"]
        return source, memory

    _, usual = prepare(few)
    source, memory = prepare(raw)
    print(f"workers: at most {(memory - usual) / MIB:.0f} MiB more than with sound files; refused: {source['refused']}")
    assert memory - usual < 512 * MIB
    assert source["train"] + source["val"] >= 6
    must = sum("" not in allowed for allowed in reasons.values())
    assert must <= sum(source["refused"].values()) <= len(reasons)
    assert "crashed" not in source["refused"] and "timeout" not in source["refused"], source["refused"]


def test_the_largest_that_are_read_fit(tmp_path):
    """With all bounds a quarter of what they are, for the time's sake. Each in a process of its own, which a worker
    that has read other files asks for when it runs out of memory."""
    (tmp_path / "a.nii.gz").write_bytes(deflated(nifti((1024, 1024, 40), np.uint16), 80, 31))
    Image.new("RGBA", (3160, 3160), (1, 2, 3, 200)).save(tmp_path / "b.png", compress_level=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (3160, 3160), (9, 8, 7)).save(tmp_path / "c.jpg", exif=exif)
    Image.new("F", (3160, 3160), 0.5).save(tmp_path / "d.tif")
    (tmp_path / "e.dcm").write_bytes(deflated_dicom(1024, 1024, 40))
    names = ("a.nii.gz", "b.png", "c.jpg", "d.tif", "e.dcm")
    found = [run([tmp_path / name], memory_mb=128)[0] for name in names]
    assert [(outcome, frames) for outcome, frames, *_ in found] == [("", 2), ("", 1), ("", 1), ("", 1), ("", 2)]
    assert max(used for *_, used, _ in found) < 128 * MIB
