"""`dex explain`: why a trained model takes these experts for one scan. Reads only.

The route with whole and masked views, the masked loss with other experts, and the training images that are most alike.
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
"""Labels that an error names."""


class Options(NamedTuple):
    label: str | None = None
    """Which image of a file with several; None: the middle one of those that `dex prepare` would keep."""
    masks: int = 16
    train: int = 512
    """Training images that are looked at."""
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
    """The experts that a modality's training images most often take, given to the scan."""

    modality: str
    change: Interval
    """Of the masked loss; over the masks."""
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
    """Of one image, ``[1, ...]``."""
    alternatives: Alternatives
    usual: list[Usual]
    neighbours: list[Neighbour]
    compared: int
    """Training images that neighbours were sought among."""
    notes: list[str]


class Job(NamedTuple):
    """Everything resolved; nothing is measured yet."""

    run: str
    loaded: Loaded
    file: Path
    found: Preprocessed
    place: int
    """Of the image in the file."""
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

    Without ``data``, training images that are no longer where the run had them are a note.
    """
    for name in ("masks", "train", "neighbours", "batch_size"):
        if getattr(options, name) < (2 if name == "masks" else 1):
            least = 2 if name == "masks" else 1
            raise ValueError(f"{name.replace('_', '-')}: expected at least {least}; got {getattr(options, name)}")
    loaded = load(run, path="experts")
    if not loaded.encoder.dex_layers:
        raise ValueError("run: expected a model with experts; this one is monolithic, so that nothing is routed")
    found = preprocess(file, modality, planes)
    place = _chosen(found, options.label)
    notes = []
    if found.dropped[place] is not None:
        notes.append(f"dex prepare would leave this image out of a corpus: {found.dropped[place]}")
    if found.modality is not None and loaded.modalities and found.modality not in loaded.modalities:
        notes.append(f"The model was not trained on {found.modality}, but on {', '.join(loaded.modalities)}")
    try:
        dataset = open_data(loaded, data)
        check_modalities(loaded, dataset)
    except (ValueError, FileNotFoundError) as error:
        if data is not None:
            raise
        notes.append(f"No training images are shown: {error}")
        dataset = None
    train = None if dataset is None else dataset.split("train")
    return Job(Path(run).resolve().name, loaded, Path(file), found, place, train, options, notes)


def _chosen(found: Preprocessed, label: str | None) -> int:
    if label is None:
        kept = [i for i, why in enumerate(found.dropped) if why is None] or list(range(len(found.labels)))
        return kept[len(kept) // 2]
    if label not in found.labels:
        some = ", ".join(found.labels[:_SHOWN]) + (", ..." if len(found.labels) > _SHOWN else "")
        raise ValueError(f"image: expected one of the file's images ({some}); got {label!r}")
    return found.labels.index(label)


def explain(
    job: Job, device: torch.device, say: Callable[[int, int, str], None] = lambda done, total, text: None
) -> Explanation:
    """Measure everything; the model is moved to ``device``."""
    model, config, options = job.loaded.model.to(device), job.loaded.config.model, job.options
    image = center(job.found.images[job.place][None].to(device), config.img_size, config.in_chans)
    patches = model.encoder.patches
    generator = torch.Generator().manual_seed(_MASKS)
    noise = torch.rand(options.masks, patches, generator=generator).to(device)
    asked = {"mask_ratio": config.mask_ratio, "batch_size": options.batch_size}
    say(0, 4, "routes")
    whole = masked_forward(model, image, noise[:1], mask_ratio=0.0).routes
    say(1, 4, "other experts")
    others = alternatives(model, image[0], noise, **asked)
    usual, neighbours, compared = [], [], 0
    if job.train is not None:
        say(2, 4, "reading training images")
        sample = spread_out(job.train, options.train)
        compared = len(sample.ids)
        if compared:
            say(3, 4, "training images")
            known = center(sample.images.to(device), config.img_size, config.in_chans)
            names = job.train.modalities
            of_each = torch.rand(compared, patches, generator=generator).to(device)
            routes = masked_forward(model, known, of_each, **asked).routes
            for name, sets in zip(names, usual_sets(routes, sample.modality, len(names)), strict=True):
                if sets is not None:
                    losses = loss_with_sets(model, image[0], noise, sets, **asked)
                    usual.append(Usual(name, change(losses, others.own), sets))
            neighbours = _nearest(job, model, image, known, sample)
        else:
            job.notes.append("No training images are shown: the data set has none that can be read")
    say(4, 4, "done")
    return Explanation(
        run=job.run,
        step=job.loaded.step,
        file=job.file.name,
        label=job.found.labels[job.place],
        labels=job.found.labels,
        modality=job.found.modality,
        image=job.found.images[job.place],
        whole=whole,
        alternatives=others,
        usual=usual,
        neighbours=neighbours,
        compared=compared,
        notes=job.notes,
    )


def similarities(one: maps.Tokens, others: maps.Tokens) -> Tensor:
    """Mean of the cosines of CLS tokens and of means of patches, ``[n]``, once the others' mean is taken away: without
    that, a common offset makes all images alike."""
    found = []
    for a, b in ((one.cls, others.cls), (one.patches.mean(1), others.patches.mean(1))):
        found.append(F.cosine_similarity(a.double() - b.double().mean(0), b.double() - b.double().mean(0), dim=1))
    return sum(found) / len(found)


def _nearest(job: Job, model: torch.nn.Module, image: Tensor, known: Tensor, sample: Sample) -> list[Neighbour]:
    batch = job.options.batch_size
    like = similarities(maps.tokens(model.encoder, image), maps.tokens(model.encoder, known, batch_size=batch))
    nearest = like.argsort(descending=True)[: job.options.neighbours]
    some = nearest.to(known.device)
    none = torch.zeros(len(nearest), model.encoder.patches, device=known.device)
    routes = masked_forward(model, known[some], none, mask_ratio=0.0, batch_size=batch).routes
    return [
        Neighbour(
            sample.ids[i],
            job.train.modalities[int(sample.modality[i])],
            float(like[i]),
            sample.images[i],
            [experts[row].tolist() for experts in routes.experts],
        )
        for row, i in enumerate(nearest.tolist())
    ]
