"""The model card of an exported model: what it is, what it was trained on, how it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dex.inference.load import Loaded
from dex.train.runlog import METRICS, STARTS, read_rows

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
([arXiv 2605.21861](https://arxiv.org/abs/2605.21861)), trained with dexkernels. It gives features, makes no diagnosis
and has not been validated for clinical use.

| | |
| --- | --- |
{model}

## Training

| | |
| --- | --- |
{training}
{data}
## Use

```python
import dex

model = dex.load("FOLDER")  # this folder
features = model.embed("scan.dcm").cls  # [slices, {width}]; pictures, NIfTI with modality="MR", arrays
```

Images are square, RGB or grey, and normalised as in training: `model.preprocess` reads files, `dex.data.center`
normalises arrays. The weights in `model.safetensors` hold no pickle; `config.json` has their SHA-256 and every field of
the training configuration but the place of the data.
"""


def model_card(loaded: Loaded) -> str:
    """Markdown; names no file, folder, person or machine."""
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
        "images": f"{m.img_size} x {m.img_size} pixels, patches of {m.patch_size}",
        "computes with": loaded.path,
    }
    run = loaded.folder.parent.parent
    training = {"steps": f"{loaded.step:,}", "images per step": f"{loaded.config.data.batch_size:,}"}
    training |= {"modalities": ", ".join(loaded.modalities) or "not recorded"}
    training |= _evaluation(run, loaded.step)
    return _CARD.format(
        title=f"DEX ViT {m.embed_dim}/{m.depth}/{m.num_heads}",
        model=_rows(model),
        training=_rows(training),
        data=_data(run),
        width=m.embed_dim,
    )


def _evaluation(run: Path, step: int) -> dict[str, str]:
    """The last evaluation on held-out images up to the checkpoint."""
    rows = [row for row in read_rows(run / METRICS) if "val_loss" in row and row.get("step", 0) <= step]
    if not rows:
        return {}
    row = rows[-1]
    said = {"held-out loss": f"{row['val_loss']:.4f} at step {row['step']:,}"}
    if row.get("probe_knn") is not None:
        said["modality by kNN, held out"] = f"{row['probe_knn']:.1%}"
    return said


def _data(run: Path) -> str:
    try:
        counts: dict[str, Any] = json.loads((run / STARTS).read_text(encoding="utf-8"))["starts"][-1]["data"]["images"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    rows = "\n".join(f"| {name} | {count:,} |" for name, count in counts.items())
    return f"\n| modality | images |\n| --- | --- |\n{rows}\n"


def _rows(values: dict[str, str]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in values.items())


def _numbers(value: int | tuple[int, ...]) -> str:
    return str(value) if isinstance(value, int) else ", ".join(map(str, value))
