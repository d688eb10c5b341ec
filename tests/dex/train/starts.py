"""Several starts of `dex` at the same moment, each a process of its own.

A program; it reads an order, JSON, on stdin:

    starts: the arguments of each; wait: what `LOCK_WAIT` is there;
    pauses: {"start": number, "method": [module, class, name], "until": path} of any: that start calls the method only
    once the file holds something;
    ended: a folder, where a file with the number of a start appears when it has ended; out: the run folder.

One start is to run on. When all others have ended and it has logged three rows, it is sent SIGTERM. The answer is JSON:
for every start its exit code and what it wrote on stderr.
"""

import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

# All that a start would import, once for all of them.
import matplotlib.pyplot  # noqa: F401
import torch
import torch._dynamo  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import dex.cli
import dex.train.run  # noqa: F401
from dex.train import runlog


def pause(method, until):
    module, cls, name = method
    owner = getattr(importlib.import_module(module), cls)
    real = getattr(owner, name)

    def late(*arguments, **options):
        while not (os.path.exists(until) and os.path.getsize(until)):
            time.sleep(0.02)
        return real(*arguments, **options)

    setattr(owner, name, late)


def start(number, order, gate, folder):
    for stream in (1, 2):
        os.dup2(os.open(folder / f"{number}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
    runlog.LOCK_WAIT = order["wait"]
    for paused in order["pauses"]:
        if paused["start"] == number:
            pause(paused["method"], paused["until"])
    os.read(gate, 1)  # until it is opened for all of them
    sys.exit(dex.cli.main(order["starts"][number]))


def main():
    order = json.load(sys.stdin)
    torch.set_num_threads(1)
    folder, metrics = Path(tempfile.mkdtemp()), Path(order["out"]) / "metrics.jsonl"
    gate, opens = os.pipe()
    processes = {}
    for number in range(len(order["starts"])):
        pid = os.fork()
        if pid == 0:
            os.close(opens)
            start(number, order, gate, folder)
        processes[pid] = number
    os.close(opens)
    codes, deadline = {}, time.monotonic() + 120
    while time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG) if processes else (0, 0)
        if pid:
            number = processes.pop(pid)
            codes[number] = os.waitstatus_to_exitcode(status)
            (Path(order["ended"]) / str(number)).write_text("ended")
        elif not processes or (len(processes) == 1 and len(runlog.read_rows(metrics)) >= 3):
            break
        time.sleep(0.02)
    for pid in processes:
        os.kill(pid, signal.SIGTERM)
    for pid, number in processes.items():
        codes[number] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([[codes[n], (folder / f"{n}.2").read_text()] for n in range(len(order["starts"]))]))


if __name__ == "__main__":
    main()
