"""The raw results of attention: kind "attention", version 2, one row per cell, implementation and direction.

Read next: results.py, the file; work.py, the FLOPs and bytes of a row.
"""

from __future__ import annotations

from . import work
from .results import Results
from .shapes import Cell


def key(cell: Cell, implementation: str, direction: str) -> tuple:
    return cell.pattern, cell.sides, cell.batch, cell.heads, cell.head_dim, cell.dtype, implementation, direction


def key_of(row: dict) -> tuple:
    names = ("pattern", "sides", "batch", "heads", "head_dim", "dtype", "impl", "direction")
    return tuple(tuple(row[name]) if name == "sides" else row[name] for name in names)


def describe(cell: Cell, direction: str) -> dict:
    """What a row says of its cell."""
    return {
        "pattern": cell.pattern,
        "resolution": cell.resolution,
        "sides": list(cell.sides),
        "length": cell.length,
        "pairs": cell.pairs,
        "batch": cell.batch,
        "heads": cell.heads,
        "head_dim": cell.head_dim,
        "dtype": cell.dtype,
        "direction": direction,
        "flops": work.flops(cell, direction),
        "bytes": work.fewest_bytes(cell, direction),
        "fewest_extra_bytes": work.fewest_extra_bytes(cell, direction),
    }


NUMBERS = ("ms", "p10_ms", "p90_ms", "rounds", "host_us", "first_call_s", "peak_bytes", "extra_bytes", "check")


def row_without_numbers(cell: Cell, implementation: str, ours: bool, direction: str, status: str, reason: str) -> dict:
    found = {"impl": implementation, "ours": ours, "status": status, "reason": reason}
    return describe(cell, direction) | found | dict.fromkeys(NUMBERS)


class AttentionResults(Results):
    kind, version = "attention", 2
    key_of = staticmethod(key_of)
