"""The ranks of one run: how they start, exchange values, and share a model.

Needs only the environment variables of torchrun. Objects are exchanged as JSON.
"""

import contextlib
import datetime
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dex.common.cores import cores
from dexkernels import shard

Strategy = Literal["ddp", "fsdp"]
_NCCL_GRACE = datetime.timedelta(seconds=60)
_NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Variable of torchrun that makes its ranks use a new store at each start. Without it, a node that is no longer the
first after others have joined sends its ranks to its old store, where they wait alone."""


class Ranks(NamedTuple):
    """This process among the ranks of a run."""

    rank: int
    world_size: int
    local_rank: int
    control: Any = None
    """A gloo group for messages of the host, separate from the devices' group; None with one rank."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


ALONE = Ranks(0, 1, 0)


def announced() -> Ranks:
    """The ranks from RANK, WORLD_SIZE and LOCAL_RANK, as set by torchrun or a scheduler; a single rank without them.

    ValueError names an invalid variable.
    """
    world_size = _environment("WORLD_SIZE", 1)
    if world_size < 1:
        raise ValueError(f"WORLD_SIZE: expected at least 1, got {world_size}")
    if world_size == 1:
        return ALONE
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(f"{name}: expected a value with WORLD_SIZE={world_size}; start with torchrun -m dex ...")
    rank = _environment("RANK", 0)
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK: expected 0 <= RANK < WORLD_SIZE = {world_size}, got {rank}")
    return Ranks(rank, world_size, _environment("LOCAL_RANK", rank))


def ranks_here() -> int:
    """Number of ranks on this machine, from LOCAL_WORLD_SIZE of torchrun; 1 without it."""
    return max(_environment("LOCAL_WORLD_SIZE", 1), 1)


def default_workers(device: str) -> int:
    """Number of reading processes for a model on ``device``: 0 on a CPU, where they would slow down the model, else
    half of the cores per rank on this machine, at most 8."""
    return 0 if device == "cpu" else min(8, cores() // (2 * ranks_here()))


def start(ranks: Ranks, device: torch.device, timeout: float) -> Ranks:
    """Start the process group; ``timeout`` is that of every collective, in seconds. Does nothing with one rank.

    RuntimeError: the other ranks did not start in time.
    """
    if ranks.world_size == 1:
        return ranks
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=timeout)
    try:
        options: dict[str, Any] = {}
        if (store := _store_of_this_start(limit)) is not None:
            options = {"store": store, "rank": ranks.rank, "world_size": ranks.world_size}
        if device.type == "cuda":
            # gloo for tensors on the host, NCCL for tensors on a GPU. NCCL's watchdog aborts the process after its
            # timeout; ours must act first, since it knows which rank is to blame.
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=limit + _NCCL_GRACE, **options)
        else:
            dist.init_process_group("gloo", timeout=limit, **options)
        return ranks._replace(control=dist.new_group(backend="gloo", timeout=limit))
    except RuntimeError as error:
        raise RuntimeError(_did_not_meet(ranks, timeout, error)) from error


def _store_of_this_start(limit: datetime.timedelta) -> dist.Store | None:
    """The store in which the ranks of this start meet; None if torch's default is right.

    torchrun keeps one store over restarts, so a rank that is faster than rank 0 would read the address of the previous
    rank 0. Each start therefore uses its own prefix, if a single torchrun counts the starts of all ranks.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or _environment("GROUP_WORLD_SIZE", 1) > 1:
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], _environment("MASTER_PORT", 0), is_master=False, timeout=limit)
    return dist.PrefixStore(f"start {_environment('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _did_not_meet(ranks: Ranks, timeout: float, error: RuntimeError) -> str:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = (
        f"rank {ranks.rank}: expected all {ranks.world_size} ranks to meet at {address} within {timeout:g} s, got: "
        f"{str(error).splitlines()[0]}"
    )
    if _environment("GROUP_WORLD_SIZE", 1) > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        text += f". If nodes join and leave, torchrun needs {_NEW_STORE}=1 in its environment"
    return text


def stop(ranks: Ranks) -> None:
    """Destroy the process group, if there is one."""
    if ranks.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()
        _wait_for_threads()


def _wait_for_threads(limit: float = 5.0) -> None:
    """Wait up to ``limit`` seconds until gloo's threads sleep.

    A group lives on in what still refers to it, such as DDP. A thread that releases the tensors of the last exchange
    while Python ends aborts the process, so that a complete run would end with SIGABRT (pytorch/pytorch#179291).
    """
    ends = time.monotonic() + limit
    asleep = 0
    while asleep < 2 and time.monotonic() < ends:
        time.sleep(0.01)  # Without the GIL, which the threads need
        asleep = asleep + 1 if all(state == "S" for state in _states_of("gloo")) else 0


def _states_of(name: str) -> list[str]:
    """The states (proc(5)) of this process's threads with ``name`` in their names; none where there is no /proc."""
    states = []
    for path in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # The thread has ended.
            _, rest = path.read_text().split("(", 1)
            thread, state = rest.rsplit(")", 1)
            if name in thread:
                states.append(state.split()[0])
    return states


def gather(ranks: Ranks, value: Any, group: Any = None) -> list[Any]:
    """``value`` (JSON) of every rank, in order of ranks, on every rank."""
    if ranks.world_size == 1:
        return [value]
    group = group or ranks.control
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks.world_size)]
    dist.all_gather(sizes, torch.tensor([data.numel()]), group=group)
    longest = int(max(sizes))
    padded = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(padded, torch.nn.functional.pad(data, (0, longest - data.numel())), group=group)
    return [json.loads(bytes(p[: int(n)].tolist())) for p, n in zip(padded, sizes, strict=True)]


