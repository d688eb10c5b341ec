"""Processes for the tests of reliability: ranks of ``dex``, with faults that a test asks for.

Run as a program this imports everything once and then forks one process per order, so that a rank starts in a tenth of
a second. Orders and answers are lines of JSON: ``{"start": ...}`` gives a process id, ``{"wait": ...}`` an exit code.
A rank runs what ``python -m dex`` runs; its faults are put in beforehand, from outside the package.
"""

import builtins
import contextlib
import ctypes
import errno
import gc
import hashlib
import io
import json
import os
import signal
import sys
import threading
import time

OPERATIONS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir", "chmod")


class FileFaults:
    """Counts what one thread does to files and makes one operation fail.

    Covered: files opened for writing (``open``, ``Path.open``) and each of their writes, the file of tensors as one
    write, `os.mkdir`, `os.open`, `os.fsync`, `os.rename`, `os.replace`, `os.unlink`, `os.rmdir`, `os.chmod`. Not
    covered: what the kernel had not written to the disk when the power went.
    number: the operation, from 1; None only counts. how: the process is killed "before" it, "after" it or half-way
    through a write ("torn"), or the disk is "full" from there on (OSError ENOSPC).
    """

    def __init__(self, thread, number=None, how="before", log=None):
        self.thread, self.number, self.how, self.log, self.count, self.full = thread, number, how, log, 0, False
        for name in OPERATIONS:
            setattr(os, name, self._wrapped(getattr(os, name), name))
        real = io.open
        builtins.open = io.open = lambda *a, **k: self._opened(real, *a, **k)
        from dex.train import checkpoint

        save_file = checkpoint.save_file
        checkpoint.save_file = lambda *a: self._hit("write", lambda: save_file(*a), lambda: self._half(save_file, *a))

    def _hit(self, name, act, torn=None):
        if threading.current_thread().name != self.thread:
            return act()
        self.count += 1
        if self.log:
            os.write(self.log, f"{self.count} {name}\n".encode())
        if self.full and name in ("write", "mkdir", "create"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.count != self.number:
            return act()
        if self.how == "full":
            self.full = True
            if torn:
                torn()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.how == "torn" and torn:
            torn()
        elif self.how == "after":
            with contextlib.suppress(OSError):
                act()
        os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def _half(save_file, tensors, path, *a):
        save_file(tensors, path, *a)
        os.truncate(path, path.stat().st_size // 2)

    def _wrapped(self, real, name):
        return lambda *a, **k: self._hit(name, lambda: real(*a, **k))

    def _opened(self, real, file, mode="r", *a, **k):
        if not set(mode) & set("wax+") or threading.current_thread().name != self.thread:
            return real(file, mode, *a, **k)
        return Written(self._hit("create", lambda: real(file, mode, *a, **k)), self._hit)


class Written:
    """A file whose writes reach the system one by one."""

    def __init__(self, file, hit):
        self._file, self._hit = file, hit

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, data):
        def put(part):
            done = self._file.write(part)
            self._file.flush()
            return done

        return self._hit("write", lambda: put(data), lambda: put(data[: len(data) // 2]))


def put_in(faults):
    """Change the package as ``faults`` says; keys are read below. ``rank``: where; the others only take part."""
    import torch

    from dex.data.dataset import SampleError
    from dex.model import MaskedAutoencoder
    from dex.train import trainer as engine

    rank = int(os.environ["RANK"])
    here = faults.get("rank", rank) == rank
    trace = open(f"{faults['trace']}.{rank}", "a", buffering=1) if "trace" in faults else None  # noqa: SIM115
    if trace:
        trace.write(json.dumps({"pid": os.getpid()}) + "\n")
        real_signal = signal.signal

        def traced_signal(number, handler):
            def note(*a):
                trace.write(json.dumps({"signal": number, "at": time.monotonic()}) + "\n")
                return handler(*a)

            return real_signal(number, note if callable(handler) else handler)

        signal.signal = traced_signal
    watched = faults.get("bad_steps", [])
    bad = watched if here else []
    step = 0
    if here and "operation" in faults:
        log = os.open(f"{faults['operations']}.{rank}", os.O_WRONLY | os.O_CREAT) if "operations" in faults else None
        FileFaults(faults.get("thread", "checkpoint"), faults["operation"], faults.get("how", "before"), log)

    real_step, real_augment, real_next = engine.Trainer.train_step, engine.augment, engine.Trainer._next_batch
    real_forward = MaskedAutoencoder.forward

    def next_batch(self):
        found = real_next(self)
        if trace:
            trace.write(json.dumps({"step": self.step, "ids": list(found[0].ids)}) + "\n")
        return found

    def train_step(self):
        nonlocal step
        step = self.step
        if trace and step in watched:
            trace.write(json.dumps({"before": step, "hash": everything(self)}) + "\n")
        try:
            return real_step(self)
        finally:
            if trace:
                trace.write(json.dumps({"done": step + 1, "at": time.monotonic()}) + "\n")
            if trace and step in watched:
                trace.write(json.dumps({"after": step, "hash": everything(self)}) + "\n")
            if trace and (step + 1) % faults.get("directors_every", 1 << 60) == 0:
                trace.write(json.dumps({"directors": step + 1, "hash": directors(self)}) + "\n")

    def augment(*a, **k):
        images = real_augment(*a, **k)
        if step in bad and faults["kind"] == "pixel":
            images[0, 0, 3, 5] = float("nan")
        return images

    def forward(self, *a, **k):
        out = real_forward(self, *a, **k)
        if not self.training or step not in bad:
            return out
        if faults["kind"] == "loss":
            poison = torch.zeros_like(out.image_loss)
            poison[0] = float("inf")
            return out._replace(loss=out.loss + poison.sum(), image_loss=out.image_loss + poison)
        if faults["kind"] == "gradient":
            return out._replace(loss=BadGradient.apply(out.loss))
        return out

    class BadGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    engine.Trainer.train_step, engine.Trainer._next_batch = train_step, next_batch
    engine.augment, MaskedAutoencoder.forward = augment, forward

    if "hang_at" in faults and here:

        def hang(self):
            if self.step == faults["hang_at"]:
                time.sleep(3600)
            return next_batch(self)

        engine.Trainer._next_batch = hang
    if "drift_at" in faults and here:

        def drift(self):
            if self.step == faults["drift_at"]:
                with torch.no_grad():
                    self.model.encoder.dex_layers[0].director.fc1.bias[0] += 1e-3
            return next_batch(self)

        engine.Trainer._next_batch = drift
    if "error_at" in faults and here:

        def fail(self):
            if self.step == faults["error_at"]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return next_batch(self)

        engine.Trainer._next_batch = fail
    if "like_nccl" in faults:  # what waits for a rank that failed goes on waiting, and so does leaving it

        def wait_for_ever(self):
            try:
                return train_step(self)
            except RuntimeError:
                time.sleep(3600)

        engine.Trainer.train_step = wait_for_ever
        if here:
            from dex.train import run as pretrain

            pretrain.stop = lambda ranks: time.sleep(3600)
    if "slow_forward" in faults and here:

        def slow(self, *a, **k):
            time.sleep(faults["slow_forward"] if self.training else 0)
            return forward(self, *a, **k)

        MaskedAutoencoder.forward = slow
    if "slow_loader" in faults and here:
        from dex.data import Loader

        real_batch = Loader.__next__

        def late(self):
            time.sleep(faults["slow_loader"])
            return real_batch(self)

        Loader.__next__ = late
    if "unreadable_from" in faults and here:
        from dex.data.folder import FolderDataset

        def spoiled(self):
            if self.step == faults["unreadable_from"]:

                def unreadable(data, index, out):
                    raise SampleError(f"broken-{index}", "cut short")

                FolderDataset.read = unreadable
            return next_batch(self)

        engine.Trainer._next_batch = spoiled


def digest(named):
    from dex.common.ranks import full

    sha = hashlib.sha256()
    for name, tensor in named:
        sha.update(name.encode())
        sha.update(full(tensor.detach()).contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()


def everything(trainer):
    """Weights, buffers and moments."""
    return digest(sorted(trainer.tensors().items()))


def directors(trainer):
    """What the directors and their usage are on this rank."""
    names = trainer.model.state_dict().items()
    return digest(sorted((n, t) for n, t in names if ".director." in n or n.endswith("usage_ema")))


def rank_main(order):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with its parent
    for number, path in ((1, order["stdout"]), (2, order["stderr"])):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["environment"])
    if order["faults"]:
        put_in(order["faults"])
    from dex.cli import main

    sys.exit(main(order["arguments"]))


def serve():
    import matplotlib.pyplot  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import tyro  # noqa: F401

    import dex.cli  # noqa: F401
    import dex.train.run  # noqa: F401
    import dexkernels.native  # noqa: F401

    torch.set_num_threads(1)
    assert threading.active_count() == 1
    gc.freeze()  # no rank looks through what all of them were born with
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            pid = os.fork()
            if pid == 0:
                rank_main(order["start"])
            answer = pid
        else:
            answer = wait(order["wait"], time.monotonic() + order["seconds"])
        print(json.dumps(answer), flush=True)


def wait(pid, deadline):
    """The exit code, negative for a signal; None when the process still runs at the deadline."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


if __name__ == "__main__":
    if sys.argv[1:]:  # under torchrun: rank.py FAULTS ARGUMENTS...
        put_in(json.loads(sys.argv[1]))
        from dex.cli import main

        sys.exit(main(sys.argv[2:]))
    serve()
