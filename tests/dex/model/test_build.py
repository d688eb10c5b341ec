import pytest

from dex.model.build import build_model


@pytest.mark.parametrize("align", ["kd", "cosine", "mse"])
def test_the_align_loss_is_the_configured_one(tiny, change, align):
    model = build_model(change(tiny, model__align=align))
    assert [layer.align for layer in model.encoder.dex_layers] == [align, align]
