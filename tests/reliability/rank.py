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


class Faults:
    """What is put into the package on one rank; keys of ``asked`` are read where they take effect.

    ``rank``: where the faults are; the others only take part. Each method changes what it is named for.
    """

    def __init__(self, asked):
        from dex.model import MaskedAutoencoder
        from dex.train import trainer as engine

        self.asked, self.engine, self.model = asked, engine, MaskedAutoencoder
        self.rank = int(os.environ["RANK"])
        self.here = asked.get("rank", self.rank) == self.rank
        self.watched = asked.get("bad_steps", [])
        self.bad = self.watched if self.here else []
        self.step = 0
        self._trace = None
        if "trace" in asked:
            self._trace = open(f"{asked['trace']}.{self.rank}", "a", buffering=1)  # noqa: SIM115

    def note(self, **entry):
        if self._trace:
            self._trace.write(json.dumps(entry) + "\n")

    def put_in(self):
        self.note(pid=os.getpid())
        if self._trace:
            self.signals()
        if self.here:
            self.files()
        self.steps()
        self.images()
        self.forward()
        self.batches()
        if self.here:
            self.loader()
            self.reads()
            self.end()

    def signals(self):
        real = signal.signal

        def traced(number, handler):
            def noted(*a):
                self.note(signal=number, at=time.monotonic())
                return handler(*a)

            return real(number, noted if callable(handler) else handler)

        signal.signal = traced

    def files(self):
        if "operation" in self.asked:
            log = None
            if "operations" in self.asked:
                log = os.open(f"{self.asked['operations']}.{self.rank}", os.O_WRONLY | os.O_CREAT)
            thread, how = self.asked.get("thread", "checkpoint"), self.asked.get("how", "before")
            FileFaults(thread, self.asked["operation"], how, log)

    def steps(self):
        """A trace of every step, and of the state around those that are watched."""
        real = self.engine.Trainer.train_step

        def train_step(trainer):
            self.step = step = trainer.step
            watched = self._trace and step in self.watched
            if watched:
                self.note(before=step, hash=everything(trainer))
            try:
                return real(trainer)
            finally:
                self.note(done=step + 1, at=time.monotonic())
                if watched:
                    self.note(after=step, hash=everything(trainer))
                if self._trace and (step + 1) % self.asked.get("directors_every", 1 << 60) == 0:
                    self.note(directors=step + 1, hash=directors(trainer))

        def wait_for_ever(trainer):
            try:
                return train_step(trainer)
            except RuntimeError:
                time.sleep(3600)

        # What waits for a rank that failed goes on waiting with NCCL.
        self.engine.Trainer.train_step = wait_for_ever if "like_nccl" in self.asked else train_step

    def images(self):
        real = self.engine.augment

        def augment(*a, **k):
            images = real(*a, **k)
            if self.step in self.bad and self.asked["kind"] == "pixel":
                images[0, 0, 3, 5] = float("nan")
            return images

        self.engine.augment = augment

    def forward(self):
        import torch

        real = self.model.forward

        class BadGradient(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, g):
                return g * float("nan")

        def forward(model, *a, **k):
            if "slow_forward" in self.asked and self.here and model.training:
                time.sleep(self.asked["slow_forward"])
            out = real(model, *a, **k)
            if not model.training or self.step not in self.bad:
                return out
            if self.asked["kind"] == "loss":
                poison = torch.zeros_like(out.image_loss)
                poison[0] = float("inf")
                return out._replace(loss=out.loss + poison.sum(), image_loss=out.image_loss + poison)
            if self.asked["kind"] == "gradient":
                return out._replace(loss=BadGradient.apply(out.loss))
            return out

        self.model.forward = forward

    def batches(self):
        """A trace of every batch, and what happens before one is given."""
        import torch

        from dex.data.dataset import SampleError
        from dex.data.folder import FolderDataset

        def unreadable(data, index, out):
            raise SampleError(f"broken-{index}", "cut short")

        def before(trainer):
            step = trainer.step
            if step == self.asked.get("hang_at"):
                time.sleep(3600)
            if step == self.asked.get("drift_at"):
                with torch.no_grad():
                    trainer.model.encoder.dex_layers[0].director.fc1.bias[0] += 1e-3
            if step == self.asked.get("error_at"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if step == self.asked.get("unreadable_from"):
                FolderDataset.read = unreadable

        real = self.engine.Trainer._next_batch

        def next_batch(trainer):
            if self.here:
                before(trainer)
            batch, error = real(trainer)
            self.note(step=trainer.step, ids=list(batch.ids))
            return batch, error

        self.engine.Trainer._next_batch = next_batch

    def loader(self):
        if "slow_loader" in self.asked:
            from dex.data import Loader

            real = Loader.__next__

            def late(loader):
                time.sleep(self.asked["slow_loader"])
                return real(loader)

            Loader.__next__ = late

    def reads(self):
        """Whoever reads an image while ``stall`` is there, a FIFO, waits until somebody has written to it."""
        if "stall" in self.asked:
            from dex.data.folder import FolderDataset

            real, stall = FolderDataset._bytes, self.asked["stall"]

            def late(dataset, path):
                with contextlib.suppress(FileNotFoundError), open(stall) as file:
                    file.read()
                return real(dataset, path)

            FolderDataset._bytes = late

    def end(self):
        if "like_nccl" in self.asked:  # leaving the others waits for them, too
            from dex.train import run

            run.stop = lambda ranks: time.sleep(3600)


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
        Faults(order["faults"]).put_in()
    from dex.cli import main

    sys.exit(main(order["arguments"]))


def serve():
    import matplotlib.pyplot  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

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
        Faults(json.loads(sys.argv[1])).put_in()
        from dex.cli import main

        sys.exit(main(sys.argv[2:]))
    serve()
