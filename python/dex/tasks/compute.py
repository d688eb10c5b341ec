"""The compute of a pretraining, as recorded by its run, and whether two are equal."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dex.config import per_layer
from dex.inference.load import Loaded
from dex.sizing.estimate import training_flops
from dex.train.runlog import STARTS, data_of

TOLERANCE = 0.05
"""Tolerated relative difference in active parameters and operations of runs of equal compute."""


class Compute(NamedTuple):
    name: str
    steps: int
    images: int
    """Images seen in all steps; 0 for a random start."""
    parameters: int
    """Of the encoder."""
    active: int
    """Parameters of the encoder that one image uses."""
    operations: int
    """Operations of all steps by ``dex.sizing.estimate.training_flops``: matrix products without the directors'."""
    director: int
    """Operations of the directors, which a control does not have."""
    data: str
    """Fingerprint of the pretraining set; "" if the run does not record it."""


def of_run(name: str, loaded: Loaded, random_start: bool = False) -> Compute:
    """The compute of a pretrained run; with ``random_start`` its training does not count."""
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
        if (place / STARTS).is_file():
            return str(data_of(place).get("fingerprint", ""))
    return ""


def differences(a: Compute, b: Compute) -> tuple[str, ...]:
    """The differences between two pretrainings that rule out equal compute; () if there are none."""
    result = []
    for field, title in (("images", "images seen"), ("steps", "steps")):
        first, second = getattr(a, field), getattr(b, field)
        if first != second:
            result.append(f"{title}: {first:,} and {second:,}")
    for field, title in (("active", "active parameters"), ("operations", "operations of pretraining")):
        first, second = getattr(a, field), getattr(b, field)
        if max(first, second) > (1 + TOLERANCE) * min(first, second):
            result.append(f"{title}: {first:.4g} and {second:.4g}")
    if a.data != b.data and a.data and b.data:
        result.append("pretraining set: different images")
    return tuple(result)


def sentences(a: Compute, b: Compute) -> list[str]:
    """Sentences on the compute of the two sides, for readers of a comparison."""
    unequal = differences(a, b)
    result = []
    if unequal:
        result.append(f"Compute is not equal ({'; '.join(unequal)}), which may explain a difference.")
    else:
        result.append(
            f"Equal compute: {a.images:,} images in {a.steps:,} steps each, {a.active:,} and {b.active:,} active "
            "parameters."
        )
    for side in (a, b):
        if side.director:
            share = side.director / (side.operations + side.director)
            total = f"the operations of {side.name}'s pretraining"
            result.append(f"Directors take {share:.0%} of {total}; the comparison leaves these out.")
    if not a.data or not b.data:
        unknown = " and ".join(side.name for side in (a, b) if not side.data)
        result.append(f"The pretraining images of {unknown} are unknown.")
    return result
