"""Group norm and SiLU of channels-last images in Triton: the image is read twice and written once.

    statistics  per chunk of positions and channel: mean and sum of squared deviations
    factors     per group: those of its chunks and channels combined; y = silu(factor x + offset)
    apply       elementwise

A shift of the channels is part of the factors and costs nothing. A residual z = x + branch + shift is added by the
first kernel, which then reads two images and writes z; the last one reads z.

A convolution behind it, to few channels such as those of a picture, takes the place of the last kernel, and the norm is
never written:

    taps        y times the convolution's weights [taps x channels out], at the position where y is: one small product
    gather      every position sums its taps' products, found at its neighbours

Where what made the image has statistics of it, in more and smaller chunks, those are merged and the image is read once.

Grids: (chunks, blocks of channels, images), the same of merged chunks, (groups, images), (blocks of elements, images),
twice (blocks of positions, images). All arithmetic is float32 but the product, of y and weights as x's dtype rounds
them, summed in float32. Chunks are combined by Chan's rule and take their deviations from the chunk's first value, so
that nothing cancels where the mean is large.
"""

from __future__ import annotations

from typing import NamedTuple

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
MAX_TAPS = 64  # times channels, of a convolution
TAP_POSITIONS, TAP_CHANNELS, TAP_STAGES, TAP_WARPS = 128, 32, 3, 4  # of a program of the taps kernel
GATHERED = 512  # positions of a program of the last one


class ChunkStatistics(NamedTuple):
    """Of an image [N, C, H, W], divided into chunks of chunk_size positions, in any order.

    means: [N, chunks, C], float32. deviations: the same, sums of squared distances from the mean of the chunk.
    """

    means: Tensor
    deviations: Tensor
    chunk_size: int


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


