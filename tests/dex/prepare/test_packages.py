"""Package files: fetched by hash, unpacked without trust; archives here are made by the test, most of them hostile."""

import gzip
import hashlib
import io
import os
import signal
import stat
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dex.prepare import packages
from dex.prepare.packages import Package, compile_globs, fetch, unpack

SHA = "ab" * 32


def package(cache: Path, file: str, data: bytes, **changes) -> Package:
    cache.mkdir(exist_ok=True)
    (cache / file).write_bytes(data)
    values = {"registry": "pypi", "file": file, "sha256": hashlib.sha256(data).hexdigest()} | changes
    return Package("thing", "1.0", **values)


def tar(*members: tuple[str, bytes] | tarfile.TarInfo, pax: bool = True) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", format=tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size, info.mode = len(member[1]), 0o777
                archive.addfile(info, io.BytesIO(member[1]))
    return stream.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes], compress: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compress) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return stream.getvalue()


def link_in_zip(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def cache(tmp_path):
    """A folder with a witness beside it: whatever happens, nothing outside the cache may change."""
    (tmp_path / "witness").write_text("as it was")
    (tmp_path / "cache").mkdir()
    yield tmp_path / "cache"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "witness"]
    assert (tmp_path / "witness").read_text() == "as it was"


GOOD = (("d/1.png", b"one"), ("d/e/2.png", b"two" * 1000), ("d/2.txt", b"text"), ("3.png", b""))


@pytest.mark.parametrize(("file", "make"), [("t.tar.gz", tar), ("t.tgz", tar), ("t.whl", zipped), ("t.zip", zipped)])
def test_only_the_named_members_come_out(cache, file, make):
    thing = package(cache, file, make(*GOOD))
    folder = unpack(thing, ["**/*.png"], cache)
    assert folder.parent == cache / "thing-1.0"
    assert tree(folder) == {"d/1.png": b"one", "d/e/2.png": b"two" * 1000, "3.png": b""}
    assert not any(path.stat().st_mode & 0o111 for path in folder.rglob("*") if path.is_file())
    other = unpack(thing, ["d/*"], cache)
    assert tree(other) == {"d/1.png": b"one", "d/2.txt": b"text"} and other != folder
    # again: the same folder, without the archive
    (cache / file).unlink()
    before = (folder / "d/1.png").stat().st_mtime_ns
    assert unpack(thing, ["**/*.png"], cache) == folder and (folder / "d/1.png").stat().st_mtime_ns == before
    assert sorted(p.name for p in (cache / "thing-1.0").iterdir()) == sorted([folder.name, other.name])


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize(("file", "make"), [("t.tar.gz", tar), ("t.zip", zipped)])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../evil.png", "not a plain path"),
        ("d/../../evil.png", "not a plain path"),
        ("/evil.png", "not a plain path"),
        ("//evil.png", "not a plain path"),
        ("d//evil.png", "not a plain path"),
        ("d/./evil.png", "not a plain path"),
        ("..\\evil.png", "not a plain path"),
        ("C:evil.png", "not a plain path"),
        ("d/e\nvil.png", "not a plain path"),
        ("d/\x1b[31mevil.png", "not a plain path"),
        ("d/" + "e" * 300 + ".png", "not a plain path"),
        ("d/1.png", "comes twice"),
        ("D/1.PNG", "comes twice"),
        ("d/1.png/evil.png", "is a file and a folder"),
        ("d/e", "is a file and a folder"),
    ],
)
def test_bad_names(cache, file, make, name, says):
    thing = package(cache, file, make(*GOOD, (name, b"evil")))
    with pytest.raises(ValueError, match=f"^{file}: .*{says}"):
        unpack(thing, ["**/*"], cache)
    assert list((cache / "thing-1.0").iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a device"),
    ],
)
def test_links_and_devices_in_a_tar(cache, kind, what):
    for number, target in enumerate(("../../../witness", "/etc/passwd", "d/1.png")):
        data = tar(*GOOD, special("d/0.png", kind, target))
        thing = package(cache, f"t{number}.tar.gz", data)
        with pytest.raises(ValueError, match=f"'d/0.png': expected a regular file, got {what}"):
            unpack(thing, ["**/*.png"], cache)
    assert list((cache / "thing-1.0").iterdir()) == []


