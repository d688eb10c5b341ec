"""Everything that decides a run, as frozen dataclasses; YAML in and out; the presets.

`Config()` holds the values of the published code and reads images in the training process. A preset or a YAML file
changes some of them, the command line the rest; `check` refuses what cannot work before anything is built.
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
    """The masked autoencoder; `dex.model.MaskedAutoencoder` takes the same names."""

    img_size: int | tuple[int, int] = 256
    """Pixels of the training crop: side of a square, or height and width."""
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    num_experts: int | tuple[int, ...] = 8
    """Experts of every layer, or one number per layer; 0 is the monolithic control, one MLP of top_k * hidden size."""
    top_k: int | tuple[int, ...] = 2
    """Experts an image takes in every layer, or one number per layer."""
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0
    in_chans: Literal[1, 3] = 3
    """3, colours, of which grey images have three equal ones; 1, grey: colours become their luminance."""
    norm_pix_loss: bool = True
    """Predict pixels normalised per patch, as the published runs do, instead of the pixels themselves."""
    mask_ratio: float = 0.75
    """Share of patches hidden from the encoder."""
    align: Literal["kd", "cosine", "mse"] = "kd"
    """Which align loss: kd is the published code's, cosine the paper's Eq. 7; see `dexkernels.align_loss`."""
    route_from: Literal["cls", "mean"] = "cls"
    """What the routers read: the CLS token, as published, or the mean of all tokens."""
    temperature: float = 0.5
    """Of the routers' softmax."""
    router_init: Literal["xavier", "linear"] = "xavier"
    """How routers are drawn; linear as torch.nn.Linear draws, like the published runs: 0.4 times as wide at 768."""
    usage_momentum: float = 0.99
    """Of the average usage that exploration noise favours rarely used experts by."""
    balance_over: Literal["part", "batch"] = "part"
    """Whose mean probabilities the balance loss is of: the images that a rank computes at once, as published, or the
    whole batch, which makes any number of ranks and micro-batches one run; see `dex.model.balance`."""
    init: str | None = None
    """Weights to start from: a file of MAE, timm, Hugging Face or published DEX, or a run; none draws all weights."""
    backend: str | None = None
    """Kernel backend of every op; none takes each op's default. `dex doctor` lists them."""


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None
    """Folder of images (one sub-folder per modality) or shard set; none is the small set in the package."""
    batch_size: int = 896
    """Images per step."""
    temperature: float = 1.0
    """Shares of the modalities: proportional to their numbers of images to this power. 1 shows every image equally
    often, 0 every modality."""
    num_workers: int | None = 0
    """Processes that read ahead; 0 reads in the training process, null takes the cores at hand, at most 8. The order of
    images does not depend on it."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW over every parameter that takes a gradient."""

    base_lr: float = 1e-4
    """Learning rate per 512 images: the peak is base_lr * batch_size / 512."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-6
    eps: float = 1e-8
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; larger ones are scaled down to it."""
    decay_exclude: Literal["none", "vectors"] = "none"
    """What weight decay leaves out: nothing, as published, or biases, norms and tokens."""
    layer_decay: float = 1.0
    """Factor of the learning rate from one encoder block to the one before it; 1 gives all the same."""
    ema: float | None = None
    """Momentum of an average of the weights that is kept beside them, such as 0.9999; null keeps none."""
    fused: bool = False
    """Whether AdamW and the directors' update read the experts once, together; results differ in rounding."""


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes with the step; every pair is (first step, last step of the span), joined by half a cosine."""

    epochs: float = 200.0
    steps: int | None = None
    """Length in steps; overrides epochs."""
    warmup: float = 0.05
    """Share of the run over which the learning rate rises linearly; 0.05 is 10 of 200 epochs."""
    lr_shape: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: half a cosine to 0; the peak and, at the end, a straight line to 0; or the peak."""
    decay: float = 0.1
    """Share of the run over which wsd falls to 0."""
    span: int | None = None
    """Steps that warm-up and pairs span; null is the whole run. A run that is extended gets the length it had."""
    noise_std: tuple[float, float] = (1.0, 0.0)
    """Exploration noise of the router."""
    momentum: tuple[float, float] = (0.99, 0.999)
    """Momentum of the directors (GEMA)."""
    align_weight: float | tuple[float, float] = 0.01
    """One number for the whole run, or a pair."""
    balance_weight: tuple[float, float] = (0.01, 0.01)


