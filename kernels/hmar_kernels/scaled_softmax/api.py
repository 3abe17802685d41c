"""The softmax operator: argument checks, choice of implementation, torch custom op.

The mathematics is in reference.py, the kernel behind impl="triton" in triton.py.
"""

from __future__ import annotations

import math

import torch

from .. import triton_device
from . import reference, triton

IMPLEMENTATIONS = ("reference", "triton")
"""Names that `scaled_softmax(..., impl=...)` takes beside "auto"."""


def scaled_softmax(
    x: torch.Tensor, scale: float = 1.0, *, dtype: torch.dtype | None = None, impl: str = "auto"
) -> torch.Tensor:
    """softmax(scale x) over the last dimension: weights of attention whose scores are stored.

    Args:
        x: [..., L], float16, bfloat16 or float32 (float64: reference only), L at least 1.
        scale: finite.
        dtype: of the result. Default: x's.
        impl: "auto", "reference" or "triton", which has no derivative and L up to triton.MAX_COLUMNS. A named
            implementation runs or raises; "auto" takes "triton" on GPUs it runs on where no gradient is needed.
    Returns:
        [..., L] in `dtype`. "triton" computes in float32, "reference" in x's dtype.
    Raises:
        ValueError: shape, dtype or scale that do not fit, or the implementation cannot take them.
    """
    dtype = x.dtype if dtype is None else dtype
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_floating_point() or not dtype.is_floating_point:
        raise ValueError(
            f"x must be floats [..., L] with L at least 1, and dtype floating, got {x.dtype} {list(x.shape)}, {dtype}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f'unknown impl "{impl}": expected "auto" or one of {", ".join(IMPLEMENTATIONS)}')
    reason = _reason(x, dtype)
    if impl == "triton" and reason is not None:
        raise ValueError(f'impl="triton" cannot run here: {reason}; impl="reference" would')
    if impl == "reference" or reason is not None or (impl == "auto" and not x.is_cuda):
        return reference.forward(x, scale, dtype)
    forward = _scaled_softmax if torch.compiler.is_compiling() else triton.forward
    return forward(x, float(scale), dtype)


def _reason(x: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run; None when it can."""
    if torch.is_grad_enabled() and x.requires_grad:
        return "it has no derivative"
    if x.shape[-1] > triton.MAX_COLUMNS:
        return f"it takes rows of up to {triton.MAX_COLUMNS} numbers, got {x.shape[-1]}"
    return triton_device.unavailable(x.device, x.dtype, dtype)


_scaled_softmax = torch.library.custom_op("hmar_kernels::scaled_softmax", triton.forward, mutates_args=())


@_scaled_softmax.register_fake
def _(x, scale, dtype):
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
