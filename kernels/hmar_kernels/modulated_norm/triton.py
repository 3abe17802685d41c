"""Adaptive layer norm with the gated residual before it, forward and backward in Triton.

    forward    y = x + keep gate branch;  h = (y - mean) rstd (1 + scale) + shift;  branch may be parts and a bias
    backward   xhat = (y - mean) rstd;  g = dh (1 + scale)
               dx = dy + rstd (g - mean_C(g) - xhat mean_C(g xhat));  dbranch = keep gate dx
               dshift = sum_L dh;  dscale = sum_L dh xhat;  dgate = sum_L keep branch dx

Grid: (groups of an image's rows, images); a program owns whole rows [C], so every input is read once and every output
written once. Statistics, sums and all arithmetic are float32. Sums over an image's rows are in two stages, partial sums
of a program's rows and `sum_partials`: no atomics, results are bit-equal from run to run. `statistics` are the mean
and the reciprocal standard deviation, float32 [2, B, L], of y as it was rounded to its dtype. The backward can give h
once more, in dh's place, for who has not kept it, and can start from x instead of y (`norm_linear`).

NOTE: products are rounded before they are added (enable_fp_fusion=False, 5 % more instructions): g - mean_C(g) is then
exactly 0 where a token has one channel, and not what g was rounded by, times a rstd of 1000; and y made of x in the
backward is that of the forward to the bit.

The equations are stated in reference.py; autograd and argument checks live in api.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..triton_device import num_sms, on_device, sum_partials


class Tile(NamedTuple):
    """Of a program of the forward: rows it owns, warps. Of the backward, which goes row by row: stages, warps."""

    rows_or_stages: int
    warps: int


# Channels padded to a power of two -> tiles of forward and backward. All compile for sm_80 and sm_90 without spills;
# `python -m bench.tune_operators` prints what is fastest. More channels take the last row.
TILES: dict[int, tuple[Tile, Tile]] = {
    512: (Tile(8, 4), Tile(3, 4)),
    1024: (Tile(4, 4), Tile(3, 8)),
    2048: (Tile(2, 4), Tile(3, 16)),
    4096: (Tile(1, 4), Tile(2, 16)),
}
# Of branches in parts, which belong to generation, up to so many rows a multiprocessor: a program each, of many warps.
FEW_ROWS_PER_SM, FEW_CHANNELS_PER_WARP = 4, 128
# The backward divides the rows of a batch among so many programs, but gives each at least LEAST_ROWS: more programs
# fill the GPU more evenly, fewer write fewer partial sums (a tenth of a float32 residual stream at training shapes).
PROGRAMS_PER_SM, LEAST_ROWS = 8, 8


@triton.jit
def _forward_kernel(
    x_ptr,
    branch_ptr,
    bias_ptr,
    gate_ptr,
    keep_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    part_stride,
    gate_stride,
    scale_stride,
    shift_stride,
    length,
    eps,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    offs_l = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.arange(0, BLOCK_C)
    row = b * length + offs_l
    offs = row[:, None] * C + offs_c[None, :]
    mask_l = offs_l < length
    mask_c = offs_c < C
    mask = mask_l[:, None] & mask_c[None, :]

    y = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 0:
        gate = tl.load(gate_ptr + b * gate_stride + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        if HAS_KEEP:
            gate *= tl.load(keep_ptr + b).to(tl.float32)
        branch = tl.load(branch_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            branch += tl.load(branch_ptr + part * part_stride + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            branch += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        y += gate[None, :] * branch
        # NOTE: the statistics are those of the stored y, from which the backward starts.
        rounded = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs, rounded, mask=mask)
        y = rounded.to(tl.float32)

    mean = tl.sum(y, 1) / C
    centred = tl.where(mask, y - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)

    scale = tl.load(scale_ptr + b * scale_stride + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * shift_stride + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    h = centred * rstd[:, None] * (1.0 + scale)[None, :] + shift[None, :]
    tl.store(h_ptr + offs, h.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=mask_l)
    tl.store(rstd_ptr + row, rstd, mask=mask_l)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dh_ptr,
    y_ptr,
    branch_ptr,
    gate_ptr,
    keep_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dbranch_ptr,
    h_ptr,
    partials_ptr,
    gate_stride,
    scale_stride,
    shift_stride,
    length,
    rows,
    HAS_DY: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    GIVES_H: tl.constexpr,
    FROM_X: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    row_begin = tl.program_id(0) * rows
    row_end = tl.minimum(row_begin + rows, length)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    num_vectors: tl.constexpr = 3 if HAS_BRANCH else 2
    partials_ptr += (b * tl.num_programs(0) + tl.program_id(0)) * num_vectors * C
    scale = tl.load(scale_ptr + b * scale_stride + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        gate = tl.load(gate_ptr + b * gate_stride + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        keep = tl.load(keep_ptr + b).to(tl.float32) if HAS_KEEP else 1.0
    if GIVES_H:
        shift = tl.load(shift_ptr + b * shift_stride + offs_c, mask=mask_c, other=0.0).to(tl.float32)

    dscale = tl.zeros([BLOCK_C], tl.float32)
    dshift = tl.zeros([BLOCK_C], tl.float32)
    dgate = tl.zeros([BLOCK_C], tl.float32)
    for l in tl.range(row_begin, row_end, num_stages=STAGES):
        row = b * length + l
        offs = row * C + offs_c
        y = tl.load(y_ptr + offs, mask=mask_c, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + offs, mask=mask_c, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            branch = tl.load(branch_ptr + offs, mask=mask_c, other=0.0).to(tl.float32)
        if FROM_X:
            y = (y + gate * keep * branch).to(y_ptr.dtype.element_ty).to(tl.float32)
        xhat = tl.where(mask_c, (y - tl.load(mean_ptr + row)) * tl.load(rstd_ptr + row), 0.0)
        dshift += dh
        dscale += dh * xhat
        dxhat = dh * (1.0 + scale)
        dx = (dxhat - tl.sum(dxhat, 0) / C - xhat * (tl.sum(dxhat * xhat, 0) / C)) * tl.load(rstd_ptr + row)
        if HAS_DY:
            dx += tl.load(dy_ptr + offs, mask=mask_c, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask_c)
        if HAS_BRANCH:
            dx *= keep
            dgate += dx * branch
            tl.store(dbranch_ptr + offs, (dx * gate).to(dbranch_ptr.dtype.element_ty), mask=mask_c)
        if GIVES_H:
            h = xhat * (1.0 + scale) + shift
            tl.store(h_ptr + offs, h.to(h_ptr.dtype.element_ty), mask=mask_c)

    tl.store(partials_ptr + offs_c, dscale, mask=mask_c)
    tl.store(partials_ptr + C + offs_c, dshift, mask=mask_c)
    if HAS_BRANCH:
        tl.store(partials_ptr + 2 * C + offs_c, dgate, mask=mask_c)


def forward(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    keep: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    parts: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x branch [B,L,C], gate scale shift [B,1,C], keep [B] -> y, h [B,L,C], statistics [2,B,L].

    branch, gate and keep may be None; without a branch y is x. parts [P,B,L,C] and bias [C], whose sum is the branch,
    may be given instead of it.
    """
    b, length, c = x.shape
    x, block_c = x.contiguous(), _padded(c)
    num_parts = 0 if branch is None else 1
    if parts is not None:
        branch, num_parts = parts, len(parts)
    y = x if branch is None else torch.empty_like(x)
    h = torch.empty_like(x, dtype=dtype)
    statistics = torch.empty(2, b, length, dtype=torch.float32, device=x.device)
    gate, scale, shift = _vectors(gate, scale, shift)
    tile, _ = select_tiles(block_c)
    if parts is not None and b * length <= FEW_ROWS_PER_SM * num_sms(x.device):
        tile = few_rows_tile(block_c)
    if x.numel():
        with on_device(x):
            _forward_kernel[(triton.cdiv(length, tile.rows_or_stages), b)](
                x_ptr=x,
                branch_ptr=x if branch is None else branch.contiguous(),
                bias_ptr=x if bias is None else bias.contiguous(),
                gate_ptr=scale if gate is None else gate,
                keep_ptr=scale if keep is None else keep.contiguous(),
                scale_ptr=scale,
                shift_ptr=shift,
                y_ptr=y,
                h_ptr=h,
                mean_ptr=statistics[0],
                rstd_ptr=statistics[1],
                part_stride=x.numel(),
                gate_stride=0 if gate is None else gate.stride(0),
                scale_stride=scale.stride(0),
                shift_stride=shift.stride(0),
                length=length,
                eps=eps,
                PARTS=num_parts,
                HAS_BIAS=bias is not None,
                HAS_KEEP=keep is not None,
                C=c,
                BLOCK_C=block_c,
                ROWS=tile.rows_or_stages,
                num_warps=tile.warps,
                enable_fp_fusion=False,
            )
    return y, h, statistics


