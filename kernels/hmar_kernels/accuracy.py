"""How far an implementation may be from the float64 reference: the one tolerance rule of tests and benchmarks.

Over every 64 rows of a tensor [..., L, D] the norm of the error is at most twice that of eager attention in the same
dtype (which rounds its intermediate results), plus one unit in the last place of the result's norm, plus a few float32
ulps of unit-sized entries (gradients cancel: a query with one key has an exact dq of zero). Rows are judged in groups
because their sizes differ: the first scales see few keys and have outputs a hundred times larger than the last, which
a limit on the whole tensor would not protect.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ROWS = 64
EAGER_FACTOR = 2.0
ULPS = 1.0
FLOAT32_ULPS = 32.0


def row_group_norms(x: torch.Tensor) -> torch.Tensor:
    """Norm of every 64 rows of [..., L, D], float64 [..., groups]; the last few rows count with the 64 before them."""
    squares = x.double().square().sum(-1)
    groups = max(1, squares.shape[-1] // ROWS)
    whole, rest = squares[..., : groups * ROWS], squares[..., groups * ROWS :]
    sums = F.pad(whole, (0, groups * ROWS - whole.shape[-1])).unflatten(-1, (groups, ROWS)).sum(-1)
    sums[..., -1] += rest.sum(-1)
    return sums.sqrt()


def limits(exact: torch.Tensor, eager: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Largest tolerated error norm of each group of rows, float64 [..., groups].

    Args:
        exact: float64 [..., L, D], the reference.
        eager: the reference run in the dtype under test, same shape.
        dtype: whose unit in the last place counts, by default eager's. A float32 sum over what was rounded to a lower
            dtype is no better known than that.
    """
    ulp = torch.finfo(dtype or eager.dtype).eps
    floor = FLOAT32_ULPS * torch.finfo(torch.float32).eps * row_group_norms(torch.ones_like(exact))
    return EAGER_FACTOR * row_group_norms(eager.double() - exact) + ULPS * ulp * row_group_norms(exact) + floor
