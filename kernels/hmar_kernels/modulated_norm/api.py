"""Adaptive layer norm, alone and with the gated residual before it: argument checks, choice, custom ops, autograd.

The mathematics is in reference.py, the kernels behind impl="triton" in triton.py.
"""

from __future__ import annotations

import torch

from ..custom_op import Operator
from ..triton_device import choose, select
from . import reference, triton

__all__ = ["choose", "modulated_norm", "residual_modulated_norm", "summed_modulated_norm"]


def modulated_norm(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Layer norm of every token, times 1 + scale, plus shift.

    Args:
        x: [B, L, C].
        scale, shift: [B, 1, C], any stride over B (chunks of one tensor are read in place); dtypes of their own.
        eps: added to the variance.
        dtype: of the result. Default: what a linear layer would cast it to, which is autocast's dtype where that is on
            and else the common dtype of x, scale and shift.
        impl: "auto", "reference" or "triton". A named implementation runs or raises; `choose` tells what "auto" takes.
    Returns:
        h [B, L, C]. Statistics are float32. The backward keeps x and two numbers a token; it is bit-deterministic.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the implementation cannot take them.
    """
    check_inputs(x, {"scale": scale, "shift": shift})
    dtype = _result_dtype(dtype, x, scale, shift)
    if select(impl, x.device, x.dtype, scale.dtype, shift.dtype, dtype) == "reference":
        return reference.norm(x, scale, shift, eps).to(dtype)
    h, _ = _norm(x, scale, shift, eps, dtype)
    return h


def residual_modulated_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    keep: torch.Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x + keep gate branch, and `modulated_norm` of y.

    Args:
        x: the residual stream, [B, L, C].
        branch: what is added to it, [B, L, C], of a dtype of its own.
        gate, scale, shift: [B, 1, C], any stride over B; dtypes of their own.
        keep: [B], a factor on each image's branch: 0 or 1 / (1 - p) under drop-path. It has no gradient.
        eps, dtype, impl: as in `modulated_norm`.
    Returns:
        y [B, L, C] in x's dtype, rounded once, and h [B, L, C]. The backward keeps y, branch and two numbers a token;
        it is bit-deterministic.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the implementation cannot take them.
    """
    check_inputs(x, {"gate": gate, "scale": scale, "shift": shift}, branch, keep)
    dtype = _result_dtype(dtype, x, branch, gate, scale, shift)
    inputs = (x, branch, gate, scale, shift) if keep is None else (x, branch, gate, scale, shift, keep)
    if select(impl, x.device, *(t.dtype for t in inputs), dtype) == "reference":
        y = reference.residual(x, branch, gate, keep)
        return y, reference.norm(y, scale, shift, eps).to(dtype)
    y, h, _ = _residual_norm(x, branch, gate, keep, scale, shift, eps, dtype)
    return y, h


def summed_modulated_norm(
    x: torch.Tensor,
    parts: torch.Tensor,
    bias: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x + gate (sum of the parts + bias), and `modulated_norm` of y: after `linear_parts`.

    Args:
        x: the residual stream, [B, L, C].
        parts: [P, B, L, C], of a dtype of its own. bias: [C].
        gate, scale, shift: [B, 1, C], any stride over B; dtypes of their own.
        eps, dtype, impl: as in `modulated_norm`; "triton" has no derivative, and "auto" does not take it where one is
            needed.
    Returns:
        y [B, L, C] in x's dtype, rounded once, and h [B, L, C].
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the implementation cannot take them.
    """
    if parts.ndim != 4 or len(parts) == 0:
        raise ValueError(f"parts must be [P, B, L, C] with at least one part, got shape {list(parts.shape)}")
    check_inputs(x, {"gate": gate, "scale": scale, "shift": shift}, parts[0])
    if list(bias.shape) != [x.shape[2]] or bias.device != x.device or not bias.is_floating_point():
        raise ValueError(
            f"bias must be floats [{x.shape[2]}] on {x.device}, got {bias.dtype} {list(bias.shape)} on {bias.device}"
        )
    dtype = _result_dtype(dtype, x, parts, gate, scale, shift)
    inputs = (x, parts, bias, gate, scale, shift)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if needs_grad and impl == "triton":
        raise ValueError('impl="triton" cannot run here: it has no derivative; impl="reference" would')
    if needs_grad or select(impl, x.device, *(t.dtype for t in inputs), dtype) == "reference":
        branch = parts.sum(0, dtype=torch.promote_types(parts.dtype, torch.float32)) + bias
        y = reference.residual(x, branch, gate, None)
        return y, reference.norm(y, scale, shift, eps).to(dtype)
    forward = _summed_norm if torch.compiler.is_compiling() else _run_summed_norm
    return forward(x, parts, bias, gate, scale, shift, eps, dtype)


def check_inputs(
    x: torch.Tensor,
    vectors: dict[str, torch.Tensor],
    branch: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> None:
    """Raise ValueError where x [B,L,C], the vectors [B,1,C], branch [B,L,C] and keep [B] do not go together."""
    if x.ndim != 3 or x.shape[2] == 0:
        raise ValueError(f"x must be [B, L, C] with at least one channel, got shape {list(x.shape)}")
    b, _, c = x.shape
    expected = {name: [b, 1, c] for name in vectors}
    tensors = dict(vectors)
    if branch is not None:
        expected["branch"], tensors["branch"] = list(x.shape), branch
    if keep is not None:
        expected["keep"], tensors["keep"] = [b], keep
    for name, tensor in tensors.items():
        if list(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name} must be {expected[name]} to go with x {list(x.shape)}, got {list(tensor.shape)}"
                + ("; unsqueeze(1) makes [B, C] a [B, 1, C]" if name in vectors and tensor.ndim == 2 else "")
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    for name, tensor in {"x": x, **tensors}.items():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if keep is not None and keep.requires_grad:
        raise ValueError("keep has no gradient, but requires one; keep.detach() works")


def _result_dtype(dtype: torch.dtype | None, *tensors: torch.Tensor) -> torch.dtype:
    device = tensors[0].device.type
    if dtype is not None:
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        return dtype
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _run_norm(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    _, h, statistics = triton.forward(x, None, None, None, scale, shift, eps, dtype)
    return h, statistics


def _fake_norm(x, scale, shift, eps, dtype):
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format), _fake_statistics(x)


def _fake_statistics(x):
    return x.new_empty(2, *x.shape[:2], dtype=torch.float32)


def _save_norm(ctx, inputs, output):
    x, scale, shift, _, _ = inputs
    ctx.save_for_backward(x, scale, output[1])
    ctx.shift_dtype = shift.dtype
    ctx.set_materialize_grads(False)


def _differentiate_norm(ctx, dh, _):
    x, scale, statistics = ctx.saved_tensors
    if dh is None:
        return None, None, None, None, None
    dx, _, d_vectors = _norm_backward(None, dh, x, None, None, None, scale, statistics)
    return dx, d_vectors[:, 0:1], d_vectors[:, 1:2].to(ctx.shift_dtype), None, None


def _run_residual_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    keep: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return triton.forward(x, branch, gate, keep, scale, shift, eps, dtype)


def _fake_residual_norm(x, branch, gate, keep, scale, shift, eps, dtype):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y, dtype=dtype), _fake_statistics(x)


def _save_residual_norm(ctx, inputs, output):
    _, branch, gate, keep, scale, shift, _, _ = inputs
    y, _, statistics = output
    ctx.save_for_backward(y, branch, gate, keep, scale, statistics)
    ctx.shift_dtype = shift.dtype
    ctx.set_materialize_grads(False)


def _differentiate_residual_norm(ctx, dy, dh, _):
    y, branch, gate, keep, scale, statistics = ctx.saved_tensors
    if dh is None:
        dh = torch.zeros_like(y)
    dx, d_branch, d_vectors = _norm_backward(dy, dh, y, branch, gate, keep, scale, statistics)
    d_scale, d_shift, d_gate = d_vectors.split(1, dim=1)
    return dx, d_branch, d_gate.to(gate.dtype), None, d_scale, d_shift.to(ctx.shift_dtype), None, None


def _run_norm_backward(
    dy: torch.Tensor | None,
    dh: torch.Tensor,
    y: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    keep: torch.Tensor | None,
    scale: torch.Tensor,
    statistics: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return triton.backward(dy, dh, y, branch, gate, keep, scale, statistics)


def _fake_norm_backward(dy, dh, y, branch, gate, keep, scale, statistics):
    b, _, c = y.shape
    dx = torch.empty_like(y, memory_format=torch.contiguous_format)
    if branch is None:
        return dx, y.new_empty(0), scale.new_empty(b, 2, c)
    d_branch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    return dx, d_branch, scale.new_empty(b, 3, c)


def _run_summed_norm(
    x: torch.Tensor,
    parts: torch.Tensor,
    bias: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, h, _ = triton.forward(x, None, gate, None, scale, shift, eps, dtype, parts=parts, bias=bias)
    return y, h


def _fake_summed_norm(x, parts, bias, gate, scale, shift, eps, dtype):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y, dtype=dtype)


_summed_norm = torch.library.custom_op("hmar_kernels::summed_modulated_norm", _run_summed_norm, mutates_args=())
_summed_norm.register_fake(_fake_summed_norm)
_norm_backward = Operator("modulated_norm_backward", _run_norm_backward, fake=_fake_norm_backward)
_norm = Operator("modulated_norm", _run_norm, fake=_fake_norm, setup=_save_norm, backward=_differentiate_norm)
_residual_norm = Operator(
    "residual_modulated_norm",
    _run_residual_norm,
    fake=_fake_residual_norm,
    setup=_save_residual_norm,
    backward=_differentiate_residual_norm,
)
