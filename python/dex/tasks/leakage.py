"""Images of a task that the pretraining set holds already: `dex data leak` between the two, as a record for sheets."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dex.config import Config, read_yaml
from dex.data import open_dataset
from dex.data.shard_format import MANIFEST
from dex.inference.preprocess import preprocess
from dex.prepare.leak import KINDS, leak
from dex.tasks.task import SPLITS, Case, TaskData
from dex.train.runlog import CONFIG, STARTS


class LeakCheck(NamedTuple):
    """What was found, or why nothing was looked for. Plain values, for JSON."""

    against: str
    """Name of the pretraining set; "" where it was not checked."""
    images: dict[str, int]
    """Of each side that was compared."""
    found: dict[str, dict[str, int]]
    """Of each side, how many of its images the set holds, for each of `dex.prepare.leak.KINDS`."""
    cases: tuple[str, ...]
    """Ids of the cases with such images, sorted."""
    unreadable: int
    reason: str = ""
    """Why it was not checked."""

    @property
    def total(self) -> int:
        return sum(sum(kinds.values()) for kinds in self.found.values())

    @property
    def sentence(self) -> str:
        """For a sheet: ``none found``, what was found, or ``not checked because ...``."""
        if self.reason:
            return f"not checked because {self.reason}"
        compared = sum(self.images.values())
        left_out = f"; {self.unreadable:,} unreadable" if self.unreadable else ""
        if not self.total:
            return f"none found in {compared:,} images against {self.against}{left_out}"
        parts = [
            f"{sum(kinds.values()):,} of {self.images[side]:,} in {side} "
            f"({', '.join(f'{count:,} {kind}' for kind, count in kinds.items() if count)})"
            for side, kinds in self.found.items()
            if any(kinds.values())
        ]
        return f"{self.total:,} images of {len(self.cases):,} cases in {self.against}: {', '.join(parts)}{left_out}"


def not_checked(reason: str) -> LeakCheck:
    """reason: a clause, as of "not checked because the data are not at hand"."""
    return LeakCheck("", {}, {}, (), 0, reason)


def check(
    data: TaskData,
    pretraining: Path | None,
    *,
    sides: Iterable[str] = SPLITS,
    workers: int = 1,
    beat: Callable[[], None] = lambda: None,
) -> LeakCheck:
    """Compare the images of a task, as `dex prepare` would make them, with a pretraining set.

    pretraining: a shard set or a folder of images; None: the embedded set. sides: that are compared. workers: processes
    that decode. beat: called for every case. A case that cannot be read is counted.
    Raises: FileNotFoundError, ValueError as of `dex.data.open_dataset`.
    """
    name = open_dataset(pretraining).name
    cases = [case for side in sides for case in data.of(side)]
    lost = 0
    with tempfile.TemporaryDirectory(prefix="dex-leak-") as folder:
        for number, case in enumerate(cases):
            beat()
            lost += not _write(Path(folder) / f"{number:07d}", case, data)
        if lost == len(cases):
            return not_checked("no image of the task could be read")
        report = leak(pretraining, folder, workers)
        written = Counter(cases[int(path.parent.name)].split for path in Path(folder).glob("*/*.png"))
    images = {side: written[side] for side in SPLITS if written[side]}
    found = {side: dict.fromkeys(KINDS, 0) for side in images}
    touched = set()
    for pair in report.pairs:
        case = cases[int(pair.b.split("/")[-2])]
        found[case.split][pair.kind] += 1
        touched.add(case.id)
    return LeakCheck(name, images, found, tuple(sorted(touched)), lost + report.b.unreadable)


def of_run(data: TaskData, run: Path, **options: Any) -> LeakCheck:
    """`check` against the set that a run was pretrained on, if it is at hand and still the same; else the reason why
    not. run: its folder."""
    try:
        config = read_yaml(run / CONFIG, Config())
        starts = json.loads((run / STARTS).read_text(encoding="utf-8"))["starts"]
        trained_on = starts[-1]["data"]
        name, fingerprint, counts = trained_on["name"], trained_on["fingerprint"], trained_on["images"]
    except (OSError, ValueError, LookupError, TypeError):
        return not_checked("the run's folder does not say what it was trained on")
    path = None if config.data.path is None else Path(config.data.path).expanduser()
    try:
        dataset = open_dataset(path)
    except (OSError, ValueError):
        return not_checked(f"the run's data, {name}, are not at hand; --pretraining PATH names them")
    if dataset.modality_counts() != counts:
        return not_checked(f"the run's data, {name}, are no longer those that it was trained on")
    of_shards = path is None or (path / MANIFEST).exists()  # to take that of a folder is to read all of it
    if of_shards and dataset.fingerprint != fingerprint:
        return not_checked(f"the run's data, {name}, are no longer those that it was trained on")
    return check(data, path, **options)


def _write(folder: Path, case: Case, data: TaskData) -> bool:
    """The images of a case as PNG files; whether there are any."""
    from PIL import Image

    task = data.task
    try:
        made = preprocess(case.image, task.modality or None, (task.plane,))
    except (ValueError, OSError):
        return False
    folder.mkdir()
    for number, image in enumerate(made.images):
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(folder / f"{number:06d}.png", compress_level=1)
    return len(made.images) > 0
