"""A linear layer and the tanh form of GELU behind it, as torch has them: y = gelu(x W^T + b).

Any dtype and device, differentiated by autograd.
"""

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y
