"""Split of a packed projection into heads with q and k of unit length: `api.py` has the operator."""

from .api import choose, qk_norm

__all__ = ["choose", "qk_norm"]
