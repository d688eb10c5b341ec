"""A network in which who goes where, and what it is worth, is planted: images are their modality and nothing else."""

from types import SimpleNamespace

import torch
from torch import nn

from dexkernels import DEXLayer

E, M, DEPTH = 4, 4, 2


class Planted(nn.Module):
    """Per layer, expert e adds ``unit(e)``; an image of modality m wants ``DEPTH * unit(m)``, so that what it loses is
    a matter of its experts alone. ``router``: reads ``"modality"``, or ``"noise"``, which has nothing to do with it;
    ``alike``: all experts are one and the same."""

    def __init__(self, router="modality", alike=False):
        super().__init__()
        self.layers = nn.ModuleList(DEXLayer(M + E, 3, E, 1) for _ in range(DEPTH))
        for layer in self.layers:
            with torch.no_grad():
                for p in layer.experts.parameters():
                    p.zero_()
                layer.experts.fc2_bias[:, :E] = torch.ones(E, E) / E if alike else torch.eye(E)
                layer.router_weight.zero_()
                layer.router_weight[:, :E] = torch.eye(E) * (10.0 if router == "modality" else 0.0)
                layer.router_weight[:, M:] = torch.eye(E) * (10.0 if router == "noise" else 0.0)
        self.encoder = SimpleNamespace(dex_layers=list(self.layers))

    def forward(self, images, mask_ratio, mask_noise):
        """``images [B, M + E]``: the modality as a unit vector, then noise."""
        total = torch.zeros_like(images[:, :E])
        auxes = []
        for layer in self.layers:
            y, aux = layer(images[:, None], return_aux=True)
            total = total + y[:, 0, :E]
            auxes.append(aux)
        loss = (total - DEPTH * images[:, :M]).square().sum(1)
        gates, experts = [a.gates for a in auxes], [a.expert_indices for a in auxes]
        return SimpleNamespace(image_loss=loss, loss=loss.mean(), cls=total, gates=gates, expert_indices=experts)


def inputs(images_each=6):
    """Images ``[B, M + E]``, their modality ``[B]``, mask noise ``[B, 1]`` (which plays no part)."""
    modality = torch.arange(M).repeat_interleave(images_each)
    noise = torch.randn(len(modality), E, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.eye(M)[modality], noise], 1), modality, torch.zeros(len(modality), 1)
