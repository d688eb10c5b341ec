"""Find the volumes in a series with several slices at each place: echoes, b-values, phases, times.

Slices are separated by the header values in ``KEYS``, then by the time of acquisition, then by their number. If none of
these separates them, they do not form a volume: it is better to show them one by one than to mix contrasts.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from .file import GE_PARAMETERS, PHILIPS_MR, SIEMENS_MR, listed, private, text
from .file import number as number_of

_RELATIVE = 0.02  # Relative tolerance of equal amounts: headers give measured values, not the requested ones
_SEQUENCES = 4  # Number of observed acquisition sequences that are tried


class Key(NamedTuple):
    """always: separates slices even if no place recurs, because it changes the contrast or names the stack. kind:
    "value", "amount" (close values are equal) or "time" (seconds or milliseconds)."""

    name: str
    kind: str = "value"
    always: bool = False


KEYS = (
    Key("acquisition"),
    Key("temporal position", always=True),
    Key("echo", always=True),
    Key("echo time", "amount", always=True),
    Key("b-value", "amount", always=True),
    Key("trigger time", "time"),
    Key("stack", always=True),
    Key("series number"),
    Key("image type"),
    Key("b-value of the manufacturer"),
    Key("gradient direction"),
    Key("sequence name"),
    Key("inversion time", "amount"),
    Key("flip angle", "amount"),
    Key("repetition time", "amount"),
    Key("voltage", "amount"),
    Key("kernel"),
    Key("thickness", "amount"),
    Key("contrast agent"),
    Key("description"),
    Key("part of the signal"),
    Key("velocity encoding"),
    Key("cardiac phase", "amount"),
    Key("respiratory phase", "amount"),
    Key("cardiac delay", "time"),
    Key("time offset", "time"),
    Key("frame reference time", "time"),
    Key("acquisition time", "time"),
    Key("content time", "time"),
)
SERIES_NUMBER = KEYS.index(Key("series number"))
_TIMES = [number for number, key in enumerate(KEYS) if key.kind == "time"]


class Piece(Protocol):
    """key_values: a value for each of KEYS, followed by the frame's dimension indices; instance: number of its file in
    the series; order: sorts slices at the same place, the file's name last."""

    key_values: tuple[Hashable, ...]
    instance: int
    order: tuple[Any, ...]


