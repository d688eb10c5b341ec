"""What a finished or running pretraining is good for: `load` gives the model back."""

from dex.inference.load import Loaded, load

__all__ = ["Loaded", "load"]
