"""Convolutions: the reference against its definition, the kernel's own source on the CPU, the kernels on a GPU.

The emulation (cuda_on_cpu/) checks index maps, descriptors, rings and the epilogue; what it takes for granted of wgmma
and the copy engine, the GPU tests check.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernel_on_cpu
from hmar_kernels import conv2d, conv_transpose2d, group_norm
from hmar_kernels.attention import hopper_launch as attention_launch
from hmar_kernels.conv2d import choose, conv2d_with_statistics, hopper, hopper_launch, packed_taps
from hmar_kernels.conv2d.hopper import TILES, Tile

ROOT = Path(__file__).parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def inputs(doubled, N, C, O, H, W, dtype, device="cpu"):
    """x, weight and bias as the kernels read them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, H, W, generator=generator).to(device, dtype).contiguous(memory_format=torch.channels_last)
    side = 4 if doubled else 3
    weight = torch.randn(O, side, side, C, generator=generator) / math.sqrt(C * (4 if doubled else 9))
    weight = weight.to(device, dtype)
    bias = torch.randn(O, generator=generator).to(device, dtype)
    return x, weight.permute(3, 0, 1, 2) if doubled else weight.permute(0, 3, 1, 2), bias


def torchs(doubled, x, weight, bias):
    return F.conv_transpose2d(x, weight, bias, 2, 1) if doubled else F.conv2d(x, weight, bias, padding=1)


def assert_accurate(actual, doubled, x, weight, bias):
    """At most rounding of a float32 sum: half a unit of the dtype, with as much again for the order of the sum.

    Matrix units cut off what they add up, so that long sums which cancel are off by more than their own rounding.
    """
    expected = torchs(doubled, *(None if t is None else t.double() for t in (x, weight, bias)))
    assert actual.shape == expected.shape and actual.dtype == x.dtype and actual.isfinite().all()
    error = (actual.double() - expected).abs()
    eps = torch.finfo(x.dtype).eps
    assert (error <= eps * expected.abs() + 5e-5 * expected.abs().max()).all(), error.max()
    assert error.norm() <= 0.5 * eps * expected.norm()


def test_reference_is_its_definition():
    x, weight, bias = inputs(False, 2, 3, 5, 4, 6, torch.float64)
    expected = bias[:, None, None].repeat(2, 1, 4, 6)
    for n, o, y, column in torch.cartesian_prod(*map(torch.arange, (2, 5, 4, 6))).tolist():
        for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
            if 0 <= y + i - 1 < 4 and 0 <= column + j - 1 < 6:
                expected[n, o, y, column] += weight[o, :, i, j] @ x[n, :, y + i - 1, column + j - 1]
    torch.testing.assert_close(conv2d(x, weight, bias), expected)
    torch.testing.assert_close(conv2d(x, weight, impl="reference"), expected - bias[:, None, None])
    assert torch.autograd.gradcheck(lambda x: conv2d(x, weight), x[:1, :, :2, :2].clone().requires_grad_())


def test_transposed_reference_is_its_definition():
    x, weight, bias = inputs(True, 2, 3, 5, 4, 3, torch.float64)
    expected = torch.zeros(2, 5, 10, 8, dtype=torch.float64)  # with the padding around it
    for y, column in torch.cartesian_prod(torch.arange(4), torch.arange(3)).tolist():
        spread = torch.einsum("nc,coij->noij", x[:, :, y, column], weight)
        expected[:, :, 2 * y : 2 * y + 4, 2 * column : 2 * column + 4] += spread
    torch.testing.assert_close(conv_transpose2d(x, weight, bias), expected[:, :, 1:-1, 1:-1] + bias[:, None, None])


# --- the kernel's source on the CPU -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    headers = ("hopper_conv.cuh", "hopper_conv.h", "hopper_tile.cuh", "hopper_params.h")
    return kernel_on_cpu.build(tmp_path_factory.mktemp("hopper_conv"), "hopper_conv", "hopper_ptx.cuh", headers)


