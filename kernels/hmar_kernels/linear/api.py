"""The linear operator: argument checks, choice of implementation, torch custom op.

The mathematics is in reference.py, the kernel for few rows in triton.py; impl="cublas" is a call of torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import triton_device
from . import reference, triton

IMPLEMENTATIONS = ("reference", "cublas", "triton")
"""Names that `linear(..., impl=...)` takes beside "auto"."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False, impl: str = "auto") -> Tensor:
    """x W^T + b, then the tanh form of GELU (arXiv 1606.08415, section 2) if wanted.

    Args:
        x: [..., K] of the weight's dtype: nothing is cast, whatever autocast says.
        weight: [N, K].
        bias: [N] or None.
        impl: "auto" or one of IMPLEMENTATIONS. "cublas" has bias and GELU behind the product, in the same kernel;
            "triton" is for few rows, where the time goes into reading the weight. Neither has a derivative. "auto" is
            "cublas" on a GPU where no gradient is needed, else "reference". A named implementation runs or raises.
    Returns:
        [..., N] in x's dtype. Sums are float32.
    Raises:
        ValueError: shapes or dtypes do not fit together, or the implementation cannot take them.
    """
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1] or 0 in x.shape or 0 in weight.shape:
        raise ValueError(
            f"x must be [..., K] and weight [N, K], none of them 0, got {list(x.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], one a row of the weight, got {list(bias.shape)}")
    given = [x, weight] if bias is None else [x, weight, bias]
    if len({tensor.dtype for tensor in given}) > 1 or not x.is_floating_point():
        dtypes = ", ".join(str(tensor.dtype) for tensor in given)
        raise ValueError(f"x, weight and bias must be of one floating dtype, got {dtypes}; x.to(weight.dtype) is")
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f'unknown impl "{impl}": expected "auto" or one of {", ".join(IMPLEMENTATIONS)}')
    if impl == "auto":
        impl = "cublas" if x.is_cuda and not needs_grad else "reference"
    elif impl != "reference":
        reason = "it has no derivative" if needs_grad else None
        if reason is None and impl == "cublas" and not x.is_cuda:
            reason = f"it needs a CUDA device, got {x.device.type}"
        if reason is None and impl == "triton":
            reason = triton_device.unavailable(x.device, x.dtype)
        if reason is not None:
            raise ValueError(f'impl="{impl}" cannot run here: {reason}; impl="reference" would')
    if impl == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return reference.forward(x, weight, bias, gelu)
    rows = x.reshape(-1, x.shape[-1])
    if impl == "triton":
        # NOTE: the operator's dispatch takes the host longer than the kernel takes, so it is there for tracing only.
        forward = _linear_triton if torch.compiler.is_compiling() else triton.forward
        y = forward(rows, weight, bias, gelu)
    else:
        y = _cublas(rows, weight, bias, gelu)
    return y.view(*x.shape[:-1], weight.shape[0])


def _cublas(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        if gelu and bias is not None:
            # NOTE: on CUDA this is the tanh form; on a CPU it would be the other one.
            return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
        return reference.forward(x, weight, bias, gelu)


@torch.library.custom_op("hmar_kernels::linear_triton", mutates_args=())
def _linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return triton.forward(x, weight, bias, gelu)


@_linear_triton.register_fake
def _(x, weight, bias, gelu):
    return x.new_empty(x.shape[0], weight.shape[0])
