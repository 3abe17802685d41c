"""Drawing codes in Triton: guidance, truncation, draw and confidence in one pass over the logits.

    x = ((1 + t) c - t u) / temperature;  w = exp(x - max x);  code = argmax over kept of w / E

Grid: one program a token. It reads the row (both halves of it with guidance) once and keeps it in registers, as a tile
[V / 4, 4] of which a row takes its four words from one call of the generator. Nothing is sorted: the k-th likeliest
logit and the threshold of top-p are found by bisection over float bits, which order as the floats do, and over the
values in turn, so that usually 14 and at most 96 turns give the exact value. All warps wait for each other at every
reduction over the row, so each tells as much as it can: three counts in one number are two turns, bounds of the row
tell whether it is finite, and what lies above the threshold of top-p is known from the search. Weights are summed as
int64 (reference.py tells why), the rest is float32.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_device
from .reference import MASS_BITS, SHARE_BITS, share, targets, truncates

MAX_CODES = 65536  # a row must fit into the registers of a program
CODES_PER_WARP = 512

ONE_MASS: tl.constexpr = tl.constexpr(float(2**MASS_BITS))
BITS: tl.constexpr = tl.constexpr(SHARE_BITS)
LOW_BITS: tl.constexpr = tl.constexpr(2**SHARE_BITS - 1)
ABOVE_ALL: tl.constexpr = tl.constexpr(0x7FFFFFFF)
INFINITE_KEY: tl.constexpr = tl.constexpr(0x7F800000)  # of infinity; that of its negative is -INFINITE_KEY - 1
COUNT_BITS: tl.constexpr = tl.constexpr(21)  # of a count of codes, of which three fit into 64 bits
COUNT_MASK: tl.constexpr = tl.constexpr(2**21 - 1)
SNAPPING_TURN: tl.constexpr = tl.constexpr(8)  # about the binary logarithm of the codes that hold most of the mass


@triton.jit
def _exponential(seed, position, step, groups):
    """Noise [groups, 4], as in reference.py."""
    zeros = tl.zeros_like(groups)
    r0, r1, r2, r3 = tl.philox(seed, groups, zeros + position, zeros + step, zeros)
    column = tl.arange(0, 4)[None, :]
    words = tl.where(column == 0, r0, tl.where(column == 1, r1, tl.where(column == 2, r2, r3)))
    v = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    series = v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * 0.25)))
    return tl.where(v < 0.00390625, series, -tl.log(1.0 - v))


@triton.jit
def _value(key):
    """The float of a key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & ABOVE_ALL)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high, turn):
    """A key between low and high, not either: half of their values in even turns, of their bits in odd ones.

    The halved values are those of a range without most of the keys, which lie around 0; the halved bits bound the turns
    where values are of very different sizes. Where no key is between, the lower one.
    """
    value = 0.5 * _value(low) + 0.5 * _value(high)
    bits = value.to(tl.int32, bitcast=True)
    of_values = (bits ^ ((bits >> 31) & ABOVE_ALL)).to(tl.int64)
    of_bits = low + (high - low) // 2
    return tl.minimum(tl.maximum(tl.where(turn % 2 == 0, of_values, of_bits), low + 1), high - 1)


@triton.jit
def _kth_key(keys, valid, low, top, k):
    """The largest threshold that at least k of the valid keys reach; `low` is the smallest key, `top` the largest."""
    low, high = low.to(tl.int64), top.to(tl.int64) + 1
    turn = 0
    while high - low > 1:
        # Two turns at once: the second has one of two thresholds, as the first one ends
        middle = _middle(low, high, turn)
        lower, upper = _middle(low, middle, turn + 1), _middle(middle, high, turn + 1)
        reached = (keys >= lower.to(tl.int32)).to(tl.int64)
        reached += (keys >= middle.to(tl.int32)).to(tl.int64) << COUNT_BITS
        reached += (keys >= upper.to(tl.int32)).to(tl.int64) << (2 * COUNT_BITS)
        counts = tl.sum(tl.where(valid, reached, 0))
        of_lower, of_middle = counts & COUNT_MASK, (counts >> COUNT_BITS) & COUNT_MASK
        of_upper = counts >> (2 * COUNT_BITS)
        high = tl.where(of_lower < k, lower, tl.where(of_middle < k, middle, tl.where(of_upper < k, upper, high)))
        low = tl.where(of_upper >= k, upper, tl.where(of_middle >= k, middle, tl.where(of_lower >= k, lower, low)))
        # With exactly k the set is found, whatever the value of the k-th key.
        high = tl.where((of_lower == k) | (of_middle == k) | (of_upper == k), low + 1, high)
        turn += 2
    return low.to(tl.int32)


