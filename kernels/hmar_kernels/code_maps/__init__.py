"""What the codes of a scale add to the latent, and what the next scale reads of it: `api.py` has the operators."""

from .api import add_codes_, choose, map_codes

__all__ = ["add_codes_", "choose", "map_codes"]
