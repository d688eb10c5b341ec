"""Helpers of the scripts that make pages from results: write a page, or check that it is up to date."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))

from dex.common import atomic  # noqa: E402


def settle(page: Path, text: str, *, check: bool, source: str, command: str) -> int:
    """Write ``page``, or with ``check`` compare it with ``text`` and print what to run. Returns the exit status."""
    if not check:
        atomic.write(page, text)
        return 0
    if page.is_file() and page.read_text(encoding="utf-8") == text:
        return 0
    print(f"{page.relative_to(ROOT)}: does not match {source}; run {command}")
    return 1


def commit_of(machine: dict) -> str:
    """The commit of a run's description (see `dex.train.runlog.describe_machine`) as text."""
    name = machine["commit"][:10] if machine["commit"] else "an unknown commit"
    return name + (", changed" if machine["dirty"] else "")


def literal(lines: list[str]) -> str:
    """A dict literal with one entry per line."""
    return "{\n" + "".join(lines) + "}" if lines else "{}"


def strings(text: str) -> str:
    """Text as adjacent string literals, each short enough for a line."""
    parts, line = [], ""
    for word in text.replace('"', "").replace("'", "").replace("\\", "").split(" "):
        if len(line) + len(word) > 98:
            parts.append(line)
            line = ""
        line += word + " "
    parts.append(line.rstrip())
    return "".join(f'        "{part}"\n' for part in parts)
