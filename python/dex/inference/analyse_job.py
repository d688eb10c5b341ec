"""``dex analyse``: a trained model, its references and, if wanted, its earlier checkpoints, measured in the same way.

It only reads. The references are the model that the run started from, the pixels, and another run if one is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis import maps
from dex.analysis.examine import PARTS, Findings, Material, examine, material_of, pixel_probe
from dex.analysis.intervals import Interval
from dex.config import Config
from dex.data import center, open_dataset
from dex.data.dataset import Dataset
from dex.data.shards import ShardDataset
from dex.inference.load import Loaded, load
from dex.model import MaskedAutoencoder
from dex.train import checkpoint
from dex.train.initial import first_model, load_initial
from dex.train.runlog import CONFIG, data_of

HELD_OUT, PROBED = 256, 512
OVER_STEPS = ("routing", "swap", "features")
"""The parts measured for every checkpoint."""
PICTURES = 8
"""Images whose feature maps are drawn."""
_MEASURE = ("norm_pix_loss", "mask_ratio", "img_size", "patch_size", "in_chans")
"""Fields of the model that must be equal for masked losses to be comparable."""


class Options(NamedTuple):
    parts: tuple[str, ...] = PARTS
    """Of ``dex.analysis.examine.PARTS``."""
    images: int = HELD_OUT
    probed: int = PROBED
    batch_size: int = 64
    checkpoints: str | int = "last"
    """``"last"``, ``"all"``, or their maximum number, spread over the run."""
    ema: bool = False
    """Measure the averaged weights that runs with ``optim.ema`` keep, for the other run too."""


class Subject(NamedTuple):
    """A model to measure."""

    name: str
    step: int
    config: Config
    load: Callable[[], MaskedAutoencoder]


class Other(NamedTuple):
    """The run compared with."""

    name: str
    findings: Findings
    comparable: bool
    """Whether its masked loss is comparable."""


class Maps(NamedTuple):
    """Feature maps of n images, G patches to a side."""

    images: Tensor
    """uint8 ``[n, 3, S, S]``."""
    labels: list[str]
    colours: Tensor
    """float ``[n, G, G, 3]``; see ``dex.analysis.maps.principal_maps``."""
    attention: Tensor
    """float ``[n, G, G]``: mean over the heads."""


class Analysis(NamedTuple):
    name: str
    config: Config
    material: Material
    data: str
    """Name of the data set."""
    findings: Findings
    start: Findings | None
    """Of the model at step 0. None: not requested, or its weights are unavailable, as a note then says."""
    other: Other | None
    pixels: Interval | None
    curve: list[Findings]
    """By ascending step, from step 0 to the newest; empty unless checkpoints were requested."""
    maps: Maps | None
    start_maps: Maps | None
    notes: list[str]


class Job(NamedTuple):
    """Everything resolved, nothing measured yet."""

    name: str
    loaded: Loaded
    start: Subject | None
    other: Loaded | None
    other_name: str
    earlier: list[Subject]
    """Checkpoints before the newest."""
    dataset: Dataset
    options: Options
    notes: list[str]


Say = Callable[[int, int, str], None]
"""Called with (done, total, what comes next)."""


def prepare(
    run: str | Path, options: Options, *, data: str | Path | None = None, compare: str | Path | None = None
) -> Job:
    """Load the models and open the data. ValueError or FileNotFoundError naming the argument."""
    check(options)
    loaded = load(run, path="experts", ema=options.ema)
    dataset = open_data(loaded, data)
    check_modalities(loaded, dataset)
    if not len(dataset.split("val")):
        raise ValueError(f"data: expected held-out images; the split 'val' of {dataset.name} is empty. Give --data")
    notes = _data_notes(loaded, dataset, data)
    if options.ema:
        notes.append("The averaged weights (optim.ema) were measured")
    start, earlier = None, []
    if set(options.parts) != {"heldout"}:
        start = _start(loaded, notes)
    if options.checkpoints != "last":
        earlier = _earlier(Path(run), loaded, options, notes)
    other = None
    if compare is not None:
        try:
            other = load(compare, path="experts", ema=options.ema)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"compare: {str(error).removeprefix('run: ')}") from error
    name = Path(run).resolve().name
    other_name = "" if compare is None else Path(compare).resolve().name
    if other_name == name:
        other_name = f"{Path(compare).resolve().parent.name}/{other_name}"
    return Job(name, loaded, start, other, other_name, earlier, dataset, options, notes)


def check(options: Options) -> None:
    """ValueError naming the argument."""
    if unknown := set(options.parts) - set(PARTS):
        raise ValueError(f"only: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    for name in ("images", "probed", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    wanted = options.checkpoints
    if wanted not in ("all", "last") and not (isinstance(wanted, int) and wanted >= 1):
        raise ValueError(f"checkpoints: expected all, last, or a number of at least 1, got {wanted!r}")


def open_data(loaded: Loaded, data: str | Path | None) -> Dataset:
    """The data set ``data``, or that of the run. ValueError, FileNotFoundError."""
    path = loaded.config.data.path if data is None else data
    try:
        return open_dataset(path)
    except (ValueError, FileNotFoundError) as error:
        reason = str(error).removeprefix("path: ")
        hint = ". The run had its data there; give --data if they have moved" if data is None else ""
        raise type(error)(f"data: {reason}{hint}") from error


def check_modalities(loaded: Loaded, dataset: Dataset) -> None:
    """ValueError if the data have a modality that the run was not trained on."""
    unknown = [name for name in dataset.modalities if name not in loaded.modalities]
    if loaded.modalities and unknown:
        raise ValueError(
            f"data: expected modalities of the run ({', '.join(loaded.modalities)}); {dataset.name} also has "
            f"{', '.join(unknown)}. The spelling must match"
        )


def analyse(job: Job, device: torch.device, say: Say = lambda done, total, text: None) -> Analysis:
    """Measure everything. The models are moved to ``device`` one by one."""
    options, progress = job.options, _Progress(job, say)
    progress("reading images")
    probed = options.probed if "features" in options.parts else 1
    material = material_of(job.dataset, held_out=options.images, probed=probed)

    def measure(model: MaskedAutoencoder, name: str, step: int, config: Config, parts: Sequence[str]) -> Findings:
        report = lambda part: progress(f"{name}: {part}")  # noqa: E731
        return examine(model.to(device), step, config, material, parts, batch_size=options.batch_size, report=report)

    loaded = job.loaded
    findings = measure(loaded.model, f"step {loaded.step}", loaded.step, loaded.config, options.parts)
    with_maps = "features" in options.parts
    own_maps = _maps(loaded.model, loaded.config, material) if with_maps else None
    start = start_maps = None
    if job.start is not None:
        model = job.start.load()
        start = measure(model, "step 0", 0, job.start.config, options.parts)
        start_maps = _maps(model, job.start.config, material) if with_maps else None
    other = None
    if job.other is not None:
        of_other = measure(job.other.model, job.other_name, job.other.step, job.other.config, options.parts)
        differing = _differing(loaded.config, job.other.config)
        other = Other(job.other_name, of_other, not differing)
        if differing:
            job.notes.append(
                f"The losses of {job.name} and {job.other_name} are not comparable: the runs differ in "
                f"{', '.join(differing)}"
            )
    over_steps = [part for part in OVER_STEPS if part in options.parts]
    curve = [measure(s.load(), s.name, s.step, s.config, over_steps) for s in job.earlier]
    if job.earlier:
        curve = [*([start] if start else []), *curve, findings]
    pixels = None
    if with_maps:
        progress("pixels")
        pixels = pixel_probe(material)
    progress.end()
    return Analysis(
        name=job.name,
        config=loaded.config,
        material=material,
        data=job.dataset.name,
        findings=findings,
        start=start,
        other=other,
        pixels=pixels,
        curve=curve,
        maps=own_maps,
        start_maps=start_maps,
        notes=job.notes,
    )


class _Progress:
    """Counts the parts of all models."""

    def __init__(self, job: Job, say: Say):
        wanted, loaded = set(job.options.parts), job.loaded
        models = [loaded.model, *([loaded.model] if job.start else []), *([job.other.model] if job.other else [])]
        parts = sum(_parts(model, wanted) for model in models)
        parts += len(job.earlier) * _parts(loaded.model, wanted.intersection(OVER_STEPS))
        self._total = 1 + parts + ("features" in wanted)
        self._done, self._say = 0, say

    def __call__(self, text: str) -> None:
        self._say(min(self._done, self._total), self._total, text)
        self._done += 1

    def end(self) -> None:
        self._say(self._total, self._total, "done")


def _parts(model: MaskedAutoencoder, wanted: set[str]) -> int:
    """The number of parts that ``examine`` measures; a model without experts has fewer."""
    left_out = set() if model.encoder.dex_layers else {"swap", "ablation", "similarity"}
    return len((wanted | {"heldout"}) - left_out)


def _data_notes(loaded: Loaded, dataset: Dataset, data: str | Path | None) -> list[str]:
    notes = []
    if not loaded.modalities:
        notes.append("The modalities that the model was trained on are unknown; those of the data set are used")
    doubt = "the run may have trained on images that are held out here"
    trained_on = data_of(loaded.folder.parent.parent).get("fingerprint")
    if isinstance(dataset, ShardDataset) and trained_on is not None:
        if dataset.fingerprint != trained_on and not dataset.withdrawn_since(trained_on):
            notes.append(
                f"The data set {dataset.name} is not, or no longer, the one that the run was trained on: {doubt}"
            )
    elif data is not None:
        notes.append(f"The data set {dataset.name} was given by --data: {doubt}")
    return notes


def _start(loaded: Loaded, notes: list[str]) -> Subject | None:
    config = replace(loaded.config, model=replace(loaded.config.model, backend=None))

    def begin() -> MaskedAutoencoder:
        with torch.random.fork_rng(devices=[]):
            model = first_model(config)
            if config.model.init is not None:
                load_initial(model, config)
        return model.eval()

    if config.model.init is not None and not Path(config.model.init).expanduser().exists():
        notes.append(f"The model at step 0 is not shown: it began as {config.model.init}, which no longer exists")
        return None
    return Subject("step 0", 0, config, begin)


def _earlier(run: Path, loaded: Loaded, options: Options, notes: list[str]) -> list[Subject]:
    wanted = options.checkpoints
    if not is_run(run):
        raise ValueError(f"checkpoints: expected a run folder, which has several, got the single model {run}")
    folders = [
        (step, folder) for step, folder in checkpoint.list_checkpoints(run / "checkpoints") if step < loaded.step
    ]
    if isinstance(wanted, int):
        others = wanted - 1
        if others < len(folders):
            folders = [folders[i * len(folders) // others] for i in range(others)] if others else []
    intact = []
    for step, folder in folders:
        try:
            checkpoint.verify(folder)
        except checkpoint.CheckpointError as error:
            notes.append(f"The checkpoint of step {step} is left out: {error}")
            continue
        load_model = functools.partial(_model_of, folder, options.ema)
        intact.append(Subject(f"step {step}", step, loaded.config, load_model))
    if not intact:
        notes.append(f"There is no checkpoint before step {loaded.step}; run.keep_checkpoints sets how many are kept")
    return intact


def _model_of(folder: Path, ema: bool) -> MaskedAutoencoder:
    return load(folder, ema=ema).model


def is_run(folder: Path) -> bool:
    """Whether it is the folder of a run, rather than of a checkpoint or an exported model."""
    return (folder / CONFIG).is_file() and not checkpoint.is_checkpoint(folder)


def _differing(a: Config, b: Config) -> list[str]:
    return [f"model.{f}" for f in _MEASURE if getattr(a.model, f) != getattr(b.model, f)]


def _maps(model: MaskedAutoencoder, config: Config, material: Material) -> Maps:
    """The maps of the first held-out images, whose modalities take turns; components are over all their patches."""
    count = min(len(material.held_out.modality.unique()), PICTURES)
    count = count if 2 * count > PICTURES else PICTURES
    images = material.held_out.images[:count]
    labels = [material.modalities[m] for m in material.held_out.modality[:count].tolist()]
    device = next(model.parameters()).device
    tokens = maps.tokens(model.encoder, center(images.to(device), config.model.img_size, config.model.in_chans))
    return Maps(images, labels, maps.principal_maps(tokens.patches, model.encoder.grid), tokens.attention.mean(1))
