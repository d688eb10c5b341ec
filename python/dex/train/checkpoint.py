"""Checkpoints: one folder per saved step, hashed, written atomically, without pickle, for any number of ranks.

``step-00000100/`` has a file from each rank (``shard-00001-model-00001-of-00001.safetensors``, ...: torch's distributed
checkpoint in safetensors, which can be loaded on another number of ranks), ``state.json``, and ``MANIFEST.json`` with
the size and SHA-256 of every file. It is written under a temporary name, flushed to disk and renamed, so a folder with
the final name is complete. Every hash is checked before anything is loaded.

All ranks share one file system. Names of tensors: ``model.NAME``, ``exp_avg.NAME``, ``exp_avg_sq.NAME``, ``step.NAME``,
and with ``optim.ema`` ``ema.NAME``.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from dex.common.atomic import sync_path
from dex.common.ranks import ALONE, Ranks, everywhere, gather
from dex.train.average import PREFIX

# torch warns at every save and load of a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_STATE, _MANIFEST = "state.json", "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8,})$")
_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_TEMPORARY = ".writing-"
FORMAT = 2
MILESTONE = "milestone"
"""Key of the state that is True in a checkpoint that is never removed."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete or does not fit; the message names the file or the tensor."""


class Checkpoint(NamedTuple):
    """A verified checkpoint folder and its ``state.json``."""

    folder: Path
    state: dict[str, Any]


class Saver:
    """Writes the checkpoints of one run in a thread while training continues. All ranks call the same methods.

    keep: how many of the newest checkpoints are kept, counted back from the saved step; milestones are kept as well.
    An interrupted save (a kill, a full disk, another rank) leaves the earlier checkpoints unchanged.
    """

    def __init__(self, root: Path, keep: int, ranks: Ranks = ALONE):
        self.root: Path = root
        self.keep: int = keep
        self.ranks: Ranks = ranks
        # A separate group, so that messages of the thread cannot mix with those of the training loop.
        # Long timeout: the watchdog already covers a rank that hangs or dies.
        one_rank = ranks.world_size == 1
        self._group = None if one_rank else dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        self._mesh: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], stay: Collection[int] = ()) -> None:
        """Copy all tensors, then write ``root/step-XXXXXXXX`` in the background. Raises the error of the previous save.

        stay: steps whose checkpoints are kept, however old, when this one is complete.
        """
        self.wait()
        staged = {name: self._copy(tensor) for name, tensor in tensors.items()}
        self._thread = threading.Thread(target=self._run, args=(step, staged, state, stay), name="checkpoint")
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the last save is complete. OSError or ``dex.common.ranks.Failed``: it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], stay: Collection[int]) -> None:
        try:
            self._write(step, tensors, state, stay)
        except BaseException as error:  # torch's CheckpointException is not an Exception
            self._error = _plain_error(error)

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], stay: Collection[int]) -> None:
        final, work = self.root / f"step-{step:08d}", self.root / f"{_TEMPORARY}step-{step:08d}"
        try:
            self._first(lambda: self._begin(work))
            dcp.save(
                tensors,
                storage_writer=_Writer(str(work), save_distributed=True),
                process_group=self._group,
                no_dist=self._group is None,
            )
            sealed = self._all(lambda: self._seal(work))
            files: dict[str, Any] = {}
            for rank_files in gather(self.ranks, sealed, self._group):
                files |= rank_files
            self._first(lambda: self._finish(step, state, files, work, final))
            self._first(lambda: self._remove_old(step, stay))
        finally:
            if self.ranks.first:
                _remove_unfinished(self.root)

    def _begin(self, work: Path) -> None:
        self.root.mkdir(exist_ok=True)  # Without parents: a run folder that was removed is not made again
        _remove_unfinished(self.root)
        work.mkdir()

    def _seal(self, work: Path) -> dict[str, Any]:
        """Flush the files of this rank to disk and hash them."""
        written = sorted(work.glob(f"shard-{self.ranks.rank + 1:05d}-*.safetensors"))
        for path in written:
            sync_path(path)
        return {path.name: _digest(path) for path in written}

    def _finish(self, step: int, state: dict[str, Any], files: dict[str, Any], work: Path, final: Path) -> None:
        (work / _STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        mode = (work / _STATE).stat().st_mode & 0o777
        for name in files:
            (work / name).chmod(mode)
        files = files | {_STATE: _digest(work / _STATE)}
        (work / _MANIFEST).write_text(_manifest_text(step, files), encoding="utf-8")
        for name in (_STATE, _MANIFEST):
            sync_path(work / name)
        sync_path(work)
        if final.exists():  # From before the run was resumed at an earlier step
            _set_aside(final)
        work.rename(final)
        sync_path(self.root)

    def _remove_old(self, step: int, stay: Collection[int]) -> None:
        for saved_step, folder in [saved for saved in list_checkpoints(self.root) if saved[0] <= step][: -self.keep]:
            if saved_step in stay or _is_milestone(folder):
                continue
            try:
                shutil.rmtree(folder)
            except OSError as error:
                # A network file system cannot remove a file that is open elsewhere; a later save tries again.
                if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                    raise

    def _first(self, action: Callable[[], Any]) -> None:
        """Run ``action`` on rank 0; every rank raises its error."""
        self._all(action if self.ranks.first else lambda: None)

    def _all(self, action: Callable[[], Any]) -> Any:
        return everywhere(self.ranks, action, self._group)

    def _copy(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            return tensor.to("cpu", copy=True).reshape(tensor.shape or (1,))
        if self._mesh is None:
            self._mesh = dist.device_mesh.init_device_mesh("cpu", (self.ranks.world_size,))
        local = tensor.to_local().to("cpu", copy=True)
        return DTensor.from_local(
            local, self._mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )


class _Writer(dcp.HuggingFaceStorageWriter):
    """torch's writer, but a file is written straight from the tensors' memory, without holding Python's lock.

    torch's writer first makes two copies of the whole file with the lock held, which stops training for seconds per GB.
    """

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        tensors = {item.index.fqn: planner.resolve_data(item).contiguous() for item in plan.items}
        if tensors:
            path = Path(self.path) / f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
            # Position of each piece in its tensor, in the format of torch's reader.
            offsets = {item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)} for item in plan.items}
            try:
                save_file(tensors, path, {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)})
            except SafetensorError as error:  # A system error: the tensors always fit the format
                raise OSError(f"{path}: {error}") from error
        done.set_result([WriteResult(item.index, tensors[item.index.fqn].nbytes, None) for item in plan.items])
        return done


