"""Remove a patient, or single images, from a prepared set for good.

Removed are the images from the shards (``dex.data.shard_rewrite``), their thumbnails and counts from the card, their
rows from the private table, and all copies: images that ``prepare`` left out as duplicates of a removed one, or kept
instead of it. ``DIR.private/withdrawn.jsonl`` keeps their hashed ids, so that no later start of ``dex prepare`` adds
them again; the manifest and the card keep the date and the number.

The record is written first, then the shards change, then the private folder is cleared. If a call is interrupted
anywhere, the next one completes it.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dex.common import locks
from dex.data import shard_rewrite
from dex.data.dataset import SPLITS
from dex.data.shard_format import read_bytes, read_manifest

from . import card, left_out, lookup, splits, thumbnails, trace
from .card import Example
from .filters import WITHDRAWN
from .lookup import Found, Private
from .thumbnails import LeftOut

LEFTOVERS = ("chunks", "set", "headers")
"""Folders that ``prepare`` keeps until the set is written; a killed run may have left them."""
_BY_PATIENT = (None, "patient", "source")
"""Values of a card's ``by`` for which every group is a patient; cards of earlier versions have none."""
CARD_HTML, CARD_JSON = "card.html", "card.json"


class Impossible(ValueError):
    """The request names nothing that is in the set, or all of it."""


class Outcome(NamedTuple):
    """images: number removed now; patients: number of named patients that had some of them; copies: how many of the
    images were not named, but repeat a named one; others: images of the same patients (or of the groups that stand for
    patients) that stay, because single images were named; before, after: the set's fingerprints; seen_by: all
    fingerprints that the set has had; knows_copies: False if an earlier version made the set; finished: whether an
    interrupted earlier withdrawal was completed first; earlier: dates of the withdrawals that already removed what was
    named."""

    images: int
    patients: int
    copies: int
    others: int
    before: str
    after: str
    seen_by: tuple[str, ...]
    knows_copies: bool
    finished: bool
    earlier: tuple[str, ...]


class _Chosen(NamedTuple):
    """ids: of all images to remove, in the set or not; kept: (shard, index line) of those in the set."""

    ids: frozenset[str]
    groups: frozenset[str]
    kept: list[tuple[dict, dict]]
    copies: int
    patients: int


def withdraw(root: Path, folder: Path, texts: Sequence[str]) -> Outcome:
    """Remove what ``texts`` (see ``lookup``) name from the set in ``root``, whose private folder is ``folder``.

    An interrupted earlier call is completed first; without texts, nothing else is done. Raises Impossible for a text
    that names nothing, and if no image would be left; ValueError for a damaged set; BlockingIOError if another process
    is withdrawing from it; and OSError. The set is then unchanged.
    """
    with _alone(root):
        private = Private(folder) if folder.exists() else None
        finished = shard_rewrite.settle(root)
        if private:
            finished |= _settle_private(root, private)
            private = Private(folder)
        if not texts and not finished:
            raise Impossible("ID: expected a patient or an id; there is no interrupted withdrawal to complete")
        matches = lookup.find(root, private, texts)
        earlier = tuple(sorted({record.time for match in matches for record in match.withdrawn}))
        chosen = _chosen(root, private, matches)
        if chosen.kept:
            return _carry_out(root, private, chosen)._replace(finished=finished, earlier=earlier)
        now = shard_rewrite.fingerprint(root)
        return Outcome(0, 0, 0, 0, now, now, (), True, finished, earlier)


def _chosen(root: Path, private: Private | None, matches: Sequence[Found]) -> _Chosen:
    for match in matches:
        if not any(image.line or image.duplicate for image in match.images.values()) and not match.withdrawn:
            raise Impossible(nothing(match, private))
    images = {name: image for match in matches for name, image in match.images.items()}
    groups = frozenset(group for match in matches for group in match.groups)
    keys = {image.line["key"] for image in images.values() if image.line}
    ids: set[str] = set(images)
    if private:
        keys |= {row["key"] for row in private.duplicates() if row["id"] in images or row["group"] in groups}
        ids |= {row["id"] for row in private.duplicates() if row["key"] in keys}
    manifest, _ = read_manifest(root)
    kept = [(entry, line) for entry, line in shard_rewrite.lines(root, manifest) if line["key"] in keys]
    copies = sum(line["id"] not in images for _, line in kept)
    patients = sum(bool(match.groups and match.images) for match in matches)
    return _Chosen(frozenset(ids.union(line["id"] for _, line in kept)), groups, kept, copies, patients)


