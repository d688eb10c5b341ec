"""What a model makes of held-out images: losses, use of experts, a probe, pictures; nothing of training is changed.

Shape letters: B images, E experts, M modalities, R held-out images shown, S image side.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis.probe import director_distance, knn_accuracy
from dex.analysis.sample import Sample, spread_out
from dex.analysis.usage import expert_by_modality, gate_entropy, one_hot
from dex.common.random import step_seed
from dex.config import Config, per_layer
from dex.data import center, denormalize
from dex.data.dataset import Dataset
from dex.model import MaskedAutoencoder
from dexkernels import hold_weights

_SEED = 0xE7A1
_KNOWN = 4
"""Training images that the probe knows, for every held-out one."""


class Evaluation(NamedTuple):
    """What `Trainer.evaluate` found on the held-out images."""

    loss: float
    modality_loss: dict[str, float]
    mass: list[Tensor]
    """Per layer float64 ``[M, E_l]``: gate mass that each modality gives to each expert. Empty when monolithic."""
    probe: float | None
    """Share of the held-out images whose modality a kNN probe tells; None with a single modality."""
    gate_entropy: list[float]
    """Per layer, without exploration noise; see `dex.analysis.usage.gate_entropy`."""
    director_distance: list[float]
    """Per layer; see `dex.analysis.probe.director_distance`."""
    original: Tensor
    """float ``[R, 3, S, S]`` in [0, 1], one image after the other of different modalities; so are the next two."""
    masked: Tensor
    reconstruction: Tensor
    labels: list[str]


class _Pictures(NamedTuple):
    """What is shown of a batch; float ``[R, 3, S, S]`` each, as the model sees and gives images."""

    original: Tensor
    masked: Tensor
    """NaN where a patch is hidden."""
    reconstruction: Tensor


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class Evaluator:
    """Evaluates ``model`` on up to ``run.evaluate_images`` images of ``held_out``, always the same ones.

    ``train``: the probe knows four times as many of these.
    """

    def __init__(
        self,
        config: Config,
        model: MaskedAutoencoder,
        train: Dataset,
        held_out: Dataset,
        device: torch.device,
        precision: str,
    ):
        self.config, self.model, self.train, self.held_out = config, model, train, held_out
        self.device, self.precision, self.modalities = device, precision, held_out.modalities
        self.experts = [e for e in per_layer(config.model.num_experts, config.model.depth) if e]
        self._held_out: Sample | None = None
        self._known: Sample | None = None

    @torch.no_grad()
    def evaluate(self, pictures: int = 16) -> Evaluation | None:
        """Masked loss and expert use on the held-out images, always the same images and masks; None without any.

        Changes neither the model nor what training will draw: every step seeds its own random numbers.
        """
        # Low-precision copies of the experts are made once. With fsdp they would undo what it saves.
        held = hold_weights(self.model) if self.config.parallel.strategy == "ddp" else contextlib.nullcontext()
        with held:
            return self._evaluate(pictures)

    def _evaluate(self, pictures: int) -> Evaluation | None:
        wanted = self.config.run.evaluate_images
        if self._held_out is None:
            self._held_out = spread_out(self.held_out, wanted)
        held_out = self._held_out
        if len(held_out.images) == 0:
            return None
        names, size = self.modalities, self.config.model.img_size
        loss = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        mass = [torch.zeros(len(names), e, dtype=torch.float64, device=self.device) for e in self.experts]
        entropy = torch.zeros(len(self.experts), dtype=torch.float64, device=self.device)
        shown: list[_Pictures] = []
        chunk = min(self.config.data.batch_size, 64)
        self.model.eval()
        for i, begin in enumerate(range(0, len(held_out.images), chunk)):
            torch.manual_seed(step_seed(_SEED, i))
            images = center(held_out.images[begin : begin + chunk].to(self.device), size)
            kinds = held_out.modality[begin : begin + chunk].to(self.device)
            with autocast(self.device, self.precision):
                out = self.model(images, mask_ratio=self.config.model.mask_ratio)
            loss += one_hot(kinds, len(names)).T @ out.image_loss.double()
            for layer, (gates, indices) in enumerate(zip(out.gates, out.expert_indices, strict=True)):
                mass[layer] += expert_by_modality(gates, indices, kinds, self.experts[layer], len(names))
                entropy[layer] += len(gates) * gate_entropy(gates)
            if begin < pictures:
                n = pictures - begin
                reconstruction = self.model.reconstruct(images, out)[:n]
                shown.append(_Pictures(images[:n], self._hide(images[:n], out.mask[:n]), reconstruction))
        self.model.train()
        counts = torch.bincount(held_out.modality, minlength=len(names))
        loss = loss.cpu()
        drawn = _Pictures(*(torch.cat(parts) for parts in zip(*shown, strict=True)))
        return Evaluation(
            loss=float(loss.sum() / counts.sum()),
            modality_loss={name: float(loss[m] / counts[m]) for m, name in enumerate(names) if counts[m]},
            mass=[m.cpu() for m in mass],
            probe=self._probe(held_out),
            gate_entropy=(entropy / len(held_out.images)).tolist(),
            director_distance=director_distance(self.model),
            original=denormalize(drawn.original).cpu(),
            masked=torch.where(drawn.masked.isnan(), 0.5, denormalize(drawn.masked)).cpu(),
            reconstruction=denormalize(drawn.reconstruction).cpu(),
            labels=[names[m] for m in held_out.modality[: len(drawn.original)].tolist()],
        )

    def _probe(self, held_out: Sample) -> float | None:
        """Accuracy of a kNN probe of the modality, by CLS tokens of whole images: held-out ones among training ones."""
        if self._known is None:
            self._known = spread_out(self.train, _KNOWN * self.config.run.evaluate_images)
        known = self._known
        kinds = len(known.modality.unique())
        if kinds < 2:
            return None
        return knn_accuracy(
            self._tokens(known.images),
            known.modality.to(self.device),
            self._tokens(held_out.images),
            held_out.modality.to(self.device),
            # A modality needs enough known images to win a vote of k.
            k=min(20, max(1, len(known.images) // kinds // 2)),
        ).accuracy

    def _tokens(self, images: Tensor) -> Tensor:
        """CLS tokens ``[B, D]`` of whole images, uint8 on the host."""
        chunk, size = min(self.config.data.batch_size, 64), self.config.model.img_size
        self.model.eval()
        tokens = []
        for part in images.split(chunk):
            with autocast(self.device, self.precision):
                tokens.append(self.model(center(part.to(self.device), size), mask_ratio=0.0).cls.float())
        self.model.train()
        return torch.cat(tokens)

    def _hide(self, images: Tensor, mask: Tensor) -> Tensor:
        """``images`` with NaN where a patch is hidden."""
        grid = self.config.model.img_size // self.config.model.patch_size
        hidden = mask.reshape(-1, 1, grid, grid).repeat_interleave(self.config.model.patch_size, 2)
        return images.masked_fill(hidden.repeat_interleave(self.config.model.patch_size, 3) == 1, float("nan"))
