"""What a rank holds and sends in a step; a program of `scaling_ranks.launch`."""

import gc
import json
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "scripts"))

from scaling_ranks import barrier, make_trainer, rank, step_seconds  # noqa: E402


def measure(ranks, job):
    return [of_point(ranks, point) for point in job["points"]]


def of_point(ranks, point):
    """Bytes held between two steps and sent in one, the peak within a step, and {collective: [calls, numbers]}."""
    gc.collect()
    trainer, meet = make_trainer(point, ranks), barrier(ranks)
    for _ in range(2):
        step_seconds(trainer, meet)
    meet()
    before = written()
    trainer.train_step()
    wire = written() - before  # Without those of the barrier.
    bytes_held = held(trainer)
    peak, collectives = profiled(trainer, meet)
    trainer.close()
    return {"wire": wire, "collectives": collectives, "held": bytes_held, "peak": peak}


def held(trainer) -> dict[str, int]:
    """Bytes of the tensors that this rank holds between two steps."""

    def local(t) -> int:
        t = t.to_local() if hasattr(t, "to_local") else t
        return t.numel() * t.element_size()

    model, optimizer = trainer.model, trainer.optimizer
    return {
        "weights": sum(map(local, [*model.parameters(), *model.buffers()])),
        "gradients": sum(local(p.grad) for p in trainer.parameters),
        "moments": sum(local(s[k]) for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")),
    }


def profiled(trainer, meet) -> tuple[int, dict[str, list[int]]]:
    """The peak allocation of a step beyond the bytes before it, and {collective: [calls, numbers]} of that step.

    Both are from torch's profiler. Gradients of the previous step are freed first, unless they are views of buckets.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    trainer.optimizer.zero_grad(set_to_none=True)
    meet()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as record:
        trainer.train_step()
    calls: dict[str, list[int]] = {}
    for event in record.events():
        if event.name.startswith("gloo:"):
            entry = calls.setdefault(event.name.removeprefix("gloo:"), [0, 0])
            entry[0] += 1
            entry[1] += sum(torch.Size(shape).numel() for shape in event.input_shapes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    first = events[0]["args"]  # torch continues counting from the end of the previous record.
    base = first["Total Allocated"] - first["Bytes"]
    return max(e["args"]["Total Allocated"] for e in events) - base, calls


def written() -> int:
    """Bytes that this process has written so far; gloo's messages are writes to sockets."""
    return int(re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text())[1])


if __name__ == "__main__":
    rank(Path(sys.argv[1]), measure)
