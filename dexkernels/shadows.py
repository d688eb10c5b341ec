"""Shadows: what a layer computes with under autocast, low-precision copies of its float32 weights (the masters)."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .records import MLPWeights


class Held(NamedTuple):
    """Shadows, and what they were made of."""

    masters: list[tuple[int, StorageWeakRef, int]]
    """Of each tensor: its id, its storage, its version. Weak: they keep no memory, and no address is given again.

    No weak reference to the tensor itself: torch could not swap it for another one then.
    """
    dtype: torch.dtype
    stream: int
    """On which they were made: another one would read them before they are written."""
    copies: MLPWeights


class Shadows:
    """The shadows of one layer: made in every forward, and kept from one to the next inside `hold_weights` alone.

    There they are made again when a master is another tensor, or has another storage or version. A write through
    ``.data`` and a fused optimizer of torch change none of these: they break the promise of `hold_weights`. A forward
    in a CUDA graph makes its own, in the graph.
    """

    def __init__(self):
        self._held: Held | None = None
        self._holders = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A copy of a layer, or one that is loaded, makes its own.
        return Shadows, ()

    def of(self, masters: MLPWeights, director: MLPWeights | None, dtype: torch.dtype) -> MLPWeights | None:
        """A copy in ``dtype`` of each master ``[E, ...]``; with a director's tensors ``[E + 1, ...]``, those last.

        None when the masters are of ``dtype`` themselves. Outside of autograd: the operators give the masters their
        gradients, in the masters' own dtype.
        """
        if all(w.dtype == dtype for w in masters):
            return None
        if torch.compiler.is_compiling() or not self._holders:
            return _copies(masters, director, dtype)
        tensors = [*masters, *(director or ())]
        device = tensors[0].device
        if capturing(device) or any(t.is_inference() or _is_wrapped(t) for t in tensors):
            return _copies(masters, director, dtype)
        stream = stream_of(device)
        held = self._held  # read once: another thread may replace it meanwhile
        if held is None or (held.dtype, held.stream) != (dtype, stream) or not _is_same(held.masters, tensors):
            seen = [(id(t), StorageWeakRef(t.untyped_storage()), t._version) for t in tensors]
            held = self._held = Held(seen, dtype, stream, _copies(masters, director, dtype))
        return held.copies

    def hold(self, more: int) -> None:
        """Begin (1) or end (-1) a time in which the masters stay as they are."""
        self._holders += more
        self._held = None


@contextlib.contextmanager
def hold_weights(model: nn.Module) -> Iterator[None]:
    """A promise that no weight changes inside: forwards of `DEXLayer` under autocast share one copy of the experts.

    For steps of several forwards, such as those that accumulate gradients over micro-batches; without it each of
    them makes its own copy. The copies of all layers live until the end of the block. Forwards in a CUDA graph or
    under torch.compile make their own copies.
    """
    shadows = [module.shadows for module in model.modules() if isinstance(getattr(module, "shadows", None), Shadows)]
    for s in shadows:
        s.hold(1)
    try:
        yield
    finally:
        for s in shadows:
            s.hold(-1)


def shadowed(weights: MLPWeights, shadows: MLPWeights) -> MLPWeights:
    """What is computed with: ``shadows``, or ``weights`` when there are none and each of them is None."""
    return weights if shadows.fc1_weight is None else shadows


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _is_same(seen: list[tuple[int, StorageWeakRef, int]], tensors: Sequence[Tensor]) -> bool:
    return len(seen) == len(tensors) and all(
        address == id(t) and storage.cdata == t.untyped_storage()._cdata and version == t._version
        for (address, storage, version), t in zip(seen, tensors, strict=True)
    )


def _is_wrapped(t: Tensor) -> bool:
    """Whether it is one of torch.func's, such as vmap's, which have no storage and no operators of lists."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)


def _copies(masters: MLPWeights, director: MLPWeights | None, dtype: torch.dtype) -> MLPWeights:
    if torch.compiler.is_compiling():
        return _copy(masters, director, dtype, one_by_one=False)
    # Made in inference mode they could not be saved for a backward later.
    with torch.inference_mode(False):
        return _copy(masters, director, dtype, one_by_one=any(map(_is_wrapped, (*masters, *(director or ())))))


@torch.no_grad()
def _copy(masters: MLPWeights, director: MLPWeights | None, dtype: torch.dtype, *, one_by_one: bool) -> MLPWeights:
    more = director is not None
    copies = [m.new_empty((m.shape[0] + more, *m.shape[1:]), dtype=dtype) for m in masters]
    to = [c[: m.shape[0]] for c, m in zip(copies, masters, strict=True)]
    to, of = to + [c[-1] for c in copies] * more, [*masters, *(director or ())]
    if one_by_one:
        for c, m in zip(to, of, strict=True):
            c.copy_(m)
    else:
        torch._foreach_copy_(to, of)
    return MLPWeights(*copies)
