"""A linear layer, with GELU behind it, for generation: `api.py` checks arguments and picks an implementation."""

from .api import IMPLEMENTATIONS, linear

__all__ = ["IMPLEMENTATIONS", "linear"]
