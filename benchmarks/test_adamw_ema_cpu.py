"""`adamw_ema_` on the CPU against torch's fused AdamW after `group_ema_`, and against the bound by bytes.

In float32, for E experts and their director, AdamW reads a weight, its gradient and two moments and writes three of
these: 7 E. GEMA alone reads the experts, and reads and writes the director: E + 2. In one pass the experts are read
only once: (8 E + 2) / (7 E + 2) is 1.14 for E = 8.
"""

import torch

from dexkernels.ops.adamw_ema import adamw_ema_
from dexkernels.ops.adamw_ema.records import Rule, Update
from dexkernels.ops.group_ema import group_ema_


def test_adamw_ema(tiny, compare, report):
    D, H, E = (16, 32, 4) if tiny else (512, 2048, 8)
    shapes = ((H, D), (H,), (D, H), (D,))
    weights = torch.rand(E)
    weights /= weights.sum()

    def updates_of(copies):
        updates = []
        for shape in shapes:
            p, g, m, v = (1e-3 * torch.randn(E, *shape) for _ in range(4))
            copy = torch.empty(E + 1, *shape, dtype=torch.bfloat16) if copies else None
            updates.append(Update(p, g, m, v.square(), torch.tensor(3.0), torch.randn(shape), weights, copy))
        return updates

    fused, separate, with_copies = updates_of(False), updates_of(False), updates_of(True)
    rule = Rule(1e-4)

    def apart():
        group_ema_([u.director for u in separate], [u.parameter for u in separate], [weights] * 4, 0.99)
        tensors = ([getattr(u, name) for u in separate] for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq"))
        steps = [u.step for u in separate]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            *tensors, [], steps, lr=1e-4, beta1=0.9, beta2=0.999, weight_decay=1e-2, eps=1e-8, amsgrad=False,
            maximize=False,
        )  # fmt: skip

    t = compare(
        {
            "one pass": lambda: adamw_ema_(fused, rule, momentum=0.99),
            "apart": apart,
            "with copies": lambda: adamw_ema_(with_copies, rule, momentum=0.99),
        },
        rounds=9,
    )
    bound = (8 * E + 2) / (7 * E + 2)
    copied = f"with bfloat16 copies {t['with copies'] * 1e3:.0f} ms"
    detail = f"{t['one pass'] * 1e3:.0f} ms, apart {t['apart'] * 1e3:.0f} ms, {copied}; by bytes {bound:.2f}"
    report("adamw_ema_", "fused AdamW, then group_ema_", t["apart"] / t["one pass"], 0.9, detail, goal=1.05)
