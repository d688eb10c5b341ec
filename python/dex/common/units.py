"""Human-readable durations and bytes."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """``59s``, ``3m05s``, ``2h07m``, ``4d03h``."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def format_bytes(count: float) -> str:
    """``812 B``, ``4 kB``, ``310 MB``, ``1,024.5 GB``; powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:,.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
