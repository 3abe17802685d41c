"""What the codes of a scale add to the latent, and what the next scale reads of it: `api.py` has the operators."""

from .api import accumulate_codes_, choose, map_codes

__all__ = ["accumulate_codes_", "choose", "map_codes"]
