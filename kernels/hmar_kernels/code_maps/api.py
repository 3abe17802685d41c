"""Maps of codes to a latent: argument checks, choice of implementation.

The mathematics is in reference.py, the kernels in triton.py. Neither has derivatives: f is changed in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference, triton

IMPLEMENTATIONS = ("reference", "triton")
"""Names that `map_codes(..., impl=...)` takes beside "auto"."""


@torch.no_grad()
def map_codes(
    codes: Tensor,
    table: Tensor,
    row_matrix: Tensor,
    column_matrix: Tensor,
    *,
    impl: str = "auto",
    overlap: bool = False,
) -> Tensor:
    """A square of codes n x n, as vectors of a table, mapped along rows and along columns to m x m.

    Args:
        codes: int64 [B, n^2], row by row; of the table, which is not checked.
        table: T [3, V, 3 E]: for each of three taps along rows every code's vectors of three taps along columns.
        row_matrix: R [m, 3 n], the n numbers of each tap side by side.
        column_matrix: C [m, 3 n], the three taps of each of n side by side.
        impl: "auto", "reference" or "triton", which takes float32 and m up to triton.MAX_SIDE. A named implementation
            runs or raises; `choose` tells what "auto" takes.
        overlap: of "triton": its kernels but the first may be launched before those queued before them have ended,
            and then wait. Without effect below compute capability 9.0.
    Returns:
        [B, m, m, E] in the table's dtype, whatever autocast says: sum_dd' R_d T_dd'[codes] C_d'^T.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the implementation cannot take them.
    """
    given = codes, table, row_matrix, column_matrix
    if _select(impl, *given) == "reference":
        return reference.map_codes(*given)
    return triton.map_codes(*_contiguous(*given), overlap)


@torch.no_grad()
def add_codes_(
    f: Tensor,
    codes: Tensor,
    table: Tensor,
    row_matrix: Tensor,
    column_matrix: Tensor,
    shrink: Tensor | None = None,
    *,
    impl: str = "auto",
    overlap: bool = False,
) -> Tensor | None:
    """Add `map_codes` to f, and give what the next scale reads of that.

    Args:
        f: [B, m, m, E], contiguous; changed in place.
        shrink: P [n', m], by which rows and columns of f become those of the next scale; None gives nothing.
        codes, table, row_matrix, column_matrix, impl, overlap: as in `map_codes`.
    Returns:
        P f P^T [B, n', n', E], or None without P.
    Raises:
        ValueError: as in `map_codes`; f is as it was.
    """
    given = codes, table, row_matrix, column_matrix
    impl = _select(impl, *given)
    expected = len(codes), len(row_matrix), len(row_matrix), table.shape[2] // 3
    if f.shape != expected or f.dtype != table.dtype or not f.is_contiguous():
        raise ValueError(f"f must be contiguous {table.dtype} {list(expected)}, got {f.dtype} {list(f.shape)}")
    if shrink is not None and (
        shrink.ndim != 2
        or shrink.shape[1] != f.shape[1]
        or not 0 < len(shrink) <= f.shape[1]
        or shrink.dtype != f.dtype
    ):
        raise ValueError(
            f"shrink must be {f.dtype} [n', {f.shape[1]}], a column for each row of f and no more rows, got "
            f"{shrink.dtype} {list(shrink.shape)}"
        )
    for name, x in (("f", f), ("shrink", shrink)):
        if x is not None and x.device != codes.device:
            raise ValueError(f"{name} is on {x.device} and codes are on {codes.device}; move it there")
    if impl == "reference":
        return reference.add_codes_(f, *given, shrink)
    return triton.add_codes_(f, *_contiguous(*given), shrink if shrink is None else shrink.contiguous(), overlap)


def choose(codes: Tensor, table: Tensor, row_matrix: Tensor, column_matrix: Tensor) -> tuple[str, str]:
    """What impl="auto" takes of IMPLEMENTATIONS, and the reason."""
    reason = triton.unavailable(codes, table, len(row_matrix))
    if codes.is_cuda and reason is None:
        return "triton", "two kernels for a gather, two products and a sum"
    return "reference", reason or "the plain implementation serves CPU tensors"


def _select(impl: str, *given: Tensor) -> str:
    _check(*given)
    if impl == "auto":
        return choose(*given)[0]
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f'unknown impl "{impl}": expected "auto", "reference" or "triton"')
    codes, table, row_matrix, _ = given
    reason = triton.unavailable(codes, table, len(row_matrix)) if impl == "triton" else None
    if reason is not None:
        raise ValueError(f'impl="triton" cannot run here: {reason}; impl="reference" would')
    return impl


def _contiguous(codes: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return codes, *(x.contiguous() for x in others)


def _check(codes: Tensor, table: Tensor, row_matrix: Tensor, column_matrix: Tensor) -> None:
    if table.ndim != 3 or len(table) != 3 or table.shape[2] % 3 or 0 in table.shape or not table.is_floating_point():
        raise ValueError(f"table must be floats [3, V, 3 E], got {table.dtype} {list(table.shape)}")
    shape = tuple(row_matrix.shape)
    if len(shape) != 2 or shape[1] % 3 or 0 in shape or column_matrix.shape != shape:
        raise ValueError(
            f"row_matrix and column_matrix must be [m, 3 n], got {list(shape)} and {list(column_matrix.shape)}"
        )
    n = shape[1] // 3
    if codes.ndim != 2 or codes.shape[1] != n * n or len(codes) == 0 or codes.dtype != torch.int64:
        raise ValueError(
            f"codes must be int64 [B, {n * n}], as matrices are [m, 3 x {n}], got {codes.dtype} {list(codes.shape)}"
        )
    for name, x in (("table", table), ("row_matrix", row_matrix), ("column_matrix", column_matrix)):
        if x.device != codes.device:
            raise ValueError(f"{name} is on {x.device} and codes are on {codes.device}; move it there")
        if x.dtype != table.dtype:
            raise ValueError(f"table and matrices must have one dtype, got {table.dtype} and {x.dtype} for {name}")
