"""The two convolutions as torch has them: cuDNN's on a GPU. Any dtype and memory format, differentiated by autograd.

With a norm, of silu(factors x + offsets) in x's dtype. With a residual, plus that and its shift: in float32
at least.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..group_norm import NormFactors


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: NormFactors | None = None,
    residual: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    out = F.conv2d(x if norm is None else normed(x, norm), weight, bias, padding=1)
    if residual is None:
        return out
    total = out.to(torch.promote_types(x.dtype, torch.float32)) + residual
    return (total if shift is None else total + shift[:, None, None]).to(x.dtype)


def normed(x: Tensor, norm: NormFactors) -> Tensor:
    factors, offsets = (t[:, :, None, None] for t in norm)
    return F.silu(factors * x + offsets).to(x.dtype)


def conv_transpose2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
