"""csrc/linear_rows.cuh, as it stands, run on the CPU by the emulation of cuda_on_cpu/: index maps, rings, clusters and
arithmetic. What it takes for granted of wgmma, the copy engine and clusters, the GPU tests check.

It stands in for no GPU test: those are in test_linear.py. What ptxas says of the kernels is in test_cuda_build.py.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

import kernel_on_cpu
from hmar_kernels import linear
from hmar_kernels.linear import cuda

HEADERS = ("linear_rows.cuh", "hopper_tile.cuh", "linear_rows.h", "hopper_params.h")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fields(*names):
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "b": ctypes.c_bool, "f": ctypes.c_float}
    return [(name, kinds[kind]) for kind, *group in names for name in group]


class LinearRows(ctypes.Structure):
    """LinearRows of csrc/linear_rows.h."""

    _fields_ = fields(
        ("i", "bfloat16"),
        ("p", "x", "weight", "bias", "residual", "gate", "y"),
        ("l", "gate_stride"),
        ("i", "num_rows", "num_inputs", "num_outputs", "image_rows"),
        ("b", "float_residual", "gelu"),
    )


class NormParams(ctypes.Structure):
    """NormRowsParams of csrc/hopper_params.h."""

    _fields_ = fields(
        ("p", "x", "scale", "shift", "h"),
        ("l", "scale_stride", "shift_stride"),
        ("i", "num_inputs", "image_rows"),
        ("f", "eps"),
        ("b", "float_x"),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    loaded = kernel_on_cpu.build(tmp_path_factory.mktemp("linear_rows"), "linear_rows", "hopper_ptx.cuh", HEADERS)
    loaded.linear_rows_on_cpu.restype = loaded.norm_rows_on_cpu.restype = ctypes.c_char_p
    return loaded


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def arguments_of(images, length, N, K, kind, dtype=torch.bfloat16):
    """Of a kind of KINDS, and whether GELU follows."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size, dtype=dtype):
        return torch.randn(*size, generator=generator).to(dtype)

    arguments = {
        "x": draw(images, length, K),
        "weight": draw(N, K) / K**0.5,
        "bias": draw(N),
        "residual": draw(images, length, N, dtype=dtype if kind == "stream" else torch.float32),
        "gate": draw(images, 1, 2 * N)[..., N:],
    }
    missing = {"plain": ("bias", "residual", "gate"), "gelu": ("residual", "gate")}.get(kind, ())
    return {name: value for name, value in arguments.items() if name not in missing}, {"gelu": kind == "gelu"}


KINDS = ("plain", "gelu", "residual", "stream")
"""A product alone; with bias and GELU; with a residual in float32; with one in the dtype of the product."""


def kernel_for(rows):
    return next(most for most in cuda.ROWS if rows <= most)


def run_linear(library, x, weight, bias=None, residual=None, gate=None, gelu=False, **options):
    """y; NaN where nothing is written, and behind it. Options: kernel_rows, splits (as launched), last_first."""
    rows, N = x.shape[:-1].numel(), weight.shape[0]
    dtype = x.dtype if residual is None else residual.dtype
    storage = torch.full((rows * N + 1000,), math.nan, dtype=dtype)
    call = LinearRows(
        x.dtype == torch.bfloat16,
        *(address(t) for t in (x, weight, bias, residual, gate, storage)),
        *(0 if gate is None else gate.stride(0), rows, x.shape[-1], N, x.shape[1]),
        *(residual is not None and residual.dtype == torch.float32, gelu),
    )
    kernel_rows = options.get("kernel_rows", kernel_for(rows))
    failure = library.linear_rows_on_cpu(
        ctypes.byref(call), kernel_rows, options.get("splits", 0), options.get("last_first", False)
    )
    assert failure is None, failure.decode()
    assert storage[rows * N :].isnan().all()
    return storage[: rows * N].view(*x.shape[:-1], N)


def assert_accurate(actual, arguments, **options):
    exact = {name: value.double() for name, value in arguments.items()}
    expected = linear(**exact, **options, impl="reference")
    eager = linear(**arguments, **options, impl="reference")
    assert actual.dtype == eager.dtype and actual.isfinite().all()
    error, allowed = ((y.double() - expected).norm() for y in (actual, eager))
    assert error <= 2 * allowed + torch.finfo(eager.dtype).eps * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kernel_rows", cuda.ROWS)
