"""Attention of a packed projection: argument checks, choice of implementation, torch custom op.

The mathematics is in reference.py, the kernel behind impl="triton" in triton.py. For longer images and other masks:
`qk_norm`, then `attention`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..qk_norm.api import check_inputs
from . import reference, triton

IMPLEMENTATIONS = ("reference", "triton")
"""Names that `qk_norm_attention(..., impl=...)` takes beside "auto"."""


class KVCache(NamedTuple):
    """Keys and values of earlier tokens, as `qk_norm` gives them, and room for more.

    Attributes:
        k, v: [B, H, capacity, D], contiguous, in qkv's dtype; changed in place.
        length: how many tokens are there.
    """

    k: torch.Tensor
    v: torch.Tensor
    length: int


def qk_norm_attention(
    qkv: torch.Tensor,
    q_bias: torch.Tensor,
    v_bias: torch.Tensor,
    log_scale: torch.Tensor,
    *,
    max_log_scale: float = math.inf,
    cache: KVCache | None = None,
    impl: str = "auto",
    overlap: bool = False,
) -> torch.Tensor:
    """`qk_norm`, then dense attention of each image's tokens: one scale of a pyramid under the block-diagonal mask, or
    with a cache of all earlier ones under the block-causal mask.

    Args:
        qkv: [B, L, 3 H D], the output of a linear layer without bias: all heads of q, then of k, then of v.
        q_bias, v_bias: [H D], dtypes of their own.
        log_scale: [H]; q is multiplied by exp(min(log_scale, max_log_scale)), and logits by nothing else.
        max_log_scale: the largest log_scale that counts.
        cache: of earlier tokens, which are seen as well; keys and values of these ones are written behind them. Has no
            derivative.
        impl: "auto", "reference" or "triton", which has one kernel, no derivative and L up to triton.MAX_LENGTH. A
            named implementation runs or raises; `choose` tells what "auto" takes.
        overlap: of "triton": the kernel may read biases and log_scale before the kernel queued just before it has
            ended. For those that no kernel writes which may still run. Without effect below compute capability 9.0.
    Returns:
        [B, L, H D] in qkv's dtype. Norms, logits and sums are float32.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the implementation cannot take them.
    """
    check_inputs(qkv, q_bias, v_bias, log_scale)
    given = (qkv, q_bias, v_bias, log_scale)
    if cache is not None:
        _check_cache(qkv, log_scale.shape[0], cache)
        if (needs := _needs_derivative(*given, cache.k, cache.v)) is not None:
            raise ValueError(f"attention with a cache cannot run here: {needs}; torch.no_grad() would")
    if impl == "auto":
        impl = choose(*given)[0]
    elif impl not in IMPLEMENTATIONS:
        raise ValueError(f'unknown impl "{impl}": expected "auto", "reference" or "triton"')
    reason = _reason(*given) if impl == "triton" else None
    if reason is not None:
        raise ValueError(f'impl="{impl}" cannot run here: {reason}; qk_norm and attention, or impl="reference", would')
    given = given if cache is None else (*given, *cache)
    if impl == "reference":
        return (reference.forward if cache is None else reference.forward_cached)(*given, max_log_scale)
    if cache is None:
        forward = _qk_norm_attention if torch.compiler.is_compiling() else triton.forward
    else:
        forward = _cached if torch.compiler.is_compiling() else triton.forward_cached
    return forward(*given, float(max_log_scale), overlap)


def choose(qkv: torch.Tensor, q_bias: torch.Tensor, v_bias: torch.Tensor, log_scale: torch.Tensor) -> tuple[str, str]:
    """What impl="auto" takes of IMPLEMENTATIONS, and the reason."""
    reason = _reason(qkv, q_bias, v_bias, log_scale)
    if qkv.is_cuda and reason is None:
        return "triton", "one kernel for all keys of an image"
    return "reference", reason or "the plain implementation serves CPU tensors"


def _reason(qkv: torch.Tensor, q_bias: torch.Tensor, v_bias: torch.Tensor, log_scale: torch.Tensor) -> str | None:
    """Why the kernel cannot run; None when it can."""
    reason = _needs_derivative(qkv, q_bias, v_bias, log_scale)
    return reason or triton.unavailable(qkv, log_scale.shape[0], q_bias.dtype, v_bias.dtype, log_scale.dtype)


def _needs_derivative(*given: torch.Tensor) -> str | None:
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return "it has no derivative" if needed else None


def _check_cache(qkv: torch.Tensor, heads: int, cache: KVCache) -> None:
    batch, length, width = qkv.shape
    # NOTE: tensors that are traced have no address.
    if not torch.compiler.is_compiling() and cache.k.data_ptr() == cache.v.data_ptr() and cache.k.numel() > 0:
        raise ValueError("the cache's k and v are the same memory; each needs room of its own")
    for name, x in (("k", cache.k), ("v", cache.v)):
        expected = (batch, heads, cache.k.shape[2] if cache.k.ndim == 4 else -1, width // (3 * heads))
        if x.shape != expected or x.dtype != qkv.dtype or x.device != qkv.device or not x.is_contiguous():
            raise ValueError(
                f"the cache's {name} must be contiguous {qkv.dtype} [{batch}, {heads}, capacity, {expected[3]}] on "
                f"{qkv.device}, got {x.dtype} {list(x.shape)} with strides {list(x.stride())} on {x.device}"
            )
    if not 0 <= cache.length <= cache.k.shape[2] - length:
        raise ValueError(
            f"the cache has room for {cache.k.shape[2]} tokens and {cache.length} of them are there; there is none for "
            f"{length} more"
        )


_qk_norm_attention = torch.library.custom_op("hmar_kernels::qk_norm_attention", triton.forward, mutates_args=())


@_qk_norm_attention.register_fake
def _(qkv, q_bias, v_bias, log_scale, max_log_scale, overlap):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


_cached = torch.library.custom_op(
    "hmar_kernels::qk_norm_attention_cached", triton.forward_cached, mutates_args=("k_cache", "v_cache")
)


@_cached.register_fake
def _(qkv, q_bias, v_bias, log_scale, k_cache, v_cache, num_cached, max_log_scale, overlap):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
