"""Training steps on a GPU that is not there: fake tensors, whose device is cuda and which hold no values.

A program. It prints JSON: for every case of `CASES` what stopped its steps (None: nothing did), how much the device
part of a step launched, and which of its launches had other numbers in the next step. Argument: what `no_gpu.cpp`
compiles to. Everything of a step runs but the kernels: operators of this library run as their fake kernels
(tests/kernels looks at the launchers), `group_ema_` as plain torch, events are stand-ins. Reading a fake tensor is an
error by itself; what else would wait is `dexkernels.testing.NoHostWaits`'s to find.
"""

import contextlib
import ctypes
import json
import sys
from unittest import mock

ctypes.CDLL(sys.argv[1])

import torch  # noqa: E402
from small import trainer  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402

from dex.model import MaskedAutoencoder  # noqa: E402
from dex.train import engine, initial, plan  # noqa: E402
from dex.train import trainer as pretraining  # noqa: E402
from dex.train.trainer import Trainer  # noqa: E402
from dex.train.verdict import Agreement  # noqa: E402
from dex.train.window import Window  # noqa: E402
from dexkernels import collect_aux, layer, optim, shadows  # noqa: E402
from dexkernels.testing import NoHostWaits  # noqa: E402

STEPS = 4
ARRIVED = [1.0, 0.0, 0.0] + [1.0] * 10
"""The verdict of a good step on 8 images, as it reaches the host."""
DEVICE = torch.device("cuda", 0)


class Event:
    """An event of a GPU that knows in which step it was recorded, and by whom it is waited for."""

    step = 0

    def __init__(self, enable_timing=False):
        pass

    def record(self):
        self.recorded = Event.step

    def synchronize(self):
        if self.recorded >= Event.step:
            raise RuntimeError(f"step {Event.step} waits for an event of step {self.recorded}")


class Watch(NoHostWaits):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket is torch.ops.aten._fused_adamw_:  # in place, and fake tensors know of no such operator
            self.see(op, args, kwargs)
            return None
        return super().__torch_dispatch__(op, types, args, kwargs)


def after(owner, name, do):
    """``owner.name`` followed by ``do(result, *arguments)``."""
    real = getattr(owner, name)

    def wrapped(*arguments, **options):
        out = real(*arguments, **options)
        do(out, *arguments)
        return out

    return mock.patch.object(owner, name, wrapped)


def instead(owner, name, do):
    return mock.patch.object(owner, name, do)


def in_plain_torch(operator):
    return lambda *arguments, **options: operator(*arguments, **options | {"backend": "reference"})


def ask_for_skip(self, mass, momentum, *, skip, process_group):
    if not skip:
        layer.update_directors(self.encoder.dex_layers, mass, momentum, process_group=process_group)


def as_number(name):
    """The schedule's value ``name`` as a number, which a CUDA graph would keep."""
    real = Trainer._compute

    def compute(self, *arguments):
        tensors, value = self._schedule, getattr(pretraining.schedule_at(self.config, self.step, self.steps), name)
        self._schedule = tensors._replace(**{name: value})
        if name == "lr":
            self.optimizer.param_groups[0]["lr"] = value
        out = real(self, *arguments)
        self._schedule = tensors
        return out

    return instead(Trainer, "_compute", compute)


real_read = Trainer._read_verdicts
CASES = {
    "nothing": contextlib.nullcontext,
    "micro-batches": contextlib.nullcontext,
    "checkpointing": contextlib.nullcontext,
    "bf16": contextlib.nullcontext,
    "averages and rates by depth": contextlib.nullcontext,
    "fp16": contextlib.nullcontext,
    "fused": contextlib.nullcontext,
    "fused in bf16": contextlib.nullcontext,
    "micro-batches in bf16": contextlib.nullcontext,
    "layer reads its loss": lambda: after(layer.DEXLayer, "_routed", lambda out, *_: out[1].align_loss.item()),
    "layer reads group sizes": lambda: after(layer, "routed_mlp", lambda out, *_: out[1].group_sizes.tolist()),
    "layer asks whether finite": lambda: after(layer, "align_loss", lambda out, *_: bool(out.isfinite())),
    "model picks by a mask": lambda: after(MaskedAutoencoder, "patch_loss", lambda out, *_: out[out > 0]),
    "model sets by a mask": lambda: after(
        MaskedAutoencoder, "patch_loss", lambda out, *_: out.detach().__setitem__(out > 0, out.detach()[0, 0])
    ),
    "model makes a tensor on the host": lambda: after(
        pretraining, "augment", lambda out, *_: torch.tensor([0.5, 0.5], device=out.device)
    ),
    "batch is copied from pageable memory": lambda: instead(
        Trainer, "_to_device", lambda self, t: t.to(self.device, non_blocking=True)
    ),
    "batch is waited for": lambda: instead(Trainer, "_to_device", lambda self, t: t.pin_memory().to(self.device)),
    "step reads the loss": lambda: after(Trainer, "_compute", lambda out, *_: float(out[0].losses.loss)),
    "step copies the loss": lambda: after(Trainer, "_compute", lambda out, *_: out[0].losses.loss.cpu()),
    "verdict decides on the host": lambda: after(Agreement, "reach", lambda out, *_: bool(out.good)),
    "verdict is sent and waited for": lambda: after(engine, "send", lambda out, *_: out.ready.synchronize()),
    "verdict is sent to pageable memory": lambda: after(
        engine, "send", lambda out, verdict, *_: torch.empty(1).copy_(verdict.slots[:1], non_blocking=True)
    ),
    "verdict is read at once": lambda: instead(Trainer, "_read_verdicts", lambda self, keep: real_read(self, 0)),
    "gradients are checked": lambda: instead(
        torch.nn.utils,
        "clip_grads_with_norm_",
        lambda parameters, limit, norm: torch.nn.utils.clip_grad_norm_(parameters, limit, error_if_nonfinite=True),
    ),
    "directors ask for skip": lambda: instead(MaskedAutoencoder, "update_directors", ask_for_skip),
    "slots are looked through": lambda: after(Window, "count", lambda out, window, *_: window.slots.nonzero()),
    **{name: lambda name=name: as_number(name) for name in ("lr", "noise_std", "momentum", "balance_weight")},
    "stop": lambda: after(Trainer, "_compute", lambda out, self, *_: torch.full_like(out[0].good, self.stop_requested)),
}

