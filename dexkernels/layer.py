"""`DEXLayer`: an image-wise mixture of experts with a director that follows the experts.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen.
"""

import gc
import inspect
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .choices import (
    KINDS,
    PATHS,
    ROUTE_FROM,
    ROUTINGS,
    ActivationName,
    AlignKind,
    BackendName,
    LayoutName,
    PathName,
    RouteFrom,
    RoutingName,
)
from .layout import LAYOUTS, Layout
from .ops import backends
from .ops.align_loss import align_loss
from .ops.common import EPS, guard_version
from .ops.dense import ACTIVATIONS, mlp
from .ops.group_ema import group_ema_
from .ops.route import Noise
from .ops.routed_mlp import Settings, routed_mlp
from .published import PublishedNames
from .records import MLPWeights
from .shadows import Shadows, written_in_graph


class Aux(NamedTuple):
    """Results of one layer's forward that a training step needs beside the output."""

    align_loss: Tensor
    """0-dim, not yet weighted; see `dexkernels.align_loss`."""
    balance_loss: Tensor
    """0-dim, not yet weighted, local to this rank."""
    gate_mass: Tensor
    """``[E]``, detached: summed gates of this call; the argument of `DEXLayer.update_director`."""
    gates: Tensor
    """``[B, K]`` (image-wise) or ``[B, N, K]`` (token-wise)."""
    expert_indices: Tensor
    """int32, shape of gates, by descending probability."""


class Recording:
    """The record that `collect_aux` attaches to a layer whose caller only sees ``y = layer(x)``.

    While it is open, forwards add their `Aux`. Once closed, it tells a recomputation in backward how the recorded
    forward ran.
    """

    def __init__(self, noise_std: float | Tensor):
        self.noise_std = noise_std
        self.open = False
        self.passed = False
        """Whether the layer ran in training after the recording was closed."""
        self.thread: int = threading.get_ident()
        # torch.compile can trace a list; a ContextVar would break its graph.
        self.calls: list[Aux] = []

    def add(self, aux: Aux) -> None:
        if not torch.compiler.is_compiling() and threading.get_ident() != self.thread:
            raise ValueError("collect_aux: expected forwards in the thread that opened it, got one in another thread")
        self.calls.append(aux)


class Replaced:
    """Weak references to parameters that a call replaced in a host. A copy of the layer has none."""

    def __init__(self) -> None:
        self._parameters: list[tuple[weakref.ref[nn.Parameter], str]] = []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Replaced, ()

    def add(self, parameters: Iterable[nn.Parameter], by: str) -> None:
        """Add parameters that the call named ``by`` replaced."""
        self._parameters += [(weakref.ref(p), by) for p in parameters]

    def check_optimizers(self) -> None:
        """Raise ValueError if an optimizer still holds one of them. Checks once, and only if one is alive."""
        if torch.compiler.is_compiling() or not self._parameters:
            return
        alive = {id(p): by for reference, by in self._parameters if (p := reference()) is not None}
        self._parameters = []
        objects = gc.get_objects() if alive else ()
        for o in (o for o in objects if issubclass(type(o), torch.optim.Optimizer)):
            held = [alive[id(p)] for group in o.param_groups for p in group["params"] if id(p) in alive]
            if held:
                raise ValueError(
                    f"optimizer: expected one that was built after {held[0]}, got {type(o).__name__} with {len(held)} "
                    f"parameters that {held[0]} has replaced: the experts would never be trained. Build it again from "
                    "model.parameters()"
                )