def key_values_of(head: Any, groups: Sequence[Any], content: Any) -> tuple[Hashable, ...]:
    """A frame's header value for each of KEYS, always of the same type, and its dimension indices. groups: its
    functional groups."""

    def of(sequence: str, keyword: str) -> Any:
        items = next((items for group in groups if (items := group.get(sequence))), None)
        inner = items[0].get(keyword) if items else None
        return head.get(keyword) if inner is None else inner

    def amount(value: Any) -> float:
        return number_of(value) or 0.0

    diffusion = "MRDiffusionSequence"
    gradient = next(iter(listed(of(diffusion, "DiffusionGradientDirectionSequence"))), head)
    timing, cardiac = "MRTimingAndRelatedParametersSequence", "CardiacSynchronizationSequence"
    indices = tuple(int(number_of(v) or 0) for v in listed(content.get("DimensionIndexValues")))
    values = (
        int(amount(content.get("FrameAcquisitionNumber") or head.get("AcquisitionNumber"))),
        int(amount(content.get("TemporalPositionIndex") or head.get("TemporalPositionIdentifier"))),
        int(amount(next(iter(listed(head.get("EchoNumbers"))), None))),
        amount(of("MREchoSequence", "EffectiveEchoTime") or head.get("EchoTime")),
        amount(of(diffusion, "DiffusionBValue")),
        amount(head.get("TriggerTime")) / 1000,
        str(content.get("StackID") or ""),
        text(head, "SeriesNumber"),
        _words(of("MRImageFrameTypeSequence", "FrameType") or head.get("ImageType")),
        _words(
            private(head, 0x0019, SIEMENS_MR, 0x0C)
            or private(head, 0x0043, GE_PARAMETERS, 0x39)
            or private(head, 0x2001, PHILIPS_MR, 0x03)
        ),
        _words(gradient.get("DiffusionGradientOrientation")),
        text(head, "SequenceName"),
        amount(of("MRModifierSequence", "InversionTimes") or head.get("InversionTime")),
        amount(of(timing, "FlipAngle")),
        amount(of(timing, "RepetitionTime")),
        amount(of("CTXRayDetailsSequence", "KVP")),
        _words(of("CTReconstructionSequence", "ConvolutionKernel")),
        amount(of("PixelMeasuresSequence", "SliceThickness")),
        text(head, "ContrastBolusAgent"),
        text(head, "SeriesDescription") + "\0" + text(head, "ProtocolName"),
        _words(of("MRImageFrameTypeSequence", "ComplexImageComponent")),
        _words(of("MRVelocityEncodingSequence", "VelocityEncodingDirection")),
        amount(of(cardiac, "NominalPercentageOfCardiacPhase")),
        amount(of("RespiratorySynchronizationSequence", "NominalPercentageOfRespiratoryPhase")),
        amount(of(cardiac, "NominalCardiacTriggerDelayTime") or of(cardiac, "ActualCardiacTriggerDelayTime")) / 1000,
        amount(of("TemporalPositionSequence", "TemporalPositionTimeOffset")),
        amount(head.get("FrameReferenceTime")) / 1000,
        _seconds(
            content.get("FrameAcquisitionDateTime")
            or content.get("FrameReferenceDateTime")
            or head.get("AcquisitionDateTime")
            or head.get("AcquisitionTime")
        ),
        _seconds(head.get("ContentTime")),
    )
    return (*values, *indices)


def split(
    slices: Sequence[Piece], places: Sequence[int], digest: Callable[[Piece], bytes]
) -> tuple[list[list[Piece]], list[Piece], list[Piece]]:
    """Divide slices into volumes. Returns the volumes, each with at most one slice per place, in the order of places;
    the slices that belong to no known volume; and copies of other slices at the same place. places: the number of each
    slice's place; digest: of a slice's pixels, called only if a place has more slices than others."""
    stacks, alone, copies = [], [], []
    for group in _by_keys(list(zip(places, slices, strict=True))):
        counts = Counter(place for place, _ in group)
        if len(set(counts.values())) > 1:
            group, again = _without_copies(group, counts, digest)
            copies += again
            counts = Counter(place for place, _ in group)
        parts = [group] if max(counts.values()) == 1 else _by_order(group, counts)
        if parts is None:  # The places with a single slice still form a volume if they are the majority
            once = [item for item in group if counts[item[0]] == 1]
            parts = [once] if 2 * len(once) > len(counts) else []
            alone += [piece for place, piece in group if not parts or counts[place] > 1]
        stacks += [[piece for _, piece in sorted(part, key=lambda item: item[0])] for part in parts]
    return stacks, alone, copies


def separate(slices: Sequence[Piece]) -> list[list[Piece]]:
    """Divide slices with unknown places by contrast or phase, if each part has several slices."""
    groups = [list(slices)]
    for number, key in enumerate(KEYS):
        if key.always or key.name in ("acquisition", "trigger time"):
            divided = [_clusters(group, [piece.key_values[number] for piece in group], key) for group in groups]
            groups = [
                part
                for group, parts in zip(groups, divided, strict=True)
                for part in (parts if all(len(part) > 1 for part in parts) else [group])
            ]
    return groups


_Item = tuple[int, Any]  # A place and its slice


def _by_keys(group: list[_Item]) -> list[list[_Item]]:
    groups = [group]
    count = max(len(piece.key_values) for _, piece in group)
    for number in range(count):
        key = KEYS[number] if number < len(KEYS) else Key("dimension index")
        groups = [part for group in groups for part in _by_key(group, number, key)]
    return groups


