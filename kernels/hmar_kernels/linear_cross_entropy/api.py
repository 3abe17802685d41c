"""Linear layer and weighted cross-entropy in one operator: argument checks, choice, custom op and autograd.

The mathematics is in reference.py, the kernels behind impl="triton" and what they cost in triton.py.
"""

from __future__ import annotations

import torch

from ..custom_op import Operator
from ..triton_device import choose, select
from . import reference, triton

__all__ = ["choose", "linear_cross_entropy"]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    token_weight: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of F.linear(hidden, weight, bias) against targets, summed with a weight for each token.

    Args:
        hidden: [N, C].
        weight: [V, C]; bias: [V] or None. Under autocast products are in its dtype, as those of F.linear, else all
            three have one dtype; the gradients of weight and bias keep their float32 sums if they are float32.
        targets: int64 [N], 0 to V - 1.
        token_weight: float [N], without a gradient; 0 leaves a token out. Default 1 / N, the mean.
        impl: "auto", "reference" or "triton". A named implementation runs or raises; `choose` tells what "auto" takes.
    Returns:
        loss, a float32 scalar (float64 for float64 inputs), and correct, bool [N]: whether the target has the largest
        logit (of equal ones, the first). Where gradients are wanted, impl="triton" computes them in the forward and
        keeps them instead of hidden: the backward only scales. It is bit-deterministic where matrix products are.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together, the implementation cannot take them, or a target on
            the CPU is out of range. On a GPU that is a device-side assertion, as it is in F.cross_entropy: seen at the
            next synchronisation, because reading the targets would be one.
    """
    check_inputs(hidden, weight, bias, targets, token_weight)
    dtypes = [x.dtype for x in (hidden, weight, bias, token_weight) if x is not None]
    if select(impl, hidden.device, *dtypes) == "reference":
        return reference.forward(hidden, weight, bias, targets, token_weight)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, correct, *_ = _linear_cross_entropy(hidden, weight, bias, targets, token_weight, wanted)
    return loss, correct


def check_inputs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    token_weight: torch.Tensor | None,
) -> None:
    """Raise ValueError where hidden [N,C], weight [V,C], bias [V], targets [N] and token_weight [N] do not fit."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or 0 in (*hidden.shape, len(weight)):
        raise ValueError(
            f"hidden must be [N, C] and weight [V, C], none of them empty, got {list(hidden.shape)} and "
            f"{list(weight.shape)}; flatten(0, 1) makes [B, L, C] an [N, C]"
        )
    (n, _), vocabulary = hidden.shape, weight.shape[0]
    for name, x, size in (("bias", bias, vocabulary), ("targets", targets, n), ("token_weight", token_weight, n)):
        if x is not None and list(x.shape) != [size]:
            raise ValueError(
                f"{name} must be [{size}] to go with hidden {list(hidden.shape)} and weight {list(weight.shape)}, "
                f"got {list(x.shape)}"
            )
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {x.device}")
    if weight.device != hidden.device:
        raise ValueError(f"weight must be on hidden's device {hidden.device}, got {weight.device}")
    floats = {"hidden": hidden, "weight": weight, "bias": bias, "token_weight": token_weight}
    for name, x in floats.items():
        if x is not None and (not x.dtype.is_floating_point or x.dtype.itemsize < 2):
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    same = weight.dtype == hidden.dtype and (bias is None or bias.dtype == hidden.dtype)
    if not same and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(
            f"without autocast hidden, weight and bias must share one dtype, got {hidden.dtype}, {weight.dtype}"
            + (f", {bias.dtype}" if bias is not None else "")
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}; targets.long() works")
    if token_weight is not None and token_weight.requires_grad:
        raise ValueError("token_weight has no gradient, but requires one; token_weight.detach() works")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and n:
        low, high = targets.aminmax()
        if low < 0 or high >= vocabulary:
            raise ValueError(f"targets must be from 0 to {vocabulary - 1}, got values from {low} to {high}")


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    token_weight: torch.Tensor | None,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    # NOTE: dtypes are chosen here; autocast would round float32 products once more.
    with torch.autocast(hidden.device.type, enabled=False):
        return triton.forward(hidden, weight, bias, targets, token_weight, wanted)


def _fake(hidden, weight, bias, targets, token_weight, wanted):
    d_hidden, d_weight, d_bias = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if wants else hidden.new_empty(0)
        for x, wants in zip((hidden, weight, weight[:, 0] if bias is None else bias), wanted, strict=True)
    )
    loss, unit = (hidden.new_empty((), dtype=torch.float32) for _ in range(2))
    return loss, targets.new_empty(targets.shape, dtype=torch.bool), unit, d_hidden, d_weight, d_bias


def _save(ctx, inputs, output):
    *_, ctx.wanted = inputs
    ctx.save_for_backward(*output[2:])


def _differentiate(ctx, d_loss, *_):
    if torch.is_grad_enabled():
        raise RuntimeError('linear_cross_entropy with impl="triton" has no second derivative; impl="reference" has one')
    unit, *gradients = ctx.saved_tensors
    factor = d_loss * unit
    scaled = (x * factor.to(x.dtype) if wants else None for x, wants in zip(gradients, ctx.wanted, strict=True))
    return *scaled, None, None, None


_linear_cross_entropy = Operator("linear_cross_entropy", _run, fake=_fake, setup=_save, backward=_differentiate)
