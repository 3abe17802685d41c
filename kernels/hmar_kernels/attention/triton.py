"""Block-sparse attention forward and backward in Triton, over tile plans made on the host.

    forward   out = softmax(scale q k^T + mask) v, online over key blocks; lse = log sum exp
    dq pass   delta = rowsum(out * do) - dlse;  ds = p * (do v^T - delta);  dq = scale ds k
    dk/dv     dv = p^T do;  dk = scale ds^T q, per key tile over its query blocks

Grid: one program per (tile, batch * head), tiles of one head side by side so that its keys stay in L2; a program owns
its output rows, so no atomics are used and results are bit-equal from run to run. Accumulators, softmax statistics,
lse and delta are float32; the operands of every product have the inputs' dtype.

The equations are stated in reference.py, the tiles in plan.py; autograd and argument checks live in api.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import triton_device
from ..mask import SpanMask
from .plan import TilePlan, key_plan, query_plan

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Running maximum before any key was seen. Finite, so that (-inf) - (-inf) cannot occur; a masked logit is -inf.
NO_KEY: tl.constexpr = tl.constexpr(-1.0e30)
# Integers of which the kernels have one version for all values: no other pyramid or number of heads compiles again.
SIZES = ("num_heads", "num_queries", "num_tiles")


@dataclass(frozen=True)
class Tile:
    """Shape of one program: rows it owns, columns it visits at a time, warps and pipeline stages."""

    rows: int
    cols: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    forward: Tile
    dq: Tile
    dkdv: Tile


# (compute capability 9 or 8, head dim padded to a power of two, span class by mean keys per query) -> tiles, for
# two-byte dtypes. Rows of (9, 64) were chosen by `python -m bench.tune_attention` on an H100 (reports/log.md). The rest
# were chosen by compiling alone (no spills), without timing others; those of 8 are the largest such tiles for sm_80.
# GPUs of other capabilities take the nearest row.
SHORT, MEDIUM, LONG = "short", "medium", "long"
MEDIUM_SPAN, LONG_SPAN = 512, 2048
TILES: dict[tuple[int, int, str], Tiles] = {
    (9, 64, SHORT): Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 1)),
    (9, 64, MEDIUM): Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 2)),
    (9, 64, LONG): Tiles(Tile(128, 64, 4, 3), Tile(128, 32, 8, 3), Tile(64, 64, 4, 3)),
    (9, 128, SHORT): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    (9, 128, MEDIUM): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    (9, 128, LONG): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    (8, 64, SHORT): Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    (8, 64, MEDIUM): Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    (8, 64, LONG): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    (8, 128, SHORT): Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (8, 128, MEDIUM): Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (8, 128, LONG): Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
}
# Chosen to fit shared memory: float32 products run outside the matrix units.
FLOAT32_TILES = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))


def select_tiles(capability: int, head_dim: int, dtype: torch.dtype, mask: SpanMask) -> Tiles:
    """The row of the tile table for a GPU of compute capability `capability`.x. A pure function of its arguments."""
    if dtype == torch.float32:
        return FLOAT32_TILES
    span = mask.num_pairs / mask.num_queries
    span_class = SHORT if span < MEDIUM_SPAN else MEDIUM if span < LONG_SPAN else LONG
    return TILES[min(max(capability, 8), 9), 64 if head_dim <= 64 else 128, span_class]


@dataclass(frozen=True)
class AttentionPlan:
    """Everything the kernels need to know of a mask: its intervals on the device and the tiles of three passes."""

    key_start: torch.Tensor
    key_end: torch.Tensor
    forward: TilePlan
    dq: TilePlan
    dkdv: TilePlan
    tiles: Tiles


def capability_of(device: torch.device) -> int:
    """Major compute capability; the interpreter on a CPU stands for the oldest one served."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


