"""Images of a task that are also in the pretraining set: ``dex data leak`` between the two, as a record for sheets."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from dex.config import Config, read_yaml
from dex.data import open_dataset
from dex.data.shard_format import MANIFEST
from dex.inference.preprocess import preprocess
from dex.prepare.leak import KINDS, leak
from dex.tasks.task import SPLITS, Case, TaskData
from dex.train.runlog import CONFIG, data_of


class LeakCheck(NamedTuple):
    """The shared images, or why no check ran. Plain values, for JSON."""

    against: str
    """Name of the pretraining set; "" if no check ran."""
    images: dict[str, int]
    """Number of images in each split compared."""
    found: dict[str, dict[str, int]]
    """For each split, the number of its images in the set, by kind of ``dex.prepare.leak.KINDS``."""
    cases: tuple[str, ...]
    """Ids of the cases with shared images, sorted."""
    unreadable: int
    reason: str = ""
    """Why no check ran."""

    @property
    def total(self) -> int:
        return sum(sum(kinds.values()) for kinds in self.found.values())

    @property
    def sentence(self) -> str:
        """The result for a sheet: ``none found ...``, the numbers found, or ``not checked because ...``."""
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
    """A record without a check; reason: the clause after "not checked because"."""
    return LeakCheck("", {}, {}, (), 0, reason)


def check(
    data: TaskData,
    pretraining: Path | None,
    *,
    sides: Iterable[str] = SPLITS,
    workers: int = 1,
    beat: Callable[[], None] = lambda: None,
) -> LeakCheck:
    """Compare the images of a task, as ``dex prepare`` would produce them, with a pretraining set.

    pretraining: a shard set or a folder of images; None: the embedded set. sides: splits to compare. workers: number of
    processes that decode. beat: called for every case. Unreadable cases are counted.
    Raises: FileNotFoundError, ValueError as from ``dex.data.open_dataset``.
    """
    name = open_dataset(pretraining).name
    cases = [case for side in sides for case in data.of(side)]
    unreadable = 0
    with tempfile.TemporaryDirectory(prefix="dex-leak-") as folder:
        for number, case in enumerate(cases):
            beat()
            unreadable += not _write(Path(folder) / f"{number:07d}", case, data)
        if unreadable == len(cases):
            return not_checked("no image of the task could be read")
        report = leak(pretraining, folder, workers)
        written = Counter(cases[int(path.parent.name)].split for path in Path(folder).glob("*/*.png"))
    images = {side: written[side] for side in SPLITS if written[side]}
    found = {side: dict.fromkeys(KINDS, 0) for side in images}
    ids = set()
    for pair in report.pairs:
        case = cases[int(pair.b.split("/")[-2])]
        found[case.split][pair.kind] += 1
        ids.add(case.id)
    return LeakCheck(name, images, found, tuple(sorted(ids)), unreadable + report.b.unreadable)


def of_run(data: TaskData, run: Path, **options: Any) -> LeakCheck:
    """``check`` against the pretraining set of the run in folder ``run``, if it is available and unchanged."""
    try:
        config = read_yaml(run / CONFIG, Config())
        name, fingerprint, counts = itemgetter("name", "fingerprint", "images")(data_of(run))
    except (OSError, ValueError, LookupError):
        return not_checked("the run's folder does not state its pretraining set")
    path = None if config.data.path is None else Path(config.data.path).expanduser()
    try:
        dataset = open_dataset(path)
    except (OSError, ValueError):
        return not_checked(f"the run's data, {name}, are not available; --pretraining PATH gives their location")
    of_shards = path is None or (path / MANIFEST).exists()  # The fingerprint of a folder takes reading all of it
    if dataset.modality_counts() != counts or (of_shards and dataset.fingerprint != fingerprint):
        return not_checked(f"the run's data, {name}, have changed since it was trained")
    return check(data, path, **options)


def _write(folder: Path, case: Case, data: TaskData) -> bool:
    """Write the images of a case as PNG files; return whether there are any."""
    from PIL import Image

    task = data.task
    try:
        preprocessed = preprocess(case.image, task.modality or None, (task.plane,))
    except (ValueError, OSError):
        return False
    folder.mkdir()
    for number, image in enumerate(preprocessed.images):
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(folder / f"{number:06d}.png", compress_level=1)
    return len(preprocessed.images) > 0
