"""Codes of a scale to tokens of a transformer: `api.py` has the operator."""

from .api import Known, choose, token_embedding

__all__ = ["Known", "choose", "token_embedding"]
