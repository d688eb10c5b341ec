"""The parts of scripts/rehearsal.py that start runs of `dex pretrain`, and what `dex.sizing` predicts for GPUs."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "scripts", "python")]

PRESETS = ("published-code", "paper")
EPOCHS = 200
RANKS = (2, 8, 64)
SMALL = {
    "--model.img-size": "64",
    "--model.embed-dim": "64",
    "--model.depth": "2",
    "--model.num-heads": "2",
    "--model.decoder-embed-dim": "32",
    "--model.decoder-depth": "1",
    "--model.decoder-num-heads": "2",
    "--run.device": "cpu",
    "--run.precision": "fp32",
    "--run.log-every": "1",
    "--run.evaluate-every": "0",
    "--data.num-workers": "0",
}
"""Changes to a preset that leave its data, batch, schedules and length: the network is small, so that a CPU computes a
step in seconds."""
STOPS = (2, 4)
MICRO_BATCH = 112
"""Images that a GPU computes at once, at most."""


def training(root: Path) -> dict:
    """Runs of both presets' data and schedules: one to the second stop, another that stops in between and resumes."""
    rows = {}
    for name in PRESETS:
        folders = {kind: root.parent / f"{name}-{kind}" for kind in ("whole", "resumed")}
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        first, last = STOPS
        whole = pretrain(name, root, folders["whole"], last)
        stopped = pretrain(name, root, folders["resumed"], first)
        resumed = pretrain(name, root, folders["resumed"], last, "--resume", "auto")
        written = {kind: weights(folder, last) for kind, folder in folders.items()}
        rows[name] = {
            "start": whole,
            "stop": stopped,
            "resume": resumed,
            "steps": json.loads((folders["whole"] / "run.json").read_text())["starts"][0]["steps"],
            "equal": written["whole"] == written["resumed"],
            "tensors": len(written["whole"]),
            "checkpoint": checkpoint_sizes(folders["whole"]),
        }
        for folder in folders.values():
            shutil.rmtree(folder)
    return rows


def pretrain(name: str, data: Path, out: Path, stop_at: int, *words: str) -> dict:
    """Run `dex pretrain` to step ``stop_at``: seconds to its first row of metrics and to its end, and its peak memory.

    RuntimeError: it failed.
    """
    changes = [word for pair in SMALL.items() for word in pair]
    command = [sys.executable, "-m", "dex", "pretrain", "--preset", name, "--data", str(data), "--out", str(out)]
    command += [*changes, "--run.stop-at", str(stop_at), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{ROOT}"}
    metrics = out / "metrics.jsonl"
    rows = metrics.read_text().count("\n") if metrics.exists() else 0
    began, first = time.perf_counter(), None
    with open(out.with_suffix(".log"), "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                if first is None and metrics.exists() and metrics.read_text().count("\n") > rows:
                    first = time.perf_counter() - began
                time.sleep(0.05)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        log.seek(0)
        text = log.read()
    if process.returncode != 0:
        raise RuntimeError(f"dex pretrain --preset {name}: exit {process.returncode}: {text[-2000:]}")
    usage = ended[2]
    return {
        "first_step": seconds if first is None else first,
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * 1024,
    }


def weights(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of every tensor in the checkpoint of ``step``."""
    import hashlib

    from safetensors.torch import load_file

    from dex.train import checkpoint

    folder = checkpoint.newest_good(run / "checkpoints")[0].folder
    if folder.name != f"step-{step:08d}":
        raise RuntimeError(f"{run.name}: expected a checkpoint of step {step}, got {folder.name}")
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors[f"{file.name}/{name}"] = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
    return tensors


def checkpoint_sizes(run: Path) -> dict[str, int]:
    """Bytes of the newest checkpoint's files, and what the estimate says."""
    from dex.config import Config, read_yaml
    from dex.sizing.estimate import estimate
    from dex.train import checkpoint

    folder = checkpoint.newest_good(run / "checkpoints")[0].folder
    return {
        "written": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "estimated": estimate(read_yaml(run / "config.yaml", Config()), 1).checkpoint,
    }


def predicted(root: Path) -> dict:
    """What one day of each preset does on GPUs, with the unit costs that docs/scaling.md assumes."""
    from scaling import GPU, MODALITIES, gpu_costs

    from dex.config import preset
    from dex.data.shard_format import read_manifest
    from dex.sizing.scaling import memory, split, step, workload

    costs, sources = gpu_costs(GPU)
    images = sum(row["train"] for row in read_manifest(root)[0]["modalities"])
    rows, checkpoints = [], {}
    for name in PRESETS:
        counted = workload(preset(name), MODALITIES)
        batch, every = counted.config.data.batch_size, counted.config.run.checkpoint_every
        checkpoints[name] = {
            "bytes": counted.estimate.checkpoint,
            "every": every,
            "kept": counted.config.run.keep_checkpoints,
        }
        for count in RANKS:
            work = counted._replace(config=split(counted.config, count, MICRO_BATCH))
            seconds = step(work, count, "ddp", costs).total
            steps = 86400 / seconds
            rows.append(
                {
                    "preset": name,
                    "gpus": count,
                    "step": seconds,
                    "memory": sum(memory(work, count, "ddp").values()),
                    "steps_a_day": steps,
                    "epochs_a_day": steps / (images // batch),
                    "days": EPOCHS * (images // batch) / steps,
                    "images_a_second": batch / seconds,
                    "checkpoints_a_day": steps / every,
                }
            )
    return {"gpu": GPU, "sources": sources, "strategy": "ddp", "rows": rows, "checkpoints": checkpoints}
