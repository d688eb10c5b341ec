#!/usr/bin/env python3
"""Builds the documentation site from docs/ with zensical, and checks it.

Dead links and anchors fail, and so does a page that would load something from another server.

usage: python scripts/docs.py [--out site] [--requirements]

Needs the extra ``docs``; `make docs` has an environment with it. Nothing is fetched.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
LOADED = ("script", "img", "iframe", "source", "video", "audio", "embed")
"""Elements whose ``src`` a page loads when it opens, as it does ``link``, but for canonical, prev and next."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
ABROAD = re.compile(r"""url\(\s*['"]?(?:https?:)?//|@import\s+['"](?:https?:)?//""")


def page_for_the_site(text: str, source: Path, stage: Path) -> str:
    """The Markdown of a page, as the site needs it.

    A code block keeps only its language (the words after it are for tests). Links to files of the repository outside
    docs/ lead to copies below ``files/``.

    Args:
        text: the page's text.
        source: its file in the repository, which its links start from.
        stage: the folder of the site's pages. Linked files are copied to its ``files/``.

    Raises:
        ValueError: a link leads nowhere, or to a folder.
    """
    docs = ROOT / "docs"
    folder = docs if source == ROOT / "CHANGELOG.md" else source.parent  # The page stands among the others

    def link(match: re.Match[str]) -> str:
        address = match[2]
        if urlsplit(address).scheme:
            return match[0]
        target = (source.parent / unquote(address)).resolve()
        if not target.is_file():
            raise ValueError(f"{source.relative_to(ROOT)}: expected a link to a file, got {address}")
        if not target.is_relative_to(docs):
            kept = stage / "files" / target.relative_to(ROOT)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, kept)
            target = docs / kept.relative_to(stage)
        return f"{match[1]}{Path(os.path.relpath(target, folder)).as_posix()}{match[3]}"

    parts = re.split(r"^(```.*?^```$)", text, flags=re.M | re.S)  # Every second part is a code block
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    parts[1::2] = [re.sub(r"^```(\w+) [^\n]*", r"```\1", part) for part in parts[1::2]]
    return "".join(parts)


def stage_pages(work: Path) -> None:
    """Write the pages and the configuration below ``work``."""
    stage = work / "docs"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(ROOT / "docs", stage)
    for source in [*(ROOT / "docs").rglob("*.md"), ROOT / "CHANGELOG.md"]:
        inside = source.is_relative_to(ROOT / "docs")
        target = stage / (source.relative_to(ROOT / "docs") if inside else "changelog.md")
        target.write_text(page_for_the_site(source.read_text(encoding="utf-8"), source, stage), encoding="utf-8")
    shutil.copyfile(ROOT / "zensical.toml", work / "zensical.toml")


class Page(HTMLParser):
    """What one page links to and loads, and its anchors."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(values.get("href", ""))
        if tag in LOADED and values.get("src"):
            self.loads.append(values["src"])
        self.loads += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]


class Fault(NamedTuple):
    page: str
    problem: str


def faults(site: Path) -> list[Fault]:
    """Dead links and anchors of a built site, and what its pages and style sheets would load from elsewhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # Its addresses start at the server's root
        name = path.relative_to(site).as_posix()
        for address in [*page.loads, *page.links]:
            parts = urlsplit(address)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                if address in page.loads:
                    found.append(Fault(name, f"loads {address}"))
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(Fault(name, f"dead link: {address}"))
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(Fault(name, f"dead anchor: {address}"))
    for path in sorted(site.rglob("*.css")):
        if ABROAD.search(path.read_text(encoding="utf-8")):
            found.append(Fault(path.relative_to(site).as_posix(), "loads from another server"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="where the site is written [site]")
    parser.add_argument("--requirements", action="store_true", help="print the packages of the extra docs, and stop")
    args = parser.parse_args()
    if args.requirements:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        print(*project["optional-dependencies"]["docs"])
        return 0
    out = args.out.resolve()
    if out.exists() and not (out / "objects.inv").exists():  # It is replaced as a whole
        print(f"--out: expected a new folder or an earlier site, got {out}", file=sys.stderr)
        return 2
    work = ROOT / "build" / "docs"
    stage_pages(work)
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))  # Docstrings are read from the sources, without imports
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    environment = os.environ | {"PYTHONPATH": path}
    built = subprocess.run(
        command,
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    print(COLOURS.sub("", built.stdout), end="")
    if built.returncode:
        return 1
    found = faults(work / "site")
    for fault in found:
        print(f"{fault.page}: {fault.problem}", file=sys.stderr)
    if found:
        return 1
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(work / "site", out)
    print(f"{out / 'index.html'}: {len(list(out.rglob('*.html')))} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
