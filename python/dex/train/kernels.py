"""The kernels of a run: verified on each GPU model before the first step, unless a record has them already."""

import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dex.common.ranks import Ranks, gather
from dex.common.shapes import height_width
from dex.config import Config, per_layer
from dexkernels.verification import choice, record
from dexkernels.verification.identity import Identity, identity
from dexkernels.verification.record import Choices, Record, Sizes
from dexkernels.verification.run import summary, verify

SWITCH = "--parallel.no-verify-kernels"
_MEET_EVERY = 0.5
"""Seconds between two meetings of ranks while some of them verify, well below the collectives' timeout."""


def sizes_of(config: Config, images: int) -> Sizes | None:
    """Sizes of the layer with the most experts, for ``images`` at once; None without experts."""
    m = config.model
    experts = max(zip(per_layer(m.num_experts, m.depth), per_layer(m.top_k, m.depth), strict=True))
    if experts[0] == 0:
        return None
    height, width = (side // m.patch_size for side in height_width(m.img_size))
    tokens = 1 + int(height * width * (1 - m.mask_ratio))
    return Sizes(images, tokens, m.embed_dim, int(m.embed_dim * m.mlp_ratio), *experts)


def prove(
    config: Config,
    ranks: Ranks,
    device: torch.device,
    images: int,
    waiting: Callable[[], None] = lambda: None,
) -> list[str]:
    """Verify the kernels that have no record yet, and choose the kernels of this process on ``device``.

    For each GPU model (with driver and software), the first rank verifies, unless a rank has a record with the run's
    sizes; the other ranks of the model receive the record. With several models, a kernel is used only if all models
    prove it: different kernels would give the ranks different directors. With ``parallel.verify_kernels`` off, nothing
    is verified and existing records are used. On a CPU, and with ``model.backend``, nothing happens. All ranks call it.

    images: number that a rank computes at once. waiting: called twice a second while ranks wait. Returns the lines to
    print before the run.
    """
    sizes = sizes_of(config, images)
    if device.type != "cuda" or config.model.backend is not None or sizes is None:
        return []
    who = identity(device)
    known, reason = record.load(who)
    verifies = config.parallel.verify_kernels
    found = known if known is not None and (sizes in known.sizes or not verifies) else None
    everyone = gather(ranks, {"identity": list(who), "found": found is not None})
    alike = [rank for rank, other in enumerate(everyone) if Identity(*other["identity"]) == who]
    lacking = not any(everyone[rank]["found"] for rank in alike)
    if lacking and verifies and alike[0] == ranks.rank:
        found = _verified(sizes, device, lambda busy: _meet(ranks, busy, waiting))
    else:
        while _meet(ranks, False, waiting):
            pass
    records = gather(ranks, [list(who), None if found is None else record.to_json(found)])
    tables = _tables(records, sizes)
    received = tables[who].record
    if received is not None and record.load(who)[0] != received:
        _keep(received)
    choices = record.common(table.choices for table in tables.values())
    choice.use(choices, device)
    return _notes(tables, choices, reason, verifies)


class _Table(NamedTuple):
    record: Record | None
    choices: Choices


def _meet(ranks: Ranks, busy: bool, waiting: Callable[[], None]) -> bool:
    """Whether any rank is busy."""
    anyone = any(gather(ranks, busy))
    if anyone:
        waiting()
        time.sleep(_MEET_EVERY)
    return anyone


def _verified(sizes: Sizes, device: torch.device, meet: Callable[[bool], bool]) -> Record | None:
    """Verify in a thread while this rank keeps meeting the others. Returns the record; None if it failed."""
    stop, results = threading.Event(), []

    def work() -> None:
        try:
            results.append(verify(sizes, device=device, say=_say, stop=stop))
        except Exception as error:  # The run continues in plain torch
            _say(f"the kernels could not be verified: {type(error).__name__}: {error}")

    _say(f"these kernels were not verified on this GPU yet; {SWITCH} skips this and uses plain torch")
    thread = threading.Thread(target=work, name="verify", daemon=True)
    thread.start()
    try:
        while meet(thread.is_alive()):
            pass
    finally:
        stop.set()
        thread.join()
    return results[0] if results else None


def _say(line: str) -> None:
    print(line, flush=True)


def _tables(rows: list[list[Any]], sizes: Sizes) -> dict[Identity, _Table]:
    """By GPU model, in the order of the ranks."""
    tables: dict[Identity, _Table] = {}
    for who, value in rows:
        who, found = Identity(*who), None if value is None else record.from_json(value)
        if tables.get(who, _Table(None, {})).record is None:
            tables[who] = _Table(found, {} if found is None else found.choices(sizes if sizes in found.sizes else None))
    return tables


def _keep(received: Record) -> None:
    try:
        record.write(received.with_times_of(record.load(received.identity)[0]))
    except OSError as error:
        warnings.warn(f"the record of the kernels was not kept: {error}", stacklevel=2)


def _notes(tables: dict[Identity, _Table], choices: Choices, reason: str, verifies: bool) -> list[str]:
    named = ", ".join(f"{op} in {dtype} by {backend}" for (op, dtype), backend in sorted(choices.items()))
    notes = [f"kernels: {named or 'plain torch'}"]
    if len(tables) > 1:
        notes.append(f"the ranks have {len(tables)} kinds of GPU; a kernel is used only if all of them prove it")
    for who, table in tables.items():
        if table.record is None:
            remedy = "run `dex verify` once" + ("" if verifies else f", or omit {SWITCH}")
            notes.append(f"no kernel was verified on {who}: {remedy}{f' ({reason})' if reason else ''}")
        elif table.record.wrong():
            notes.append(list(summary(table.record))[-1])
    return notes


def described(device: torch.device) -> dict[str, str]:
    """The kernels in use, as ``{"grouped_mlp bfloat16": "triton"}``, for ``run.json``; the rest is plain torch."""
    if device.type != "cuda":
        return {}
    return {f"{op} {dtype}": backend for (op, dtype), backend in sorted(choice.in_use(device).items())}


def changed(start: dict[str, Any] | None, device: torch.device) -> list[str]:
    """Lines to print if the kernels differ from those of the run's last start."""
    before, now = (start or {}).get("kernels"), described(device)
    if before is None or before == now:
        return []
    change = f"kernels were {before or 'plain torch'} and are {now or 'plain torch'}"
    return [f"{change}: the run continues, but not bit for bit"]
