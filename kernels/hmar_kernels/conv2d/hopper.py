"""The hand-written convolutions for Hopper GPUs (csrc/hopper_conv.cuh): argument checks, choice of tile and launch.

The kernels come with the extension hmar_kernels._cuda, or are compiled when they are first launched
(`hopper_launch.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import extension
from ..group_norm import ChunkStatistics
from .hopper_launch import BLOCK_SIDE, OUT_CHANNELS, PATCH_COLUMNS, ConvKernels

DTYPES = (torch.float16, torch.bfloat16)
CHANNELS = 8  # input and output channels come in multiples: 16 bytes
MAX_NUMBERS = 2**31 - 1


class Tile(NamedTuple):
    """A compiled kernel.

    doubled: `conv_transpose2d`. blocks: of 64 positions for each of two warpgroups, so that a patch has 8 blocks x 16
    positions. stages, map_stages: of weights and of the map in shared memory.
    """

    doubled: bool
    blocks: int
    stages: int
    map_stages: int


# NOTE: of the transposed convolution a map lasts for four taps instead of nine, so more of them are under way.
TILES = (Tile(False, 2, 12, 3), Tile(False, 1, 14, 3), Tile(True, 2, 10, 4), Tile(True, 1, 12, 4))

# The extension where it was built with them; else what compiles the table's kernels when they are first launched.
_kernels = extension.module if hasattr(extension.module, "hopper_conv") else ConvKernels(TILES)

ITEM_OVERHEAD = 0.15
"""Time of an item beside its products, in blocks: weights are read once an item. With anything between .05 and .4
`select_tile` takes the faster kernel in all 36 cells of reports/data/convolutions_h100.json."""
LEAST_FILLED = 1 / 3
"""Of the multiprocessors, by maps that are not left to cuDNN, which divides sums, too. Measured on 132 (the same file):
128 items take .043 ms, cuDNN .056; 64 items .025 and .023; 16 items .023 and .012."""


def num_items(tile: Tile, N: int, H: int, W: int, O: int) -> int:
    """How many patches, tiles of output channels and parities a map of these sizes has."""
    patches = math.ceil(H / (BLOCK_SIDE * tile.blocks)) * math.ceil(W / PATCH_COLUMNS)
    return N * patches * math.ceil(O / OUT_CHANNELS) * (4 if tile.doubled else 1)


def select_tile(doubled: bool, N: int, H: int, W: int, O: int, num_sms: int) -> Tile:
    """The kernel whose items fill num_sms multiprocessors best. A pure function of its arguments."""

    tiles = [tile for tile in TILES if tile.doubled == doubled]
    times = [math.ceil(num_items(tile, N, H, W, O) / num_sms) * (tile.blocks + ITEM_OVERHEAD) for tile in tiles]
    return tiles[times.index(min(times))]  # torch.compile cannot trace min(..., key=)


def is_large(N: int, H: int, W: int, O: int, num_sms: int) -> bool:
    """Whether `conv2d` keeps LEAST_FILLED of num_sms multiprocessors busy."""
    return num_items(select_tile(False, N, H, W, O, num_sms), N, H, W, O) >= LEAST_FILLED * num_sms


def unavailable(x: Tensor, weight: Tensor, bias: Tensor | None, *, doubled: bool) -> str | None:
    """Why the kernels cannot run on these tensors, whose shapes and dtypes go together; None when they can."""
    (C, O) = weight.shape[:2] if doubled else weight.shape[1::-1]
    if C % CHANNELS or O % CHANNELS:
        return f"the kernels take channels in multiples of {CHANNELS}, got {C} -> {O}"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the map is not channels-last: x.contiguous(memory_format=torch.channels_last) is"
    if doubled and not weight.permute(1, 2, 3, 0).is_contiguous():
        return f"the weight does not lie in memory as [{O}, 4, 4, {C}]: packed_taps(weight) does"
    if not doubled and not weight.is_contiguous(memory_format=torch.channels_last):
        return "the weight is not channels-last: weight.contiguous(memory_format=torch.channels_last) is"
    if (4 if doubled else 1) * x.shape[3] * O > MAX_NUMBERS or x.numel() // C > MAX_NUMBERS:
        return f"a map of {list(x.shape)} exceeds 32-bit offsets"
    return unavailable_on(x.device, x.dtype)


def unavailable_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel of this dtype can run on a device; None when they can."""
    if dtype not in DTYPES:
        return f"the kernels take float16 and bfloat16, got {dtype}"
    if device.type != "cuda":
        return f"the kernels run on CUDA tensors, got {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"the kernels need compute capability 9.0, got {capability[0]}.{capability[1]}"
    error = _load_error(torch.cuda.current_device() if device.index is None else device.index)
    return f"the kernels cannot run on {device}: {error}" if error else None


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, C, H, W], weight [O, C, 3, 3], both channels-last -> [N, O, H, W], channels-last."""
    return forward(x, weight, bias, _chosen(False, x, weight.shape[0]))[0]


def conv_transpose2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, C, H, W], channels-last, weight [C, O, 4, 4], in memory [O, 4, 4, C] -> [N, O, 2 H, 2 W], channels-last."""
    return forward(x, weight, bias, _chosen(True, x, weight.shape[1]))[0]


