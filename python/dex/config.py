"""The configuration of a run as frozen dataclasses, its checks, its presets, and YAML in and out.

``Config()`` has the values of the published code, but reads images in the training process. Presets, YAML files and the
command line override fields; ``check`` refuses values that cannot work before anything is built. The docstrings of the
fields are the help of ``dex pretrain``.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from dex.common.fields import OnceLoader, flat, merge
from dex.common.shapes import height_width


@dataclass(frozen=True)
class ModelConfig:
    """The masked autoencoder; the fields have the names of the arguments of dex.model.MaskedAutoencoder."""

    img_size: int | tuple[int, int] = 256
    """Pixels of the training crop: side of a square, or height and width."""
    patch_size: int = 16
    """Pixels of the side of a patch."""
    embed_dim: int = 768
    """Width of the encoder."""
    depth: int = 12
    """Blocks of the encoder."""
    num_heads: int = 12
    """Attention heads of the encoder."""
    num_experts: int | tuple[int, ...] = 8
    """Experts per layer, or one number for each layer; 0 is the monolithic control: one MLP of top_k * hidden size."""
    top_k: int | tuple[int, ...] = 2
    """Experts per image in every layer, or one number for each layer."""
    decoder_embed_dim: int = 512
    """Width of the decoder."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_num_heads: int = 16
    """Attention heads of the decoder."""
    mlp_ratio: float = 4.0
    """Hidden units of an MLP, as a multiple of the width."""
    in_chans: Literal[1, 3] = 3
    """Channels: 3 repeats grey images in three channels, 1 converts colours to luminance."""
    norm_pix_loss: bool = True
    """Predict pixels normalised per patch, as in the published runs, instead of the pixels themselves."""
    mask_ratio: float = 0.75
    """Share of patches hidden from the encoder."""
    align: Literal["kd", "cosine", "mse"] = "kd"
    """Align loss: kd is the published code's, cosine is Eq. 7 of the paper; see dexkernels.align_loss."""
    route_from: Literal["cls", "mean"] = "cls"
    """Input of the routers: the CLS token, as published, or the mean of all tokens."""
    temperature: float = 0.5
    """Temperature of the routers' softmax."""
    router_init: Literal["xavier", "linear"] = "xavier"
    """Initialisation of the routers; linear is that of torch.nn.Linear, as published: 0.4 times as wide at 768."""
    usage_momentum: float = 0.99
    """Momentum of the running average of expert usage; exploration noise favours rarely used experts by it."""
    balance_over: Literal["part", "batch"] = "part"
    """Images over which the balance loss averages probabilities: part is those that a rank computes at once, as
    published; batch is the whole batch, so that the result does not depend on ranks and micro-batches."""
    init: str | None = None
    """Weights to start from: a file of MAE, timm, Hugging Face or published DEX, or a run; none is random
    initialisation."""
    backend: str | None = None
    """Kernel backend of every operator; none takes the default of each. dex doctor lists them."""


@dataclass(frozen=True)
class DataConfig:
    """The images."""

    path: str | None = None
    """Folder of images (one sub-folder per modality) or shard set; none is the small set in the package."""
    batch_size: int = 896
    """Images per step."""
    temperature: float = 1.0
    """Each modality is sampled in proportion to its number of images to this power: 1 samples all images equally often,
    0 all modalities."""
    num_workers: int | None = 0
    """Processes that read ahead; 0 reads in the training process, null is one per available core, at most 8. The order
    of images does not depend on it."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW on every parameter that has a gradient."""

    base_lr: float = 1e-4
    """Learning rate per 512 images: the peak is base_lr * batch_size / 512."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Momenta of the first and second moment."""
    weight_decay: float = 1e-6
    """Decoupled weight decay, multiplied by the learning rate."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; larger gradients are scaled down to it."""
    decay_exclude: Literal["none", "vectors"] = "none"
    """Parameters without weight decay: none, as published, or vectors, that is biases, norms and tokens."""
    layer_decay: float = 1.0
    """Factor by which the learning rate falls from each encoder block to the block before it; 1 is the same for all."""
    ema: float | None = None
    """Momentum of a running average of the weights, such as 0.9999; null keeps none."""
    fused: bool = False
    """Compute AdamW and the update of the directors in one pass over the experts; results differ in rounding."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Values that change with the step; a pair is (value at the first step, value at the last step of the span), joined
    by half a cosine."""

    epochs: float = 200.0
    """Length of the run in epochs."""
    steps: int | None = None
    """Length of the run in steps; overrides epochs."""
    warmup: float = 0.05
    """Share of the run over which the learning rate rises linearly; 0.05 is 10 of 200 epochs."""
    lr_shape: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up: half a cosine to 0; the peak, then a straight line to 0; or the peak."""
    decay: float = 0.1
    """Share of the run over which wsd falls to 0."""
    span: int | None = None
    """Steps that the warm-up and pairs span; null is the whole run. An extended run keeps the span of the original."""
    noise_std: tuple[float, float] = (1.0, 0.0)
    """Standard deviation of the router's exploration noise."""
    momentum: tuple[float, float] = (0.99, 0.999)
    """Momentum of the directors (GEMA)."""
    align_weight: float | tuple[float, float] = 0.01
    """Weight of the align loss: one number for the whole run, or a pair."""
    balance_weight: tuple[float, float] = (0.01, 0.01)
    """Weight of the balance loss."""


