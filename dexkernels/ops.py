"""The operators: validation, autocast, torch.library registration and autograd, written once for all backends.

Every operator is a function of this module that checks its arguments and calls a `torch.library` operator of the
namespace ``dexkernels``; that one calls the launcher which `backends.LAUNCHERS` names. Backwards are operators too,
so that `torch.compile` never looks into either.
Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen, R decisions (B, or B*N token-wise),
S = R*K slots.
"""

import torch
from torch import Tensor

from . import backends, reference
from .checks import (
    FLOATS,
    check_choice,
    check_momentum,
    check_noise_std,
    check_skip,
    check_temperature,
    check_tensor,
    check_top_k,
    check_x,
    describe,
    shape_of,
)
from .routing import Routing
from .shadows import Shadows

ROUTINGS = ("image", "token")
ROUTE_FROM = ("cls", "mean")
ALIGN_KINDS = ("kd", "cosine", "mse")


def route(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    *,
    routing: str = "image",
    route_from: str = "cls",
    temperature: float = 0.5,
    noise_std: float | Tensor = 0.0,
    router_noise: Tensor | None = None,
    usage_ema: Tensor | None = None,
    backend: str | None = None,
) -> Routing:
    """Choose K of E experts for every image (``routing="image"``) or token (``"token"``).

    ``p = softmax((r @ router_weight.T + noise) / temperature)``, gates are the K largest p over their sum. Computed in
    float32 for half-precision inputs and outside autocast.

    Args:
        x: ``[B, N, D]``, CLS token first.
        router_weight: ``[E, D]``.
        top_k: K, ``1 <= K <= E``.
        route_from: image-wise only: ``"cls"`` decides from ``x[:, 0]``, ``"mean"`` from the mean token.
        noise_std: exploration noise, a float or 0-dim tensor, ``>= 0``; a float 0 means none.
        router_noise: standard normal noise ``[B, 1, E]`` (image) or ``[B, N, E]`` (token); drawn when None.
        usage_ema: ``[E]`` running usage, needed with noise.

    Returns: a `Routing`. Its ``gates`` and ``balance_loss`` are differentiable in x and router_weight.
    Raises: ValueError naming the argument.
    """
    noise = _check_route(x, router_weight, top_k, routing, route_from, temperature, noise_std, router_noise, usage_ema)
    backend = backends.choose("route", backend, x.device)
    r = _router_rows(x, routing, route_from)
    p, *fields = torch.ops.dexkernels.route(r, router_weight, noise, usage_ema, top_k, temperature, backend)
    return _routing(x, routing, *fields)


def grouped_mlp(
    x: Tensor,
    routing: Routing,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """``out[b] = sum_k gates[b, k] * fc2_e(gelu(fc1_e(x[b])))`` with ``e = expert_indices[b, k]`` and the exact GELU.

    Args:
        x: ``[B, N, D]``.
        routing: what `route` returned for this x; gates ``[B, K]`` (per image) or ``[B, N, K]`` (per token).
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: ``[E, H, D]``, ``[E, H]``, ``[E, D, H]``, ``[E, D]``, dtype of x
            (any of the four float dtypes; under autocast copies of its dtype are computed with, and gradients of the
            weights come in the weights' own).

    Returns: ``[B, N, D]``. Differentiable once, in x, gates and weights; an expert without images gets exact zeros.
    Raises: ValueError naming the argument.
    """
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    _check_mlp(x, weights)
    B, N, D = x.shape
    gates = routing.gates
    if tuple(gates.shape[:-1]) not in ((B,), (B, N)):
        raise ValueError(f"routing.gates: expected [{B}, K] or [{B}, {N}, K] for this x, got {shape_of(gates)}")
    check_tensor("routing.group_sizes", routing.group_sizes, (fc1_weight.shape[0],), like=x, same_dtype=False)
    check_tensor("routing.slot_order", routing.slot_order, (gates.numel(),), like=x, same_dtype=False)
    check_tensor("routing.group_offsets", routing.group_offsets, (fc1_weight.shape[0] + 1,), like=x, same_dtype=False)
    backend = backends.choose("grouped_mlp", backend, x.device)
    x = x.to(_autocast_dtype(x))
    shadows = _shadows(x.dtype, weights, None, None)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gates, *weights))
    if gates.dim() == 3:
        x, gates = x.reshape(B * N, 1, D), gates.flatten(0, 1)
    out, _ = torch.ops.dexkernels.grouped_mlp(
        x, gates, routing.slot_order, routing.group_offsets, *weights, *shadows, save, backend
    )
    return out.view(B, N, D)


