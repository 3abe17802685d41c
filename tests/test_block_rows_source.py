"""csrc/block_rows.cuh, as it stands, run on the CPU by the emulation of cuda_on_cpu/: all blocks at once, in
both orders of threads.

It stands in for no GPU test: those are in test_blocks.py. What ptxas says of the kernels is in test_cuda_build.py.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

import kernel_on_cpu
from block_cases import case
from hmar_kernels.blocks import cuda, reference
from hmar_kernels.linear import reference as linear_reference

HEADERS = ("block_rows.cuh", "rows.cuh", "hopper_tile.cuh", "hopper_params.h")
MAX_BLOCKS = cuda.MAX_BLOCKS


class BlockWeights(ctypes.Structure):
    """BlockWeights of csrc/hopper_params.h."""

    _fields_ = [
        ("layers", ctypes.c_uint64 * 16 * 4),
        ("biases", ctypes.c_void_p * 4),
        *((name, ctypes.c_void_p) for name in ("q_bias", "v_bias", "log_scale")),
        ("padding", ctypes.c_uint64),
    ]


class Params(ctypes.Structure):
    """BlockRowsParams of csrc/hopper_params.h."""

    _fields_ = [
        ("weights", ctypes.c_void_p),
        ("vectors", ctypes.c_void_p * 6 * MAX_BLOCKS),
        *((name, ctypes.c_void_p) for name in ("x", "y", "statistics", "qkv", "hidden", "counters")),
        ("vector_stride", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("max_log_scale", "eps")),
        *((name, ctypes.c_int32) for name in ("num_rows", "image_rows", "num_blocks", "width", "hidden_width")),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    loaded = kernel_on_cpu.build(tmp_path_factory.mktemp("block_rows"), "block_rows", "hopper_ptx.cuh", HEADERS)
    loaded.block_rows_on_cpu.restype = ctypes.c_char_p
    assert loaded.size_of_block_weights() == ctypes.sizeof(BlockWeights)
    assert loaded.size_of_params() == ctypes.sizeof(Params)
    return loaded


def run_blocks(library, x, blocks, vectors, max_log_scale, clusters=2, last_first=False, kernel_rows=None):
    """y and its statistics; NaN where nothing is written, and behind it."""
    rows, (width, hidden_width) = x.shape[:-1].numel(), cuda.widths(blocks[0])
    y = torch.full((rows + 1, width), math.nan)
    statistics = torch.full((rows + 1, width // 64, 2), math.nan)
    between = [
        torch.full((rows + 1, size), math.nan, dtype=blocks[0].qkv.dtype)
        for size in (3 * width, max(width, hidden_width))
    ]
    counters = torch.zeros(2, dtype=torch.int32)
    floats = [[t.float() for t in (block.q_bias, block.v_bias, block.log_scale)] for block in blocks]
    # NOTE: at a multiple of 64 bytes, as a tensor map lies.
    storage = torch.zeros(len(blocks) * ctypes.sizeof(BlockWeights) + 64, dtype=torch.uint8)
    start = -storage.data_ptr() % 64 + storage.data_ptr()
    table = (BlockWeights * len(blocks)).from_address(start)
    matrices = []
    for entry, block, of_block in zip(table, blocks, floats, strict=True):
        entry.biases[:] = [None, *(t.data_ptr() for t in (block.proj_bias, block.fc1_bias, block.fc2_bias))]
        entry.q_bias, entry.v_bias, entry.log_scale = (t.data_ptr() for t in of_block)
        matrices += [t.data_ptr() for t in (block.qkv, block.proj, block.fc1, block.fc2)]
    params = Params(weights=start)
    for i, of_block in enumerate(vectors):
        params.vectors[i][:] = [vector.data_ptr() for vector in of_block]
    params.x, params.y, params.statistics = x.data_ptr(), y.data_ptr(), statistics.data_ptr()
    params.qkv, params.hidden = (t.data_ptr() for t in between)
    params.counters, params.vector_stride = counters.data_ptr(), vectors[0][0].stride(0)
    params.max_log_scale, params.eps = max_log_scale, 1e-6
    params.num_rows, params.image_rows, params.num_blocks = rows, x.shape[1], len(blocks)
    params.width, params.hidden_width = width, hidden_width
    failure = library.block_rows_on_cpu(
        ctypes.byref(params),
        (ctypes.c_void_p * len(matrices))(*matrices),
        blocks[0].qkv.dtype == torch.bfloat16,
        kernel_rows or next(most for most in cuda.ROWS if rows <= most),
        clusters,
        last_first,
    )
    assert failure is None, failure.decode()
    assert counters.tolist() == [0, 0]
    assert all(t[rows].isnan().all() for t in (y, statistics, *between))
    return y[:rows].view_as(x), statistics[:rows].view(*x.shape[:-1], -1, 2)


def assert_accurate(outputs, x, blocks, vectors, max_log_scale):
    """By the one rule: no further from float64 than twice what rounding as eager torch does is."""
    y, statistics = outputs

    def exact(tensors):
        return [type(of_block)(*(t.double() for t in of_block)) for of_block in tensors]

    expected = reference.forward(
        x.double(), exact(blocks), [[t.double() for t in v] for v in vectors], max_log_scale, 1e-6
    )
    eager = reference.forward(x, blocks, vectors, max_log_scale, 1e-6)
    error, allowed = ((t.double() - expected).norm() for t in (y, eager))
    assert y.isfinite().all() and error <= 2 * allowed
    torch.testing.assert_close(statistics.double(), linear_reference.statistics(y.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last_first", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(
    "images, length, kernel_rows",
    [
        (2, 1, 8),
        (2, 4, 8),
        (1, 3, 8),
        (8, 1, 8),
        (1, 9, 16),
        (2, 8, 16),
        (1, 16, 16),
        (5, 3, 16),
        (1, 2, 16),
        (2, 9, 32),
        (2, 16, 32),
        (32, 1, 32),
        (5, 6, 32),
        (3, 7, 32),
        (1, 1, 32),
    ],
)
def test_blocks_of_the_source(library, images, length, kernel_rows, last_first):
    given = case(images, length, 256, 512, 2)
    assert_accurate(run_blocks(library, *given, last_first=last_first, kernel_rows=kernel_rows), *given)


@pytest.mark.parametrize("clusters", [1, 3])
@pytest.mark.parametrize(
    "images, length, width, hidden_width",
    [(2, 1, 1024, 2048), (1, 9, 768, 3072), (2, 8, 576, 5184), (2, 16, 640, 4608), (4, 5, 1152, 512)],
)
def test_rings_of_the_source_turn_over(library, images, length, width, hidden_width, clusters):
    """More chunks than the rings hold, which the blocks of a cluster do not share evenly, nor clusters the tiles; with
    one cluster more tiles than there are buffers of sums, of which chunks are brought again for each."""
    given = case(images, length, width, hidden_width, 1)
    outputs = [run_blocks(library, *given, clusters=clusters, last_first=last_first) for last_first in (False, True)]
    assert_accurate(outputs[0], *given)
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


def test_half_precision_of_the_source(library):
    for length in (5, 11):
        given = case(2, length, 256, 512, 2, torch.float16)
        assert_accurate(run_blocks(library, *given), *given)


@pytest.mark.parametrize("length", [3, 7])
def test_images_of_the_source_depend_on_no_others(library, length):
    x, *given = case(4, length, 256, 512, 2)
    expected, _ = run_blocks(library, x, *given)
    x[1] = math.nan
    actual, _ = run_blocks(library, x, *given)
    assert torch.equal(actual[[0, 2, 3]], expected[[0, 2, 3]]) and actual[1].isnan().any()
