"""The model card of an exported model: architecture, training data, results, use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dex.common.shapes import height_width
from dex.inference.load import Loaded
from dex.train.runlog import METRICS, data_of, read_rows

_CARD = """---
library_name: dexkernels
pipeline_tag: image-feature-extraction
tags:
- medical-imaging
- mixture-of-experts
- masked-autoencoder
---

# {title}

A masked autoencoder with a Director-Experts (DEX) vision transformer
([arXiv 2605.21861](https://arxiv.org/abs/2605.21861)), trained with dexkernels. It computes features of images, makes
no diagnosis and has not been validated for clinical use.

| | |
| --- | --- |
{model}

## Intended use

Research: features of medical images for probes, retrieval and clustering, or a starting point for fine-tuning. Not for
diagnosis, triage or any other decision about a patient.

## Training

| | |
| --- | --- |
{training}
{data}
## Measured

{measured}
The held-out images come from the same sources as the training images; no other data was tested.

**No downstream study.** Performance of the features on labelled tasks, compared with a control of equal size, was not
measured. `dex probe` evaluates them on your own images.

## Limits

- Modalities, devices, sites and patients other than those of the training data are untested; age, sex and origin of
  the patients are not recorded.
- Volumes are processed slice by slice, images at {size} pixels; details smaller than a pixel are lost.
- The expert that an image is routed to depends on its appearance; it is not a clinical finding.

## Licence

No licence is stated for these weights. If you publish them, choose one; you are bound by the licences of the training
data. {licences}
## Use

```python
import dex

model = dex.load("FOLDER")  # this folder
features = model.embed("scan.dcm").cls  # [slices, {width}]; also pictures, NIfTI with modality="MR", arrays
```

Images are square, RGB or grey, and normalised as in training: `model.preprocess` reads files, `dex.data.center`
normalises arrays. The weights in `model.safetensors` contain no pickle; `config.json` has their SHA-256 and every field
of the training configuration except the location of the data.
"""


_EMBEDDED = "The training data were the small set in the package dexkernels, which lists its sources and licences.\n"
_OWN = "They are not recorded here; the data card of a set that `dex prepare` wrote lists them.\n"


def model_card(loaded: Loaded) -> str:
    """The card as Markdown; it names no file, folder, person or machine."""
    m = loaded.config.model
    experts = (
        f"{_numbers(m.num_experts)} per layer, {_numbers(m.top_k)} per image"
        if loaded.encoder.dex_layers
        else "none: the monolithic control"
    )
    parameters = sum(p.numel() for p in loaded.encoder.parameters())
    model = {
        "encoder": f"width {m.embed_dim}, {m.depth} layers, {m.num_heads} heads, {parameters:,} parameters",
        "experts": experts,
        "images": " x ".join(map(str, height_width(m.img_size))) + f" pixels, patches of {m.patch_size}",
        "computes with": loaded.path,
    }
    run = loaded.folder.parent.parent
    training = {"steps": f"{loaded.step:,}", "images per step": f"{loaded.config.data.batch_size:,}"}
    training |= {"modalities": ", ".join(loaded.modalities) or "not recorded"}
    embedded = data_of(run).get("name") == "embedded" and loaded.config.data.path is None
    return _CARD.format(
        title=f"DEX ViT {m.embed_dim}/{m.depth}/{m.num_heads}",
        model=_rows(model),
        training=_rows(training),
        data=_data(run),
        measured=_evaluation(run, loaded.step),
        size=" x ".join(map(str, height_width(m.img_size))),
        licences=_EMBEDDED if embedded else _OWN,
        width=m.embed_dim,
    )


def _evaluation(run: Path, step: int) -> str:
    """The last evaluation on held-out images up to the checkpoint, beside the one before training."""
    rows = [row for row in read_rows(run / METRICS) if "val_loss" in row and row.get("step", 0) <= step]
    if not rows:
        return "Nothing was measured on held-out images.\n"
    last, first = rows[-1], rows[0] if rows[0]["step"] == 0 and len(rows) > 1 else {}
    lines = [f"| on held-out images | step {last['step']:,} | before training |", "| --- | --- | --- |"]
    lines.append(_measured("reconstruction loss", last, first, "val_loss", ".4f"))
    if last.get("probe_knn") is not None:
        lines.append(_measured("kNN accuracy of the modality", last, first, "probe_knn", ".1%"))
    losses = last.get("val_modality_loss") or {}
    before = first.get("val_modality_loss") or {}
    lines += [_measured(f"reconstruction loss, {name}", losses, before, name, ".4f") for name in losses]
    return "\n".join(lines) + "\n"


def _measured(title: str, last: dict[str, Any], first: dict[str, Any], name: str, form: str) -> str:
    before = first.get(name)
    return f"| {title} | {last[name]:{form}} | {'not measured' if before is None else f'{before:{form}}'} |"


def _data(run: Path) -> str:
    start = data_of(run)
    try:
        rows = "\n".join(f"| {name} | {count:,} |" for name, count in start["images"].items())
        return f"\n| modality | images |\n| --- | --- |\n{rows}\n\nFingerprint of the data: `{start['fingerprint']}`.\n"
    except (LookupError, TypeError, AttributeError, ValueError):
        return ""


def _rows(values: dict[str, str]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in values.items())


def _numbers(value: int | tuple[int, ...]) -> str:
    return str(value) if isinstance(value, int) else ", ".join(map(str, value))