@dataclass(frozen=True)
class RunConfig:
    """How a run is carried out. Of these fields only seed, precision and device change its result.

    Another device draws other random numbers and rounds differently.
    """

    seed: int = 0
    """Seed of all random numbers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA if available, else the CPU."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "bf16"
    """bf16 and fp16 compute under autocast, fp16 with a scaled loss; auto takes bf16 where the processor multiplies it
    in hardware, else fp32."""
    stop_at: int | None = None
    """Stop after this step, saved and resumable; the schedules still span the whole run."""
    log_every: int = 50
    """Steps between rows of metrics."""
    evaluate_every: int = 1000
    """Steps between evaluations on held-out images: losses, pictures, and whether experts specialise; 0 for none. A run
    of 100 steps or more is also evaluated after its first tenth."""
    evaluate_images: int = 256
    """Held-out images to evaluate, spread evenly over the modalities."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep; older ones are removed."""
    wandb: str | None = None
    """Weights & Biases project that also receives the metrics; null writes them only to the run folder."""
    milestones: tuple[int, ...] | None = None
    """Steps whose checkpoints are never removed."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest held-out loss; the model is saved after each evaluation that is the best so
    far."""


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is spread over ranks and memory. Results change only by the order of sums."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Between several ranks, ddp replicates the model; fsdp shards weights, gradients and moments."""
    micro_batch: int | None = None
    """Images a rank computes at once; gradients and gate mass are accumulated over its part of the batch. None: all."""
    checkpointing: bool = False
    """Recompute the encoder's blocks in backward instead of keeping their activations."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cuda_graph: bool = False
    """Replay the step as one CUDA graph, on one GPU, with experts that never wait for the host (backend triton)."""
    verify_kernels: bool = True
    """First run ``dex verify`` on GPUs whose kernels were not verified yet, for at most three minutes. Without it plain
    torch computes there."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others before the run ends with the name of the rank that hangs."""


@dataclass(frozen=True)
class Config:
    """The whole configuration of a pretraining run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def peak_lr(self) -> float:
        """Highest learning rate of the schedule."""
        return self.optim.base_lr * self.data.batch_size / 512


MOST_WORKERS = 256
"""Largest number of reading processes per rank; a larger number is a mistake."""
MOST_WIDE, MOST_DEEP, MOST_EXPERTS = 2**20, 1_000, 2**16
"""Largest width, depth and number of experts per layer; a larger number is a mistake, since no machine could hold the
model."""

# Fields that a resumed run may change; schedules and data must stay the same. On another device or kernel backend the
# run does not resume bit-for-bit: both round differently, and a device has its own random numbers.
FREE_ON_RESUME = frozenset(
    {"data.path", "data.num_workers", "model.backend", "model.init"}
    | {f"parallel.{f.name}" for f in dataclasses.fields(ParallelConfig)}
    | {f"run.{f.name}" for f in dataclasses.fields(RunConfig) if f.name not in ("seed", "precision")}
)

_PUBLISHED = Config(data=DataConfig(num_workers=None))
_DEMO = Config(
    model=ModelConfig(
        embed_dim=192,
        depth=4,
        num_heads=3,
        decoder_embed_dim=128,
        decoder_depth=2,
        decoder_num_heads=2,
        norm_pix_loss=False,
    ),
    # Many steps of few images: in a run this short, attention finds neighbouring patches only after enough steps.
    data=DataConfig(batch_size=16),
    optim=OptimConfig(base_lr=0.048, betas=(0.9, 0.95)),  # A peak of 1.5e-3
    # Ten times the published balance weight, for a run this short.
    schedule=ScheduleConfig(steps=1000, warmup=0.1, balance_weight=(0.1, 0.1)),
    run=RunConfig(
        precision="auto", log_every=25, evaluate_every=500, evaluate_images=64, checkpoint_every=500, keep_checkpoints=2
    ),
)

PRESETS: dict[str, Config] = {
    "published-code": _PUBLISHED,
    "paper": replace(
        _PUBLISHED,
        model=replace(_PUBLISHED.model, align="cosine"),
        data=replace(_PUBLISHED.data, batch_size=448),
        schedule=replace(_PUBLISHED.schedule, balance_weight=(0.001, 0.0)),
    ),
    "demo": _DEMO,
    "demo-monolithic": replace(_DEMO, model=replace(_DEMO.model, num_experts=0)),
}


def preset(name: str) -> Config:
    """The preset ``name``. ValueError: no such preset."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries and lists, as in YAML and JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


