"""Block-sparse attention over pyramids of image tokens, and the operators around it.

Read `mask.py` first (which tokens see which), then `attention/api.py` and `sampling/api.py` (the operators).
"""

from .attention import IMPLEMENTATIONS, attention, choose, explain, unavailable
from .group_norm import group_norm
from .mask import SpanMask
from .sampling import SampledCodes, sample_codes

__all__ = [
    "IMPLEMENTATIONS",
    "SampledCodes",
    "SpanMask",
    "attention",
    "choose",
    "explain",
    "group_norm",
    "sample_codes",
    "unavailable",
]
