"""`grouped_mlp` by the native library: products of bfloat16 or float16 with float32 sums, on sm_80 and newer.

Letters: see `records`. Rows are gathered: an image's tokens need not fill a tile, and token-wise routing is the same.
The library takes addresses and sizes. Every grid is an upper bound known from shapes, so the host never waits for the
routing. The limits of this backend are in the operator's table.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from ... import native
from ...records import MLPWeights
from .records import Gradients, Needs, Result, Saved, Slots, has_director

DTYPES = (torch.bfloat16, torch.float16)
WIDTH = 8
"""D and H must be multiples of this, since copies have 16 bytes."""

TILE = 128
"""Rows and columns of a tile: ``MLP_TILE`` in ``csrc/grouped_mlp/tiles.h``."""

PROGRAMS = 132
"""Approximate number of blocks that run at a time: a constant, so that bits do not depend on the device."""

WAVES = 3
"""A piece of an expert's rows takes at most about 1 / WAVES of the time of all rows."""

SLACK = 1.5
"""Multiple of the average expert's slots above which a weight gradient is cut, so that uniform routing is not cut."""


class _Launches(NamedTuple):
    """The shared arguments of the launches of one call."""

    slots: Slots
    """Contiguous, the gates in float32."""
    tokens: int
    """N"""
    director_images: int
    """B, or 0 without a director."""
    bfloat16: bool
    stream: int

    def launch(self, name: str, **arguments: object) -> None:
        run: Callable[..., None] = getattr(native.library, f"grouped_mlp_{name}")
        run(**arguments, bfloat16=self.bfloat16, stream=self.stream)

    def record(self) -> tuple[int, ...]:
        """The slots in the format of the library."""
        s, images = self.slots, self.director_images
        order, offsets = s.slot_order.data_ptr(), s.group_offsets.data_ptr()
        return order, offsets, s.num_experts, s.num_slots, images, self.tokens, s.top_k


def forward(x: Tensor, slots: Slots, weights: MLPWeights, save: bool, activation: str = "gelu") -> Result:
    """`Result` on a GPU. z is in slot order.

    A director, whose weights come after the experts', is one more expert of the same launches, chosen by every image.
    Temporary memory: ``a [S, N, H]``, followed by the director's ``[B, N, H]``, and the outputs of all slots.
    """
    _check(x, weights.fc1_weight, activation)
    (B, N, D), H = x.shape, weights.fc1_weight.shape[1]
    images = B if has_director(weights, slots) else 0
    out, director_out = x.new_empty((B, N, D)), x.new_empty((images, N, D))
    z = x.new_empty((slots.num_slots if save else 0, N, H))
    if out.numel() == 0:
        return Result(out, z, director_out)
    with _on_device(x):
        launches = _launches(x, slots, images)
        x, fc1, fc2 = ready(x), ready(weights.fc1_weight), ready(weights.fc2_weight)
        b1, b2 = _whole(weights.fc1_bias), _whole(weights.fc2_bias)
        a = x.new_empty((slots.num_slots + images, N, H))
        launches.launch(
            "fc1",
            x=_strided(x),
            weight=_strided(fc1),
            bias=b1.data_ptr(),
            z=z.data_ptr() if save else 0,
            a=a.data_ptr(),
            slots=launches.record(),
            dim=D,
            hidden=H,
        )
        by_slot = x.new_empty((slots.num_slots, N, D))
        launches.launch(
            "to_slots",
            rows=a.data_ptr(),
            weight=_strided(fc2),
            transposed=False,
            bias=b2.data_ptr(),
            out=by_slot.data_ptr(),
            director_out=director_out.data_ptr() if images else 0,
            slots=launches.record(),
            sizes=(H, D),
        )
        _combine(launches, by_slot, launches.slots.gates, out)
    return Result(out, z, director_out)


