"""A linear layer for generation, with norm, GELU and residual around it: `api.py` has the operator."""

from .api import IMPLEMENTATIONS, linear, linear_parts
from .cuda import MAX_NORMED_ROWS, unavailable_on

__all__ = ["IMPLEMENTATIONS", "MAX_NORMED_ROWS", "linear", "linear_parts", "unavailable_on"]
