"""No launcher reads a tensor on the host, nor copies one to it: they run on meta tensors, which hold no values.

What a launch is given then follows from shapes, dtypes and addresses alone, so a CUDA graph of it freezes no value.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")

from dexkernels.ops.align_loss import triton as align_loss  # noqa: E402
from dexkernels.ops.group_ema import triton as group_ema  # noqa: E402
from dexkernels.ops.grouped_mlp import triton as grouped_mlp  # noqa: E402
from dexkernels.ops.grouped_mlp.records import Needs, Saved, Slots  # noqa: E402
from dexkernels.ops.grouped_mlp.triton import gather  # noqa: E402
from dexkernels.ops.route import triton as route  # noqa: E402
from dexkernels.ops.route.records import Saved as SavedByRoute  # noqa: E402
from dexkernels.records import MLPWeights  # noqa: E402
from dexkernels.testing import HostWaits, NoHostWaits  # noqa: E402

B, N, D, H, E, K = 4, 65, 32, 64, 4, 2


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched; none of them runs."""
    found = []
    kinds = {type(gather.fc1_kernel), type(group_ema.group_ema_kernel)}
    for kind in kinds:
        monkeypatch.setattr(kind, "run", lambda self, **_: found.append(self.__name__))
    return found


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def mlp(path, dtype=torch.float16, experts=E, needs=(True, True, True), director=False):
    x = meta(B, N, D, dtype=dtype)
    slots = Slots(meta(B, K), meta(B * K, dtype=torch.int64), meta(experts + 1, dtype=torch.int64))
    weights = MLPWeights(*(meta(experts + director, *s, dtype=dtype) for s in ((H, D), (H,), (D, H), (D,))))
    alone = MLPWeights(*(w[:experts] for w in weights))
    grouped_mlp.forward(x, slots, alone, False, path=path)
    out, z, _ = grouped_mlp.forward(x, slots, weights, True, path=path)
    saved = Saved(x, *slots, alone.fc1_weight, alone.fc2_weight, alone.fc2_bias, z)
    grouped_mlp.backward(out, saved, Needs(*needs), torch.float32 if director else dtype, path=path)


def routing(rows, noise=True):
    r, weight = meta(rows, D), meta(E, D)
    noise = meta(rows, E) if noise else None
    p, gates, indices, balance, *_ = route.forward(r, weight, K, 0.5, noise)
    route.backward(gates, balance, SavedByRoute(p, gates, indices, r, weight), 0.5)


def align(kind):
    y = meta(B, N, D)
    loss, saved = align_loss.forward(y, y, kind)
    align_loss.backward(loss, y, y, saved, kind)


DIRECTORS = [meta(H, D), meta(H), meta(D, H), meta(D)]


def gema(momentum, skip):
    # Of one shape each: tensors on meta have one address, and the table is kept by addresses and sizes.
    experts = [meta(E, *d.shape) for d in DIRECTORS]
    group_ema.group_ema_(DIRECTORS, experts, [meta(E)] * len(DIRECTORS), momentum, skip)


CASES = {
    "gather": lambda: mlp("gather"),
    "gather, float32": lambda: mlp("gather", torch.float32),
    "gather, no gradient of x": lambda: mlp("gather", needs=(False, False, True)),
    "aligned": lambda: mlp("aligned"),
    "aligned, many experts": lambda: mlp("aligned", experts=64),
    "gather, with a director": lambda: mlp("gather", director=True),
    "aligned, with a director": lambda: mlp("aligned", director=True),
    "aligned, many experts and a director": lambda: mlp("aligned", experts=64, director=True),
    "route": lambda: routing(B),
    "route, many rows": lambda: routing(route.ONE_LAUNCH + 1, noise=False),
    **{kind: lambda kind=kind: align(kind) for kind in align_loss.KINDS},
    "GEMA": lambda: gema(meta(), meta(dtype=torch.bool)),
    "GEMA, float64 momentum": lambda: gema(meta(dtype=torch.float64), None),
}


@pytest.mark.parametrize("case", CASES)
def test_no_launcher_waits(case, launched):
    CASES[case]()  # GEMA's first call copies its table to the device
    first = len(launched)
    with NoHostWaits():
        CASES[case]()
    assert 0 < first == len(launched) - first and launched[:first] == launched[first:]


def read(t):
    t.sum().item()
    return t


READS = {
    "gather": (grouped_mlp, "unit_rows", read),
    "aligned": (grouped_mlp.aligned, "tma_ready", lambda t: t.cpu().to(t.device)),
    "route": (route, "check_dtype", lambda name, t: t.isnan().any().tolist()),
    "kd": (align_loss, "unit_rows", lambda t: t if t.isfinite().all() else read(t)),
    "GEMA": (group_ema, "_table", group_ema._table.__wrapped__),
}


@pytest.mark.parametrize("case", READS)
def test_a_wait_is_found(case, launched, monkeypatch):
    CASES[case]()
    monkeypatch.setattr(*READS[case])
    with NoHostWaits(), pytest.raises(HostWaits):
        CASES[case]()
