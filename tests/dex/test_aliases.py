"""Names that modules had before they moved into packages."""

import dex.checkpoint
from dex.train import checkpoint


def test_the_earlier_name_gives_the_same_things():
    assert "tensors" in dex.checkpoint.__all__
    assert all(getattr(dex.checkpoint, name) is getattr(checkpoint, name) for name in dex.checkpoint.__all__)
