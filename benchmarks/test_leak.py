"""What `dex data leak` finds, what it mistakes for a copy, and what it costs.

The images are those of the public package-borne sources (`dex prepare packages`); the tiny form takes some of the
embedded ones. Some images of each source are changed in one way and searched for among all. The limits of
`dex.prepare.alignment` were set earlier, with other changes of images of the same sources: no source is new to them.
So sources are split into two halves, "set" and "other", by the hash of their names; a difference between the halves
shows how far the figures generalise. `DEX_LEAK_SET=DIR` measures on the shard set DIR instead, whose sources are new to
the limits. Ids of slices of public sources end in, for example, "axial-012", and neighbours are known only for these.
An image counts as found if any image of a matches it. Intervals are Wilson's, 95 %.
"""

import contextlib
import hashlib
import io
import math
import os
import re
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dex.cli import main
from dex.data import ShardWriter, open_dataset
from dex.prepare import alignment
from dex.prepare.candidates import candidates, turned, view
from dex.prepare.leak import leak

PER_SOURCE = 4
NEIGHBOUR = re.compile(r"(.*(?:axial|coronal|sagittal|frame)-)(\d+)")
LARGE = 20_000, 2_000


def jpeg(image, quality):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    with Image.open(stream) as picture:
        return np.asarray(picture.convert("RGB"))


def shift(image, draw):
    down, right = draw.integers(2, 7, 2) * draw.choice([-1, 1], 2)
    wide = np.pad(image, ((8, 8), (8, 8), (0, 0)), mode="edge")
    return wide[8 + down : 264 + down, 8 + right : 264 + right]


def crop(image, draw, share=0.95):
    side = round(256 * share)
    top, left = draw.integers(0, 257 - side, 2)
    return np.asarray(Image.fromarray(image[top : top + side, left : left + side]).resize((256, 256), Image.BICUBIC))


def levels(image, gain, offset):
    return np.clip(image * gain + offset, 0, 255).astype(np.uint8)


CHANGES = {
    "JPEG of quality 60": lambda x, draw: jpeg(x, 60),
    "brightness +-20": lambda x, draw: levels(x, 1, draw.choice([-20, 20])),
    "contrast 0.85 or 1.15": lambda x, draw: levels(x - 128.0, draw.choice([0.85, 1.15]), 128),
    "gamma 0.8 or 1.25": lambda x, draw: levels((x / 255) ** draw.choice([0.8, 1.25]), 255, 0),
    "half the size": lambda x, draw: np.asarray(
        Image.fromarray(x).resize((128, 128), Image.BICUBIC).resize((256, 256))
    ),
    "shift of 2 to 6 pixels": shift,
    "mirrored left to right": lambda x, draw: x[:, ::-1],
    "mirrored top to bottom": lambda x, draw: x[::-1],
    "quarter turn": lambda x, draw: np.rot90(x, draw.choice([1, 3])),
    "half turn": lambda x, draw: np.rot90(x, 2),
    "95 % crop": crop,
    "90 % crop": lambda x, draw: crop(x, draw, 0.9),
    "mirrored, 95 % crop, JPEG 75": lambda x, draw: jpeg(np.ascontiguousarray(crop(x, draw)[:, ::-1]), 75),
    "quarter turn, shift, contrast": lambda x, draw: levels(np.rot90(shift(x, draw)) - 128.0, 0.9, 128),
}


class Images(NamedTuple):
    """A data set, its ids, the half of each id's source, and all halves."""

    path: object
    ids: list[str]
    half: list[str]
    halves: tuple[str, ...]


def half_of(sample_id: str) -> str:
    return ("set", "other")[hashlib.sha256(sample_id.split("/")[0].encode()).digest()[0] % 2]


