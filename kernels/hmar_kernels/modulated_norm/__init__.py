"""Layer norm scaled and shifted by the class, with the gated residual before it: `api.py` has the operators."""

from .api import choose, modulated_norm, residual_modulated_norm, summed_modulated_norm

__all__ = ["choose", "modulated_norm", "residual_modulated_norm", "summed_modulated_norm"]
