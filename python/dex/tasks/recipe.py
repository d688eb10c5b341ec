"""The settings of a fine-tuning, with their defaults and whether these are the paper's.

The supplement states full fine-tuning with AdamW at 1e-4, ten warm-up epochs and a cosine, Dice and cross-entropy for
segmentation, cross-entropy for classification. Everything else is our choice, as its help says.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from dex.common.cores import cores
from dex.common.fields import merge, words
from dex.config import MOST_WORKERS

STATED, OURS = "as the supplement states", "not stated by the paper"


def _setting(default: Any, text: str, stated: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "stated": stated})


@dataclass(frozen=True)
class Settings:
    """Settings of a fine-tuning; each has a ``help``, and ``describe`` adds the origin of its default."""

    mode: Literal["full", "frozen", "linear", "lora"] = _setting(
        "full",
        "full trains everything on the path, frozen only the head, linear one linear map on frozen features, lora the "
        "head and low-rank updates of attention and MLPs",
        stated=True,
    )
    path: Literal["experts", "director"] = _setting(
        "experts", "whether the encoder uses routed experts, or the director as a dense MLP"
    )
    start: Literal["pretrained", "random"] = _setting(
        "pretrained", "random: start from random initialisation, as a control for the value of pretraining", stated=True
    )
    epochs: int = _setting(100, "passes over the training images")
    warmup_epochs: float = _setting(10.0, "epochs of linear warm-up, before half a cosine to 0", True)
    lr: float = _setting(1e-4, "peak learning rate of AdamW", stated=True)
    weight_decay: float = _setting(0.01, "weight decay of AdamW")
    batch_size: int = _setting(16, "images per step, over all ranks")
    img_size: int | None = _setting(
        None, "side of the model's images, a multiple of its patch size; none: as in pretraining"
    )
    feature_size: int = _setting(16, "channels of UNETR at full resolution")
    dropout: float = _setting(0.0, "dropout before the last layer of the classification head")
    class_weights: Literal["none", "balanced"] = _setting(
        "none", "class weights of the cross-entropy; balanced gives every class the same share"
    )
    lora_rank: int = _setting(8, "rank for --mode lora")
    lora_alpha: float = _setting(16.0, "for --mode lora: updates are scaled by alpha / rank")
    gema: bool = _setting(False, "keep updating directors towards their experts; for --path experts in --mode full")
    momentum: float = _setting(0.999, "momentum of the directors with --gema")
    align_weight: float = _setting(0.0, "weight of pretraining's align loss")
    balance_weight: float = _setting(0.0, "weight of pretraining's balance loss")
    flips: Literal["none", "horizontal", "both"] = _setting("none", "random flips, for anatomy that may be mirrored")
    scale: float = _setting(0.2, "largest random change of the image scale, as a share")
    shift: float = _setting(0.1, "largest random shift, as a share of the image's side")
    rotation: float = _setting(10.0, "largest random rotation, in degrees")
    intensity: float = _setting(0.1, "largest random change of brightness and contrast, as a share")
    clip_norm: float = _setting(1.0, "maximum norm of the whole gradient")
    patience: int | None = _setting(
        None, "number of epochs without a better validation metric after which to stop; none: never"
    )
    evaluate_cases: int = _setting(100, "maximum number of validation cases per epoch, always the same ones")
    checkpoint_every: int = _setting(5, "epochs between two checkpoints; the best and the last are always saved")
    keep_checkpoints: int = _setting(2, "number of newest checkpoints to keep besides the best")
    seed: int = _setting(0, "seed of order, augmentation, dropout and random initialisation")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = _setting(
        "auto", "bf16 and fp16 use autocast; auto: bf16 if the processor supports it, else fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = _setting("auto", "auto: CUDA if available")
    workers: int | None = _setting(
        None,
        "processes that read the cases, each with limits on memory and time; none: one per processor, at most 8; 0: "
        "read in the main process, without limits",
    )
    micro_batch: int | None = _setting(
        None, "images that a rank computes at once, a divisor of its part of the batch, to save memory; none: all"
    )
    strategy: Literal["ddp", "fsdp"] = _setting(
        "ddp", "for several ranks: ddp replicates the model, fsdp shards weights, gradients and moments"
    )
    fused: bool = _setting(False, "run AdamW and --gema in one pass over the experts; results differ in rounding")
    timeout: float = _setting(600.0, "seconds that a rank waits for the others")

    @property
    def processes(self) -> int:
        """Number of processes that read the cases."""
        if self.workers is not None:
            return self.workers
        from dex.common.ranks import ranks_here  # Imports torch, so not at the top: `dex finetune --help` must be fast

        return max(1, min(8, cores() // ranks_here()))

    @property
    def wants_aux(self) -> bool:
        """Whether a step needs pretraining's losses or the gate mass."""
        return self.gema or self.align_weight > 0 or self.balance_weight > 0


