"""Earlier name of ``dex.train.checkpoint``."""

from dex.train.checkpoint import Checkpoint, CheckpointError, load, tensors, verify

__all__ = ["Checkpoint", "CheckpointError", "load", "tensors", "verify"]
