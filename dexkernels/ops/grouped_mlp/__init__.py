"""`grouped_mlp`: the MLPs of each image's experts. Letters: see `records`."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check_choice, check_tensor, check_weights, check_x, shape_of
from ...choices import ActivationName, BackendName
from ...records import MLPWeights
from ...routing import Routing
from ...shadows import Shadows, shadowed
from .. import backends
from ..common import autocast_dtype, gradients, or_empty, without_autocast
from ..dense import ACTIVATIONS
from .records import MAX_COUNT, MAX_WIDTH, Gradients, Needs, Result, Saved, Slots

BACKENDS = {"reference": "cpu", "triton": "triton", "cuda": "cuda"}
"""Backend -> the module of this folder that has its ``forward`` and ``backward``."""

LARGE = "sizes past 32 bits"
UNEVEN = "widths that are not multiples of 8"
WIDE = "elements of more than 16 bits"
TANH = "tanh GELU"
_COUNTS = "its kernels count rows, and the elements of an image or of a matrix, in 32 bits"
LIMITS = {
    "triton": {LARGE: _COUNTS},
    "cuda": {
        LARGE: _COUNTS,
        WIDE: "its products are of bfloat16 or float16, on tensor cores",
        UNEVEN: "its kernels copy 16 bytes at a time",
        TANH: "its kernels have the exact GELU",
    },
}
"""Backend -> what it cannot compute -> why: plain torch does, unless the backend is asked for by name."""

backends.register("grouped_mlp", __name__, BACKENDS, LIMITS)


def grouped_mlp(
    x: Tensor,
    routing: Routing,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    activation: ActivationName = "gelu",
    backend: BackendName | None = None,
) -> Tensor:
    """``out[b] = sum_k gates[b, k] * fc2_e(gelu(fc1_e(x[b])))`` with ``e = expert_indices[b, k]``.

    Args:
        x: ``[B, N, D]``.
        routing: the result of `route` for this x; gates ``[B, K]`` (per image) or ``[B, N, K]`` (per token).
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: ``[E, H, D]``, ``[E, H]``, ``[E, D, H]``, ``[E, D]``, dtype of x
            (any of the four float dtypes). Under autocast, copies in autocast's dtype are used, and gradients of the
            weights have the weights' own dtype.
        activation: ``"gelu"``, the exact one, or ``"gelu_tanh"``, its approximation by tanh.

    Returns: ``[B, N, D]``. Differentiable once, in x, gates and weights; the gradients of an expert without images are
        exact zeros.
    Raises: ValueError naming the argument.
    """
    weights = MLPWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_x(x)
    check_weights(x, weights)
    (B, N, D), E, gates = x.shape, fc1_weight.shape[0], routing.gates
    if tuple(gates.shape[:-1]) not in ((B,), (B, N)):
        raise ValueError(f"routing.gates: expected [{B}, K] or [{B}, {N}, K] for this x, got {shape_of(gates)}")
    check_tensor("routing.group_sizes", routing.group_sizes, (E,), like=x, same_dtype=False)
    check_tensor("routing.slot_order", routing.slot_order, (gates.numel(),), like=x, same_dtype=False)
    check_tensor("routing.group_offsets", routing.group_offsets, (E + 1,), like=x, same_dtype=False)
    check_choice("activation", activation, tuple(ACTIVATIONS))
    x = x.to(autocast_dtype(x))
    need = need_of(N if gates.dim() == 2 else 1, B * N * gates.shape[-1], fc1_weight, x.dtype, activation)
    backend = backends.choose("grouped_mlp", backend, x.device, need, x.dtype)
    lowered = Shadows().of(weights, None, x.dtype)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gates, *weights))
    if gates.dim() == 3:
        x, gates = x.reshape(B * N, 1, D), gates.flatten(0, 1)
    out, _ = torch.ops.dexkernels.grouped_mlp(
        x, gates, routing.slot_order, routing.group_offsets, *weights, *(lowered or (None,) * 4), save, activation,
        backend,
    )  # fmt: skip
    return out.view(B, N, D)


def need_of(tokens: int, rows: int, fc1_weight: Tensor, dtype: torch.dtype, activation: str) -> str | None:
    """The key of `LIMITS` for a needed feature that a backend may lack; of several, the one most backends lack.

    tokens: tokens of an image, 1 token-wise. rows: B*N*K, with a director B*N*(K + 1). dtype: dtype of the products.
    """
    H, D = fc1_weight.shape[1:]
    # No max() over batch sizes: torch.export would require every batch to have the same largest one as its example.
    large = max(D, H) > MAX_WIDTH or rows > MAX_COUNT or tokens * D > MAX_COUNT or D * H > MAX_COUNT
    if large:
        return LARGE
    if dtype.itemsize > 2:
        return WIDE
    if D % 8 or H % 8 or not D * H:
        return UNEVEN
    return TANH if activation == "gelu_tanh" else None


class _Inputs(NamedTuple):
    """The arguments of the operator, in the order of its schema."""

    x: Tensor
    gates: Tensor
    slot_order: Tensor
    group_offsets: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    fc1_weight_shadow: Tensor | None
    fc1_bias_shadow: Tensor | None
    fc2_weight_shadow: Tensor | None
    fc2_bias_shadow: Tensor | None
    save: bool
    activation: str
    backend: str

    @property
    def computed(self) -> MLPWeights:
        """The weights to compute with."""
        return shadowed(
            MLPWeights(self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias),
            MLPWeights(self.fc1_weight_shadow, self.fc1_bias_shadow, self.fc2_weight_shadow, self.fc2_bias_shadow),
        )


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
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out and z of `Result`, computed with the shadows (see `dexkernels.shadows`) if there are any."""
    weights = shadowed(
        MLPWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias),
        MLPWeights(fc1_weight_shadow, fc1_bias_shadow, fc2_weight_shadow, fc2_bias_shadow),
    )
    with without_autocast(x.device):
        result = run_forward(backend, x, Slots(gates, slot_order, group_offsets), weights, save, activation)
    return result.out, result.z


