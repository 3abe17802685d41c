"""Block-sparse attention over pyramids of image tokens.

Read `mask.py` first (which tokens see which), then `attention/api.py` (the operator).
"""

from .attention import IMPLEMENTATIONS, attention, choose, explain, unavailable
from .mask import SpanMask

__all__ = ["IMPLEMENTATIONS", "SpanMask", "attention", "choose", "explain", "unavailable"]