def from_dict(values: Any, base: Config, source: str = "configuration") -> Config:
    """``base`` with the fields in ``values`` replaced.

    ValueError, naming the field and ``source``: an unknown key or a value of the wrong type.
    """
    return merge(base, values, source)


def read_yaml(path: str | Path, base: Config) -> Config:
    """``base`` with the fields in the file replaced. FileNotFoundError: no file. ValueError: as ``from_dict``."""
    path = Path(path).expanduser()
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"config: expected a YAML file; found {found} at {path}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), OnceLoader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"config: expected YAML in {path}, got: {' '.join(str(error).split())}") from error
    return from_dict({} if values is None else values, base, str(path))


def to_yaml(config: Config) -> str:
    """All fields as YAML; ``read_yaml`` reads the same configuration back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name of each field that differs -> (old value, new value)."""
    a, b = flat(to_dict(old)), flat(to_dict(new))
    return {key: (a[key], b[key]) for key in a if a[key] != b[key]}


def check(config: Config) -> None:
    """ValueError, with the field, what was expected and what was given, for values that cannot work."""
    _check_model(config.model)
    _check_data(config.data)
    _check_optim(config.optim, config.peak_lr)
    _check_schedule(config.schedule)
    for name, value in flat(to_dict(config)).items():
        numbers = value if isinstance(value, list) else [value]
        floats = [n for n in numbers if isinstance(n, float)]
        _require(all(math.isfinite(n) for n in floats), name, "finite numbers", value)
        _require(all(n == 0 or 1e-37 < abs(n) < 1e37 for n in floats), name, "0 or numbers that float32 holds", value)
    _check_parallel(config.parallel)
    _check_run(config.run)


