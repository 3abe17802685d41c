"""Group norm of channels-last images, with the residual before it, SiLU and a convolution to few channels behind.

`api.py` checks arguments and picks an implementation.
"""

from .api import ChunkStatistics, group_norm, group_norm_conv, residual_group_norm

__all__ = ["ChunkStatistics", "group_norm", "group_norm_conv", "residual_group_norm"]
