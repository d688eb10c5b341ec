"""The arms of the study and the runs of each; see docs/study-plan.md, which was written first."""

from dataclasses import dataclass, field
from typing import Any

BASE: dict[str, dict[str, Any]] = {
    "model": {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
        "num_experts": 8,
        "top_k": 2,
        "decoder_embed_dim": 64,
        "decoder_depth": 2,
        "decoder_num_heads": 2,
        "norm_pix_loss": False,
    },
    "data": {"batch_size": 16},
    "optim": {"base_lr": 0.048, "betas": [0.9, 0.95]},
    "schedule": {"warmup": 0.1, "balance_weight": [0.1, 0.1]},
    "run": {"device": "cpu", "precision": "fp32", "evaluate_every": 0},
}
TINY: dict[str, dict[str, Any]] = {
    "model": {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_experts": 4, "decoder_embed_dim": 16}
    | {"decoder_depth": 1, "patch_size": 16},
    "data": {"batch_size": 4},
}
"""Changes that make a run take seconds, for tests."""
PUBLISHED = {"schedule": {"balance_weight": [0.01, 0.01]}}
"""Changes of the search's reference."""
K_WARMUP = 0.2
"""Share of a run in which each image takes `Arm.warm_k` experts."""


@dataclass(frozen=True)
class Arm:
    """A way to train, as changes to `BASE`."""

    name: str
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    routing: str = "image"
    """``"image"``, ``"token"``, or ``"random"``: router weights stay 0, and noise chooses."""
    upcycled: bool = False
    """Whether it starts from a dense MAE that was trained for as many steps with the same seed."""
    warm_k: int | None = None


@dataclass(frozen=True)
class Spec:
    """One run."""

    arm: Arm
    seed: int
    steps: int
    half: int | None = None
    """Half of the sources, 0 or 1; None: all sources."""
    tiny: bool = False

    @property
    def key(self) -> str:
        sources = "" if self.half is None else f", half {self.half}"
        return f"{self.arm.name}, {self.steps} steps, seed {self.seed}{sources}{', tiny' if self.tiny else ''}"


def read_spec(values: dict[str, Any]) -> Spec:
    """The `Spec` from its ``dataclasses.asdict``, read from JSON."""
    return Spec(**values | {"arm": Arm(**values["arm"])})


MONO = Arm("monolithic", {"model": {"num_experts": 0}})
CLS, MEAN = Arm("cls"), Arm("mean", {"model": {"route_from": "mean"}})
NORMALISED = {"model": {"norm_pix_loss": True}}


def joined(*changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Several changes merged; later ones win."""
    whole: dict[str, dict[str, Any]] = {}
    for change in changes:
        for section, values in change.items():
            whole[section] = whole.get(section, {}) | values
    return whole


def normalised(arm: Arm) -> Arm:
    return Arm(f"{arm.name}, normalised", joined(arm.changes, NORMALISED))


MAIN = (MONO, CLS, MEAN)
BALANCE = (
    Arm("balance 0", {"schedule": {"balance_weight": [0.0, 0.0]}}),
    Arm("balance 0.01", {"schedule": {"balance_weight": [0.01, 0.01]}}),
)
OTHERS = (
    Arm("upcycled", upcycled=True),
    Arm("monolithic, equal parameters", {"model": {"num_experts": 0, "top_k": 8}}),
    Arm("align 0", {"schedule": {"align_weight": 0.0}}),
    Arm("frozen director", {"schedule": {"momentum": [1.0, 1.0]}}),
    Arm("token-wise", routing="token"),
    Arm("random experts", {"schedule": {"noise_std": [1.0, 1.0]}}, routing="random"),
)


def study(steps: tuple[int, int] = (400, 1100), tiny: bool = False) -> list[Spec]:
    """All runs of the study, in the order of the plan."""
    short, long = steps
    specs = [
        Spec(arm, seed, short, tiny=tiny) for seed in range(5) for arm in (*MAIN, *(normalised(arm) for arm in MAIN))
    ]
    specs += [Spec(arm, seed, short, tiny=tiny) for seed in range(3) for arm in (*BALANCE, *OTHERS)]
    return specs + [Spec(arm, seed, long, tiny=tiny) for seed in range(3) for arm in MAIN]


def _candidate(name: str, changes: dict[str, dict[str, Any]], **more: Any) -> Arm:
    return Arm(name, joined(PUBLISHED, changes), **more)


REFERENCE = _candidate("published", {})
CANDIDATES: dict[str, list[Arm]] = {
    "routing input": [_candidate("mean token", MEAN.changes)],
    "balance": [_candidate(f"balance {w}", {"schedule": {"balance_weight": [w, w]}}) for w in (0.03, 0.1, 0.3)],
    "noise": [
        _candidate("noise 0.3", {"schedule": {"noise_std": [0.3, 0.0]}}),
        _candidate("no noise", {"schedule": {"noise_std": [0.0, 0.0]}}),
    ],
    "temperature": [_candidate(f"temperature {t}", {"model": {"temperature": t}}) for t in (0.25, 1.0)],
    "warm-up of K": [_candidate("K from 4", {}, warm_k=4)],
    "routers": [_candidate("routers as nn.Linear", {"model": {"router_init": "linear"}})],
    "align": [
        _candidate("no align", {"schedule": {"align_weight": 0.0}}),
        _candidate("align from 0", {"schedule": {"align_weight": [0.0, 0.01]}}),
    ],
    "micro-batches": [
        _candidate("parts of 4", {"parallel": {"micro_batch": 4}}),
        _candidate("batch in parts of 4", {"parallel": {"micro_batch": 4}, "model": {"balance_over": "batch"}}),
    ],
}
"""Kind of change -> candidates with one such change each."""
SEARCHED, CONFIRMED = (0, 1, 2), (10, 11, 12, 13, 14)
"""Seeds of the search and of the confirmation."""


def search(steps: int = 400, tiny: bool = False) -> list[Spec]:
    """The candidates and their reference, on the first half of the sources."""
    arms = [REFERENCE, *(arm for kind in CANDIDATES.values() for arm in kind)]
    return [Spec(arm, seed, steps, half=0, tiny=tiny) for seed in SEARCHED for arm in arms]


def combined(better: list[Arm]) -> Arm:
    """One candidate with all changes that helped: the best of each kind."""
    changes = [
        {
            section: {k: v for k, v in values.items() if REFERENCE.changes.get(section, {}).get(k) != v}
            for section, values in arm.changes.items()
        }
        for arm in better
    ]
    warm = next((arm.warm_k for arm in better if arm.warm_k), None)
    return Arm("combined", joined(REFERENCE.changes, *changes), warm_k=warm)


def confirmation(chosen: Arm, steps: tuple[int, int] = (400, 1100), tiny: bool = False) -> list[Spec]:
    """Runs on the second half of the sources, with seeds that the search has not used."""
    arms = (chosen, REFERENCE, MONO)
    return [Spec(arm, seed, s, half=1, tiny=tiny) for s in steps for seed in CONFIRMED for arm in arms]
