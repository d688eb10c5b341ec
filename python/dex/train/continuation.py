"""What a resumed run may change: nothing that makes it another run, but for its length and what is overridden by name.

A longer run is the same run as long as no step that was taken depended on the length: with a constant learning rate, or
before the decay of warm-up-stable-decay. What else moves with the step keeps the span that it had.
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
"""What a run came to, and the field that decides it."""


class Override(NamedTuple):
    """Fields in which a resumed run may be another than it was."""

    fields: tuple[str, ...]
    """Dotted names."""
    reason: str

    def check(self, resume: str | Path | None) -> None:
        """ValueError: nothing is resumed, there is no reason, or a field does not exist or cannot be overridden."""
        if resume is None:
            raise ValueError("override: expected a run that is resumed, --resume auto; got a new run")
        if not self.reason.strip():
            raise ValueError("reason: expected why --override changes the run, for its record; got nothing")
        known = flat(to_dict(Config()))
        for name in self.fields:
            if name not in known:
                raise ValueError(f"override: expected fields of the configuration, such as optim.base_lr; got {name!r}")
            if name in _NOT_OVERRIDDEN:
                raise ValueError(f"override: {name} {_NOT_OVERRIDDEN[name]}")


class Change(NamedTuple):
    """A field that is another from this start of a run on."""

    field: str
    was: Any
    now: Any
    reason: str | None
    """None where the run was made longer."""


class Continuation(NamedTuple):
    config: Config
    """The one that was asked for, with the span of a run that was extended."""
    changes: list[Change]
    refused: list[str]
    """Fields in which the configuration is another run's, in words."""


def go_on(
    earlier: Config, state: Mapping[str, Any], config: Config, resolved: Mapping[str, Any], override: Override | None
) -> Continuation:
    """Whether the run of ``earlier`` and ``state`` goes on with ``config``.

    state: of its checkpoint, or what is known from its start. resolved: what ``config`` comes to, by the names in
    `_RESOLVED`.
    """
    fields = set(override.fields) if override else set()
    steps, before = resolved["steps"], state.get("steps", resolved["steps"])
    is_stretched = bool(fields & _LENGTH)
    is_longer = not is_stretched and steps > before
    expected_span = earlier.schedule.span
    if is_longer:
        expected_span = expected_span or before
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
        if reason := _why_not_longer(earlier, before, state.get("step", 0)):
            refused.append(f"schedule.steps: expected {before!r}, got {steps!r}: {reason}")
        changes.append(Change("schedule.steps", before, steps, None))
    for name, (was, now) in changed.items():
        field = _RESOLVED.get(name, name)
        if field in fields or (is_stretched and field in {*_LENGTH, "schedule.span"}):
            changes.append(Change(name, was, now, override.reason))
        else:
            refused.append(f"{name}: expected {was!r}, got {now!r}")
    return Continuation(config, changes, refused)


def _why_not_longer(earlier: Config, steps: int, done: int) -> str | None:
    """Why a run of ``steps``, of which so many are done, cannot be extended, and what can be done instead."""
    stable = stable_steps(earlier, steps)
    otherwise = "--override schedule.steps --reason TEXT stretches every schedule; --init RUN starts a new run from it"
    if stable is None:
        return f"a run whose learning rate is a cosine ends with it (constant and wsd can be extended). {otherwise}"
    if done > stable:
        return (
            f"its learning rate has fallen since step {stable}: resume from a checkpoint of at most that step, "
            f"--resume RUN/checkpoints/step-{stable:08d}. {otherwise}"
        )
    return None
