"""A linear layer for generation, with norm, GELU and residual around it: `api.py` has the operator."""

from .api import IMPLEMENTATIONS, linear
from .cuda import unavailable_on

__all__ = ["IMPLEMENTATIONS", "linear", "unavailable_on"]
