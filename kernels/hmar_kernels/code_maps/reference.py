"""Maps of a square of codes, stated plainly: with taps d, d' of three,

    map[z] = sum_dd' R_d T_dd'[z] C_d'^T,   f += map[z],   next = P f P^T

R_d and C_d' [m, n] act on rows and columns of the square [n, n], T_dd' has E numbers for each code, and P [n', m] is
that of the next scale. Any dtype, any device. Autocast is off: sums are of the tensors' own precision.
"""

from __future__ import annotations

import torch
from torch import Tensor


def map_codes(codes: Tensor, table: Tensor, row_matrix: Tensor, column_matrix: Tensor) -> Tensor:
    """codes [B, n^2], table [3, V, 3 E], row_matrix [m, (d, n)], column_matrix [m, (n, d)] -> [B, m, m, E]."""
    with torch.autocast(codes.device.type, enabled=False):
        columns, rows = _factors(codes, table, row_matrix, column_matrix)
        m = len(row_matrix)
        return torch.bmm(columns, rows).view(len(codes), m, m, -1)


def accumulate_codes_(
    f: Tensor, codes: Tensor, table: Tensor, row_matrix: Tensor, column_matrix: Tensor, downsample: Tensor | None
) -> Tensor | None:
    """f [B, m, m, E], which is changed, downsample [n', m] -> [B, n', n', E]; nothing without downsample."""
    with torch.autocast(codes.device.type, enabled=False):
        f.flatten(0, 1).baddbmm_(*_factors(codes, table, row_matrix, column_matrix))
        if downsample is None:
            return None
        batch, side, _, dims = f.shape
        n = len(downsample)
        rows = torch.bmm(downsample.expand(batch, -1, -1), f.flatten(2)).view(batch * n, side, dims)
        return torch.bmm(downsample.expand(batch * n, -1, -1), rows).view(batch, n, n, dims)


def _factors(codes: Tensor, table: Tensor, row_matrix: Tensor, column_matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors [B m, m, 3 n] and [B m, 3 n, E] whose product is the map [B m, m, E]."""
    batch, m, n = len(codes), row_matrix.shape[0], row_matrix.shape[1] // 3
    # NOTE: a gather of expanded views is one kernel; an embedding would need the codes of every d, made by another.
    index = codes[:, None, :, None].expand(-1, 3, -1, table.shape[2])
    taps = table.expand(batch, -1, -1, -1).gather(2, index).view(batch, 3 * n, -1)
    rows = torch.bmm(row_matrix.expand(batch, -1, -1), taps).view(batch * m, 3 * n, -1)
    return column_matrix.expand(batch * m, -1, -1), rows
