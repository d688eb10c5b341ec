"""The published parameter names, in and out."""

import pytest
import torch
from layer_cases import D, H, changed, layer_of, snapshot


def test_published_names():
    layer = layer_of(E=2)
    state = layer.reference_state_dict()
    parts = [
        f"{part}.{fc}.{name}"
        for part in ("experts.0", "experts.1", "director")
        for fc in ("fc1", "fc2")
        for name in ("weight", "bias")
    ]
    assert set(state) == {*parts, "router.linear.weight", "expert_activation_count"}
    assert torch.equal(state["experts.1.fc2.weight"], layer.experts.fc2_weight[1])
    state["experts.1.fc2.weight"].zero_(), state["director.fc1.bias"].zero_()
    assert layer.experts.fc2_weight[1].count_nonzero() and layer.director.fc1.bias.count_nonzero()


def test_reference_round_trip():
    layer, other = layer_of(seed=1), layer_of(seed=2)
    layer.usage_ema.copy_(torch.arange(6))
    assert len(changed(other, snapshot(layer))) == 10
    other.load_reference_state_dict(layer.reference_state_dict())
    assert changed(other, snapshot(layer)) == []


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda s: s.pop("experts.3.fc1.bias"), "missing experts.3.fc1.bias"),
        (lambda s: s.update({"gate.weight": torch.ones(1)}), "unknown gate.weight"),
        (lambda s: s.update({"experts.6.fc1.bias": torch.ones(H)}), "unknown experts.6.fc1.bias"),
        (
            lambda s: s.update({"director.fc1.weight": torch.ones(D, H)}),
            r"director.fc1.weight: expected shape \[7, 9\]",
        ),
        (lambda s: s.update({"director.fc1.bias": torch.ones(1)}), "director.fc1.bias: expected shape"),
        (lambda s: s.update({"expert_activation_count": [0.0] * 6}), "expert_activation_count: expected a tensor"),
        (lambda s: s.clear(), "missing router.linear.weight"),
    ],
)
def test_a_wrong_state_is_named_and_changes_nothing(damage, named):
    layer, state = layer_of(seed=1), layer_of(seed=2).reference_state_dict()
    before = snapshot(layer)
    damage(state)
    with pytest.raises(ValueError, match=named):
        layer.load_reference_state_dict(state)
    assert changed(layer, before) == []


def test_all_wrong_keys_are_named_at_once():
    state = layer_of().reference_state_dict()
    del state["experts.0.fc1.bias"]
    state["extra"] = torch.ones(1)
    state["router.linear.weight"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"(?s)missing experts.0.fc1.bias.*unknown extra.*router.linear.weight"):
        layer_of().load_reference_state_dict(state)
