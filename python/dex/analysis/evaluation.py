"""Evaluation on held-out images during training: losses, use of experts, a probe, pictures.

Shape letters: B images, D width, E experts, K chosen, L patches, M modalities, R held-out images shown, S image side.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dex.analysis import source_probe
from dex.analysis.instruments import Instruments, Probed, Seen, Sizes, Whole, linear_probe, measure, sizes
from dex.analysis.intervals import Interval
from dex.analysis.probe import director_distance, knn_accuracy
from dex.analysis.routes import Masked, Override, Routes, masked_forward, watched
from dex.analysis.sample import Groups, Sample, groups, spread_out
from dex.analysis.usage import expert_by_modality, gate_entropy, one_hot
from dex.common.random import step_seed
from dex.common.ranks import ALONE, Ranks, gather
from dex.config import Config, per_layer
from dex.data import center, denormalize
from dex.data.dataset import Dataset
from dex.model import MaskedAutoencoder
from dexkernels import hold_weights

_SEED = 0xE7A1


class Evaluation(NamedTuple):
    """Results on the held-out images."""

    images: int
    """Number of held-out images."""
    loss: float
    """Mean masked loss."""
    modality_loss: dict[str, float]
    mass: list[Tensor]
    """Per layer float64 ``[M, E_l]``: gate mass that each modality gives to each expert. Empty when monolithic."""
    probe: float | None
    """Share of the held-out images whose modality a kNN probe predicts; None with a single modality."""
    gate_entropy: list[float]
    """Per layer, without exploration noise; see ``dex.analysis.usage.gate_entropy``."""
    director_distance: list[float]
    """Per layer; see ``dex.analysis.probe.director_distance``."""
    original: Tensor
    """float ``[R, 3, S, S]`` in [0, 1], images of alternating modalities."""
    masked: Tensor
    """As ``original``, with removed patches in grey."""
    reconstruction: Tensor
    """As ``original``."""
    labels: list[str]
    """Modalities of the images shown."""
    groups: int
    """Number of sources (patients, images) that the instruments' intervals are over."""
    instruments: Instruments | None
    """Measures of specialisation; None unless requested."""


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """torch.autocast for ``precision``: ``"fp32"``, ``"bf16"`` or ``"fp16"``."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)


class Evaluator:
    """Evaluates ``model`` on up to ``run.evaluate_images`` images of ``held_out``, always the same ones.

    dataset: the whole set with the splits ``train`` and ``held_out``; gives the sources. steps: length of the run, from
    which ``dex.analysis.instruments.sizes`` computes how many images the instruments use. Each rank computes its part,
    and all get the complete result, which equals that of one rank except for the order of sums.
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
        *,
        dataset: Dataset | None = None,
        steps: int = 0,
    ):
        self.ranks = ranks
        self.config: Config = config
        self.model: MaskedAutoencoder = model
        self.train: Dataset = train
        self.held_out: Dataset = held_out
        self.dataset: Dataset = held_out if dataset is None else dataset
        self.device: torch.device = device
        self.precision: str = precision
        self.modalities: tuple[str, ...] = held_out.modalities
        self.experts: list[int] = [e for e in per_layer(config.model.num_experts, config.model.depth) if e]
        self.chosen: tuple[int, ...] = per_layer(config.model.top_k, config.model.depth) if self.experts else ()
        self.steps = steps

    @functools.cached_property
    def _images(self) -> Sample:
        return self._sample(self.held_out, self.config.run.evaluate_images)

    @functools.cached_property
    def sizes(self) -> Sizes:
        return sizes(self.config, self.steps, len(self._images.images))

    @functools.cached_property
    def _known(self) -> Sample:
        return self._sample(self.train, self.sizes.known)

    @functools.cached_property
    def _groups(self) -> tuple[Groups, Tensor]:
        """Groups of the held-out images, and of all probed images: first held-out, then known."""
        held_out = groups(self.dataset, self._images.ids)
        return held_out, groups(self.dataset, self._images.ids + self._known.ids).of

    @functools.cached_property
    def _pixels_probe(self) -> Interval | None:
        """The probe of pixels, which is the same at every step."""
        pixels = source_probe.pixels(torch.cat([self._images.images, self._known.images]))
        return linear_probe(Probed(pixels, self._probed_modality, self._groups[1]))

    @property
    def _probed_modality(self) -> Tensor:
        return torch.cat([self._images.modality, self._known.modality])

    @torch.no_grad()
    def evaluate(self, pictures: int = 16, probe: bool = True) -> Evaluation | None:
        """Masked loss and use of experts on the held-out images, always with the same masks; None without images.

        pictures: number of images shown. probe: False leaves out probes and instruments. All ranks call it. It changes
        neither the model nor the random numbers of training, since every step seeds its own.
        """
        # Make low-precision copies of the experts only once; with fsdp the copies would use the memory that it saves.
        hold = hold_weights(self.model) if self.config.parallel.strategy == "ddp" else contextlib.nullcontext()
        with hold:
            return self._evaluate(pictures, probe)

    def _evaluate(self, pictures: int, probe: bool) -> Evaluation | None:
        held_out = self._images
        count = len(held_out.images)
        if count == 0:
            return None
        names, patches = self.modalities, self.model.encoder.patches
        loss = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        mass = [torch.zeros(len(names), e, dtype=torch.float64, device=self.device) for e in self.experts]
        entropy = torch.zeros(len(self.experts), dtype=torch.float64, device=self.device)
        shown = self._centred(held_out.images[:pictures])
        reconstruction = torch.zeros_like(shown)
        hidden = torch.zeros(len(shown), patches, device=self.device)
        noise = torch.zeros(count, patches, device=self.device)
        seen = self._zeros(count)
        self.model.eval()
        for turn in self._turns(count):
            torch.manual_seed(step_seed(_SEED, turn.number))
            images = self._centred(held_out.images[turn.part])
            modality = held_out.modality[turn.part].to(self.device)
            mask_noise = torch.rand(len(images), patches, device=self.device)
            with autocast(self.device, self.precision), self._probabilities() as probabilities:
                out = self.model(images, mask_ratio=self.config.model.mask_ratio, mask_noise=mask_noise)
            if not turn.counts:
                continue
            noise[turn.part] = mask_noise
            loss += one_hot(modality, len(names)).T @ out.image_loss.double()
            for layer, (gates, indices) in enumerate(zip(out.gates, out.expert_indices, strict=True)):
                mass[layer] += expert_by_modality(gates, indices, modality, self.experts[layer], len(names))
                entropy[layer] += len(gates) * gate_entropy(gates)
            _fill(seen.loss, turn.part, out.image_loss)
            _fill(seen.cls, turn.part, out.cls)
            routes = (out.gates, out.expert_indices, probabilities)
            for field, field_of_part in zip(seen.routes, routes, strict=True):
                for layer, layer_of_part in zip(field, field_of_part, strict=True):
                    _fill(layer, turn.part, layer_of_part)
            if (n := len(shown) - turn.part.start) > 0:
                reconstruction[turn.part] = self.model.reconstruct(images, out)[:n]
                hidden[turn.part] = out.mask[:n].float()
        self.model.train()
        for tensor in (loss, *mass, entropy, reconstruction, hidden, seen.loss, seen.cls, *sum(seen.routes, [])):
            self._add_up(tensor)
        counts = torch.bincount(held_out.modality, minlength=len(names))
        loss = loss.cpu()
        accuracy, instruments = self._probe(seen, noise) if probe else (None, None)
        return Evaluation(
            images=count,
            loss=float(loss.sum() / counts.sum()),
            modality_loss={name: float(loss[m] / counts[m]) for m, name in enumerate(names) if counts[m]},
            mass=[m.cpu() for m in mass],
            probe=accuracy,
            gate_entropy=(entropy / count).tolist(),
            director_distance=director_distance(self.model),
            original=_coloured(shown),
            masked=torch.where(self._pixels(hidden).cpu(), 0.5, _coloured(shown)),
            reconstruction=_coloured(reconstruction),
            labels=[names[m] for m in held_out.modality[: len(shown)].tolist()],
            groups=len(self._groups[0].of[: self.sizes.swapped].unique()) if probe else 0,
            instruments=instruments,
        )

    def _zeros(self, count: int) -> Masked:
        """Results of ``count`` images as zeros; each rank fills its part."""

        def zeros(width: int | None = None) -> Tensor:
            return torch.zeros(count if width is None else (count, width), device=self.device)

        gates, experts = [zeros(k) for k in self.chosen], [zeros(k).int() for k in self.chosen]
        return Masked(zeros(), Routes(gates, experts, [zeros(e) for e in self.experts]), zeros(self._width))

    @property
    def _width(self) -> int:
        return self.config.model.embed_dim

    def _probabilities(self) -> contextlib.AbstractContextManager[list[Tensor]]:
        """Context in which forwards append each layer's probabilities to a list."""
        layers = self.model.encoder.dex_layers
        return watched(layers, [None] * len(layers))

    def _probe(self, seen: Masked, noise: Tensor) -> tuple[float | None, Instruments]:
        """Accuracy of a kNN probe of the modality, from CLS tokens of whole images, with training images as neighbours;
        and the instruments.

        noise: of the masks ``[B, L]``, filled for this rank's parts.
        """
        held_out, known = self._images, self._known
        count = len(held_out.images)
        whole = self._whole(torch.cat([held_out.images, known.images]))
        whole_held_out = whole.first(count)
        probed = Probed(whole.features, self._probed_modality, self._groups[1])
        routes = Routes(*([tensor.cpu() for tensor in field] for field in seen.routes))
        masked = Masked(seen.loss.cpu(), routes, seen.cls.cpu())
        swaps = min(self.sizes.swapped, count)
        instruments = measure(
            Seen(masked, whole_held_out, held_out.modality, self._groups[0]),
            probed,
            self._pixels_probe,
            swaps,
            lambda overrides: self._loss_under(overrides, noise, swaps),
            chosen=self.chosen,
        )
        modalities = len(known.modality.unique())
        if modalities < 2:
            return None, instruments
        # A modality needs enough known images to win a vote of k neighbours.
        k = min(20, max(1, len(known.images) // modalities // 2))
        knn = knn_accuracy(whole.cls[count:], known.modality, whole_held_out.cls, held_out.modality, k=k)
        return knn.accuracy, instruments

    def _loss_under(self, overrides: Sequence[Override | None], noise: Tensor, count: int) -> Tensor:
        """Masked losses ``[count]`` of the first held-out images with other routes, on the host."""
        loss = torch.zeros(count, device=self.device)
        for turn in self._turns(count):
            images = self._centred(self._images.images[turn.part])
            routes = [o and Override(o.gates[turn.part], o.experts[turn.part]) for o in overrides]
            ratio = self.config.model.mask_ratio
            with autocast(self.device, self.precision):
                masked = masked_forward(
                    self.model, images, noise[turn.part], mask_ratio=ratio, overrides=routes, batch_size=len(images)
                )
            if turn.counts:
                loss[turn.part] = masked.loss
        self._add_up(loss)
        return loss.cpu()

    def _whole(self, images: Tensor) -> Whole:
        """Tokens and probabilities of whole images, which are uint8 on the host."""
        count = len(images)
        cls = torch.zeros(count, self._width, device=self.device)
        patches = torch.zeros_like(cls)
        probabilities = [torch.zeros(count, e, device=self.device) for e in self.experts]
        self.model.eval()
        for turn in self._turns(count):
            part = self._centred(images[turn.part])
            with autocast(self.device, self.precision), self._probabilities() as probabilities_of_part:
                tokens = self._encode(part).float()
            if turn.counts:
                cls[turn.part], patches[turn.part] = tokens[:, 0], tokens[:, 1:].mean(1)
                for layer, layer_of_part in zip(probabilities, probabilities_of_part, strict=True):
                    layer[turn.part] = layer_of_part
        self.model.train()
        for tensor in (cls, patches, *probabilities):
            self._add_up(tensor)
        return Whole(cls.cpu(), patches.cpu(), [p.cpu() for p in probabilities])

    def _encode(self, images: Tensor) -> Tensor:
        """Tokens ``[B, 1 + L, D]``; with fsdp the whole model must be called, or the weights stay sharded."""
        if self.config.parallel.strategy != "fsdp":
            return self.model.encoder(images)
        tokens: list[Tensor] = []
        handle = self.model.encoder.norm.register_forward_hook(lambda module, given, out: tokens.append(out))
        try:
            self.model(images, mask_ratio=0.0)
        finally:
            handle.remove()
        return tokens[0]

    def _pixels(self, patches: Tensor) -> Tensor:
        """bool ``[R, 1, H, W]`` of ``[R, L]``: whether a pixel's patch is 1."""
        side = self.config.model.patch_size
        return (
            patches.reshape(-1, 1, *self.model.encoder.grid).repeat_interleave(side, 2).repeat_interleave(side, 3)
        ) == 1

    def _centred(self, images: Tensor) -> Tensor:
        """Input of the model from uint8 images on the host."""
        model = self.config.model
        return center(images.to(self.device), model.img_size, model.in_chans)

    def _sample(self, dataset: Dataset, wanted: int) -> Sample:
        """``spread_out``. RuntimeError: the ranks could not read the same images."""
        sample = spread_out(dataset, wanted)
        counts = gather(self.ranks, len(sample.images))
        if len(set(counts)) > 1:
            listed = ", ".join(map(str, counts))
            raise RuntimeError(f"evaluation: expected {wanted} images on every rank; the ranks read {listed}")
        return sample

    def _turns(self, count: int) -> Iterator["_Turn"]:
        """The parts of ``count`` images that this rank computes.

        With fsdp all ranks take part in every forward; ranks without images left repeat the first part.
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


def _fill(target: Tensor, part: slice, values: Tensor) -> None:
    target[part] = values.to(target.dtype)


class _Turn(NamedTuple):
    """Images of one forward."""

    number: int
    """Number of the part, which seeds the masks."""
    part: slice
    counts: bool
    """False for a repeated part, whose result is ignored."""


def _coloured(images: Tensor) -> Tensor:
    """``[R, 3, H, W]`` within about [0, 1] on the host, for pictures; grey becomes three equal channels."""
    return denormalize(images).cpu().expand(-1, 3, -1, -1)
