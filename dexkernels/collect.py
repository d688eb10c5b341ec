"""`collect_aux`: losses and gate masses of the DEX layers in a model whose blocks only see ``y = mlp(x)``."""

from types import TracebackType
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import checks
from .layer import Aux, DEXLayer, Recording, update_directors


def collect_aux(model: nn.Module, noise_std: float | Tensor = 0.0) -> "AuxCollector":
    """Record the `Aux` of every DEX layer of ``model`` in the forwards of a ``with`` block.

        with dexkernels.collect_aux(model, noise_std=0.1) as aux:
            y = model(x)
        loss = task(y) + aux.losses(align=0.01, balance=0.01)
        loss.backward()
        aux.update_directors(0.99)
        optimizer.step()

    Args:
        model: any module that contains DEX layers with ``path="experts"``, also wrapped by DDP or `torch.compile`.
        noise_std: exploration noise of the routers in training, a float or a 0-dim tensor. With a tensor that is
            filled with each step's value, a compiled model is not recompiled. It must not change before backward.

    Raises: ValueError naming the argument; errors of nested or concurrent use are raised on entering the block.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    checks.check_noise_std(noise_std)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DEXLayer) and m.path == "experts"}
    if not layers:
        raise ValueError("model: expected at least one DEXLayer with path='experts' in it, got none (see upcycle_)")
    return AuxCollector(layers, noise_std)


class AuxCollector:
    """The result of `collect_aux`: a context manager that may be entered again, once for every micro-batch.

    Losses are those of the latest block. Gate masses add up over blocks until `update_directors` or `take_gate_mass`
    uses them, as gradient accumulation needs. A layer that runs several times in one block (it is shared, or the model
    is called several times) has the mean of its losses and the sum of its masses; one that does not run has losses and
    mass 0. Recomputation under activation checkpointing is not counted. With recomputation, a training forward between
    a block and its `update_directors` is refused in backward, since it is unknown which forward is recomputed.
    """

    layers: dict[str, DEXLayer]
    """Module path -> layer, in the order of the model's modules; the position is l in the weighting of `align_loss`."""
    calls: dict[str, list[Aux]]
    """Module path -> one `Aux` for each run of the layer in the latest block."""

    def __init__(self, layers: dict[str, DEXLayer], noise_std: float | Tensor):
        self.layers, self.calls = layers, {}
        self._noise_std = noise_std
        self._recordings: list[Recording] = []
        self._mass: list[Tensor] | None = None

    def __enter__(self) -> "AuxCollector":
        for name, layer in self.layers.items():
            if layer.recording is not None and layer.recording.open:
                raise ValueError(f"collect_aux: expected one block at a time, got a second one that records {name!r}")
        self.calls = {}
        self._recordings = [Recording(self._noise_std) for _ in self.layers]
        for layer, recording in zip(self.layers.values(), self._recordings, strict=True):
            recording.open, layer.recording = True, recording
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        calls = [recording.calls for recording in self._recordings]
        for recording in self._recordings:
            # Layers keep the recording for recomputation, but not its calls, which hold the graph.
            recording.open, recording.calls = False, []
        if error is None:
            self.calls = dict(zip(self.layers, calls, strict=True))
            if any(calls):
                self._mass = [m + sum(a.gate_mass for a in c) for m, c in zip(self._masses(), calls, strict=True)]

    @property
    def align_loss(self) -> Tensor:
        """0-dim: mean over the L layers of the layer's align loss divided by ``L - l``."""
        L = len(self.layers)
        return sum(_mean([a.align_loss for a in calls]) / (L - l) for l, calls in self._ran()) / L  # noqa: E741

    @property
    def balance_loss(self) -> Tensor:
        """0-dim: mean over the L layers, local to this rank."""
        return sum(_mean([a.balance_loss for a in calls]) for _, calls in self._ran()) / len(self.layers)

    @property
    def gate_mass(self) -> list[Tensor]:
        """Per layer ``[E_l]``, detached: summed over all runs since the last `update_directors` or `take_gate_mass`."""
        return self._masses()

    def losses(self, align: float | Tensor = 0.01, balance: float | Tensor = 0.01) -> Tensor:
        """``align * align_loss + balance * balance_loss`` of the latest block, 0-dim; add it to the task's loss.

        Raises: ValueError if no DEX layer ran in the block, or if they ran without gradient although gradient is
        enabled here: under no_grad or reentrant activation checkpointing, where these losses train nothing.
        """
        return align * self.align_loss + balance * self.balance_loss

    def update_directors(
        self,
        momentum: float | Tensor,
        *,
        skip: Tensor | None = None,
        process_group: dist.ProcessGroup | Literal[False] | None = None,
    ) -> None:
        """GEMA of every layer with the collected masses, after backward and before the optimizer; resets the masses.

        See `DEXLayer.update_director`. All ranks must call it together; one all-reduce serves all layers.

        Raises: ValueError if nothing was collected since the last call, or inside the block.
        """
        update_directors(
            self.layers.values(), self._complete("update_directors"), momentum, skip=skip, process_group=process_group
        )
        self._reset()

    def take_gate_mass(self) -> list[Tensor]:
        """`gate_mass` for a step of `DEXAdamW`, which updates the directors; after backward. Resets the masses.

            optimizer.step(gate_mass=aux.take_gate_mass(), momentum=0.99)  # instead of update_directors and a step

        Raises: ValueError if nothing was collected since the last call, or inside the block.
        """
        masses = self._complete("take_gate_mass")
        self._reset()
        return masses

    def _complete(self, caller: str) -> list[Tensor]:
        """The masses of complete blocks. ValueError if there are none."""
        if self._open:
            raise ValueError(f"{caller}: expected a call after collect_aux's block and backward, got one inside")
        if self._mass is None:
            raise ValueError(f"{caller}: expected a forward inside collect_aux since the last update, got none")
        return self._mass

    def _reset(self) -> None:
        self._mass = None
        for layer, recording in zip(self.layers.values(), self._recordings, strict=True):
            if layer.recording is recording:
                layer.recording = None  # So that later, uncollected forwards are recomputed as such.

    @property
    def _open(self) -> bool:
        return any(recording.open for recording in self._recordings)

    def _masses(self) -> list[Tensor]:
        return self._mass or [layer.usage_ema.new_zeros(layer.num_experts) for layer in self.layers.values()]

    def _ran(self) -> list[tuple[int, list[Aux]]]:
        """``(l, runs)`` of the layers that ran in the latest block."""
        if self._open:
            raise ValueError("aux: expected its losses to be read after the collect_aux block, got a read inside it")
        ran = [(i, calls) for i, calls in enumerate(self.calls.values()) if calls]
        if not ran:
            raise ValueError("aux: expected a forward of the model in collect_aux's block, got no DEX layer that ran")
        for name, layer in self.layers.items() if torch.is_grad_enabled() else ():
            trained = layer.experts.fc1_weight.requires_grad
            if trained and not all(aux.align_loss.requires_grad for aux in self.calls[name]):
                raise ValueError(
                    f"aux: expected {name!r} to run with gradient, got a forward under no_grad or reentrant activation "
                    "checkpointing: set use_reentrant=False (to read losses without training, use no_grad)"
                )
        return ran


def _mean(losses: list[Tensor]) -> Tensor:
    return sum(losses) / len(losses)