@triton.jit(do_not_specialize=["num_chunks", "num_merged", "at_once", "chunk_size"])
def _merge_kernel(
    mean_ptr,
    deviation_ptr,
    merged_mean_ptr,
    merged_deviation_ptr,
    num_channels,
    num_chunks,
    num_merged,
    at_once,
    chunk_size,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    merged, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    members = tl.arange(0, BLOCK_K)
    chunks = merged * at_once + members
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_k, mask_c = (members < at_once) & (chunks < num_chunks), channels < num_channels
    mask = mask_k[:, None] & mask_c[None, :]
    offs = (image * num_chunks + chunks[:, None]) * num_channels + channels[None, :]
    means = tl.load(mean_ptr + offs, mask=mask, other=0.0)
    deviations = tl.load(deviation_ptr + offs, mask=mask, other=0.0)

    count = tl.minimum(at_once, num_chunks - merged * at_once).to(tl.float32)
    mean = tl.sum(means, 0) / count
    distances = tl.where(mask, means - mean[None, :], 0.0)
    deviation = tl.sum(deviations, 0) + chunk_size.to(tl.float32) * tl.sum(distances * distances, 0)
    offs = (image * num_merged + merged) * num_channels + channels
    tl.store(merged_mean_ptr + offs, mean, mask=mask_c)
    tl.store(merged_deviation_ptr + offs, deviation, mask=mask_c)


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


@triton.jit(do_not_specialize=["num_positions"])
def _taps_kernel(
    x_ptr,
    factor_ptr,
    offset_ptr,
    weight_ptr,
    taps_ptr,
    num_positions,
    stride_out,
    stride_in,
    stride_ky,
    stride_kx,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL_X: tl.constexpr,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """taps [TAPS, positions] of an image; column ky KERNEL_X CHANNELS + kx CHANNELS + channel of the weights."""
    image = tl.program_id(1).to(tl.int64)
    positions = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.arange(0, BLOCK_T)
    mask_p, mask_t = positions < num_positions, columns < TAPS
    tap = columns // CHANNELS
    offs_w = columns % CHANNELS * stride_out + tap // KERNEL_X * stride_ky + tap % KERNEL_X * stride_kx
    x_ptr += image * num_positions * C
    sums = tl.zeros([BLOCK_P, BLOCK_T], tl.float32)
    for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        channels = start + tl.arange(0, BLOCK_C)
        mask_c = channels < C
        x = tl.load(
            x_ptr + positions[:, None] * C + channels[None, :], mask=mask_p[:, None] & mask_c[None, :], other=0.0
        )
        factor = tl.load(factor_ptr + image * C + channels, mask=mask_c, other=0.0)
        offset = tl.load(offset_ptr + image * C + channels, mask=mask_c, other=0.0)
        y = x.to(tl.float32) * factor[None, :] + offset[None, :]
        if SILU:
            y = y * tl.sigmoid(y)
        weight = tl.load(
            weight_ptr + channels[:, None] * stride_in + offs_w[None, :],
            mask=mask_c[:, None] & mask_t[None, :],
            other=0.0,
        )
        sums = tl.dot(y.to(x.dtype), weight, sums, input_precision="ieee")
    offs = (image * TAPS + columns[None, :]) * num_positions + positions[:, None]
    tl.store(taps_ptr + offs, sums, mask=mask_p[:, None] & mask_t[None, :])


@triton.jit(do_not_specialize=["height", "width"])
def _gather_kernel(
    taps_ptr,
    bias_ptr,
    y_ptr,
    height,
    width,
    CHANNELS: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    num_positions = height * width
    positions = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = positions // width, positions % width
    mask = positions < num_positions
    taps_ptr += image * CHANNELS * KERNEL_Y * KERNEL_X * num_positions
    for channel in tl.static_range(CHANNELS):
        total = tl.zeros([BLOCK], tl.float32)
        for tap in tl.static_range(KERNEL_Y * KERNEL_X):
            down, right = tap // KERNEL_X - KERNEL_Y // 2, tap % KERNEL_X - KERNEL_X // 2
            inside = mask & (row + down >= 0) & (row + down < height)
            inside &= (column + right >= 0) & (column + right < width)
            offs = (tap * CHANNELS + channel) * num_positions + positions + down * width + right
            total += tl.load(taps_ptr + offs, mask=inside, other=0.0)
        if HAS_BIAS:
            total += tl.load(bias_ptr + channel).to(tl.float32)
        offs = (image * num_positions + positions) * CHANNELS + channel
        tl.store(y_ptr + offs, total.to(y_ptr.dtype.element_ty), mask=mask)


def unavailable(x: Tensor) -> str | None:
    """Why the kernels cannot run on such images; None when they can."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the images are not channels-last: x.contiguous(memory_format=torch.channels_last) is"
    if x[0].numel() >= 2**31:
        return f"an image of {x[0].numel()} numbers exceeds 32-bit offsets"
    return triton_device.unavailable(x.device, x.dtype)


def unavailable_conv(conv_weight: Tensor, positions: int) -> str | None:
    """Why the kernels have no such convolution [O, C, KY, KX] of images of so many positions; None when they have."""
    taps = conv_weight[:, 0].numel()
    if taps > MAX_TAPS:
        return f"the convolution has {taps} taps times output channels; the kernels have few, at most {MAX_TAPS}"
    if taps * positions >= 2**31:
        return f"{taps} taps of {positions} positions exceed 32-bit offsets"
    return triton_device.unavailable(conv_weight.device, conv_weight.dtype)


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
    x: Tensor,
    shift: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    statistics: ChunkStatistics | None = None,
) -> Tensor:
    """x [N, C, H, W], channels-last -> y of the same shape, dtype and format."""
    return _apply(x, *_factors(x, None, shift, None, num_groups, weight, bias, eps, statistics), silu)


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
    return z, _apply(z, *_factors(x, branch, shift, z, num_groups, weight, bias, eps), silu)


def conv_forward(
    x: Tensor,
    branch: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    eps: float,
    silu: bool,
) -> Tensor:
    """x, branch [N, C, H, W], channels-last, conv_weight [O, C, KY, KX] -> [N, O, H, W], channels-last."""
    N, C, H, W = x.shape
    O, _, KY, KX = conv_weight.shape
    z = x if branch is None else torch.empty_like(x, memory_format=torch.channels_last)
    factor, offset = _factors(x, branch, shift, z, num_groups, weight, bias, eps)
    taps = torch.empty(N, O * KY * KX, H * W, dtype=torch.float32, device=x.device)
    y = torch.empty(N, H, W, O, dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    with triton_device.on_device(x):
        _taps_kernel[(triton.cdiv(H * W, TAP_POSITIONS), N)](
            x_ptr=z,
            factor_ptr=factor,
            offset_ptr=offset,
            weight_ptr=conv_weight,
            taps_ptr=taps,
            num_positions=H * W,
            stride_out=conv_weight.stride(0),
            stride_in=conv_weight.stride(1),
            stride_ky=conv_weight.stride(2),
            stride_kx=conv_weight.stride(3),
            C=C,
            CHANNELS=O,
            KERNEL_X=KX,
            TAPS=O * KY * KX,
            SILU=silu,
            BLOCK_P=TAP_POSITIONS,
            BLOCK_C=TAP_CHANNELS,
            BLOCK_T=max(16, triton.next_power_of_2(O * KY * KX)),
            STAGES=TAP_STAGES,
            num_warps=TAP_WARPS,
        )
        _gather_kernel[(triton.cdiv(H * W, GATHERED), N)](
            taps_ptr=taps,
            bias_ptr=taps if conv_bias is None else conv_bias,
            y_ptr=y,
            height=H,
            width=W,
            CHANNELS=O,
            KERNEL_Y=KY,
            KERNEL_X=KX,
            HAS_BIAS=conv_bias is not None,
            BLOCK=GATHERED,
            num_warps=4,
        )
    return y


def _factors(
    x: Tensor,
    branch: Tensor | None,
    shift: Tensor | None,
    z: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    statistics: ChunkStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """factor, offset [N, C]. With a branch z is written, and they are those of z."""
    N, C, H, W = x.shape
    positions, residual, has_shift = H * W, branch is not None, shift is not None
    factor, offset = torch.empty(2, N, C, dtype=torch.float32, device=x.device)
    with triton_device.on_device(x):
        if statistics is None:
            mean, deviation, size = _statistics(x, branch, shift, z)
        else:
            mean, deviation, size = _merged(*statistics)
        chunks = mean.shape[1]
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
    return factor, offset


def _statistics(x: Tensor, branch: Tensor | None, shift: Tensor | None, z: Tensor | None) -> ChunkStatistics:
    """Of x, or of z, which is written. The last chunk may be shorter."""
    N, C, H, W = x.shape
    block_c = channel_block(C)
    size = chunk_size(H * W, N * triton.cdiv(C, block_c))
    chunks, residual = triton.cdiv(H * W, size), branch is not None
    mean, deviation = torch.empty(2, N, chunks, C, dtype=torch.float32, device=x.device)
    _statistics_kernel[(chunks, triton.cdiv(C, block_c), N)](
        x_ptr=x,
        branch_ptr=branch if residual else x,
        shift_ptr=shift if shift is not None else mean,
        z_ptr=z if residual else x,
        mean_ptr=mean,
        deviation_ptr=deviation,
        num_positions=H * W,
        num_channels=C,
        num_chunks=chunks,
        chunk_size=size,
        RESIDUAL=residual,
        HAS_SHIFT=shift is not None and residual,
        ROWS=TILE // block_c,
        BLOCK_C=block_c,
        STAGES=STAGES,
        num_warps=WARPS,
    )
    return ChunkStatistics(mean, deviation, size)


def _merged(means: Tensor, deviations: Tensor, size: int) -> ChunkStatistics:
    """The same in at most MAX_CHUNKS chunks, of which the last one may be shorter."""
    N, chunks, C = means.shape
    at_once = triton.cdiv(chunks, MAX_CHUNKS)
    if at_once == 1:
        return ChunkStatistics(means, deviations, size)
    merged, block_c = triton.cdiv(chunks, at_once), channel_block(C)
    mean, deviation = torch.empty(2, N, merged, C, dtype=torch.float32, device=means.device)
    _merge_kernel[(merged, triton.cdiv(C, block_c), N)](
        mean_ptr=means,
        deviation_ptr=deviations,
        merged_mean_ptr=mean,
        merged_deviation_ptr=deviation,
        num_channels=C,
        num_chunks=chunks,
        num_merged=merged,
        at_once=at_once,
        chunk_size=size,
        BLOCK_K=triton.next_power_of_2(at_once),
        BLOCK_C=block_c,
        num_warps=4,
    )
    return ChunkStatistics(mean, deviation, size * at_once)


def _apply(x: Tensor, factor: Tensor, offset: Tensor, silu: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.channels_last)
    N, C, num_elements = x.shape[0], x.shape[1], x[0].numel()
    with triton_device.on_device(x):
        _apply_kernel[(triton.cdiv(num_elements, ELEMENTS), N)](
            x_ptr=x,
            y_ptr=y,
            factor_ptr=factor,
            offset_ptr=offset,
            num_elements=num_elements,
            C=C,
            SILU=silu,
            BLOCK=ELEMENTS,
            num_warps=8,
        )
    return y
