"""A linear layer of few rows in Triton: y = gelu(x W^T + b), the weight read once.

Grid: (blocks of columns, blocks of rows); a program owns [BLOCK_M, BLOCK_N] of y and all of K. With few rows the time
is that of reading the weight, which wants many programs, each with much of it on its way: blocks of columns are narrow
(cuBLAS has tiles of 64 and more, 8 to 16 programs for 1024 columns), and loads run `stages` ahead. Sums, bias and GELU
are float32. Results are bit-equal from run to run.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    stages: int


# Rows up to -> tile; more rows take blocks of the last one. By calculation: from 4 to 5 of these stages of 64 to 132
# programs are 2 to 3 MB on their way, which is what 3 TB/s want. Not measured yet.
TILES: dict[int, Tile] = {
    16: Tile(16, 16, 256, 5),
    32: Tile(32, 16, 256, 4),
    64: Tile(64, 32, 128, 4),
}


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = rows < num_rows, columns < N
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * K + offs_k[None, :]
    weight_ptrs = weight_ptr + columns.to(tl.int64)[None, :] * K + offs_k[:, None]

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        mask_k = start + offs_k < K
        x = tl.load(x_ptrs + start, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        weight = tl.load(weight_ptrs + start, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")

    if HAS_BIAS:
        sums += tl.load(bias_ptr + columns, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if GELU:
        # 0.5 (1 + tanh u) = sigmoid(2 u), and 2 sqrt(2 / pi) = 1.5957691
        sums *= tl.sigmoid(1.5957691216057308 * (sums + 0.044715 * sums * sums * sums))
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y_ptrs, sums.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def select_tile(num_rows: int, itemsize: int = 2) -> Tile:
    """The row of the table for so many rows. A pure function of its arguments."""
    tile = next((TILES[rows] for rows in TILES if num_rows <= rows), TILES[max(TILES)])
    # NOTE: twice the bytes would not fit into shared memory.
    return tile if itemsize <= 2 else tile._replace(block_k=tile.block_k // 2)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """x [M, K], weight [N, K], bias [N] -> [M, N]."""
    (M, K), N = x.shape, weight.shape[0]
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    tile = select_tile(M, x.itemsize)
    # NOTE: Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _linear_kernel[(triton.cdiv(N, tile.block_n), triton.cdiv(M, tile.block_m))](
            x_ptr=x,
            weight_ptr=weight,
            bias_ptr=weight if bias is None else bias.contiguous(),
            y_ptr=y,
            num_rows=M,
            N=N,
            K=K,
            HAS_BIAS=bias is not None,
            GELU=gelu,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            STAGES=tile.stages,
            num_warps=4,
        )
    return y
