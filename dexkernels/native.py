"""The native library, `dexkernels._C`: loads it, says why it is absent, and calls it with torch tensors.

It links nothing of torch: it takes addresses, sizes and a stream. `csrc/` holds its sources, `setup.py` builds it.
"""

import importlib
import importlib.machinery
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ._version import __version__

MIN_CAPABILITY = (8, 0)
DEVICE_TYPE = "cuda"


def _load() -> tuple[ModuleType | None, str | None]:
    """``(the module, None)`` or ``(None, why there is none)``."""
    files = [f.name for f in Path(__file__).parent.glob("_C.*") if f.suffix in (".so", ".pyd")]
    usable = [f for f in files if f.removeprefix("_C") in importlib.machinery.EXTENSION_SUFFIXES]
    if not files:
        return None, "the native library was not built: the installation found no nvcc, or DEX_CUDA was 0"
    if not usable:
        return None, f"the native library was built for another Python ({', '.join(sorted(files))}); install again"
    try:
        module = importlib.import_module("dexkernels._C")
    except ImportError as error:
        return None, f"the native library does not load: {error}"
    if module.__version__ != __version__:
        return (
            None,
            f"the native library is of version {module.__version__}, dexkernels of {__version__}; install again",
        )
    return module, None


_C, _absent = _load()


def why_not() -> str | None:
    """Why the native library cannot run here; None when it can. Asks for the GPU only when the library is there."""
    if _absent is not None:
        return _absent
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"the GPU is sm_{capability[0]}{capability[1]}; the native library needs sm_80 or newer"
    return None


def group_ema_(
    directors: list[Tensor],
    experts: list[Tensor],
    group_weights: list[Tensor],
    momentum: float | Tensor,
    skip: Tensor | None = None,
    shadows: list[Tensor | None] | None = None,
) -> None:
    """`dexkernels.reference.group_ema_` in one launch per device (up to 500 tensors), never waiting for it.

    Directors must be float32 and contiguous, and so must each ``experts[i][e]``; others are refused by name. Any E,
    any size, any alignment of 4 bytes; addresses and expert strides that are multiples of 16 bytes go faster, to the
    same bits. Weights that are not float32 are converted first. Scalars on the device are read there; a float momentum
    is frozen into a CUDA graph.

    Args:
        shadows: of each director a contiguous bfloat16 tensor of its shape, or None. Gets a copy of the new director
            in the same pass. Where the director keeps its bits (all weights 0, or skip) the shadow does too.

    Raises: ValueError, before anything is changed; RuntimeError when the launch fails.
    """
    assert _C is not None, _absent
    shadows = [None] * len(directors) if shadows is None else shadows
    _check_layout(directors, experts, shadows)
    # Scalars on the host can be read at once: no GPU is waited for.
    if on_host(skip):
        if skip:
            return
        skip = None
    if on_host(momentum):
        momentum = float(momentum)
    for device in dict.fromkeys(d.device for d in directors):
        with torch.cuda.device(device):
            _launch(
                [
                    group
                    for group in zip(directors, experts, group_weights, shadows, strict=True)
                    if group[0].device == device
                ],
                momentum.to(device) if isinstance(momentum, Tensor) else momentum,
                None if skip is None else skip.to(device),
                torch.cuda.current_stream(device).cuda_stream,
            )
    # The library writes behind torch's back; a director that was saved for backward must still be known as changed.
    torch.autograd.graph.increment_version([t for t in (*directors, *shadows) if t is not None])


def on_host(scalar: float | Tensor | None) -> bool:
    return isinstance(scalar, Tensor) and scalar.device.type == "cpu"


def _launch(groups: list[tuple], momentum: float | Tensor, skip: Tensor | None, stream: int) -> None:
    """One device's part. Converted copies may be freed after the launch: their memory is reused in stream order."""
    groups = [(d, e, a.to(torch.float32).contiguous(), shadow) for d, e, a, shadow in groups]
    value, address, is_double = momentum, 0, False
    if isinstance(momentum, Tensor):
        if momentum.dtype not in (torch.float32, torch.float64):
            momentum = momentum.to(torch.float64)
        value, address, is_double = 0.0, momentum.data_ptr(), momentum.dtype == torch.float64
    rows = [
        (d.data_ptr(), e.data_ptr(), a.data_ptr(), 0 if s is None else s.data_ptr(), d.numel(), e.stride(0), e.shape[0])
        for d, e, a, s in groups
    ]
    _C.group_ema_(rows, value, address, is_double, 0 if skip is None else skip.data_ptr(), stream)


def _check_layout(directors: list[Tensor], experts: list[Tensor], shadows: list[Tensor | None]) -> None:
    """What this backend asks for beyond `dexkernels.ops`, whose own checks were made before."""
    seen = {}
    for i, (d, e, shadow) in enumerate(zip(directors, experts, shadows, strict=True)):
        if d.device.type != DEVICE_TYPE:
            raise ValueError(f"directors[{i}]: the cuda backend expects a tensor on a GPU, got {d.device}")
        if d.dtype != torch.float32:
            raise ValueError(f"directors[{i}]: the cuda backend updates torch.float32, got {d.dtype}")
        if not d.is_contiguous():
            raise ValueError(f"directors[{i}]: the cuda backend expects a contiguous tensor, got strides {d.stride()}")
        if not (e.is_contiguous() or e[0].is_contiguous()):
            raise ValueError(f"experts[{i}]: the cuda backend expects contiguous experts, got strides {e.stride()}")
        if shadow is not None:
            like = (torch.bfloat16, d.shape, d.device)
            if (shadow.dtype, shadow.shape, shadow.device) != like or not shadow.is_contiguous():
                raise ValueError(
                    f"shadows[{i}]: expected contiguous torch.bfloat16 {list(d.shape)} on {d.device}, "
                    f"got {shadow.dtype} {list(shadow.shape)} on {shadow.device} with strides {shadow.stride()}"
                )
        if d.numel() and seen.setdefault(d.data_ptr(), i) != i:
            raise ValueError(
                f"directors[{i}]: the same tensor as directors[{seen[d.data_ptr()]}]; one launch cannot do both"
            )
