"""Group norm and SiLU of channels-last images in Triton: the image is read twice and written once.

    statistics  per chunk of positions and channel: mean and sum of squared deviations
    factors     per group: those of its chunks and channels combined; y = silu(factor x + offset)
    apply       elementwise

A shift of the channels is part of the factors and costs nothing. A residual z = x + branch + shift is added by the
first kernel, which then reads two images and writes z; the last one reads z.

Grids: (chunks, blocks of channels, images), (groups, images), (blocks of elements, images). All arithmetic is float32.
Chunks are combined by Chan's rule and take their deviations from the chunk's first value, so that nothing cancels where
the mean is large.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_device

# Of the first kernel: positions of a program at least, programs an image at most; where a batch has more programs than
# PROGRAMS, which is several for every multiprocessor, they are longer, down to MIN_CHUNKS an image.
MIN_CHUNK, MAX_CHUNKS, PROGRAMS, MIN_CHUNKS = 512, 128, 2048, 16
ROUNDED = 128  # positions of a chunk are a multiple of this
TILE, STAGES, WARPS = 4096, 3, 8  # numbers it reads at a time, such tiles on their way
ELEMENTS = 4096  # of a program of the last kernel
MAX_CHANNEL_BLOCK = 128


@triton.jit
def _load(x_ptr, branch_ptr, shift, offs, mask, RESIDUAL: tl.constexpr):
    """x, or z = x + branch + shift as its dtype rounds it, in float32."""
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(branch_ptr + offs, mask=mask, other=0.0).to(tl.float32) + shift
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["num_positions", "num_chunks", "chunk_size"])
def _statistics_kernel(
    x_ptr,
    branch_ptr,
    shift_ptr,
    z_ptr,
    mean_ptr,
    deviation_ptr,
    num_positions,
    num_channels,
    num_chunks,
    chunk_size,
    RESIDUAL: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunk, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channels < num_channels
    x_ptr += image * num_positions * num_channels
    branch_ptr += image * num_positions * num_channels
    z_ptr += image * num_positions * num_channels
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, num_positions)
    shift = tl.zeros([BLOCK_C], tl.float32)
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + channels, mask=mask_c, other=0.0).to(tl.float32)
    offs_first = begin.to(tl.int64) * num_channels + channels
    first = _load(x_ptr, branch_ptr, shift, offs_first, mask_c, RESIDUAL)

    # NOTE: sums of a thread's own, added up once: a sum over the program in every step would wait for all its warps.
    sums = tl.zeros([ROWS, BLOCK_C], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & mask_c[None, :]
        offs = rows.to(tl.int64)[:, None] * num_channels + channels[None, :]
        x = _load(x_ptr, branch_ptr, shift[None, :], offs, mask, RESIDUAL)
        if RESIDUAL:
            tl.store(z_ptr + offs, x.to(z_ptr.dtype.element_ty), mask=mask)
        x = tl.where(mask, x - first[None, :], 0.0)
        sums += x
        squares += x * x

    count = (end - begin).to(tl.float32)
    sums, squares = tl.sum(sums, 0), tl.sum(squares, 0)
    offs = (image * num_chunks + chunk) * num_channels + channels
    tl.store(mean_ptr + offs, first + sums / count, mask=mask_c)
    tl.store(deviation_ptr + offs, squares - sums * (sums / count), mask=mask_c)


@triton.jit(do_not_specialize=["num_positions", "num_chunks", "chunk_size", "channels_per_group"])
def _factors_kernel(
    mean_ptr,
    deviation_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    factor_ptr,
    offset_ptr,
    num_positions,
    num_channels,
    num_chunks,
    chunk_size,
    channels_per_group,
    eps,
    HAS_SHIFT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunks, members = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_J)
    mask_j = members < channels_per_group
    channels = group * channels_per_group + members
    mask = (chunks < num_chunks) & mask_j[None, :]
    offs = (image * num_chunks + chunks) * num_channels + channels[None, :]
    means = tl.load(mean_ptr + offs, mask=mask, other=0.0)
    deviations = tl.load(deviation_ptr + offs, mask=mask, other=0.0)
    shift = tl.zeros([BLOCK_J], tl.float32)
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + channels, mask=mask_j, other=0.0).to(tl.float32)
        means += shift[None, :]

    counts = tl.minimum(chunk_size, num_positions - chunks * chunk_size).to(tl.float32)
    total = num_positions.to(tl.float32) * channels_per_group.to(tl.float32)
    mean = tl.sum(tl.where(mask, counts * means, 0.0)) / total
    distances = means - mean
    variance = tl.sum(tl.where(mask, deviations + counts * distances * distances, 0.0)) / total

    weight = tl.load(weight_ptr + channels, mask=mask_j, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=mask_j, other=0.0).to(tl.float32)
    factor = tl.rsqrt(variance + eps) * weight
    tl.store(factor_ptr + image * num_channels + channels, factor, mask=mask_j)
    tl.store(offset_ptr + image * num_channels + channels, bias + (shift - mean) * factor, mask=mask_j)


@triton.jit
def _apply_kernel(
    x_ptr,
    y_ptr,
    factor_ptr,
    offset_ptr,
    num_elements,
    C: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_elements
    channels = offs % C  # NOTE: of a constant, for that is most of what there is to compute
    x = tl.load(x_ptr + image * num_elements + offs, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + image * C + channels, mask=mask, other=0.0)
    offset = tl.load(offset_ptr + image * C + channels, mask=mask, other=0.0)
    y = x * factor + offset
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + image * num_elements + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def unavailable(x: Tensor) -> str | None:
    """Why the kernels cannot run on such images; None when they can."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the images are not channels-last: x.contiguous(memory_format=torch.channels_last) is"
    if x[0].numel() >= 2**31:
        return f"an image of {x[0].numel()} numbers exceeds 32-bit offsets"
    return triton_device.unavailable(x.device, x.dtype)


