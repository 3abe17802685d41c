"""Adaptive layer norm, stated plainly (DiT, arXiv 2212.09748, section 3.2, adaLN-Zero; VAR, arXiv 2404.02905).

    y = x + keep gate branch,   h = (y - mean(y)) / sqrt(var(y) + eps) (1 + scale) + shift

with mean and (biased) variance over the channels of a token; gate, scale and shift are one vector an image, keep a
number an image (0, or 1 / (1 - p) under drop-path; 1 without it). Any dtype, any device; differentiated by autograd.
Every other implementation is measured against this one in float64.
"""

import torch
import torch.nn.functional as F


def norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """x [B,L,C], scale shift [B,1,C] -> h [B,L,C] in their common dtype."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """x branch [B,L,C], gate [B,1,C], keep [B] or None -> y [B,L,C] in x's dtype."""
    update = gate * branch
    if keep is not None:
        update = update * keep[:, None, None]
    return (x + update).to(x.dtype)
