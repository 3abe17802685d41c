"""A linear layer as torch has it, between an adaptive layer norm and a gated residual where these are given.

    y = gelu(h W^T + b)  or  residual + gate gelu(...);   h = x  or  h = LN(x) (1 + scale) + shift

with the norm and the residual of `modulated_norm/reference.py` and the tanh form of GELU, where it is wanted. Any dtype
and device, differentiated by autograd.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modulated_norm import reference

TILE = 64  # numbers of a row that have statistics of their own


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, Tensor] | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    h = x if norm is None else reference.norm(x, *norm, eps).to(weight.dtype)
    y = F.linear(h, weight, bias)
    y = F.gelu(y, approximate="tanh") if gelu else y
    return y if residual is None else reference.residual(residual, y, gate, None).to(residual.dtype)


def statistics(y: Tensor) -> Tensor:
    """y [..., N] -> [..., ceil(N / TILE), 2], at least float32: of each tile of a row the mean and the sum of squared
    distances from it; the last tile may be shorter."""
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    tiles = y.split(TILE, dim=-1)
    means = [tile.mean(-1, keepdim=True) for tile in tiles]
    squares = [(tile - mean).square().sum(-1, keepdim=True) for tile, mean in zip(tiles, means, strict=True)]
    return torch.stack([torch.cat(means, -1), torch.cat(squares, -1)], -1)