@pytest.mark.parametrize("K, splits", [(8, 1), (64, 1), (200, 2), (712, 8)])
def test_product_of_the_source(library, kernel_rows, K, splits, dtype):
    """All rows that a kernel takes and fewer, whole tiles of features and not, chunks of inputs and a part of one."""
    lengths = {"plain": (1, kernel_rows), "gelu": (1, 1), "residual": (3, kernel_rows // 3), "stream": (2, 3)}
    for N in (3, 128, 139):
        for kind in KINDS:
            arguments, options = arguments_of(*lengths[kind], N, K, kind, dtype)
            launch = {"kernel_rows": kernel_rows, "splits": splits}
            actual = run_linear(library, **arguments, **options, **launch)
            assert_accurate(actual, arguments, **options)
            assert torch.equal(actual, run_linear(library, **arguments, **options, **launch, last_first=True))


@pytest.mark.parametrize("rows", [*range(1, 20), 31, 32, 33, 50, 64, 65, 72, 96, 97, 127, 128])
def test_rings_of_the_source_turn_over(library, rows):
    """Longer sums than the rings hold, by the blocks of a launch; the kernel that Python chooses for so many rows."""
    arguments, options = arguments_of(1, rows, 70, 1160, "residual")
    for splits in (0, 1):
        assert_accurate(run_linear(library, **arguments, **options, splits=splits), arguments, **options)


# N and K in widths of the layers of a block
LAYERS = {"qkv": (3, 1, "plain"), "proj": (1, 1, "residual"), "fc1": (4, 1, "gelu"), "fc2": (1, 4, "residual")}


@pytest.mark.parametrize("rows", [2, 32, 72])
@pytest.mark.parametrize("width", [1024, 1536, 1920, 2304])
@pytest.mark.parametrize("layer", LAYERS)
def test_published_sums_of_the_source(library, layer, width, rows):
    """K of the published widths, some features: the last blocks of a layer, as many to a cluster as it has."""
    N, K, kind = LAYERS[layer]
    features = 64 if rows <= 32 else 128
    splits = library.linear_splits_of(-(-N * width // features), K * width // 64, 132)
    arguments, options = arguments_of(2, rows // 2, 40, K * width, kind)
    assert_accurate(run_linear(library, **arguments, **options, splits=splits), arguments, **options)


def test_splits_fill_the_multiprocessors(library):
    """Tiles of features, chunks of K -> blocks of a cluster: a power of two, all at once, none without a chunk."""
    assert library.linear_splits_of(30, 120, 132) == 4  # fc2 of width 1920: 120 blocks
    assert library.linear_splits_of(90, 30, 132) == 1  # its qkv
    assert library.linear_splits_of(16, 16, 132) == 8  # proj of width 1024: 128 blocks
    assert library.linear_splits_of(200, 16, 132) == 1
    for tiles in range(1, 140):
        for chunks in range(1, 20):
            splits = library.linear_splits_of(tiles, chunks, 132)
            assert splits in (1, 2, 4, 8) and splits <= chunks and (splits == 1 or splits * tiles <= 132)
            assert splits == 8 or 2 * splits > chunks or 2 * splits * tiles > 132


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("float_x", [True, False], ids=["fp32", "low"])
@pytest.mark.parametrize("K", [8, 1536, 8192])
def test_norm_of_the_source(library, float_x, K, dtype):
    images, length = 2, 3
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(images, length, K, generator=generator) + 50).to(torch.float32 if float_x else dtype)
    scale, shift = (0.5 * torch.randn(images, 1, 3 * K, generator=generator)).to(dtype).split((K, 2 * K), dim=-1)
    shift, h = shift[..., K:], torch.full((images, length, K), math.nan, dtype=dtype)
    strides = scale.stride(0), shift.stride(0)
    params = NormParams(*(address(t) for t in (x, scale, shift, h)), *strides, K, length, 1e-6, float_x)
    failure = library.norm_rows_on_cpu(ctypes.byref(params), dtype == torch.bfloat16, images * length, False)
    assert failure is None, failure.decode()
    norm = torch.nn.functional.layer_norm(x.double(), (K,), eps=1e-6)
    expected = norm * (1 + scale.double()) + shift.double()
    eps = torch.finfo(dtype).eps
    assert (h.double() - expected).abs().max() <= eps * expected.abs().max() and h.isfinite().all()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"weight": torch.zeros(4, 32)}, "weights are float16 or bfloat16"),
        ({"x": torch.zeros(1, 129, 32).bfloat16()}, "at most 128, got 129"),
        ({"x": torch.zeros(1, 2, 12).bfloat16(), "weight": torch.zeros(4, 12).bfloat16()}, "multiple of 8, got 12"),
        ({"x": torch.zeros(1, 2, 32).half()}, "x and residual are float32 or torch.bfloat16"),
        ({"bias": torch.zeros(4)}, "bias, scale, shift and gate are torch.bfloat16"),
        ({}, None),
    ],
)
def test_what_the_kernels_do_not_take(change, reason):
    tensors = {"x": torch.zeros(1, 2, 32), "weight": torch.zeros(4, 32), "bias": torch.zeros(4)}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()} | change
    actual = cuda.refusal(tensors["x"], tensors["weight"], tensors["bias"])
    assert actual is None if reason is None else reason in actual
    with pytest.raises(ValueError, match='impl="cuda" cannot run here'):
        linear(torch.zeros(1, 2, 32), torch.zeros(4, 32), impl="cuda")
