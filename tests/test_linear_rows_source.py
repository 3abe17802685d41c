"""csrc/linear_rows.cuh, as it stands, run on the CPU by the emulation of cuda_on_cpu/: index maps and arithmetic.

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

WARPS, FEATURES, STEPS_AT_ONCE = 8, 16, 4  # of csrc/linear_rows.cuh


def fields(*names):
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "b": ctypes.c_bool, "f": ctypes.c_float}
    return [(name, kinds[kind]) for kind, *group in names for name in group]


class LinearParams(ctypes.Structure):
    """LinearRowsParams of csrc/params.h."""

    _fields_ = fields(
        ("p", "x", "weight", "bias", "residual", "gate", "y"),
        ("l", "gate_stride"),
        ("i", "num_rows", "num_inputs", "num_outputs", "image_rows"),
        ("b", "float_residual", "gelu"),
    )


class NormParams(ctypes.Structure):
    """NormRowsParams of csrc/params.h."""

    _fields_ = fields(
        ("p", "x", "scale", "shift", "h"),
        ("l", "scale_stride", "shift_stride"),
        ("i", "num_inputs", "image_rows"),
        ("f", "eps"),
        ("b", "float_x"),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    loaded = kernel_on_cpu.build(tmp_path_factory.mktemp("linear_rows"), "linear_rows")
    loaded.linear_rows_on_cpu.restype = loaded.norm_rows_on_cpu.restype = ctypes.c_char_p
    return loaded


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def arguments_of(images, length, N, K, stream=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*size, dtype=torch.bfloat16):
        return torch.randn(*size, generator=generator).to(dtype)

    return {
        "x": draw(images, length, K),
        "weight": draw(N, K) / K**0.5,
        "bias": draw(N),
        "residual": draw(images, length, N, dtype=stream),
        "gate": draw(images, 1, 2 * N)[..., N:],
    }


def run_linear(library, kernel_rows, x, weight, bias=None, residual=None, gate=None, gelu=False, last_warp_first=False):
    """y, prefetches and late loads; NaN where nothing is written, and behind y."""
    rows, N = x.shape[:-1].numel(), weight.shape[0]
    dtype = x.dtype if residual is None else residual.dtype
    storage = torch.full((rows * N + 1000,), math.nan, dtype=dtype)
    params = LinearParams(
        *(address(t) for t in (x, weight, bias, residual, gate, storage)),
        *(0 if gate is None else gate.stride(0), rows, x.shape[-1], N, x.shape[1]),
        *(residual is not None and residual.dtype == torch.float32, gelu),
    )
    counts = (ctypes.c_long * 2)()
    failure = library.linear_rows_on_cpu(ctypes.byref(params), kernel_rows, last_warp_first, counts)
    assert failure is None, failure.decode()
    assert storage[rows * N :].isnan().all()
    return storage[: rows * N].view(*x.shape[:-1], N), *counts


def assert_accurate(actual, arguments, **options):
    exact = {name: value.double() for name, value in arguments.items()}
    expected = linear(**exact, **options, impl="reference")
    eager = linear(**arguments, **options, impl="reference")
    assert actual.dtype == eager.dtype and actual.isfinite().all()
    error, allowed = ((y.double() - expected).norm() for y in (actual, eager))
    assert error <= 2 * allowed + torch.finfo(eager.dtype).eps * expected.norm()


@pytest.mark.parametrize("kernel_rows", cuda.ROWS)
@pytest.mark.parametrize("K", [32, 224, 1920])
@pytest.mark.parametrize("N", [16, 41])
def test_product_of_the_source(library, kernel_rows, K, N):
    """Fewer rows than the tile has and all of them; fewer steps than warps, and several rounds."""
    shapes = ((1, 1, "plain"), (1, kernel_rows, "gelu"), (3, kernel_rows // 4, "residual"), (2, 3, "stream"))
    for images, length, kind in shapes:
        arguments = arguments_of(images, length, N, K, torch.bfloat16 if kind == "stream" else torch.float32)
        if kind in ("plain", "gelu"):
            del arguments["residual"], arguments["gate"]
        if kind == "plain":
            del arguments["bias"]
        options = {"gelu": True} if kind == "gelu" else {}
        actual, prefetches, late = run_linear(library, kernel_rows, **arguments, **options)
        assert_accurate(actual, arguments, **options)
        assert torch.equal(actual, run_linear(library, kernel_rows, **arguments, **options, last_warp_first=True)[0])
        # What registers hold at first is read before the wait, the rest is on its way to the L2 cache, in whole lines.
        features = -(-N // FEATURES) * FEATURES
        ahead = min(K, 32 * WARPS * STEPS_AT_ONCE)
        assert prefetches == features * -(-(K - ahead) // 64)
        assert late == features * (K - ahead) // 8


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("K", [32, 1536, 8192])
def test_norm_of_the_source(library, stream, K):
    images, length = 2, 3
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(images, length, K, generator=generator) + 50).to(stream)
    scale, shift = (0.5 * torch.randn(images, 1, 3 * K, generator=generator)).bfloat16().split((K, 2 * K), dim=-1)
    shift, h = shift[..., K:], torch.full((images, length, K), math.nan, dtype=torch.bfloat16)
    strides = scale.stride(0), shift.stride(0)
    params = NormParams(*(address(t) for t in (x, scale, shift, h)), *strides, K, length, 1e-6, stream == torch.float32)
    failure = library.norm_rows_on_cpu(ctypes.byref(params), images * length, False)
    assert failure is None, failure.decode()
    norm = torch.nn.functional.layer_norm(x.double(), (K,), eps=1e-6)
    expected = norm * (1 + scale.double()) + shift.double()
    assert (h.double() - expected).abs().max() <= 2**-8 * expected.abs().max() and h.isfinite().all()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"weight": torch.zeros(4, 32)}, "weights are float16 or bfloat16"),
        ({"x": torch.zeros(1, 17, 32).bfloat16()}, "at most 16, got 17"),
        ({"x": torch.zeros(1, 2, 48).bfloat16(), "weight": torch.zeros(4, 48).bfloat16()}, "multiple of 32"),
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
