#!/usr/bin/env python3
"""What scripts/multi_gpu.sh needs beside `dex pretrain`.

usage: torchrun ... scripts/multi_gpu_ranks.py exchange    sums over ranks, and directors that stay equal
       python scripts/multi_gpu_ranks.py compare RUN RUN [TOLERANCE]    weights and last loss of two runs
       python scripts/multi_gpu_ranks.py healthy RUN STEPS    all steps done, losses finite, ranks with equal bits
Exit status 1, with one line, when something is not as it must be.
"""

import math
import os
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from dex.train.runlog import METRICS, read_rows  # noqa: E402

STEPS, MEGABYTES = 5, 64


def exchange() -> str:
    """Sums of known numbers by the backend that training uses; then steps of a layer on other images for each rank."""
    import torch.distributed as dist

    from dex.common import ranks
    from dexkernels import DEXLayer

    announced = ranks.announced()
    device = torch.device("cuda", announced.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    joined = ranks.start(announced, device, 120.0)
    try:
        numbers = torch.full((MEGABYTES * 2**18,), float(joined.rank + 1), device=device)
        dist.all_reduce(numbers)
        began = time.perf_counter()
        dist.all_reduce(numbers.clone())
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        want = joined.world_size * (joined.world_size + 1) / 2
        if not bool((numbers == want).all()):
            raise ValueError(f"all_reduce: expected {want} everywhere, got {numbers.min()} to {numbers.max()}")
        torch.manual_seed(0)
        layer = DEXLayer(64, 128, 4, 2, backend="reference").to(device)
        network = torch.nn.parallel.DistributedDataParallel(
            layer, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
        generator = torch.Generator().manual_seed(joined.rank)
        for _ in range(STEPS):
            optimizer.zero_grad()
            y, aux = network(torch.randn(4, 9, 64, generator=generator).to(device), return_aux=True)
            (y.square().mean() + aux.align_loss + aux.balance_loss).backward()
            layer.update_director(aux.gate_mass, 0.9)
            optimizer.step()
        if not ranks.same_bits([*layer.parameters(), layer.usage_ema]):
            raise ValueError(f"directors or experts differ between ranks after {STEPS} steps")
        rate = MEGABYTES / 1e3 / seconds
        return f"{joined.world_size} ranks, {dist.get_backend_config()}, {MEGABYTES} MiB summed at {rate:.1f} GB/s"
    finally:
        ranks.stop(joined)


def compare(first: str, second: str, tolerance: str = "0") -> str:
    """The largest difference of weights, relative to the largest weight of the tensor."""
    import dex

    a, b = (dex.load(run).model.state_dict() for run in (first, second))
    if a.keys() != b.keys():
        raise ValueError(f"{first} and {second}: other weights: {sorted(a.keys() ^ b.keys())[:5]}")
    worst = max((float((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-12)), k) for k in a if a[k].numel())
    last = [list(losses(run).values())[-1] for run in (first, second)]
    if not worst[0] <= float(tolerance):
        raise ValueError(f"{worst[1]}: differs by {worst[0]:.2e} of its largest weight, expected at most {tolerance}")
    return f"weights differ by at most {worst[0]:.1e}, last losses {last[0]:.6f} and {last[1]:.6f}"


def healthy(run: str, steps: str) -> str:
    found, agree = losses(run), [row["ranks_agree"] for row in read_rows(Path(run) / METRICS) if "ranks_agree" in row]
    if not found or max(found) != int(steps):
        raise ValueError(f"{run}: expected {steps} steps, got {max(found, default=0)}")
    if not all(map(math.isfinite, found.values())):
        raise ValueError(f"{run}: a loss is not finite: {found}")
    if not agree or not all(agree):
        raise ValueError(f"{run}: expected ranks with equal weights and directors, got {agree or 'no comparison'}")
    return f"{steps} steps, last loss {found[int(steps)]:.4f}, ranks equal in {len(agree)} comparisons"


def losses(run: str) -> dict[int, float]:
    """By step."""
    return {row["step"]: row["loss"] for row in read_rows(Path(run) / METRICS) if "loss" in row}


def main() -> int:
    commands = {"exchange": exchange, "compare": compare, "healthy": healthy}
    name, *arguments = sys.argv[1:] or [""]
    if name not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        text = commands[name](*arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") == "0":
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