def load(folder: Path) -> Checkpoint:
    """Verify ``folder`` and read its state. CheckpointError names what is wrong. FileNotFoundError: no such folder."""
    step = verify(folder)
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / _STATE}: unreadable although its hash matches; {error}") from error
    if state.get("step") != step:
        raise CheckpointError(f"{folder / _STATE}: expected step {step}, got {state.get('step')!r}")
    return Checkpoint(folder, state)


def verify(folder: Path) -> int:
    """Check the manifest and every hash, and return the step.

    CheckpointError names the first bad file. FileNotFoundError: no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint: expected a folder; there is none at {folder}")
    path = folder / _MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        step, files = manifest["step"], manifest["files"]
        # The text is compared too, so that every flipped bit is noticed.
        names = set(files) - {_STATE}
        good = manifest["format"] == FORMAT and text == _manifest_text(step, files)
        good = good and len(names) + 1 == len(files) and names and all(_SHARD.fullmatch(name) for name in names)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: unreadable ({type(error).__name__})") from error
    if not good:
        raise CheckpointError(f"{path}: damaged, or not of format {FORMAT}")
    others = {p.name for p in folder.glob("*.safetensors")} - names
    if others:
        raise CheckpointError(f"{folder / min(others)}: not in {_MANIFEST}")
    with ThreadPoolExecutor() as pool:  # Hashing releases Python's lock
        for _ in pool.map(lambda name: _check(folder / name, files[name]), files):
            pass
    return step


def _check(file: Path, entry: Mapping[str, Any]) -> None:
    """CheckpointError unless ``file`` has the size and hash in ``entry`` of the manifest."""
    try:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{file}: expected {entry['bytes']} bytes, got {size}")
        if _digest(file) != entry:
            raise CheckpointError(f"{file}: damaged, its SHA-256 differs from {_MANIFEST}")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or type(error).__name__})") from error


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` is a checkpoint by its name or its manifest; it may be damaged."""
    return bool(_NAME.match(folder.name)) or (folder / _MANIFEST).is_file()


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint in ``root``, oldest first, including damaged ones."""
    if not root.is_dir():
        return []
    matches = [(m, p) for p in root.iterdir() if p.is_dir() and (m := _NAME.match(p.name))]
    return sorted((int(m.group(1)), p) for m, p in matches)


def newest_good(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint, and the errors of the newer ones.

    None if there is no checkpoint at all. CheckpointError: all checkpoints are damaged.
    """
    errors = []
    for _, folder in reversed(list_checkpoints(root)):
        try:
            return load(folder), errors
        except CheckpointError as error:
            errors.append(str(error))
    if errors:
        raise CheckpointError(f"resume: no checkpoint in {root} can be read; " + "; ".join(errors))
    return None, []


def set_aside_after(root: Path, step: int) -> list[Path]:
    """Rename the checkpoints after ``step``: the run continues from there, so they are no longer part of it."""
    return [_set_aside(folder) for later, folder in list_checkpoints(root) if later > step]


