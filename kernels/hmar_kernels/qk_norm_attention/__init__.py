"""Attention of a packed projection within short images: `api.py` has the operator."""

from .api import choose, qk_norm_attention

__all__ = ["choose", "qk_norm_attention"]
