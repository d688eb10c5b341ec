import json

import torch

from dex.analysis.examine import Findings
from dex.analysis.intervals import Interval
from dex.analysis.record import plain, to_plain


def test_records_and_tensors_become_what_json_holds():
    value = {"a": Interval(1.0, float("nan"), 2.0), 3: torch.tensor([[1.5, float("inf")]]), "b": [(1, None), "x", True]}
    assert to_plain(value) == {
        "a": {"value": 1.0, "low": None, "high": 2.0},
        "3": [[1.5, None]],
        "b": [[1, None], "x", True],
    }
    json.dumps(to_plain(value), allow_nan=False)


def test_single_images_are_not_told():
    nothing = dict.fromkeys(Findings._fields)
    found = Findings(**nothing | {"step": 3, "loss": Interval(1.0, 0.5, 2.0), "image_loss": torch.ones(4)})
    assert plain(found) == {k: None for k in nothing if k != "image_loss"} | {
        "step": 3,
        "loss": {"value": 1.0, "low": 0.5, "high": 2.0},
    }
