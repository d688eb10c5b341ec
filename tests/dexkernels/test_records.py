"""`MLPWeights` has the order in which the operators take the four tensors."""

import inspect

from dexkernels import grouped_mlp
from dexkernels.layer import MLP, Experts
from dexkernels.ops.dense import mlp
from dexkernels.records import MLPWeights


def test_the_order_is_that_of_the_operators():
    for function in (grouped_mlp, mlp):
        names = [name for name in inspect.signature(function).parameters if name.startswith("fc")]
        assert tuple(names) == MLPWeights._fields


def test_layers_give_their_parameters_by_name():
    experts, director = Experts(3, 4, 5), MLP(4, 5)
    for name in MLPWeights._fields:
        assert getattr(experts.weights, name) is getattr(experts, name)
        assert getattr(director.weights, name) is director.get_parameter(name.replace("_", "."))
