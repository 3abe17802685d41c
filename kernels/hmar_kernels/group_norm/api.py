"""Group norm, with the residual before it or a convolution behind it: checks, choice of implementation, custom ops.

The mathematics is in reference.py, the kernels in triton.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, triton
from .triton import ChunkStatistics

IMPLEMENTATIONS = ("reference", "triton")


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = False,
    statistics: ChunkStatistics | None = None,
    impl: str = "auto",
) -> Tensor:
    """Group norm (arXiv 1803.08494, equation 1) over positions and the channels of each group, then SiLU if wanted.

    Args:
        x: [N, C, H, W].
        num_groups: divides C.
        weight, bias: [C].
        shift: [C], added to x first: the bias of the convolution that made x, which so costs no pass of its own.
        eps: added to the variance.
        statistics: of x, where what made it has them: "triton" then reads x once less. The reference makes its own, and
            so does "triton" under torch.compile.
        impl: "auto", "reference" or "triton". "auto" takes "triton" for channels-last images on a GPU that need no
            gradient, outside of autocast; it has no derivative. A named implementation runs or raises.
    Returns:
        [N, C, H, W] in x's dtype (under autocast, of the reference: float32) and memory format.
    Raises:
        ValueError: shapes do not fit together, or the implementation cannot take them.
    """
    if statistics is not None:
        chunks = x.shape[2] * x.shape[3] / statistics.chunk_size if x.ndim == 4 else 0
        expected = (x.shape[0], chunks, x.shape[1])
        if statistics.means.shape != expected or statistics.deviations.shape != expected:
            raise ValueError(
                f"statistics must be of whole chunks of x {list(x.shape)}, got {list(statistics.means.shape)} of "
                f"{statistics.chunk_size} positions each"
            )
    if _select(impl, num_groups, x, None, weight, bias, shift) == "reference":
        return reference.forward(x, shift, num_groups, weight, bias, eps, silu)
    # NOTE: the operator's dispatch takes the host longer than small kernels take, so it is there for tracing only.
    if torch.compiler.is_compiling():
        return _group_norm_triton(x, shift, num_groups, weight, bias, eps, silu)
    return triton.forward(x, shift, num_groups, weight, bias, eps, silu, statistics)


def residual_group_norm(
    x: Tensor,
    branch: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """z = x + branch + shift, and `group_norm` of z.

    Args:
        x, branch: [N, C, H, W] of one dtype.
        shift: [C] or None, the biases of the convolutions that made them.
        num_groups, weight, bias, eps, silu, impl: as in `group_norm`.
    Returns:
        z and its norm, both [N, C, H, W] in x's dtype (under autocast, of the reference: the norm in float32).
    Raises:
        ValueError: shapes do not fit together, or the implementation cannot take them.
    """
    if _select(impl, num_groups, x, branch, weight, bias, shift) == "reference":
        z = reference.total(x, branch, shift)
        return z, reference.forward(z, None, num_groups, weight, bias, eps, silu)
    forward = _residual_group_norm_triton if torch.compiler.is_compiling() else triton.residual_forward
    return forward(x, branch, shift, num_groups, weight, bias, eps, silu)


def group_norm_conv(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    *,
    branch: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The convolution of `group_norm` of x + branch + shift, with zeros around it, to as many positions.

    Args:
        x, branch: [N, C, H, W] of one dtype; the branch may be None.
        num_groups, weight, bias, shift, eps, silu: as in `group_norm`.
        conv_weight: [O, C, KY, KX] of x's dtype, KY and KX odd.
        conv_bias: [O] or None.
        impl: as in `group_norm`. "triton" is for few output channels, O KY KX of at most 64: there the norm is neither
            written nor read. Otherwise "auto" is a call of torch after the norm that "auto" takes.
    Returns:
        [N, O, H, W] in x's dtype and memory format (of the reference under autocast: as torch's convolution).
    Raises:
        ValueError: shapes or dtypes do not fit together, or the implementation cannot take them.
    """
    chosen = _select(impl, num_groups, x, branch, weight, bias, shift, conv_weight, conv_bias)
    if conv_weight.ndim != 4 or conv_weight.shape[1] != x.shape[1] or not all(n % 2 for n in conv_weight.shape[2:]):
        raise ValueError(
            f"conv_weight must be [O, {x.shape[1]}, KY, KX], KY and KX odd, to go with x {list(x.shape)}, "
            f"got {list(conv_weight.shape)}"
        )
    if conv_bias is not None and conv_bias.shape != conv_weight.shape[:1]:
        raise ValueError(f"conv_bias must be [{conv_weight.shape[0]}], got {list(conv_bias.shape)}")
    if conv_weight.dtype != x.dtype:
        raise ValueError(f"conv_weight must be {x.dtype} as x is, got {conv_weight.dtype}; conv_weight.to(x.dtype) is")
    reason = triton.unavailable_conv(conv_weight, x.shape[2] * x.shape[3])
    if chosen == "triton" and reason is None:
        forward = _group_norm_conv_triton if torch.compiler.is_compiling() else triton.conv_forward
        return forward(x, branch, shift, num_groups, weight, bias, conv_weight, conv_bias, eps, silu)
    if impl == "triton":
        raise ValueError(f'impl="triton" cannot run here: {reason}; impl="auto" would')
    options = {"shift": shift, "eps": eps, "silu": silu, "impl": impl}
    if branch is None:
        h = group_norm(x, num_groups, weight, bias, **options)
    else:
        _, h = residual_group_norm(x, branch, num_groups, weight, bias, **options)
    return F.conv2d(h, conv_weight, conv_bias, padding=tuple(n // 2 for n in conv_weight.shape[2:]))


def _select(
    impl: str,
    num_groups: int,
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    *others: Tensor | None,
) -> str:
    """The implementation to run; ValueError for arguments that do not go together, or that it cannot take."""
    if x.ndim != 4 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"x must be floats [N, C, H, W], none of them 0, got {x.dtype} {list(x.shape)}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {num_groups}")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"weight and bias must be [{channels}], got {list(weight.shape)} and {list(bias.shape)}")
    if shift is not None and shift.shape != (channels,):
        raise ValueError(f"shift must be [{channels}], one a channel of x, got {list(shift.shape)}")
    if branch is not None and (branch.shape, branch.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"branch must be {x.dtype} {list(x.shape)} as x is, got {branch.dtype} {list(branch.shape)}; "
            "branch.to(x.dtype) mends the dtype"
        )
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f'unknown impl "{impl}": expected "auto" or one of {", ".join(IMPLEMENTATIONS)}')
    given = [tensor for tensor in (x, branch, weight, bias, shift, *others) if tensor is not None]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    reason = triton.unavailable(x) or (None if branch is None else triton.unavailable(branch))
    if impl == "auto":
        plain = needs_grad or not x.is_cuda or torch.is_autocast_enabled("cuda")
        return "reference" if plain or reason is not None else "triton"
    if impl == "triton":
        reason = "the kernels have no derivative" if needs_grad else reason
        if reason is not None:
            raise ValueError(f'impl="triton" cannot run here: {reason}; impl="auto" would take "reference"')
    return impl


@torch.library.custom_op("hmar_kernels::group_norm_triton", mutates_args=())
def _group_norm_triton(
    x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    return triton.forward(x, shift, num_groups, weight, bias, eps, silu)


@_group_norm_triton.register_fake
def _(x, shift, num_groups, weight, bias, eps, silu):
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.custom_op("hmar_kernels::residual_group_norm_triton", mutates_args=())
def _residual_group_norm_triton(
    x: Tensor,
    branch: Tensor,
    shift: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    return triton.residual_forward(x, branch, shift, num_groups, weight, bias, eps, silu)


@_residual_group_norm_triton.register_fake
def _(x, branch, shift, num_groups, weight, bias, eps, silu):
    z = torch.empty_like(x, memory_format=torch.channels_last)
    return z, torch.empty_like(z)


_group_norm_conv_triton = torch.library.custom_op(
    "hmar_kernels::group_norm_conv_triton", triton.conv_forward, mutates_args=()
)


@_group_norm_conv_triton.register_fake
def _(x, branch, shift, num_groups, weight, bias, conv_weight, conv_bias, eps, silu):
    return x.new_empty(x.shape[0], *x.shape[2:], conv_weight.shape[0]).permute(0, 3, 1, 2)
