"""Shadows: low-precision copies of a layer's float32 weights (the masters), used under autocast."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from .records import MLPWeights


class Held(NamedTuple):
    """Shadows, and the state of their masters."""

    masters: list[tuple[int, StorageWeakRef, int]]
    """Id, storage and version of each tensor. A weak reference keeps no memory, but its address is not reused.

    There is no weak reference to the tensor itself, because torch could not swap it then.
    """
    dtype: torch.dtype
    stream: int
    """The stream that made them: another one could read them before they are written."""
    copies: MLPWeights


class Shadows:
    """The shadows of one layer: made in every forward, and kept between forwards only inside `hold_weights`.

    There they are made again if a master is another tensor, or has another storage or version. A write through
    ``.data`` or by a fused optimizer of torch changes none of these and must not occur inside `hold_weights`. A
    forward in a CUDA graph makes its own shadows in the graph.

    Copies that `DEXAdamW` has written stay valid until something may have changed the weights, see `Watched`.
    """

    def __init__(self):
        self._held: Held | None = None
        self._written: Held | None = None
        self._holders = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A copied or loaded layer makes its own.
        return Shadows, ()

    def of(self, masters: MLPWeights, director: MLPWeights | None, dtype: torch.dtype) -> MLPWeights | None:
        """A copy in ``dtype`` of each master ``[E, ...]``; with a director ``[E + 1, ...]``, the director last.

        None if the masters have this dtype already. Autograd does not see the copies: the operators return the
        masters' gradients, in the masters' dtype.
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
        held = self._held  # Read once, since another thread may replace it.
        if held is None or (held.dtype, held.stream) != (dtype, stream) or not _is_same(held.masters, tensors):
            held = self._held = Held(_states(tensors), dtype, stream, _copies(masters, director, dtype))
        return held.copies

    def kept(self, masters: MLPWeights, director: MLPWeights, dtype: torch.dtype) -> MLPWeights:
        """The copies ``[E + 1, ...]`` of the current weights, to be overwritten with the next weights."""
        written = self._written
        if written is not None and written.dtype == dtype and _is_current(written, [*masters, *director]):
            return written.copies
        self._written = None
        return _copies(masters, director, dtype)

    def keep(self, masters: MLPWeights, director: MLPWeights, copies: MLPWeights) -> None:
        """Keep ``copies`` of the current weights: forwards use them while the weights are known to be unchanged."""
        tensors, dtype = [*masters, *director], copies.fc1_weight.dtype
        for t in tensors:
            watch(t)
        self._written = Held(_states(tensors), dtype, stream_of(tensors[0].device), copies)

    def drop(self) -> None:
        """Forget the kept copies, which no longer match the weights."""
        self._written = None

    def hold(self, more: int) -> None:
        """Begin (1) or end (-1) a period in which the masters do not change."""
        self._holders += more
        self._held = None


@contextlib.contextmanager
def hold_weights(model: nn.Module) -> Iterator[None]:
    """Let the forwards of each `DEXLayer` under autocast share one copy of the experts. No weight may change inside.

    Use it for steps with several forwards, such as gradient accumulation over micro-batches; without it each forward
    makes its own copy. The copies of all layers live until the end of the block. Forwards in a CUDA graph or under
    torch.compile make their own copies.
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
    """The weights to compute with: ``shadows``, or ``weights`` if each shadow is None."""
    return weights if shadows.fc1_weight is None else shadows


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class Watched(nn.Parameter):
    """A parameter that records every access to ``data``, through which a write changes no version.

    `watch` changes the class of a parameter in place, so all references to it stay valid.
    """

    touched: bool
    """Whether ``data``, or an optimizer without version counts, was used since the last `watch`."""
    in_graph: bool = False
    """Whether a CUDA graph writes it, whose replays change no version."""

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
    """Start recording in `Watched.touched` accesses to ``.data`` and writes of optimizers that bump no version."""
    if type(t) is nn.Parameter:
        t.__class__ = Watched
    t.touched = False


def written_in_graph(tensors: Iterable[Tensor]) -> None:
    """Mark ``tensors`` if they are written in a CUDA graph that is being captured: no copies of them are kept then."""
    for t in tensors:
        if torch.compiler.is_compiling() or not capturing(t.device):
            return
        t.in_graph = True


def _after_an_optimizer(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    """Mark the parameters of an optimizer step, since torch's fused optimizers bump no version.

    An optimizer with ``keeps_copies`` accounts for its own writes, except those of a CUDA graph.
    """
    written_in_graph(p for group in optimizer.param_groups for p in group["params"])
    if getattr(optimizer, "keeps_copies", False):
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if type(p) is Watched:
                p.touched = True


register_optimizer_step_post_hook(_after_an_optimizer)

_ALONE = torch.empty(0)


def _references(t: Tensor) -> int:
    """The number of references to a tensor's storage beyond those of an unshared tensor."""
    count = torch._C._storage_Use_Count
    return count(t.untyped_storage()._cdata) - count(_ALONE.untyped_storage()._cdata)


def _is_current(held: Held, tensors: Sequence[Tensor]) -> bool:
    """Whether nothing can have written to the tensors since: by a versioned write, ``.data``, or a tensor that shares
    their memory. ``tensors`` may be the masters alone, without the director."""
    if not all(type(t) is Watched and not (t.touched or t.in_graph) for t in tensors):
        return False
    if any(_references(t) for t in tensors):
        return False
    return _is_same(held.masters[: len(tensors)], tensors)


def _states(tensors: Sequence[Tensor]) -> list[tuple[int, StorageWeakRef, int]]:
    return [(id(t), StorageWeakRef(t.untyped_storage()), t._version) for t in tensors]


def _is_same(states: list[tuple[int, StorageWeakRef, int]], tensors: Sequence[Tensor]) -> bool:
    return len(states) == len(tensors) and all(
        address == id(t) and storage.cdata == t.untyped_storage()._cdata and version == t._version
        for (address, storage, version), t in zip(states, tensors, strict=True)
    )


def _is_wrapped(t: Tensor) -> bool:
    """Whether it is a tensor of torch.func, such as vmap's, which has no storage and no ``_foreach`` operators."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)


def _copies(masters: MLPWeights, director: MLPWeights | None, dtype: torch.dtype) -> MLPWeights:
    if torch.compiler.is_compiling():
        return _copy(masters, director, dtype, one_by_one=False)
    # Copies made in inference mode could not be saved for a later backward.
    with torch.inference_mode(False):
        return _copy(masters, director, dtype, one_by_one=any(map(_is_wrapped, (*masters, *(director or ())))))


@torch.no_grad()
def _copy(masters: MLPWeights, director: MLPWeights | None, dtype: torch.dtype, *, one_by_one: bool) -> MLPWeights:
    more = director is not None
    copies = [m.new_empty((m.shape[0] + more, *m.shape[1:]), dtype=dtype) for m in masters]
    targets = [c[: m.shape[0]] for c, m in zip(copies, masters, strict=True)] + [c[-1] for c in copies] * more
    sources = [*masters, *(director or ())]
    if one_by_one:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
    else:
        torch._foreach_copy_(targets, sources)
    return MLPWeights(*copies)
