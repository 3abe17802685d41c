"""Bias, GELU and a linear layer, of which only the input is kept: `api.py` has the operator."""

from .api import gelu_linear

__all__ = ["gelu_linear"]