def make_plan(mask: SpanMask, tiles: Tiles, device: torch.device | str) -> AttentionPlan:
    """Tile plans of all passes over `mask`; made once per mask, tile shapes and device, then kept on the mask."""
    return mask.cached(
        ("triton", tiles, str(device)),
        lambda: AttentionPlan(
            *mask.intervals(device),
            forward=query_plan(mask, tiles.forward.rows, tiles.forward.cols, device),
            dq=query_plan(mask, tiles.dq.rows, tiles.dq.cols, device),
            dkdv=key_plan(mask, tiles.dkdv.rows, tiles.dkdv.cols, device),
            tiles=tiles,
        ),
    )


@triton.jit
def _load_rows(ptr, offs_row, offs_d, strides, row_limit, D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """A [rows, BLOCK_D] tile; rows from `row_limit` on and columns from D on read as zero."""
    ptrs = ptr + offs_row.to(tl.int64)[:, None] * strides[2] + offs_d.to(tl.int64)[None, :] * strides[3]
    if MASK_ROWS:
        return tl.load(ptrs, mask=(offs_row < row_limit)[:, None] & (offs_d < D)[None, :], other=0.0)
    if offs_d.shape[0] != D:
        return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _store_rows(ptr, tile, offs_row, offs_d, strides, row_limit, D: tl.constexpr):
    ptrs = ptr + offs_row.to(tl.int64)[:, None] * strides[2] + offs_d.to(tl.int64)[None, :] * strides[3]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=(offs_row < row_limit)[:, None] & (offs_d < D)[None, :])


