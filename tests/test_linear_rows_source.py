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
from hmar_kernels.linear import cuda, reference

HEADERS = ("linear_rows.cuh", "rows.cuh", "hopper_tile.cuh", "linear_rows.h", "hopper_params.h")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fields(*names):
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "b": ctypes.c_bool, "f": ctypes.c_float}
    return [(name, kinds[kind]) for kind, *group in names for name in group]


class RowsNorm(ctypes.Structure):
    """RowsNorm of csrc/hopper_params.h."""

    _fields_ = fields(("p", "statistics", "scale", "shift"), ("l", "scale_stride", "shift_stride"), ("f", "eps"))


class LinearRows(ctypes.Structure):
    """LinearRows of csrc/linear_rows.h."""

    _fields_ = [
        *fields(("i", "bfloat16"), ("p", "x")),
        ("norm", RowsNorm),
        *fields(
            ("p", "weight", "bias", "residual", "gate", "y", "statistics"),
            ("l", "gate_stride"),
            ("i", "num_rows", "num_inputs", "num_outputs", "image_rows"),
            ("b", "float_x", "float_residual", "gelu"),
        ),
    ]


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
    """Of a kind of KINDS, and whether GELU follows. Rows to be normed have means of their own, far from zero."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size, dtype=dtype):
        return torch.randn(*size, generator=generator).to(dtype)

    normed, stream = kind in ("norm", "all"), dtype if kind in ("stream", "all") else torch.float32
    x = draw(images, length, K, dtype=torch.float32)
    x = (3 * x + 20 * torch.randn(images, length, 1, generator=generator)).to(stream) if normed else x.to(dtype)
    vectors = 0.5 * draw(images, 1, K + 2 * N)
    arguments = {
        "x": x,
        "weight": draw(N, K) / K**0.5,
        "bias": draw(N),
        "norm": (vectors[..., :K], draw(images, 1, K)),
        "residual": draw(images, length, N, dtype=stream),
        "gate": vectors[..., K : K + N],
    }
    missing = {"plain": ("bias", "residual", "gate", "norm"), "gelu": ("residual", "gate", "norm"), "all": ()}
    missing |= {"norm": ("bias", "residual", "gate"), "residual": ("norm",), "stream": ("norm",)}
    given = {name: value for name, value in arguments.items() if name not in missing[kind]}
    return given, {"gelu": kind in ("gelu", "all")}


KINDS = ("plain", "gelu", "residual", "stream", "norm", "all")
"""A product alone; with bias and GELU; with a residual in float32; with one in the dtype of the product; of a norm of
float32; with everything, all numbers in the dtype of the product."""


def kernel_for(rows):
    return next(most for most in cuda.ROWS if rows <= most)


def of_tiles(x):
    return -(-x.shape[-1] // 64)


def run_linear(library, x, weight, bias=None, norm=None, residual=None, gate=None, gelu=False, **options):
    """y and its statistics; NaN where nothing is written, and behind it. Options: kernel_rows, splits (as launched),
    last_first, statistics (of x, else as they are)."""
    rows, N, (scale, shift) = x.shape[:-1].numel(), weight.shape[0], norm or (None, None)
    dtype = weight.dtype if residual is None else residual.dtype
    storage = torch.full((rows * N + 1000,), math.nan, dtype=dtype)
    statistics = torch.full((rows + 1, -(-N // 64), 2), math.nan)
    given = None if norm is None else options.get("statistics", reference.statistics(x).contiguous())
    strides = (0, 0) if norm is None else (scale.stride(0), shift.stride(0))
    call = LinearRows(
        *(weight.dtype == torch.bfloat16, address(x)),
        RowsNorm(*(address(t) for t in (given, scale, shift)), *strides, 1e-6),
        *(address(t) for t in (weight, bias, residual, gate, storage, statistics)),
        *(0 if gate is None else gate.stride(0), rows, x.shape[-1], N, x.shape[1]),
        *(x.dtype == torch.float32, residual is not None and residual.dtype == torch.float32, gelu),
    )
    kernel_rows = options.get("kernel_rows", kernel_for(rows))
    failure = library.linear_rows_on_cpu(
        ctypes.byref(call), kernel_rows, options.get("splits", 0), options.get("last_first", False)
    )
    assert failure is None, failure.decode()
    assert storage[rows * N :].isnan().all() and statistics[rows].isnan().all()
    return storage[: rows * N].view(*x.shape[:-1], N), statistics[:rows].view(*x.shape[:-1], -1, 2)


def assert_accurate(outputs, arguments, **options):
    """y by the one rule; statistics of it as it is stored."""
    (actual, statistics), norm = outputs, arguments.get("norm")
    exact = {name: value.double() for name, value in arguments.items() if name != "norm"}
    expected = linear(**exact, norm=norm and tuple(t.double() for t in norm), **options, impl="reference")
    eager = linear(**arguments, **options, impl="reference")
    assert actual.dtype == eager.dtype and actual.isfinite().all()
    error, allowed = ((y.double() - expected).norm() for y in (actual, eager))
    assert error <= 2 * allowed + torch.finfo(eager.dtype).eps * expected.norm()
    torch.testing.assert_close(statistics.double(), reference.statistics(actual.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kernel_rows", cuda.ROWS)
@pytest.mark.parametrize("K, splits", [(8, 1), (64, 1), (200, 2), (712, 8)])
def test_product_of_the_source(library, kernel_rows, K, splits, dtype):
    """All rows that a kernel takes and fewer, whole tiles of features and not, chunks of inputs and a part of one."""
    lengths = {"plain": (1, kernel_rows), "gelu": (1, 1), "residual": (3, kernel_rows // 3), "stream": (2, 3)}
    lengths |= {"norm": (2, kernel_rows // 2), "all": (3, 1)}
    kinds = KINDS if kernel_rows in cuda.NORMED_ROWS else KINDS[:4]
    for N in (3, 128, 139):
        for kind in kinds:
            arguments, options = arguments_of(*lengths[kind], N, K, kind, dtype)
            launch = {"kernel_rows": kernel_rows, "splits": splits}
            actual = run_linear(library, **arguments, **options, **launch)
            assert_accurate(actual, arguments, **options)
            others = run_linear(library, **arguments, **options, **launch, last_first=True)
            assert all(torch.equal(*pair) for pair in zip(actual, others, strict=True))


@pytest.mark.parametrize("rows, kind", [*((n, "residual") for n in range(1, 33)), *((n, "norm") for n in range(1, 9))])
def test_rings_of_the_source_turn_over(library, rows, kind):
    """Longer sums than the rings hold, by the blocks of a launch; the kernel that Python chooses for so many rows."""
    arguments, options = arguments_of(1, rows, 70, 1160, kind)
    for splits, last_first in ((0, True), (1, False)):
        launch = {"splits": splits, "last_first": last_first}
        assert_accurate(run_linear(library, **arguments, **options, **launch), arguments, **options)


@pytest.mark.parametrize("kernel_rows", cuda.ROWS)
@pytest.mark.parametrize("rows", [1, 5])
def test_rings_turn_over_with_fewer_rows_than_the_kernel_has(library, kernel_rows, rows):
    arguments, options = arguments_of(1, rows, 70, 1160, "norm" if kernel_rows in cuda.NORMED_ROWS else "stream")
    for last_first in (False, True):
        launch = {"kernel_rows": kernel_rows, "splits": 1, "last_first": last_first}
        assert_accurate(run_linear(library, **arguments, **options, **launch), arguments, **options)


@pytest.mark.parametrize("images, length, kind", [(8, 1, "all"), (4, 2, "all"), (2, 3, "all"), (6, 5, "stream")])
def test_vectors_are_those_of_their_image(library, images, length, kind):
    arguments, options = arguments_of(images, length, 66, 328, kind)
    assert_accurate(run_linear(library, **arguments, **options), arguments, **options)


def test_norms_are_of_the_statistics_given(library):
    """Of each row those of all its tiles, the last of which is short: any other row's, and any tile's, would show."""
    arguments, options = arguments_of(1, 8, 8, 712, "norm")
    statistics = reference.statistics(arguments["x"])
    expected, _ = run_linear(library, **arguments, **options)
    for row, tile in ((0, 0), (4, 5), (7, 11)):
        for moment, change in ((0, 3.0), (1, 500.0)):
            changed = statistics.clone()
            changed[0, row, tile, moment] += change
            actual, _ = run_linear(library, **arguments, **options, statistics=changed)
            same = torch.ones(8, dtype=torch.bool)
            same[row] = False
            assert torch.equal(actual[0, same], expected[0, same])
            assert not torch.equal(actual[0, row], expected[0, row])


@pytest.mark.parametrize("rows", [2, 5, 8])
def test_norms_of_more_tiles_than_are_read_together(library, rows):
    arguments, options = arguments_of(1, rows, 8, 3400, "norm")
    arguments["x"][..., 3200:] += 30
    assert_accurate(run_linear(library, **arguments, **options), arguments, **options)


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_norms_of_numbers_far_from_zero(library, size):
    """Deviations that are a thousandth of the mean, and one tile far from the others: no bits are lost in sums."""
    generator = torch.Generator().manual_seed(0)
    arguments, options = arguments_of(1, 8, 40, 1160, "norm")
    arguments["x"] = size * (1000 + torch.randn(1, 8, 1160, generator=generator))
    arguments["x"][0, 3, :64] += 300 * size
    arguments["x"][0, 4, 1152:] += 300 * size
    assert_accurate(run_linear(library, **arguments, **options), arguments, **options)


# N and K in widths of the layers of a block
LAYERS = {"qkv": (3, 1, "norm"), "proj": (1, 1, "residual"), "fc1": (4, 1, "all"), "fc2": (1, 4, "residual")}


@pytest.mark.parametrize("width", [1024, 1536, 1920, 2304])
@pytest.mark.parametrize(
    "layer, rows", [(layer, rows) for layer in LAYERS for rows in ((2, 8) if layer in ("qkv", "fc1") else (2, 18, 32))]
)
def test_published_sums_of_the_source(library, layer, width, rows):
    """K of the published widths, some features: the last blocks of a layer, as many to a cluster as it has."""
    N, K, kind = LAYERS[layer]
    splits = library.linear_splits_of(N * width // 64, K * width // 64, 132)
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
@pytest.mark.parametrize("K, last_first", [(8, False), (1536, True), (8192, False)])
def test_norm_of_the_source(library, float_x, K, last_first, dtype):
    images, length = 2, 3
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(images, length, K, generator=generator) + 50).to(torch.float32 if float_x else dtype)
    scale, shift = (0.5 * torch.randn(images, 1, 3 * K, generator=generator)).to(dtype).split((K, 2 * K), dim=-1)
    shift, h = shift[..., K:], torch.full((images, length, K), math.nan, dtype=dtype)
    strides = scale.stride(0), shift.stride(0)
    params = NormParams(*(address(t) for t in (x, scale, shift, h)), *strides, K, length, 1e-6, float_x)
    failure = library.norm_rows_on_cpu(ctypes.byref(params), dtype == torch.bfloat16, images * length, last_first)
    assert failure is None, failure.decode()
    norm = torch.nn.functional.layer_norm(x.double(), (K,), eps=1e-6)
    expected = norm * (1 + scale.double()) + shift.double()
    eps = torch.finfo(dtype).eps
    assert (h.double() - expected).abs().max() <= eps * expected.abs().max() and h.isfinite().all()


def test_statistics_combine_to_those_of_the_rows():
    """The reference's, of tiles of any length: mean and variance of torch."""
    x = torch.randn(2, 3, 200, dtype=torch.float64) + 5
    means, squares = reference.statistics(x).unbind(-1)
    sizes = torch.tensor([64, 64, 64, 8])
    mean = (means * sizes).sum(-1) / 200
    variance = (squares + sizes * (means - mean[..., None]) ** 2).sum(-1) / 200
    torch.testing.assert_close(mean, x.mean(-1))
    torch.testing.assert_close(variance, x.var(-1, unbiased=False))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"weight": torch.zeros(4, 32)}, "weights are float16 or bfloat16"),
        ({"x": torch.zeros(1, 33, 32).bfloat16()}, "at most 32, got 33"),
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
