"""Shadows: what a layer computes with under autocast, low-precision copies of its float32 weights (the masters)."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


class Kept(NamedTuple):
    """Shadows, and what they were made of."""

    masters: list[tuple[int, StorageWeakRef, int]]
    """Of each tensor: its id, its storage, its version. Weak: they keep no memory, and no address is given again.

    No weak reference to the tensor itself: torch could not swap it for another one then.
    """
    dtype: torch.dtype
    stream: int
    """On which they were made: another one would read them before they are written."""
    copies: list[Tensor]


class Shadows:
    """The shadows of one layer, kept from call to call where nothing can have changed the masters meanwhile.

    Fresh are those whose masters are the same tensors in the same storage at the same version: a state dict, a move to
    another device or most optimizers change one of these. A fused optimizer of torch changes none, nor does writing
    through ``.data``, nor do FSDP and its kind, which gather masters anew into the same storage. So they are kept in
    evaluation alone, by forwards in inference mode, of which no training can make use: from `DEXLayer.eval` on until
    ``train`` or a forward whose masters need a gradient; and not where torch.distributed is at work. `hold_weights`
    keeps them wherever it is asked to. In a CUDA graph they are made in the graph, and once a graph holds the layer,
    whose replays change masters unseen, none are kept any more, inside `hold_weights` neither.
    """

    def __init__(self):
        self._kept: Kept | None = None
        self._evaluating = False
        self._held = 0
        self._in_a_graph = False

    def __reduce__(self):
        # A copy of a layer, or one that is loaded, makes its own.
        return Shadows, ()

    def of(
        self, masters: Sequence[Tensor], director: Sequence[Tensor] | None, dtype: torch.dtype, keep: bool
    ) -> list[Tensor]:
        """Of each master ``[E, ...]`` a copy of ``dtype``; with a director's tensors ``[E + 1, ...]``, those last.

        keep: whether no gradient of the masters will be asked for, and the director is not trained.
        """
        if not keep:
            self._evaluating = False
        if torch.compiler.is_compiling():
            if not keep:
                self.forget()
            return _copies(masters, director, dtype)
        tensors = [*masters, *(director or ())]
        device = tensors[0].device
        self._in_a_graph = self._in_a_graph or capturing(device)
        evaluating = self._evaluating and torch.is_inference_mode_enabled() and not _distributed()
        keep = (self._held > 0 or evaluating) and not self._in_a_graph
        keep = keep and not any(t.is_inference() or _is_wrapped(t) for t in tensors)
        stream = stream_of(device) if keep else 0
        kept = self._kept  # read once: another thread may forget them meanwhile
        if keep and kept is not None and kept.dtype == dtype and kept.stream == stream:
            if _is_same(kept.masters, tensors):
                return kept.copies
        self.forget()
        # Made in inference mode they could not be saved for a backward later.
        with torch.inference_mode(False):
            copies = _copies(masters, director, dtype)
        if keep:
            seen = [(id(t), StorageWeakRef(t.untyped_storage()), t._version) for t in tensors]
            self._kept = Kept(seen, dtype, stream, copies)
        return copies

    def evaluate(self, evaluating: bool) -> None:
        """Begin or end an evaluation."""
        self._evaluating = evaluating
        self.forget()

    def used_without(self) -> None:
        """Of a forward that took the masters themselves, and of which an optimizer may make use."""
        self._evaluating = False
        self.forget()

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
    them makes its own copy. The copies of all layers live until the end of the block. Forwards in a CUDA graph or
    compiled by torch.compile make their own as ever.
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


def stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_same(seen: list[tuple[int, StorageWeakRef, int]], tensors: Sequence[Tensor]) -> bool:
    return len(seen) == len(tensors) and all(
        address == id(t) and storage.cdata == t.untyped_storage()._cdata and version == t._version
        for (address, storage, version), t in zip(seen, tensors, strict=True)
    )


def _is_wrapped(t: Tensor) -> bool:
    """Whether it is one of torch.func's, such as vmap's, which have no storage and no operators of lists."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)


@torch.no_grad()
def _copies(masters: Sequence[Tensor], director: Sequence[Tensor] | None, dtype: torch.dtype) -> list[Tensor]:
    more = director is not None
    copies = [m.new_empty((m.shape[0] + more, *m.shape[1:]), dtype=dtype) for m in masters]
    to = [c[: m.shape[0]] for c, m in zip(copies, masters, strict=True)]
    to, of = to + [c[-1] for c in copies] * more, [*masters, *(director or ())]
    if not torch.compiler.is_compiling() and any(map(_is_wrapped, of)):
        for c, m in zip(to, of, strict=True):
            c.copy_(m)
    else:
        torch._foreach_copy_(to, of)
    return copies
