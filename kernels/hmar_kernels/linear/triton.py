"""A linear layer of few rows in Triton, with the norm before it and the gated residual behind it.

    y = gelu(h W^T + b)  or  y = residual + gate (h W^T + b);   h = x  or  h = LN(x) (1 + scale) + shift

Grid: (blocks of columns, splits of K, blocks of rows); a program owns [BLOCK_M, BLOCK_N] of y and its split of K, as
GROUPS parts that its warps multiply side by side: with so few rows one warp's chain of products would take longer than
reading the weight. Blocks of columns are narrow, so that every multiprocessor reads a part of the weight. Of several
splits the last one to arrive adds all of them up in their order. Statistics, sums, bias, GELU and gate are float32; h
has the weight's dtype. Results are bit-equal from run to run.

With OVERLAP the kernel starts while the one before it still runs (programmatic dependent launch), reads its part of the
weight, into registers or at least into the L2 cache, and only then waits for the end of that kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..triton_device import on_device, overlaps


class Tile(NamedTuple):
    """block_k: of K at once, in `groups` parts."""

    block_n: int
    block_k: int
    groups: int
    splits: int
    stages: int
    warps: int


# K up to -> tile. By calculation: a program reads its rows from L2 at 64 bytes a clock, so tiles are narrow, and splits
# are where few programs would read long rows. `python -m bench.tune_linear` prints what is fastest; with more than ROWS
# rows that is cuBLAS.
ROWS = 16  # of a block; more rows take several
WIDE = 1 << 30
TILES: dict[int, Tile] = {
    1024: Tile(16, 1024, 8, 1, 1, 8),
    2560: Tile(16, 256, 4, 1, 3, 4),
    4096: Tile(16, 1024, 8, 4, 1, 8),
    WIDE: Tile(16, 512, 4, 1, 4, 4),
}
BLOCKS = 132  # of columns at most, one for every multiprocessor of an H100, where blocks need not exceed the next
MAX_BLOCK_N = 64  # columns of a block
LINE_BYTES = 128  # of the L2 cache


@triton.jit
def _prefetch(ptrs):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _statistics(x, mask, count):
    """Mean and sum of squared deviations of x [G, M, K / G], which is 0 outside of the mask."""
    mean = tl.sum(tl.sum(x, 2), 0) / count
    centred = tl.where(mask, x - mean[None, :, None], 0.0)
    return mean, tl.sum(tl.sum(centred * centred, 2), 0)


@triton.jit
def _normalised(x, mean, rstd, scale, shift):
    return (x - mean[None, :, None]) * rstd[None, :, None] * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)


@triton.jit(do_not_specialize=["num_rows", "length"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    gate_ptr,
    y_ptr,
    partials_ptr,
    counters_ptr,
    scale_stride,
    shift_stride,
    gate_stride,
    num_rows,
    length,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    LINE: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    split = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    images = rows // length
    mask_m, mask_n = rows < num_rows, columns < N
    # NOTE: 32-bit offsets, for half of the instructions before the first load are addresses; api.py checks sizes.
    # k of a block as [G, K / G], with a place for rows and one for columns
    offs_k = tl.arange(0, GROUPS)[:, None] * (BLOCK_K // GROUPS) + tl.arange(0, BLOCK_K // GROUPS)[None, :]
    offs_x, offs_w = offs_k[:, None, :], offs_k[:, :, None]
    begin = split * SPLIT_K
    end = tl.minimum(begin + SPLIT_K, K)
    x_ptrs = x_ptr + rows[None, :, None] * K + offs_x
    scale_ptrs = scale_ptr + images[None, :, None] * scale_stride + offs_x
    shift_ptrs = shift_ptr + images[None, :, None] * shift_stride + offs_x
    weight_ptrs = weight_ptr + columns[None, None, :] * K + offs_w

    # what does not depend on the kernel before
    if SPLIT_K <= BLOCK_K:
        mask_w = mask_n[None, None, :]
        mask_x = mask_m[None, :, None]
        if not EVEN:
            mask_w &= begin + offs_w < end
            mask_x &= begin + offs_x < end
        weight = tl.load(weight_ptrs + begin, mask=mask_w, other=0.0, eviction_policy="evict_first")
    elif OVERLAP:
        for start in tl.static_range(0, SPLIT_K, BLOCK_K):
            lines = begin + start + tl.arange(0, BLOCK_K // LINE) * LINE
            inside = tl.minimum(lines, end - 1)
            _prefetch(weight_ptr + tl.minimum(columns, N - 1)[:, None] * K + inside[None, :])
    if OVERLAP:
        gdc_wait()

    # products
    if SPLIT_K <= BLOCK_K:
        x = tl.load(x_ptrs + begin, mask=mask_x, other=0.0)
        if NORM:
            scale = tl.load(scale_ptrs, mask=mask_x, other=0.0)
            shift = tl.load(shift_ptrs, mask=mask_x, other=0.0)
            x = x.to(tl.float32)
            mean, squares = _statistics(x, mask_x, K)
            x = _normalised(x, mean, tl.rsqrt(squares / K + eps), scale, shift).to(weight.dtype)
        sums = tl.dot(x, weight, input_precision="ieee")
    else:
        if NORM:
            mean = tl.zeros([BLOCK_M], tl.float32)
            squares = tl.zeros([BLOCK_M], tl.float32)
            for start in tl.range(0, K, BLOCK_K):
                mask_x = (start + offs_x < K) & mask_m[None, :, None]
                x = tl.load(x_ptrs + start, mask=mask_x, other=0.0).to(tl.float32)
                count = tl.minimum(K - start, BLOCK_K).to(tl.float32)
                mean_here, squares_here = _statistics(x, mask_x, count)
                # NOTE: Chan's rule, with which nothing cancels where the mean is large.
                distance, total = mean_here - mean, start + count
                squares += squares_here + distance * distance * (start * count / total)
                mean += distance * (count / total)
            rstd = tl.rsqrt(squares / K + eps)
        sums = tl.zeros([GROUPS, BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
            mask_x = (start + offs_x < end) & mask_m[None, :, None]
            mask_w = (start + offs_w < end) & mask_n[None, None, :]
            x = tl.load(x_ptrs + start, mask=mask_x, other=0.0)
            weight = tl.load(weight_ptrs + start, mask=mask_w, other=0.0, eviction_policy="evict_first")
            if NORM:
                scale = tl.load(scale_ptrs + start, mask=mask_x, other=0.0)
                shift = tl.load(shift_ptrs + start, mask=mask_x, other=0.0)
                x = _normalised(x.to(tl.float32), mean, rstd, scale, shift).to(weight.dtype)
            sums = tl.dot(x, weight, sums, input_precision="ieee")
    y = tl.sum(sums, 0)

    # epilogue
    if SPLITS == 1:
        _store(
            y, bias_ptr, residual_ptr, gate_ptr, y_ptr, rows, images, columns, mask_m, mask_n, gate_stride, N,
            HAS_BIAS, GELU, RESIDUAL,
        )  # fmt: skip
    else:
        offs = rows[:, None] * N + columns[None, :]
        mask = mask_m[:, None] & mask_n[None, :]
        split_size = num_rows * N
        tl.store(partials_ptr + split * split_size + offs, y, mask=mask)
        counter_ptr = counters_ptr + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        # NOTE: the writes of all threads, before the one that tells of them.
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SPLITS - 1:
            y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for i in tl.static_range(SPLITS):
                y += tl.load(partials_ptr + i * split_size + offs, mask=mask, other=0.0, cache_modifier=".cg")
            _store(
                y, bias_ptr, residual_ptr, gate_ptr, y_ptr, rows, images, columns, mask_m, mask_n, gate_stride, N,
                HAS_BIAS, GELU, RESIDUAL,
            )  # fmt: skip
            tl.store(counter_ptr, 0)


@triton.jit
def _store(
    y,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    y_ptr,
    rows,
    images,
    columns,
    mask_m,
    mask_n,
    gate_stride,
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """What follows the product, of sums y [M, N]."""
    mask = mask_m[:, None] & mask_n[None, :]
    offs = rows[:, None] * N + columns[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if GELU:
        # 0.5 (1 + tanh u) = sigmoid(2 u), and 2 sqrt(2 / pi) = 1.5957691
        y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    if RESIDUAL:
        gate = tl.load(gate_ptr + images[:, None] * gate_stride + columns[None, :], mask=mask, other=0.0)
        y = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32) + gate.to(tl.float32) * y
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def select_tile(N: int, K: int, itemsize: int = 2) -> Tile:
    """The row of the table for a weight, with blocks widened until they are few. Pure function of its arguments."""
    tile = next(TILES[width] for width in TILES if width >= K)
    widened = min(MAX_BLOCK_N, triton.next_power_of_2(triton.cdiv(N, BLOCKS)))
    narrowed = max(16 * tile.groups, triton.next_power_of_2(triton.cdiv(K, tile.splits)))
    tile = tile._replace(block_n=max(tile.block_n, widened), block_k=min(tile.block_k, narrowed))
    # NOTE: twice the bytes would not fit into shared memory.
    return tile if itemsize <= 2 else tile._replace(block_k=max(16 * tile.groups, tile.block_k // 2))


def normalises(weight: Tensor) -> bool:
    """Whether the kernel computes the norm itself: every program needs whole rows."""
    return select_tile(*weight.shape, weight.itemsize).splits == 1


def num_counters(num_rows: int, N: int, K: int) -> int:
    """Counters that the splits of a product with 16-bit weights need; 0 where there is one split."""
    tile = select_tile(N, K)
    return triton.cdiv(N, tile.block_n) * triton.cdiv(num_rows, ROWS) if tile.splits > 1 else 0


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    gelu: bool,
    eps: float,
    counters: Tensor | None,
    overlap: bool,
) -> Tensor:
    """x [B, L, K], weight [N, K], bias [N], scale shift [B, 1, K], residual [B, L, N], gate [B, 1, N] -> [B, L, N].

    scale and shift only where the kernel `normalises`.
    """
    (batch, length, K), N, num_rows = x.shape, weight.shape[0], x.shape[0] * x.shape[1]
    tile = select_tile(N, K, weight.itemsize)
    overlap = overlap and overlaps(x.device)
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty(batch, length, N, dtype=weight.dtype if residual is None else residual.dtype, device=x.device)
    partials = y
    if tile.splits > 1:
        partials = torch.empty(tile.splits, num_rows, N, dtype=torch.float32, device=x.device)
        wanted = triton.cdiv(N, tile.block_n) * triton.cdiv(num_rows, ROWS)
        if counters is None or len(counters) < wanted:
            counters = torch.zeros(wanted, dtype=torch.int32, device=x.device)
    split_k = tile.block_k * triton.cdiv(K, tile.splits * tile.block_k)
    pdl = {"launch_pdl": True} if overlap else {}
    with on_device(x):
        _linear_kernel[(triton.cdiv(N, tile.block_n), tile.splits, triton.cdiv(num_rows, ROWS))](
            x_ptr=x,
            weight_ptr=weight,
            bias_ptr=weight if bias is None else bias.contiguous(),
            scale_ptr=weight if scale is None else scale,
            shift_ptr=weight if shift is None else shift,
            residual_ptr=weight if residual is None else residual.contiguous(),
            gate_ptr=weight if gate is None else gate,
            y_ptr=y,
            partials_ptr=partials,
            counters_ptr=partials if tile.splits == 1 else counters,
            scale_stride=0 if scale is None else scale.stride(0),
            shift_stride=0 if shift is None else shift.stride(0),
            gate_stride=0 if gate is None else gate.stride(0),
            num_rows=num_rows,
            length=length,
            eps=eps,
            N=N,
            K=K,
            HAS_BIAS=bias is not None,
            NORM=scale is not None,
            GELU=gelu,
            RESIDUAL=residual is not None,
            OVERLAP=overlap,
            BLOCK_M=ROWS,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUPS=tile.groups,
            SPLITS=tile.splits,
            SPLIT_K=split_k,
            EVEN=split_k * tile.splits == K,
            STAGES=tile.stages,
            LINE=LINE_BYTES // weight.itemsize,
            num_warps=tile.warps,
            **pdl,
        )
    return y
