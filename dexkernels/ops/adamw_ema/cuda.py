"""`adamw_ema_` by the native library: one launch for up to 300 updates; only the rates of a step take a new tensor.

The library takes addresses and sizes; the tensors are checked here.
"""

import torch

from ... import native
from .records import Rule, Scalars, Update, rates

DEVICE_TYPE = "cuda"


def why_not(update: Update) -> str | None:
    """Why the library cannot take an update, beginning with the field; None if it can."""
    for name, t in update._asdict().items():
        if t is None or name == "step":
            continue
        if t.device.type != DEVICE_TYPE:
            return f"{name}: the cuda backend expects a tensor on a GPU, got {t.device}"
        if name == "group_weights":
            continue
        dtype = torch.bfloat16 if name == "copy" else torch.float32
        if t.dtype != dtype:
            return f"{name}: the cuda backend takes {dtype}, got {t.dtype}"
        if not t.is_contiguous():
            return f"{name}: the cuda backend takes contiguous tensors, got strides {t.stride()}"
        if t.data_ptr() % t.element_size():
            return f"{name}: expected an address that is a multiple of {t.element_size()} bytes, got {t.data_ptr():#x}"
    return None


def adamw_ema_(updates: list[Update], rule: Rule, scalars: Scalars) -> None:
    """See `dexkernels.ops.adamw_ema.adamw_ema_`; `why_not` lists the limits.

    Raises: RuntimeError if the launch fails.
    """
    assert native.library is not None, native.why_not()
    steps = [u.step for u in updates]
    if scalars.skip is None:
        torch._foreach_add_(steps, 1)
    else:
        torch._foreach_add_(steps, [(~scalars.skip).to(torch.float32)] * len(steps))
    updates = [u for u in updates if u.parameter.numel()]
    if not updates:
        return
    device = updates[0].parameter.device
    with torch.cuda.device(device):
        # Tensors made here may be freed after the launch: their memory is reused in stream order.
        step_rates, momentum = rates(updates, rule), scalars.momentum.double()
        clip = None if scalars.clip_scale is None else scalars.clip_scale.float()
        weights = {id(u): u.group_weights.to(torch.float32).contiguous() for u in updates if u.director is not None}
        first, second = rule.betas
        native.library.adamw_ema_(
            rows=[
                (
                    *(0 if t is None else t.data_ptr() for t in (*u[:4], u.director, u.copy, weights.get(id(u)))),
                    step_rates.data_ptr() + i * step_rates.stride(0) * step_rates.element_size(),
                    u.parameter.numel() // u.num_experts,
                    u.num_experts,
                )
                for i, u in enumerate(updates)
            ],
            rule=(first, 1.0 - first, second, 1.0 - second, rule.eps),
            momentum_at=momentum.data_ptr(),
            clip_at=0 if clip is None else clip.data_ptr(),
            skip_at=0 if scalars.skip is None else scalars.skip.data_ptr(),
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
