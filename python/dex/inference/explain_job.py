"""``dex explain``: why a trained model takes these experts for one scan. It only reads.

It measures the routes of the whole and of the masked image, the masked loss with other experts, and the training images
that are most similar.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dex.analysis import maps
from dex.analysis.intervals import Interval
from dex.analysis.one_image import Alternatives, UsualSet, alternatives, change, loss_with_sets, usual_sets
from dex.analysis.routes import Routes, masked_forward
from dex.analysis.sample import Sample, spread_out
from dex.data import center
from dex.data.dataset import Dataset
from dex.inference.analyse_job import check_modalities, open_data
from dex.inference.load import Loaded, load
from dex.inference.preprocess import Preprocessed, preprocess

_MASKS = 0x5CA1
_SHOWN = 20
"""Labels named in an error, at most."""


class Options(NamedTuple):
    label: str | None = None
    """Which image of a file with several; None: the middle one of those that ``dex prepare`` would keep."""
    masks: int = 16
    train: int = 512
    """Training images to compare with."""
    neighbours: int = 8
    batch_size: int = 64


class Neighbour(NamedTuple):
    """A training image."""

    id: str
    modality: str
    similarity: float
    image: Tensor
    """uint8 ``[3, S, S]``."""
    experts: list[list[int]]
    """Per layer, of the whole image."""


class Usual(NamedTuple):
    """The scan with the experts that a modality's training images most often take."""

    modality: str
    change: Interval
    """Of the masked loss; the interval is over the masks."""
    sets: list[UsualSet]
    """Per layer."""


class Explanation(NamedTuple):
    run: str
    step: int
    file: str
    label: str
    labels: tuple[str, ...]
    """Of all images of the file."""
    modality: str | None
    image: Tensor
    """uint8 ``[3, S, S]``."""
    whole: Routes
    """Routes of the unmasked image, ``[1, ...]``."""
    alternatives: Alternatives
    usual: list[Usual]
    neighbours: list[Neighbour]
    compared: int
    """Number of training images compared with."""
    notes: list[str]


class Job(NamedTuple):
    """Everything resolved, nothing measured yet."""

    run: str
    loaded: Loaded
    file: Path
    scan: Preprocessed
    place: int
    """Index of the image in the scan."""
    train: Dataset | None
    options: Options
    notes: list[str]


