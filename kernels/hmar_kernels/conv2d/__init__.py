"""Convolutions of channels-last maps that keep the resolution, and transposed ones that double it. Inference only.

`api.py` checks arguments and picks an implementation; `hopper.py` has the hand-written one.
"""

from .api import (
    choose,
    conv2d,
    conv2d_with_statistics,
    conv_transpose2d,
    conv_transpose2d_with_statistics,
    packed_taps,
)
from .hopper import unavailable_on

__all__ = [
    "choose",
    "conv2d",
    "conv2d_with_statistics",
    "conv_transpose2d",
    "conv_transpose2d_with_statistics",
    "packed_taps",
    "unavailable_on",
]
