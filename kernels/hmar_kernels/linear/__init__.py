"""A linear layer for generation, with norm, GELU and residual around it: `api.py` has the operator."""

from .api import IMPLEMENTATIONS, linear
from .triton import num_counters

__all__ = ["IMPLEMENTATIONS", "linear", "num_counters"]
