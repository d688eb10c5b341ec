"""Helpers of tests and benchmarks: the plain-torch loop over experts, inputs, error measures, a guard against waits.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .layer import DEXLayer


class ExpertLoop(nn.Module):
    """A DEX layer without this library: E separate MLPs, `torch.where`, indexing and index-add.

    It is the baseline for accuracy (in the same dtype) and speed. Its parameters have the published names, so
    ``loop.load_state_dict(layer.reference_state_dict())`` copies a layer's weights. Image-wise, from the CLS token.
    """

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, top_k: int, temperature: float = 0.5):
        super().__init__()
        self.top_k: int = top_k
        self.temperature: float = temperature
        self.router: nn.ModuleDict = nn.ModuleDict({"linear": nn.Linear(dim, num_experts, bias=False)})
        self.experts: nn.ModuleList = nn.ModuleList(_mlp(dim, hidden_dim) for _ in range(num_experts))
        self.director: nn.ModuleDict = _mlp(dim, hidden_dim).requires_grad_(False)
        self.register_buffer("expert_activation_count", torch.zeros(num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``x [B, N, D] -> (output [B, N, D], align loss, balance loss, gate mass [E])``."""
        num_experts = len(self.experts)
        p = (self.router["linear"](x[:, 0]) / self.temperature).softmax(-1)
        top, chosen = p.topk(self.top_k)
        gates = top / top.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            image, choice = torch.where(chosen == e)
            if image.numel():
                y = gates[image, choice][:, None, None] * _run(expert, x[image])
                out = out.index_add(0, image, y.to(out.dtype))
        with torch.no_grad():
            director_out = _run(self.director, x)
        align = -((director_out / 0.5).softmax(-1) * out.softmax(-1).clamp(min=1e-6).log()).sum(-1).mean()
        mean_p = p.mean(0)
        balance = num_experts * (mean_p * mean_p.detach()).sum()
        mass = torch.zeros_like(mean_p).index_add(0, chosen.flatten(), gates.detach().flatten())
        return out, align, balance, mass

    @torch.no_grad()
    def update_director(self, gate_mass: Tensor, momentum: float) -> None:
        """GEMA by stacking every expert's tensor, multiplying and summing."""
        weights = gate_mass / (gate_mass.sum() + 1e-6)
        for layer in ("fc1", "fc2"):
            for name in ("weight", "bias"):
                director = getattr(self.director[layer], name)
                stacked = torch.stack([getattr(expert[layer], name).data for expert in self.experts])
                mean = (stacked * weights.view(-1, *[1] * director.dim())).sum(0)
                director.data = momentum * director.data + (1 - momentum) * mean


def _mlp(dim: int, hidden_dim: int) -> nn.ModuleDict:
    return nn.ModuleDict({"fc1": nn.Linear(dim, hidden_dim), "fc2": nn.Linear(hidden_dim, dim)})


def _run(mlp: nn.ModuleDict, x: Tensor) -> Tensor:
    return mlp["fc2"](F.gelu(mlp["fc1"](x)))


@torch.no_grad()
def randomize_(layer: DEXLayer, seed: int = 0) -> DEXLayer:
    """Give every parameter random values at the scale of a trained layer; the experts of a new layer are all equal."""
    generator = torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        scale = 0.1 if p.dim() < 2 else p.shape[-1] ** -0.5
        p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    # Wide logits avoid near-ties, which rounding would flip.
    layer.router_weight.mul_(4)
    return layer


def relative_error(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||`` in float64 (absolute if want is 0); infinite if got is not finite."""
    if got.shape != want.shape:
        raise ValueError(f"got: expected shape {list(want.shape)}, got {list(got.shape)}")
    got, want = got.detach().double(), want.detach().double()
    if not got.isfinite().all():
        return float("inf")
    norm = want.norm().item()
    return ((got - want).norm() / (norm or 1.0)).item()


class HostWaits(RuntimeError):
    """Raised by `NoHostWaits`."""


class NoHostWaits(TorchDispatchMode):
    """``with NoHostWaits():`` raises `HostWaits` at an operation that makes the host wait for a tensor's device.

    Such operations are: reading a value (``item``, ``tolist``, ``bool``), an operator whose result size depends on
    values (``nonzero``, ``x[mask]``, ``unique``), a copy to the host that waits or targets unpinned memory, and a copy
    from unpinned memory (``torch.tensor(..., device=...)``). It inspects the calls to torch, so tensors may be fake, or
    on meta; it cannot see inside operators of torch or of a native library.
    ``seen``: every operator with its numbers and shapes, in order.
    """

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = op._schema.name.removeprefix("aten::")
        if reason := self._waits(name, args, kwargs, tensors):
            raise HostWaits(f"{reason}: {op}")
        self.see(op, args, kwargs)
        if name == "_pin_memory":  # Fails on fake tensors and without a GPU.
            out = args[0].clone()
            out.pinned = True
            return out
        out = op(*args, **kwargs)
        if kwargs.get("pin_memory"):
            out.pinned = True
        return out

    def see(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
        if op.namespace != "profiler":
            self.seen.append(" ".join([str(op), *map(_described, tree_leaves((args, kwargs or {})))]))

    def _waits(self, name: str, args: tuple, kwargs: dict, tensors: list[Tensor]) -> str | None:
        if name == "_to_copy":
            target, waits = kwargs.get("device") or args[0].device, not kwargs.get("non_blocking")
            pinned = target.type == "cpu" or getattr(args[0], "pinned", False)  # torch pins the targets of its copies.
            return self._copies(args[0].device, target, waits, pinned)
        if name == "copy_":
            waits = not (kwargs.get("non_blocking") or len(args) > 2 and args[2])
            on_host = args[0] if args[0].device.type == "cpu" else args[1]
            return self._copies(args[1].device, args[0].device, waits, getattr(on_host, "pinned", False))
        if all(t.device.type == "cpu" for t in tensors):
            return None
        if name == "repeat_interleave" and kwargs.get("output_size") is not None:
            return None
        if (
            name in _READS
            or name in ("index", "index_put", "index_put_", "_index_put_impl_")
            and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        ):
            return "a value is read on the host"
        return None

    @staticmethod
    def _copies(source: torch.device, target: torch.device, waits: bool, pinned: bool) -> str | None:
        if "cpu" not in (source.type, target.type) or source.type == target.type:
            return None
        where = "to the host" if target.type == "cpu" else "from the host"
        return f"a copy {where} that waits" if waits else None if pinned else f"a copy {where} with unpinned memory"


_READS = frozenset(
    "_local_scalar_dense is_nonzero equal allclose nonzero nonzero_numpy argwhere masked_select bincount "
    "_unique _unique2 unique_dim unique_consecutive repeat_interleave".split()
)
"""Operators that need values on the host."""


def _described(leaf) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
