"""Shadows: what a layer computes with under autocast, low-precision copies of its float32 weights (the masters)."""

import contextlib
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class Shadows:
    """The shadows of one layer, kept from call to call where nothing can have changed the masters meanwhile.

    Fresh are those whose masters are the same tensors in the same storage at the same version: a state dict, a move to
    another device or most optimizers change one of these. A fused optimizer of torch changes none, nor does writing
    through ``.data``. So a forward whose masters need a gradient, of which an optimizer may make use, leaves none
    behind, except inside `hold_weights`; nor do `DEXLayer.train` and ``eval``. In a CUDA graph they are made in the
    graph, and once a graph holds the layer, whose replays change masters unseen, none are kept any more.
    """

    def __init__(self):
        self._kept: tuple[list, torch.dtype, list[Tensor]] | None = None
        self._held = 0
        self._in_a_graph = False

    def __reduce__(self):
        # A copy of a layer, or one that is loaded, makes its own.
        return Shadows, ()

    def of(
        self, masters: Sequence[Tensor], director: Sequence[Tensor] | None, dtype: torch.dtype, keep: bool
    ) -> list[Tensor]:
        """Of each master ``[E, ...]`` a copy of ``dtype``; with a director's tensors ``[E + 1, ...]``, those last.

        keep: whether no gradient of the masters will be asked for.
        """
        if torch.compiler.is_compiling():
            if not keep:
                self.forget()
            return _copies(masters, director, dtype)
        tensors = [*masters, *(director or ())]
        self._in_a_graph = self._in_a_graph or capturing(tensors[0].device)
        keep = (keep or self._held > 0) and not self._in_a_graph and not any(t.is_inference() for t in tensors)
        if keep and self._kept is not None:
            seen, of_dtype, kept = self._kept
            if of_dtype == dtype and _is_same(seen, tensors):
                return kept
        self.forget()
        # Made in inference mode they could not be saved for a backward later.
        with torch.inference_mode(False):
            copies = _copies(masters, director, dtype)
        if keep:
            self._kept = [(weakref.ref(t), t.untyped_storage()._cdata, t._version) for t in tensors], dtype, copies
        return copies

    def forget(self) -> None:
        self._kept = None

    def hold(self, more: int) -> None:
        """Begin (1) or end (-1) a time in which the masters stay as they are."""
        self._held += more
        self.forget()


@contextlib.contextmanager
def hold_weights(model: nn.Module) -> Iterator[None]:
    """A promise that no weight changes inside: forwards of `DEXLayer` under autocast share one copy of the experts.

    For steps of several forwards, such as those that accumulate gradients over micro-batches; without it each of
    them makes its own copy. The copies of all layers live until the end of the block.
    """
    shadows = [module.shadows for module in model.modules() if isinstance(getattr(module, "shadows", None), Shadows)]
    for s in shadows:
        s.hold(1)
    try:
        yield
    finally:
        for s in shadows:
            s.hold(-1)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_same(seen: list, tensors: Sequence[Tensor]) -> bool:
    return len(seen) == len(tensors) and all(
        ref() is t and storage == t.untyped_storage()._cdata and version == t._version
        for (ref, storage, version), t in zip(seen, tensors, strict=True)
    )


@torch.no_grad()
def _copies(masters: Sequence[Tensor], director: Sequence[Tensor] | None, dtype: torch.dtype) -> list[Tensor]:
    more = director is not None
    copies = [m.new_empty((m.shape[0] + more, *m.shape[1:]), dtype=dtype) for m in masters]
    to = [c[: m.shape[0]] for c, m in zip(copies, masters, strict=True)]
    torch._foreach_copy_(to + [c[-1] for c in copies] * more, [*masters, *(director or ())])
    return copies
