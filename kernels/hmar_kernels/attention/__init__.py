"""Masked attention: `api.py` checks arguments and picks an implementation; each of those is one file."""

from .api import IMPLEMENTATIONS, attention, choose, unavailable

__all__ = ["IMPLEMENTATIONS", "attention", "choose", "unavailable"]
