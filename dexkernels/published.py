"""Loading and saving under the published parameter names, for a layer and for models of layers."""

from collections.abc import Mapping

import torch
from torch import Tensor


class PublishedNames:
    """A mixin for modules that map the published names to their tensors."""

    def reference_tensors(self) -> dict[str, Tensor]:
        """Published name -> the matching tensor, or view of one, in this module (not a copy)."""
        raise NotImplementedError

    def load_reference_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load weights under the published names (``experts.<e>.fc1.weight``, ``router.linear.weight``, ...), strictly.

        In a model, names begin with the layer's: ``blocks.<l>.DEX.experts.<e>.fc1.weight``.
        Raises: ValueError naming every missing, unknown or mis-shaped key; nothing is then changed.
        """
        copy_strictly(state, self.reference_tensors())

    def reference_state_dict(self) -> dict[str, Tensor]:
        """Copies of all weights under the published names."""
        return {name: t.detach().clone() for name, t in self.reference_tensors().items()}


@torch.no_grad()
def copy_strictly(state: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copy each tensor of ``state`` to the target of the same name; ValueError, and no change, unless all match."""
    if not isinstance(state, Mapping):
        raise ValueError(f"state: expected a mapping of names to tensors, got {type(state).__name__}")
    wrong = [f"missing {k}" for k in targets if k not in state] + [f"unknown {k}" for k in state if k not in targets]
    for k, t in targets.items():
        if k in state and not isinstance(state[k], Tensor):
            wrong.append(f"{k}: expected a tensor, got {type(state[k]).__name__}")
        elif k in state and (state[k].is_complex() or state[k].is_meta):
            wrong.append(f"{k}: expected real numbers, got {state[k].dtype} on {state[k].device}")
        elif k in state and state[k].shape != t.shape:
            wrong.append(f"{k}: expected shape {list(t.shape)}, got {list(state[k].shape)}")
    if wrong:
        more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError("state: " + "; ".join(wrong[:20]) + more)
    for k, t in targets.items():
        t.copy_(state[k])