@_grouped_mlp.register_fake
def _(*args, **kwargs):
    given = _Inputs(*args, **kwargs)
    return given.x.new_empty(given.x.shape), empty_z(given.x, given.slot_order.shape[0], given.fc1_bias, given.save)


def run_forward(
    backend: str, x: Tensor, slots: Slots, weights: MLPWeights, save: bool, activation: str = "gelu"
) -> Result:
    """Run the forward of ``backend`` with autocast off; ``x`` and ``weights`` have one dtype."""
    return backends.load("grouped_mlp", backend).forward(x, slots, weights, save, activation)


def run_backward(
    backend: str, grad_out: Tensor, saved: Saved, needs: Needs, grad_dtype: torch.dtype, activation: str = "gelu"
) -> Gradients:
    """Run the backward of ``backend`` with autocast off; gradients of the weights have ``grad_dtype``."""
    return backends.load("grouped_mlp", backend).backward(grad_out, saved, needs, grad_dtype, activation)


def empty_z(x: Tensor, num_slots: int, fc1_bias: Tensor, save: bool) -> Tensor:
    """An uninitialised z of `Result`, for fake kernels."""
    return x.new_empty((num_slots if save else 0, x.shape[1], fc1_bias.shape[1]))


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
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Gradients`, with an empty tensor for each that is not needed, since operators cannot return None."""
    saved = Saved(x, gates, slot_order, group_offsets, fc1_weight, fc2_weight, fc2_bias, z)
    with without_autocast(x.device):
        grads = run_backward(backend, grad_out, saved, Needs(need_x, need_gates, need_weights), grad_dtype, activation)
    return or_empty(x, *grads)


@_grouped_mlp_backward.register_fake
def _(
    grad_out, x, gates, slot_order, group_offsets, fc1_weight, fc2_weight, fc2_bias, z,
    need_x, need_gates, need_weights, grad_dtype, activation, backend,
):  # fmt: skip
    dx, dgates = (t.new_empty(t.shape) if need else x.new_empty(0) for need, t in ((need_x, x), (need_gates, gates)))
    return dx, dgates, *empty_weight_grads(x, fc2_weight, need_weights, grad_dtype)


def empty_weight_grads(x: Tensor, fc2_weight: Tensor, need: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Uninitialised gradients of `MLPWeights`, for fake kernels."""
    E, D, H = fc2_weight.shape
    if not need:
        return tuple(x.new_empty(0) for _ in range(4))
    return tuple(x.new_empty(shape, dtype=dtype) for shape in ((E, H, D), (E, H), (E, D, H), (E, D)))


def _save(ctx, inputs, output):
    given = _Inputs(*inputs)
    _, z = output
    ctx.mark_non_differentiable(z)
    ctx.rest = given.fc1_weight.dtype, given.activation, given.backend
    weights = given.computed
    ctx.save_for_backward(
        *Saved(
            given.x,
            given.gates,
            given.slot_order,
            given.group_offsets,
            weights.fc1_weight,
            weights.fc2_weight,
            weights.fc2_bias,
            z,
        )
    )


def _backward(ctx, grad_out, _):
    need = _Inputs(*ctx.needs_input_grad)
    need_weights = MLPWeights(need.fc1_weight, need.fc1_bias, need.fc2_weight, need.fc2_bias)
    grads = Gradients(
        *torch.ops.dexkernels.grouped_mlp_backward(
            grad_out, *ctx.saved_tensors, need.x, need.gates, any(need_weights), *ctx.rest
        )
    )
    needed = {name: grad for name, grad in grads._asdict().items() if getattr(need, name)}
    return gradients(_Inputs, **needed)


_grouped_mlp.register_autograd(_backward, setup_context=_save)