def backward(
    grad_out: Tensor, saved: Saved, needs: Needs, grad_dtype: torch.dtype, activation: str = "gelu"
) -> Gradients:
    """`Gradients` on a GPU, those of the weights in ``grad_dtype``.

    Temporary memory: ``dz`` and ``g gelu(z)``, each ``[S, N, H]``, the results by slot, and partial sums.
    """
    _check(saved.x, saved.fc1_weight, activation)
    (B, N, D), (E, H, _) = saved.x.shape, saved.fc1_weight.shape
    weight_dtype = saved.x.dtype if grad_dtype == saved.x.dtype else torch.float32
    new = saved.x.new_empty
    dx = new((B, N, D)) if needs.x else None
    dgates = new((B, saved.slots.top_k), dtype=torch.float32) if needs.gates else None
    shapes = (E, H, D), (E, H), (E, D, H), (E, D)
    dweights = [new(shape, dtype=weight_dtype) if needs.weights else None for shape in shapes]
    if saved.x.numel() == 0:
        for t in (dgates, *dweights):
            if t is not None:
                t.zero_()
    else:
        with _on_device(saved.x):
            launches = _launches(saved.x, saved.slots, 0)
            grad_out = ready(grad_out)
            saved = saved._replace(
                x=ready(saved.x),
                fc1_weight=ready(saved.fc1_weight),
                fc2_weight=ready(saved.fc2_weight),
                fc2_bias=_whole(saved.fc2_bias),
                z=_whole(saved.z),
            )
            hidden = _hidden_grads(launches, grad_out, saved, needs)
            _small_sums(launches, grad_out, saved, hidden, dgates, MLPWeights(*dweights))
            if needs.weights:
                _weight_grad(launches, grad_out, True, hidden.gated, dweights[2])
                _weight_grad(launches, saved.x, False, hidden.dz, dweights[0])
            if dx is not None:
                _input_grad(launches, hidden.dz, saved.fc1_weight, dx)
    dgates = None if dgates is None else dgates.to(saved.gates.dtype)
    return Gradients(dx, dgates, *(None if t is None else t.to(grad_dtype) for t in dweights))


def most_slots(num_slots: int, num_experts: int, tiles: int) -> int:
    """Slots of a piece of a weight gradient of ``tiles`` tiles per expert; from shapes alone, for reproducible bits.

    Shorter pieces fill the last wave better, but each is written and read in float32.
    """
    return max(int(SLACK * num_slots / num_experts), num_slots * tiles // (WAVES * PROGRAMS), 1)


def ready(t: Tensor) -> Tensor:
    """``t``, or a copy, whose rows are contiguous and begin at multiples of 16 bytes."""
    outer = zip(t.shape[:-1], t.stride()[:-1], strict=True)
    aligned = t.data_ptr() % 16 == 0 and all(n == 1 or stride % WIDTH == 0 for n, stride in outer)
    return t if aligned and t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)


def _whole(t: Tensor) -> Tensor:
    """``t``, or a copy, contiguous and at a multiple of 16 bytes."""
    return t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def _check(x: Tensor, fc1_weight: Tensor, activation: str) -> None:
    """Check the requirements of this backend; the operator has checked its own, and its table keeps the rest away."""
    assert native.library is not None, native.why_not()
    if x.dtype not in DTYPES:
        raise ValueError(f"x: the cuda backend takes bfloat16 or float16, got {x.dtype}")
    H, D = fc1_weight.shape[1:]
    if D % WIDTH or H % WIDTH or not D or not H:
        raise ValueError(f"fc1_weight: the cuda backend takes D and H in multiples of {WIDTH}, got D = {D}, H = {H}")
    if activation != "gelu":
        raise ValueError(f"activation: the cuda backend has 'gelu', got {activation!r}")


def _on_device(x: Tensor) -> AbstractContextManager[None]:
    return torch.cuda.device(x.device)


def _launches(x: Tensor, slots: Slots, images: int) -> _Launches:
    gates = slots.gates.to(torch.float32)
    slots = Slots(*(t.contiguous() for t in slots._replace(gates=gates)))
    stream = torch.cuda.current_stream(x.device).cuda_stream
    return _Launches(slots, x.shape[1], images, x.dtype == torch.bfloat16, stream)


def _strided(t: Tensor) -> tuple[int, int, int]:
    """Address and strides of ``[B, N, .]`` or of stacked matrices."""
    return t.data_ptr(), t.stride(0), t.stride(1)


def _combine(launches: _Launches, by_slot: Tensor, gates: Tensor | None, out: Tensor) -> None:
    """``out [B, N, D] = sum_k by_slot [B*K, N, D]``, weighted by gates if given, for ascending k."""
    launches.launch(
        "combine",
        by_slot=by_slot.data_ptr(),
        gates=0 if gates is None else gates.data_ptr(),
        out=out.data_ptr(),
        images=out.shape[0],
        size=out[0].numel(),
        top_k=launches.slots.top_k,
    )


