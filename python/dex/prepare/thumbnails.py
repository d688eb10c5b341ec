"""Thumbnails of what was left out, and which of them are shown.

`DIR.private/left_out.html` shows all that are chosen, the set's card those of public sources: others' pixels may hold
names. A thumbnail knows whose it may be, so that a withdrawal takes it away.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SHOWN = 6
"""Thumbnails of each reason."""
SIDE = 128  # pixels of a thumbnail
_QUALITY = 85
_SEED = b"dex left out\0"


class Thumbnail(NamedTuple):
    """What was left out: a slice, a file, or a slice with the one that it repeats.

    name: what it is called, a path for the private page and a source for the card. path: of its unit, "" where it is
    not to be told. groups: the patients that it may show, () where nobody knows; ids: of the images that it shows.
    pictures: JPEG of at most SIDE pixels a side; of a duplicate that and the one that was kept. public: whether all of
    it is of public sources.
    """

    reason: str
    source: str
    name: str
    path: str
    detail: str
    groups: tuple[str, ...]
    ids: tuple[str, ...]
    pictures: tuple[bytes, ...]
    public: bool

    @property
    def order(self) -> str:
        """Draws those that are shown."""
        named = "\0".join((self.reason, self.source, self.path, self.name, self.detail))
        return hashlib.sha256(_SEED + named.encode("utf-8", "surrogatepass")).hexdigest()

    def for_card(self) -> Thumbnail:
        """Without the path."""
        return self._replace(name=self.source, path="")


class LeftOut(NamedTuple):
    """counts: of all that was left out, by reason; shown: thumbnails of some."""

    counts: Counter[str]
    shown: Sequence[Thumbnail]

    def to_json(self) -> bytes:
        rows = [
            one._asdict() | {"pictures": [base64.b64encode(data).decode() for data in one.pictures]}
            for one in self.shown
        ]
        return json.dumps({"counts": dict(sorted(self.counts.items())), "shown": rows}, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> LeftOut:
        read = json.loads(data)
        return cls(Counter(read["counts"]), [_from_row(row) for row in read["shown"]])


def _from_row(row: dict[str, Any]) -> Thumbnail:
    pictures = tuple(map(base64.b64decode, row["pictures"]))
    return Thumbnail(**row | {"pictures": pictures, "groups": tuple(row["groups"]), "ids": tuple(row["ids"])})


def choose(some: Iterable[Thumbnail]) -> list[Thumbnail]:
    """SHOWN of each reason."""
    chosen: dict[str, list[Thumbnail]] = {}
    for one in some:
        chosen[one.reason] = sorted([*chosen.get(one.reason, ()), one], key=lambda one: one.order)[:SHOWN]
    return [one for reason in sorted(chosen) for one in chosen[reason]]


def without(
    some: Iterable[Thumbnail], groups: frozenset[str], ids: frozenset[str], paths: frozenset[str]
) -> list[Thumbnail]:
    """Those that show nothing of these patients, images and units. What may be anybody's goes too."""
    return [
        one
        for one in some
        if one.groups and groups.isdisjoint(one.groups) and ids.isdisjoint(one.ids) and one.path not in paths
    ]


def thumbnail(frame: np.ndarray) -> bytes:
    """JPEG of numbers [H, W] or uint8 [H, W, 3], from the least to the greatest, SIDE pixels at most."""
    if frame.dtype != np.uint8:
        values = np.nan_to_num(frame.astype(np.float32), posinf=0, neginf=0)
        low, high = float(values.min()), float(values.max())
        frame = np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    elif frame.ndim == 2 and 0 < frame.max() < 64:  # labels, which would all look black
        frame = (frame.astype(np.uint16) * 255 // frame.max()).astype(np.uint8)
    return _encoded(Image.fromarray(np.ascontiguousarray(frame)))


def of_slice(image: np.ndarray) -> bytes:
    """`thumbnail` of a slice as it would be stored: uint8 or uint16 [S, S], or uint8 [S, S, 3]."""
    return _encoded(Image.fromarray(image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)))


def of_file(data: bytes) -> bytes:
    """`of_slice` of an encoded one."""
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        return of_slice(np.asarray(image))


def _encoded(image: Image.Image) -> bytes:
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()


def figures(some: Sequence[Thumbnail]) -> str:
    """The thumbnails as HTML, in their order."""
    return f'<div class="grid">{"".join(map(_figure, some))}</div>'


def _figure(one: Thumbnail) -> str:
    name = escape(one.name.encode("utf-8", "backslashreplace").decode())
    images = [f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" for data in one.pictures]
    told = ("left out", "kept") if len(images) > 1 else ("",)
    html = "".join(
        f'<img src="{url}" alt="{name}{which and f", {which}"}" width="{SIDE}" height="{SIDE}">'
        for url, which in zip(images, told, strict=False)
    )
    if len(images) > 1:
        html = f'<div class="pair">{html}</div>'
    html = html or '<p class="quiet">no image</p>'
    kind = ' class="two"' if len(images) > 1 else ""
    return f"<figure{kind}>{html}<figcaption><b>{name}</b> <span>{escape(one.detail)}</span></figcaption></figure>"
