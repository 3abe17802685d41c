"""The least confident of the hidden codes in Triton, in one kernel.

    rank_i = number of keys below key_i, and of equal ones at lower places;  hidden where rank_i < count

Grid: (blocks of places, images); a program owns the ranks of BLOCK_I places and compares their keys with those of the
whole image, BLOCK_J at a time. Keys are the bits of float32 confidences, which order as the floats do.

The order is stated in reference.py; argument checks live in api.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_device import on_device

BLOCK_I, BLOCK_J, WARPS = 32, 128, 4

INFINITY: tl.constexpr = tl.constexpr(float("inf"))
NAN_KEY: tl.constexpr = tl.constexpr(0x7F800001)  # of NaN, one above that of infinity
ABOVE_ALL: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _keys(confidence_ptr, hidden_ptr, offs, mask, HIDDEN: tl.constexpr):
    """Integers that order as the sort does, equal ones for both zeros and for every NaN; above all beyond the mask."""
    # NOTE: adding 0 makes -0 to 0, which float comparison takes for equal and the order of bits does not.
    x = tl.load(confidence_ptr + offs, mask=mask, other=0.0) + 0.0
    if HIDDEN:
        x = tl.where(tl.load(hidden_ptr + offs, mask=mask, other=0) != 0, x, INFINITY)
    bits = x.to(tl.int32, bitcast=True)
    keys = tl.where(x == x, bits ^ ((bits >> 31) & ABOVE_ALL), NAN_KEY)
    return tl.where(mask, keys, ABOVE_ALL)


@triton.jit(do_not_specialize=["length", "count", "first"])
def _ranks_kernel(
    confidence_ptr,
    hidden_ptr,
    places_ptr,
    positions_ptr,
    still_hidden_ptr,
    length,
    count,
    first,
    HIDDEN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_i = offs_i < length
    confidence_ptr += b * length
    hidden_ptr += b * length
    keys_i = _keys(confidence_ptr, hidden_ptr, offs_i, mask_i, HIDDEN)

    ranks = tl.zeros([BLOCK_I], tl.int32)
    for start in range(0, length, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        keys_j = _keys(confidence_ptr, hidden_ptr, offs_j, offs_j < length, HIDDEN)
        # The key of a place is below those of later places that it equals
        bounds = keys_i[:, None] + (offs_j[None, :] < offs_i[:, None]).to(tl.int32)
        ranks += tl.sum((keys_j[None, :] < bounds).to(tl.int32), 1)

    stays = ranks < count
    offs = b * count + ranks
    tl.store(places_ptr + offs, offs_i.to(tl.int64), mask=mask_i & stays)
    tl.store(positions_ptr + offs, (first + offs_i).to(tl.int64), mask=mask_i & stays)
    tl.store(still_hidden_ptr + b * length + offs_i, stays, mask=mask_i)


def forward(confidence: Tensor, hidden: Tensor | None, count: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """confidence, hidden [B,n] -> places and positions [B,count], hidden [B,n]."""
    batch, length = confidence.shape
    confidence = confidence.contiguous()
    places, positions = (torch.empty(batch, count, dtype=torch.int64, device=confidence.device) for _ in range(2))
    still_hidden = torch.empty(batch, length, dtype=torch.bool, device=confidence.device)
    with on_device(confidence):
        _ranks_kernel[(triton.cdiv(length, BLOCK_I), batch)](
            confidence_ptr=confidence,
            hidden_ptr=confidence if hidden is None else hidden.contiguous(),
            places_ptr=places,
            positions_ptr=positions,
            still_hidden_ptr=still_hidden,
            length=length,
            count=count,
            first=first,
            HIDDEN=hidden is not None,
            BLOCK_I=BLOCK_I,
            BLOCK_J=BLOCK_J,
            num_warps=WARPS,
        )
    return places, positions, still_hidden
