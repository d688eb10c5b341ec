"""What a pretraining cost, as far as its run says it, and whether two cost the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dex.config import per_layer
from dex.inference.load import Loaded
from dex.sizing.estimate import training_flops
from dex.train.runlog import STARTS

TOLERANCE = 0.05
"""Share by which active parameters and operations of runs of equal compute may differ."""


class Compute(NamedTuple):
    name: str
    steps: int
    images: int
    """Shown in all steps together; 0 for a random start."""
    parameters: int
    """Of the encoder."""
    active: int
    """Of them, those that an image's way through the encoder takes."""
    operations: int
    """Of all steps, by `dex.sizing.estimate.training_flops`: matrix products but the director's."""
    director: int
    """The director's operations, which a control without one does not have."""
    data: str
    """Fingerprint of the pretraining set; "" where the run does not say it."""


def of_run(name: str, loaded: Loaded, random_start: bool = False) -> Compute:
    """Of a pretrained run; with a random start nothing of its training counts."""
    config, encoder = loaded.config, loaded.encoder
    sizes = {name: parameter.numel() for name, parameter in encoder.named_parameters()}
    unused = 0.0
    experts, chosen = (per_layer(v, config.model.depth) for v in (config.model.num_experts, config.model.top_k))
    for layer, (count, k) in enumerate(zip(experts, chosen, strict=True)):
        if not count:
            continue
        of_layer = {key: size for key, size in sizes.items() if key.startswith(f"blocks.{layer}.")}
        unused += sum(size for key, size in of_layer.items() if ".director" in key)
        unused += sum(size for key, size in of_layer.items() if ".experts" in key) * (1 - k / count)
    steps = 0 if random_start else loaded.step
    images, operations = steps * config.data.batch_size, training_flops(config)
    directors = operations.pop("directors")
    return Compute(
        name,
        steps,
        images,
        sum(sizes.values()),
        round(sum(sizes.values()) - unused),
        images * sum(operations.values()),
        images * directors,
        "" if random_start else _fingerprint(loaded.folder),
    )


def _fingerprint(folder: Path) -> str:
    for place in (folder, *folder.parents[:2]):
        path = place / STARTS
        if path.is_file():
            try:
                return str(json.loads(path.read_text(encoding="utf-8"))["starts"][-1]["data"]["fingerprint"])
            except (OSError, ValueError, LookupError, TypeError):
                return ""
    return ""


def differences(a: Compute, b: Compute) -> tuple[str, ...]:
    """In what two pretrainings differ that a comparison at equal compute keeps equal; () where they cost the same."""
    return tuple(_differences(a, b))


def sentences(a: Compute, b: Compute) -> list[str]:
    """What a reader of a comparison must know of what the two sides cost."""
    unequal = differences(a, b)
    said = []
    if unequal:
        said.append(f"The two are not of equal compute ({'; '.join(unequal)}): what differs may be that.")
    else:
        said.append(
            f"Equal compute: {a.images:,} images in {a.steps:,} steps each, {a.active:,} and {b.active:,} active "
            "parameters."
        )
    for one in (a, b):
        if one.director:
            share = one.director / (one.operations + one.director)
            said.append(
                f"Of the operations of {one.name}'s pretraining {share:.0%} are its directors', on top of these."
            )
    if not a.data or not b.data:
        silent = " and ".join(one.name for one in (a, b) if not one.data)
        said.append(f"Which images {silent} was pretrained on is not known.")
    return said


def _differences(a: Compute, b: Compute) -> Iterator[str]:
    for field, title in (("images", "images seen"), ("steps", "steps")):
        first, second = getattr(a, field), getattr(b, field)
        if first != second:
            yield f"{title}: {first:,} and {second:,}"
    for field, title in (("active", "active parameters"), ("operations", "operations of pretraining")):
        first, second = getattr(a, field), getattr(b, field)
        if max(first, second) > (1 + TOLERANCE) * min(first, second):
            yield f"{title}: {first:.4g} and {second:.4g}"
    if a.data != b.data and a.data and b.data:
        yield "pretraining set: not the same images"
