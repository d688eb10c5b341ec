"""What a model makes of held-out images: losses, use of experts, a probe, pictures; nothing of training is changed.

Shape letters: B images, E experts, M modalities, R held-out images shown, S image side.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dex.analysis.probe import director_distance, knn_accuracy
from dex.analysis.sample import Sample, spread_out
from dex.analysis.usage import expert_by_modality, gate_entropy, one_hot
from dex.common.random import step_seed
from dex.common.ranks import ALONE, Ranks, gather
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

    images: int
    """Held-out images that the other fields are of."""
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
    """precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)


class Evaluator:
    """Evaluates ``model`` on up to ``run.evaluate_images`` images of ``held_out``, always the same ones.

    ``train``: the probe knows four times as many of these. Each of several ranks computes its part, all get the whole:
    what one rank alone finds, but for the order of sums.
    """

    def __init__(
        self,
        config: Config,
        model: MaskedAutoencoder,
        train: Dataset,
        held_out: Dataset,
        device: torch.device,
        precision: str,
        ranks: Ranks = ALONE,
    ):
        self.ranks = ranks
        self.config, self.model, self.train, self.held_out = config, model, train, held_out
        self.device, self.precision, self.modalities = device, precision, held_out.modalities
        self.experts = [e for e in per_layer(config.model.num_experts, config.model.depth) if e]
        self._held_out: Sample | None = None
        self._known: Sample | None = None

    @torch.no_grad()
    def evaluate(self, pictures: int = 16, probe: bool = True) -> Evaluation | None:
        """Masked loss and expert use on the held-out images, always the same images and masks; None without any.

        pictures: how many images are shown. probe: False leaves out the kNN probe. All ranks ask. Changes neither the
        model nor what training will draw: every step seeds its own random numbers.
        """
        # Low-precision copies of the experts are made once. With fsdp they would undo what it saves.
        held = hold_weights(self.model) if self.config.parallel.strategy == "ddp" else contextlib.nullcontext()
        with held:
            return self._evaluate(pictures, probe)

    def _evaluate(self, pictures: int, probe: bool) -> Evaluation | None:
        if self._held_out is None:
            self._held_out = self._sample(self.held_out, self.config.run.evaluate_images)
        held_out = self._held_out
        count = len(held_out.images)
        if count == 0:
            return None
        names, size = self.modalities, self.config.model.img_size
        loss = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        mass = [torch.zeros(len(names), e, dtype=torch.float64, device=self.device) for e in self.experts]
        entropy = torch.zeros(len(self.experts), dtype=torch.float64, device=self.device)
        shown = center(held_out.images[:pictures].to(self.device), size)
        reconstruction = torch.zeros_like(shown)
        hidden = torch.zeros(len(shown), (size // self.config.model.patch_size) ** 2, device=self.device)
        self.model.eval()
        for turn in self._turns(count):
            torch.manual_seed(step_seed(_SEED, turn.number))
            images = center(held_out.images[turn.part].to(self.device), size)
            kinds = held_out.modality[turn.part].to(self.device)
            with autocast(self.device, self.precision):
                out = self.model(images, mask_ratio=self.config.model.mask_ratio)
            if not turn.counts:
                continue
            loss += one_hot(kinds, len(names)).T @ out.image_loss.double()
            for layer, (gates, indices) in enumerate(zip(out.gates, out.expert_indices, strict=True)):
                mass[layer] += expert_by_modality(gates, indices, kinds, self.experts[layer], len(names))
                entropy[layer] += len(gates) * gate_entropy(gates)
            if (n := len(shown) - turn.part.start) > 0:
                reconstruction[turn.part] = self.model.reconstruct(images, out)[:n]
                hidden[turn.part] = out.mask[:n].float()
        self.model.train()
        for tensor in (loss, *mass, entropy, reconstruction, hidden):
            self._add_up(tensor)
        counts = torch.bincount(held_out.modality, minlength=len(names))
        loss = loss.cpu()
        return Evaluation(
            images=count,
            loss=float(loss.sum() / counts.sum()),
            modality_loss={name: float(loss[m] / counts[m]) for m, name in enumerate(names) if counts[m]},
            mass=[m.cpu() for m in mass],
            probe=self._probe(held_out) if probe else None,
            gate_entropy=(entropy / count).tolist(),
            director_distance=director_distance(self.model),
            original=denormalize(shown).cpu(),
            masked=torch.where(self._pixels(hidden), 0.5, denormalize(shown)).cpu(),
            reconstruction=denormalize(reconstruction).cpu(),
            labels=[names[m] for m in held_out.modality[: len(shown)].tolist()],
        )

    def _probe(self, held_out: Sample) -> float | None:
        """Accuracy of a kNN probe of the modality, by CLS tokens of whole images: held-out ones among training ones."""
        if self._known is None:
            self._known = self._sample(self.train, _KNOWN * self.config.run.evaluate_images)
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
        size = self.config.model.img_size
        tokens = torch.zeros(len(images), self.config.model.embed_dim, device=self.device)
        self.model.eval()
        for turn in self._turns(len(images)):
            with autocast(self.device, self.precision):
                found = self.model(center(images[turn.part].to(self.device), size), mask_ratio=0.0).cls.float()
            if turn.counts:
                tokens[turn.part] = found
        self.model.train()
        self._add_up(tokens)
        return tokens

    def _pixels(self, patches: Tensor) -> Tensor:
        """bool ``[R, 1, S, S]`` of ``[R, L]``: whether a pixel's patch is 1."""
        side = self.config.model.patch_size
        grid = self.config.model.img_size // side
        return (patches.reshape(-1, 1, grid, grid).repeat_interleave(side, 2).repeat_interleave(side, 3)) == 1

    def _sample(self, dataset: Dataset, wanted: int) -> Sample:
        """`spread_out`. RuntimeError when the ranks could not read the same images."""
        sample = spread_out(dataset, wanted)
        counts = gather(self.ranks, len(sample.images))
        if len(set(counts)) > 1:
            listed = ", ".join(map(str, counts))
            raise RuntimeError(f"evaluation: expected the same images on every rank; of {wanted} they read {listed}")
        return sample

    def _turns(self, count: int) -> Iterator["_Turn"]:
        """The parts of ``count`` images that this rank computes.

        With fsdp all ranks take part in every forward: where images are left for some, the others repeat the first.
        """
        chunk, ranks = min(self.config.data.batch_size, 64), self.ranks
        chunks = -(-count // chunk)
        for number in range(ranks.rank, -(-chunks // ranks.world_size) * ranks.world_size, ranks.world_size):
            counts = number < chunks
            if counts or self.config.parallel.strategy == "fsdp":
                begin = number * chunk if counts else 0
                yield _Turn(number, slice(begin, min(begin + chunk, count)), counts)

    def _add_up(self, tensor: Tensor) -> None:
        """Sum over the ranks, in place."""
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(tensor)


class _Turn(NamedTuple):
    """Images of one forward."""

    number: int
    """Of the part; it seeds the masks."""
    part: slice
    counts: bool