OPTIONS = {
    "micro-batches": {"micro_batch": 4},
    "checkpointing": {"checkpointing": True},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "fused": {"optim": {"fused": True, "layer_decay": 0.5}},
    "fused in bf16": {"optim": {"fused": True}, "precision": "bf16"},
    "averages and rates by depth": {"optim": {"ema": 0.9, "layer_decay": 0.5, "decay_exclude": "vectors"}},
    "micro-batches in bf16": {"micro_batch": 4, "precision": "bf16"},
}


def steps(name: str, launched: list[list[str]]) -> None:
    """`STEPS` steps with the trainer of a case; ``launched`` gets what `_compute` launched in each."""
    real_batch = Trainer._next_batch

    def next_batch(self):
        with _disable_current_modes():
            return real_batch(self)

    def read_verdicts(self, keep):
        # What has arrived on the host is no fake; a verdict that has not is left as it is.
        for i, verdict in enumerate(self._pending):
            if verdict.step < Event.step:
                with _disable_current_modes():
                    self._pending[i] = verdict._replace(values=torch.tensor(ARRIVED))
        with _disable_current_modes():
            return real_verdicts(self, keep)

    def compute(self, *arguments):
        first = len(watch.seen)
        out = real_compute(self, *arguments)
        launched.append(watch.seen[first:])
        return out

    real_build = initial.build_model

    def build_model(config):
        with DEVICE:
            model = real_build(config)
        model.to = lambda device: model  # fake parameters do not move
        return model

    with contextlib.ExitStack() as stack:
        for owner, attribute, value in (
            (plan, "resolve_device", lambda *_: DEVICE),
            (initial, "build_model", build_model),
            (torch.cuda, "Event", Event),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda: True),
            (shadows, "stream_of", lambda device: 0),
            (optim, "checked", in_plain_torch(optim.checked)),
            (optim, "group_ema_", in_plain_torch(optim.group_ema_)),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (Trainer, "_next_batch", next_batch),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, value))
        stack.enter_context(CASES[name]())
        real_compute, real_verdicts = Trainer._compute, Trainer._read_verdicts
        stack.enter_context(mock.patch.object(Trainer, "_compute", compute))
        stack.enter_context(mock.patch.object(Trainer, "_read_verdicts", read_verdicts))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        t = trainer("cpu", "reference", **OPTIONS.get(name, {}))
        assert {p.device.type for p in t.model.parameters()} == {"cuda"}
        watch = stack.enter_context(Watch())
        for Event.step in range(STEPS):
            t.stop_requested = Event.step == STEPS - 1
            t.train_step()
        assert t.step == STEPS and t._pending[0].values.device.type == "cpu"


LAYERS = {
    "layer by token": {"routing": "token"},
    "layer by mean, cosine": {"route_from": "mean", "align": "cosine"},
    "layer, mse": {"align": "mse"},
    "layer of a host": {},
}


def layers(name: str, launched: list[list[str]]) -> None:
    """Steps of a layer alone, or of one whose host sees only its output; schedules are tensors, as a host's must be."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        instead(torch.cuda, "is_bf16_supported", lambda: True),
        instead(torch.cuda, "is_current_stream_capturing", lambda: False),
    ):
        with DEVICE:
            host = torch.nn.Sequential(torch.nn.Linear(16, 16), layer.DEXLayer(16, 32, 4, 2, **LAYERS[name]))
            for dex in host.children():
                if isinstance(dex, layer.DEXLayer):
                    dex.backend = "reference"
            noise_std, momentum, x = torch.zeros(()), torch.zeros(()), torch.randn(8, 5, 16)
        with Watch() as watch:
            for step in range(STEPS):
                noise_std.fill_(1 / (step + 1)), momentum.fill_(step / STEPS)
                first = len(watch.seen)
                if name == "layer of a host":
                    with collect_aux(host, noise_std) as aux:
                        y = host(x)
                    (y.square().mean() + aux.losses()).backward()
                    aux.update_directors(momentum, skip=~y.isfinite().all())
                else:
                    y, aux = host[1](host[0](x), noise_std=noise_std, return_aux=True)
                    (y.square().mean() + aux.align_loss + aux.balance_loss).backward()
                    host[1].update_director(aux.gate_mass, momentum, skip=~y.isfinite().all())
                launched.append(watch.seen[first:])


def main() -> None:
    found = {}
    for name in (*CASES, *LAYERS):
        stopped, launched = None, []
        try:
            (steps if name in CASES else layers)(name, launched)
        except Exception as error:
            stopped = f"{type(error).__name__}: {error}"
        last = launched[-2:] if stopped is None else [[], []]
        moved = [f"{before} -> {after}" for before, after in zip(*last, strict=True) if before != after]
        half = sum("torch.bfloat16[" in launch for launch in last[0])
        found[name] = {"stopped": stopped, "launches": len(last[0]), "in_bf16": half, "moved": moved}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
