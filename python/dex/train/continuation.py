"""What a resumed run may change: its length, fields without effect on the result, and fields overridden by name.

A run can be extended if no step so far depended on its length: with a constant learning rate, or before the decay of
warm-up-stable-decay. All other schedules keep the span they had.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dex.common.fields import flat
from dex.config import FREE_ON_RESUME, Config, differences, to_dict
from dex.train.schedules import stable_steps

_LENGTH = frozenset({"schedule.steps", "schedule.epochs"})
_NOT_OVERRIDDEN = {
    "data.batch_size": "counts the images of the run so far; start a new run from its weights with --init",
    "schedule.span": "follows from the length; override schedule.steps",
}
_RESOLVED = {"steps": "schedule.steps", "precision": "run.precision"}
"""Resolved values of a run, and the field that decides each."""


class Override(NamedTuple):
    """Fields whose values may change when a run is resumed."""

    fields: tuple[str, ...]
    """Dotted names."""
    reason: str

    def check(self, resume: str | Path | None) -> None:
        """ValueError: no run is resumed, there is no reason, or a field does not exist or cannot be overridden."""
        if resume is None:
            raise ValueError("override: expected a resumed run, --resume auto, got a new run")
        if not self.reason.strip():
            raise ValueError("reason: expected why --override changes the run, to be stored with it, got nothing")
        known = flat(to_dict(Config()))
        for name in self.fields:
            if name not in known:
                raise ValueError(f"override: expected fields of the configuration, such as optim.base_lr, got {name!r}")
            if name in _NOT_OVERRIDDEN:
                raise ValueError(f"override: {name} {_NOT_OVERRIDDEN[name]}")


class Change(NamedTuple):
    """A field whose value changes at this start of a run."""

    field: str
    was: Any
    now: Any
    reason: str | None
    """None if the run was extended."""


class Continuation(NamedTuple):
    """How a run continues with a new configuration."""

    config: Config
    """The new configuration, with the span of an extended run."""
    changes: list[Change]
    refused: list[str]
    """Differences that are not allowed, in words."""


def continue_run(
    earlier: Config, state: Mapping[str, Any], config: Config, resolved: Mapping[str, Any], override: Override | None
) -> Continuation:
    """How the run with configuration ``earlier`` and ``state`` continues with ``config``.

    state: of its checkpoint, or what its start recorded. resolved: the values of ``config`` for the names in
    ``_RESOLVED``.
    """
    fields = set(override.fields) if override else set()
    steps, earlier_steps = resolved["steps"], state.get("steps", resolved["steps"])
    is_stretched = bool(fields & _LENGTH)
    is_longer = not is_stretched and steps > earlier_steps
    expected_span = earlier.schedule.span
    if is_longer:
        expected_span = expected_span or earlier_steps
    if config.schedule.span is None and not is_stretched:
        config = replace(config, schedule=replace(config.schedule, span=expected_span))

    changed = {k: v for k, v in differences(earlier, config).items() if k not in FREE_ON_RESUME}
    for name, field in _RESOLVED.items():
        value = resolved[name]
        if state.get(name, value) != value and field not in changed:
            changed[name] = (state[name], value)
    changes, refused = [], []
    if is_longer:
        for name in (*_LENGTH, "steps"):
            changed.pop(name, None)
        if config.schedule.span == expected_span:
            changed.pop("schedule.span", None)
        if reason := _why_not_longer(earlier, earlier_steps, state.get("step", 0)):
            refused.append(f"schedule.steps: expected {earlier_steps!r}, got {steps!r}: {reason}")
        changes.append(Change("schedule.steps", earlier_steps, steps, None))
    for name, (was, now) in changed.items():
        field = _RESOLVED.get(name, name)
        if field in fields or (is_stretched and field in {*_LENGTH, "schedule.span"}):
            changes.append(Change(name, was, now, override.reason))
        else:
            refused.append(f"{name}: expected {was!r}, got {now!r}")
    return Continuation(config, changes, refused)


def _why_not_longer(earlier: Config, steps: int, done: int) -> str | None:
    """Why a run of ``steps`` steps cannot be extended after ``done``, and what to do instead; None if it can."""
    stable = stable_steps(earlier, steps)
    remedy = "--override schedule.steps --reason TEXT stretches every schedule; --init RUN starts a new run from it"
    if stable is None:
        return f"a run with a cosine learning rate cannot be extended (constant and wsd can). {remedy}"
    if done > stable:
        return (
            f"its learning rate has been falling since step {stable}: resume from a checkpoint up to that step, "
            f"--resume RUN/checkpoints/step-{stable:08d}. {remedy}"
        )
    return None