def on_cpu(library, doubled, blocks, x, weight, bias, *, statistics=None, num_blocks=2, last_thread_first=False):
    """statistics: two tensors to be filled."""
    entry = library.hopper_conv_on_cpu
    entry.restype = ctypes.c_char_p
    flag, number, pointer = ctypes.c_bool, ctypes.c_int, ctypes.c_void_p
    entry.argtypes = [*(flag,) * 2, *(number,) * 6, *(pointer,) * 6, number, flag]
    (N, C, H, W), O, factor = x.shape, weight.shape[1 if doubled else 0], 2 if doubled else 1
    # NaN everywhere, and behind the numbers that the kernel may write
    storage = torch.full((N * H * W * factor**2 * O + 4096,), math.nan, dtype=x.dtype)
    pointers = [None if t is None else t.data_ptr() for t in (x, weight, bias, storage, *(statistics or (None, None)))]
    kernel = (x.dtype == torch.bfloat16, doubled, blocks)
    failure = entry(*kernel, N, H, W, C, O, *pointers, num_blocks, last_thread_first)
    assert failure is None, failure.decode()
    assert storage[-4096:].isnan().all()
    return storage[:-4096].view(N, factor * H, factor * W, O).permute(0, 3, 1, 2)


# N, C, O, H, W
CPU_SHAPES = {
    "one patch": (1, 32, 160, 16, 16),
    "less than a patch": (2, 8, 24, 3, 5),
    "edges": (2, 40, 160, 11, 19),
    "two tiles of channels": (1, 64, 168, 9, 16),
}


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("doubled", [False, True], ids=["same", "doubled"])
@pytest.mark.parametrize("shape", CPU_SHAPES.values(), ids=CPU_SHAPES)
def test_kernel_source_on_cpu(library, shape, doubled, blocks):
    x, weight, bias = inputs(doubled, *shape, torch.bfloat16)
    actual = on_cpu(library, doubled, blocks, x, weight, bias)
    assert_accurate(actual, doubled, x, weight, bias)


def test_kernel_source_on_cpu_in_half_precision_without_bias(library):
    x, weight, _ = inputs(False, *CPU_SHAPES["edges"], torch.float16)
    assert_accurate(on_cpu(library, False, 2, x, weight, None), False, x, weight, None)


def test_kernel_source_has_no_races(library):
    """Threads run first to last or last to first, items in one block or in several: bit-equal."""
    x, weight, bias = inputs(False, 1, 64, 160, 24, 33, torch.bfloat16)
    schedules = [(1, False), (1, True), (3, False), (9, True)]
    results = [
        on_cpu(library, False, 1, x, weight, bias, num_blocks=blocks, last_thread_first=reverse)
        for blocks, reverse in schedules
    ]
    for result in results[1:]:
        assert torch.equal(result, results[0])


def chunks_of(out, doubled, blocks):
    """[N, chunks, O, positions] of a result, as the warpgroups have it."""
    factor = 2 if doubled else 1
    planes = torch.stack([out[:, :, p::factor, q::factor] for p in range(factor) for q in range(factor)], dim=2)
    parts = planes.unflatten(4, (-1, 2, 8)).unflatten(3, (-1, 8 * blocks))  # N O parity, y rows, x group columns
    return parts.permute(0, 3, 5, 2, 6, 1, 4, 7).flatten(6).flatten(1, 4)


