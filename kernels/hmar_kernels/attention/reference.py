"""Masked attention, stated plainly.

    out_i = sum_j p_ij v_j,   p_ij = exp(s_ij - lse_i),   s_ij = scale q_i . k_j,   lse_i = log sum_j exp(s_ij)

with j over the keys that query i sees. A query that sees no key has out = 0, lse = -inf and takes no part in any
gradient. Any dtype, any device; differentiated by autograd. Every other implementation is measured against this one
in float64.
"""

import torch

from ..mask import SpanMask


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SpanMask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,Lq,D], k v [B,H,Lk,D] -> out [B,H,Lq,D] in q's dtype, lse [B,H,Lq] (float32, float64 for float64)."""
    hidden = ~mask.to_dense(q.device)
    blind = hidden.all(-1, keepdim=True)
    scores = (q @ k.mT) * scale
    if q.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    scores = scores.masked_fill(hidden, float("-inf"))
    # NOTE: a row of only -inf would make NaN gradients in logsumexp; such rows get finite scores and a zero weight.
    lse = scores.masked_fill(blind, 0.0).logsumexp(-1, keepdim=True)
    probs = (scores - lse).exp()
    out = probs.to(v.dtype) @ v
    lse = lse.masked_fill(blind, float("-inf")).squeeze(-1)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse
