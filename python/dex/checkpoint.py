"""The same as `dex.train.checkpoint`, under its earlier name."""

from dex.train.checkpoint import Checkpoint, CheckpointError, load, tensors, verify

__all__ = ["Checkpoint", "CheckpointError", "load", "tensors", "verify"]
