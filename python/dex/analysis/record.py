"""Findings as values for JSON and CSV."""

import math
from typing import Any

import torch

from dex.analysis.examine import Findings

FORMAT, VERSION = "dex-analysis", 1
_LEFT_OUT = ("image_loss",)


def plain(findings: Findings) -> dict[str, Any]:
    """All numbers of ``findings`` except those of single images. A part that was not measured is None."""
    return {name: to_plain(value) for name, value in findings._asdict().items() if name not in _LEFT_OUT}


def to_plain(value: Any) -> Any:
    """Records as mappings, tensors as lists; NaN and infinity, which JSON lacks, as None."""
    if isinstance(value, torch.Tensor):
        return to_plain(value.tolist())
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: to_plain(v) for name, v in value._asdict().items()}
    if isinstance(value, dict):
        return {str(name): to_plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