def nothing(match: Found, private: Private | None) -> str:
    """The message for a text that names nothing in the set: what was searched, and similar names."""
    if match.images:
        return (
            f"ID: {match.text} names images that were left out as copies of others; this set does not record of "
            "which: an earlier version made it"
        )
    if match.refused:
        return f"ID: {match.text} names what was refused; nothing of it is in the set"
    if private is None:
        ways = "the ids of images and patient groups; only the private folder knows patients and paths"
    else:
        sources = ", ".join(listed.name for listed in private.sources[:3])
        more = f" and {len(private.sources) - 3} more" if len(private.sources) > 3 else ""
        ways = f"ids of images, units and patient groups, PatientIDs, folders and paths of {sources}{more}"
        if any(listed.naming("") is None for listed in private.sources):
            ways += "; without the salt, patients cannot be looked up by name"
    alike = f". Did you mean {' or '.join(match.alike)}?" if match.alike else ""
    return f"ID: expected a name in the set, got {match.text}, searched among {ways}{alike}"


def _carry_out(root: Path, private: Private | None, chosen: _Chosen) -> Outcome:
    date = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    manifest, _ = read_manifest(root)
    gone = frozenset(line["id"] for _, line in chosen.kept)
    if len(gone) == manifest["samples"]:
        raise Impossible(
            f"ID: expected some of the set's images, got all {len(gone):,}: remove {root}, or prepare other sources"
        )
    documents, others = _documents(root, manifest, chosen, date)
    change = shard_rewrite.plan(root, gone, documents, date)
    record = trace.Withdrawn(
        date, len(gone), tuple(sorted(chosen.ids)), tuple(sorted(chosen.groups)), change.before, change.after
    )
    if private:
        earlier = [other for other in trace.withdrawn(private.folder) if other.before != change.before]
        trace.write_withdrawn(private.folder, [*earlier, record])
    shard_rewrite.carry_out(root, change)
    if private:
        _clear(private, record)
    return Outcome(
        images=len(gone),
        patients=chosen.patients,
        copies=chosen.copies,
        others=others,
        before=change.before,
        after=change.after,
        seen_by=(*(withdrawal["before"] for withdrawal in manifest.get("withdrawals", ())), change.before),
        knows_copies=private is None or private.knows_duplicates,
        finished=False,
        earlier=(),
    )


def _settle_private(root: Path, private: Private) -> bool:
    """Clear the private folder after an interrupted withdrawal; delete the record of one that never reached the
    shards."""
    records = trace.withdrawn(private.folder)
    if not records:
        return False
    manifest, _ = read_manifest(root)
    last = records[-1]
    if all(entry["before"] != last.before for entry in manifest.get("withdrawals", ())):
        if shard_rewrite.fingerprint(root) == last.before:
            trace.write_withdrawn(private.folder, records[:-1])
        return False
    return _clear(private, last)


def _clear(private: Private, record: trace.Withdrawn) -> bool:
    """Remove everything about withdrawn images from the private folder. Returns whether there was anything."""
    changed = False
    for name in LEFTOVERS:
        if (private.folder / name).exists():
            shutil.rmtree(private.folder / name)
            changed = True
    units = frozenset(place.unit for place in private.places() if place.id in record.ids)
    left_out.forget(private.folder, frozenset(record.groups), frozenset(record.ids), units)
    tables = [private.folder / trace.DUPLICATES, *sorted((private.folder / trace.IDS).glob("*.jsonl"))]
    for table in tables:
        if table.exists():
            changed |= trace.remove(table, frozenset(record.ids))
    if changed:
        trace.log(private.folder, "withdrawn", images=record.images, date=record.time)
    return changed


