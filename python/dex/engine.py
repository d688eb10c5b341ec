"""The pretraining step, with everything that a run's next step depends on; no file is touched here.

Shape letters: B images, K chosen, E experts, M modalities, R held-out images shown, S image side.
"""

import base64
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dex import analysis, checkpoint
from dex.config import Config, check, per_layer, to_dict
from dex.data import Loader, SampleError, augment, center, denormalize, sample_keys
from dex.data.dataset import Dataset
from dex.model import MAEOutput, MaskedAutoencoder
from dex.schedules import schedule_at, step_seed, total_steps

_INIT = -1
"""The 'step' whose seed draws the initial weights."""
_EVALUATION_SEED = 0xE7A1
_LOSSES = ("loss", "total", "align_loss", "balance_loss", "grad_norm")
_SLOTS_TO_JUDGE = 100
"""Slots per expert of an even load that are awaited before an expert is called dead."""


class Evaluation(NamedTuple):
    """What `Trainer.evaluate` found on the held-out images."""

    loss: float
    modality_loss: dict[str, float]
    mass: list[Tensor]
    """Per layer float64 ``[M, E_l]``: gate mass that each modality gives to each expert. Empty when monolithic."""
    original: Tensor
    """float ``[R, 3, S, S]`` in [0, 1], one image after the other of different modalities; so are the next two."""
    masked: Tensor
    reconstruction: Tensor
    labels: list[str]


class NonFinite(NamedTuple):
    """A step that changed nothing because its loss, gate mass or gradient was not finite."""

    step: int
    """Steps done when it began."""
    loss: float
    grad_norm: float
    samples: list[str]
    """Ids of the images with a non-finite loss; the whole batch when only the gradient was non-finite."""


class _Verdict(NamedTuple):
    """What the host will read of one step: ``values`` is [good, loss, grad_norm, image losses]."""

    step: int
    ids: Sequence[str]
    values: Tensor
    ready: Any


def build_model(config: Config) -> MaskedAutoencoder:
    m = config.model
    return MaskedAutoencoder(
        m.img_size,
        m.patch_size,
        m.embed_dim,
        m.depth,
        m.num_heads,
        m.num_experts,
        m.top_k,
        m.decoder_embed_dim,
        m.decoder_depth,
        m.decoder_num_heads,
        mlp_ratio=m.mlp_ratio,
        norm_pix_loss=m.norm_pix_loss,
        backend=m.backend,
        align=m.align,
    )


def resolve_device(config: Config) -> torch.device:
    """ValueError when CUDA is asked for and absent."""
    wanted = config.run.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: expected a device that is there; got 'cuda', and torch finds no CUDA device")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_precision(config: Config, device: torch.device) -> str:
    """``auto`` becomes bf16 where the device multiplies bf16 in hardware: elsewhere it is slower than fp32."""
    if config.run.precision != "auto":
        return config.run.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"


