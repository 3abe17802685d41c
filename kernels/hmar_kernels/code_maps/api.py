"""Maps of codes to a latent: argument checks, choice of implementation.

The mathematics is in reference.py, the kernels in triton.py. Neither has derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference, triton

IMPLEMENTATIONS = ("reference", "triton")
"""Names that `map_codes(..., impl=...)` takes beside "auto"."""


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
        ValueError: shapes, dtypes or devices do not fit together, the implementation cannot take them, or a derivative
            is asked for.
    """
    given = codes, table, row_matrix, column_matrix
    impl = _select(impl, *given)
    _refuse_derivatives(*given)
    if impl == "reference":
        return reference.map_codes(*given)
    return triton.map_codes(*_contiguous(*given), overlap)


def accumulate_codes_(
    f: Tensor,
    codes: Tensor,
    table: Tensor,
    row_matrix: Tensor,
    column_matrix: Tensor,
    downsample: Tensor | None = None,
    *,
    impl: str = "auto",
    overlap: bool = False,
) -> Tensor | None:
    """Add `map_codes` to f, and give what the next scale reads of that.

    Args:
        f: [B, m, m, E], contiguous, for it is changed in place.
        downsample: P [n', m], by which rows and columns of f become those of the next scale; None gives nothing.
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
        raise ValueError(
            f"f must be contiguous {table.dtype} {list(expected)}, got {f.dtype} {list(f.shape)} "
            f"with strides {list(f.stride())}"
        )
    if downsample is not None and (
        downsample.ndim != 2
        or downsample.shape[1] != f.shape[1]
        or not 0 < len(downsample) <= f.shape[1]
        or downsample.dtype != f.dtype
    ):
        raise ValueError(
            f"downsample must be {f.dtype} [n', {f.shape[1]}], a column for each row of f and no more rows, got "
            f"{downsample.dtype} {list(downsample.shape)}"
        )
    for name, x in (("f", f), ("downsample", downsample)):
        if x is not None and x.device != codes.device:
            raise ValueError(f"{name} is on {x.device} and codes are on {codes.device}; move it there")
    _refuse_derivatives(f, *given, *(() if downsample is None else (downsample,)))
    if impl == "reference":
        return reference.accumulate_codes_(f, *given, downsample)
    if downsample is not None:
        downsample = downsample.contiguous()
    return triton.accumulate_codes_(f, *_contiguous(*given), downsample, overlap)


def choose(codes: Tensor, table: Tensor, row_matrix: Tensor, column_matrix: Tensor) -> tuple[str, str]:
    """What impl="auto" takes of IMPLEMENTATIONS, and the reason."""
    if torch.compiler.is_compiling():
        return "reference", "torch.compile traces it"
    reason = triton.unavailable(codes, table, len(row_matrix))
    if codes.is_cuda and reason is None:
        return "triton", "up to three kernels for a gather, products and a sum"
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
    """All but the codes as they are read. Of those the kernel takes images that lie apart, but no codes that do."""
    return codes if codes.stride(1) == 1 else codes.contiguous(), *(x.contiguous() for x in others)


def _refuse_derivatives(*given: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise ValueError("maps of codes have no derivative, and a tensor requires one; under torch.no_grad() they run")


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
