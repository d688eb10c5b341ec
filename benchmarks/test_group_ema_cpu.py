"""GEMA on the CPU against stack-multiply-sum and against the copy bandwidth.

For E 8, D 768, H 3072 in fp32, every expert is read once and the director read and written: 10 x 18.9 MB = 189 MB.
"""

import torch

from dexkernels import DEXLayer, group_ema_
from dexkernels.testing import ExpertLoop, randomize_


def test_group_ema(tiny, compare, report):
    D, H, E = (16, 32, 4) if tiny else (768, 3072, 8)
    layer = randomize_(DEXLayer(D, H, E, 2))
    loop = ExpertLoop(D, H, E, 2)
    loop.load_state_dict(layer.reference_state_dict())
    mass = torch.rand(E) + 0.1
    weights = mass / mass.sum()
    directors, experts = map(list, zip(*layer.director_pairs(), strict=True))
    num_bytes = sum((e.numel() + 2 * d.numel()) * 4 for d, e in zip(directors, experts, strict=True))
    source = torch.randn(num_bytes // 8)
    target = torch.empty_like(source)

    t = compare(
        {
            "group_ema_": lambda: group_ema_(directors, experts, [weights] * len(directors), 0.99),
            "stack": lambda: loop.update_director(mass, 0.99),
            "copy": lambda: target.copy_(source),
        },
        rounds=31,
    )
    gbps = {name: num_bytes / t[name] / 1e9 for name in ("group_ema_", "copy")}
    detail = f"{t['group_ema_'] * 1e3:.2f} ms, stack {t['stack'] * 1e3:.2f} ms"
    report("group_ema_", "stack, multiply, sum", t["stack"] / t["group_ema_"], 9, detail)
    detail = f"{gbps['group_ema_']:.1f} GB/s, copy {gbps['copy']:.1f} GB/s"
    report("group_ema_", "copy of as many bytes", gbps["group_ema_"] / gbps["copy"], 0.65, detail)
