"""Group norm, and SiLU behind it, as torch has them; before it, what a convolution leaves to be added.

z = x + shift, or z = x + branch + shift;  y = silu((z - mean) / sqrt(var + eps) weight + bias), mean and var over the
positions and channels of a group.

Any memory format, differentiated by autograd. On CUDA torch brings channels-last images into another order and back.
"""

import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    y = F.group_norm(total(x, None, shift), num_groups, weight, bias, eps)
    return F.silu(y) if silu else y


def total(x: Tensor, branch: Tensor | None, shift: Tensor | None) -> Tensor:
    """x + branch + shift, each of the last two only where it is given."""
    # NOTE: the shift first, to the branch it is the bias of: so rounds the convolution that adds it itself.
    added = x if branch is None else branch
    if shift is not None:
        added = added + shift.to(added.dtype)[:, None, None]
    return added if branch is None else x + added