def test_a_file_through_a_link_is_a_file_in_a_folder(cache):
    for number, member in enumerate(
        (special("out", tarfile.SYMTYPE, "../../.."), special("out", tarfile.SYMTYPE, "/tmp"))
    ):
        thing = package(cache, f"t{number}.tar.gz", tar(member, ("out/new.png", b"evil")))
        folder = unpack(thing, ["**/*.png"], cache)
        assert tree(folder) == {"out/new.png": b"evil"} and not (folder / "out").is_symlink()
        # and the link itself is refused when it is asked for
        with pytest.raises(ValueError, match="'out': expected a regular file, got a link"):
            unpack(thing, ["**/*"], cache)


def test_links_and_odd_members_in_a_zip(cache):
    thing = package(cache, "a.zip", zipped((link_in_zip("d/0.png"), b"/etc/passwd")))
    with pytest.raises(ValueError, match="expected a regular file, got a link"):
        unpack(thing, ["d/*"], cache)
    thing = package(cache, "b.zip", zipped(("d/0.png", b"x" * 99), compress=zipfile.ZIP_LZMA))
    with pytest.raises(ValueError, match="expected a regular file, got compressed in an unusual way"):
        unpack(thing, ["d/*"], cache)
    data = bytearray(zipped(("d/0.png", b"x" * 99)))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    thing = package(cache, "c.zip", bytes(data))
    with pytest.raises(ValueError, match="expected a regular file, got encrypted"):
        unpack(thing, ["d/*"], cache)


