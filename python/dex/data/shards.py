"""A data set from a shard set; ``shard_format`` describes its files.

Images are read by the index, without the tar headers. Opening a set checks the manifest against its hash, every index
against its hash and every offset against the size of the shard. Each image is checked against its hash when it is read;
``verify`` checks everything.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from . import images
from .dataset import SPLITS, Dataset, SampleError, Withdrawal, raise_if_exhausted
from .shard_format import KINDS, MANIFEST, check_file_size, read_bytes, read_manifest, reason_of
from .shard_index import read_rows


class ShardDataset(Dataset):
    """A shard set, opened for reading; see ``open_dataset``.

    ValueError names the file and the fault if manifest, indices and shards do not match each other.
    Memory per sample: 62 bytes and its id, in two buffers that the workers of a loader share. Indices are read one
    after the other; opening needs twice that memory for a moment.
    """

    def __init__(self, root: str | Path):
        self.root: Path = Path(root).resolve(strict=True)
        manifest, raw = read_manifest(self.root)
        self.manifest: dict[str, Any] = manifest
        self.name: str = manifest["name"]
        self.image_size: int = manifest["image_size"]
        self.fingerprint: str = hashlib.sha256(raw).hexdigest()
        self.withdrawals: tuple[Withdrawal, ...] = tuple(
            Withdrawal(entry["date"], entry["images"], entry["before"]) for entry in manifest.get("withdrawals", ())
        )
        rows = manifest["modalities"]
        self.modalities: tuple[str, ...] = tuple(row["name"] for row in rows if not row["empty"])
        self.empty_modalities: tuple[str, ...] = tuple(row["name"] for row in rows if row["empty"])

        number = {name: index for index, name in enumerate(self.modalities)}
        parts = []
        ids = bytearray()
        for shard_number, entry in enumerate(manifest["shards"]):
            check_file_size(self.root, entry["file"], entry["bytes"])
            part, part_ids = read_rows(self.root, entry, number)
            part["shard"] = shard_number
            part["id_end"] += len(ids)
            parts.append(part)
            ids += part_ids
        self._rows = np.concatenate(parts)
        parts.clear()
        self._ids = bytes(ids)
        for row in rows:
            for split in SPLITS:
                of_modality = self._rows["modality"] == number.get(row["name"], -1)
                count = int((of_modality & (self._rows["val"] == (split == "val"))).sum())
                if count != row[split]:
                    raise ValueError(
                        f"{MANIFEST}: expected {row[split]} {split} samples of {row['name']!r}, "
                        f"got {count} in the indices"
                    )

    def __len__(self) -> int:
        return len(self._rows)

    def sample_id(self, index: int) -> str:
        index = self._check_index(index)
        start = int(self._rows["id_end"][index - 1]) if index else 0
        return self._ids[start : int(self._rows["id_end"][index])].decode()

    def modality_index(self) -> np.ndarray:
        return self._rows["modality"].astype(np.int64)

    def _in_split(self, name: str) -> np.ndarray:
        return self._rows["val"] == (name == "val")

    def image_bytes(self, index: int) -> bytes:
        """The encoded image of sample ``index``. SampleError: it cannot be read or differs from its hash."""
        row = self._rows[self._check_index(index)]
        entry = self.manifest["shards"][int(row["shard"])]
        try:
            data = read_bytes(self.root, entry["file"], int(row["offset"]), int(row["size"]))
        except (OSError, ValueError) as error:
            raise_if_exhausted(error)
            raise SampleError(self.sample_id(index), f"{entry['file']}: {reason_of(error)}") from error
        if hashlib.sha256(data).digest() != row["sha256"].tobytes():
            raise SampleError(self.sample_id(index), f"{entry['file']}: sha256 of its bytes differs from the index")
        return data

    def read(self, index: int, out: np.ndarray) -> tuple[int, str]:
        data = self.image_bytes(index)
        sample_id, row = self.sample_id(index), self._rows[index]
        try:
            image, maximum = images.decode_with_maximum(data, KINDS[int(row["kind"])])
            if image.size != (self.image_size, self.image_size):
                raise ValueError(
                    f"size: expected {self.image_size} x {self.image_size}, got {image.width} x {image.height}"
                )
        except ValueError as error:
            raise SampleError(sample_id, str(error)) from error
        self.note_maximum(sample_id, maximum)
        images.to_planes(image, out)
        return int(row["modality"]), sample_id
