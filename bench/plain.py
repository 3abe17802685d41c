"""The model with plain PyTorch in place of every fused operator: what published code and oracles compute with.

Attention has an argument for that; the other operators of hmar.model are replaced here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import hmar.model

OPERATORS = ("modulated_norm", "residual_modulated_norm", "qk_norm", "linear_cross_entropy")


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Within it hmar.model calls the reference version of OPERATORS."""
    fused = {name: getattr(hmar.model, name) for name in OPERATORS}
    try:
        for name, operator in fused.items():
            setattr(hmar.model, name, functools.partial(operator, impl="reference"))
        yield
    finally:
        for name, operator in fused.items():
            setattr(hmar.model, name, operator)
