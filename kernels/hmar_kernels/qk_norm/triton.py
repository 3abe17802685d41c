"""Head split with normalised q and k, forward and backward in Triton.

    forward    r_q = 1 / max(|q' + b_q|, EPS);  q = s r_q (q' + b_q);  v = v' + b_v;  r_k, k as r_q, q without b_q, s
    backward   dq' = s r_q (dq - q <q, dq> / <q, q>);  dk' = r_k (dk - k <k, dk> / <k, k>);  dv' = dv
               db_q = sum dq';  db_v = sum dv;  dlog_scale = sum <q, dq>

Where a norm is below EPS the projection is absent. Grid: (heads, groups of an image's rows, images); a program owns its
rows of one head [rows, D] in q, k and v. All arithmetic is float32. Sums over rows are in two stages, partial sums of
BACKWARD_ROWS rows and `sum_partials`: no atomics, results are bit-equal from run to run.

The equations are stated in reference.py; autograd and argument checks live in api.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..triton_device import on_device, sum_partials

EPS: tl.constexpr = tl.constexpr(1e-12)  # that of F.normalize


class Tile(NamedTuple):
    """Rows at head dim 64, warps; stages of the backward, which goes down its rows tile by tile."""

    rows: int
    warps: int
    stages: int = 1


# Both compile for sm_80 and sm_90 without spills; `python -m bench.tune_operators` prints what is fastest.
FORWARD_TILE, BACKWARD_TILE = Tile(32, 4), Tile(16, 4)
BACKWARD_ROWS = 128  # of a program


@triton.jit
def _forward_kernel(
    qkv_ptr,
    q_bias_ptr,
    v_bias_ptr,
    log_scale_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    norms_ptr,
    length,
    max_log_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    h = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    offs_l = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    row = b * length + offs_l
    offs_in = row[:, None] * (3 * H * D) + h * D + offs_d[None, :]
    offs_out = row[:, None] * (H * D) + h * D + offs_d[None, :]
    offs_norm = (b * H + h) * length + offs_l
    mask_l = offs_l < length
    mask_d = offs_d < D
    mask = mask_l[:, None] & mask_d[None, :]
    scale = tl.exp(tl.minimum(tl.load(log_scale_ptr + h).to(tl.float32), max_log_scale))

    q = tl.load(qkv_ptr + offs_in, mask=mask, other=0.0).to(tl.float32)
    k = tl.load(qkv_ptr + H * D + offs_in, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(qkv_ptr + 2 * H * D + offs_in, mask=mask, other=0.0).to(tl.float32)
    q += tl.load(q_bias_ptr + h * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    v += tl.load(v_bias_ptr + h * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    q_norm = 1.0 / tl.maximum(tl.sqrt(tl.sum(q * q, 1)), EPS)
    k_norm = 1.0 / tl.maximum(tl.sqrt(tl.sum(k * k, 1)), EPS)

    tl.store(q_ptr + offs_out, (q * (q_norm * scale)[:, None]).to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(k_ptr + offs_out, (k * k_norm[:, None]).to(k_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + offs_out, v.to(v_ptr.dtype.element_ty), mask=mask)
    tl.store(norms_ptr + offs_norm, q_norm, mask=mask_l)
    tl.store(norms_ptr + tl.num_programs(2).to(tl.int64) * H * length + offs_norm, k_norm, mask=mask_l)


@triton.jit
def _load_tile(ptr, b, h, offs_l, offs_d, strides, mask):
    """Rows of one head of [B,H,L,D] as float32."""
    ptrs = ptr + b * strides[0] + h * strides[1] + offs_l.to(tl.int64)[:, None] * strides[2] + offs_d[None, :]
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _through_norm(gradient, result, reciprocal_norm):
    """Gradient of x, but for the scale, from that of result = scale x / max(|x|, EPS); and <result, gradient>."""
    inner, square = tl.sum(result * gradient, 1), tl.sum(result * result, 1)
    # NOTE: <result, result> is no longer the square of the scale once the result is rounded, and with that square the
    # gradient would keep a part along the result. 0.999, since the reciprocal of EPS is rounded too.
    has_radius = (square > 0.0) & (reciprocal_norm * EPS < 0.999)
    radial = tl.where(has_radius, inner / tl.where(has_radius, square, 1.0), 0.0)
    return (gradient - result * radial[:, None]) * reciprocal_norm[:, None], inner


@triton.jit
def _backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_ptr,
    k_ptr,
    log_scale_ptr,
    norms_ptr,
    d_qkv_ptr,
    partials_ptr,
    dq_strides,
    dk_strides,
    dv_strides,
    q_strides,
    k_strides,
    length,
    rows,
    max_log_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    h = tl.program_id(0).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    row_begin = tl.program_id(1) * rows
    row_end = tl.minimum(row_begin + rows, length)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    partials_ptr += (b * tl.num_programs(1) + tl.program_id(1)) * (2 * H * D + H)
    q_norms_ptr = norms_ptr + (b * H + h) * length
    k_norms_ptr = q_norms_ptr + tl.num_programs(2).to(tl.int64) * H * length
    log_scale = tl.load(log_scale_ptr + h).to(tl.float32)
    scale = tl.exp(tl.minimum(log_scale, max_log_scale))

    d_q_bias = tl.zeros([TILE_ROWS, BLOCK_D], tl.float32)
    d_v_bias = tl.zeros([TILE_ROWS, BLOCK_D], tl.float32)
    d_scale = tl.zeros([TILE_ROWS], tl.float32)
    for start in tl.range(row_begin, row_end, TILE_ROWS, num_stages=STAGES):
        offs_l = start + tl.arange(0, TILE_ROWS)
        mask_l = offs_l < row_end
        mask = mask_l[:, None] & mask_d[None, :]
        offs = (b * length + offs_l)[:, None] * (3 * H * D) + h * D + offs_d[None, :]
        dq = _load_tile(dq_ptr, b, h, offs_l, offs_d, dq_strides, mask)
        q = _load_tile(q_ptr, b, h, offs_l, offs_d, q_strides, mask)
        dk = _load_tile(dk_ptr, b, h, offs_l, offs_d, dk_strides, mask)
        k = _load_tile(k_ptr, b, h, offs_l, offs_d, k_strides, mask)
        dv = _load_tile(dv_ptr, b, h, offs_l, offs_d, dv_strides, mask)
        q_norm = tl.load(q_norms_ptr + offs_l, mask=mask_l, other=0.0)
        k_norm = tl.load(k_norms_ptr + offs_l, mask=mask_l, other=0.0)

        dq, inner = _through_norm(dq, q, q_norm)
        dq *= scale
        dk, _ = _through_norm(dk, k, k_norm)
        tl.store(d_qkv_ptr + offs, dq.to(d_qkv_ptr.dtype.element_ty), mask=mask)
        tl.store(d_qkv_ptr + H * D + offs, dk.to(d_qkv_ptr.dtype.element_ty), mask=mask)
        tl.store(d_qkv_ptr + 2 * H * D + offs, dv.to(d_qkv_ptr.dtype.element_ty), mask=mask)
        # NOTE: rows are summed after the loop, for a sum over them waits for all warps.
        d_q_bias += dq
        d_v_bias += dv
        d_scale += inner

    tl.store(partials_ptr + h * D + offs_d, tl.sum(d_q_bias, 0), mask=mask_d)
    tl.store(partials_ptr + H * D + h * D + offs_d, tl.sum(d_v_bias, 0), mask=mask_d)
    # NOTE: as torch has it, the limit itself still passes the gradient.
    tl.store(partials_ptr + 2 * H * D + h, tl.where(log_scale <= max_log_scale, tl.sum(d_scale, 0), 0.0))


def forward(
    qkv: torch.Tensor, q_bias: torch.Tensor, v_bias: torch.Tensor, log_scale: torch.Tensor, max_log_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """qkv [B,L,3C] -> q, k, v [B,H,L,D] and the reciprocal norms of q and k, float32 [2,B,H,L]."""
    b, length, width = qkv.shape
    heads = log_scale.shape[0]
    head_dim = width // (3 * heads)
    q, k, v = (
        torch.empty(b, length, heads, head_dim, dtype=qkv.dtype, device=qkv.device).transpose(1, 2) for _ in range(3)
    )
    reciprocal_norms = torch.empty(2, b, heads, length, dtype=torch.float32, device=qkv.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    rows = tile_rows(FORWARD_TILE, block_d)
    if qkv.numel():
        with on_device(qkv):
            _forward_kernel[(heads, triton.cdiv(length, rows), b)](
                qkv_ptr=qkv.contiguous(),
                q_bias_ptr=q_bias.contiguous(),
                v_bias_ptr=v_bias.contiguous(),
                log_scale_ptr=log_scale.contiguous(),
                q_ptr=q,
                k_ptr=k,
                v_ptr=v,
                norms_ptr=reciprocal_norms,
                length=length,
                max_log_scale=max_log_scale,
                H=heads,
                D=head_dim,
                BLOCK_D=block_d,
                ROWS=rows,
                num_warps=FORWARD_TILE.warps,
            )
    return q, k, v, reciprocal_norms


def backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    log_scale: torch.Tensor,
    reciprocal_norms: torch.Tensor,
    max_log_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """d_qkv [B,L,3C] in q's dtype; the gradients of q_bias, v_bias and log_scale as one float32 tensor [2C + H]."""
    b, heads, length, head_dim = q.shape
    width = heads * head_dim
    d_qkv = torch.empty(b, length, 3 * width, dtype=q.dtype, device=q.device)
    num_groups = triton.cdiv(length, BACKWARD_ROWS)
    partials = torch.empty(1, b * num_groups, 2 * width + heads, dtype=torch.float32, device=q.device)
    dq, dk, dv, q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (dq, dk, dv, q, k))
    block_d = max(16, triton.next_power_of_2(head_dim))
    if q.numel():
        with on_device(q):
            _backward_kernel[(heads, num_groups, b)](
                dq_ptr=dq,
                dk_ptr=dk,
                dv_ptr=dv,
                q_ptr=q,
                k_ptr=k,
                log_scale_ptr=log_scale.contiguous(),
                norms_ptr=reciprocal_norms,
                d_qkv_ptr=d_qkv,
                partials_ptr=partials,
                dq_strides=dq.stride()[:3],
                dk_strides=dk.stride()[:3],
                dv_strides=dv.stride()[:3],
                q_strides=q.stride()[:3],
                k_strides=k.stride()[:3],
                length=length,
                rows=BACKWARD_ROWS,
                max_log_scale=max_log_scale,
                H=heads,
                D=head_dim,
                BLOCK_D=block_d,
                TILE_ROWS=tile_rows(BACKWARD_TILE, block_d),
                STAGES=BACKWARD_TILE.stages,
                num_warps=BACKWARD_TILE.warps,
            )
    return d_qkv, sum_partials(partials, torch.float32)[0]


def tile_rows(tile: Tile, block_d: int) -> int:
    """As many as make a tile of the same size whatever the head dim, so that it fits in registers."""
    return max(1, min(BACKWARD_ROWS, tile.rows * 64 // block_d))
