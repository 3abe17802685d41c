"""Drawing codes from logits: `api.py` checks arguments and picks an implementation, `reference.py` states the draw."""

from .api import SampledCodes, choose, sample_codes

__all__ = ["SampledCodes", "choose", "sample_codes"]
