"""Adaptive layer norm followed by a linear layer, stated plainly.

    y = x + gate branch,   out = h W^T,   h = (y - mean(y)) / sqrt(var(y) + eps) (1 + scale) + shift

Any dtype, any device; differentiated by autograd, which keeps h. Norm and residual are those of `modulated_norm`.
"""

import torch
import torch.nn.functional as F

from ..modulated_norm import reference


def norm_linear(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """x [B,L,C], scale shift [B,1,C], weight [M,C] -> h W^T [B,L,M]; h and W are rounded to `dtype`."""
    return F.linear(reference.norm(x, scale, shift, eps).to(dtype), weight.to(dtype))
