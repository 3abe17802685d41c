"""Attention of a packed projection: argument checks, choice of implementation, torch custom op.

The mathematics is in reference.py, the kernel behind impl="triton" in triton.py. For longer images and other masks:
`qk_norm`, then `attention`.
"""

from __future__ import annotations

import math

import torch

from ..qk_norm.api import check_inputs
from . import reference, triton

IMPLEMENTATIONS = ("reference", "triton")
"""Names that `qk_norm_attention(..., impl=...)` takes beside "auto"."""


def qk_norm_attention(
    qkv: torch.Tensor,
    q_bias: torch.Tensor,
    v_bias: torch.Tensor,
    log_scale: torch.Tensor,
    *,
    max_log_scale: float = math.inf,
    impl: str = "auto",
    overlap: bool = False,
) -> torch.Tensor:
    """`qk_norm`, then dense attention of each image's tokens: one scale of a pyramid under the block-diagonal mask.

    Args:
        qkv: [B, L, 3 H D], the output of a linear layer without bias: all heads of q, then of k, then of v.
        q_bias, v_bias: [H D], dtypes of their own.
        log_scale: [H]; q is multiplied by exp(min(log_scale, max_log_scale)), and logits by nothing else.
        max_log_scale: the largest log_scale that counts.
        impl: "auto", "reference" or "triton", which has one kernel, no derivative and L up to triton.MAX_KEYS. A named
            implementation runs or raises; `choose` tells what "auto" takes.
        overlap: of "triton": the kernel may read biases and log_scale before the kernel queued just before it has
            ended. For those that no kernel writes which may still run. Without effect below compute capability 9.0.
    Returns:
        [B, L, H D] in qkv's dtype. Norms, logits and sums are float32.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the implementation cannot take them.
    """
    check_inputs(qkv, q_bias, v_bias, log_scale)
    given = (qkv, q_bias, v_bias, log_scale)
    if impl == "auto":
        impl = choose(*given)[0]
    elif impl not in IMPLEMENTATIONS:
        raise ValueError(f'unknown impl "{impl}": expected "auto", "reference" or "triton"')
    reason = _reason(*given) if impl == "triton" else None
    if reason is not None:
        raise ValueError(f'impl="{impl}" cannot run here: {reason}; qk_norm and attention, or impl="reference", would')
    if impl == "reference":
        return reference.forward(*given, max_log_scale)
    forward = _qk_norm_attention if torch.compiler.is_compiling() else triton.forward
    return forward(*given, float(max_log_scale), overlap)


def choose(qkv: torch.Tensor, q_bias: torch.Tensor, v_bias: torch.Tensor, log_scale: torch.Tensor) -> tuple[str, str]:
    """What impl="auto" takes of IMPLEMENTATIONS, and the reason."""
    reason = _reason(qkv, q_bias, v_bias, log_scale)
    if qkv.is_cuda and reason is None:
        return "triton", "one kernel for all keys of an image"
    return "reference", reason or "the plain implementation serves CPU tensors"


def _reason(qkv: torch.Tensor, q_bias: torch.Tensor, v_bias: torch.Tensor, log_scale: torch.Tensor) -> str | None:
    """Why the kernel cannot run; None when it can."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (qkv, q_bias, v_bias, log_scale)):
        return "it has no derivative"
    return triton.unavailable(qkv, log_scale.shape[0], q_bias.dtype, v_bias.dtype, log_scale.dtype)


_qk_norm_attention = torch.library.custom_op("hmar_kernels::qk_norm_attention", triton.forward, mutates_args=())


@_qk_norm_attention.register_fake
def _(qkv, q_bias, v_bias, log_scale, max_log_scale, overlap):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
