"""Batches: resumption, ranks, workers, and the replacement of samples that cannot be read."""

import errno
import logging
import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch
from number_set import Numbers

from dex.data import CorruptDataError, Loader
from dex.data.order import replacement


class Kinds(Numbers):
    """Two thirds of the samples are of one modality."""

    def modality_index(self):
        return (np.arange(self.count) % 3 == 0).astype(np.int64)


def take(loader, count):
    return [next(loader).ids for _ in range(count)]


def test_batches_hold_what_they_say():
    loader = Loader(Numbers(10), 4, seed=0)
    assert [next(loader).places.tolist() for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    batch = next(loader)
    assert batch.places.dtype == torch.int64
    assert batch.images.shape == (4, 3, 4, 4) and batch.images.dtype == torch.uint8
    assert batch.modality.dtype == torch.int64
    for image, modality, sample_id in zip(batch.images, batch.modality, batch.ids, strict=True):
        number = int(sample_id[1:])
        assert (image == number).all() and modality == number % 2


def test_epochs_are_permutations_and_differ():
    with Loader(Numbers(23), 5, seed=3) as loader:
        assert loader.batches_per_epoch == 4
        epochs = [sum(take(loader, 4), ()) for _ in range(3)]
    for ids in epochs:
        assert len(set(ids)) == 20
    assert len({ids for ids in epochs}) == 3
    assert take(Loader(Numbers(23), 5, seed=4), 4) != take(Loader(Numbers(23), 5, seed=3), 4)


def test_a_view_without_some_modality():
    class Kinds(Numbers):
        modalities = ("a", "b", "c", "d")

        def modality_index(self):
            return np.array([1] * 8 + [2] * 2)

    batches = take(Loader(Kinds(10), 5, seed=0, temperature=0), 2)
    numbers = [int(name[1:]) for name in sum(batches, ())]
    assert sum(number >= 8 for number in numbers) == 5 and len({number for number in numbers if number < 8}) == 5


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumption_anywhere(workers, temperature):
    dataset = Kinds(37, corrupt={5, 6})

    def loader(start, workers, **more):
        arguments = {"seed": 11, "temperature": temperature, "start_batch": start, "num_workers": workers}
        return Loader(dataset, 4, **arguments, **more)

    whole = take(loader(0, 0), 60)
    draw = random.Random(0)
    # 20 random places in the middle of an epoch
    for start in draw.sample([number for number in range(1, 54) if number % 9], 20):
        with loader(start, workers) as resumed:
            count = draw.randrange(1, 5)
            assert take(resumed, count) == whole[start : start + count]
            # what the workers have read ahead must not count
            assert resumed.position == start + count
    position = start + count
    with loader(position, 2 - workers) as resumed:
        assert take(resumed, 3) == whole[position : position + 3]
    if temperature == 1:
        for epoch in range(6):
            clean = take(Loader(Kinds(37), 4, seed=11, start_batch=9 * epoch), 9)
            assert len(set(sum(clean, ()))) == 36  # each once


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_then_one_then_two(workers, temperature):
    """In the middle of an epoch, with samples that cannot be read: one global order, one set of places."""
    dataset = Kinds(41, corrupt={2, 5, 30})

    def go(world, start, count):
        arguments = {"seed": 3, "temperature": temperature, "start_batch": start, "num_workers": workers}
        parts = []
        for rank in range(world):
            with Loader(dataset, 6, rank=rank, world_size=world, **arguments) as loader:
                parts.append([next(loader) for _ in range(count)])
                assert loader.position == start + count
        for step in zip(*parts, strict=True):
            ids.append(sum((batch.ids for batch in step), ()))
            places.extend(torch.cat([batch.places for batch in step]).tolist())

    ids, places = [], []
    go(1, 0, 20)
    whole, ids, places = ids, [], []
    for world, start, count in ((2, 0, 4), (1, 4, 5), (2, 9, 2), (3, 11, 9)):
        go(world, start, count)
    assert ids == whole and places == list(range(20 * 6))


def test_workers_give_the_same_pixels():
    dataset = Numbers(30)
    with Loader(dataset, 6, seed=1) as alone, Loader(dataset, 6, seed=1, num_workers=2) as read_ahead:
        for _ in range(12):
            one, two = next(alone), next(read_ahead)
            assert one.ids == two.ids and torch.equal(one.modality, two.modality)
            assert torch.equal(one.images, two.images) and torch.equal(one.places, two.places)


def test_batches_that_are_kept_keep_their_images():
    """More of them than the workers have memory for; and what is let go of is used again."""
    dataset = Numbers(60)
    with Loader(dataset, 6, seed=1, num_workers=2) as loader:
        kept = [next(loader) for _ in range(15)]
        parts = [next(loader).images[2, 1] for _ in range(15)]
        for batch, part, number in zip(kept, parts, range(15), strict=True):
            want = next(Loader(dataset, 6, seed=1, start_batch=number))
            assert batch.ids == want.ids and torch.equal(batch.images, want.images)
            later = next(Loader(dataset, 6, seed=1, start_batch=number + 15))
            assert torch.equal(part, later.images[2, 1])
    assert (kept[0].images == torch.tensor([int(name[1:]) for name in kept[0].ids])[:, None, None, None]).all()


def test_memory_is_used_again():
    with Loader(Numbers(60), 6, seed=1, num_workers=2) as loader:
        for _ in range(8):
            next(loader)  # from here on every batch that is let go of makes room for one
        places = {next(loader).images.data_ptr() for _ in range(40)}
        assert len(places) <= 6


def test_close_keeps_the_position():
    with Loader(Numbers(30), 5, seed=1, num_workers=2) as loader:
        first = take(loader, 3)
        loader.close()
        assert first + take(loader, 3) == take(Loader(Numbers(30), 5, seed=1), 6)


def test_ranks_share_one_global_order():
    whole = take(Loader(Numbers(30), 6, seed=2), 10)
    for world in (2, 3):
        parts = [take(Loader(Numbers(30), 6, seed=2, rank=rank, world_size=world), 10) for rank in range(world)]
        assert [sum(step, ()) for step in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_numbers_are_left_alone(workers):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with Loader(Numbers(30), 6, seed=2, num_workers=workers) as loader:
        take(loader, 7)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_corrupt_samples_are_replaced_and_named_once(workers, temperature, caplog):
    corrupt = {3, 8, 20}
    clean = take(Loader(Kinds(24), 4, seed=5, temperature=temperature), 18)
    with (
        caplog.at_level(logging.WARNING, "dex.data"),
        Loader(Kinds(24, corrupt), 4, seed=5, temperature=temperature, num_workers=workers) as loader,
    ):
        seen = take(loader, 18)
        assert loader.corrupt == {f"n{index}": "torn" for index in corrupt}
    for number, (ours, theirs) in enumerate(zip(seen, clean, strict=True)):
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if int(other[1:]) in corrupt:
                at = (number % 6) * 4 + place
                draws = (replacement(5, number // 6, at, attempt, 24) for attempt in range(32))
                assert one == f"n{next(index for index in draws if index not in corrupt)}"
            else:
                assert one == other
    for index in corrupt:
        assert sum(f"'n{index}'" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_samples_stop_the_run(workers):
    with Loader(Numbers(100, range(10)), 10, seed=0, num_workers=workers) as loader:
        take(loader, 30)  # ten are allowed
        assert len(loader.corrupt) == 10
    with Loader(Numbers(100, range(11)), 10, seed=0, num_workers=workers) as loader:
        with pytest.raises(CorruptDataError, match="more than 10 of 100.*torn") as caught:
            take(loader, 30)
    assert len(caught.value.samples) == 11 and all(sample in str(caught.value) for sample in caught.value.samples)


def test_no_readable_sample_at_all():
    with pytest.raises(CorruptDataError, match="no readable replacement"):
        next(Loader(Numbers(4, range(4)), 2, seed=0))


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 11}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"batch_size": 5, "world_size": 2}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
        ({"temperature": 1.01}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"num_workers": -1}, "num_workers"),
        ({"start_batch": -3}, "start_batch"),
        ({"rank": 1}, "rank"),
    ],
)
def test_arguments(arguments, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        Loader(Numbers(10), **{"batch_size": 2, "seed": 0, **arguments})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_workers_does_not_end_them(number):
    want = take(Loader(Numbers(40), 4, seed=0), 20)
    with Loader(Numbers(40), 4, seed=0, num_workers=2) as loader:
        got = take(loader, 4)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid, number)
        assert got + take(loader, 16) == want


def test_shared_memory_without_room_is_named(monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("Lock", "RawArray"):
        with monkeypatch.context() as patch, Loader(Numbers(10), 4, seed=0, num_workers=2) as loader:
            patch.setattr(multiprocessing, name, full)
            with pytest.raises(
                OSError, match=r"no space in shared memory \(/dev/shm\) for 2 reading processes; .* data.num_w"
            ):
                next(loader)
