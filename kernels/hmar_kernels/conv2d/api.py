"""Convolutions of 3x3 taps, and transposed ones of 4x4 taps and stride 2: checks, choice of implementation, custom ops.

The mathematics is in reference.py; hopper.py launches the kernel of csrc/hopper_conv.cuh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..group_norm import ChunkStatistics
from . import hopper, reference

IMPLEMENTATIONS = ("reference", "hopper")


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """The convolution of 3x3 taps, stride 1 and padding 1.

    out[:, :, y, x] = bias + sum over i, j of weight[:, :, i, j] x[:, :, y + i - 1, x + j - 1], which is 0 outside of x.

    Args:
        x: [N, C, H, W].
        weight: [O, C, 3, 3] of x's dtype.
        bias: [O] of x's dtype, or None.
        impl: "auto", "reference" (torch) or "hopper": float16 and bfloat16, x and weight channels-last, C and O in
            multiples of 8, compute capability 9.0, no gradients. A named implementation runs or raises; `choose` tells
            what "auto" takes.
    Returns:
        [N, O, H, W] in x's dtype; of "hopper" channels-last.
    Raises:
        ValueError: shapes or dtypes do not fit together, or the implementation cannot take them.
    """
    if _select(impl, x, weight, bias, doubled=False) == "reference":
        return reference.conv2d(x, weight, bias)
    # NOTE: the operator's dispatch takes the host longer than small kernels take, so it is there for tracing only.
    forward = _conv2d_hopper if torch.compiler.is_compiling() else hopper.conv2d
    return forward(x, weight, bias)


def conv_transpose2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """The transposed convolution of 4x4 taps, stride 2 and padding 1, which doubles both sides.

    It spreads position (y, x) over rows 2 y - 1 .. 2 y + 2 and columns 2 x - 1 .. 2 x + 2 by the weight's 4x4 taps.

    Args:
        x: [N, C, H, W].
        weight: [C, O, 4, 4] of x's dtype.
        bias: [O] of x's dtype, or None.
        impl: as in `conv2d`; for "hopper" the weight lies in memory as [O, 4, 4, C], as `packed_taps` has it, and where
            it does "auto" takes "hopper" for every map.
    Returns:
        [N, O, 2 H, 2 W] in x's dtype; of "hopper" channels-last.
    Raises:
        ValueError: shapes or dtypes do not fit together, or the implementation cannot take them.
    """
    if _select(impl, x, weight, bias, doubled=True) == "reference":
        return reference.conv_transpose2d(x, weight, bias)
    forward = _conv_transpose2d_hopper if torch.compiler.is_compiling() else hopper.conv_transpose2d
    return forward(x, weight, bias)


def conv2d_with_statistics(x: Tensor, weight: Tensor, *, impl: str = "auto") -> tuple[Tensor, ChunkStatistics | None]:
    """`conv2d` without a bias, and statistics of it for the `group_norm` behind.

    They come without another pass of "hopper" for maps that its patches fill (sides in multiples of 16 always are);
    otherwise, and under torch.compile, they are None.
    """
    impl = _select(impl, x, weight, None, doubled=False)
    if impl == "hopper" and not torch.compiler.is_compiling():
        return hopper.with_statistics(x, weight, doubled=False)
    return conv2d(x, weight, impl=impl), None


def conv_transpose2d_with_statistics(
    x: Tensor, weight: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, ChunkStatistics | None]:
    """The same of `conv_transpose2d`."""
    impl = _select(impl, x, weight, None, doubled=True)
    if impl == "hopper" and not torch.compiler.is_compiling():
        return hopper.with_statistics(x, weight, doubled=True)
    return conv_transpose2d(x, weight, impl=impl), None


def choose(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, doubled: bool) -> tuple[str, str]:
    """What impl="auto" takes for arguments that go together, and the reason. doubled: of `conv_transpose2d`."""
    reason = _unavailable(x, weight, bias, doubled)
    if reason is not None:
        return "reference", f"torch's convolution: {reason}"
    if doubled:
        return "hopper", "the weight lies as the kernel reads it, and torch would copy it"
    N, _, H, W = x.shape
    if not hopper.is_large(N, H, W, weight.shape[0], hopper.num_multiprocessors(x.device.index)):
        return "reference", "torch's convolution divides the sums of a small map among more multiprocessors"
    return "hopper", "patches of the map keep the multiprocessors busy"


def packed_taps(weight: Tensor) -> Tensor:
    """A weight [C, O, 4, 4] of `conv_transpose2d` in the memory order that "hopper" reads."""
    return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def _select(impl: str, x: Tensor, weight: Tensor, bias: Tensor | None, *, doubled: bool) -> str:
    """The implementation to run; ValueError for arguments that do not go together, or that it cannot take."""
    if x.ndim != 4 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"x must be floats [N, C, H, W], none of them 0, got {x.dtype} {list(x.shape)}")
    taps, outer, inner = ((4, 4), 1, 0) if doubled else ((3, 3), 0, 1)
    if weight.ndim != 4 or weight.shape[2:] != taps or weight.shape[inner] != x.shape[1] or 0 in weight.shape:
        expected = f"[{x.shape[1]}, O, 4, 4]" if doubled else f"[O, {x.shape[1]}, 3, 3]"
        raise ValueError(f"weight must be {expected} to go with x {list(x.shape)}, got {list(weight.shape)}")
    if bias is not None and bias.shape != (weight.shape[outer],):
        raise ValueError(f"bias must be [{weight.shape[outer]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}; {name}.to(x.dtype) is")
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f'unknown impl "{impl}": expected "auto" or one of {", ".join(IMPLEMENTATIONS)}')
    if impl == "auto":
        return choose(x, weight, bias, doubled=doubled)[0]
    reason = _unavailable(x, weight, bias, doubled) if impl == "hopper" else None
    if reason is not None:
        raise ValueError(f'impl="hopper" cannot run here: {reason}; impl="auto" would take "reference"')
    return impl


def _unavailable(x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool) -> str | None:
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return "the kernels have no derivative"
    return hopper.unavailable(x, weight, bias, doubled=doubled)


_conv2d_hopper = torch.library.custom_op("hmar_kernels::conv2d_hopper", hopper.conv2d, mutates_args=())
_conv_transpose2d_hopper = torch.library.custom_op(
    "hmar_kernels::conv_transpose2d_hopper", hopper.conv_transpose2d, mutates_args=()
)


@_conv2d_hopper.register_fake
def _(x, weight, bias):
    return hopper.empty_output(x, weight.shape[0], 1)


@_conv_transpose2d_hopper.register_fake
def _(x, weight, bias):
    return hopper.empty_output(x, weight.shape[1], 2)
