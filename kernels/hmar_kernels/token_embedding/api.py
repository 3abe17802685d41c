"""Embedding of tokens: argument checks, choice of implementation, torch custom op.

The mathematics is in reference.py, the kernel in triton.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference, triton

IMPLEMENTATIONS = ("reference", "triton")
"""Names that `token_embedding(..., impl=...)` takes beside "auto"."""


class Known(NamedTuple):
    """What masked prediction adds to every token: W residual where its code is visible, else the mask embedding.

    Attributes:
        residuals: [B, n, E], any dtype.
        hidden: bool [B, n].
        mask: [C], any dtype.
    """

    residuals: Tensor
    hidden: Tensor
    mask: Tensor


def token_embedding(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    scale: Tensor,
    known: Known | None = None,
    *,
    copies: int = 1,
    impl: str = "auto",
    overlap: bool = False,
) -> Tensor:
    """W f + b, with what masked prediction adds, the position and the scale: tokens of one scale of a pyramid.

    Args:
        inputs: f [B, n, E] in a dtype of their own; rounded to the weight's.
        weight, bias: [C, E] and [C], of one dtype.
        position, scale: [n, C] and [C], of one dtype.
        known: of masked prediction; None adds nothing.
        copies: how often the images are repeated in the result, one batch after the other.
        impl: "auto", "reference" or "triton", which has one kernel, no derivative and E up to triton.MAX_DIMS. A named
            implementation runs or raises; `choose` tells what "auto" takes.
        overlap: of "triton": the kernel may read weight, bias, position, scale and mask before the kernels queued
            before it have ended. For those that no kernel writes which may still run. Without effect below compute
            capability 9.0.
    Returns:
        [copies B, n, C], in the dtype to which weight and position promote. Sums of products are float32.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the implementation cannot take them.
    """
    known_tensors = (None, None, None) if known is None else tuple(known)
    given = (inputs, weight, bias, position, scale, *known_tensors)
    _check(*given, copies)
    if impl == "auto":
        impl = choose(inputs, weight, bias, position, scale, known)[0]
    elif impl not in IMPLEMENTATIONS:
        raise ValueError(f'unknown impl "{impl}": expected "auto", "reference" or "triton"')
    reason = _reason(*given) if impl == "triton" else None
    if reason is not None:
        raise ValueError(f'impl="{impl}" cannot run here: {reason}; impl="reference" would')
    if impl == "reference":
        return reference.forward(*given, copies)
    # NOTE: the operator's dispatch takes the host longer than the kernel takes, so it is there for tracing only.
    forward = _token_embedding if torch.compiler.is_compiling() else triton.forward
    return forward(*given, copies, overlap)


def choose(
    inputs: Tensor, weight: Tensor, bias: Tensor, position: Tensor, scale: Tensor, known: Known | None = None
) -> tuple[str, str]:
    """What impl="auto" takes of IMPLEMENTATIONS, and the reason."""
    reason = _reason(inputs, weight, bias, position, scale, *(known or (None, None, None)))
    if inputs.is_cuda and reason is None:
        return "triton", "one kernel for all sums"
    return "reference", reason or "the plain implementation serves CPU tensors"


def _reason(*given: Tensor | None) -> str | None:
    """Why the kernel cannot run; None when it can."""
    inputs, *others = (x for x in given if x is not None and x.is_floating_point())
    if torch.is_grad_enabled() and any(x.requires_grad for x in (inputs, *others)):
        return "it has no derivative"
    return triton.unavailable(inputs, *(x.dtype for x in others))


_token_embedding = torch.library.custom_op("hmar_kernels::token_embedding", triton.forward, mutates_args=())


@_token_embedding.register_fake
def _(inputs, weight, bias, position, scale, residuals, hidden, mask, copies, overlap):
    batch, length, _ = inputs.shape
    dtype = torch.promote_types(weight.dtype, position.dtype)
    return inputs.new_empty(copies * batch, length, weight.shape[0], dtype=dtype)


def _check(inputs, weight, bias, position, scale, residuals, hidden, mask, copies) -> None:
    if inputs.ndim != 3 or weight.ndim != 2 or inputs.shape[2] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"inputs must be [B, n, E] and weight [C, E], got {list(inputs.shape)} and {list(weight.shape)}"
        )
    batch, length, dims = inputs.shape
    width = weight.shape[0]
    expected = {
        "bias": (bias, (width,)),
        "position": (position, (length, width)),
        "scale": (scale, (width,)),
        "residuals": (residuals, (batch, length, dims)),
        "hidden": (hidden, (batch, length)),
        "mask": (mask, (width,)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
        if x is not None and x.device != inputs.device:
            raise ValueError(f"{name} is on {x.device} and inputs are on {inputs.device}; move it there")
    if weight.device != inputs.device:
        raise ValueError(f"weight is on {weight.device} and inputs are on {inputs.device}; move it there")
    for first, second, dtypes in (
        ("weight", "bias", (weight.dtype, bias.dtype)),
        ("position", "scale", (position.dtype, scale.dtype)),
    ):
        if dtypes[0] != dtypes[1]:
            raise ValueError(f"{first} and {second} must have one dtype, got {dtypes[0]} and {dtypes[1]}")
    if hidden is not None and hidden.dtype != torch.bool:
        raise ValueError(f"hidden must be bool, got {hidden.dtype}")
    if copies < 1:
        raise ValueError(f"copies is {copies}; at least one is needed")
