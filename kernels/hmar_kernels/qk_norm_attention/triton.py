"""Attention of a packed projection within short images in Triton, in one kernel.

    q = s (q' + b_q) / |q' + b_q|,   k = k' / |k'|,   v = v' + b_v,   out = softmax(q k^T) v

Grid: (blocks of queries, heads, images); a program owns [BLOCK_Q, D] of out and goes over the keys in blocks of
BLOCK_L, which copies bring into shared memory ahead of it. Keys and values are multiplied as they lie there: a key's
length divides its logits, and the bias of values is added to their mean. Norms, logits and sums are float32, q is
rounded as it is where it is stored. With OVERLAP the kernel starts while the one before it still runs.

The equations are stated in reference.py; argument checks live in api.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import triton_device
from ..triton_device import on_device, overlaps

EPS: tl.constexpr = tl.constexpr(1e-12)  # that of F.normalize


class Tile(NamedTuple):
    block_q: int
    block_l: int
    warps: int
    stages: int


# Tokens of an image, up to -> tile, of which none spills. NOTE: measured on an H100 (reports/log.md, "keys in turn");
# with 576 tokens `qk_norm` and `attention` are faster.
TILES: dict[int, Tile] = {
    16: Tile(16, 16, 1, 1),
    32: Tile(16, 32, 2, 1),
    64: Tile(32, 64, 4, 1),
    384: Tile(64, 64, 4, 3),
}
MAX_KEYS, MAX_HEAD_DIM = max(TILES), 128


@triton.jit
def _inverse_length(x):
    """Of rows."""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), EPS)


@triton.jit(do_not_specialize=["length"])
def _attention_kernel(
    qkv_ptr,
    q_bias_ptr,
    v_bias_ptr,
    log_scale_ptr,
    out_ptr,
    length,
    max_log_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_l, offs_d = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask_q = (offs_q < length)[:, None] & mask_d[None, :]
    qkv_ptr += b * length * (3 * H * D) + h * D
    dtype = qkv_ptr.dtype.element_ty
    scale = tl.exp(tl.minimum(tl.load(log_scale_ptr + h).to(tl.float32), max_log_scale))
    q_bias = tl.load(q_bias_ptr + h * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    v_bias = tl.load(v_bias_ptr + h * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()

    q = tl.load(qkv_ptr + offs_q[:, None] * (3 * H * D) + offs_d[None, :], mask=mask_q, other=0.0).to(tl.float32)
    q += q_bias[None, :]
    q = (q * (_inverse_length(q) * scale)[:, None]).to(dtype)
    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_Q], tl.float32)
    for begin in tl.range(0, length, BLOCK_L, num_stages=STAGES):
        left = length - begin
        mask_l = (offs_l < left)[:, None] & mask_d[None, :]
        offs = (begin + offs_l)[:, None] * (3 * H * D) + offs_d[None, :]
        k = tl.load(qkv_ptr + H * D + offs, mask=mask_l, other=0.0)
        v = tl.load(qkv_ptr + 2 * H * D + offs, mask=mask_l, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * _inverse_length(k.to(tl.float32))[None, :]
        logits = tl.where((offs_l < left)[None, :], logits, float("-inf"))
        before, highest = highest, tl.maximum(highest, tl.max(logits, 1))
        weights, shrink = tl.exp(logits - highest[:, None]), tl.exp(before - highest)
        weight = weight * shrink + tl.sum(weights, 1)
        total = tl.dot(weights.to(dtype), v, total * shrink[:, None], input_precision="ieee")
    out = total / weight[:, None] + v_bias[None, :]
    out_ptr += b * length * (H * D) + h * D
    tl.store(out_ptr + offs_q[:, None] * (H * D) + offs_d[None, :], out.to(dtype), mask=mask_q)


def unavailable(qkv: torch.Tensor, heads: int, *dtypes: torch.dtype) -> str | None:
    """Why the kernel cannot run on such a projection; None when it can."""
    head_dim = qkv.shape[2] // (3 * heads)
    if qkv.shape[1] > MAX_KEYS or head_dim > MAX_HEAD_DIM:
        found = f"{qkv.shape[1]} and {head_dim}"
        return f"it takes images of up to {MAX_KEYS} tokens and head dims up to {MAX_HEAD_DIM}, got {found}"
    return triton_device.unavailable(qkv.device, qkv.dtype, *dtypes)


def select_tile(length: int, head_dim: int) -> Tile:
    """A pure function of its arguments."""
    tile = TILES[next(longest for longest in TILES if length <= longest)]
    # NOTE: keys of twice the width take twice the registers.
    return tile if head_dim <= 64 else tile._replace(warps=min(8, 2 * tile.warps))


def forward(
    qkv: torch.Tensor,
    q_bias: torch.Tensor,
    v_bias: torch.Tensor,
    log_scale: torch.Tensor,
    max_log_scale: float,
    overlap: bool,
) -> torch.Tensor:
    """qkv [B,L,3C] -> [B,L,C]."""
    b, length, width = qkv.shape
    heads = log_scale.shape[0]
    head_dim = width // (3 * heads)
    out = torch.empty(b, length, width // 3, dtype=qkv.dtype, device=qkv.device)
    if not out.numel():
        return out
    tile = select_tile(length, head_dim)
    overlap = overlap and overlaps(qkv.device)
    with on_device(qkv):
        _attention_kernel[(triton.cdiv(length, tile.block_q), heads, b)](
            qkv_ptr=qkv.contiguous(),
            q_bias_ptr=q_bias.contiguous(),
            v_bias_ptr=v_bias.contiguous(),
            log_scale_ptr=log_scale.contiguous(),
            out_ptr=out,
            length=length,
            max_log_scale=max_log_scale,
            H=heads,
            D=head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_Q=tile.block_q,
            BLOCK_L=tile.block_l,
            STAGES=tile.stages,
            OVERLAP=overlap,
            num_warps=tile.warps,
            **({"launch_pdl": True} if overlap else {}),
        )
    return out
