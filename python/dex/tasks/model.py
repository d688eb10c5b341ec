"""A pretrained encoder with the head of a task.

Shape letters: B images, S image side, C outputs (classes; of segmentation with the background first).
"""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dex.inference.load import choose_path_
from dex.model import VisionTransformer
from dex.model.heads import ClassificationHead, LinearSegmentation
from dex.model.lora import add_lora_, merge_lora_
from dex.model.unetr import UNETR
from dex.tasks.recipe import Settings
from dex.tasks.task import Task
from dexkernels import Aux
from dexkernels.layer import update_directors


class TaskOutput(NamedTuple):
    logits: Tensor
    """``[B, C, S, S]`` or ``[B, C]``."""
    aux: list[Aux]
    """Of the DEX layers; empty unless requested."""


class TaskModel(nn.Module):
    """``images [B, in_chans, S, S] -> logits [B, C, S, S]`` or ``[B, C]``; images as ``dex.data.center`` gives them.

    encoder: of the pretrained run; it becomes part of this model. Parameters that ``settings.mode`` does not train take
    no gradient. Segmentation needs MONAI, except in mode linear. Raises: ValueError naming the setting.
    """

    def __init__(self, encoder: VisionTransformer, task: Task, settings: Settings):
        super().__init__()
        if not isinstance(encoder.img_size, int):
            sides = " x ".join(map(str, encoder.img_size))
            raise ValueError(
                f"img_size: expected a square image size, which tasks need; the run's images are {sides}: set img_size"
            )
        choose_path_(encoder, settings.path)
        self.mode, self.kind = settings.mode, task.kind
        width, depth = encoder.patch_embed.out_features, len(encoder.blocks)
        outputs = outputs_of(task)
        self.encoder = encoder
        self.head: nn.Module
        if task.kind == "classification":
            self.head = ClassificationHead(width, outputs, settings.dropout, linear=settings.mode == "linear")
        elif settings.mode == "linear":
            self.head = LinearSegmentation(width, outputs, encoder.img_size)
        else:
            self.head = UNETR(
                encoder.img_size, encoder.patch_size, width, depth, outputs, settings.feature_size, encoder.in_chans
            )
        if settings.mode == "lora":
            add_lora_(encoder, settings.lora_rank, settings.lora_alpha)
        elif settings.mode != "full":
            encoder.requires_grad_(False)

    def forward(self, images: Tensor, return_aux: bool = False) -> TaskOutput | Tensor:
        """The logits, or with ``return_aux`` a ``TaskOutput``."""
        after = self.head.after if isinstance(self.head, UNETR) else ()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mode in ("full", "lora")):
            tokens, aux, hidden = self.encoder.forward_hidden(images, after, return_aux=return_aux)
        logits = self.head(images, tokens, hidden) if isinstance(self.head, UNETR) else self.head(tokens)
        return TaskOutput(logits, aux) if return_aux else logits

    def update_directors(
        self,
        gate_mass: list[Tensor],
        momentum: Tensor | float,
        *,
        skip: Tensor | None = None,
        process_group: dist.ProcessGroup | Literal[False] | None = None,
    ) -> None:
        """``dexkernels.layer.update_directors`` for the encoder."""
        update_directors(self.encoder.dex_layers, gate_mass, momentum, skip=skip, process_group=process_group)

    def merge_(self) -> "TaskModel":
        """Merge LoRA's updates into plain weights."""
        if self.mode == "lora":
            merge_lora_(self.encoder)
        return self

    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def outputs_of(task: Task) -> int:
    """Number of channels of the logits."""
    return len(task.classes) + (task.kind == "segmentation")
