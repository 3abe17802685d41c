"""Drawing codes from logits: `api.py` checks arguments and picks an implementation, `reference.py` states the draw."""

from .api import SampledCodes, sample_codes

__all__ = ["SampledCodes", "sample_codes"]