@pytest.fixture(scope="module")
def images(request, tmp_path_factory):
    path = os.environ.get("DEX_LEAK_SET")
    new = path is not None
    if not new and not request.config.getoption("--tiny"):
        path = tmp_path_factory.mktemp("leak") / "packages"
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            assert main(["prepare", "packages", "--out", str(path)]) == 0, output.getvalue()
    dataset = open_dataset(path)
    ids = [dataset.sample_id(index) for index in range(len(dataset))]
    halves = ["new" if new else half_of(sample_id) for sample_id in ids]
    return Images(path, ids, halves, ("new",) if new else ("set", "other"))


def pixels(dataset, index):
    return dataset[index].image.numpy().transpose(1, 2, 0)


def write(path, named):
    with ShardWriter(path, name=path.name, modalities=("CT",)) as writer:
        for name, image in named:
            stream = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(image)).save(stream, "PNG", compress_level=1)
            writer.add(name, stream.getvalue(), kind="png", modality="CT", split="train", group="")
    return path


def chosen(images, tiny):
    """Indices of the images to change: some of each source."""
    by_source = {}
    for place, name in enumerate(images.ids):
        by_source.setdefault(name.split("/")[0], []).append(place)
    each = 1 if tiny else PER_SOURCE
    chosen = [p for places in by_source.values() for p in places[:: max(1, len(places) // each)][:each]]
    return sorted(chosen)[:: 5 if tiny else 1]


def wilson(count, total):
    if not total:
        return "none"
    z, share = 1.96, count / total
    middle, spread = share + z * z / (2 * total), z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    low, high = ((middle + sign * spread) / (1 + z * z / total) for sign in (-1, 1))
    return f"{count}/{total} = {share:.1%} [{low:.1%}, {high:.1%}]"


@pytest.mark.slow
def test_recall_by_change(images, tiny, tmp_path, capsys):
    """The share found as any kind, and as a copy; the difference was classified as a neighbour."""
    dataset, places = open_dataset(images.path), chosen(images, tiny)

    def changed():
        for number, change in enumerate(CHANGES.values()):
            draw = np.random.default_rng(number)
            for place in places:
                yield f"{number}/{place}", change(pixels(dataset, place), draw)

    report = leak(images.path, write(tmp_path / "changed", changed()))
    kinds = {pair.b: pair.kind for pair in report.pairs}
    lines, recalls = [], {}
    for number, name in enumerate(CHANGES):
        for half in images.halves:
            results = [kinds.get(f"{number}/{place}", "") for place in places if images.half[place] == half]
            count = len(results)
            any_kind, copies = (sum(kind not in other for kind in results) for other in (("",), ("", "neighbour")))
            recalls[name, half] = any_kind / max(1, count)
            lines.append(f"{name:30} {half:5}: found {wilson(any_kind, count)}, as a copy {wilson(copies, count)}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    if not tiny and "other" in images.halves:
        assert all(recall >= 0.9 for (name, half), recall in recalls.items() if half == "other" and name != "90 % crop")


def neighbours(images):
    """Pairs of indices of adjacent slices or frames."""
    where = {name: place for place, name in enumerate(images.ids)}
    for name, place in where.items():
        match = NEIGHBOUR.fullmatch(name)
        following = where.get(f"{match[1]}{int(match[2]) + 1:0{len(match[2])}d}") if match else None
        if following is not None:
            yield place, following


@pytest.mark.slow
def test_false_alarms(images, tiny, capsys):
    """Neighbours in a volume classified as copies, and images of other sources found as any kind."""
    dataset = open_dataset(images.path)
    levels = torch.stack([grey(dataset, place) for place in range(len(dataset))])
    lines, shares = [], {}
    for half in images.halves:
        pairs = [pair for pair in neighbours(images) if images.half[pair[0]] == half]
        fine = list(aligned(levels, [Way(a, b, 0, (0.0, 0.0, 1.0)) for a, b in pairs]))
        copies = sum(pair.fine >= alignment.RELATED and pair.finest >= alignment.COPY for pair in fine)
        related = sum(pair.fine >= alignment.RELATED for pair in fine) - copies
        shares[half] = copies / max(1, len(fine))
        lines.append(
            f"next slices, {half}: copies {wilson(copies, len(fine))}, neighbours {wilson(related, len(fine))}"
        )
    views = np.stack([view(pixels(dataset, place)) for place in range(len(dataset))])
    for half in images.halves:
        lines.append(f"images of other sources, {half}: {strangers(images, half, views, levels, tiny)}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    if not tiny and "other" in images.halves:
        assert shares["other"] <= 0.2


class Way(NamedTuple):
    """Indices of two images, and the turn and start with which the second is aligned to the first."""

    a: int
    b: int
    turn: int
    start: tuple[float, float, float]


class Fine(NamedTuple):
    way: Way
    fine: float
    finest: float


def aligned(levels, ways):
    """The fine and the finest correlation of each pair; the fine one is -1 if the coarse one is too low."""
    for first in range(0, len(ways), 64):
        part = ways[first : first + 64]
        a, b = torch.stack([levels[w.a] for w in part]), torch.stack([turned(levels[w.b], w.turn) for w in part])
        result = alignment.align(a, b, torch.tensor([way.start for way in part]))
        values = torch.where(result.coarse >= alignment.COARSE, result.fine, torch.tensor(-1.0))
        yield from map(Fine, part, values.tolist(), result.finest.tolist())


def grey(dataset, place):
    levels = dataset[place].image.float().mean(dim=0)
    return torch.nn.functional.adaptive_avg_pool2d(levels[None, None], alignment.SIDE)[0, 0]


def strangers(images, half, views, levels, tiny):
    """Search some images of each source of a half among all other sources; name matches, as packages share some."""
    places = [place for place in chosen(images, tiny) if images.half[place] == half]
    sources = np.array([name.split("/")[0] for name in images.ids])
    matches: dict[str, int] = {}
    for source in sorted(set(sources[places])):
        own, others = [place for place in places if sources[place] == source], np.flatnonzero(sources != source)
        likely = candidates(views[others], views[own])
        ways = [
            Way(
                int(others[likely.of[row, k]]), own[row], int(likely.turn[row, k]), tuple(likely.start[row, k].tolist())
            )
            for row, k in zip(*np.nonzero(likely.of >= 0), strict=True)
        ]
        best = {}
        for way, fine, finest in aligned(levels, ways):
            if fine >= alignment.RELATED and fine > best.get(way.b, (-1.0,))[0]:
                best[way.b] = fine, f"{source} of {sources[way.a]}{' (copy)' if finest >= alignment.COPY else ''}"
        for _, name in best.values():
            matches[name] = matches.get(name, 0) + 1
    named = "; ".join(f"{name} {count}" for name, count in matches.items())
    return f"{wilson(sum(matches.values()), len(places))} {named}"


def test_cost_of_the_search(images, tiny, report):
    """Seconds to compare the pairs of two sets, without decoding and alignment."""
    n, m = (400, 40) if tiny else LARGE
    draw = np.random.default_rng(0)
    dataset = open_dataset(None)
    few = np.stack(
        [np.asarray(Image.fromarray(pixels(dataset, i)[:, :, 0]).resize((32, 32))) for i in range(0, 600, 6)]
    )
    # Mixtures of real views are similar to each other, like images of one modality.
    parts = draw.dirichlet([0.3] * 4, n + m).astype(np.float32)
    views = np.zeros((n + m, 32, 32), np.float32)
    for part in parts.T:
        views += part[:, None, None] * few[draw.integers(len(few), size=n + m)]
    views = views.astype(np.uint8)
    start = time.process_time()
    result = candidates(views[:n], views[n:])
    seconds = time.process_time() - start
    assert result.of.shape[0] == m
    limit = 60.0 * n * m / (LARGE[0] * LARGE[1])
    report(
        f"candidates of {m:,} among {n:,}", f"{limit:.3g} s", limit / seconds, 1, f"{seconds:.1f} s of processor time"
    )