@triton.jit
def _share_key(keys, masses, low, top, total, wanted):
    """The largest threshold of which the keys that reach it have a mass of at least `wanted`.

    Also that mass, and the mass of the keys above it. Those that reach `low` have a mass of `total`.
    """
    low, high = low.to(tl.int64), top.to(tl.int64) + 1
    reached, above = total, total - total
    turn = 0
    while high - low > 1:
        middle = _middle(low, high, turn)
        snaps = turn % 3 == 2 and turn >= SNAPPING_TURN
        if snaps:
            # NOTE: with few keys left between the bounds, the largest of them is soon the one that is looked for.
            middle = tl.max(tl.where(keys < high.to(tl.int32), keys, low.to(tl.int32))).to(tl.int64)
        mass = tl.sum(tl.where(keys >= middle.to(tl.int32), masses, 0))
        enough = mass >= wanted
        reached, above = tl.where(enough, mass, reached), tl.where(enough, above, mass)
        high = tl.where(enough, tl.where(snaps, middle + 1, high), middle)
        low = tl.where(enough, middle, low)
        turn += 1
    return low.to(tl.int32), reached, above


@triton.jit
def _tie_start(tied, codes, low, num_codes, wanted):
    """The largest index from which on at least `wanted` codes are tied."""
    high = num_codes
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = tl.sum((tied & (codes >= middle)).to(tl.int32)) >= wanted
        high = tl.where(enough, high, middle)
        low = tl.where(enough, middle, low)
    return low


