"""softmax(scale x) over the last dimension, stated plainly. Any dtype, any device; differentiated by autograd."""

import torch


def forward(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """x [..., L] -> [..., L] in `dtype`, computed in x's."""
    return (x * scale).softmax(-1).to(dtype)