class MLP(nn.Module):
    """``fc2(gelu(fc1(x)))``, ``[..., D] -> [..., D]``: the director, or the dense MLP of a ViT."""

    def __init__(self, dim: int, hidden_dim: int, activation: ActivationName = "gelu"):
        super().__init__()
        self.activation: ActivationName = activation
        self.fc1: nn.Linear = nn.Linear(dim, hidden_dim)
        self.fc2: nn.Linear = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if all(getattr(type(fc), "forward", None) is nn.Linear.forward for fc in (self.fc1, self.fc2)):
            return mlp(x, *self.weights, self.activation)
        # Quantised maps and adapters have their own forward.
        return self.fc2(F.gelu(self.fc1(x), approximate=ACTIVATIONS[self.activation]))

    @property
    def weights(self) -> MLPWeights:
        return MLPWeights(self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class Experts(nn.Module):
    """E MLPs stacked: ``fc1_weight [E, H, D]``, ``fc1_bias [E, H]``, ``fc2_weight [E, D, H]``, ``fc2_bias [E, D]``.

    It only holds the parameters: `dexkernels.grouped_mlp` computes with them.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1_weight: nn.Parameter = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.fc1_bias: nn.Parameter = nn.Parameter(torch.empty(num_experts, hidden_dim))
        self.fc2_weight: nn.Parameter = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.fc2_bias: nn.Parameter = nn.Parameter(torch.empty(num_experts, dim))

    @property
    def weights(self) -> MLPWeights:
        return MLPWeights(self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)

    def extra_repr(self) -> str:
        E, H, D = self.fc1_weight.shape
        return f"{E}, {D}, {H}"


class DEXLayer(PublishedNames, nn.Module):
    """Replaces the MLP of a transformer block: ``y = layer(x)``, ``[B, N, D] -> [B, N, D]``.

    Every image is sent whole to K of E experts, chosen from its CLS token. The director, an MLP of the same shape, is
    not an expert: it follows the experts through a group EMA and pulls them together through the align loss.

    Args:
        dim, hidden_dim: D and H.
        num_experts, top_k: E and K, ``1 <= K <= E``.
        routing: ``"image"``, or ``"token"``: the ablation with one decision per token.
        temperature: temperature of the router's softmax.
        align: ``"kd"``, ``"cosine"`` (the paper's Eq. 7) or ``"mse"``; see `dexkernels.align_loss`.
        usage_momentum: momentum of ``usage_ema``, which favours rarely used experts in the exploration noise.
        route_from: ``"cls"``: token 0; ``"mean"``: the mean token, for hosts without a CLS token.
        path: ``"experts"``, or ``"director"`` to fine-tune the director alone as a dense MLP. May be set later.
        activation: ``"gelu"``, the exact GELU, or ``"gelu_tanh"``, its approximation by tanh.
        layout: ``"tokens"``: x is ``[B, N, D]``; ``"channels_last"``: ``[B, H, W, D]``; ``"channels_first"``:
            ``[B, D, H, W]``. Maps have no CLS token: they need ``route_from="mean"`` or ``routing="token"``.
        windows: P, for hosts that pass an image as P consecutive windows, ``[B * P, ...]``. The windows are routed
            together, from the image's mean token. May be set later.
        backend: None uses the default of `dexkernels.ops.backends`; a name that cannot run raises with the reason.

    Experts and director start as copies of one MLP. Parameters must be float32 (or float64) for training: in half
    precision the director could not move. Forward changes no state; only `update_director` does.
    Under autocast every forward computes with new copies of the parameters; inside `hold_weights` forwards share them.

    Raises: ValueError naming the argument.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int = 8,
        top_k: int = 2,
        *,
        routing: RoutingName = "image",
        temperature: float = 0.5,
        align: AlignKind = "kd",
        usage_momentum: float = 0.99,
        route_from: RouteFrom = "cls",
        path: PathName = "experts",
        activation: ActivationName = "gelu",
        layout: LayoutName = "tokens",
        windows: int = 1,
        backend: BackendName | None = None,
    ):
        super().__init__()
        sizes = {"dim": dim, "hidden_dim": hidden_dim, "num_experts": num_experts, "windows": windows}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        checks.check_top_k(top_k, num_experts)
        checks.check_choice("routing", routing, ROUTINGS)
        checks.check_choice("align", align, KINDS)
        checks.check_choice("route_from", route_from, ROUTE_FROM)
        checks.check_choice("activation", activation, tuple(ACTIVATIONS))
        checks.check_choice("layout", layout, tuple(LAYOUTS))
        if routing == "image" and route_from == "cls" and (layout != "tokens" or windows > 1):
            host = f"layout={layout!r}" if layout != "tokens" else f"windows={windows}"
            raise ValueError(f"route_from: expected 'mean' with {host}, which has no CLS token, got 'cls'")
        checks.check_temperature(temperature)
        checks.check_number("usage_momentum", usage_momentum, "a number in [0, 1]", lambda v: 0 <= v <= 1)
        backends.check_backend(backend)
        self.dim: int = dim
        self.hidden_dim: int = hidden_dim
        self.num_experts: int = num_experts
        self.top_k: int = top_k
        self.routing: RoutingName = routing
        self.route_from: RouteFrom = route_from
        self.temperature: float = temperature
        self.align: AlignKind = align
        self.usage_momentum: float = usage_momentum
        self.backend: BackendName | None = backend
        self.activation: ActivationName = activation
        self.layout: LayoutName = layout
        self.windows: int = windows
        self.recording: Recording | None = None
        self.token_mask: Tensor | None = None
        self.shadows: Shadows = Shadows()
        self.replaced: Replaced = Replaced()

        self.router_weight: nn.Parameter = nn.Parameter(torch.empty(num_experts, dim))
        self.experts: Experts = Experts(num_experts, dim, hidden_dim)
        self.director: MLP = MLP(dim, hidden_dim, activation)
        self.usage_ema: Tensor
        self.register_buffer("usage_ema", torch.zeros(num_experts))
        nn.init.xavier_uniform_(self.router_weight)
        self.copy_director_to_experts_()
        self.path = path

    @property
    def path(self) -> PathName:
        """``"experts"`` or ``"director"``; setting it makes only that path trainable."""
        return self._path

    @path.setter
    def path(self, path: PathName) -> None:
        checks.check_choice("path", path, PATHS)
        self._path: PathName = path
        self.director.requires_grad_(path == "director")
        self.experts.requires_grad_(path == "experts")
        self.router_weight.requires_grad_(path == "experts")

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As in `torch.nn.Module`; also turns off the gradient of parameters that the path does not use.

        ``model.requires_grad_(True)`` would enable the directors too. Optimizers, DDP and FSDP list modules or
        parameters, and so call this, before they read ``requires_grad``.
        """
        routed = (self.router_weight, *self.experts.parameters())
        for p in self.director.parameters() if self._path == "experts" else routed:
            if isinstance(p, nn.Parameter) and p.requires_grad:  # functional_call replaces parameters by plain tensors.
                p.requires_grad_(False)
        return super().named_modules(*args, **kwargs)

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any.

        @overload
        def __call__(
            self,
            x: Tensor,
            *,
            noise_std: float | Tensor = 0.0,
            router_noise: Tensor | None = None,
            token_mask: Tensor | None = None,
            return_aux: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            *,
            noise_std: float | Tensor = 0.0,
            router_noise: Tensor | None = None,
            token_mask: Tensor | None = None,
            return_aux: Literal[True],
        ) -> tuple[Tensor, Aux]: ...

        def __call__(self, x: Tensor, **options: Any) -> Tensor | tuple[Tensor, Aux]: ...

    def forward(
        self,
        x: Tensor,
        *,
        noise_std: float | Tensor = 0.0,
        router_noise: Tensor | None = None,
        token_mask: Tensor | None = None,
        return_aux: bool = False,
    ) -> Tensor | tuple[Tensor, Aux]:
        """``[B, N, D] -> [B, N, D]``, or maps in the layer's layout; with ``return_aux`` also the `Aux` of this call.

        Args:
            x: the block's normalised input, any strides.
            noise_std: exploration noise of the router in training, a float or 0-dim tensor; ignored in evaluation.
                Inside `collect_aux`, 0.0 means the noise of `collect_aux`.
            router_noise: ``[B, 1, E]`` (``[B, N, E]`` token-wise) standard normal; None: drawn by torch.
            token_mask: bool, the shape of x without D, true for real tokens; None: the mask of `mask_tokens`, or all
                tokens are real. Padding may hold anything, even NaN: its outputs and gradients are 0. The mean token,
                losses and gate masses ignore padding, and images of padding alone. With ``route_from="cls"`` token 0
                must be real (checked on a CPU, not on a GPU). A loss over no real token is 0.
            return_aux: also compute the director and the losses.

        Raises: ValueError naming the argument.
        """
        checks.check_noise_std(noise_std)
        layout, mask = Layout(self.layout, self.windows), self.token_mask if token_mask is None else token_mask
        layout.check(x, self.dim)
        self._check_dtypes(x, return_aux)
        if not hasattr(self.experts, "weights"):  # Before their first use.
            raise ValueError(
                f"experts: expected the layer's own module, got {type(self.experts).__name__}: stacked experts take no "
                "adapters. Let the adapters reach attention, or the director of layers with path='director'"
            )
        if self._path == "experts" and self.training and torch.is_grad_enabled():
            self._check_director()
        if torch.jit.is_tracing() and torch.is_grad_enabled():
            raise ValueError("torch.jit.trace: expected it under torch.no_grad(), got one that records gradients")
        if self._path == "director" and return_aux:
            raise ValueError("return_aux: expected False with path='director', which has no auxiliary losses")
        images = layout.images(x)
        if mask is not None:
            mask = layout.token_mask(mask, x)
            images = images.masked_fill(~mask[..., None], 0)
        aux = None
        if self._path == "director":
            y = self.director(images)
        else:
            y, aux = self._recorded(images, noise_std, router_noise, mask, return_aux)
        if mask is not None:
            y = y.masked_fill(~mask[..., None], 0)
        y = layout.restore(y, x)
        return (y, aux) if return_aux else y

    def _recorded(
        self,
        x: Tensor,
        noise_std: float | Tensor,
        router_noise: Tensor | None,
        token_mask: Tensor | None,
        return_aux: bool,
    ) -> tuple[Tensor, Aux | None]:
        """The experts' output ``[B, N, D]``, and with ``return_aux`` its `Aux`; an open recording gets its own."""
        recording = None if return_aux else self.recording
        if recording is None:
            return self._routed(x, noise_std, router_noise, token_mask, return_aux)
        # Inside backward this is a recomputation (activation checkpointing), usually after collect_aux's block has
        # ended: it repeats the recorded forward and is not recorded itself.
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if not (recording.open or again):
            recording.passed = recording.passed or self.training
            return self._routed(x, noise_std, router_noise, token_mask, False)
        if again and recording.passed:
            raise ValueError(
                "collect_aux: expected every checkpointed forward of a step inside the block, got one after it and "
                "before update_directors, so it is unknown which of them is recomputed"
            )
        if not isinstance(noise_std, Tensor) and noise_std == 0:
            noise_std = recording.noise_std
        y, aux = self._routed(x, noise_std, router_noise, token_mask, True)
        if not again:
            recording.add(aux)
        return y, None

    def _check_dtypes(self, x: Tensor, return_aux: bool) -> None:
        """Raise ValueError naming the parameter, x, or the whole layer if its dtype differs from the rest."""
        autocast = torch.is_autocast_enabled(x.device.type)
        director = next((p.dtype for p in self.director.parameters()), None)  # None: quantised, or a user's own module.
        own = director if self._path == "director" else self.router_weight.dtype
        if self._path == "experts" and not autocast:
            for name, p in self.experts.named_parameters():
                if p.dtype != own:
                    raise ValueError(f"experts.{name}: expected {own}, the dtype of router_weight, got {p.dtype}")
            if return_aux and director not in (own, None):
                raise ValueError(f"director: expected {own}, the dtype of the experts, got {director}")
        if own is not None and (torch.float64 in (x.dtype, own) if autocast else x.dtype != own):
            half = x.dtype in (torch.float16, torch.bfloat16)
            remedy = "wrap the forward in torch.autocast" if half else f"x.to({own}), or layer.to({x.dtype})"
            raise ValueError(f"x: expected {own}, the dtype of the layer's parameters, got {x.dtype}: {remedy}")
        half = self._path == "experts" and self.usage_ema.dtype in (torch.float16, torch.bfloat16)
        if half and self.training and torch.is_grad_enabled() and self.experts.fc1_weight.requires_grad:
            raise ValueError(
                f"parameters: expected float32 or float64 for training, got {own}, in which a director cannot follow "
                "its experts: keep the layer in float32 and wrap the forward in torch.autocast; in evaluation "
                "(layer.eval()) it may be in half precision"
            )

    def _check_director(self) -> None:
        """Raise ValueError for adapters on a director that follows its experts; any module of the user is allowed."""
        for name, module in self.director.named_children():
            adapted = not isinstance(module, nn.Linear) and next(module.parameters(), None) is not None
            if adapted and isinstance(self.director, MLP):
                raise ValueError(
                    f"director.{name}: expected torch.nn.Linear with path='experts', got {type(module).__name__}: "
                    "adapters there are never trained. Let them reach attention, or set path='director'"
                )

    def _routed(
        self,
        x: Tensor,
        noise_std: float | Tensor,
        router_noise: Tensor | None,
        token_mask: Tensor | None,
        return_aux: bool,
    ) -> tuple[Tensor, Aux | None]:
        d = self.director
        # Hooks, such as FSDP's, must be called, and another module in the director's place has its own forward.
        plain = type(d) is MLP and not (d._forward_hooks or d._forward_pre_hooks)
        y, routing, director_out = routed_mlp(
            x,
            self.router_weight,
            self.experts.weights,
            Settings(self.top_k, self.routing, self.route_from, self.temperature, self.activation),
            Noise(noise_std if self.training else 0.0, router_noise, self.usage_ema),
            token_mask=token_mask,
            director=d.weights if return_aux and plain else None,
            shadows=self.shadows,
            backend=self.backend,
        )
        if not return_aux:
            return y, None
        if director_out is None:
            with torch.no_grad():
                director_out = self.director(x)
        backend = backends.covering("align_loss", self.backend, None if token_mask is None else "token_mask")
        align = align_loss(y, director_out, self.align, token_mask=token_mask, backend=backend)
        align = guard_version(align, tuple(self.director.parameters()))
        return y, Aux(align, routing.balance_loss, routing.gate_mass, routing.gates, routing.expert_indices)

    def update_director(
        self,
        gate_mass: Tensor,
        momentum: float | Tensor,
        *,
        skip: Tensor | None = None,
        process_group: dist.ProcessGroup | Literal[False] | None = None,
    ) -> None:
        """GEMA: ``director <- m * director + (1 - m) * sum_e a_e * expert_e``, ``a = s / (sum(s) + 1e-6)``, in place.

        Call it once a step, after backward and before the optimizer. It also moves ``usage_ema``.

        Args:
            gate_mass: s, ``aux.gate_mass [E]`` of this rank (summed over micro-batches). A non-finite mass changes
                nothing; zero total mass does not change the director.
            momentum: m, a float in [0, 1] or a 0-dim tensor.
            skip: 0-dim bool tensor; if it is true on any rank, nothing changes on any rank.
            process_group: the ranks over which the mass is summed. None: the default group if torch.distributed is
                initialised. False: the mass is already summed.
        """
        update_directors([self], [gate_mass], momentum, skip=skip, process_group=process_group)

    def reference_tensors(self) -> dict[str, Tensor]:
        """Published name -> the matching view of this layer's parameters or buffers (not a copy)."""
        tensors = {"router.linear.weight": self.router_weight, "expert_activation_count": self.usage_ema}
        for name, t in self.director.named_parameters():
            tensors[f"director.{name}"] = t
        for e in range(self.num_experts):
            for name, stacked in self.experts.weights._asdict().items():
                tensors[f"experts.{e}.{name.replace('_', '.')}"] = stacked.detach()[e]
        return tensors

    @torch.no_grad()
    def copy_director_to_experts_(self) -> None:
        """Make every expert a copy of the director: the start of a new layer, or from a dense checkpoint."""
        for director, experts in self.director_pairs():
            experts.copy_(director.expand_as(experts))

    def director_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """``(director tensor, stacked expert tensor [E, ...])`` of all four parameters."""
        return list(zip(self.director.weights, self.experts.weights, strict=True))

    def extra_repr(self) -> str:
        """Sizes, and every other argument that is not at its default."""
        options = [p for p in inspect.signature(DEXLayer).parameters.values() if p.kind == p.KEYWORD_ONLY]
        values = {p.name: getattr(self, p.name) for p in options if getattr(self, p.name) != p.default}
        sizes = f"{self.dim}, {self.hidden_dim}, num_experts={self.num_experts}, top_k={self.top_k}"
        return ", ".join((sizes, *(f"{name}={value!r}" for name, value in values.items())))


@torch.no_grad()
def update_directors(
    layers: Iterable[DEXLayer],
    gate_mass: Iterable[Tensor],
    momentum: float | Tensor,
    *,
    skip: Tensor | None = None,
    process_group: dist.ProcessGroup | Literal[False] | None = None,
) -> None:
    """`DEXLayer.update_director` of many layers: one all-reduce and one `group_ema_` for all of them."""
    layers = list(layers)
    checks.check_momentum(momentum)
    followed = agree(layers, gate_mass, skip, process_group)
    if followed is None:
        return
    directors, experts, weights = [], [], []
    for layer, a in zip(layers, followed.group_weights, strict=True):
        for director, stacked in layer.director_pairs():
            director, stacked = local_pair(director, stacked)
            directors.append(director), experts.append(stacked), weights.append(a)
    backend = backends.covering("group_ema_", layers[0].backend)
    group_ema_(directors, experts, weights, momentum, skip=followed.still, backend=backend)
    written_in_graph(director for layer in layers for director in layer.director.weights)
    move_usage(layers, followed)


class Followed(NamedTuple):
    """The agreed inputs of a directors' update."""

    group_weights: list[Tensor]
    """``[E]`` per layer, the normalised gate mass of all ranks."""
    still: Tensor
    """0-dim bool, the same on every rank: whether nothing changes."""


def agree(
    layers: list[DEXLayer],
    gate_mass: Iterable[Tensor],
    skip: Tensor | None,
    process_group: dist.ProcessGroup | Literal[False] | None,
) -> Followed | None:
    """Check layers and masses, and sum the masses over the ranks; None without layers."""
    gate_mass = list(gate_mass)
    checks.check_skip(skip)
    if len(gate_mass) != len(layers):
        raise ValueError(f"gate_mass: expected one tensor per layer ({len(layers)}), got {len(gate_mass)}")
    for i, (layer, mass) in enumerate(zip(layers, gate_mass, strict=True)):
        if layer.path == "director":
            raise ValueError("update_director: expected path='experts'; with path='director' the optimizer trains it")
        if not isinstance(mass, Tensor) or tuple(mass.shape) != (layer.num_experts,):
            shape = list(mass.shape) if isinstance(mass, Tensor) else repr(mass)
            raise ValueError(f"gate_mass[{i}]: expected [{layer.num_experts}], got {shape}")
        if mass.device != layer.usage_ema.device:
            raise ValueError(f"gate_mass[{i}]: expected device {layer.usage_ema.device}, got {mass.device}")
    if not layers:
        return None
    for layer in layers:
        layer.replaced.check_optimizers()
    if len({layer.backend for layer in layers}) > 1:
        raise ValueError(f"layers: expected one backend, got {', '.join(str(layer.backend) for layer in layers)}")
    if process_group not in (None, False) and not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(f"process_group: expected a process group, None or False, got {process_group!r}")
    # skip is reduced with the masses: if one rank skips a step, all must, or their directors drift apart.
    flag = gate_mass[0].new_zeros(1) if skip is None else skip.to(gate_mass[0]).view(1)
    masses = torch.cat([*(m.detach() for m in gate_mass), flag])
    if process_group is not False and dist.is_available() and dist.is_initialized():
        dist.all_reduce(masses, group=process_group)
    still = ~masses.isfinite().all() | (masses[-1] > 0)
    masses = masses[:-1].split([layer.num_experts for layer in layers])
    return Followed([m / (m.sum() + EPS) for m in masses], still)


def move_usage(layers: list[DEXLayer], followed: Followed) -> None:
    """Move ``usage_ema`` of each layer towards the same weights."""
    for layer, a in zip(layers, followed.group_weights, strict=True):
        u, m = layer.usage_ema, layer.usage_momentum
        u.copy_(torch.where(followed.still, u, m * u + (1 - m) * a.to(u.dtype)))


def local_pair(director: Tensor, stacked: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's pieces ``(director, stacked experts [E, ...])``, with the same features of both in every placement.

    A director cut along dimension d matches experts cut along d + 1. Experts that are cut differently, as by default
    in `fully_shard`, are redistributed; every rank must then call this.

    Raises: ValueError if the director is cut but the experts are not, or are cut over another mesh.
    """
    if not (hasattr(director, "placements") or hasattr(stacked, "placements")):
        return director, stacked
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(director, DTensor):  # Whole on every rank.
        return director, stacked.full_tensor()
    if not isinstance(stacked, DTensor):
        raise ValueError(
            "experts: expected them to be cut over ranks like their director, got whole tensors: wrap the module that "
            "contains the DEXLayer, not only its director, or call dexkernels.shard(model)"
        )
    if director.device_mesh != stacked.device_mesh:
        raise ValueError("experts: expected the mesh of the director, got another one; call dexkernels.shard(model)")
    placements = tuple(Shard(p.dim + 1) if p.is_shard() else p for p in director.placements)
    if any(p.is_partial() for p in (*director.placements, *stacked.placements)):
        raise ValueError(f"director: expected placements Shard or Replicate, got {director.placements}")
    if stacked.placements != placements:
        stacked = stacked.redistribute(placements=placements)
    return director.to_local(), stacked.to_local()
