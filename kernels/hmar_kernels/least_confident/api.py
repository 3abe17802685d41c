"""The codes that masked prediction hides again: argument checks, choice of implementation.

The order is stated in reference.py, the kernel in triton.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import triton_device
from . import reference, triton

IMPLEMENTATIONS = ("reference", "triton")
"""Names that `least_confident(..., impl=...)` takes beside "auto"."""


class LeastConfident(NamedTuple):
    """The codes that stay hidden.

    Attributes:
        places: int64 [B, count], within the scale, the least confident first.
        positions: int64 [B, count], the same within the pyramid.
        hidden: bool [B, n], True at these places.
    """

    places: Tensor
    positions: Tensor
    hidden: Tensor


def least_confident(
    confidence: Tensor, hidden: Tensor | None = None, *, count: int, first: int = 0, impl: str = "auto"
) -> LeastConfident:
    """The `count` hidden codes of lowest confidence of each image.

    Args:
        confidence: [B, n]; of equal ones those at lower places come first, and NaN last.
        hidden: bool [B, n], which codes are hidden; None: all. Others come after all that are not NaN.
        count: from 1 to n.
        first: position of the scale within the pyramid.
        impl: "auto" or one of IMPLEMENTATIONS; "triton" takes float32 and compares every code with every other, which
            is for scales of some thousands. A named implementation runs or raises.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the implementation cannot take them.
    """
    if confidence.ndim != 2 or 0 in confidence.shape or not confidence.is_floating_point():
        raise ValueError(
            f"confidence must be floats [images, codes], none of them 0, got {confidence.dtype} "
            f"{list(confidence.shape)}"
        )
    if hidden is not None and (hidden.shape, hidden.dtype) != (confidence.shape, torch.bool):
        raise ValueError(f"hidden must be bool {list(confidence.shape)}, got {hidden.dtype} {list(hidden.shape)}")
    if hidden is not None and hidden.device != confidence.device:
        raise ValueError(f"hidden is on {hidden.device} and confidence is on {confidence.device}; move it there")
    if not 1 <= count <= confidence.shape[1]:
        raise ValueError(f"count is {count}; it must be from 1 to the {confidence.shape[1]} codes of an image")
    reason = None if confidence.dtype == torch.float32 else f"it takes float32, not {confidence.dtype}"
    reason = reason or triton_device.unavailable(confidence.device, confidence.dtype)
    if impl == "auto":
        impl = "triton" if reason is None and confidence.is_cuda else "reference"
    elif impl not in IMPLEMENTATIONS:
        raise ValueError(f'unknown impl "{impl}": expected "auto" or one of {", ".join(IMPLEMENTATIONS)}')
    elif impl == "triton" and reason is not None:
        raise ValueError(f'impl="triton" cannot run here: {reason}; impl="auto" would take "reference"')
    forward = reference.forward if impl == "reference" else triton.forward
    return LeastConfident(*forward(confidence, hidden, count, first))
