"""Group norm of channels-last images, with SiLU behind it: `api.py` checks arguments and picks an implementation."""

from .api import group_norm

__all__ = ["group_norm"]
