"""Every refusal of the contract is a ValueError that names the argument."""

import re

import pytest
import torch

from dexkernels import DEXLayer, Routing, align_loss, group_ema_, grouped_mlp, route
from dexkernels.ops import backends

X, W = torch.zeros(2, 3, 4), torch.zeros(5, 4)
NOISE, USAGE = torch.zeros(2, 1, 5), torch.zeros(5)
R = route(X, W, 2)
WEIGHTS = {
    "fc1_weight": torch.zeros(5, 6, 4),
    "fc1_bias": torch.zeros(5, 6),
    "fc2_weight": torch.zeros(5, 4, 6),
    "fc2_bias": torch.zeros(5, 4),
}
NAN = float("nan")


def layer(*args, **options):
    return DEXLayer(*args, **options)


def forward(x=X, **options):
    return DEXLayer(4, 6, 5, 2)(x, **options)


def mlp(x=X, routing=R, **changed):
    return grouped_mlp(x, routing, **(WEIGHTS | changed))


def ema(d=None, e=None, a=None, m=0.9, **options):
    d = [torch.zeros(3)] if d is None else d
    e = [torch.zeros(2, 3)] if e is None else e
    group_ema_(d, e, [torch.ones(2)] if a is None else a, m, **options)


def update(mass=None, m=0.9, **options):
    DEXLayer(4, 6, 5, 2).update_director(torch.ones(5) if mass is None else mass, m, **options)


def noisy(**options):
    return route(X, W, 2, **({"noise_std": 1.0, "router_noise": NOISE, "usage_ema": USAGE} | options))


def refused(op):
    """Backends that cannot run here, and one that there is not."""
    return [b for b in backends.BACKENDS if backends.why_not(op, b)] + ["nonsense"]


TABLE = [
    # DEXLayer(...)
    *(("dim", lambda v=v: layer(v, 6)) for v in (0, -1, 4.0, True, "4", None)),
    *(("hidden_dim", lambda v=v: layer(4, v)) for v in (0, -1, 6.0, True, None)),
    *(("num_experts", lambda v=v: layer(4, 6, v, 1)) for v in (0, -1, 2.0, True, None)),
    *(("top_k", lambda v=v: layer(4, 6, 5, v)) for v in (0, -1, 6, 2.0, True, None)),
    *(("routing", lambda v=v: layer(4, 6, routing=v)) for v in ("Image", "", None, "tokens")),
    *(("align", lambda v=v: layer(4, 6, align=v)) for v in ("KD", "", None, "l2")),
    *(("route_from", lambda v=v: layer(4, 6, route_from=v)) for v in ("first", None)),
    *(("path", lambda v=v: layer(4, 6, path=v)) for v in ("expert", None)),
    *(("temperature", lambda v=v: layer(4, 6, temperature=v)) for v in (0, 0.0, -1.0, NAN, None, "1")),
    *(("usage_momentum", lambda v=v: layer(4, 6, usage_momentum=v)) for v in (-0.1, 1.1, NAN, None, "1")),
    *(("backend", lambda v=v: layer(4, 6, backend=v)) for v in (*refused("group_ema_"), "", 3)),
    # layer(x)
    *(("x", lambda v=v: forward(v)) for v in (X[0], X[None], X[..., :3], X.int(), X.bool(), X.to(torch.complex64))),
    *(("x", lambda v=v: forward(v)) for v in (None, [[[0.0]]], X[:, :0])),
    *(("noise_std", lambda v=v: forward(noise_std=v)) for v in (-0.1, NAN, True, "1", None, torch.zeros(1))),
    ("noise_std", lambda: DEXLayer(4, 6, 5, 2).eval()(X, noise_std=-1.0)),
    *(("router_noise", lambda v=v: forward(noise_std=1.0, router_noise=v)) for v in (NOISE[0], NOISE[:1], X, "a")),
    ("router_noise", lambda: forward(noise_std=1.0, router_noise=NOISE.to("meta"))),
    # route
    *(("x", lambda v=v: route(v, W, 2)) for v in (X[0], X.int(), X[:, :0], None)),
    *(("router_weight", lambda v=v: route(X, v, 2)) for v in (W[0], W[:, :3], W.T, None, W.to("meta"))),
    *(("top_k", lambda v=v: route(X, W, v)) for v in (0, 6, -1, True, 2.0, None)),
    ("routing", lambda: route(X, W, 2, routing="both")),
    ("route_from", lambda: route(X, W, 2, route_from="patch")),
    *(("temperature", lambda v=v: route(X, W, 2, temperature=v)) for v in (0, -1, NAN, None)),
    *(("noise_std", lambda v=v: noisy(noise_std=v)) for v in (-1, NAN, False, torch.zeros(1))),
    *(("usage_ema", lambda v=v: noisy(usage_ema=v)) for v in (None, USAGE[:4], USAGE[None], USAGE.to("meta"))),
    *(("router_noise", lambda v=v: noisy(router_noise=v)) for v in (NOISE[:, 0], NOISE[..., :4], NOISE.to("meta"))),
    ("router_noise", lambda: noisy(routing="token")),
    *(("backend", lambda v=v: route(X, W, 2, backend=v)) for v in refused("route")),
    # grouped_mlp
    *(("x", lambda v=v: mlp(v)) for v in (X[0], X.int(), None)),
    *((n, lambda n=n: mlp(**{n: WEIGHTS[n][0]})) for n in WEIGHTS),
    *((n, lambda n=n: mlp(**{n: WEIGHTS[n].double()})) for n in WEIGHTS),
    *((n, lambda n=n: mlp(**{n: WEIGHTS[n].to("meta")})) for n in WEIGHTS),
    *((n, lambda n=n: mlp(**{n: WEIGHTS[n][:4]})) for n in ("fc1_bias", "fc2_weight", "fc2_bias")),
    ("fc1_weight", lambda: mlp(fc1_weight=WEIGHTS["fc1_weight"][..., :3])),
    ("fc2_weight", lambda: mlp(fc2_weight=WEIGHTS["fc2_weight"].transpose(1, 2))),
    ("routing.gates", lambda: mlp(X[:1])),
    ("routing.gates", lambda: mlp(routing=R._replace(gates=R.gates[:, :1, None, None]))),
    ("routing.slot_order", lambda: mlp(routing=R._replace(slot_order=R.slot_order[:3]))),
    ("routing.group_sizes", lambda: mlp(routing=R._replace(group_sizes=R.group_sizes[:4]))),
    ("routing.group_offsets", lambda: mlp(routing=R._replace(group_offsets=R.group_offsets[:4]))),
    *(("backend", lambda v=v: mlp(backend=v)) for v in refused("grouped_mlp")),
    # align_loss
    *(("kind", lambda v=v: align_loss(X, X, v)) for v in ("KD", "", None)),
    *(("experts_out", lambda v=v: align_loss(v, v)) for v in (X.int(), torch.zeros(()), X.to(torch.complex64))),
    ("experts_out", lambda: align_loss(None, X)),
    *(("director_out", lambda v=v: align_loss(X, v)) for v in (X[0], X[..., :1], None, X.to("meta"))),
    *(("backend", lambda v=v: align_loss(X, X, backend=v)) for v in refused("align_loss")),
    # group_ema_
    *(("momentum", lambda v=v: ema(m=v)) for v in (-0.1, 1.1, NAN, True, "1", None, torch.zeros(1))),
    *(("skip", lambda v=v: ema(skip=v)) for v in (True, 1, torch.zeros(1, dtype=torch.bool), torch.tensor(1), "no")),
    ("experts", lambda: ema(e=[])),
    ("group_weights", lambda: ema(a=[])),
    *(
        (r"experts\[0\]", lambda v=v: ema(e=[v]))
        for v in (torch.zeros(3), torch.zeros(2, 4), torch.zeros(2, 3).double())
    ),
    (r"experts\[0\]", lambda: ema(e=[torch.zeros(2, 3, device="meta")])),
    *((r"group_weights\[0\]", lambda v=v: ema(a=[v])) for v in (torch.ones(3), torch.ones(1, 2), None)),
    *((r"directors\[0\]", lambda v=v: ema([v])) for v in (torch.zeros(3).half(), torch.zeros(3).int(), None)),
    *(("backend", lambda v=v: ema(backend=v)) for v in refused("group_ema_")),
    # update_director
    *(("gate_mass", lambda v=v: update(v)) for v in (torch.ones(4), torch.ones(1, 5), torch.tensor(1.0), [1.0] * 5)),
    ("gate_mass", lambda: update(torch.ones(5, device="meta"))),
    *(("momentum", lambda v=v: update(m=v)) for v in (-0.1, 1.1, NAN, False, None, torch.zeros(2))),
    *(("skip", lambda v=v: update(skip=v)) for v in (False, torch.zeros(1, dtype=torch.bool), torch.tensor(0.0))),
]


