"""The processor cores that this process may use."""

import os


def cores() -> int:
    """Number of cores that this process may use; of the whole machine where the system sets no such limit (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
