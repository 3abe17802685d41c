"""Block-diagonal masks as variable-length FlashAttention (torch.nn.attention.varlen).

Every block of every image becomes one sequence. Only masks with `SpanMask.cu_seqlens` have this form: library
variable-length kernels cannot express block-causal masks.
"""

from __future__ import annotations

import inspect
from functools import cache

import torch

from ..mask import SpanMask


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SpanMask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,Lq,D], k v [B,H,Lk,D] -> out [B,H,Lq,D], lse float32 [B,H,Lq].

    Gradients flow through out only: the library has none for lse, which is therefore returned detached.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    batch = q.shape[0]
    cu_q, cu_k, max_q, max_k = _offsets(mask, batch, q.device)
    out, lse = varlen_attn(
        _tokens(q), _tokens(k), _tokens(v), cu_q, cu_k, max_q, max_k, return_aux=AuxRequest(lse=True), scale=scale
    )
    num_heads, num_queries = q.shape[1], q.shape[2]
    return (
        out.view(batch, num_queries, num_heads, -1).transpose(1, 2),
        lse.detach().view(num_heads, batch, num_queries).transpose(0, 1),
    )


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """[B,H,L,D] -> [B*L,H,D], a view when the heads of a token lie side by side."""
    return x.transpose(1, 2).flatten(0, 1)


def _offsets(mask: SpanMask, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    def make() -> tuple[torch.Tensor, torch.Tensor, int, int]:
        def repeat(offsets: torch.Tensor) -> torch.Tensor:
            steps = torch.arange(batch, dtype=torch.int32)[:, None] * offsets[-1]
            return torch.cat([(offsets[:-1] + steps).flatten(), offsets[-1:] * batch]).to(device)

        cu_q, cu_k = mask.cu_seqlens()
        return repeat(cu_q), repeat(cu_k), int(cu_q.diff().max()), int(cu_k.diff().max())

    return mask.cached(("varlen", batch, str(device)), make)


@cache
def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "return_aux"} <= set(inspect.signature(varlen_attn).parameters)


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int, mask: SpanMask) -> str | None:
    """Why variable-length FlashAttention cannot run on such inputs; None when it can."""
    if not _has_varlen():
        return "this torch has no variable-length attention with a scale argument; torch 2.11 has"
    if mask.cu_seqlens() is None:
        return "the mask is not block-diagonal, so it has no cu_seqlens"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "variable-length FlashAttention needs a CUDA device of compute capability 8.0 or newer"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"variable-length FlashAttention takes float16 or bfloat16, not {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"variable-length FlashAttention takes head dims that are multiples of 8 up to 256, not {head_dim}"
    return None
