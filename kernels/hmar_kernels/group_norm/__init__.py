"""Group norm of channels-last images, with the residual before it and SiLU behind it.

`api.py` checks arguments and picks an implementation.
"""

from .api import group_norm, residual_group_norm

__all__ = ["group_norm", "residual_group_norm"]