def _by_key(group: list[_Item], number: int, key: Key) -> list[list[_Item]]:
    """The parts into which a key divides the group, or the whole group.

    A value that changes from slice to slice within a volume divides nothing: an ``always`` key needs half of the slices
    in parts with several places. Other keys need a recurring place that recurs less often in the parts, and half of the
    slices in parts with more than half of the places.
    """
    values = [piece.key_values[number] if number < len(piece.key_values) else 0 for _, piece in group]
    parts = _clusters(group, values, key)
    if len(parts) == 1:
        return parts
    sizes = [len({place for place, _ in part}) for part in parts]
    total, most = len({place for place, _ in group}), _recurring(group)
    if key.always and 2 * sum(len(part) for part, size in zip(parts, sizes, strict=True) if size > 1) >= len(group):
        return parts
    if key.kind == "time" and most > 1 and max(map(_recurring, parts)) == most:
        return [group]
    covering = sum(len(part) for part, size in zip(parts, sizes, strict=True) if 2 * size > total)
    if most > 1 and 2 * covering >= len(group) and max(map(_recurring, parts)) < most:
        return parts
    return [group]


def _clusters(group: list, values: list, key: Key) -> list[list]:
    """The group divided by value, in ascending order; amounts close to the one before are equal to it."""
    ranked = sorted(range(len(group)), key=lambda n: (values[n], n))
    parts: list[list] = []
    last = None
    for n in ranked:
        near = key.kind == "amount" and last is not None and values[n] - last <= _RELATIVE * abs(values[n])
        if not parts or not (near or values[n] == last):
            parts.append([])
        parts[-1].append(group[n])
        last = values[n]
    return parts


def _recurring(group: list[_Item]) -> int:
    """The largest number of slices at one place."""
    return max(Counter(place for place, _ in group).values())


def _without_copies(
    group: list[_Item], counts: Counter[int], digest: Callable[[Any], bytes]
) -> tuple[list[_Item], list[Any]]:
    seen: set[tuple[int, bytes]] = set()
    kept, copies = [], []
    for place, piece in sorted(group, key=lambda item: item[1].order):
        if counts[place] > 1:
            pixels = (place, digest(piece))
            if pixels in seen:
                copies.append(piece)
                continue
            seen.add(pixels)
        kept.append((place, piece))
    return kept, copies


def _by_order(group: list[_Item], counts: Counter[int]) -> list[list[_Item]] | None:
    """Parts with one slice per place, by time of acquisition or number; None if neither divides the group."""
    times = [number for number in _TIMES if _distinct(group, lambda piece, n=number: piece.key_values[n])]
    orders: list[Callable[[Any], Hashable]] = [lambda piece, n=number: piece.key_values[n] for number in times]
    numbered = _distinct(group, lambda piece: piece.instance)
    if numbered:
        orders.append(lambda piece: piece.instance)
    for number in times:
        if parts := _pauses(group, number):
            return parts
    named: Callable[[Any], Hashable] = lambda piece: piece.order  # noqa: E731 - Part of a list of such functions
    for order in (*orders, named):
        if parts := _passes(group, order, by_name=order is named):
            return parts
    if len(set(counts.values())) > 1:
        return None
    if not orders and not _place_by_place(group, named):
        return None
    by_place: dict[int, list[Any]] = defaultdict(list)
    for place, piece in group:
        by_place[place].append(piece)
    order = orders[0] if orders else named
    ranked = {place: sorted(pieces, key=order) for place, pieces in by_place.items()}
    return [[(place, pieces[n]) for place, pieces in ranked.items()] for n in range(max(counts.values()))]


def _distinct(group: list[_Item], value: Callable[[Any], Hashable]) -> bool:
    """Whether the slices at each place all have different values."""
    return len({(place, value(piece)) for place, piece in group}) == len(group)


