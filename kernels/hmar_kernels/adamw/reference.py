"""AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), stated plainly, for one tensor.

g = grad / grad_scale;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
w = w (1 - lr decay) - lr m / (1 - b1^step) / (sqrt(v / (1 - b2^step)) + eps)
"""

import torch


def adamw(
    weight: torch.Tensor,
    grad: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    grad_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The new weight, m and v; step counts from 1."""
    g = grad / grad_scale
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g.square()
    update = m / (1 - betas[0] ** step) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
    return weight * (1 - lr * decay) - lr * update, m, v
