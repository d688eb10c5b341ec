"""The frame of an HTML page around its sections, and how a page is written to disk."""

import base64
import contextlib
import glob
import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dex.common import atomic
from dex.report.charts import esc
from dex.report.style import SCRIPT, STYLE

UNFINISHED_AFTER = 3600.0
"""Age in seconds from which a partial file counts as abandoned."""


class Section(NamedTuple):
    anchor: str
    title: str
    content: str
    """HTML; an empty section is partial out."""


def document(kind: str, title: str, headline: str, notes: Iterable[str], sections: Sequence[Section]) -> str:
    """A self-contained HTML page: it loads nothing, whatever text it contains.

    kind: the kind of page, shown above the title. headline: HTML below the title. notes: sentences without a full stop.
    """
    sections = [s for s in sections if s.content]
    links = "".join(f'<a href="#{s.anchor}">{esc(s.title)}</a>' for s in sections)
    body = "".join(f'<section id="{s.anchor}"><h2>{esc(s.title)}</h2>{s.content}</section>' for s in sections)
    notices = "".join(f'<p class="notice">{esc(note)}.</p>' for note in notes)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{esc(title)}: {esc(kind)}</title>'
        f'<style>{STYLE}</style></head>\n<body><header><p class="over">{esc(kind)}</p>'
        f"<h1>{esc(title)}</h1>{headline}{notices}<nav>{links}</nav></header>\n<main>{body}</main>\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def write(page: str, out: Path, mode: int = 0o666) -> None:
    """Write the page whole or not at all, and remove partial files that killed writers partial behind."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for partial in out.parent.glob(f"{glob.escape(out.name)}.*{atomic.PARTIAL}"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > UNFINISHED_AFTER:  # A younger file may still be in use
                partial.unlink()
    atomic.write(out, page.encode("utf-8", "replace"), mode=mode)