def test_sparse_members_of_a_tar(cache):
    # the old GNU form: a header of type S, real size at 483; 512 bytes stored, 1 TB declared
    info = tarfile.TarInfo("d/0.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[124:136] = b"%011o\0" % 512
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"%011o\0" % (2**33 - 1)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    thing = package(cache, "t.tar.gz", gzip.compress(bytes(header) + b"x" * 512 + bytes(1024)))
    with pytest.raises(ValueError, match="expected a regular file, got sparse"):
        unpack(thing, ["d/*"], cache)


def test_sizes_and_counts_are_bounded(cache, monkeypatch):
    for file, make in (("t.tar.gz", tar), ("t.zip", zipped)):
        thing = package(cache, file, make(*((f"{n}.png", b"x" * 1000) for n in range(20))))
        for constant, value, says in (
            ("MAX_MEMBERS", 19, "expected at most 19 members"),
            ("MAX_MEMBER_BYTES", 999, "'0.png': expected at most 999 bytes, got 1000"),
            ("MAX_UNPACKED_BYTES", 19_999, "expected at most 19999 bytes in all"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(packages, constant, value)
                with pytest.raises(ValueError, match=says):
                    unpack(thing, ["*.png"], cache)
        assert len(tree(unpack(thing, ["*.png"], cache))) == 20
        (cache / file).unlink()


def test_a_bomb_of_unwanted_members_is_not_read_to_its_end(cache, monkeypatch):
    monkeypatch.setattr(packages, "MAX_UNPACKED_BYTES", 8 * 2**20)
    thing = package(cache, "t.tar.gz", tar(("big.bin", bytes(16 * 2**20)), ("a.png", b"a")))
    with pytest.raises(ValueError, match="expected at most 8388608 bytes in all"):
        unpack(thing, ["*.png"], cache)


def test_a_header_that_declares_gigabytes_costs_none(cache):
    # a pax header's text of 3 GB would be read into memory at once
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 3 * 2**30
    thing = package(cache, "t.tar.gz", gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(2**20)))
    with pytest.raises(ValueError, match="a header of the archive is too large"):
        unpack(thing, ["**/*"], cache)


def lie(data: bytes, size: int) -> bytes:
    """A zip of one member whose uncompressed size is said to be `size`, in both of its headers."""
    out = bytearray(data)
    struct.pack_into("<I", out, out.index(b"PK\x03\x04") + 22, size)
    struct.pack_into("<I", out, out.index(b"PK\x01\x02") + 24, size)
    return bytes(out)


@pytest.mark.parametrize("size", [10, 999, 1001, 5000])
def test_a_zip_that_lies_about_a_size(cache, size):
    thing = package(cache, "t.zip", lie(zipped(("d/0.png", bytes(1000))), size))
    with pytest.raises(ValueError, match="^t.zip: "):
        unpack(thing, ["d/*"], cache)
    assert list((cache / "thing-1.0").iterdir()) == []


def test_a_tar_that_lies_about_a_size(cache):
    info = tarfile.TarInfo("d/0.png")
    info.size = 100_000
    thing = package(cache, "t.tar.gz", gzip.compress(info.tobuf() + b"x" * 1000))
    with pytest.raises(ValueError, match="^t.tar.gz: "):
        unpack(thing, ["d/*"], cache)
    info.size = 2**33
    thing = package(cache, "t.tar.gz", gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 1000))
    with pytest.raises(ValueError, match="'d/0.png': expected at most 536870912 bytes, got 8589934592"):
        unpack(thing, ["d/*"], cache)


@pytest.mark.parametrize(("file", "make"), [("t.tar.gz", tar), ("t.zip", zipped)])
def test_damaged_archives_are_a_named_error(cache, file, make):
    noise = hashlib.shake_128(b"seed").digest(2000)
    data = make(*GOOD, ("4.png", noise))
    cases = [data[:cut] for cut in range(0, len(data), 211)] + [b"", b"not an archive" * 50]
    for at in range(0, len(data), 61):
        case = bytearray(data)
        case[at] ^= 0xFF
        cases.append(bytes(case))
    whole = {name: content for name, content in (*GOOD, ("4.png", noise)) if name.endswith(".png")}
    refused = 0
    for number, case in enumerate(cases):
        thing = package(cache, f"{number}-{file}", case)
        try:
            got = tree(unpack(thing, ["**/*.png"], cache))
        except ValueError as error:
            assert str(error).startswith(f"{number}-{file}: ")
            refused += 1
        else:  # in a zip, names and dates have no sum
            assert got == whole if make is tar else set(got.values()) <= set(whole.values())
    assert refused == len(cases) if make is tar else refused > 0.6 * len(cases)


@pytest.mark.parametrize("pax", [True, False])
def test_members_of_every_length_and_long_names(cache, pax):
    members = {
        f"d/{'n' * 120}/{n}.png": bytes([n % 251]) * n for n in (0, 1, 511, 512, 513, 1023, 1024, 2**20, 2**20 + 1)
    }
    unwanted = ((f"d/{n}.bin", b"x" * n) for n in (511, 512, 513))
    thing = package(
        cache, "t.tgz", tar(*members.items(), *unwanted, *((f"z{n}", p) for n, p in members.items()), pax=pax)
    )
    assert tree(unpack(thing, ["d/**/*.png"], cache)) == members


def test_a_pattern_that_names_nothing(cache):
    thing = package(cache, "t.zip", zipped(*GOOD))
    with pytest.raises(ValueError, match=r"^t.zip: expected members that match 'x/\*'"):
        unpack(thing, ["d/*", "x/*"], cache)
    with pytest.raises(ValueError, match="patterns: expected at least one"):
        unpack(thing, [], cache)


def dying(real, left: list[int]):
    def wrapped(*arguments, **more):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)

    return wrapped


def test_a_kill_at_any_moment_leaves_nothing_that_is_taken_for_whole(cache, monkeypatch):
    thing = package(cache, "t.tar.gz", tar(*GOOD, *((f"m/{n}.png", b"x" * 5000) for n in range(4))))
    whole = {name: data for name, data in GOOD if name.endswith(".png")} | {f"m/{n}.png": b"x" * 5000 for n in range(4)}
    calls, kills = {}, 0
    for moment in range(200):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:  # only files from here, then an end without ceremony
            left = [moment]
            for name in ("open", "fsync", "rename", "mkdir"):
                setattr(os, name, dying(getattr(os, name), left))
            try:
                unpack(thing, ["**/*.png"], cache)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        folders = [p for p in (cache / "thing-1.0").glob("*") if not p.name.startswith(".")]
        for folder in folders:
            assert tree(folder) == whole
        calls[moment] = len(folders)
        if status == 0:
            break
        assert os.WIFSIGNALED(status), status
        kills += 1
        for folder in folders:  # so that the next one starts anew
            folder.rename(cache / f"gone-{moment}")
    assert kills > 15 and calls[0] == 0 and tree(unpack(thing, ["**/*.png"], cache)) == whole
    for folder in cache.glob("gone-*"):
        assert tree(folder) == whole


