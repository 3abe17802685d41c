"""Masked attention: `api.py` checks arguments and picks an implementation; each of those is one file."""

from .api import IMPLEMENTATIONS, attention, choose, unavailable
from .explain import explain

__all__ = ["IMPLEMENTATIONS", "attention", "choose", "explain", "unavailable"]