def routed_mlp(
    x: Tensor,
    router_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    top_k: int,
    *,
    routing: str = "image",
    route_from: str = "cls",
    temperature: float = 0.5,
    noise_std: float | Tensor = 0.0,
    router_noise: Tensor | None = None,
    usage_ema: Tensor | None = None,
    director: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    shadows: Shadows | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Routing, Tensor | None]:
    """`route`, then `grouped_mlp`, as one autograd node: the router's gradient of x is added to the rows it read.

    Two nodes would fill an ``[B, N, D]`` tensor with zeros but for the CLS rows and add it. Arguments, results and
    errors are those of the two, and:

    Args:
        director: its fc1_weight ``[H, D]``, fc1_bias ``[H]``, fc2_weight ``[D, H]`` and fc2_bias ``[D]``, when its
            output is wanted. Where the weights have shadows it is one more expert of the same launches, and its output
            ``[B, N, D]`` comes third, without a gradient; else that is None: to stand beside the experts it would have
            to be copied.
        shadows: where the layer keeps its own.
    """
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    noise = _check_route(x, router_weight, top_k, routing, route_from, temperature, noise_std, router_noise, usage_ema)
    _check_mlp(x, weights)
    check_tensor("router_weight", router_weight, (fc1_weight.shape[0], x.shape[2]), like=x, same_dtype=False)
    if director is not None:
        for name, t, w in zip(("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"), director, weights, strict=True):
            check_tensor(f"director.{name}", t, tuple(w.shape[1:]), like=x, same_dtype=False)
    route_backend = backends.choose("route", backends.covering("route", backend), x.device)
    mlp_backend = backends.choose("grouped_mlp", backends.covering("grouped_mlp", backend), x.device)
    # The router reads x as it came; only the experts compute in autocast's dtype.
    compute = _autocast_dtype(x)
    lowered = _shadows(compute, weights, director, shadows)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, router_weight, *weights))
    out, _, director_out, _, *fields = torch.ops.dexkernels.routed_mlp(
        x, router_weight, noise, usage_ema, *weights, *lowered, top_k, temperature, routing, route_from, save,
        route_backend, mlp_backend,
    )  # fmt: skip
    apart = director is None or lowered[0] is None
    return out, _routing(x, routing, *fields), None if apart else director_out


def align_loss(experts_out: Tensor, director_out: Tensor, kind: str = "kd", *, backend: str | None = None) -> Tensor:
    """How far the experts' output is from the director's, a 0-dim mean over all leading dimensions.

    - ``kd``: ``q = softmax(experts_out)``, ``p = softmax(director_out / 0.5)``; ``-sum_D p * log(max(q, 1e-6))``.
    - ``cosine``: ``1 - cos`` along D, the paper's Eq. 7.
    - ``mse``: mean squared difference.

    Args:
        experts_out, director_out: ``[..., D]``, same shape; no gradient flows into director_out.

    Returns: 0-dim, float32 for half-precision inputs. Raises: ValueError naming the argument.
    """
    check_choice("kind", kind, ALIGN_KINDS)
    if not isinstance(experts_out, Tensor) or experts_out.dim() < 1 or experts_out.dtype not in FLOATS:
        raise ValueError(f"experts_out: expected a floating-point tensor [..., D], got {describe(experts_out)}")
    check_tensor("director_out", director_out, tuple(experts_out.shape), like=experts_out, same_dtype=False)
    backend = backends.choose("align_loss", backend, experts_out.device)
    loss, _ = torch.ops.dexkernels.align_loss(experts_out, director_out.detach(), kind, backend)
    return loss


