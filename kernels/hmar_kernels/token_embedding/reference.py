"""Embedding of tokens, stated plainly:

    x = W f + b,   known:  x + (m where hidden, else W r),   out = x + position + scale

W f + b, W r, m and their sum have W's dtype, the last two sums that of promotion with positions. Any dtype, any device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    scale: Tensor,
    residuals: Tensor | None,
    hidden: Tensor | None,
    mask: Tensor | None,
    copies: int,
) -> Tensor:
    """inputs residuals [B,n,E], weight [C,E], bias scale mask [C], position [n,C], hidden [B,n] -> [copies B,n,C]."""
    with torch.autocast(inputs.device.type, enabled=False):
        x = F.linear(inputs.to(weight.dtype), weight, bias)
        if residuals is not None:
            visible = F.linear(residuals.to(weight.dtype), weight)
            x = x + torch.where(hidden[..., None], mask.to(weight.dtype), visible)
        return (x + position + scale).repeat(copies, 1, 1)