class _HiddenGrads(NamedTuple):
    """Gradients through fc2 and the GELU; None for those that are not needed."""

    dz: Tensor | None
    """``[S, N, H]``"""
    gated: Tensor | None
    """``[S, N, H]``; ``g gelu(z)``"""
    gate_parts: Tensor | None
    """float32 ``[parts, S, N]``: ``da . a`` over 32 columns."""
    bias_parts: Tensor | None
    """float32 ``[parts, H]``: dz summed over half a tile."""


def _hidden_grads(launches: _Launches, grad_out: Tensor, saved: Saved, needs: Needs) -> _HiddenGrads:
    (S, N, H), E, D = saved.z.shape, launches.slots.num_experts, saved.x.shape[2]
    new, tiles = saved.z.new_empty, S * N // TILE + E
    hidden = _HiddenGrads(
        dz=new((S, N, H)) if needs.x or needs.weights else None,
        gated=new((S, N, H)) if needs.weights else None,
        gate_parts=new((-(-H // TILE) * 4, S, N), dtype=torch.float32) if needs.gates else None,
        bias_parts=new((2 * tiles, H), dtype=torch.float32) if needs.weights else None,
    )
    launches.launch(
        "to_hidden_grad",
        grad_out=_strided(grad_out),
        weight=_strided(saved.fc2_weight),
        gates=launches.slots.gates.data_ptr(),
        z=saved.z.data_ptr(),
        to=tuple(0 if t is None else t.data_ptr() for t in hidden),
        slots=launches.record(),
        dim=D,
        hidden=H,
    )
    return hidden


def _small_sums(
    launches: _Launches, grad_out: Tensor, saved: Saved, hidden: _HiddenGrads, dgates: Tensor | None, of: MLPWeights
) -> None:
    """``dgates`` and the biases' gradients in ``of``, where there are any."""
    B, N, D = grad_out.shape
    if dgates is None and of.fc2_bias is None:
        return
    sums = grad_out.new_empty((B, D), dtype=torch.float32)
    launches.launch("image_sum", grad_out=_strided(grad_out), sums=sums.data_ptr(), images=B, tokens=N, dim=D)
    if dgates is not None:
        launches.launch(
            "gate_grad",
            gate_parts=hidden.gate_parts.data_ptr(),
            sums=sums.data_ptr(),
            bias=saved.fc2_bias.data_ptr(),
            dgates=dgates.data_ptr(),
            slots=launches.record(),
            num_parts=hidden.gate_parts.shape[0],
            dim=D,
        )
    for name, parts, out in (("bias1_grad", hidden.bias_parts, of.fc1_bias), ("bias2_grad", sums, of.fc2_bias)):
        if out is not None:
            launches.launch(
                name,
                parts=parts.data_ptr(),
                gates=launches.slots.gates.data_ptr(),
                out=out.data_ptr(),
                slots=launches.record(),
                width=out.shape[1],
                float_out=out.dtype == torch.float32,
            )


def _weight_grad(launches: _Launches, gathered: Tensor, gather_left: bool, rows: Tensor, out: Tensor) -> None:
    """``out [E, height, width] = left^T right`` of an expert's rows, ``gathered [B, N, .]`` and ``rows [S, N, .]``."""
    (E, height, width), S = out.shape, launches.slots.num_slots
    most = most_slots(S, E, -(-height // TILE) * -(-width // TILE))
    parts = None
    if S > most:
        parts = out.new_empty((S // most + S // (most + 1), height, width), dtype=torch.float32)
    launches.launch(
        "weight_grad",
        gathered=_strided(gathered),
        gather_left=gather_left,
        rows=rows.data_ptr(),
        out=out.data_ptr(),
        parts=0 if parts is None else parts.data_ptr(),
        slots=launches.record(),
        sizes=(most, height, width),
        float_out=out.dtype == torch.float32,
    )


def _input_grad(launches: _Launches, dz: Tensor, fc1_weight: Tensor, dx: Tensor) -> None:
    """``dx [B, N, D]``: of every slot ``dz @ W1_e``, then their sum."""
    H, D = fc1_weight.shape[1:]
    by_slot = dx if launches.slots.top_k == 1 else dx.new_empty((dz.shape[0], *dx.shape[1:]))
    launches.launch(
        "to_slots",
        rows=dz.data_ptr(),
        weight=_strided(fc1_weight),
        transposed=True,
        bias=0,
        out=by_slot.data_ptr(),
        director_out=0,
        slots=launches.record(),
        sizes=(H, D),
    )
    if by_slot is not dx:
        _combine(launches, by_slot, None, dx)
