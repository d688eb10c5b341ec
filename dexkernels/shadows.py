"""Shadows: what a layer computes with under autocast, low-precision copies of its float32 weights (the masters)."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

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

    Copies that `DEXAdamW` has written stay until something may have changed the weights, see `Watched`.
    """

    def __init__(self):
        self._held: Held | None = None
        self._written: Held | None = None
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
        if torch.compiler.is_compiling() or not (self._holders or self._written):
            return _copies(masters, director, dtype)
        tensors = [*masters, *(director or ())]
        device = tensors[0].device
        if capturing(device) or any(t.is_inference() or _is_wrapped(t) for t in tensors):
            return _copies(masters, director, dtype)
        stream, written = stream_of(device), self._written
        if written is not None and (written.dtype, written.stream) == (dtype, stream):
            if _is_current(written, tensors):
                return written.copies if director is not None else MLPWeights(*(c[:-1] for c in written.copies))
        if not self._holders:
            return _copies(masters, director, dtype)
        held = self._held  # read once: another thread may replace it meanwhile
        if held is None or (held.dtype, held.stream) != (dtype, stream) or not _is_same(held.masters, tensors):
            held = self._held = Held(_seen(tensors), dtype, stream, _copies(masters, director, dtype))
        return held.copies

    def kept(self, masters: MLPWeights, director: MLPWeights, dtype: torch.dtype) -> MLPWeights:
        """The copies ``[E + 1, ...]`` to write the next weights into: of the weights as they are, whole, until then."""
        written = self._written
        if written is not None and written.dtype == dtype and _is_current(written, [*masters, *director]):
            return written.copies
        self._written = None
        return _copies(masters, director, dtype)

    def keep(self, masters: MLPWeights, director: MLPWeights, copies: MLPWeights) -> None:
        """``copies`` are those of the weights as they are now: forwards take them while that can be told to last."""
        tensors, dtype = [*masters, *director], copies.fc1_weight.dtype
        for t in tensors:
            watch(t)
        self._written = Held(_seen(tensors), dtype, stream_of(tensors[0].device), copies)

    def drop(self) -> None:
        """What was kept is not the copies of the weights any more."""
        self._written = None

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


class Watched(nn.Parameter):
    """A parameter whose ``data`` says that it was asked for: who has that may write where no version tells of it.

    A parameter becomes one in its place (`watch`), with everything that refers to it.
    """

    touched: bool

    @property
    def data(self) -> Tensor:
        self.touched = True
        return torch._C.TensorBase.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        self.touched = True
        torch._C.TensorBase.data.__set__(self, value)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return torch._utils._rebuild_parameter, (self.detach(), self.requires_grad, {})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
        return memo[id(self)]


def watch(t: Tensor) -> None:
    """From now on `Watched.touched` tells of ``.data`` and of optimizers that write behind torch's back."""
    if type(t) is nn.Parameter:
        t.__class__ = Watched
    t.touched = False


def _after_an_optimizer(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    """torch's fused optimizers bump no version. One that keeps copies tells of its own writes."""
    if getattr(optimizer, "keeps_copies", False):
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if type(p) is Watched:
                p.touched = True


register_optimizer_step_post_hook(_after_an_optimizer)

_ALONE = torch.empty(0)


def _references(t: Tensor) -> int:
    """To its memory, beyond those of a tensor that shares it with no other."""
    of = torch._C._storage_Use_Count
    return of(t.untyped_storage()._cdata) - of(_ALONE.untyped_storage()._cdata)


def _is_current(held: Held, tensors: Sequence[Tensor]) -> bool:
    """Whether nothing can have written to the tensors since: nothing that has a version, ``.data``, or a tensor that
    shares their memory. Of the masters alone, where ``tensors`` has no director."""
    if not all(type(t) is Watched and not t.touched for t in tensors):
        return False
    if any(_references(t) for t in tensors):
        return False
    return _is_same(held.masters[: len(tensors)], tensors)


def _seen(tensors: Sequence[Tensor]) -> list[tuple[int, StorageWeakRef, int]]:
    return [(id(t), StorageWeakRef(t.untyped_storage()), t._version) for t in tensors]


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
