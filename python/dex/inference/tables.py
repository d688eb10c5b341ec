"""Features as tables: Parquet parts, or one NumPy archive. pyarrow is imported only here.

One row per image. Columns: those of ``dex.inference.collection.Row``; ``cls`` and ``patches`` (float32 lists of the
width); ``layer_03`` for chosen blocks; ``experts_03`` (int32) and ``gates_03`` (float32), lists of K, for DEX layers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dex.common import atomic
from dex.inference.collection import Row
from dex.inference.embed import Embedding


def columns(embedding: Embedding) -> dict[str, np.ndarray]:
    """The numeric columns of a table: name -> array ``[n, width]``."""
    named = {"cls": embedding.cls, "patches": embedding.patches}
    named |= {f"layer_{layer:02d}": tokens for layer, tokens in embedding.layers.items()}
    for number, (indices, gates) in enumerate(zip(embedding.expert_indices, embedding.gates, strict=True)):
        named |= {f"experts_{number:02d}": indices, f"gates_{number:02d}": gates}
    return {name: tensor.numpy() for name, tensor in named.items()}


def write_parquet(path: Path, rows: Sequence[Row], embedding: Embedding) -> None:
    import pyarrow
    import pyarrow.parquet

    table: dict[str, Any] = {name: [getattr(row, name) for row in rows] for name in Row._fields}
    arrays = {name: pyarrow.array(values, pyarrow.string()) for name, values in table.items()}
    for name, values in columns(embedding).items():
        flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
        arrays[name] = pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
    with atomic.writing(path, sync=True) as file:
        pyarrow.parquet.write_table(pyarrow.table(arrays), file)


def count_rows(path: Path) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(path).num_rows


def write_npz(path: Path, rows: Sequence[Row], embedding: Embedding) -> None:
    """Text has a fixed width, so ``numpy.load`` reads the file without pickle."""
    text = {name: np.array([getattr(row, name) for row in rows], dtype=np.str_) for name in Row._fields}
    stream = io.BytesIO()
    np.savez(stream, **text, **columns(embedding))
    atomic.write(path, stream.getvalue(), sync=True)
