"""`routed_mlp`: `route`, then `grouped_mlp`, as one autograd node that runs their backends.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen, R decisions (B, or B*N token-wise).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check_tensor, check_token_mask, check_transforms, check_weights
from ...records import MLPWeights
from ...routing import Routing
from ...shadows import Shadows, shadowed
from .. import backends
from ..common import autocast_dtype, check_versions, gradients, or_empty, without_autocast
from ..grouped_mlp import empty_weight_grads, empty_z, need_of, run_backward, run_forward
from ..grouped_mlp import records as mlp
from ..route import (
    Noise,
    as_routing,
    check_tokens,
    counted_rows,
    empty_routed,
    num_real,
    remember_usage,
    router_rows,
    scaled_noise,
)
from ..route import records as router
from ..route import run_forward as run_router


class Settings(NamedTuple):
    """Routing settings of a layer, see `route`, and the activation of its experts, see `grouped_mlp`."""

    top_k: int
    routing: str = "image"
    route_from: str = "cls"
    temperature: float = 0.5
    activation: str = "gelu"


def routed_mlp(
    x: Tensor,
    router_weight: Tensor,
    weights: MLPWeights,
    settings: Settings,
    noise: Noise,
    *,
    token_mask: Tensor | None = None,
    director: MLPWeights | None = None,
    shadows: Shadows | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Routing, Tensor | None]:
    """`route`, then `grouped_mlp`, as one autograd node: the router's gradient of x is added to the rows it read.

    Two nodes would add an ``[B, N, D]`` tensor that is zero except for the CLS rows. Arguments and results are those
    of the two operators. The calling layer has checked x, the settings and ``noise.std``; here the tensors are checked
    against each other.

    Args:
        token_mask: bool ``[B, N]``, see `DEXLayer.forward`. Padding must be 0 in x; its outputs are undefined.
        director: its weights, without the leading E, to also return its output. If the weights have shadows, the
            director is one more expert of the same launches, and the third result is its output ``[B, N, D]``,
            without a gradient. Otherwise the third result is None, since the director would have to be copied.
        shadows: the layer's shadows; None: made for this call.

    Raises: ValueError naming the argument.
    """
    E, D = weights.fc1_weight.shape[0], x.shape[2]
    check_tokens(x)
    check_transforms(router_weight)
    check_tensor("router_weight", router_weight, (E, D), like=x, same_dtype=False)
    check_weights(x, weights)
    if director is not None:
        for name, t, w in zip(("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"), director, weights, strict=True):
            check_tensor(f"director.{name}", t, tuple(w.shape[1:]), like=x, same_dtype=False)
    added = scaled_noise(x, E, settings.routing, noise)
    feature, tokens = None, x.shape[1] if settings.routing == "image" else 1
    rows = x.shape[0] * x.shape[1] * (settings.top_k + (director is not None))
    if token_mask is not None:
        check_token_mask(token_mask, x, cls=settings.routing == "image" and settings.route_from == "cls")
        feature = "token_mask"
    computed = autocast_dtype(x)
    route_backend, mlp_backend = (
        backends.choose(op, backends.covering(op, backend, need), x.device, need, dtype)
        for op, need, dtype in (
            ("route", feature, x.dtype),
            ("grouped_mlp", need_of(tokens, rows, weights.fc1_weight, computed, settings.activation), computed),
        )
    )
    # The router reads x in its own dtype; only the experts compute in autocast's dtype.
    lowered = (shadows or Shadows()).of(weights, director, computed)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, router_weight, *weights))
    result = _Outputs(
        *torch.ops.dexkernels.routed_mlp(
            x, router_weight, added, noise.usage_ema, token_mask, *weights, *(lowered or (None,) * 4), settings.top_k,
            settings.temperature, settings.routing, settings.route_from, settings.activation, save, route_backend,
            mlp_backend,
        )
    )  # fmt: skip
    apart = director is None or lowered is None
    return result.out, as_routing(result.routed, x, settings.routing), None if apart else result.director_out


class _Inputs(NamedTuple):
    """The arguments of the operator, in the order of its schema."""

    x: Tensor
    router_weight: Tensor
    noise: Tensor | None
    usage_ema: Tensor | None
    token_mask: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    fc1_weight_shadow: Tensor | None
    fc1_bias_shadow: Tensor | None
    fc2_weight_shadow: Tensor | None
    fc2_bias_shadow: Tensor | None
    top_k: int
    temperature: float
    routing: str
    route_from: str
    activation: str
    save: bool
    route_backend: str
    mlp_backend: str

    @property
    def computed(self) -> MLPWeights:
        """The weights to compute with; shadows may hold the director's after the experts'."""
        return shadowed(
            MLPWeights(self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias),
            MLPWeights(self.fc1_weight_shadow, self.fc1_bias_shadow, self.fc2_weight_shadow, self.fc2_bias_shadow),
        )


class _Outputs(NamedTuple):
    """The results of the operator."""

    out: Tensor
    """``[B, N, D]``"""
    z: Tensor
    director_out: Tensor
    """``[B, N, D]``; ``[0]`` unless the shadows hold the director."""
    p: Tensor
    gates: Tensor
    expert_indices: Tensor
    balance_loss: Tensor
    gate_mass: Tensor
    slot_order: Tensor
    group_sizes: Tensor
    group_offsets: Tensor

    @property
    def routed(self) -> router.Routed:
        return router.Routed(
            self.p,
            self.gates,
            self.expert_indices,
            self.balance_loss,
            self.gate_mass,
            self.slot_order,
            self.group_sizes,
            self.group_offsets,
        )


class _Saved(NamedTuple):
    """Tensors that the forward saves for its backward. The weights are the ones it used, without the director's."""

    x: Tensor
    router_weight: Tensor
    fc1_weight: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    z: Tensor
    p: Tensor
    gates: Tensor
    expert_indices: Tensor
    slot_order: Tensor
    group_offsets: Tensor
    token_mask: Tensor | None


