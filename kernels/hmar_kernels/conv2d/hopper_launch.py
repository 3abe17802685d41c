"""The Hopper convolutions where the extension is not built: compiled when they are first launched, launched from here.

`ConvKernels` has the functions that csrc/bindings.cpp gives the extension and does what csrc/hopper_conv.cu and
csrc/hopper_conv.h do, over the same kernels; hopper.py takes either.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from ctypes import Structure, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

from ..attention import nvrtc
from ..attention.hopper_launch import DTYPES, CompiledKernels, CudaDriver, TensorMap, aligned, kernel_source

OUT_CHANNELS, PATCH_COLUMNS, BLOCK_SIDE, IN_CHANNELS = 160, 16, 8, 32  # csrc/hopper_params.h, kConvColumns and on


class HopperConvParams(Structure):
    _fields_ = (
        *((name, TensorMap) for name in ("x", "weight")),
        *((name, c_void_p) for name in ("out", "bias", "means", "deviations")),
        ("image_stride", c_int64),
        *((name, c_int32) for name in ("row_stride", "column_stride", "parity_row_stride", "parity_column_stride")),
        *((name, c_int32) for name in ("height", "width", "num_chunks", "out_channels")),
        *((name, c_int32) for name in ("num_patch_rows", "num_patch_columns", "num_column_tiles", "num_items")),
    )


class MapGeometry(NamedTuple):
    """What a tensor map says, from the innermost dimension on, 64 bytes wide in shared memory and swizzled.

    Strides in bytes, of all dimensions but the first.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


def x_geometry(blocks: int, N: int, H: int, W: int, C: int) -> MapGeometry:
    strides = (2 * C, 2 * C * W, 2 * C * W * H)
    return MapGeometry((C, W, H, N), strides, (IN_CHANNELS, PATCH_COLUMNS + 2, BLOCK_SIDE * blocks + 2, 1))


def weight_geometry(doubled: bool, C: int, O: int) -> MapGeometry:
    taps = 16 if doubled else 9
    return MapGeometry((C, taps, O), (2 * C, 2 * C * taps), (IN_CHANNELS, 1, OUT_CHANNELS))


def numbers_of(doubled: bool, blocks: int, N: int, H: int, W: int, C: int, O: int) -> dict[str, int]:
    """The fields of HopperConvParams but tensor maps and addresses."""
    factor = 2 if doubled else 1
    row = factor * W * O
    patches = {
        "num_patch_rows": math.ceil(H / (BLOCK_SIDE * blocks)),
        "num_patch_columns": math.ceil(W / PATCH_COLUMNS),
        "num_column_tiles": math.ceil(O / OUT_CHANNELS),
    }
    return {
        "image_stride": row * factor * H,
        "row_stride": factor * row,
        "column_stride": factor * O,
        "parity_row_stride": row,
        "parity_column_stride": O,
        "height": H,
        "width": W,
        "num_chunks": math.ceil(C / IN_CHANNELS),
        "out_channels": O,
        **patches,
        "num_items": N * math.prod(patches.values()) * factor**2,
    }


def make_source(tile: tuple, bfloat16: bool, folder: Path) -> nvrtc.Source:
    """The source of one kernel of hopper.py's table."""
    doubled, *numbers = tile
    tile_type = (
        f"HopperConvTile<DType::{DTYPES[bfloat16]}, Resolution::{'kDoubled' if doubled else 'kSame'}, "
        f"{', '.join(map(str, numbers))}>"
    )
    return kernel_source("hopper_conv.cuh", "hopper_conv_kernel", tile_type, HopperConvParams.__name__, folder)


class ConvKernels(CompiledKernels):
    """The extension's functions for convolutions: hopper_conv, and its tiles.

    Args:
        tiles: the kernels, as tuples. The index of a kernel is the number by which the function knows it.
    """

    def __init__(self, tiles: Sequence[tuple]) -> None:
        super().__init__()
        self.hopper_conv_tiles = [tuple(tile) for tile in tiles]

    def hopper_conv(self, tile, shape, x, weight, bias, out, means, deviations, device, stream) -> None:
        tile = self.hopper_conv_tiles[tile]
        doubled, blocks, *_ = tile
        bfloat16, N, H, W, C, O = shape
        params = aligned(HopperConvParams)
        params.out, params.bias, params.means, params.deviations = out, bias, means, deviations
        for name, number in numbers_of(doubled, blocks, N, H, W, C, O).items():
            setattr(params, name, number)
        maps = {
            "x": (x, x_geometry(blocks, N, H, W, C)),
            "weight": (weight, weight_geometry(doubled, C, O)),
        }
        with self._cuda.current_device(device):
            for name, (address, geometry) in maps.items():
                field = ctypes.addressof(params) + getattr(HopperConvParams, name).offset
                self._cuda.describe(field, bfloat16, address, *geometry, CudaDriver.SWIZZLE_64B)
            _, function, numbers, num_sms = self._loaded(
                (tile, bfloat16, device), lambda folder: make_source(tile, bfloat16, folder), HopperConvParams
            )
            grid = min(params.num_items, num_sms)
            launch = (function, grid, numbers.num_threads, numbers.shared_bytes, stream)
            self._cuda.launch(*launch, ctypes.addressof(params))
