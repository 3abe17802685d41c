"""The model with plain PyTorch in place of every fused operator: what published code and oracles compute with.

Attention has an argument for that; the other operators of hmar.model are replaced here, and its MLP by the published
one, in which the bias before GELU belongs to the first linear layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

import hmar.model
from hmar.model import MLP, Residual

OPERATORS = (
    "modulated_norm",
    "residual_modulated_norm",
    "norm_linear",
    "residual_norm_linear",
    "qk_norm",
    "linear_cross_entropy",
)


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Within it hmar.model calls the reference version of OPERATORS, and MLPs are plain."""
    fused, mlp = {name: getattr(hmar.model, name) for name in OPERATORS}, MLP.forward
    try:
        for name, operator in fused.items():
            setattr(hmar.model, name, functools.partial(operator, impl="reference"))
        MLP.forward = _mlp
        yield
    finally:
        MLP.forward = mlp
        for name, operator in fused.items():
            setattr(hmar.model, name, operator)


def _mlp(self: MLP, stream: Residual, scale_B1C: Tensor, shift_B1C: Tensor) -> tuple[Tensor, Tensor]:
    x_BLC, h_BLC = stream.norm(scale_B1C, shift_B1C)
    return x_BLC, self.fc2(F.gelu(self.fc1(h_BLC), approximate="tanh"))