@pytest.mark.parametrize(("name", "call"), TABLE, ids=[f"{name}-{i}" for i, (name, _) in enumerate(TABLE)])
def test_refused_by_name(name, call):
    with pytest.raises(ValueError, match=f"(^|[ ,]){name.replace('.', '[.]')}(, [a-z_]+)*(\\[\\d+\\])?: "):
        call()


def test_the_calls_of_the_table_work_unaltered():
    assert layer(4, 6).num_experts == 8
    assert forward().shape == mlp().shape == X.shape
    assert forward(noise_std=1.0, router_noise=NOISE).shape == X.shape
    assert isinstance(noisy(), Routing)
    ema(), update(), ema(skip=torch.tensor(False)), update(skip=torch.tensor(False))


def test_messages_say_what_was_expected_and_what_came():
    with pytest.raises(ValueError, match=r"^x: expected \[B, N, 4\], got \[2, 3, 3\]$"):
        forward(X[..., :3])
    with pytest.raises(ValueError, match=r"^top_k: expected an integer in 1\.\.num_experts \(5\), got 6$"):
        layer(4, 6, 5, 6)


def test_backend_report_gives_the_reasons_of_the_refusals():
    rows = {(r.op, r.backend): r for r in backends.report()}
    assert set(rows) == {(op, b) for op in backends.TABLES for b in backends.BACKENDS}
    for (op, backend), row in rows.items():
        assert row.reason and (row.available or backend != "reference")
        if not row.available:
            with pytest.raises(ValueError, match=re.escape(row.reason)):
                backends.choose(op, backend, torch.device("cpu"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for op in backends.TABLES:
        assert [b for b in backends.BACKENDS if rows[op, b].default] == [
            backends.choose(op, None, device, dtype=backends.training_dtype(op))
        ]
    assert layer(4, 6, backend="reference")(X).shape == X.shape
