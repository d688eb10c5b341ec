"""Thumbnails of what was left out, and the choice of those that are shown.

``DIR.private/left_out.html`` shows all chosen ones, the set's card only those of public sources: other pixels may show
names. A thumbnail records the patients that it may show, so that a withdrawal removes it.
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
"""Thumbnails per reason."""
SIDE = 160  # Pixels of a thumbnail
_QUALITY = 75
_SEED = b"dex left out\0"


class Thumbnail(NamedTuple):
    """Something left out: a slice, a file, or a slice with the one that it repeats.

    name: its caption, a path on the private page and a source on the card. path: of its unit, "" if it must not be
    known. groups: the patients that it may show, () if unknown; ids: of the images that it shows. pictures: JPEG of at
    most SIDE pixels along a side; for a duplicate, followed by that of the kept image. public: whether all of it is
    from public sources.
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
        """A hash that orders thumbnails at random; the first ones are shown."""
        named = "\0".join((self.reason, self.source, self.path, self.name, self.detail))
        return hashlib.sha256(_SEED + named.encode("utf-8", "surrogatepass")).hexdigest()

    def for_card(self) -> Thumbnail:
        """The thumbnail without its path."""
        return self._replace(name=self.source, path="")


class LeftOut(NamedTuple):
    """What was left out. counts: of everything, by reason; shown: thumbnails of a part."""

    counts: Counter[str]
    shown: Sequence[Thumbnail]

    def to_json(self) -> bytes:
        rows = [
            thumbnail._asdict() | {"pictures": [base64.b64encode(data).decode() for data in thumbnail.pictures]}
            for thumbnail in self.shown
        ]
        return json.dumps({"counts": dict(sorted(self.counts.items())), "shown": rows}, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> LeftOut:
        values = json.loads(data)
        return cls(Counter(values["counts"]), [_from_row(row) for row in values["shown"]])


def _from_row(row: dict[str, Any]) -> Thumbnail:
    pictures = tuple(map(base64.b64decode, row["pictures"]))
    return Thumbnail(**row | {"pictures": pictures, "groups": tuple(row["groups"]), "ids": tuple(row["ids"])})


def choose(thumbnails: Iterable[Thumbnail]) -> list[Thumbnail]:
    """At most SHOWN thumbnails per reason."""
    chosen: dict[str, list[Thumbnail]] = {}
    for thumbnail in thumbnails:
        same = [*chosen.get(thumbnail.reason, ()), thumbnail]
        chosen[thumbnail.reason] = sorted(same, key=lambda thumbnail: thumbnail.order)[:SHOWN]
    return [thumbnail for reason in sorted(chosen) for thumbnail in chosen[reason]]


def without(
    thumbnails: Iterable[Thumbnail], groups: frozenset[str], ids: frozenset[str], paths: frozenset[str]
) -> list[Thumbnail]:
    """The thumbnails that show none of these patients, images and units; those of unknown patients are removed too."""
    return [
        one
        for one in thumbnails
        if one.groups and groups.isdisjoint(one.groups) and ids.isdisjoint(one.ids) and one.path not in paths
    ]


def thumbnail(frame: np.ndarray) -> bytes:
    """A JPEG, at most SIDE pixels along a side, of any numbers [H, W] or uint8 [H, W, 3]. Values other than uint8 are
    scaled from the least to the greatest."""
    if frame.dtype != np.uint8:
        values = np.nan_to_num(frame.astype(np.float32), posinf=0, neginf=0)
        low, high = float(values.min()), float(values.max())
        frame = np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    elif frame.ndim == 2 and 0 < frame.max() < 64:  # Labels, which would all look black
        frame = (frame.astype(np.uint16) * 255 // frame.max()).astype(np.uint8)
    return _encoded(Image.fromarray(np.ascontiguousarray(frame)))


def of_slice(image: np.ndarray) -> bytes:
    """A thumbnail of a slice as it would be stored: uint8 or uint16 [S, S], or uint8 [S, S, 3]."""
    return _encoded(Image.fromarray(image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)))


def of_file(data: bytes) -> bytes:
    """A thumbnail of an encoded slice."""
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        return of_slice(np.asarray(image))


def _encoded(image: Image.Image) -> bytes:
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()


def figures(thumbnails: Sequence[Thumbnail]) -> str:
    """The thumbnails as HTML, in this order."""
    return f'<div class="grid">{"".join(map(_figure, thumbnails))}</div>'


def _figure(thumbnail: Thumbnail) -> str:
    name, detail = escape(thumbnail.name.encode("utf-8", "backslashreplace").decode()), escape(thumbnail.detail)
    images = [f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" for data in thumbnail.pictures]
    roles = (", left out", ", kept") if len(images) > 1 else ("",)
    html = "".join(
        f'<img src="{url}" alt="{name}{role}" width="{SIDE}" height="{SIDE}">'
        for url, role in zip(images, roles, strict=False)
    )
    if len(images) > 1:
        html = f'<div class="pair">{html}</div>'
    html = html or '<p class="quiet">no image</p>'
    kind = ' class="two"' if len(images) > 1 else ""
    return f"<figure{kind}>{html}<figcaption><b>{name}</b> <span>{detail}</span></figcaption></figure>"