@dataclass(frozen=True)
class RunConfig:
    """How a run is carried out. Seed, precision and device change its result; nothing else here does.

    Another device draws other random numbers and rounds otherwise.
    """

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "bf16"
    """bf16 and fp16 are autocast, fp16 with a scaled loss; auto takes bf16 where the processor has it, else fp32."""
    stop_at: int | None = None
    """Stop after this step, saved and resumable; the schedules still span the whole run."""
    log_every: int = 50
    """Steps between two rows of metrics."""
    evaluate_every: int = 1000
    """Steps between two evaluations of held-out images: losses, pictures, and whether experts specialise; 0 for none. A
    run of 100 steps or more is evaluated after its first tenth too."""
    evaluate_images: int = 256
    """Held-out images, spread evenly over the modalities."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep_checkpoints: int = 3
    """The newest ones; older ones are removed."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the numbers of the rows too; null tracks in the run folder alone."""
    milestones: tuple[int, ...] | None = None
    """Steps whose checkpoints stay for good."""
    keep_best: bool = False
    """The checkpoint of the lowest held-out loss stays; an evaluation that is the best so far is followed by a save."""


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is spread over ranks and memory. Nothing here changes what is computed but for the order of sums."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """With several ranks: ddp holds everything on each; fsdp cuts weights, gradients and moments over them."""
    micro_batch: int | None = None
    """Images a rank computes at once; gradients and gate mass add up until its part of the batch is done. None: all."""
    checkpointing: bool = False
    """Recompute the encoder's blocks in backward instead of keeping what they computed."""
    compile: bool = False
    """torch.compile the model."""
    cuda_graph: bool = False
    """Replay the step as one CUDA graph: on one GPU, with experts that need nothing of the host (backend triton)."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others before the run ends, naming the one that hangs."""


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def peak_lr(self) -> float:
        return self.optim.base_lr * self.data.batch_size / 512


MOST_WORKERS = 256
"""Of one rank; each is a process. No machine has so many cores for a rank that more would be meant."""
MOST_WIDE, MOST_DEEP, MOST_EXPERTS = 2**20, 1_000, 2**16
"""Features, blocks, experts of a layer: above them a number is a slip, whose model no machine could hold."""

