"""Argument checks: each raises a ValueError with the argument, what was expected and what was given."""

from collections.abc import Callable

import torch
from torch import Tensor

from .records import MLPWeights

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_top_k(top_k: int, num_experts: int) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: expected an integer in 1..num_experts ({num_experts}), got {top_k!r}")


def check_temperature(temperature: float) -> None:
    check_number("temperature", temperature, "a number above 0", lambda v: v > 0)


def check_noise_std(noise_std: float | Tensor) -> None:
    check_scalar("noise_std", noise_std, "a number >= 0", lambda v: v >= 0)


def check_momentum(momentum: float | Tensor) -> None:
    check_scalar("momentum", momentum, "a number in [0, 1]", lambda v: 0 <= v <= 1)


def check_skip(skip: Tensor | None) -> None:
    if skip is not None and not (isinstance(skip, Tensor) and skip.dim() == 0 and skip.dtype == torch.bool):
        raise ValueError(f"skip: expected a 0-dim bool tensor or None, got {describe(skip)}")


def check_scalar(name: str, value: float | Tensor, expected: str, holds: Callable[[float], bool]) -> None:
    if isinstance(value, Tensor):
        # The value is not read: that would make the host wait for a GPU.
        if value.dim() != 0:
            raise ValueError(f"{name}: expected a float or a 0-dim tensor, got shape {shape_of(value)}")
    else:
        check_number(name, value, expected + ", or a 0-dim tensor", holds)


def check_number(name: str, value: float, expected: str, holds: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_transforms(*tensors: Tensor | None) -> None:
    """Raise ValueError for tensors that torch.func differentiates: its `jvp` would treat an operator as constant."""
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    for t in tensors:
        while isinstance(t, Tensor) and functorch.is_functorch_wrapped_tensor(t):
            if functorch.is_gradtrackingtensor(t):
                raise ValueError(
                    "torch.func: expected torch.autograd around the operators of dexkernels, got grad, jvp, jacrev or "
                    "another derivative of torch.func, which they do not support; for gradients per sample call "
                    "torch.autograd.grad once for each image"
                )
            t = functorch.get_unwrapped(t)


def check_x(x: Tensor, width: int | None = None) -> None:
    """Check a floating-point x ``[B, N, D]``; ``width`` is D, if known."""
    if width is not None and not (isinstance(x, Tensor) and x.dim() == 3 and x.shape[2] == width):
        value = shape_of(x) if isinstance(x, Tensor) else repr(x)
        maps = isinstance(x, Tensor) and x.dim() == 4
        remedy = ": maps need layout='channels_last' ([B, H, W, D]) or 'channels_first' ([B, D, H, W])" if maps else ""
        raise ValueError(f"x: expected [B, N, {width}], got {value}{remedy}")
    if not isinstance(x, Tensor) or x.dim() != 3 or x.dtype not in FLOATS:
        raise ValueError(f"x: expected a floating-point tensor [B, N, D], got {describe(x)}")


def check_weights(x: Tensor, weights: MLPWeights) -> None:
    """Check that stacked weights match each other and x in shape and, except under autocast, in dtype."""
    check_transforms(x, *weights)
    same_dtype = not torch.is_autocast_enabled(x.device.type)
    check_tensor("fc1_weight", weights.fc1_weight, (None, None, x.shape[2]), like=x, same_dtype=same_dtype)
    E, H, D = weights.fc1_weight.shape
    check_tensor("fc1_bias", weights.fc1_bias, (E, H), like=x, same_dtype=same_dtype)
    check_tensor("fc2_weight", weights.fc2_weight, (E, D, H), like=x, same_dtype=same_dtype)
    check_tensor("fc2_bias", weights.fc2_bias, (E, D), like=x, same_dtype=same_dtype)


def check_tensor(name: str, t: Tensor, shape: tuple[int | None, ...], *, like: Tensor, same_dtype: bool = True) -> None:
    """Check shape, device and dtype; None in ``shape`` allows any size."""
    fits = isinstance(t, Tensor) and t.dim() == len(shape)
    if not fits or any(expected not in (None, size) for size, expected in zip(t.shape, shape, strict=True)):
        sizes = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
        raise ValueError(f"{name}: expected shape {sizes}, got {describe(t)}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {t.device}")
    if same_dtype and t.dtype != like.dtype:
        raise ValueError(f"{name}: expected {like.dtype}, got {t.dtype}")


def check_mask(name: str, mask: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if not (isinstance(mask, Tensor) and mask.dtype == torch.bool and tuple(mask.shape) == tuple(shape)):
        raise ValueError(f"{name}: expected torch.bool {list(shape)}, true for real tokens, got {describe(mask)}")
    if mask.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {mask.device}")


def check_token_mask(mask: Tensor, x: Tensor, *, cls: bool) -> None:
    """Check a token mask. With ``cls``, token 0 must be real; only checked on a CPU, since a GPU would cause a wait."""
    check_mask("token_mask", mask, tuple(x.shape[:2]), x)
    if not cls or mask.device.type != "cpu" or torch.compiler.is_compiling() or mask.numel() == 0:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(mask):
        return
    if not bool((mask[:, 0] | ~mask.any(1)).all()):
        raise ValueError(
            "token_mask: expected a real token 0, which route_from='cls' routes from, got an image whose token 0 is "
            "padding: put padding last, or route from the mean token (route_from='mean')"
        )


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def shape_of(t: Tensor) -> str:
    return str(list(t.shape))


def describe(t: object) -> str:
    return f"{t.dtype} {shape_of(t)}" if isinstance(t, Tensor) else repr(t)
