"""Fused operators of transformers over pyramids of image tokens.

attention: block-sparse attention. Read `mask.py` first (which tokens see which), then `attention/api.py`.
modulated_norm, qk_norm, linear_cross_entropy: what surrounds it, each in `api.py` of its folder.
"""

from .attention import IMPLEMENTATIONS, attention, choose, explain, unavailable
from .linear_cross_entropy import linear_cross_entropy
from .mask import SpanMask
from .modulated_norm import modulated_norm, residual_modulated_norm
from .qk_norm import qk_norm

__all__ = [
    "IMPLEMENTATIONS",
    "SpanMask",
    "attention",
    "choose",
    "explain",
    "linear_cross_entropy",
    "modulated_norm",
    "qk_norm",
    "residual_modulated_norm",
    "unavailable",
]