class Trainer:
    """Model, optimizer, loader and counters of one run; nothing here knows of a folder.

    A step: forward, backward, verdict, GEMA, clip, AdamW. The verdict (loss, gate mass and gradient norm finite) is a
    0-dim tensor on the device, and with a bad one the same launches change nothing, so no step waits for its own
    verdict: the host reads it one step late on a GPU, at once on a CPU. Other things may still wait for the device:
    the plain-torch experts that a GPU uses today read the sizes of their groups on the host, in every layer.
    """

    def __init__(self, config: Config, dataset: Dataset, *, start_batch: int = 0):
        """``dataset``: all of it; training takes its split "train", evaluation "val". ValueError as in `check`."""
        check(config)
        self.config = config
        self.device = resolve_device(config)
        self.precision = resolve_precision(config, self.device)
        self.modalities = dataset.modalities
        self.fingerprint = dataset.fingerprint
        train, self._held_out_set = dataset.split("train"), dataset.split("val")
        if len(train) == 0:
            raise ValueError(f"data: expected images to train on; the training split of {dataset.name!r} is empty")
        self.loader = Loader(
            train,
            config.data.batch_size,
            seed=config.run.seed,
            temperature=config.data.temperature,
            num_workers=config.data.num_workers,
            start_batch=start_batch,
        )
        self.steps = total_steps(config, self.loader.batches_per_epoch)
        self.step = 0
        """Steps done."""
        torch.manual_seed(step_seed(config.run.seed, _INIT))
        self.model = build_model(config).to(self.device)
        self.named_parameters = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in self.named_parameters]
        o = config.optim
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.peak_lr, betas=o.betas, weight_decay=o.weight_decay, eps=o.eps, fused=True
        )
        # Read by the fused step: where found_inf is 1 it leaves weights, moments and step counters alone.
        self.optimizer.grad_scale = None
        depth, experts = config.model.depth, config.model.num_experts
        self.experts = [e for e in per_layer(experts, depth) if e]
        self.nonfinite_in_a_row = 0
        self.data_wait = 0.0
        """Seconds spent waiting for the loader since it was last set to 0."""
        self._pending: deque[_Verdict] = deque()
        self._held_out: tuple[Tensor, Tensor] | None = None
        self._window = self._new_window()
        self._slots = torch.zeros(sum(self.experts), dtype=torch.int64, device=self.device)
        self._unused: list[analysis.UnusedExperts] = [analysis.UnusedExperts((), ()) for _ in self.experts]

    @property
    def epoch(self) -> float:
        return self.step / self.loader.batches_per_epoch

    def train_step(self) -> list[NonFinite]:
        """One step; returns the non-finite ones among the steps whose verdict has arrived."""
        config = self.config
        values = schedule_at(config, self.step, self.steps)
        began = time.perf_counter()
        batch = next(self.loader)
        self.data_wait += time.perf_counter() - began

        torch.manual_seed(step_seed(config.run.seed, self.step))
        keys = sample_keys(config.run.seed, batch.places.to(self.device, non_blocking=True))
        images = augment(batch.images.to(self.device, non_blocking=True), config.model.img_size, keys)
        modality = batch.modality.to(self.device, non_blocking=True)
        self.model.train()
        with self._autocast():
            out = self.model(images, mask_ratio=config.model.mask_ratio, noise_std=values.noise_std)
        total = out.loss + values.align_weight * out.align_loss + values.balance_weight * out.balance_loss
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()

        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        good = torch.isfinite(torch.cat([total.detach()[None], grad_norm[None], *out.gate_mass])).all()
        self.model.update_directors(out.gate_mass, values.momentum, skip=~good)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, config.optim.clip_norm, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = values.lr
        self.optimizer.found_inf = (~good).float()
        self.optimizer.step()

        self._count(good, torch.stack([out.loss, total, out.align_loss, out.balance_loss, grad_norm]), out, modality)
        self._pending.append(self._send_verdict(batch.ids, good, out, grad_norm))
        self.step += 1
        return self._read_verdicts(keep=1 if self.device.type == "cuda" else 0)

    def flush(self) -> list[NonFinite]:
        """Wait for the verdicts still under way and return the non-finite steps among them."""
        return self._read_verdicts(keep=0)

    def row(self) -> dict[str, Any]:
        """Means over the steps since the last row, this step's schedule, the experts' load; waits for the device."""
        window = {name: tensor.tolist() for name, tensor in self._window.items()}
        self._window = self._new_window()
        good = window["good"]
        values = schedule_at(self.config, self.step - 1, self.steps)
        counts = self._slots_by_layer()
        return {
            "step": self.step,
            "epoch": self.epoch,
            **{name: value / good if good else None for name, value in zip(_LOSSES, window["sums"], strict=True)},
            "lr": values.lr,
            "momentum": values.momentum,
            "noise_std": values.noise_std,
            "balance_weight": values.balance_weight,
            "skipped": int(window["steps"] - good),
            "modality_loss": {
                name: loss / images
                for name, loss, images in zip(
                    self.modalities, window["modality_loss"], window["modality_images"], strict=True
                )
                if images
            },
            "usage_entropy": [analysis.usage_entropy(c) for c in counts],
            "usage_min_share": [analysis.min_share(c) for c in counts],
        }

    def newly_unused(self) -> list[tuple[int, analysis.UnusedExperts]]:
        """(layer, its unused experts) where that changed for the worse since the last judgement.

        Judges only once enough slots were given out to tell, and then begins to count anew.
        """
        counts = self._slots_by_layer()
        if not counts or any(c.sum() < _SLOTS_TO_JUDGE * c.numel() for c in counts):
            return []
        self._slots.zero_()
        before, self._unused = self._unused, [analysis.unused_experts(c) for c in counts]
        return [
            (layer, new)
            for layer, (old, new) in enumerate(zip(before, self._unused, strict=True))
            if set(new.dead) - set(old.dead) or set(new.nearly_dead) - set(old.dead) - set(old.nearly_dead)
        ]

    @torch.no_grad()
    def evaluate(self, pictures: int = 16) -> Evaluation | None:
        """Masked loss and expert use on the held-out images, always the same images and masks; None without any.

        Changes neither the model nor what training will draw: every step seeds its own random numbers.
        """
        if self._held_out is None:
            self._held_out = self._read_held_out()
        images_u8, modality = self._held_out
        if len(images_u8) == 0:
            return None
        names, size = self.modalities, self.config.model.img_size
        loss = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        mass = [torch.zeros(len(names), e, dtype=torch.float64, device=self.device) for e in self.experts]
        shown: list[tuple[Tensor, Tensor, Tensor]] = []
        chunk = min(self.config.data.batch_size, 64)
        self.model.eval()
        for i, begin in enumerate(range(0, len(images_u8), chunk)):
            torch.manual_seed(step_seed(_EVALUATION_SEED, i))
            images = center(images_u8[begin : begin + chunk].to(self.device), size)
            kinds = modality[begin : begin + chunk].to(self.device)
            with self._autocast():
                out = self.model(images, mask_ratio=self.config.model.mask_ratio)
            loss += analysis.one_hot(kinds, len(names)).T @ out.image_loss.double()
            for layer, (gates, indices) in enumerate(zip(out.gates, out.expert_indices, strict=True)):
                mass[layer] += analysis.expert_by_modality(gates, indices, kinds, self.experts[layer], len(names))
            if begin < pictures:
                n = pictures - begin
                rebuilt = self.model.reconstruct(images, out)
                shown.append((images[:n], self._hidden(images[:n], out.mask[:n]), rebuilt[:n]))
        self.model.train()
        counts = torch.bincount(modality, minlength=len(names))
        loss = loss.cpu()
        original, masked, reconstruction = (torch.cat(parts) for parts in zip(*shown, strict=True))
        masked = torch.where(masked.isnan(), 0.5, denormalize(masked))
        return Evaluation(
            float(loss.sum() / counts.sum()),
            {name: float(loss[m] / counts[m]) for m, name in enumerate(names) if counts[m]},
            [m.cpu() for m in mass],
            denormalize(original).cpu(),
            masked.cpu(),
            denormalize(reconstruction).cpu(),
            [names[m] for m in modality[: len(original)].tolist()],
        )

    def state(self) -> dict[str, Any]:
        """Everything but weights and moments that the next step depends on, as JSON; wait for verdicts first."""
        return {
            "step": self.step,
            "steps": self.steps,
            "config": to_dict(self.config),
            "precision": self.precision,
            "data_fingerprint": self.fingerprint,
            "data_position": self.loader.position,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "window": {name: tensor.tolist() for name, tensor in self._window.items()},
            "slots": self._slots.tolist(),
            "unused": [list(map(list, u)) for u in self._unused],
            "rng": {
                "cpu": _encode(torch.get_rng_state()),
                "cuda": _encode(torch.cuda.get_rng_state(self.device)) if self.device.type == "cuda" else None,
            },
        }

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from ``saved``, a checkpoint of this run; `dex.pretrain` refuses another run's."""
        checkpoint.restore(saved, self.model, self.optimizer)
        state = saved.state
        self.step = state["step"]
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
        for name, tensor in self._window.items():
            tensor.copy_(torch.tensor(state["window"][name], dtype=tensor.dtype))
        self._slots.copy_(torch.tensor(state["slots"], dtype=torch.int64))
        self._unused = [analysis.UnusedExperts(tuple(dead), tuple(nearly)) for dead, nearly in state["unused"]]
        torch.set_rng_state(_decode(state["rng"]["cpu"]))
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(_decode(state["rng"]["cuda"]), self.device)

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _new_window(self) -> dict[str, Tensor]:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self.device)

        kinds = len(self.modalities)
        return {
            "steps": zeros(),
            "good": zeros(),
            "sums": zeros(len(_LOSSES)),
            "modality_loss": zeros(kinds),
            "modality_images": zeros(kinds),
        }

    @torch.no_grad()
    def _count(self, good: Tensor, losses: Tensor, out: MAEOutput, modality: Tensor) -> None:
        kinds = analysis.one_hot(modality, len(self.modalities))
        window = self._window
        window["steps"] += 1
        window["good"] += good
        for name, value in (
            ("sums", losses.double()),
            ("modality_loss", kinds.T @ out.image_loss.double()),
            ("modality_images", kinds.sum(0)),
        ):
            window[name] += torch.where(good, value, 0.0)
        first = 0
        for indices, experts in zip(out.expert_indices, self.experts, strict=True):
            taken = indices.flatten().long() + first
            self._slots.index_add_(0, taken, good.long().expand(len(taken)))
            first += experts

    def _slots_by_layer(self) -> list[Tensor]:
        return list(self._slots.to("cpu", copy=True).split(self.experts)) if self.experts else []

    def _send_verdict(self, ids: Sequence[str], good: Tensor, out: MAEOutput, grad_norm: Tensor) -> _Verdict:
        head = torch.stack([good.float(), out.loss.detach().float(), grad_norm.float()])
        values = torch.cat([head, out.image_loss.float()])
        if self.device.type != "cuda":
            return _Verdict(self.step, ids, values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return _Verdict(self.step, ids, host, ready)

    def _read_verdicts(self, keep: int) -> list[NonFinite]:
        bad = []
        while len(self._pending) > keep:
            step, ids, values, ready = self._pending.popleft()
            if ready is not None:
                ready.synchronize()
            if values[0]:
                self.nonfinite_in_a_row = 0
                continue
            self.nonfinite_in_a_row += 1
            guilty = [i for i, finite in zip(ids, torch.isfinite(values[3:]).tolist(), strict=True) if not finite]
            bad.append(NonFinite(step, float(values[1]), float(values[2]), guilty or list(ids)))
        return bad

    def _read_held_out(self) -> tuple[Tensor, Tensor]:
        """Up to ``run.evaluate_images`` held-out images, uint8, and their modalities, which take turns."""
        dataset, wanted = self._held_out_set, self.config.run.evaluate_images
        kinds = torch.as_tensor(dataset.modality_index())
        present = kinds.unique().tolist()
        order = []
        for m in present:
            mine = torch.nonzero(kinds == m).flatten()
            # Spread over the modality: neighbours may be slices of one volume.
            count = min(len(mine), -(-wanted // len(present)))
            order += [(turn, m, int(mine[turn * len(mine) // count])) for turn in range(count)]
        images, modality = [], []
        for _, m, index in sorted(order)[:wanted]:
            with contextlib.suppress(SampleError):  # one that cannot be read is left out
                images.append(dataset[index].image)
                modality.append(m)
        if not images:
            return torch.zeros(0, 3, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
        return torch.stack(images), torch.tensor(modality)

    def _hidden(self, images: Tensor, mask: Tensor) -> Tensor:
        """``images`` with NaN where a patch is hidden."""
        grid = self.config.model.img_size // self.config.model.patch_size
        hidden = mask.reshape(-1, 1, grid, grid).repeat_interleave(self.config.model.patch_size, 2)
        return images.masked_fill(hidden.repeat_interleave(self.config.model.patch_size, 3) == 1, float("nan"))


def _encode(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