def test_two_at_once_give_one_folder(cache, monkeypatch):
    thing = package(cache, "t.zip", zipped(*GOOD))
    real = packages._extract
    inner = []

    def meanwhile(*arguments):
        real(*arguments)
        if not inner:
            inner.append(None)
            inner[0] = unpack(thing, ["d/*"], cache)

    monkeypatch.setattr(packages, "_extract", meanwhile)
    assert unpack(thing, ["d/*"], cache) == inner[0]
    assert [p.name for p in (cache / "thing-1.0").iterdir()] == [inner[0].name]


def test_a_full_disk_is_not_called_a_bad_archive(cache, monkeypatch):
    thing = package(cache, "t.zip", zipped(*GOOD))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        unpack(thing, ["d/*"], cache)
    assert caught.value.errno == 28 and list((cache / "thing-1.0").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"registry": "cran"}, "package.registry: expected one of pypi, npm, got 'cran'"),
        ({"name": "../x"}, "package.name: expected a package's name"),
        ({"name": "--index-url"}, "package.name: expected a package's name"),
        ({"version": "1 --index-url http://x"}, "package.version: expected one version"),
        ({"file": "a/b.whl"}, "package.file: expected a .whl"),
        ({"file": "b.exe"}, "package.file: expected a .whl"),
        ({"sha256": "AB" * 32}, "package.sha256: expected 64"),
        ({"fetch": ("--index-url", "http://x")}, "package.fetch: expected pairs"),
        ({"fetch": ("--index-url", "x")}, "package.fetch: expected pairs"),
        ({"fetch": ("--no-binary",)}, "package.fetch: expected pairs"),
        ({"fetch": ("--no-binary", "--index-url")}, "package.fetch: expected pairs"),
        ({"fetch": ("--abi", "cp38"), "registry": "npm"}, "package.fetch: expected pairs"),
    ],
)
def test_bad_packages(changes, says):
    with pytest.raises(ValueError, match=says):
        Package(**({"name": "a", "version": "1", "registry": "pypi", "file": "a.whl", "sha256": SHA} | changes))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip finds packages in this folder only."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def wheel(version: str = "1.0") -> bytes:
    info = f"thing-{version}.dist-info"
    return zipped(
        ("thing/a.png", b"one"),
        (f"{info}/METADATA", f"Metadata-Version: 2.1\nName: thing\nVersion: {version}\n".encode()),
        (f"{info}/WHEEL", b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
        (f"{info}/RECORD", b""),
    )


def test_pip_fetches_what_is_pinned(index, tmp_path):
    file, data = "thing-1.0-py3-none-any.whl", wheel()
    (index / file).write_bytes(data)
    thing = Package("thing", "1.0", "pypi", file, hashlib.sha256(data).hexdigest(), ("--only-binary", ":all:"))
    cache = tmp_path / "new" / "cache"
    assert fetch(thing, cache) == cache / file and (cache / file).read_bytes() == data
    assert [p.name for p in cache.iterdir()] == [file]
    (index / file).unlink()
    assert tree(unpack(thing, ["thing/*"], cache)) == {"thing/a.png": b"one"}  # from the cache alone


def test_pip_refuses_what_is_not(index, tmp_path):
    file, data = "thing-1.0-py3-none-any.whl", wheel()
    (index / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"^{file}: expected sha256 {SHA}, got {hashlib.sha256(data).hexdigest()}"):
        fetch(Package("thing", "1.0", "pypi", file, SHA), tmp_path / "cache")
    other = Package("thing", "1.0", "pypi", "thing-1.0-cp38-abi3-any.whl", hashlib.sha256(data).hexdigest())
    with pytest.raises(ValueError, match=f"expected the file thing-1.0-cp38-abi3-any.whl, got {file}"):
        fetch(other, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_network_that_is_absent(index, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(ConnectionError, match="^thing 1.0: expected to fetch t.whl with pip; is the network reachable"):
        fetch(Package("thing", "1.0", "pypi", "t.whl", SHA), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_npm(tmp_path, monkeypatch):
    data = tar(("package/a.dcm", b"one"))
    (tmp_path / "real.tgz").write_bytes(data)
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    thing = Package("thing", "1.0", "npm", "thing-1.0.tgz", hashlib.sha256(data).hexdigest())
    with pytest.raises(ConnectionError, match="with npm, which is not installed"):
        fetch(thing, tmp_path / "cache")
    npm = tools / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(ConnectionError, match="is the network reachable.*npm error code ENOTFOUND"):
        fetch(thing, tmp_path / "cache")
    npm.write_text(f'#!/bin/sh\n/bin/cp "{tmp_path}/real.tgz" thing-1.0.tgz\necho "$@" > "{tmp_path}/said"\n')
    assert tree(unpack(thing, ["package/*.dcm"], tmp_path / "cache")) == {"package/a.dcm": b"one"}
    assert (tmp_path / "said").read_text() == "pack --ignore-scripts thing@1.0\n"
    (tmp_path / "real.tgz").write_bytes(data + b"x")
    with pytest.raises(ValueError, match="^thing-1.0.tgz: expected sha256"):
        fetch(thing, tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_a_file_of_another_hash_in_the_cache(tmp_path):
    (tmp_path / "t.whl").write_bytes(b"something else")
    with pytest.raises(
        ValueError, match=f"^t.whl: expected sha256 {SHA}, got {hashlib.sha256(b'something else')}"[:60]
    ):
        fetch(Package("thing", "1.0", "pypi", "t.whl", SHA), tmp_path)
    with pytest.raises(ValueError, match="^t.whl: expected sha256"):
        unpack(Package("thing", "1.0", "pypi", "t.whl", SHA), ["*"], tmp_path)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*.png", ["a.png", "A.PNG", "[x].png"], ["d/a.png", ".a.png", "a.pngx", "xa.png\n", "a.jpg"]),
        ("**/*.png", ["a.png", "d/a.png", "d/e/f/a.png"], ["d/.e/a.png", ".d/a.png", "d/a.jpg"]),
        ("d/**", ["d/a", "d/e/a"], ["d", "e/d/a", "d/.a", "d/.e/a"]),
        ("**", ["a", "d/a"], [".a", ""]),
        ("**/**/a", ["a", "x/a", "x/y/a"], ["ba"]),
        ("d/**/a", ["d/a", "d/x/a", "d/x/y/a"], ["d/xa", "a", "da"]),
        ("a?c", ["abc", "axc"], ["ac", "a/c", "abbc"]),
        ("a[0-9]c", ["a0c", "a9c"], ["axc", "a10c"]),
        ("a[!0-9]c", ["axc"], ["a1c", "a/c"]),
        ("a[^]c", ["a^c"], ["abc"]),
        ("a[]]c", ["a]c"], ["abc"]),
        ("a[b", ["a[b"], ["ab"]),
        ("a+(b).dcm", ["a+(b).dcm"], ["aab.dcm"]),
        (".hidden/*", [".hidden/a"], [".hidden/.a", "hidden/a"]),
        ("x**y", ["xy", "xaay"], ["xa/y"]),
        ("CT.1.3.12.*", ["CT.1.3.12.2.1107"], ["CT-1.3.12.2"]),
    ],
)
def test_patterns(pattern, yes, no):
    one = compile_globs([pattern])
    assert [path for path in yes if not one.match(path)] == [] and [path for path in no if one.match(path)] == []
    both = compile_globs(["nothing", pattern])
    assert all(both.match(path) for path in yes) and not any(both.match(path) for path in no)


def test_patterns_do_not_blow_up():
    pattern = compile_globs(["*" * 60 + "a" + "**/" * 30 + "*b"])
    assert not pattern.match("a" * 200 + "/" + "c/" * 60)
    assert not compile_globs([]).match("") and not compile_globs([]).match("a")
