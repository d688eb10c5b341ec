#!/usr/bin/env python3
"""One run of the study: trains a `Spec`, measures it, and prints its row as JSON.

usage: python scripts/study_run.py DATA SPEC     (scripts/study.py starts these; SPEC is JSON, DATA may be "embedded")
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "python"), str(ROOT)]

from study_arms import BASE, K_WARMUP, TINY, Spec, joined, read_spec  # noqa: E402

from dex.analysis import information  # noqa: E402
from dex.analysis.examine import features  # noqa: E402
from dex.analysis.maps import tokens  # noqa: E402
from dex.analysis.routes import Masked, Override, Routes, masked_forward, sets_of  # noqa: E402
from dex.analysis.sample import Sample, spread_out  # noqa: E402
from dex.analysis.source_probe import leave_sources_out  # noqa: E402
from dex.analysis.swap import KINDS, swapped  # noqa: E402
from dex.config import Config, from_dict  # noqa: E402
from dex.data import center, open_dataset  # noqa: E402
from dex.data.dataset import SPLITS, Dataset, View  # noqa: E402
from dex.model import MaskedAutoencoder  # noqa: E402
from dex.model.weights import load_pretrained  # noqa: E402
from dex.train.plan import resolve  # noqa: E402
from dex.train.trainer import Trainer  # noqa: E402

MASKS = 4
"""Masks under which each held-out image is measured."""
HELD_OUT, PROBED = 256, 512
_SEED = 0x57D1


class Half(View):
    """Some sources of a data set, with its splits."""

    def split(self, name: str) -> Dataset:
        if name not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {name!r}")
        member = self._base._in_split(name)
        return View(self._base, [i for i in self._indices if member[i]], f"{self.label}/{name}")


def source_of(name: str) -> str:
    """The source in an image's id; in a plain folder each image is its own source."""
    return name.split("/")[0]


def half_of(dataset: Dataset, half: int) -> Half:
    """Every other source of each modality, in order of their names."""
    names = [source_of(dataset.sample_id(i)) for i in range(len(dataset))]
    modality = dataset.modality_index()
    modality_of: dict[str, int] = {}
    for i, name in enumerate(names):
        modality_of.setdefault(name, int(modality[i]))
    chosen: set[str] = set()
    for m in sorted(set(modality_of.values())):
        chosen |= set(sorted(name for name, kind in modality_of.items() if kind == m)[half::2])
    return Half(dataset, [i for i, name in enumerate(names) if name in chosen], f"half {half}")


def configuration(spec: Spec) -> Config:
    values = joined(BASE, TINY if spec.tiny else {}, spec.arm.changes)
    if spec.tiny:
        values["model"]["top_k"] = min(values["model"]["top_k"], 4)
    values = joined(values, {"run": {"seed": spec.seed}, "schedule": {"steps": spec.steps}})
    return from_dict(values, Config(), f"arm {spec.arm.name}")


def prepare(model: MaskedAutoencoder, spec: Spec) -> None:
    """Apply the changes of an arm that the configuration has no field for."""
    for layer in model.encoder.dex_layers:
        if spec.arm.routing == "token":
            layer.routing = "token"
            layer.register_forward_pre_hook(_noise_for_tokens, with_kwargs=True)
        if spec.arm.routing == "random":
            with torch.no_grad():
                layer.router_weight.zero_()
            # With a gradient of zeros, neither AdamW nor its decay moves a weight of 0.
            layer.router_weight.register_hook(torch.zeros_like)