def _images(x: Tensor, routing: str) -> Tensor:
    """``[B, N, D]``, or token-wise ``[B*N, 1, D]``, which makes each token an image for the experts."""
    return x.reshape(-1, 1, x.shape[2]) if routing == "token" else x


@torch.library.custom_op("dexkernels::routed_mlp", mutates_args=())
def _routed_mlp(
    x: Tensor,
    router_weight: Tensor,
    noise: Tensor | None,
    usage_ema: Tensor | None,
    token_mask: Tensor | None,
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
    activation: str,
    save: bool,
    route_backend: str,
    mlp_backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `_Outputs`."""
    weights = shadowed(
        MLPWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias),
        MLPWeights(fc1_weight_shadow, fc1_bias_shadow, fc2_weight_shadow, fc2_bias_shadow),
    )
    with without_autocast(x.device):
        r, counted = router_rows(x, routing, route_from, token_mask), counted_rows(token_mask, routing)
        routed = run_router(route_backend, r, router_weight, top_k, temperature, noise, counted)
        slots = mlp.Slots(routed.gates, routed.slot_order, routed.group_offsets)
        images = _images(x, routing).to(weights.fc1_weight.dtype)
        result = run_forward(mlp_backend, images, slots, weights, save, activation)
    # By its shape, which also works for an empty batch.
    director_out = result.director_out.view(x.shape if mlp.has_director(weights, slots) else 0)
    return result.out.view(x.shape), result.z, director_out, *routed


@_routed_mlp.register_fake
def _(*args, **kwargs):
    given = _Inputs(*args, **kwargs)
    x, weight = given.x, given.computed.fc1_weight
    rows, E = _images(x, given.routing), given.router_weight.shape[0]
    z = empty_z(rows, rows.shape[0] * given.top_k, given.fc1_bias, given.save).to(weight.dtype)
    out, director_out = (
        x.new_empty(shape, dtype=weight.dtype) for shape in (x.shape, x.shape if weight.shape[0] > E else 0)
    )
    return out, z, director_out, *empty_routed(x, rows.shape[0], E, given.top_k)


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
    token_mask: Tensor | None,
    temperature: float,
    routing: str,
    route_from: str,
    activation: str,
    need_x: bool,
    need_router: bool,
    need_weights: bool,
    grad_dtype: torch.dtype,
    route_backend: str,
    mlp_backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, router_weight and the experts' weights; an empty tensor for each that is not needed."""
    with without_autocast(x.device):
        images = _images(x, routing).to(fc1_weight.dtype)
        saved = mlp.Saved(images, gates, slot_order, group_offsets, fc1_weight, fc2_weight, fc2_bias, z)
        needs = mlp.Needs(need_x, need_x or need_router, need_weights)
        grads = run_backward(mlp_backend, _images(grad_out, routing), saved, needs, grad_dtype, activation)
        dx, dgates, *dweights = grads
        drouter = None
        if needs.gates:
            rows, counted = router_rows(x, routing, route_from, token_mask), counted_rows(token_mask, routing)
            decided = router.Saved(p, gates, expert_indices, rows, router_weight, counted)
            dr, drouter = backends.load("route", route_backend).backward(
                dgates + grad_gates, grad_balance, decided, temperature
            )
        if need_x:
            dx = dx.view(x.shape).to(x.dtype)
            if routing == "token":
                dx += dr.view(x.shape)
            elif route_from == "cls":
                dx[:, 0] += dr
            else:
                dr = dr / (x.shape[1] if token_mask is None else num_real(token_mask))
                dx += dr[:, None]
    return or_empty(x, dx, drouter, *dweights)


@_routed_mlp_backward.register_fake
def _(
    grad_out, grad_gates, grad_balance, x, router_weight, fc1_weight, fc2_weight, fc2_bias, z, p, gates, expert_indices,
    slot_order, group_offsets, token_mask, temperature, routing, route_from, activation, need_x, need_router,
    need_weights, grad_dtype, route_backend, mlp_backend,
):  # fmt: skip
    needed = ((need_x, x), (need_x or need_router, router_weight))
    dx, drouter = (t.new_empty(t.shape) if need else x.new_empty(0) for need, t in needed)
    return dx, drouter, *empty_weight_grads(x, fc2_weight, need_weights, grad_dtype)


def _save(ctx, inputs, output):
    given, result = _Inputs(*inputs), _Outputs(*output)
    remember_usage(ctx, given.noise, given.usage_ema)
    ctx.mark_non_differentiable(result.z, result.director_out, result.p, result.gate_mass)
    ctx.settings = given.temperature, given.routing, given.route_from, given.activation
    ctx.rest = given.fc1_weight.dtype, given.route_backend, given.mlp_backend
    weights = given.computed
    if given.fc1_weight_shadow is not None:
        weights = MLPWeights(*(w[: given.router_weight.shape[0]] for w in weights))
    ctx.save_for_backward(
        *_Saved(
            given.x,
            given.router_weight,
            weights.fc1_weight,
            weights.fc2_weight,
            weights.fc2_bias,
            result.z,
            result.p,
            result.gates,
            result.expert_indices,
            result.slot_order,
            result.group_offsets,
            given.token_mask,
        )
    )


def _backward(ctx, *grad_outputs):
    check_versions(ctx)
    grads, need = _Outputs(*grad_outputs), _Inputs(*ctx.needs_input_grad)
    need_weights = any((need.fc1_weight, need.fc1_bias, need.fc2_weight, need.fc2_bias))
    dx, drouter, *dweights = torch.ops.dexkernels.routed_mlp_backward(
        grads.out, grads.gates, grads.balance_loss, *ctx.saved_tensors, *ctx.settings, need.x, need.router_weight,
        need_weights, *ctx.rest,
    )  # fmt: skip
    grads_of = {"x": dx, "router_weight": drouter} | MLPWeights(*dweights)._asdict()
    return gradients(_Inputs, **{name: grad for name, grad in grads_of.items() if getattr(need, name)})


_routed_mlp.register_autograd(_backward, setup_context=_save)
