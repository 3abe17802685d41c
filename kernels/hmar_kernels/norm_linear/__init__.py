"""Adaptive layer norm followed by a linear layer, whose input is not kept: `api.py` has the operators."""

from .api import norm_linear, residual_norm_linear

__all__ = ["norm_linear", "residual_norm_linear"]