@triton.jit(do_not_specialize=["seeds_stride", "num_tokens", "step", "top_k", "wanted_share"])
def _sample_kernel(
    logits_ptr,
    unconditional_ptr,
    guidance_ptr,
    seeds_ptr,
    positions_ptr,
    places_ptr,
    codes_ptr,
    confidence_ptr,
    nonfinite_ptr,
    logits_strides,
    unconditional_strides,
    seeds_stride,
    positions_strides,
    places_strides,
    codes_strides,
    confidence_strides,
    nonfinite_strides,
    num_tokens,
    num_codes,
    step,
    inverse_temperature,
    top_k,
    wanted_share,
    GUIDED: tl.constexpr,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    PLACED: tl.constexpr,
    INTO: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b, n = row // num_tokens, row % num_tokens
    groups = tl.arange(0, BLOCK_V // 4)[:, None]
    codes = groups * 4 + tl.arange(0, 4)[None, :]
    valid = codes < num_codes

    # guided logits
    offs = b * logits_strides[0] + n * logits_strides[1] + codes.to(tl.int64) * logits_strides[2]
    x = tl.load(logits_ptr + offs, mask=valid, other=0.0).to(tl.float32)
    if GUIDED:
        offs = (
            b * unconditional_strides[0] + n * unconditional_strides[1] + codes.to(tl.int64) * unconditional_strides[2]
        )
        u = tl.load(unconditional_ptr + offs, mask=valid, other=0.0).to(tl.float32)
        strength = tl.load(guidance_ptr + b)
        x = (1.0 + strength) * x - strength * u
    if not GREEDY:
        x = x * inverse_temperature
    # NOTE: adding 0 makes -0 to 0, which float comparison takes for equal and the order of bits does not.
    x += 0.0
    bits = x.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & ABOVE_ALL)
    low = tl.min(tl.where(valid, keys, ABOVE_ALL))
    top = tl.max(tl.where(valid, keys, -ABOVE_ALL - 1))
    # Keys of NaN are beyond those of the infinities
    bad = (top >= INFINITE_KEY) | (low <= -INFINITE_KEY - 1)
    x, keys = tl.where(bad, 0.0, x), tl.where(bad, 0, keys)
    low, top = tl.where(bad, 0, low), tl.where(bad, 0, top)
    weights = tl.where(valid, tl.exp(x - _value(top)), 0.0)

    # truncation
    if TOP_K:
        low = _kth_key(keys, valid, low, top, top_k)
        weights = tl.where(keys >= low, weights, 0.0)
    masses = (weights * ONE_MASS).to(tl.int64)
    total = tl.sum(masses)
    if TOP_P:
        wanted = (total >> BITS) * wanted_share + (((total & LOW_BITS) * wanted_share + LOW_BITS) >> BITS)
        threshold, reached, above = _share_key(keys, masses, low, top, total, wanted)
        tied = valid & (keys == threshold)
        mass = tl.max(tl.where(tied, masses, 0))
        num_wanted = (wanted - above + mass - 1) // mass
        first = 0
        if (reached - above) // mass > num_wanted:
            first = _tie_start(tied, codes, first, num_codes, num_wanted)
        weights = tl.where((keys > threshold) | (tied & (codes >= first)), weights, 0.0)
        total = tl.minimum(reached, above + num_wanted * mass)

    # draw
    if GREEDY:
        # NOTE: not of the weights, of which those of logits near the largest round to 1.
        scores = tl.where(valid, keys, -ABOVE_ALL - 1)
    else:
        seed, position = (
            tl.load(seeds_ptr + b * seeds_stride),
            tl.load(positions_ptr + b * positions_strides[0] + n * positions_strides[1]),
        )
        noise = _exponential(seed, position.to(tl.int32), step, groups)
        # Bits of floats from 0 on order as they do
        scores = tl.where(valid, tl.div_rn(weights, noise), -1.0).to(tl.int32, bitcast=True)
    # The largest score, and of equal ones that of the lowest code
    ranked = (scores.to(tl.int64) << 32) + (ABOVE_ALL - codes)
    code = ABOVE_ALL - (tl.max(ranked) & 0xFFFFFFFF).to(tl.int32)
    weight = tl.sum(tl.where(codes == code, weights, 0.0))
    kept = total.to(tl.float32) * (1.0 / ONE_MASS)

    place = n
    if PLACED:
        place = tl.load(places_ptr + b * places_strides[0] + n * places_strides[1])
    tl.store(codes_ptr + b * codes_strides[0] + place * codes_strides[1], tl.where(bad, 0, code).to(tl.int64))
    confidence = tl.where(bad, float("nan"), tl.div_rn(weight, kept))
    tl.store(confidence_ptr + b * confidence_strides[0] + place * confidence_strides[1], confidence)
    nonfinite_ptr += b * nonfinite_strides[0] + n * nonfinite_strides[1]
    # NOTE: tokens of an image share what they are written into, and none may undo what another has found.
    if INTO:
        tl.store(nonfinite_ptr, bad, mask=bad)
    else:
        tl.store(nonfinite_ptr, bad)


def unavailable(device: torch.device, dtype: torch.dtype, num_codes: int) -> str | None:
    """Why the kernel cannot run; None when it can."""
    if num_codes > MAX_CODES:
        return f"a row must fit into registers, at most {MAX_CODES} codes, got {num_codes}"
    return triton_device.unavailable(device, dtype)


def num_warps(block: int) -> int:
    return min(16, max(1, block // CODES_PER_WARP))


def forward(
    logits: Tensor,
    unconditional: Tensor | None,
    guidance: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    step: int,
    inverse_temperature: float,
    top_k: int,
    top_p: float,
    greedy: bool,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
    places: Tensor | None = None,
    overlap: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, n, V], guidance [B], seeds [B], positions [B, n] -> codes, confidence, nonfinite [B, n].

    into: codes and confidence [B, N], which are written at the places [B, n], or else N = n, and nonfinite [B].
    overlap: without effect here.
    """
    B, n, num_codes = logits.shape
    codes, confidence, nonfinite = targets(logits, into)
    guided, (by_k, by_p) = unconditional is not None, truncates(num_codes, top_k, top_p, greedy)
    block = max(16, triton.next_power_of_2(num_codes))
    # NOTE: Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        _sample_kernel[(B * n,)](
            logits_ptr=logits,
            unconditional_ptr=unconditional if guided else logits,
            guidance_ptr=guidance if guided else logits,
            seeds_ptr=seeds,
            positions_ptr=positions,
            places_ptr=positions if places is None else places,
            codes_ptr=codes,
            confidence_ptr=confidence,
            nonfinite_ptr=nonfinite,
            logits_strides=logits.stride(),
            unconditional_strides=unconditional.stride() if guided else logits.stride(),
            seeds_stride=seeds.stride(0),
            positions_strides=positions.stride(),
            places_strides=(positions if places is None else places).stride(),
            codes_strides=codes.stride(),
            confidence_strides=confidence.stride(),
            nonfinite_strides=nonfinite.stride(),
            num_tokens=n,
            num_codes=num_codes,
            step=step,
            inverse_temperature=inverse_temperature,
            top_k=top_k,
            wanted_share=share(top_p),
            GUIDED=guided,
            GREEDY=greedy,
            TOP_K=by_k,
            TOP_P=by_p,
            PLACED=places is not None,
            INTO=into is not None,
            BLOCK_V=block,
            num_warps=num_warps(block),
            # NOTE: the reference rounds every product of the guidance; fused ones would order near ties in another way.
            enable_fp_fusion=False,
        )
    return (codes, confidence, nonfinite) if into is None else into
