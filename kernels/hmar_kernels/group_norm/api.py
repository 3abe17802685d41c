"""The group norm operator: argument checks, choice of implementation, torch custom op.

The mathematics is in reference.py, the kernels in triton.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference, triton

IMPLEMENTATIONS = ("reference", "triton")


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    silu: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Group norm (arXiv 1803.08494, equation 1) over positions and the channels of each group, then SiLU if wanted.

    Args:
        x: [N, C, H, W].
        num_groups: divides C.
        weight, bias: [C].
        eps: added to the variance.
        impl: "auto", "reference" or "triton". "auto" takes "triton" for channels-last images on a GPU that need no
            gradient, outside of autocast; it has no derivative. A named implementation runs or raises.
    Returns:
        [N, C, H, W] in x's dtype (under autocast, of the reference: float32) and memory format.
    Raises:
        ValueError: shapes do not fit together, or the implementation cannot take them.
    """
    if x.ndim != 4 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"x must be floats [N, C, H, W], none of them 0, got {x.dtype} {list(x.shape)}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {num_groups}")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"weight and bias must be [{channels}], got {list(weight.shape)} and {list(bias.shape)}")
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f'unknown impl "{impl}": expected "auto" or one of {", ".join(IMPLEMENTATIONS)}')
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    if impl == "auto":
        plain = needs_grad or not x.is_cuda or torch.is_autocast_enabled("cuda")
        impl = "reference" if plain or triton.unavailable(x) is not None else "triton"
    elif impl == "triton":
        reason = "the kernels have no derivative" if needs_grad else triton.unavailable(x)
        if reason is not None:
            raise ValueError(f'impl="triton" cannot run here: {reason}; impl="auto" would take "reference"')
    if impl == "reference":
        return reference.forward(x, num_groups, weight, bias, eps, silu)
    # NOTE: the operator's dispatch takes the host longer than small kernels take, so it is there for tracing only.
    forward = _group_norm_triton if torch.compiler.is_compiling() else triton.forward
    return forward(x, num_groups, weight, bias, eps, silu)


@torch.library.custom_op("hmar_kernels::group_norm_triton", mutates_args=())
def _group_norm_triton(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    return triton.forward(x, num_groups, weight, bias, eps, silu)


@_group_norm_triton.register_fake
def _(x, num_groups, weight, bias, eps, silu):
    return torch.empty_like(x, memory_format=torch.channels_last)
