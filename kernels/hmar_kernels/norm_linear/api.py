"""Adaptive layer norm followed by a linear layer: argument checks, custom ops, autograd.

What is saved is memory: a linear layer keeps its input for the gradient of its weight, and the norm's backward, which
has the normalised tokens at hand, can write that input once more for 2 bytes a value. Nothing else is computed twice.
The mathematics is in reference.py; impl="triton" is the kernels of `modulated_norm` and torch's products. Read
`gelu_linear/api.py` for the other half of an MLP.
"""

from __future__ import annotations

import torch

from ..custom_op import Operator
from ..modulated_norm import reference as norm_reference
from ..modulated_norm import triton
from ..modulated_norm.api import check_inputs
from ..products import product, product_dtype
from ..triton_device import select
from . import reference

__all__ = ["norm_linear", "residual_norm_linear"]


def norm_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> torch.Tensor:
    """`modulated_norm` of every token, then a linear layer without bias.

    Args:
        x: [B, L, C].
        scale, shift: [B, 1, C], any stride over B; dtypes of their own.
        weight: [M, C]. Norm and weight are rounded to autocast's dtype where that is on, else to the weight's.
        eps: added to the variance.
        impl: "auto", "reference" or "triton", as in `modulated_norm`.
    Returns:
        out [B, L, M] in that dtype. The backward keeps x, the weight as it is and two numbers a token.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the implementation cannot take them.
    """
    check_inputs(x, {"scale": scale, "shift": shift})
    check_weight(weight, x)
    dtype = product_dtype(x, weight)
    if select(impl, x.device, x.dtype, scale.dtype, shift.dtype, weight.dtype, dtype) == "reference":
        return reference.norm_linear(x, scale, shift, weight, eps, dtype)
    out, _ = _norm_linear(x, scale, shift, weight, eps, dtype)
    return out


def residual_norm_linear(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    *,
    keep_x: bool = False,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x + gate branch, and `norm_linear` of y.

    Args:
        x: the residual stream, [B, L, C].
        branch: what is added to it, [B, L, C], of a dtype of its own.
        gate, scale, shift: [B, 1, C], any stride over B; dtypes of their own.
        weight, eps, impl: as in `norm_linear`.
        keep_x: the backward keeps x and adds the branch to it once more, instead of keeping y. That saves a residual
            stream where x is kept anyway, by the operator that gave it.
    Returns:
        y [B, L, C] in x's dtype, rounded once, and out [B, L, M]. The backward keeps y or x, branch, the weight as it
        is and two numbers a token.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the implementation cannot take them.
    """
    check_inputs(x, {"gate": gate, "scale": scale, "shift": shift}, branch)
    check_weight(weight, x)
    dtype, inputs = product_dtype(x, weight), (x, branch, gate, scale, shift, weight)
    if select(impl, x.device, *(t.dtype for t in inputs), dtype) == "reference":
        y = norm_reference.residual(x, branch, gate, None)
        return y, reference.norm_linear(y, scale, shift, weight, eps, dtype)
    y, out, _ = _residual_norm_linear(x, branch, gate, scale, shift, weight, eps, dtype, keep_x)
    return y, out


def check_weight(weight: torch.Tensor, x: torch.Tensor) -> None:
    """Raise ValueError where weight [M,C] does not go with x [B,L,C]."""
    if weight.ndim != 2 or weight.shape[1] != x.shape[2] or not len(weight):
        raise ValueError(f"weight must be [M, {x.shape[2]}] to go with x {list(x.shape)}, got {list(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise ValueError(f"weight must be float16, bfloat16, float32 or float64, got {weight.dtype}")


def _run(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    _, h, statistics = triton.forward(x, None, None, None, scale, shift, eps, dtype)
    return _product(h, weight), statistics


def _product(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # NOTE: dtypes are chosen here, not by autocast, which would also keep the rounded weight to its end.
    with torch.autocast(h.device.type, enabled=False):
        return torch.nn.functional.linear(h, weight.to(h.dtype))


def _fake(x, scale, shift, weight, eps, dtype):
    return x.new_empty(*x.shape[:2], len(weight), dtype=dtype), _fake_statistics(x)


def _fake_statistics(x):
    return x.new_empty(2, *x.shape[:2], dtype=torch.float32)


def _save(ctx, inputs, output):
    x, scale, shift, weight, _, _ = inputs
    ctx.save_for_backward(x, scale, shift, weight, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_out, _):
    if d_out is None:
        return (None,) * 6
    x, scale, shift, weight, statistics = ctx.saved_tensors
    dx, _, d_vectors, d_weight = _backward(None, d_out, x, None, None, scale, shift, weight, statistics, False)
    return dx, d_vectors[:, 0:1], d_vectors[:, 1:2].to(shift.dtype), d_weight, None, None


def _run_residual(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    keep_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, h, statistics = triton.forward(x, branch, gate, None, scale, shift, eps, dtype)
    return y, _product(h, weight), statistics


def _fake_residual(x, branch, gate, scale, shift, weight, eps, dtype, keep_x):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(*x.shape[:2], len(weight), dtype=dtype), _fake_statistics(x)


def _save_residual(ctx, inputs, output):
    x, branch, gate, scale, shift, weight, _, dtype, keep_x = inputs
    y, _, statistics = output
    ctx.save_for_backward(x if keep_x else y, branch, gate, scale, shift, weight, statistics)
    ctx.dtype, ctx.keep_x = dtype, keep_x
    ctx.set_materialize_grads(False)


def _differentiate_residual(ctx, dy, d_out, _):
    start, branch, gate, scale, shift, weight, statistics = ctx.saved_tensors
    if d_out is None:
        d_out = start.new_zeros(*start.shape[:2], len(weight), dtype=ctx.dtype)
    dx, d_branch, d_vectors, d_weight = _backward(
        dy, d_out, start, branch, gate, scale, shift, weight, statistics, ctx.keep_x
    )
    d_scale, d_shift, d_gate = d_vectors.split(1, dim=1)
    return dx, d_branch, d_gate.to(gate.dtype), d_scale, d_shift.to(shift.dtype), d_weight, None, None, None


def _run_backward(
    dy: torch.Tensor | None,
    d_out: torch.Tensor,
    start: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    statistics: torch.Tensor,
    from_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(start.device.type, enabled=False):
        d_out = d_out.flatten(0, 1)
        dh = torch.mm(d_out, weight.to(d_out.dtype)).view(start.shape)
        found = triton.backward(dy, dh, start, branch, gate, None, scale, statistics, shift=shift, from_x=from_x)
        h = dh.flatten(0, 1)
        return *found, product(d_out.T, h, weight.dtype)


def _fake_backward(dy, d_out, start, branch, gate, scale, shift, weight, statistics, from_x):
    b, _, c = start.shape
    dx = torch.empty_like(start, memory_format=torch.contiguous_format)
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if branch is None:
        return dx, start.new_empty(0), scale.new_empty(b, 2, c), d_weight
    d_branch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    return dx, d_branch, scale.new_empty(b, 3, c), d_weight


_backward = Operator("norm_linear_backward", _run_backward, fake=_fake_backward)
_norm_linear = Operator("norm_linear", _run, fake=_fake, setup=_save, backward=_differentiate)
_residual_norm_linear = Operator(
    "residual_norm_linear",
    _run_residual,
    fake=_fake_residual,
    setup=_save_residual,
    backward=_differentiate_residual,
)