PRESETS: dict[str, Settings] = {
    "paper": Settings(),
    "cpu": Settings(epochs=20, warmup_epochs=2.0, batch_size=8, feature_size=8, checkpoint_every=2, evaluate_cases=32),
}
"""cpu: takes minutes on two cores for a small run, and keeps everything that the supplement states but the warm-up."""
RUNTIME = frozenset(
    {
        "device",
        "checkpoint_every",
        "keep_checkpoints",
        "workers",
        "timeout",
        "micro_batch",
        "strategy",
        "fused",
    }
)
"""Settings that a resumed run may change: they affect results only by rounding, except that dropout is drawn per
micro-batch."""


def fields() -> list[dataclasses.Field[Any]]:
    return list(dataclasses.fields(Settings))


def kind_of(name: str) -> Any:
    """The annotation of a setting."""
    return typing.get_type_hints(Settings)[name]


def describe(field: "dataclasses.Field[Any]") -> str:
    """The sentence of ``--help``: the meaning, the default, and the origin of the default."""
    shown = "no" if field.default is False else "none" if field.default is None else f"{field.default}"
    origin = "" if field.name in RUNTIME else f", {STATED if field.metadata['stated'] else OURS}"
    return f"{field.metadata['help']} ({shown}{origin})"


def preset(name: str) -> Settings:
    """The settings of a preset, a name in ``PRESETS``. ValueError for another name."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def to_dict(settings: Settings) -> dict[str, Any]:
    return dataclasses.asdict(settings)


def from_dict(values: Any, base: Settings, source: str) -> Settings:
    """``base`` with the settings in ``values``. ValueError as from ``dex.common.fields.merge``."""
    return merge(base, values, source)


def differences(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """Changed setting -> (old, new), without those of ``RUNTIME``."""
    a, b = to_dict(old), to_dict(new)
    return {name: (a[name], b[name]) for name in a if a[name] != b[name] and name not in RUNTIME}


def check(settings: Settings) -> None:
    """ValueError naming the setting, what was expected and its value."""
    s = settings

    def require(valid: bool, name: str, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name}: expected {expected}, got {getattr(s, name)!r}")

    for name, value in to_dict(s).items():
        kind = kind_of(name)
        require(_is(value, kind), name, words(kind))
        require(not isinstance(value, float) or math.isfinite(value), name, "a finite number")
    for name in ("epochs", "batch_size", "feature_size", "lora_rank", "evaluate_cases", "checkpoint_every"):
        require(getattr(s, name) >= 1, name, "at least 1")
    require(s.keep_checkpoints >= 1, "keep_checkpoints", "at least 1")
    require(s.img_size is None or s.img_size >= 1, "img_size", "at least 1")
    require(s.micro_batch is None or s.micro_batch >= 1, "micro_batch", "at least 1")
    require(s.patience is None or s.patience >= 1, "patience", "at least 1")
    require(0 <= s.warmup_epochs < s.epochs, "warmup_epochs", f"at least 0 and less than the {s.epochs} epochs")
    require(0 < s.lr <= 1, "lr", "a number above 0, at most 1")
    require(0 <= s.weight_decay * s.lr < 1, "weight_decay", "at least 0, and less than 1 when multiplied by lr")
    require(0 <= s.dropout < 1, "dropout", "a share in [0, 1)")
    require(s.lora_alpha > 0, "lora_alpha", "above 0")
    require(0 <= s.momentum <= 1, "momentum", "a number in [0, 1]")
    for name in ("align_weight", "balance_weight"):
        require(getattr(s, name) >= 0, name, "at least 0")
    require(0 <= s.scale < 1, "scale", "a share in [0, 1)")
    require(0 <= s.shift < 1, "shift", "a share in [0, 1)")
    require(0 <= s.rotation <= 180, "rotation", "0 to 180 degrees")
    require(0 <= s.intensity < 1, "intensity", "a share in [0, 1)")
    require(s.clip_norm > 0, "clip_norm", "above 0")
    require(0 <= s.seed < 2**63, "seed", "at least 0, below 2^63")
    require(s.workers is None or 0 <= s.workers <= MOST_WORKERS, "workers", f"0 to {MOST_WORKERS}")
    require(s.timeout > 0, "timeout", "above 0")
    _check_together(s)


def _check_together(s: Settings) -> None:
    if s.wants_aux and (s.path != "experts" or s.mode != "full"):
        name = "gema" if s.gema else "align_weight" if s.align_weight else "balance_weight"
        raise ValueError(
            f"{name}: expected mode full and path experts, which train experts, got mode {s.mode}, path {s.path}"
        )


def _is(value: Any, kind: Any) -> bool:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return value in arguments
    return any(type(value) is k or (k is float and type(value) is int) for k in arguments or (kind,))
