"""Which codes masked prediction hides again: `api.py` has the operator."""

from .api import LeastConfident, least_confident

__all__ = ["LeastConfident", "least_confident"]
