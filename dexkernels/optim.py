"""`DEXAdamW`: AdamW that reads the experts once for the step, the directors' update and low-precision copies."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import checks
from .layer import DEXLayer, agree, local_pair, move_usage
from .ops import backends
from .ops.adamw_ema import COPIES, checked
from .ops.adamw_ema.records import Rule, Update
from .ops.group_ema import group_ema_
from .records import MLPWeights
from .shadows import Watched, capturing


class _Pair(NamedTuple):
    """This rank's piece of a director tensor, its experts, and the weights by which it follows them."""

    director: Tensor
    experts: Tensor
    group_weights: Tensor


class DEXAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` whose step also moves the directors of DEX layers and writes copies of the experts.

        optimizer = dexkernels.optim.DEXAdamW(model, lr=1e-4)
        ...
        loss.backward()
        optimizer.step(gate_mass=out.gate_mass, momentum=0.99)

    This equals ``model.update_directors(gate_mass, momentum)`` followed by a step of AdamW, up to rounding. Experts
    and their moments are read once, in `adamw_ema_`. If experts and directors are cut over ranks in different ways,
    as by default in `fully_shard`, directors are updated first, separately; after `dexkernels.shard` they are not.

    Args:
        model: contains the DEX layers, if any.
        params: parameters or parameter groups, as in torch; None: all trainable parameters of the model.
        lr, betas, eps, weight_decay: as in torch.
        copies: torch.bfloat16 or torch.float16, the dtype of autocast: each step also writes copies of experts and
            directors in it, ``[E + 1, ...]``, which the next forward uses instead of its own. They permanently take 2
            bytes a parameter. Forwards in a CUDA graph or under torch.compile make their own. A forward also makes
            its own copies after anything that may have changed the weights: a state dict, another optimizer,
            ``.data``, a tensor that shares their memory (such as ``p.detach()``, while it lives), another stream.
        backend: backend of `adamw_ema_`; None uses the default.

    State dicts have the format of `torch.optim.AdamW`, and each loads the other's.

    Raises: ValueError naming the argument.
    """

    keeps_copies = True

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        copies: torch.dtype | None = None,
        backend: str | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if copies is not None and copies not in COPIES:
            raise ValueError(f"copies: expected torch.bfloat16, torch.float16 or None, got {copies!r}")
        backends.check_backend(backend)
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        super().__init__(params, lr, betas, eps, weight_decay)
        self._model, self._copies, self._backend = model, copies, backend

    @torch._disable_dynamo  # It looks at memory and versions, which torch.compile does not see.
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        gate_mass: Iterable[Tensor] | None = None,
        momentum: float | Tensor | None = None,
        clip_scale: float | Tensor | None = None,
        skip: Tensor | None = None,
        process_group: dist.ProcessGroup | Literal[False] | None = None,
    ) -> Any:
        """One step, without waiting for the device.

        Args:
            closure: as in torch: recomputes the loss and its gradients.
            gate_mass: one ``[E]`` per DEX layer with path="experts", in the order of the model's modules; None: the
                directors do not change.
            momentum: momentum of GEMA, a float in [0, 1] or a 0-dim tensor; required with ``gate_mass``.
            clip_scale: a float or a 0-dim tensor by which gradients are multiplied; the gradients do not change.
            skip: 0-dim bool tensor. If it is true (with ``gate_mass``, on any rank), or a gate mass is not finite,
                nothing changes: no weight, moment, counter, director, or usage.
            process_group: see `DEXLayer.update_director`.

        Returns: the result of the closure.
        Raises: ValueError naming the argument, before anything is changed.
        """
        if (gate_mass is None) != (momentum is None):
            raise ValueError("momentum: expected it together with gate_mass, got one without the other")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = [m for m in self._model.modules() if isinstance(m, DEXLayer) and m.path == "experts"]
        for group in self.param_groups:
            if group["amsgrad"] or group["maximize"]:
                raise ValueError("amsgrad, maximize: expected False, got True: torch.optim.AdamW has them")
        followed, pairs, alone = None, {}, []
        if gate_mass is not None:
            checks.check_momentum(momentum)
            followed = agree(layers, gate_mass, skip, process_group)
        if followed is not None:
            skip = followed.still
            pairs, alone = self._pairs(layers, followed.group_weights)
        kept = self._kept(layers, pairs)
        copies = {
            id(p): copy for layer, written in kept for p, copy in zip(layer.experts.weights, written, strict=True)
        }
        parts = []
        for group in self.param_groups:
            rule = Rule(group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"])
            updates = [
                self._update(p, pairs.get(id(p)), copies.get(id(p))) for p in group["params"] if p.grad is not None
            ]
            parts += [
                checked(
                    [u for u in updates if u.parameter.device == device],
                    rule,
                    momentum=1.0 if momentum is None else momentum,
                    clip_scale=clip_scale,
                    skip=skip,
                    backend=self._backend,
                )
                for device in dict.fromkeys(u.parameter.device for u in updates)
            ]
        if alone:
            directors, experts, weights = map(list, zip(*alone, strict=True))
            group_ema_(directors, experts, weights, momentum, skip=skip, backend=self._backend)
        for part in parts:
            part.run()
        for layer, written in kept:
            layer.shadows.keep(layer.experts.weights, layer.director.weights, written)
        if followed is not None:
            move_usage(layers, followed)
        return loss

    def _pairs(self, layers: list[DEXLayer], group_weights: list[Tensor]) -> tuple[dict[int, _Pair], list[_Pair]]:
        """Id of the experts' parameter -> the director that its update moves; and the directors that none moves: those
        of frozen or differently cut experts, and of tensors that several layers share."""
        trained = {id(p) for group in self.param_groups for p in group["params"] if p.grad is not None}
        users = Counter(id(t) for layer in layers for pair in layer.director_pairs() for t in pair)
        alone, pairs = [], {}
        for layer, a in zip(layers, group_weights, strict=True):
            for director, stacked in layer.director_pairs():
                pair = _Pair(*local_pair(director, stacked), a)
                memory = (t.untyped_storage()._cdata for t in (pair.experts, _local(stacked)))
                only = users[id(director)] == users[id(stacked)] == 1
                if len(set(memory)) == 1 and id(stacked) in trained and only:
                    pairs[id(stacked)] = pair
                else:
                    alone.append(pair)
        return pairs, alone

    def _kept(self, layers: list[DEXLayer], pairs: dict[int, _Pair]) -> list[tuple[DEXLayer, MLPWeights]]:
        """The layers whose copies this step writes, and the copies; drops the copies of all other layers."""
        kept = []
        for layer in layers:
            experts, director = layer.experts.weights, layer.director.weights
            whole = all(type(t) in (nn.Parameter, Watched) for t in (*experts, *director))
            written = self._copies is not None and all(id(p) in pairs for p in experts)
            if written and whole and experts[0].dtype == torch.float32 and not capturing(experts[0].device):
                kept.append((layer, layer.shadows.kept(experts, director, self._copies)))
            else:
                layer.shadows.drop()
        return kept

    def _update(self, p: Tensor, pair: _Pair | None, copy: Tensor | None) -> Update:
        for name, t in (("parameter", p), ("gradient", p.grad)):
            if t.dtype not in (torch.float32, torch.float64):
                remedy = "keep weights in float32, and compute under autocast"
                raise ValueError(f"{self._name(p)}: expected a float32 or float64 {name}, got {t.dtype}; {remedy}")
        if p.grad.layout != torch.strided:
            raise ValueError(f"{self._name(p)}: expected a dense gradient, got {p.grad.layout}")
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        elif state["step"].device != p.device:  # torch counts steps on the host.
            state["step"] = state["step"].to(p.device)
        tensors = [_local(t) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
        if pair is None:
            return Update(*tensors, state["step"])
        return Update(*tensors, state["step"], pair.director, pair.group_weights, copy)

    def _name(self, parameter: Tensor) -> str:
        return next((name for name, p in self._model.named_parameters() if p is parameter), "a parameter")


def _local(t: Tensor) -> Tensor:
    """This rank's piece, detached; it shares the parameter's memory."""
    return (t.to_local() if hasattr(t, "to_local") else t).detach()
