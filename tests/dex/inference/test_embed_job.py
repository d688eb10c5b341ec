"""Parts, resuming and ranks are in tests/dex/cli/test_embed.py, from the command."""

import pytest
import torch

import dex
from dex.data import center
from dex.inference import embed_job
from dex.inference.collection import Collection, Decoded, Note, Row


@pytest.fixture
def loaded(trained):
    return dex.load(trained)


class Listed:
    """A reader whose units are what they give."""

    has_paths = False

    def read(self, unit, beat):
        return unit


def of_counts(counts):
    """Items with these numbers of images, in one part; every other item is grey."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for i, n in enumerate(counts):
        images = torch.randint(0, 256, (n, 3 - 2 * (i % 2), 64, 64), dtype=torch.uint8, generator=generator)
        notes = [] if n else [Note(f"unit/{i}", f"{i}.dcm", "", "unreadable: by its numbers")]
        items.append(Decoded([images.numpy()], [Row(f"{i}/{k}", "", "", "", "") for k in range(n)], notes))
    return items, Collection("print", [range(len(items))], lambda number: [items[number]], Listed())


def test_batches_cross_items_and_keep_their_size(loaded, tmp_path):
    items, collection = of_counts([3, 0, 9, 1, 4, 8])
    options = embed_job.Options(tmp_path / "a.npz", batch_size=4)
    (part,) = embed_job.embedded(loaded, collection, [0], options, None)
    images = torch.cat([torch.from_numpy(item.images[0]).expand(-1, 3, -1, -1) for item in items])
    images = center(images, 64)
    with torch.no_grad():
        want = torch.cat([loaded.encoder(batch)[:, 0] for batch in images.split(4)])
    assert torch.equal(part.embedding.cls, want)
    assert [row.id for row in part.rows][3:5] == ["2/0", "2/1"] and len(part.notes) == 1


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_a_collection_without_images_is_an_empty_table(loaded, tmp_path, counts):
    _, collection = of_counts(counts)
    options = embed_job.Options(tmp_path / "a.npz")
    embed_job.begin(loaded, collection, options)
    refused = {"unreadable": len(counts)} if counts else {}
    assert embed_job.run(loaded, collection, options) == (0, refused, True)


def test_progress_says_how_much_is_left(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_job, "_EVERY", 0.0)
    _, collection = of_counts([2, 2])
    options, lines = embed_job.Options(tmp_path / "a.npz"), []
    embed_job.begin(loaded, collection, options)
    embed_job.run(loaded, collection, options, lines.append)
    assert lines[0].startswith("1 of 2 items, 2 images, ") and lines[1].endswith("0s left")


def test_the_digest_follows_every_weight(loaded):
    before = embed_job.digest_of(loaded.model)
    assert embed_job.digest_of(loaded.model) == before
    with torch.no_grad():
        loaded.model.mask_token[0, 0, 0] += 1
    assert embed_job.digest_of(loaded.model) != before
