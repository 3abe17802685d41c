"""Products of matrices whose result has more bits than they have: gradients of float32 weights under autocast."""

import torch


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a [M, K] b [K, N] of one dtype -> [M, N] in `dtype`. Sums are float32; on a GPU a float32 result is never rounded
    to the dtype of a and b, nor written twice."""
    if a.is_cuda and dtype == torch.float32 and a.dtype in (torch.float16, torch.bfloat16) and a.shape[1]:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def product_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """In which a linear layer computes: autocast's dtype where that is on, else that of its weight."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