def assert_statistics_are_of(out, statistics, doubled, blocks):
    means, deviations = statistics
    parts = chunks_of(out.double(), doubled, blocks)
    assert means.shape == parts.shape[:3] and means.isfinite().all() and deviations.isfinite().all()
    torch.testing.assert_close(means.double(), parts.mean(3), rtol=1e-5, atol=1e-6)
    expected = (parts - parts.mean(3, keepdim=True)).square().sum(3)
    torch.testing.assert_close(deviations.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("doubled", [False, True], ids=["same", "doubled"])
def test_kernel_source_gives_statistics(library, doubled, blocks):
    """Also where means are large beside deviations, and of some of an item's channels only."""
    x, weight, _ = inputs(doubled, 2, 8, 176, 16, 32, torch.float16)
    weight[..., 0, 0] += 5
    x[:, 0] = 1
    chunks = 2 * 2 * (2 // blocks) * (4 if doubled else 1)
    statistics = [torch.full((2, chunks, 176), math.nan) for _ in range(2)]
    actual = on_cpu(library, doubled, blocks, x, weight, None, statistics=statistics)
    assert_accurate(actual, doubled, x, weight, None)
    assert_statistics_are_of(actual, statistics, doubled, blocks)


@pytest.mark.parametrize("doubled", [False, True])
def test_padding_is_not_read(library, doubled):
    """Not even times zero: images beside this one hold NaN."""
    x, weight, bias = inputs(doubled, 3, 32, 160, 5, 9, torch.bfloat16)
    x[0], x[2] = math.nan, math.nan
    actual = on_cpu(library, doubled, 2, x, weight, bias)
    assert_accurate(actual[1:2], doubled, x[1:2], weight, bias)


# --- what a launch is told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_geometry_is_that_of_cpp(library, tile):
    N, H, W, C, O = 3, 37, 50, 72, 328
    expected = (ctypes.c_int64 * 64)()
    library.hopper_conv_geometry(tile.doubled, tile.blocks, N, H, W, C, O, expected)
    maps = (
        hopper_launch.x_geometry(tile.blocks, N, H, W, C),
        hopper_launch.weight_geometry(tile.doubled, C, O),
    )
    actual = []
    for sizes, strides, box in maps:
        actual += [len(sizes), *sizes, *strides, *box]
    numbers = hopper_launch.numbers_of(tile.doubled, tile.blocks, N, H, W, C, O)
    actual += numbers.values()
    assert actual == expected[: len(actual)] and not any(expected[len(actual) :])
    assert numbers["num_items"] == hopper.num_items(tile, N, H, W, O)
    assert all(number % 16 == 0 for geometry in maps for number in geometry.strides)


def test_structure_lies_as_in_cpp(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++ on PATH")
    params = hopper_launch.HopperConvParams
    checks = [
        f"static_assert(offsetof(HopperConvParams, {name}) == {getattr(params, name).offset});"
        for name, _ in params._fields_
    ]
    checks.append(f"static_assert(sizeof(HopperConvParams) == {attention_launch._padded_size(params)});")
    for name, value in {
        "kConvColumns": hopper_launch.OUT_CHANNELS,
        "kPatchColumns": hopper_launch.PATCH_COLUMNS,
        "kBlockSide": hopper_launch.BLOCK_SIDE,
        "kConvChannels": hopper_launch.IN_CHANNELS,
    }.items():
        checks.append(f"static_assert({name} == {value});")
    program = tmp_path / "layout.cpp"
    program.write_text('#include <cstddef>\n#include "hopper_params.h"\nusing namespace hmar;\n' + "\n".join(checks))
    command = [compiler, "-std=c++17", "-Wno-invalid-offsetof", "-fsyntax-only", "-I", ROOT / "csrc", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class FakeDriver:
    """Records what is asked of CUDA."""

    def __init__(self):
        self.calls = []

    def current_device(self, device):
        return contextlib.nullcontext()

    def describe(self, address, bfloat16, data, *geometry):
        self.calls.append(("describe", bfloat16, data, *geometry))

    def launch(self, function, blocks, threads, shared_bytes, stream, params):
        params = hopper_launch.HopperConvParams.from_address(params)
        told = (params.out, params.bias, params.means, params.deviations, params.num_items)
        self.calls.append(("launch", function, blocks, threads, shared_bytes, stream, *told))


def test_launch_of_compiled_kernels():
    kernels, driver = hopper_launch.ConvKernels(TILES), FakeDriver()
    kernels.__dict__["_cuda"] = driver
    numbers = attention_launch.LaunchNumbers(1000, 384, 384)
    kernels._loaded = lambda key, source, params: (None, key, numbers, 7)
    kernels.hopper_conv(1, (True, 2, 20, 30, 160, 320), 16, 32, 0, 64, 128, 256, 5, 99)
    swizzle = attention_launch.CudaDriver.SWIZZLE_64B
    x = ("describe", True, 16, *hopper_launch.x_geometry(1, 2, 20, 30, 160), swizzle)
    weight = ("describe", True, 32, *hopper_launch.weight_geometry(False, 160, 320), swizzle)
    items = 2 * 3 * 2 * 2
    assert driver.calls == [x, weight, ("launch", (TILES[1], True, 5), 7, 384, 1000, 99, 64, None, 128, 256, items)]


def test_tiles_fill_the_multiprocessors():
    """Of 132: large maps take large patches, those of 128 small items small ones."""
    assert hopper.select_tile(False, 16, 256, 256, 160, 132).blocks == 2
    assert hopper.select_tile(False, 16, 16, 16, 640, 132).blocks == 1
    assert hopper.select_tile(True, 16, 128, 128, 160, 132) == Tile(True, 2, 10, 4)
    assert hopper.num_items(TILES[1], 16, 16, 16, 640) == 128


def test_the_faster_kernel_is_chosen():
    """In every cell that was measured."""
    cells = {}
    for row in json.loads((ROOT / "reports/data/convolutions_h100.json").read_text())["results"]:
        key = row["doubled"], row["images"], row["side"], row["side"], row["out_channels"], row["in_channels"]
        cells.setdefault(key, {})[row["impl"]] = row["ms"]
    assert len(cells) == 36
    for (doubled, *shape, _), ms in cells.items():
        chosen = hopper.select_tile(doubled, *shape, 132)
        assert ms[f"rows-{chosen.blocks}"] == min(ms["rows-1"], ms["rows-2"])
        if not doubled:
            chosen_ms = ms[f"rows-{chosen.blocks}"] if hopper.is_large(*shape, 132) else ms["torch"]
            assert chosen_ms <= 1.1 * min(ms["torch"], ms["rows-1"], ms["rows-2"])


def test_the_choice_can_be_traced():
    """As torch.compile does in a model that calls `conv2d`."""

    @torch.compile(fullgraph=True, backend="eager")
    def marked(x):
        N, _, H, W = x.shape
        return x + 1 if hopper.is_large(N, H, W, 160, 132) else x - 1

    for side in (256, 16):
        x = torch.zeros(1, 1, side, side)
        assert (marked(x).sum() > 0) == hopper.is_large(1, side, side, 160, 132)
    assert hopper.is_large(1, 256, 256, 160, 132) and not hopper.is_large(1, 16, 16, 160, 132)


# --- the operators ----------------------------------------------------------------------------------------------------


def zeros(*shape, dtype=torch.bfloat16, layout=torch.channels_last):
    return torch.zeros(*shape, dtype=dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 3)}, "x must be floats"),
        ({"weight": zeros(8, 16, 3, 3)}, r"weight must be \[O, 8, 3, 3\].* got \[8, 16, 3, 3\]"),
        ({"weight": zeros(8, 8, 1, 1)}, r"weight must be \[O, 8, 3, 3\]"),
        ({"weight": zeros(8, 8, 3, 3, dtype=torch.float16)}, "weight must be torch.bfloat16"),
        ({"bias": torch.zeros(9)}, r"bias must be \[8\]"),
        ({"bias": torch.zeros(8)}, "bias must be torch.bfloat16"),
        ({"impl": "cudnn"}, 'unknown impl "cudnn"'),
        ({"weight": zeros(12, 8, 3, 3)}, "multiples of 8, got 8 -> 12"),
        ({"x": zeros(1, 8, 4, 5, layout=torch.contiguous_format)}, "the map is not channels-last"),
        ({"weight": zeros(8, 8, 3, 3, layout=torch.contiguous_format)}, "the weight is not channels-last"),
        ({"weight": zeros(8, 8, 3, 3).requires_grad_()}, "no derivative"),
        (
            {"x": zeros(1, 8, 4, 5, dtype=torch.float32), "weight": zeros(8, 8, 3, 3, dtype=torch.float32)},
            "bfloat16, got",
        ),
        ({}, "run on CUDA tensors, got cpu"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"x": zeros(1, 8, 4, 5), "weight": zeros(8, 8, 3, 3), "bias": None, "impl": "hopper"} | change
    with pytest.raises(ValueError, match=message):
        conv2d(**arguments)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (zeros(16, 8, 4, 4), r"weight must be \[8, O, 4, 4\]"),
        (zeros(8, 16, 4, 4), r"as \[16, 4, 4, 8\]: packed_taps"),
        (packed_taps(zeros(8, 16, 4, 4)), "run on CUDA tensors"),
    ],
)
def test_bad_weights_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        conv_transpose2d(zeros(1, 8, 4, 5), weight, impl="hopper")