def prepare(
    run: str | os.PathLike[str],
    file: str | os.PathLike[str],
    options: Options,
    *,
    modality: str | None = None,
    planes: Sequence[str] = ("auto",),
    data: str | os.PathLike[str] | None = None,
) -> Job:
    """Load the model, read the scan and open the data. ValueError or FileNotFoundError naming the argument.

    Without ``data``, a note says so if the training data are no longer where the run had them.
    """
    for name, least in (("masks", 2), ("train", 1), ("neighbours", 1), ("batch_size", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"{name.replace('_', '-')}: expected at least {least}, got {getattr(options, name)}")
    loaded = load(run, path="experts")
    if not loaded.encoder.dex_layers:
        raise ValueError("run: expected a model with experts, got a monolithic one, which routes nothing")
    scan = preprocess(file, modality, planes)
    place = _chosen(scan, options.label)
    notes = []
    if scan.dropped[place] is not None:
        notes.append(f"dex prepare would leave this image out of a corpus: {scan.dropped[place]}")
    if scan.modality is not None and loaded.modalities and scan.modality not in loaded.modalities:
        notes.append(f"The model was not trained on {scan.modality}, but on {', '.join(loaded.modalities)}")
    try:
        dataset = open_data(loaded, data)
        check_modalities(loaded, dataset)
    except (ValueError, FileNotFoundError) as error:
        if data is not None:
            raise
        notes.append(f"No training images are shown: {error}")
        dataset = None
    train = None if dataset is None else dataset.split("train")
    return Job(Path(run).resolve().name, loaded, Path(file), scan, place, train, options, notes)


def _chosen(scan: Preprocessed, label: str | None) -> int:
    if label is None:
        kept = [i for i, reason in enumerate(scan.dropped) if reason is None] or list(range(len(scan.labels)))
        return kept[len(kept) // 2]
    if label not in scan.labels:
        some = ", ".join(scan.labels[:_SHOWN]) + (", ..." if len(scan.labels) > _SHOWN else "")
        raise ValueError(f"image: expected one of the file's images ({some}), got {label!r}")
    return scan.labels.index(label)


def explain(
    job: Job, device: torch.device, say: Callable[[int, int, str], None] = lambda done, total, text: None
) -> Explanation:
    """Measure everything; the model is moved to ``device``."""
    model, config, options = job.loaded.model.to(device), job.loaded.config.model, job.options
    image = center(job.scan.images[job.place][None].to(device), config.img_size, config.in_chans)
    patches = model.encoder.patches
    generator = torch.Generator().manual_seed(_MASKS)
    noise = torch.rand(options.masks, patches, generator=generator).to(device)
    masking = {"mask_ratio": config.mask_ratio, "batch_size": options.batch_size}
    say(0, 4, "routes")
    whole = masked_forward(model, image, noise[:1], mask_ratio=0.0).routes
    say(1, 4, "other experts")
    others = alternatives(model, image[0], noise, **masking)
    usual, neighbours, compared = [], [], 0
    if job.train is not None:
        say(2, 4, "reading training images")
        sample = spread_out(job.train, options.train)
        compared = len(sample.ids)
        if compared:
            say(3, 4, "training images")
            train_images = center(sample.images.to(device), config.img_size, config.in_chans)
            names = job.train.modalities
            train_noise = torch.rand(compared, patches, generator=generator).to(device)
            routes = masked_forward(model, train_images, train_noise, **masking).routes
            for name, sets in zip(names, usual_sets(routes, sample.modality, len(names)), strict=True):
                if sets is not None:
                    losses = loss_with_sets(model, image[0], noise, sets, **masking)
                    usual.append(Usual(name, change(losses, others.own), sets))
            neighbours = _nearest(job, model, image, train_images, sample)
        else:
            job.notes.append("No training images are shown: the data set has none that can be read")
    say(4, 4, "done")
    return Explanation(
        run=job.run,
        step=job.loaded.step,
        file=job.file.name,
        label=job.scan.labels[job.place],
        labels=job.scan.labels,
        modality=job.scan.modality,
        image=job.scan.images[job.place],
        whole=whole,
        alternatives=others,
        usual=usual,
        neighbours=neighbours,
        compared=compared,
        notes=job.notes,
    )


def similarities(one: maps.Tokens, others: maps.Tokens) -> Tensor:
    """Mean cosine ``[n]`` of CLS tokens and of patch means, after the mean over ``others`` is subtracted: a common
    offset would make all images similar."""

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        mean = b.double().mean(0)
        return F.cosine_similarity(a.double() - mean, b.double() - mean, dim=1)

    return (cosine(one.cls, others.cls) + cosine(one.patches.mean(1), others.patches.mean(1))) / 2


def _nearest(job: Job, model: torch.nn.Module, image: Tensor, train_images: Tensor, sample: Sample) -> list[Neighbour]:
    batch = job.options.batch_size
    tokens = maps.tokens(model.encoder, train_images, batch_size=batch)
    similarity = similarities(maps.tokens(model.encoder, image), tokens)
    nearest = similarity.argsort(descending=True)[: job.options.neighbours]
    images = train_images[nearest.to(train_images.device)]
    noise = torch.zeros(len(nearest), model.encoder.patches, device=train_images.device)
    routes = masked_forward(model, images, noise, mask_ratio=0.0, batch_size=batch).routes
    return [
        Neighbour(
            sample.ids[i],
            job.train.modalities[int(sample.modality[i])],
            float(similarity[i]),
            sample.images[i],
            [experts[row].tolist() for experts in routes.experts],
        )
        for row, i in enumerate(nearest.tolist())
    ]
