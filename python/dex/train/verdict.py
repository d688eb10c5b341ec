"""The verdict of a step, on which all ranks agree, and its copy on the host; numbers are addressed by field name.

Shape letters: B images of this rank, E experts of all layers, E_l experts of layer l, M modalities.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dex.analysis import usage
from dex.common.ranks import Ranks


class Losses(NamedTuple):
    """Means over a batch, each a 0-dim tensor."""

    loss: Tensor
    total: Tensor
    align_loss: Tensor
    balance_loss: Tensor
    grad_norm: Tensor


class Verdict(NamedTuple):
    """Result of a step over all ranks, on the device: ``losses`` are means over the ranks, the other numbers sums."""

    good: Tensor
    """0-dim bool: every rank could read its images, and everything is finite on all ranks."""
    stop: Tensor
    """0-dim: number of ranks that were asked to stop."""
    unreadable: Tensor
    """0-dim: number of ranks that cannot read their images."""
    losses: Losses
    """float64."""
    modality_loss: Tensor
    """float64 ``[M]``."""
    modality_images: Tensor
    """float64 ``[M]``."""
    slots: Tensor
    """float64 ``[E]``."""
    gate_mass: list[Tensor]
    """float32 ``[E_l]`` of every layer with experts."""


class HostVerdict(NamedTuple):
    """The part of a verdict that the host reads."""

    good: bool
    stop: bool
    unreadable: bool
    loss: float
    grad_norm: float
    image_loss: Tensor
    """float32 ``[B]``."""


class NonFinite(NamedTuple):
    """A step that changed nothing because its loss, gate mass or gradient was not finite."""

    step: int
    """Steps done when it began."""
    loss: float
    grad_norm: float
    samples: list[str]
    """Ids of the images with a non-finite loss; the whole batch if only the gradient was non-finite."""


class Fields:
    """Named tensors concatenated into one vector. ``shapes``: the shape of each, by name."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]):
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in shapes.items()}
        self.sizes: list[int] = [math.prod(shape) for shape in self.shapes.values()]

    def pack(self, dtype: torch.dtype, **values: Tensor) -> Tensor:
        """The vector of ``values``, which has a tensor for every field."""
        return torch.cat([values[name].to(dtype).reshape(-1) for name in self.shapes])

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of ``vector`` by field name."""
        parts = zip(self.shapes.items(), vector.split(self.sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}


class Routed(Protocol):
    """Output of a forward as far as the verdict needs it; fields as in ``dex.model.MAEOutput``."""

    @property
    def gate_mass(self) -> list[Tensor]: ...

    @property
    def expert_indices(self) -> list[Tensor]: ...

    @property
    def image_loss(self) -> Tensor: ...


class Agreement:
    """Computes a ``Verdict`` by one all-reduce of one vector, without waiting on the host.

    experts: number of experts of each layer that has any. modalities: their number.
    """

    def __init__(self, ranks: Ranks, experts: Sequence[int], modalities: int):
        self.ranks: Ranks = ranks
        self.experts: list[int] = list(experts)
        self.modalities: int = modalities
        by_modality, by_expert = (modalities,), (sum(experts),)
        self.fields: Fields = Fields(
            {"bad": (), "stop": (), "unreadable": ()}
            | dict.fromkeys(Losses._fields, ())
            | {"modality_loss": by_modality, "modality_images": by_modality}
            | {"slots": by_expert, "gate_mass": by_expert}
        )

    @torch.no_grad()
    def reach(self, losses: Losses, out: Routed, modality: Tensor, stop: Tensor, unreadable: Tensor) -> Verdict:
        """The verdict of a step; all ranks call it. stop, unreadable: 0-dim bool, of this rank; modality: int64
        ``[B]``."""
        one_hot = usage.one_hot(modality, self.modalities)
        means = torch.stack(losses) / self.ranks.world_size
        loss_and_norm = torch.stack([losses.total, losses.grad_norm])
        finite = torch.isfinite(torch.cat([loss_and_norm, *out.gate_mass])).all()
        vector = self.fields.pack(
            torch.float64,
            bad=~finite | unreadable,
            stop=stop,
            unreadable=unreadable,
            **Losses(*means.double())._asdict(),
            modality_loss=one_hot.T @ out.image_loss.double(),
            modality_images=one_hot.sum(0),
            slots=self._slots(out),
            gate_mass=torch.cat(out.gate_mass) if out.gate_mass else means.new_empty(0),
        )
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(vector)
        fields = self.fields.unpack(vector)
        bad, gate_mass = fields.pop("bad"), fields.pop("gate_mass")
        agreed = Losses(**{name: fields.pop(name) for name in Losses._fields})
        # Checked again, since sums of finite values may overflow.
        good = (bad == 0) & torch.isfinite(vector).all()
        masses = list(gate_mass.float().split(self.experts))
        return Verdict(good=good, losses=agreed, gate_mass=masses, **fields)

    def _slots(self, out: Routed) -> Tensor:
        """float64 ``[E]``: how often each expert was chosen."""
        slots = torch.zeros(sum(self.experts), dtype=torch.float64, device=out.image_loss.device)
        first = 0
        for indices, experts in zip(out.expert_indices, self.experts, strict=True):
            chosen = indices.flatten().long() + first
            slots.index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float64))
            first += experts
        return slots


class Sent(NamedTuple):
    """A verdict on its way to the host."""

    step: int
    ids: Sequence[str]
    values: Tensor
    """``_host_fields``, float32."""
    ready: Any
    """The event after which ``values`` are complete; None if they already are."""

    def read(self) -> HostVerdict:
        """Wait for the copy and return it."""
        if self.ready is not None:
            self.ready.synchronize()
        fields = _host_fields(len(self.ids)).unpack(self.values)
        image_loss = fields.pop("image_loss")
        good, stop, unreadable = (bool(fields.pop(name).item()) for name in ("good", "stop", "unreadable"))
        return HostVerdict(good, stop, unreadable, image_loss=image_loss, **{k: v.item() for k, v in fields.items()})


def send(verdict: Verdict, image_loss: Tensor, step: int, ids: Sequence[str]) -> Sent:
    """Start copying to the host what it needs of a step, without waiting for a GPU."""
    values = _host_fields(len(ids)).pack(
        torch.float32,
        good=verdict.good,
        stop=verdict.stop,
        unreadable=verdict.unreadable,
        loss=verdict.losses.loss,
        grad_norm=verdict.losses.grad_norm,
        image_loss=image_loss,
    )
    if values.device.type != "cuda":
        return Sent(step, ids, values, None)
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return Sent(step, ids, host, ready)


def _host_fields(images: int) -> Fields:
    return Fields(
        {name: () for name in ("good", "stop", "unreadable", "loss", "grad_norm")} | {"image_loss": (images,)}
    )
