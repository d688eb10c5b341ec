"""A CUDA graph without a GPU: what torch is asked for during a capture, recorded on a CPU and run again at a replay.

As on a GPU a capture runs nothing: what it changed is put back, and what it computed is lost. A replay gives the same
operators the same memory and the same numbers, and runs no Python of the step; a tensor's version does not move. What
would break a capture is an error: a value that is read on the host, a random number generator. So are streams that do
not wait for each other. Operators of dexkernels are recorded whole.
"""

import contextlib
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dex.train import cuda_graph, engine
from dex.train.trainer import Trainer
from dexkernels import shadows
from dexkernels.ops.adamw_ema import cpu as adamw_ema
from dexkernels.ops.group_ema import cpu


class Refused(RuntimeError):
    """What a GPU would not capture."""


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.launches, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for op, (args, kwargs), made, grad, half in self.launches:
            with (
                torch.set_grad_enabled(grad),
                torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False),
                torch._C._DisableAutocast(),
                torch._C._AutoDispatchBelowAutograd(),
            ):
                found = tensors(op(*args, **kwargs))
                for i, mine in made:
                    mine.copy_(found[i])


class Capture(TorchDispatchMode):
    """In the place of torch.cuda.graph."""

    def __init__(self, graph: Graph, stream: "Stream"):
        super().__init__()
        self.graph, self.stream = graph, stream
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.own: set[int] = set()

    def __enter__(self):
        self.patches = contextlib.ExitStack()
        for owner in (torch, torch.random):
            for name in ("get_rng_state", "set_rng_state"):
                self.patches.enter_context(mock.patch.object(owner, name, self._refuse_generators))
        self.patches.enter_context(mock.patch.object(Stream, "now", self.stream))
        self.patches.enter_context(mock.patch.object(shadows, "capturing", lambda device: True))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()
        for tensor, old in self.before.values():
            tensor.copy_(old)
        for *_, made, _, _ in self.graph.launches:
            for _, mine in made:
                mine.fill_(float("nan") if mine.is_floating_point() else 1)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(op.tags):
            raise Refused(f"a value is read on the host: {op}")
        if torch.Tag.nondeterministic_seeded in op.tags and "attention" not in str(op):  # without dropout in any step
            self._refuse_generators()
        given = (args, kwargs)
        by_name = [(argument, kwargs.get(argument.name)) for argument in op._schema.arguments[len(args) :]]
        for argument, value in [*zip(op._schema.arguments, args, strict=False), *by_name]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors(value):
                    if memory(tensor) not in self.own:
                        whole = tensor.data.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
                        self.before.setdefault(memory(tensor), (whole, whole.clone()))
        out = op(*args, **kwargs)
        there = {memory(tensor) for tensor in tensors(given)}
        made = [(i, tensor.data) for i, tensor in enumerate(tensors(out)) if memory(tensor) not in there]
        self.own |= {memory(tensor) for _, tensor in made}
        if made or op._schema.is_mutable:
            # .data: the same memory, versions of its own
            kept = tree_map(lambda leaf: leaf.data if isinstance(leaf, Tensor) else leaf, given)
            flags = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
            self.graph.launches.append((op, kept, made, *flags))
        return out

    @staticmethod
    def _refuse_generators(*_):
        raise Refused("a random number generator is asked")


class Stream:
    """In the place of torch.cuda.Stream."""

    now: "Stream"

    def __init__(self, device=None):
        self.waits_for: set[Stream] = set()
        """Streams whose work so far comes before what is launched here next."""
        self.apart: set[Stream] = set()
        """Streams that were given work since this one waited for them."""

    def wait_stream(self, other: "Stream") -> None:
        self.waits_for.add(other)
        self.apart.discard(other)

    @contextlib.contextmanager
    def use(self):
        """As torch.cuda.stream."""
        before = Stream.now
        if before not in self.waits_for:
            raise Refused("another stream does not wait for the current one")
        with mock.patch.object(Stream, "now", self):
            yield
        self.waits_for.discard(before)
        before.apart.add(self)


@contextlib.contextmanager
def graphs_on_the_cpu():
    """Trainers on a CPU take ``parallel.cuda_graph``, and their steps launch what they would launch on a GPU.

    Yields the graphs in the order of their captures.
    """
    made: list[Graph] = []
    Stream.now = Stream()

    def new_graph() -> Graph:
        made.append(Graph())
        return made[-1]

    def send(*of_the_step):
        if Stream.now.apart:
            raise Refused("the current stream does not wait for another one")
        return real_send(*of_the_step)

    def init(self, *arguments, **options):
        real_init(self, *arguments, **options)
        lr = self._schedule.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr if group["lr_scale"] == 1.0 else torch.zeros_like(lr)

    def group_ema_(directors, experts, group_weights, momentum, skip=None):
        for director, stacked, weights in zip(directors, experts, group_weights, strict=True):
            cpu.on_device_(director, stacked, weights, momentum, skip)

    real_send, real_init = engine.send, Trainer.__init__
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (Trainer, "__init__", init),
            (engine, "send", send),
            (cuda_graph, "why_not", lambda *_: None),
            (torch.cuda, "CUDAGraph", new_graph),
            (torch.cuda, "graph", lambda graph, stream: Capture(graph, stream)),
            (torch.cuda, "Stream", Stream),
            (torch.cuda, "stream", Stream.use),
            (torch.cuda, "current_stream", lambda: Stream.now),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.object(cpu, "group_ema_", group_ema_))
        stack.enter_context(mock.patch.object(adamw_ema, "adamw_ema_", adamw_ema._on_device_))
        yield made
