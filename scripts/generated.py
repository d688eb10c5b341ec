"""What the scripts share that make pages from results: write a page, or check that it is what the results say."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))

from dex.common import atomic  # noqa: E402


def settle(page: Path, text: str, *, check: bool, source: str, command: str) -> int:
    """Write ``page``, or where ``check`` is set compare it with ``text`` and say what to run; the exit status."""
    if not check:
        atomic.write(page, text)
        return 0
    if page.is_file() and page.read_text(encoding="utf-8") == text:
        return 0
    print(f"{page.relative_to(ROOT)}: not what {source} says; run {command}")
    return 1


def commit_of(machine: dict) -> str:
    """What a page says of the commit that a run's description names, see `dex.train.runlog.describe_machine`."""
    name = machine["commit"][:10] if machine["commit"] else "an unknown commit"
    return name + (", changed" if machine["dirty"] else "")


def literal(lines: list[str]) -> str:
    """The literal of a dict, one entry a line."""
    return "{\n" + "".join(lines) + "}" if lines else "{}"


def strings(text: str) -> str:
    """Text as adjacent string literals that fit into a line."""
    parts, line = [], ""
    for word in text.replace('"', "").replace("'", "").replace("\\", "").split(" "):
        if len(line) + len(word) > 98:
            parts.append(line)
            line = ""
        line += word + " "
    parts.append(line.rstrip())
    return "".join(f'        "{part}"\n' for part in parts)
