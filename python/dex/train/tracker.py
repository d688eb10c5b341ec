"""Metrics of a run in Weights & Biases, beside tensorboard: ``run.wandb``. Sends no image, path, host or user."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dex.common.fields import flat
from dex.config import Config, to_dict

FOLDER = "wandb"
"""Folder of wandb in the run folder."""
_PRIVATE = ("data.path", "model.init")
_SETTINGS = {
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "disable_job_creation": True,
    "console": "off",
    "silent": True,
    "host": "",
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
}
"""Turns off what wandb collects by itself about the machine and the user."""


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics by unique names."""
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):  # Nested tables are only for `dex report`
            numbers |= {f"{key}/{name}": number for name, number in value.items() if isinstance(number, int | float)}
        elif isinstance(value, list):
            numbers |= {f"{key}/layer {layer}": number for layer, number in enumerate(value)}
        elif key != "step" and value is not None:
            numbers[key] = value
    return numbers


class Tracker:
    """A Weights & Biases run, continued by later starts. An error is printed once and ends tracking, never the run."""

    def __init__(self, config: Config, folder: Path, starts: Iterable[Mapping[str, Any]], say: Callable[[str], None]):
        """folder: the run folder. starts: of the run; the hash of the first is the id."""
        self._say, self._run = say, None
        first = json.dumps(next(iter(starts)), sort_keys=True)
        fields = {name: value for name, value in flat(to_dict(config)).items() if name not in _PRIVATE}

        def begin() -> Any:
            import wandb

            run = wandb.init(
                project=config.run.wandb,
                name=folder.resolve().name,
                id=hashlib.sha256(first.encode()).hexdigest()[:16],
                resume="allow",
                dir=str(folder),
                config=fields,
                settings=wandb.Settings(**_SETTINGS),
            )
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
            return run

        self._run = self._guarded(begin)

    def row(self, row: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._guarded(lambda: self._run.log({"step": row["step"], **scalars(row)}))

    def close(self) -> None:
        if self._run is not None:
            self._guarded(self._run.finish)
            self._run = None

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            self._run = None
            self._say(
                f"run.wandb: tracking ends, the run continues: {' '.join(str(error).split()) or type(error).__name__}"
            )
            return None
