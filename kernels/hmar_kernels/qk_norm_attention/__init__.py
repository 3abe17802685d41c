"""Attention of a packed projection within short images: `api.py` has the operator."""

from .api import Cache, choose, qk_norm_attention
from .triton import MAX_HEAD_DIM, MAX_KEYS

__all__ = ["MAX_HEAD_DIM", "MAX_KEYS", "Cache", "choose", "qk_norm_attention"]