# Fields that a resumed run may change: schedules and data stay what they were. Another device or kernel backend rounds
# otherwise, and another device draws other random numbers: such a run goes on, but not bit for bit.
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
    # Many steps of few images: in so short a run the number of steps decides whether attention finds the neighbours.
    data=DataConfig(batch_size=16),
    optim=OptimConfig(base_lr=0.048, betas=(0.9, 0.95)),  # a peak of 1.5e-3
    # Ten times the published balance weight, chosen for so short a run.
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
    """The preset called ``name``. ValueError: no such preset."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries and lists, as YAML and JSON hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


def from_dict(values: Any, base: Config, source: str = "configuration") -> Config:
    """``base`` with the fields that ``values`` names replaced.

    ValueError, naming the field and ``source``: an unknown key or a value of the wrong type.
    """
    return merge(base, values, source)


def read_yaml(path: str | Path, base: Config) -> Config:
    """``base`` with the fields that the file names replaced. FileNotFoundError; ValueError as in `from_dict`."""
    path = Path(path).expanduser()
    if not path.is_file():
        there = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"config: expected a YAML file; {there} at {path}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), OnceLoader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"config: expected YAML in {path}; got: {' '.join(str(error).split())}") from error
    return from_dict({} if values is None else values, base, str(path))


def to_yaml(config: Config) -> str:
    """Every field; `read_yaml` turns it back into the same configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name of each field that differs -> (old value, new value)."""
    a, b = flat(to_dict(old)), flat(to_dict(new))
    return {key: (a[key], b[key]) for key in a if a[key] != b[key]}


def check(config: Config) -> None:
    """ValueError, naming the field, what was expected and what came, for values that cannot work."""
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


def _require(good: bool, name: str, expected: str, value: Any) -> None:
    if not good:
        raise ValueError(f"{name}: expected {expected}; got {value!r}")


def _check_model(model: ModelConfig) -> None:
    _require(min(height_width(model.img_size)) >= 1, "model.img_size", "at least 1", model.img_size)
    for name in ("patch_size", "embed_dim", "depth", "num_heads"):
        _require(getattr(model, name) >= 1, f"model.{name}", "at least 1", getattr(model, name))
    for name in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads"):
        _require(getattr(model, name) >= 1, f"model.{name}", "at least 1", getattr(model, name))
    for names, most in ((("embed_dim", "decoder_embed_dim"), MOST_WIDE), (("depth", "decoder_depth"), MOST_DEEP)):
        for name in names:
            _require(getattr(model, name) <= most, f"model.{name}", f"at most {most:,}", getattr(model, name))
    by_patch = f"a multiple of model.patch_size = {model.patch_size}"
    divides = not any(side % model.patch_size for side in height_width(model.img_size))
    _require(divides, "model.img_size", by_patch, model.img_size)
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
    # Each at its own width: of a small ratio the narrower one comes out as no unit at all.
    for name in ("embed_dim", "decoder_embed_dim"):
        width = getattr(model, name)
        hidden = f"a ratio that gives at least one hidden unit of model.{name} = {width}"
        _require(width * model.mlp_ratio >= 1, "model.mlp_ratio", hidden, model.mlp_ratio)
        widest = f"a ratio that gives at most {MOST_WIDE:,} hidden units of model.{name} = {width}"
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
    few = f"at most {MOST_EXPERTS:,} a layer"
    _require(max(experts) <= MOST_EXPERTS, "model.num_experts", few, model.num_experts)
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
    # AdamW's steps are about as long as the learning rate, so that above 1 no weight outlives one.
    if peak_lr > 1:
        raise ValueError(
            "optim.base_lr: expected a peak, base_lr * data.batch_size / 512, of at most 1; got "
            f"{optim.base_lr:g}, whose peak is {peak_lr:g}"
        )
    decay = "a share of less than 1 at the peak learning rate"
    _require(optim.weight_decay * peak_lr < 1, "optim.weight_decay", decay, optim.weight_decay)
    _require(all(0 <= b < 1 for b in optim.betas), "optim.betas", "two numbers in [0, 1)", optim.betas)
    _require(optim.weight_decay >= 0, "optim.weight_decay", "at least 0", optim.weight_decay)
    _require(optim.eps > 0, "optim.eps", "above 0", optim.eps)
    _require(optim.clip_norm > 0, "optim.clip_norm", "above 0", optim.clip_norm)
    _require(0 < optim.layer_decay <= 1, "optim.layer_decay", "a factor above 0, at most 1", optim.layer_decay)
    _require(optim.ema is None or 0 <= optim.ema < 1, "optim.ema", "a number in [0, 1), or null", optim.ema)


def _check_schedule(schedule: ScheduleConfig) -> None:
    pairs = "two numbers of at least 0"
    _require(schedule.epochs > 0, "schedule.epochs", "above 0", schedule.epochs)
    _require(schedule.steps is None or schedule.steps >= 1, "schedule.steps", "at least 1", schedule.steps)
    _require(0 <= schedule.warmup < 1, "schedule.warmup", "a share in [0, 1)", schedule.warmup)
    _require(0 < schedule.decay <= 1, "schedule.decay", "a share above 0, at most 1", schedule.decay)
    if schedule.lr_shape == "wsd":
        rest = f"at most what schedule.warmup = {schedule.warmup:g} leaves"
        _require(schedule.warmup + schedule.decay <= 1, "schedule.decay", rest, schedule.decay)
    _require(schedule.span is None or schedule.span >= 1, "schedule.span", "at least 1, or null", schedule.span)
    _require(min(schedule.noise_std) >= 0, "schedule.noise_std", pairs, schedule.noise_std)
    momenta = all(0 <= m <= 1 for m in schedule.momentum)
    _require(momenta, "schedule.momentum", "two numbers in [0, 1]", schedule.momentum)
    align = pair(schedule.align_weight)
    _require(min(align) >= 0, "schedule.align_weight", "a number or two of at least 0", schedule.align_weight)
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
    _require(evaluates, "run.keep_best", "evaluations, run.evaluate_every above 0", run.keep_best)


def per_layer(value: int | tuple[int, ...], depth: int) -> tuple[int, ...]:
    """One number per layer of a field that may be one number for all."""
    return (value,) * depth if isinstance(value, int) else value


def pair(value: float | tuple[float, float]) -> tuple[float, float]:
    """First and last value of a schedule that may be one number."""
    return value if isinstance(value, tuple) else (value, value)


def images_per_rank(config: Config, world_size: int) -> int:
    """Images of a batch that each of ``world_size`` ranks takes. ValueError when they cannot share it evenly."""
    batch = config.data.batch_size
    if batch % world_size:
        raise ValueError(f"data.batch_size: expected a multiple of the {world_size} ranks; got {batch}")
    return batch // world_size


def resolve_micro_batch(config: Config, world_size: int) -> int:
    """Images that a rank computes at once. ValueError when its part cannot be cut into equal micro-batches."""
    part, micro = images_per_rank(config, world_size), config.parallel.micro_batch
    if micro is not None and part % micro:
        raise ValueError(f"parallel.micro_batch: expected a divisor of the {part} images of a rank; got {micro}")
    return micro or part


def field_kind(kind: type, name: str) -> Any:
    """The annotation of the field with this dotted name, in a dataclass of dataclasses; None when there is none.

    Hyphens count as underscores; the fields of `Config` may lie below a field of their own.
    """
    first, _, rest = name.replace("-", "_").partition(".")
    hints = typing.get_type_hints(kind)
    if first not in hints:
        return field_kind(Config, name) if kind is not Config and Config in hints.values() else None
    annotation = hints[first]
    if rest:
        return field_kind(annotation, rest) if dataclasses.is_dataclass(annotation) else None
    return None if dataclasses.is_dataclass(annotation) else annotation
