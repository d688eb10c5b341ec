"""Checkpoints: a folder per saved step, hashed, written atomically, without pickle.

``step-00000100/`` holds ``model.safetensors``, ``optimizer.safetensors``, ``state.json`` and ``MANIFEST.json`` with
the size and SHA-256 of the three. It is written under a temporary name, flushed to the disk and renamed, so a folder of
that name is complete; reading checks every hash before anything is handed out.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8,})$")
_TEMPORARY = ".writing-"
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or does not fit; the message names the file or the tensor."""


class Checkpoint(NamedTuple):
    folder: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save(
    root: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``root/step-XXXXXXXX`` and return it; then remove all but the ``keep`` newest up to this step.

    Whatever stops this half-way (a kill, a full disk) leaves the earlier checkpoints as they were.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(root)
    final, work = root / f"step-{step:08d}", root / f"{_TEMPORARY}step-{step:08d}"
    try:
        work.mkdir()
        (work / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
        mode = (work / "state.json").stat().st_mode & 0o777
        for name, tensors in (("model.safetensors", model), ("optimizer.safetensors", optimizer)):
            save_file(_plain(tensors), work / name)
            (work / name).chmod(mode)  # safetensors makes it readable by its owner alone, whatever the umask
        (work / _MANIFEST).write_text(_manifest_text(step, {name: _digest(work / name) for name in _FILES}))
        for name in (*_FILES, _MANIFEST):
            _sync(work / name)
        _sync(work)
        if final.exists():  # the same step of a run that was taken back to an earlier one
            _set_aside(final)
        work.rename(final)
        _sync(root)
    finally:
        _remove_unfinished(root)
    for _, old in [c for c in found(root) if c[0] <= step][:-keep]:
        shutil.rmtree(old)
    return final


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking every hash. CheckpointError names what is wrong; FileNotFoundError."""
    step = verify(folder)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        model, optimizer = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{folder}: unreadable although its hashes agree; {error}") from error
    if state.get("step") != step:
        raise CheckpointError(f"{folder / 'state.json'}: expected step {step}; got {state.get('step')!r}")
    return Checkpoint(folder, model, optimizer, state)


def verify(folder: Path) -> int:
    """Check the manifest and every hash; the step. CheckpointError names the first bad file; FileNotFoundError."""
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint: expected a folder; nothing at {folder}")
    path = folder / _MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        step, files = manifest["step"], manifest["files"]
        # The text is compared too, so that no flipped bit in it goes unseen.
        good = manifest["format"] == FORMAT and set(files) == set(_FILES) and text == _manifest_text(step, files)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: unreadable ({type(error).__name__})") from error
    if not good:
        raise CheckpointError(f"{path}: damaged, or of another format than {FORMAT}")
    for name in _FILES:
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        size = file.stat().st_size
        if size != files[name]["bytes"]:
            raise CheckpointError(f"{file}: expected {files[name]['bytes']} bytes; got {size}")
        if _digest(file) != files[name]:
            raise CheckpointError(f"{file}: damaged, its SHA-256 is not the one in {_MANIFEST}")
    return step


def found(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint under ``root``, oldest first; damaged ones too."""
    if not root.is_dir():
        return []
    matches = [(m, p) for p in root.iterdir() if p.is_dir() and (m := _NAME.match(p.name))]
    return sorted((int(m.group(1)), p) for m, p in matches)


def newest_good(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose hashes agree, and why each newer one was passed over.

    None when there is no checkpoint at all. CheckpointError: there are some, and every one is damaged.
    """
    passed_over = []
    for _, folder in reversed(found(root)):
        try:
            return load(folder), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    if passed_over:
        raise CheckpointError(f"resume: no checkpoint in {root} can be read; " + "; ".join(passed_over))
    return None, []


def set_aside_after(root: Path, step: int) -> list[Path]:
    """Rename checkpoints later than ``step``: the run goes on from there, and they are no longer part of it."""
    return [_set_aside(folder) for later, folder in found(root) if later > step]


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """State of an Adam-like optimizer, flat: ``exp_avg.NAME``, ``exp_avg_sq.NAME``, ``step.NAME``."""
    return {
        f"{key}.{name}": value
        for name, parameter in parameters
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Copy the checkpoint into both. CheckpointError names tensors that do not fit; then nothing was changed."""
    own = model.state_dict(keep_vars=True)
    _require_same(checkpoint, "model.safetensors", own, checkpoint.model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        wanted |= {f"exp_avg.{name}": parameter, f"exp_avg_sq.{name}": parameter, f"step.{name}": torch.zeros(())}
    _require_same(checkpoint, "optimizer.safetensors", wanted, checkpoint.optimizer)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(checkpoint.model[name])
        for name, parameter in trained.items():
            state = optimizer.state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                state[key] = checkpoint.optimizer[f"{key}.{name}"].to(parameter.device, copy=True)


def _require_same(checkpoint: Checkpoint, file: str, want: Mapping[str, Tensor], have: Mapping[str, Tensor]) -> None:
    wrong = [f"{name} is missing" for name in want if name not in have]
    wrong += [f"{name} is not expected" for name in have if name not in want]
    wrong += [
        f"{name}: expected {t.dtype} {list(t.shape)}; got {have[name].dtype} {list(have[name].shape)}"
        for name, t in want.items()
        if name in have and (t.shape != have[name].shape or t.dtype != have[name].dtype)
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{checkpoint.folder / file}: " + "; ".join(wrong[:5]) + more)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory; a view into a larger tensor is copied.
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _manifest_text(step: int, files: Mapping[str, Any]) -> str:
    body = {"format": FORMAT, "step": step, "files": files}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1, sort_keys=True) + "\n"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _set_aside(folder: Path) -> Path:
    target = folder.with_name(f"set-aside-{folder.name}")
    if target.exists():
        shutil.rmtree(target)
    return folder.rename(target)


def _remove_unfinished(root: Path) -> None:
    for path in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