def with_statistics(x: Tensor, weight: Tensor, *, doubled: bool) -> tuple[Tensor, ChunkStatistics | None]:
    """`conv2d` or `conv_transpose2d` without a bias, and statistics of the result where the map has whole patches."""
    tile = _chosen(doubled, x, weight.shape[1 if doubled else 0])
    return forward(x, weight, None, tile, statistics=has_statistics(tile, *x.shape[2:]))


def has_statistics(tile: Tile, H: int, W: int) -> bool:
    return H % (BLOCK_SIDE * tile.blocks) == 0 and W % PATCH_COLUMNS == 0


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile, *, statistics: bool = False
) -> tuple[Tensor, ChunkStatistics | None]:
    """The convolution by one kernel of TILES, and statistics of it if wanted, for which there is no bias.

    Raises:
        ValueError: a tensor does not start at a multiple of 16 bytes.
        RuntimeError: the launch failed; the CUDA error is named.
    """
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.data_ptr() % 16:
            raise ValueError(
                f"{name} must start at a multiple of 16 bytes, got {tensor.data_ptr():#x}; {name}.clone() works"
            )
    (N, C, H, W), O = x.shape, weight.shape[1 if tile.doubled else 0]
    out, found = empty_output(x, O, 2 if tile.doubled else 1), None
    if statistics:
        assert bias is None and has_statistics(tile, H, W), "statistics are of whole patches, without a bias"
        size = BLOCK_SIDE**2 * tile.blocks
        means, deviations = torch.empty(2, N, out[0, 0].numel() // size, O, dtype=torch.float32, device=x.device)
        found = ChunkStatistics(means, deviations, size)
    _kernels.hopper_conv(
        _kernels.hopper_conv_tiles.index(tuple(tile)),
        (x.dtype == torch.bfloat16, N, H, W, C, O),
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *((means.data_ptr(), deviations.data_ptr()) if statistics else (0, 0)),
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return out, found


def empty_output(x: Tensor, channels: int, factor: int) -> Tensor:
    """[N, channels, factor H, factor W], channels-last."""
    N, _, H, W = x.shape
    return x.new_empty(N, factor * H, factor * W, channels).permute(0, 3, 1, 2)


def _chosen(doubled: bool, x: Tensor, O: int) -> Tile:
    N, _, H, W = x.shape
    return select_tile(doubled, N, H, W, O, num_multiprocessors(x.device.index))


@torch.compiler.assume_constant_result
def num_multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_load_errors: dict[int, str] = {}


@torch.compiler.assume_constant_result
def _load_error(device: int) -> str:
    if device not in _load_errors:
        _load_errors[device] = _kernels.hopper_load_error(device)
    return _load_errors[device]
