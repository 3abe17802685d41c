"""The second half of an MLP, stated plainly, with the tanh form of GELU (Hendrycks and Gimpel, arXiv 1606.08415).

    out = gelu(x + bias) W^T + out_bias,   gelu(u) = u / 2 (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3)))

Any dtype, any device; differentiated by autograd, which keeps x + bias and gelu of it.
"""

import torch
import torch.nn.functional as F


def gelu_linear(
    x: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, out_bias: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """x [..., F], bias [F], weight [M, F], out_bias [M] -> [..., M]; the linear layer is computed in `dtype`."""
    hidden = F.gelu(x + bias.to(x.dtype), approximate="tanh")
    return F.linear(hidden.to(dtype), weight.to(dtype), out_bias.to(dtype))