def _noise_for_tokens(layer: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Replace the trainer's noise per image with noise per token, ``[B, N, E]``."""
    if kwargs.get("router_noise") is not None:
        kwargs = kwargs | {"router_noise": torch.randn(*args[0].shape[:2], layer.num_experts)}
    return args, kwargs


def train(
    spec: Spec, dataset: Dataset, parent: int | None, look: Callable[[MaskedAutoencoder], None] = lambda model: None
) -> tuple[Trainer, list[list[float]]]:
    """Train a run.

    Args:
        spec: the run.
        dataset: training data.
        parent: process to exit with, so that a killed study leaves no running processes.
        look: called with the model at step 0.

    Returns: the trainer after its last step, and ``[step, loss]`` of twenty intervals.
    """
    torch.manual_seed(_SEED + spec.seed)
    config = configuration(spec)
    trainer = Trainer(resolve(config, dataset))
    if spec.arm.upcycled:
        load_pretrained(trainer.model, dense(spec, dataset, parent))
    prepare(trainer.model, spec)
    look(trainer.model)
    layers = trainer.model.encoder.dex_layers
    chosen, curve = [layer.top_k for layer in layers], []
    every = max(1, spec.steps // 20)
    for step in range(spec.steps):
        for layer, k in zip(layers, chosen, strict=True):
            layer.top_k = (spec.arm.warm_k or k) if step < K_WARMUP * spec.steps else k
        trainer.train_step()
        if (step + 1) % every == 0:
            curve.append([step + 1, trainer.row()["loss"]])
            if parent is not None and os.getppid() != parent:
                raise SystemExit("the parent process has exited")
    trainer.flush()
    return trainer, curve


def dense(spec: Spec, dataset: Dataset, parent: int | None) -> dict[str, Tensor]:
    """Weights, by published name, of a dense MAE: MLPs of an expert's size, trained for as many steps, same seed."""
    from dataclasses import replace

    changes = joined(spec.arm.changes, {"model": {"num_experts": 0, "top_k": 1}})
    other = replace(spec, arm=replace(spec.arm, changes=changes, upcycled=False))
    trainer, _ = train(other, dataset, parent)
    trainer.close()
    return {name: t.detach().clone() for name, t in trainer.model.reference_state_dict().items()}


def random_routes(model: MaskedAutoencoder, images: int, seed: int) -> Routes:
    """Routes from noise alone, as in training: gates of the K largest probabilities."""
    generator = torch.Generator().manual_seed(seed)
    gates, experts, probabilities = [], [], []
    for layer in model.encoder.dex_layers:
        p = torch.softmax(torch.randn(images, layer.num_experts, generator=generator) / layer.temperature, -1)
        top = p.topk(layer.top_k, 1)
        gates.append(top.values / top.values.sum(1, keepdim=True))
        experts.append(top.indices.int())
        probabilities.append(p)
    return Routes(gates, experts, probabilities)


def measure(spec: Spec, model: MaskedAutoencoder, config: Config, held_out: Sample) -> dict[str, Any]:
    """Sums by source, over images and masks, of the loss and its rise with others' experts; information by layer."""
    images = center(held_out.images, config.model.img_size)
    routed = bool(model.encoder.dex_layers) and spec.arm.routing != "token"
    sources: dict[str, dict[str, float]] = {}
    by_mask: list[list[float]] = []
    for mask in range(MASKS):
        noise = torch.rand(len(images), (config.model.img_size // config.model.patch_size) ** 2,
                           generator=torch.Generator().manual_seed(_SEED + mask))  # fmt: skip
        random = random_routes(model, len(images), mask) if spec.arm.routing == "random" else None

        def under(overrides: Sequence[Override | None] | None, noise: Tensor = noise) -> Masked:
            ratio = config.model.mask_ratio
            return masked_forward(model, images, noise, mask_ratio=ratio, overrides=overrides)

        own = under(None if random is None else _as_overrides(random))
        columns = {"loss": own.loss}
        if routed:
            own = own if random is None else own._replace(routes=random)
            swap = swapped(lambda o, under=under: under(o).loss, own, held_out.modality, layers_apart=False, seed=mask)
            columns |= {kind: swap.given[k, -1] - swap.own for k, kind in enumerate(KINDS)}
            columns["beyond"] = swap.given[1, -1] - swap.given[0, -1]
            by_mask.append([information.information(sets_of(e), held_out.modality).value for e in own.routes.experts])
        for name, values in columns.items():
            for image, value in zip(held_out.ids, values.tolist(), strict=True):
                row = sources.setdefault(source_of(image), {})
                if math.isfinite(value):  # NaN: there is no partner, or the run diverged.
                    row[name] = row.get(name, 0.0) + value
                    row[f"{name} of"] = row.get(f"{name} of", 0) + 1
    by_layer = [sum(layer) / len(layer) for layer in zip(*by_mask, strict=True)]
    return {"sources": sources, "information": by_layer}


def _as_overrides(routes: Routes) -> list[Override]:
    return [Override(g, e) for g, e in zip(routes.gates, routes.experts, strict=True)]


def probe(model: MaskedAutoencoder, config: Config, probed: Sample) -> list[float] | None:
    """Accuracy of a linear probe with sources left out: value, low, high."""
    x = features(tokens(model.encoder, center(probed.images, config.model.img_size)))
    names = [source_of(name) for name in probed.ids]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    interval = leave_sources_out(x, probed.modality, torch.tensor([number[name] for name in names]))
    return interval and list(interval)


def row_of(spec: Spec, data: str | None, parent: int | None = None) -> dict[str, Any]:
    """The row of a run."""
    torch.set_num_threads(1)
    dataset = open_dataset(data)
    if spec.half is not None:
        dataset = half_of(dataset, spec.half)
    held_out, probed = spread_out(dataset.split("val"), HELD_OUT), spread_out(dataset, PROBED)
    began = time.process_time()
    at_start: dict[str, Any] = {}
    config = configuration(spec)

    def look(model: MaskedAutoencoder) -> None:
        at_start.update(measure(spec, model, config, held_out))

    trainer, curve = train(spec, dataset, parent, look)
    seconds = time.process_time() - began
    model = trainer.model.eval()
    row = {"key": spec.key, "arm": spec.arm.name, "seed": spec.seed, "steps": spec.steps, "half": spec.half}
    row |= {"tiny": spec.tiny, "training_cpu_s": seconds, "curve": curve}
    row |= measure(spec, model, config, held_out)
    row["finite"] = all(math.isfinite(loss) for _, loss in curve if loss is not None) and bool(row["sources"])
    row["probe"] = probe(model, config, probed) if row["finite"] else None
    row["information at step 0"] = at_start["information"]
    trainer.close()
    return row | {"cpu_s": time.process_time() - began}


def main(data: str, spec: str) -> None:
    row = row_of(read_spec(json.loads(spec)), None if data == "embedded" else data, os.getppid())
    print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