def test_what_auto_takes(monkeypatch):
    """Large maps, and transposed convolutions whose weights lie as the kernel reads them, where it can run."""
    small, large, weight = zeros(1, 8, 32, 32), zeros(1, 8, 128, 128), zeros(160, 8, 3, 3)
    taps = zeros(8, 160, 4, 4)
    assert choose(large, weight, doubled=False) == (
        "reference",
        "torch's convolution: the kernels run on CUDA tensors, got cpu",
    )
    monkeypatch.setattr(hopper, "unavailable_on", lambda device, dtype: None)
    monkeypatch.setattr(hopper, "num_multiprocessors", lambda device: 132)
    assert choose(large, weight, doubled=False)[0] == "hopper"
    name, reason = choose(small, weight, doubled=False)
    assert name == "reference" and "small map" in reason
    assert "no derivative" in choose(large, weight.requires_grad_(), doubled=False)[1]
    assert choose(small, packed_taps(taps), doubled=True)[0] == "hopper"
    assert "packed_taps(weight) does" in choose(large, taps, doubled=True)[1]
    monkeypatch.setattr(hopper, "with_statistics", lambda x, weight, *, doubled: ("kernel", "statistics"))
    assert conv2d_with_statistics(large, weight.detach()) == ("kernel", "statistics")
    assert conv2d_with_statistics(small, weight.detach())[1] is None


