"""Maps of a square of codes in Triton: the gather within the product with R, the sum with f and half of the next
scale's product within the one with C.

    rows      H[b, r, (j, d'), e] = sum_di R[r, (d, i)] T_dd'[z[b, i, j]]   grid: (j of all images, tiles of r, of d' e)
    columns   f[b, r] (+)= C H[b, r],   G[b, r] = P f[b, r]                 grid: r of all images, tiles of e
    downsample    next[b] = P G[b]                                              grid: (images, tiles of p, of q e)

Products and sums are float32 without TF32. With OVERLAP the second and third start while the one before them still
runs; the first does not, so that what follows may read, before it waits, all that was written before these kernels.

The equations are stated in reference.py; argument checks live in api.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import triton_device
from ..triton_device import on_device, overlaps

MAX_SIDE = 64  # of f, of which a program has a row
BLOCK_K, BLOCK_N, WARPS = 32, 32, 4


@triton.jit
def _load(ptr, row, mask_row, stride, column, mask_column):
    mask = mask_row[:, None] & mask_column[None, :]
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=["codes_stride", "num_codes", "n", "m"], do_not_specialize_on_alignment=["codes_ptr"]
)  # codes of a scale begin anywhere in those of the image
def _rows_kernel(
    codes_ptr,
    table_ptr,
    matrix_ptr,
    rows_ptr,
    codes_stride,
    num_codes,
    n,
    m,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    b, j = tl.program_id(0) // n, tl.program_id(0) % n
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < m, offs_n < TAPS
    codes_ptr += b.to(tl.int64) * codes_stride + j
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, 3 * n, BLOCK_K):
        offs_k = begin + tl.arange(0, BLOCK_K)
        mask_k = offs_k < 3 * n
        d, i = offs_k // n, offs_k % n
        code = tl.load(codes_ptr + i * n, mask=mask_k, other=0)
        taps = _load(table_ptr, d * num_codes + code, mask_k, TAPS, offs_n, mask_n)
        matrix = _load(matrix_ptr, offs_m, mask_m, 3 * n, offs_k, mask_k)
        acc += tl.dot(matrix, taps, input_precision="ieee")
    rows_ptr += (b.to(tl.int64) * m * n + j) * TAPS
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(rows_ptr + offs_m[:, None] * (n * TAPS) + offs_n[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["length", "m", "next_side"])
def _columns_kernel(
    rows_ptr,
    matrix_ptr,
    f_ptr,
    downsample_ptr,
    halfway_ptr,
    length,
    m,
    next_side,
    E: tl.constexpr,
    ADD: tl.constexpr,
    DOWNSAMPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    offs_m, offs_e = tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_m, mask_e = offs_m < m, offs_e < E
    rows_ptr += row * length * E
    f_ptr += row * m * E
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for begin in range(0, length, BLOCK_K):
        offs_k = begin + tl.arange(0, BLOCK_K)
        mask_k = offs_k < length
        matrix = _load(matrix_ptr, offs_m, mask_m, length, offs_k, mask_k)
        acc += tl.dot(matrix, _load(rows_ptr, offs_k, mask_k, E, offs_e, mask_e), input_precision="ieee")
    if ADD:
        acc += _load(f_ptr, offs_m, mask_m, E, offs_e, mask_e)
    tl.store(f_ptr + offs_m[:, None] * E + offs_e[None, :], acc, mask=mask_m[:, None] & mask_e[None, :])
    if DOWNSAMPLE:
        offs_q = tl.arange(0, BLOCK_Q)
        mask_q = offs_q < next_side
        downsample = _load(downsample_ptr, offs_q, mask_q, m, offs_m, mask_m)
        halfway = tl.dot(downsample, acc, input_precision="ieee")
        halfway_ptr += row * next_side * E
        mask = mask_q[:, None] & mask_e[None, :]
        tl.store(halfway_ptr + offs_q[:, None] * E + offs_e[None, :], halfway, mask=mask)


@triton.jit(do_not_specialize=["m", "next_side", "width"])
def _downsample_kernel(
    halfway_ptr,
    downsample_ptr,
    out_ptr,
    m,
    next_side,
    width,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_n, mask_p = offs_n < width, offs_p < next_side
    halfway_ptr += b * m * width
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for begin in range(0, m, BLOCK_K):
        offs_k = begin + tl.arange(0, BLOCK_K)
        mask_k = offs_k < m
        downsample = _load(downsample_ptr, offs_p, mask_p, m, offs_k, mask_k)
        acc += tl.dot(downsample, _load(halfway_ptr, offs_k, mask_k, width, offs_n, mask_n), input_precision="ieee")
    out_ptr += b * next_side * width
    tl.store(out_ptr + offs_p[:, None] * width + offs_n[None, :], acc, mask=mask_p[:, None] & mask_n[None, :])


def unavailable(codes: Tensor, table: Tensor, side: int) -> str | None:
    """Why the kernels cannot run on maps to `side` rows and columns; None when they can."""
    if table.dtype != torch.float32:
        return f"they take tables and matrices of float32, not {table.dtype}"
    if side > MAX_SIDE:
        return f"they take maps of up to {MAX_SIDE} rows, got {side}"
    return triton_device.unavailable(codes.device, table.dtype)


def map_codes(codes: Tensor, table: Tensor, row_matrix: Tensor, column_matrix: Tensor, overlap: bool) -> Tensor:
    """codes [B,n^2], table [3,V,3E], row_matrix [m,(d,n)], column_matrix [m,(n,d)] -> [B,m,m,E]."""
    m, dims = len(row_matrix), table.shape[2] // 3
    out = table.new_empty(len(codes), m, m, dims)
    _launch(out, codes, table, row_matrix, column_matrix, overlap, add=False)
    return out


def accumulate_codes_(
    f: Tensor,
    codes: Tensor,
    table: Tensor,
    row_matrix: Tensor,
    column_matrix: Tensor,
    downsample: Tensor | None,
    overlap: bool,
) -> Tensor | None:
    """f [B,m,m,E] contiguous, downsample [n',m] -> [B,n',n',E], or nothing without downsample."""
    if downsample is None:
        _launch(f, codes, table, row_matrix, column_matrix, overlap, add=True)
        return None
    batch, m, _, dims = f.shape
    next_side = len(downsample)
    halfway, out = f.new_empty(batch, m, next_side, dims), f.new_empty(batch, next_side, next_side, dims)
    _launch(f, codes, table, row_matrix, column_matrix, overlap, add=True, downsample=downsample, halfway=halfway)
    width, block_p = next_side * dims, _block(next_side)
    with on_device(f):
        _downsample_kernel[(batch, triton.cdiv(next_side, block_p), triton.cdiv(width, BLOCK_N))](
            halfway_ptr=halfway,
            downsample_ptr=downsample,
            out_ptr=out,
            m=m,
            next_side=next_side,
            width=width,
            BLOCK_P=block_p,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=WARPS,
            **_ahead(f, overlap),
        )
    return out


def _launch(
    out: Tensor,
    codes: Tensor,
    table: Tensor,
    row_matrix: Tensor,
    column_matrix: Tensor,
    overlap: bool,
    *,
    add: bool,
    downsample: Tensor | None = None,
    halfway: Tensor | None = None,
) -> None:
    """The first two kernels: the map to out [B,m,m,E], written or added; with downsample, G to halfway [B,m,n',E]."""
    batch, dims = len(codes), table.shape[2] // 3
    m, n = len(row_matrix), row_matrix.shape[1] // 3
    rows = table.new_empty(batch, m, 3 * n, dims)
    next_side = 0 if downsample is None else len(downsample)
    block = _block(m)
    with on_device(out):
        _rows_kernel[(batch * n, triton.cdiv(m, block), triton.cdiv(3 * dims, BLOCK_N))](
            codes_ptr=codes,
            table_ptr=table,
            matrix_ptr=row_matrix,
            rows_ptr=rows,
            codes_stride=codes.stride(0),
            num_codes=table.shape[1],
            n=n,
            m=m,
            TAPS=3 * dims,
            BLOCK_M=block,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            OVERLAP=overlap and overlaps(out.device),
            num_warps=WARPS,
        )
        _columns_kernel[(batch * m, triton.cdiv(dims, BLOCK_N))](
            rows_ptr=rows,
            matrix_ptr=column_matrix,
            f_ptr=out,
            downsample_ptr=out if downsample is None else downsample,
            halfway_ptr=out if halfway is None else halfway,
            length=3 * n,
            m=m,
            next_side=next_side,
            E=dims,
            ADD=add,
            DOWNSAMPLE=downsample is not None,
            BLOCK_M=block,
            BLOCK_Q=_block(next_side),
            BLOCK_E=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=WARPS,
            **_ahead(out, overlap),
        )


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _ahead(x: Tensor, overlap: bool) -> dict[str, bool]:
    overlap = overlap and overlaps(x.device)
    return {"OVERLAP": overlap} | ({"launch_pdl": True} if overlap else {})