def channel_block(num_channels: int) -> int:
    """The largest power of two that divides the channels, or the next one where those would be narrow reads."""
    divisor = num_channels & -num_channels
    return min(divisor if divisor >= 16 else triton.next_power_of_2(num_channels), MAX_CHANNEL_BLOCK)


def chunk_size(positions: int, per_position: int = 1) -> int:
    """Positions of a chunk: few enough chunks for one program to combine, many enough to occupy a GPU.

    per_position: programs for each chunk of an image, over channels and images.
    """
    chunks = min(MAX_CHUNKS, max(MIN_CHUNKS, PROGRAMS // per_position))
    return max(MIN_CHUNK, ROUNDED * triton.cdiv(positions, ROUNDED * chunks))


def forward(
    x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    """x [N, C, H, W], channels-last -> y of the same shape, dtype and format."""
    return _launch(x, None, shift, None, num_groups, weight, bias, eps, silu)


def residual_forward(
    x: Tensor,
    branch: Tensor,
    shift: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """x, branch [N, C, H, W], channels-last -> z, y of the same shape, dtype and format."""
    z = torch.empty_like(x, memory_format=torch.channels_last)
    return z, _launch(x, branch, shift, z, num_groups, weight, bias, eps, silu)


def _launch(
    x: Tensor,
    branch: Tensor | None,
    shift: Tensor | None,
    z: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
) -> Tensor:
    N, C, H, W = x.shape
    positions, y = H * W, torch.empty_like(x, memory_format=torch.channels_last)
    block_c = channel_block(C)
    size = chunk_size(positions, N * triton.cdiv(C, block_c))
    chunks = triton.cdiv(positions, size)
    residual, has_shift = branch is not None, shift is not None
    mean, deviation = torch.empty(2, N, chunks, C, dtype=torch.float32, device=x.device)
    factor, offset = torch.empty(2, N, C, dtype=torch.float32, device=x.device)
    # NOTE: Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _statistics_kernel[(chunks, triton.cdiv(C, block_c), N)](
            x_ptr=x,
            branch_ptr=branch if residual else x,
            shift_ptr=shift if has_shift else bias,
            z_ptr=z if residual else y,
            mean_ptr=mean,
            deviation_ptr=deviation,
            num_positions=positions,
            num_channels=C,
            num_chunks=chunks,
            chunk_size=size,
            RESIDUAL=residual,
            HAS_SHIFT=has_shift and residual,
            ROWS=TILE // block_c,
            BLOCK_C=block_c,
            STAGES=STAGES,
            num_warps=WARPS,
        )
        _factors_kernel[(num_groups, N)](
            mean_ptr=mean,
            deviation_ptr=deviation,
            shift_ptr=shift if has_shift else bias,
            weight_ptr=weight,
            bias_ptr=bias,
            factor_ptr=factor,
            offset_ptr=offset,
            num_positions=positions,
            num_channels=C,
            num_chunks=chunks,
            chunk_size=size,
            channels_per_group=C // num_groups,
            eps=eps,
            HAS_SHIFT=has_shift and not residual,
            BLOCK_K=triton.next_power_of_2(chunks),
            BLOCK_J=triton.next_power_of_2(C // num_groups),
        )
        _apply_kernel[(triton.cdiv(positions * C, ELEMENTS), N)](
            x_ptr=z if residual else x,
            y_ptr=y,
            factor_ptr=factor,
            offset_ptr=offset,
            num_elements=positions * C,
            C=C,
            SILU=silu,
            BLOCK=ELEMENTS,
            num_warps=8,
        )
    return y
