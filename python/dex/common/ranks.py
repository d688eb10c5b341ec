"""The ranks of one run: how they start, what they agree on, how a model is spread over them.

Nothing here needs more than what torchrun puts into the environment. Objects that ranks exchange travel as JSON.
"""

import datetime
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dexkernels import shard

Strategy = Literal["ddp", "fsdp"]
_NCCL_GRACE = datetime.timedelta(seconds=60)
_NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Of torchrun: its ranks meet at a new store each time they are started. Without it a node that was the first, and no
longer is when others have joined, sends its ranks to its old store, where nobody comes."""


class Ranks(NamedTuple):
    """``control``: a gloo group for what the host says, beside the devices' own; None with one rank."""

    rank: int
    world_size: int
    local_rank: int
    control: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0


ALONE = Ranks(0, 1, 0)


def announced() -> Ranks:
    """What torchrun or a scheduler says in RANK, WORLD_SIZE and LOCAL_RANK; one rank without them.

    ValueError names the variable that makes no sense.
    """
    world_size = _environment("WORLD_SIZE", 1)
    if world_size < 1:
        raise ValueError(f"WORLD_SIZE: expected at least 1, got {world_size}")
    if world_size == 1:
        return ALONE
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(f"{name}: expected it beside WORLD_SIZE={world_size}; start with torchrun -m dex ...")
    rank = _environment("RANK", 0)
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK: expected 0 <= RANK < WORLD_SIZE = {world_size}, got {rank}")
    return Ranks(rank, world_size, _environment("LOCAL_RANK", rank))


def ranks_here() -> int:
    """Ranks of this machine, as torchrun says in LOCAL_WORLD_SIZE; one without it."""
    return max(_environment("LOCAL_WORLD_SIZE", 1), 1)


def default_workers(device: str) -> int:
    """Processes that read ahead of a model on ``device``: none on a CPU, whose forwards they would slow down, else half
    of the cores that each rank of this machine has, at most 8."""
    return 0 if device == "cpu" else min(8, len(os.sched_getaffinity(0)) // (2 * ranks_here()))


def start(ranks: Ranks, device: torch.device, timeout: float) -> Ranks:
    """Join the others; ``timeout`` in seconds for every collective. One rank stays alone.

    RuntimeError: the others did not come.
    """
    if ranks.world_size == 1:
        return ranks
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=timeout)
    try:
        place: dict[str, Any] = {}
        if (store := _store_of_this_start(limit)) is not None:
            place = {"store": store, "rank": ranks.rank, "world_size": ranks.world_size}
        if device.type == "cuda":
            # gloo for tensors on the host, NCCL for those on a GPU, whose watchdog aborts the process when its time is
            # up: the watch comes first, since it knows whom to name.
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=limit + _NCCL_GRACE, **place)
        else:
            dist.init_process_group("gloo", timeout=limit, **place)
        return ranks._replace(control=dist.new_group(backend="gloo", timeout=limit))
    except RuntimeError as error:
        raise RuntimeError(_did_not_meet(ranks, timeout, error)) from error


def _store_of_this_start(limit: datetime.timedelta) -> dist.Store | None:
    """Where the ranks of this start meet; None where torch's own way is right.

    torchrun keeps one store over its restarts: a rank that came before rank 0 found the address of the rank 0 before,
    where nobody is. So each start has names of its own, where one torchrun counts the starts of all ranks.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or _environment("GROUP_WORLD_SIZE", 1) > 1:
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], _environment("MASTER_PORT", 0), is_master=False, timeout=limit)
    return dist.PrefixStore(f"start {_environment('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _did_not_meet(ranks: Ranks, timeout: float, error: RuntimeError) -> str:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = (
        f"rank {ranks.rank}: expected all {ranks.world_size} ranks to meet at {place} within {timeout:g} s; got: "
        f"{str(error).splitlines()[0]}"
    )
    if _environment("GROUP_WORLD_SIZE", 1) > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        text += f". Where nodes come and go, torchrun needs {_NEW_STORE}=1 in its environment"
    return text


def stop(ranks: Ranks) -> None:
    if ranks.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def gather(ranks: Ranks, value: Any, group: Any = None) -> list[Any]:
    """``value`` (JSON) of every rank, in their order, on every rank."""
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


def barrier(ranks: Ranks, group: Any = None) -> None:
    if ranks.world_size > 1:
        dist.barrier(group=group or ranks.control)


class Failed(RuntimeError):
    """Another rank could not do what all must do; the message is that rank's."""


def together(ranks: Ranks, error: BaseException | None, group: Any = None) -> None:
    """Raise on every rank when any has an ``error``: its own there, `Failed` with the first one's words elsewhere."""
    words = None if error is None else f"{type(error).__name__}: {error}"
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(gather(ranks, words, group)) if text is not None]
    if error is not None:
        raise error
    if failed:
        raise Failed(failed[0])


def everywhere(ranks: Ranks, action: Callable[[], Any], group: Any = None) -> Any:
    """What ``action()`` gives on this rank. All ranks call it; an error of any is raised on all, as by `together`."""
    result, error = None, None
    try:
        result = action()
    except Exception as e:
        error = e
    together(ranks, error, group)
    return result


def decided(ranks: Ranks, decide: Callable[[], Any], group: Any = None) -> Any:
    """What ``decide()`` (JSON) gives on rank 0, on every rank; its error is raised on all, as by `together`."""
    return from_first(ranks, everywhere(ranks, decide if ranks.first else lambda: None, group))


def spread(model: nn.Module, blocks: Iterable[nn.Module], strategy: Strategy, device: torch.device) -> nn.Module:
    """``model`` as what is to be called in training, after its parameters were spread over the ranks.

    ddp: every rank holds everything; gradients are averaged. fsdp: every parameter is cut over the ranks, stacked
    experts along their hidden or output dimension and directors likewise, so that GEMA stays local to a rank.

    Raises: ValueError when a stacked tensor cannot be cut evenly.
    """
    if strategy == "ddp":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its successor is newer
            return nn.parallel.DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
    from torch.distributed.device_mesh import init_device_mesh

    # A block's output is never changed in place, which is what the warning, at every block and step, is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    stacked = {id(p): name for name, p in model.named_parameters() if ".experts." in name}
    for p in model.parameters():
        if id(p) in stacked:
            check_cut(stacked[id(p)], p.shape, mesh.size())
    return shard(model, mesh, blocks=blocks)


def same_bits(tensors: Iterable[Tensor]) -> bool:
    """Whether all ranks hold the same ``tensors``: 4-byte numbers, whole on every rank. All ranks ask.

    Every tensor's bits are summed as integers, so what differs in one number is found; differences that add up to
    nothing are not.
    """
    sums = torch.stack([t.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for t in tensors])
    low, high = sums, sums.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return bool((low == high).all())


def check_cut(name: str, shape: Sequence[int], ranks: int) -> None:
    """ValueError when fsdp cannot cut the stacked tensor ``name`` evenly over the ranks."""
    if shape[1] % ranks:
        raise ValueError(
            f"parallel.strategy: fsdp cuts {name} {list(shape)} along dimension 1; expected it to be a multiple "
            f"of the {ranks} ranks"
        )


def full(tensor: Tensor) -> Tensor:
    """A tensor cut over the ranks, whole on every rank; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: expected a whole number, got {text!r}") from None
