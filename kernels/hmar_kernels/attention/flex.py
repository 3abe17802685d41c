"""The mask handed to torch.nn.attention.flex_attention, compiled with its default options."""

from __future__ import annotations

import torch

from ..mask import SpanMask


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SpanMask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,Lq,D], k v [B,H,Lk,D] -> out [B,H,Lq,D], lse float32 [B,H,Lq]; differentiable."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    out, aux = _compiled(flex_attention)(
        q, k, v, block_mask=mask.to_flex(q.device), scale=scale, return_aux=AuxRequest(lse=True)
    )
    return out, aux.lse


_compiled_functions: dict = {}


def _compiled(function):
    if function not in _compiled_functions:
        _compiled_functions[function] = torch.compile(function, dynamic=False)
    return _compiled_functions[function]


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlexAttention cannot run on such inputs; None when it can."""
    if device.type != "cuda":
        return f"FlexAttention with gradients needs a CUDA device, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"FlexAttention takes float16, bfloat16 or float32, not {dtype}"
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"FlexAttention takes head dims that are powers of two from 16 on, not {head_dim}"
    return None