def group_ema_(
    directors: list[Tensor],
    experts: list[Tensor],
    group_weights: list[Tensor],
    momentum: float | Tensor,
    *,
    skip: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """GEMA: ``director <- m * director + (1 - m) * sum_e a_e * experts[e]``, in place, of any number of tensors.

    Args:
        directors: tensors of any shape, float32 or float64: in half precision a director would not move at m = 0.999.
        experts: one ``[E, *director.shape]`` per director.
        group_weights: one ``[E]`` per director, normalised gate mass. Weight 0 contributes nothing whatever the expert
            holds; all 0 leaves the director as it is.
        momentum: m, a float in [0, 1] or a 0-dim tensor.
        skip: 0-dim bool tensor; where true nothing changes.

    Raises: ValueError naming the argument, before anything is changed.
    """
    for name, tensors in (("directors", directors), ("experts", experts), ("group_weights", group_weights)):
        if not isinstance(tensors, (list, tuple)):
            raise ValueError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
    if not len(directors) == len(experts) == len(group_weights):
        raise ValueError(
            f"experts, group_weights: expected one per director ({len(directors)}), "
            f"got {len(experts)} and {len(group_weights)}"
        )
    check_momentum(momentum)
    check_skip(skip)
    for i, (d, e, a) in enumerate(zip(directors, experts, group_weights, strict=True)):
        if not isinstance(d, Tensor) or d.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"directors[{i}]: expected float32 or float64 (half precision cannot follow), got {describe(d)}"
            )
        check_tensor(f"experts[{i}]", e, (None, *d.shape), like=d)
        check_tensor(f"group_weights[{i}]", a, (e.shape[0],), like=d, same_dtype=False)
    if not directors:
        return
    device = directors[0].device
    if not isinstance(momentum, Tensor):
        # A kernel that fills, not a copy from the host: nobody waits. float64: 1 - m is exact to the last bit.
        momentum = torch.full((), momentum, dtype=torch.float64, device=device)
    backend = backends.choose("group_ema_", backend, device)
    if torch.compiler.is_compiling():
        torch.ops.dexkernels.group_ema_(directors, experts, group_weights, momentum, skip, backend)
    else:
        # There is no gradient to record; the dispatcher would only add its time to each step.
        with torch.no_grad():
            backends.LAUNCHERS["group_ema_", backend](directors, experts, group_weights, momentum, skip)


def guard_version(loss: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """``loss`` itself, whose backward raises RuntimeError when one of ``tensors`` was changed in place since.

    Without it, a layer that is recomputed in backward (activation checkpointing) after an early `update_director`
    would silently use the new director. Compiled graphs go without: there is no version to read while tracing.
    """
    if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
        return loss
    return _GuardVersion.apply(loss, tensors)


class _GuardVersion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, tensors):
        _remember_versions(ctx, tensors)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad):
        _check_versions(ctx)
        return grad, None


def _remember_versions(ctx, tensors: tuple[Tensor, ...]) -> None:
    # Plain attributes: saved tensors would be recomputed together with the forward, at their new version.
    ctx.guarded = [(t, t._version) for t in tensors]


def _check_versions(ctx) -> None:
    if any(t._version != version for t, version in ctx.guarded):
        raise RuntimeError(
            "the director or usage_ema was changed between forward and backward: call update_director after backward "
            "(the losses of a step use the director before its update)"
        )


def _remember_usage(ctx, noise: Tensor | None, usage_ema: Tensor | None) -> None:
    # The noise was made from usage_ema: a forward recomputed after an early update would route otherwise.
    _remember_versions(ctx, () if noise is None else (usage_ema,))