def collect(
    model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """All tensors of model and optimizer by their names in a checkpoint, not copied."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for name, parameter in parameters:
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return tensors


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[tuple[str, nn.Parameter]],
    averages: Mapping[str, Tensor] | None = None,
) -> bool:
    """Copy the checkpoint into ``model``, ``optimizer`` and ``averages``, on all ranks.

    Returns whether the checkpoint has averages. Without ``averages`` they are ignored; if it has none, ``averages`` are
    unchanged. CheckpointError names what does not fit; nothing is then changed.
    """
    targets = {f"model.{name}": t for name, t in model.state_dict().items()}
    moments: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, p in parameters:
        steps = torch.zeros(1, device=p.device if p.is_cuda else "cpu")
        moments[p] = {"step": steps, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        targets |= {f"{key}.{name}": t.detach() for key, t in moments[p].items()}
    reader, metadata = _open(checkpoint.folder)
    has_averages = any(name.startswith(PREFIX) for name in metadata)
    if has_averages:
        targets |= averages or {}
    wanted = has_averages and bool(averages)
    saved = {k: (t.properties.dtype, list(t.size)) for k, t in metadata.items() if wanted or not k.startswith(PREFIX)}
    _require_same(checkpoint.folder, {name: (t.dtype, list(t.shape or (1,))) for name, t in targets.items()}, saved)
    try:
        dcp.load(targets, storage_reader=reader, no_dist=not dist.is_initialized())
    except BaseException as error:
        raise _plain_error(error) from error
    for p, values in moments.items():
        state = optimizer.state[p]
        state["step"] = values["step"].view(())
        state["exp_avg"], state["exp_avg_sq"] = values["exp_avg"], values["exp_avg_sq"]
    return has_averages


def restore_model(checkpoint: Checkpoint, model: nn.Module, *, averages: bool = False) -> None:
    """Copy only the weights, or their averages, into ``model`` in a single process.

    CheckpointError names what does not fit. ValueError: there are no averages.
    """
    averaged = {name for name, _ in model.named_parameters()} if averages else set()
    names = {name: f"{PREFIX}{name}" if name in averaged else f"model.{name}" for name in model.state_dict()}
    targets = {names[name]: t for name, t in model.state_dict().items()}
    reader, metadata = _open(checkpoint.folder)
    if averages and not any(name.startswith(PREFIX) for name in metadata):
        raise ValueError(
            f"ema: expected a run with an average of the weights (optim.ema); {checkpoint.folder} has none"
        )
    unused = {f"model.{name}" for name in averaged}
    prefixes = ("model.", PREFIX) if averages else ("model.",)
    saved = {
        k: (t.properties.dtype, list(t.size)) for k, t in metadata.items() if k.startswith(prefixes) and k not in unused
    }
    _require_same(checkpoint.folder, {k: (t.dtype, list(t.shape or (1,))) for k, t in targets.items()}, saved)
    dcp.load(targets, storage_reader=reader, no_dist=True)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, unsharded, on the host. CheckpointError and FileNotFoundError as in ``verify``."""
    verify(folder)
    reader, metadata = _open(folder)
    unsharded = {name: torch.empty(t.size, dtype=t.properties.dtype) for name, t in metadata.items()}
    dcp.load(unsharded, storage_reader=reader, no_dist=True)
    return unsharded


def _open(folder: Path) -> tuple[dcp.HuggingFaceStorageReader, dict[str, Any]]:
    """A reader for the folder's safetensors files, and the metadata of their tensors by name."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        return reader, reader.read_metadata().state_dict_metadata
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: unreadable although its hashes match; {error}") from error


def _require_same(folder: Path, expected: Mapping[str, tuple], saved: Mapping[str, tuple]) -> None:
    """CheckpointError unless both have the same names with the same (dtype, shape)."""
    problems = [f"{name} is missing" for name in expected if name not in saved]
    problems += [f"{name} is not expected" for name in saved if name not in expected]
    problems += [
        f"{name}: expected {t[0]} {t[1]}, got {saved[name][0]} {saved[name][1]}"
        for name, t in expected.items()
        if name in saved and t != saved[name]
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{folder}: " + "; ".join(problems[:5]) + more)


def _plain_error(error: BaseException) -> BaseException:
    """The error inside torch's CheckpointException, which is not an Exception; other errors as they are."""
    from torch.distributed.checkpoint.api import CheckpointException

    if not isinstance(error, CheckpointException):
        return error
    inner = [failure[0] for _, failure in sorted(error.failures.items())]
    return inner[0] if inner and isinstance(inner[0], Exception) else CheckpointError(str(error))


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _manifest_text(step: int, files: Mapping[str, Any]) -> str:
    body = {"format": FORMAT, "step": step, "files": files}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1, sort_keys=True) + "\n"


def _set_aside(folder: Path) -> Path:
    target = folder.with_name(f"set-aside-{folder.name}")
    if target.exists():
        shutil.rmtree(target)
    return folder.rename(target)


def _is_milestone(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # An unreadable checkpoint need not be kept
        return json.loads((folder / _STATE).read_text(encoding="utf-8")).get(MILESTONE, False)
    return False


def _remove_unfinished(root: Path) -> None:
    for path in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
