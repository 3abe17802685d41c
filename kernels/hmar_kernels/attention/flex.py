"""The mask handed to torch.nn.attention.flex_attention, compiled with its default options.

Each mask, shape and dtype has a compiled function of its own, kept on the mask: sharing one would run into
torch.compile's recompile limit after eight of them and fall back to the dense form without a word.
"""

from __future__ import annotations

from types import FunctionType

import torch

from ..mask import SpanMask


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SpanMask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,Lq,D], k v [B,H,Lk,D] -> out [B,H,Lq,D], lse float32 [B,H,Lq]; differentiable."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def attend(q, k, v):
        return flex_attention(q, k, v, block_mask=block_mask, scale=scale, return_aux=AuxRequest(lse=True))

    block_mask = mask.to_flex(q.device)
    if torch.compiler.is_compiling():
        out, aux = attend(q, k, v)
    else:
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        signature = tuple((x.shape, x.stride()) for x in (q, k, v))
        key = ("flex_compiled", str(q.device), q.dtype, signature, scale, needs_grad)
        # NOTE: a code object of its own, because the recompile limit counts per code object
        compiled = mask.cached(key, lambda: torch.compile(_own_code(attend), dynamic=False, fullgraph=True))
        out, aux = compiled(q, k, v)
    return out, aux.lse


def _own_code(function: FunctionType) -> FunctionType:
    return FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlexAttention cannot run on such inputs; None when it can."""
    if device.type != "cuda":
        return f"FlexAttention with gradients needs a CUDA device, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"FlexAttention takes float16, bfloat16 or float32, not {dtype}"
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"FlexAttention takes head dims that are powers of two from 16 on, not {head_dim}"
    return None
