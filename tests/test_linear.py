"""The linear operator: the kernel for few rows and cuBLAS's epilogue against float64 by the one rule of accuracy."""

import pytest
import torch
import torch.nn.functional as F

from hmar_kernels import linear
from hmar_kernels.linear import triton as kernels

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels run there")
# rows, N, K
SHAPES = {"one row": (1, 40, 70), "odd": (7, 33, 129), "full tile": (16, 32, 256), "blocks": (70, 48, 300)}
PUBLISHED = {f"{rows} of d16": (rows, 3072, 1024) for rows in (1, 2, 18, 64, 128)} | {"wide": (32, 1920, 7680)}


def inputs(shape, dtype, device="cpu"):
    rows, N, K = shape
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator) for s in ((rows, K), (N, K), (N,)))
    return [t.to(device, dtype) for t in (x, weight / K**0.5, bias)]


def assert_accurate(shape, dtype, impl, gelu, biased, device="cpu"):
    x, weight, bias = inputs(shape, dtype, device)
    bias = bias if biased else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    expected = F.gelu(expected, approximate="tanh") if gelu else expected
    eager = F.linear(x, weight, bias)
    eager = F.gelu(eager, approximate="tanh") if gelu else eager
    actual = linear(x[None], weight, bias, gelu=gelu, impl=impl)
    assert actual.dtype == dtype and actual.shape == (1, *expected.shape) and actual.isfinite().all()
    error, allowed = ((y.double() - expected).norm() for y in (actual[0], eager))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * expected.norm()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("gelu, biased", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_under_the_interpreter(name, gelu, biased, dtype, poisoned_memory):
    assert_accurate(SHAPES[name], dtype, "triton", gelu, biased)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("gelu, biased", [(False, False), (False, True), (True, True), (True, False)])
@pytest.mark.parametrize("impl", ["triton", "cublas"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), *PUBLISHED.values()], ids=str)
def test_implementations_on_a_gpu(shape, impl, gelu, biased, dtype, poisoned_memory):
    assert_accurate(shape, dtype, impl, gelu, biased, "cuda")


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    x, weight, bias = inputs(SHAPES["odd"], torch.bfloat16, "cuda")
    for impl in ("triton", "cublas"):
        compiled = torch.compile(lambda x, impl=impl: linear(x, weight, bias, gelu=True, impl=impl), fullgraph=True)
        torch.testing.assert_close(compiled(x), linear(x, weight, bias, gelu=True, impl=impl), rtol=2e-2, atol=1e-2)


def test_auto_on_the_cpu_is_the_layer():
    x, weight, bias = (t.requires_grad_() for t in inputs(SHAPES["odd"], torch.float64))
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.autograd.gradcheck(lambda *t: linear(*t, gelu=True), (x[:2, :4], weight[:3, :4], bias[:3]))


def test_tiles_suit_the_rows():
    assert [kernels.select_tile(rows).block_m for rows in (1, 16, 17, 32, 33, 200)] == [16, 16, 32, 32, 64, 64]
    for tile in kernels.TILES.values():
        assert 2 * tile.stages * tile.block_k * (tile.block_m + tile.block_n) <= 227 << 10, "shared memory of an SM"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 5)}, r"got \[3, 5\] and \[2, 4\]"),
        ({"bias": torch.zeros(3)}, r"bias must be \[2\]"),
        ({"x": torch.zeros(3, 4).half()}, "of one floating dtype"),
        ({"impl": "cutlass"}, "unknown impl"),
        ({"impl": "cublas"}, "needs a CUDA device"),
        ({"impl": "triton", "weight": torch.zeros(2, 4, requires_grad=True)}, "no derivative"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"x": torch.zeros(3, 4), "weight": torch.zeros(2, 4), "bias": torch.zeros(2)} | change
    with pytest.raises(ValueError, match=message):
        linear(**arguments)