def _require(valid: bool, name: str, expected: str, value: Any) -> None:
    if not valid:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _check_model(model: ModelConfig) -> None:
    _require(min(height_width(model.img_size)) >= 1, "model.img_size", "at least 1", model.img_size)
    for name in ("patch_size", "embed_dim", "depth", "num_heads"):
        _require(getattr(model, name) >= 1, f"model.{name}", "at least 1", getattr(model, name))
    for name in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads"):
        _require(getattr(model, name) >= 1, f"model.{name}", "at least 1", getattr(model, name))
    for names, most in ((("embed_dim", "decoder_embed_dim"), MOST_WIDE), (("depth", "decoder_depth"), MOST_DEEP)):
        for name in names:
            _require(getattr(model, name) <= most, f"model.{name}", f"at most {most:,}", getattr(model, name))
    multiple = f"a multiple of model.patch_size = {model.patch_size}"
    divisible = not any(side % model.patch_size for side in height_width(model.img_size))
    _require(divisible, "model.img_size", multiple, model.img_size)
    for whole, part in (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads")):
        value, divisor = getattr(model, whole), getattr(model, part)
        _require(value % divisor == 0, f"model.{whole}", f"a multiple of model.{part} = {divisor}", value)
    for name in ("embed_dim", "decoder_embed_dim"):
        width = getattr(model, name)
        _require(width % 4 == 0, f"model.{name}", "a multiple of 4, for 2-D sine positions", width)
    _check_experts(model)
    _require(model.temperature > 0, "model.temperature", "above 0", model.temperature)
    _require(0 <= model.usage_momentum <= 1, "model.usage_momentum", "a number in [0, 1]", model.usage_momentum)
    _require(model.init is None or bool(model.init.strip()), "model.init", "a file or folder, or null", model.init)
    # A ratio may give no hidden unit at the smaller of the two widths.
    for name in ("embed_dim", "decoder_embed_dim"):
        width = getattr(model, name)
        narrowest = f"a ratio that gives at least one hidden unit for model.{name} = {width}"
        _require(width * model.mlp_ratio >= 1, "model.mlp_ratio", narrowest, model.mlp_ratio)
        widest = f"a ratio that gives at most {MOST_WIDE:,} hidden units for model.{name} = {width}"
        _require(width * model.mlp_ratio <= MOST_WIDE, "model.mlp_ratio", widest, model.mlp_ratio)
    patches = math.prod(side // model.patch_size for side in height_width(model.img_size))
    kept = int(patches * (1 - model.mask_ratio))
    _require(
        0 < model.mask_ratio < 1 and 1 <= kept < patches,
        "model.mask_ratio",
        f"a share that keeps and hides at least one of {patches} patches",
        model.mask_ratio,
    )


def _check_experts(model: ModelConfig) -> None:
    for name in ("num_experts", "top_k"):
        value = getattr(model, name)
        _require(
            isinstance(value, int) or len(value) == model.depth,
            f"model.{name}",
            f"one number or model.depth = {model.depth} numbers",
            value,
        )
    experts, chosen = per_layer(model.num_experts, model.depth), per_layer(model.top_k, model.depth)
    most = f"at most {MOST_EXPERTS:,} per layer"
    _require(max(experts) <= MOST_EXPERTS, "model.num_experts", most, model.num_experts)
    _require(all(k >= 1 for k in chosen), "model.top_k", "at least 1", model.top_k)
    _require(
        all(e == 0 for e in experts) or all(e >= k for e, k in zip(experts, chosen, strict=True)),
        "model.num_experts",
        f"0 in every layer, or at least model.top_k = {model.top_k}",
        model.num_experts,
    )


def _check_data(data: DataConfig) -> None:
    _require(data.path is None or bool(data.path.strip()), "data.path", "a folder", data.path)
    _require(data.batch_size >= 1, "data.batch_size", "at least 1", data.batch_size)
    _require(0 <= data.temperature <= 1, "data.temperature", "a number from 0 to 1", data.temperature)
    workers = data.num_workers
    _require(workers is None or 0 <= workers <= MOST_WORKERS, "data.num_workers", f"0 to {MOST_WORKERS}", workers)


def _check_optim(optim: OptimConfig, peak_lr: float) -> None:
    _require(optim.base_lr > 0, "optim.base_lr", "above 0", optim.base_lr)
    # A step of AdamW changes a weight by about the learning rate; above 1 that overwrites every weight.
    if peak_lr > 1:
        raise ValueError(
            "optim.base_lr: expected a peak, base_lr * data.batch_size / 512, of at most 1, got "
            f"{optim.base_lr:g}, whose peak is {peak_lr:g}"
        )
    decay = "less than 1 after multiplication by the peak learning rate"
    _require(optim.weight_decay * peak_lr < 1, "optim.weight_decay", decay, optim.weight_decay)
    _require(all(0 <= b < 1 for b in optim.betas), "optim.betas", "two numbers in [0, 1)", optim.betas)
    _require(optim.weight_decay >= 0, "optim.weight_decay", "at least 0", optim.weight_decay)
    _require(optim.eps > 0, "optim.eps", "above 0", optim.eps)
    _require(optim.clip_norm > 0, "optim.clip_norm", "above 0", optim.clip_norm)
    _require(0 < optim.layer_decay <= 1, "optim.layer_decay", "a factor above 0, at most 1", optim.layer_decay)
    _require(optim.ema is None or 0 <= optim.ema < 1, "optim.ema", "a number in [0, 1), or null", optim.ema)


def _check_schedule(schedule: ScheduleConfig) -> None:
    pairs = "two numbers, each at least 0"
    _require(schedule.epochs > 0, "schedule.epochs", "above 0", schedule.epochs)
    _require(schedule.steps is None or schedule.steps >= 1, "schedule.steps", "at least 1", schedule.steps)
    _require(0 <= schedule.warmup < 1, "schedule.warmup", "a share in [0, 1)", schedule.warmup)
    _require(0 < schedule.decay <= 1, "schedule.decay", "a share above 0, at most 1", schedule.decay)
    if schedule.lr_shape == "wsd":
        rest = f"at most the share that schedule.warmup = {schedule.warmup:g} leaves"
        _require(schedule.warmup + schedule.decay <= 1, "schedule.decay", rest, schedule.decay)
    _require(schedule.span is None or schedule.span >= 1, "schedule.span", "at least 1, or null", schedule.span)
    _require(min(schedule.noise_std) >= 0, "schedule.noise_std", pairs, schedule.noise_std)
    in_range = all(0 <= m <= 1 for m in schedule.momentum)
    _require(in_range, "schedule.momentum", "two numbers in [0, 1]", schedule.momentum)
    align = pair(schedule.align_weight)
    _require(min(align) >= 0, "schedule.align_weight", "one or two numbers, each at least 0", schedule.align_weight)
    _require(min(schedule.balance_weight) >= 0, "schedule.balance_weight", pairs, schedule.balance_weight)


def _check_parallel(parallel: ParallelConfig) -> None:
    micro = parallel.micro_batch
    _require(parallel.timeout > 0, "parallel.timeout", "above 0", parallel.timeout)
    _require(parallel.timeout <= 1e7, "parallel.timeout", "at most 10,000,000 seconds", parallel.timeout)
    _require(micro is None or micro >= 1, "parallel.micro_batch", "at least 1, or null", micro)


def _check_run(run: RunConfig) -> None:
    _require(0 <= run.seed < 2**63, "run.seed", "at least 0, below 2^63", run.seed)
    _require(run.stop_at is None or run.stop_at >= 1, "run.stop_at", "at least 1", run.stop_at)
    for name in ("log_every", "evaluate_images", "checkpoint_every", "keep_checkpoints"):
        _require(getattr(run, name) >= 1, f"run.{name}", "at least 1", getattr(run, name))
    _require(run.evaluate_every >= 0, "run.evaluate_every", "at least 0", run.evaluate_every)
    _require(min(run.milestones or (1,)) >= 1, "run.milestones", "steps of at least 1", run.milestones)
    _require(run.wandb is None or bool(run.wandb.strip()), "run.wandb", "the name of a project, or null", run.wandb)
    evaluates = not run.keep_best or run.evaluate_every > 0
    _require(evaluates, "run.keep_best", "false unless run.evaluate_every is above 0", run.keep_best)


def per_layer(value: int | tuple[int, ...], depth: int) -> tuple[int, ...]:
    """One number per layer, from a field that may be one number for all layers."""
    return (value,) * depth if isinstance(value, int) else value


def pair(value: float | tuple[float, float]) -> tuple[float, float]:
    """First and last value of a schedule, which may be given as one number."""
    return value if isinstance(value, tuple) else (value, value)


def images_per_rank(config: Config, world_size: int) -> int:
    """Images of a batch per rank. ValueError: the ranks cannot share the batch evenly."""
    batch = config.data.batch_size
    if batch % world_size:
        raise ValueError(f"data.batch_size: expected a multiple of the {world_size} ranks, got {batch}")
    return batch // world_size


def resolve_micro_batch(config: Config, world_size: int) -> int:
    """Images that a rank computes at once. ValueError: its part of the batch is not a multiple of the micro-batch."""
    part, micro = images_per_rank(config, world_size), config.parallel.micro_batch
    if micro is not None and part % micro:
        raise ValueError(f"parallel.micro_batch: expected a divisor of the images per rank, {part}, got {micro}")
    return micro or part


def field_kind(kind: type, name: str) -> Any:
    """Annotation of the field with the dotted ``name`` in a dataclass of dataclasses; None if there is no such field.

    Hyphens are read as underscores. If ``kind`` has a field of type ``Config``, names of its fields are also accepted.
    """
    first, _, rest = name.replace("-", "_").partition(".")
    hints = typing.get_type_hints(kind)
    if first not in hints:
        return field_kind(Config, name) if kind is not Config and Config in hints.values() else None
    annotation = hints[first]
    if rest:
        return field_kind(annotation, rest) if dataclasses.is_dataclass(annotation) else None
    return None if dataclasses.is_dataclass(annotation) else annotation
