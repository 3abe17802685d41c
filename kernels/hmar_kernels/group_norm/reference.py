"""Group norm, and SiLU behind it, as torch has them.

y = silu((x - mean) / sqrt(var + eps) weight + bias), mean and var over the positions and channels of a group.

Any memory format, differentiated by autograd. On CUDA torch brings channels-last images into another order and back.
"""

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y) if silu else y
