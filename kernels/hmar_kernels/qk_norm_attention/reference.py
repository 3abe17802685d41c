"""Attention with normalised queries and keys, stated plainly: the equation of qk_norm/reference.py, then

    out = softmax(q k^T) v

over all tokens of the same image, heads side by side. Any dtype, any device; differentiated by autograd. Every other
implementation is measured against this one in float64.
"""

import torch
import torch.nn.functional as F

from ..qk_norm import reference


def forward(
    qkv: torch.Tensor, q_bias: torch.Tensor, v_bias: torch.Tensor, log_scale: torch.Tensor, max_log_scale: float
) -> torch.Tensor:
    """qkv [B,L,3C], q_bias v_bias [C], log_scale [H] -> [B,L,C] in qkv's dtype."""
    q, k, v = reference.forward(qkv, q_bias, v_bias, log_scale, max_log_scale)
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2)


def forward_cached(
    qkv: torch.Tensor,
    q_bias: torch.Tensor,
    v_bias: torch.Tensor,
    log_scale: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_cached: int,
    max_log_scale: float,
) -> torch.Tensor:
    """The same over all tokens of k_cache v_cache [B,H,capacity,D], to which L are added behind num_cached."""
    q, k, v = reference.forward(qkv, q_bias, v_bias, log_scale, max_log_scale)
    end = num_cached + qkv.shape[1]
    k_cache[:, :, num_cached:end], v_cache[:, :, num_cached:end] = k, v
    k, v = k_cache[:, :, :end], v_cache[:, :, :end]
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2)