# --- torch.library: one operator for each forward and each backward ---------------------------------------------------


def _plain(device: torch.device):
    """Autocast off: an operator's dtypes are decided before it is called, also when backward runs under autocast."""
    return torch.autocast(device.type, enabled=False)


@torch.library.custom_op("dexkernels::route", mutates_args=())
def _route(
    r: Tensor,
    router_weight: Tensor,
    noise: Tensor | None,
    usage_ema: Tensor | None,
    top_k: int,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with _plain(r.device):
        return backends.LAUNCHERS["route", backend].forward(r, router_weight, top_k, temperature, noise)


@_route.register_fake
def _(r, router_weight, noise, usage_ema, top_k, temperature, backend):
    return _route_shapes(r, r.shape[0], router_weight.shape[0], top_k)


def _route_shapes(like, R, E, K):
    real = reference.accumulation_dtype(like.dtype)
    p, gates, mass = (like.new_empty(s, dtype=real) for s in ((R, E), (R, K), (E,)))
    indices = like.new_empty((R, K), dtype=torch.int32)
    order, sizes, offsets = (like.new_empty(n, dtype=torch.int64) for n in (R * K, E, E + 1))
    return p, gates, indices, like.new_empty((), dtype=real), mass, order, sizes, offsets


@torch.library.custom_op("dexkernels::route_backward", mutates_args=())
def _route_backward(
    grad_gates: Tensor,
    grad_balance: Tensor,
    p: Tensor,
    gates: Tensor,
    expert_indices: Tensor,
    r: Tensor,
    router_weight: Tensor,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with _plain(r.device):
        return backends.LAUNCHERS["route", backend].backward(
            grad_gates, grad_balance, p, expert_indices, gates, r, router_weight, gates.shape[1], temperature
        )


@_route_backward.register_fake
def _(grad_gates, grad_balance, p, gates, expert_indices, r, router_weight, temperature, backend):
    return r.new_empty(r.shape), router_weight.new_empty(router_weight.shape)


def _route_save(ctx, inputs, output):
    r, router_weight, noise, usage_ema, _, ctx.temperature, ctx.backend = inputs
    _remember_usage(ctx, noise, usage_ema)
    p, gates, indices, _, mass, *_ = output
    ctx.mark_non_differentiable(p, mass)
    ctx.save_for_backward(p, gates, indices, r, router_weight)


def _route_grad(ctx, _, grad_gates, __, grad_balance, *___):
    _check_versions(ctx)
    dr, drouter = torch.ops.dexkernels.route_backward(
        grad_gates, grad_balance, *ctx.saved_tensors, ctx.temperature, ctx.backend
    )
    return dr, drouter, None, None, None, None, None


_route.register_autograd(_route_grad, setup_context=_route_save)


@torch.library.custom_op("dexkernels::grouped_mlp", mutates_args=())
def _grouped_mlp(
    x: Tensor,
    gates: Tensor,
    slot_order: Tensor,
    group_offsets: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    fc1_weight_shadow: Tensor | None,
    fc1_bias_shadow: Tensor | None,
    fc2_weight_shadow: Tensor | None,
    fc2_bias_shadow: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Shadows: see `_shadows`; here and below the weights serve their gradients alone where there are some."""
    weights = fc1_weight, fc1_bias, fc2_weight, fc2_bias
    if fc1_weight_shadow is not None:
        weights = fc1_weight_shadow, fc1_bias_shadow, fc2_weight_shadow, fc2_bias_shadow
    with _plain(x.device):
        out, z, _ = backends.LAUNCHERS["grouped_mlp", backend].forward(
            x, gates, slot_order, group_offsets, *weights, save
        )
    return out, z


@_grouped_mlp.register_fake
def _(x, gates, slot_order, group_offsets, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *others):
    save = others[-2]
    return x.new_empty(x.shape), _z_shape(x, slot_order.shape[0], fc1_bias.shape[1], save)


def _z_shape(x, S, H, save):
    return x.new_empty((S, x.shape[1], H) if save else (0, x.shape[1], H))


@torch.library.custom_op("dexkernels::grouped_mlp_backward", mutates_args=())
def _grouped_mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    gates: Tensor,
    slot_order: Tensor,
    group_offsets: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    z: Tensor,
    need_x: bool,
    need_gates: bool,
    need_weights: bool,
    grad_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weights, or their shadows; their gradients are of grad_dtype.

    An empty tensor stands for a gradient that is not needed: operators do not return None.
    """
    with _plain(x.device):
        grads = backends.LAUNCHERS["grouped_mlp", backend].backward(
            grad_out,
            x,
            gates,
            slot_order,
            group_offsets,
            fc1_weight,
            fc2_weight,
            fc2_bias,
            z,
            need_x=need_x,
            need_gates=need_gates,
            need_weights=need_weights,
            grad_dtype=grad_dtype,
        )
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@_grouped_mlp_backward.register_fake
def _(
    grad_out, x, gates, slot_order, group_offsets, fc1_weight, fc2_weight, fc2_bias, z,
    need_x, need_gates, need_weights, grad_dtype, backend,
):  # fmt: skip
    dx, dgates = (t.new_empty(t.shape) if need else x.new_empty(0) for need, t in ((need_x, x), (need_gates, gates)))
    return dx, dgates, *_weight_grad_shapes(x, fc2_weight, need_weights, grad_dtype)


def _weight_grad_shapes(x, fc2_weight, need, grad_dtype):
    E, D, H = fc2_weight.shape
    if not need:
        return tuple(x.new_empty(0) for _ in range(4))
    return tuple(x.new_empty(shape, dtype=grad_dtype) for shape in ((E, H, D), (E, H), (E, D, H), (E, D)))


def _grouped_mlp_save(ctx, inputs, output):
    x, gates, slot_order, group_offsets, *weights, _, ctx.backend = inputs
    _, z = output
    ctx.mark_non_differentiable(z)
    ctx.grad_dtype = weights[0].dtype
    fc1_weight, _, fc2_weight, fc2_bias = weights[:4] if weights[4] is None else weights[4:]
    ctx.save_for_backward(x, gates, slot_order, group_offsets, fc1_weight, fc2_weight, fc2_bias, z)


def _grouped_mlp_grad(ctx, grad_out, _):
    need_x, need_gates, _, _, *need_weights = ctx.needs_input_grad[:8]
    grads = torch.ops.dexkernels.grouped_mlp_backward(
        grad_out, *ctx.saved_tensors, need_x, need_gates, any(need_weights), ctx.grad_dtype, ctx.backend
    )
    dx, dgates, *dweights = _needed(grads, (need_x, need_gates, *need_weights))
    return dx, dgates, None, None, *dweights, *[None] * 6


_grouped_mlp.register_autograd(_grouped_mlp_grad, setup_context=_grouped_mlp_save)


def _needed(grads, needs):
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


@torch.library.custom_op("dexkernels::routed_mlp", mutates_args=())
def _routed_mlp(
    x: Tensor,
    router_weight: Tensor,
    noise: Tensor | None,
    usage_ema: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    fc1_weight_shadow: Tensor | None,
    fc1_bias_shadow: Tensor | None,
    fc2_weight_shadow: Tensor | None,
    fc2_bias_shadow: Tensor | None,
    top_k: int,
    temperature: float,
    routing: str,
    route_from: str,
    save: bool,
    route_backend: str,
    mlp_backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, z, the director's output ``[B, N, D]`` (``[0]`` unless it is in the shadows), then what `_route` returns."""
    weights = fc1_weight, fc1_bias, fc2_weight, fc2_bias
    if fc1_weight_shadow is not None:
        weights = fc1_weight_shadow, fc1_bias_shadow, fc2_weight_shadow, fc2_bias_shadow
    with _plain(x.device):
        r = _router_rows(x, routing, route_from)
        routed = backends.LAUNCHERS["route", route_backend].forward(r, router_weight, top_k, temperature, noise)
        _, gates, _, _, _, slot_order, _, group_offsets = routed
        out, z, director_out = backends.LAUNCHERS["grouped_mlp", mlp_backend].forward(
            _images(x, routing).to(weights[0].dtype), gates, slot_order, group_offsets, *weights, save
        )
    # By its shape, which a batch of no images has too.
    director_out = director_out.view(x.shape if reference.has_director(weights[0], group_offsets) else 0)
    return out.view(x.shape), z, director_out, *routed


@_routed_mlp.register_fake
def _(
    x, router_weight, noise, usage_ema, fc1_weight, fc1_bias, fc2_weight, fc2_bias, fc1_weight_shadow,
    fc1_bias_shadow, fc2_weight_shadow, fc2_bias_shadow, top_k, temperature, routing, route_from, save, route_backend,
    mlp_backend,
):  # fmt: skip
    rows = _images(x, routing)
    compute = fc1_weight if fc1_weight_shadow is None else fc1_weight_shadow
    routed = _route_shapes(x, rows.shape[0], router_weight.shape[0], top_k)
    z = _z_shape(rows, rows.shape[0] * top_k, fc1_bias.shape[1], save).to(compute.dtype)
    out, director_out = (
        x.new_empty(shape, dtype=compute.dtype)
        for shape in (x.shape, x.shape if compute.shape[0] > router_weight.shape[0] else 0)
    )
    return out, z, director_out, *routed


@torch.library.custom_op("dexkernels::routed_mlp_backward", mutates_args=())
def _routed_mlp_backward(
    grad_out: Tensor,
    grad_gates: Tensor,
    grad_balance: Tensor,
    x: Tensor,
    router_weight: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    z: Tensor,
    p: Tensor,
    gates: Tensor,
    expert_indices: Tensor,
    slot_order: Tensor,
    group_offsets: Tensor,
    temperature: float,
    routing: str,
    route_from: str,
    need_x: bool,
    need_router: bool,
    need_weights: bool,
    grad_dtype: torch.dtype,
    route_backend: str,
    mlp_backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with _plain(x.device):
        dx, dgates, *dweights = backends.LAUNCHERS["grouped_mlp", mlp_backend].backward(
            _images(grad_out, routing),
            _images(x, routing).to(fc1_weight.dtype),
            gates,
            slot_order,
            group_offsets,
            fc1_weight,
            fc2_weight,
            fc2_bias,
            z,
            need_x=need_x,
            need_gates=need_x or need_router,
            need_weights=need_weights,
            grad_dtype=grad_dtype,
        )
        drouter = None
        if need_x or need_router:
            dr, drouter = backends.LAUNCHERS["route", route_backend].backward(
                dgates + grad_gates,
                grad_balance,
                p,
                expert_indices,
                gates,
                _router_rows(x, routing, route_from),
                router_weight,
                gates.shape[1],
                temperature,
            )
        if need_x:
            dx = dx.view(x.shape).to(x.dtype)
            if routing == "token":
                dx += dr.view(x.shape)
            elif route_from == "cls":
                dx[:, 0] += dr
            else:
                dx += dr[:, None] / x.shape[1]
    return tuple(x.new_empty(0) if g is None else g for g in (dx, drouter, *dweights))


@_routed_mlp_backward.register_fake
def _(
    grad_out, grad_gates, grad_balance, x, router_weight, fc1_weight, fc2_weight, fc2_bias, z, p, gates, expert_indices,
    slot_order, group_offsets, temperature, routing, route_from, need_x, need_router, need_weights, grad_dtype,
    route_backend, mlp_backend,
):  # fmt: skip
    needed = ((need_x, x), (need_x or need_router, router_weight))
    dx, drouter = (t.new_empty(t.shape) if need else x.new_empty(0) for need, t in needed)
    return dx, drouter, *_weight_grad_shapes(x, fc2_weight, need_weights, grad_dtype)


def _routed_mlp_save(ctx, inputs, output):
    x, router_weight, noise, usage_ema, *weights, _, temperature, routing, route_from, _, route, mlp = inputs
    _remember_usage(ctx, noise, usage_ema)
    _, z, director_out, p, gates, indices, _, mass, slot_order, _, group_offsets = output
    ctx.mark_non_differentiable(z, director_out, p, mass)
    ctx.settings = temperature, routing, route_from
    ctx.rest = weights[0].dtype, route, mlp
    weights = weights[:4] if weights[4] is None else [w[: router_weight.shape[0]] for w in weights[4:]]
    fc1_weight, _, fc2_weight, fc2_bias = weights
    ctx.save_for_backward(
        x, router_weight, fc1_weight, fc2_weight, fc2_bias, z, p, gates, indices, slot_order, group_offsets
    )


def _routed_mlp_grad(ctx, grad_out, _, __, ___, grad_gates, ____, grad_balance, *_____):
    _check_versions(ctx)
    need_x, need_router, _, _, *need_weights = ctx.needs_input_grad[:8]
    grads = torch.ops.dexkernels.routed_mlp_backward(
        grad_out, grad_gates, grad_balance, *ctx.saved_tensors, *ctx.settings, need_x, need_router, any(need_weights),
        *ctx.rest,
    )  # fmt: skip
    dx, drouter, *dweights = _needed(grads, (need_x, need_router, *need_weights))
    return dx, drouter, None, None, *dweights, *[None] * 11


_routed_mlp.register_autograd(_routed_mlp_grad, setup_context=_routed_mlp_save)


@torch.library.custom_op("dexkernels::align_loss", mutates_args=())
def _align_loss(experts_out: Tensor, director_out: Tensor, kind: str, backend: str) -> tuple[Tensor, Tensor]:
    with _plain(experts_out.device):
        return backends.LAUNCHERS["align_loss", backend].forward(experts_out, director_out, kind)


@_align_loss.register_fake
def _(experts_out, director_out, kind, backend):
    dtype = reference.accumulation_dtype(experts_out.dtype)
    saved = backends.ALIGN_SAVED[backend][kind], experts_out[..., 0].numel() if experts_out.shape[-1] else 0
    return experts_out.new_empty((), dtype=dtype), experts_out.new_empty(saved, dtype=dtype)


@torch.library.custom_op("dexkernels::align_loss_backward", mutates_args=())
def _align_loss_backward(
    grad_loss: Tensor, experts_out: Tensor, director_out: Tensor, saved: Tensor, kind: str, backend: str
) -> Tensor:
    with _plain(experts_out.device):
        return backends.LAUNCHERS["align_loss", backend].backward(grad_loss, experts_out, director_out, saved, kind)


@_align_loss_backward.register_fake
def _(grad_loss, experts_out, director_out, saved, kind, backend):
    return experts_out.new_empty(experts_out.shape)


def _align_loss_save(ctx, inputs, output):
    experts_out, director_out, ctx.kind, ctx.backend = inputs
    _, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(experts_out, director_out, saved)


def _align_loss_grad(ctx, grad_loss, _):
    grad = torch.ops.dexkernels.align_loss_backward(grad_loss, *ctx.saved_tensors, ctx.kind, ctx.backend)
    return grad, None, None, None


_align_loss.register_autograd(_align_loss_grad, setup_context=_align_loss_save)


@torch.library.custom_op("dexkernels::group_ema_", mutates_args=("directors",))
def _group_ema_(
    directors: list[Tensor],
    experts: list[Tensor],
    group_weights: list[Tensor],
    momentum: Tensor,
    skip: Tensor | None,
    backend: str,
) -> None:
    backends.LAUNCHERS["group_ema_", backend](directors, experts, group_weights, momentum, skip)


@_group_ema_.register_fake
def _(directors, experts, group_weights, momentum, skip, backend):
    return None


# --- what the operators above share -----------------------------------------------------------------------------------


def _router_rows(x: Tensor, routing: str, route_from: str) -> Tensor:
    """What the router reads: ``[B, D]`` per image, ``[B*N, D]`` per token; contiguous: strides change no bit."""
    if routing == "token":
        return x.reshape(-1, x.shape[2]).contiguous()
    if route_from == "cls":
        return x[:, 0].contiguous()
    return x.contiguous().mean(1, dtype=reference.accumulation_dtype(x.dtype))


def _images(x: Tensor, routing: str) -> Tensor:
    """``[B, N, D]``, or token-wise ``[B*N, 1, D]``: to the experts a token is then an image of its own."""
    return x.reshape(-1, 1, x.shape[2]) if routing == "token" else x


def _routing(x, routing, gates, indices, balance_loss, mass, slot_order, group_sizes, group_offsets) -> Routing:
    if routing == "token":
        shape = (*x.shape[:2], gates.shape[1])
        gates, indices = gates.view(shape), indices.view(shape)
    return Routing(gates, indices, balance_loss, mass, slot_order, group_sizes, group_offsets)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _shadows(
    dtype: torch.dtype,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    director: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    shadows: Shadows | None,
) -> list[Tensor | None]:
    """Copies of the weights in ``dtype``, the director's behind the experts': ``[E(+1), ...]``; None if they are of it.

    Outside of autograd: the operators give the weights their gradients, in the weights' own dtype.
    """
    keep = not (torch.is_grad_enabled() and any(w.requires_grad for w in weights))
    if any(d.requires_grad for d in director or ()):
        keep = False  # it is trained by forwards of its own, which are not seen here
    if all(w.dtype == dtype for w in weights):
        if shadows is not None and not keep:
            shadows.used_without()
        return [None] * 4
    return (shadows or Shadows()).of(weights, director, dtype, keep)


def _check_route(
    x, router_weight, top_k, routing, route_from, temperature, noise_std, router_noise, usage_ema
) -> Tensor | None:
    """Validate; returns what is added to the logits, ``[R, E]``, or None."""
    check_x(x)
    check_choice("routing", routing, ROUTINGS)
    check_choice("route_from", route_from, ROUTE_FROM)
    B, N, D = x.shape
    check_tensor("router_weight", router_weight, (None, D), like=x, same_dtype=False)
    E = router_weight.shape[0]
    check_top_k(top_k, E)
    check_temperature(temperature)
    if N == 0:
        raise ValueError("x: expected at least one token to route from, got shape " + shape_of(x))
    check_noise_std(noise_std)
    if not isinstance(noise_std, Tensor) and noise_std == 0:
        return None
    shape = (B, 1 if routing == "image" else N, E)
    if usage_ema is None:
        raise ValueError("usage_ema: expected a tensor [E] when noise_std is not 0, got None")
    check_tensor("usage_ema", usage_ema, (E,), like=x, same_dtype=False)
    if router_noise is None:
        router_noise = torch.randn(shape, device=x.device)
    check_tensor("router_noise", router_noise, shape, like=x, same_dtype=False)
    with torch.no_grad():
        noise = reference.expert_usage_noise(noise_std, router_noise, usage_ema)
    return noise.reshape(-1, E)


def _check_mlp(x: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    check_x(x)
    same_dtype = not torch.is_autocast_enabled(x.device.type)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    check_tensor("fc1_weight", fc1_weight, (None, None, x.shape[2]), like=x, same_dtype=same_dtype)
    E, H, D = fc1_weight.shape
    check_tensor("fc1_bias", fc1_bias, (E, H), like=x, same_dtype=same_dtype)
    check_tensor("fc2_weight", fc2_weight, (E, D, H), like=x, same_dtype=same_dtype)
    check_tensor("fc2_bias", fc2_bias, (E, D), like=x, same_dtype=same_dtype)