# --- the kernels on a GPU ---------------------------------------------------------------------------------------------

GPU_SHAPES = {
    "one patch": (1, 160, 160, 16, 16),
    "less than a patch": (3, 8, 24, 3, 5),
    "one position": (1, 640, 640, 1, 1),
    "smallest level": (2, 640, 640, 16, 16),
    "latents": (2, 32, 640, 16, 16),
    "wide": (2, 320, 160, 17, 130),
    "high": (1, 640, 320, 131, 9),
    "more channels out": (1, 160, 648, 33, 47),
    "many items": (5, 160, 160, 128, 128),
}


@pytest.fixture
def on_hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels need compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "-".join(str(int(number)) for number in tile))
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
def test_kernels_on_a_gpu(on_hopper, poisoned_memory, shape, tile, dtype):
    x, weight, bias = inputs(tile.doubled, *shape, dtype, "cuda")
    for constant in (bias, None):
        actual, _ = hopper.forward(x, weight, constant, tile)
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert_accurate(actual, tile.doubled, x, weight, constant)
        assert torch.equal(hopper.forward(x, weight, constant, tile)[0], actual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "-".join(str(int(number)) for number in tile))
@pytest.mark.parametrize("shape", [(3, 160, 320, 48, 80), (2, 32, 24, 16, 16), (5, 160, 160, 128, 128)], ids=str)
def test_statistics_on_a_gpu(on_hopper, poisoned_memory, shape, tile, dtype):
    """And the norm that uses them is that without them."""
    x, weight, _ = inputs(tile.doubled, *shape, dtype, "cuda")
    out, statistics = hopper.forward(x, weight, None, tile, statistics=True)
    assert torch.equal(out, hopper.forward(x, weight, None, tile)[0])
    assert_statistics_are_of(out, statistics[:2], tile.doubled, tile.blocks)
    scale, shift = torch.randn(2, shape[2], device="cuda", dtype=dtype)
    norms = [group_norm(out, 8, scale, shift, statistics=given, impl="triton") for given in (statistics, None)]
    torch.testing.assert_close(*norms, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["hopper", "auto"])
@pytest.mark.parametrize("doubled", [False, True])
def test_operator_compiled_and_captured_on_a_gpu(on_hopper, doubled, impl):
    x, weight, bias = inputs(doubled, 2, 160, 320, 100, 130, torch.bfloat16, "cuda")
    assert choose(x, weight, bias, doubled=doubled)[0] == "hopper"
    operator = conv_transpose2d if doubled else conv2d
    expected = operator(x, weight, bias, impl="hopper")
    compiled = torch.compile(lambda x: operator(x, weight, bias, impl=impl), fullgraph=True)
    assert torch.equal(compiled(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator(x, weight, bias, impl=impl)
    captured.fill_(math.nan)
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_auto_is_torch_for_small_maps_on_a_gpu():
    x, weight, bias = inputs(False, 1, 160, 160, 16, 16, torch.bfloat16, "cuda")
    assert torch.equal(conv2d(x, weight, bias), F.conv2d(x, weight, bias, padding=1))
