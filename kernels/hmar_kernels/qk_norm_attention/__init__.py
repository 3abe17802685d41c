"""Attention of a packed projection within short images: `api.py` has the operator."""

from .api import KVCache, choose, qk_norm_attention
from .triton import MAX_HEAD_DIM, MAX_LENGTH

__all__ = ["MAX_HEAD_DIM", "MAX_LENGTH", "KVCache", "choose", "qk_norm_attention"]