def backward(
    dy: torch.Tensor | None,
    dh: torch.Tensor,
    y: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    keep: torch.Tensor | None,
    scale: torch.Tensor,
    statistics: torch.Tensor,
    *,
    shift: torch.Tensor | None = None,
    from_x: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx [B,L,C] in y's dtype, dbranch [B,L,C], and dscale, dshift, dgate as one tensor [B,3,C] in scale's dtype.

    Without a branch dbranch is empty and the last tensor [B,2,C]. dy may be None where y has no other use.
    shift: given, h is computed once more and written over dh, which must be contiguous and of h's dtype.
    from_x: `y` holds x, to which the gated branch is added once more.
    """
    b, length, c = y.shape
    y, dh, block_c = y.contiguous(), dh.contiguous(), _padded(c)
    has_branch, num_vectors = branch is not None, 2 if branch is None else 3
    rows = backward_rows(b, length, y.device)
    num_partials = triton.cdiv(length, rows)
    _, tile = select_tiles(block_c)
    dx = torch.empty_like(y)
    d_branch = torch.empty_like(branch, memory_format=torch.contiguous_format) if has_branch else y.new_empty(0)
    partials = torch.empty(b, num_partials, num_vectors * c, dtype=torch.float32, device=y.device)
    gate, vector_scale, shift = _vectors(gate, scale, shift)
    if y.numel():
        with on_device(y):
            _backward_kernel[(num_partials, b)](
                dy_ptr=dh if dy is None else dy.contiguous(),
                dh_ptr=dh,
                y_ptr=y,
                branch_ptr=branch.contiguous() if has_branch else y,
                gate_ptr=gate if has_branch else vector_scale,
                keep_ptr=vector_scale if keep is None else keep.contiguous(),
                scale_ptr=vector_scale,
                shift_ptr=vector_scale if shift is None else shift,
                mean_ptr=statistics[0],
                rstd_ptr=statistics[1],
                dx_ptr=dx,
                dbranch_ptr=d_branch if has_branch else dx,
                # NOTE: a row of dh is in registers before its h is written there.
                h_ptr=dh,
                partials_ptr=partials,
                gate_stride=gate.stride(0) if has_branch else 0,
                scale_stride=vector_scale.stride(0),
                shift_stride=0 if shift is None else shift.stride(0),
                length=length,
                rows=rows,
                HAS_DY=dy is not None,
                HAS_BRANCH=has_branch,
                HAS_KEEP=keep is not None,
                GIVES_H=shift is not None,
                FROM_X=from_x,
                C=c,
                BLOCK_C=block_c,
                STAGES=tile.rows_or_stages,
                num_warps=tile.warps,
                enable_fp_fusion=False,
            )
    return dx, d_branch, sum_partials(partials, scale.dtype).view(b, num_vectors, c)


def _vectors(*vectors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """[B,1,C] with any stride over B, but channels side by side."""
    return [x if x is None or x.stride(2) == 1 else x.contiguous() for x in vectors]


def _padded(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def select_tiles(block_c: int) -> tuple[Tile, Tile]:
    """The row of the table for so many channels. A pure function of its argument."""
    return next((TILES[channels] for channels in TILES if block_c <= channels), TILES[max(TILES)])


def few_rows_tile(block_c: int) -> Tile:
    return Tile(1, max(1, min(16, block_c // FEW_CHANNELS_PER_WARP)))


def backward_rows(batch: int, length: int, device: torch.device) -> int:
    """Rows of one image that a program of the backward owns."""
    programs = triton.cdiv(PROGRAMS_PER_SM * num_sms(device), max(1, batch))
    return max(LEAST_ROWS, triton.cdiv(length, programs))