def _pauses(group: list[_Item], number: int) -> list[list[_Item]] | None:
    """Parts separated by pauses: at least half of the median time between two slices at the same place."""
    by_place: dict[int, list[float]] = defaultdict(list)
    for place, piece in group:
        by_place[place].append(piece.key_values[number])
    steps = [b - a for times in map(sorted, by_place.values()) for a, b in zip(times, times[1:], strict=False)]
    pause = statistics.median(steps) / 2
    parts: list[list[_Item]] = []
    last = -math.inf
    for item in sorted(group, key=lambda item: item[1].key_values[number]):
        if item[1].key_values[number] - last > pause:
            parts.append([])
        parts[-1].append(item)
        last = item[1].key_values[number]
    return parts if max(map(_recurring, parts)) == 1 and len(parts) == _recurring(group) else None


def _passes(group: list[_Item], order: Callable[[Any], Hashable], by_name: bool = False) -> list[list[_Item]] | None:
    """Parts that each pass through the places once, all in the same sequence; None if the slices do not fit that.
    by_name: names may have any order, so only a sequence from end to end is accepted as not random.

    If the first or the last slice of all is missing, the sequence could begin at several places. Then it must begin at
    an end of the volume, or the result is None.
    """
    ranked = sorted(group, key=lambda item: order(item[1]))
    places = np.array([place for place, _ in ranked])
    distinct = np.unique(places)
    first: list[int] = []
    passes = []
    for place in places.tolist():
        if place in first:
            passes.append(first)
            first = []
        first.append(place)
    full = [tuple(visited) for visited in (*passes, first) if len(visited) == len(distinct)]
    straight = [tuple(distinct.tolist()), tuple(distinct[::-1].tolist())]
    sequences = dict.fromkeys([*(() if by_name else full[:_SEQUENCES]), *straight])
    possible: dict[tuple[int, ...], bool] = {}  # Where the parts end -> whether they begin at an end of the volume
    for sequence in sequences:
        rank = np.empty(len(distinct), np.int64)
        rank[np.searchsorted(distinct, sequence)] = np.arange(len(distinct))
        ranks = rank[np.searchsorted(distinct, places)]
        for start in range(len(distinct)):
            cuts = tuple((np.flatnonzero(np.diff((ranks - start) % len(distinct)) <= 0) + 1).tolist())
            if len(cuts) + 1 == _recurring(group):
                possible[cuts] = possible.get(cuts, False) or sequence[start] in (distinct[0], distinct[-1])
    likely = [cuts for cuts, at_an_end in possible.items() if at_an_end or len(possible) == 1]
    if len(likely) != 1:
        return None
    ends = [0, *likely[0], len(ranked)]
    return [ranked[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]


def _place_by_place(group: list[_Item], order: Callable[[Any], Hashable]) -> bool:
    """Whether the slices of each place are consecutive."""
    places = [place for place, _ in sorted(group, key=lambda item: order(item[1]))]
    return sum(a != b for a, b in zip(places, places[1:], strict=False)) == len(set(places)) - 1


def _words(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("ascii", "replace").strip(" \0")
    return "\\".join(str(part).strip().upper() for part in listed(value))


def _seconds(value: Any) -> float:
    """Seconds of a date and time, or of a time of day; -1 for anything else."""
    digits, _, fraction = str(value or "").replace(":", "").strip().split("+")[0].split("-")[0].partition(".")
    if not digits.isdecimal():
        return -1.0
    days, clock = (int(digits[:8]), digits[8:]) if len(digits) > 8 else (0, digits)
    parts = [int(clock[i : i + 2]) for i in range(0, min(len(clock), 6), 2)]
    whole = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    return days * 86400.0 + whole + (float(f"0.{fraction}") if fraction.isdecimal() else 0.0)


def numbered(along: Sequence[float], apart: float) -> list[int]:
    """The number of the place of each position along a line. A place holds all positions at most ``apart`` from its
    first one."""
    places = [0] * len(along)
    number, first = -1, -math.inf
    for n in sorted(range(len(along)), key=along.__getitem__):
        if along[n] - first > apart:
            number, first = number + 1, along[n]
        places[n] = number
    return places
