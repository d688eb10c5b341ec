"""The frame of a self-contained HTML page, and the format of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from .card_style import CSS


class Section(NamedTuple):
    """key: anchor of its address in the page. html: its body."""

    key: str
    title: str
    html: str


def document(title: str, header: str, sections: Sequence[Section]) -> str:
    """An HTML page; ``header`` is HTML too."""
    links = "".join(f'<a href="#{section.key}">{section.title}</a>' for section in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{heading}</h2>{html}</section>\n'
        for key, heading, html in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # The browser enforces that the page fetches nothing and runs nothing.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>\n{CSS}</style>\n</head>\n<body>\n<main>\n{header}\n<nav>{links}</nav>\n{body}</main>\n"
        "</body>\n</html>\n"
    )


class Tile(NamedTuple):
    """A number at the top of a page."""

    label: str
    big: str
    small: str


def tiles(listed: Sequence[Tile]) -> str:
    html = (f"<div><dt>{label}</dt><dd><b>{big}</b><span>{small}</span></dd></div>" for label, big, small in listed)
    return f'<dl class="tiles">{"".join(html)}</dl>'


def number(value: int) -> str:
    return f"{value:,}"


def count(value: int, noun: str) -> str:
    return f"{number(value)} {noun}{'' if value == 1 else 's'}"


def percent(part: int, whole: int) -> str:
    """A share with few digits; "0 %" and "100 %" are exact."""
    if not part:
        return "0 %"
    share = 100 * part / whole
    if share < 0.1:
        return "< 0.1 %"
    if part == whole:
        return "100 %"
    return f"{min(share, 99.9):.1f} %" if share < 10 or share > 99 else f"{share:.0f} %"