@triton.jit
def _tile_of_program(tiles_ptr, num_tiles, num_heads):
    """Program id -> (batch, head, the six numbers of its tile)."""
    pid = tl.program_id(0)
    head_id = (pid // num_tiles).to(tl.int64)
    entry_ptr = tiles_ptr + (pid % num_tiles) * 6
    return (
        head_id // num_heads,
        head_id % num_heads,
        tl.load(entry_ptr),
        tl.load(entry_ptr + 1),
        tl.load(entry_ptr + 2),
        tl.load(entry_ptr + 3),
        tl.load(entry_ptr + 4),
        tl.load(entry_ptr + 5),
    )


@triton.jit
def _masked_block(i, num_before, col_begin, full_end, BLOCK: tl.constexpr):
    """First column of the i-th masked block: those before the full range come first, then those after it."""
    return tl.where(i < num_before, col_begin + i * BLOCK, full_end + (i - num_before) * BLOCK)


@triton.jit
def _forward_block(
    acc,
    row_sum,
    row_max,
    q,
    k_ptr,
    v_ptr,
    offs_n,
    offs_d,
    k_strides,
    v_strides,
    key_limit,
    span_start,
    span_end,
    scale_log2,
    D: tl.constexpr,
    MASKED: tl.constexpr,
):
    k = _load_rows(k_ptr, offs_n, offs_d, k_strides, key_limit, D, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        s = tl.where((offs_n[None, :] >= span_start[:, None]) & (offs_n[None, :] < span_end[:, None]), s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - new_max[:, None])
    alpha = tl.exp2(row_max - new_max)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    v = _load_rows(v_ptr, offs_n, offs_d, v_strides, key_limit, D, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, row_sum, new_max


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    key_start_ptr,
    key_end_ptr,
    tiles_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    num_heads,
    num_queries,
    num_tiles,
    scale_log2,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, h, row_begin, row_end, col_begin, col_end, full_begin, full_end = _tile_of_program(
        tiles_ptr, num_tiles, num_heads
    )
    q_ptr += b * q_strides[0] + h * q_strides[1]
    k_ptr += b * k_strides[0] + h * k_strides[1]
    v_ptr += b * v_strides[0] + h * v_strides[1]
    out_ptr += b * out_strides[0] + h * out_strides[1]
    lse_ptr += (b * num_heads + h) * num_queries
    offs_m = row_begin + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < row_end
    span_start = tl.load(key_start_ptr + offs_m, mask=mask_m, other=0)
    span_end = tl.load(key_end_ptr + offs_m, mask=mask_m, other=0)
    q = _load_rows(q_ptr, offs_m, offs_d, q_strides, row_end, D, True)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], NO_KEY, tl.float32)

    # blocks that every row sees
    for start_n in tl.range(full_begin, full_end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        acc, row_sum, row_max = _forward_block(
            acc, row_sum, row_max, q, k_ptr, v_ptr, offs_n, offs_d, k_strides, v_strides,
            col_end, span_start, span_end, scale_log2, D, False,
        )  # fmt: skip
    # blocks on the edge of some row's interval
    num_before = (full_begin - col_begin) // BLOCK_N
    for i in tl.range(0, num_before + tl.cdiv(col_end - full_end, BLOCK_N)):
        offs_n = _masked_block(i, num_before, col_begin, full_end, BLOCK_N) + tl.arange(0, BLOCK_N)
        acc, row_sum, row_max = _forward_block(
            acc, row_sum, row_max, q, k_ptr, v_ptr, offs_n, offs_d, k_strides, v_strides,
            col_end, span_start, span_end, scale_log2, D, True,
        )  # fmt: skip

    # a row without keys: zeros, lse = -inf
    blind = row_sum == 0.0
    out = acc / tl.where(blind, 1.0, row_sum)[:, None]
    lse = tl.where(blind, float("-inf"), (row_max + tl.log2(tl.where(blind, 1.0, row_sum))) * LN_2)
    _store_rows(out_ptr, out, offs_m, offs_d, out_strides, row_end, D)
    tl.store(lse_ptr + offs_m, lse, mask=mask_m)


@triton.jit
def _dq_block(
    dq,
    q,
    do,
    lse_log2,
    delta,
    k_ptr,
    v_ptr,
    offs_n,
    offs_d,
    k_strides,
    v_strides,
    key_limit,
    span_start,
    span_end,
    scale_log2,
    D: tl.constexpr,
    MASKED: tl.constexpr,
):
    k = _load_rows(k_ptr, offs_n, offs_d, k_strides, key_limit, D, MASKED)
    v = _load_rows(v_ptr, offs_n, offs_d, v_strides, key_limit, D, MASKED)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse_log2[:, None])
    if MASKED:
        p = tl.where((offs_n[None, :] >= span_start[:, None]) & (offs_n[None, :] < span_end[:, None]), p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=SIZES)
def _dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    do_ptr,
    dq_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    key_start_ptr,
    key_end_ptr,
    tiles_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    do_strides,
    dq_strides,
    num_heads,
    num_queries,
    num_tiles,
    scale,
    HAS_DLSE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, h, row_begin, row_end, col_begin, col_end, full_begin, full_end = _tile_of_program(
        tiles_ptr, num_tiles, num_heads
    )
    q_ptr += b * q_strides[0] + h * q_strides[1]
    k_ptr += b * k_strides[0] + h * k_strides[1]
    v_ptr += b * v_strides[0] + h * v_strides[1]
    out_ptr += b * out_strides[0] + h * out_strides[1]
    do_ptr += b * do_strides[0] + h * do_strides[1]
    dq_ptr += b * dq_strides[0] + h * dq_strides[1]
    row_offset = (b * num_heads + h) * num_queries
    offs_m = row_begin + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < row_end
    span_start = tl.load(key_start_ptr + offs_m, mask=mask_m, other=0)
    span_end = tl.load(key_end_ptr + offs_m, mask=mask_m, other=0)
    q = _load_rows(q_ptr, offs_m, offs_d, q_strides, row_end, D, True)
    do = _load_rows(do_ptr, offs_m, offs_d, do_strides, row_end, D, True)
    out = _load_rows(out_ptr, offs_m, offs_d, out_strides, row_end, D, True)
    lse = tl.load(lse_ptr + row_offset + offs_m, mask=mask_m, other=float("inf"))
    # NOTE: a row without keys has lse = -inf; +inf makes its probabilities zero instead of infinite.
    lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    scale_log2 = scale * LOG2_E

    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row_offset + offs_m, mask=mask_m, other=0.0)
    tl.store(delta_ptr + row_offset + offs_m, delta, mask=mask_m)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # blocks that every row sees
    for start_n in tl.range(full_begin, full_end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        dq = _dq_block(
            dq, q, do, lse_log2, delta, k_ptr, v_ptr, offs_n, offs_d, k_strides, v_strides,
            col_end, span_start, span_end, scale_log2, D, False,
        )  # fmt: skip
    # blocks on the edge of some row's interval
    num_before = (full_begin - col_begin) // BLOCK_N
    for i in tl.range(0, num_before + tl.cdiv(col_end - full_end, BLOCK_N)):
        offs_n = _masked_block(i, num_before, col_begin, full_end, BLOCK_N) + tl.arange(0, BLOCK_N)
        dq = _dq_block(
            dq, q, do, lse_log2, delta, k_ptr, v_ptr, offs_n, offs_d, k_strides, v_strides,
            col_end, span_start, span_end, scale_log2, D, True,
        )  # fmt: skip

    _store_rows(dq_ptr, dq * scale, offs_m, offs_d, dq_strides, row_end, D)


@triton.jit
def _dkdv_block(
    dk,
    dv,
    k,
    v,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    key_start_ptr,
    key_end_ptr,
    offs_m,
    offs_n,
    offs_d,
    q_strides,
    do_strides,
    query_limit,
    scale_log2,
    D: tl.constexpr,
    MASKED: tl.constexpr,
):
    q = _load_rows(q_ptr, offs_m, offs_d, q_strides, query_limit, D, MASKED)
    do = _load_rows(do_ptr, offs_m, offs_d, do_strides, query_limit, D, MASKED)
    if MASKED:
        mask_m = offs_m < query_limit
        lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
        span_start = tl.load(key_start_ptr + offs_m, mask=mask_m, other=0)
        span_end = tl.load(key_end_ptr + offs_m, mask=mask_m, other=0)
    else:
        lse = tl.load(lse_ptr + offs_m)
        delta = tl.load(delta_ptr + offs_m)
    # NOTE: k q^T is built directly; transposing p or ds afterwards has miscompiled on Hopper.
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - (lse * LOG2_E)[None, :])
    if MASKED:
        p = tl.where((offs_n[:, None] >= span_start[None, :]) & (offs_n[:, None] < span_end[None, :]), p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def _dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    key_start_ptr,
    key_end_ptr,
    tiles_ptr,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dk_strides,
    dv_strides,
    num_heads,
    num_queries,
    num_tiles,
    scale,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, h, row_begin, row_end, col_begin, col_end, full_begin, full_end = _tile_of_program(
        tiles_ptr, num_tiles, num_heads
    )
    q_ptr += b * q_strides[0] + h * q_strides[1]
    k_ptr += b * k_strides[0] + h * k_strides[1]
    v_ptr += b * v_strides[0] + h * v_strides[1]
    do_ptr += b * do_strides[0] + h * do_strides[1]
    dk_ptr += b * dk_strides[0] + h * dk_strides[1]
    dv_ptr += b * dv_strides[0] + h * dv_strides[1]
    lse_ptr += (b * num_heads + h) * num_queries
    delta_ptr += (b * num_heads + h) * num_queries
    offs_n = row_begin + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    k = _load_rows(k_ptr, offs_n, offs_d, k_strides, row_end, D, True)
    v = _load_rows(v_ptr, offs_n, offs_d, v_strides, row_end, D, True)
    scale_log2 = scale * LOG2_E

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # query blocks that see every key of the tile
    for start_m in tl.range(full_begin, full_end, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        dk, dv = _dkdv_block(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, key_start_ptr, key_end_ptr,
            offs_m, offs_n, offs_d, q_strides, do_strides, col_end, scale_log2, D, False,
        )  # fmt: skip
    # query blocks that see some of them
    num_before = (full_begin - col_begin) // BLOCK_M
    for i in tl.range(0, num_before + tl.cdiv(col_end - full_end, BLOCK_M)):
        offs_m = _masked_block(i, num_before, col_begin, full_end, BLOCK_M) + tl.arange(0, BLOCK_M)
        dk, dv = _dkdv_block(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, key_start_ptr, key_end_ptr,
            offs_m, offs_n, offs_d, q_strides, do_strides, col_end, scale_log2, D, True,
        )  # fmt: skip

    _store_rows(dk_ptr, dk * scale, offs_n, offs_d, dk_strides, row_end, D)
    _store_rows(dv_ptr, dv, offs_n, offs_d, dv_strides, row_end, D)


def _launch(kernel, plan: TilePlan, tile: Tile, q: torch.Tensor, **arguments) -> None:
    head_dim = q.shape[-1]
    # NOTE: Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        kernel[(plan.num_tiles * q.shape[0] * q.shape[1],)](
            **arguments,
            tiles_ptr=plan.tiles,
            num_heads=q.shape[1],
            num_queries=q.shape[2],
            num_tiles=plan.num_tiles,
            D=head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def empty_rows_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised [B,H,L,D] whose memory order is [B,L,H,D], so that merging heads afterwards is a view."""
    b, h, length, d = x.shape
    return torch.empty(b, length, h, d, dtype=x.dtype, device=x.device).transpose(1, 2)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,Lq,D], k v [B,H,Lk,D] -> out [B,H,Lq,D] in q's dtype, lse float32 [B,H,Lq]."""
    out = empty_rows_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tile = plan.tiles.forward
    _launch(
        _forward_kernel,
        plan.forward,
        tile,
        q,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        lse_ptr=lse,
        key_start_ptr=plan.key_start,
        key_end_ptr=plan.key_end,
        q_strides=q.stride(),
        k_strides=k.stride(),
        v_strides=v.stride(),
        out_strides=out.stride(),
        scale_log2=scale * LOG2_E.value,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
    )
    return out, lse


def backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients dq [B,H,Lq,D], dk dv [B,H,Lk,D] in the inputs' dtype; dlse float32 [B,H,Lq] or None."""
    dq, delta = backward_dq(do, dlse, q, k, v, out, lse, plan, scale)
    dk, dv = backward_dkdv(do, q, k, v, lse, delta, plan, scale)
    return dq, dk, dv


def backward_dq(do, dlse, q, k, v, out, lse, plan: AttentionPlan, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The first pass of `backward`: dq, and delta float32 [B,H,Lq] for the second."""
    dq, delta = empty_rows_like(q), torch.empty_like(lse)
    tile = plan.tiles.dq
    _launch(
        _dq_kernel,
        plan.dq,
        tile,
        q,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        do_ptr=do,
        dq_ptr=dq,
        lse_ptr=lse,
        dlse_ptr=delta if dlse is None else dlse.contiguous(),
        delta_ptr=delta,
        key_start_ptr=plan.key_start,
        key_end_ptr=plan.key_end,
        q_strides=q.stride(),
        k_strides=k.stride(),
        v_strides=v.stride(),
        out_strides=out.stride(),
        do_strides=do.stride(),
        dq_strides=dq.stride(),
        scale=scale,
        HAS_DLSE=dlse is not None,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
    )
    return dq, delta


def backward_dkdv(do, q, k, v, lse, delta, plan: AttentionPlan, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The second pass of `backward`: dk and dv from lse and delta."""
    dk, dv = empty_rows_like(k), empty_rows_like(v)
    tile = plan.tiles.dkdv
    _launch(
        _dkdv_kernel,
        plan.dkdv,
        tile,
        q,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        do_ptr=do,
        dk_ptr=dk,
        dv_ptr=dv,
        lse_ptr=lse,
        delta_ptr=delta,
        key_start_ptr=plan.key_start,
        key_end_ptr=plan.key_end,
        q_strides=q.stride(),
        k_strides=k.stride(),
        v_strides=v.stride(),
        do_strides=do.stride(),
        dk_strides=dk.stride(),
        dv_strides=dv.stride(),
        scale=scale,
        BLOCK_N=tile.rows,
        BLOCK_M=tile.cols,
    )
    return dk, dv


def unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the Triton kernels cannot run on such inputs; None when they can."""
    if not 16 <= head_dim <= 128:
        return f"the Triton kernels take head dims 16 to 128, not {head_dim}"
    return triton_device.unavailable(device, dtype)
