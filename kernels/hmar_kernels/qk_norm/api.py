"""Head split with normalised q and k: argument checks, choice of implementation, custom ops and autograd.

The mathematics is in reference.py, the kernels behind impl="triton" in triton.py.
"""

from __future__ import annotations

import math

import torch

from ..custom_op import Operator
from ..triton_device import choose, select
from . import reference, triton

__all__ = ["choose", "qk_norm"]


def qk_norm(
    qkv: torch.Tensor,
    q_bias: torch.Tensor,
    v_bias: torch.Tensor,
    log_scale: torch.Tensor,
    *,
    max_log_scale: float = math.inf,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of attention from a packed projection: biases, unit length of q and k, a scale of q, heads apart.

    Args:
        qkv: [B, L, 3 H D], the output of a linear layer without bias: all heads of q, then of k, then of v.
        q_bias, v_bias: [H D], dtypes of their own.
        log_scale: [H]; q is multiplied by exp(min(log_scale, max_log_scale)).
        max_log_scale: where log_scale is larger it has no gradient.
        impl: "auto", "reference" or "triton". A named implementation runs or raises; `choose` tells what "auto" takes.
    Returns:
        q, k, v [B, H, L, D] in qkv's dtype, with memory order [B, L, H, D]. Arithmetic is float32. The backward keeps
        q and k, which attention keeps anyway, and two numbers a token and head: qkv itself is not needed again. It
        writes the gradient of qkv as one packed tensor, and is bit-deterministic.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the implementation cannot take them.
    """
    check_inputs(qkv, q_bias, v_bias, log_scale)
    if not max_log_scale <= math.inf:
        raise ValueError("max_log_scale must be a number, or math.inf for no limit, got nan")
    dtypes = (qkv.dtype, q_bias.dtype, v_bias.dtype, log_scale.dtype)
    if select(impl, qkv.device, *dtypes) == "reference":
        return reference.forward(qkv, q_bias, v_bias, log_scale, max_log_scale)
    q, k, v, _ = _qk_norm(qkv, q_bias, v_bias, log_scale, float(max_log_scale))
    return q, k, v


def check_inputs(qkv: torch.Tensor, q_bias: torch.Tensor, v_bias: torch.Tensor, log_scale: torch.Tensor) -> None:
    """Raise ValueError where qkv [B,L,3C], the biases [C] and log_scale [H] do not go together."""
    if qkv.ndim != 3 or qkv.shape[2] % 3 or qkv.shape[2] == 0:
        raise ValueError(
            f"qkv must be [B, L, 3 H D], got shape {list(qkv.shape)}; flatten(2) makes it of [B, L, 3, H, D]"
        )
    width = qkv.shape[2] // 3
    if log_scale.ndim != 1 or log_scale.shape[0] == 0 or width % log_scale.shape[0]:
        raise ValueError(
            f"log_scale must be [H] with H a divisor of the width {width} of q, got shape {list(log_scale.shape)}"
        )
    for name, bias in (("q_bias", q_bias), ("v_bias", v_bias)):
        if list(bias.shape) != [width]:
            raise ValueError(f"{name} must be [{width}] to go with qkv {list(qkv.shape)}, got {list(bias.shape)}")
    for name, x in (("qkv", qkv), ("q_bias", q_bias), ("v_bias", v_bias), ("log_scale", log_scale)):
        if not x.dtype.is_floating_point or x.dtype.itemsize < 2:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.device != qkv.device:
            raise ValueError(f"{name} must be on qkv's device {qkv.device}, got {x.device}")


def _run_qk_norm(
    qkv: torch.Tensor, q_bias: torch.Tensor, v_bias: torch.Tensor, log_scale: torch.Tensor, max_log_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return triton.forward(qkv, q_bias, v_bias, log_scale, max_log_scale)


def _fake_qk_norm(qkv, q_bias, v_bias, log_scale, max_log_scale):
    b, length, width = qkv.shape
    heads = log_scale.shape[0]
    q, k, v = (qkv.new_empty(b, length, heads, width // (3 * heads)).transpose(1, 2) for _ in range(3))
    return q, k, v, qkv.new_empty(2, b, heads, length, dtype=torch.float32)


def _save_qk_norm(ctx, inputs, output):
    _, q_bias, v_bias, log_scale, ctx.max_log_scale = inputs
    q, k, _, reciprocal_norms = output
    ctx.save_for_backward(q, k, log_scale, reciprocal_norms)
    ctx.bias_dtypes = q_bias.dtype, v_bias.dtype


def _differentiate_qk_norm(ctx, dq, dk, dv, _):
    q, k, log_scale, reciprocal_norms = ctx.saved_tensors
    d_qkv, d_vectors = _qk_norm_backward(dq, dk, dv, q, k, log_scale, reciprocal_norms, ctx.max_log_scale)
    width = d_qkv.shape[2] // 3
    d_q_bias, d_v_bias, d_log_scale = d_vectors.split((width, width, log_scale.shape[0]))
    q_dtype, v_dtype = ctx.bias_dtypes
    return d_qkv, d_q_bias.to(q_dtype), d_v_bias.to(v_dtype), d_log_scale.to(log_scale.dtype), None


def _run_qk_norm_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    log_scale: torch.Tensor,
    reciprocal_norms: torch.Tensor,
    max_log_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return triton.backward(dq, dk, dv, q, k, log_scale, reciprocal_norms, max_log_scale)


def _fake_qk_norm_backward(dq, dk, dv, q, k, log_scale, reciprocal_norms, max_log_scale):
    b, heads, length, head_dim = q.shape
    d_vectors = q.new_empty(2 * heads * head_dim + heads, dtype=torch.float32)
    return q.new_empty(b, length, 3 * heads * head_dim), d_vectors


_qk_norm_backward = Operator("qk_norm_backward", _run_qk_norm_backward, fake=_fake_qk_norm_backward)
_qk_norm = Operator("qk_norm", _run_qk_norm, fake=_fake_qk_norm, setup=_save_qk_norm, backward=_differentiate_qk_norm)
