"""Transformer blocks of generation, all of a pass in one kernel where rows are few: `api.py` has the operator."""

from .api import IMPLEMENTATIONS, transformer_blocks
from .cuda import MAX_ROWS, Table, refusal_of_rows, unavailable_on
from .reference import BlockWeights

__all__ = [
    "IMPLEMENTATIONS",
    "MAX_ROWS",
    "BlockWeights",
    "Table",
    "refusal_of_rows",
    "transformer_blocks",
    "unavailable_on",
]