def _documents(root: Path, manifest: dict, chosen: _Chosen, date: str) -> tuple[dict[str, bytes], int]:
    """The set's card without the images, and the number of other images of the same patients that stay."""
    gone = {line["id"]: (entry, line) for entry, line in chosen.kept}
    groups = {line["group"] for _, line in chosen.kept}
    stay = [
        (entry, line)
        for entry, line in shard_rewrite.lines(root, manifest)
        if line["group"] in groups and line["id"] not in gone
    ]
    listed = {entry["file"]: entry for entry in manifest["documents"]}
    if not {CARD_HTML, CARD_JSON} <= listed.keys():
        return {}, len(stay)
    facts = json.loads(read_bytes(root, CARD_JSON, 0, None))
    shown = facts.pop("examples")
    split = {row["source"]: row["by"] for row in facts.get("split", ())}
    left = {(_row_of(facts, root, entry, line)["name"], line["group"]) for entry, line in stay}
    for entry, line in chosen.kept:
        row = _row_of(facts, root, entry, line)
        row["kept"] -= 1
        row[line["split"]] -= 1
        row["dropped"][WITHDRAWN] = row["dropped"].get(WITHDRAWN, 0) + 1
        row["text_suspected"] -= bool(shard_rewrite.meta(root, entry, line).get("text_suspected"))
        if (row["name"], line["group"]) not in left:
            left.add((row["name"], line["group"]))
            whole = line["group"] in chosen.groups or split.get(row["name"].partition(" (")[0]) in _BY_PATIENT
            row["patients"] = max(0, row["patients"] - whole)  # Smaller groups were not counted as patients
    _subtract_sides(facts, root, chosen)
    for name in {line["modality"] for _, line in chosen.kept}:
        here = [(entry, line) for entry, line in chosen.kept if line["modality"] == name]
        _subtract(next(row for row in facts["modalities"] if row["name"] == name), root, here)
    for split in SPLITS:
        facts[split] = sum(row[split] for row in facts["modalities"])
    facts["images"] = facts["train"] + facts["val"]
    facts["withdrawn"] = [*facts.get("withdrawn", ()), {"date": date, "images": len(gone)}]
    documents, left = {}, LeftOut(Counter(), ())
    if card.LEFT_OUT in listed:
        left = LeftOut.from_json(read_bytes(root, card.LEFT_OUT, 0, None))
        left = left._replace(shown=thumbnails.without(left.shown, chosen.groups | groups, chosen.ids, frozenset()))
        documents[card.LEFT_OUT] = left.to_json()
    page, numbers = card.build(facts, _examples(root, manifest, facts, shown, gone), left.shown)
    return {**documents, CARD_HTML: page, CARD_JSON: numbers}, len(stay)


def _subtract_sides(facts: dict, root: Path, chosen: _Chosen) -> None:
    """Subtract the images from the card's split, and drop its numbers of patients and files, now unknown."""
    rows = {row["source"]: row for row in facts.get("split", ())}
    for entry, line in chosen.kept:
        row = rows.get(shard_rewrite.meta(root, entry, line).get("source", ""))
        if row is not None:
            row["images"][line["split"]] -= 1
            row["unnamed"], row["groups"] = splits.unnamed_kinds(row), {}


def _row_of(facts: dict, root: Path, entry: dict, line: dict) -> dict[str, Any]:
    """The card's row that counts an image. Raises ValueError if there is none."""
    source = shard_rewrite.meta(root, entry, line).get("source", "")
    for row in facts["sources"]:
        if row["name"] in (source, f"{source} ({line['modality']})") and row["modality"] == line["modality"]:
            return row
    raise ValueError(f"{CARD_JSON}: expected the card that dex prepare wrote; it lists no source of {line['id']}")


def _subtract(row: dict[str, Any], root: Path, kept: Sequence[tuple[dict, dict]]) -> None:
    """Subtract images from a modality's counts and histogram. The histogram is of the pixels before encoding, so a
    pixel whose level JPEG has changed is subtracted from the next level that has one."""
    pixels = np.zeros(256, np.int64)
    for entry, line in kept:
        row[line["split"]] -= 1
        pixels += _histogram(shard_rewrite.image(root, entry, line))
    row["empty"] = not (row["train"] or row["val"])
    before = np.array(row["histogram"], np.int64)
    total = max(0, int(before.sum() - pixels.sum()))
    rising = np.minimum(np.maximum.accumulate(np.cumsum(before - pixels).clip(0)), total)
    row["histogram"] = [0] * 256 if row["empty"] else np.diff(rising, prepend=0).tolist()


def _histogram(data: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as opened:
        image = np.asarray(opened)
    eight = image if image.dtype == np.uint8 else ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.bincount(eight.ravel(), minlength=256)


def _examples(root: Path, manifest: dict, facts: dict, shown: Sequence[dict], gone: dict) -> list[Example]:
    """The card's examples, with removed ones replaced by others of the same modality."""
    left = [example["id"] for example in shown if example["id"] not in gone]
    missing = Counter(example["modality"] for example in shown if example["id"] in gone)
    count = {row["name"]: row["train"] + row["val"] for row in facts["modalities"]}
    places = {
        name: {(2 * i + 1) * count[name] // (2 * most) for i in range(most)} if count[name] else set()
        for name, most in missing.items()
    }
    wanted, seen, chosen = set(left), Counter[str](), []
    for entry, line in shard_rewrite.lines(root, manifest):
        name = line["modality"]
        if line["id"] in gone:
            continue
        if line["id"] in wanted or seen[name] in places.get(name, ()):
            data = shard_rewrite.image(root, entry, line)
            source = _row_of(facts, root, entry, line)["name"]
            chosen.append(Example(name, source, line["id"], data, line["kind"]))
        seen[name] += 1
    return chosen


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            with contextlib.suppress(locks.NoLocks):
                stack.enter_context(locks.exclusive(root, wait=0))
        except BlockingIOError:
            raise BlockingIOError(f"DIR: another process is withdrawing from {root}") from None
        yield
