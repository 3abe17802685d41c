"""Group norm of channels-last images, with the residual before it, SiLU and a convolution to few channels behind;
or factors alone, for what applies them itself.

`api.py` checks arguments and picks an implementation.
"""

from .api import (
    ChunkStatistics,
    NormFactors,
    group_norm,
    group_norm_conv,
    group_norm_factors,
    residual_group_norm,
    residual_group_norm_factors,
)

__all__ = [
    "ChunkStatistics",
    "NormFactors",
    "group_norm",
    "group_norm_conv",
    "group_norm_factors",
    "residual_group_norm",
    "residual_group_norm_factors",
]
