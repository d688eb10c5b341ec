"""Cases of csrc/grouped_mlp: shapes and routings, results of `dexkernels.ops.grouped_mlp.cuda`, those of the spec.

Letters: B images, N tokens (CLS first), D width, H hidden, E experts, K chosen.
"""

import types
from typing import NamedTuple

import cuda_grouped_mlp
import torch
from shipped_cases import NAMES, Case, MLPInputs, Results, _slots, _want_mlp, mlp_inputs

from dexkernels import reference
from dexkernels.ops.grouped_mlp import cuda, records
from dexkernels.records import MLPWeights
from dexkernels.routing import Routing

SPECIFICATION = types.SimpleNamespace(reference=reference, Routing=Routing, mlp_records=records)


class Form(NamedTuple):
    """sizes: B, N, D, H, E, K."""

    sizes: tuple[int, ...]
    many_orders: bool = False
    director: bool = False
    skewed: bool = False
    one_expert: bool = False
    alone: bool = False
    """A forward that saves nothing, and each gradient by itself."""
    strided: bool = False
    """Inputs that do not lie as the kernels want them."""


FORMS = {
    "": Form((2, 65, 128, 256, 3, 2)),
    "N 1": Form((64, 1, 136, 72, 5, 3)),
    "N 5": Form((2, 5, 40, 72, 3, 2), many_orders=True),
    "N 17": Form((3, 17, 40, 136, 4, 2)),
    "N 64, K = 1": Form((3, 64, 64, 72, 3, 1)),
    "N 65, with a director": Form((2, 65, 40, 72, 3, 2), director=True),
    "N 130, K = E": Form((2, 130, 40, 72, 3, 3)),
    "N 257": Form((2, 257, 40, 72, 3, 2)),
    "chunks, with a director": Form((7, 5, 16, 24, 4, 1), many_orders=True, director=True, skewed=True),
    "all to one of 40 experts": Form((5, 17, 24, 8, 40, 1), one_expert=True),
    "one gradient at a time": Form((2, 5, 40, 72, 3, 2), alone=True),
    "strided": Form((2, 5, 40, 72, 3, 2), strided=True),
}
"""What is special -> form; each runs in bf16 and in fp16."""


def case(form: Form, dtype: torch.dtype) -> Case:
    """Its ``compute`` runs under `cuda_grouped_mlp.emulated`; see `shipped_cases.Case`."""
    inputs = inputs_of(form, dtype)
    director = director_of(form, dtype) if form.director else None

    def compute(library: cuda_grouped_mlp.Library) -> Results:
        given = _strided(inputs) if form.strided else inputs
        return _alone(given) if form.alone else _run(given, director)

    return Case(dtype, compute, lambda precision: _want_mlp(SPECIFICATION, inputs, precision, director))


def inputs_of(form: Form, dtype: torch.dtype) -> MLPInputs:
    inputs = mlp_inputs(*form.sizes, dtype, skewed=form.skewed)
    return inputs._replace(indices=torch.full_like(inputs.indices, 3)) if form.one_expert else inputs


def director_of(form: Form, dtype: torch.dtype) -> list[torch.Tensor]:
    return [w[0] for w in mlp_inputs(*form.sizes, dtype, seed=1).weights]


def with_director(weights: list[torch.Tensor], director: list[torch.Tensor]) -> list[torch.Tensor]:
    """The stacks with the director behind the experts."""
    return [torch.cat((w, d[None])) for w, d in zip(weights, director, strict=True)]


def _run(inputs, director) -> Results:
    """With a director float32 gradients of the weights, as under autocast."""
    slots, stacked = _slots(SPECIFICATION, inputs), inputs.weights
    E = slots.num_experts
    if director is not None:
        stacked = with_director(inputs.weights, director)
    out, z, director_out = cuda.forward(inputs.x, slots, MLPWeights(*stacked), True)
    saved = records.Saved(inputs.x, *slots, *(stacked[i][:E] for i in (0, 2, 3)), z)
    grad_dtype = inputs.x.dtype if director is None else torch.float32
    grads = cuda.backward(inputs.grad_out, saved, records.Needs(), grad_dtype)
    results = dict(zip(NAMES, (out, *grads), strict=True))
    return results if director is None else results | {"director_out": director_out}


def _alone(inputs) -> Results:
    slots, weights = _slots(SPECIFICATION, inputs), MLPWeights(*inputs.weights)
    out, unsaved, _ = cuda.forward(inputs.x, slots, weights, False)
    assert unsaved.numel() == 0
    z = cuda.forward(inputs.x, slots, weights, True)[1]
    saved = records.Saved(inputs.x, *slots, weights.fc1_weight, weights.fc2_weight, weights.fc2_bias, z)
    results = {"out": out}
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        grads = cuda.backward(inputs.grad_out, saved, records.Needs(*needs), inputs.x.dtype)
        results |= {name: t for name, t in zip(NAMES[1:], grads, strict=True) if t is not None}
    assert set(results) == set(NAMES)
    return results


def _strided(inputs):
    """x is part of a wider tensor, the gradient begins at an odd address, weights are transposed, gates lie apart."""
    B, N, D = inputs.x.shape
    wide = torch.full((B, N + 2, D + 8), torch.nan, dtype=inputs.x.dtype)
    wide[:, 1:-1, 8:] = inputs.x
    off = torch.full((inputs.grad_out.numel() + 1,), torch.nan, dtype=inputs.x.dtype)
    off[1:] = inputs.grad_out.flatten()
    apart = torch.full((*inputs.gates.shape, 2), torch.nan)
    apart[..., 0] = inputs.gates
    return inputs._replace(
        x=wide[:, 1:-1, 8:],
        grad_out=off[1:].view(B, N, D),
        gates=apart[..., 0],
        weights=[w.mT.contiguous().mT if w.dim() == 3 else w for w in inputs.weights],
    )
