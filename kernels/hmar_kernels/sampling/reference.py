"""Drawing codes, stated plainly.

    x_j  = ((1 + t) c_j - t u_j) / temperature                     guidance with strength t
    w_j  = exp(x_j - max x)                                         weights
    kept = top-k, then top-p of the weights, see `kept_codes`
    code = argmax over kept of w_j / E_j                            E_j exponential noise of rate 1
    confidence = w_code / sum over kept w_j

The argmax is a draw with probabilities w_j / sum w (the exponential race, which is the Gumbel-max trick), and one that
small errors of the logits seldom change. The noise is a function of (seed of the image, position of the token, step,
code) through a counter-based generator (Philox4x32-10; Salmon et al., SC 2011), so that no draw depends on the batch.

Sums of weights are sums of integers, multiples of 2^-40 of the likeliest code's weight: they are the same in any order,
and so is which codes top-p keeps. Any floating-point dtype, any device; at least float32 inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASS_BITS = 40  # a weight of 1 as an integer is 2^40: 2^23 of them fit into 64 bits
SHARE_BITS = 31  # top_p is rounded to multiples of 2^-31
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


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
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, n, V], guidance [B], seeds [B], positions [B, n] -> codes, confidence, nonfinite [B, n]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if unconditional is not None:
        strength = guidance.to(logits.dtype)[:, None, None]
        logits = (1 + strength) * logits - strength * unconditional.to(logits.dtype)
    if not greedy:
        logits = logits * inverse_temperature
    nonfinite = ~logits.isfinite().all(-1)
    logits = logits.masked_fill(nonfinite[..., None], 0)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    if greedy:
        # NOTE: the likeliest code survives any truncation, so greedy truncates nothing, and the confidence is the plain
        # probability. Truncated to a single code it would be 1 everywhere and order nothing.
        codes = logits.argmax(-1)
    else:
        weights = weights.masked_fill(~kept_codes(logits, top_k, top_p), 0)
        noise = exponential_noise(seeds, positions, step, logits.shape[-1])
        codes = (weights / noise.to(weights.dtype)).argmax(-1)
    total = mass(weights).sum(-1).to(weights.dtype) * 2.0**-MASS_BITS
    confidence = weights.gather(-1, codes[..., None]).squeeze(-1) / total
    return (
        codes.masked_fill(nonfinite, 0),
        confidence.to(torch.float32).masked_fill(nonfinite, torch.nan),
        nonfinite,
    )


def truncates(num_codes: int, top_k: int, top_p: float, greedy: bool) -> tuple[bool, bool]:
    """Whether top-k and top-p leave any code out."""
    return not greedy and 0 < top_k < num_codes, not greedy and 0 < top_p < 1


def targets(logits: Tensor, into: tuple[Tensor, Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """What kernels write: codes and confidence [B, n], or else those of `into`, and nonfinite [B, n]."""
    B, n, _ = logits.shape
    if into is not None:
        return into[0], into[1], into[2][:, None].expand(B, n)
    codes, confidence, nonfinite = (
        torch.empty(B, n, dtype=dtype, device=logits.device) for dtype in (torch.int64, torch.float32, torch.bool)
    )
    return codes, confidence, nonfinite


def kept_codes(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The codes [..., V] (bool) that truncation keeps.

    top-k keeps every code at least as likely as the k-th. Of those, top-p keeps the smallest set of most likely codes
    that together have a probability of at least p; of equally likely codes those of higher index come first. 0 turns
    either off, and so do k of at least V and p of 1.
    """
    kept = torch.ones_like(logits, dtype=torch.bool)
    if 0 < top_k < logits.shape[-1]:
        kept = logits >= logits.topk(top_k, dim=-1).values[..., -1:]
    if 0 < top_p < 1:
        weights = (logits - logits.amax(-1, keepdim=True)).exp().masked_fill(~kept, 0)
        order = logits.sort(dim=-1, stable=True).indices
        upto = mass(weights).gather(-1, order).cumsum(-1)
        total = upto[..., -1:]
        # A code stays when those before it in the order of likelihood have not reached the share yet.
        stays = total - upto < wanted_mass(total, top_p)
        kept = kept & torch.zeros_like(stays).scatter(-1, order, stays)
    return kept


def mass(weights: Tensor) -> Tensor:
    """Weights in [0, 1] as int64 multiples of 2^-MASS_BITS, rounded down."""
    return (weights * 2.0**MASS_BITS).to(torch.int64)


def share(top_p: float) -> int:
    """top_p as a multiple of 2^-SHARE_BITS, at least one."""
    return max(1, round(top_p * 2**SHARE_BITS))


def wanted_mass(total: Tensor, top_p: float) -> Tensor:
    """ceil(total top_p) in integers; the product itself would not fit into 64 bits."""
    high, low = total >> SHARE_BITS, total & (2**SHARE_BITS - 1)
    return high * share(top_p) + ((low * share(top_p) + 2**SHARE_BITS - 1) >> SHARE_BITS)


def exponential_noise(seeds: Tensor, positions: Tensor, step: int, num_codes: int) -> Tensor:
    """Exponential noise of rate 1, float32 [B, n, num_codes], for seeds [B] and positions [B, n] (int64)."""
    groups = torch.arange(-(-num_codes // 4), device=seeds.device)
    counter = (groups, positions[..., None], torch.full_like(groups, step), torch.zeros_like(groups))
    words = torch.stack(philox(seeds[:, None, None], counter), dim=-1).flatten(-2)[..., :num_codes]
    # NOTE: small values decide which unlikely codes win, so they keep all 32 bits; 1 - v would round them to 2^-24.
    v = ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)
    return torch.where(v < 2.0**-8, v * (1 + v * (0.5 + v * (1 / 3 + v * 0.25))), -(1 - v).log())


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Four random words (int64 in [0, 2^32)) for 64-bit seeds and four words of a counter, all broadcast together."""
    c0, c1, c2, c3 = (word & WORD for word in torch.broadcast_tensors(*counter, seed)[:4])
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        # NOTE: the products wrap around as unsigned ones do; the mask undoes the sign of the shift.
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) & WORD) ^ c1 ^ k0, product1 & WORD
        c2, c3 = ((product0 >> 32) & WORD) ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + PHILOX_INCREMENTS[0]) & WORD, (k1 + PHILOX_INCREMENTS[1]) & WORD
    return [c0, c1, c2, c3]
