"""Attention of a packed projection within short images in Triton, in one kernel.

    q = s (q' + b_q) / |q' + b_q|,   k = k' / |k'|,   v = v' + b_v,   out = softmax(q k^T) v

Grid: (blocks of queries, heads, images); a program owns [BLOCK_Q, D] of out and goes over the keys in blocks of
BLOCK_L, which copies bring into shared memory ahead of it. Keys and values are multiplied as they lie there: a key's
length divides its logits, and the bias of values is added to their mean. Norms, logits and sums are float32, q is
rounded as it is where it is stored. With OVERLAP the kernel starts while the one before it still runs. With CACHED
keys and values of earlier tokens, as they are stored, come first, and a program stores those of its own tokens.

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


# Keys of an image, up to -> tile, of which none spills. NOTE: measured on an H100 (reports/log.md, "keys in turn");
# with 576 tokens `qk_norm` and `attention` are faster.
TILES: dict[int, Tile] = {
    16: Tile(16, 16, 1, 1),
    32: Tile(16, 32, 2, 1),
    64: Tile(32, 64, 4, 1),
    384: Tile(64, 64, 4, 3),
}
MAX_LENGTH, MAX_HEAD_DIM = max(TILES), 128


@triton.jit
def _inverse_length(x):
    """Of rows."""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), EPS)


@triton.jit
def _attend(logits, v, visible, highest, weight, total):
    """A step of the online softmax: the sums with one block of keys more."""
    logits = tl.where(visible[None, :], logits, float("-inf"))
    before, highest = highest, tl.maximum(highest, tl.max(logits, 1))
    weights, shrink = tl.exp(logits - highest[:, None]), tl.exp(before - highest)
    weight = weight * shrink + tl.sum(weights, 1)
    total = tl.dot(weights.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
    return highest, weight, total


@triton.jit(do_not_specialize=["length", "num_cached", "capacity"])
def _attention_kernel(
    qkv_ptr,
    q_bias_ptr,
    v_bias_ptr,
    log_scale_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    length,
    num_cached,
    capacity,
    max_log_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
    CACHED: tl.constexpr,
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
    if CACHED:
        k_cache_ptr += (b * H + h) * capacity * D
        v_cache_ptr += (b * H + h) * capacity * D
        # its own tokens, for later scales; before sums take registers
        own_ptr = qkv_ptr + offs_q[:, None] * (3 * H * D) + offs_d[None, :]
        own_k = tl.load(own_ptr + H * D, mask=mask_q, other=0.0).to(tl.float32)
        own_v = tl.load(own_ptr + 2 * H * D, mask=mask_q, other=0.0).to(tl.float32)
        own_offs = (num_cached + offs_q)[:, None] * D + offs_d[None, :]
        tl.store(k_cache_ptr + own_offs, (own_k * _inverse_length(own_k)[:, None]).to(dtype), mask=mask_q)
        tl.store(v_cache_ptr + own_offs, (own_v + v_bias[None, :]).to(dtype), mask=mask_q)
        for begin in tl.range(0, num_cached, BLOCK_L, num_stages=STAGES):
            visible = offs_l < num_cached - begin
            mask_l = visible[:, None] & mask_d[None, :]
            offs = (begin + offs_l)[:, None] * D + offs_d[None, :]
            k = tl.load(k_cache_ptr + offs, mask=mask_l, other=0.0)
            v = tl.load(v_cache_ptr + offs, mask=mask_l, other=0.0)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
            highest, weight, total = _attend(logits, v, visible, highest, weight, total)
        cached_weight, cached_highest = weight, highest
    for begin in tl.range(0, length, BLOCK_L, num_stages=STAGES):
        visible = offs_l < length - begin
        mask_l = visible[:, None] & mask_d[None, :]
        offs = (begin + offs_l)[:, None] * (3 * H * D) + offs_d[None, :]
        k = tl.load(qkv_ptr + H * D + offs, mask=mask_l, other=0.0)
        v = tl.load(qkv_ptr + 2 * H * D + offs, mask=mask_l, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * _inverse_length(k.to(tl.float32))[None, :]
        highest, weight, total = _attend(logits, v, visible, highest, weight, total)
    out = total / weight[:, None]
    if CACHED:
        # Values that are cached have the bias already.
        own = 1.0 - cached_weight * tl.exp(cached_highest - highest) / weight
        out += own[:, None] * v_bias[None, :]
    else:
        out += v_bias[None, :]
    out_ptr += b * length * (H * D) + h * D
    tl.store(out_ptr + offs_q[:, None] * (H * D) + offs_d[None, :], out.to(dtype), mask=mask_q)


def unavailable(qkv: torch.Tensor, heads: int, *dtypes: torch.dtype) -> str | None:
    """Why the kernel cannot run on such a projection; None when it can."""
    head_dim = qkv.shape[2] // (3 * heads)
    # NOTE: of cached keys there may be any number.
    if qkv.shape[1] > MAX_LENGTH or head_dim > MAX_HEAD_DIM:
        found = f"{qkv.shape[1]} and {head_dim}"
        return f"it takes images of up to {MAX_LENGTH} tokens and head dims up to {MAX_HEAD_DIM}, got {found}"
    return triton_device.unavailable(qkv.device, qkv.dtype, *dtypes)


def select_tile(num_keys: int, head_dim: int) -> Tile:
    """A pure function of its arguments."""
    tile = TILES[next((longest for longest in TILES if num_keys <= longest), MAX_LENGTH)]
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
    return _launch(qkv, q_bias, v_bias, log_scale, None, None, 0, max_log_scale, overlap)


def forward_cached(
    qkv: torch.Tensor,
    q_bias: torch.Tensor,
    v_bias: torch.Tensor,
    log_scale: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_cached: int,
    max_log_scale: float,
    overlap: bool,
) -> torch.Tensor:
    """The same with k_cache v_cache [B,H,capacity,D], to which L tokens are added behind num_cached."""
    return _launch(qkv, q_bias, v_bias, log_scale, k_cache, v_cache, num_cached, max_log_scale, overlap)


def _launch(
    qkv: torch.Tensor,
    q_bias: torch.Tensor,
    v_bias: torch.Tensor,
    log_scale: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    num_cached: int,
    max_log_scale: float,
    overlap: bool,
) -> torch.Tensor:
    """qkv [B,L,3C], caches [B,H,capacity,D] or none -> [B,L,C]."""
    b, length, width = qkv.shape
    heads = log_scale.shape[0]
    head_dim = width // (3 * heads)
    out = torch.empty(b, length, width // 3, dtype=qkv.dtype, device=qkv.device)
    if not out.numel():
        return out
    tile = select_tile(num_cached + length, head_dim)
    cached = k_cache is not None
    overlap = overlap and overlaps(qkv.device)
    with on_device(qkv):
        _attention_kernel[(triton.cdiv(length, tile.block_q), heads, b)](
            qkv_ptr=qkv.contiguous(),
            q_bias_ptr=q_bias.contiguous(),
            v_bias_ptr=v_bias.contiguous(),
            log_scale_ptr=log_scale.contiguous(),
            k_cache_ptr=k_cache if cached else out,
            v_cache_ptr=v_cache if cached else out,
            out_ptr=out,
            length=length,
            num_cached=num_cached,
            capacity=k_cache.shape[2] if cached else 0,
            max_log_scale=max_log_scale,
            H=heads,
            D=head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_Q=tile.block_q,
            BLOCK_L=tile.block_l,
            STAGES=tile.stages,
            CACHED=cached,
            OVERLAP=overlap,
            num_warps=tile.warps,
            **({"launch_pdl": True} if overlap else {}),
        )
    return out
