"""Bias, GELU and a linear layer as one operator: argument checks, custom ops, autograd.

What is saved is memory: of an MLP's hidden layer, wide as it is, plain autograd keeps the input of GELU and its output,
this operator the input alone. The backward reads it once and writes GELU's output and the gradient in one pass. The
bias before GELU belongs to it, so that its gradient comes out of the same pass. The mathematics is in reference.py,
the kernels behind impl="triton" in triton.py.
"""

from __future__ import annotations

import torch

from ..custom_op import Operator
from ..products import product, product_dtype
from ..triton_device import column_sums, select
from . import reference, triton

__all__ = ["gelu_linear"]


def gelu_linear(
    x: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, out_bias: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """gelu(x + bias) W^T + out_bias, with GELU in its tanh form.

    Args:
        x: [..., F], of a dtype of its own, which x + bias of the reference has as well.
        bias: [F]. out_bias: [M].
        weight: [M, F]. The linear layer computes in autocast's dtype where that is on, else in the weight's.
        impl: "auto", "reference" or "triton". A named implementation runs or raises; "auto" takes "triton" on GPUs it
            runs on.
    Returns:
        [..., M] in that dtype. The backward keeps x, and bias and weight as they are; it is bit-deterministic.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the implementation cannot take them.
    """
    _check(x, bias, weight, out_bias)
    dtype = product_dtype(x, weight)
    if select(impl, x.device, *(t.dtype for t in (x, bias, weight, out_bias)), dtype) == "reference":
        return reference.gelu_linear(x, bias, weight, out_bias, dtype)
    return _gelu_linear(x, bias, weight, out_bias, dtype)


def _check(x: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, out_bias: torch.Tensor) -> None:
    if x.ndim < 2 or weight.ndim != 2 or x.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"x must be [..., F] and weight [M, F], with at least one channel each, got {list(x.shape)} and "
            f"{list(weight.shape)}"
        )
    m, f = weight.shape
    for name, tensor, size in (("bias", bias, f), ("out_bias", out_bias, m)):
        if list(tensor.shape) != [size]:
            raise ValueError(
                f"{name} must be [{size}] to go with weight {list(weight.shape)}, got {list(tensor.shape)}"
            )
    for name, tensor in {"x": x, "bias": bias, "weight": weight, "out_bias": out_bias}.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def _run(
    x: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, out_bias: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    # NOTE: dtypes are chosen here, not by autocast, which would also keep the rounded weight to its end.
    with torch.autocast(x.device.type, enabled=False):
        hidden = triton.forward(x.flatten(0, -2), bias, dtype)
        out = torch.addmm(out_bias.to(dtype), hidden, weight.to(dtype).T)
        return out.view(*x.shape[:-1], len(weight))


def _fake(x, bias, weight, out_bias, dtype):
    return x.new_empty(*x.shape[:-1], len(weight), dtype=dtype)


def _save(ctx, inputs, output):
    x, bias, weight, out_bias, _ = inputs
    ctx.save_for_backward(x, bias, weight)
    ctx.out_bias_dtype = out_bias.dtype


def _differentiate(ctx, d_out):
    return *_backward(d_out, *ctx.saved_tensors, ctx.out_bias_dtype), None


def _run_backward(
    d_out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, out_bias_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        d_out = d_out.flatten(0, -2)
        d_hidden = torch.mm(d_out, weight.to(d_out.dtype))
        hidden, dx, d_bias = triton.backward(d_hidden, x.flatten(0, -2), bias)
        d_weight = product(d_out.T, hidden, weight.dtype)
        return dx.view(x.shape), d_bias, d_weight, column_sums(d_out, out_bias_dtype)


def _fake_backward(d_out, x, bias, weight, out_bias_dtype):
    dx, d_bias, d_weight = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, bias, weight))
    return dx, d_bias, d_weight, weight.new_empty(len(weight), dtype=out_bias_dtype)


_backward = Operator("gelu_linear_backward", _run_backward, fake=_fake_backward)
_gelu_linear = Operator("gelu_linear", _run, fake=_fake, setup=_save, backward=_differentiate)
