"""What a model makes of held-out images: losses, use of experts, a probe, pictures; nothing of training is changed.

Shape letters: B images, E experts, M modalities, R held-out images shown, S image side.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis import usage as analysis
from dex.analysis.probe import director_distance, knn_accuracy
from dex.common.random import step_seed
from dex.config import Config, per_layer
from dex.data import SampleError, center, denormalize
from dex.data.dataset import Dataset
from dex.model import MaskedAutoencoder

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
        self._held_out: tuple[Tensor, Tensor] | None = None
        self._known: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def evaluate(self, pictures: int = 16) -> Evaluation | None:
        """Masked loss and expert use on the held-out images, always the same images and masks; None without any.

        Changes neither the model nor what training will draw: every step seeds its own random numbers.
        """
        wanted = self.config.run.evaluate_images
        if self._held_out is None:
            self._held_out = _spread_out(self.held_out, wanted)
        images_u8, modality = self._held_out
        if len(images_u8) == 0:
            return None
        names, size = self.modalities, self.config.model.img_size
        loss = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        mass = [torch.zeros(len(names), e, dtype=torch.float64, device=self.device) for e in self.experts]
        entropy = torch.zeros(len(self.experts), dtype=torch.float64, device=self.device)
        shown: list[tuple[Tensor, Tensor, Tensor]] = []
        chunk = min(self.config.data.batch_size, 64)
        self.model.eval()
        for i, begin in enumerate(range(0, len(images_u8), chunk)):
            torch.manual_seed(step_seed(_SEED, i))
            images = center(images_u8[begin : begin + chunk].to(self.device), size)
            kinds = modality[begin : begin + chunk].to(self.device)
            with autocast(self.device, self.precision):
                out = self.model(images, mask_ratio=self.config.model.mask_ratio)
            loss += analysis.one_hot(kinds, len(names)).T @ out.image_loss.double()
            for layer, (gates, indices) in enumerate(zip(out.gates, out.expert_indices, strict=True)):
                mass[layer] += analysis.expert_by_modality(gates, indices, kinds, self.experts[layer], len(names))
                entropy[layer] += len(gates) * analysis.gate_entropy(gates)
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
            self._probe(images_u8, modality),
            (entropy / len(images_u8)).tolist(),
            director_distance(self.model),
            denormalize(original).cpu(),
            masked.cpu(),
            denormalize(reconstruction).cpu(),
            [names[m] for m in modality[: len(original)].tolist()],
        )

    def _probe(self, images: Tensor, modality: Tensor) -> float | None:
        """Accuracy of a kNN probe of the modality, by CLS tokens of whole images: held-out ones among training ones."""
        if self._known is None:
            self._known = _spread_out(self.train, _KNOWN * self.config.run.evaluate_images)
        kinds = len(self._known[1].unique())
        if kinds < 2:
            return None
        known, known_modality = self._known
        first, second = self._tokens(known), self._tokens(images)
        # A modality needs enough known images to win a vote of k.
        k = min(20, max(1, len(known) // kinds // 2))
        return knn_accuracy(first, known_modality.to(self.device), second, modality.to(self.device), k=k).accuracy

    def _tokens(self, images: Tensor) -> Tensor:
        """CLS tokens ``[B, D]`` of whole images, uint8 on the host."""
        chunk, size = min(self.config.data.batch_size, 64), self.config.model.img_size
        self.model.eval()
        found = []
        for part in images.split(chunk):
            with autocast(self.device, self.precision):
                found.append(self.model(center(part.to(self.device), size), mask_ratio=0.0).cls.float())
        self.model.train()
        return torch.cat(found)

    def _hidden(self, images: Tensor, mask: Tensor) -> Tensor:
        """``images`` with NaN where a patch is hidden."""
        grid = self.config.model.img_size // self.config.model.patch_size
        hidden = mask.reshape(-1, 1, grid, grid).repeat_interleave(self.config.model.patch_size, 2)
        return images.masked_fill(hidden.repeat_interleave(self.config.model.patch_size, 3) == 1, float("nan"))


def _spread_out(dataset: Dataset, wanted: int) -> tuple[Tensor, Tensor]:
    """Up to ``wanted`` images, uint8, and their modalities, which take turns; always the same ones."""
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
