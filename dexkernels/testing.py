"""What tests and benchmarks share: the plain-torch loop over experts, inputs, and error measures.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import DEXLayer


class ExpertLoop(nn.Module):
    """A DEX layer as one writes it without this library: E separate MLPs, `torch.where`, indexing and index-add.

    The yardstick of accuracy (in the same dtype) and of speed. Its parameters have the published names, so that
    ``loop.load_state_dict(layer.reference_state_dict())`` gives it a layer's weights. Image-wise, from the CLS token.
    """

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, top_k: int, temperature: float = 0.5):
        super().__init__()
        self.top_k, self.temperature = top_k, temperature
        self.router = nn.ModuleDict({"linear": nn.Linear(dim, num_experts, bias=False)})
        self.experts = nn.ModuleList(_mlp(dim, hidden_dim) for _ in range(num_experts))
        self.director = _mlp(dim, hidden_dim).requires_grad_(False)
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
    """Give every parameter its own values at the scale of a trained layer; a bare layer's experts are all equal."""
    generator = torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        scale = 0.1 if p.dim() < 2 else p.shape[-1] ** -0.5
        p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    # Wide logits: routing decisions are then not near ties, which rounding would flip.
    layer.router_weight.mul_(4)
    return layer


def relative_error(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||`` in float64 (absolute when want is 0); infinite when got is not finite."""
    if got.shape != want.shape:
        raise ValueError(f"got: expected shape {list(want.shape)}, got {list(got.shape)}")
    got, want = got.detach().double(), want.detach().double()
    if not got.isfinite().all():
        return float("inf")
    norm = want.norm().item()
    return ((got - want).norm() / (norm or 1.0)).item()