def from_first(ranks: Ranks, value: Any = None) -> Any:
    """Rank 0's ``value`` (JSON) on every rank."""
    return gather(ranks, value if ranks.first else None)[0]


class Failed(RuntimeError):
    """Another rank failed in a common action; the message is that of its error."""


def together(ranks: Ranks, error: BaseException | None, group: Any = None) -> None:
    """Raise on every rank if any has an ``error``: its own error there, ``Failed`` with the first message elsewhere."""
    message = None if error is None else f"{type(error).__name__}: {error}"
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(gather(ranks, message, group)) if text is not None]
    if error is not None:
        raise error
    if failed:
        raise Failed(failed[0])


def everywhere(ranks: Ranks, action: Callable[[], Any], group: Any = None) -> Any:
    """Result of ``action()`` on this rank. All ranks call it; an error on any rank is raised on all, see
    ``together``."""
    result, error = None, None
    try:
        result = action()
    except Exception as e:
        error = e
    together(ranks, error, group)
    return result


def decided(ranks: Ranks, decide: Callable[[], Any], group: Any = None) -> Any:
    """Result (JSON) of ``decide()`` on rank 0, on every rank; its error is raised on all, see ``together``."""
    return from_first(ranks, everywhere(ranks, decide if ranks.first else lambda: None, group))


def spread(model: nn.Module, blocks: Iterable[nn.Module], strategy: Strategy, device: torch.device) -> nn.Module:
    """Wrap ``model`` in DDP or FSDP; returns the module to call in training.

    ddp: every rank has the whole model, and gradients are averaged. fsdp: every parameter is sharded, stacked experts
    along their hidden or output dimension and directors likewise, so that GEMA is local to a rank.

    Raises: ValueError if a stacked tensor cannot be sharded evenly.
    """
    if strategy == "ddp":
        with warnings.catch_warnings():
            # Older torch does not have the successor of this argument.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            return nn.parallel.DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
    from torch.distributed.device_mesh import init_device_mesh

    # The warning, at every block and step, is about changing a block's output in place, which never happens here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    stacked = {id(p): name for name, p in model.named_parameters() if ".experts." in name}
    for p in model.parameters():
        if id(p) in stacked:
            check_cut(stacked[id(p)], p.shape, mesh.size())
    return shard(model, mesh, blocks=blocks)


def exchange(net: nn.Module, ranks: Ranks, strategy: Strategy, last: bool) -> contextlib.AbstractContextManager[None]:
    """Context of the forward and backward of a micro-batch: ranks exchange gradients only in the ``last`` one.

    net: the result of ``spread``.
    """
    if ranks.world_size == 1:
        return contextlib.nullcontext()
    if strategy == "fsdp":
        net.set_requires_gradient_sync(last)
        return contextlib.nullcontext()
    return contextlib.nullcontext() if last else net.no_sync()


def same_bits(tensors: Iterable[Tensor]) -> bool:
    """Whether replicated ``tensors`` of 4-byte numbers are the same on all ranks. All ranks call it.

    Compares the sum of each tensor's bits as integers: a difference in one number is always found, differences that
    cancel in the sum are not.
    """
    sums = torch.stack([t.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for t in tensors])
    low, high = sums, sums.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return bool((low == high).all())


def check_cut(name: str, shape: Sequence[int], ranks: int) -> None:
    """ValueError if fsdp cannot shard the stacked tensor ``name`` evenly."""
    if shape[1] % ranks:
        raise ValueError(
            f"parallel.strategy: expected dimension 1 of {name}, which fsdp shards, to be a multiple of the {ranks} "
            f"ranks, got {list(shape)}"
        )


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; other tensors unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: expected a whole number, got {text!r}") from None
